"""Whether a run has diverged. Decides and does not act.

Owns: `Watch`. Must not know: optimizers, studies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Watch:
    """What has been seen of the training loss: its first value, an exponential mean, and the number of steps."""

    first: float | None = None
    mean: float = 0.0
    steps: int = 0

    def see(self, loss: float) -> Watch:
        """Returns the watch after one more optimizer step; `loss` in nats per token."""
        if self.first is None:
            return Watch(loss, loss, 1)
        return Watch(self.first, 0.8 * self.mean + 0.2 * loss, self.steps + 1)


PATIENCE = 5  # steps before a mean is trusted
FACTOR, MARGIN = 1.5, 1.0  # the untuned loss times this, plus this many nats per token


def diverged(watch: Watch, loss: float, gradient_norm: float) -> str | None:
    """Returns why the run has diverged, or None.

    A loss or gradient that is not finite always counts. A finite loss counts where its mean has risen well above that of
    the untuned model: adapters start as the identity, so the first loss is the untuned one.
    """
    if not math.isfinite(loss):
        return f"the loss became {loss} at step {watch.steps}"
    if not math.isfinite(gradient_norm):
        return f"the gradient's norm became {gradient_norm} at step {watch.steps}"
    if watch.first is not None and watch.steps >= PATIENCE and watch.mean > FACTOR * watch.first + MARGIN:
        return f"the training loss rose from {watch.first:.2f} to {watch.mean:.2f} nats per token by step {watch.steps}"
    return None
