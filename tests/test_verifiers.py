"""What a response scores: SDPO's published cases, letter by letter, and what lenient adds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd_jax.records import MultipleChoice
from pmd_jax.tasks.verifiers import extract_answer, is_well_formed, verify

FOUR = MultipleChoice(("12 g", "24 g", "36 g", "48 g"), "A")
TWO = MultipleChoice(("active", "inactive"), "B")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<reasoning>\nx\n</reasoning>\n<answer>\nA\n</answer>", 1),
        ("A", 1),
        ("<answer>A", 1),
        ("<answer>A</answer> trailing", 1),
        ("<answer>B</answer> no, <answer>A</answer>", 1),
        ("<answer>A: foo</answer>", 0),
        ("<answer>a</answer>", 0),
        ("Answer: A", 0),
        ("<answer>A</answer> and then <answer>", 0),
        ("<answer>B</answer>", 0),
        ("", 0),
    ],
)
def test_strict_is_the_rule_of_sdpo(text, reward):
    verdict = verify(FOUR, text, "strict")
    assert (verdict.reward, verdict.correct) == (reward, bool(reward))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer>b</answer>", "B"),
        ("<answer>B: 24 g</answer>", "B"),
        ("<answer>**C**</answer>", "C"),
        ("The answer is B.", "B"),
        ("The correct answer is: (C)", "C"),
        ("Answer: D", "D"),
        ("I would choose option D because it is larger", "D"),
        ("so it must be **B**", "B"),
        ("(C)", "C"),
        ("A: 12 g\nB: 24 g\nC: 36 g\nD: 48 g", ""),  # a recopied list is no answer
        ("A: 12 g\nB: 24 g\nThe answer is B", "B"),
        ("The answer is A or the answer is B", ""),
        ("A mole is a unit.", ""),
        ("The answer is a number", ""),
        ("<answer>Both</answer>", ""),
        ("", ""),
    ],
)
def test_lenient_takes_the_one_letter_that_is_named(text, letter):
    assert extract_answer(FOUR, text, "lenient") == letter


def test_a_letter_that_is_no_option_is_no_answer():
    assert extract_answer(TWO, "<answer>C</answer>", "lenient") == ""
    assert extract_answer(TWO, "<answer>C</answer>", "strict") == ""
    assert verify(TWO, "<answer>B</answer>", "strict").correct


def test_well_formed_needs_a_closed_tag_with_a_letter_of_the_problem_at_the_end():
    assert is_well_formed(FOUR, "text <answer> A </answer>\n")
    assert not is_well_formed(FOUR, "<answer>A</answer> trailing")
    assert not is_well_formed(FOUR, "A")
    assert not is_well_formed(TWO, "<answer>C</answer>")


def test_feedback_says_what_is_wrong_and_never_what_is_right():
    assert verify(FOUR, "<answer>B</answer>", "strict").feedback == ""
    wrong = verify(FOUR, "<answer>B</answer>", "strict", feedback=True).feedback
    assert wrong == "The answer B is not correct."
    assert "<answer>LETTER</answer>" in verify(FOUR, "hm", "strict", feedback=True).feedback
    assert verify(FOUR, "<answer>A</answer>", "strict", feedback=True).feedback == ""


@given(st.text(alphabet="ABCDabc <>/answer:*()\n.", max_size=60) | st.text(max_size=60))
def test_any_text_gets_a_verdict_and_lenient_accepts_what_strict_does(text):
    strict, lenient = (verify(FOUR, text, mode, feedback=True) for mode in ("strict", "lenient"))
    assert lenient.reward >= strict.reward
    assert bool(strict.feedback) != strict.correct
