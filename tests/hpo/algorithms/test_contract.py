"""What every algorithm in the folder must do. A new file in hpo/algorithms is tested by being there."""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys
from random import Random

import pytest

from hpo.algorithms import check_options, load, names, require
from hpo.errors import NotFound
from hpo.objectives import named
from hpo.space import Space, key
from hpo.trial import Trial
from training.recipe import Outcome, Recipe

RECIPE = Recipe(precision="bf16")
OBJECTIVES = named(["accuracy", "seconds", "peak_bytes"])

SPACES = {
    "floats": Space(
        {
            "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
            "dropout": {"type": "float", "low": 0.0, "high": 0.3},
        }
    ),
    "mixed": Space(
        {
            "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
            "rank": {"type": "int", "low": 2, "high": 128, "log": True},
            "alpha": {"type": "float", "low": 0.5, "high": 4.0, "times": "rank"},
            "batch_size": {"type": "int", "low": 4, "high": 64, "step": 4},
            "bits": {"type": "choice", "values": [16, 8, 4]},
            "gradient_checkpointing": {"type": "choice", "values": [True, False]},
        }
    ),
    "conditional": Space(
        {
            "rank": {"type": "int", "low": 1, "high": 64, "when": {"targets": "attention"}},
            "targets": {"type": "choice", "values": ["attention", "mlp", "all-linear"]},
            "dropout": {"type": "float", "low": 0.0, "high": 0.5, "when": {"targets": "mlp"}},
            "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
            "alpha": {"type": "choice", "values": [0.5, 1.0, 2.0], "times": "rank"},
        }
    ),
    "single": Space(
        {
            "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
            "schedule": {"type": "choice", "values": ["cosine"]},
        }
    ),
}

# No range has more than three values, so that the default grid is the whole space.
FINITE = {
    "flat": Space(
        {
            "bits": {"type": "choice", "values": [32, 4]},
            "rank": {"type": "int", "low": 8, "high": 24, "step": 8},
            "gradient_checkpointing": {"type": "choice", "values": [False, True]},
        }
    ),
    "conditional": Space(
        {
            "rank": {"type": "int", "low": 1, "high": 3, "log": True, "when": {"targets": "mlp"}},
            "targets": {"type": "choice", "values": ["mlp", "attention"]},
            "alpha": {"type": "choice", "values": [1, 2.5], "times": "rank"},
        }
    ),
    "equal in Python": Space({"gradient_checkpointing": {"type": "choice", "values": [True, 1, False, 0]}}),
    "one point": Space({"bits": {"type": "choice", "values": [4]}}),
}


def measure(params: dict, number: int) -> tuple[str, Outcome | None]:
    """A stand-in for training: any number of fields, an optimum inside, a wall of memory, every state now and then."""
    state = {5: "failed", 7: "stopped", 11: "diverged", 13: "cancelled"}.get(number % 17, "complete")
    rank, batch = params.get("rank", 16), params.get("batch_size", 8)
    memory = params.get("bits", 16) / 8 + rank / 64 + batch / 32
    if memory > 4.5:
        return "infeasible", None if number % 2 else Outcome(ended="infeasible", peak_bytes=int(memory * 1e9))
    if state in ("failed", "cancelled"):
        return state, None
    rate = math.log10(params.get("learning_rate", 1e-4))
    accuracy = 0.9 - 0.1 * (rate + 3.3) ** 2 + 0.02 * math.log2(rank) - params.get("dropout", 0.1) / 5
    ended = state if state in ("stopped", "diverged") else "complete"
    outcome = Outcome(
        ended=ended,
        share=1.0 if state == "complete" else 0.5,
        scores={"accuracy": accuracy},
        seconds=100 / batch + rank / 8,
        peak_bytes=int(memory * 1e9),
    )
    return state, outcome


def trial(number: int, params: dict, state: str = "complete", outcome: Outcome | None = None) -> Trial:
    return Trial(number=number, params=params, recipe=RECIPE, state=state, outcome=outcome)


def steps_of(name: str, steps: int) -> int:
    """A model takes a third of a second for a point, and has seen all there is to see after ten of them."""
    return min(steps, 22) if name == "bayes" else min(steps, 15) if name == "auto" else steps


def search(name: str, space: Space, steps: int, objectives=OBJECTIVES, seed: int = 0, slots: int = 3) -> list[Trial]:
    """Runs `steps` trials of which up to `slots` are in flight; the last ones stay so."""
    suggest, history = load(name), []
    for number in range(steps):
        point = suggest(space, objectives, history, Random(f"{seed}:{number}"))
        if point is None:
            break
        history.append(trial(number, point, state="running"))
        if number >= slots:
            done = history[number - slots]
            state, outcome = measure(done.params, done.number)
            history[number - slots] = trial(done.number, done.params, state, outcome)
    return history


def history_of(name: str, space: Space, length: int) -> list[Trial]:
    """A history that any algorithm may have to go on from: random points, every state, points of other algorithms."""
    history = search("random", space, length, seed=9)
    return [t if t.number % 10 else t.model_copy(update={"origin": "start"}) for t in history]


@pytest.fixture(params=names())
def algorithm(request):
    return request.param


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("space", SPACES)
def test_every_point_is_new_and_in_the_space(algorithm, space, objectives):
    steps = steps_of(algorithm, 45)
    history = search(algorithm, SPACES[space], steps, OBJECTIVES[:objectives])
    assert len(history) == steps or algorithm == "grid"
    for t in history:
        assert SPACES[space].contains(t.params)
        assert all(type(value) in (bool, int, float, str) for value in t.params.values())
        SPACES[space].resolve(t.params, RECIPE)
    assert len({key(t.params) for t in history}) == len(history)


def test_one_objective_works_or_is_refused(algorithm):
    try:
        steps = steps_of(algorithm, 30)
        history = search(algorithm, SPACES["mixed"], steps, OBJECTIVES[:1])
    except ValueError as error:
        assert "at least 2 objectives, got 1" in str(error)
    else:
        assert len({key(t.params) for t in history}) == steps


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("length", [0, 5, 40])
def test_equal_inputs_give_equal_answers_also_through_json_and_change_nothing(algorithm, space, length):
    history = history_of(algorithm, SPACES[space], length)
    before = copy.deepcopy(history)
    first = load(algorithm)(SPACES[space], OBJECTIVES, history, Random(3))
    assert load(algorithm)(SPACES[space], OBJECTIVES, history, Random(3)) == first
    assert history == before
    again = [Trial.model_validate_json(t.model_dump_json()) for t in history]
    same_space = Space.model_validate_json(SPACES[space].model_dump_json())
    answer = load(algorithm)(same_space, OBJECTIVES, again, Random(3))
    assert answer == first
    assert list(answer) == list(first)


def test_the_answer_does_not_depend_on_the_process(algorithm):
    # Python's string hashes differ from process to process; an order taken from a set would show.
    code = (
        "from random import Random; import sys; from tests.hpo.algorithms.test_contract import *;"
        f"h = history_of('', SPACES['conditional'], 40);"
        f"print([load('{algorithm}')(SPACES['conditional'], OBJECTIVES, h, Random(i)) for i in range(4)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_another_rng_gives_another_point_unless_the_order_is_fixed(algorithm):
    history = history_of(algorithm, SPACES["mixed"], 40)
    answers = {key(load(algorithm)(SPACES["mixed"], OBJECTIVES, history, Random(i))) for i in range(5)}
    # Sobol's sequence is seeded by the first point of the history, which came from another rng.
    assert len(answers) == (1 if algorithm in ("grid", "random") else 5)


def test_two_interleaved_studies_equal_two_separate_ones(algorithm):
    space, other = SPACES["mixed"], SPACES["conditional"]
    steps = steps_of(algorithm, 30)
    alone = search(algorithm, space, steps, seed=1), search(algorithm, other, steps, seed=2)
    suggest, histories = load(algorithm), ([], [])
    for number in range(steps):
        for which, (history, where) in enumerate(zip(histories, (space, other), strict=True)):
            point = suggest(where, OBJECTIVES, history, Random(f"{which + 1}:{number}"))
            history.append(trial(number, point, state="running"))
            if number >= 3:
                done = history[number - 3]
                history[number - 3] = trial(done.number, done.params, *measure(done.params, done.number))
    assert list(histories) == list(alone)


@pytest.mark.parametrize("space", FINITE)
def test_a_finite_space_is_tried_out_and_then_ends(algorithm, space):
    history = search(algorithm, FINITE[space], 100, slots=2)
    assert len(history) == FINITE[space].size
    assert {key(t.params) for t in history} == {key(point) for point in FINITE[space].grid(10)}


def test_a_finite_space_of_which_all_failed_ends(algorithm):
    space = FINITE["flat"]
    history = [trial(i, point, "failed") for i, point in enumerate(space.grid(10))]
    assert load(algorithm)(space, OBJECTIVES, history, Random(0)) is None


def test_the_last_point_of_a_space_is_found(algorithm):
    space = Space({"rank": {"type": "int", "low": 1, "high": 3000}, "bits": {"type": "choice", "values": [4, 8]}})
    points = space.grid(3000)
    outcome = Outcome(scores={"accuracy": 0.5}, seconds=1.0, peak_bytes=1)
    history = [trial(i, p, "complete" if i < 50 else "failed", outcome) for i, p in enumerate(points) if i != 2000]
    options = {"levels": 1000} if algorithm == "grid" else {}
    answer = load(algorithm)(space, OBJECTIVES, history, Random(0), **options)
    assert answer == points[2000] or algorithm == "grid" and answer is None


def test_an_empty_space_has_one_point(algorithm):
    assert load(algorithm)(Space({}), OBJECTIVES, [], Random(0)) == {}
    assert load(algorithm)(Space({}), OBJECTIVES, [trial(0, {})], Random(0)) is None


def _points(space: Space, count: int) -> list[dict]:
    rng = Random(5)
    return [space.sample(rng) for _ in range(count)]


GOOD = Outcome(scores={"accuracy": 0.5}, seconds=10.0, peak_bytes=10**9)
HISTORIES = {
    "all infeasible": [("infeasible", None)] * 40,
    "all diverged": [("diverged", Outcome(ended="diverged", scores={"accuracy": 0.1}, seconds=1.0, peak_bytes=1))] * 40,
    "all stopped": [("stopped", Outcome(ended="stopped", share=0.2))] * 40,
    "all stopped without outcome": [("stopped", None)] * 40,
    "all failed": [("failed", None)] * 40,
    "all cancelled": [("cancelled", None)] * 40,
    "all running": [("running", None)] * 40,
    "complete without outcome": [("complete", None)] * 40,
    "complete without an objective": [("complete", Outcome(scores={"accuracy": 0.5}))] * 40,
    "one trial": [("complete", GOOD)],
    "one good among infeasible": [("complete", GOOD)] + [("infeasible", None)] * 40,
    "constant values": [("complete", GOOD)] * 40,
    "huge values": [
        ("complete", Outcome(scores={"accuracy": x * 1e308}, seconds=1.7e308, peak_bytes=10**300)) for x in (-1.7, 1.7, 0.0) * 10
    ],
}


@pytest.mark.parametrize("space", ["mixed", "conditional"])
@pytest.mark.parametrize("case", HISTORIES)
def test_any_history_is_survived(algorithm, case, space):
    points = _points(SPACES[space], len(HISTORIES[case]))
    history = [trial(i, points[i], *known) for i, known in enumerate(HISTORIES[case])]
    point = load(algorithm)(SPACES[space], OBJECTIVES, history, Random(0))
    assert SPACES[space].contains(point)
    assert key(point) not in {key(t.params) for t in history}


def test_trials_outside_the_space_do_no_harm(algorithm):
    # The defaults are trial 0, and may lie elsewhere.
    strange = [{}, {"rank": 16}, {"learning_rate": 5.0, "dropout": 0.1}, {"learning_rate": 1e-3, "dropout": "no"}]
    history = [trial(i, params, "complete", GOOD) for i, params in enumerate(strange)]
    history += [t.model_copy(update={"number": t.number + 4}) for t in history_of(algorithm, SPACES["floats"], 30)]
    assert SPACES["floats"].contains(load(algorithm)(SPACES["floats"], OBJECTIVES, history, Random(0)))


def test_a_float_written_as_a_whole_number_is_understood(algorithm):
    space = Space({"alpha": {"type": "float", "low": 1, "high": 64, "log": True}})
    rng = Random(1)
    points = [{"alpha": 2}, {"alpha": 64}] + [space.sample(rng) for _ in range(30)]
    history = [trial(i, p, "complete", GOOD) for i, p in enumerate(points)]
    assert space.contains(load(algorithm)(space, OBJECTIVES, history, Random(0)))


def test_nothing_is_logged_and_no_log_level_is_changed(algorithm, caplog, capfd):
    level = logging.getLogger("optuna").level
    history = history_of(algorithm, SPACES["conditional"], 30)
    with caplog.at_level(logging.DEBUG):
        load(algorithm)(SPACES["conditional"], OBJECTIVES, history, Random(0))
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert logging.getLogger("optuna").level in (level, logging.INFO)


# Names and options


def test_the_folder_is_the_registry():
    assert {"auto", "bayes", "grid", "nsga2", "random"} <= set(names())
    assert not [name for name in names() if name.startswith("_")]


def test_names_that_people_type_get_a_hint():
    with pytest.raises(NotFound, match="no algorithm 'tpe'. Did you mean bayes. There are auto, bayes, grid"):
        load("tpe")
    with pytest.raises(NotFound, match="Did you mean nsga2"):
        check_options("nsgaii", {})


def test_options_are_checked_without_importing_the_libraries():
    code = (
        "import sys; from hpo.algorithms import *; from hpo.algorithms import names, check_options;"
        "[check_options(name, {'startup': 0}) for name in names()];"
        "sys.exit(any(heavy in sys.modules for heavy in ('optuna', 'pymoo', 'numpy', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": "."}).returncode == 0


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("bayes", {"startup": 5}, []),
        ("bayes", {}, []),
        ("bayes", {"startup": 0}, [("startup", "must be greater than or equal to 1, got 0")]),
        ("bayes", {"startup": True}, [("startup", "must be an integer, got True")]),
        ("bayes", {"startup": "5"}, [("startup", "must be an integer, got '5'")]),
        ("bayes", {"startup": 5.0}, [("startup", "must be an integer, got 5.0")]),
        ("bayes", {"startup": None}, [("startup", "must be an integer, got None")]),
        (
            "bayes",
            {"start_up": 5},
            [("start_up", "is not an option of bayes. Did you mean startup? Its options are startup, model")],
        ),
        ("bayes", {"model": "gp"}, []),
        ("bayes", {"model": "tree"}, [("model", "must be 'auto', 'gp' or 'tpe', got 'tree'")]),
        ("nsga2", {"population": 3}, [("population", "must be greater than or equal to 4, got 3")]),
        ("grid", {"levels": 0}, [("levels", "must be greater than or equal to 1, got 0")]),
        ("random", {"seed": 1}, [("seed", "is not an option of random. It has none")]),
        (
            "grid",
            {"levels": -1, "rng": 2},
            [
                ("levels", "must be greater than or equal to 1, got -1"),
                ("rng", "is not an option of grid. Its options are levels"),
            ],
        ),
    ],
)
def test_options_are_checked_against_the_signature(name, options, found):
    assert check_options(name, options) == found


@pytest.mark.parametrize(
    ("name", "options"), [("bayes", {"startup": 0}), ("nsga2", {"population": True}), ("grid", {"levels": "3"})]
)
def test_a_wrong_option_raises_with_rule_and_value(name, options):
    with pytest.raises(ValueError, match="must be .*, got"):
        load(name)(SPACES["mixed"], OBJECTIVES, [], Random(0), **options)
    with pytest.raises(ValueError, match="must be .*, got"):
        require(name, **options)


def test_the_objectives_that_an_algorithm_needs_are_said():
    with pytest.raises(ValueError, match="nsga2 needs at least 2 objectives, got 1"):
        load("nsga2")(SPACES["mixed"], OBJECTIVES[:1], [], Random(0))
    with pytest.raises(ValueError, match="bayes needs at least 1 objective, got 0"):
        load("bayes")(SPACES["mixed"], (), [], Random(0))
