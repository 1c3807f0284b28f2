"""NSGA-II (Deb et al. 2002) in steady state: each call selects a population from the history and breeds one child.

Owns: how points and trials are told to pymoo's operators. Must not know: other algorithms; nothing of pymoo leaves this
file. There are no generations, so no trial waits for another to end.

Complete trials have no violation; stopped, infeasible and diverged ones have, which loses to any without one both in
survival and in the tournament (Deb et al. 2002, section VI). Ranges are searched in log coordinates where they say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hpo.algorithms import require
from hpo.algorithms._lesson import Lesson, lessons
from hpo.algorithms.random import draw
from hpo.objectives import Objective
from hpo.space import Choice, Float, Int, Params, Space, Value, key
from hpo.trial import Trial

if TYPE_CHECKING:
    import numpy
    from pymoo.core.mixed import MixedVariableMating
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.core.variable import Variable

MATINGS = 50
"""Children that are all known before a point is drawn at random instead."""


def suggest(
    space: Space,
    objectives: Sequence[Objective],
    history: Sequence[Trial],
    rng: Random,
    *,
    population: Annotated[int, Field(ge=4, le=10_000)] = 20,
) -> Params | None:
    """Returns a child of two parents from the best `population` results, or None if no point is left.

    Simulated binary crossover (eta 15, probability 0.9), polynomial mutation (eta 20), a new draw for choices, each
    dimension mutated with probability 1 / dimensions: pymoo's defaults for NSGA-II, and the paper's but for eta 20 in
    the crossover.

    Args:
        population: results that may be parents, and the number of points that are drawn at random before the first
            child. Default 20: a fifth of the budget of about a hundred trials that fine-tuning allows, where the
            paper's 100 would leave nothing to breed.

    Raises:
        ValueError: `population` is out of range, or there are fewer than two objectives.
    """
    require("nsga2", population=population)
    if len(objectives) < 2:
        raise ValueError(f"nsga2 needs at least 2 objectives, got {len(objectives)}. Use bayes for one")
    learned = lessons(space, objectives, history)
    running = sum(trial.state == "running" for trial in history)
    # Without one point that can be trained, all parents are bad examples.
    fertile = len(learned) > 1 and any(lesson.violation == 0 for lesson in learned)
    if not space or not fertile or len(learned) + running < population:
        return draw(space, history, rng)
    tried = {trial.key for trial in history}
    child = _breed(space, _fittest(learned, population), tried, population, rng)
    return child if child is not None else draw(space, history, rng)


def _fittest(learned: Sequence[Lesson], population: int) -> list[Lesson]:
    # All without violation, whom pymoo ranks, and of the others the mildest that could survive beside them: pymoo's own
    # sort leaves open which of equal ones.
    good = [lesson for lesson in learned if lesson.violation == 0]
    bad = sorted((lesson for lesson in learned if lesson.violation > 0), key=lambda lesson: lesson.violation)
    return good + bad[: max(0, population - len(good))]


def _breed(space: Space, parents: Sequence[Lesson], tried: set, population: int, rng: Random) -> Params | None:
    import numpy
    from pymoo.core.problem import Problem
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    variables = {name: _variable(dimension) for name, dimension in space.items()}
    problem = Problem(vars=variables, n_obj=len(parents[0].vector), n_ieq_constr=1)
    chance = numpy.random.default_rng(rng.getrandbits(64))
    everyone = _population(space, problem, parents, rng)
    alive = RankAndCrowding().do(problem, everyone, n_survive=population, random_state=chance, return_indices=True)
    survivors = everyone[sorted(alive)]
    mating = _mating(len(space))
    # The tournament reads its rule and its randomness from an algorithm object; this is all of it.
    rule = SimpleNamespace(tournament_type="comp_by_rank_and_crowding", random_state=chance)
    for _ in range(MATINGS):
        child = mating(problem, survivors, 1, random_state=chance, algorithm=rule)[0].X
        point = space.trim({name: _decode(dimension, child[name]) for name, dimension in space.items()})
        if key(point) not in tried:
            return point
    return None


def _mating(dimensions: int) -> MixedVariableMating:
    from pymoo.algorithms.moo.nsga2 import binary_tournament
    from pymoo.core.mixed import MixedVariableMating
    from pymoo.core.variable import Choice as Options
    from pymoo.core.variable import Integer, Real
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.crossover.ux import UX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.mutation.rm import ChoiceRandomMutation
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.selection.tournament import TournamentSelection

    # pymoo breeds each kind of variable apart and would mutate 1 / (number of that kind): too many in total.
    rate: dict[str, Any] = {"prob": 1.0, "prob_var": 1 / dimensions}
    whole: dict[str, Any] = {"vtype": float, "repair": RoundingRepair()}
    return MixedVariableMating(
        selection=TournamentSelection(func_comp=binary_tournament),
        crossover={
            Real: SBX(eta=15, prob=0.9),
            Integer: SBX(eta=15, prob=0.9, **whole),
            Options: UX(prob=0.9),
        },
        mutation={
            Real: PM(eta=20, **rate),
            Integer: PM(eta=20, **rate, **whole),
            Options: ChoiceRandomMutation(**rate),
        },
        eliminate_duplicates=None,  # not what the parents are but the whole history decides, in the caller
        n_max_iterations=1,
    )


def _population(space: Space, problem: Problem, parents: Sequence[Lesson], rng: Random) -> Population:
    import numpy
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.population import Population
    from pymoo.problems.static import StaticProblem

    genes = []
    for parent in parents:
        # A dimension that does not exist at a parent has no value to inherit: the gene is drawn.
        full = {name: parent.params.get(name, dimension.sample(rng)) for name, dimension in space.items()}
        genes.append({name: _code(space[name], value) for name, value in full.items()})
    values = numpy.array([parent.vector for parent in parents])
    violations = numpy.array([[parent.violation] for parent in parents])
    everyone = Population.new("X", genes)
    Evaluator().eval(StaticProblem(problem, F=values, G=violations), everyone)
    return everyone


def _variable(dimension: Float | Int | Choice) -> Variable:
    from pymoo.core.variable import Choice as Options
    from pymoo.core.variable import Integer, Real

    if isinstance(dimension, Choice):
        return Options(options=list(range(len(dimension.values))))
    if dimension.log:
        return Real(bounds=(math.log(dimension.low), math.log(dimension.high)))
    if isinstance(dimension, Int):
        return Integer(bounds=(0, int(dimension.size) - 1))
    return Real(bounds=(dimension.low, dimension.high))


def _code(dimension: Float | Int | Choice, value: Value) -> float | int:
    if isinstance(dimension, Choice):
        known = enumerate(dimension.values)
        return next(i for i, v in known if v == value and isinstance(v, bool) == isinstance(value, bool))
    if dimension.log:
        return math.log(value)
    return (value - dimension.low) // dimension.step if isinstance(dimension, Int) else float(value)


def _decode(dimension: Float | Int | Choice, gene: float | numpy.number) -> Value:
    if isinstance(dimension, Choice):
        return dimension.values[int(gene)]
    if isinstance(dimension, Int):
        value = round(math.exp(gene)) if dimension.log else dimension.low + int(gene) * dimension.step
    else:
        value = math.exp(gene) if dimension.log else float(gene)
    return min(max(value, dimension.low), dimension.high)
