"""The peak of a training step as it is predicted, against that which is counted: random recipes on three shapes of Llama.

Every recipe is trained for two real steps on rows of random length, and the bytes of every tensor are counted
(`training.run.probe_bytes`). The prediction knows the recipe, the shape, and the lengths of the rows of the heaviest step.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.models import llama
from training import memory, schedule
from training.data import Tokenized
from training.model import describe
from training.recipe import DataConfig, Job, Recipe, Resources, clashes
from training.run import probe_bytes
from training.world import World

RECIPES = 100
SEED = 12  # of recipes to which the formula was not fitted
TARGETS = ("all-linear", "all-linear", "attention", "mlp", ("q_proj", "v_proj"))
LONGEST = {"embedded": 160, "small": 160, "medium": 96}  # tokens of a row
BATCHES = {"embedded": (1, 2, 4, 8, 12, 16, 24), "small": (1, 2, 4, 8, 12, 16, 24), "medium": (1, 2, 4, 6, 8)}


def draw(rng: random.Random, models: dict[str, str]) -> tuple[str, Recipe, Tokenized]:
    """Returns the name of a model, a recipe that can be trained on a CPU and rows of three steps."""
    while True:
        name = rng.choice(list(models))
        batch, bits = rng.choice(BATCHES[name]), rng.choice((32, 32, 16, 8, 4))
        recipe = Recipe(
            model=models[name], adapter=rng.choice(("lora", "lora", "rslora", "dora", "full")),
            rank=rng.choice((2, 4, 8, 16, 32, 64)), dropout=rng.choice((0, 0.05)), targets=rng.choice(TARGETS), batch_size=batch,
            micro_batch=rng.choice((None, None, max(1, batch // 2), max(1, batch // 3))), steps=3,
            bits=bits, precision="bf16" if bits == 16 else rng.choice(("fp32", "fp32", "bf16")),
            gradient_checkpointing=rng.random() < 0.3, optimizer=rng.choice(("adamw", "adamw", "adamw_8bit")),
            seed=rng.randrange(1000),
        )  # fmt: skip
        if not clashes(recipe, Resources()):
            break
    lengths = [rng.randint(16, rng.choice((48, LONGEST[name]))) for _ in range(3 * batch)]
    prompts = [rng.randint(1, length - 4) for length in lengths]
    return name, recipe, Tokenized([[rng.randrange(3, 500) for _ in range(length)] for length in lengths], prompts)


def compare(recipe: Recipe, rows: Tokenized) -> tuple[int, memory.Memory]:
    """Returns the peak bytes that are counted, and the prediction."""
    shape, world = describe(recipe.model), World()
    planned = schedule.plan(recipe, rows, workers=1)
    packed = recipe.packing == "auto"
    step = schedule.heaviest(planned, rows, world, packed=packed)
    forwards = schedule.loads(planned.micro_batches(step, 0, 1), rows, packed=packed)
    job = Job(recipe=recipe, data=DataConfig(train="none"))
    return probe_bytes(job, shape, planned, rows, world, "cpu"), memory.predict(recipe, shape, forwards=forwards)


def measure(quick: bool) -> dict[str, Any]:
    """Returns the 95th percentile, the median and the largest of the errors as shares of what was counted, and the worst five."""
    torch.set_num_threads(1)
    rng, found = random.Random(SEED), []
    with tempfile.TemporaryDirectory() as folder:
        models = {"embedded": "embedded", **{name: llama(name, Path(folder)) for name in ("small", "medium")}}
        for _ in range(8 if quick else RECIPES):
            name, recipe, rows = draw(rng, models)
            counted, predicted = compare(recipe, rows)
            given = recipe.model_dump(exclude_defaults=True, exclude={"model", "steps", "seed"})
            found.append({"error": round(predicted.total / counted - 1, 4), "counted": counted, "predicted": predicted.total,
                          "model": name, "recipe": " ".join(f"{key}={value}" for key, value in given.items())})  # fmt: skip
    sizes = sorted(abs(each["error"]) for each in found)
    worst = sorted(found, key=lambda each: -abs(each["error"]))
    return {
        "memory_error_p95": sizes[round(0.95 * (len(sizes) - 1))], "memory_error_median": sizes[len(sizes) // 2],
        "memory_error_largest": sizes[-1], "memory_recipes": len(found), "worst": worst[:5],
    }  # fmt: skip
