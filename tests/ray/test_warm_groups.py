"""Warm groups on a real cluster: what one does again and again, what ends it, what comes after."""

import contextlib
import os
import sys
import threading
import time

import psutil
import pytest

pytest.importorskip("ray")

import ray  # noqa: E402
from ray import cloudpickle  # noqa: E402

from training import loop, own, simulate  # noqa: E402
from training.desk import call_warm, run_warm  # noqa: E402
from training.errors import WorkersFailed, WorkersLost  # noqa: E402
from training.mailbox import mailbox_of  # noqa: E402
from training.pool import Pool  # noqa: E402
from training.recipe import DataConfig, EvaluationConfig, Job, Outcome, Progress, Recipe, Resources  # noqa: E402

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def as_told(job, report):
    """Does what the run's output folder says."""
    told = job.output or ""
    step = 0
    while told == "endless":
        step += 1
        if reason := report(Progress(step=step, steps=10**6, tokens=step, share=step / 10**6, seconds=float(step))):
            return Outcome(ended="stopped", reason=reason, share=step / 10**6, conditions={"pid": os.getpid()})
    return simulate.train(job, report).model_copy(update={"conditions": {"pid": os.getpid()}})


def job(told: str | None = None, **recipe) -> Job:
    given = {"model": "embedded", "max_length": 64, "steps": 3, "batch_size": 4} | recipe
    return Job(
        recipe=Recipe(**given), output=told, evaluation=EvaluationConfig(rows=8, reports=1),
        data=DataConfig(train="embedded:train.jsonl", validation="embedded:validation.jsonl", template="{instruction}\nAnswer:"),
    )  # fmt: skip


@contextlib.contextmanager
def a_pool(folder, *, size: int = 1, train=as_told, **options):
    with mailbox_of("pool") as mailbox, Pool(
        mailbox, Resources(), size, storage=str(folder), name=f"pool-{time.time_ns()}", train=train, **options
    ) as pool:  # fmt: skip
        yield pool


@pytest.fixture(scope="module")
def pool(cluster, tmp_path_factory):
    """One group of patience, for all tests that leave it alive."""
    with a_pool(tmp_path_factory.mktemp("pool"), patience=3600) as one:
        yield one


def run(pool, told=None, name="run", **options) -> Outcome:
    return run_warm(job(told), f"{name}-{time.time_ns()}", pool.mailbox, **options)


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)


def until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_one_group_does_run_after_run(pool):
    outcomes = [run(pool) for _ in range(20)]
    assert {one.conditions["pid"] for one in outcomes} == {outcomes[0].conditions["pid"]} and pool.started == 1
    assert all(one.ended == "complete" for one in outcomes)


def test_every_report_arrives_in_order_before_the_outcome(pool):
    seen = []
    run(pool, on_progress=lambda progress: seen.append(progress.step))
    assert seen == [1, 2, 3, 4]


def test_a_function_is_called_on_the_group_that_trains(pool):
    pid = run(pool).conditions["pid"]
    assert call_warm("os.getpid", {}, f"call-{time.time_ns()}", pool.mailbox) == pid
    with pytest.raises(WorkersFailed, match="FileNotFoundError"):
        call_warm("os.listdir", {"path": "/nowhere"}, f"call-{time.time_ns()}", pool.mailbox)


def test_two_hundred_runs_that_are_stopped_leave_nothing_behind(pool):
    pid = run(pool).conditions["pid"]
    here, there = psutil.Process(), psutil.Process(pid)
    for i in range(200):
        if i == 100:  # by now everything that starts threads of its own has done so
            before = (there.num_threads(), len(there.children()), len(here.children(recursive=True)))
        name = f"stopped-{i}"
        ray.get(pool.mailbox.submit.remote(name, {"job": job("endless").model_dump_json()}))
        while not ray.get(pool.mailbox.poll.remote(name, 5.0))[0]:
            pass
        ray.get(pool.mailbox.stop.remote(name, "enough"))
        while (result := ray.get(pool.mailbox.poll.remote(name, 5.0))[3]) is None:
            pass
        assert Outcome.model_validate_json(result["outcome"]).reason == "enough"
        ray.get(pool.mailbox.forget.remote(name))
    assert (there.num_threads(), len(there.children()), len(here.children(recursive=True))) == before
    assert ray.get(pool.mailbox.demand.remote(-1, 0)) == 0 and run(pool).conditions["pid"] == pid


def test_work_that_nobody_began_ends_at_once_when_it_is_stopped(pool):
    ending = threading.Thread(target=run, args=(pool, "endless", "first"))
    ending.start()
    until(lambda: ray.get(pool.mailbox.demand.remote(-1, 0)) == 1)
    name = "second"
    ray.get(pool.mailbox.submit.remote(name, {"job": job().model_dump_json()}))
    ray.get(pool.mailbox.stop.remote(name, "never mind"))
    assert ray.get(pool.mailbox.poll.remote(name, 0))[3] == {"stopped": "never mind"}
    names = [key for key in ray.get(pool.mailbox.names.remote()) if key.startswith("first")]
    ray.get(pool.mailbox.stop.remote(names[0], "enough"))
    ending.join(30)
    assert not ending.is_alive()


def test_a_group_without_work_goes_home_and_its_cpu_is_free(tmp_path):
    before = free_cpus()
    with a_pool(tmp_path, patience=1.0, ahead=1) as pool:
        assert run(pool).ended == "complete"
        until(lambda: free_cpus() == before)
        assert pool.started == 1


# Several recipes at once in one group

KINDS = ({"rank": 4, "seed": 1}, {"rank": 8, "seed": 2, "batch_size": 2}, {"rank": 16, "alpha": 32.0, "seed": 3})


def at_once(pool, jobs, **options) -> list:
    """Runs jobs side by side; returns what each came to, or the exception that it ended with."""
    found: list = [None] * len(jobs)

    def one(number):
        try:
            found[number] = run_warm(jobs[number], f"beside-{number}-{time.time_ns()}", pool.mailbox, **options)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def boom(answer, expected, prompt):
    raise ValueError("this metric is broken")


def test_recipes_run_one_after_another_and_together_and_one_that_breaks_the_pack_hurts_nobody_in_the_end(tmp_path):
    jobs = [job(dropout=0.0, **kind) for kind in KINDS]
    cold = [loop.train(one) for one in jobs]
    poison = jobs[0].model_copy(update={"evaluation": jobs[0].evaluation.model_copy(update={"metrics": ("given:boom",)})})
    with own.given({"boom": boom}), a_pool(tmp_path, train=None, seats=3) as pool:
        warm = [run_warm(one, f"warm-{time.time_ns()}", pool.mailbox, alone=True) for one in (*jobs, jobs[0])]
        assert [(o.loss, o.peak_bytes) for o in warm] == [(o.loss, o.peak_bytes) for o in (*cold, cold[0])], "to the bit"
        together = at_once(pool, jobs)
        assert pool.started == 1 and all(outcome.conditions["seats"] == 3 for outcome in together)
        for outcome, one in zip(together, cold, strict=True):
            assert outcome.loss == pytest.approx(one.loss, rel=1e-3) and outcome.peak_bytes == one.peak_bytes
        split = at_once(pool, [poison, *jobs[1:]])
        assert isinstance(split[0], WorkersLost) and "this metric is broken" in str(split[0])
        alone = at_once(pool, [poison, *jobs[1:]], alone=True)
        assert isinstance(alone[0], WorkersFailed) and "this metric is broken" in str(alone[0])
        assert [outcome.ended for outcome in alone[1:]] == ["complete", "complete"]
