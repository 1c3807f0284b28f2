"""Algorithms against each other: the same problem, seed and first points, one process a core, every finished run kept.

Owns: ours and its peers as a user would run them, one trial at a time; the journal of runs; ratios with their intervals.
Must not know: which figures are wanted.

A run is named by problem, algorithm and seed. It begins with START points drawn at random, the same ones for all algorithms of
that seed, and keeps the hypervolume at some numbers of trials.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.search import problems
from benchmarks.search.problems import Problem
from hpo.algorithms import load
from hpo.objectives import losses
from hpo.space import Choice, Int, Params
from hpo.trial import Trial

START = 10
CORES = 2
Run = dict[str, Any]


def runs(wanted: Iterable[Run], journal: Path) -> list[Run]:
    """Returns the runs that are wanted, those that lack being made and appended to the journal as they end.

    Args:
        wanted: each with problem, algorithm, seed, options and `at`, the numbers of trials whose hypervolume is kept.
    """
    wanted = list(wanted)
    known = {_name(run): run for run in read(journal)}
    missing = [run for run in wanted if _name(run) not in known]
    if missing:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # A seed of all problems before the next: what is there after any time is a smaller benchmark, not a part of one.
        missing.sort(key=lambda run: run["seed"])
        with multiprocessing.get_context("spawn").Pool(CORES) as pool, journal.open("a") as file:
            for run in pool.imap_unordered(_run, missing):
                file.write(json.dumps(run) + "\n")
                file.flush()
                known[_name(run)] = run
    return [known[_name(run)] for run in wanted]


def _name(run: Run) -> str:
    return json.dumps([run.get(part) for part in ("problem", "algorithm", "seed", "options", "at", "given")], sort_keys=True)


def read(journal: Path) -> list[Run]:
    """Returns what a journal holds; a torn last line is cut off, so that what is appended next stands alone."""
    if not journal.is_file():
        return []
    whole, _, torn = journal.read_bytes().rpartition(b"\n")
    if torn:
        with journal.open("r+b") as file:
            file.truncate(len(whole) + 1 if whole else 0)
    return [json.loads(line) for line in whole.splitlines()]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Returns the ratio of the means over seeds, and the paired 95 % interval of the differences (bootstrap, 2,000 draws)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    rng = Random(0)
    draws = sorted(statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(2000))
    return {
        "ratio": round(statistics.fmean(ours) / statistics.fmean(theirs), 4),
        "difference": [round(draws[49], 4), round(draws[1949], 4)],
        "seeds": len(differences),
    }


def start(problem: Problem, seed: int, count: int = START) -> list[Params]:
    """Returns the first points of every run of a seed."""
    rng = Random(f"start:{seed}")
    return [problem.space.sample(rng) for _ in range(count)]


def wrong(problem: Problem, seed: int, count: int) -> list[Params]:
    """Returns a prior that could not be worse: the `count` points of the lowest accuracy among 500 drawn."""
    rng = Random(f"wrong:{seed}")
    drawn = [problem.space.sample(rng) for _ in range(500)]
    scores = [outcome.scores["accuracy"] for outcome in problem.evaluate(drawn)]
    return [drawn[i] for i in sorted(range(len(drawn)), key=scores.__getitem__)[:count]]


def _run(run: Run) -> Run:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = problems.load(run["problem"])
    peer = {"random": _random, "optuna": _optuna, "pymoo": _pymoo}.get(run["algorithm"])
    length = max(run["at"])
    if peer:
        trials = peer(problem, run["seed"], length)
    else:
        given = wrong(problem, run["seed"], run["given"]) if run.get("given") else []
        trials = _ours(problem, run["seed"], length, run["algorithm"], run["options"], given)
    return run | {"volumes": [round(problem.volume(trials[:at]), 6) for at in run["at"]]}


def _ours(problem: Problem, seed: int, length: int, name: str, options: dict[str, Any], given: list[Params]) -> list[Trial]:
    first = [*given, *start(problem, seed, options.get("population", START))]
    trials = [problem.trial(i, point) for i, point in enumerate(first)]
    while len(trials) < length:
        point = load(name)(problem.space, problem.objectives, trials, Random(f"{seed}:{len(trials)}"), **options)
        trials.append(problem.trial(len(trials), point))
    return trials


def _random(problem: Problem, seed: int, length: int) -> list[Trial]:
    rng = Random(f"random:{seed}")
    points = start(problem, seed) + [problem.space.sample(rng) for _ in range(length - START)]
    return [problem.trial(i, point) for i, point in enumerate(points)]


def _optuna(problem: Problem, seed: int, length: int) -> list[Trial]:
    """Optuna as it comes: its default sampler for several objectives (TPE), asked and told; conditions are `if`s."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(directions=["minimize"] * len(problem.objectives), sampler=sampler)
    trials: list[Trial] = []
    kinds = {"choice": lambda d: CategoricalDistribution(d.values),
             "int": lambda d: IntDistribution(d.low, d.high, log=d.log, step=d.step),
             "float": lambda d: FloatDistribution(d.low, d.high, log=d.log)}  # fmt: skip
    for point in start(problem, seed):
        trials.append(problem.trial(len(trials), point))
        shapes = {name: kinds[problem.space[name].type](problem.space[name]) for name in point}
        values = losses(trials[-1], problem.objectives)
        study.add_trial(optuna.trial.create_trial(params=point, distributions=shapes, values=values))
    while len(trials) < length:
        asked, point = study.ask(), {}
        for name, dimension in sorted(problem.space.items(), key=lambda item: bool(item[1].when)):
            if name not in problem.space.active(point):
                continue
            if isinstance(dimension, Choice):
                point[name] = asked.suggest_categorical(name, dimension.values)
            elif isinstance(dimension, Int):
                point[name] = asked.suggest_int(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
            else:
                point[name] = asked.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
        trials.append(problem.trial(len(trials), point))
        study.tell(asked, losses(trials[-1], problem.objectives))
    return trials


POPULATION = 20


def _pymoo(problem: Problem, seed: int, length: int) -> list[Trial]:
    """pymoo's NSGA-II by generations, with mixed variables and the population of 20 as its own page on them has it."""
    import numpy
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.mixed import MixedVariableDuplicateElimination, MixedVariableMating
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem as Foreign
    from pymoo.core.termination import NoTermination
    from pymoo.core.variable import Choice as Options
    from pymoo.core.variable import Integer, Real
    from pymoo.problems.static import StaticProblem

    space, trials = problem.space, []
    kinds = {"choice": lambda d: Options(options=list(d.values)), "int": lambda d: Integer(bounds=(d.low, d.high)),
             "float": lambda d: Real(bounds=(d.low, d.high))}  # fmt: skip
    # It knows no logarithms: such ranges are given as exponents, as its users do.
    variables = {n: Real(bounds=(math.log(d.low), math.log(d.high))) if _log(d) else kinds[d.type](d) for n, d in space.items()}
    foreign = Foreign(vars=variables, n_obj=len(problem.objectives))

    def point(genes: dict) -> Params:
        found = {}
        for name, d in space.items():
            value = math.exp(genes[name]) if _log(d) else genes[name]
            value = (
                value if isinstance(d, Choice) else min(max(round(value) if isinstance(d, Int) else float(value), d.low), d.high)
            )
            found[name] = value.item() if isinstance(value, numpy.generic) else value
        return space.trim(found)

    rng = Random(f"genes:{seed}")  # of dimensions that do not exist at a first point
    first = [
        {name: math.log(v) if _log(d) else v for name, d in space.items() for v in [known.get(name, d.sample(rng))]}
        for known in start(problem, seed, POPULATION)
    ]
    algorithm = NSGA2(
        pop_size=POPULATION, sampling=Population.new("X", first), eliminate_duplicates=MixedVariableDuplicateElimination(),
        mating=MixedVariableMating(eliminate_duplicates=MixedVariableDuplicateElimination()),
    )  # fmt: skip
    algorithm.setup(foreign, termination=NoTermination(), seed=seed)
    while len(trials) < length:
        asked = algorithm.ask()
        done = [problem.trial(len(trials) + i, point(individual.X)) for i, individual in enumerate(asked)]
        trials += done
        values = numpy.array([losses(trial, problem.objectives) for trial in done])
        Evaluator().eval(StaticProblem(foreign, F=values), asked)
        algorithm.tell(infills=asked)
    return trials[:length]


def _log(dimension: Any) -> bool:
    return not isinstance(dimension, Choice) and dimension.log
