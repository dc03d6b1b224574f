"""A task: problems in three splits, the student's prompt, the verifier, and scores without a model.

Worked examples of the answer format (`format_shots`) are part of the task: the same for student,
teacher and evaluation, never taken from evaluation, and nothing to do with memory.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pmd_jax.records import Message, Problem, Split, Verdict
from pmd_jax.tasks import verifiers

MAX_SHOTS = 4


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which questions, and how they are asked and graded.

    name: "scicalc" generates questions; "sciknoweval" reads files.
    path: of sciknoweval, a folder with <domain>/train.jsonl and test.jsonl, or "hf:ORG/DATASET",
        a hub dataset of that layout.
    subject: of sciknoweval one domain; of scicalc one subject, or all when empty.
    families: of scicalc, only these; all when empty.
    verifier: strict or lenient (verifiers.py). feedback: whether verdicts say what was wrong.
    format_shots: worked examples of the answer format in every prompt.
    response_style: "reasoning" asks for thought first, "direct" for the answer alone.
    num_train, num_validation, num_test: sizes; of sciknoweval 0 takes all of train or test, and
        validation is taken out of train.
    """

    name: Literal["scicalc", "sciknoweval"] = "scicalc"
    path: str = ""
    subject: str = ""
    families: tuple[str, ...] = ()
    verifier: verifiers.Mode = "strict"
    feedback: bool = False
    format_shots: int = 0
    response_style: Literal["reasoning", "direct"] = "reasoning"
    num_train: int = 0
    num_validation: int = 0
    num_test: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.format_shots <= MAX_SHOTS:
            raise ValueError(
                f"format_shots: must be between 0 and {MAX_SHOTS}; got {self.format_shots}"
            )
        for name in ("num_train", "num_validation", "num_test"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0; got {getattr(self, name)}")
        if self.name == "sciknoweval":
            if not self.path:
                raise ValueError(
                    "path: must name the folder that holds <domain>/train.jsonl and test.jsonl "
                    "of SciKnowEval, or hf:ORG/DATASET; got ''"
                )
            if not self.subject:
                raise ValueError("subject: must be biology, chemistry, material or physics; got ''")
        elif not (self.num_train and self.num_test):
            raise ValueError(
                f"num_train: scicalc generates as many problems as it is asked for; num_train "
                f"and num_test must be at least 1; got {self.num_train} and {self.num_test}"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """Problems by split, and the worked examples that open every prompt."""

    config: TaskConfig
    splits: Mapping[Split, tuple[Problem, ...]]
    shots: tuple[Message, ...]

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            if not self.splits[split]:
                raise ValueError(
                    f"config.task: the {split} split of {self.config.name} is empty; check "
                    f"task.path, task.subject and task.num_{split}"
                )

    def student_messages(self, problem: Problem) -> tuple[Message, ...]:
        """The student's whole prompt: system, worked examples, question."""
        return (
            {"role": "system", "content": problem.system},
            *self.shots,
            {"role": "user", "content": problem.question},
        )

    def verify(self, problem: Problem, text: str) -> Verdict:
        return verifiers.verify(problem.check, text, self.config.verifier, self.config.feedback)

    def answer(self, problem: Problem, text: str) -> str:
        """The letter that a response chose, "" for none."""
        return verifiers.extract_answer(problem.check, text, self.config.verifier)


def baselines(problems: Sequence[Problem]) -> dict[str, float | str]:
    """Scores that need no model: uniform guessing, and the best constant letter."""
    letters = Counter(problem.check.answer for problem in problems)
    letter, count = min(letters.items(), key=lambda item: (-item[1], item[0]))
    return {
        "chance": sum(1 / len(p.check.options) for p in problems) / len(problems),
        "constant": count / len(problems),
        "constant_letter": letter,
    }


def worked_examples(examples: Sequence[Problem], style: str) -> tuple[Message, ...]:
    """Question and answer turns that show the format; the reasoning in them is a placeholder."""
    shots: list[Message] = []
    for problem in examples:
        answer = problem.check.answer
        reply = f"<answer>{answer}</answer>"
        if style == "reasoning":
            reply = (
                f"<reasoning>\nComparing the options, the one that fits is "
                f"{problem.check.correct_option.strip()}.\n</reasoning>\n"
                f"<answer>\n{answer}\n</answer>"
            )
        shots += [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": reply},
        ]
    return tuple(shots)


def load_task(config: TaskConfig) -> Task:
    """Reads or generates a task. Raises ValueError, on one line, for what is wrong with it."""
    if config.name == "scicalc":
        from pmd_jax.tasks.scicalc import load_scicalc

        return load_scicalc(config)
    from pmd_jax.tasks.sciknoweval import load_sciknoweval

    return load_sciknoweval(config)
