"""What the stopping rule ends on a real cluster: its worker group is gone at once, and the study goes on."""

import contextlib
import sys
import time

import pytest

pytest.importorskip("ray")

import ray  # noqa: E402
from ray import cloudpickle  # noqa: E402
from ray.util import placement_group_table  # noqa: E402

from hpo import pareto, replay, tune  # noqa: E402
from hpo import spec as specs  # noqa: E402
from hpo.search import Search  # noqa: E402
from hpo.store import open_store  # noqa: E402
from training.recipe import Outcome, Progress  # noqa: E402

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def worse_each_time(job, report):
    """Is worse and slower with each number, and all but the first report until they are told to end."""
    number = int(job.output[-5:])
    steps = 5 if number == 0 else 2000
    for step in range(1, steps + 1):
        share, metrics = step / steps, {"accuracy": 0.9 / (1 + number)}
        told = Progress(step=step, steps=steps, tokens=step, share=share, seconds=(1 + number) * share, metrics=metrics)
        if reason := report(told):
            return Outcome(ended="stopped", reason=reason, share=share, scores=metrics, seconds=told.seconds)
        time.sleep(0.05)
    return Outcome(scores=metrics, seconds=1.0 + number, peak_bytes=1)


@contextlib.contextmanager
def stopping_study(storage, trials):
    loaded = specs.load({
        "name": "stops", "storage": str(storage), "data": {"train": "embedded:train.jsonl"}, "space": "tiny",
        "algorithm": "random", "objectives": ["accuracy", "seconds"], "stopping": {"name": "fixed", "share": 0.01},
        "budget": {"trials": trials},
    })  # fmt: skip
    store = open_store(loaded.spec.storage)
    record = store.add_study(loaded.spec, loaded.written, "")
    with store.hold(record.id) as holder:
        yield Search(store, record, holder)


def test_a_trial_that_the_rule_ends_frees_its_group_and_the_next_one_gets_it(tmp_path):
    with stopping_study(tmp_path, 3) as search:
        tune.run_search(search, search.spec.data, parallel=1, train=worse_each_time)
        trials = search.store.trials(search.study.id)
        assert [t.state for t in trials] == ["complete", "stopped", "stopped"], [t.error for t in trials]
        assert all(t.error == "beaten by trial 0 at 1% of its length" and t.outcome.share < 1 for t in trials[1:])
        assert [t.number for t in pareto.front(trials, search.spec.targets)] == [0]
        assert replay.replay(search.store, search.study).difference is None
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"] == []
