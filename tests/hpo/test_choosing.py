"""Which point of a front is taken: by best score, knee or weights, within limits."""

from __future__ import annotations

import pytest
from contracts import command, one_object, simulated

import hpo
from hpo.choosing import Choose, choose, problems
from hpo.errors import InputError, SpecError
from hpo.objectives import named
from hpo.spec import load
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

THREE = named(["accuracy", "seconds", "peak_bytes"])
# Accurate and dear, a little less so and far cheaper, poor and cheapest, dominated.
POINTS = [(0.90, 100.0, 1000), (0.88, 30.0, 400), (0.50, 10.0, 300), (0.40, 20.0, 500)]


def trials(points=POINTS) -> list[Trial]:
    return [
        Trial(number=n, params={"rank": n + 1}, recipe=Recipe(), state="complete",
              outcome=Outcome(scores={"accuracy": a}, seconds=s, peak_bytes=b))
        for n, (a, s, b) in enumerate(points)
    ]  # fmt: skip


def number(**how) -> int:
    return choose(trials(), THREE, Choose(**how))[0].number


def test_the_best_the_knee_and_the_weights_choose_differently():
    assert number() == 0
    assert number(by="knee") == 1
    assert number(by="weights", weights={"accuracy": 1}) == 0
    assert number(by="weights", weights={"seconds": 1}) == 2
    assert number(by="weights", weights={"accuracy": 1, "seconds": 1, "peak_bytes": 1}) == 1


def test_a_knee_does_not_depend_on_units():
    in_minutes = [(a, s / 60, b * 1000) for a, s, b in POINTS]
    assert choose(trials(in_minutes), THREE, Choose(by="knee"))[0].number == 1


def test_limits_leave_out_what_breaks_them_and_the_reason_names_them():
    assert number(limits={"seconds": 50}) == 1
    assert number(limits={"peak_bytes": 300}) == 2
    assert number(by="weights", weights={"seconds": 1}, limits={"accuracy": 0.8}) == 1
    assert "within seconds at most 50 trial 1 has the best" in choose(trials(), THREE, Choose(limits={"seconds": 50}))[1]


def test_a_limit_that_no_member_keeps_is_said_and_not_hidden():
    chosen, why = choose(trials(), THREE, Choose(limits={"accuracy": 0.99}))
    assert chosen.number == 0
    assert why.startswith("no member of the front keeps accuracy at least 0.99, so this is chosen without: trial 0")


def test_what_is_dominated_is_never_chosen_whatever_the_weights():
    weights = ({"accuracy": a, "seconds": s, "peak_bytes": b} for a in (0, 1) for s in (0, 1) for b in (0, 1) if a + s + b)
    assert 3 not in {number(by="weights", weights=w) for w in weights}
    assert choose([], THREE, Choose(by="knee")) is None


@pytest.mark.parametrize(("how", "said"), [
    ({"by": "weights"}, "choose.weights: are needed"),
    ({"weights": {"accuracy": 1}}, "choose.weights: have no meaning with by: best"),
    ({"limits": {"time": 3}}, "choose.limits.time: is no objective of the study. Did you mean seconds?"),
    ({"by": "weights", "weights": {"accuracy": -1}}, "choose.weights.accuracy: must be at least 0"),
    ({"by": "elbow"}, "choose.by"),
])  # fmt: skip
def test_a_choice_that_cannot_be_made_is_refused_before_anything_starts(how, said):
    with pytest.raises(SpecError) as raised:
        load(simulated("/x", choose=how))
    assert any(said in str(problem) for problem in raised.value.problems)


def test_problems_of_a_choice_are_found_all_at_once():
    assert len(problems(Choose(by="knee", weights={"x": 1}, limits={"y": 1}), ["accuracy"])) == 3


def test_a_study_chooses_as_it_was_told_and_another_rule_can_be_tried_afterwards(tmp_path, capsys):
    study = hpo.run(simulated(tmp_path, budget={"trials": 7}, choose={"by": "knee"}))
    assert study.certificate.reason.startswith(f"trial {study.winner().number} is the knee")
    assert study.winner("best").number == study.front()[0].number
    cheapest = min(study.front(), key=lambda t: (t.outcome.seconds, t.number))
    assert study.winner(weights={"seconds": 1}).number == cheapest.number
    assert study.winner(limits={"seconds": cheapest.outcome.seconds}).outcome.seconds == cheapest.outcome.seconds
    with pytest.raises(InputError):
        study.winner("elbow")
    show = ["show", "small", "--storage", tmp_path]
    code, out, _ = command(capsys, *show, "--choose", "seconds=1", "--json")
    assert (code, one_object(out)["chosen"]["number"]) == (0, cheapest.number)
    code, out, _ = command(capsys, *show, "--within", f"seconds={cheapest.outcome.seconds}")
    assert code == 0 and "By this rule: within seconds at most" in out
    assert command(capsys, *show, "--choose", "elbow")[0] == 2
