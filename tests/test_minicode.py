"""The generated exercises: their tests, their splits, their worked examples."""

import dataclasses
import random
import re

import pytest

from pmd_jax.tasks.generated import Pool
from pmd_jax.tasks.judge import JudgeConfig
from pmd_jax.tasks.minicode import unit_tests
from pmd_jax.tasks.minicode_families import FAMILIES, outputs
from pmd_jax.tasks.sandbox import SandboxConfig
from pmd_jax.tasks.task import TaskConfig, load_task

NAMES = [name for families in FAMILIES.values() for name, _ in families]
CONFIG = TaskConfig(
    "minicode",
    judge=JudgeConfig(time_limit_seconds=2.0, sandbox=SandboxConfig(workers=1)),
    feedback=True,
    format_shots=2,
    response_style="direct",
    num_train=3 * len(NAMES),
    num_validation=len(NAMES),
    num_test=len(NAMES),
)


@pytest.fixture(scope="module")
def task():
    made = load_task(CONFIG)
    yield made
    made.verifier.close()


def draws(name, split, count=20):
    family = next(f for families in FAMILIES.values() for n, f in families if n == name)
    return [family(Pool(random.Random(f"{split}{i}"), split)) for i in range(count)]


def fenced(code):
    return f"```python\n{code}\n```"


def test_there_are_a_dozen_families_and_more():
    assert len(NAMES) >= 12 and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_reference_code_passes_its_own_tests(task, name):
    [exercise] = draws(name, "train", 1)
    check = unit_tests(exercise, 2.0)
    assert len(check.inputs) >= 5
    verdict = task.verifier.verify(check, fenced(exercise.solution), feedback=True)
    assert (verdict.correct, verdict.feedback) == (True, "")


def test_every_family_is_in_training(task):
    assert sorted({problem.subtask for problem in task.splits["train"]}) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_constant_answer_solves_an_exercise(name):
    for split in ("train", "validation", "test"):
        for exercise in draws(name, split, 5):
            found = [repr(value) for value in outputs(exercise)]
            if set(found) <= {"True", "False"}:
                assert min(found.count("True"), found.count("False")) >= 2, exercise.stem
            else:
                assert len(set(found)) >= 2, exercise.stem


@pytest.mark.parametrize("name", NAMES)
def test_statements_of_the_splits_differ_and_so_does_what_they_name(name):
    stems = {split: {e.stem for e in draws(name, split)} for split in ("train", "test")}
    assert len(stems["train"]) >= 8
    assert not stems["train"] & stems["test"]
    numbers = {
        split: {n for stem in found for n in re.findall(r"(?<![\w-])\d+(?!\w)", stem)}
        for split, found in stems.items()
    }
    assert not numbers["train"] & numbers["test"]


def test_the_same_seed_gives_the_same_exercises_and_another_gives_others(task):
    again = load_task(CONFIG)
    assert again.splits == task.splits and again.shots == task.shots
    other = load_task(dataclasses.replace(CONFIG, seed=1))
    assert other.splits["train"] != task.splits["train"]
    for made in (again, other):
        made.verifier.close()


def test_worked_examples_open_the_prompt_and_are_no_training_problem(task):
    problem = task.splits["test"][0]
    system, *shots, question = task.student_messages(problem)
    assert [m["role"] for m in shots] == ["user", "assistant"] * 2
    assert question == {"role": "user", "content": problem.question}
    assert "```python\n" in shots[1]["content"] and shots[1]["content"].endswith("\n```")
    asked = {shots[0]["content"], shots[2]["content"]}
    assert not asked & {p.question for split in task.splits.values() for p in split}
    assert "code block" in system["content"]


def test_a_wrong_answer_is_told_its_case_in_training_and_nothing_in_evaluation(task):
    wrong = fenced("print('no')\ndef nothing(): pass")
    for problem in task.splits["train"][:4]:
        assert task.verify(problem, wrong).feedback.startswith("Test Case 1: ")
    for problem in (*task.splits["test"][:4], *task.splits["validation"][:4]):
        assert task.verify(problem, wrong).feedback == ""


def test_reasoning_asks_for_words_before_the_code():
    task = load_task(dataclasses.replace(CONFIG, response_style="reasoning"))
    assert "First say how" in task.splits["train"][0].system
    assert not task.shots[1]["content"].startswith("```")
    task.verifier.close()


def test_a_family_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown family 'time'; did you mean times"):
        load_task(dataclasses.replace(CONFIG, families=("time",)))
