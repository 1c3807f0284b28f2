"""What several workers change in the result: nothing. DDP and ZeRO 1, 2 and 3 on two workers against one worker, in fp32.

    python -m benchmarks.training.zero [--quick]

The same rows, in the same order, with the same initial weights; what may differ is the order in which numbers are added up. The
batch is cut into forwards of unequal size, so that accumulation is looked at too.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from training import loop
from training.recipe import DataConfig, EvaluationConfig, Job, Recipe

FORMS = {"ddp": 0, "zero 1": 1, "zero 2": 2, "zero 3": 3}
METHODS = {"lora": {"rank": 16}, "dora": {"adapter": "dora", "rank": 16}, "full": {"adapter": "full", "learning_rate": 1e-3}}
FILES = {name: f"embedded:{name}.jsonl" for name in ("train", "validation", "test")}
DATA = DataConfig(**FILES, template="{instruction}\nAnswer:")


def job(method: str, stage: int, steps: int) -> Job:
    """Returns what is trained: the embedded model on its task."""
    fields = {"learning_rate": 1e-2, "dropout": 0, "batch_size": 8, "micro_batch": 3, "max_length": 64} | METHODS[method]
    return Job(data=DATA, evaluation=EvaluationConfig(reports=1, rows=64), recipe=Recipe(**fields, steps=steps, zero_stage=stage))


def measure(quick: bool) -> dict:
    """Returns `zero_loss_gap`, the largest difference of final validation losses (nats per token), and all losses."""
    methods, steps = (["lora"], 3) if quick else (list(METHODS), 24)
    jobs = {f"{method} {form}": job(method, stage, steps) for method in methods for form, stage in FORMS.items()}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jobs.json").write_text(json.dumps({name: each.model_dump(mode="json") for name, each in jobs.items()}))
        torch.multiprocessing.spawn(_work, (_free_port(), folder), nprocs=2)
        two = json.loads((Path(folder) / "losses.json").read_text())
    torch.set_num_threads(1)
    rows = []
    for method in methods:
        alone = loop.train(job(method, 0, steps)).loss
        rows += [{"method": method, "workers": form, "loss": two[f"{method} {form}"], "alone": alone,
                  "gap": abs(two[f"{method} {form}"] - alone)} for form in FORMS]  # fmt: skip
    return {"zero_loss_gap": max(row["gap"] for row in rows), "steps": steps, "losses": rows}


def _work(rank: int, port: int, folder: str) -> None:
    """Trains every job as one of two workers; the first writes the losses down."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": "2"}  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=2)
    jobs = json.loads((Path(folder) / "jobs.json").read_text())
    losses = {name: loop.train(Job.model_validate(raw)).loss for name, raw in jobs.items()}
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="LoRA alone, three steps")
    print(json.dumps(measure(parser.parse_args().quick), indent=1))
