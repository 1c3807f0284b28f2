"""Useful tokens per second of our loop against Hugging Face's Trainer with PEFT: same recipe, same rows, same loss at the end.

Rows have the lengths of real ones (wikisql_mini and gsm8k, four characters to a token) and random tokens. Both run by turns in
one process with one thread; ratios are medians over rounds. `ratio` is against the Trainer with the same rows in each step, and
so the same loss at the end; `grouped` against the faster of that and of its own order by length, which puts other rows into a
step. Beside them stands our loop against itself, which says how noisy the machine is.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import peer
from benchmarks.training.models import llama
from training import evaluate, schedule
from training.data import Tokenized
from training.model import describe
from training.recipe import DataConfig, Job, Recipe
from training.world import World

SHARED = Path(os.environ.get("PARETUNE_SHARED", Path(__file__).parents[3] / "shared" / "data"))
CHARACTERS = 4  # of English to a token of a usual vocabulary
WARM = 3
# model -> steps of a round and longest row
CASES = {"embedded": (40, 256), "medium": (5, 512)}


def lengths(name: str) -> list[tuple[int, int]]:
    """Returns (tokens of the prompt, of the response) of the training rows of a data set."""
    file = SHARED / "text" / name / "train.jsonl"
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, _, answer = (row["question"], "", row["answer"]) if "question" in row else row["text"].rpartition("A: ")
        found.append((len(prompt) // CHARACTERS + 1, len(answer) // CHARACTERS + 1))
    return found


def rows_of(sizes: list[tuple[int, int]], longest: int, *, vocabulary: int, count: int) -> Tokenized:
    """Returns rows of such lengths with random tokens."""
    rng, ids, prompts = random.Random(0), [], []
    for prompt, answer in rng.sample(sizes, min(count, len(sizes))):
        prompt = min(prompt, longest - 8)
        answer = min(answer, longest - prompt)
        ids.append([rng.randrange(3, vocabulary) for _ in range(prompt + answer)])
        prompts.append(prompt)
    return Tokenized(ids, prompts)


def recipe_of(model: str, steps: int, longest: int) -> Recipe:
    """Returns the recipe of a case: the defaults, without dropout, so that both sides can be held to the same loss."""
    return Recipe(model=model, steps=steps + WARM, dropout=0.0, max_length=longest, learning_rate=1e-3)


def loss_of(model, rows: Tokenized) -> float:
    """Returns nats per supervised token on the first rows."""
    nll, tokens, _ = evaluate.response_scores(model, rows.ids[:32], rows.prompt_lengths[:32], batch_size=8)
    return sum(nll) / sum(tokens)


def case(name: str, model: str, data: str, rounds: int, steps: int, longest: int) -> dict[str, Any]:
    """Returns what one model on rows of one data set's lengths comes to."""
    recipe = recipe_of(model, steps, longest)
    rows = rows_of(lengths(data), longest, vocabulary=describe(model).vocabulary, count=512)
    planned = schedule.plan(recipe, rows, workers=1)
    useful = sum(len(rows.ids[row]) for row in planned.order[WARM * planned.batch : planned.steps * planned.batch])
    padded = sum(
        planned.batch * max(len(rows.ids[row]) for row in planned.order[step * planned.batch : (step + 1) * planned.batch])
        for step in range(WARM, planned.steps)
    )
    job, ratios, sorted_too, noise, best, losses = Job(recipe=recipe, data=DataConfig(train="none")), [], [], [], [], None
    for _ in range(rounds):
        mine, run = peer.ours(job, rows, planned, World(), warm=WARM)
        plain, trained = peer.theirs(recipe, rows, planned, grouped=False, warm=WARM)
        losses = (loss_of(run.inner, rows), loss_of(trained, rows))
        again, _ = peer.ours(job, rows, planned, World(), warm=WARM)
        grouped, _ = peer.theirs(recipe, rows, planned, grouped=True, warm=WARM)
        ratios.append(plain / ((mine + again) / 2))
        sorted_too.append(min(plain, grouped) / ((mine + again) / 2))
        noise.append(mine / again)
        best.append((useful / ((mine + again) / 2), useful / plain, useful / grouped))
    ours, plain, grouped = (statistics.median(each) for each in zip(*best, strict=True))
    return {
        "case": f"{name} {data}", "ratio": round(statistics.median(ratios), 3), "from": round(min(ratios), 3),
        "to": round(max(ratios), 3), "grouped": round(statistics.median(sorted_too), 3),
        "ours": round(ours), "trainer": round(plain), "trainer_grouped": round(grouped),
        "padding": round(padded / useful - 1, 3), "loss_gap": round(abs(losses[0] - losses[1]), 6),
        "loss": round(losses[0], 4), "ours_against_ours": round(statistics.median(noise), 3),
    }  # fmt: skip


def measure(quick: bool) -> dict[str, Any]:
    """Returns the smallest ratio over all cases, and every case: tokens per second, spread over rounds, losses."""
    torch.set_num_threads(1)
    found = []
    if not lengths("gsm8k"):
        return {"skipped": f"no rows in {SHARED}"}
    with tempfile.TemporaryDirectory() as folder:
        models = {"embedded": "embedded"} | ({} if quick else {"medium": llama("medium", Path(folder))})
        for name, model in models.items():
            steps, longest = CASES[name]
            for data in ("wikisql_mini", "gsm8k"):
                found.append(case(name, model, data, 2 if quick else 4, 4 if quick else steps, longest))
    return {"tokens_per_second_ratio": min(each["ratio"] for each in found),
            "tokens_per_second_ratio_grouped": min(each["grouped"] for each in found), "speed": found}  # fmt: skip
