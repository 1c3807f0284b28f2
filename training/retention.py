"""What a tuned model still knows: its perplexity on general text, which the task's rows say nothing of.

Owns: `read`, `score`. Must not know: what the model was trained on, what is made of the numbers.
"""

from __future__ import annotations

from training import rows, sources
from training.errors import InputError, Problem
from training.recipe import DataConfig

TEXTS = 500  # at most, from the beginning
WHERE = "evaluation.retention"


def read(name: str) -> list[str]:
    """Returns the texts of a file, a folder or a data set, named as rows are (`training.sources`): a column `text`.

    Raises:
        InputError: it cannot be read, or a row has no text.
    """
    config = DataConfig(train=name, task="completion")
    try:
        source = sources.load(name, "train", None, WHERE)
        # To the end, where problems are told.
        found = [entry for i, entry in enumerate(rows.entries(source, config, "train", rows.Ledger())) if i < TEXTS]
    except InputError as error:
        raise InputError(*(Problem(WHERE, p.rule, "Give rows with the field `text`.") for p in error.problems)) from None
    return [entry.row["response"] for entry in found]


def score(model, name: str, tokenizer, *, max_length: int, batch_size: int) -> dict[str, list]:
    """Returns for each text `nll` (nats, summed from its second token on) and `tokens`; what is too long loses its end."""
    from training import evaluate  # torch, which reading a text does without
    from training.data import Tokenized

    ids = [text[:max_length] for text in tokenizer(read(name))["input_ids"]]
    nll, tokens = evaluate.prompt_scores(model, Tokenized(ids, [len(text) for text in ids]), batch_size=batch_size)
    return {"nll": nll, "tokens": tokens}
