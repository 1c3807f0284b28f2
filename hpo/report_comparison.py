"""The comparison of a certificate in words and tables, for the report and the terminal.

Owns: `tables`, `said`. Must not know: HTML, how the numbers were made.
"""

from __future__ import annotations

from typing import Any

from hpo.certificate import Certificate, Interval
from training.metrics import METRICS

ALREADY = ("accuracy",)  # has a table and a figure of its own


def tables(certificate: Certificate | None) -> dict[str, Any] | None:
    """Returns the tables of the comparison as text: metrics, breakdown, general text, overlap; None without a comparison."""
    if certificate is None or not certificate.metrics:
        return None
    who = list(certificate.metrics[0].values)
    others = [name for name in who if name in certificate.metrics[0].differences]
    lines = []
    for one in certificate.metrics:
        values = [_number(one.values[name].value) for name in who]
        against = [_signed(one.differences[name]) for name in others]
        better = "less" if one.goal == "minimize" else "more"
        about = METRICS[one.name].about if one.name in METRICS else ""
        lines.append((one.name, about, better, f"{one.rows:,}", values, against, ", ".join(one.worse)))
    slices = [
        (part.by, part.group, f"{part.rows:,}", [f"{100 * part.accuracy[name]:.1f}" for name in who], _signed(part.gain, 100),
         part.worse)
        for part in certificate.breakdown
    ]  # fmt: skip
    return {"who": who, "others": others, "metrics": lines, "slices": slices, "against": others[-1] if others else "",
            "said": said(certificate), "kept": certificate.retained, "overlap": certificate.overlap}  # fmt: skip


def said(certificate: Certificate) -> list[str]:
    """Returns sentences about what became worse, what was forgotten, and rows on two sides."""
    found = []
    worse: dict[str, list[str]] = {}
    for one in certificate.metrics:
        for name in one.worse:
            worse.setdefault(name, []).append(one.name)
    for name, metrics in worse.items():
        found.append(f"Worse than {'the ' if name != 'untuned' else ''}{name}: {', '.join(metrics)}.")
    if (kept := certificate.retained) is not None:
        values = ", ".join(f"{name} {value:.3g}" for name, value in kept.perplexity.items())
        found.append(f"Perplexity on {kept.texts:,} general texts: {values}.")
        if (rise := kept.rise.get("winner")) is not None:
            found.append(f"The winner's is {_percent(rise.value)} against the untuned model's "
                         f"(95 % interval {_percent(rise.low)} to {_percent(rise.high)}).")  # fmt: skip
    if (overlap := certificate.overlap) is not None:
        left = f"{overlap.left:,} test rows ask what a training row asks" if overlap.left else "no test row stands in training"
        found.append(f"{overlap.removed:,} rows on two sides were left out; {left}.")
    return found


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.2e}"


def _signed(found: Interval, factor: float = 1.0) -> str:
    digits = 1 if factor == 100 else 3 if abs(found.value) < 100 else 1
    value, low, high = (f"{factor * part:+.{digits}f}" if abs(part) < 1e6 else f"{part:+.2e}" for part in
                        (found.value, found.low, found.high))  # fmt: skip
    return f"{value} [{low}, {high}]"
