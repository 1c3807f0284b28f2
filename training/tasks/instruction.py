"""Follow an instruction: the response is right when the greedy answer equals it, to the last token.

{"instruction": "Translate to SQL: how many ships?", "input": "", "output": "SELECT count(*) FROM ships"}
"""

from __future__ import annotations

COLUMNS = {
    "instruction": ("instruction", "prompt", "question", "query", "text"),
    "input": ("input", "context"),
    "response": ("response", "output", "answer", "completion", "target"),
}
OPTIONAL = ("input",)
TEMPLATE = "{instruction}\n{input}\nAnswer:"
RESPONSE = "response"


def score(model, rows, *, batch_size: int, labels=()) -> dict[str, list[float]]:
    """Returns per row: `nll` (nats, summed over the response), `tokens`, and `right` (1.0 or 0.0).

    `right` is exact match of greedy decoding without decoding: the greedy answer equals the reference if and only if the
    argmax is right at every position given the reference before it, end-of-sequence included.
    """
    from training.evaluate import response_scores

    nll, tokens, right = response_scores(model, rows.ids, rows.prompt_lengths, batch_size=batch_size)
    return {"nll": nll, "tokens": tokens, "right": right}
