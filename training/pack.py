"""Several recipes trained at once over one frozen base: each tick is one forward and one backward for all of them.

Owns: `Pack`, its seats, what each tick has of whom. Every seat has its own rows and their order, steps, rate, clipping, moments
and loss over its own supervised tokens, so that a trial comes to what it comes to alone; it enters and leaves between two ticks.
Must not know: reports, limits, Ray, studies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from training import packing, warm
from training.beside import base_of, refusal
from training.data import Tokenized
from training.model import computing, match
from training.recipe import Recipe
from training.schedule import Plan, rate, supervised
from training.stacked import Layout, Stack, install, uninstall

# Tokens of one forward. On a CPU what a larger one saves in dispatch it loses in caches (benchmarks/packing).
AT_ONCE = {"cpu": 768, "cuda": 16_384}
ODD = (2_654_435_761, 2_246_822_519, 3_266_489_917, 668_265_263)  # large odd numbers that spread what they multiply


@dataclass
class Seat:
    """One trial in a pack. `step` counts its finished optimizer steps, `taken` the rows of the current one that are done."""

    number: int
    recipe: Recipe
    plan: Plan
    step: int = 0
    taken: int = 0
    loss: float = 0.0
    tokens: int = 0

    @property
    def done(self) -> bool:
        return self.step >= self.plan.steps

    def offer(self) -> list[int]:
        """Returns the rows of the next forward."""
        start = self.step * self.plan.batch + self.taken
        return self.plan.order[start : min(start + self.plan.micro, (self.step + 1) * self.plan.batch)]


@dataclass(frozen=True)
class Step:
    """A finished optimizer step of one seat: the loss before it (nats per token) and the norm of the gradient."""

    seat: Seat
    loss: float
    norm: float


class Pack:
    """A base with seats for several trials."""

    def __init__(self, recipe: Recipe, shape, rows: Tokenized, *, seats: int, rank: int, device: str = "cpu",
                 kind: str = "stacked", dtype: torch.dtype = torch.float32):  # fmt: skip
        """Loads the base.

        Args:
            recipe: of any of the trials; they have its `base_of`.
            shape: `training.model.describe` of the base.
            rows: of all trials.
            seats: how many trials there may be at a time.
            rank: the largest of them, or of the first; a larger one makes room for itself.
            kind: "stacked", or "loop": the reference.
            dtype: of the adapters; of the whole model too where it is fp64, for tests.
        """
        self.recipe, self.rows, self.device = recipe, rows, device
        self.seats, self._kind = [None] * seats, kind
        model = self._base(dtype)
        chosen = match(recipe.targets, shape)
        sizes = {name: chosen[name] for name, _ in model.named_modules() if name in chosen}
        self.stack = Stack(sizes, seats, rank, device=device, dtype=dtype)
        install(model, self.stack, kind)
        self.model = model

    def _base(self, dtype: torch.dtype):
        model = warm.take(self.recipe, device=self.device)
        if dtype == torch.float64:
            model.double()
        if not packing.packs(model):
            warm.give_back(model)
            raise ValueError(f"{self.recipe.model} cannot have rows of several trials in one forward")
        return model

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Gives the base back while the block runs, for a run of its own on it; the seats keep what they have."""
        uninstall(self.model, self.stack)
        warm.give_back(self.model)
        self.model = None
        try:
            yield
        finally:
            self.model = self._base(self.stack.dtype)
            install(self.model, self.stack, self._kind)

    def close(self) -> None:
        """Gives the base back for good."""
        uninstall(self.model, self.stack)
        warm.give_back(self.model)

    @contextmanager
    def only(self, seat: Seat) -> Iterator[None]:
        """Makes the model that of one trial while the block runs, whatever rows it sees."""
        self.stack.only = (seat.number, seat.recipe.rank, _scale(seat.recipe))
        try:
            yield
        finally:
            self.stack.only = None

    # Who is there

    @property
    def present(self) -> list[Seat]:
        return [seat for seat in self.seats if seat is not None]

    def enter(self, recipe: Recipe, plan: Plan) -> Seat:
        """Gives a trial the first free seat, with new weights.

        Raises:
            ValueError: it cannot be trained here, or no seat is free.
        """
        if (reason := refusal(recipe)) or base_of(recipe) != base_of(self.recipe):
            raise ValueError(reason or f"a pack for {base_of(self.recipe)} has no place for {recipe}")
        number = self.seats.index(None)
        self.stack.grow(recipe.rank)
        self.stack.draw(number, recipe.rank, recipe.seed)
        self.seats[number] = Seat(number, recipe, plan)
        return self.seats[number]

    def leave(self, seat: Seat) -> None:
        """Empties a trial's seat."""
        self.stack.clear(seat.number)
        self.seats[seat.number] = None

    def adapter(self, seat: Seat) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns a trial's (A, B) by module."""
        return self.stack.taken(seat.number, seat.recipe.rank)

    # One tick

    def tick(self) -> list[Step]:
        """Trains every seat on its next rows; returns those that finished an optimizer step by it.

        A step whose loss or gradient is not finite is told, and changes no weight.
        """
        active = [seat for seat in self.present if not seat.done]
        offers = [seat.offer() for seat in active]
        losses = [loss for some in self._forwards(offers) for loss in self._learn(active[some], offers[some])]
        finished = []
        for seat, rows, loss in zip(active, offers, losses, strict=True):
            seat.loss += loss
            seat.taken += len(rows)
            seat.tokens += sum(len(self.rows.ids[row]) for row in rows)
            if seat.taken == seat.plan.batch:
                finished.append(seat)
        if not finished:
            return []
        norms = torch.stack([self.stack.norm(seat.number, seat.recipe.rank) for seat in finished]).tolist()
        told = [Step(seat, seat.loss, norm) for seat, norm in zip(finished, norms, strict=True)]
        for seat, norm in zip(finished, norms, strict=True):
            if math.isfinite(norm) and math.isfinite(seat.loss):
                self._update(seat, norm)
            else:
                self.stack.forget(seat.number)
            seat.step, seat.taken, seat.loss = seat.step + 1, 0, 0.0
        return told

    def _update(self, seat: Seat, norm: float) -> None:
        recipe = seat.recipe
        now = rate(recipe, seat.step, seat.plan.steps)
        self.stack.update(
            seat.number, recipe.rank, shrink=recipe.clip / (norm + 1e-6), rates=(now, now * recipe.lora_plus_ratio),
            decay=recipe.weight_decay, step=seat.step + 1,
        )  # fmt: skip

    def _forwards(self, offers: list[list[int]]) -> list[slice]:
        """Returns which seats share a forward: neighbours, as long as their tokens together are not too many for the caches."""
        found, most, tokens = [], AT_ONCE.get(torch.device(self.device).type, AT_ONCE["cuda"]), 0
        for i, rows in enumerate(offers):
            more = sum(len(self.rows.ids[row]) for row in rows)
            if found and tokens + more <= most:
                found[-1], tokens = slice(found[-1].start, i + 1), tokens + more
            else:
                found.append(slice(i, i + 1))
                tokens = more
        return found

    def _learn(self, active: list[Seat], offers: list[list[int]]) -> list[float]:
        """Does one forward and one backward; returns each seat's part of its loss."""
        chosen = sorted(
            ((seat, row) for seat, rows in zip(active, offers, strict=True) for row in rows), key=lambda pair: pair[0].number
        )
        ids, firsts = [self.rows.ids[row] for _, row in chosen], [max(self.rows.prompt_lengths[row], 1) for _, row in chosen]
        starts = [0, *itertools.accumulate(map(len, ids))]
        answers = [len(row) - first for row, first in zip(ids, firsts, strict=True)]

        def of(values, dtype=torch.long) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=self.device)

        batch = {
            "input_ids": of(itertools.chain.from_iterable(ids))[None],
            "position_ids": of(at for row in ids for at in range(len(row)))[None],
            "keep": of(at for start, row, first in zip(starts, ids, firsts, strict=False)
                       for at in range(start + first - 1, start + len(row) - 1)),
            "rows": packing.grouped([[len(row) for row in ids]], device=self.device),
        }  # fmt: skip
        labels = of(token for row, first in zip(ids, firsts, strict=True) for token in row[first:])
        whose = of(seat.number for (seat, _), count in zip(chosen, answers, strict=True) for _ in range(count))
        shares = torch.zeros(len(self.seats), dtype=self.stack.dtype, device=self.device)
        for seat in active:
            shares[seat.number] = 1 / supervised(self.rows, seat.plan, seat.step)
        self.stack.open(active[0].number, active[-1].number + 1, max(seat.recipe.rank for seat in active))
        self.stack.layout = self._layout(chosen, [len(row) for row in ids], batch["position_ids"][0])
        with computing(self.recipe.precision, self.device):
            logits = packing.logits_of(self.model, batch)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        sums = torch.zeros_like(shares).index_add(0, whose, each) * shares
        self.stack.backward(sums.sum())
        self.stack.layout = None
        told = sums.tolist()
        return [told[seat.number] for seat in active]

    def _layout(self, chosen: list[tuple[Seat, int]], lengths: list[int], positions: torch.Tensor) -> Layout:
        counts = [0] * len(self.seats)
        for (seat, _), length in zip(chosen, lengths, strict=True):
            counts[seat.number] += length
        recipes, repeats = [seat.recipe for seat, _ in chosen], torch.tensor(lengths, device=self.device)

        def spread(values: list[float], dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device).repeat_interleave(repeats).unsqueeze(1)

        keep = keys = None
        if any(recipe.dropout for recipe in recipes):
            keep = spread([1 - recipe.dropout for recipe in recipes], self.stack.dtype)
            keys = spread([_key(seat, row) for seat, row in chosen], torch.int64) + positions.unsqueeze(1) * ODD[3]
        counts = counts[chosen[0][0].number : chosen[-1][0].number + 1]
        ends = torch.tensor(counts, device=self.device).cumsum(0).to(torch.int32)
        return Layout(tuple(counts), ends, spread([_scale(recipe) for recipe in recipes], self.stack.dtype), keep, keys)


def _scale(recipe: Recipe) -> float:
    return recipe.alpha / (math.sqrt(recipe.rank) if recipe.adapter == "rslora" else recipe.rank)


def _key(seat: Seat, row: int) -> int:
    return (seat.recipe.seed * ODD[0] + seat.step * ODD[1] + row * ODD[2]) % 2**31
