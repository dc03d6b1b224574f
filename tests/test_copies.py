"""Near copies between held-out and training questions, by hand."""

import dataclasses

import fakes
import pytest

from pmd_jax.records import MultipleChoice
from pmd_jax.tasks.copies import near_copies

OPTIONS = MultipleChoice(("iron", "gold"), "A")


def problem(number, stem, options=OPTIONS):
    return dataclasses.replace(fakes.problem(number, stem), check=options)


# With the two options at the end, each stem of n words makes n trigrams.
STEM = "a b c d e f g h"


def test_the_same_words_are_a_copy_whatever_their_case_and_punctuation():
    assert near_copies([problem(0, "A, b c? d e f: G h!")], [problem(1, STEM)]) == {
        fakes.problem(0, "").id
    }


def test_other_words_are_none():
    assert near_copies([problem(0, "i j k l m n")], [problem(1, STEM)]) == frozenset()


def test_options_count():
    other = MultipleChoice(("lead", "tin"), "A")
    near = problem(0, "a b c")
    assert near_copies([near], [problem(1, "a b c")])
    # a b c | b c lead | c lead tin against a b c | b c iron | c iron gold: 1 of 5
    assert not near_copies([near], [problem(1, "a b c", other)], threshold=0.21)
    assert near_copies([near], [problem(1, "a b c", other)], threshold=0.2)


@pytest.mark.parametrize(("threshold", "found"), [(5 / 11, True), (5 / 11 + 1e-9, False)])
def test_the_threshold_is_jaccards(threshold, found):
    """The last word of the stem changed: 5 of 8 trigrams are shared, of 11 different ones."""
    held, train = problem(0, "a b c d e f g x"), problem(1, STEM)
    assert bool(near_copies([held], [train], threshold)) is found


def test_each_held_out_question_is_judged_by_its_nearest():
    held = [problem(0, STEM), problem(2, "q r s t")]
    train = [problem(3, "u v w"), problem(1, STEM), problem(4, "a b c")]
    assert near_copies(held, train) == {held[0].id}


def test_short_texts_are_compared_too():
    empty = MultipleChoice(("",), "A")
    assert near_copies([problem(0, "word", empty)], [problem(1, "Word", empty)])
    assert not near_copies([problem(0, "word", empty)], [problem(1, "other", empty)])
