"""One recipe, trained: `train(job, report) -> Outcome`.

Owns: when to report, score and end. Runs alone or as one of several
data-parallel workers (torch.distributed already set up). Must not know: Ray, studies, searches.

A run ends by itself in one of five ways (`Outcome.ended`): complete, stopped (the report said so), infeasible (memory or a
limit), diverged, paused (it left a checkpoint and goes on from there when it is launched again). Anything else is an exception
and means that something is broken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from training import checkpoint, evaluate, metrics, preemption, stability, warm, zero
from training.data import Prepared, Tokenized, sample
from training.errors import wrong
from training.meter import Counted, Stopwatch, gemm_seconds, operations
from training.model import Shape, computing, describe, device_of
from training.recipe import Job, Outcome, Pause, Progress, Report, clashes
from training.resumption import Checkpoints, identity, unkept
from training.run import Run, probe_bytes, set_up
from training.schedule import Plan, plan, rate, supervised
from training.world import World, versions

REPORTS_PER_SCORE = 4  # how often a run reports between two scored points
NO_REPORT: Report = lambda progress: None  # noqa: E731


class _End(Exception):
    """Leaves the loop with an Outcome to be completed."""

    def __init__(self, ended: str, reason: str):
        self.ended, self.reason = ended, reason


@dataclass
class _Ledger:
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


def train(job: Job, report: Report = NO_REPORT) -> Outcome:
    """Trains one recipe and returns what it came to. On several workers every one of them calls this with the same job.

    Args:
        job: recipe, data, limits and where to keep the adapter.
        report: is told of progress on every worker; the main worker's answer decides whether to go on.

    Raises:
        InputError: the model, the data or a target is not as the recipe says.
    """
    world = World.join()
    device = device_of(job.resources)
    watch = Counted() if job.evaluation.timing == "counted" else Stopwatch(device)
    ledger = _Ledger(world, device, watch, {"device": _device_name(device), "workers": world.size, **versions()})
    try:
        return _train(job, report, world, device, ledger)
    except _End as end:
        return ledger.outcome(end.ended, end.reason)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or world.size > 1:  # other workers wait for this one: only the driver can end them
            raise
        if device == "cuda":
            ledger.peak = torch.cuda.max_memory_allocated()
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return ledger.outcome("infeasible", f"out of memory at step {ledger.step}: {said}")


def out_of_memory(error: BaseException) -> bool:
    """Says whether an exception, or what it was raised from, means that memory ran out on the GPU or the host."""
    said = f"{type(error).__name__}: {error}"
    known = ("OutOfMemory", "MemoryError", "can't allocate memory", "out of memory")
    return any(word in said for word in known) or (error.__cause__ is not None and out_of_memory(error.__cause__))


def _train(job: Job, report: Report, world: World, device: str, ledger: _Ledger) -> Outcome:
    recipe = job.recipe
    for field_name, rule, remedy in clashes(recipe, job.resources):
        raise wrong(f"recipe.{field_name}", rule, remedy)
    shape = ledger.shape = describe(recipe.model, recipe.revision)
    tokenizer, prepared = warm.rows_of(job)
    rows = prepared.train if job.rows == "train" else prepared.train + prepared.validation
    held_out = sample(prepared.validation, job.evaluation.rows, seed=0)
    planned = plan(recipe, rows, workers=world.size)
    ledger.steps = planned.steps
    ledger.conditions |= {"micro_batch": planned.micro, "validation_rows": len(held_out), "cut_rows": rows.cut,
                          "threads": torch.get_num_threads(), "gemm_seconds": gemm_seconds()}  # fmt: skip
    if device == "cpu":
        ledger.peak = int(world.largest(probe_bytes(job, shape, planned, rows, world, device)))
        _check_limit(job.limits.peak_bytes, ledger.peak, "peak bytes")
    run = set_up(job, shape, planned, world, device)
    ledger.trainable = sum(zero.elements(p) for p in run.parameters)
    ledger.conditions["packed"] = run.packed  # a model that cannot be is padded
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    kept = _checkpoints(job, run, identity(recipe, planned.steps, len(rows)), ledger) if job.resume else None
    try:
        _steps(job, report, run, planned, rows, lambda: _score(run, held_out, prepared, tokenizer, job, ledger), ledger, kept)
        folder = None
        if job.output:
            with zero.whole(run.inner, run.engine):
                if world.rank == 0:
                    record = {"recipe": recipe.model_dump(mode="json"), "tokens": ledger.tokens, "metrics": ledger.metrics}
                    folder = checkpoint.save_adapter(run.inner, job.output, record)
    except _End:
        run.close()
        raise
    run.close()
    return ledger.outcome(folder=folder)


def _checkpoints(job: Job, run: Run, identity: dict, ledger: _Ledger) -> Checkpoints | None:
    """Returns the run's checkpoints, after going on from the newest that is sound; None where it cannot have any."""
    if why := unkept(run):
        ledger.conditions["no_checkpoints"] = why
        return None
    kept = Checkpoints(Path(job.resume), job.resources.save, identity, run.world)
    if (path := kept.newest()) is not None:
        ledger.take_up(*kept.restore(run, path))
        ledger.conditions["resumed_at"] = ledger.step
    if kept.refused:
        ledger.conditions["refused_checkpoints"] = list(kept.refused)
    return kept


def _steps(job: Job, report: Report, run: Run, planned: Plan, rows: Tokenized, score: Callable, ledger: _Ledger,
           kept: Checkpoints | None) -> None:  # fmt: skip
    """Runs all optimizer steps; the stopwatch runs during them alone. Raises _End where the run ends early."""
    every = max(1, planned.steps // (job.evaluation.reports * REPORTS_PER_SCORE))
    scored = {round(planned.steps * (i + 1) / job.evaluation.reports) for i in range(job.evaluation.reports)}
    if job.interventions and run.engine is None:
        run.accept = lambda loss, norm: stability.wrong_with(ledger.seen, loss, norm) is None
    if job.interventions and kept is not None and ledger.step == 0:
        kept.write(run, 0, ledger.said())  # to go back to
    ledger.watch.start()
    while ledger.step < planned.steps:
        if not _step(job, run, planned, rows, ledger, kept):
            continue
        telling = ledger.step % every == 0 or ledger.step in scored
        leave, due = _wishes(run.world, kept)
        if not (telling or leave or due):
            continue
        ledger.watch.stop()
        stop = _tell(job, report, run, planned, score if ledger.step in scored else None, ledger) if telling else None
        if ledger.step < planned.steps:
            _heed(job, stop, leave, due, run, ledger, kept)
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what scoring used is not training's
        ledger.watch.start()
    ledger.watch.stop()


def _step(job: Job, run: Run, planned: Plan, rows: Tokenized, ledger: _Ledger, kept: Checkpoints | None) -> bool:
    """Does one optimizer step, or leaves it out; returns whether the run went on, and not back."""
    step = ledger.step
    if step in ledger.guard.left_out:
        ledger.step += 1
        return True
    chunks = planned.micro_batches(step, run.world.rank, run.world.size)
    lr = rate(job.recipe, step, planned.steps) * ledger.guard.rate(step)
    loss, norm = run.step(rows, chunks, supervised(rows, planned, step), lr)
    seen = ledger.seen.see(loss, norm)
    refused = stability.wrong_with(ledger.seen, loss, norm) if job.interventions else None
    reason = refused or stability.diverged(seen, loss, norm)
    if reason and job.interventions:
        # A step that was refused has changed nothing, unless DeepSpeed did it.
        return _intervene(run, step, reason, refused is None or run.engine is not None, ledger, kept)
    ledger.seen = seen
    ledger.step = step + 1
    lengths = [len(rows.ids[r]) for r in planned.order[step * planned.batch : (step + 1) * planned.batch]]
    ledger.tokens += sum(lengths)
    if isinstance(ledger.watch, Counted):
        ledger.watch.count(operations(job.recipe, ledger.shape, ledger.trainable, lengths) / run.world.size)
    if reason:
        ledger.watch.stop()
        raise _End("diverged", reason)
    return True


def _intervene(run: Run, step: int, why: str, damaged: bool, ledger: _Ledger, kept: Checkpoints | None) -> bool:
    ledger.watch.stop()
    did, guard = ledger.guard.answer(step, why, damaged=damaged, can_go_back=kept is not None)
    if did == "end":
        raise _End("diverged", f"{why} at step {step + 1}, after {len(guard.record)} interventions")
    if did == "restore":
        if (path := kept.newest()) is None:
            raise _End("diverged", f"{why} at step {step + 1}, and no sound checkpoint is left to go back to")
        ledger.take_up(*kept.restore(run, path))
        guard = guard.went_back(ledger.step)
    else:
        ledger.step = step + 1
    ledger.guard = guard
    ledger.watch.start()
    return did != "restore"


def _wishes(world: World, kept: Checkpoints | None) -> tuple[bool, bool]:
    """Returns whether any worker was told to leave, and whether a checkpoint is due."""
    wish = int(world.largest(2 * preemption.noticed() + (kept is not None and kept.due())))
    return wish >= 2, wish % 2 == 1


def _tell(job: Job, report: Report, run: Run, planned: Plan, score: Callable | None, ledger: _Ledger) -> str | None:
    """Measures, scores where it is time, and reports; returns the main worker's reason to stop, if there is one."""
    _take_peak(run, ledger)
    _check_limit(job.limits.peak_bytes, ledger.peak, "peak bytes")
    _check_limit(job.limits.seconds, run.world.largest(ledger.watch.seconds), "seconds")
    measured = {"train_loss": ledger.seen.mean} | (score() if score else {})
    ledger.metrics |= measured
    if score and not math.isfinite(ledger.metrics["loss"]):
        raise _End("diverged", f"the validation loss became {ledger.metrics['loss']} at step {ledger.step}")
    stop = report(Progress(step=ledger.step, steps=planned.steps, tokens=ledger.tokens, share=ledger.step / planned.steps,
                           seconds=ledger.watch.seconds, peak_bytes=ledger.peak, since=ledger.conditions.get("resumed_at", 0),
                           metrics=measured))  # fmt: skip
    return run.world.agree(stop)


def _heed(
    job: Job, stop: str | None, leave: bool, due: bool, run: Run, ledger: _Ledger, kept: Checkpoints | None
) -> None:
    """Ends the run where it was told to, with a checkpoint where it is to go on; else writes one that is due."""
    if leave and not stop:
        stop = Pause(f"told to leave (SIGTERM) at step {ledger.step}")
    due = due and not (job.interventions and not ledger.guard.sound(ledger.step, ledger.seen))
    if kept is not None and (isinstance(stop, Pause) or (due and not stop)):
        kept.write(run, ledger.step, ledger.said())
    if stop:
        raise _End("paused" if isinstance(stop, Pause) else "stopped", stop)


def _take_peak(run: Run, ledger: _Ledger) -> None:
    if run.device == "cuda":
        ledger.peak = max(ledger.peak or 0, int(run.world.largest(torch.cuda.max_memory_allocated())))


def _check_limit(limit: float | None, value: float | None, name: str) -> None:
    if limit is not None and value is not None and value > limit:
        raise _End("infeasible", f"{value:,.6g} {name} are over the limit of {limit:,.6g}")


def _score(run: Run, held_out: Tokenized, prepared: Prepared, tokenizer, job: Job, ledger: _Ledger) -> dict[str, float]:
    world, wanted, own = run.world, metrics.chosen(job.evaluation.metrics), evaluate.own_scores(job)
    # At ZeRO stage 3 every forward is a collective: all workers score all rows together.
    together = job.recipe.zero_stage == 3
    part = slice(None) if together else slice(world.rank, None, world.size)
    mine = Tokenized(held_out.ids[part], held_out.prompt_lengths[part])
    answered = evaluate.chosen_rows(len(held_out), job.evaluation.answers)[part]
    limit = evaluate.answer_limit(job.evaluation, held_out)
    scores = {name: [] for name in ("nll", "tokens", "right", *own, *wanted)}
    if len(mine):
        with computing(job.recipe.precision, run.device):
            scores |= evaluate.score_rows(run.inner, mine, prepared, job, tokenizer=tokenizer, answered=answered, limit=limit)
    scores = scores if together else world.gather(scores)
    ledger.conditions["right"] = evaluate.pack_bits(scores["right"])
    return evaluate.summary(scores, wanted, own)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.uname().machine} CPU"
