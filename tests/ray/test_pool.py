"""Warm groups on a real cluster: what one does again and again, what ends it, what comes after."""

import contextlib
import os
import signal
import sys
import threading
import time

import psutil
import pytest

pytest.importorskip("ray")

import ray  # noqa: E402
from ray import cloudpickle  # noqa: E402

from training import loop, simulate  # noqa: E402
from training.mailbox import mailbox_of  # noqa: E402
from training.pool import Pool, call_warm, run_warm  # noqa: E402
from training.recipe import DataConfig, EvaluationConfig, Job, Outcome, Progress, Recipe, Resources  # noqa: E402
from training.workers import WorkersFailed, WorkersLost  # noqa: E402

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def as_told(job, report):
    """Does what the run's output folder says."""
    told = job.output or ""
    if told == "raise":
        raise ValueError("the seed is odd")
    if told == "die":
        os.kill(os.getpid(), signal.SIGKILL)
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
    before = (there.num_threads(), len(there.children()), len(here.children(recursive=True)))
    for i in range(200):
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


def test_a_worker_that_dies_takes_its_run_along_and_is_replaced(pool):
    started = pool.started
    with pytest.raises(WorkersLost):
        run(pool, "die")
    assert run(pool).ended == "complete" and pool.started == started + 1


def test_training_code_that_raises_ends_its_group_too_for_it_may_have_left_traces(pool):
    first = run(pool).conditions["pid"]
    with pytest.raises(WorkersFailed, match="ValueError: the seed is odd"):
        run(pool, "raise")
    assert run(pool).conditions["pid"] != first


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


def test_a_group_without_work_goes_home_and_its_cpu_is_free_until_there_is_work_again(tmp_path):
    before = free_cpus()
    with a_pool(tmp_path, patience=1.0, ahead=1) as pool:
        assert run(pool).ended == "complete"
        until(lambda: free_cpus() == before)
        assert run(pool).ended == "complete" and pool.started == 2
    until(lambda: free_cpus() == before)


def test_real_runs_on_one_group_come_to_what_they_come_to_here_to_the_bit(tmp_path):
    jobs = [job(seed=seed, rank=rank, dropout=0.1) for seed, rank in ((1, 4), (2, 8), (1, 4))]
    with a_pool(tmp_path, train=None) as pool:
        warm = [run_warm(one, f"real-{i}-{time.time_ns()}", pool.mailbox) for i, one in enumerate(jobs)]
        assert pool.started == 1
    cold = [loop.train(one) for one in jobs]
    assert [(o.loss, o.peak_bytes) for o in warm] == [(o.loss, o.peak_bytes) for o in cold]
