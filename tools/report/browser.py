"""The memory browser's data: every entry that ever was in memory, and a selection of rollouts.

All of it is columns and indexes, so that a bank of 100,000 entries stays small, and each text is
held once. What does not fit the budgets below is left out, counted, and said on the page:

    entries     all of them, with the steps of their coming, changes and going
    texts       insights and behaviors in full; experiences up to EXPERIENCE_CHARS in all, those
                still in memory first, then the latest
    rollouts    MAX_ROLLOUTS of those logged, of at most ROLLOUT_BYTES: for each behavior the last
                rollout whose teacher was shown it, then an equal share of every step, those with
                the most loss first

Several runs share the budgets evenly. Left out: how the data is written into the page (page.py) and
shown (static/).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pmd_jax.memory import teacher
from pmd_jax.memory.dynamics import LEVELS, Entry
from pmd_jax.records import Behavior, from_dict
from tools.report.runs import Run, is_number, read_row

EXPERIENCE_CHARS = 24_000_000
ENTRY_CHARS = 6_000  # of one text; the rest of it is cut, and said to be
MAX_ROLLOUTS = 2_000
ROLLOUT_BYTES = 24_000_000
BLOCK_ROLLOUTS = 100  # unpacked together, when one of them is opened
NATS = 10_000  # divergences are sent as whole ten-thousandths of a nat

HEADINGS = {
    "strategies": teacher.STRATEGIES.strip(),
    "lessons": teacher.LESSONS.strip(),
    "behaviors": teacher.BEHAVIORS.strip(),
    "experience": teacher.EXPERIENCE.strip(),
    "sibling": teacher.SIBLING.strip(),
    "feedback": teacher.FEEDBACK.strip(),
    "": teacher.CLOSING.strip(),
}


@dataclasses.dataclass(frozen=True)
class Browser:
    """index: columns of entries and rollouts. blocks: whole rollouts, BLOCK_ROLLOUTS at a time."""

    index: dict[str, Any]
    blocks: list[list[dict[str, Any]]]


def browse(run: Run, num_runs: int = 1) -> Browser:
    """num_runs: runs on the page, which share the budgets."""
    entries = list(run.memory.entries.values()) if run.memory else []
    number = {entry.id: i for i, entry in enumerate(entries)}
    problems = _Numbers()
    subjects = _Numbers()
    columns = _columns(run, entries, number, problems, subjects)
    columns["text"], cut, without = _texts(entries, EXPERIENCE_CHARS // num_runs)
    chosen = choose(run, MAX_ROLLOUTS // num_runs, ROLLOUT_BYTES // num_runs)
    rollouts = {
        "id": [row["rollout"] for row in chosen],
        "step": [row["step"] for row in chosen],
        "problem": [problems[row["problem"]] for row in chosen],
        "correct": [int(bool(row["correct"])) for row in chosen],
        "loss": [_short(row["loss_nats"]) for row in chosen],
        "cited": [[number.get(key, key) for key in row["cited"]] for row in chosen],
    }
    index = {
        "name": run.name,
        "lastStep": max(_last_steps(run, entries), default=0),
        "entries": columns,
        "rollouts": rollouts,
        "blockSize": BLOCK_ROLLOUTS,
        "problems": problems.names,
        "subjectOf": [subjects[run.subject(name)] for name in problems.names],
        "subjects": subjects.names,
        "logged": len(run.rows),
        "cutTexts": cut,
        "withoutText": without,
    }
    return Browser(index, list(_blocks(run, chosen, entries, number)))


class _Numbers:
    """Numbers for names, in the order in which they are first asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._known: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = len(self.names)
            self.names.append(name)
        return self._known[name]


def _short(value: Any) -> float | None:
    return float(f"{value:.4g}") if is_number(value) else None


def _last_steps(run: Run, entries: Iterable[Entry]) -> Iterable[int]:
    yield from (row["step"] for row in run.metrics[-1:])
    yield from (step for entry in entries for step, _ in entry.changes[-1:])


# --- entries ------------------------------------------------------------------------------------


def _columns(
    run: Run,
    entries: Sequence[Entry],
    number: Mapping[str, int],
    problems: _Numbers,
    subjects: _Numbers,
) -> dict[str, list[Any]]:
    uses = Counter(key for row in run.rows for key in row["cited"])
    columns: dict[str, list[Any]] = defaultdict(list)
    for entry in entries:
        known = [key for key in entry.source_ids if key in number]
        of = {run.subject(entry.problem_id)} if entry.problem_id else set()
        ratio = entry.fields.get("success_ratio")
        if entry.level == "behavior":
            insights = [entries[number[key]] for key in known]
            of = {run.subject(i.problem_id) for i in insights} or {"unknown"}
            ratios = [i.fields["success_ratio"] for i in insights]
            ratio = sum(ratios) / len(ratios) if ratios else None
        problem = problems[entry.problem_id] if entry.problem_id else -1
        columns["id"].append(entry.id.removeprefix(entry.problem_id) if problem >= 0 else entry.id)
        columns["level"].append(LEVELS.index(entry.level))
        columns["kind"].append(entry.kind)
        columns["problem"].append(problem)
        columns["subject"].append([subjects[name] for name in sorted(of)])
        columns["written"].append(entry.fields["step"])
        columns["added"].append(entry.added)
        columns["removed"].append(entry.removed)
        columns["ratio"].append(_short(ratio))
        columns["sources"].append([number.get(key, key) for key in entry.source_ids])
        columns["cited"].append(uses[entry.id])
        columns["name"].append(entry.fields.get("name", ""))
        columns["changes"].append(_changes(entry))
    return dict(columns)


def _changes(entry: Entry) -> list[list[Any]]:
    """[step, success ratio or uses, number of sources] after each change."""
    found: list[list[Any]] = []
    state: dict[str, Any] = {}
    if entry.level == "experience":
        return found
    for step, fields in entry.changes:
        state |= fields
        sources = state.get("experience_ids") or state.get("insight_ids") or ()
        found.append([step, _short(state.get("success_ratio", state.get("uses"))), len(sources)])
    return found


def _texts(entries: Sequence[Entry], budget: int) -> tuple[list[str | None], int, int]:
    """(a text per entry or None, how many were cut short, how many were left out)."""
    texts: list[str | None] = [None] * len(entries)
    cut = 0
    # Experiences last: those in memory first, then the latest.
    order = sorted(
        range(len(entries)),
        key=lambda i: (
            entries[i].level == "experience",
            entries[i].removed is not None,
            -entries[i].added,
        ),
    )
    for i in order:
        text = text_of(entries[i])
        short = text[:ENTRY_CHARS]
        if entries[i].level == "experience":
            budget -= len(short)
            if budget < 0:
                continue
        cut += len(short) < len(text)
        texts[i] = short + f" [{len(text) - len(short):,} more characters]" * (short != text)
    return texts, cut, sum(text is None for text in texts)


def text_of(entry: Entry) -> str:
    fields = entry.fields
    if entry.level == "behavior":
        return "\n".join(part for part in (fields["when"], fields["instruction"]) if part)
    return str(fields["text"])


# --- rollouts -----------------------------------------------------------------------------------


def choose(run: Run, most: int, num_bytes: int) -> list[dict[str, Any]]:
    """The rollouts to show, in the order of the log; the rule stands at the top of this file."""
    rows = run.rows
    entries = run.memory.entries if run.memory else {}
    showing: dict[str, int] = {}
    for i, row in enumerate(rows):
        for key in row["cited"]:
            if key in entries and entries[key].level == "behavior":
                showing[key] = i
    by_step: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_step[row["step"]].append(i)
    ranked = [
        sorted(items, key=lambda i: (-(rows[i]["loss_nats"] or 0), i)) for items in by_step.values()
    ]
    in_turns = (
        i for turn in itertools.zip_longest(*_spread(ranked)) for i in turn if i is not None
    )
    chosen: set[int] = set()
    for i in itertools.chain(sorted(set(showing.values()), reverse=True), in_turns):
        if len(chosen) >= most:
            break
        if i not in chosen and rows[i]["size"] <= num_bytes:
            num_bytes -= rows[i]["size"]
            chosen.add(i)
    return [rows[i] for i in sorted(chosen)]


def _spread(steps: Sequence[list[int]]) -> list[list[int]]:
    """Steps in an order whose every beginning is spread over the run: their bits reversed."""
    bits = max(1, (len(steps) - 1).bit_length())
    order = sorted(range(len(steps)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [steps[i] for i in order]


def _blocks(
    run: Run,
    chosen: Sequence[Mapping[str, Any]],
    entries: Sequence[Entry],
    number: Mapping[str, int],
) -> Iterable[list[dict[str, Any]]]:
    path = run.folder / "samples.jsonl"
    for start in range(0, len(chosen), BLOCK_ROLLOUTS):
        part = chosen[start : start + BLOCK_ROLLOUTS]
        whole = read_row(path, (row["offset"] for row in part))
        yield [_rollout(row, entries, number) for row in whole]


def _rollout(
    row: Mapping[str, Any], entries: Sequence[Entry], number: Mapping[str, int]
) -> dict[str, Any]:
    pieces, nats = row.get("pieces"), row.get("token_nats")
    if not pieces or not nats or len(pieces) != len(nats):
        pieces = nats = None
    student, prompt = row.get("student_prompt") or "", row.get("teacher_prompt") or ""
    cited = {
        number[key]: shown_text(entries[number[key]])
        for key in row.get("cited") or ()
        if key in number
    }
    return {
        "student": student,
        "teacher": segments(student, prompt, cited),
        "response": None if pieces else row.get("response") or "",
        "pieces": pieces,
        "nats": [round(NATS * x) if is_number(x) else 0 for x in nats] if nats else None,
        **{name: row.get(name) for name in ("answer", "reward", "well_formed", "feedback", "stop")},
        **{name: row.get(name) for name in ("subtask", "has_guidance", "advantage")},
        "section_tokens": row.get("section_tokens") or {},
        "cut_tokens": row.get("cut_tokens") or {},
    }


def shown_text(entry: Entry) -> str:
    """An insight or a behavior as a teacher's prompt shows it; "" for an experience."""
    if entry.level == "experience":
        return ""
    return from_dict(Behavior, entry.fields).text if entry.level == "behavior" else text_of(entry)


def segments(
    student: str, prompt: str, cited: Mapping[int, str]
) -> list[tuple[str, str, int | None]]:
    """The teacher's prompt as (text, section, number of the entry it shows) in order.

    section: "" for what the student reads too. What the teacher reads beyond that is one stretch,
    whatever the layout and the chat template, and its sections begin with their headings.
    """
    start = _common(student, prompt)
    tail = min(_common(student[::-1], prompt[::-1]), min(len(student), len(prompt)) - start)
    inner = prompt[start : len(prompt) - tail]
    found: list[tuple[str, str, int | None]] = [(prompt[:start], "", None)]
    places = sorted((inner.find(text), name) for name, text in HEADINGS.items() if text in inner)
    bounds = [(0, ""), *places, (len(inner), "")]
    for (begin, name), (end, _) in itertools.pairwise(bounds):
        found += _marked(inner[begin:end], name, cited)
    found.append((prompt[len(prompt) - tail :], "", None))
    return [segment for segment in found if segment[0]]


def _marked(text: str, section: str, cited: Mapping[int, str]) -> list[tuple[str, str, int | None]]:
    """One section, with the entries that it shows as segments of their own."""
    places = sorted((text.find(shown), i) for i, shown in cited.items() if shown and shown in text)
    found: list[tuple[str, str, int | None]] = []
    at = 0
    for begin, i in places if section else ():
        if begin >= at:
            found += [(text[at:begin], section, None), (cited[i], section, i)]
            at = begin + len(cited[i])
    return [*found, (text[at:], section, None)]


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
