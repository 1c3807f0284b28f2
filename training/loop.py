"""One recipe, trained: `train(job, report) -> Outcome`.

Owns: the order of the rows, the optimizer steps, and when to report, score and end. Runs alone or as one of several
data-parallel workers (torch.distributed already set up). Must not know: Ray, studies, searches.

A run ends by itself in one of four ways (`Outcome.ended`): complete, stopped (the report said so), infeasible (memory or a
limit), diverged. Anything else is an exception and means that something is broken.
"""

from __future__ import annotations

import gc
import math
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from training import checkpoint, evaluate, optimizers, stability, zero
from training.adapters import ADAPTERS, attach
from training.data import Prepared, Tokenized, prepare, read, sample
from training.errors import wrong
from training.meter import Stopwatch, count_bytes, gemm_seconds
from training.model import computing, describe, device_of, load_model, load_tokenizer
from training.recipe import Job, Outcome, Progress, Recipe, Report, clashes
from training.world import World, versions

REPORTS_PER_SCORE = 4  # how often a run reports between two scored points
LEAST = 0.1  # of the peak rate, at the end of cosine_min
NO_REPORT: Report = lambda progress: None  # noqa: E731


class _End(Exception):
    """Leaves the loop with an Outcome to be completed."""

    def __init__(self, ended: str, reason: str):
        self.ended, self.reason = ended, reason


@dataclass(frozen=True)
class Plan:
    """Which rows each optimizer step trains on, over all workers: `order[step * batch : (step + 1) * batch]`."""

    steps: int
    batch: int
    micro: int
    order: list[int] = field(repr=False)

    def micro_batches(self, step: int, rank: int, workers: int) -> list[list[int]]:
        """Returns this worker's rows of one step, cut into forwards; equally many on every worker."""
        mine = self.order[step * self.batch : (step + 1) * self.batch][rank::workers]
        return [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]


def plan(recipe: Recipe, rows: Tokenized, *, workers: int) -> Plan:
    """Returns the rows of every step: one seeded permutation per epoch, batches running on across epochs, all full.

    Raises:
        ValueError: the batch cannot be shared equally among the workers.
    """
    if recipe.batch_size % workers:
        raise ValueError(f"batch_size must be a multiple of the workers, got {recipe.batch_size} and {workers}")
    rng = random.Random(recipe.seed)
    order: list[int] = []

    def extend():
        epoch = list(range(len(rows)))
        rng.shuffle(epoch)
        order.extend(epoch)

    if recipe.steps:
        steps = recipe.steps
    elif recipe.tokens:
        steps, seen = 0, 0
        while seen < recipe.tokens:
            while len(order) < (steps + 1) * recipe.batch_size:
                extend()
            seen += sum(len(rows.ids[i]) for i in order[steps * recipe.batch_size : (steps + 1) * recipe.batch_size])
            steps += 1
    else:
        steps = max(1, round((recipe.epochs or 1) * len(rows) / recipe.batch_size))
    while len(order) < steps * recipe.batch_size:
        extend()
    share = recipe.batch_size // workers
    return Plan(steps, recipe.batch_size, min(recipe.micro_batch or share, share), order)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Returns the learning rate of a step (0-based): linear warm-up, then cosine or linear down to 0, or constant.

    `cosine_min` goes down to a tenth of the peak.
    """
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - warmup) / max(steps - warmup, 1)
    if recipe.schedule == "linear":
        return recipe.learning_rate * (1 - done)
    least = LEAST if recipe.schedule == "cosine_min" else 0.0
    return recipe.learning_rate * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Run:
    """A model ready to be trained: `forward` is what is called, `inner` the model itself; `done` counts optimizer steps."""

    recipe: Recipe
    world: World
    device: str
    inner: torch.nn.Module
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    engine: object | None
    accumulation: int
    scaler: torch.amp.GradScaler
    done: int = 0

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable ones; walking all modules at every step would cost a millisecond."""
        return [p for p in self.inner.parameters() if p.requires_grad]

    def held(self) -> list[torch.Tensor]:
        """Returns every tensor that exists before the first step: weights, buffers, quantization states."""
        tensors = list(self.inner.parameters()) + list(self.inner.buffers())
        for parameter in self.inner.parameters():
            state = getattr(parameter, "quant_state", None)
            for part in (state, getattr(state, "state2", None)):
                tensors += [value for value in vars(part).values() if isinstance(value, torch.Tensor)] if part else []
            tensors += [t for name in ("CB", "SCB") if isinstance(t := getattr(parameter, name, None), torch.Tensor)]
        return tensors

    def step(self, rows: Tokenized, chunks: list[list[int]], tokens: int, lr: float) -> tuple[float, float]:
        """Does one optimizer step; returns the loss before it (nats per token over all workers) and the gradient's norm.

        Args:
            chunks: this worker's rows, one list per forward.
            tokens: supervised tokens of this step over all workers, by which the loss is divided: so the result does not
                depend on how rows are cut into forwards and workers.
        """
        optimizers.set_rate(self.optimizer, lr)
        penalty = ADAPTERS[self.recipe.adapter].penalty
        total = 0.0
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            batch = evaluate.batch_of(
                [rows.ids[r] for r in chunk], [rows.prompt_lengths[r] for r in chunk], pad=0, device=self.device
            )
            waiting = self.forward.no_sync() if self._distributed and not last else nullcontext()
            with waiting:
                with computing(self.recipe.precision, self.device):
                    logits = evaluate.logits_of(self.forward, batch)
                loss = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
                ) / tokens  # fmt: skip
                total += loss.item()
                if last and penalty is not None:
                    loss = loss + penalty(self.inner)
                # Data-parallel gradients are averaged over the workers, so the sum over them is asked for.
                if self.engine is not None:
                    self.engine.backward(loss * self.world.size * self.accumulation)
                    if not last:
                        self.engine.step()
                else:
                    self.scaler.scale(loss * self.world.size).backward()
            del logits, loss
        norm = self._update()
        return self.world.total(total), norm

    @property
    def _distributed(self) -> bool:
        return isinstance(self.forward, torch.nn.parallel.DistributedDataParallel)

    def _update(self) -> float:
        if self.engine is not None:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            return float(norm) if norm is not None else 0.0
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self.done += 1
            if (stepped := ADAPTERS[self.recipe.adapter].stepped) is not None:
                stepped(self.inner, self.done)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        # In fp16 an overflow is no divergence: the step is left out and the scale halved, as long as there is one.
        overflow = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() >= 1
        return 0.0 if overflow else norm


def scaler_of(recipe: Recipe, device: str, *, start: float = 2.0**16) -> torch.amp.GradScaler:
    """Returns what scales the loss so that gradients do not vanish in fp16; it does nothing at another precision."""
    return torch.amp.GradScaler(device, init_scale=start, enabled=recipe.precision == "fp16")


def set_up(job: Job, shape, planned: Plan, world: World, device: str) -> Run:
    """Returns a fresh run: base model loaded, adapter attached, optimizer, and data-parallel wrapping where asked."""
    recipe = job.recipe
    inner = attach(load_model(recipe, device=device), recipe, shape, steps=planned.steps)
    torch.manual_seed(recipe.seed + world.rank)
    optimizer = optimizers.build(recipe, inner)
    accumulation = math.ceil(planned.batch // world.size / planned.micro)
    forward, engine = inner, None
    if recipe.zero_stage:
        if not torch.distributed.is_initialized():
            raise wrong("recipe.zero_stage", "ZeRO shares state among workers, and this process is alone.",
                        "Set zero_stage: 0, or resources.workers to 2 or more.")  # fmt: skip
        import deepspeed

        trainable = sum(p.numel() for p in inner.parameters() if p.requires_grad)
        settings = zero.config(
            recipe, workers=world.size, micro_batch=planned.micro, accumulation=accumulation, trainable=trainable
        )
        engine, optimizer, _, _ = deepspeed.initialize(
            model=inner, optimizer=optimizer, config=settings, dist_init_required=False
        )
        forward = engine
    elif world.size > 1:
        forward = torch.nn.parallel.DistributedDataParallel(inner)
    return Run(recipe, world, device, inner, forward, optimizer, engine, accumulation, scaler_of(recipe, device))


def heaviest(planned: Plan, rows: Tokenized, world: World) -> int:
    """Returns the step whose widest forward has the most padded tokens: the one that needs the most memory."""

    def weight(step: int) -> int:
        return max(len(c) * max(len(rows.ids[r]) for r in c) for c in planned.micro_batches(step, 0, world.size))

    return max(range(planned.steps), key=weight)


def probe_bytes(job: Job, shape, planned: Plan, rows: Tokenized, world: World, device: str) -> int:
    """Returns the peak bytes of training on this worker, counted over two steps on the heaviest batch of a scratch model.

    Two steps, because the optimizer's state exists only from the second on. Weights, adapters, gradients, optimizer state
    and every temporary are counted by storage; the interpreter and libraries are not.
    """
    step = heaviest(planned, rows, world)
    chunks = planned.micro_batches(step, world.rank, world.size)
    run = set_up(job, shape, planned, world, device)
    run.scaler = scaler_of(job.recipe, device, start=1.0)  # an overflow would leave the optimizer without its state
    tokens = supervised(rows, planned, step)
    with count_bytes(run.held()) as counter:
        for _ in range(2):
            run.step(rows, chunks, tokens, 0.0)
    del run
    gc.collect()
    return counter.peak


def supervised(rows: Tokenized, planned: Plan, step: int) -> int:
    """Returns the number of response tokens in one step over all workers; the first token of a row is never predicted."""
    chosen = planned.order[step * planned.batch : (step + 1) * planned.batch]
    return sum(len(rows.ids[r]) - max(rows.prompt_lengths[r], 1) for r in chosen)


@dataclass
class _Ledger:
    """What a run has come to so far; becomes its Outcome however it ends."""

    world: World
    device: str
    watch: Stopwatch
    conditions: dict
    step: int = 0
    steps: int = 1
    tokens: int = 0
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
    ledger = _Ledger(world, device, Stopwatch(device), {"device": _device_name(device), "workers": world.size, **versions()})
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
    shape = describe(recipe.model, recipe.revision)
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
    _steps(job, report, run, planned, rows, lambda: _score(run, held_out, prepared, job, ledger), ledger)
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
        ledger.tokens += sum(len(rows.ids[r]) for r in planned.order[step * planned.batch : (step + 1) * planned.batch])
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
                               seconds=ledger.watch.seconds, metrics=metrics))  # fmt: skip
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


def _score(run: Run, held_out: Tokenized, prepared: Prepared, job: Job, ledger: _Ledger) -> dict[str, float]:
    world = run.world
    mine = Tokenized(held_out.ids[world.rank :: world.size], held_out.prompt_lengths[world.rank :: world.size])
    with computing(job.recipe.precision, run.device):
        scores = evaluate.score_rows(run.inner, mine, prepared, job) if len(mine) else {"nll": [], "tokens": [], "right": []}
    scores = world.gather(scores)
    ledger.conditions["right"] = evaluate.pack_bits(scores["right"])
    return evaluate.summary(scores)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.uname().machine} CPU"
