"""What several LoRA recipes in one forward and backward gain over one at a time, and whether each comes to the same as alone.

    python -m benchmarks.packing [--quick]

Tokens per second of K recipes packed against the same K recipes one after another, each a PEFT model in our own loop
(padding-free, fused AdamW: faster than the Trainer, see benchmarks/training), on the embedded model with one thread, for several
K and batches. Interleaved, the ratio is the median over rounds; one at a time stands against itself, and a case in which that
leaves 0.95-1.05 is measured anew, three times at most. Then operations per trial and step, which repeat exactly, and generated
packs (ranks, rates, batches, dropout, schedules mixed; trials that enter as others leave) against each trial alone.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from training import pack
from training.beside import SHARED
from training.data import Tokenized, prepare, read
from training.model import describe, load_tokenizer
from training.recipe import DataConfig, Job, Recipe
from training.run import Run, set_up
from training.schedule import plan, rate, supervised
from training.world import World

BASE = Recipe(model="embedded", max_length=128, dropout=0.0, learning_rate=1e-3, steps=10_000)
DATA = DataConfig(train="embedded:train.jsonl", template="{instruction}\nAnswer:")
SEATS, BATCHES = (1, 2, 4, 8), (1, 2, 4, 8, 16)
ROUNDS, STEPS = 5, 6
NOISE = (0.95, 1.05)
NUDGES = 6


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def rows_of(data: DataConfig) -> Tokenized:
    """Returns the embedded task's training rows."""
    return prepare(read(data), data, load_tokenizer(BASE), BASE.max_length).train


def recipes_of(seats: int, batch: int) -> list[Recipe]:
    """Returns recipes that differ in rank, alpha and rate."""
    ranks = (8, 16, 4, 32)
    return [BASE.model_copy(update={"rank": ranks[i % 4], "alpha": 2.0 * ranks[i % 4], "batch_size": batch, "seed": i,
                                    "learning_rate": 1e-3 / (1 + i)}) for i in range(seats)]  # fmt: skip


class Alone:
    """Recipes trained one after another, each a PEFT model."""

    def __init__(self, recipes: list[Recipe], rows: Tokenized):
        self.rows, self.plans = rows, [plan(recipe, rows, workers=1) for recipe in recipes]
        self.runs: list[Run] = [
            set_up(Job(recipe=recipe, data=DATA), describe(recipe.model), planned, World(), "cpu")
            for recipe, planned in zip(recipes, self.plans, strict=True)
        ]

    def steps(self, first: int, count: int) -> float:
        """Does some steps of every recipe; returns the seconds."""
        since = time.perf_counter()
        for run, planned in zip(self.runs, self.plans, strict=True):
            for step in range(first, first + count):
                lr = rate(run.recipe, step, planned.steps)
                run.step(self.rows, planned.micro_batches(step, 0, 1), supervised(self.rows, planned, step), lr)
        return time.perf_counter() - since


class Packed:
    """The same recipes, together."""

    def __init__(self, recipes: list[Recipe], rows: Tokenized):
        most = max(recipe.rank for recipe in recipes)
        self.pack = pack.Pack(recipes[0], describe(BASE.model), rows, seats=len(recipes), rank=most)
        for recipe in recipes:
            self.pack.enter(recipe, plan(recipe, rows, workers=1))

    def steps(self, count: int) -> float:
        """Does some steps of every recipe; returns the seconds."""
        since = time.perf_counter()
        for _ in range(count):
            self.pack.tick()
        return time.perf_counter() - since


def cell(seats: int, batch: int, rows: Tokenized, rounds: int) -> dict[str, Any]:
    """Returns how much faster a pack is than its recipes one after another."""
    recipes = recipes_of(seats, batch)
    tries = 0
    while tries < 3:
        tries += 1
        alone, packed = Alone(recipes, rows), Packed(recipes, rows)
        alone.steps(0, 2), packed.steps(2)
        ratios, noise = [], []
        for i in range(rounds):
            first = 2 + 2 * i * STEPS
            one = alone.steps(first, STEPS)
            both = packed.steps(STEPS)
            packed_again = packed.steps(STEPS)
            again = alone.steps(first + STEPS, STEPS)
            ratios.append((one + again) / (both + packed_again))
            noise.append(one / again)
        steady = statistics.median(noise)
        if NOISE[0] <= steady <= NOISE[1]:
            break
    tokens = statistics.fmean(len(rows.ids[row]) for row in alone.plans[0].order[: 50 * batch]) * batch * seats
    return {
        "seats": seats, "batch": batch, "tokens_per_tick": round(tokens), "ratio": round(statistics.median(ratios), 3),
        "from": round(min(ratios), 3), "to": round(max(ratios), 3), "alone_against_alone": round(steady, 3), "tries": tries,
        "noisy": not NOISE[0] <= steady <= NOISE[1],
    }  # fmt: skip


def operations(rows: Tokenized, seats: int = 8, batch: int = 2) -> dict[str, float]:
    """Returns the operations of one step of one recipe: alone, and in a pack."""
    recipes = recipes_of(seats, batch)
    alone, packed = Alone(recipes[:1], rows), Packed(recipes, rows)
    alone.steps(0, 1), packed.steps(1)
    with Operations() as one:
        alone.steps(1, 1)
    with Operations() as all_of_them:
        packed.steps(1)
    return {"alone": one.count, "packed": round(all_of_them.count / seats, 1),
            "ratio": round(one.count / (all_of_them.count / seats), 2)}  # fmt: skip


def some(rng: random.Random, shared: dict) -> Recipe:
    """Returns a recipe that differs from others in all that recipes in a pack may differ in."""
    return BASE.model_copy(update={
        "rank": rng.choice([1, 2, 3, 8, 16]), "alpha": rng.choice([4.0, 16.0, 33.0]), "dropout": rng.choice([0.0, 0.1, 0.3]),
        "learning_rate": rng.choice([1e-4, 1e-3, 5e-3]), "batch_size": rng.choice([1, 2, 3]), "seed": rng.randrange(1000),
        "weight_decay": rng.choice([0.0, 0.1]), "clip": rng.choice([0.3, 1.0]), "steps": rng.choice([2, 3, 4]),
        "adapter": rng.choice(["lora", "rslora"]), "schedule": rng.choice(["cosine", "linear", "constant"]),
        "lora_plus_ratio": rng.choice([1.0, 4.0]), "max_length": BASE.max_length,
    } | shared)  # fmt: skip


def trained(
    recipes: list[Recipe], rows: Tokenized, seats: int, kind: str, dtype: torch.dtype, *, wild: bool = False, nudged: int = 0
) -> list[dict]:  # fmt: skip
    """Returns the adapter of each recipe before and after training; they enter in order, as seats come free.

    Args:
        wild: there is a neighbour whose weights are infinite at once, and whose rate is absurd.
        nudged: other than 0, each begins with weights that differ in their last bit, drawn with this seed.
    """
    packed = pack.Pack(recipes[0], describe(BASE.model), rows, seats=seats + wild, rank=16, dtype=dtype, kind=kind)
    if wild:
        shared = {name: getattr(recipes[0], name) for name in SHARED}
        neighbour = BASE.model_copy(update=shared | {"learning_rate": 1e3, "clip": 1e9, "seed": 5})
        seat = packed.enter(neighbour, plan(neighbour, rows, workers=1))
        packed.stack.arrays["weights"][0][seat.number] = float("inf")
    waiting, found, whose = list(enumerate(recipes)), [{} for _ in recipes], {}
    while waiting or whose:
        while waiting and None in packed.seats:
            number, recipe = waiting.pop(0)
            seat = packed.enter(recipe, plan(recipe, rows, workers=1))
            if nudged:
                own = packed.stack.arrays["weights"][0][seat.number]  # each by its own: Adam does not see one factor for all
                signs = torch.randint(-1, 2, own.shape, generator=torch.Generator().manual_seed(nudged), dtype=dtype)
                own *= 1 + torch.finfo(dtype).eps * signs
            found[number]["before"], whose[seat.number] = packed.adapter(seat), number
        packed.tick()
        for seat in [seat for seat in packed.present if seat.done and seat.number in whose]:
            found[whose.pop(seat.number)]["after"] = packed.adapter(seat)
            packed.leave(seat)
    packed.close()
    return found


def error(one: dict, other: dict) -> float:
    """Returns the largest relative difference of what two runs have learned, over modules and both sides."""
    return max(
        ((mine - theirs).norm() / (theirs - first).norm()).item()
        for name, pair in one["after"].items()
        for mine, theirs, first in zip(pair, other["after"][name], other["before"][name], strict=True)
    )


def errors(rows: Tokenized, packs: int, kind: str, dtype: torch.dtype, wanted: float) -> dict[str, Any]:
    """Returns the errors of trials in generated packs against the same trials alone, by the reference.

    Of those above what is wanted, `last_bit` is the largest error of the same trial alone against itself, begun with weights that
    differ in their last bit: what rounding comes to in that trial whoever computes it.
    """
    found, above = [], []
    for seed in range(packs):
        rng = random.Random(seed)
        shared = {"gradient_checkpointing": rng.random() < 0.3, "targets": rng.choice(["all-linear", "attention"])}
        recipes = [some(rng, shared) for _ in range(rng.choice([2, 3, 4]))]
        together = trained(recipes, rows, rng.choice([2, 3]), kind, dtype, wild=rng.random() < 0.4)
        for recipe, mine in zip(recipes, together, strict=True):
            (alone,) = trained([recipe], rows, 1, "loop", dtype)
            found.append(error(mine, alone))
            if found[-1] > wanted:
                nudged = [trained([recipe], rows, 1, "loop", dtype, nudged=i + 1)[0] for i in range(NUDGES)]
                above.append({"error": found[-1], "last_bit": max(error(other, alone) for other in nudged)})
    return {"worst": max(found), "median": statistics.median(found), "trials": len(found), "above": above}


def main() -> None:
    options = record.arguments(__doc__.split("\n")[0])
    torch.set_num_threads(1)
    rows, short = rows_of(DATA), rows_of(DATA.model_copy(update={"limit": 100}))
    place = Path(options.storage) / "packing.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    done = [] if options.quick or not place.is_file() else [json.loads(line) for line in place.read_text().splitlines()]
    for batch in (2,) if options.quick else BATCHES:
        for seats in (1, 4) if options.quick else SEATS:
            if not any((one["seats"], one["batch"]) == (seats, batch) for one in done):
                done.append(cell(seats, batch, rows, 2 if options.quick else ROUNDS))
                if not options.quick:
                    place.write_text("".join(json.dumps(one) + "\n" for one in done))
                print(done[-1], flush=True)
    counted = operations(rows)
    packs = 3 if options.quick else 100
    fp64 = errors(short, packs, "stacked", torch.float64, 1e-11)
    fp32 = errors(short, 2 if options.quick else 20, "loop", torch.float32, 1e-4)
    many = [one["ratio"] for one in done if one["seats"] > 1]
    eight = [one["ratio"] for one in done if one["seats"] == 8 and one["batch"] <= 2]
    single = [1 / one["ratio"] - 1 for one in done if one["seats"] == 1]
    figures = {
        "steady_ratio_k8": min(eight, default=None), "sweep_min_ratio": min(many, default=None),
        "k1_overhead": round(max(single), 3), "ops_ratio_k8": counted["ratio"],
        "fp64_error": fp64["worst"], "fp32_error": fp32["worst"], "fp64": fp64, "fp32": fp32,
        "operations": counted, "packs": packs, "cells": done,
    }  # fmt: skip
    for name, value in figures.items():
        record.show(name, value)
    record.finish("packing", figures, quick=options.quick)
    if not options.quick:
        place.unlink()


if __name__ == "__main__":
    main()
