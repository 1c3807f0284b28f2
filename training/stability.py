"""Whether a run goes wrong, and what the final retrain does about it. Decides and does not act.

Owns: `Watch` and what is seen in it: `wrong_with` (one step), `diverged` (a trial); `Guard` (interventions, their bound and the
rate). Must not know: optimizers, studies, checkpoints.

A trial only ever ends: it never changes its own hyperparameters. Clipping bounds what one bad step can do, so a trial is left
alone until the loss or the gradient is no number, or what went wrong stays. The final retrain answers each bad step.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

WINDOW = 10  # steps that a spike is held against
PATIENCE = 5  # steps before a mean is trusted
FACTOR, MARGIN = 1.5, 1.0  # the untuned loss times this, plus this many nats per token
SIGMAS = 6.0  # standard deviations above the window's mean
SPIKE = 2.0  # times the window's mean
EXPLODED, EXPLODING = 100.0, 100.0  # a norm above this, and so many times the window's mean
HOPELESS = 1e6  # a norm above which no run is sound
STAYS = 3  # exploding steps in a row
LEARNT = 0.5  # of the first loss: below it a run has learnt something that can be lost


@dataclass(frozen=True)
class Watch:
    """What has been seen: the first loss, an exponential mean and its least value, the last losses and norms that were sound."""

    first: float | None = None
    mean: float = 0.0
    steps: int = 0
    least: float = math.inf
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    exploding: int = 0

    def see(self, loss: float, norm: float = 0.0) -> Watch:
        """Returns the watch after one more optimizer step.

        Args:
            loss: nats per token.
            norm: of the whole gradient before it was clipped.
        """
        first = loss if self.first is None else self.first
        mean = loss if self.first is None else 0.8 * self.mean + 0.2 * loss
        steps = self.steps + 1
        least = min(self.least, mean) if steps >= PATIENCE else self.least
        # What stands out is not what later steps are held against: a spike must not hide the next one.
        losses = self.losses if _spikes(self, loss) else (*self.losses, loss)[-WINDOW:]
        explodes = _explodes(self, norm)
        norms = self.norms if explodes else (*self.norms, norm)[-WINDOW:]
        return Watch(first, mean, steps, least, losses, norms, self.exploding + 1 if explodes else 0)


def _spikes(watch: Watch, loss: float) -> bool:
    if not math.isfinite(loss) or len(watch.losses) < PATIENCE:
        return not math.isfinite(loss)
    mean, spread = statistics.fmean(watch.losses), statistics.pstdev(watch.losses)
    return loss > max(SPIKE * mean, mean + SIGMAS * spread, FACTOR * watch.first + MARGIN)


def _explodes(watch: Watch, norm: float) -> bool:
    if not math.isfinite(norm) or norm > HOPELESS:
        return True
    return len(watch.norms) >= PATIENCE and norm > max(EXPLODED, EXPLODING * statistics.fmean(watch.norms))


def wrong_with(watch: Watch, loss: float, norm: float) -> str | None:
    """Returns what is wrong with one optimizer step, held against those before it, or None.

    Args:
        watch: what was seen before this step.
    """
    if not math.isfinite(loss):
        return f"the loss became {loss}"
    if not math.isfinite(norm):
        return f"the gradient's norm became {norm}"
    if _explodes(watch, norm):
        usual = f", after {statistics.fmean(watch.norms):.3g} on average" if watch.norms else ""
        return f"the gradient's norm rose to {norm:.3g}{usual}"
    if _spikes(watch, loss):
        return f"the loss jumped to {loss:.2f} nats per token, after {statistics.fmean(watch.losses):.2f} on average"
    return None


def diverged(watch: Watch, loss: float, gradient_norm: float) -> str | None:
    """Returns why the run has diverged, or None.

    Args:
        watch: what was seen, this step included.

    A loss or gradient that is not finite always counts, and so does a norm beyond all bounds or one that stays far above what it
    was. A finite loss counts where its mean has risen well above that of the untuned model: adapters start as the identity, so
    the first loss is the untuned one; where the run had learnt something, it is enough that all of it is lost.
    """
    if not math.isfinite(loss):
        return f"the loss became {loss} at step {watch.steps}"
    if not math.isfinite(gradient_norm):
        return f"the gradient's norm became {gradient_norm} at step {watch.steps}"
    if gradient_norm > HOPELESS:
        return f"the gradient's norm rose to {gradient_norm:.3g} at step {watch.steps}"
    if watch.exploding >= STAYS:
        return (f"the gradient's norm rose from {statistics.fmean(watch.norms):.3g} to {gradient_norm:.3g} and stayed there "
                f"for {watch.exploding} steps, by step {watch.steps}")  # fmt: skip
    if watch.first is None or watch.steps < PATIENCE:
        return None
    if watch.mean > FACTOR * watch.first + MARGIN:
        return f"the training loss rose from {watch.first:.2f} to {watch.mean:.2f} nats per token by step {watch.steps}"
    if watch.least < LEARNT * watch.first and watch.mean > watch.first + MARGIN:
        return (f"the training loss had come to {watch.least:.2f} and rose above the untuned {watch.first:.2f} "
                f"to {watch.mean:.2f} nats per token by step {watch.steps}")  # fmt: skip
    return None


MOST = 10  # interventions, after which a run has diverged all the same
NEAR = 10  # steps within which one thing that goes wrong follows from another
BACK_OFF = 0.5  # of the rate, each time
RETURN = 20  # steps in which half of the rate comes back


@dataclass(frozen=True)
class Guard:
    """The interventions of a final retrain so far: the record, the steps whose batch is left out, and how low the rate is.

    `factor` holds at step `since`; from there on the rate doubles every `RETURN` steps until it is whole again.
    """

    record: tuple[dict[str, Any], ...] = ()
    left_out: frozenset[int] = frozenset()
    factor: float = 1.0
    since: int = 0

    def rate(self, step: int) -> float:
        """Returns what the schedule's rate is multiplied with at a step (0-based)."""
        return min(1.0, self.factor * 2 ** (max(0, step - self.since) / RETURN)) if self.factor < 1 else 1.0

    def answer(self, step: int, why: str, *, damaged: bool, can_go_back: bool = True) -> tuple[str, Guard]:
        """Returns what is done about a bad step (0-based), and the guard that has it on record.

        skip: the batch is left out. slow: and the rate is halved for a while, where it is not the first of late. restore: and
        what was learnt goes back to the last good checkpoint, where the batch is left out when it comes again. end: enough.

        Args:
            damaged: the weights have taken harm, so that nothing less than going back helps.
            can_go_back: there are checkpoints.
        """
        near = [entry["did"] for entry in self.record if abs(step + 1 - entry["step"]) <= NEAR]
        did = "restore" if damaged or "slow" in near or "restore" in near else "slow" if near else "skip"
        if did == "restore" and not can_go_back:
            did = "end" if damaged else "slow"
        if did == "end" or len(self.record) >= MOST:
            return "end", self
        slowed = replace(self, factor=self.rate(step) * BACK_OFF, since=step) if did != "skip" else self
        entry = {"step": step + 1, "did": did, "why": why, "values": {"rate_factor": round(slowed.rate(step), 4)}}
        return did, replace(slowed, record=(*self.record, entry), left_out=self.left_out | {step})



    def went_back(self, step: int) -> Guard:
        """Returns the guard with the step on record that the last intervention went back to."""
        last = self.record[-1]
        return replace(self, record=(*self.record[:-1], last | {"values": last["values"] | {"back_to_step": step}}))

    def sound(self, step: int, watch: Watch) -> bool:
        """Says whether the run after `step` steps may be gone back to: nothing was wrong of late."""
        calm = not self.record or step - self.record[-1]["step"] >= NEAR
        return calm and (watch.first is None or watch.mean <= watch.first + MARGIN)
