"""How memory lived: what came, stayed, was cited and went, from the events of a bank.

`replay` follows each entry from its first step to its last; `dynamics` counts per step. Both read
events once, in order, and need neither a model nor the bank's texts in memory twice. What teachers
cited beyond behaviors, and what became of a problem afterwards, is in the rows of samples.jsonl,
which `citations` and `utility` take as plain dicts.

A state "at step s" is the one after the last event of s.

Left out: what memory refused before it reached the bank (`reflect/leaked` and `abstract/leaked` of
metrics.jsonl count that), and any claim that memory caused a change: nothing here is an experiment.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pmd_jax.memory.bank import MemoryConfig

LEVELS = ("experience", "insight", "behavior")
CAPACITIES = {
    "success": "successes_per_problem",
    "failure": "failures_per_problem",
    "strategy": "strategies_per_problem",
    "lesson": "lessons_per_problem",
}
"""Kinds with a capacity per problem, and the name of that capacity in MemoryConfig."""


@dataclasses.dataclass(slots=True)
class Entry:
    """One entry from coming to going.

    fields: the record as it was last. kind: success, failure, strategy, lesson, skill or mistake.
    added: step at which it came. removed: step at which it went, None where it is still there; an
    id that comes back counts as never gone. changes: (step, fields that changed -> their value),
    its first state included.
    """

    id: str
    level: str
    kind: str
    problem_id: str
    fields: dict[str, Any]
    added: int
    removed: int | None
    changes: list[tuple[int, dict[str, Any]]]

    @property
    def source_ids(self) -> Sequence[str]:
        """What it was read from: experiences of an insight, insights of a behavior."""
        return self.fields.get("experience_ids") or self.fields.get("insight_ids") or ()

    def at(self, step: int) -> dict[str, Any] | None:
        """The changing fields as they were at `step`, None where it was not in memory."""
        if step < self.added or (self.removed is not None and self.removed <= step):
            return None
        state: dict[str, Any] = {}
        for when, fields in self.changes:
            if when <= step:
                state |= fields
        return state


TRACKED = ("success_ratio", "step", "experience_ids", "insight_ids", "uses", "last_used")
"""Fields that may change under an id."""


@dataclasses.dataclass(frozen=True)
class StepDynamics:
    """What one step did to memory, and how memory stood after it.

    sizes, added, evicted, mean_age: by level. An entry that came and went within one step is in
    none of them. mean_age: steps since an entry came, None for an empty level.
    at_capacity: share of the problems in memory that hold as many of a kind as they may, by kind;
        "behaviors" is the filled share of their one capacity.
    confirmed: new insights that said the same as a kept one. merged: new behaviors likewise.
    updated: behaviors rewritten under their name; they count in neither added nor evicted.
    duplicate_rate: (confirmed or merged) / (those and what was added), by level, None without news.
        An insight that was dropped at once, for want of trust, left no event and is in neither.
    citations: uses of behaviors by teacher prompts, all rollouts of the step.
    cited_behaviors: different ones. citation_entropy_nats: of the uses over behaviors;
        citation_evenness: as a share of log(number of behaviors in memory), its largest value.
        Both None without citations, the latter also where memory holds one behavior.
    """

    step: int
    sizes: dict[str, int]
    at_capacity: dict[str, float]
    added: dict[str, int]
    evicted: dict[str, int]
    mean_age: dict[str, float | None]
    confirmed: int
    merged: int
    updated: int
    duplicate_rate: dict[str, float | None]
    citations: int
    cited_behaviors: int
    citation_entropy_nats: float | None
    citation_evenness: float | None


def replay(events: Iterable[Mapping[str, Any]]) -> dict[str, Entry]:
    """{id: entry} of all that ever was in memory, in the order of its coming."""
    history = _History(MemoryConfig())
    for event in events:
        history.apply(event)
    return history.entries


def dynamics(
    events: Iterable[Mapping[str, Any]], config: MemoryConfig
) -> tuple[list[StepDynamics], dict[str, Entry]]:
    """(one item per step that wrote events, what `replay` gives), in one reading of the events."""
    history, steps = _History(config), []
    step: int | None = None
    for event in events:
        if step is not None and event["step"] != step:
            steps.append(history.close(step))
        step = event["step"]
        history.apply(event)
    if step is not None:
        steps.append(history.close(step))
    return steps, history.entries


class _History:
    """All entries so far, the sums that a step is told from, and the counts of the open step."""

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        self.entries: dict[str, Entry] = {}
        self.present: dict[str, dict[str, Entry]] = {level: {} for level in LEVELS}
        self.of_problem: dict[str, list[str]] = defaultdict(list)  # insights in memory
        self.held: Counter[tuple[str, str]] = Counter()  # (kind, problem) -> entries
        self.full: Counter[str] = Counter()  # kind -> problems at capacity
        self.problems: Counter[str] = Counter()  # problem -> entries
        self.added_sum: Counter[str] = Counter()  # level -> sum of `added` over its entries
        self._open()

    def _open(self) -> None:
        self.added: Counter[str] = Counter()
        self.evicted: Counter[str] = Counter()
        self.fresh: set[str] = set()
        self.uses: Counter[str] = Counter()
        self.confirmed = self.merged = self.updated = 0

    # --- one event ------------------------------------------------------------------------------

    def apply(self, event: Mapping[str, Any]) -> None:
        step = event["step"]
        match event["event"]:
            case "inherit":
                records = event["records"]
                for level in LEVELS:
                    for fields in records.get(f"{level}s", ()):
                        self._put(level, fields, step)
            case "begin_step":
                if event["forget"]:
                    for level in LEVELS:
                        for key in list(self.present[level]):
                            self._drop(level, key, step)
            case "remember":
                for fields in event["added"]:
                    self._put("experience", fields, step)
                for key in event["evicted"]:
                    self._drop("experience", key, step)
            case "rewrite_insights":
                kept = {fields["id"] for fields in event["insights"]}
                for key in [k for k in self.of_problem[event["problem_id"]] if k not in kept]:
                    self._drop("insight", key, step)
                for fields in event["insights"]:
                    self._put("insight", fields, step)
                self.confirmed += len(event["confirmed"])
            case "apply_operations":
                self._operations(event, step)
            case "cite":
                self.uses.update(event["uses"])
                for key, count in event["uses"].items():
                    old = self.entries[key].fields
                    self._put(
                        "behavior", {**old, "uses": old["uses"] + count, "last_used": step}, step
                    )

    def _operations(self, event: Mapping[str, Any], step: int) -> None:
        self.merged += len(event["merged"])
        names = {fields["name"] for fields in event["put"]}
        for key in event["removed"]:
            if self.entries[key].fields["name"] in names:  # the same name, written anew
                self.updated += 1
                if key not in self.fresh:
                    self.evicted["behavior"] -= 1
                    self.added["behavior"] -= 1
            self._drop("behavior", key, step)
        for fields in event["put"]:
            self._put("behavior", fields, step)

    def _put(self, level: str, fields: Mapping[str, Any], step: int) -> None:
        key = fields["id"]
        entry = self.entries.get(key)
        tracked = {name: fields[name] for name in TRACKED if name in fields}
        if entry is None:
            entry = Entry(
                key,
                level,
                _kind(level, fields),
                fields.get("problem_id", ""),
                dict(fields),
                step,
                None,
                [(step, tracked)],
            )
            self.entries[key] = entry
            self._count(entry, 1)
            self.added[level] += 1
            self.fresh.add(key)
            return
        if key not in self.present[level]:  # it comes back
            entry.removed = None
            self._count(entry, 1)
            self.added[level] += 1
        changed = {n: v for n, v in tracked.items() if v != entry.fields.get(n)}
        if changed:
            if entry.changes[-1][0] == step:
                entry.changes[-1] = (step, entry.changes[-1][1] | changed)
            else:
                entry.changes.append((step, changed))
            entry.fields = dict(fields)

    def _drop(self, level: str, key: str, step: int) -> None:
        entry = self.present[level].get(key)
        if entry is None:
            return
        self._count(entry, -1)
        entry.removed = step
        if key in self.fresh:  # it came and went within the step
            self.added[level] -= 1
        else:
            self.evicted[level] += 1

    def _count(self, entry: Entry, sign: int) -> None:
        self.added_sum[entry.level] += sign * entry.added
        if sign > 0:
            self.present[entry.level][entry.id] = entry
        else:
            del self.present[entry.level][entry.id]
        if not entry.problem_id:
            return
        self.problems[entry.problem_id] += sign
        if not self.problems[entry.problem_id]:
            del self.problems[entry.problem_id]
        if entry.level == "insight":
            ids = self.of_problem[entry.problem_id]
            ids.append(entry.id) if sign > 0 else ids.remove(entry.id)
        slot, capacity = (entry.kind, entry.problem_id), self._capacity(entry.kind)
        before = self.held[slot]
        self.held[slot] += sign
        self.full[entry.kind] += (self.held[slot] >= capacity) - (before >= capacity)

    def _capacity(self, kind: str) -> int:
        return max(1, getattr(self.config, CAPACITIES[kind]))

    # --- one step -------------------------------------------------------------------------------

    def close(self, step: int) -> StepDynamics:
        sizes = {level: len(self.present[level]) for level in LEVELS}
        problems = max(len(self.problems), 1)
        entropy = entropy_nats(self.uses.values()) if self.uses else None
        behaviors = sizes["behavior"]
        result = StepDynamics(
            step=step,
            sizes=sizes,
            at_capacity={
                **{kind: self.full[kind] / problems for kind in CAPACITIES},
                "behaviors": behaviors / max(self.config.behaviors, 1),
            },
            added={level: self.added[level] for level in LEVELS},
            evicted={level: self.evicted[level] for level in LEVELS},
            mean_age={
                level: step - self.added_sum[level] / sizes[level] if sizes[level] else None
                for level in LEVELS
            },
            confirmed=self.confirmed,
            merged=self.merged,
            updated=self.updated,
            duplicate_rate={
                "insight": _share(self.confirmed, self.added["insight"]),
                "behavior": _share(self.merged, self.added["behavior"]),
            },
            citations=self.uses.total(),
            cited_behaviors=len(self.uses),
            citation_entropy_nats=entropy,
            citation_evenness=None
            if entropy is None or behaviors < 2
            else entropy / math.log(behaviors),
        )
        self._open()
        return result


def _kind(level: str, fields: Mapping[str, Any]) -> str:
    if level == "experience":
        return "success" if fields["verdict"]["correct"] else "failure"
    return str(fields["kind"])


def _share(repeated: int, added: int) -> float | None:
    return repeated / (repeated + added) if repeated + added else None


def entropy_nats(counts: Iterable[int]) -> float:
    """Entropy of the distribution that counts describe: log(n) for n equal ones."""
    numbers = np.array([count for count in counts if count], dtype=np.float64)
    shares = numbers / numbers.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0


# --- from the rows of samples.jsonl -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepCitations:
    """Retrieval hits of a step: of `rollouts` logged ones, the share whose teacher was shown an
    entry of each level. What is no insight and no behavior in memory is an experience: a sibling's
    solution, or one kept from an earlier visit."""

    step: int
    rollouts: int
    share: dict[str, float]


def citations(
    rows: Iterable[Mapping[str, Any]], entries: Mapping[str, Entry]
) -> list[StepCitations]:
    """Per step in order. rows: of samples.jsonl, with step and cited. entries: of `replay`."""
    hits: dict[int, Counter[str]] = defaultdict(Counter)
    totals: Counter[int] = Counter()
    for row in rows:
        totals[row["step"]] += 1
        hits[row["step"]].update({level_of(key, entries) for key in row["cited"]})
    return [
        StepCitations(
            step, totals[step], {level: hits[step][level] / totals[step] for level in LEVELS}
        )
        for step in sorted(totals)
    ]


def level_of(key: str, entries: Mapping[str, Entry]) -> str:
    return entries[key].level if key in entries else "experience"


@dataclasses.dataclass(frozen=True)
class Utility:
    """Change of a problem's solve rate from one visit to its next, over `visits` pairs.

    mean_change: in shares of rollouts, None without visits. standard_error: of the mean, pairs
    taken as independent, None below two.
    """

    visits: int
    mean_change: float | None
    standard_error: float | None


def utility(rows: Iterable[Mapping[str, Any]], entries: Mapping[str, Entry]) -> dict[str, Utility]:
    """{"cited": ..., "not cited": ...}: visits at which a teacher showed the problem an insight or
    a behavior, against visits at which none did.

    This is no causal claim. Which problems are shown memory is not drawn by lot: hard problems
    gather lessons, rates near 0 can only rise, and the policy learns from all problems in between.
    """
    solved: dict[tuple[str, int], list[bool]] = defaultdict(list)
    shown: dict[tuple[str, int], bool] = defaultdict(bool)
    for row in rows:
        visit = (row["problem"], row["step"])
        solved[visit].append(bool(row["correct"]))
        shown[visit] |= any(level_of(key, entries) != "experience" for key in row["cited"])
    changes: dict[str, list[float]] = {"cited": [], "not cited": []}
    for now, later in _pairs(solved):
        change = float(np.mean(solved[later]) - np.mean(solved[now]))
        changes["cited" if shown[now] else "not cited"].append(change)
    return {name: _utility(values) for name, values in changes.items()}


def _pairs(visits: Iterable[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Each visit of a problem with its next one."""
    ordered = sorted(visits)
    for now, later in itertools.pairwise(ordered):
        if now[0] == later[0]:
            yield now, later


def _utility(changes: Sequence[float]) -> Utility:
    n = len(changes)
    return Utility(
        n,
        float(np.mean(changes)) if n else None,
        float(np.std(changes, ddof=1) / math.sqrt(n)) if n > 1 else None,
    )
