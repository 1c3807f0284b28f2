"""How long `suggest` takes at some lengths of the history: mixed space of six dimensions, three objectives, eight running."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.search import problems
from hpo.algorithms import load
from hpo.objectives import named
from hpo.space import Space
from hpo.trial import Trial
from training.recipe import Outcome

SPACE = Space(
    {
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
        "rank": {"type": "int", "low": 2, "high": 128, "log": True},
        "alpha": {"type": "float", "low": 0.5, "high": 4.0, "times": "rank"},
        "batch_size": {"type": "int", "low": 4, "high": 64, "step": 4},
        "bits": {"type": "choice", "values": [16, 8, 4]},
        "gradient_checkpointing": {"type": "choice", "values": [True, False]},
    }
)
OBJECTIVES = named(["accuracy", "seconds", "peak_bytes"])
RUNNING = 8


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns the median milliseconds of bayes at 1,000 trials, and a table of all algorithms."""
    import torch

    torch.set_num_threads(1)
    lengths, repeats = ((50, 100), 2) if quick else ((50, 100, 200, 500, 1000), 9)
    rows = []
    for name in ("bayes", "nsga2", "random", "grid"):
        row: dict[str, Any] = {"algorithm": name}
        for length in lengths:
            history = _history(length)
            took = []
            for repeat in range(repeats + 1):
                began = time.perf_counter()
                load(name)(SPACE, OBJECTIVES, history, Random(repeat))
                took.append(1000 * (time.perf_counter() - began))
            row[str(length)] = round(statistics.median(took[1:]), 1)  # the first one imports
        rows.append(row)
    return {"suggest_ms_1000": max(row[str(lengths[-1])] for row in rows), "suggest_ms": rows}


def _history(length: int) -> list[Trial]:
    rng, history = Random(0), []
    for number in range(length + RUNNING):
        point = SPACE.sample(rng)
        accuracy = 0.9 - abs(point["rank"] - 16) / 200 - rng.random() / 20
        seconds, peak = 100 / point["batch_size"] + point["rank"] / 8, int(1e9 * (point["bits"] / 8 + point["batch_size"] / 32))
        if number >= length:
            trial = Trial.model_construct(number=number, params=point, recipe=problems.RECIPE, state="running", outcome=None)
        elif peak > 3.6e9:
            trial = problems.trial(number, point, Outcome(ended="infeasible", share=0.0, peak_bytes=peak))
        else:
            trial = problems.trial(number, point, Outcome(scores={"accuracy": accuracy}, seconds=seconds, peak_bytes=peak))
        history.append(trial)
    return history
