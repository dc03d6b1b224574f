"""Which held-out questions have a near copy among the training ones.

A memory that is built on training questions finds near copies at evaluation, so scores are also
reported without them. Near: Jaccard similarity of the word trigrams of question and options, at
least `threshold`.

Left out: copies in other words, which trigrams do not see.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from pmd_jax.records import MultipleChoice, Problem

Trigram = tuple[str, ...]


def near_copies(
    held_out: Sequence[Problem], train: Sequence[Problem], threshold: float = 0.7
) -> frozenset[str]:
    """Ids of the held-out problems with a near copy in train."""
    holders: dict[Trigram, list[int]] = defaultdict(list)
    sizes = []
    for number, problem in enumerate(train):
        grams = _trigrams(problem)
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(number)
    found = set()
    for problem in held_out:
        grams = _trigrams(problem)
        shared: dict[int, int] = defaultdict(int)
        for gram in grams:
            for number in holders.get(gram, ()):
                shared[number] += 1
        if any(n >= threshold * (len(grams) + sizes[i] - n) for i, n in shared.items()):
            found.add(problem.id)
    return frozenset(found)


def _trigrams(problem: Problem) -> set[Trigram]:
    options = problem.check.options if isinstance(problem.check, MultipleChoice) else ()
    words = re.findall(r"\w+", " ".join((problem.stem, *options)).lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
