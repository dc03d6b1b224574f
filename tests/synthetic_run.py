"""A run's folder without a run: files as a run writes them, a real bank, made-up words and numbers.

`write_run` makes anything from three steps to the 500 steps and 3,000 problems for which a report
has budgets. The same arguments give the same folder.
"""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np

from pmd_jax.memory.bank import Bank, MemoryConfig, Operation
from pmd_jax.memory.teacher import BEHAVIORS, LESSONS, SIBLING, STRATEGIES
from pmd_jax.records import Behavior, Experience, Insight, Verdict
from pmd_jax.telemetry import RunWriter

SUBJECTS = ("biology", "chemistry", "material", "physics")
WORDS = re.findall(
    r"\w+",
    "mass energy ratio lattice enzyme allele volume pressure charge field decay half life current "
    "multiply divide convert units before after compare option answer check estimate root square "
    "because therefore when first then given ask sum product inverse linear constant molar atom",
)
SYLLABLES = re.findall(
    r"\w+", "ba co di fer gu hel ing ka lo men nor pa qui ra sta tion ul ver wo yl ze th mi es"
)
PLENTY = WORDS + [
    "".join(random.Random(number).choices(SYLLABLES, k=1 + number % 4)) for number in range(3000)
]
"""Texts of so many different words compress no better than English."""
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@dataclasses.dataclass(frozen=True)
class Shape:
    """hostile: texts hold markup that would run if it were not escaped. old: rows without tokens.
    done: steps that were finished, all if None. memory: whether there is any. save_every: steps
    between saves of the bank, 0 for one at the end."""

    steps: int = 6
    problems: int = 12
    problems_per_step: int = 4
    rollouts: int = 4
    logged: int = 64
    words: int = 12
    behaviors: int = 20
    hostile: bool = False
    old: bool = False
    memory: bool = True
    done: int | None = None
    seed: int = 0
    name: str = "synthetic"


def problem_id(number: int) -> str:
    return f"toy/{SUBJECTS[number % len(SUBJECTS)]}/train/{number}"


class Writer:
    """Writes one run, step by step."""

    def __init__(self, folder: Path, shape: Shape):
        self.shape, self.rng = shape, random.Random(shape.seed)
        self.folder = folder
        self.writer = RunWriter(folder, tensorboard=False)
        self.bank = Bank(MemoryConfig(behaviors=shape.behaviors))

    def text(self, words: int) -> str:
        said = " ".join(self.rng.choices(PLENTY, k=words))
        return f"{said} {HOSTILE}" if self.shape.hostile else said

    def write(self) -> Path:
        shape = self.shape
        self.writer.write_config(
            {
                "name": shape.name + (HOSTILE if shape.hostile else ""),
                "seed": shape.seed,
                "steps": shape.steps,
                "model": {"path": "toy"},
                "task": {"name": "toy"},
                "memory": dataclasses.asdict(self.bank.config),
                "rollout": {
                    "problems_per_step": shape.problems_per_step,
                    "rollouts_per_problem": shape.rollouts,
                },
            }
        )
        self.evaluate("before", 0)
        done = shape.steps if shape.done is None else shape.done
        for step in range(done):
            self.step(step)
        if shape.memory and done:
            self.bank.save(self.folder / "memory")
        if done == shape.steps:
            self.evaluate("after", done)
        self.writer.close()
        return self.folder

    def evaluate(self, name: str, step: int) -> None:
        scores = {f"toy/{SUBJECTS[i % 4]}/test/{i}": self.rng.randint(0, 4) / 4 for i in range(20)}
        average = sum(scores.values()) / len(scores)
        self.writer.write_evaluation(
            name,
            {
                "step": step,
                "split": "test",
                "num_problems": 20,
                "num_samples": 4,
                "average": average,
                "interval": [average - 0.1, average + 0.1],
                "majority": average,
                "best": average + 0.2,
                "headroom": 0.2,
                "well_formed": 1.0,
                "chance": 0.25,
                "constant": 0.3,
                "per_problem": scores,
                "pass_at": {"1": average, "2": average + 0.1, "4": average + 0.2},
                "pass_at_interval": {"2": [average, average + 0.2]},
                "majority_at": {"1": average, "2": average, "4": average},
            },
        )

    def step(self, step: int) -> None:
        shape, rng, bank = self.shape, self.rng, self.bank
        numbers = rng.sample(range(shape.problems), shape.problems_per_step)
        bank.begin_step(step)
        groups = [self.attempts(problem_id(number), step) for number in numbers]
        if shape.memory:
            self.learn(step, groups)
        rows, cited = [], []
        near = list(bank.behaviors)
        for group in groups:
            key = group[0].problem_id
            shown = rng.sample(near, min(2, len(near)))
            for attempt in group:
                row = self.row(attempt, bank.insights(key), shown, group[0])
                cited += row["cited"]
                rows.append(row)
        bank.cite(step, cited)
        correct = [a.verdict.correct for group in groups for a in group]
        self.writer.log_samples(step, rows[: shape.logged])
        sizes = bank.sizes() if shape.memory else {}
        self.writer.log_step(
            step,
            {
                "accuracy": float(np.mean(correct)),
                "loss": 1 / (step + 2),
                **({"loss_without_memory": 0.5 / (step + 2)} if step % 2 == 0 else {}),
                "entropy": 1 / (step + 1),
                "logprob_gap": 1e-6,
                "loss_fraction": 1.0,
                "groups/all_solved": 0.1,
                "groups/none_solved": 0.2,
                "truncated": 0.0,
                "well_formed": 1.0,
                "concepts/share": 0.1,
                "concepts/per_1000_tokens": 0.5 + step / 100,
                "reflect/leaked": step % 3,
                "abstract/leaked": 0,
                "peak_memory_gib": 1.5,
                **{f"memory/{name}": size for name, size in sizes.items()},
                **{f"seconds/{n}": 0.5 for n in ("attempt", "reflect", "distill", "idle", "sync")},
            },
        )

    def attempts(self, key: str, step: int) -> list[Experience]:
        return [
            Experience(
                f"{key}@{step}.{sample}",
                key,
                step,
                self.text(self.shape.words),
                Verdict(sample == 0 or self.rng.random() < 0.3, float(sample == 0), "", True),
            )
            for sample in range(self.shape.rollouts)
        ]

    def learn(self, step: int, groups: list[list[Experience]]) -> None:
        bank = self.bank
        bank.remember(step, [attempt for group in groups for attempt in group])
        written = []
        for group in groups:
            key, ids = group[0].problem_id, tuple(attempt.id for attempt in group[:2])
            ratio = sum(a.verdict.correct for a in group) / len(group)
            new = [
                Insight(f"{key}@{step}#{kind}1", key, step, kind, self.text(16), ratio, ids)
                for kind in ("strategy", "lesson")
            ]
            bank.rewrite_insights(step, key, new)
            written += [insight.id for insight in bank.insights(key)][:1]
        name = f"behavior_{self.rng.choice(WORDS)}_{self.rng.choice(WORDS)}"
        kind = self.rng.choice(("skill", "mistake"))
        behavior = Behavior(
            f"{name}@{step}",
            name,
            kind,
            self.text(6),
            self.text(14),
            step,
            tuple(written[:3]),
            last_used=step,
        )
        bank.apply_operations(step, [Operation("ADD", behavior)], fakes.embed)

    def row(self, attempt, insights, behaviors, sibling) -> dict:
        strategies = [i for i in insights if i.kind == "strategy"]
        lessons = [i for i in insights if i.kind == "lesson"]
        shown = "".join(
            heading + "\n".join(f"- {item.text}" for item in items)
            for heading, items in (
                (STRATEGIES, strategies),
                (LESSONS, lessons),
                (BEHAVIORS, behaviors),
            )
            if items
        )
        cited = [item.id for item in (*insights, *behaviors)]
        if attempt is not sibling:
            shown += SIBLING + sibling.text
            cited.append(sibling.id)
        question = f"<|user|>\n{attempt.problem_id}: {self.text(30)}"
        pieces = [piece + " " for piece in attempt.text.split(" ")]
        tokens = {
            "pieces": pieces,
            "token_nats": [round(self.rng.expovariate(20), 4) for _ in pieces],
        }
        return {
            "rollout": attempt.id,
            "problem": attempt.problem_id,
            "subject": attempt.problem_id.split("/")[1],
            "subtask": "toy",
            "answer": "A",
            "student_prompt": f"{question}\n<|assistant|>\n",
            "response": attempt.text,
            **({} if self.shape.old else tokens),
            "correct": attempt.verdict.correct,
            "reward": attempt.verdict.reward,
            "well_formed": True,
            "feedback": "",
            "has_guidance": bool(cited),
            "teacher_prompt": f"{question}{shown}\n<|assistant|>\n",
            "cited": cited,
            "section_tokens": {"strategies": 3} if strategies else {},
            "cut_tokens": {},
            "advantage": None,
            "loss_nats": self.rng.random() / 10 if cited else None,
        }


def write_run(folder: Path, **shape) -> Path:
    return Writer(folder, Shape(**shape)).write()


BUDGETED = {
    "steps": 500,
    "problems": 3000,
    "problems_per_step": 32,
    "rollouts": 8,
    "words": 100,
    "behaviors": 120,
}
"""The run for which a report must build in a minute, take at most 40 MB and open in 3 seconds."""


def write_large_run(folder: Path, **shape) -> Path:
    """`write_run` in a process of its own, where types are not checked at every call."""
    command = [sys.executable, __file__, str(folder), json.dumps(shape)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, check=True, env=environment)
    return folder


if __name__ == "__main__":
    write_run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
