"""Choose a label: the label whose text is likeliest after the prompt.

{"text": "how do i freeze my card", "label": "banking"}
"""

from __future__ import annotations

COLUMNS = {
    "text": ("text", "sentence", "utterance", "instruction", "prompt", "question", "query"),
    "label": ("label", "intent", "class", "category", "domain", "target", "output"),
}
OPTIONAL = ()
TEMPLATE = "{text}\nLabel:"
RESPONSE = "label"


def score(model, rows, *, batch_size: int, labels: list[list[int]]) -> dict[str, list[float]]:
    """Returns per row: `nll` (nats, summed over the true label), `tokens`, and `right` (1.0 or 0.0).

    Args:
        rows: tokenized rows, each prompt followed by its true label.
        labels: the token ids of every label, end-of-sequence included. A row is right when its own label has the highest
            summed log-likelihood (Brown et al. 2020, section 2.4, without length normalisation).
    """
    from training.evaluate import response_scores

    ids, lengths = [], []
    for row, length in zip(rows.ids, rows.prompt_lengths, strict=True):
        ids += [row[:length] + label for label in labels]
        lengths += [length] * len(labels)
    nll, _, _ = response_scores(model, ids, lengths, batch_size=batch_size)
    out: dict[str, list[float]] = {"nll": [], "tokens": [], "right": []}
    for i, (row, length) in enumerate(zip(rows.ids, rows.prompt_lengths, strict=True)):
        scores = nll[i * len(labels) : (i + 1) * len(labels)]
        own = labels.index(row[length:])
        out["nll"].append(scores[own])
        out["tokens"].append(len(row) - length)
        out["right"].append(float(min(range(len(labels)), key=scores.__getitem__) == own))
    return out
