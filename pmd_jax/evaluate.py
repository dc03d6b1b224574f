"""Scores: the policy answers held-out problems, from the problem alone unless told otherwise.

Reported beside what needs no policy: uniform guessing and the best constant letter. Intervals are
bootstrapped over questions, so they say what another draw of questions could have given. Prompts
with memory are made by the caller; nothing here knows a bank.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmd_jax.metrics import (
    Scores,
    avg_at_k,
    best_at_k,
    bootstrap_interval,
    concept_frequency,
    curve,
    majority_at_k,
    pass_at_k,
)
from pmd_jax.policy.policy import Policy
from pmd_jax.records import Message, MultipleChoice, Problem, Split
from pmd_jax.rollout import Grading, Group, attempt, name_seed, shared_groups
from pmd_jax.tasks.copies import near_copies
from pmd_jax.tasks.task import Task, baselines


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the policy is scored. The defaults are the paper's: avg@16 at T 0.6, top-p 0.95.

    num_problems: the first of the split, 0 for all. max_new_tokens 0 takes the rollouts' own.
    every: steps between evaluations during training, 0 for none. before: one before the first
        step; after the last there always is one.
    with_memory: score also with the run's bank in the prompt, as `teacher` shows it.
    """

    split: Split = "test"
    num_problems: int = 0
    num_samples: int = 16
    max_new_tokens: int = 0
    temperature: float = 0.6
    top_p: float = 0.95
    every: int = 0
    before: bool = True
    with_memory: bool = False

    def __post_init__(self) -> None:
        for name in ("num_problems", "max_new_tokens", "every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0; got {getattr(self, name)}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: must be at least 1; got {self.num_samples}")


Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of one policy on one split; shares in [0, 1], intervals 95% over questions.

    average: avg@k, k = num_samples. pass_at, majority_at: by the number of samples, "1" to k, of
    which `majority` and `best` are the last. headroom: best@k - majority@k. tests_passed: the share
    of unit tests, averaged over samples; a sample is correct when it passes all. Programs are not
    voted on nor guessed, and letters have no tests: None and empty. fresh: avg@k of the
    num_fresh questions without a near copy among the training ones, None where there are none.
    by_subtask, per_problem: avg@k.
    """

    split: str
    num_problems: int
    num_samples: int
    average: float
    interval: Interval
    tests_passed: float | None
    tests_passed_interval: Interval | None
    majority: float | None
    majority_interval: Interval | None
    best: float
    headroom: float | None
    pass_at: dict[str, float]
    pass_at_interval: dict[str, Interval]
    majority_at: dict[str, float]
    majority_at_interval: dict[str, Interval]
    well_formed: float
    chance: float | None
    constant: float | None
    constant_letter: str
    num_fresh: int
    fresh: float | None
    fresh_interval: Interval | None
    by_subtask: dict[str, float]
    per_problem: dict[str, float]
    concepts_per_1000_tokens: float
    response_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    policy: Policy,
    task: Task,
    config: EvaluationConfig,
    max_new_tokens: int,
    seed: int,
    messages: Sequence[Sequence[Message]] | None = None,
) -> Evaluation:
    """Scores `policy` on the task's split. The same seed gives the same draws.

    messages: the chat of each problem, the student's own where None.
    """
    began = time.perf_counter()
    groups = answer(policy, task, config, max_new_tokens, seed, messages)
    return score(groups, task, config.split, time.perf_counter() - began)


def chosen_problems(task: Task, config: EvaluationConfig) -> tuple[Problem, ...]:
    """Those that an evaluation asks."""
    return task.splits[config.split][: config.num_problems or None]


def answer(
    policy: Policy,
    task: Task,
    config: EvaluationConfig,
    max_new_tokens: int,
    seed: int,
    messages: Sequence[Sequence[Message]] | None = None,
) -> list[Group]:
    """The policy's graded samples of each problem; processes share the problems."""
    problems = chosen_problems(task, config)

    def work(own: Sequence[int]) -> list[Group]:
        asked = [problems[i] for i in own]
        with Grading(task) as grading:
            attempts = attempt(
                policy,
                task,
                asked,
                config.num_samples,
                config.max_new_tokens or max_new_tokens,
                step=0,
                seed=name_seed(seed, "evaluate"),
                temperature=config.temperature,
                top_p=config.top_p,
                on_rollout=grading,
                messages=None if messages is None else [messages[i] for i in own],
            )
            return grading.groups(asked, attempts)

    return shared_groups(problems, work)


def score(groups: Sequence[Group], task: Task, split: Split, seconds: float) -> Evaluation:
    """What graded samples come to; all groups have as many."""
    problems = [group.problem for group in groups]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    correct = np.array([[v.correct for v in group.verdicts] for group in groups])
    num_samples = correct.shape[1]
    average = avg_at_k(correct)
    passed = {str(k): pass_at_k(correct, k) for k in curve(num_samples)}
    voted = majorities(groups, task)
    best, majority = best_at_k(correct), voted.get(str(num_samples))
    tests = tests_passed(groups)
    copies = near_copies(problems, task.splits["train"]) if split != "train" else frozenset()
    fresh = average[[problem.id not in copies for problem in problems]]
    subtasks: dict[str, list[float]] = defaultdict(list)
    for problem, value in zip(problems, average, strict=True):
        subtasks[problem.subtask].append(float(value))
    scores = baselines(problems)
    num_tokens = sum(len(rollout.tokens) for rollout in rollouts)
    concepts = concept_frequency([rollout.text for rollout in rollouts], num_tokens)
    return Evaluation(
        split=split,
        num_problems=len(problems),
        num_samples=num_samples,
        average=float(average.mean()),
        interval=bootstrap_interval(average),
        tests_passed=None if tests is None else float(tests.mean()),
        tests_passed_interval=None if tests is None else bootstrap_interval(tests),
        majority=None if majority is None else float(majority.mean()),
        majority_interval=None if majority is None else bootstrap_interval(majority),
        best=float(best.mean()),
        headroom=None if majority is None else float(best.mean() - majority.mean()),
        pass_at=_means(passed),
        pass_at_interval=_intervals(passed),
        majority_at=_means(voted),
        majority_at_interval=_intervals(voted),
        well_formed=float(np.mean([v.well_formed for g in groups for v in g.verdicts])),
        chance=scores.chance,
        constant=scores.constant,
        constant_letter=scores.constant_letter,
        num_fresh=len(fresh),
        fresh=float(fresh.mean()) if len(fresh) else None,
        fresh_interval=bootstrap_interval(fresh) if len(fresh) else None,
        by_subtask={name: float(np.mean(values)) for name, values in sorted(subtasks.items())},
        per_problem={p.id: float(value) for p, value in zip(problems, average, strict=True)},
        concepts_per_1000_tokens=concepts["concepts/per_1000_tokens"],
        response_tokens=num_tokens,
        seconds=seconds,
    )


def majorities(groups: Sequence[Group], task: Task) -> dict[str, Scores]:
    """majority@k of each question by k; empty where the answers are programs."""
    checks = [group.problem.check for group in groups]
    gold = [check.answer for check in checks if isinstance(check, MultipleChoice)]
    if not gold:
        return {}
    answers = [[task.answer(g.problem, r.text) for r in g.rollouts] for g in groups]
    return {str(k): majority_at_k(answers, gold, k) for k in curve(len(answers[0]))}


def tests_passed(groups: Sequence[Group]) -> Scores | None:
    """Of each question, the share of unit tests that its samples pass; None without tests."""
    shares = [[v.tests_passed for v in group.verdicts] for group in groups]
    if any(share is None for row in shares for share in row):
        return None
    return np.array(shares, np.float64).mean(axis=1)


def _means(scores: dict[str, Scores]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in scores.items()}


def _intervals(scores: dict[str, Scores]) -> dict[str, Interval]:
    return {name: bootstrap_interval(values) for name, values in scores.items()}
