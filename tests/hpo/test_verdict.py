"""Winner or tie: the statistics against cases whose truth is known, and what an allowance buys."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hpo.objectives import named
from hpo.trial import Trial
from hpo.verdict import Scores, judge, optimism, rivals, seeds_for
from training.recipe import Outcome, Recipe

BOTH = named(["accuracy", "seconds"])


def rows(share: float, count: int = 200) -> tuple[float, ...]:
    right = round(share * count)
    return (1.0,) * right + (0.0,) * (count - right)


def scores(number: int, *seeds: tuple[float, ...]) -> Scores:
    return Scores(number, seeds, (1.0,) * len(seeds[0]))


def trial(number: int, right: str, seconds: float = 1.0) -> Trial:
    accuracy = right.count("1") / len(right)
    outcome = Outcome(scores={"accuracy": accuracy}, seconds=seconds, conditions={"right": right})
    return Trial(number=number, params={}, recipe=Recipe(), state="complete", outcome=outcome)


# Who is compared, how often


def test_rivals_are_those_that_tie_and_else_the_nearest():
    best, near, far = (trial(n, "1" * k + "0" * (100 - k)) for n, k in ((0, 80), (1, 79), (2, 30)))
    assert [t.number for t in rivals(best, [best, near, far], BOTH, 3)] == [1]
    assert [t.number for t in rivals(best, [best, far], BOTH, 3)] == [2]
    assert rivals(best, [best], BOTH, 3) == [] == rivals(best, [best, near], BOTH, 0)


@pytest.mark.parametrize(("allowed", "bought"), [
    (100, [5, 5, 5]), (61, [4, 4, 4]), (31, [2, 2, 2]), (29, [4, 4]), (14, [2, 2]), (11, [2]), (5, [1]), (4, []), (0, []),
])  # fmt: skip
def test_an_allowance_buys_two_seeds_each_for_as_many_as_it_can_and_then_more_seeds(allowed, bought):
    found = seeds_for([5, 2, 8], allowed, 5)
    assert found == bought
    assert sum(n * c for n, c in zip(found, [5, 2, 8], strict=False)) <= allowed


# What is said


def test_a_winner_far_ahead_is_sure_and_one_that_is_equal_ties():
    far = judge(scores(1, rows(0.9), rows(0.9)), [scores(2, rows(0.5), rows(0.51))], over="seeds", failed={})
    assert (far.kind, far.tied) == ("winner", ())
    assert far.confidence >= 0.95 and far.rivals[0].low > 0
    same = judge(scores(1, rows(0.9), rows(0.9)), [scores(2, rows(0.9), rows(0.9))], over="seeds", failed={})
    assert (same.kind, same.tied, same.rivals[0].ahead) == ("tie", (2,), pytest.approx(0.5, abs=0.03))


def test_a_tie_names_only_those_that_are_not_surely_worse():
    found = judge(scores(1, rows(0.9)), [scores(2, rows(0.895)), scores(3, rows(0.3))], over="rows", failed={})
    assert (found.kind, found.tied) == ("tie", (2,))


def test_a_rival_that_is_surely_better_is_named():
    found = judge(scores(1, rows(0.5), rows(0.5)), [scores(2, rows(0.9), rows(0.9))], over="seeds", failed={})
    assert (found.kind, found.better) == ("beaten", 2)


def test_seeds_that_differ_much_make_a_tie_of_what_rows_alone_would_call_sure():
    one, other = (rows(0.80), rows(0.60)), (rows(0.65), rows(0.45))
    assert judge(scores(1, *one), [scores(2, *other)], over="seeds", failed={}).kind == "tie"
    assert judge(scores(1, rows(0.70)), [scores(2, rows(0.55))], over="rows", failed={}).kind == "winner"


def test_one_seed_each_says_nothing_about_seeds_and_a_winner_that_failed_nothing_at_all():
    one = (scores(1, rows(0.9)), [scores(2, rows(0.1))])
    assert judge(*one, over="seeds", failed={}).kind == "open"
    two = (scores(1, rows(0.9), rows(0.9)), [scores(2, rows(0.1), rows(0.1))])
    assert judge(*two, over="seeds", failed={1: "diverged"}).kind == "open"
    assert judge(*two, over="seeds", failed={2: "diverged"}).kind == "winner"


def test_equal_trials_are_called_a_winner_at_most_as_often_as_5_in_100():
    rng = np.random.default_rng(0)
    called = 0
    for n in range(200):
        def trained(number, rng=rng):
            shares = 0.7 + rng.normal(0, 0.03, size=3)
            return scores(number, *(tuple(float(v) for v in rng.random(150) < share) for share in shares))

        called += judge(trained(1), [trained(2)], over="seeds", failed={}, seed=n).kind in ("winner",)
    assert called / 200 <= 0.08


def test_the_optimism_covers_the_truth_and_is_none_where_nothing_was_chosen():
    rng = random.Random(0)
    covered = 0
    for n in range(100):
        chosen = [float(rng.random() < 0.8) for _ in range(300)]
        held = scores(1, *(tuple(float(rng.random() < 0.75) for _ in range(300)) for _ in range(3)))
        found = optimism(chosen, held, seed=n)
        covered += found.low <= 0.05 <= found.high
    assert 88 <= covered <= 100
    assert optimism([0.8], Scores(1, ((0.7,),), (1.0,))).low is None


def test_a_loss_weighs_rows_by_their_tokens():
    a, b = Scores(1, ((-2.0, -9.0),), (2.0, 3.0)), Scores(2, ((-4.0, -12.0),), (2.0, 3.0))
    assert a.means() == [pytest.approx(-11 / 5)]
    assert judge(a, [b], over="rows", failed={}).rivals[0].value == pytest.approx(1.0)
