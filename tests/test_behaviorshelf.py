"""What the shelf of behaviors answers follows from what it holds, whatever happened before."""

import dataclasses
import random

import pytest
from fakes import behavior, embed

from pmd_jax.memory.behaviorshelf import BehaviorShelf


def lived(seed, num_changes=400):
    """A shelf after random puts, uses and drops, and the behaviors that it must hold by id."""
    rng, shelf, held = random.Random(seed), BehaviorShelf(), {}
    for step in range(num_changes):
        key = f"behavior_{rng.randrange(40)}@0"
        if key in held and rng.random() < 0.3:
            shelf.drop(key)
            del held[key]
            continue
        kind = rng.choice(["skill", "mistake"])
        new = held.get(key) or behavior(key.removesuffix("@0"), 0, kind, instruction=str(step))
        held[key] = dataclasses.replace(new, uses=rng.randrange(3), last_used=rng.randrange(5))
        shelf.put(held[key])
        if rng.random() < 0.1:
            shelf.nearest(embed(["a question"]), 2, embed)
    return shelf, held


@pytest.mark.parametrize("seed", range(3))
def test_the_shelf_holds_what_was_put_and_not_dropped(seed):
    shelf, held = lived(seed)
    assert shelf.in_order() == tuple(b for _, b in sorted(held.items()))
    assert len(shelf) == len(held)
    assert shelf.counts["skill"] == sum(b.kind == "skill" for b in held.values())
    assert all(shelf.named(b.name) == b.id for b in held.values())
    assert shelf.named("behavior_unknown") is None


@pytest.mark.parametrize("seed", range(3))
def test_the_longest_unretrieved_are_the_first_by_use_and_asking_changes_nothing(seed):
    shelf, held = lived(seed)
    without = set(sorted(held)[::3])
    ranked = sorted(held.values(), key=lambda b: (b.last_used, b.uses, b.id))
    ranked = [b for b in ranked if b.id not in without]
    for num in (0, 1, 5, 99, 5):
        assert shelf.longest_unretrieved(num, without) == ranked[:num]


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_are_those_of_a_shelf_without_history(seed):
    shelf, held = lived(seed)
    fresh = BehaviorShelf()
    for item in held.values():
        fresh.put(item)
    queries = embed(["molar mass 17 and 390", "behavior 3"])
    for kind in (None, "skill", "mistake"):
        found = shelf.nearest(queries, 5, embed, kind)
        assert found == fresh.nearest(queries, 5, embed, kind)
        assert all(kind in (None, held[key].kind) for row in found for _, key in row)


def test_notes_of_use_do_not_pile_up():
    shelf = BehaviorShelf()
    for step in range(1000):
        shelf.put(dataclasses.replace(behavior(), last_used=step))
    assert len(shelf._heap) < 100
