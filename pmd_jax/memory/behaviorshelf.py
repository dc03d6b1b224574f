"""All behaviors, with what answers questions about them without a walk over all of them.

    by id, by name       dictionaries
    in order of id       a list of ids, sorted again only after one came or went
    longest unretrieved  a heap; an entry that is no longer true is passed over when it comes up
    nearest              one matrix of vectors per kind, a row per behavior

Vectors are asked for once per text, when the nearest are wanted; they are no part of the state and
of no file. Everything here follows from the behaviors alone, whatever history led to them.

Left out: which behaviors are put and dropped (merging.py decides, bank.py applies).
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Float

from pmd_jax.memory import Embed
from pmd_jax.memory.nearest import Index, first
from pmd_jax.records import Behavior

TEXTS_PER_CALL = 8192
"""How many texts are embedded at once."""


class BehaviorShelf:
    """Behaviors by id. counts: number of behaviors per kind."""

    def __init__(self) -> None:
        self._behaviors: dict[str, Behavior] = {}
        self._ids: dict[str, str] = {}
        self._sorted: list[str] | None = []
        self._heap: list[tuple[int, int, str]] = []
        self._embed: Embed | None = None
        self._indexes: dict[str, Index] = {}
        self._unread: dict[str, None] = {}
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._behaviors)

    def __contains__(self, key: str) -> bool:
        return key in self._behaviors

    def __getitem__(self, key: str) -> Behavior:
        return self._behaviors[key]

    def get(self, key: str) -> Behavior | None:
        return self._behaviors.get(key)

    def named(self, name: str) -> str | None:
        """The id of the behavior of this name."""
        return self._ids.get(name)

    def in_order(self) -> tuple[Behavior, ...]:
        """All behaviors, sorted by id."""
        if self._sorted is None:
            self._sorted = sorted(self._behaviors)
        return tuple(map(self._behaviors.__getitem__, self._sorted))

    # --- changes --------------------------------------------------------------------------------

    def put(self, behavior: Behavior) -> None:
        """A new behavior, or a new state of the one with this id."""
        key, old = behavior.id, self._behaviors.get(behavior.id)
        if old is None or (old.kind, old.text) != (behavior.kind, behavior.text):
            self.drop(key)
            self._unread[key] = None
            self._sorted = None
            self.counts[behavior.kind] += 1
        self._behaviors[key] = behavior
        self._ids[behavior.name] = key
        heapq.heappush(self._heap, _use(behavior))
        if len(self._heap) > 2 * len(self._behaviors) + 64:
            self._heap = [_use(b) for b in self._behaviors.values()]
            heapq.heapify(self._heap)

    def drop(self, key: str) -> None:
        """Forget a behavior, known or not."""
        old = self._behaviors.pop(key, None)
        if old is None:
            return
        if self._ids.get(old.name) == key:
            del self._ids[old.name]
        self.counts[old.kind] -= 1
        self._sorted = None
        if key in self._unread:
            del self._unread[key]
        elif old.kind in self._indexes:
            self._indexes[old.kind].drop(key)

    # --- who goes first -------------------------------------------------------------------------

    def longest_unretrieved(self, num: int, without: Collection[str]) -> list[Behavior]:
        """The `num` lowest by last_used, then uses, then id, but for these ids."""
        uses: list[tuple[int, int, str]] = []
        found: list[Behavior] = []
        while self._heap and len(found) < num:
            use = heapq.heappop(self._heap)
            behavior = self._behaviors.get(use[2])
            if behavior is None or _use(behavior) != use or use in uses[-1:]:
                continue  # no longer true, or said twice
            uses.append(use)
            if use[2] not in without:
                found.append(behavior)
        for use in uses:
            heapq.heappush(self._heap, use)
        return found

    # --- what is near ---------------------------------------------------------------------------

    def nearest(
        self, queries: Float[np.ndarray, "Q D"], k: int, embed: Embed, kind: str | None = None
    ) -> list[list[tuple[float, str]]]:
        """Per query the k nearest behaviors as (cosine, id), nearest first; of equals the lower id.

        kind: of these alone. Texts that `embed` has not seen are embedded first.
        """
        self._read(embed)
        kinds = sorted(self._indexes) if kind is None else [kind] if kind in self._indexes else []
        if not kinds:
            return [[] for _ in queries]
        found = [self._indexes[name].nearest(queries, k) for name in kinds]
        return [first(itertools.chain(*parts), k) for parts in zip(*found, strict=True)]

    def learn(self, vectors: Mapping[str, Float[np.ndarray, " D"]], embed: Embed) -> None:
        """Vectors that `embed` gave for behaviors, by id: it is not asked for these again."""
        if self._embed != embed:
            return
        for key in vectors.keys() & self._unread.keys():
            self._index(key).add({key: vectors[key]})
            del self._unread[key]

    def _read(self, embed: Embed) -> None:
        """Vectors of all behaviors. Those of another `embed` are of no use and are forgotten."""
        if self._embed != embed:
            self._embed, self._indexes = embed, {}
            self._unread = dict.fromkeys(self._behaviors)
        for kind in ("skill", "mistake"):
            keys = [key for key in self._unread if self._behaviors[key].kind == kind]
            for start in range(0, len(keys), TEXTS_PER_CALL):
                some = keys[start : start + TEXTS_PER_CALL]
                rows = embed([self._behaviors[key].text for key in some])
                vectors = dict(zip(some, rows, strict=True))
                self._index(some[0]).add(vectors, expected=self.counts[kind])
        self._unread = {}

    def _index(self, key: str) -> Index:
        return self._indexes.setdefault(self._behaviors[key].kind, Index())


def _use(behavior: Behavior) -> tuple[int, int, str]:
    return behavior.last_used, behavior.uses, behavior.id
