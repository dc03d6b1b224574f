"""Records of one level of memory by problem, packed: about the bytes of their text.

A record in memory is its values as JSON in UTF-8. Python's own objects would take a few hundred
bytes more per record, and twice or four times the text as soon as it holds one Greek letter or one
emoji. The id of the problem, with which the ids of attempts begin, is left out of a pack: it stands
for itself as one NUL, a byte that JSON never holds. Readers unpack a problem at a time.

Left out: capacities and evictions (bank.py); behaviors, which belong to no problem
(behaviorshelf.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, KeysView
from typing import Generic, TypeVar

from pmd_jax.records import Experience, Insight, from_dict, to_dict

Kept = TypeVar("Kept", bound=Experience | Insight)

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Shelf(Generic[Kept]):
    """Records of one kind in the order of each problem. counts: number of records per label."""

    def __init__(self, kind: type[Kept], label: Callable[[Kept], str]) -> None:
        self._kind, self._label = kind, label
        self._fields = [field.name for field in dataclasses.fields(kind)]
        self._packs: dict[str, tuple[bytes, ...]] = {}
        self.counts: Counter[str] = Counter()

    @property
    def problem_ids(self) -> KeysView[str]:
        """Problems with a record, in no order."""
        return self._packs.keys()

    def get(self, problem_id: str) -> tuple[Kept, ...]:
        return tuple(self._unpack(problem_id, pack) for pack in self._packs.get(problem_id, ()))

    def add(self, records: Iterable[Kept]) -> None:
        """Put each record behind those of its problem."""
        for record in records:
            packs = self._packs.get(record.problem_id, ())
            self._set(record.problem_id, (*packs, self._pack(record)))
            self.counts[self._label(record)] += 1

    def replace(self, problem_id: str, records: Iterable[Kept]) -> None:
        """The records of a problem, in place of those before."""
        self.counts.subtract(self._label(record) for record in self.get(problem_id))
        self._set(problem_id, ())
        self.add(records)

    def drop(self, ids: Collection[str], likely: Iterable[str]) -> None:
        """Forget the records of these ids. likely: problems to look into before all others."""
        wanted = set(ids)
        if not wanted:
            return
        for problem_id in itertools.chain(tuple(likely), self._packs):
            packs = self._packs.get(problem_id, ())
            records = [self._unpack(problem_id, pack) for pack in packs]
            found = [record for record in records if record.id in wanted]
            if found:
                self.counts.subtract(map(self._label, found))
                pairs = zip(records, packs, strict=True)
                self._set(problem_id, tuple(pack for r, pack in pairs if r.id not in wanted))
                wanted.difference_update(record.id for record in found)
                if not wanted:
                    return

    def _set(self, problem_id: str, packs: tuple[bytes, ...]) -> None:
        if packs:
            self._packs[sys.intern(problem_id)] = packs
        else:
            self._packs.pop(problem_id, None)

    def _pack(self, record: Kept) -> bytes:
        text = _encode(list(to_dict(record).values()))
        if key := _encode(record.problem_id)[1:-1]:
            text = text.replace(key, "\0")
        return text.encode("utf-8", "surrogatepass")

    def _unpack(self, problem_id: str, pack: bytes) -> Kept:
        text = pack.decode("utf-8", "surrogatepass").replace("\0", _encode(problem_id)[1:-1])
        return from_dict(self._kind, dict(zip(self._fields, json.loads(text), strict=True)))
