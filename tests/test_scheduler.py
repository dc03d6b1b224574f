"""Who sits where: the longest first, no more members of a slot than its table has, and packing."""

import numpy as np
import pytest

from pmd_jax.policy.scheduler import Scheduler, Seat, Shape, power_of_two, shape_for


def seats(scheduler):
    """{(shard, row): (prompt, sample)}"""
    return {(f, row): (seat.prompt, seat.sample) for f, row, seat in scheduler.live()}


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ((8, 8, 32, 1), Shape(1, 8, 32, 5)),  # slots for twice the rows, 1.25 x 32 / 8 members
        ((8, 8, 64, 1), Shape(1, 8, 64, 8)),  # everything at once
        ((32, 8, 64, 1), Shape(1, 16, 64, 5)),
        ((5, 1, 64, 1), Shape(1, 8, 8, 1)),  # one response a prompt: a slot a row
        ((1, 64, 64, 1), Shape(1, 1, 64, 64)),
        ((8, 4, 16, 4), Shape(4, 2, 4, 3)),  # cut over four shards
    ],
)
def test_tables_have_room_for_the_rows(asked, shape):
    found = shape_for(*asked)
    assert found == shape
    assert found.slots * found.members >= found.rows


def test_the_longest_response_goes_first_and_a_free_row_takes_the_next():
    scheduler = Scheduler([[5, 9], [7, 1]], Shape(1, 2, 2, 2))
    assert scheduler.load() == [(0, 0, 0), (0, 1, 1)]
    scheduler.start()
    assert seats(scheduler) == {(0, 0): (0, 1), (0, 1): (1, 0)}  # 9 and 7
    assert scheduler.finish(0, 1) == Seat(slot=1, member=0, prompt=1, sample=0)
    scheduler.start()
    assert seats(scheduler) == {(0, 0): (0, 1), (0, 1): (0, 0)}  # 5 before 1, in either slot
    assert scheduler.has_waiting


def test_a_slot_is_freed_with_its_last_response_and_takes_the_next_prompt():
    scheduler = Scheduler([[3], [2], [1]], Shape(1, 1, 1, 1))
    order = []
    while scheduler.load():
        ((shard, row, seat),) = scheduler.start()
        order.append(seat.prompt)
        scheduler.finish(shard, row)
    assert order == [0, 1, 2] and not scheduler.has_waiting


def test_a_slot_never_has_more_rows_than_its_table():
    scheduler = Scheduler([[9, 9, 9, 9], [1, 1, 1, 1]], Shape(1, 2, 4, 3))
    scheduler.load()
    scheduler.start()
    members, place = scheduler.tables()
    assert sorted(seats(scheduler).values()) == [(0, 1), (0, 2), (0, 3), (1, 3)]
    # Each row stands where its place says, in the table of its slot.
    assert [int(members.reshape(-1)[p]) for p in place[0]] == [0, 1, 2, 3]


def test_prompts_are_spread_over_the_shards():
    scheduler = Scheduler([[4, 4]] * 4, Shape(2, 2, 4, 2))
    assert sorted(scheduler.load()) == [(0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 3)]


def test_tables_shrink_when_nothing_waits_and_half_of_the_rows_are_idle():
    scheduler = Scheduler([[8, 7], [6, 5]], Shape(1, 2, 4, 2))
    scheduler.load()
    scheduler.start()
    assert scheduler.smaller(1) is None
    scheduler.finish(0, 0)  # the response of 8
    assert scheduler.smaller(1) is None
    scheduler.finish(0, 2)  # that of 6
    assert scheduler.smaller(min_rows=4) is None
    shape = scheduler.smaller(min_rows=1)
    assert shape == Shape(1, 2, 2, 1)
    rows, slots = scheduler.move(shape)
    np.testing.assert_array_equal(rows, [[1, 3]])
    np.testing.assert_array_equal(slots, [[0, 1]])
    assert seats(scheduler) == {(0, 0): (0, 1), (0, 1): (1, 1)}


def test_powers_of_two():
    assert [power_of_two(n) for n in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 4, 8, 16]
