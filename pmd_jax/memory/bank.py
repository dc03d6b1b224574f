"""The bank: three levels of memory as a deterministic state machine.

    level 0  experience  attempts as they were, per problem        capacity per outcome
    level 1  insight     strategies and lessons, per problem       capacity per kind
    level 2  behavior    skills and mistakes, over all problems    one capacity

The same calls in the same order give the same bank, byte for byte, so many processes can hold
replicas. Every change is first decided, then written down as an event, then applied by the one
function that also replays events: `Bank.replay` needs no model, because what a model decided (two
behaviors say the same) is in the event as an outcome. A text never changes under its id.

The paper gives no capacities, eviction rules or file formats; all of these are ours.

Left out: who writes the texts (reflection.py, behaviors.py), who reads them (teacher.py), and bytes
on disk (store.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pmd_jax.memory import Embed, store
from pmd_jax.records import Behavior, Experience, Insight, from_dict, to_dict

SAME_WORDS = 0.8
"""Two insights of one problem say the same when they share this part of their words."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryConfig:
    """How much is kept, and for how long.

    lifetime: "run" keeps memory for the run; "step" forgets it when the next step begins
        (PMD-Transient); "frozen" never changes it.
    path: folder of a saved bank to start from.
    successes_per_problem, failures_per_problem: experiences; the oldest go first.
    strategies_per_problem, lessons_per_problem: insights; the lowest success ratio goes first,
        then the oldest.
    behaviors: the longest unretrieved go first.
    merge_similarity: cosine from which two behaviors of one kind count as one.
    """

    lifetime: Literal["run", "step", "frozen"] = "run"
    path: str = ""
    successes_per_problem: int = 2
    failures_per_problem: int = 4
    strategies_per_problem: int = 3
    lessons_per_problem: int = 3
    behaviors: int = 120
    merge_similarity: float = 0.90

    def __post_init__(self) -> None:
        if self.lifetime == "frozen" and not self.path:
            raise ValueError("path: must name a saved bank where lifetime is frozen; got ''")
        if self.lifetime == "step" and self.path:
            raise ValueError(
                "path: must be empty where lifetime is step, which forgets what was before; "
                f"got {self.path!r}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{field.name}: must be at least 0; got {value}")
        if not 0 < self.merge_similarity <= 1:
            raise ValueError(
                f"merge_similarity: must be above 0 and at most 1; got {self.merge_similarity}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One change of behavior memory, as its writer wishes it; the bank decides what becomes of it.

    ADD a new behavior; UPDATE the one of the same name; NONE changes nothing and has no behavior.
    """

    kind: Literal["ADD", "UPDATE", "NONE"]
    behavior: Behavior | None = None

    def __post_init__(self) -> None:
        if (self.kind == "NONE") != (self.behavior is None):
            raise ValueError(f"behavior: must be given for ADD and UPDATE alone; got {self}")


class Bank:
    """Three levels of memory. Mutators take the current step, which may not go back."""

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        self._step = 0
        self._experiences: dict[str, list[Experience]] = {}
        self._insights: dict[str, list[Insight]] = {}
        self._behaviors: dict[str, Behavior] = {}
        self._abstracted: dict[str, int] = {}
        self._events: list[dict[str, Any]] = []

    # --- readers ----------------------------------------------------------------------------

    @property
    def is_frozen(self) -> bool:
        """Whether writing has no effect, so that nobody needs to write."""
        return self.config.lifetime == "frozen"

    @property
    def problem_ids(self) -> tuple[str, ...]:
        """Problems with an experience or an insight, sorted."""
        return tuple(sorted(self._experiences.keys() | self._insights.keys()))

    @property
    def behaviors(self) -> tuple[Behavior, ...]:
        """All behaviors, sorted by id."""
        return tuple(self._behaviors[key] for key in sorted(self._behaviors))

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """All changes since the bank was empty, oldest first, as plain JSON values."""
        return tuple(self._events)

    def experiences(self, problem_id: str) -> tuple[Experience, ...]:
        """Attempts at one problem, oldest first."""
        return tuple(self._experiences.get(problem_id, ()))

    def insights(self, problem_id: str) -> tuple[Insight, ...]:
        """Insights of one problem: strategies, then lessons, the most trusted of each first."""
        return tuple(self._insights.get(problem_id, ()))

    def abstracted_at(self, problem_id: str) -> int | None:
        """The step at which the problem's insights were last read for behaviors."""
        return self._abstracted.get(problem_id)

    def sizes(self) -> dict[str, int]:
        """Number of records per level, and of the kinds within it."""
        experiences = [e for items in self._experiences.values() for e in items]
        insights = [i for items in self._insights.values() for i in items]
        num_correct = sum(e.verdict.correct for e in experiences)
        num_strategies = sum(i.kind == "strategy" for i in insights)
        num_skills = sum(b.kind == "skill" for b in self._behaviors.values())
        return {
            "problems": len(self.problem_ids),
            "experiences": len(experiences),
            "successes": num_correct,
            "failures": len(experiences) - num_correct,
            "insights": len(insights),
            "strategies": num_strategies,
            "lessons": len(insights) - num_strategies,
            "behaviors": len(self._behaviors),
            "skills": num_skills,
            "mistakes": len(self._behaviors) - num_skills,
        }

    # --- mutators: decide, then commit ------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Open a step. Where lifetime is "step", what earlier steps remembered is forgotten."""
        forget = self.config.lifetime == "step" and step > self._step
        self._commit("begin_step", step, forget=forget)

    def remember(self, step: int, experiences: Iterable[Experience]) -> None:
        """Add attempts. One whose text is already kept with the same outcome is passed over."""
        kept = {key: list(items) for key, items in self._experiences.items()}
        added: dict[str, Experience] = {}
        evicted = []
        for new in experiences:
            items = kept.setdefault(new.problem_id, [])
            same = [e for e in items if e.verdict.correct == new.verdict.correct]
            if any(e.text.strip() == new.text.strip() for e in same):
                continue
            items.append(new)
            added[new.id] = new
            capacity = (
                self.config.successes_per_problem
                if new.verdict.correct
                else self.config.failures_per_problem
            )
            for old in [*same, new][: max(0, len(same) + 1 - capacity)]:
                items.remove(old)
                # An attempt that came and went within this call never was in memory.
                if added.pop(old.id, None) is None:
                    evicted.append(old.id)
        if added or evicted:
            self._commit("remember", step, added=list(added.values()), evicted=evicted)

    def rewrite_insights(self, step: int, problem_id: str, insights: Iterable[Insight]) -> None:
        """Join new insights to those of the problem, and keep the most trusted of each kind.

        A new one that says the same as an old one confirms it: the old text stays, with the new
        success ratio and step and the attempts of both.
        """
        before = self.insights(problem_id)
        items = list(before)
        confirmed = []
        for new in insights:
            if new.problem_id != problem_id:
                raise ValueError(f"insights: must be of {problem_id}; got one of {new.problem_id}")
            twin = next((i for i in items if i.kind == new.kind and _same(i.text, new.text)), None)
            if twin is None:
                items.append(new)
                continue
            confirmed.append([new.id, twin.id])
            items[items.index(twin)] = dataclasses.replace(
                twin,
                step=new.step,
                success_ratio=new.success_ratio,
                experience_ids=_united(twin.experience_ids, new.experience_ids),
            )
        kept = self._most_trusted(items)
        if kept != before:
            ids = {i.id for i in kept}
            evicted = [i.id for i in items if i.id not in ids]
            self._commit(
                "rewrite_insights",
                step,
                problem_id=problem_id,
                insights=kept,
                confirmed=confirmed,
                evicted=evicted,
            )

    def _most_trusted(self, items: Iterable[Insight]) -> tuple[Insight, ...]:
        ranked = sorted(items, key=lambda i: (-i.success_ratio, -i.step, i.id))
        strategies = [i for i in ranked if i.kind == "strategy"]
        lessons = [i for i in ranked if i.kind == "lesson"]
        return (
            *strategies[: self.config.strategies_per_problem],
            *lessons[: self.config.lessons_per_problem],
        )

    def apply_operations(self, step: int, operations: Iterable[Operation], embed: Embed) -> None:
        """Change behavior memory.

        ADD under a name that is taken gets a number; UPDATE of a name that is unknown adds. What
        resembles a kept behavior of its kind (cosine of `Behavior.text` at least
        `merge_similarity`) is merged into it: the kept text stays, insight ids are united, uses
        summed. Beyond capacity the longest unretrieved go: lowest last_used, then uses, then id.
        """
        wanted = [(op.kind, op.behavior) for op in operations if op.behavior is not None]
        if not wanted or self.is_frozen:
            return
        kept = dict(self._behaviors)
        texts = [b.text for b in kept.values()] + [b.text for _, b in wanted]
        rows = embed(texts)
        vectors = dict(zip(kept, rows, strict=False))
        merged = []
        for (kind, new), vector in zip(wanted, rows[len(vectors) :], strict=True):
            namesake = next((b for b in kept.values() if b.name == new.name), None)
            if namesake is not None and kind == "UPDATE":
                new = _absorbed(new, kept.pop(namesake.id))
            similar = [
                (float(vectors[b.id] @ vector), b.id) for b in kept.values() if b.kind == new.kind
            ]
            cosine, twin = max(similar, default=(-1.0, ""))
            if cosine >= self.config.merge_similarity:
                kept[twin] = _absorbed(kept[twin], new)
                merged.append([new.id, twin])
                continue
            name = _free_name(new.name, {b.name for b in kept.values()})
            new = dataclasses.replace(new, name=name, id=behavior_id(name, step))
            kept[new.id], vectors[new.id] = new, vector
        ranked = sorted(kept.values(), key=lambda b: (b.last_used, b.uses, b.id))
        kept = {b.id: b for b in ranked[max(0, len(ranked) - self.config.behaviors) :]}
        self._commit(
            "apply_operations",
            step,
            put=[b for key, b in sorted(kept.items()) if self._behaviors.get(key) != b],
            removed=sorted(self._behaviors.keys() - kept.keys()),
            merged=merged,
        )

    def mark_abstracted(self, step: int, problem_ids: Iterable[str]) -> None:
        """Note that the insights of these problems were read for behaviors at this step."""
        if ids := sorted(set(problem_ids)):
            self._commit("mark_abstracted", step, problem_ids=ids)

    def cite(self, step: int, ids: Iterable[str]) -> None:
        """Count one use of a behavior for every time that its id occurs.

        Teacher prompts cite insights and attempts as well; ids of these are passed over.
        """
        uses = Counter(key for key in ids if key in self._behaviors)
        if uses:
            self._commit("cite", step, uses=dict(sorted(uses.items())))

    def _commit(self, name: str, step: int, **payload: Any) -> None:
        if self.is_frozen:
            return
        if step < self._step:
            raise ValueError(f"step: the bank is at {self._step} and does not go back; got {step}")
        event = to_dict({"event": name, "step": step, **payload})
        self._apply(event)
        self._events.append(event)

    # --- events -----------------------------------------------------------------------------

    @classmethod
    def replay(cls, events: Iterable[Mapping[str, Any]], config: MemoryConfig) -> Bank:
        """The bank that these events describe, without any model."""
        bank = cls(config)
        for event in events:
            bank._apply(event)
            bank._events.append(dict(event))
        return bank

    def _apply(self, event: Mapping[str, Any]) -> None:
        """Bring the state up to date with one event: the only place where the state changes."""
        step = event["step"]
        match event["event"]:
            case "inherit":
                self._fill(event["records"])
            case "begin_step":
                if event["forget"]:
                    self._fill({})
            case "remember":
                evicted = set(event["evicted"])
                for fields in event["added"]:
                    self._experiences.setdefault(fields["problem_id"], []).append(
                        from_dict(Experience, fields)
                    )
                if evicted:
                    self._experiences = {
                        key: [e for e in items if e.id not in evicted]
                        for key, items in self._experiences.items()
                    }
            case "rewrite_insights":
                items = [from_dict(Insight, fields) for fields in event["insights"]]
                self._insights[event["problem_id"]] = items
            case "apply_operations":
                for key in event["removed"]:
                    del self._behaviors[key]
                for fields in event["put"]:
                    self._behaviors[fields["id"]] = from_dict(Behavior, fields)
            case "mark_abstracted":
                self._abstracted.update(dict.fromkeys(event["problem_ids"], step))
            case "cite":
                for key, count in event["uses"].items():
                    old = self._behaviors[key]
                    self._behaviors[key] = dataclasses.replace(
                        old, uses=old.uses + count, last_used=step
                    )
            case unknown:
                raise ValueError(f"event: must be one that this version writes; got {unknown!r}")
        self._step = step

    # --- the state as records ---------------------------------------------------------------

    def records(self) -> dict[str, list[dict[str, Any]]]:
        """The whole state as plain JSON values, per level, in an order that history cannot change.

        Problems come sorted; the records of one problem come in the order of their readers.
        """
        return {
            "experiences": [to_dict(e) for p in self.problem_ids for e in self.experiences(p)],
            "insights": [to_dict(i) for p in self.problem_ids for i in self.insights(p)],
            "behaviors": [to_dict(b) for b in self.behaviors],
            "abstracted": [
                {"problem_id": p, "step": step} for p, step in sorted(self._abstracted.items())
            ],
        }

    def _fill(self, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        experiences = [from_dict(Experience, fields) for fields in records.get("experiences", ())]
        insights = [from_dict(Insight, fields) for fields in records.get("insights", ())]
        behaviors = [from_dict(Behavior, fields) for fields in records.get("behaviors", ())]
        self._experiences = _by_problem(experiences)
        self._insights = _by_problem(insights)
        self._behaviors = {b.id: b for b in behaviors}
        self._abstracted = {f["problem_id"]: f["step"] for f in records.get("abstracted", ())}

    def digest(self) -> str:
        """sha256 (hex) of step and state: equal for replicas that saw the same."""
        return store.sha256(store.lines([{"step": self._step}, self.records()]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bank):
            return NotImplemented
        mine, theirs = ((b.config, b._step, b.records(), b._events) for b in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]  # it changes

    # --- files ------------------------------------------------------------------------------

    @classmethod
    def open(cls, config: MemoryConfig) -> Bank:
        """The bank that a run starts with: empty, or what `config.path` holds.

        A frozen bank is taken as it is. Otherwise the run inherits: its step 0 comes after all
        that the saved bank has seen, so steps are moved below 0, and ids get "earlier:" in front,
        since both runs may write the same ones.
        """
        if not config.path:
            return cls(config)
        if config.lifetime == "frozen":
            return cls.load(Path(config.path), config)
        bank = cls(config)
        bank._commit("inherit", 0, records=_inherited(cls.load(Path(config.path))))
        return bank

    def save(self, folder: Path) -> None:
        """Write the bank into a folder, all of it or nothing, in place of one saved there before.

        Raises ValueError where `folder` holds anything else.
        """
        header = {
            "step": self._step,
            "digest": self.digest(),
            "config": dataclasses.asdict(self.config),
        }
        store.write_tables(folder, header, {**self.records(), "events": self._events})

    @classmethod
    def load(cls, folder: Path, config: MemoryConfig | None = None) -> Bank:
        """The bank in `folder`, under its own config where none is given.

        Raises ValueError naming the file that is missing, damaged or of another format.
        """
        header, tables = store.read_tables(folder)
        bank = cls(config or MemoryConfig(**header["config"]))
        bank._events = tables.pop("events")
        bank._fill(tables)
        bank._step = header["step"]
        if bank.digest() != header["digest"]:
            raise ValueError(
                f"{folder}: damaged, its records do not give the digest in manifest.json; "
                "take another copy"
            )
        return bank


def behavior_id(name: str, step: int) -> str:
    return f"{name}@{step}"


# --- what says the same -------------------------------------------------------------------------


def _same(one: str, other: str) -> bool:
    """Whether two texts share `SAME_WORDS` of their words, order and punctuation apart."""
    a, b = (set(re.findall(r"\w+", text.casefold())) for text in (one, other))
    return len(a & b) >= SAME_WORDS * len(a | b)


def _united(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *second]))


def _absorbed(kept: Behavior, other: Behavior) -> Behavior:
    """`kept`, with the provenance and the uses of `other` as well."""
    return dataclasses.replace(
        kept,
        insight_ids=_united(kept.insight_ids, other.insight_ids),
        uses=kept.uses + other.uses,
        last_used=max(kept.last_used, other.last_used),
    )


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or the first of name_2, name_3, ... that is not taken."""
    number = 1
    free = name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _by_problem(items: Iterable[Any]) -> dict[str, list[Any]]:
    grouped: dict[str, list[Any]] = {}
    for item in items:
        grouped.setdefault(item.problem_id, []).append(item)
    return grouped


def _inherited(bank: Bank) -> dict[str, list[dict[str, Any]]]:
    """The records of another run's bank: steps moved below 0, ids marked as earlier."""
    shift = bank._step + 1

    def moved(fields: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(fields)
        for name in ("step", "last_used"):
            if name in result:
                result[name] -= shift
        for name in ("experience_ids", "insight_ids"):
            if name in result:
                result[name] = [f"earlier:{key}" for key in result[name]]
        if "id" in result:
            result["id"] = f"earlier:{result['id']}"
        return result

    return {name: [moved(fields) for fields in items] for name, items in bank.records().items()}
