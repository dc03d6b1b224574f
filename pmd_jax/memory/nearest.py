"""The nearest documents of each query by cosine, in about the time of one matrix product.

Documents are read in blocks, so the whole [Q, N] of cosines never exists. A block is looked at only
for queries whose block maximum reaches what they hold already; there are few of these, since a
record is broken the more rarely the more documents were seen.

The answer is the same whatever the block and the order of rows: the fast product only chooses
candidates, with slack for its last bits; their cosines are then summed in float64, each by
itself, and rounded.

Axes: Q queries, N documents, D dimensions, K results. All rows have length 1 (or 0).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int

DECIMALS = 5
"""Cosines closer than this are ties."""

BLOCK = 32_768
"""Documents per product: [32, 32768] float32 are 4 MiB, enough work for all threads of BLAS."""

SLACK = 3 * 10**-DECIMALS
"""Rounding moves a cosine by half a unit, float32 sums of a few thousand terms by less."""


def nearest(
    queries: Float[np.ndarray, "Q D"], documents: Float[np.ndarray, "N D"], k: int
) -> tuple[Int[np.ndarray, "Q K"], Float[np.ndarray, "Q K"]]:
    """(indices, cosines) of the K = min(k, N) nearest documents per query, nearest first.

    Of documents that are equally near, the one with the lower index comes first.
    """
    if k < 1:
        raise ValueError(f"k: must be at least 1; got {k}")
    k = min(k, len(documents))
    indices, cosines = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k))
    for row, (found, values) in enumerate(leaders(queries, documents, k)):
        order = np.lexsort((found, -values))[:k]
        indices[row], cosines[row] = found[order], values[order]
    return indices, cosines


def rounded_cosines(
    query: Float[np.ndarray, " D"], documents: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, " N"]:
    """Cosines whose bits do not depend on how many documents are compared, to `DECIMALS`."""
    cosines = np.empty(len(documents))
    for start in range(0, len(documents), 4096):
        rows = slice(start, start + 4096)
        cosines[rows] = (documents[rows].astype(np.float64) * query).sum(axis=1)
    return np.round(cosines, DECIMALS) + 0.0  # no -0.0


def leaders(
    queries: Float[np.ndarray, "Q D"], documents: Float[np.ndarray, "N D"], k: int
) -> list[tuple[Int[np.ndarray, " C"], Float[np.ndarray, " C"]]]:
    """Per query (indices, rounded cosines) of all that may be among the k nearest, ties included.

    C differs by query: k, and what is as near as the last of them.
    """
    held = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in queries]
    floor = np.full(len(queries), -np.inf)
    buffer = np.empty(len(queries) * BLOCK, np.result_type(queries, documents))
    start = 0
    while k and start < len(documents):
        # As many as were seen before, so that few of them break a record, up to a whole block.
        block = documents[start : start + min(BLOCK, max(start, 256))]
        out = buffer[: len(queries) * len(block)].reshape(len(queries), len(block))
        cosines = np.matmul(queries, block.T, out=out)
        for row in np.flatnonzero(cosines.max(axis=1) >= floor).tolist():
            near = np.flatnonzero(cosines[row] >= floor[row])
            found = np.concatenate([held[row][0], near + start])
            values = np.concatenate([held[row][1], cosines[row, near]])
            if len(values) >= k:
                floor[row] = np.partition(values, len(values) - k)[len(values) - k] - SLACK
            keep = values >= floor[row]
            held[row] = found[keep], values[keep]
        start += len(block)
    return [
        (found, rounded_cosines(query, documents[found]))
        for query, (found, _) in zip(queries.astype(np.float64), held, strict=True)
    ]


class Index:
    """Vectors by key in one matrix that grows and shrinks; row order is nobody's business."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._rows: dict[str, int] = {}
        self._matrix = np.zeros((0, 0), np.float32)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, vectors: Mapping[str, Float[np.ndarray, " D"]], expected: int = 0) -> None:
        """Keys that are new, with their vectors. expected: how many keys there will be soon."""
        needed = len(self._keys) + len(vectors)
        if needed > len(self._matrix) and vectors:
            width = len(next(iter(vectors.values())))
            capacity = max(needed, expected, len(self._matrix) * 3 // 2)
            grown = np.empty((capacity, width), np.float32)
            if self._keys:
                grown[: len(self._keys)] = self._matrix[: len(self._keys)]
            self._matrix = grown
        for key, vector in vectors.items():
            self._rows[key] = len(self._keys)
            self._matrix[len(self._keys)] = vector
            self._keys.append(key)

    def drop(self, key: str) -> None:
        """Forget a key, known or not; the last row takes its place."""
        row = self._rows.pop(key, None)
        if row is None:
            return
        last = self._keys.pop()
        if last != key:
            self._keys[row], self._rows[last] = last, row
            self._matrix[row] = self._matrix[len(self._keys)]

    def nearest(self, queries: Float[np.ndarray, "Q D"], k: int) -> list[list[tuple[float, str]]]:
        """Per query the k nearest as (cosine, key), nearest first; of equals by key."""
        if not self._keys:
            return [[] for _ in queries]
        documents = self._matrix[: len(self._keys)]
        return [
            first(zip(values.tolist(), (self._keys[i] for i in found.tolist()), strict=True), k)
            for found, values in leaders(queries, documents, min(k, len(documents)))
        ]


def first(found: Iterable[tuple[float, str]], k: int) -> list[tuple[float, str]]:
    """The k highest cosines; of equals the lower key first."""
    return heapq.nsmallest(k, found, key=lambda pair: (-pair[0], pair[1]))
