"""Two workers, plain and with ZeRO, come to what one worker comes to. One group of two processes runs everything."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training import checkpoint, evaluate, loop, memory, schedule
from training.data import prepare, read, sample
from training.model import describe, load_model, load_tokenizer
from training.recipe import EvaluationConfig, Job, Limits
from training.world import World

ZERO = importlib.util.find_spec("deepspeed") is not None
needs_zero = pytest.mark.skipif(not ZERO, reason="needs deepspeed")


def jobs(make_job) -> dict[str, Job]:
    # Row lengths differ, the batch is cut into forwards of 3 and 1, and the middle report is scored.
    usual = {"steps": 4, "rank": 64, "batch_size": 8, "micro_batch": 3, "evaluation": EvaluationConfig(reports=2, rows=13)}
    found = {
        "plain": make_job(**usual),
        "four bits": make_job(**usual, bits=4),
        "full": make_job(**usual, adapter="full", learning_rate=1e-3),
        "stopped": make_job(**usual),
        "limit": make_job(**usual, limits=Limits(seconds=1e-9)),
        "diverged": make_job(**(usual | {"steps": 40}), model="embedded", learning_rate=1e3, warmup=0),
    }
    if ZERO:
        found |= {"zero 1 lora plus": make_job(**usual, zero_stage=1, lora_plus_ratio=8)}
        found |= {"zero 2 dora": make_job(**usual, zero_stage=2, adapter="dora")}
        found |= {"zero 3": make_job(**usual, zero_stage=3)}
        found |= {"zero 3 full": make_job(**usual, zero_stage=3, adapter="full", learning_rate=1e-3)}
    return found


def predicted(job: Job, world: World) -> int:
    """Returns the peak bytes predicted for the row lengths that the probe meets."""
    rows = prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length).train
    planned = schedule.plan(job.recipe, rows, workers=world.size)
    step = schedule.heaviest(planned, rows, world, packed=True)
    forwards = schedule.loads(planned.micro_batches(step, world.rank, world.size), rows, packed=True)
    return memory.predict(job.recipe, describe(job.recipe.model), workers=world.size, forwards=forwards).total


def work(rank: int, port: int, folder: str) -> None:
    """Runs every job as one of two workers and writes down what came out."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": "2"}  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = World.join()
    found: dict = {
        "collectives": [world.total(rank + 1), world.largest(rank), world.agree(f"worker {rank}"),
                        world.gather({"rows": list(range(7))[rank::2]})],
    }  # fmt: skip
    for name, raw in json.loads((Path(folder) / "jobs.json").read_text()).items():
        # Only the main worker wants to stop; what the other one says does not count.
        wish = "by the main worker" if rank == 0 else None if name == "stopped" else "by the other worker"
        counts = []

        def report(progress, name=name, wish=wish, counts=counts):
            counts.append(progress.step)
            return wish if (name == "stopped" or rank == 1) and progress.step >= 2 else None

        job = Job.model_validate(raw)
        found[name] = loop.train(job, report).model_dump(mode="json")
        found[name] |= {"reports": counts, "predicted": world.largest(predicted(job, world))}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def both(make_job, tmp_path_factory) -> list[dict]:
    """What each of the two workers came to, by job."""
    folder = tmp_path_factory.mktemp("workers")
    output = {name: str(folder / name) for name in ("plain", "zero 3", "zero 3 full")}
    raw = {name: job.model_dump(mode="json") | {"output": output.get(name)} for name, job in jobs(make_job).items()}
    (folder / "jobs.json").write_text(json.dumps(raw))
    torch.multiprocessing.spawn(work, (free_port(), str(folder)), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(make_job):
    """The same jobs on one worker."""
    done: dict = {}

    def outcome(name: str):
        job = jobs(make_job)[name]
        recipe = job.recipe.model_copy(update={"zero_stage": 0})
        if (said := recipe.model_dump_json()) not in done:
            done[said] = loop.train(job.model_copy(update={"recipe": recipe}))
        return done[said]

    return outcome


ZEROS = ("zero 1 lora plus", "zero 2 dora", "zero 3", "zero 3 full")
CASES = ["plain", "four bits", "full", *(pytest.param(name, marks=needs_zero) for name in ZEROS)]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_come_to_what_one_comes_to(both, alone, name):
    one = alone(name)
    for found in (worker[name] for worker in both):
        assert (found["ended"], found["share"], found["tokens"]) == ("complete", 1.0, one.tokens)
        assert found["loss"] == pytest.approx(one.loss, abs=1e-4)
        assert found["conditions"]["workers"] == 2 and found["conditions"]["micro_batch"] == 3
        assert found["conditions"]["right"] == one.conditions["right"]  # row by row, in the rows' own order
        assert found["trainable"] == one.trainable
        assert found["reports"][-1] == 4


@pytest.mark.parametrize("name", CASES)
def test_both_workers_agree_on_what_was_measured(both, name):
    first, second = both[0][name], both[1][name]
    assert first["seconds"] == second["seconds"] > 0 and first["peak_bytes"] == second["peak_bytes"] > 0
    assert first["scores"] == second["scores"] and first["reports"] == second["reports"]


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_predicted_within_a_tenth(both, name):
    assert both[0][name]["predicted"] == pytest.approx(both[0][name]["peak_bytes"], rel=0.1)


def test_only_the_main_worker_writes_the_adapter(both):
    assert both[0]["plain"]["checkpoint"] is not None and both[1]["plain"]["checkpoint"] is None


@needs_zero
@pytest.mark.parametrize("name", ["zero 3", "zero 3 full"])
def test_what_stage_3_cut_into_parts_is_written_whole(both, make_job, name):
    job, found = jobs(make_job)[name], both[0][name]
    model = checkpoint.load_adapter(load_model(job.recipe), found["checkpoint"])
    prepared = prepare(read(job.data), job.data, load_tokenizer(job.recipe), job.recipe.max_length)
    held_out = sample(prepared.validation, job.evaluation.rows, seed=0)
    nll, tokens, _ = evaluate.response_scores(model, held_out.ids, held_out.prompt_lengths, batch_size=8)
    assert sum(nll) / sum(tokens) == pytest.approx(found["loss"], abs=1e-4)
    assert both[1][name]["checkpoint"] is None


def test_the_main_worker_decides_when_to_stop_for_all(both):
    for worker in both:
        found = worker["stopped"]
        assert (found["ended"], found["reason"], found["share"]) == ("stopped", "by the main worker", 0.5)
        assert found["reports"][-1] == 2


def test_limits_and_divergence_end_all_workers_alike(both):
    for worker in both:
        assert worker["limit"]["ended"] == "infeasible" and "seconds are over" in worker["limit"]["reason"]
        assert worker["diverged"]["ended"] == "diverged"
    assert both[0]["diverged"]["reason"] == both[1]["diverged"]["reason"]


def test_collectives_are_over_all_workers(both):
    for worker in both:
        assert worker["collectives"] == [3, 1, "worker 0", {"rows": list(range(7))}]


def test_one_worker_needs_no_group():
    world = World.join()
    assert world == World(0, 1)
    assert (world.total(2.5), world.largest(2.5), world.agree("x"), world.gather({"a": [1]})) == (2.5, 2.5, "x", {"a": [1]})
