"""How busy eight slots are kept by steady state and by a barrier after each generation; trials of lognormal length."""

from __future__ import annotations

import heapq
import statistics
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.search import problems
from hpo.algorithms import load
from hpo.objectives import named
from hpo.space import Space
from hpo.trial import Trial
from training.recipe import Outcome

SLOTS, SIGMA, POPULATION, TRIALS, SEEDS = 8, 0.6, 8, 120, 20
SPACE = Space({"learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
               "rank": {"type": "int", "low": 2, "high": 128, "log": True}})  # fmt: skip
OBJECTIVES = named(["accuracy", "seconds"])


def measure(quick: bool, storage: Path) -> dict[str, Any]:
    """Returns the share of slot time that trials fill: nsga2 as it is, and with a barrier."""
    seeds, trials = (2, 24) if quick else (SEEDS, TRIALS)
    steady = [_steady(seed, trials) for seed in range(seeds)]
    barrier = [_barrier(seed, trials) for seed in range(seeds)]
    return {"utilisation": round(statistics.fmean(steady), 3), "utilisation_barrier": round(statistics.fmean(barrier), 3)}


def _length(seed: int, number: int) -> float:
    return Random(f"{seed}:{number}").lognormvariate(0, SIGMA)


def _steady(seed: int, trials: int) -> float:
    """The algorithm is asked whenever a slot is free, knowing what is running; it may never say "not now"."""
    history: list[Trial] = []
    running: list[tuple[float, int]] = []
    now = busy = 0.0
    while len(history) < trials or running:
        while len(running) < SLOTS and len(history) < trials:
            number = len(history)
            point = load("nsga2")(SPACE, OBJECTIVES, history, Random(f"{seed}:{number}:ask"), population=POPULATION)
            assert point is not None
            history.append(
                Trial.model_construct(number=number, params=point, recipe=problems.RECIPE, state="running", outcome=None)
            )
            heapq.heappush(running, (now + _length(seed, number), number))
        now, number = heapq.heappop(running)
        busy += _length(seed, number)
        score = 1 / (1 + abs(history[number].params["rank"] - 16))
        outcome = Outcome(scores={"accuracy": score}, seconds=_length(seed, number))
        history[number] = problems.trial(number, history[number].params, outcome)
    return busy / (SLOTS * now)


def _barrier(seed: int, trials: int) -> float:
    """Generations of as many trials as there are slots; each waits for the last of its own."""
    lengths = [_length(seed, number) for number in range(trials)]
    makespan = sum(max(lengths[i : i + POPULATION]) for i in range(0, trials, POPULATION))
    return sum(lengths) / (SLOTS * makespan)
