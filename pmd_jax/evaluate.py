"""Memory-free scores: the policy answers held-out problems from the problem alone.

Reported beside what needs no policy: uniform guessing and the best constant letter. Intervals are
bootstrapped over questions, so they say what another draw of questions could have given.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from typing import Any

import numpy as np

from pmd_jax.metrics import avg_at_k, best_at_k, bootstrap_interval, majority_at_k
from pmd_jax.policy.policy import Policy
from pmd_jax.records import Split
from pmd_jax.rollout import attempt, name_seed, verify
from pmd_jax.tasks.task import Task, baselines


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the policy is scored. The defaults are the paper's: avg@16 at T 0.6, top-p 0.95.

    num_problems: the first of the split, 0 for all. max_new_tokens 0 takes the rollouts' own.
    every: steps between evaluations during training, 0 for none; before and after are always.
    """

    split: Split = "test"
    num_problems: int = 0
    num_samples: int = 16
    max_new_tokens: int = 0
    temperature: float = 0.6
    top_p: float = 0.95
    every: int = 0

    def __post_init__(self) -> None:
        for name in ("num_problems", "max_new_tokens", "every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0; got {getattr(self, name)}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: must be at least 1; got {self.num_samples}")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of one policy on one split; shares in [0, 1].

    average: avg@k and interval: its 95% bootstrap interval over questions. majority: majority@k.
    headroom: best@k - majority@k. by_subtask: avg@k. per_problem: avg@k by problem id.
    """

    split: str
    num_problems: int
    num_samples: int
    average: float
    interval: tuple[float, float]
    majority: float
    majority_interval: tuple[float, float]
    best: float
    headroom: float
    well_formed: float
    chance: float
    constant: float
    constant_letter: str
    by_subtask: dict[str, float]
    per_problem: dict[str, float]
    response_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    policy: Policy, task: Task, config: EvaluationConfig, max_new_tokens: int, seed: int
) -> Evaluation:
    """Scores `policy` on the task's split, without memory. The same seed gives the same draws."""
    problems = task.splits[config.split][: config.num_problems or None]
    began = time.perf_counter()
    attempts = attempt(
        policy,
        task,
        problems,
        config.num_samples,
        config.max_new_tokens or max_new_tokens,
        step=0,
        seed=name_seed(seed, "evaluate"),
        temperature=config.temperature,
        top_p=config.top_p,
    )
    groups = verify(task, problems, attempts)
    correct = np.array([[v.correct for v in group.verdicts] for group in groups])
    answers = [[task.answer(g.problem, r.text) for r in g.rollouts] for g in groups]
    average = avg_at_k(correct)
    majority = majority_at_k(answers, [problem.check.answer for problem in problems])
    subtasks: dict[str, list[float]] = defaultdict(list)
    for problem, score in zip(problems, average, strict=True):
        subtasks[problem.subtask].append(float(score))
    scores = baselines(problems)
    return Evaluation(
        split=config.split,
        num_problems=len(problems),
        num_samples=config.num_samples,
        average=float(average.mean()),
        interval=bootstrap_interval(average),
        majority=float(majority.mean()),
        majority_interval=bootstrap_interval(majority),
        best=float(best_at_k(correct).mean()),
        headroom=float(best_at_k(correct).mean() - majority.mean()),
        well_formed=float(np.mean([v.well_formed for g in groups for v in g.verdicts])),
        chance=float(scores["chance"]),
        constant=float(scores["constant"]),
        constant_letter=str(scores["constant_letter"]),
        by_subtask={name: float(np.mean(scores)) for name, scores in sorted(subtasks.items())},
        per_problem={p.id: float(s) for p, s in zip(problems, average, strict=True)},
        response_tokens=sum(len(r.tokens) for group in groups for r in group.rollouts),
        seconds=time.perf_counter() - began,
    )
