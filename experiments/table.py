"""The table of a study: a line per row, with intervals, its difference to the reference, its cost.

A row's score of a question is the mean over its seeds; intervals and differences resample questions
(metrics.py), so they hold for these seeds and other questions. How far seeds differ stands beside
them: with three seeds that is a range and no interval.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from pmd_jax.metrics import bootstrap_interval, paired_bootstrap
from pmd_jax.telemetry import duration, percent


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row under one seed, done. evaluation: its scores; totals: its cost (totals.json)."""

    row: str
    seed: int
    evaluation: Mapping[str, Any]
    totals: Mapping[str, Any]

    @property
    def per_problem(self) -> Mapping[str, float]:
        return self.evaluation["per_problem"]


@dataclasses.dataclass(frozen=True)
class TableRow:
    """Shares in [0, 1]; cost is the mean of a seed.

    difference: (difference, low, high, p) to the reference over the seeds that both have; None
    for the reference itself, or where no seed is common.
    """

    row: str
    seeds: tuple[int, ...]
    average: float
    interval: tuple[float, float]
    per_seed: tuple[float, ...]
    difference: tuple[float, float, float, float] | None
    well_formed: float
    updates: float
    rollouts: float
    rollout_tokens: float
    memory_tokens: float
    seconds: float


def read_cell(folder: Path, row: str, seed: int, evaluation: str) -> Cell:
    """The cell whose run is over in `folder`."""
    scores = json.loads((folder / "evaluation.json").read_text())[evaluation]
    return Cell(row, seed, scores, json.loads((folder / "totals.json").read_text()))


def compare(cells: Sequence[Cell], reference: str) -> list[TableRow]:
    """A line per row, in the order of first appearance.

    Raises ValueError where cells were scored on different questions.
    """
    questions = {tuple(sorted(cell.per_problem)) for cell in cells}
    if len(questions) > 1:
        raise ValueError(
            "cells: must all be scored on the same questions; they are not, run them under one "
            "task configuration"
        )
    by_row: dict[str, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    return [_line(row, of_row, by_row.get(reference, [])) for row, of_row in by_row.items()]


def _line(row: str, cells: Sequence[Cell], reference: Sequence[Cell]) -> TableRow:
    scores = _scores(cells)

    def mean(name: str) -> float:
        return float(np.mean([cell.totals.get(name, 0) for cell in cells]))

    return TableRow(
        row=row,
        seeds=tuple(cell.seed for cell in cells),
        average=float(scores.mean()),
        interval=bootstrap_interval(scores),
        per_seed=tuple(cell.evaluation["average"] for cell in cells),
        difference=_difference(cells, reference) if reference[:1] != cells[:1] else None,
        well_formed=float(np.mean([cell.evaluation["well_formed"] for cell in cells])),
        updates=mean("steps"),
        rollouts=mean("rollouts"),
        rollout_tokens=mean("trained_tokens"),
        memory_tokens=mean("sampled_tokens") - mean("trained_tokens"),
        seconds=mean("milliseconds") / 1000,
    )


def _scores(cells: Sequence[Cell]) -> Float[np.ndarray, " N"]:
    return np.mean([[cell.per_problem[q] for q in sorted(cell.per_problem)] for cell in cells], 0)


def _difference(
    cells: Sequence[Cell], reference: Sequence[Cell]
) -> tuple[float, float, float, float] | None:
    common = {cell.seed for cell in cells} & {cell.seed for cell in reference}
    if not common:
        return None
    ours, theirs = ([c for c in side if c.seed in common] for side in (cells, reference))
    return paired_bootstrap(_scores(ours), _scores(theirs))


def rendered(rows: Sequence[TableRow], reference: str, num_samples: int) -> Group:
    """What a person reads, within 80 columns: scores, then what they cost."""

    def table(title: str, *headings: str) -> Table:
        made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        made.add_column("row")
        for heading in headings:
            made.add_column(heading, justify="right")
        return made

    scores = table(
        f"avg@{num_samples} in %, 95% intervals over questions",
        "mean",
        "interval",
        "each seed",
        f"less {reference}",
        "p",
    )
    costs = table(
        "of a seed", "well-formed", "updates", "rollouts", "their tokens", "memory's", "time"
    )
    for row in rows:
        low, high = (f"{100 * bound:.1f}" for bound in row.interval)
        each = " ".join(f"{100 * score:.1f}" for score in row.per_seed)
        difference, p = "", ""
        if row.difference:
            value, least, most, chance = row.difference
            difference = f"{100 * value:+.1f} ({100 * least:+.1f} to {100 * most:+.1f})"
            p = f"{chance:.3f}"
        scores.add_row(row.row, f"{100 * row.average:.1f}", f"{low} to {high}", each, difference, p)
        counts = (row.updates, row.rollouts, row.rollout_tokens, row.memory_tokens)
        costs.add_row(
            row.row,
            percent(row.well_formed),
            *(f"{count:,.0f}" for count in counts),
            duration(row.seconds),
        )
    return Group(scores, costs)
