"""Figures of what memory did, and of what a step costs.

Left out: what the policy learned (learning.py), and how the counts are made (memory/dynamics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from pmd_jax.memory.dynamics import LEVELS, StepDynamics, citations, utility
from tools.report.charts import (
    Chart,
    add_line,
    colour,
    draw,
    from_to,
    joined,
    label,
    lacking,
    line_figure,
    panels,
    series_table,
    smoothed,
)
from tools.report.runs import Run

PHASES = (
    "attempt",
    "verify",
    "remember",
    "reflect",
    "abstract",
    "teach",
    "probe",
    "distill",
)
"""Phases of a step, one after the other, so that their seconds add up."""
WITHIN = ("idle", "sync", "compile")
"""The same seconds seen another way: they lie within the phases and are never added to them."""
PHASE_COLOURS = (
    "#2f6f9f",
    "#8fb6d3",
    "#c9b458",
    "#3d8b5a",
    "#8fc2a0",
    "#b0447a",
    "#b9b9b9",
    "#c2571a",
)
STEP = "step (policy updates)"
NO_BANK = "No run here holds a bank that can be read: none was saved, or the run had no memory."
KINDS = {
    "success": "successes",
    "failure": "failures",
    "strategy": "strategies",
    "lesson": "lessons",
    "behaviors": "behaviors",
}
Value = Callable[[StepDynamics], Any]


def of_key(field: str, key: str) -> Value:
    """The value under `key` of one of the dicts of a step's dynamics."""
    return lambda step: getattr(step, field)[key]


def memory_charts(runs: Sequence[Run]) -> list[Chart]:
    return [
        sizes(runs),
        of_steps(
            runs,
            "capacity",
            "Share of memory that is full",
            "Of the problems in memory, the share that holds as many of a kind as it may; for "
            "behaviors, the filled share of their one capacity. At 100% nothing enters but in "
            "exchange.",
            [(plural, "share", of_key("at_capacity", kind)) for kind, plural in KINDS.items()],
            share=True,
            height=125,
        ),
        turnover(runs),
        of_steps(
            runs,
            "age",
            "Age of what is in memory",
            "Steps since an entry came, mean over the level. A line that climbs by one a step is a "
            "level that nothing enters.",
            [(f"{level}s", "steps", of_key("mean_age", level)) for level in LEVELS],
        ),
        retrieval(runs),
        of_steps(
            runs,
            "evenness",
            "Are all behaviors cited, or the same few?",
            "Entropy of a step's citations over behaviors, and as a share of log(number of "
            "behaviors in memory), which all cited alike would reach.",
            [
                ("entropy of citations", "nats", lambda s: s.citation_entropy_nats),
                ("share of the largest", "share", lambda s: s.citation_evenness),
                ("behaviors cited", "behaviors", lambda s: s.cited_behaviors),
            ],
        ),
        usefulness(runs),
        of_steps(
            runs,
            "duplicates",
            "What is written again",
            "Share of new insights that confirm a kept one, and of new behaviors that merge into "
            "one; running mean. Near 100% the writer has nothing new to say.",
            [
                (f"{level}s", "share", of_key("duplicate_rate", level))
                for level in ("insight", "behavior")
            ],
            share=True,
            smooth=True,
        ),
        leaks(runs),
    ]


def cost_charts(runs: Sequence[Run]) -> list[Chart]:
    return [*(step_time(run, i) for i, run in enumerate(runs)), degenerate(runs)]


# --- memory -------------------------------------------------------------------------------------


def of_steps(
    runs: Sequence[Run],
    key: str,
    title: str,
    note: str,
    lines: Sequence[tuple[str, str, Value]],
    share: bool = False,
    smooth: bool = False,
    height: int = 190,
) -> Chart:
    """One panel for each (name, unit, value of a step's dynamics)."""
    units = [unit for _, unit, _ in lines]
    figure = panels([name for name, _, _ in lines], STEP, units, height)
    columns, parts = [], []
    for number, run in enumerate(runs):
        for panel, (name, _, value) in enumerate(lines, start=1):
            found = [(s.step, value(s)) for s in run.memory.steps] if run.memory else []
            found = [(step, v) for step, v in found if v is not None]
            if not found:
                continue
            steps, values = [s for s, _ in found], [v for _, v in found]
            drawn = smoothed(values) if smooth else values
            add_line(figure, steps, drawn, run.name, number, panel=panel, legend=panel == 1)
            columns.append((f"{run.name}: {name}", steps, values))
            parts.append(from_to(f"{run.name}: {name}", steps, values, share))
    if not columns:
        return lacking(key, title, NO_BANK)
    if share:
        figure.update_yaxes(tickformat=".0%", range=[0, 1.04])
    return draw(key, title, note, joined(parts), figure, *series_table(columns))


def sizes(runs: Sequence[Run]) -> Chart:
    """From the metrics, which reach further than a saved bank."""
    title = "How much memory holds"
    names = ("experiences", "insights", "behaviors")
    figure = panels(names, STEP, ("entries",) * 3)
    columns, parts = [], []
    for number, run in enumerate(runs):
        for panel, (name, level) in enumerate(zip(names, LEVELS, strict=True), start=1):
            steps, values = run.series(f"memory/{name}")
            if not steps and run.memory:
                steps = [s.step for s in run.memory.steps]
                values = [s.sizes[level] for s in run.memory.steps]
            if steps:
                add_line(figure, steps, values, run.name, number, panel=panel, legend=panel == 1)
                columns.append((f"{run.name}: {name}", steps, values))
                parts.append(from_to(f"{run.name}: {name}", steps, values))
    if not columns:
        return lacking("sizes", title, "No run here logged the size of its memory.")
    note = "Entries in memory after each step, by level."
    return draw("sizes", title, note, joined(parts), figure, *series_table(columns))


def turnover(runs: Sequence[Run]) -> Chart:
    title = "What comes into memory, and what goes"
    figure = panels([f"{level}s" for level in LEVELS], STEP, ("entries a step",) * 3, height=210)
    columns, parts = [], []
    flows: list[tuple[str, Callable[[StepDynamics, str], int | None]]] = [
        ("added", lambda s, level: s.added[level]),
        ("evicted", lambda s, level: s.evicted[level]),
        (
            "confirmed or merged",
            lambda s, level: {"insight": s.confirmed, "behavior": s.merged}.get(level),
        ),
        ("updated", lambda s, level: s.updated if level == "behavior" else None),
    ]
    for number, run in enumerate(runs):
        if not run.memory or not run.memory.steps:
            continue
        steps = [s.step for s in run.memory.steps]
        for panel, level in enumerate(LEVELS, start=1):
            for dash, (name, value) in enumerate(flows):
                values = [value(s, level) for s in run.memory.steps]
                known = [v for v in values if v is not None]
                if len(known) < len(values):
                    continue
                drawn = smoothed(known) if len(known) > 40 else known
                legend = panel == 1 and dash == 0
                add_line(figure, steps, drawn, f"{run.name}: {name}", number, dash, panel, legend)
                columns.append((f"{run.name}: {level}s {name}", steps, values))
                parts.append(f"{run.name}: {level}s {name} {sum(known)} in all")
    if not columns:
        return lacking("turnover", title, NO_BANK)
    note = (
        "Per step; running mean where there are more than 40 steps. Solid: added; dashed: evicted; "
        "dotted: insights that confirm a kept one, behaviors merged into one; dash-dotted: "
        "behaviors rewritten under their name."
    )
    return draw("turnover", title, note, joined(parts), figure, *series_table(columns))


def retrieval(runs: Sequence[Run]) -> Chart:
    title = "How often teachers are shown memory"
    figure = panels([f"{level}s" for level in LEVELS], STEP, ("share of rollouts",) * 3)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.04])
    columns, parts = [], []
    for number, run in enumerate(runs):
        found = citations(run.rows, run.memory.entries) if run.memory else []
        for panel, level in enumerate(LEVELS, start=1):
            if found:
                steps, values = [c.step for c in found], [c.share[level] for c in found]
                add_line(figure, steps, values, run.name, number, panel=panel, legend=panel == 1)
                columns.append((f"{run.name}: {level}s", steps, values))
                parts.append(from_to(f"{run.name}: {level}s cited", steps, values, share=True))
    if not columns:
        return lacking("citations", title, "No run here logged rollouts beside a readable bank.")
    note = (
        "Share of the logged rollouts whose teacher's prompt shows an entry of the level. "
        "Experiences: a sibling's solution, or one of an earlier visit."
    )
    return draw("citations", title, note, joined(parts), figure, *series_table(columns))


def usefulness(runs: Sequence[Run]) -> Chart:
    title = "Solve rate at the next visit, with and without memory cited"
    figure = line_figure("change of the solve rate", "")
    rows, parts = [], []
    for number, run in enumerate(runs):
        found = utility(run.rows, run.memory.entries) if run.memory else {}
        for name, result in found.items():
            if result.mean_change is None:
                continue
            error = result.standard_error
            figure.add_trace(
                go.Scatter(
                    x=[result.mean_change],
                    y=[label(f"{run.name}: {name}")],
                    mode="markers",
                    showlegend=False,
                    marker={"size": 10, "color": colour(number)},
                    error_x={"type": "data", "array": [1.96 * (error or 0)], "thickness": 1.5},
                )
            )
            rows.append([run.name, name, result.visits, result.mean_change, error])
            parts.append(
                f"{run.name}: {name}, {result.mean_change:+.1%} over {result.visits} visits"
            )
    if not rows:
        return lacking("utility", title, "No problem was visited twice in the logged rollouts.")
    figure.update_xaxes(tickformat="+.1%", rangemode="normal", zeroline=True)
    figure.update_yaxes(automargin=True, rangemode="normal")
    figure.update_layout(height=150 + 40 * len(rows))
    note = (
        "Mean change from one visit of a problem to its next, with 1.96 standard errors. No causal "
        "claim: which problems are shown memory is not drawn by lot, low rates can only rise, and "
        "the policy learns from all problems in between."
    )
    columns = ("run", "teacher", "visits", "mean change", "standard error")
    return draw("utility", title, note, joined(parts), figure, columns, rows)


def leaks(runs: Sequence[Run]) -> Chart:
    title = "Texts refused because they give an answer away"
    names = ("reflect/leaked", "abstract/leaked")
    figure = panels(("insights refused", "behaviors refused"), STEP, ("texts a step",) * 2)
    columns, parts = [], []
    for number, run in enumerate(runs):
        for panel, name in enumerate(names, start=1):
            steps, values = run.series(name)
            if steps:
                drawn = smoothed(values) if len(values) > 40 else values
                add_line(figure, steps, drawn, run.name, number, panel=panel, legend=panel == 1)
                columns.append((f"{run.name} {name}", steps, values))
                parts.append(f"{run.name}: {name} {sum(values):g} in all")
    if not columns:
        return lacking("leaks", title, "No run here wrote insights or behaviors.")
    note = (
        "A text that holds a problem's answer is kept out of memory. Running mean where there are "
        "more than 40 steps."
    )
    return draw("leaks", title, note, joined(parts), figure, *series_table(columns))


# --- cost ---------------------------------------------------------------------------------------


def step_time(run: Run, number: int) -> Chart:
    key, title = (
        f"time-{number}" if number else "time",
        f"Where the seconds of a step go: {run.name}",
    )
    figure = line_figure(STEP, "seconds")
    figure.update_layout(barmode="stack", bargap=0.1)
    columns, parts = [], []
    for name, tint in zip(PHASES, PHASE_COLOURS, strict=True):
        steps, values = run.series(f"seconds/{name}")
        if not steps or not any(values):
            continue
        if len(steps) > 60:
            figure.add_trace(
                go.Scatter(
                    x=steps,
                    y=values,
                    name=name,
                    stackgroup="phases",
                    mode="lines",
                    line={"width": 0.5, "color": tint},
                )
            )
        else:
            figure.add_trace(go.Bar(x=steps, y=values, name=name, marker={"color": tint}))
        columns.append((name, steps, values))
        parts.append(f"{name} {sum(values) / len(values):.3g} s")
    for name in WITHIN:
        steps, values = run.series(f"seconds/{name}")
        if steps:
            columns.append((f"within: {name}", steps, values))
            if name == "idle":
                style = {"color": "#808080", "dash": "dot", "width": 2}
                figure.add_trace(
                    go.Scatter(x=steps, y=values, name="device idle (within)", line=style)
                )
    if not columns:
        return lacking(key, title, "This run logged no seconds per phase.")
    alternative = f"Mean seconds a step by phase: {', '.join(parts)}."
    note = (
        "Stacked: the phases, one after the other. Device idle, and sync and compile in the table, "
        "are parts of the same seconds and add nothing. First steps compile."
    )
    return draw(key, title, note, alternative, figure, *series_table(columns))


def degenerate(runs: Sequence[Run]) -> Chart:
    title = "Batches that teach little"
    counters = (
        ("groups/all_solved", "groups all correct"),
        ("groups/none_solved", "groups none correct"),
        ("truncated", "rollouts truncated"),
        ("well_formed", "rollouts well-formed"),
        ("loss_fraction", "rollouts that carried loss"),
    )
    figure = panels([words for _, words in counters], STEP, ("share",) * len(counters), height=125)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.04])
    columns, parts = [], []
    for number, run in enumerate(runs):
        for panel, (name, words) in enumerate(counters, start=1):
            steps, values = run.series(name)
            if steps:
                drawn = smoothed(values) if len(values) > 40 else values
                add_line(figure, steps, drawn, run.name, number, panel=panel, legend=panel == 1)
                columns.append((f"{run.name}: {words}", steps, values))
                parts.append(from_to(f"{run.name}: {words}", steps, values, share=True))
    if not columns:
        return lacking("degenerate", title, "No run here has finished a step.")
    note = (
        "A group all of whose rollouts are correct, or none, has nothing to contrast. Shares of "
        "groups or rollouts of a step; running mean where there are more than 40 steps."
    )
    return draw("degenerate", title, note, joined(parts), figure, *series_table(columns))
