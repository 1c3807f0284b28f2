"""Scores of a model on held-out rows.

Owns: batched teacher-forced scoring, greedy answers, from both to the statistics of metrics, the summary of a split.
Must not know: how the model was trained, how a metric is computed.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch

from training import metrics, tasks
from training.data import Prepared, Tokenized
from training.metrics import Metric
from training.recipe import EvaluationConfig, Job

LOGITS = 2**26  # elements at a time where a whole sequence is scored


def batch_of(ids: list[list[int]], prompt_lengths: list[int], *, pad: int, device) -> dict:
    """Returns tensors of one batch, rows aligned at their right end so that all responses share the last columns.

    Returns:
        `input_ids`, `attention_mask`, `position_ids`: int64 (rows, longest); `labels`: int64 (rows, keep - 1), -100 where
        there is no response token; `keep`: number of last positions whose logits are needed.
    """
    longest = max(len(row) for row in ids)
    keep = max(len(row) - length for row, length in zip(ids, prompt_lengths, strict=True)) + 1
    keep = min(keep, longest)
    tokens = torch.full((len(ids), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    labels = torch.full((len(ids), keep - 1), -100, dtype=torch.long)
    for i, (row, length) in enumerate(zip(ids, prompt_lengths, strict=True)):
        tokens[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
        response = row[max(length, 1) :]
        labels[i, keep - 1 - len(response) :] = torch.tensor(response)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "labels": labels}
    return {name: tensor.to(device) for name, tensor in out.items()} | {"keep": keep}


def logits_of(model, batch: dict) -> torch.Tensor:
    """Returns the logits that predict `batch["labels"]`: (rows, keep - 1, vocabulary), in the model's own precision."""
    known = _accepted(model)
    extra = {"position_ids": batch["position_ids"]} if "position_ids" in known else {}
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = batch["keep"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **extra).logits
    return logits[:, -batch["keep"] : -1]


def _accepted(model) -> set[str]:
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return set(inspect.signature(inner.forward).parameters)


@contextmanager
def evaluating(model):
    """Puts the model into eval mode without gradients, and back as it was, every part of it; random numbers go on as before."""
    was = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in was:
            module.training = training


def response_scores(model, ids, prompt_lengths, *, batch_size: int) -> tuple[list[float], list[int], list[float]]:
    """Returns per row: summed negative log-likelihood of the response in nats, its tokens, and 1.0 where every argmax is right.

    Rows are sorted by length to save padding; results come back in the order given.
    """
    inner = getattr(model, "module", model)
    device = next(inner.parameters()).device
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    nll, tokens, right = [0.0] * len(ids), [0] * len(ids), [0.0] * len(ids)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = batch_of([ids[i] for i in chosen], [prompt_lengths[i] for i in chosen], pad=0, device=device)
            logits, labels = logits_of(inner, batch).float(), batch["labels"]
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
            wanted = labels != -100
            hit = (logits.argmax(-1) == labels) | ~wanted
            for i, row_loss, count, row_right in zip(
                chosen, loss.sum(1).tolist(), wanted.sum(1).tolist(), hit.all(1).tolist(), strict=True
            ):
                nll[i], tokens[i], right[i] = row_loss, count, float(row_right)
    return nll, tokens, right


def score_rows(
    model, rows: Tokenized, prepared: Prepared, job: Job, *, tokenizer=None, answered: Sequence[bool] = (), limit: int = 0
) -> dict[str, list]:
    """Returns per row the scores of the job's task (`nll`, `tokens`, `right`) and, by name, statistics of each metric.

    Args:
        tokenizer: reads and writes answers; needed where a metric looks at them.
        answered: for each row whether it is answered in words; a row that is not has no statistics there (`chosen_rows`).
        limit: tokens of the longest answer (`answer_limit`).
    """
    task, wanted = tasks.load(job.data.task), metrics.chosen(job.evaluation.metrics)
    scores = task.score(model, rows, batch_size=job.evaluation.batch_size, labels=prepared.labels)
    return scores | statistics(
        model, rows, scores, wanted, tokenizer=tokenizer, answered=answered, limit=limit, batch_size=job.evaluation.batch_size
    )[0]


def statistics(
    model, rows: Tokenized, scores: dict[str, list[float]], wanted: Mapping[str, Metric], *, tokenizer, answered: Sequence[bool],
    limit: int, batch_size: int,
) -> tuple[dict[str, list[list[float]]], dict[int, str]]:  # fmt: skip
    """Returns the statistics of each row by metric, and the answers by row; arguments as `score_rows`, which has `scores`."""
    found: dict[str, list[list[float]]] = {}
    of_likelihood = {name: metric for name, metric in wanted.items() if metric.needs == "likelihood"}
    if of_likelihood:
        prompts = prompt_scores(model, rows, batch_size=batch_size)
        seen = list(zip(*prompts, scores["nll"], scores["tokens"], strict=True))
        found |= {name: [metric.row(*one) for one in seen] for name, metric in of_likelihood.items()}
    of_answers = {name: metric for name, metric in wanted.items() if metric.needs == "answers"}
    places = [i for i, asked in enumerate(answered) if asked] if of_answers else []
    some = Tokenized([rows.ids[i] for i in places], [rows.prompt_lengths[i] for i in places])
    said = greedy_answers(model, some, tokenizer, limit=limit, batch_size=batch_size) if places else []
    texts = {i: (answer, *_in_words(rows, i, tokenizer)) for i, answer in zip(places, said, strict=True)}
    for name, metric in of_answers.items():
        found[name] = [metric.row(*texts[i]) if i in texts else [] for i in range(len(rows))]
    return found, dict(zip(places, said, strict=True))


def _in_words(rows: Tokenized, i: int, tokenizer) -> tuple[str, str]:
    ids, length = rows.ids[i], rows.prompt_lengths[i]
    return expected_answer(ids, length, tokenizer), tokenizer.decode(ids[:length], skip_special_tokens=True)


def expected_answer(ids: list[int], length: int, tokenizer) -> str:
    """Returns a row's own response as text."""
    return tokenizer.decode(ids[length:], skip_special_tokens=True).strip()


def own_scores(job: Job) -> list[str]:
    """Returns the names of the scores that the job's task has beside `right`."""
    return list(getattr(tasks.load(job.data.task), "SCORES", ()))


def chosen_rows(rows: int, count: int) -> list[bool]:
    """Returns for each row whether it is one of at most `count`, by a seeded choice."""
    chosen = set(random.Random(0).sample(range(rows), min(count, rows)))
    return [i in chosen for i in range(rows)]


def answer_limit(config: EvaluationConfig, rows: Tokenized) -> int:
    """Returns how many tokens an answer may have: `max_new_tokens`, and no more than would be wrong for every row anyway."""
    longest = max((len(row) - length for row, length in zip(rows.ids, rows.prompt_lengths, strict=True)), default=0)
    return min(config.max_new_tokens, 2 * longest + 8)


def prompt_scores(model, rows: Tokenized, *, batch_size: int) -> tuple[list[float], list[int]]:
    """Returns per row the summed negative log-likelihood of the prompt in nats, from its second token on, and its tokens."""
    lengths = rows.prompt_lengths
    nll, tokens = [0.0] * len(lengths), [max(0, length - 1) for length in lengths]
    places = [i for i, length in enumerate(lengths) if length > 1]
    if places:
        # Every position has its logits here, not only those of a response.
        room = LOGITS // (max(lengths) * _vocabulary(model))
        found, _, _ = response_scores(
            model, [rows.ids[i][: lengths[i]] for i in places], [0] * len(places), batch_size=max(1, min(batch_size, room))
        )
        for i, value in zip(places, found, strict=True):
            nll[i] = value
    return nll, tokens


def _vocabulary(model) -> int:
    return int(getattr(model, "module", model).config.vocab_size)


def summary(
    scores: dict[str, list], wanted: Mapping[str, Metric] | None = None, own_scores: Iterable[str] = ()
) -> dict[str, float]:
    """Returns `accuracy` (share of rows right), `loss` (nats per response token over all rows), and the other scores.

    Args:
        scores: of all rows, as `score_rows` returns them.
        wanted: the metrics among them.
        own_scores: names of a task's own scores among them, of which the mean is taken.
    """
    found = {"accuracy": sum(scores["right"]) / len(scores["right"]), "loss": sum(scores["nll"]) / sum(scores["tokens"])}
    found |= {name: sum(scores[name]) / len(scores[name]) for name in own_scores}
    return found | {name: metric.of(metrics.total(scores[name])) for name, metric in (wanted or {}).items()}


def pack_bits(right: list[float]) -> str:
    """Returns which rows were right as a string of 0 and 1, in the rows' order, by which two models are compared in pairs."""
    return "".join("1" if value else "0" for value in right)


def greedy_answers(model, rows: Tokenized, tokenizer, *, limit: int = 128, batch_size: int = 32) -> list[str]:
    """Returns the greedy answers to the rows' prompts as text, at most `limit` tokens each.

    Prompts of like length are answered together, padded on their left, with a cache of keys and values.
    """
    lengths = [max(1, length) for length in rows.prompt_lengths]  # a text without a prompt is continued from its first token
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        said = _continued(model, [rows.ids[i][: lengths[i]] for i in chosen], tokenizer, limit)
        for i, text in zip(chosen, said, strict=True):
            answers[i] = text.strip()
    return answers


def _continued(model, prompts: list[list[int]], tokenizer, limit: int) -> list[str]:
    device, width, pad = next(model.parameters()).device, max(map(len, prompts)), tokenizer.pad_token_id or 0
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    with evaluating(model):
        out = model.generate(
            input_ids=tokens.to(device), attention_mask=mask.to(device), do_sample=False, num_beams=1, use_cache=True,
            max_new_tokens=limit, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
