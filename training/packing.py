"""Padding-free forwards: the rows of one forward laid end to end, and attention that never crosses from one to another.

Owns: the layout of a packed batch, the attention function `rows` that is registered with transformers, which models allow it.
Must not know: optimizers, which rows are chosen, when a forward happens.

All but attention works token by token, so end to end it does no work for padding. Attention runs on each row by itself, rows of
like length together and padded within it, by the kernel that `sdpa` chooses; there is no mask, and what is not finite in one row
stays there (in a block-diagonal mask 0 x NaN would carry it to the others). As a row of its own is all that attention gets, a
model may be packed whose layers ask transformers for their attention and pass on the arguments of the forward; `packs` tries.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass

import torch

from training.schedule import alike

NAME = "rows"  # of the attention function, among transformers' own
TRIED = (3, 3, 4)  # tokens of the rows on which a model is tried


@dataclass(frozen=True)
class Rows:
    """Rows of a packed forward, and how attention takes them: those of like length beside each other, padded to the longest.

    `groups`: (rows, longest) of each, in the order of the tokens. Where anything is padded, `padded`: int64 (padded tokens,),
    which token lies there, one past the last where a row has ended; `places`: int64 (tokens,), where each token lies among them.
    """

    groups: tuple[tuple[int, int], ...]
    padded: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def taken(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Returns (tokens, heads, head size) as (rows, heads, longest, head size) of each group; zeros where a row has ended."""
        if self.padded is not None:
            # Zeros and nobody's tokens: what is computed of them is thrown away, but its gradient, 0, is multiplied with it.
            # Gathered, because that keeps nothing for the backward pass; putting tokens in their places would keep them.
            tokens = torch.cat((tokens, tokens.new_zeros(1, *tokens.shape[1:]))).index_select(0, self.padded)
        parts = tokens.split([count * longest for count, longest in self.groups])
        return [part.unflatten(0, group).transpose(1, 2) for part, group in zip(parts, self.groups, strict=True)]

    def given_back(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Returns (rows, longest, heads, head size) of each group as (tokens, heads, head size)."""
        flat = [part.flatten(0, 1) for part in parts]
        tokens = flat[0] if len(flat) == 1 else torch.cat(flat)
        return tokens if self.places is None else tokens.index_select(0, self.places)


def grouped(lengths: list[list[int]], *, device) -> Rows:
    """Returns rows of some groups, in the order of their tokens; any lengths may stand beside each other in a group."""
    groups = tuple((len(group), max(group)) for group in lengths)
    if all(min(group) == max(group) for group in lengths):
        return Rows(groups)
    padded: list[int] = []
    places: list[int] = []
    total = sum(map(sum, lengths))
    for group in lengths:
        longest = max(group)
        for length in group:
            first = len(places)
            places += range(len(padded), len(padded) + length)
            padded += [*range(first, first + length), *[total] * (longest - length)]
    return Rows(groups, torch.tensor(padded, device=device), torch.tensor(places, device=device))


def batch_of(ids: list[list[int]], prompt_lengths: list[int], *, device) -> dict:
    """Returns tensors of rows laid end to end, in the order of their lengths.

    Returns:
        `input_ids`, `position_ids`: int64 (1, tokens), positions begin at 0 in each row; `labels`: int64 (supervised,), every
        response token in order; `keep`: int64 (supervised,), the positions that predict them; `rows`: Rows, for attention.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    keep: list[int] = []
    for i in order:
        row, first = ids[i], max(prompt_lengths[i], 1)  # the first token of a row is never predicted
        keep += range(len(tokens) + first - 1, len(tokens) + len(row) - 1)
        labels += row[first:]
        positions += range(len(row))
        tokens += row
    rows = grouped(alike([len(ids[i]) for i in order]), device=device)
    tensors = {"input_ids": [tokens], "position_ids": [positions], "labels": labels, "keep": keep}
    return {name: torch.tensor(value, dtype=torch.long, device=device) for name, value in tensors.items()} | {"rows": rows}


def logits_of(model, batch: dict) -> torch.Tensor:
    """Returns the logits that predict `batch["labels"]`, of supervised positions alone: (supervised, vocabulary)."""
    # transformers hands a mask of four dimensions on as it is; this one says nothing, and attention does not read it.
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch["input_ids"].device)
    return model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False,
        logits_to_keep=batch["keep"], rows=batch["rows"],
    ).logits[0]  # fmt: skip


def attention(module, query, key, value, attention_mask, *, rows: Rows | None = None, sliding_window=None, **options):
    """Returns what transformers' `sdpa` does, (1, tokens, heads, head size) and None; of a packed forward row by row.

    Args:
        query, key, value: (1, heads, tokens, head size), keys and values with heads of their own number.
        rows: of a packed forward; None is any other one, with its mask.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if rows is None:
        return sdpa(module, query, key, value, attention_mask, sliding_window=sliding_window, **options)
    found = []
    parts = (rows.taken(each[0].transpose(0, 1)) for each in (query, key, value))
    for (_, length), *alone in zip(rows.groups, *parts, strict=True):
        mask = None
        if sliding_window is not None and sliding_window < length:
            seen = torch.ones((length, length), dtype=torch.bool, device=query.device)
            mask = (seen.tril() & seen.triu(1 - sliding_window))[None, None]
        out, _ = sdpa(module, *alone, mask, **options)
        found.append(out)
    return rows.given_back(found)[None], None


def enable(model) -> None:
    """Makes a model's attention take packed forwards as well; every other one stays what it is with `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def packs(model) -> bool:
    """Says whether a model can be packed, and leaves it ready for it then: tried on three rows of few tokens.

    What is asked of it: changing a row changes nothing in the others, and equal rows have equal logits wherever they are (up
    to half the digits of their precision). A model that recurs or convolves over tokens, or whose attention does not come from
    transformers, fails that and stays as it was.
    """
    if model in _ready and model.config._attn_implementation == NAME:
        return True
    if sound := _tried_out(model):
        _ready.add(model)
    return sound


_ready: weakref.WeakSet = weakref.WeakSet()  # models that were tried: a base is taken for run after run


def _tried_out(model) -> bool:
    wanted = {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters)
    if not wanted or not getattr(model, "_supports_attention_backend", False):
        return False
    before, was = model.config._attn_implementation, model.training
    # LLM.int8 computes a column in full where any token of the batch has an outlier in it; that is no attention.
    states = [getattr(module, "state", None) for module in model.modules()]
    outliers = [(state, state.threshold) for state in states if hasattr(state, "threshold")]
    for state, _ in outliers:
        state.threshold = 0.0
    enable(model)
    model.eval()
    try:
        with torch.no_grad():
            one, other = (_tried(model, first) for first in (0, TRIED[0]))
        sound = all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
        rounding = torch.finfo(other[0].dtype).eps ** 0.5 * other[1].abs().max()
        sound = sound and bool((other[0] - other[1]).abs().max() <= rounding)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it does not take the arguments, or the layout
        sound = False
    for state, threshold in outliers:
        state.threshold = threshold
    model.train(was)
    if not sound:
        model.set_attn_implementation(before)
    return sound


def _tried(model, first: int) -> tuple[torch.Tensor, ...]:
    """Returns the logits of three short packed rows, of which the first begins with token `first`; the second with 3."""
    starts = (first, TRIED[0], TRIED[0] + TRIED[1])
    ids = [list(range(start, start + length)) for start, length in zip(starts, TRIED, strict=True)]
    batch = batch_of(ids, [1] * len(ids), device=next(model.parameters()).device)
    return logits_of(model, batch).split([length - 1 for length in TRIED])
