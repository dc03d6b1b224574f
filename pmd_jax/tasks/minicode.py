"""minicode: generated programming exercises with generated tests, for a model that writes one line.

The embedded task of programs: no download, any size, a seed. Every family of minicode_families.py
asks for one kind of function, or of program that reads and prints; expected outputs come from its
reference code. Splits share families, and neither numbers, letters nor words in their statements.

Left out: exercises that need more than a line, and time limits that matter.
"""

from __future__ import annotations

import json

from pmd_jax.records import Message, Problem, UnitTests
from pmd_jax.tasks.generated import Place, Pool, generate
from pmd_jax.tasks.minicode_families import FAMILIES, Exercise, Family, outputs
from pmd_jax.tasks.task import Task, TaskConfig, start_judge

SYSTEM = {
    "direct": "Write Python code. Reply with one fenced code block.",
    "reasoning": "Write Python code. First say how, in a sentence; then one fenced code block.",
}


def unit_tests(exercise: Exercise, time_limit_seconds: float) -> UnitTests:
    """The exercise's tests in the judge's encoding."""
    wanted = outputs(exercise)
    if not exercise.function:
        inputs = tuple(text for (text,) in exercise.inputs)
        return UnitTests(inputs, tuple(wanted), "", time_limit_seconds)
    inputs = tuple("\n".join(map(json.dumps, arguments)) for arguments in exercise.inputs)
    return UnitTests(inputs, tuple(map(json.dumps, wanted)), exercise.function, time_limit_seconds)


def question_of(exercise: Exercise) -> str:
    """The statement, with a function's first line below it, as a contest site has it."""
    if not exercise.function:
        return exercise.stem
    return f"{exercise.stem}\n\ndef {exercise.function}({', '.join(exercise.parameters)}):"


def reply_of(exercise: Exercise, style: str) -> str:
    """A response that passes, in the form that is asked for."""
    before = "The answer can be computed in one expression.\n\n" if style == "reasoning" else ""
    return f"{before}```python\n{exercise.solution.rstrip()}\n```"


def load_minicode(config: TaskConfig) -> Task:
    """Generates all splits, with the worked examples that `format_shots` asks for."""
    replies: dict[str, str] = {}

    def make(family: Family, pool: Pool, place: Place) -> Problem:
        exercise = family(pool)
        replies[exercise.stem] = reply_of(exercise, config.response_style)
        return Problem(
            id=f"minicode/{place.subject}/{place.split}/{place.number}",
            subject=place.subject,
            subtask=place.name,
            stem=exercise.stem,
            question=question_of(exercise),
            system=SYSTEM[config.response_style],
            check=unit_tests(exercise, config.judge.time_limit_seconds),
        )

    examples, splits = generate(config, FAMILIES, make)
    shots: list[Message] = []
    for problem in examples:
        shots.append({"role": "user", "content": problem.question})
        shots.append({"role": "assistant", "content": replies[problem.stem]})
    return Task(config, splits, tuple(shots), start_judge(config.judge))
