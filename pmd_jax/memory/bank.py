"""The bank: three levels of memory as a deterministic state machine.

    level 0  experience  attempts as they were, per problem        capacity per outcome
    level 1  insight     strategies and lessons, per problem       capacity per kind
    level 2  behavior    skills and mistakes, over all problems    one capacity

The same calls in the same order give the same bank, byte for byte, so many processes can hold
replicas. Every change is first decided, then written down as an event, then applied by the one
function that also replays events: `Bank.replay` needs no model, because what a model decided (two
behaviors say the same) is in the event as an outcome. A saved bank is its events, and loading it is
replaying them. A text never changes under its id.

A call costs as much as what it brings and evicts, however much the bank holds; `apply_operations`
also compares its new behaviors with all of their kind.

The paper gives no capacities, eviction rules or file formats; all of these are ours.

Left out: how records lie in memory (shelf.py, behaviorshelf.py) and events on disk (journal.py,
store.py), which behaviors say the same (merging.py), who writes the texts (reflection.py,
behaviors.py) and who reads them (teacher.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from pmd_jax.memory import Embed, prompts, store
from pmd_jax.memory.behaviorshelf import BehaviorShelf
from pmd_jax.memory.journal import Journal
from pmd_jax.memory.merging import Operation, decide, joined
from pmd_jax.memory.shelf import Shelf
from pmd_jax.memory.store import Damaged as Damaged  # what `load` raises
from pmd_jax.records import Behavior, Experience, Insight, from_dict, to_dict


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryConfig:
    """How much is kept, and for how long.

    lifetime: "run" keeps memory for the run; "step" forgets it when the next step begins
        (PMD-Transient); "frozen" never changes it.
    path: a saved bank to start from: its folder, a run's, or that of one of a run's steps.
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


class Bank:
    """Three levels of memory. Mutators take the current step, which may not go back."""

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        self._step = 0
        self._prompts_version: int | None = prompts.VERSION
        self._journal = Journal()
        self._clear()

    def _clear(self) -> None:
        self._experiences = Shelf(
            Experience, lambda e: "successes" if e.verdict.correct else "failures"
        )
        self._insights = Shelf(Insight, lambda i: i.kind)
        self._behaviors = BehaviorShelf()
        self._newest: dict[str, int] = {}
        self._abstracted: dict[str, int] = {}

    # --- readers ----------------------------------------------------------------------------

    @property
    def is_frozen(self) -> bool:
        """Whether writing has no effect, so that nobody needs to write."""
        return self.config.lifetime == "frozen"

    @property
    def problem_ids(self) -> tuple[str, ...]:
        """Problems with an experience or an insight, sorted."""
        return tuple(sorted(self._experiences.problem_ids | self._insights.problem_ids))

    @property
    def behaviors(self) -> tuple[Behavior, ...]:
        """All behaviors, sorted by id."""
        return self._behaviors.in_order()

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """All changes since the bank was empty, oldest first, as plain JSON values.

        Reads the whole history back from where it lies.
        """
        return tuple(self._journal)

    def experiences(self, problem_id: str) -> tuple[Experience, ...]:
        """Attempts at one problem, oldest first."""
        return self._experiences.get(problem_id)

    def insights(self, problem_id: str) -> tuple[Insight, ...]:
        """Insights of one problem: strategies, then lessons, the most trusted of each first."""
        return self._insights.get(problem_id)

    def newest_insight(self, problem_id: str) -> int | None:
        """The step of the problem's latest insight, None where it has none."""
        return self._newest.get(problem_id)

    def nearest_behaviors(
        self, queries: Float[np.ndarray, "Q D"], k: int, embed: Embed
    ) -> list[list[Behavior]]:
        """Per query the k nearest behaviors, nearest first; of equals the lower id first.

        embed: gives the vectors of behaviors; one that is lent always is asked once per text.
        """
        found = self._behaviors.nearest(queries, k, embed)
        return [[self._behaviors[key] for _, key in row] for row in found]

    def abstracted_at(self, problem_id: str) -> int | None:
        """The step at which the problem's insights were last read for behaviors."""
        return self._abstracted.get(problem_id)

    def sizes(self) -> dict[str, int]:
        """Number of records per level, and of the kinds within it."""
        experiences, insights = self._experiences.counts, self._insights.counts
        return {
            "problems": len(self._experiences.problem_ids | self._insights.problem_ids),
            "experiences": experiences.total(),
            "successes": experiences["successes"],
            "failures": experiences["failures"],
            "insights": insights.total(),
            "strategies": insights["strategy"],
            "lessons": insights["lesson"],
            "behaviors": len(self._behaviors),
            "skills": self._behaviors.counts["skill"],
            "mistakes": self._behaviors.counts["mistake"],
        }

    # --- mutators: decide, then commit ------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Open a step. Where lifetime is "step", what earlier steps remembered is forgotten."""
        forget = self.config.lifetime == "step" and step > self._step
        self._commit("begin_step", step, forget=forget)

    def remember(self, step: int, experiences: Iterable[Experience]) -> None:
        """Add attempts. One whose text is already kept with the same outcome is passed over."""
        kept: dict[str, list[Experience]] = {}
        added: dict[str, Experience] = {}
        evicted = []
        for new in experiences:
            if new.problem_id not in kept:
                kept[new.problem_id] = list(self.experiences(new.problem_id))
            items = kept[new.problem_id]
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
        items, confirmed = joined(problem_id, before, insights)
        kept = self._most_trusted(items)
        if kept != before:
            ids = {i.id for i in kept}
            self._commit(
                "rewrite_insights",
                step,
                problem_id=problem_id,
                insights=kept,
                confirmed=confirmed,
                evicted=[i.id for i in items if i.id not in ids],
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
        wishes = [(op.kind, op.behavior) for op in operations if op.behavior is not None]
        if not wishes or self.is_frozen:
            return
        config = self.config
        decision = decide(
            self._behaviors, wishes, step, embed, config.merge_similarity, config.behaviors
        )
        self._commit(
            "apply_operations",
            step,
            put=decision.put,
            removed=decision.removed,
            merged=decision.merged,
        )
        self._behaviors.learn(decision.vectors, embed)

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
        self._record(to_dict({"event": name, "step": step, **payload}))

    def _record(self, event: Mapping[str, Any]) -> None:
        line = store.line(event)  # first: what cannot be written must not happen
        self._apply(event)
        self._journal.append(line)

    # --- events -----------------------------------------------------------------------------

    @classmethod
    def replay(cls, events: Iterable[Mapping[str, Any]], config: MemoryConfig) -> Bank:
        """The bank that these events describe, without any model."""
        bank = cls(config)
        for event in events:
            bank.follow(event)
        return bank

    @property
    def num_events(self) -> int:
        """Changes so far: what `rewound` takes."""
        return len(self._journal)

    def rewound(self, num_events: int) -> Bank:
        """The bank as it was after its first `num_events` changes."""
        bank = Bank.replay(itertools.islice(self._journal, num_events), self.config)
        bank._prompts_version = self._prompts_version
        return bank

    def follow(self, event: Mapping[str, Any]) -> None:
        """Do what another bank did, by its event."""
        self._record(event)

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
                added = [from_dict(Experience, fields) for fields in event["added"]]
                self._experiences.add(added)
                self._experiences.drop(event["evicted"], dict.fromkeys(e.problem_id for e in added))
            case "rewrite_insights":
                self._insights.replace(event["problem_id"], ())
                self._newest.pop(event["problem_id"], None)
                self._put_insights(event["insights"])
            case "apply_operations":
                for key in event["removed"]:
                    self._behaviors.drop(key)
                for fields in event["put"]:
                    self._behaviors.put(from_dict(Behavior, fields))
            case "mark_abstracted":
                self._abstracted.update(
                    (sys.intern(problem_id), step) for problem_id in event["problem_ids"]
                )
            case "cite":
                for key, count in event["uses"].items():
                    old = self._behaviors[key]
                    self._behaviors.put(
                        dataclasses.replace(old, uses=old.uses + count, last_used=step)
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
        self._clear()
        self._experiences.add(from_dict(Experience, f) for f in records.get("experiences", ()))
        self._put_insights(records.get("insights", ()))
        for fields in records.get("behaviors", ()):
            self._behaviors.put(from_dict(Behavior, fields))
        self._abstracted = {f["problem_id"]: f["step"] for f in records.get("abstracted", ())}

    def _put_insights(self, items: Iterable[Mapping[str, Any]]) -> None:
        for fields in items:
            new = from_dict(Insight, fields)
            self._insights.add([new])
            key = sys.intern(new.problem_id)
            self._newest[key] = max(new.step, self._newest.get(key, new.step))

    def digest(self) -> str:
        """sha256 (hex) of all events: equal for replicas that saw the same calls."""
        return self._journal.digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bank):
            return NotImplemented
        mine, theirs = ((b.config, b._step, b.digest(), b.records()) for b in (self, other))
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
            return cls.load(store.find_bank(Path(config.path)), config)
        bank = cls(config)
        bank._commit("inherit", 0, records=_inherited(cls.load(store.find_bank(Path(config.path)))))
        return bank

    def save(self, folder: Path) -> None:
        """Write the bank into a folder, all of it or nothing, in place of one saved there before.

        Full segments of events that an earlier save wrote are linked, not written again.
        Raises ValueError where `folder` holds anything else.
        """
        config = dataclasses.asdict(self.config)
        header = {"step": self._step, "config": config, "prompts_version": self._prompts_version}
        self._journal.save(folder, header)

    @classmethod
    def load(cls, folder: Path, config: MemoryConfig | None = None) -> Bank:
        """The bank in `folder`, under its own config where none is given.

        Raises ValueError naming the file that is missing, damaged or of another format.
        """
        header, journal = Journal.load(folder)
        bank = cls(config or MemoryConfig(**header["config"]))
        if bank.is_frozen:  # its texts were written by the prompts of then
            bank._prompts_version = header.get("prompts_version")
        for event in journal:
            bank._apply(event)
        bank._journal = journal
        return bank


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
