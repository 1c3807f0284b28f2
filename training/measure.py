"""What is measured on its own, outside any trial: recipes timed alone, models compared on untouched rows.

Owns: `time_alone`, `compare`, `judge`. Called on a worker by dotted name; takes and returns JSON. Must not know: studies.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from training import checkpoint, evaluate, metrics, retention, warm
from training.data import Prepared, Rows, Tokenized, prepare, read, sample
from training.meter import Stopwatch, gemm_seconds
from training.model import computing, describe, device_of, load_model, load_tokenizer
from training.recipe import EvaluationConfig, Job, Recipe
from training.run import Run, set_up
from training.schedule import Plan, plan, rate, supervised
from training.world import World, versions

REPEATS = 3
STEPS = 10  # timed per repeat, spread over the whole plan


def time_alone(jobs: list[dict], *, repeats: int = REPEATS, steps: int = STEPS) -> list[dict[str, Any]]:
    """Returns for each job what its whole training takes when nothing else runs on this worker.

    The same steps, spread evenly over the job's own plan, are timed `repeats` times after one that warms up, and scaled to
    the number of steps of the plan.

    Returns:
        `seconds` (median), `low`, `high` (extremes), `repeats`, and `peak_bytes` where a GPU measured it.
    """
    return [_time_one(Job.model_validate(raw), repeats, steps) for raw in jobs]


def _time_one(job: Job, repeats: int, steps: int) -> dict[str, Any]:
    world, device = World(), device_of(job.resources)
    shape = describe(job.recipe.model, job.recipe.revision)
    rows = warm.rows_of(job)[1].train
    planned = plan(job.recipe, rows, workers=1)
    run = set_up(job, shape, planned, world, device)
    step_seconds(run, rows, planned, count=1)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    totals = [statistics.fmean(step_seconds(run, rows, planned, count=steps)) * planned.steps for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    run.close()
    del run
    gc.collect()
    ordered = sorted(totals)
    return {"seconds": ordered[len(ordered) // 2], "low": ordered[0], "high": ordered[-1], "repeats": repeats, "peak_bytes": peak}


def step_seconds(
    run: Run, rows: Tokenized, planned: Plan, *, count: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Returns the seconds of `count` optimizer steps (at most those that there are), spread evenly over the plan, by a clock."""
    count = min(count, planned.steps)
    watch, found = Stopwatch(run.device, clock), []
    for i in range(count):
        step = int((i + 0.5) * planned.steps / count)
        chunks, tokens = planned.micro_batches(step, 0, 1), supervised(rows, planned, step)
        watch.start()
        run.step(rows, chunks, tokens, rate(run.recipe, step, planned.steps))
        found.append(watch.stop())
    return found


def compare(models: list[dict], job: dict, *, shown: int = 20) -> dict[str, Any]:
    """Returns how each model does on the test rows, and their answers side by side on some of them.

    Args:
        models: each `who`, `recipe` and `checkpoint` (None for the untuned base); the last one is the winner, the one before
            it what it is compared with.
        job: gives data, evaluation and resources.
        shown: of the rows that were answered in words those to show, those first where the winner is wrong and the other
            right, then the other way round.

    Returns:
        `models`: for each `who`, `right`, `nll`, `tokens` per row, `metrics` (of each that there is and of the user's own the
        statistics of each row) and `retention` (`nll` and `tokens` of each text, where there is one); `rows`: for each shown
        row `prompt`, `expected`, and the answer by `who`; `groups`: what rows can be told apart by; `overlap`: rows on two
        sides; `machine`: versions, device and how fast it is now.
    """
    given = Job.model_validate(job)
    device, read_rows = device_of(given.resources), read(given.data)
    scored, answers = [], {}
    for entry in models:
        with_model = _Loaded(entry, device)
        tokenizer = with_model.tokenizer
        prepared = prepare(read_rows, given.data, tokenizer, with_model.recipe.max_length, cache=given.cache)
        held_out = sample(prepared.test, given.evaluation.test_rows, seed=0)
        scores, answers[entry["who"]] = _everything(with_model, held_out, prepared, given)
        scored.append({"who": entry["who"], **scores})
        del with_model
        gc.collect()
    first = scored[-2]["right"] if len(scored) > 1 else scored[-1]["right"]
    order = [i for i in _telling(scored[-1]["right"], first) if i in answers[models[-1]["who"]]][:shown]
    texts = [
        tokenizer.decode(held_out.ids[i][: held_out.prompt_lengths[i]], skip_special_tokens=True) for i in order
    ]  # fmt: skip
    expected = [evaluate.expected_answer(*row, tokenizer) for row in zip(held_out.ids, held_out.prompt_lengths, strict=True)]
    rows = [
        {"prompt": text, "expected": expected[i], **{who: said[i] for who, said in answers.items()}}
        for i, text in zip(order, texts, strict=True)
    ]
    lengths = list(held_out.prompt_lengths)  # from the cache they are no list
    groups = {"answer": expected, "tokens of the prompt": lengths, "tokens of the answer": scored[-1]["tokens"]}
    return {"models": scored, "rows": rows, "groups": groups, "overlap": _overlap(read_rows, prepared.train, held_out),
            "machine": _machine()}  # fmt: skip


def _everything(
    with_model: _Loaded, held_out: Tokenized, prepared: Prepared, given: Job
) -> tuple[dict[str, Any], dict[int, str]]:
    """Returns all that is measured of one model on the test rows, and its answers by row."""
    config = given.evaluation
    with with_model.autocast():
        plain = given.model_copy(update={"evaluation": config.model_copy(update={"metrics": ()})})
        scores = evaluate.score_rows(with_model.model, held_out, prepared, plain)
        found, said = evaluate.statistics(
            with_model.model, held_out, scores, metrics.METRICS | metrics.chosen(config.metrics), tokenizer=with_model.tokenizer,
            answered=evaluate.chosen_rows(len(held_out), config.answers), limit=evaluate.answer_limit(config, held_out),
            batch_size=config.batch_size,
        )  # fmt: skip
        found |= {name: [[value, 1.0] for value in scores.pop(name)] for name in evaluate.own_scores(given)}
        return scores | {"metrics": found, "retention": with_model.retention(config)}, said


def _overlap(read_rows: Rows, train: Tokenized, held_out: Tokenized) -> dict[str, int]:
    """Returns how many rows were taken out because they stood on two sides, and how many test rows training still has."""

    def asked(rows: Tokenized) -> list[tuple[int, ...]]:
        return [tuple(ids[:length] or ids) for ids, length in zip(rows.ids, rows.prompt_lengths, strict=True)]

    known = set(asked(train))
    removed = sum(found.count for found in read_rows.found if found.kind in ("leak", "near_leak") and found.action == "drop")
    return {"removed": removed, "left": sum(row in known for row in asked(held_out))}


def judge(models: list[dict], job: dict) -> dict[str, Any]:
    """Returns how each model does on the test rows, row by row, without any answers: as `compare`, but quicker.

    Args:
        models: each `who`, `recipe` and `checkpoint` (None for a model without an adapter).
        job: gives data, evaluation and resources.

    Returns:
        `models`: for each `who`, `right`, `nll`, `tokens` per row, in the rows' order, and `retention` as `compare`; `machine`.
    """
    given = Job.model_validate(job)
    return {"models": _score(models, given, device_of(given.resources), read(given.data)), "machine": _machine()}


def _score(models: list[dict], given: Job, device: str, rows: Rows) -> list[dict[str, Any]]:
    scored, plain = [], given.model_copy(update={"evaluation": given.evaluation.model_copy(update={"metrics": ()})})
    for entry in models:
        with_model = _Loaded(entry, device)
        prepared = prepare(rows, given.data, with_model.tokenizer, with_model.recipe.max_length, cache=given.cache)
        held_out = sample(prepared.test, given.evaluation.test_rows, seed=0)
        with with_model.autocast():
            scores = evaluate.score_rows(with_model.model, held_out, prepared, plain)
            scored.append({"who": entry["who"], **{name: scores[name] for name in ("right", "nll", "tokens")},
                           "retention": with_model.retention(given.evaluation)})  # fmt: skip
        del with_model
        gc.collect()
    return scored


def _machine() -> dict[str, Any]:
    return {"gemm_seconds": gemm_seconds(), "threads": torch.get_num_threads(), **versions()}


class _Loaded:
    """One model to be scored: base, adapter where it has one, tokenizer."""

    def __init__(self, entry: dict, device: str):
        self.recipe = Recipe.model_validate(entry["recipe"])
        self.device = device
        self.tokenizer = load_tokenizer(self.recipe)
        self.model = load_model(self.recipe.model_copy(update={"gradient_checkpointing": False}), device=device)
        if entry["checkpoint"]:
            self.model = checkpoint.load_adapter(self.model, entry["checkpoint"])
        self.model.eval()

    def autocast(self):
        return computing(self.recipe.precision, self.device)

    def retention(self, config: EvaluationConfig) -> dict[str, list] | None:
        """Returns what is still known of the general text, where there is one."""
        if config.retention is None:
            return None
        return retention.score(
            self.model, config.retention, self.tokenizer, max_length=self.recipe.max_length, batch_size=config.batch_size
        )


def _telling(winner: list[float], other: list[float]) -> list[int]:
    """Returns all row indices: regressions first, then gains, then rows wrong in both, then the rest."""
    rank = {(0.0, 1.0): 0, (1.0, 0.0): 1, (0.0, 0.0): 2, (1.0, 1.0): 3}
    groups = sorted(range(len(winner)), key=lambda i: (rank[(winner[i], other[i])], i))
    kinds = {k: [i for i in groups if rank[(winner[i], other[i])] == k] for k in range(4)}
    # At most half of what is shown is gains, so that mistakes of both and successes of both are seen too.
    head = kinds[0] + kinds[1][:8] + kinds[2][:4] + kinds[3][:4]
    return head + [i for i in groups if i not in set(head)]


__all__ = ["compare", "judge", "time_alone"]
