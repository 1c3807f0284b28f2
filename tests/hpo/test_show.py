"""How numbers and texts of others look on a terminal: nothing in them is taken for markup, nothing is cut off."""

from __future__ import annotations

import io
import time

import pytest
from contracts import simulated

from hpo import show
from hpo.check import inspect
from hpo.doctor import Finding
from hpo.spec import load
from hpo.study import Status, run
from training.recipe import DataConfig, Outcome, Recipe


def text(renderable) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=400, highlight=False).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "", "-"), (True, "", "True"), ("all-linear", "", "all-linear"), (0, "", "0"), (12345, "", "12,345"),
        (0.000123, "", "1.23e-04"), (0.5, "", "0.5"), (123456.0, "", "1.23e+05"), (0.0, "", "0"), (-0.25, "", "-0.25"),
        (1_500_000, "bytes", "1.5 MB"), (2_340_000_000, "bytes", "2.34 GB"), (59.94, "s", "59.9 s"), (1200, "s", "20.0 min"),
    ],
)  # fmt: skip
def test_numbers_are_for_people(value, unit, shown):
    assert show.number(value, unit) == shown


def test_brackets_in_what_others_wrote_are_shown_as_they_are(tmp_path):
    def train(job, report):
        raise RuntimeError("shape [/x] and [bold] and [3, 4]")

    written = simulated(tmp_path / "[red]", description="a [/x] and [bold] thing", budget={"trials": 1})
    assert "a [/x] and [bold] thing" in text(show.check_text(inspect(load(written).spec)))
    study = run(written, train=train)
    assert "RuntimeError: shape [/x] and [bold] and [3, 4]" in text(show.study_text(study))
    assert "[red]" in text(show.next_text(study))


def test_a_remedy_with_an_extra_is_whole():
    shown = text(show.doctor_text([Finding("deepspeed", "missing", False, "pip install 'paretune[deepspeed]'", needed=False)]))
    assert "pip install 'paretune[deepspeed]'" in shown


@pytest.mark.parametrize("model", [Recipe, DataConfig])
def test_a_schema_names_every_field_with_its_meaning(model):
    shown = text(show.schema_text(model))
    for name, field in model.model_fields.items():
        assert name in shown
        assert (field.description or "") in shown


def test_what_would_run_is_said_with_model_rows_and_memory(tmp_path):
    written = {n: v for n, v in simulated(tmp_path, limits={"peak_bytes": 1}).items() if n != "train"}
    found = inspect(load(written).spec)
    shown = text(show.check_text(found))
    for words in (
        "3 dimensions, infinitely many points",
        "4 trials",
        "parameters",
        "training",
        "weights",
        "100% of the space is over",
    ):
        assert words in shown
    record = show.check_record(found)
    assert record["refused_share"] == 1.0
    assert record["predicted_peak_bytes"]["defaults"] == found.memory.total


def test_a_study_without_trials_is_shown(tmp_path):
    study = run(simulated(tmp_path, limits={"peak_bytes": 1}, budget={"trials": 1}))
    assert "1 infeasible" in text(show.study_text(study))
    assert "Front" not in text(show.study_text(study))


def test_what_was_billed_is_shown_beside_the_seconds_of_the_trials_alone(tmp_path):
    def train(job, report, **conditions):
        time.sleep(0.01)
        return Outcome(seconds=0.005, peak_bytes=1, scores={"accuracy": 0.5}, conditions=conditions)

    def packed(job, report):
        return train(job, report, seats=4, billed_seconds=30.0).model_copy(update={"seconds": 60.0})

    study = run(simulated(tmp_path, name="alone", budget={"trials": 2}), train=train)
    assert "of worker groups, 0.0 s of it training steps" in text(show.study_text(study))
    assert show.study_record(study)["billed_seconds"] >= 0.02
    study = run(simulated(tmp_path, name="packed", budget={"trials": 2}), train=packed)
    assert "Billed: 60.0 s of worker groups, for training steps that take 120.0 s alone" in text(show.study_text(study))


def test_progress_without_a_terminal_is_a_line_for_each_change(capsys):
    with show.progress() as on_status:
        for status in (
            Status(),
            Status(seconds=1.0),
            Status(phase="training", trials=9, running={1: 0.5, 0: 0.1}, seconds=2),
            Status(phase="training", trials=9, running={1: 0.9, 0: 0.3}, seconds=3),
            Status(
                phase="training",
                trials=9,
                finished=3,
                states={"failed": 1, "complete": 2},
                front=2,
                best=0.5,
                left=200,
                seconds=4,
            ),
        ):
            on_status(status)
    assert capsys.readouterr().err.splitlines() == [
        "     0 s  checking",
        "     2 s  training  0/9 trials, running 0, 1",
        "     4 s  training  3/9 trials, 1 failed, front 2, best 0.500, about 3 min left",
    ]
