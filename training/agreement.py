"""Whether two models say the same: their logits and greedy answers on prompts, within stated bounds.

Owns: the bounds, `Exam` (what both are asked), `Seen` (what one makes of it), `differ`, `same_answers`.
Must not know: how the models came about.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from training import evaluate
from training.errors import wrong
from training.model import computing
from training.recipe import Recipe

ANSWER = 32  # tokens of a greedy answer
BEFORE = 32  # positions at the end of each prompt whose logits are compared too

# Largest |difference of logits| as a share of the largest |logit|. Seen on the embedded model: 1e-6 where EXACT holds, 0.011 to
# 0.016 in bf16, 0.0025 in fp16, 0.019 to 0.023 at 8 bits.
EXACT = 1e-4  # the same weights, the same arithmetic in another order
INT8 = 0.10  # LLM.int8 rounds activations too, which the dense model does not (Dettmers et al. 2022, section 2)
# The trial computed with 8 or 11 bits of mantissa, and the merge does not.
TRAINED = {"fp32": EXACT, "bf16": 0.05, "fp16": 0.01}
STORED = {"fp32": EXACT, "bf16": 0.05, "fp16": 0.01}
AGREE = 0.8  # smallest share of equal answer tokens where the bounds above allow other ones; seen: 0.95 to 1
SPARED = 2  # tokens that may differ however few there are


@dataclass(frozen=True)
class Exam:
    """Prompts and the first model's greedy answers to them, as token ids, and the batch of both whose logits are compared."""

    asked: list[list[int]]
    answers: list[list[int]]
    batch: dict


def bound_of(recipe: Recipe) -> float:
    """Returns how far the logits of a trial's own model may be from those of the merged one, which computes in fp32."""
    return max(INT8 if recipe.bits == 8 else EXACT, TRAINED[recipe.precision])


def set_exam(model, prompts: list[str], tokenizer, *, longest: int, precision: str = "fp32") -> Exam:
    """Returns the exam that a model's own greedy answers make of some prompts.

    Args:
        longest: tokens of a prompt, and with its answer of the model's context; what is more is cut from the left.
        precision: in which the model computes, as in training.
    """
    config = model.config
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or longest + ANSWER
    asked = _tokens(prompts, tokenizer, max(1, min(longest, context - ANSWER)))
    answers = greedy(model, asked, tokenizer, precision=precision)
    rows = [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]
    lengths = [max(1, len(prompt) - BEFORE) for prompt in asked]
    return Exam(asked, answers, evaluate.batch_of(rows, lengths, pad=0, device=next(model.parameters()).device))


@dataclass(frozen=True)
class Seen:
    """What a model makes of a batch: logits (rows, positions, vocabulary), where they count, and its last state per layer."""

    logits: torch.Tensor
    counts: torch.Tensor
    layers: list[torch.Tensor]

    @property
    def scale(self) -> float:
        """The largest |logit|."""
        return self.logits[self.counts].abs().max().item()


def see(model, batch: dict, *, precision: str = "fp32") -> Seen:
    """Returns what a model makes of an exam's batch."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = set(inspect.signature(inner.forward).parameters)
    extra = {"position_ids": batch["position_ids"]} if "position_ids" in known else {}
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = batch["keep"]
    with torch.no_grad(), computing(precision, batch["input_ids"].device.type):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
                    output_hidden_states=True, **extra)  # fmt: skip
    logits = out.logits[:, -batch["keep"] : -1].float()
    return Seen(logits, batch["labels"] != -100, [state[:, -1].float() for state in out.hidden_states])


def differ(what: str, one: Seen, other: Seen, bound: float) -> dict[str, float]:
    """Returns the largest difference of logits, as a share of the largest |logit|, with its bound.

    Raises:
        InputError: the bound is broken; names the first layer whose output differs by more.
    """
    difference = (one.logits - other.logits)[one.counts].abs().max().item() / max(one.scale, 1e-12)
    if not difference <= bound:  # NaN is refused too
        raise wrong(_first_apart(one, other, bound), f"{what} part: logits differ by {difference:.2g} of the largest one, "
                    f"at most {bound:.2g} is allowed.", "Nothing was kept. Choose another trial or precision.")  # fmt: skip
    return {"difference": difference, "bound": bound}


def _first_apart(one: Seen, other: Seen, bound: float) -> str:
    for number, (a, b) in enumerate(zip(one.layers, other.layers, strict=True)):
        if not (a - b).abs().max() <= bound * a.abs().max():
            return f"layer {number} of {len(one.layers) - 1}" if number else "the embeddings"
    return "the output layer"


def same_answers(trained: Seen, stored: Seen, answers: list[list[int]], again: list[list[int]], *, exact: bool) -> dict:
    """Returns the shares of equal greedy answers and tokens; an exact merge may differ only where two tokens tie."""
    theirs, ours, total, same = trained.logits, stored.logits, 0, 0
    width = theirs.shape[1]
    for row, (answer, other) in enumerate(zip(answers, again, strict=True)):
        start = width - len(answer)
        same += (theirs[row, start:].argmax(-1) == ours[row, start:].argmax(-1)).sum().item()
        total += len(answer)
        if exact and answer != other:
            at = next((i for i, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), None)
            gap = theirs[row, start + at, answer[at]] - theirs[row, start + at, other[at]] if at is not None else torch.inf
            if gap > 2 * EXACT * trained.scale:
                raise wrong(f"prompt {row + 1}", f"the written model answers otherwise from token {(at or 0) + 1} on.")
    shares = {
        "texts_equal": sum(a == b for a, b in zip(answers, again, strict=True)) / len(answers),
        "tokens_equal": same / total,
    }
    bound = 1.0 if exact else AGREE
    if not exact and total - same > max(SPARED, (1 - bound) * total):
        raise wrong("answers", f"only {shares['tokens_equal']:.0%} of the greedy tokens are those of the trial's own model, "
                    f"{bound:.0%} are needed.", "Nothing was kept. Serve it in fp32, or choose another trial.")  # fmt: skip
    return shares | {"bound": bound}


def _tokens(prompts: list[str], tokenizer, longest: int) -> list[list[int]]:
    """Returns the prompts as token ids, cut from the left; as in serving, a special token's name in a prompt is text."""
    rows = [ids[-longest:] for ids in tokenizer(prompts, split_special_tokens=True)["input_ids"]]
    if not all(rows):
        raise wrong("prompts", "one of them is empty.", "Give real ones.")
    return rows


def greedy(model, asked: list[list[int]], tokenizer, *, precision: str = "fp32") -> list[list[int]]:
    """Returns the most likely answers as token ids, each up to and with its end of sequence.

    Penalties and the like that a base's own generation settings ask for are left out, as they are in serving.
    """
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    batch = evaluate.batch_of(asked, [len(row) for row in asked], pad=pad, device=next(inner.parameters()).device)
    own, inner.generation_config = inner.generation_config, GenerationConfig(eos_token_id=end, pad_token_id=pad)
    try:
        with torch.no_grad(), computing(precision, batch["input_ids"].device.type):
            out = inner.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=ANSWER
            )
    finally:
        inner.generation_config = own
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
