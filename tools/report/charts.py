"""One chart as the page shows it: a Plotly figure, its words, and its numbers as a table.

Colours are by run and the same in every chart; lines within a run differ by dash. A chart without
data holds one sentence instead of a figure.

Left out: which charts there are (learning.py, remembering.py) and how the page draws (page.py).
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

COLOURS = ("#2f6f9f", "#c2571a", "#3d8b5a", "#8a5aa8", "#a08a1e", "#b0447a")
"""Of runs, in order. Each has a contrast of 3 or more with both backgrounds of the page."""
GREY = "#808080"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SMOOTHING = 0.9
"""Weight of what was before in the running mean of noisy series."""
MAX_POINTS = 2000
"""A longer series is thinned evenly, first and last step kept."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """key: of its anchor. note: how to read it, and what is divided by what. alternative: what a
    reader who cannot see it should know. missing: the sentence in place of a figure."""

    key: str
    title: str
    note: str
    alternative: str = ""
    figure: dict[str, Any] | None = None
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    missing: str = ""


def lacking(key: str, title: str, sentence: str) -> Chart:
    return Chart(key, title, "", missing=sentence)


def draw(
    key: str,
    title: str,
    note: str,
    alternative: str,
    figure: go.Figure,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
) -> Chart:
    content = json.loads(figure.to_json())
    content["layout"].pop("template", None)
    table = tuple(tuple(rounded(value) for value in row) for row in rows)
    return Chart(key, title, note, alternative, content, tuple(columns), table)


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def label(text: str) -> str:
    """Text of a run for Plotly, which reads some HTML in its labels."""
    return html.escape(text, quote=False)


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def line_figure(x: str, y: str, share: bool = False) -> go.Figure:
    figure = go.Figure()
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y, rangemode="tozero")
    if share:
        figure.update_yaxes(tickformat=".0%")
    return figure


def panels(titles: Sequence[str], x: str, units: Sequence[str], height: int = 190) -> go.Figure:
    """Small charts one above the other, with steps in common."""
    figure = make_subplots(
        rows=len(titles),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.28 / max(2, len(titles)),
        subplot_titles=[label(title) for title in titles],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_layout(height=height * len(titles) + 60)
    figure.update_xaxes(title_text=x, row=len(titles), col=1)
    for row, unit in enumerate(units, start=1):
        figure.update_yaxes(title_text=unit, rangemode="tozero", row=row, col=1)
    return figure


def add_line(
    figure: go.Figure,
    x: Sequence[Any],
    y: Sequence[Any],
    name: str,
    number: int,
    dash: int = 0,
    panel: int = 0,
    legend: bool = True,
    **style: Any,
) -> None:
    """number: of the run, for its colour. panel: of `panels`, from 1; 0 for a single chart."""
    x, y = thinned(x), thinned(y)
    few = len(x) <= 40
    trace = go.Scatter(
        x=x,
        y=y,
        name=label(name),
        legendgroup=label(name),
        showlegend=legend,
        mode="lines+markers" if few else "lines",
        marker={"size": 5},
        line={"color": colour(number), "dash": DASHES[dash % len(DASHES)], "width": 1.8},
        **style,
    )
    if panel:
        figure.add_trace(trace, row=panel, col=1)
    else:
        figure.add_trace(trace)


def thinned(values: Sequence[Any]) -> list[Any]:
    n = len(values)
    if n <= MAX_POINTS:
        return list(values)
    return [values[round(i * (n - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean with weights SMOOTHING^age, which sum to 1 from the first value on."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        result.append(total / weight)
    return result


def from_to(name: str, steps: Sequence[int], values: Sequence[float], share: bool = False) -> str:
    """ "accuracy goes from 21.1% at step 0 to 56.2% at step 5"."""
    if not values:
        return f"{name} was not logged"
    first, last = (f"{v:.1%}" if share else f"{v:.4g}" for v in (values[0], values[-1]))
    return f"{name} goes from {first} at step {steps[0]} to {last} at step {steps[-1]}"


def joined(parts: Iterable[str]) -> str:
    text = "; ".join(parts)
    return f"{text}." if text else ""


def series_table(
    columns: Sequence[tuple[str, Sequence[int], Sequence[Any]]],
) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of series by step, None where one has no value."""
    steps = sorted({step for _, xs, _ in columns for step in xs})
    maps = [dict(zip(xs, ys, strict=True)) for _, xs, ys in columns]
    rows = [[step, *(values.get(step) for values in maps)] for step in steps]
    return ["step", *(name for name, _, _ in columns)], rows
