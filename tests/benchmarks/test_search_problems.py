"""The problems of benchmarks/search: what is read agrees with what was recorded, and a journal goes on after a torn line."""

from __future__ import annotations

import json
import re
import sys
from random import Random

import pytest

from benchmarks.search import problems, race
from hpo.objectives import losses

KNOWN = problems.available()


@pytest.fixture(params=problems.NAMES)
def problem(request):
    if request.param not in KNOWN:
        pytest.skip(f"the data of {request.param} is not there; set PARETUNE_SHARED")
    if not request.param.startswith(("table", "lora")):
        pytest.importorskip("onnxruntime", reason="pip install -e '.[bench]'")
    return problems.load(request.param)


def test_every_point_has_all_objectives_and_its_curve_ends_where_its_outcome_is(problem):
    rng = Random(0)
    for point in [problem.space.sample(rng) for _ in range(5)]:
        assert problem.space.contains(point)
        trial = problem.trial(0, point)
        assert losses(trial, problem.objectives)
        if problem.curve:
            last = problem.curve(point)[-1]
            assert last.share == 1
            assert last.metrics["accuracy"] == pytest.approx(trial.outcome.scores["accuracy"])
            assert last.seconds == pytest.approx(trial.outcome.seconds)


def test_hypervolume_grows_with_every_trial_or_stays(problem):
    trials = [problem.trial(i, point) for i, point in enumerate(race.start(problem, 0))]
    volumes = [problem.volume(trials[:count]) for count in range(len(trials) + 1)]
    assert volumes[0] == 0 and volumes == sorted(volumes) and volumes[-1] > 0


def test_a_journal_with_a_torn_line_is_gone_on_with(tmp_path, monkeypatch):
    if not KNOWN:
        pytest.skip("no data; set PARETUNE_SHARED")
    made = []
    monkeypatch.setattr(race, "_run", lambda run: made.append(run["seed"]) or run | {"volumes": [1.0]})
    monkeypatch.setattr(race.multiprocessing, "get_context", lambda _: sys.modules[__name__])
    wanted = [{"problem": KNOWN[0], "algorithm": "random", "seed": seed, "options": {}, "at": [12]} for seed in range(3)]
    journal = tmp_path / "runs.jsonl"
    race.runs(wanted[:2], journal)
    journal.write_text(journal.read_text()[:-5])
    found = race.runs(wanted, journal)
    assert made == [0, 1, 1, 2]
    assert [run["seed"] for run in found] == [0, 1, 2]
    assert [json.loads(line)["seed"] for line in journal.read_text().splitlines()] == [0, 1, 2]


def Pool(_):  # noqa: N802 - what multiprocessing calls it; in this process, so that what was made is seen
    class Here:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        imap_unordered = staticmethod(map)

    return Here()


def test_a_ratio_has_a_paired_interval():
    found = race.compare([1.1, 1.2, 1.3], [1.0, 1.0, 1.0])
    assert found["ratio"] == 1.2
    assert found["difference"][0] == pytest.approx(0.1) and found["difference"][1] == pytest.approx(0.3)


def test_the_examples_of_the_lora_table_run(monkeypatch, capsys):
    if not problems.LORA_TABLE.is_file():
        pytest.skip("no LoRA table; python -m benchmarks.search.record_lora makes it")
    root = problems.LORA_TABLE.parents[2]
    monkeypatch.chdir(root)
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "lora-table.md").read_text(), re.S)
    for block in blocks:
        exec(block, {"__name__": "example"})
    assert len(blocks) == 2 and "on the front" in capsys.readouterr().out
