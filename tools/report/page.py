"""The page as one file: static parts, words and states as HTML, data as packed blocks.

A block is JSON, gzip and base64, so that no text of a run is ever markup. Words that stand in the
HTML itself are escaped. The page's content policy admits the two scripts by their hashes and
nothing else, and no connection at all.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import html
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

import pmd_jax
from tools.report.browser import Browser, browse
from tools.report.charts import Chart, colour
from tools.report.learning import learning_charts
from tools.report.remembering import cost_charts, memory_charts
from tools.report.runs import Run, facts

STATIC = Path(__file__).parent / "static"
HEIGHT = 320  # of a chart that asks for no other, in pixels
SCRIPTS = ("charts.js", "browser.js", "detail.js")


def build(runs: Sequence[Run]) -> str:
    """The whole page. Names of runs must differ."""
    sections = [
        ("learning", "Learning", learning_charts(runs)),
        ("dynamics", "Memory dynamics", memory_charts(runs)),
        ("cost", "Cost and batches", cost_charts(runs)),
    ]
    charts = [chart for _, _, found in sections for chart in found]
    blocks = [block("charts", [dataclasses.asdict(c) for c in charts if c.figure])]
    for number, run in enumerate(runs):
        browser: Browser = browse(run, len(runs))
        blocks.append(block(f"memory-{number}", browser.index))
        blocks += [block(f"rollouts-{number}-{i}", part) for i, part in enumerate(browser.blocks)]
    names = ", ".join(run.name for run in runs)
    plotly = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    script = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "title": html.escape(f"{'Run' if len(runs) == 1 else 'Runs'} {names}"),
        "hashes": " ".join(f"'sha256-{digest(text)}'" for text in (plotly, script)),
        "css": (STATIC / "page.css").read_text(encoding="utf-8"),
        "contents": "".join(
            f'<a href="#{key}">{title}</a>'
            for key, title in [(k, t) for k, t, _ in sections] + [("memory", "Memory browser")]
        ),
        "runs": "".join(head(run, number) for number, run in enumerate(runs)),
        "sections": "".join(section(*one) for one in sections),
        "footer": html.escape(
            f"Made by pmd_jax {pmd_jax.__version__} on {time.strftime('%Y-%m-%d %H:%M')} from "
            f"{', '.join(str(run.folder) for run in runs)}."
        ),
        "blocks": "\n".join(blocks),
        "plotly": plotly,
        "script": script,
    }
    template = (STATIC / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def block(name: str, content: Any) -> str:
    """Data that the page's script unpacks when it needs it."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    packed = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="block-{name}">{packed}</script>'


# --- words --------------------------------------------------------------------------------------


def head(run: Run, number: int) -> str:
    lines = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts(run)
    )
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in run.warnings)
    listed = f'<ul class="warning" aria-label="Warnings">{warnings}</ul>' if warnings else ""
    return (
        f'<article class="run" style="border-color: {colour(number)}">'
        f"<h2>{html.escape(run.name)}</h2>"
        f'<p class="state{"" if run.finished else " warning"}">{html.escape(run.state)}</p>'
        f"<dl>{lines}</dl>{listed}</article>"
    )


def section(key: str, title: str, charts: Sequence[Chart]) -> str:
    figures = "".join(figure(chart) for chart in charts)
    return (
        f'<section id="{key}" aria-labelledby="{key}-heading">'
        f'<h2 id="{key}-heading">{html.escape(title)}</h2><div class="charts">{figures}</div>'
        "</section>"
    )


def figure(chart: Chart) -> str:
    title = f'<h3 id="title-{chart.key}">{html.escape(chart.title)}</h3>'
    if not chart.figure:
        missing = f'<p class="note">{html.escape(chart.missing)}</p>'
        return f'<figure id="{chart.key}">{title}{missing}</figure>'
    words = html.escape(chart.alternative)
    return (
        f'<figure id="{chart.key}" aria-labelledby="title-{chart.key}">{title}'
        f"<figcaption>{html.escape(chart.note)}</figcaption>"
        f'<div class="plot" id="plot-{chart.key}" role="img" aria-label="{words}" '
        f'style="min-height: {chart.figure["layout"].get("height", HEIGHT)}px"></div>'
        f'<details id="data-{chart.key}"><summary>In words and numbers</summary><p>{words}</p>'
        '<div class="table" tabindex="0"></div></details></figure>'
    )
