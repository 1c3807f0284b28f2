"""One recipe, trained: `train(job, report) -> Outcome`.

Owns: when to report, score and end. Runs alone or as one of several
data-parallel workers (torch.distributed already set up). Must not know: Ray, studies, searches.

A run ends by itself in one of four ways (`Outcome.ended`): complete, stopped (the report said so), infeasible (memory or a
limit), diverged. Anything else is an exception and means that something is broken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from training import checkpoint, evaluate, metrics, stability
from training.data import Prepared, Tokenized, prepare, read, sample
from training.errors import wrong
from training.meter import Counted, Stopwatch, gemm_seconds, operations
from training.model import Shape, computing, describe, device_of, load_tokenizer
from training.recipe import Job, Outcome, Progress, Report, clashes
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

    def outcome(self, ended: str = "complete", reason: str = "", folder: str | None = None) -> Outcome:
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
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(read(job.data), job.data, tokenizer, recipe.max_length, cache=job.cache)
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
    ledger.trainable = sum(p.numel() for p in run.parameters)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _steps(job, report, run, planned, rows, lambda: _score(run, held_out, prepared, tokenizer, job, ledger), ledger)
    folder = None
    if job.output and world.rank == 0:
        record = {"recipe": recipe.model_dump(mode="json"), "tokens": ledger.tokens, "metrics": ledger.metrics}
        folder = checkpoint.save_adapter(run.inner, job.output, record)
    return ledger.outcome(folder=folder)


def _steps(job: Job, report: Report, run: Run, planned: Plan, rows: Tokenized, score: Callable, ledger: _Ledger) -> None:
    """Runs all optimizer steps; the stopwatch runs during them alone. Raises _End where the run ends early."""
    every = max(1, planned.steps // (job.evaluation.reports * REPORTS_PER_SCORE))
    scored = {round(planned.steps * (i + 1) / job.evaluation.reports) for i in range(job.evaluation.reports)}
    seen = stability.Watch()
    ledger.watch.start()
    for step in range(planned.steps):
        chunks = planned.micro_batches(step, run.world.rank, run.world.size)
        loss, norm = run.step(rows, chunks, supervised(rows, planned, step), rate(job.recipe, step, planned.steps))
        seen = seen.see(loss)
        ledger.step = step + 1
        lengths = [len(rows.ids[r]) for r in planned.order[step * planned.batch : (step + 1) * planned.batch]]
        ledger.tokens += sum(lengths)
        if isinstance(ledger.watch, Counted):
            ledger.watch.count(operations(job.recipe, ledger.shape, ledger.trainable, lengths) / run.world.size)
        if reason := stability.diverged(seen, loss, norm):
            ledger.watch.stop()
            raise _End("diverged", reason)
        if ledger.step % every and ledger.step not in scored:
            continue
        ledger.watch.stop()
        _take_peak(run, ledger)
        _check_limit(job.limits.peak_bytes, ledger.peak, "peak bytes")
        _check_limit(job.limits.seconds, run.world.largest(ledger.watch.seconds), "seconds")
        metrics = {"train_loss": seen.mean} | (score() if ledger.step in scored else {})
        ledger.metrics |= metrics
        if ledger.step in scored:
            if not math.isfinite(ledger.metrics["loss"]):
                raise _End("diverged", f"the validation loss became {ledger.metrics['loss']} at step {ledger.step}")
        stop = report(Progress(step=ledger.step, steps=planned.steps, tokens=ledger.tokens, share=ledger.step / planned.steps,
                               seconds=ledger.watch.seconds, peak_bytes=ledger.peak, metrics=metrics))  # fmt: skip
        stop = run.world.agree(stop)
        if stop and ledger.step < planned.steps:
            raise _End("stopped", stop)
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what scoring used is not training's
        ledger.watch.start()
    ledger.watch.stop()


def _take_peak(run: Run, ledger: _Ledger) -> None:
    if run.device == "cuda":
        ledger.peak = max(ledger.peak or 0, int(run.world.largest(torch.cuda.max_memory_allocated())))


def _check_limit(limit: float | None, value: float | None, name: str) -> None:
    if limit is not None and value is not None and value > limit:
        raise _End("infeasible", f"{value:,.6g} {name} are over the limit of {limit:,.6g}")


def _score(run: Run, held_out: Tokenized, prepared: Prepared, tokenizer, job: Job, ledger: _Ledger) -> dict[str, float]:
    world, wanted, own = run.world, metrics.chosen(job.evaluation.metrics), evaluate.own_scores(job)
    part = slice(world.rank, None, world.size)
    mine = Tokenized(held_out.ids[part], held_out.prompt_lengths[part])
    answered = evaluate.chosen_rows(len(held_out), job.evaluation.answers)[part]
    limit = evaluate.answer_limit(job.evaluation, held_out)
    scores = {name: [] for name in ("nll", "tokens", "right", *own, *wanted)}
    if len(mine):
        with computing(job.recipe.precision, run.device):
            scores |= evaluate.score_rows(run.inner, mine, prepared, job, tokenizer=tokenizer, answered=answered, limit=limit)
    scores = world.gather(scores)
    ledger.conditions["right"] = evaluate.pack_bits(scores["right"])
    return evaluate.summary(scores, wanted, own)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.uname().machine} CPU"
