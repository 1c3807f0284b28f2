"""What a run has come to so far, when it tells so, and how it ends.

Owns: `Ledger`, `End`, `tell` and the rhythm of reports, `scored`. Must not know: how a step is done, who runs beside it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from training import evaluate, metrics, stability
from training.data import Prepared, Tokenized
from training.meter import Counted, Stopwatch
from training.model import Shape, computing, device_of
from training.recipe import Job, Outcome, Pause, Progress, Recipe, Report
from training.world import World, versions

REPORTS_PER_SCORE = 4  # how often a run reports between two scored points


class End(Exception):
    """Leaves the loop with an Outcome to be completed."""

    def __init__(self, ended: str, reason: str):
        self.ended, self.reason = ended, reason


@dataclass
class Ledger:
    """What a run has come to so far; becomes its Outcome however it ends."""

    world: World
    device: str
    watch: Stopwatch | Counted
    conditions: dict
    step: int = 0
    steps: int = 1
    tokens: int = 0
    shape: Shape | None = None
    trainable: int | None = None
    peak: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seen: stability.Watch = stability.Watch()
    guard: stability.Guard = stability.Guard()

    def said(self) -> dict:
        """Returns what a checkpoint keeps of it, as JSON. Every worker must ask."""
        guard = asdict(self.guard) | {"left_out": sorted(self.guard.left_out)}
        seconds = self.world.largest(self.watch.seconds)
        return {"tokens": self.tokens, "seconds": seconds, "peak": self.peak, "metrics": self.metrics,
                "seen": asdict(self.seen), "guard": guard, "right": self.conditions.get("right")}  # fmt: skip

    def take_up(self, step: int, said: dict) -> None:
        """Goes on from what a checkpoint has kept."""
        self.step, self.tokens, self.metrics = step, said["tokens"], said["metrics"]
        self.watch.seconds = max(self.watch.seconds, said["seconds"])
        self.peak = max(self.peak or 0, said["peak"] or 0) or None
        seen, guard = said["seen"], said["guard"]
        self.seen = stability.Watch(**seen | {"losses": tuple(seen["losses"]), "norms": tuple(seen["norms"])})
        self.guard = stability.Guard(**guard | {"record": tuple(guard["record"]), "left_out": frozenset(guard["left_out"])})
        if said["right"] is not None:
            self.conditions["right"] = said["right"]

    def record(self, recipe: Recipe) -> dict:
        """Returns what is kept beside what was trained."""
        return {"recipe": recipe.model_dump(mode="json"), "tokens": self.tokens, "metrics": self.metrics}

    def outcome(self, ended: str = "complete", reason: str = "", folder: str | None = None) -> Outcome:
        if self.guard.record:
            self.conditions["interventions"] = list(self.guard.record)
        scores = {name: value for name, value in self.metrics.items() if name not in ("loss", "train_loss")}
        finite = all(math.isfinite(value) for value in self.metrics.values())
        return Outcome(
            ended=ended, reason=reason, share=self.step / self.steps, scores=scores if finite else {},
            loss=self.metrics.get("loss") if finite else None, seconds=self.world.largest(self.watch.seconds),
            peak_bytes=self.peak, tokens=self.tokens, trainable=self.trainable, checkpoint=folder, conditions=self.conditions,
        )  # fmt: skip


def open_ledger(job: Job, world: World) -> Ledger:
    """Returns the ledger of a run that is about to begin on this worker."""
    device = device_of(job.resources)
    watch = Counted() if job.evaluation.timing == "counted" else Stopwatch(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.uname().machine} CPU"
    return Ledger(world, device, watch, {"device": name, "workers": world.size, **versions()})


def rhythm(job: Job, steps: int) -> tuple[int, set[int]]:
    """Returns every how many steps a run reports, and after which steps it is scored as well."""
    every = max(1, steps // (job.evaluation.reports * REPORTS_PER_SCORE))
    return every, {round(steps * (i + 1) / job.evaluation.reports) for i in range(job.evaluation.reports)}


def tell(job: Job, report: Report, score: Callable[[], dict[str, float]] | None, ledger: Ledger) -> str | None:
    """Scores where it is time, and reports; returns the main worker's reason to stop, if there is one.

    Raises:
        End: a limit is passed, or the loss on held-out rows is no number.
    """
    check_limit(job.limits.peak_bytes, ledger.peak, "peak bytes")
    check_limit(job.limits.seconds, ledger.world.largest(ledger.watch.seconds), "seconds")
    measured = {"train_loss": ledger.seen.mean} | (score() if score else {})
    ledger.metrics |= measured
    if score and not math.isfinite(ledger.metrics["loss"]):
        raise End("diverged", f"the validation loss became {ledger.metrics['loss']} at step {ledger.step}")
    stop = report(Progress(step=ledger.step, steps=ledger.steps, tokens=ledger.tokens, share=ledger.step / ledger.steps,
                           seconds=ledger.watch.seconds, peak_bytes=ledger.peak, since=ledger.conditions.get("resumed_at", 0),
                           metrics=measured))  # fmt: skip
    return ledger.world.agree(stop)


def heed(job: Job, stop: str | None, leave: bool, due: bool, ledger: Ledger, write: Callable[[int, dict], None] | None) -> None:
    """Ends the run where it was told to, with a checkpoint where it is to go on; else writes one that is due.

    Args:
        stop: the reason that the report was answered with.
        leave: whether this process is to end.
        write: (step, what the ledger says) writes a checkpoint; None where the run can have none.

    Raises:
        End: it was told to.
    """
    if leave and not stop:
        stop = Pause(f"told to leave (SIGTERM) at step {ledger.step}")
    due = due and not (job.interventions and not ledger.guard.sound(ledger.step, ledger.seen))
    if write is not None and (isinstance(stop, Pause) or (due and not stop)):
        write(ledger.step, ledger.said())
    if stop:
        raise End("paused" if isinstance(stop, Pause) else "stopped", stop)


def check_limit(limit: float | None, value: float | None, name: str) -> None:
    """Ends the run where a value is above its limit.

    Raises:
        End: it is.
    """
    if limit is not None and value is not None and value > limit:
        raise End("infeasible", f"{value:,.6g} {name} are over the limit of {limit:,.6g}")


def out_of_memory(error: BaseException) -> bool:
    """Says whether an exception, or what it was raised from, means that memory ran out on the GPU or the host."""
    said = f"{type(error).__name__}: {error}"
    known = ("OutOfMemory", "MemoryError", "can't allocate memory", "out of memory")
    return any(word in said for word in known) or (error.__cause__ is not None and out_of_memory(error.__cause__))


def scored(model, held_out: Tokenized, prepared: Prepared, tokenizer, job: Job, ledger: Ledger) -> dict[str, float]:
    """Returns the scores of a model on the held-out rows; all workers take part."""
    world, wanted, own = ledger.world, metrics.chosen(job.evaluation.metrics), evaluate.own_scores(job)
    # At ZeRO stage 3 every forward is a collective: all workers score all rows together.
    together = job.recipe.zero_stage == 3
    part = slice(None) if together else slice(world.rank, None, world.size)
    mine = Tokenized(held_out.ids[part], held_out.prompt_lengths[part])
    answered = evaluate.chosen_rows(len(held_out), job.evaluation.answers)[part]
    limit = evaluate.answer_limit(job.evaluation, held_out)
    scores = {name: [] for name in ("nll", "tokens", "right", *own, *wanted)}
    if len(mine):
        with computing(job.recipe.precision, ledger.device):
            scores |= evaluate.score_rows(model, mine, prepared, job, tokenizer=tokenizer, answered=answered, limit=limit)
    scores = scores if together else world.gather(scores)
    ledger.conditions["right"] = evaluate.pack_bits(scores["right"])
    return evaluate.summary(scores, wanted, own)
