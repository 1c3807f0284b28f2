"""What is optimised: names, goals, units, and how each is read from an Outcome.

Owns: `Objective`, the built-in ones, the loss vector of a trial. Must not know: algorithms, stores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpo.trial import Trial
from training.metrics import METRICS
from training.recipe import Outcome

ADAPTER_BYTES = 4  # an adapter is kept and trained in fp32


@dataclass(frozen=True)
class Objective:
    """A number read from an Outcome, whether more or less of it is wanted, and its unit."""

    name: str
    goal: Literal["maximize", "minimize"]
    unit: str
    of: Callable[[Outcome], float | None]

    def loss(self, outcome: Outcome) -> float | None:
        """Returns the value to minimise, or None where it is missing or not finite."""
        value = self.of(outcome)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return -value if self.goal == "maximize" else value


def _score(name: str) -> Callable[[Outcome], float | None]:
    return lambda outcome: outcome.scores.get(name)


def _throughput(outcome: Outcome) -> float | None:
    return outcome.tokens / outcome.seconds if outcome.seconds else None


def _adapter_bytes(outcome: Outcome) -> float | None:
    return outcome.trainable * ADAPTER_BYTES if outcome.trainable is not None else None


def _device_hours(outcome: Outcome) -> float | None:
    if outcome.seconds is None:
        return None
    return outcome.seconds / 3600 * outcome.conditions.get("workers", 1)


BUILT_IN: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("accuracy", "maximize", "", _score("accuracy")),
        Objective("loss", "minimize", "nats/token", lambda outcome: outcome.loss),
        Objective("seconds", "minimize", "s", lambda outcome: outcome.seconds),
        Objective("peak_bytes", "minimize", "bytes", lambda outcome: outcome.peak_bytes),
        Objective("device_hours", "minimize", "h", _device_hours),
        Objective("cost", "minimize", "", lambda outcome: None),  # known once there is a price
        Objective("adapter_bytes", "minimize", "bytes", _adapter_bytes),
        Objective("tokens_per_second", "maximize", "tokens/s", _throughput),
        *(Objective(name, metric.goal, "", _score(name)) for name, metric in METRICS.items()),
    )
}


def named(
    names: Sequence[str],
    goals: Mapping[str, Literal["maximize", "minimize"]] | None = None,
    *,
    price: float | None = None,
) -> tuple[Objective, ...]:
    """Returns the objectives of these names, each built in or a score by that name: a user's metric, or one of the task.

    Args:
        goals: of the user's metrics; of another score more is better.
        price: of an hour of one worker, for `cost`.
    """
    known = goals or {}

    def one(name: str) -> Objective:
        if name == "cost" and price is not None:
            return dataclasses.replace(BUILT_IN[name], of=lambda outcome: _times(_device_hours(outcome), price))
        return BUILT_IN.get(name) or Objective(name, known.get(name, "maximize"), "", _score(name))

    return tuple(map(one, names))


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def losses(trial: Trial, objectives: Sequence[Objective]) -> list[float] | None:
    """Returns the trial's vector to minimise, or None unless every objective is there and finite."""
    if trial.outcome is None:
        return None
    vector = [objective.loss(trial.outcome) for objective in objectives]
    return None if any(value is None for value in vector) else vector
