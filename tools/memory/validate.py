"""Whether a bank is whole and makes sense: every byte, every event, every reference.

A check that fails does not stop the others, as far as they can go without it: damaged files are all
named, but their events are not read.

Left out: whether the texts are any good.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmd_jax.memory import store
from pmd_jax.memory.bank import Bank, MemoryConfig
from tools.memory.card import CARD, card_problems, read_card
from tools.memory.views import entries, problem_of

Event = Mapping[str, Any]


@dataclasses.dataclass
class Report:
    """checked: what was checked, with counts. problems: what is wrong, one line each."""

    checked: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def validate(folder: Path) -> Report:
    """All that can be checked of the bank in `folder` without a model."""
    report = Report()
    if (folder / CARD).exists():
        _check_card(folder, report)
    lines, config = _check_files(folder, report)
    if report.problems or config is None:
        return report
    events = _check_events(lines, report)
    if not report.problems:
        bank = _check_replay(folder, events, config, report)
        if bank is not None:
            _check_history(events, report)
            _check_state(bank, report)
    return report


def _check_card(folder: Path, report: Report) -> None:
    try:
        card = read_card(folder / CARD)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
        return
    report.problems += card_problems(folder, card)
    report.checked.append(f"card: version, sha256, {len(card.files)} files, digest and counts")


def _check_files(folder: Path, report: Report) -> tuple[list[bytes], MemoryConfig | None]:
    """The lines of all segments; and the bank's configuration, None where the manifest is bad."""
    try:
        header, segments = store.read_manifest(folder)
        config = MemoryConfig(**header["config"])
    except (ValueError, OSError, TypeError, KeyError) as error:
        report.problems.append(f"{folder / 'manifest.json'}: must be a manifest; got {error}")
        return [], None
    lines = []
    for segment in segments:
        try:
            lines += store.read_segment(folder, segment)
        except (ValueError, OSError) as error:
            report.problems.append(str(error))
    num_bytes = sum(map(len, lines))
    report.checked.append(f"files: manifest.json and {len(segments)} of events, {num_bytes} bytes")
    return lines, config


def _check_events(lines: list[bytes], report: Report) -> list[Event]:
    """All events; each must be one line of canonical JSON, and their steps may not go back."""
    events: list[Event] = []
    step = None
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            is_canonical = store.line(event) == line
            at = event["step"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            report.problems.append(f"event {number}: must be a JSON object with a step; {error}")
            continue
        if not is_canonical:
            report.problems.append(f"event {number}: must be canonical JSON; got {line[:60]!r}")
        if step is not None and at < step:
            report.problems.append(f"event {number}: step must not go back from {step}; got {at}")
        events.append(event)
        step = at
    report.checked.append(f"events: {len(events)}, canonical, their steps in order")
    return events


def _check_replay(
    folder: Path, events: list[Event], config: MemoryConfig, report: Report
) -> Bank | None:
    """The bank that the events give, which must be the one that is loaded."""
    done = 0

    def counted() -> Iterator[Event]:
        nonlocal done
        for event in events:
            done += 1
            yield event

    try:
        bank = Bank.replay(counted(), config)
        loaded = Bank.load(folder)
    except (ValueError, KeyError, TypeError) as error:
        report.problems.append(f"event {done}: must replay; got {type(error).__name__}: {error}")
        return None
    if bank != loaded:
        report.problems.append(f"{folder}: its events must give the bank that is loaded; not so")
    report.checked.append(f"replay: {done} events, digest {bank.digest()[:12]}")
    return bank


# --- the history --------------------------------------------------------------------------------


def _check_history(events: list[Event], report: Report) -> None:
    """Texts under their ids, and what insights and behaviors were made of, in the order of events.

    An insight may cite an attempt that was never kept: the reflector reads the whole group, and
    memory passes over what is said already. Such an attempt must be of the insight's own problem
    and of no later step. Ids of an earlier run ("earlier:") stand for what this bank never saw.
    """
    texts: dict[str, str] = {}
    experiences: set[str] = set()
    insights: set[str] = set()
    seen: Counter[str] = Counter()

    def told(level: str, fields: Mapping[str, Any], text: str) -> None:
        key = fields["id"]
        if texts.setdefault(f"{level} {key}", text) != text:
            report.problems.append(f"{level} {key}: its text must never change; it did")

    for number, event in enumerate(events, start=1):
        name, step = event["event"], event["step"]
        records = event["records"] if name == "inherit" else {}
        for fields in [*event.get("added", ()), *records.get("experiences", ())]:
            if fields["id"] in experiences:
                report.problems.append(
                    f"event {number}: experience {fields['id']} must be remembered once; not so"
                )
            told("experience", fields, fields["text"])
            experiences.add(fields["id"])
        for fields in [*event.get("insights", ()), *records.get("insights", ())]:
            told("insight", fields, fields["text"])
            insights.add(fields["id"])
            for key in fields["experience_ids"]:
                if key in experiences:
                    seen["to an experience"] += 1
                elif key.startswith("earlier:"):
                    seen["to an earlier run"] += 1
                elif problem_of(key) == fields["problem_id"] and _step_of(key) <= step:
                    seen["to an attempt that was not kept"] += 1
                else:
                    report.problems.append(
                        f"insight {fields['id']}: experience_ids must be attempts at its problem "
                        f"up to step {step}; got {key}"
                    )
        for fields in [*event.get("put", ()), *records.get("behaviors", ())]:
            told("behavior", fields, f"{fields['when']}\n{fields['instruction']}")
            for key in fields["insight_ids"]:
                if key in insights:
                    seen["to an insight"] += 1
                elif key.startswith("earlier:"):
                    seen["to an earlier run"] += 1
                else:
                    report.problems.append(
                        f"behavior {fields['id']}: insight_ids must be insights written before; "
                        f"got {key}"
                    )
    report.problems[:] = dict.fromkeys(report.problems)
    parts = ", ".join(f"{number} {kind}" for kind, number in sorted(seen.items())) or "none"
    report.checked.append(f"references: {parts}")
    report.checked.append(f"texts: {len(texts)}, each one under its id for good")


def _step_of(key: str) -> float:
    """The step in the id of an attempt, <problem>@<step>.<sample>; infinite where it is none."""
    step = key.rpartition("@")[2].partition(".")[0]
    return int(step) if step.isdigit() else float("inf")


# --- the state ----------------------------------------------------------------------------------


def _check_state(bank: Bank, report: Report) -> None:
    """Ids, texts and capacities of what is kept now."""
    found = entries(bank)
    twice = [key for key, n in Counter((e.level, e.id) for e in found).items() if n > 1]
    report.problems += [
        f"{level} {key}: ids must be unique; it is there twice" for level, key in twice
    ]
    report.checked.append(f"ids: {len(found)}, unique within their level")

    empty = Counter[str]()
    for entry in found:
        names = ("name", "instruction") if entry.level == "behavior" else ("text",)
        for name in names:
            if entry.fields[name].strip():
                continue
            if entry.level == "experience":  # a policy may answer nothing, and that is what it did
                empty["attempts without a word"] += 1
            else:
                report.problems.append(f"{entry.level} {entry.id}: {name} must not be empty")
    told = "".join(f", {n} {kind}" for kind, n in empty.items())
    report.checked.append(f"texts of insights and behaviors: none empty{told}")
    _check_capacities(bank, report)


def _check_capacities(bank: Bank, report: Report) -> None:
    """No more of a kind than its capacity, per problem or over all.

    What was inherited may be more, until something is written beside it; a frozen bank is as it
    came.
    """
    config = bank.config
    if config.lifetime == "frozen":
        report.checked.append("capacities: none, the bank is frozen")
        return
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries(bank):
        if entry.level == "experience":
            of, about = entry.fields["problem_id"], entry.about
        elif entry.level == "insight":
            of, about = entry.fields["problem_id"], entry.fields["kind"]
        else:
            of, about = "all problems", "behavior"
        groups.setdefault((of, about), []).append(entry.id)
    capacities = {
        "correct": config.successes_per_problem,
        "wrong": config.failures_per_problem,
        "strategy": config.strategies_per_problem,
        "lesson": config.lessons_per_problem,
        "behavior": config.behaviors,
    }
    names = {"correct": "successes", "wrong": "failures", "strategy": "strategies"}
    for (of, about), keys in groups.items():
        is_inherited = all(key.startswith("earlier:") for key in keys)
        if len(keys) > capacities[about] and not is_inherited:
            kind = names.get(about, f"{about}s")
            report.problems.append(
                f"{of}: must hold at most {capacities[about]} {kind}; got {len(keys)}"
            )
    report.checked.append(f"capacities: {len(groups)} groups of a problem and a kind")
