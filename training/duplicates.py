"""Rows that are much like each other.

Owns: `near`, `clusters` and `like`: Jaccard similarity of character 5-grams (Broder 1997), with candidates from MinHash and
locality-sensitive hashing (datasketch) and each of them verified exactly, so that none is reported wrongly.
Must not know: files, splits, tasks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence

ALIKE = 0.8  # Jaccard similarity from which on two texts are near-duplicates
LENGTH = 5  # characters of a shingle
PERMUTATIONS = 64
_NOISE = re.compile(r"[\W_]+")


def near(one: str, other: str) -> float:
    """Returns the Jaccard similarity of two texts, 0 to 1; case, punctuation and space do not count."""
    first, second = _shingles(one), _shingles(other)
    return len(first & second) / len(first | second)


def clusters(texts: Sequence[str]) -> list[int]:
    """Returns for each text the index of the first text that it is alike, directly or over others; its own if none."""
    parents = list(range(len(texts)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    shingles, index = [], _index()
    for i, (grams, sketch) in enumerate(_sketched(texts)):
        shingles.append(grams)
        for j in index.query(sketch):
            first, second = sorted((root(i), root(j)))
            if first != second and _alike(grams, shingles[j]):
                parents[second] = first
        index.insert(i, sketch, check_duplication=False)
    return [root(i) for i in range(len(texts))]


def like(texts: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """Returns for each text the index of one of the others that it is alike, or None."""
    shingles, index = [], _index()
    for i, (grams, sketch) in enumerate(_sketched(others)):
        shingles.append(grams)
        index.insert(i, sketch, check_duplication=False)
    return [
        next((j for j in sorted(index.query(sketch)) if _alike(grams, shingles[j])), None) for grams, sketch in _sketched(texts)
    ]


def _alike(one: frozenset[int], other: frozenset[int]) -> bool:
    common = len(one & other)
    return common >= ALIKE * (len(one) + len(other) - common)


def _shingles(text: str) -> frozenset[int]:
    plain = _NOISE.sub(" ", text.casefold()).strip().encode() or text.encode()
    return frozenset(zlib.crc32(plain[i : i + LENGTH]) for i in range(max(1, len(plain) - LENGTH + 1)))


def _sketched(texts: Sequence[str]) -> Iterator[tuple[frozenset[int], object]]:
    from datasketch import MinHash

    empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=_same)
    for text in texts:
        grams, sketch = _shingles(text), empty.copy()
        sketch.update_batch(list(grams))
        yield grams, sketch


def _same(value: int) -> int:
    return value  # shingles are 32-bit hashes already; datasketch mixes them


def _index():
    from datasketch import MinHashLSH

    # More bands than the threshold asks for: candidates are verified, so a missed one costs more than one too many.
    return MinHashLSH(num_perm=PERMUTATIONS, params=(16, 4))
