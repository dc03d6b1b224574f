"""How a rollout workload is cut into batches for libraries that decode a batch to its end.

They do not put a new request in the place of a finished one, so the rows of a batch should end at
about the same time: rows are sorted by length, the longest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

SIZES = (8, 16, 32, 64, 128, 256)  # rows of a batch that are tried
STEPS = 8  # decode steps that a calibration measures


@dataclasses.dataclass(frozen=True)
class Row:
    """One wanted response: the place of its prompt, which sample of it, and its exact length."""

    prompt: int
    sample: int
    length: int


def rows_of(workload: Mapping[str, Any]) -> list[Row]:
    """All rows of a workload, the longest first. Raises ValueError where lengths do not fit."""
    prompts, lengths = workload["prompts"], workload["lengths"]
    samples = workload["num_samples"]
    if len(lengths) != len(prompts) or any(len(each) != samples for each in lengths):
        raise ValueError(f"lengths: must be {len(prompts)} prompts x {samples} samples")
    rows = [Row(i, j, n) for i, each in enumerate(lengths) for j, n in enumerate(each)]
    if min(row.length for row in rows) < 1:
        raise ValueError("lengths: must be at least 1")
    return sorted(rows, key=lambda row: -row.length)


def cut(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Batches of `size` rows; rows of a batch lie side by side by prompt."""
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [sorted(batch, key=lambda row: (row.prompt, -row.length)) for batch in batches]


def report(rows: Sequence[Row], responses: Sequence[list[int]], seconds: float) -> dict[str, Any]:
    """What a rollout answers to run. Raises ValueError where a response has not its length.

    responses: the tokens of each row; they come back in the order of the workload.
    """
    for row, response in zip(rows, responses, strict=True):
        if len(response) != row.length:
            raise ValueError(f"{row}: the library made {len(response)} tokens")
    pairs = sorted(zip(rows, responses, strict=True), key=lambda pair: dataclasses.astuple(pair[0]))
    tokens = sum(row.length for row in rows)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "responses": [response for _, response in pairs],
    }


def sizes_for(num_rows: int) -> list[int]:
    """The batch sizes to try: those of SIZES below all rows, and all rows."""
    return [size for size in SIZES if size < num_rows] + [num_rows]


def predicted(rows: Sequence[Row], size: int, prefill: float, step: float) -> float:
    """Seconds of all rows in batches, from those of one batch's prefill and of one decode step."""
    steps = sum(max(row.length for row in batch) - 1 for batch in cut(rows, size))
    return prefill * len(rows) / size + step * steps
