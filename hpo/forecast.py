"""How long trials take, and how long a study still has to go.

Owns: `known`, `trial`, `Left` (from a study's own trials), `probe` (from a few short runs on this machine). Must not know: who
asks, how it is shown.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpo.check import Findings
from hpo.errors import Problem, SpecError
from hpo.spec import Spec
from hpo.trial import Trial
from training import pace
from training.model import Shape
from training.pace import Estimate, Pace, Rows
from training.recipe import Job, Recipe

SAMPLED = 32  # points of the space that stand for the trials to come
STEPS = 3  # timed of each probe


@dataclass(frozen=True)
class Prediction:
    """Predicted training seconds: of a trial, the least and the most of the space, of the whole study, and what it costs.

    `study` and `cost` are of training steps alone, without start-up, scoring and certification; `cost` is None without a price.
    """

    trial: Estimate
    least: float
    most: float
    study: Estimate
    cost: float | None
    runs: int


def known(trials: Sequence[Trial], shape: Shape | None, rows: Rows, workers: int) -> Pace | None:
    """Returns the pace that a study's finished trials tell: each is a probe that cost nothing."""
    runs = []
    for one in trials:
        outcome = one.outcome
        if one.final and outcome and outcome.seconds and outcome.share > 0:
            runs.append((pace.count(one.recipe, shape, rows, workers=workers).times(outcome.share), outcome.seconds))
    return pace.fit(runs)


def points(spec: Spec) -> list[Recipe]:
    """Returns a seeded choice of the space's recipes."""
    rng = random.Random(spec.seed)
    return [spec.space.resolve(spec.space.sample(rng), spec.recipe) for _ in range(SAMPLED)]


def trial(found: Pace, recipes: Sequence[Recipe], shape: Shape | None, rows: Rows, workers: int) -> tuple[Estimate, list[float]]:
    """Returns the mean seconds of these recipes, and those of each."""
    each = [found.predict(pace.count(recipe, shape, rows, workers=workers)).seconds for recipe in recipes]
    mean = statistics.fmean(each)
    return Estimate(mean, mean * max(0.0, 1 - found.error), mean * (1 + found.error)), each


class Left:
    """How long a study still has to go, as its trials end. Fitted anew when there are a tenth more of them."""

    def __init__(self, spec: Spec, shape: Shape | None, rows: Rows | None):
        """Takes what trials train on where it is known; of a simulated study it is told from the trials."""
        self._spec, self._shape, self._rows, self._workers = spec, shape, rows, spec.resources.workers
        self._fitted, self._pace, self._beside, self._mean = 0, None, 0.0, 0.0

    def seconds(self, trials: Sequence[Trial], running: Mapping[int, float], remaining: int) -> float | None:
        """Returns the wall-clock seconds until the budget of trials is spent; None until a trial has finished.

        Predicted training seconds of what runs (what is left of it) and of what is to come (the space's mean), each with what
        trials took beside training so far, over as many at a time as run now.

        Args:
            running: share done, by the number of each trial that runs.
            remaining: trials that have not finished, running ones included.
        """
        timed = [t for t in trials if t.final and t.outcome and t.outcome.seconds and t.outcome.share > 0 and t.finished]
        if len(timed) > 1.1 * self._fitted or (timed and self._pace is None):
            self._fit(timed)
        if self._pace is None:
            return None
        now = [t for t in trials if t.number in running]
        begun = sum((self._of(t.recipe) + self._beside) * (1 - running[t.number]) for t in now)
        return (begun + max(0, remaining - len(now)) * (self._mean + self._beside)) / max(1, len(now))

    def _fit(self, timed: Sequence[Trial]) -> None:
        self._fitted, self._rows = len(timed), self._rows or _rows(timed)
        self._pace = known(timed, self._shape, self._rows, self._workers) if self._rows else None
        if self._pace is not None:
            self._beside = statistics.median(max(0.0, t.finished - (t.started or 0) - t.outcome.seconds) for t in timed)
            self._mean = statistics.fmean(self._of(recipe) for recipe in points(self._spec))

    def _of(self, recipe: Recipe) -> float:
        return self._pace.predict(pace.count(recipe, self._shape, self._rows, workers=self._workers)).seconds


def _rows(timed: Sequence[Trial]) -> Rows | None:
    """Returns rows that make up an epoch as trials had it, where the rows themselves are not known (a simulated study)."""
    epochs = [t.outcome.tokens / t.outcome.share / (t.recipe.epochs or 1) for t in timed if t.outcome.tokens]
    tokens = int(statistics.median(epochs)) if epochs else 0
    return Rows(max(1, tokens // 64), tokens) if tokens else None


def probe(findings: Findings) -> Prediction:
    """Times a few steps of a few recipes in this process, on this machine, and predicts the study from them.

    Raises:
        SpecError: the trials would not run on what this process has.
    """
    spec, rows, shape = findings.spec, findings.trained, findings.shape
    if rows is None or shape is None:
        raise SpecError(Problem("train", "nothing is trained here that could be timed.", "Leave --probe out."))
    if spec.resources.gpus:
        import torch

        if not torch.cuda.is_available():
            raise SpecError(Problem("resources.gpus", "a probe runs here, where there is no GPU.", "Run it on a GPU's node."))
    from training.measure import time_alone

    recipes = points(spec)
    alone = spec.resources.model_copy(update={"workers": 1})
    chosen = [recipe.model_copy(update={"zero_stage": 0, "offload": False}) for recipe in pace.probes([spec.recipe, *recipes])]
    jobs = [Job(recipe=r, data=spec.data, evaluation=spec.evaluation, resources=alone) for r in chosen]
    timed = time_alone([job.model_dump(mode="json") for job in jobs], repeats=2, steps=STEPS)
    found = pace.fit([(pace.count(r, shape, rows), t["seconds"]) for r, t in zip(chosen, timed, strict=True)])
    mean, each = trial(found, recipes, shape, rows, spec.resources.workers)
    trials = spec.budget.trials
    whole = Estimate(mean.seconds * trials, mean.low * trials, mean.high * trials)
    cost = None if spec.price is None else whole.seconds / 3600 * spec.price * spec.resources.workers
    return Prediction(mean, min(each), max(each), whole, cost, found.runs)
