"""One recipe, trained: `train(job, report) -> Outcome`.

Owns: the course of a run from its first step to its last. Runs alone or as one of several data-parallel workers
(torch.distributed already set up). Must not know: Ray, studies, searches.

A run ends by itself in one of five ways (`Outcome.ended`): complete, stopped (the report said so), infeasible (memory or a
limit), diverged, paused (it left a checkpoint and goes on from there when it is launched again). Anything else is an exception
and means that something is broken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training import checkpoint, preemption, stability, warm, zero
from training.data import Prepared, Tokenized, sample
from training.errors import wrong
from training.ledger import End, Ledger, check_limit, heed, open_ledger, out_of_memory, rhythm, scored, tell
from training.meter import Counted, gemm_seconds, operations
from training.model import describe
from training.recipe import Job, Outcome, Report, clashes
from training.resumption import Checkpoints, identity, unkept
from training.run import Run, probed, set_up
from training.schedule import Plan, plan, rate, supervised
from training.world import World

NO_REPORT: Report = lambda progress: None  # noqa: E731


def train(job: Job, report: Report = NO_REPORT) -> Outcome:
    """Trains one recipe and returns what it came to. On several workers every one of them calls this with the same job.

    Args:
        job: recipe, data, limits and where to keep the adapter.
        report: is told of progress on every worker; the main worker's answer decides whether to go on.

    Raises:
        InputError: the model, the data or a target is not as the recipe says.
    """
    ledger = open_ledger(job, World.join())
    world, device = ledger.world, ledger.device
    try:
        return _train(job, report, world, device, ledger)
    except End as end:
        return ledger.outcome(end.ended, end.reason)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or world.size > 1:  # other workers wait for this one: only the driver can end them
            raise
        if device == "cuda":
            ledger.peak = torch.cuda.max_memory_allocated()
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return ledger.outcome("infeasible", f"out of memory at step {ledger.step}: {said}")


@dataclass(frozen=True)
class Course:
    """What a run trains on and is scored on, and in which order."""

    tokenizer: Any
    prepared: Prepared
    rows: Tokenized
    held_out: Tokenized
    planned: Plan

    def score(self, model, job: Job, ledger: Ledger) -> dict[str, float]:
        """Returns the scores of a model on the held-out rows; all workers take part."""
        return scored(model, self.held_out, self.prepared, self.tokenizer, job, ledger)


def begin(job: Job, ledger: Ledger) -> Course:
    """Returns the course of a run, and notes in its ledger under which conditions it runs.

    Raises:
        InputError: the model, the data or a target is not as the recipe says.
    """
    recipe = job.recipe
    for field_name, rule, remedy in clashes(recipe, job.resources):
        raise wrong(f"recipe.{field_name}", rule, remedy)
    ledger.shape = describe(recipe.model, recipe.revision)
    tokenizer, prepared = warm.rows_of(job)
    rows = prepared.train if job.rows == "train" else prepared.train + prepared.validation
    held_out = sample(prepared.validation, job.evaluation.rows, seed=0)
    planned = plan(recipe, rows, workers=ledger.world.size)
    ledger.steps = planned.steps
    ledger.conditions |= {"micro_batch": planned.micro, "validation_rows": len(held_out), "cut_rows": rows.cut,
                          "threads": torch.get_num_threads(), "gemm_seconds": gemm_seconds()}  # fmt: skip
    return Course(tokenizer, prepared, rows, held_out, planned)


def _train(job: Job, report: Report, world: World, device: str, ledger: Ledger) -> Outcome:
    recipe = job.recipe
    course = begin(job, ledger)
    shape, rows, planned = ledger.shape, course.rows, course.planned
    run = None
    if device == "cpu":
        peak, run = probed(job, shape, planned, rows, world, device)
        ledger.peak = int(world.largest(peak))
        try:
            check_limit(job.limits.peak_bytes, ledger.peak, "peak bytes")
        except End:
            if run is not None:
                run.close()
            raise
    if run is None:
        run = set_up(job, shape, planned, world, device)
    ledger.trainable = sum(zero.elements(p) for p in run.parameters)
    ledger.conditions["packed"] = run.packed  # a model that cannot be is padded
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    kept = _checkpoints(job, run, identity(recipe, planned.steps, len(rows)), ledger) if job.resume else None
    folder = None
    try:
        _steps(job, report, run, planned, rows, functools.partial(course.score, run.inner, job, ledger), ledger, kept)
        if job.output:
            with zero.whole(run.inner, run.engine):
                if world.rank == 0:
                    folder = checkpoint.save_adapter(run.inner, job.output, ledger.record(recipe))
    except End:
        run.close()
        raise
    run.close()
    return ledger.outcome(folder=folder)


def _checkpoints(job: Job, run: Run, identity: dict, ledger: Ledger) -> Checkpoints | None:
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


def _steps(job: Job, report: Report, run: Run, planned: Plan, rows: Tokenized, score: Callable, ledger: Ledger,
           kept: Checkpoints | None) -> None:  # fmt: skip
    """Runs all optimizer steps; the stopwatch runs during them alone. Raises End where the run ends early."""
    every, at = rhythm(job, planned.steps)
    if job.interventions and run.engine is None:
        run.accept = lambda loss, norm: stability.wrong_with(ledger.seen, loss, norm) is None
    if job.interventions and kept is not None and ledger.step == 0:
        kept.write(run, 0, ledger.said())  # to go back to
    ledger.watch.start()
    while ledger.step < planned.steps:
        if not _step(job, run, planned, rows, ledger, kept):
            continue
        telling = ledger.step % every == 0 or ledger.step in at
        leave, due = _wishes(run.world, kept)
        if not (telling or leave or due):
            continue
        ledger.watch.stop()
        _take_peak(run, ledger)
        stop = tell(job, report, score if ledger.step in at else None, ledger) if telling else None
        if ledger.step < planned.steps:
            write = functools.partial(kept.write, run) if kept is not None else None
            heed(job, stop, leave, due, ledger, write)
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what scoring used is not training's
        ledger.watch.start()
    ledger.watch.stop()


def _step(job: Job, run: Run, planned: Plan, rows: Tokenized, ledger: Ledger, kept: Checkpoints | None) -> bool:
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
        raise End("diverged", reason)
    return True


def _intervene(run: Run, step: int, why: str, damaged: bool, ledger: Ledger, kept: Checkpoints | None) -> bool:
    ledger.watch.stop()
    did, guard = ledger.guard.answer(step, why, damaged=damaged, can_go_back=kept is not None)
    if did == "end":
        raise End("diverged", f"{why} at step {step + 1}, after {len(guard.record)} interventions")
    if did == "restore":
        if (path := kept.newest()) is None:
            raise End("diverged", f"{why} at step {step + 1}, and no sound checkpoint is left to go back to")
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


def _take_peak(run: Run, ledger: Ledger) -> None:
    if run.device == "cuda":
        ledger.peak = max(ledger.peak or 0, int(run.world.largest(torch.cuda.max_memory_allocated())))
