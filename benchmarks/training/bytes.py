"""Peak bytes of our step against Hugging Face's Trainer with PEFT: two optimizer steps on the heaviest batch, the bytes of every
tensor counted in the same way on both sides, weights among them."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import peer
from benchmarks.training.models import llama
from benchmarks.training.speed import CASES, SHARED, lengths, recipe_of, rows_of
from training import schedule
from training.meter import count_bytes
from training.model import describe
from training.recipe import DataConfig, Job
from training.run import probe_bytes
from training.world import World


def case(name: str, model: str, data: str, longest: int) -> dict[str, Any]:
    """Returns the peaks of one model on rows of one data set's lengths."""
    recipe = recipe_of(model, 2, longest).model_copy(update={"steps": 2})
    rows = rows_of(lengths(data), longest, vocabulary=describe(model).vocabulary, count=512)
    planned = schedule.plan(recipe.model_copy(update={"steps": 16}), rows, workers=1)
    heaviest = schedule.heaviest(planned, rows, World(), packed=False)  # the one that costs the Trainer most, and us little less
    chosen = planned.order[heaviest * planned.batch : (heaviest + 1) * planned.batch]
    planned = replace(planned, steps=2, order=chosen * 2)
    mine = probe_bytes(Job(recipe=recipe, data=DataConfig(train="none")), describe(model), planned, rows, World(), "cpu")
    gc.collect()
    trainer, _ = peer.trainer_of(recipe, rows, planned, grouped=False, warm=1)
    with count_bytes([*trainer.model.parameters(), *trainer.model.buffers()]) as counter:
        trainer.train()
    return {"case": f"{name} {data}", "ratio": round(mine / counter.peak, 3), "ours": mine, "trainer": counter.peak}


def measure(quick: bool) -> dict[str, Any]:
    """Returns the largest ratio over all cases, and every case."""
    torch.set_num_threads(1)
    if not lengths("gsm8k"):
        return {"skipped": f"no rows in {SHARED}"}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"embedded": "embedded"} | ({} if quick else {"medium": llama("medium", Path(folder))})
        for name, model in models.items():
            for data in ("wikisql_mini", "gsm8k"):
                found.append(case(name, model, data, CASES[name][1]))
    return {"peak_bytes_ratio": max(each["ratio"] for each in found), "bytes": found}
