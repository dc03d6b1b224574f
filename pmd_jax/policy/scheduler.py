"""Who sits where: prompts in slots, responses in rows. Plain Python, no arrays on a device.

A prompt occupies a slot from its prefill until its last response is done; a response occupies a row
of the same shard. Any row may serve any slot, so a row that falls free takes the longest response
that is still waiting, and a short tail is all that is left at the end. `members` is how many rows
may read one slot at once: the width of the table by which attention gathers them.

Axes: F shards (parts of the batch axis of the mesh), n slots of a shard, b rows of a shard,
M members of a slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

SLACK = 1.25  # members per slot over an even spread, so that long groups may take more rows


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and 1)."""
    return 1 << max(n - 1, 0).bit_length()


class Shape(NamedTuple):
    """Sizes of the tables: shards, slots and rows of a shard, members of a slot."""

    shards: int
    slots: int
    rows: int
    members: int


def shape_for(prompts: int, samples: int, max_rows: int, shards: int) -> Shape:
    """Tables for `prompts` prompts of up to `samples` responses, about `max_rows` rows in all.

    Slots for twice the rows, where prompts are shared: the next prompts wait there, prefilled.
    """
    rows = -(-min(power_of_two(prompts * samples), max_rows) // shards)
    slots = rows if samples == 1 else -(-2 * rows // samples)
    slots = min(slots, power_of_two(-(-prompts // shards)))
    members = min(samples, rows, max(int(-(-SLACK * rows // slots)), 1))
    return Shape(shards, slots, rows, members)


class Seat(NamedTuple):
    """A row in use: its slot and place among the slot's members, its prompt and sample."""

    slot: int
    member: int
    prompt: int
    sample: int


class Scheduler:
    """expected[i][j]: tokens that sample j of prompt i is expected to take. Longest go first."""

    def __init__(self, expected: Sequence[Sequence[float]], shape: Shape):
        self.shape, self.expected = shape, expected
        longest = [max(lengths) for lengths in expected]
        self.queue = sorted(range(len(expected)), key=lambda i: (-longest[i], i))
        self._clear(shape)

    def _clear(self, shape: Shape) -> None:
        self.shape = shape
        shards = range(shape.shards)
        self.prompts: list[list[int | None]] = [[None] * shape.slots for _ in shards]
        self.waiting: list[list[list[int]]] = [[[] for _ in range(shape.slots)] for _ in shards]
        self.seats: list[list[Seat | None]] = [[None] * shape.rows for _ in shards]
        self.free_members = [
            [list(range(shape.members))[::-1] for _ in range(shape.slots)] for _ in shards
        ]

    def live(self) -> Iterator[tuple[int, int, Seat]]:
        """(shard, row, seat) of every row in use."""
        for shard, seats in enumerate(self.seats):
            for row, seat in enumerate(seats):
                if seat is not None:
                    yield shard, row, seat

    @property
    def has_waiting(self) -> bool:
        """Whether a response has no row yet."""
        return bool(self.queue) or any(any(slots) for slots in self.waiting)

    def load(self) -> list[tuple[int, int, int]]:
        """Prompts that now take a free slot, as (shard, slot, prompt)."""
        loads = []
        free = [[s for s, p in enumerate(slots) if p is None][::-1] for slots in self.prompts]
        work = [sum(map(len, slots)) for slots in self.waiting]
        while self.queue and any(free):
            shard = min((s for s in range(self.shape.shards) if free[s]), key=lambda s: work[s])
            slot, prompt = free[shard].pop(), self.queue.pop(0)
            order = sorted(range(len(self.expected[prompt])), key=self.expected[prompt].__getitem__)
            self.prompts[shard][slot], self.waiting[shard][slot] = prompt, order
            work[shard] += len(order)
            loads.append((shard, slot, prompt))
        return loads

    def start(self) -> list[tuple[int, int, Seat]]:
        """Responses that now take a free row, as (shard, row, seat), the longest first."""
        starts = []
        for shard, seats in enumerate(self.seats):
            for row in [row for row, seat in enumerate(seats) if seat is None]:
                slot = self._longest(shard)
                if slot is None:
                    break
                prompt = self.prompts[shard][slot]
                assert prompt is not None
                member = self.free_members[shard][slot].pop()
                seat = Seat(slot, member, prompt, self.waiting[shard][slot].pop())
                seats[row] = seat
                starts.append((shard, row, seat))
        return starts

    def _longest(self, shard: int) -> int | None:
        """The slot of the longest response that waits in a shard and may take a row."""
        best, longest = None, -1.0
        for slot, samples in enumerate(self.waiting[shard]):
            if samples and self.free_members[shard][slot]:
                prompt = self.prompts[shard][slot]
                assert prompt is not None
                length = self.expected[prompt][samples[-1]]
                if length > longest:
                    best, longest = slot, length
        return best

    def finish(self, shard: int, row: int) -> Seat:
        """Frees a row, and its slot when nothing else needs the prompt."""
        seat = self.seats[shard][row]
        assert seat is not None
        self.seats[shard][row] = None
        members = self.free_members[shard][seat.slot]
        members.append(seat.member)
        if len(members) == self.shape.members and not self.waiting[shard][seat.slot]:
            self.prompts[shard][seat.slot] = None
        return seat

    def tables(self) -> tuple[Int[np.ndarray, "F n M"], Int[np.ndarray, "F b"]]:
        """(members, place): the rows that read a slot; slot * M + member of a row. 0 elsewhere."""
        shape = self.shape
        members = np.zeros((shape.shards, shape.slots, shape.members), np.int32)
        place = np.zeros((shape.shards, shape.rows), np.int32)
        for shard, row, seat in self.live():
            members[shard, seat.slot, seat.member] = row
            place[shard, row] = seat.slot * shape.members + seat.member
        return members, place

    def smaller(self, min_rows: int) -> Shape | None:
        """Tables half as large or less in which the live rows still fit, when nothing waits."""
        if self.has_waiting:
            return None
        rows, slots, members = [1], [1], [1]
        for shard in range(self.shape.shards):
            seats = [seat for seat in self.seats[shard] if seat is not None]
            used = [seat.slot for seat in seats]
            rows.append(len(seats))
            slots.append(len(set(used)))
            members += [used.count(slot) for slot in set(used)]
        least = -(-min_rows // self.shape.shards)
        wanted = max(power_of_two(max(rows)), least)
        if 2 * wanted > self.shape.rows:
            return None
        return Shape(
            self.shape.shards,
            min(power_of_two(max(slots)), self.shape.slots),
            wanted,
            min(power_of_two(max(members)), self.shape.members),
        )

    def move(self, shape: Shape) -> tuple[Int[np.ndarray, "F b"], Int[np.ndarray, "F n"]]:
        """Packs the live rows and slots into smaller tables; returns where each comes from."""
        live = list(self.live())
        prompts = self.prompts
        self._clear(shape)
        rows = np.zeros((shape.shards, shape.rows), np.int32)
        slots = np.zeros((shape.shards, shape.slots), np.int32)
        moved: list[dict[int, int]] = [{} for _ in range(shape.shards)]
        taken = [0] * shape.shards
        for shard, row, seat in live:
            slot = moved[shard].setdefault(seat.slot, len(moved[shard]))
            slots[shard, slot] = seat.slot
            self.prompts[shard][slot] = prompts[shard][seat.slot]
            member = self.free_members[shard][slot].pop()
            rows[shard, taken[shard]] = row
            self.seats[shard][taken[shard]] = seat._replace(slot=slot, member=member)
            taken[shard] += 1
        return rows, slots
