"""Problems become graded rollouts; and the `generate` that memory borrows from the policy.

This corridor is where text and tokens meet: chats are rendered and encoded on the way in,
responses are decoded on the way out. The prompts of `attempt` are the task's own; memory has no
way in. Draws are named by (run seed, step, purpose, problem), so they do not depend on which other
problems share a step.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from pmd_jax.distributed import share
from pmd_jax.policy.policy import Policy
from pmd_jax.policy.sampler import Sample
from pmd_jax.records import Message, Problem, Rollout, Verdict
from pmd_jax.tasks.task import Task

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How problems are attempted in training.

    rollouts_per_problem: the size of a group. temperature, top_p: of the rollouts; distillation
    asks for the distribution that was sampled, so top_p below 1 is for evaluation only.
    """

    problems_per_step: int = 32
    rollouts_per_problem: int = 8
    max_new_tokens: int = 8192
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("problems_per_step", "rollouts_per_problem", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1; got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature: must be above 0, or all rollouts of a group are one; "
                f"got {self.temperature}"
            )


@dataclasses.dataclass(frozen=True)
class Group:
    """One problem of a step with its graded rollouts, in the order of their samples."""

    problem: Problem
    prompt: Sequence[int]
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]


def name_seed(*names: object) -> int:
    """A uint32 that these names determine, the same on every machine."""
    return zlib.crc32("/".join(map(str, names)).encode())


Attempts = Mapping[str, tuple[Sequence[int], tuple[Rollout, ...]]]
"""{problem id: (student prompt tokens, its rollouts)}"""


def attempt(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    num_samples: int,
    max_new_tokens: int,
    step: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_rollout: Callable[[Problem, Rollout], None] = lambda *_: None,
    messages: Sequence[Sequence[Message]] | None = None,
) -> Attempts:
    """The policy's rollouts of each problem, from the student's prompt, which has no memory.

    messages: chats to answer instead, for evaluation with memory; training gives none.
    on_rollout hears of each as soon as it is done, while the device samples the others.
    """
    chats = [task.student_messages(p) for p in problems] if messages is None else messages
    prompts = [policy.tokenizer.encode_chat(chat) for chat in chats]
    rollouts: dict[tuple[int, int], Rollout] = {}

    def done(i: int, j: int, sample: Sample) -> None:
        rollouts[i, j] = Rollout(
            problem_id=problems[i].id,
            step=step,
            sample=j,
            text=policy.tokenizer.decode(sample.tokens),
            tokens=sample.tokens,
            logprobs=sample.logprobs,
            stop=sample.stop,
        )
        on_rollout(problems[i], rollouts[i, j])

    policy.generate(
        prompts,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        request_ids=[name_seed(problem.id) for problem in problems],
        on_sample=done,
    )
    return {
        problem.id: (prompt, tuple(rollouts[i, j] for j in range(num_samples)))
        for i, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
    }


class Grading:
    """Grades each response, on threads, while others are sampled: `attempt`'s on_rollout.

    with Grading(task) as grading:
        attempts = attempt(..., on_rollout=grading)
        groups = grading.groups(problems, attempts)
    """

    def __init__(self, task: Task):
        self._task = task
        self._threads = ThreadPoolExecutor(max(4, os.cpu_count() or 1))
        self._begun: dict[str, Future[Verdict]] = {}

    def __call__(self, problem: Problem, rollout: Rollout) -> None:
        self._begun[rollout.id] = self._threads.submit(self._task.verify, problem, rollout.text)

    def groups(self, problems: Sequence[Problem], attempts: Attempts) -> list[Group]:
        """All verdicts, once they are there. Raises what a verifier raised."""
        groups = []
        for problem in problems:
            prompt, rollouts = attempts[problem.id]
            verdicts = tuple(self._begun[rollout.id].result() for rollout in rollouts)
            groups.append(Group(problem, prompt, rollouts, verdicts))
        return groups

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


def shared_groups(
    problems: Sequence[Problem], work: Callable[[Sequence[int]], list[Group]]
) -> list[Group]:
    """The groups of all problems, each made by one process. A problem itself is not sent.

    work: positions of this process's problems -> their groups.
    """

    def send(own: Sequence[int]) -> list[tuple[Any, ...]]:
        return [(group.prompt, group.rollouts, group.verdicts) for group in work(own)]

    found = share(len(problems), send)
    return [Group(problem, *rest) for problem, rest in zip(problems, found, strict=True)]


def make_generate(
    policy: Policy, max_new_tokens: int, temperature: float, seed: int
) -> Callable[[Sequence[Sequence[Message]]], list[str]]:
    """The policy as a writer of text, for reflection and behaviors: chats -> replies.

    A chat whose last message is the assistant's is continued from there. A chat too long for the
    model keeps its end, where the request stands. Processes share the chats, and draw what one
    alone would have drawn.
    """
    room = policy.config.max_positions - max_new_tokens

    def generate(chats: Sequence[Sequence[Message]]) -> list[str]:
        def work(own: Sequence[int]) -> list[str]:
            replies = policy.generate(
                [policy.tokenizer.encode_chat(chats[i])[-room:] for i in own],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                request_ids=own,
            )
            return [policy.tokenizer.decode(sample.tokens) for [sample] in replies]

        return share(len(chats), work)

    return generate


def shared(one: Callable[[Sequence[Any]], Sequence[T]]) -> Callable[[Sequence[Any]], list[T]]:
    """A function of many items, by position, with the items shared among the processes.

    For what need not be the same in each of them by itself: another server's replies, vectors.
    """
    return lambda items: share(len(items), lambda own: one([items[i] for i in own]))
