"""Rows that are much like each other.

Owns: `near`, `sketch`, `clusters` and `like`: Jaccard similarity of 5-grams (Broder 1997), with candidates from MinHash and
locality-sensitive hashing (datasketch) and each of them verified exactly, so that none is reported wrongly.
Must not know: files, splits, tasks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

ALIKE = 0.8  # Jaccard similarity from which on two texts are near-duplicates
LENGTH = 5  # bytes of a shingle
PERMUTATIONS, BANDS = 64, 16
MOST = 100  # texts that a text is compared with among those that one number of the table says may be alike
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


def bands(texts: Sequence[str]) -> np.ndarray:
    """Returns uint64 (texts, BANDS): two texts with an equal number in one column may be alike, others are not looked at."""
    values = np.stack([made.hashvalues for _, made in sketch(texts)]).astype(np.uint64).reshape(len(texts), BANDS, -1)
    mixed = np.zeros(values.shape[:2], np.uint64)
    for i in range(values.shape[2]):
        mixed = (mixed ^ values[:, :, i]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def clusters_on_disk(table: np.ndarray, text: Callable[[int], str], rows: np.ndarray) -> np.ndarray:
    """Returns what `clusters` does for texts that are read when two of them have to be compared.

    Args:
        table: of `bands`, for all texts.
        text: returns a text by its number.
        rows: the numbers of the texts to compare.

    Returns:
        int64 (all texts): the first text that each of the rows is alike, itself if none.
    """
    first = np.arange(len(table))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = int(first[i])
        return i

    for run in _runs(table, rows):
        heads: list[int] = []
        for i in run.tolist():
            known = next((j for j in heads if root(i) == root(j) or near(text(i), text(j)) >= ALIKE), None)
            if known is None:
                heads = [*heads, i][:MOST]
            else:
                one, other = sorted((root(i), root(known)))
                first[other] = one
    for i in rows.tolist():
        if first[i] != i:
            first[i] = root(i)
    return first


def like_on_disk(table: np.ndarray, text: Callable[[int], str], rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns a mask of the rows that are alike one of the others; arguments as in `clusters_on_disk`."""
    found, held = set(), np.zeros(len(table), bool)
    held[others] = True
    for run in _runs(table, np.sort(np.concatenate([rows, others]))):
        theirs = run[held[run]][:MOST].tolist()
        for i in run[~held[run]].tolist() if theirs else ():
            if i not in found and any(near(text(i), text(j)) >= ALIKE for j in theirs):
                found.add(i)
    return np.isin(rows, sorted(found))


def _runs(table: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the rows that have a number in common, in ascending order, band by band."""
    for band in range(table.shape[1]):
        column = np.asarray(table[rows, band])
        order = np.argsort(column, kind="stable")
        ends = np.flatnonzero(np.diff(column[order])) + 1
        starts = np.concatenate([[0], ends])
        stops = np.concatenate([ends, [len(order)]])
        for i in np.flatnonzero(stops - starts > 1):
            yield rows[order[starts[i] : stops[i]]]


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
    return MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
