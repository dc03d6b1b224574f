"""What generated tasks share: pools whose splits never meet, and problems by families in turn.

The same configuration gives the same problems, byte for byte, on every machine: randomness comes
from `random.Random` seeded with text.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from pmd_jax.records import Problem, Split
from pmd_jax.tasks.task import TaskConfig

Item = TypeVar("Item")

# Of every five neighbouring numbers or entities, three are for training.
RESIDUES: dict[str, tuple[int, ...]] = {"train": (0, 1, 3), "validation": (4,), "test": (2,)}
TRIES = 400  # draws of a family until one is new


@dataclasses.dataclass(frozen=True)
class Pool:
    """What one split may draw from."""

    rng: random.Random
    split: Split

    def number(self, low: float, high: float, step: float) -> float:
        """A multiple of `step` between `low` and `high` that belongs to this split."""
        first, last = round(low / step), round(high / step)
        mine = [i for i in range(first, last + 1) if i % 5 in RESIDUES[self.split]]
        return round(self.rng.choice(mine) * step, 9)

    def entity(self, items: Sequence[Item]) -> Item:
        """One of `items` (five or more) that belongs to this split."""
        mine = [item for i, item in enumerate(items) if i % 5 in RESIDUES[self.split]]
        return self.rng.choice(mine)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a problem stands. name: its family. number: within its split, from 0."""

    subject: str
    name: str
    split: Split
    number: int


Families = Mapping[str, Sequence[tuple[str, Callable[[Pool], Any]]]]
"""{subject: (name, family) of each}"""

Make = Callable[[Callable[[Pool], Any], Pool, Place], Problem | None]
"""(family, its pool, place) -> a problem, or None where this draw gives none."""


def chosen_families(
    config: TaskConfig, families: Families
) -> list[tuple[str, str, Callable[[Pool], Any]]]:
    """(subject, name, family), subjects taking turns, so that any prefix is balanced.

    Raises ValueError for a subject or a family that is not known.
    """
    if config.subject and config.subject not in families:
        raise ValueError(
            f"config.task.subject: must be one of {', '.join(families)}, or '' for all; "
            f"got {config.subject!r}"
        )
    subjects = [config.subject] if config.subject else list(families)
    known = [name for subject in subjects for name, _ in families[subject]]
    for name in config.families:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"config.task.families: unknown family {name!r}; {hint}known: {', '.join(known)}"
            )
    columns = [[(subject, *family) for family in families[subject]] for subject in subjects]
    turns = [entry for row in zip_longest(*columns) for entry in row if entry is not None]
    return [entry for entry in turns if not config.families or entry[1] in config.families]


def generate(
    config: TaskConfig, families: Families, make: Make
) -> tuple[tuple[Problem, ...], dict[Split, tuple[Problem, ...]]]:
    """(worked examples, problems by split). Examples come first, so train never repeats them."""
    chosen = chosen_families(config, families)
    seen: set[str] = set()

    def many(split: Split, count: int, label: str) -> tuple[Problem, ...]:
        problems = []
        for i in range(count):
            subject, name, family = chosen[i % len(chosen)]
            pool = Pool(random.Random(f"{config.seed}/{label}/{name}/{i}"), split)
            place = Place(subject, name, split, i)
            problems.append(_new_problem(family, pool, place, make, seen))
        return tuple(problems)

    examples = many("train", config.format_shots, "shots")
    return examples, {
        "train": many("train", config.num_train, "train"),
        "validation": many("validation", config.num_validation, "validation"),
        "test": many("test", config.num_test, "test"),
    }


def _new_problem(
    family: Callable[[Pool], Any], pool: Pool, place: Place, make: Make, seen: set[str]
) -> Problem:
    for _ in range(TRIES):
        problem = make(family, pool, place)
        if problem is not None and problem.stem not in seen:
            seen.add(problem.stem)
            return problem
    raise ValueError(
        f"config.task.num_{place.split}: the family {place.name} has no more different questions "
        f"than asked before number {place.number}; ask for fewer, or for more families"
    )
