"""Figures of what the policy learned: scores, test-time scaling, solved sets, words of memory.

Left out: what memory did and what steps cost (remembering.py).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import plotly.graph_objects as go

from pmd_jax import metrics
from tools.report.charts import (
    GREY,
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
from tools.report.runs import Run, is_number

BEFORE, BOTH, NONE = "#7d8c3a", "#6d737a", "#c3c7cb"  # colours that are no run's
MAX_PAIRS = 3
"""Pairs of runs whose solved sets are compared; more would be a table that nobody reads."""


def learning_charts(runs: Sequence[Run]) -> list[Chart]:
    return [
        accuracy(runs),
        *unit_tests(runs),
        scaling(runs),
        headroom(runs),
        *solved_sets(runs),
        concepts(runs),
        losses(runs),
        policy(runs),
    ]


# --- scores -------------------------------------------------------------------------------------


def accuracy(runs: Sequence[Run]) -> Chart:
    title = "Accuracy in training, and memory-free scores on held-out problems"
    figure = line_figure("step (policy updates)", "share correct", share=True)
    columns, parts = [], []
    for number, run in enumerate(runs):
        steps, values = run.series("accuracy")
        if steps:
            add_line(
                figure, steps, values, f"{run.name}: train", number, legend=False, opacity=0.25
            )
            add_line(figure, steps, smoothed(values), f"{run.name}: train, smoothed", number)
            columns.append((f"{run.name} train", steps, values))
            parts.append(from_to(f"{run.name}: training accuracy", steps, values, share=True))
        points = [(s["step"], s) for _, s in run.points() if is_number(s.get("average"))]
        if points:
            add_evaluations(figure, run, number, points)
            at, scores = [step for step, _ in points], [s["average"] for _, s in points]
            columns.append((f"{run.name} held out", at, scores))
            for side, name in enumerate(("low", "high")):
                bounds = [(s.get("interval") or [None, None])[side] for _, s in points]
                columns.append((f"{run.name} held out, 95% {name}", at, bounds))
            parts.append(from_to(f"{run.name}: held-out score", at, scores, share=True))
    if not columns:
        return lacking("accuracy", title, "No run here has finished a step or an evaluation.")
    parts += add_references(figure, runs)
    figure.update_yaxes(range=[0, 1]) if _top(columns) > 0.6 else None
    note = (
        "Training: share of a step's rollouts that are correct, faint, and its running mean. "
        "Held out: avg@k without memory in the prompt, with its 95% bootstrap interval over "
        "problems. Dotted: uniform guessing; dash-dotted: the best constant answer."
    )
    return draw("accuracy", title, note, joined(parts), figure, *series_table(columns))


def unit_tests(runs: Sequence[Run]) -> list[Chart]:
    """Of runs on programs: how much of a problem's tests pass, where all must for it to count."""
    title = "Unit tests passed, and how much of the feedback gives expected outputs away"
    figure = line_figure("step (policy updates)", "share", share=True)
    columns, parts = [], []
    for number, run in enumerate(runs):
        scored = [s for _, s in run.points() if is_number(s.get("tests_passed"))]
        held_out = [s["step"] for s in scored], [s["tests_passed"] for s in scored]
        for dash, words, (steps, values) in (
            (0, "tests passed in training", run.series("tests_passed")),
            (1, "tests passed, held out", held_out),
            (2, "feedback that reveals outputs", run.series("feedback/revealed")),
        ):
            if steps:
                add_line(figure, steps, values, f"{run.name}: {words}", number, dash)
                columns.append((f"{run.name} {words}", steps, values))
                parts.append(from_to(f"{run.name}: {words}", steps, values, share=True))
    if not columns:
        return []
    note = (
        "Each rollout's share of tests passed, averaged. Feedback: the share of its characters "
        "that are expected outputs of failed training tests; evaluation's tests give none."
    )
    return [draw("tests", title, note, joined(parts), figure, *series_table(columns))]


def _top(columns: Iterable[tuple[str, Sequence[int], Sequence[Any]]]) -> float:
    return max((v for _, _, values in columns for v in values if v is not None), default=0)


def add_evaluations(
    figure: go.Figure, run: Run, number: int, points: Sequence[tuple[int, Mapping[str, Any]]]
) -> None:
    values = [s["average"] for _, s in points]
    intervals = [s.get("interval") or [v, v] for v, (_, s) in zip(values, points, strict=True)]
    figure.add_trace(
        go.Scatter(
            x=[step for step, _ in points],
            y=values,
            name=label(f"{run.name}: held out"),
            mode="markers+lines",
            marker={"size": 9, "symbol": "diamond", "color": colour(number)},
            line={"color": colour(number), "dash": "dash", "width": 1},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - v for v, (_, high) in zip(values, intervals, strict=True)],
                "arrayminus": [v - low for v, (low, _) in zip(values, intervals, strict=True)],
                "thickness": 1.5,
                "width": 5,
            },
        )
    )


def add_references(figure: go.Figure, runs: Sequence[Run]) -> list[str]:
    """Lines of what needs no policy, one for each value, and their words."""
    parts = []
    for name, words, dash in (
        ("chance", "chance", "dot"),
        ("constant", "best constant answer", "dashdot"),
    ):
        values = {
            s[name] for run in runs for s in run.evaluations.values() if is_number(s.get(name))
        }
        for value in sorted(values):
            figure.add_hline(
                y=value,
                line={"color": GREY, "dash": dash, "width": 1.2},
                annotation={"text": f"{words} {value:.1%}", "font": {"size": 11}},
                annotation_position="top left" if name == "chance" else "bottom right",
            )
            parts.append(f"{words} {value:.1%}")
    return parts


# --- test-time scaling --------------------------------------------------------------------------


def curve(scores: Mapping[str, Any], name: str, end: str) -> dict[int, float]:
    """{k: score}: what the evaluation wrote, or its two ends, k = 1 and all samples."""
    written = scores.get(name)
    if isinstance(written, Mapping) and written:
        return {int(k): v for k, v in sorted(written.items(), key=lambda kv: int(kv[0]))}
    ends = ((1, scores.get("average")), (scores.get("num_samples") or 1, scores.get(end)))
    return {int(k): float(v) for k, v in ends if v is not None}


def scaling(runs: Sequence[Run]) -> Chart:
    title = "Test-time scaling: how much more samples of one problem help"
    figure = line_figure("samples per problem, k", "share of problems", share=True)
    rows: list[list[Any]] = []
    parts, only_ends = [], False
    for number, run in enumerate(runs):
        points = run.points()
        shown = points[-1:] if len(runs) > 1 else [*points[:1], *points[-1:]]
        for name, scores in dict(shown).items():
            for measure, key, end, dash in (
                ("pass@k", "pass_at", "best", 0),
                ("majority@k", "majority_at", "majority", 1),
            ):
                found = curve(scores, key, end)
                if len(found) < 2:
                    continue
                only_ends |= key not in scores
                faint = len(shown) > 1 and name == points[0][0]
                add_line(
                    figure,
                    list(found),
                    list(found.values()),
                    f"{run.name} {name}: {measure}",
                    number,
                    dash,
                    legend=not dash,
                    opacity=0.45 if faint else 1,
                    **_interval(scores.get(f"{key}_interval"), found),
                )
                rows += [[run.name, name, measure, k, v] for k, v in found.items()]
                last = max(found)
                parts.append(
                    f"{run.name} {name}: {measure} from {found[1]:.1%} at k = 1 to "
                    f"{found[last]:.1%} at k = {last}"
                    if 1 in found
                    else f"{run.name} {name}: {measure} {found[last]:.1%} at k = {last}"
                )
    if not rows:
        return lacking(
            "scaling", title, "No run here has an evaluation with more than one sample a problem."
        )
    ks: list[int] = sorted({row[3] for row in rows})
    figure.update_xaxes(type="log", tickvals=ks, ticktext=[str(k) for k in ks])
    note = (
        "pass@k: share of problems with a correct one among k samples; majority@k: whose most "
        "frequent answer of k is correct. pass@k is solid, majority@k dashed; of one run the first "
        "evaluation is shown too, fainter."
    )
    if only_ends:
        note += " Evaluations that wrote no curve show its two ends, k = 1 and all samples."
    columns = ("run", "evaluation", "measure", "k", "share")
    return draw("scaling", title, note, joined(parts), figure, columns, rows)


def _interval(bounds: Any, found: Mapping[int, float]) -> dict[str, Any]:
    if not isinstance(bounds, Mapping):
        return {}
    pairs = [bounds.get(str(k)) or (v, v) for k, v in found.items()]
    values = list(found.values())
    return {
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - v for v, (_, high) in zip(values, pairs, strict=True)],
            "arrayminus": [v - low for v, (low, _) in zip(values, pairs, strict=True)],
            "thickness": 1,
            "width": 3,
        }
    }


def headroom(runs: Sequence[Run]) -> Chart:
    title = "Headroom a verifier could still win: best@k less majority@k"
    figure = line_figure("step (policy updates)", "difference of shares", share=True)
    columns, parts = [], []
    for number, run in enumerate(runs):
        points = [
            (s["step"], s["headroom"]) for _, s in run.points() if is_number(s.get("headroom"))
        ]
        if points:
            steps, values = [p[0] for p in points], [p[1] for p in points]
            add_line(figure, steps, values, run.name, number)
            columns.append((run.name, steps, values))
            parts.append(from_to(f"{run.name}: headroom", steps, values, share=True))
    if not columns:
        return lacking("headroom", title, "No run here has an evaluation.")
    note = "At zero more samples bring nothing that voting does not: the policy says one thing."
    return draw("headroom", title, note, joined(parts), figure, *series_table(columns))


# --- solved sets --------------------------------------------------------------------------------


def solved_sets(runs: Sequence[Run]) -> list[Chart]:
    """Of two runs their last evaluations; of one run its first and its last."""
    title = "Solved sets: which problems one solves and the other does not"
    ends = [
        Side(run.name, colour(number), run, run.points()[-1][1])
        for number, run in enumerate(runs)
        if run.points()
    ]
    if len(ends) >= 2:
        pairs = list(combinations(ends, 2))
    elif ends and len(ends[0].run.points()) >= 2:
        run = ends[0].run
        (first, x), (last, y) = run.points()[0], run.points()[-1]
        pairs = [(Side(first, BEFORE, run, x), Side(last, colour(0), run, y))]
    else:
        sentence = "Solved sets need two evaluations: of two runs, or before and after one."
        return [lacking("solved", title, sentence)]
    charts = [
        compared(f"solved-{i}" if i else "solved", *pair)
        for i, pair in enumerate(pairs[:MAX_PAIRS])
    ]
    if len(pairs) > MAX_PAIRS:
        sentence = (
            f"{len(pairs) - MAX_PAIRS} more pairs of runs are not shown; name two runs alone."
        )
        charts.append(lacking("solved-more", title, sentence))
    return charts


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two evaluations that are compared."""

    name: str
    colour: str
    run: Run
    scores: Mapping[str, Any]


def compared(key: str, a: Side, b: Side) -> Chart:
    title = f"Solved sets: {a.name} and {b.name}"
    one, other = (side.scores.get("per_problem") or {} for side in (a, b))
    shared = sorted(one.keys() & other.keys())
    if not shared:
        sentence = f"{a.name} and {b.name} were not evaluated on problems in common."
        return lacking(key, title, sentence)
    rules = (("any sample correct", 0.0), ("most samples correct", 0.5))
    names = (f"{a.name} only", f"{b.name} only", "both", "none")
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for rule, least in rules:
        sets = metrics.solved_sets(
            {problem: one[problem] for problem in shared},
            {problem: other[problem] for problem in shared},
            least,
        )
        found_by_name = (sets.only_a, sets.only_b, sets.both, sets.neither)
        for name, found in zip(names, found_by_name, strict=True):
            for problem in found:
                counts[rule, a.run.subject(problem)][name] += 1
    subjects = sorted({subject for _, subject in counts})
    groups = [(rule, subject) for rule, _ in rules for subject in subjects]
    figure = go.Figure()
    shown = [f"{subject}, {rule}" for rule, subject in groups]
    for name, tint in zip(names, (a.colour, b.colour, BOTH, NONE), strict=True):
        values = [counts[group][name] for group in groups]
        figure.add_trace(
            go.Bar(y=shown, x=values, name=label(name), orientation="h", marker={"color": tint})
        )
    figure.update_layout(barmode="stack", height=120 + 44 * len(groups), bargap=0.35)
    figure.update_xaxes(title_text="problems")
    figure.update_yaxes(autorange="reversed", automargin=True)
    rows = [[s, rule, *(counts[rule, s][name] for name in names)] for rule, s in groups]
    parts = []
    for rule, _ in rules:
        sums = {name: sum(counts[rule, subject][name] for subject in subjects) for name in names}
        parts.append(f"{rule}: " + ", ".join(f"{name} {count}" for name, count in sums.items()))
    note = f"Counts over the {len(shared)} problems that both evaluations hold."
    if a.run.config.get("task") != b.run.config.get("task"):
        note += " The runs' tasks differ, so equal ids may name different problems."
    return draw(key, title, note, joined(parts), figure, ("subject", "solved means", *names), rows)


# --- words and losses ---------------------------------------------------------------------------


def concepts(runs: Sequence[Run]) -> Chart:
    title = "Words of memory in what the policy writes without memory"
    figure = line_figure("step (policy updates)", "occurrences per 1,000 tokens")
    columns, parts = [], []
    for number, run in enumerate(runs):
        steps, values = run.series("concepts/per_1000_tokens")
        if not steps:
            continue
        add_line(figure, steps, smoothed(values), run.name, number)
        if steps[0] == 0:
            figure.add_hline(y=values[0], line={"color": colour(number), "dash": "dot", "width": 1})
        columns.append((f"{run.name} per 1,000 tokens", steps, values))
        columns.append((f"{run.name} share of rollouts", *run.series("concepts/share")))
        parts.append(from_to(f"{run.name}: occurrences per 1,000 tokens", steps, values))
    if not columns:
        return lacking("concepts", title, "No run here logged how often words of memory occur.")
    note = (
        "The words strategy, lesson, behavior and their forms in training rollouts, running mean. "
        "Dotted: the rate of step 0, which ordinary language has by itself."
    )
    return draw("concepts", title, note, joined(parts), figure, *series_table(columns))


def losses(runs: Sequence[Run]) -> Chart:
    title = "Loss, and what it would be if the teacher read no memory"
    figure = line_figure("step (policy updates)", "nats per token")
    columns, parts = [], []
    for number, run in enumerate(runs):
        for name, words, dash in (
            ("loss", "loss", 0),
            ("loss_without_memory", "without memory", 1),
        ):
            steps, values = run.series(name)
            if steps:
                add_line(figure, steps, values, f"{run.name}: {words}", number, dash)
                columns.append((f"{run.name} {words}", steps, values))
                parts.append(from_to(f"{run.name}: {words}", steps, values))
    if not columns:
        return lacking("loss", title, "No run here logged a loss.")
    note = (
        "Where the two lines meet, memory added nothing to the teacher, or the policy holds what "
        "it said. The second is measured on some steps only (teacher.probe_every)."
    )
    return draw("loss", title, note, joined(parts), figure, *series_table(columns))


def policy(runs: Sequence[Run]) -> Chart:
    title = "The policy's entropy, and the gap between sampler and trainer"
    figure = panels(
        ("entropy of the next token", "|log-probability gap|"),
        "step (policy updates)",
        ("nats",) * 2,
    )
    columns, parts = [], []
    for number, run in enumerate(runs):
        for panel, name in enumerate(("entropy", "logprob_gap"), start=1):
            steps, values = run.series(name)
            if steps:
                add_line(figure, steps, values, run.name, number, panel=panel, legend=panel == 1)
                columns.append((f"{run.name} {name}", steps, values))
                parts.append(from_to(f"{run.name}: {name.replace('_', ' ')}", steps, values))
    if not columns:
        return lacking("policy", title, "No run here logged its entropy.")
    note = (
        "An entropy that falls to zero is a policy that says one thing; a gap is a wrong gradient."
    )
    return draw("policy", title, note, joined(parts), figure, *series_table(columns))
