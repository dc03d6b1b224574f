"""What says the same: insights of a problem, and behaviors with what their writer wishes for them.

Insights are compared by their words, behaviors by the cosine of their vectors.

A decision on behaviors (merge, rename, evict) reads them and changes nothing. It looks at what is
kept through one product of the new vectors with all of their kind; everything else costs as much as
there are wishes.

Left out: applying a decision and writing it down (bank.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from pmd_jax.memory import Embed
from pmd_jax.memory.behaviorshelf import BehaviorShelf
from pmd_jax.memory.nearest import first, rounded_cosines
from pmd_jax.records import Behavior, Insight

SAME_WORDS = 0.8
"""Two insights of one problem say the same when they share this part of their words."""


def joined(
    problem_id: str, before: Iterable[Insight], insights: Iterable[Insight]
) -> tuple[list[Insight], list[list[str]]]:
    """(insights of before and new ones, [new id, old id] of those that confirm an old one)."""
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
            experience_ids=united(twin.experience_ids, new.experience_ids),
        )
    return items, confirmed


def _same(one: str, other: str) -> bool:
    """Whether two texts share `SAME_WORDS` of their words, order and punctuation apart."""
    a, b = (set(re.findall(r"\w+", text.casefold())) for text in (one, other))
    return len(a & b) >= SAME_WORDS * len(a | b)


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


def behavior_id(name: str, step: int) -> str:
    return f"{name}@{step}"


def united(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*one, *other]))


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """put: behaviors that are new or changed, by id. removed: ids. merged: [new id, kept id].

    vectors: of the new behaviors, by id, where the text is the one that was embedded.
    """

    put: list[Behavior]
    removed: list[str]
    merged: list[list[str]]
    vectors: Mapping[str, Float[np.ndarray, " D"]]


def decide(
    kept: BehaviorShelf,
    wishes: Sequence[tuple[str, Behavior]],
    step: int,
    embed: Embed,
    merge_similarity: float,
    capacity: int,
) -> Decision:
    """What (kind of operation, behavior) after (kind, behavior) makes of the kept behaviors."""
    rows = np.asarray(embed([behavior.text for _, behavior in wishes]))
    draft = _Draft(kept)
    similar = _similar(kept, wishes, rows, embed)
    merged = []
    for number, (operation, new) in enumerate(wishes):
        namesake = draft.named(new.name)
        if namesake is not None and operation == "UPDATE":
            new = _absorbed(new, draft.pop(namesake))
        near = [pair for pair in similar[number] if pair[1] not in draft.gone]
        near += draft.similar(new.kind, rows[number], rows)
        for cosine, twin in first(near, 1):
            if cosine >= merge_similarity:
                draft.put(_absorbed(draft.get(twin), new))
                merged.append([new.id, twin])
                break
        else:
            name = _free_name(new.name, draft)
            new = dataclasses.replace(new, name=name, id=behavior_id(name, step))
            draft.add(new, number)
    draft.evict(capacity)
    own = draft.added.items()
    vectors = {
        key: rows[number] for key, number in own if draft.get(key).text == wishes[number][1].text
    }
    return Decision(draft.changes(), sorted(draft.removed()), merged, vectors)


class _Draft:
    """The kept behaviors as they would be, as differences. gone: ids whose kept text is void.

    added: id -> number of the wish, of what the wishes added.
    """

    def __init__(self, kept: BehaviorShelf) -> None:
        self.kept = kept
        self.gone: set[str] = set()
        self.added: dict[str, int] = {}
        self._changed: dict[str, Behavior] = {}
        self._ids: dict[str, str | None] = {}

    def get(self, key: str) -> Behavior:
        behavior = self._changed.get(key) or self.kept.get(key)
        assert behavior is not None
        return behavior

    def named(self, name: str) -> str | None:
        """The id of the behavior of this name."""
        return self._ids[name] if name in self._ids else self.kept.named(name)

    def put(self, behavior: Behavior) -> None:
        self._changed[behavior.id] = behavior
        self._ids[behavior.name] = behavior.id

    def add(self, behavior: Behavior, number: int) -> None:
        self.put(behavior)
        self.added[behavior.id] = number

    def pop(self, key: str) -> Behavior:
        behavior = self.get(key)
        self.gone.add(key)
        self._changed.pop(key, None)
        self.added.pop(key, None)
        self._ids[behavior.name] = None
        return behavior

    def similar(
        self, kind: str, vector: Float[np.ndarray, " D"], rows: Float[np.ndarray, "M D"]
    ) -> list[tuple[float, str]]:
        """(cosine, id) of what earlier wishes added."""
        keys = [key for key in self.added if self._changed[key].kind == kind]
        others = rows[[self.added[key] for key in keys]]
        return list(zip(rounded_cosines(vector.astype(np.float64), others), keys, strict=True))

    def evict(self, capacity: int) -> None:
        """Beyond capacity the longest unretrieved go."""
        size = len(self.kept) - len(self.removed()) + sum(k not in self.kept for k in self._changed)
        num_excess = max(0, size - capacity)
        untouched = self.kept.longest_unretrieved(num_excess, self._changed.keys() | self.gone)
        candidates = [*self._changed.values(), *untouched]
        candidates.sort(key=lambda b: (b.last_used, b.uses, b.id))
        for behavior in candidates[:num_excess]:
            self.pop(behavior.id)

    def removed(self) -> set[str]:
        return {key for key in self.gone if key not in self._changed and key in self.kept}

    def changes(self) -> list[Behavior]:
        return [b for key, b in sorted(self._changed.items()) if self.kept.get(key) != b]


def _similar(
    kept: BehaviorShelf,
    wishes: Sequence[tuple[str, Behavior]],
    rows: Float[np.ndarray, "M D"],
    embed: Embed,
) -> list[list[tuple[float, str]]]:
    """Per wish the nearest kept behaviors of its kind: one, and one more for each that an UPDATE
    may take away."""
    k = 1 + sum(operation == "UPDATE" for operation, _ in wishes)
    similar: list[list[tuple[float, str]]] = [[] for _ in wishes]
    for kind in ("skill", "mistake"):
        numbers = [i for i, (_, behavior) in enumerate(wishes) if behavior.kind == kind]
        found = kept.nearest(rows[numbers], k, embed, kind) if numbers else []
        for number, pairs in zip(numbers, found, strict=True):
            similar[number] = pairs
    return similar


def _absorbed(kept: Behavior, other: Behavior) -> Behavior:
    """`kept`, with the provenance and the uses of `other` as well."""
    return dataclasses.replace(
        kept,
        insight_ids=united(kept.insight_ids, other.insight_ids),
        uses=kept.uses + other.uses,
        last_used=max(kept.last_used, other.last_used),
    )


def _free_name(name: str, draft: _Draft) -> str:
    """`name`, or the first of name_2, name_3, ... that is not taken."""
    number = 1
    free = name
    while draft.named(free) is not None:
        number += 1
        free = f"{name}_{number}"
    return free
