"""The judge's rules by hand: which code is taken, what equals what, what the teacher is told."""

import json

import pytest

from pmd_jax.records import UnitTests
from pmd_jax.tasks.feedback import (
    CUT_OFF,
    MAX_CHARACTERS,
    NO_CODE,
    CaseResult,
    no_code,
    write_feedback,
)
from pmd_jax.tasks.judge import Judge, JudgeConfig, extract_code, same_output, same_value
from pmd_jax.tasks.sandbox import Raised, Sandbox, SandboxConfig
from pmd_jax.tasks.sandbox.program import plain


@pytest.fixture(scope="module")
def judge():
    made = Judge(JudgeConfig(sandbox=SandboxConfig(workers=1)))
    yield made
    made.close()


# --- which code ---------------------------------------------------------------------------------

TWO = "First:\n```python\nlong = 1\nlonger = 2\n```\nthen\n```python\nlast = 3\n```\nDone."


@pytest.mark.parametrize(
    ("text", "official", "sdpo"),
    [
        ("```python\nx = 1\n```", "x = 1", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1", "x = 1\n"),
        (TWO, "last = 3", "long = 1\nlonger = 2\n"),
        ("x = 1", "", ""),
        ("```python\nx = 1", "", ""),  # a block that does not end
        ("```python\n```", "", ""),
        ("  ```py\n  x = 1\n  ```", "  x = 1", "  x = 1\n  "),
        ("``` x = 1 ```", "", ""),  # one line is one fence
    ],
)
def test_the_code_of_a_response(text, official, sdpo):
    assert extract_code(text, "official") == official
    assert extract_code(text, "sdpo") == sdpo


# --- what equals what ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "expected", "official", "sdpo"),
    [
        ("6", "6", True, True),
        ("6\n", "6", True, True),
        ("6   \n", "6", True, True),
        ("\n\n6\n\n", "6", True, True),
        ("1 2 \n3", "1 2\n3", True, False),  # trailing space within
        ("  1\n  2", "1\n2", True, False),
        ("6.0", "6", True, False),
        ("6.000", "6.0", True, False),
        ("1e3", "1000", True, False),
        ("0.1 0.20", "0.10 0.2", True, False),
        ("0.30000000000000004", "0.3", False, False),  # no tolerance
        ("1  2", "1 2", True, False),  # spaces between numbers
        ("a  b", "a b", False, False),  # spaces between words
        ("1 2", "1\n2", False, True),  # a line's end is a line's end
        ("1\n\n2", "1\n2", False, False),
        ("yes", "Yes", False, False),
        ("YES", "yes", False, False),
        ("", "", True, True),
        ("", "0", False, False),
        ("1 2 3", "1 2", False, False),
        ("1", "1 2", False, False),
        ("1\n2", "1", False, False),  # a line more
        ("1", "1\n2", False, False),
        ("01", "1", True, False),
        ("+1", "1", True, False),
        ("nan", "nan", True, True),
        ("NaN", "nan", False, False),
        ("inf", "Infinity", True, False),
        ("True", "1", False, False),
        ("1152921504606846977", "1152921504606846976", False, False),  # beyond float
        ("a\r\nb", "a\nb", True, False),
    ],
)
def test_printed_output(printed, expected, official, sdpo):
    assert same_output(printed, expected, "official") is official
    assert same_output(printed, expected, "sdpo") is sdpo


@pytest.mark.parametrize(
    ("value", "expected", "official", "sdpo"),
    [
        (6, "6", True, True),
        (6.0, "6", True, False),
        (True, "true", True, True),
        (True, "1", True, False),  # as Python compares
        ("a b", '"a b"', True, True),
        ([1, 2], "[1, 2]", True, True),
        ((1, 2), "[1, 2]", True, True),
        ([(1, 2)], "[[1, 2]]", False, True),  # a tuple within
        ({"a": 1}, '{"a": 1}', True, True),
        ({1: 2}, '{"1": 2}', False, True),
        (None, "null", True, True),
        (0.1 + 0.2, "0.3", False, False),
        ({1, 2}, "[1, 2]", False, False),
        (2**70, str(2**70), True, True),
        (float("inf"), "Infinity", True, True),
    ],
)
def test_returned_values(value, expected, official, sdpo):
    sent = json.loads(json.dumps(plain(value, top=True)))
    assert same_value(sent, expected, "official") is official
    assert same_value(sent, expected, "sdpo") is sdpo


@pytest.mark.parametrize("sent", [{"t": 5}, {"t": [1], "d": []}, {}, {"r": "x"}, {"d": [[1]]}])
def test_a_value_that_no_function_returned_equals_nothing(sent):
    assert not same_value(sent, "5")


def test_keys_that_no_json_has_are_not_gathered():
    """Numbers may be chosen to collide: a dict of so many would take hours."""
    sent = {"d": [[(i + 1) * (2**61 - 1), 0] for i in range(200_000)]}
    assert not same_value(sent, "{}", "official")


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 960, 980, 985, 988, 990, 995, 2000])
def test_a_deep_value_is_wrong_and_no_error_of_the_judge(judge, depth):
    code = f"def f(x):\n    v = 1\n    for _ in range({depth}): v = [v]\n    return v"
    verdict = judge.verify(UnitTests(("1",), ("1",), "f"), f"```python\n{code}\n```", True)
    assert not verdict.correct and verdict.feedback


# --- verdicts -----------------------------------------------------------------------------------

SUM = UnitTests(("1 2\n", "3 4\n", "5 6\n"), ("3", "7", "11"), "", 2.0)


def test_a_verdict_has_the_share_of_tests_and_all_of_them_or_no_reward(judge):
    right = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    some = "```python\na, b = map(int, input().split())\nprint(a + b if a < 4 else 0)\n```"
    for text, correct, share in ((right, True, 1.0), (some, False, 2 / 3), ("hm", False, 0.0)):
        verdict = judge.verify(SUM, text, feedback=False)
        assert (verdict.correct, verdict.reward) == (correct, float(correct))
        assert verdict.tests_passed == share and verdict.feedback == ""
        assert verdict.well_formed == (text != "hm")


def test_a_judgement_is_made_once_for_a_program_and_its_tests(judge, monkeypatch):
    ran = []
    run = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", lambda *args: ran.append(args) or run(*args))
    for text in ("```python\nprint(1)  # once\n```", "Again:\n```py\nprint(1)  # once\n```"):
        judge.verify(SUM, text, feedback=True)
    assert len(ran) == 1
    judge.verify(UnitTests(("",), ("1",)), "```python\nprint(1)  # once\n```", feedback=True)
    assert len(ran) == 2


def test_an_empty_block_runs_nothing(judge, monkeypatch):
    monkeypatch.setattr(Sandbox, "run", None)
    verdict = judge.verify(SUM, "```python\n\n```", feedback=True)
    assert (verdict.well_formed, verdict.feedback) == (False, NO_CODE)


# --- what the teacher is told -------------------------------------------------------------------


def case(number=1, outcome="wrong", given="1 2", actual="4", expected="3", **more) -> CaseResult:
    return CaseResult(number, outcome, given, actual, expected, **more)


def test_a_run_time_error_comes_before_all_else_with_its_lines():
    error = Raised("KeyError", "'x'", ((7, "solve", "return d[k]"), (12, "<module>", "solve()")))
    text, revealed = write_feedback([case(), case(2, "time"), case(3, "error", error=error)])
    assert text == (
        "Test Case 3: Runtime Error\nKeyError: 'x'\n  return d[k]\nLine 7 in solve (Solution.py)\n"
        "  solve()\nLine 12 in <module> (Solution.py)\n\nLast Executed Input\n1 2"
    )
    assert revealed == 0.0


def test_a_process_that_was_killed_is_a_run_time_error():
    text, _ = write_feedback([case(status=-11, outcome="crash")])
    assert "Process Error: the process was killed by SIGSEGV" in text
    text, _ = write_feedback([case(status=7, outcome="crash")])
    assert "Process Error: the process ended with exit code 7" in text


def test_time_and_output_come_before_wrong_answers():
    assert write_feedback([case(), case(2, "time")])[0] == (
        "Test Case 2: Time Limit Exceeded\n\nLast Executed Input\n1 2"
    )
    assert write_feedback([case(), case(2, "output")])[0].startswith(
        "Test Case 2: Output Limit Exceeded"
    )


def test_the_two_shortest_wrong_answers_are_shown_and_what_they_reveal_is_counted():
    results = [case(1, given="1" * 50), case(2), case(3, "passed"), case(4, expected="30")]
    text, revealed = write_feedback(results)
    one = "Test Case {}: Wrong Answer\n\nInput\n1 2\n\nOutput\n4\n\nExpected\n{}"
    assert text == one.format(2, 3) + "\n\n" + one.format(4, 30)
    assert revealed == 3 / len(text)


def test_long_texts_are_cut_to_their_limits():
    long = case(given="\n".join(["x" * 999] * 99), actual="y" * 9999, expected="z" * 9999)
    text, revealed = write_feedback([long, long])
    assert len(text) <= MAX_CHARACTERS and text.count("Test Case") == 1
    assert "z" * 247 + "..." in text and "y" * 247 + "..." in text
    assert revealed == 250 / len(text)
    error = Raised("E", "m" * 400, tuple((1, "f", "s" * 400) for _ in range(4)))
    assert len(write_feedback([case(outcome="error", error=error)])[0]) <= MAX_CHARACTERS


def test_a_response_without_code_is_told_the_format_or_that_it_was_cut_off():
    assert no_code("hm") == NO_CODE
    assert no_code("```python\nx = 1") == CUT_OFF


def test_nothing_is_said_where_all_passed():
    assert write_feedback([case(outcome="passed")]) == ("", 0.0)
