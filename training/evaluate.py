"""Scores of a model on held-out rows.

Owns: batched teacher-forced scoring, the summary of a split, greedy answers for people to read.
Must not know: how the model was trained.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import torch

from training import tasks
from training.data import Prepared, Tokenized
from training.recipe import Job


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
    """Puts the model into eval mode without gradients, and back as it was."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


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


def score_rows(model, rows: Tokenized, prepared: Prepared, job: Job) -> dict[str, list[float]]:
    """Returns per-row scores of the job's task: `nll`, `tokens`, `right`."""
    task = tasks.load(job.data.task)
    return task.score(model, rows, batch_size=job.evaluation.batch_size, labels=prepared.labels)


def summary(scores: dict[str, list[float]]) -> dict[str, float]:
    """Returns `accuracy` (share of rows right) and `loss` (nats per response token over all rows)."""
    return {"accuracy": sum(scores["right"]) / len(scores["right"]), "loss": sum(scores["nll"]) / sum(scores["tokens"])}


def pack_bits(right: list[float]) -> str:
    """Returns which rows were right as a string of 0 and 1, in the rows' order, by which two models are compared in pairs."""
    return "".join("1" if value else "0" for value in right)


def greedy_answers(model, rows: Tokenized, tokenizer, *, limit: int = 128) -> list[str]:
    """Returns the greedy answers to the rows' prompts as text, at most `limit` tokens each."""
    device = next(model.parameters()).device
    width = max(rows.prompt_lengths)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id or 0, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, (row, length) in enumerate(zip(rows.ids, rows.prompt_lengths, strict=True)):
        tokens[i, width - length :] = torch.tensor(row[:length])
        mask[i, width - length :] = 1
    longest = max(len(row) - length for row, length in zip(rows.ids, rows.prompt_lengths, strict=True))
    with evaluating(model):
        out = model.generate(
            input_ids=tokens.to(device), attention_mask=mask.to(device), do_sample=False,
            max_new_tokens=min(limit, 2 * longest + 8), pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]
