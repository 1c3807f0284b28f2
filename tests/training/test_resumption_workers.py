"""A run goes on with another number of workers, plain or with ZeRO. Groups of two processes, and this one alone."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training import loop
from training.recipe import EvaluationConfig, Job, Pause, Resources

ZERO = importlib.util.find_spec("deepspeed") is not None and shutil.which("g++") is not None
STEPS, HALF = 6, 3
STAGES = (0, 1, 2) if ZERO else (0,)
CASES = [("alone", 0), (0, "alone"), (0, 0)] + ([("alone", 2), (1, "alone"), (1, 1), (2, 1), (2, 2)] if ZERO else [])


def made(make_job, folder: Path, stage) -> Job:
    return make_job(steps=STEPS, rank=16, batch_size=8, micro_batch=3, evaluation=EvaluationConfig(reports=2, rows=13),
                    zero_stage=0 if stage == "alone" else stage, resume=str(folder), resources=Resources(save=1e9))  # fmt: skip


def run(job: Job, stop: int | None) -> dict:
    curve = []

    def report(progress):
        curve.append([progress.step, progress.metrics["train_loss"]])
        return Pause("wait") if progress.step == stop else None

    return loop.train(job, report).model_dump(mode="json") | {"curve": curve}


def work(rank: int, port: int, folder: str, part: str) -> None:
    """Runs every job of a part as one of two workers."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": "2"}  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    asked = json.loads((Path(folder) / f"{part}.json").read_text())
    found = {name: run(Job.model_validate(raw), HALF if part == "first" else None) for name, raw in asked.items()}
    (Path(folder) / f"{part}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def in_pairs(folder: Path, part: str, jobs: dict[str, Job]) -> dict[str, dict]:
    (folder / f"{part}.json").write_text(json.dumps({name: job.model_dump(mode="json") for name, job in jobs.items()}))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder), part), nprocs=2)
    first, second = (json.loads((folder / f"{part}-{rank}.json").read_text()) for rank in (0, 1))
    assert {n: f["curve"] for n, f in first.items()} == {n: f["curve"] for n, f in second.items()}
    return first


@pytest.fixture(scope="module")
def parts(make_job, tmp_path_factory):
    """Returns the first and the second half of each case, and whole runs."""
    folder = tmp_path_factory.mktemp("halves")
    firsts = {str(stage): made(make_job, folder / f"first-{stage}", stage) for stage in ("alone", *STAGES)}
    pairs = {name: job for name, job in firsts.items() if name != "alone"}
    wholes = {f"whole {name}": job.model_copy(update={"resume": None}) for name, job in pairs.items()}
    done = {"alone": run(firsts["alone"], HALF)} | in_pairs(folder, "first", pairs)
    seconds = {}
    for before, after in CASES:
        copy = folder / f"{before}-{after}"
        shutil.copytree(firsts[str(before)].resume, copy)
        seconds[f"{before} {after}"] = made(make_job, copy, after)
    alone = {name: run(job, None) for name, job in seconds.items() if name.endswith(" alone")}
    paired = {name: job for name, job in seconds.items() if not name.endswith(" alone")}
    finished = alone | in_pairs(folder, "second", paired | wholes)
    finished["whole alone"] = run(firsts["alone"].model_copy(update={"resume": None}), None)
    return done, finished


@pytest.mark.parametrize(("before", "after"), CASES)
def test_the_loss_curve_is_that_of_an_uninterrupted_run(parts, before, after):
    firsts, finished = parts
    first, second, whole = firsts[str(before)], finished[f"{before} {after}"], finished["whole alone"]
    assert (first["ended"], second["ended"], second["conditions"]["resumed_at"]) == ("paused", "complete", HALF)
    curve = first["curve"] + second["curve"]
    assert [step for step, _ in curve] == [step for step, _ in whole["curve"]]
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in whole["curve"]], abs=1e-4)
    assert second["loss"] == pytest.approx(whole["loss"], abs=1e-4) and second["tokens"] == whole["tokens"]


@pytest.mark.parametrize("stage", STAGES)
def test_on_as_many_workers_it_is_so_to_the_bit(parts, stage):
    firsts, finished = parts
    second, whole = finished[f"{stage} {stage}"], finished[f"whole {stage}"]
    assert firsts[str(stage)]["curve"] + second["curve"] == whole["curve"]
    assert (second["loss"], second["scores"]) == (whole["loss"], whole["scores"])
