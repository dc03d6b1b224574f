"""Prompts and parsers side by side, and the guards of what comes back."""

import dataclasses
import hashlib
import json

import fakes
import pytest

from pmd_jax.memory import guards, prompts
from pmd_jax.memory.prompts import Attempt, Draft, Note
from pmd_jax.records import Problem, UnitTests

BOTH = {"strategy": 2, "lesson": 2}
MOLAR = fakes.problem()
DRAFT = {
    "op": "ADD",
    "name": "behavior_verify_ring_atom_counts",
    "kind": "skill",
    "when": "When a SMILES string has rings",
    "instruction": "count the ring atoms one by one before summing",
}


def test_the_version_goes_up_with_the_wording():
    """Where this fails: raise `prompts.VERSION`, and put the new digest beside it."""
    attempts, limits = [Attempt("yes", "it was so")], {"strategy": 1, "lesson": 1}
    notes = [Note("stem", 0.5, ("strategy",), ("lesson",))]
    chats = [
        *(
            prompts.reflection_prompt("question", correct, wrong, 1, 2, previous, limits)
            for correct, wrong in ((attempts, attempts), (attempts, []), ([], attempts))
            for previous in ({}, {"strategy": ["before"], "lesson": ["once"]})
        ),
        *(
            prompts.reflection_line_prompt(kind, "stem", attempts, attempts)
            for kind in ("strategy", "lesson")
        ),
        *(prompts.behaviors_prompt(notes, names, 2) for names in ([], ["behavior_a"])),
        *(prompts.behavior_line_prompt(kind, ["insight"]) for kind in ("skill", "mistake")),
    ]
    digest = hashlib.sha256(json.dumps(chats).encode()).hexdigest()
    assert (prompts.VERSION, digest[:12]) == (1, "5c30854d46e5")


# --- insights as JSON ------------------------------------------------------------------------


def test_a_mixed_group_is_asked_for_both_kinds_in_contrast():
    messages = prompts.reflection_prompt(
        MOLAR.question,
        [Attempt("I added 2 x 1 and 16.")],
        [Attempt("I forgot hydrogen.", feedback="Off by 2.")],
        num_correct=3,
        num_attempts=8,
        previous={"strategy": ["When old, be wise."], "lesson": []},
        limits=BOTH,
    )
    ((role, text),) = [(m["role"], m["content"]) for m in messages]
    assert role == "user"
    for part in (
        MOLAR.question, "3 of 8", "Correct attempt 1:\nI added", "Wrong attempt 1:\nI forgot",
        "Feedback on it:\nOff by 2.", "Strategies:\n- When old, be wise.", "at most 2 strategies",
        "at most 2 lessons", "separates right from wrong", '"strategies"', '"lessons"',
    ):  # fmt: skip
        assert part in text


def test_an_all_wrong_group_is_asked_for_lessons_alone():
    ((message),) = prompts.reflection_prompt(
        "Q?", [], [Attempt("no")], 0, 4, {"lesson": []}, {"lesson": 3}
    )
    assert "at most 3 lessons" in message["content"]
    assert "do not claim" in message["content"]
    assert "strategies" not in message["content"]
    assert "Notes from earlier" not in message["content"]


@pytest.mark.parametrize(
    "reply",
    [
        '{"strategies": ["one", "two"], "lessons": ["three"]}',
        'Here it is:\n```json\n{"strategies": ["one", "two"], "lessons": ["three"]}\n```\nDone.',
        'In {braces}:\n```\n{"strategies": ["one", "two"], "lessons": ["three"]}\n```',
        '<think>{"strategies": []}</think>\n{"strategies": ["one", "two",], "lessons": ["three"],}',
        '{"strategies": ["1. one", "- Strategy 2: **two**"], "lessons": "three"}',
        '{"lessons": ["three"], "strategies": [" one\n", "two"]} and so on',
    ],
)
def test_forgiven_forms_of_one_reply(reply):
    items, problems = prompts.parse_reflection(reply, BOTH)
    assert items == [("strategy", "one"), ("strategy", "two"), ("lesson", "three")]
    assert problems == {}


@pytest.mark.parametrize(
    ("reply", "texts", "problems"),
    [
        ("I would be careful.", [], {"not JSON": 1}),
        ("", [], {"not JSON": 1}),
        ("{'strategies': ['one']}", [], {"not JSON": 1}),
        ('{"strategies": ["one" "two"], "lessons": []}', [], {"not JSON": 1}),
        ('{"strategies": ["one"]}', ["one"], {"missing key": 1}),
        ('{"strategies": {"a": 1}, "lessons": []}', [], {"not a list": 1}),
        ('{"strategies": ["one", 2, ""], "lessons": []}', ["one"], {"not text": 2}),
        ('{"strategies": ["1", "2", "3"], "lessons": []}', ["1", "2"], {"too many": 1}),
        ('{"strategies": [], "lessons": ["x"], "tips": ["y"]}', ["x"], {"unknown key": 1}),
        ('{"strategies": ["one", "tw', ["one"], {"cut off": 1, "missing key": 1}),
        ('{"strategies": ["one"], "less', ["one"], {"cut off": 1, "missing key": 1}),
        ('{"strategies": ["a\\" [{"], "lessons": ["b", "c', ['a" [{', "b"], {"cut off": 1}),
        ('{"strategies": "on', [], {"not JSON": 1}),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_counted(reply, texts, problems):
    items, found = prompts.parse_reflection(reply, BOTH)
    assert [text for _, text in items] == texts
    assert found == problems


# --- insights as lines -----------------------------------------------------------------------


def test_a_line_prompt_is_short_hides_the_options_and_begins_the_reply():
    user, begun = prompts.reflection_line_prompt(
        "lesson", MOLAR.stem, [Attempt("right one"), Attempt("unseen")], [Attempt("wrong one")]
    )
    assert begun == {"role": "assistant", "content": "Lesson: When"}
    assert "right one" in user["content"] and "wrong one" in user["content"]
    assert "unseen" not in user["content"] and "18.02" not in user["content"]


@pytest.mark.parametrize(
    ("reply", "texts", "problems"),
    [
        (" mixing, stir. Then wait.", ["When mixing, stir."], {}),
        ("mixing 2.5 g, stir well\nand more", ["When mixing 2.5 g, stir well"], {}),
        (" mixing e.g. salt, stir.", ["When mixing e.g. salt, stir."], {}),
        (" mixing, you should always", [], {"cut off": 1}),
        ("", [], {"empty": 1}),
        ("\n\nmore", [], {"empty": 1}),
    ],
)
def test_the_first_sentence_of_a_line_is_read(reply, texts, problems):
    assert prompts.parse_line(reply) == (texts, problems)


# --- behaviors -------------------------------------------------------------------------------


def test_the_behavior_prompt_shows_notes_and_names():
    note = Note("Mass of CO2?", 0.25, ("add atoms",), ("forgot oxygen",))
    (message,) = prompts.behaviors_prompt([note], ["behavior_old"], max_new=3)
    for part in (
        note.stem,
        "25% solved",
        "add atoms",
        "forgot oxygen",
        "behavior_old",
        "at most 3",
    ):
        assert part in message["content"]


def test_behavior_operations_are_read():
    reply = json.dumps([DRAFT, {"op": "NONE"}, {**DRAFT, "op": "update", "name": "Ring Count!"}])
    drafts, problems = prompts.parse_behaviors(reply, max_new=3)
    assert [d.operation for d in drafts] == ["ADD", "NONE", "UPDATE"]
    assert drafts[0].name == "behavior_verify_ring_atom_counts"
    assert drafts[2].name == "behavior_ring_count"
    assert problems == {}
    assert prompts.parse_behaviors(json.dumps(DRAFT), 3)[0] == [drafts[0]]


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("text", "not an object"),
        ({**DRAFT, "op": "DELETE"}, "unknown operation"),
        ({**DRAFT, "kind": "habit"}, "unknown kind"),
        ({**DRAFT, "instruction": 3}, "not text"),
        ({**DRAFT, "name": "behavior_"}, "no name"),
        ({k: v for k, v in DRAFT.items() if k != "when"}, "missing when"),
    ],
)
def test_an_operation_that_breaks_the_contract_is_counted(item, problem):
    drafts, problems = prompts.parse_behaviors(json.dumps([item, DRAFT]), 3)
    assert [d.name for d in drafts] == [DRAFT["name"]]
    assert problems == {problem: 1}


def test_a_behavior_list_cut_off_keeps_its_whole_items_and_has_a_limit():
    reply = json.dumps([DRAFT, DRAFT])[:-30]
    assert prompts.parse_behaviors(reply, 3)[1] == {"cut off": 1}
    assert len(prompts.parse_behaviors(reply, 3)[0]) == 1
    drafts, problems = prompts.parse_behaviors(json.dumps([DRAFT] * 4), 3)
    assert (len(drafts), problems) == (3, {"too many": 1})


def test_a_behavior_line_names_itself():
    drafts, problems = prompts.parse_behavior_line(
        "mistake", " converting units, do not forget to square the conversion factor."
    )
    assert problems == {}
    assert drafts == [
        Draft(
            "ADD",
            "behavior_forget_square_conversion_factor",
            "mistake",
            "When converting units",
            "do not forget to square the conversion factor.",
        )
    ]
    assert prompts.parse_behavior_line("skill", " it rains.") == ([], {"no instruction": 1})


def test_names_end_at_whole_words():
    name = prompts.snake_name("Behavior: " + "abcdefghi " * 9)
    assert name == "behavior" + "_abcdefghi" * 5
    assert prompts.snake_name("behavior_x") == "behavior_x"


# --- guards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Check the units.", "too short"),
        ("word " * 81, "too long"),
        ("When when when the mass is asked for", "repeats itself"),
        ("add the mass of it " * 4, "repeats itself"),
        ("2 + 2 = 4 | 3 + 3 = 6 | 1 1 2", "not prose"),
        ("When asked: What is the molar mass of water in grams?", "copied"),
        ("When computing a molar mass, count each atom before adding.", ""),
    ],
)
def test_texts_that_say_nothing(text, reason):
    assert guards.degenerate(text, [MOLAR.question]) == reason


@pytest.mark.parametrize(
    "text",
    [
        "When unsure, remember that the answer is B.",
        "The correct option: (C) fits here",
        "When the mass is asked, choose (D) at once.",
        "When done, write <answer>x</answer> there.",
        "A: is the first thing to look at",
        "When picking D, check again.",
        "The best answer would be D here.",
        "When you see water, the answer is d always.",
        "After checking, B is correct in this case.",
    ],
)
def test_naming_a_letter_gives_away(text):
    assert guards.gives_away(text, MOLAR) == "names a letter"


@pytest.mark.parametrize(
    "text",
    [
        "A careful reader checks the units first.",
        "When A and B are reagents, find the limiting one.",
        "When the answer is a number, estimate it first.",
        "When vitamin C or CC(C)C occurs, count its carbons.",
        "When several answers are close, compute more digits.",
    ],
)
def test_letters_within_prose_are_free(text):
    assert guards.gives_away(text, MOLAR) == ""


def test_only_letters_that_are_options_count():
    two = fakes.problem(stem="So or so?", options=("7", "8"))
    assert guards.gives_away("When it says choose (C) somewhere, go on.", two) == ""
    assert guards.gives_away("When it says choose (B) somewhere, go on.", two) == "names a letter"


@pytest.mark.parametrize(
    "written", ["1,000", "1000.0", "1e3", "1 x 10^3", r"$1 \times 10^{3}$", "10³", "about 1002"]
)
def test_every_writing_of_the_answers_number_gives_away(written):
    problem = fakes.problem(stem="How many mg in 5 such grams?", options=("7", "1000 mg"))
    assert guards.gives_away(f"When asked for it, write {written} there.", problem) == (
        "states the number"
    )


def test_numbers_that_the_question_gives_are_free():
    problem = fakes.problem(stem="Halve 88 g twice, starting from 22 g.", options=("3", "22.0"))
    assert guards.gives_away("When you start from 22 g, halve that.", problem) == ""
    near = fakes.problem(stem="What is near 88?", options=("3", "88.2"))
    assert guards.gives_away("When near 88, look closely.", near) == ""
    assert guards.gives_away("When near 88.3, look closely.", near) == "states the number"
    assert guards.gives_away("When you start from 22.05 g, halve that.", problem) == ""
    assert guards.gives_away("When halving 88 g, expect 3 or 21 or m^2 or CO2.", problem) == ""


def test_the_wording_of_the_correct_option_gives_away():
    options = ("It sinks", "Hydrogen bonds hold the molecules together strongly", "true")
    problem = fakes.problem(stem="Why does it float?", options=options)
    for text in (
        "When ice floats, hydrogen bonds hold the molecules together strongly.",
        "Say that hydrogen bonds hold the molecules together, very much.",
    ):
        assert guards.gives_away(text, problem) == "states the option"
    assert guards.gives_away("When ice floats, think of bonds.", problem) == ""
    short = fakes.problem(stem="Does it float?", options=("It floats", "It sinks"))
    assert guards.gives_away("When heavier than water, it sinks.", short) == "states the option"


def test_a_common_word_gives_away_only_as_an_answer():
    problem = fakes.problem(stem="Is it so?", options=("False", "True"))
    assert guards.gives_away("When a claim is true of all, test one.", problem) == ""
    assert guards.gives_away("In the end the answer is true here.", problem) == "states the option"


def test_code_gives_away():
    assert guards.gives_away("When sorting:\ndef solve(x):", MOLAR) == "holds code"
    assert guards.gives_away("When sorting, write ```python", MOLAR) == "holds code"


def test_behaviors_are_checked_against_every_problem_of_the_cluster():
    other = fakes.problem(1, stem="Mass of CO2?", answer="D")
    assert guards.gives_away_any("Expect 44.01 in the end.", [MOLAR]) == ""
    assert guards.gives_away_any("Expect 44.01 in the end.", [MOLAR, other]) == "states the number"
    assert guards.gives_away_any("Prefer option D then.", [MOLAR]) == "names a letter"


# --- guards of programs --------------------------------------------------------------------------

TWICE = Problem(
    "minicode/numbers/train/0",
    "numbers",
    "times",
    "Write a function `times_7(n)` that returns n multiplied by 7.",
    "",
    "",
    UnitTests(("3", "11111"), ("21", "77777"), "times_7"),
)


@pytest.mark.parametrize(
    "text",
    [
        "When asked to multiply, write ```return n * 7```.",
        "When asked to multiply, return n * 7 at once.",
        "When a product is wanted, set x = n * 7 and give it back.",
        "When output is wanted, print(n) and nothing else.",
        "def times_7(n):\n    return n",
    ],
)
def test_code_gives_a_program_away(text):
    assert guards.gives_away(text, TWICE) == "holds code"
    assert guards.gives_away_any(text, [TWICE]) == "holds code"


def test_an_expected_output_gives_a_program_away_where_it_tells_one_test_from_others():
    long = dataclasses.replace(TWICE, check=UnitTests(("1",), ("1234567",), "f"))
    text = "When the largest case comes, the result is 1234567 there."
    assert guards.gives_away(text, long) == "states an output"
    assert guards.gives_away_any(text, [TWICE, long]) == "states an output"
    assert guards.gives_away("When it is three, think of 21 as a result.", TWICE) == ""


@pytest.mark.parametrize(
    "text",
    [
        "When a number is multiplied, return the product and nothing else.",
        "When the input has two numbers on a line, split it before converting them.",
        "Return early if the list is empty, then handle the general case.",
        "(A) is a letter, and no answer of a program.",
    ],
)
def test_words_about_programs_are_free(text):
    assert guards.gives_away(text, TWICE) == ""


def test_letters_are_guarded_beside_programs():
    assert guards.gives_away_any("The answer is B here.", [TWICE, MOLAR]) == "names a letter"
