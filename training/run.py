"""A model that is being trained: base, adapter, optimizer, data-parallel wrapping; one optimizer step; its bytes.

Owns: `Run`, `set_up`, `probe_bytes`. Must not know: the order of the rows, when a run ends, Ray.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from training import evaluate, optimizers, own, packing, warm, zero
from training.adapters import attach, detach, method_of
from training.data import Tokenized
from training.errors import wrong
from training.meter import count_bytes
from training.model import computing, load_model
from training.recipe import Job, Recipe
from training.schedule import Plan, by_length, heaviest, supervised
from training.world import World


@dataclass
class Run:
    """A model ready to be trained: `forward` is what is called, `inner` the model itself; `done` counts optimizer steps.

    `packed`: the rows of a forward are laid end to end; else they are padded to the longest.
    """

    recipe: Recipe
    world: World
    device: str
    inner: torch.nn.Module
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    engine: object | None
    accumulation: int
    scaler: torch.amp.GradScaler
    packed: bool
    done: int = 0
    accept: Callable[[float, float], bool] | None = None  # (loss, norm) of a step -> whether it is done; not asked with an engine

    def close(self) -> None:
        """Gives the base back, for the next run in this process where it keeps bases; this one is over."""
        if self.engine is None:
            warm.give_back(detach(self.inner))

    def beginning(self) -> list[torch.Tensor] | None:
        """Returns what is trained as it is now, for `begin_again`; None where a run is more than that, or much."""
        method = method_of(self.recipe.adapter)
        whole = self.engine is not None or method.state is not None or method.stepped is not None or self.recipe.adapter == "full"
        return None if whole or own.is_own(self.recipe.adapter) else [p.detach().clone() for p in self.parameters]

    def begin_again(self, beginning: list[torch.Tensor]) -> None:
        """Makes this the run that `set_up` returns: attaching an adapter anew would take longer than most of its steps."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, beginning)
        torch.manual_seed(self.recipe.seed + self.world.rank)
        self.optimizer, self.done = optimizers.build(self.recipe, self.inner), 0
        self.scaler = scaler_of(self.recipe, self.device)

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable ones; walking all modules at every step would cost a millisecond."""
        return [p for p in self.inner.parameters() if p.requires_grad]

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Returns the trainable parameters with their names."""
        return [(name, parameter) for name, parameter in self.inner.named_parameters() if parameter.requires_grad]

    def held(self) -> list[torch.Tensor]:
        """Returns every tensor that exists before the first step: weights, buffers, quantization states."""
        tensors = list(self.inner.parameters()) + list(self.inner.buffers())
        tensors += [p.ds_tensor for p in self.inner.parameters() if hasattr(p, "ds_tensor")]  # this worker's part, at stage 3
        for parameter in self.inner.parameters():
            state = getattr(parameter, "quant_state", None)
            for part in (state, getattr(state, "state2", None)):
                tensors += [value for value in vars(part).values() if isinstance(value, torch.Tensor)] if part else []
            tensors += [t for name in ("CB", "SCB") if isinstance(t := getattr(parameter, name, None), torch.Tensor)]
        # After the first forward LLM.int8 keeps its scales with the module.
        states = [state for module in self.inner.modules() if (state := getattr(module, "state", None)) is not None]
        tensors += [t for state in states for name in ("CB", "SCB") if isinstance(t := getattr(state, name, None), torch.Tensor)]
        return tensors

    def step(self, rows: Tokenized, chunks: list[list[int]], tokens: int, lr: float) -> tuple[float, float]:
        """Does one optimizer step; returns the loss before it (nats per token over all workers) and the gradient's norm.

        Args:
            chunks: this worker's rows, one list per forward.
            tokens: supervised tokens of this step over all workers, by which the loss is divided: so the result does not
                depend on how rows are cut into forwards and workers.
        """
        optimizers.set_rate(self.optimizer, lr)
        penalty = method_of(self.recipe.adapter).penalty
        total = torch.zeros((), device=self.device)
        chunks = chunks if self.packed else by_length(chunks, rows)
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            waiting = self.forward.no_sync() if self._distributed and not last else nullcontext()
            with waiting, zero.sparing(self.recipe):
                loss = self._loss(rows, chunk) / tokens
                total += loss.detach()
                if last and penalty is not None:
                    loss = loss + penalty(self.inner)
                # Data-parallel gradients are averaged over the workers, so the sum over them is asked for.
                if self.engine is not None:
                    self.engine.backward(loss * self.world.size * self.accumulation)
                    if not last:
                        self.engine.step()
                else:
                    self.scaler.scale(loss * self.world.size).backward()
            del loss
        mine = total.item()
        norm = self._update(mine)
        return self.world.total(mine), norm

    def _loss(self, rows: Tokenized, chunk: list[int]) -> torch.Tensor:
        """Returns the summed loss of one forward in nats. Logits are let go here: the backward pass needs only their softmax."""
        ids, prompt_lengths = [rows.ids[r] for r in chunk], [rows.prompt_lengths[r] for r in chunk]
        layout = packing if self.packed else evaluate
        batch = layout.batch_of(ids, prompt_lengths, device=self.device, **({} if self.packed else {"pad": 0}))
        with computing(self.recipe.precision, self.device):
            logits = layout.logits_of(self.forward, batch)
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, -2), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
        )

    @property
    def _distributed(self) -> bool:
        return isinstance(self.forward, torch.nn.parallel.DistributedDataParallel)

    def _update(self, loss: float) -> float:
        if self.engine is not None:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            return float(norm) if norm is not None else 0.0
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip).item()
        if math.isfinite(norm) and (self.accept is None or self.accept(self.world.total(float(loss)), norm)):
            self.optimizer.step()
            self.done += 1
            if (stepped := method_of(self.recipe.adapter).stepped) is not None:
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
    # DeepSpeed changes a model in ways that nobody undoes; and at stage 3 no worker's device may ever hold the whole: tensors go
    # there one by one, and each worker keeps its part.
    if recipe.zero_stage:
        base = load_model(recipe, device="cpu" if recipe.zero_stage == 3 else device)
    else:
        base = warm.take(recipe, device=device)
    inner = attach(base, recipe, shape, steps=planned.steps)
    packed = recipe.packing == "auto" and packing.packs(base)
    torch.manual_seed(recipe.seed + world.rank)
    optimizer = optimizers.build(recipe, inner)
    accumulation = math.ceil(planned.batch // world.size / planned.micro)
    forward, engine = inner, None
    if recipe.zero_stage:
        if not torch.distributed.is_initialized():
            raise wrong("recipe.zero_stage", "ZeRO shares state among workers, and this process is alone.",
                        "Set zero_stage: 0, or resources.workers to 2 or more.")  # fmt: skip
        trainable = sum(p.numel() for p in inner.parameters() if p.requires_grad)
        settings = zero.config(
            recipe, workers=world.size, micro_batch=planned.micro, accumulation=accumulation, trainable=trainable,
            hidden=shape.hidden, block=shape.linear_parameters // shape.layers, pinned=device == "cuda",
        )  # fmt: skip
        engine, optimizer = zero.start(inner, optimizer, settings, device)
        forward = engine
    elif world.size > 1:
        forward = torch.nn.parallel.DistributedDataParallel(inner)
    return Run(recipe, world, device, inner, forward, optimizer, engine, accumulation, scaler_of(recipe, device), packed)


def probed(job: Job, shape, planned: Plan, rows: Tokenized, world: World, device: str) -> tuple[int, Run | None]:
    """Returns the peak bytes of training on this worker, counted over two steps on the heaviest batch, and a fresh run.

    The run is None where what these steps changed could not be undone. Two steps, because the optimizer's state exists only from
    the second on. Weights, adapters, gradients, optimizer state and every temporary are counted by storage; the interpreter and
    libraries are not.
    """
    run = set_up(job, shape, planned, world, device)
    began = run.beginning()
    step = heaviest(planned, rows, world, packed=run.packed)
    chunks = planned.micro_batches(step, world.rank, world.size)
    run.scaler = scaler_of(job.recipe, device, start=1.0)  # an overflow would leave the optimizer without its state
    tokens = supervised(rows, planned, step)
    with count_bytes(run.held()) as counter:
        for _ in range(2):
            run.step(rows, chunks, tokens, 0.0)
    if began is not None:
        run.begin_again(began)
        return counter.peak, run
    run.close()
    del run
    gc.collect()
    return counter.peak, None


def probe_bytes(job: Job, shape, planned: Plan, rows: Tokenized, world: World, device: str) -> int:
    """Returns the peak bytes of training on this worker, as `probed` does."""
    peak, run = probed(job, shape, planned, rows, world, device)
    if run is not None:
        run.close()
    return peak
