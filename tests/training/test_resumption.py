"""A run that was interrupted goes on as if nothing had happened, from the newest checkpoint that is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import artifact, preemption
from training.loop import train
from training.recipe import EvaluationConfig, Job, Pause, Resources

USUAL = {"steps": 8, "batch_size": 4, "micro_batch": 3, "evaluation": EvaluationConfig(reports=2, rows=8)}


@pytest.fixture
def job(make_job, tmp_path):
    """Returns a job whose checkpoints lie in the test's own folder."""
    return lambda **given: make_job(**USUAL | {"resume": str(tmp_path / "resume"), "resources": Resources(save=1e9)} | given)


def told(job: Job, stop=lambda progress: None):
    """Returns outcome and curve: (step, tokens, metrics) of each report."""
    curve = []

    def report(progress):
        curve.append((progress.step, progress.tokens, progress.metrics))
        return stop(progress)

    return train(job, report), curve


def at(step: int):
    return lambda progress: Pause("wait") if progress.step == step else None


def steps(job: Job) -> list[str]:
    return sorted(path.name for path in Path(job.resume).glob("[!.]*"))


def same(outcome, whole) -> None:
    fields = ("ended", "share", "scores", "loss", "tokens", "peak_bytes", "trainable")
    assert [getattr(outcome, name) for name in fields] == [getattr(whole, name) for name in fields]
    assert outcome.conditions["right"] == whole.conditions["right"]


METHODS = [
    {"dropout": 0.1}, {"adapter": "dora", "precision": "bf16"}, {"adapter": "adalora", "steps": 16, "dropout": 0.1},
    {"adapter": "full", "weight_decay": 0.1, "learning_rate": 1e-3}, {"optimizer": "adamw_8bit", "rank": 64, "bits": 4},
    {"precision": "fp16", "lora_plus_ratio": 4},
]  # fmt: skip


@pytest.mark.parametrize("fields", METHODS, ids=str)
def test_the_loss_curve_is_that_of_an_uninterrupted_run_to_the_bit(job, fields):
    made = job(**fields)
    whole, curve = told(made.model_copy(update={"resume": None}))
    first, one = told(made, at(made.recipe.steps // 2))
    assert (first.ended, first.reason, first.checkpoint) == ("paused", "wait", None)
    second, other = told(made)
    assert one + other == curve, "and no report comes twice"
    same(second, whole)
    assert second.conditions["resumed_at"] == made.recipe.steps // 2
    assert second.seconds > first.seconds, "the parts add up"


def test_a_run_that_is_shorter_than_the_time_between_two_checkpoints_writes_none(job):
    assert train(job()).ended == "complete" and steps(job()) == []


def test_the_last_two_checkpoints_are_kept_and_a_stop_for_good_writes_none(job):
    outcome, _ = told(job(resources=Resources(save=0)), lambda progress: "not promising" if progress.step == 6 else None)
    assert outcome.ended == "stopped" and steps(job()) == ["step-00000004", "step-00000005"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "flipped weights": lambda newest: flip(newest / "weights.safetensors"),
    "torn optimizer": lambda newest: os.truncate(newest / "optimizer.safetensors", 100),
    "no manifest": lambda newest: (newest / "manifest.json").unlink(),
    "torn manifest": lambda newest: os.truncate(newest / "manifest.json", 100),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_used(job, harm):
    whole = train(job(resume=None))
    told(job(resources=Resources(save=0)), at(5))
    HARM[harm](Path(job().resume) / steps(job())[-1])
    outcome = train(job())
    same(outcome, whole)
    assert outcome.conditions["resumed_at"] == 4
    (said,) = outcome.conditions["refused_checkpoints"]
    assert said.startswith("step-00000005: ")


def test_where_all_are_damaged_the_run_begins_anew_and_says_why(job):
    told(job(resources=Resources(save=0)), at(3))
    for name in steps(job()):
        flip(Path(job().resume) / name / "state.json")
    outcome = train(job())
    same(outcome, train(job(resume=None)))
    assert "resumed_at" not in outcome.conditions and len(outcome.conditions["refused_checkpoints"]) == 2


def test_the_checkpoint_of_another_recipe_or_other_rows_is_not_used(job):
    told(job(), at(2))
    outcome = train(job(learning_rate=2e-2))
    same(outcome, train(job(resume=None, learning_rate=2e-2)))
    assert outcome.conditions["refused_checkpoints"] == ["step-00000002: of another recipe or other rows"]
    assert train(job(rows="all")).conditions["refused_checkpoints"]


def test_how_a_batch_is_cut_into_forwards_may_change_on_the_way(job):
    whole = train(job(resume=None))
    told(job(), at(4))
    outcome = train(job(micro_batch=1))
    assert outcome.conditions["resumed_at"] == 4 and outcome.loss == pytest.approx(whole.loss, abs=1e-5)


def test_nothing_in_a_checkpoint_is_pickled(job):
    told(job(optimizer="adamw_8bit"), at(2))
    files = {path.name for path in (Path(job().resume) / "step-00000002").iterdir()}
    assert files == {"manifest.json", "state.json", "weights.safetensors", "optimizer.safetensors"}


def test_notice_leaves_a_checkpoint_at_the_next_step_and_takes_no_report_with_it(job):
    def stop(progress):
        preemption.notice()

    try:
        outcome, curve = told(job(evaluation=EvaluationConfig(reports=1, rows=8), steps=8), stop)
    finally:
        preemption.forget()
    assert outcome.ended == "paused" and "SIGTERM" in outcome.reason
    assert steps(job()) == [f"step-{outcome.share * 8:08.0f}"] and curve[-1][0] < 8


# Real processes, really killed

CHILD = """
import sys, json
from training import preemption
from training.loop import train
from training.recipe import Job
out = sys.argv[2]
with preemption.heeding():
    print("training", flush=True)
    outcome = train(Job.model_validate_json(open(sys.argv[1]).read()))
open(out, "w").write(outcome.model_dump_json())
"""


def launch(job: Job, folder: Path) -> subprocess.Popen:
    (folder / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-c", CHILD, str(folder / "job.json"), str(folder / "outcome.json")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def wait_for(job: Job, step: int, child: subprocess.Popen) -> None:
    until = time.monotonic() + 180
    while not [name for name in steps(job) if int(name[-8:]) >= step]:
        assert child.poll() is None and time.monotonic() < until, "ended before it could be killed"
        time.sleep(0.002)


def test_a_process_that_is_killed_again_and_again_comes_to_what_one_that_was_not_comes_to(job, tmp_path):
    made = job(resources=Resources(save=0), steps=40)
    whole = train(made.model_copy(update={"resume": None}))
    for step in (5, 15):
        with launch(made, tmp_path) as child:
            wait_for(made, step, child)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert all(artifact.verify(Path(made.resume) / name) for name in steps(made))
    outcome = train(made)
    same(outcome, whole)
    assert 15 <= outcome.conditions["resumed_at"] < 40


def test_a_process_that_is_told_to_end_leaves_a_checkpoint(job, tmp_path):
    made = job(steps=1000, evaluation=EvaluationConfig(reports=1, rows=8))
    with launch(made, tmp_path) as child:
        assert child.stdout.readline() == b"training\n"
        child.send_signal(signal.SIGTERM)
    assert child.returncode == 0
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["ended"] == "paused" and steps(made) == [f"step-{outcome['share'] * 1000:08.0f}"]
