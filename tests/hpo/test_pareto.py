"""The front against brute force, the hypervolume against sampling."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.objectives import named
from hpo.pareto import dominates, eligible, front, hypervolume, nondominated
from hpo.trial import FINAL, Trial
from training.recipe import Outcome, Recipe

# Few different numbers, so that ties and duplicates are common.
COORDINATE = st.one_of(st.integers(0, 4).map(float), st.floats(-1e6, 1e6))


def vectors(dimensions: int, most: int = 25):
    return st.lists(st.tuples(*[COORDINATE] * dimensions), max_size=most)


def trial(number: int, scores: dict, seconds: float | None = 1.0, state: str = "complete", share: float = 1.0) -> Trial:
    outcome = Outcome(scores=scores, seconds=seconds, share=share)
    return Trial(number=number, params={}, recipe=Recipe(), state=state, outcome=outcome)


@settings(deadline=None)
@given(st.integers(1, 4).flatmap(vectors))
def test_nondominated_agrees_with_brute_force_and_keeps_duplicates(points):
    expected = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert nondominated(points) == expected


@settings(deadline=None)
@given(vectors(3))
def test_nondominated_does_not_depend_on_the_order(points):
    turned = points[::-1]
    assert sorted(points[i] for i in nondominated(points)) == sorted(turned[i] for i in nondominated(turned))


@settings(deadline=None)
@given(st.tuples(*[COORDINATE] * 3), st.tuples(*[COORDINATE] * 3), st.tuples(*[COORDINATE] * 3))
def test_dominance_is_a_strict_order(a, b, c):
    assert not dominates(a, a)
    assert not (dominates(a, b) and dominates(b, a))
    if dominates(a, b) and dominates(b, c):
        assert dominates(a, c)


def test_dominance_needs_one_strict_gain_and_equal_lengths():
    assert dominates([0.0, 1.0], [0.0, 2.0])
    assert not dominates([0.0, 2.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        dominates([0.0], [0.0, 1.0])


def test_nothing_has_no_front():
    assert nondominated([]) == []
    assert front([], named(["accuracy", "seconds"])) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=20))
def test_the_front_respects_goals_and_is_ordered_best_first(pairs):
    objectives = named(["accuracy", "seconds"])
    trials = [trial(i, {"accuracy": a / 4}, float(s)) for i, (a, s) in enumerate(pairs)]
    found = front(trials, objectives)
    expected = {i for i, (a, s) in enumerate(pairs) if not any(b >= a and t <= s and (b, t) != (a, s) for b, t in pairs)}
    assert {t.number for t in found} == expected
    order = [(-t.outcome.scores["accuracy"], t.outcome.seconds, t.number) for t in found]
    assert order == sorted(order)


def test_equal_trials_all_stay_on_the_front():
    objectives = named(["accuracy", "seconds"])
    trials = [trial(i, {"accuracy": 0.5}) for i in range(3)]
    assert front(trials, objectives) == trials


@pytest.mark.parametrize("state", ["running", *FINAL])
def test_only_complete_trials_are_on_the_front(state):
    objectives = named(["accuracy", "seconds"])
    other, best = trial(0, {"accuracy": 0.5}), trial(1, {"accuracy": 0.9}, state=state)
    assert eligible(best) == (state == "complete")
    assert front([other, best], objectives) == ([best] if state == "complete" else [other])


def test_a_trial_that_did_not_train_to_its_end_is_not_on_the_front():
    objectives = named(["accuracy", "seconds"])
    short, whole = trial(0, {"accuracy": 0.9}, share=0.999), trial(1, {"accuracy": 0.5})
    assert not eligible(short)
    assert eligible(trial(2, {}, share=1 - 1e-12))
    assert front([short, whole], objectives) == [whole]


def test_a_trial_without_outcome_or_without_an_objective_is_not_on_the_front():
    objectives = named(["accuracy", "seconds"])
    empty = Trial(number=0, params={}, recipe=Recipe(), state="complete")
    untimed, unscored = trial(1, {"accuracy": 0.9}, None), trial(2, {"exact_match": 0.9})
    assert not eligible(empty)
    assert front([empty, untimed, unscored], objectives) == []


UNIT = st.floats(0, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 3).flatmap(lambda n: st.lists(st.tuples(*[UNIT] * n), min_size=1, max_size=12)))
def test_hypervolume_agrees_with_sampling(points):
    import numpy

    sample = numpy.random.default_rng(0).random((20_000, len(points[0])))
    hit = numpy.zeros(len(sample), dtype=bool)
    for point in points:
        hit |= (sample >= numpy.array(point)).all(axis=1)
    # Eleven standard errors of a share from 20,000 draws: hypothesis looks for the worst of many sets.
    assert hypervolume(points, [1.0] * len(points[0])) == pytest.approx(hit.mean(), abs=0.04)


def test_hypervolume_of_known_sets():
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([(0.25, 0.5)], [1.0, 1.0]) == pytest.approx(0.375)
    assert hypervolume([(0.0, 0.5), (0.5, 0.0)], [1.0, 1.0]) == pytest.approx(0.75)
    assert hypervolume([(-1.0, -2.0, -3.0)], [0.0, 0.0, 0.0]) == pytest.approx(6.0)
    assert hypervolume([(3.0,), (2.0,)], [5.0]) == pytest.approx(3.0)


def test_what_is_not_below_the_reference_adds_nothing():
    inside = [(0.5, 0.5)]
    for outside in ((1.0, 0.0), (0.0, 1.0), (2.0, -5.0)):
        assert hypervolume([*inside, outside], [1.0, 1.0]) == pytest.approx(0.25)
    assert hypervolume([(1.0, 1.0)], [1.0, 1.0]) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=10), st.tuples(UNIT, UNIT))
def test_another_point_never_lowers_the_hypervolume_and_a_dominated_one_leaves_it(points, extra):
    before = hypervolume(points, [1.0, 1.0])
    after = hypervolume([*points, extra], [1.0, 1.0])
    assert after >= before - 1e-12
    if any(all(p <= e for p, e in zip(point, extra, strict=True)) for point in points):
        assert math.isclose(after, before, abs_tol=1e-12)
