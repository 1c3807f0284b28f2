"""What a user brings along, by import path or as an argument, takes part in a study; what is missing is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from contracts import simulated

import hpo
from hpo import extensions
from hpo.errors import InputError, SpecError
from hpo.spec import load
from training.tasks import Task

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
EXAMPLES = GUIDE.read_text().partition("## Your own metric, task, method or train function")[2].partition("\n## ")[0]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The guide's own modules, on the import path."""
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", EXAMPLES, re.S):
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def small(folder, **changes):
    study = {
        "name": "own", "storage": str(folder / "store"), "resources": {"mode": "local"}, "budget": {"trials": 1},
        "data": {"train": "embedded:train.jsonl", "validation": "embedded:validation.jsonl", "test": "embedded:test.jsonl",
                 "limit": 16},
        "recipe": {"model": "embedded", "steps": 2, "batch_size": 4, "max_length": 128},
        "evaluation": {"rows": 8, "test_rows": 8, "reports": 1}, "space": {"learning_rate": [0.001, 0.01]},
        "certify": {"extra": 0}, "algorithm": "random",
    }  # fmt: skip
    return study | changes


def test_the_guides_examples_run_by_import_path(mine):
    study = hpo.run(small(
        mine, data=small(mine)["data"] | {"task": "mine:REQUESTS"}, recipe=small(mine)["recipe"] | {"adapter": "mine:NORMS"},
        evaluation=small(mine)["evaluation"] | {"metrics": ["mine:brevity"]}, objectives=["brevity", "answered", "seconds"],
    ))  # fmt: skip
    (trial,) = study.history()
    assert trial.state == "complete", trial.error
    assert {"accuracy", "brevity", "answered"} == set(trial.outcome.scores)
    compared = {one.name for one in study.certificate.metrics}
    assert {"brevity", "answered", "rouge_l"} < compared


def test_arguments_take_part_too_and_a_metric_is_measured_without_being_listed(mine):
    sys.modules.pop("mine", None)
    import mine as module

    study = hpo.run(
        small(mine, data=small(mine)["data"] | {"task": "given:requests"}), ["objectives=[terse, seconds]"],
        metrics={"terse": lambda answer, expected, prompt: -len(answer)}, tasks={"requests": module.REQUESTS},
        methods={"unused": module.NORMS},
    )  # fmt: skip
    (trial,) = study.history()
    assert trial.state == "complete", trial.error
    assert trial.outcome.scores["terse"] <= 0
    assert "terse" in {one.name for one in study.certificate.metrics}
    assert study.spec.evaluation.metrics == ("given:terse",)
    # Opened later, the record can be read without what was an argument then; running it again says what is missing.
    assert hpo.open_study("own", storage=str(mine / "store")).front()
    with pytest.raises(SpecError, match="given:requests is an argument of hpo.run, and it was not given this time"):
        hpo.run(small(mine, data=small(mine)["data"] | {"task": "given:requests"}))


def test_a_train_function_of_ones_own_is_named_in_the_study_too(mine):
    study = hpo.run(simulated(mine / "store", train="mine:train"))
    assert all(trial.outcome.seconds == 3.0 for trial in study.history())


def refused(**changes) -> str:
    with pytest.raises(SpecError) as error:
        load(simulated("/x", **changes))
    return str(error.value)


@pytest.mark.parametrize(("changes", "said"), [
    ({"evaluation": {"metrics": ["rougel"]}}, "evaluation.metrics[0]: unknown metric 'rougel'. Did you mean rouge_l?"),
    ({"evaluation": {"metrics": ["nowhere:f"]}}, "evaluation.metrics[0]: nowhere:f: nowhere cannot be imported"),
    ({"evaluation": {"metrics": ["math:pi"]}}, "math:pi must be a function, got float"),
    ({"evaluation": {"metrics": [{"name": "loss", "function": "math:dist"}]}}, "'loss' is the name of another score"),
    ({"evaluation": {"metrics": ["f1", "f1"]}}, "evaluation.metrics[1]: 'f1' is there twice"),
    ({"objectives": ["perplexiti", "seconds"]}, "objectives[0]: unknown objective 'perplexiti'. Did you mean perplexity?"),
    ({"data": {"train": "embedded:train.jsonl", "task": "math:pi"}}, "data.task: math:pi is no task, it lacks COLUMNS"),
    ({"recipe": {"adapter": "math:pi"}}, "recipe.adapter: math:pi must be a Method, got float"),
    ({"train": "nowhere:f"}, "train: nowhere:f: nowhere cannot be imported"),
    ({"promote": {"retention": 0.1}}, "promote.retention: is a limit for a text that is not there"),
])  # fmt: skip
def test_what_is_not_there_is_refused_at_load(changes, said):
    assert said in refused(**changes)


def test_a_metric_as_an_objective_is_measured_and_has_its_goal():
    spec = load(simulated("/x", objectives=["perplexity", "rouge_l"], evaluation={"metrics": ["f1"]})).spec
    assert spec.scoring.metrics == ("f1", "perplexity", "rouge_l") and spec.evaluation.metrics == ("f1",)
    assert [target.goal for target in spec.targets] == ["minimize", "maximize"]
    own = {"name": "gap", "function": "math:dist", "goal": "minimize"}
    assert load(simulated("/x", objectives=["gap"], evaluation={"metrics": [own]})).spec.targets[0].goal == "minimize"


def test_two_arguments_of_one_name_are_refused():
    task = Task(COLUMNS={"a": ("a",)}, TEMPLATE="{a}", RESPONSE="a")
    with pytest.raises(InputError, match="stands for two things"):
        extensions.arguments(metrics={"x": len}, tasks={"x": task})
    with pytest.raises(InputError, match="is no identifier"):
        extensions.arguments(metrics={"my metric": len})
