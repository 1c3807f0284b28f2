"""From a front to a claim: what is timed, which member is chosen and why, and how sure the numbers are."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from contracts import simulated

from hpo import certify
from hpo.certificate import Measured
from hpo.objectives import named
from hpo.pareto import front
from hpo.spec import load
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

BOTH = named(["accuracy", "seconds"])


def trial(
    number: int, accuracy: float = 0.5, seconds: float = 1.0, *, right: str = "", state="complete", share=1.0, error=0.0, **more
) -> Trial:
    outcome = Outcome(
        scores={"accuracy": accuracy},
        seconds=seconds,
        share=share,
        peak_bytes=100,
        conditions=({"right": right} if right else {}) | ({"seconds_error": error} if error else {}),
        **more,
    )
    return Trial(number=number, params={"rank": number + 1}, recipe=Recipe(), state=state, outcome=outcome)


def measured(seconds: float, peak_bytes: int = 0) -> Measured:
    return Measured(seconds=seconds, low=seconds, high=seconds, repeats=3, peak_bytes=peak_bytes, in_study=1.0)


# With what was measured alone


def test_trials_timed_alone_have_those_seconds_and_bytes_and_the_others_stay():
    given = [trial(0), trial(1), Trial(number=2, params={}, recipe=Recipe())]
    found = certify.with_measured(given, {0: measured(9.0, 7), 1: measured(8.0), 2: measured(7.0)})
    assert [t.outcome and (t.outcome.seconds, t.outcome.peak_bytes) for t in found] == [(9.0, 7), (8.0, 100), None]
    assert given[0].outcome.seconds == 1.0
    assert certify.with_measured(given, {}) == given


# What is timed alone


def test_the_front_is_timed_until_every_member_is_and_no_more():
    # The true time of trial 0 shows that it stood on the front by luck; then trial 1 comes onto it, trial 3 never does.
    trials = [trial(0, 0.9, 1.0), trial(1, 0.8, 2.0), trial(2, 0.7, 0.5), trial(3, 0.1, 9.0)]
    true = {0: 5.0, 1: 2.5, 2: 0.6}
    rounds = []

    def measure(todo):
        rounds.append(sorted(t.number for t in todo))
        return {t.number: measured(true[t.number]) for t in todo}

    found = certify.settle(trials, BOTH, measure, {})
    assert rounds == [[0, 2], [1]]
    assert {number: m.seconds for number, m in found.items()} == true


def test_what_was_timed_before_is_not_timed_again():
    found = certify.settle([trial(0)], BOTH, lambda todo: pytest.fail("timed again"), {0: measured(3.0)})
    assert found[0].seconds == 3.0


def test_settling_a_random_study_ends_with_a_front_that_is_all_timed():
    rng = random.Random(0)
    for _ in range(30):
        trials = [trial(n, round(rng.random(), 2), rng.uniform(1, 2)) for n in range(12)]
        true = {n: rng.uniform(1, 2) for n in range(12)}
        found = certify.settle(trials, BOTH, lambda todo, true=true: {t.number: measured(true[t.number]) for t in todo}, {})
        members = front(certify.with_measured(trials, found), BOTH)
        assert members
        assert {t.number for t in members} <= set(found)


def test_where_seconds_were_estimated_all_that_may_be_on_the_front_are_timed():
    # Trial 1 is beaten by 10 % and may be wrong by twice 8 %; trial 2 was measured; trial 3 is beaten beyond its error.
    trials = [trial(0, 0.9, 1.0), trial(1, 0.9, 1.1, error=0.08), trial(2, 0.9, 1.1), trial(3, 0.9, 1.3, error=0.08)]
    rounds = []

    def measure(todo):
        rounds.append(sorted(t.number for t in todo))
        return {t.number: measured({0: 1.0, 1: 0.95}[t.number]) for t in todo}

    found = certify.settle(trials, BOTH, measure, {})
    assert rounds == [[0, 1]]
    assert [t.number for t in front(certify.with_measured(trials, found), BOTH)] == [1]


# What is chosen


def test_without_a_complete_trial_there_is_no_winner():
    assert certify.choose([], BOTH) is None
    assert certify.choose([trial(0, state="stopped"), trial(1, state="diverged"), trial(2, share=0.5)], BOTH) is None


def test_the_best_score_wins_where_nothing_ties():
    wide = "1" * 90 + "0" * 10
    chosen, why = certify.choose([trial(0, 0.9, 9.0, right=wide), trial(1, 0.1, 1.0, right="1" * 10 + "0" * 90)], BOTH)
    assert chosen.number == 0
    assert why == "trial 0 has the best accuracy (0.9)"


def test_among_ties_the_cheapest_wins():
    a = "1" * 80 + "0" * 20
    trials = [
        trial(0, 0.80, 9.0, right=a),
        trial(1, 0.79, 1.0, right="1" * 79 + "0" * 21),
        trial(2, 0.3, 0.5, right="1" * 30 + "0" * 70),
    ]
    chosen, why = certify.choose(trials, BOTH)
    assert chosen.number == 1
    assert "trial 1 ties with it (95 %), and trial 1 (0.79) is the cheapest" in why


def test_the_best_one_wins_a_tie_when_it_is_the_cheapest():
    three = named(["accuracy", "seconds", "peak_bytes"])
    a, b = trial(0, 0.80, 1.0, right="1" * 80 + "0" * 20), trial(1, 0.79, 2.0, right="1" * 79 + "0" * 21)
    b = b.model_copy(update={"outcome": b.outcome.model_copy(update={"peak_bytes": 90})})
    chosen, why = certify.choose([a, b], three)
    assert chosen.number == 0
    assert why.endswith("but it is the cheapest of them")


@pytest.mark.parametrize(("lost", "won", "ties"), [(3, 0, False), (2, 0, True), (20, 13, True), (20, 8, False), (1, 1, True)])
def test_a_tie_is_a_paired_difference_within_1645_standard_errors(lost, won, ties):
    # Of 100 rows `lost` only the best has right, `won` only the other; the rest agree.
    best = "1" * lost + "0" * won + "1" * (100 - lost - won)
    other = "0" * lost + "1" * won + "1" * (100 - lost - won)
    difference = [int(a) - int(b) for a, b in zip(best, other, strict=True)]
    error = statistics.stdev(difference) / math.sqrt(100)
    assert (statistics.mean(difference) <= 1.645 * error) == ties, "the example itself"
    trials = [trial(0, best.count("1") / 100 + 1e-9, 9.0, right=best), trial(1, other.count("1") / 100, 1.0, right=other)]
    assert certify.choose(trials, BOTH)[0].number == (1 if ties else 0)


def test_without_rows_nothing_ties():
    assert certify.choose([trial(0, 0.80, 9.0), trial(1, 0.7999, 1.0)], BOTH)[0].number == 0


def test_a_score_that_is_no_accuracy_has_no_ties():
    rows = "1" * 50 + "0" * 50
    trials = [
        trial(0, 0.5, 9.0, right=rows, loss=1.0), trial(1, 0.5, 1.0, right=rows, loss=1.001),
    ]  # fmt: skip
    chosen, why = certify.choose(trials, named(["loss", "seconds"]))
    assert (chosen.number, why) == (0, "trial 0 has the best loss (1)")


def test_more_throughput_is_cheaper_not_dearer():
    objectives = named(["accuracy", "tokens_per_second"])
    slow = trial(0, 0.80, 10.0, right="1" * 80 + "0" * 20, tokens=1000)
    fast = trial(1, 0.79, 1.0, right="1" * 79 + "0" * 21, tokens=1000)
    assert certify.choose([slow, fast], objectives)[0].number == 1


# How sure


def test_the_interval_of_a_share_is_that_of_the_binomial():
    rows = [1.0] * 60 + [0.0] * 40
    found = certify.interval(rows)
    assert found.value == 0.6

    def cumulative(k: int) -> float:
        return sum(math.comb(100, i) * 0.6**i * 0.4 ** (100 - i) for i in range(k + 1))

    low = next(k for k in range(101) if cumulative(k) >= 0.025) / 100
    high = next(k for k in range(101) if cumulative(k) >= 0.975) / 100
    assert found.low == pytest.approx(low, abs=0.011)
    assert found.high == pytest.approx(high, abs=0.011)


def test_an_interval_is_the_same_each_time_and_a_point_where_all_rows_agree():
    rows = [0.0, 1.0, 1.0, 0.5]
    assert certify.interval(rows) == certify.interval(rows)
    sure = certify.interval([1.0] * 7)
    assert (sure.value, sure.low, sure.high) == (1, 1, 1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(1)
    covered = 0
    for n in range(200):
        found = certify.interval([float(rng.random() < 0.7) for _ in range(150)], seed=n)
        covered += found.low <= 0.7 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


# The whole certificate


def spec(**changes):
    return load(simulated("/x", train="loop", objectives=["accuracy", "seconds"], **changes)).spec


class Worker:
    """Answers in the place of a worker: what was timed, and right or wrong by row."""

    def __init__(self):
        self.called = []

    def __call__(self, function, payload):
        self.called.append((function, payload))
        if function == "training.measure.time_alone":
            return [{"seconds": 4.0, "low": 3.9, "high": 4.2, "repeats": 3, "peak_bytes": None} for _ in payload["jobs"]]
        right = {"untuned": [0.0] * 100, "defaults": [1.0] * 50 + [0.0] * 50, "winner": [1.0] * 80 + [0.0] * 20}
        models = [{"who": m["who"], "right": right[m["who"]], "nll": [2.0] * 100, "tokens": [4] * 100} for m in payload["models"]]
        rows = [{"prompt": "p", "expected": "e", **{m["who"]: "a" for m in payload["models"]}}]
        return {"models": models, "rows": rows, "machine": {"cores": 2, "gemm_seconds": 0.5}}


def complete(number: int, accuracy: float, seconds: float, origin="search") -> Trial:
    t = trial(number, accuracy, seconds, checkpoint=f"/c/{number}")
    conditions = {"device": "cpu", "gemm_seconds": 1.0}
    return t.model_copy(update={"origin": origin, "outcome": t.outcome.model_copy(update={"conditions": conditions})})


def test_a_certificate_names_the_winner_times_the_front_and_compares_on_untouched_rows():
    study, worker = spec(), Worker()
    trials = [complete(0, 0.5, 1.0, "defaults"), complete(1, 0.8, 2.0)]
    made = certify.certify(study, trials, study.data, worker, known={})
    assert made.winner == 1
    assert made.measured[1] == Measured(seconds=4.0, low=3.9, high=4.2, repeats=3, peak_bytes=100, in_study=2.0)
    assert [(s.who, s.number, s.accuracy.value, s.loss) for s in made.scores] == [
        ("untuned", None, 0.0, 0.5), ("defaults", 0, 0.5, 0.5), ("winner", 1, 0.8, 0.5),
    ]  # fmt: skip
    assert made.gain.value == pytest.approx(0.3)
    assert made.gain.low < 0.3 < made.gain.high
    assert made.machine == {"cores": 2, "gemm_seconds": 0.5, "device": "cpu", "slow_down": 2.0}
    compared = worker.called[-1][1]
    assert [(m["who"], m["checkpoint"]) for m in compared["models"]] == [
        ("untuned", None), ("defaults", "/c/0"), ("winner", "/c/1"),
    ]  # fmt: skip


def test_without_defaults_to_compare_with_there_is_no_gain():
    study, worker = spec(), Worker()
    made = certify.certify(study, [complete(1, 0.8, 2.0)], study.data, worker, known={})
    assert made.gain is None
    assert [s.who for s in made.scores] == ["untuned", "winner"]
    assert made.rows[0].defaults is None


def test_a_group_of_several_workers_and_a_study_without_seconds_are_not_timed_alone():
    for changes in ({"resources": {"workers": 2}}, {"objectives": ["accuracy", "peak_bytes"]}):
        study, worker = load(simulated("/x", train="loop") | changes).spec, Worker()
        made = certify.certify(study, [complete(1, 0.8, 2.0)], study.data, worker, known={})
        assert made.measured == {}
        assert [function for function, _ in worker.called] == ["training.measure.compare"]


def test_what_our_loop_did_not_train_is_only_given_its_winner():
    study = load(simulated("/x")).spec
    made = certify.certify(study, [trial(0)], study.data, lambda *_: pytest.fail("nothing to measure"), known={}, real=False)
    assert (made.winner, made.scores, made.gain) == (0, (), None)


def test_nothing_is_claimed_where_nothing_is_complete():
    study = spec()
    failed = [trial(0, state="infeasible"), Trial(number=1, params={}, recipe=Recipe(), state="failed")]
    assert certify.certify(study, failed, study.data, Worker(), known={}) is None
