"""A task: problems in three splits, the student's prompt, the verifier, and scores without a model.

Worked examples of the answer format (`format_shots`) are part of the task: the same for student,
teacher and evaluation, never taken from evaluation, and nothing to do with memory.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from pmd_jax.records import Message, MultipleChoice, Problem, Split, Verdict
from pmd_jax.tasks import verifiers
from pmd_jax.tasks.judge import Judge, JudgeConfig
from pmd_jax.tasks.sandbox import SandboxError

MAX_SHOTS = 4


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which questions, and how they are asked and graded.

    name: "scicalc" generates questions, "minicode" programming exercises; "sciknoweval" and
        "livecodebench" read files.
    path: of sciknoweval, a folder with <domain>/train.jsonl and test.jsonl, or "hf:ORG/DATASET",
        a hub dataset of that layout; of livecodebench, a file or a folder of the release's
        JSON Lines, or a hub dataset.
    subject: of sciknoweval one domain; of the others one subject, or all when empty.
    families: of what is generated, only these; all when empty.
    verifier: of letters, strict or lenient (verifiers.py); judge: of programs (judge.py).
    feedback: whether verdicts on training problems say what was wrong.
    format_shots: worked examples of the answer format in every prompt.
    response_style: "reasoning" asks for thought first, "direct" for the answer alone.
    num_train, num_validation, num_test: sizes; of what is read from files 0 takes all of train or
        test, and validation is taken out of train.
    start_date, end_date: of livecodebench, contests from the first up to the second, "YYYY-MM-DD".
    unit_tests: of livecodebench, "nested" trains on a seeded half of each problem's tests and
        evaluates on all, as SDPO; "disjoint" evaluates on the other half.
    public_tests: of livecodebench, whether evaluation has the public tests too, as the official
        harness; training never has.
    """

    name: Literal["scicalc", "sciknoweval", "livecodebench", "minicode"] = "scicalc"
    path: str = ""
    subject: str = ""
    families: tuple[str, ...] = ()
    verifier: verifiers.Mode = "strict"
    judge: JudgeConfig = JudgeConfig()  # noqa: RUF009, frozen
    feedback: bool = False
    format_shots: int = 0
    response_style: Literal["reasoning", "direct"] = "reasoning"
    num_train: int = 0
    num_validation: int = 0
    num_test: int = 0
    start_date: str = "2025-02-01"
    end_date: str = "2025-05-01"
    unit_tests: Literal["nested", "disjoint"] = "nested"
    public_tests: bool = False
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
        elif self.name == "livecodebench":
            if not self.path:
                raise ValueError(
                    "path: must name a file or folder of LiveCodeBench's code_generation_lite "
                    "(test6.jsonl holds v6), or hf:livecodebench/code_generation_lite; got ''"
                )
            if self.format_shots:
                raise ValueError(
                    f"format_shots: must be 0, since livecodebench has no solutions to show; "
                    f"got {self.format_shots}"
                )
        elif not (self.num_train and self.num_test):
            raise ValueError(
                f"num_train: {self.name} generates as many problems as it is asked for; num_train "
                f"and num_test must be at least 1; got {self.num_train} and {self.num_test}"
            )


@runtime_checkable
class Verifier(Protocol):
    """Grades a response by its problem's check, which is of the verifier's own kind.

    about: what a run says of it at its start, "" for nothing.
    """

    @property
    def about(self) -> str: ...

    def verify(self, check: Any, text: str, feedback: bool) -> Verdict: ...

    def answer(self, check: Any, text: str) -> str:
        """What a majority vote counts, "" for none."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """Problems by split, the worked examples that open every prompt, and who grades."""

    config: TaskConfig
    splits: Mapping[Split, tuple[Problem, ...]]
    shots: tuple[Message, ...]
    verifier: Verifier

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            if not self.splits[split]:
                raise ValueError(
                    f"config.task: the {split} split of {self.config.name} is empty; check "
                    f"task.path, task.subject and task.num_{split}"
                )

    def student_messages(self, problem: Problem) -> tuple[Message, ...]:
        """The student's whole prompt: system, worked examples, question."""
        system = [{"role": "system", "content": problem.system}] if problem.system else []
        return (
            *system,
            *self.shots,
            {"role": "user", "content": problem.question},
        )

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Only what is trained on may have feedback: evaluation's tests are nobody's lesson."""
        feedback = self.config.feedback and problem.split == "train"
        return self.verifier.verify(problem.check, text, feedback)

    def answer(self, problem: Problem, text: str) -> str:
        """What a response answers in a word, "" for none and for programs."""
        return self.verifier.answer(problem.check, text)

    def verifiers(self) -> dict[str, Verifier]:
        """All ways to grade the task's responses, by name."""
        if isinstance(self.verifier, Judge):
            return {rules: self.verifier.by(rules) for rules in ("official", "sdpo")}
        return {mode: verifiers.LetterVerifier(mode) for mode in ("strict", "lenient")}


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Scores that need no model: uniform guessing, and the best constant letter.

    None of programs, which nobody guesses.
    """

    chance: float | None = None
    constant: float | None = None
    constant_letter: str = ""


def baselines(problems: Sequence[Problem]) -> Baselines:
    checks = [p.check for p in problems if isinstance(p.check, MultipleChoice)]
    if not checks:
        return Baselines()
    letters = Counter(check.answer for check in checks)
    letter, count = min(letters.items(), key=lambda item: (-item[1], item[0]))
    chance = sum(1 / len(check.options) for check in checks) / len(checks)
    return Baselines(chance, count / len(checks), letter)


def worked_examples(examples: Sequence[Problem], style: str) -> tuple[Message, ...]:
    """Question and answer turns that show the format; the reasoning in them is a placeholder."""
    shots: list[Message] = []
    for problem in examples:
        assert isinstance(problem.check, MultipleChoice)
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


def start_judge(config: JudgeConfig) -> Judge:
    """The judge of a task of programs. Raises ValueError where its sandbox cannot be had."""
    try:
        return Judge(config)
    except SandboxError as error:
        raise ValueError(f"config.task.judge.{error}") from error


def load_task(config: TaskConfig) -> Task:
    """Reads or generates a task. Raises ValueError, on one line, for what is wrong with it."""
    module = importlib.import_module(f"pmd_jax.tasks.{config.name}")
    return getattr(module, f"load_{config.name}")(config)
