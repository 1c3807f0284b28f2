"""How answers and likelihoods become scores.

Owns: `METRICS`, name -> `Metric`; a user's own ones; the value of a score from statistics of rows. A new one is one entry.
Must not know: models, batches, studies.

Each row has a few numbers whose sums over any rows give the score of those rows. So workers' rows are joined, and two models
compared on resampled rows, in the same way for a mean, a perplexity and BLEU.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

from training import own
from training.errors import wrong
from training.recipe import OwnMetric

Goal = Literal["maximize", "minimize"]
LARGEST = 700.0  # nats per token whose exponential is still a number
ORDERS = 4  # of BLEU's n-grams


@dataclass(frozen=True)
class Metric:
    """One score. `needs` says what its rows are made from.

    `row`: for "likelihood" (nats of the prompt, its tokens, nats of the response, its tokens), for "answers" (answer,
    expected, prompt) as text -> statistics of that row, always equally many. `of`: their sums over rows -> the score.
    """

    goal: Goal
    needs: Literal["likelihood", "answers"]
    row: Callable[..., list[float]]
    of: Callable[[Sequence[float]], float]
    about: str


def perplexity(sums: Sequence[float]) -> float:
    """Returns exp of the mean nats per token, from [nats, tokens]; what overflows stays the largest number there is room for."""
    nats, tokens = sums
    return math.exp(min(nats / tokens, LARGEST)) if tokens else 1.0


def mean(sums: Sequence[float]) -> float:
    """Returns the mean over rows, from [sum, rows]."""
    return sums[0] / sums[1] if sums[1] else 0.0


def normalised(text: str) -> str:
    """Returns a text in lower case without punctuation, English articles and extra space (Rajpurkar et al. 2016, SQuAD)."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, expected: str) -> float:
    """Returns the harmonic mean of precision and recall over normalised words (Rajpurkar et al. 2016, SQuAD)."""
    said, wanted = normalised(answer).split(), normalised(expected).split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * shared / (len(said) + len(wanted))


class _Words:
    """The words of any script; of English text the same as rouge-score's own, which knows no letters but a to z."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@lru_cache
def _rouge(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_Words())


def rouge(kind: str, answer: str, expected: str) -> float:
    """Returns the F-measure of ROUGE (Lin 2004) by the library rouge-score; kind is rouge1, rouge2 or rougeL."""
    return float(_rouge(kind).score(expected, answer)[kind].fmeasure)


@lru_cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def _bleu_row(answer: str, expected: str, prompt: str) -> list[float]:
    found = _bleu().sentence_score(answer, [expected])
    return [float(n) for n in (*found.counts, *found.totals, found.sys_len, found.ref_len)]


def _bleu_of(sums: Sequence[float]) -> float:
    whole = [int(n) for n in sums]
    counts, totals, (said, wanted) = whole[:ORDERS], whole[ORDERS : 2 * ORDERS], whole[2 * ORDERS :]
    return _bleu().compute_bleu(counts, totals, said, wanted, smooth_method="exp").score if said else 0.0


def _answered(score: Callable[[str, str], float], answer: str, expected: str, prompt: str) -> list[float]:
    return [float(score(answer, expected)), 1.0]


def _share(score: Callable[[str, str], float], about: str) -> Metric:
    return Metric("maximize", "answers", partial(_answered, score), mean, about)


METRICS: dict[str, Metric] = {
    "perplexity": Metric("minimize", "likelihood", lambda p, np, r, nr: [p + r, np + nr], perplexity, "of prompts and responses"),
    "perplexity_prompt": Metric("minimize", "likelihood", lambda p, np, r, nr: [p, np], perplexity, "of prompts"),
    "perplexity_response": Metric("minimize", "likelihood", lambda p, np, r, nr: [r, nr], perplexity, "of responses"),
    "accuracy_generated": _share(lambda a, e: a.strip() == e.strip(), "share of answers equal to the expected one"),
    "exact_match": _share(lambda a, e: normalised(a) == normalised(e), "the same, but for case, punctuation and articles"),
    "f1": _share(token_f1, "words shared with the expected answer, F1"),
    "rouge_1": _share(partial(rouge, "rouge1"), "ROUGE-1, F-measure"),
    "rouge_2": _share(partial(rouge, "rouge2"), "ROUGE-2, F-measure"),
    "rouge_l": _share(partial(rouge, "rougeL"), "ROUGE-L, F-measure"),
    "bleu": Metric("maximize", "answers", _bleu_row, _bleu_of, "BLEU of all answers together, 0 to 100 (sacrebleu)"),
}


def chosen(names: Sequence[str | OwnMetric]) -> dict[str, Metric]:
    """Returns the metrics of an evaluation by the names of their scores.

    Raises:
        InputError: a user's own one cannot be loaded.
    """
    return {name_of(entry): METRICS[entry] if entry in METRICS else _own(entry) for entry in names}


def name_of(entry: str | OwnMetric) -> str:
    """Returns what a metric's score is called."""
    return entry.name if isinstance(entry, OwnMetric) else own.short(entry) if own.is_own(entry) else entry


def goal_of(entry: str | OwnMetric) -> Goal:
    """Returns whether more or less of a metric is wanted."""
    return entry.goal if isinstance(entry, OwnMetric) else METRICS[entry].goal if entry in METRICS else "maximize"


def _own(entry: str | OwnMetric) -> Metric:
    path = entry.function if isinstance(entry, OwnMetric) else entry
    function = own.load(path, "evaluation.metrics")

    def row(answer: str, expected: str, prompt: str) -> list[float]:
        value = function(answer, expected, prompt)
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise wrong("evaluation.metrics", f"{path} must return a finite number for each row, got {value!r}.", "Correct it.")
        return [float(value), 1.0]

    return Metric(goal_of(entry), "answers", row, mean, f"of {path}")


def total(rows: Sequence[Sequence[float]]) -> list[float]:
    """Returns the sums of rows' statistics; a row without any (it was not looked at) adds nothing."""
    return [math.fsum(column) for column in zip(*(row for row in rows if row), strict=True)]
