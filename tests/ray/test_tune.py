"""Searches on a real Ray cluster. Each launch of a fresh worker group takes seconds, so one study serves several tests.

Most trials run small train functions that fail in one particular way; the last tests train the embedded model.
"""

import _thread
import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")

import ray  # noqa: E402
from ray import cloudpickle  # noqa: E402
from ray.util import placement_group, placement_group_table, remove_placement_group  # noqa: E402

import hpo  # noqa: E402
from hpo import local, tune  # noqa: E402
from hpo import spec as specs  # noqa: E402
from hpo.errors import BackendError, InputError  # noqa: E402
from hpo.search import Search  # noqa: E402
from hpo.store import open_store  # noqa: E402
from training import simulate  # noqa: E402
from training.beside import Seats  # noqa: E402
from training.recipe import Outcome, Progress, Resources  # noqa: E402

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module


# What trials do


def number_of(job) -> int:
    return int(Path(job.output).name)


def first_time(job) -> bool:
    """Says whether this trial was never launched before."""
    mark = Path(job.output).with_suffix(".launched")
    mark.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        mark.touch(exist_ok=False)
        return True
    return False


def troubled(job, report):
    """Trial 1 raises, 2 loses its worker once, 3 runs out of memory, 4 loses its worker always; 0 is well."""
    number = number_of(job)
    if number == 1:
        raise ValueError("the seed is odd")
    if number == 2 and first_time(job):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise MemoryError("no more bytes")
    if number == 4:
        os._exit(3)
    return simulate.train(job, report)


def third_raises(job, report):
    if number_of(job) == 2:
        raise ValueError("the seed is odd")
    return simulate.train(job, report)


def never_ends(job, report):
    """Launched for the first time, trial 0 ends when it is asked to and trial 1 ignores it."""
    if not first_time(job):
        return simulate.train(job, report)
    step = 0
    while True:
        step += 1
        reason = report(Progress(step=step, steps=10_000, tokens=step, share=step / 10_000, seconds=float(step)))
        if number_of(job) == 1:
            time.sleep(3600)
        if reason:
            return Outcome(ended="stopped", reason=reason, share=step / 10_000)
        time.sleep(0.1)


def wrong(job, report):
    raise InputError(hpo.errors.Problem("data.train", "is no table.", "Give a table."))


# How they are run


@contextlib.contextmanager
def a_search(storage, name: str, trials: int, **budget):
    """Yields the Search of a study; the same call continues it."""
    written = {
        "name": name, "storage": str(storage), "data": {"train": "embedded:train.jsonl"}, "space": "tiny",
        "algorithm": "random", "budget": {"trials": trials, **budget},
    }  # fmt: skip
    loaded = specs.load(written)
    store = open_store(loaded.spec.storage)
    record = store.add_study(loaded.spec, loaded.written, "")
    with store.hold(record.id) as holder:
        yield Search(store, record, holder)


def run(search, train, *, parallel: int = 1, **options) -> None:
    tune.run_search(search, search.spec.data, parallel=parallel, train=train, **options)


def assert_nothing_left(within: float = 60.0) -> None:
    """Every CPU is free again and no group of workers exists or waits."""
    until = time.monotonic() + within
    while True:
        free = ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
        groups = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
        if free and not groups:
            return
        assert time.monotonic() < until, (ray.available_resources(), groups)
        time.sleep(0.2)


pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def mixed(cluster, tmp_path_factory):
    """Five trials, two at a time, four of them in trouble: all by number with curves, the events, Tune's processes for them."""

    def started() -> int:
        return sum("ImplicitFunc" in actor["ActorClassName"] for actor in ray._private.state.actors().values())

    before = started()
    with a_search(tmp_path_factory.mktemp("mixed"), "mixed", 5, retries=1) as search:
        run(search, troubled, parallel=2)
        trials = search.store.trials(search.study.id, curves=True)
        events = search.store.events(search.study.id)
    assert_nothing_left()
    return trials, events, started() - before


def test_a_study_goes_on_past_trials_in_trouble(mixed):
    assert [t.state for t in mixed[0]] == ["complete", "failed", "complete", "infeasible", "failed"]


def test_what_the_training_code_raises_is_kept_and_not_tried_again(mixed):
    assert (mixed[0][1].error, mixed[0][1].attempts) == ("ValueError: the seed is odd", 1)


def test_a_trial_whose_worker_is_killed_is_launched_again(mixed):
    trials, events, _ = mixed
    assert trials[2].attempts == 2
    assert [e["attempt"] for e in events if e["kind"] == "relaunched" and e["number"] == 2] == [2]


def test_a_trial_that_loses_its_worker_each_time_fails_with_the_cause(mixed):
    assert mixed[0][4].attempts == 2
    assert "worker process has died" in mixed[0][4].error


def test_each_seat_has_one_process_of_tunes_whatever_becomes_of_its_trials(mixed):
    assert mixed[2] == 2


def test_running_out_of_memory_is_a_result_with_its_reason(mixed):
    assert "no more bytes" in mixed[0][3].outcome.reason and mixed[0][3].attempts == 1


def test_every_report_arrives_in_order(mixed):
    assert [p.step for p in mixed[0][0].curve] == [1, 2, 3, 4]


def test_with_one_slot_the_history_is_that_of_the_local_runner(tmp_path):
    def history(search):
        return [
            (t.number, t.params, t.state, t.error, [o.of(t.outcome) for o in search.spec.targets] if t.outcome else None)
            for t in search.store.trials(search.study.id)
        ]

    with a_search(tmp_path / "ray", "same", 3) as search:
        run(search, third_raises)
        with_ray = history(search)
    with a_search(tmp_path / "local", "same", 3) as search:
        local.run_search(search, third_raises, search.spec.data)
        assert with_ray == history(search)


def test_a_stop_ends_running_trials_and_the_study_continues(tmp_path):
    asked = []

    def stop_when_both_report(search):
        if not asked and len(search.shares) == 2 and all(search.shares.values()):
            asked.append(time.monotonic())
            threading.Thread(target=search.stop, args=("stopped by the user",), kwargs={"resume": True}).start()

    with a_search(tmp_path, "stopped", 2) as search:
        run(search, never_ends, parallel=2, on_change=stop_when_both_report, grace=2.0)
        took = time.monotonic() - asked[0]
        assert [t.state for t in search.store.trials(search.study.id)] == ["running", "running"]
    assert took < 20, "one trial ended by itself, the other was killed 2 s later"
    assert_nothing_left()
    with a_search(tmp_path, "stopped", 2) as search:
        run(search, never_ends, parallel=2)
        # What the user stopped is no failed attempt.
        assert [(t.state, t.attempts) for t in search.store.trials(search.study.id)] == [("complete", 1)] * 2
    assert_nothing_left()


def test_an_interrupt_ends_a_trial_that_never_got_its_workers(tmp_path):
    taken = placement_group([{"CPU": 2}])
    assert taken.wait(10)
    interrupt = threading.Timer(5.0, _thread.interrupt_main)
    try:
        with a_search(tmp_path, "starved", 1) as search:
            interrupt.start()
            run(search, troubled, grace=10.0)
            assert [t.state for t in search.store.trials(search.study.id)] == ["running"]
            assert search.stopping == "interrupted"
    finally:
        interrupt.cancel()
        remove_placement_group(taken)
    assert_nothing_left()


def test_workers_are_freed_when_the_process_that_drives_their_trial_dies(tmp_path):
    killed = []

    def kill_the_driver(search):
        if not killed and any(search.shares.values()):
            drivers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ImplicitFunc")]
            killed.extend(p.pid for p in drivers)
            for process in drivers:
                process.kill()

    with a_search(tmp_path, "undriven", 1) as search:
        run(search, never_ends, on_change=kill_the_driver)
        (trial,) = search.store.trials(search.study.id)
    assert killed and (trial.state, trial.attempts) == ("complete", 2)
    assert_nothing_left()


def test_the_users_mistake_ends_the_study_with_its_remedy(tmp_path):
    with a_search(tmp_path, "mistaken", 3) as search:
        with pytest.raises(InputError, match="data.train: is no table. Give a table."):
            run(search, wrong)
    assert_nothing_left()


# The embedded model

SHORT = {
    "data": {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
             "template": "{instruction}\nAnswer:"},
    "recipe": {"model": "embedded", "max_length": 128, "steps": 4, "batch_size": 4},
    "evaluation": {"rows": 16, "test_rows": 16, "reports": 2},
    "space": {"rank": {"type": "choice", "values": [4, 8, 16]}},
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_two_workers_train_with_zero(tmp_path):
    written = SHORT | {
        "name": "zero", "storage": str(tmp_path), "resources": {"workers": 2}, "budget": {"trials": 1},
        "recipe": SHORT["recipe"] | {"zero_stage": 2, "steps": 3}, "evaluation": {"rows": 8, "test_rows": 8, "reports": 1},
    }  # fmt: skip
    loaded = specs.load(written)
    store = open_store(loaded.spec.storage)
    record = store.add_study(loaded.spec, loaded.written, "")
    with store.hold(record.id) as holder:
        search = Search(store, record, holder)
        tune.run_search(search, loaded.spec.data, parallel=1)
        (trial,) = store.trials(record.id)
    assert trial.state == "complete", trial.error
    assert trial.outcome.conditions["workers"] == 2 and trial.outcome.loss > 0
    assert_nothing_left()


def test_a_study_of_packed_trials_ends_like_any_other_and_each_is_stopped_for_itself(tmp_path):
    written = SHORT | {
        "name": "packed", "storage": str(tmp_path), "resources": {"mode": "packed"}, "budget": {"trials": 5, "parallel": 4},
        "space": {"rank": [2, 4, 8, 16], "batch_size": [1, 2]}, "algorithm": "random", "keep": "all",
        # Long enough that an order finds it still training.
        "recipe": SHORT["recipe"] | {"steps": 40}, "evaluation": {"rows": 8, "test_rows": 8, "reports": 4},
    }  # fmt: skip
    loaded = specs.load(written)
    store = open_store(loaded.spec.storage)
    record = store.add_study(loaded.spec, loaded.written, "")
    ordered = []

    def stop_one(search):
        if not ordered and search.shares:
            ordered.append(min(search.shares))
            search._inbox.stops[ordered[0]] = "not wanted"

    plan = tune.layout(loaded.spec.resources, tune.capacity(), 4)
    assert (plan.parallel, plan.groups, plan.seats) == (4, 2, 2)
    with store.hold(record.id) as holder:
        search = Search(store, record, holder)
        storage = str(tmp_path / "ray")
        with tune.groups_of("packed", loaded.spec.resources, plan.groups, storage=storage, seats=plan.seats) as groups:
            tune.run_search(search, loaded.spec.data, parallel=plan.parallel, groups=groups, on_change=stop_one)
    trials = store.trials(record.id)
    assert [t.state for t in trials if t.number != ordered[0]] == ["complete"] * 5  # a cancelled one does not count
    assert trials[ordered[0]].state == "cancelled" and trials[ordered[0]].attempts == 1
    done = [t for t in trials if t.state == "complete"]
    assert {t.outcome.conditions["seats"] for t in done} == {2}
    assert all(Path(t.outcome.checkpoint, "adapter_model.safetensors").is_file() for t in done)
    assert_nothing_left()


# Pure

CLUSTER = {
    "max_workers": 5, "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4},
        "spot": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 8},
    },
}  # fmt: skip


def test_a_cluster_grows_to_every_node_type_at_its_maximum_within_that_of_all():
    nodes = tune.growth(CLUSTER)
    assert [n.get("GPU", 0) for n in nodes] == [0, 1, 1, 1, 1, 4]
    assert sum(n["CPU"] for n in nodes) == 44


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        (Resources(cpus=1, gpus=1), None, 8),
        (Resources(cpus=1, gpus=1), 3, 3),
        (Resources(cpus=1, gpus=1, workers=3), None, 2),
        (Resources(cpus=4, gpus=2), None, 2),  # only the node with four GPUs has two for one worker
        (Resources(cpus=1, gpus=0.5), None, 16),
        (Resources(cpus=4, gpus=0), None, 11),
        (Resources(cpus=0, gpus=0), None, 1),
        (Resources(cpus=0, gpus=0), 7, 7),
    ],
)
def test_concurrency_is_what_fits_into_the_nodes(resources, asked, expected):
    assert tune.concurrency(resources, tune.growth(CLUSTER), asked) == expected


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        ({"mode": "warm"}, None, (4, 4, 1)),
        ({"mode": "warm"}, 2, (2, 2, 1)),
        ({"mode": "warm"}, 9, (4, 4, 1)),
        ({}, 4, (4, 4, 1)),
        ({}, None, (4, 4, 1)),
        ({}, 9, (9, 3, 3)),  # more than there are workers: packed
        ({"mode": "packed"}, None, (16, 4, 4)),
        ({"mode": "packed", "seats": 2}, None, (8, 4, 2)),
        ({"seats": 2}, 16, (8, 4, 2)),
        ({"mode": "fresh"}, 9, (4, 4, 1)),
        ({"workers": 2}, 9, (2, 2, 1)),
    ],
)
def test_more_trials_at_a_time_than_workers_are_packed(resources, asked, expected):
    found = tune.layout(Resources(**resources), [{"CPU": 3}, {"CPU": 1}], asked)
    assert (found.parallel, found.groups, found.seats) == expected


@pytest.mark.parametrize(("mode", "expected"), [("auto", (4, 4, 1)), ("packed", (12, 4, 3)), ("warm", (4, 4, 1))])
def test_trials_are_packed_only_where_somebody_asks_and_then_as_suits_them(mode, expected):
    found = tune.layout(Resources(mode=mode), [{"CPU": 4}], None, best=Seats(3, 2.0, ""))
    assert (found.parallel, found.groups, found.seats) == expected


@pytest.mark.parametrize("resources", [Resources(gpus=8), Resources(cpus=16), Resources(workers=9, gpus=1)])
def test_a_trial_that_never_fits_is_refused(resources):
    with pytest.raises(BackendError, match="not even one trial fits"):
        tune.concurrency(resources, tune.growth(CLUSTER), None)


def test_a_cluster_that_does_not_say_how_far_it_grows_is_told_by_the_environment(monkeypatch):
    monkeypatch.setenv("HPO_GROWTH", "{gpu: {max_workers: 3, resources: {CPU: 7, GPU: 1}}}")
    assert tune.capacity() == [{"CPU": 7, "GPU": 1}] * 3


def test_what_a_submitted_job_sets_for_its_workers_is_left_to_it(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "8"}}}')
    assert "OMP_NUM_THREADS" not in tune.environment() and "PYTHONWARNINGS" in tune.environment()
