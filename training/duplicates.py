"""Rows that are much like each other.

Owns: `near`, `sketch`, `clusters` and `like`: Jaccard similarity of 5-grams (Broder 1997), with candidates from MinHash and
locality-sensitive hashing (datasketch) and each of them verified exactly, so that none is reported wrongly.
Must not know: files, splits, tasks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIKE = 0.8  # Jaccard similarity from which on two texts are near-duplicates
LENGTH = 5  # bytes of a shingle
PERMUTATIONS = 64
_NOISE = re.compile(r"[\W_]+")
Sketch = tuple[np.ndarray, Any]  # sorted hashes of the shingles, and their MinHash


def near(one: str, other: str) -> float:
    """Returns the Jaccard similarity of two texts, 0 to 1; case, punctuation and space do not count."""
    first, second = _shingles(one), _shingles(other)
    common = np.intersect1d(first, second, assume_unique=True).size
    return common / (first.size + second.size - common)


def sketch(texts: Sequence[str]) -> list[Sketch]:
    """Returns what texts are compared by, some 700 bytes for a short one."""
    from datasketch import MinHash

    empty, out = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=_same), []
    for text in texts:
        grams, made = _shingles(text), empty.copy()
        made.update_batch(grams)
        out.append((grams, made))
    return out


def clusters(sketches: Sequence[Sketch]) -> list[int]:
    """Returns for each text the index of the first text that it is alike, directly or over others; its own if none."""
    parents = list(range(len(sketches)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    index = _index()
    for i, (grams, made) in enumerate(sketches):
        for j in index.query(made):
            first, second = sorted((root(i), root(j)))
            if first != second and _alike(grams, sketches[j][0]):
                parents[second] = first
        index.insert(i, made, check_duplication=False)
    return [root(i) for i in range(len(sketches))]


def like(sketches: Sequence[Sketch], others: Sequence[Sketch]) -> list[int | None]:
    """Returns for each text the index of one of the others that it is alike, or None."""
    index = _index()
    for i, (_, made) in enumerate(others):
        index.insert(i, made, check_duplication=False)
    return [next((j for j in sorted(index.query(made)) if _alike(grams, others[j][0])), None) for grams, made in sketches]


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    common = np.intersect1d(one, other, assume_unique=True).size
    return common >= ALIKE * (one.size + other.size - common)


def _shingles(text: str) -> np.ndarray:
    plain = _NOISE.sub(" ", text.casefold()).strip().encode() or text.encode()
    hashes = {zlib.crc32(plain[i : i + LENGTH]) for i in range(max(1, len(plain) - LENGTH + 1))}
    return np.sort(np.fromiter(hashes, dtype=np.uint32, count=len(hashes)))


def _same(value: Any) -> Any:
    return value  # shingles are 32-bit hashes already; datasketch mixes them


def _index():
    from datasketch import MinHashLSH

    # More bands than the threshold asks for: candidates are verified, so a missed one costs more than one too many.
    return MinHashLSH(num_perm=PERMUTATIONS, params=(16, 4))
