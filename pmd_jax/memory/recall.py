"""What memory gives the teacher for a problem, and the controls that give it something else.

    none      the problem's own insights and kept attempts, and the behaviors nearest to it
    shuffled  those of another problem, which stays the same through the run while it can
    random    as many insights of each kind, kept attempts and behaviors, drawn from all there are
    stale     the problem's own, as memory was `stale_steps` ago

A control shows memory of much the same length that belongs elsewhere: what a policy still gains by
it, it did not gain from what memory says (OP2SD, arXiv 2608.09228; none is in the paper). Only the
reading differs; experience, insights and behaviors are kept as ever.

Left out: what fits into the prompt and how it is worded (teacher.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pmd_jax.memory.bank import Bank
from pmd_jax.memory.retrieval import Retriever
from pmd_jax.records import Behavior, Experience, Insight, Problem

Control = Literal["none", "shuffled", "random", "stale"]


@dataclasses.dataclass(frozen=True, slots=True)
class Recalled:
    """Memory for one problem. insights: strategies first; behaviors: nearest first."""

    insights: tuple[Insight, ...] = ()
    experiences: tuple[Experience, ...] = ()
    behaviors: tuple[Behavior, ...] = ()


class Recall:
    """Reads a bank for problems, as a control has it.

    problems: all that the bank may remember; one that is asked for need not be among them.
    """

    def __init__(
        self,
        problems: Iterable[Problem],
        retriever: Retriever,
        control: Control = "none",
        stale_steps: int = 10,
        seed: int = 0,
    ) -> None:
        self._problems: Mapping[str, Problem] = {problem.id: problem for problem in problems}
        self._retriever, self._seed = retriever, seed
        self._control, self._stale_steps = control, stale_steps
        self._past: Bank | None = None
        self._num_events = 0

    def __call__(
        self, step: int, bank: Bank, problems: Sequence[Problem], top_k: int
    ) -> list[Recalled]:
        """What the teacher is shown for each problem at `step`. top_k: behaviors, 0 for none."""
        if self._control == "random":
            return [self._drawn(step, bank, problem, top_k) for problem in problems]
        if self._control == "stale":
            bank = self._as_it_was(step, bank)
        elif self._control == "shuffled":
            partners = [self._partner(bank, problem) for problem in problems]
            return [self._own(bank, [p], top_k)[0] if p else Recalled() for p in partners]
        return self._own(bank, problems, top_k)

    def _own(self, bank: Bank, problems: Sequence[Problem], top_k: int) -> list[Recalled]:
        behaviors = self._retriever.behaviors_for(problems, bank, top_k)
        return [
            Recalled(bank.insights(p.id), bank.experiences(p.id), tuple(found))
            for p, found in zip(problems, behaviors, strict=True)
        ]

    def _partner(self, bank: Bank, problem: Problem) -> Problem | None:
        """The other problem in memory whose name, hashed with this one's, is the least."""
        others = [p for p in bank.problem_ids if p != problem.id and p in self._problems]
        if not others:
            return None
        return self._problems[min(others, key=lambda other: self._hash(problem.id, other))]

    def _hash(self, *names: object) -> bytes:
        return hashlib.sha256(repr((self._seed, *names)).encode()).digest()

    def _drawn(self, step: int, bank: Bank, problem: Problem, top_k: int) -> Recalled:
        rng = random.Random(self._hash(step, problem.id))

        def draw(count: int, items: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(rng.sample(items, min(count, len(items))))

        own, others = bank.insights(problem.id), [p for p in bank.problem_ids if p != problem.id]
        elsewhere = [i for p in others for i in bank.insights(p)]
        insights: tuple[Insight, ...] = ()
        for kind in ("strategy", "lesson"):
            count = sum(i.kind == kind for i in own)
            insights += draw(count, [i for i in elsewhere if i.kind == kind])
        behaviors = draw(top_k, bank.behaviors)
        kept = [attempt for p in others for attempt in bank.experiences(p)]
        return Recalled(insights, draw(len(bank.experiences(problem.id)), kept), behaviors)

    def _as_it_was(self, step: int, bank: Bank) -> Bank:
        """The bank of `stale_steps` ago, which follows the bank's events at that distance."""
        if self._past is None:
            self._past = Bank(bank.config)
        for event in bank.events[self._num_events :]:
            if event["step"] > step - self._stale_steps:
                break
            self._past.follow(event)
            self._num_events += 1
        return self._past
