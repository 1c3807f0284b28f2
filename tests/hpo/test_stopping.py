"""When trials are ended: at an equal share of their own lengths, never because of noise, and never onto a front."""

from __future__ import annotations

import random

import pytest

from hpo import stopping
from hpo.errors import SpecError
from hpo.objectives import losses, named
from hpo.pareto import front
from hpo.spec import load
from hpo.trial import CurvePoint, Trial
from training.recipe import Outcome, Recipe

RECIPE = Recipe()
TWO = named(["accuracy", "seconds"])
THREE = named(["accuracy", "seconds", "peak_bytes"])


def curve(final: float, seconds: float, *, upto: int = 10, of: int = 10, rate: float = 3.0, peak: int | None = 5, wobble=()):
    """Returns the reports of a trial whose accuracy rises towards `final`; `wobble` is added at the first ones."""
    points = []
    for step in range(1, upto + 1):
        share = step / of
        accuracy = final * (1 - 2.718281828 ** (-rate * share)) / (1 - 2.718281828**-rate)
        accuracy += wobble[step - 1] if step <= len(wobble) else 0
        points.append(CurvePoint.model_construct(share=share, step=step, tokens=step, seconds=seconds * share, peak_bytes=peak,
                                                 metrics={"accuracy": accuracy, "train_loss": 1.0}))  # fmt: skip
    return tuple(points)


def done(number: int, final: float, seconds: float, *, peak: int = 5, **known) -> Trial:
    outcome = Outcome(scores={"accuracy": final}, seconds=seconds, peak_bytes=peak)
    return Trial(number=number, params={}, recipe=RECIPE, state="complete", outcome=outcome,
                 curve=curve(final, seconds, peak=peak, **known))  # fmt: skip


def running(final: float, seconds: float, upto: int, *, number: int = 99, **known) -> Trial:
    return Trial(number=number, params={}, recipe=RECIPE, curve=curve(final, seconds, upto=upto, **known))


FINISHED = [done(0, 0.9, 50), done(1, 0.8, 20), done(2, 0.5, 60), done(3, 0.7, 15), done(4, 0.6, 70), done(5, 0.3, 10)]


def test_a_trial_that_is_slow_and_poor_is_ended_and_the_reason_names_who_beats_it():
    said = stopping.front(FINISHED, running(0.4, 80, 3), TWO)
    assert said.startswith("behind the front at 30% of its length: even accuracy 0.")
    assert said.endswith(", seconds 80 would not beat trial 0")


@pytest.mark.parametrize("final, seconds", [(0.95, 80), (0.4, 5), (0.85, 30), (0.3, 9.9)])
def test_a_trial_that_would_be_on_the_front_is_never_ended(final, seconds):
    for upto in range(1, 11):
        assert stopping.front(FINISHED, running(final, seconds, upto), TWO) is None


def test_bytes_that_nobody_has_keep_a_trial_alive_and_bytes_like_the_others_do_not():
    assert stopping.front(FINISHED, running(0.4, 80, 5, peak=4), THREE) is None
    assert stopping.front(FINISHED, running(0.4, 80, 5, peak=5), THREE)
    assert stopping.front(FINISHED, running(0.4, 80, 5, peak=None), THREE), "no trial had less than 5"


def test_what_is_not_known_yet_is_granted_at_its_best():
    small = [*FINISHED, done(6, 0.1, 90, peak=1)]
    assert stopping.front(small, running(0.4, 80, 5, peak=None), THREE) is None
    assert stopping.front(small, running(0.4, 80, 5, peak=5), THREE)


def test_lengths_are_compared_by_share_so_a_short_trial_is_not_taken_for_a_poor_one():
    short = running(0.85, 18, 3, of=10)
    long = [done(n, 0.8 + n / 100, 100 + n, upto=100, of=100) for n in range(6)]
    assert stopping.front(long, short, TWO) is None


def test_seconds_are_corrected_by_how_projections_came_out_before():
    slow_starters = []
    for number, trial in enumerate(FINISHED):  # the first tenth of each takes half of its time
        seconds = trial.outcome.seconds
        points = tuple(p.model_copy(update={"seconds": seconds * (0.5 + 0.5 * p.share)}) for p in trial.curve)
        slow_starters.append(trial.model_copy(update={"curve": points, "number": number}))
    mine = running(0.69, 14, 3)
    points = tuple(p.model_copy(update={"seconds": 14 * (0.5 + 0.5 * p.share)}) for p in mine.curve)
    mine = mine.model_copy(update={"curve": points})
    assert mine.curve[-1].seconds / mine.curve[-1].share > 30, "at its own rate it would be far behind"
    assert stopping.front(slow_starters, mine, TWO) is None


def test_one_bad_score_is_noise_and_two_in_a_row_are_not():
    dip = (0, -0.3)
    assert stopping.front(FINISHED, running(0.86, 48, 2, wobble=dip), TWO) is None
    assert stopping.front(FINISHED, running(0.86, 48, 2, wobble=dip), TWO, patience=1)


def test_nothing_is_ended_in_its_grace_or_before_enough_are_finished_or_at_its_end():
    hopeless = {upto: running(0.01, 500, upto) for upto in (1, 2, 5, 10)}
    assert stopping.front(FINISHED, hopeless[5], TWO)
    assert stopping.front(FINISHED[:2], hopeless[5], TWO) is None
    assert stopping.front(FINISHED, hopeless[5], TWO, grace=0.45) is None
    assert stopping.front(FINISHED, hopeless[1], TWO) is None
    assert stopping.front(FINISHED, hopeless[10], TWO) is None


def test_reports_without_a_score_end_nobody_and_cost_no_patience():
    trial = running(0.01, 500, 2)
    bare = [point.model_copy(update={"metrics": {"train_loss": 1.0}, "share": point.share + 0.05}) for point in trial.curve]
    mixed = trial.model_copy(update={"curve": (trial.curve[0], bare[0])})
    assert stopping.front(FINISHED, mixed, TWO) is None
    assert stopping.front(FINISHED, mixed.model_copy(update={"curve": (trial.curve[0], bare[0], trial.curve[1])}), TWO)


def test_stopped_and_running_trials_beat_nobody():
    cut = {t.number: t.outcome.model_copy(update={"share": 0.9}) for t in FINISHED}
    unfinished = [t.model_copy(update={"state": "stopped", "outcome": cut[t.number]}) for t in FINISHED]
    weak = [done(n, 0.1, 90 + n) for n in range(5)]
    assert stopping.front([*unfinished, *weak], running(0.4, 80, 5), TWO) is None


def test_halving_ends_whoever_is_not_among_the_best_third_at_a_rung():
    others = [running(value, 10, 5, number=n) for n, value in enumerate((0.9, 0.8, 0.7, 0.6, 0.5))]
    assert stopping.asha(others, running(0.85, 99, 4), TWO, grace=0.4) is None
    assert "number 3 of 6 in accuracy at 40%" in stopping.asha(others, running(0.75, 1, 4), TWO, grace=0.4)
    assert stopping.asha(others, running(0.75, 1, 5), TWO, grace=0.4) is None, "it has passed the rung"
    assert stopping.asha(others, running(0.75, 1, 4), TWO, grace=0.4, metric="seconds") is None, "the fastest"
    assert stopping.asha([], running(0.0, 1, 4), TWO, grace=0.4) is None, "the first goes on"


def test_the_control_keeps_what_is_not_dominated_at_the_share_itself():
    others = [running(0.9, 50, 3, number=1), running(0.5, 10, 5, number=2), running(0.99, 5, 1, number=3)]
    assert stopping.fixed(others, running(0.8, 60, 3), TWO, share=0.3) == "beaten by trial 1 at 30% of its length"
    assert stopping.fixed(others, running(0.8, 40, 3), TWO, share=0.3) is None
    assert stopping.fixed(others, running(0.8, 60, 4), TWO, share=0.3) is None, "judged once"
    assert stopping.fixed(others, running(0.8, 60, 2), TWO, share=0.3) is None, "not there yet"


def random_history(chance: random.Random) -> list[Trial]:
    """Returns a history as a rule leaves it: each trial is reported, asked about, and ended where the rule says so."""
    name = chance.choice(list(stopping.RULES))
    options = {"finished": chance.randint(1, 3), "patience": 1, "grace": 0.0} if name == "front" else {}
    history: list[Trial] = []
    for number in range(chance.randint(3, 5)):
        final, seconds, peak = chance.random(), chance.uniform(1, 9), chance.randint(1, 3)
        whole = curve(final, seconds, of=4, upto=4, peak=peak, wobble=[chance.gauss(0, 0.1) for _ in range(3)])
        ended, share = "complete", 1.0
        for upto in range(1, 5):
            trial = Trial.model_construct(number=number, params={}, recipe=RECIPE, curve=whole[:upto], state="running")
            if chance.random() < 0.03:
                ended, share = chance.choice(["diverged", "infeasible", "failed", "running", "cancelled"]), upto / 4
            elif upto < 4 and stopping.RULES[name](history, trial, THREE, **options):
                ended, share = "stopped", upto / 4
            if ended != "complete":
                break
        point = whole[upto - 1]
        outcome = Outcome.model_construct(ended=ended, share=share, scores={"accuracy": point.metrics["accuracy"]}, loss=None,
                                          seconds=point.seconds, peak_bytes=peak, tokens=1, conditions={})  # fmt: skip
        history.append(trial.model_copy(update={"state": ended, "outcome": None if ended in ("running", "failed") else outcome}))
    return history


def test_no_unfinished_point_is_on_a_published_front_in_ten_thousand_random_histories():
    chance, unfinished, tempting = random.Random(0), 0, 0
    for _ in range(10_000):
        history = random_history(chance)
        members = front(history, THREE)
        unfinished += sum(t.state != "complete" or t.outcome.share != 1.0 for t in members)
        best = {tuple(losses(t, THREE)) for t in members}
        cut = [losses(t, THREE) for t in history if t.state == "stopped"]
        tempting += any(not any(all(a <= b for a, b in zip(m, c, strict=True)) for m in best) for c in cut)
    assert unfinished == 0
    assert tempting > 500, "many a stopped trial's partial values would have looked like a place on the front"


def test_remembering_one_by_one_is_remembering_all():
    chance = random.Random(1)
    trials = [done(n, chance.random(), chance.uniform(1, 90), upto=1) for n in range(300)]
    kept: list[Trial] = []
    for trial in chance.sample(trials, 300):
        kept = stopping.remember("front", [*kept, trial], TWO)
        assert len(kept) < 120
    assert kept == stopping.remember("front", trials, TWO)
    probe = running(0.4, 80, 5)
    assert stopping.front(kept, probe, TWO) == stopping.front(trials, probe, TWO)


def test_what_is_wrong_with_a_rule_is_said_with_its_place():
    study = {"name": "a", "storage": "/x", "data": {"train": "embedded:train.jsonl"}, "space": "tiny"}
    with pytest.raises(SpecError) as caught:
        load(study | {"stopping": {"name": "front", "patiance": 3, "grace": 2.0}})
    said = str(caught.value)
    assert "stopping.patiance" in said and "patience" in said and "stopping.grace" in said
    with pytest.raises(SpecError, match="stopping.name"):
        load(study | {"stopping": "front2"})
    assert load(study, ["stopping=asha", "stopping.eta=4.0"]).spec.stopping.options == {"eta": 4.0}
