"""What a study may claim about its winner, as a record.

Owns: `Certificate` and its parts. Must not know: how it is made (certify) or shown (report).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from training.recipe import Frozen


class Interval(Frozen):
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Measured(Frozen):
    """One member of the front timed alone on an otherwise idle worker.

    `seconds` is that of its whole training, from `repeats` short timings scaled to its number of steps; `low` and `high`
    are the extreme timings, scaled alike. `in_study` is what was measured while other trials ran.
    """

    seconds: float
    low: float
    high: float
    repeats: int
    peak_bytes: int
    in_study: float


class Scored(Frozen):
    """One model on rows that no trial saw. `number` is its trial, None for the untuned model."""

    who: str = Field(description="untuned, defaults or winner")
    number: int | None
    rows: int
    accuracy: Interval
    loss: float


class SideBySide(Frozen):
    """One held-out row and what each model answered."""

    prompt: str
    expected: str
    untuned: str
    defaults: str | None
    winner: str


class Rerun(Frozen):
    """One training of a trial's recipe with another seed. `score` is the first objective on rows that chose nothing."""

    number: int = Field(description="of the trial")
    seed: int
    score: float | None = Field(description="None where it did not complete")
    seconds: float | None = Field(description="of its optimizer steps")
    ended: str = "complete"
    reason: str = ""


class Rival(Frozen):
    """A member of the front beside the winner: how far the winner is ahead of it in the score, larger being better."""

    number: int
    value: float
    low: float = Field(description="of the 95 % interval of the difference")
    high: float
    ahead: float = Field(description="share of the resamples in which the winner is better")
    scores: tuple[float, ...] = Field(description="by seed")


class Verdict(Frozen):
    """What may be said of the winner against its rivals."""

    kind: Literal["winner", "tie", "beaten", "open"] = Field(
        description="winner: better than every rival with 95 % confidence; beaten: a rival is; open: nothing can be said"
    )
    over: Literal["seeds", "rows"] = Field(description="trained again with other seeds, or the trained models alone")
    confidence: float = Field(description="share of the resamples in which the winner is the best of all")
    tied: tuple[int, ...] = ()
    better: int | None = None
    rivals: tuple[Rival, ...] = ()
    scores: tuple[float, ...] = Field((), description="of the winner, by seed")
    failed: dict[int, str] = Field(default_factory=dict, description="trial -> why another seed did not complete")


class Optimism(Frozen):
    """How much better the winner looked where it was chosen than where nothing was chosen; larger is better in both scores.

    The interval is None where there are no rows to resample.
    """

    chosen: float = Field(description="its score on the validation rows, which chose it")
    held_out: float = Field(description="its score on rows, and where it was trained again seeds, that did not")
    value: float
    low: float | None
    high: float | None
    rows: int
    seeds: int


class Compared(Frozen):
    """One metric of all compared models, on the same test rows."""

    name: str
    goal: Literal["maximize", "minimize"]
    rows: int
    values: dict[str, Interval] = Field(description="by who")
    differences: dict[str, Interval] = Field(description="winner minus each of the others, paired bootstrap over rows")
    worse: tuple[str, ...] = Field((), description="whom the winner is worse than: the interval lies wholly on the wrong side")


class Slice(Frozen):
    """The accuracy of all compared models on some of the test rows; `gain` is the winner's over the one it is compared with."""

    by: str
    group: str
    rows: int
    accuracy: dict[str, float]
    gain: Interval
    worse: bool


class Retained(Frozen):
    """What tuned models still know: perplexities on general text, and their relative rise against the untuned one."""

    text: str
    texts: int
    tokens: int
    perplexity: dict[str, float] = Field(description="by who")
    rise: dict[str, Interval] = Field(description="by who: 0.1 is a tenth more, paired bootstrap over texts")


class Overlap(Frozen):
    """Rows on two sides: those that were `removed` from training or validation rows, and test rows `left` in training."""

    removed: int
    left: int


class Certificate(Frozen):
    """The winner of a study, why it was chosen, and how it does on untouched rows."""

    winner: int
    reason: str
    measured: dict[int, Measured] = Field(default_factory=dict, description="by trial number")
    scores: tuple[Scored, ...] = ()
    gain: Interval | None = Field(None, description="accuracy of winner minus defaults, paired bootstrap over rows")
    rows: tuple[SideBySide, ...] = ()
    verdict: Verdict | None = None
    optimism: Optimism | None = None
    reruns: tuple[Rerun, ...] = ()
    allowed: float | None = Field(None, description="seconds of training that might be spent on training again")
    said: tuple[str, ...] = Field((), description="verdict and optimism in words")
    insights: tuple[str, ...] = Field((), description="what the trials say of the hyperparameters")
    metrics: tuple[Compared, ...] = ()
    breakdown: tuple[Slice, ...] = ()
    retained: Retained | None = None
    overlap: Overlap | None = None
    machine: dict[str, Any] = Field(default_factory=dict, description="device, cores, versions, slow-down during the search")
    made: float = Field(description="seconds since the epoch")
