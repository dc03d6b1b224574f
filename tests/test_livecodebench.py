"""LiveCodeBench's files: what is read, what is refused, which tests train and which evaluate."""

import base64
import dataclasses
import json
import os
import pickle
import sys
import zlib
from pathlib import Path

import pytest

from pmd_jax.records import UnitTests
from pmd_jax.tasks.judge import Judge, JudgeConfig
from pmd_jax.tasks.livecodebench import decode_tests
from pmd_jax.tasks.sandbox import SandboxConfig
from pmd_jax.tasks.task import TaskConfig, baselines, load_task

HERE = Path(__file__).parent / "livecodebench"
sys.path.insert(0, str(HERE))
from cases import BROKEN, CASES, FUNCTIONS  # noqa: E402

RELEASE = Path(os.environ.get("PMD_LIVECODEBENCH", "data/livecodebench/test6.jsonl"))
JUDGE = JudgeConfig(sandbox=SandboxConfig(workers=1))


def unit_test(given: str, wanted: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": kind}


def packed(tests: object) -> str:
    """Tests as the release packs them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def row(name: str = "abc1_a", private: object = None, **changes: object) -> dict[str, object]:
    tests = [unit_test(f"{i}\n", f"{2 * i}") for i in range(6)]
    return {
        "question_title": "twice",
        "question_content": "Print twice the number.",
        "platform": "atcoder",
        "question_id": name,
        "contest_id": "abc1",
        "contest_date": "2025-03-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([unit_test("9\n", "18")]),
        "private_test_cases": packed(tests) if private is None else private,
        "metadata": "{}",
        **changes,
    }


def function_row(name: str = "3001") -> dict[str, object]:
    test = [unit_test("[1, 2]\n3", "[3, 6]", "functional")]
    starter = "class Solution:\n    def times(self, a: List[int], k: int) -> List[int]:\n        "
    return row(
        name,
        packed(test),
        platform="leetcode",
        public_test_cases=json.dumps(test),
        starter_code=starter,
        metadata='{"func_name": "times"}',
    )


@pytest.fixture
def write(tmp_path):
    def made(*rows: object) -> TaskConfig:
        file = tmp_path / "test6.jsonl"
        file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return TaskConfig("livecodebench", path=str(file), judge=JUDGE)

    return made


def changed(config: TaskConfig, **values: object) -> TaskConfig:
    return dataclasses.replace(config, **values)


# --- decoding -----------------------------------------------------------------------------------


def test_tests_are_read_packed_and_plain():
    tests = [unit_test("1\n", "2")]
    assert decode_tests(packed(tests)) == tests
    assert decode_tests(json.dumps(tests)) == tests
    raw = base64.b64encode(zlib.compress(pickle.dumps(tests))).decode()
    assert decode_tests(raw) == tests


class Calls:
    """Pickled, it asks that a function be called when it is read."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_call_anything_is_refused_by_name(protocol, tmp_path):
    file = tmp_path / "made"
    for payload, name in (
        (Calls(os.system, f"touch {file}"), r"(posix|nt)\.system"),
        ([unit_test("1", "2"), Calls(eval, "1")], r"(builtins|__builtin__)\.eval"),
        (Path("x"), "pathlib"),
    ):
        text = base64.b64encode(zlib.compress(pickle.dumps(payload, protocol))).decode()
        with pytest.raises(ValueError, match=f"a pickle that is refused: it asks for {name}"):
            decode_tests(text)
    assert not file.exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither JSON nor base64"),
        ("!!", "neither JSON nor base64"),
        (base64.b64encode(b"x").decode(), "neither JSON nor base64"),
        (base64.b64encode(zlib.compress(b"")).decode(), "neither JSON nor base64"),
        (base64.b64encode(zlib.compress(b"}]K\x01s.")).decode(), "neither JSON nor base64"),
        (base64.b64encode(zlib.compress(b"K\x01K\x02K\x03s.")).decode(), "neither JSON nor base64"),
        ("[]", "not a list of one test or more"),
        ("{}", "not a list of one test or more"),
        ('[{"input": "1"}]', "a test lacks input, output or testtype"),
    ],
)
def test_what_is_no_test_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        decode_tests(text)


# --- problems -----------------------------------------------------------------------------------


def test_training_has_half_of_the_tests_and_evaluation_all(write):
    task = load_task(write(row(), function_row()))
    train, test = task.splits["train"], task.splits["test"]
    assert [p.id for p in train] == [
        "livecodebench/atcoder/train/abc1_a",
        "livecodebench/leetcode/train/3001",
    ]
    assert [len(p.check.inputs) for p in train] == [3, 1]
    assert [len(p.check.inputs) for p in test] == [6, 1]
    assert set(train[0].check.inputs) <= set(test[0].check.inputs)
    assert list(train[0].check.inputs) == sorted(train[0].check.inputs)  # in their own order
    again = load_task(write(row(), function_row()))
    assert again.splits == task.splits
    other = load_task(changed(write(row(), function_row()), seed=1))
    assert other.splits["test"] == test and other.splits["train"] != train


def test_disjoint_halves_share_no_test_and_drop_what_has_one_alone(write):
    task = load_task(changed(write(row(), function_row()), unit_tests="disjoint"))
    [train] = task.splits["train"]
    first, second = task.splits["test"]
    assert set(train.check.inputs) | set(first.check.inputs) == {f"{i}\n" for i in range(6)}
    assert not set(train.check.inputs) & set(first.check.inputs)
    assert second.id.endswith("/3001") and len(second.check.inputs) == 1


def test_public_tests_join_evaluation_where_asked(write):
    task = load_task(changed(write(row()), public_tests=True))
    assert task.splits["test"][0].check.inputs[0] == "9\n"
    assert "9\n" not in task.splits["train"][0].check.inputs


def test_the_question_has_the_statement_and_the_signature_of_a_plain_function(write):
    task = load_task(write(row(), function_row()))
    first, second = task.splits["train"]
    assert first.question.endswith("\n\nPrint twice the number.") and "```python" in first.question
    signature = "```python\ndef times(a: List[int], k: int) -> List[int]:\n```"
    assert second.question.endswith(signature)
    assert second.check.function == "times"
    assert [m["role"] for m in task.student_messages(first)] == ["user"]


def test_the_window_is_of_contest_dates_its_end_left_out(write):
    rows = [
        row(d, contest_date=f"{d}T08:00:00") for d in ("2025-01-31", "2025-02-01", "2025-05-01")
    ]
    assert [p.id[-10:] for p in load_task(write(*rows)).splits["test"]] == ["2025-02-01"]
    with pytest.raises(ValueError, match="has no contest from 2030-01-01 up to 2025-05-01"):
        load_task(changed(write(*rows), start_date="2030-01-01"))
    with pytest.raises(ValueError, match=r"config\.task\.end_date: must be a date.*got 'May'"):
        load_task(changed(write(*rows), end_date="May"))


def test_validation_comes_out_of_training_and_has_all_tests(write):
    rows = [row(f"abc{i}_a") for i in range(6)]
    task = load_task(changed(write(*rows), num_validation=2, num_train=3))
    names = {s: [p.id.rpartition("/")[2] for p in ps] for s, ps in task.splits.items()}
    assert len(names["train"]) == 3 and len(names["validation"]) == 2 and len(names["test"]) == 6
    assert not set(names["train"]) & set(names["validation"])
    assert all(len(p.check.inputs) == 6 for p in task.splits["validation"])


def test_feedback_is_of_training_problems_alone(write):
    task = load_task(changed(write(row()), feedback=True))
    wrong = "```python\nprint(-1)\n```"
    [train], [test] = task.splits["train"], task.splits["test"]
    told = task.verify(train, wrong)
    assert "Wrong Answer" in told.feedback and 0 < told.revealed < 0.2
    assert task.verify(test, wrong).feedback == ""


def test_programs_have_no_chance_and_no_constant_answer(write):
    scores = baselines(load_task(write(row())).splits["test"])
    assert (scores.chance, scores.constant, scores.constant_letter) == (None, None, "")


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("{", ":1: must be one JSON object"),
        ("[]", ":1: must be one JSON object; got"),
        (row(difficulty=None), ":1: difficulty must be str; got None"),
        ({"question_id": "x"}, ":1: question_content must be str; got nothing"),
        (row(contest_date="soon"), ":1: contest_date: must be a date"),
        (row(private="?"), ":1: private_test_cases: neither JSON nor base64"),
        (row(metadata="["), ":1: metadata must be a JSON object"),
        (row(metadata='{"func_name": "f"}'), ":1: testtype must be functional with"),
    ],
)
def test_a_malformed_row_is_an_error_that_names_it(write, made, why):
    with pytest.raises(ValueError, match=f"test6.jsonl{why}"):
        load_task(write(made))


def test_a_question_that_stands_twice_is_an_error(write):
    with pytest.raises(ValueError, match="question_id abc1_a stands twice"):
        load_task(write(row(), row()))


def test_bad_settings_are_answered_in_one_line(write, tmp_path):
    with pytest.raises(ValueError, match="path: must name a file or folder of LiveCodeBench"):
        TaskConfig("livecodebench")
    with pytest.raises(ValueError, match="format_shots: must be 0, since livecodebench has no"):
        TaskConfig("livecodebench", path="x", format_shots=1)
    with pytest.raises(ValueError, match="path: must be a JSON Lines file"):
        load_task(TaskConfig("livecodebench", path=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="subject: must be one of atcoder, codeforces, leetcode"):
        load_task(changed(write(row()), subject="topcoder"))


# --- reference solutions ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge():
    made = Judge(JUDGE)
    yield made
    made.close()


def solution(name: str) -> str:
    return (HERE / f"{name}.py").read_text()


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def test_there_are_twenty_solutions_and_more():
    assert len(CASES) >= 20 and {file.stem for file in HERE.glob("*.py")} == {*CASES, "cases"}


@pytest.mark.parametrize("name", CASES)
def test_a_solution_passes_and_a_broken_one_is_told_its_case(judge, name):
    inputs, outputs = zip(*CASES[name], strict=True)
    check = UnitTests(inputs, outputs, FUNCTIONS.get(name, ""), 2.0)
    assert judge.verify(check, fenced(solution(name)), feedback=True).correct
    old, new = BROKEN[name]
    assert solution(name).count(old) == 1
    broken = judge.verify(check, fenced(solution(name).replace(old, new)), feedback=True)
    assert not broken.correct
    number = int(broken.feedback.removeprefix("Test Case ").partition(":")[0])
    assert inputs[number - 1].split("\n")[0][:40] in broken.feedback


@pytest.mark.skipif(not RELEASE.is_file(), reason="PMD_LIVECODEBENCH names no release file")
def test_the_131_problems_load_and_the_solutions_pass_their_samples():
    task = load_task(TaskConfig("livecodebench", path=str(RELEASE), judge=JUDGE))
    train, test = task.splits["train"], task.splits["test"]
    assert len(train) == len(test) == 131
    assert {p.subtask for p in test} == {"easy", "medium", "hard"}
    assert sum(p.check.function != "" for p in test) == 49
    assert sum(len(p.check.inputs) for p in test) == 346
    solved = [p for p in (*train, *test) if p.id.rpartition("/")[2] in CASES]
    assert len(solved) == 2 * len(CASES)
    for problem in solved:
        code = fenced(solution(problem.id.rpartition("/")[2]))
        assert task.verify(problem, code).correct, problem.id
