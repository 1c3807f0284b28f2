"""Which version answers a request, and how the versions compare.

Owns: `pick` (sticky, by shares), `Statistics`, `compare`. Must not know: engines, HTTP, files. Everything here is a pure function
of its arguments, so every replica decides alike without asking another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist

from serving.endpoint import Version

SHARES = ("errors", "feedback")  # what is a share of something, from 0 to 1
MEANS = ("seconds", "first_token")
BETTER = {"errors": "less", "feedback": "more", "seconds": "less", "first_token": "less"}
WORDS = {"errors": "share of errors", "feedback": "feedback", "seconds": "seconds", "first_token": "seconds to the first token"}
FEW = 30  # requests; below that a normal interval of a mean says little


def pick(versions: Sequence[Version], key: str, endpoint: str = "") -> Version:
    """Returns the version that answers requests with this key: the same one as long as shares stay as they are.

    Weighted rendezvous hashing: each version draws an exponential time from (endpoint, version, key) at the rate of its share,
    and the first one wins. Versions therefore win in proportion to their shares, and a version that gains share from the others
    in proportion takes keys only to itself; one that is left out gives its keys to the others and moves none between them.

    Args:
        versions: those that can answer. If none of them has a share, the newest answers.
        key: the user, the session or the request.
        endpoint: so that two endpoints divide the same users differently.

    Raises:
        ValueError: there are no versions.
    """
    if not versions:
        raise ValueError("no version can answer")
    sharing = [version for version in versions if version.share > 0]
    if not sharing:
        return max(versions, key=lambda version: version.version)
    return min(sharing, key=lambda version: (_draw(endpoint, version.version, key) / version.share, version.version))


def _draw(endpoint: str, version: int, key: str) -> float:
    digest = hashlib.sha256(f"{endpoint}\0{version}\0{key}".encode(errors="surrogatepass")).digest()
    return -math.log((int.from_bytes(digest[:8], "big") + 0.5) / 2**64)


@dataclass
class Statistics:
    """What is known of one version's answers, as sums, so that those of several replicas add up. Times are in seconds."""

    count: int = 0
    errors: int = 0
    timed: int = 0
    seconds: float = 0.0
    seconds_squared: float = 0.0
    first_timed: int = 0
    first_token: float = 0.0
    first_token_squared: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    feedback_count: int = 0
    feedback: float = 0.0

    def add(self, *, seconds: float, first_token: float | None = None, prompt_tokens: int = 0, tokens: int = 0,
            error: bool = False) -> None:  # fmt: skip
        """Adds one answered request; the time of an error says nothing about answers and is left out."""
        self.count += 1
        self.errors += bool(error)
        self.prompt_tokens += prompt_tokens
        self.tokens += tokens
        if not error:
            self.timed += 1
            self.seconds += seconds
            self.seconds_squared += seconds * seconds
        if first_token is not None and not error:
            self.first_timed += 1
            self.first_token += first_token
            self.first_token_squared += first_token * first_token

    def add_feedback(self, score: float) -> None:
        """Adds a user's score.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        if not 0 <= score <= 1:
            raise ValueError(f"a score is between 0 and 1, got {score}")
        self.feedback_count += 1
        self.feedback += score

    def merge(self, other: Statistics) -> Statistics:
        """Returns the statistics of both."""
        return Statistics(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def to_json(self) -> dict:
        """Returns plain numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping) -> Statistics:
        """Returns what `to_json` wrote; what is not known is left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in names})


def total(parts: Iterable[Mapping[str, Mapping]]) -> dict[str, Statistics]:
    """Returns the statistics of each version over several replicas, as each of them wrote its own."""
    found: dict[str, Statistics] = {}
    for part in parts:
        for name, said in part.items():
            found[name] = found.get(name, Statistics()).merge(Statistics.from_json(said))
    return found


def compare(statistics: Mapping[str, Statistics], *, confidence: float = 0.95) -> list[dict]:
    """Returns one row per version, with intervals, and its difference against the first version in words.

    Shares (errors, feedback from 0 to 1) have Wilson's interval, and differences of shares Newcombe's hybrid of two of them
    (1998, method 10), both of which hold for few requests too; for scores between 0 and 1 they are at worst too wide. Means
    (seconds) have the normal interval with Welch's standard error, from two answers on; in words they are compared only from 30
    answers on. Several differences are looked at, each at the same confidence.

    Args:
        statistics: by version; the first is what the others are held against.
        confidence: of every interval.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rows: list[dict] = []
    for name, own in statistics.items():
        row: dict = {"version": name, "requests": own.count, "prompt_tokens": own.prompt_tokens, "tokens": own.tokens}
        row |= {what: _estimate(own, what, z) for what in (*SHARES, *MEANS)}
        if rows:
            first = rows[0]
            row["difference"] = {what: _difference(row[what], first[what], what, z) for what in (*SHARES, *MEANS)}
            row["verdict"] = _verdict(row, first)
        rows.append(row)
    for row in rows:
        for what in (*SHARES, *MEANS):
            row[what].pop("error", None)
    return rows


def wilson(share: float, count: int, z: float) -> tuple[float, float]:
    """Returns Wilson's score interval of a share."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _estimate(own: Statistics, what: str, z: float) -> dict:
    count, sum_ = {
        "errors": (own.count, own.errors),
        "feedback": (own.feedback_count, own.feedback),
        "seconds": (own.timed, own.seconds),
        "first_token": (own.first_timed, own.first_token),
    }[what]
    if not count:
        return {"count": 0, "value": None, "low": None, "high": None}
    value = sum_ / count
    if what in SHARES:
        low, high = wilson(value, count, z)
        return {"count": count, "value": value, "low": low, "high": high}
    if count < 2:
        return {"count": count, "value": value, "low": None, "high": None}
    squared = own.seconds_squared if what == "seconds" else own.first_token_squared
    error = math.sqrt(max(squared - sum_ * sum_ / count, 0) / (count - 1) / count)
    return {"count": count, "value": value, "low": value - z * error, "high": value + z * error, "error": error}


def _difference(own: dict, first: dict, what: str, z: float) -> dict | None:
    if own["low"] is None or first["low"] is None:
        return None
    value = own["value"] - first["value"]
    if what in MEANS:
        half = z * math.hypot(own["error"], first["error"])
        return {"value": value, "low": value - half, "high": value + half}
    low = value - math.hypot(own["value"] - own["low"], first["high"] - first["value"])
    high = value + math.hypot(own["high"] - own["value"], first["value"] - first["low"])
    return {"value": value, "low": low, "high": high}


def _verdict(row: dict, first: dict) -> str:
    said, compared = [], False
    for what, found in row["difference"].items():
        if found is None or (what in MEANS and min(row[what]["count"], first[what]["count"]) < FEW):
            continue
        compared = True
        if found["low"] > 0 or found["high"] < 0:
            way = "less" if found["high"] < 0 else "more"
            word = "better" if way == BETTER[what] else "worse"
            near, far = sorted((abs(found["low"]), abs(found["high"])))
            said.append(f"{word} than {first['version']}: {way} {WORDS[what]}, by {near:.2g} to {far:.2g}")
    if not compared:
        return f"too few answers to compare with {first['version']}"
    return "; ".join(said) or f"no difference from {first['version']} is shown"
