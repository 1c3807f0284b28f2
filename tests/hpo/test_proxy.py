"""From a small study to a large one: which points are tried, and whether both rank alike."""

from __future__ import annotations

import random

import pytest
import yaml
from contracts import SPACE, command, one_object, simulated

import hpo
from hpo import proxy
from hpo.errors import InputError
from hpo.objectives import named
from hpo.spec import load
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

(SCORE,) = named(["accuracy"])


def trial(number: int, accuracy: float, state="complete") -> Trial:
    params = {"rank": (4, 8, 16, 32)[number % 4], "learning_rate": 1e-4 * (1 + number), "batch_size": 8}
    outcome = Outcome(scores={"accuracy": accuracy}, seconds=1.0, peak_bytes=1)
    return Trial(number=number, params=params, recipe=Recipe(), state=state, outcome=outcome)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The storage of a finished study of twelve trials."""
    storage = tmp_path_factory.mktemp("small") / "store"
    hpo.run(simulated(storage, name="proxy", budget={"trials": 12}))
    return storage


def test_the_best_are_chosen_and_some_from_all_over_the_rest():
    space = load(simulated("/x")).spec.space
    trials = [trial(n, accuracy) for n, accuracy in enumerate(random.Random(0).sample([i / 20 for i in range(20)], 20))]
    ranked = sorted(trials, key=lambda t: -t.outcome.scores["accuracy"])
    points = proxy.chosen(trials, SCORE, space, top=3, spread=4)
    places = [[t.params for t in ranked].index(point) for point in points]
    assert places[:3] == [0, 1, 2]
    assert places[3:] == sorted(places[3:]) and places[3] < 8 and places[-1] > 14 and len(set(places)) == 7


def test_only_complete_trials_inside_the_space_are_chosen():
    space = load(simulated("/x")).spec.space
    outside = trial(3, 0.99).model_copy(update={"params": {"rank": 5, "learning_rate": 1e-3, "batch_size": 8}})
    trials = [trial(0, 0.9, "stopped"), trial(1, 0.5), trial(2, 0.6), outside]
    assert proxy.chosen(trials, SCORE, space, top=4, spread=4) == [trials[2].params, trials[1].params]


@pytest.mark.parametrize(
    ("there", "expected"),
    [([0.1, 0.2, 0.3, 0.4], 1.0), ([0.4, 0.3, 0.2, 0.1], -1.0), ([0.2, 0.1, 0.4, 0.3], 0.6), ([0.5, 0.5, 0.5, 0.5], None)],
)
def test_the_rank_correlation_is_that_of_the_points_on_both(there, expected):
    here = [trial(n, a) for n, a in enumerate([0.5, 0.6, 0.7, 0.8])]
    target = [trial(n, a) for n, a in enumerate(there)] + [trial(9, 0.9)]  # which the proxy never tried
    correlation, points = proxy.agreement(here, target, SCORE)
    assert points == 4 and correlation == (expected if expected is None else pytest.approx(expected))


def test_two_points_say_nothing():
    assert proxy.agreement([trial(0, 0.1), trial(1, 0.2)], [trial(0, 0.1), trial(1, 0.2)], SCORE) == (None, 2)


def test_what_ranks_alike_is_taken_over_and_what_does_not_is_refused(small):
    target = simulated(small, name="target", budget={"trials": 99})
    made = hpo.transfer("proxy", target, top=3, spread=2)
    assert made.holds and made.correlation == pytest.approx(1.0) and made.points >= 5
    assert len(made.study.history()) == 6 and made.study.winner() is not None  # the defaults and five points
    assert "ranks as target does: rank correlation +1.00" in made.said
    refused = hpo.transfer("proxy", target, top=3, spread=2, least=1.5)  # the same points: nothing is trained again
    assert not refused.holds and len(refused.study.history()) == 6
    assert "does not rank as target does" in refused.said and "Nothing is taken over" in refused.said


def test_the_command_says_the_same(small, tmp_path, capsys):
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(simulated(small, name="large")))
    code, out, _ = command(capsys, "transfer", "proxy", path, "--top", 2, "--spread", 2, "--json")
    found = one_object(out)
    assert code == 0 and found["transfer"]["holds"] and found["transfer"]["proxy"] == "proxy"
    code, _, err = command(capsys, "transfer", "nothing", path)
    assert code == 2 and "nothing" in err


def test_a_proxy_over_other_dimensions_or_with_too_few_trials_is_refused(small):
    other = simulated(small, name="other", space={name: SPACE[name] for name in ("rank", "batch_size")})
    with pytest.raises(InputError, match="searches rank, learning_rate, batch_size, and not the target's dimensions"):
        hpo.transfer("proxy", other)
    hpo.run(simulated(small, name="tiny", budget={"trials": 2}))
    with pytest.raises(InputError, match="has 2 complete trials"):
        hpo.transfer("tiny", simulated(small, name="from-tiny"))
