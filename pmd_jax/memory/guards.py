"""What may not enter memory: texts that give an answer away, and texts that say nothing.

The teacher is shown memory, and the student learns what the teacher says. A memory that names the
answer teaches the answer instead of how to find it, so these guards prefer to refuse a good text
over letting a bad one in. They look at words and numbers, never at a model's opinion. The paper
does not say how, or whether, it kept answers out of memory.

Each guard returns the reason to refuse, or "".

Left out: counting what was refused (reflection.py, behaviors.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from pmd_jax.records import MultipleChoice, Problem, UnitTests

MIN_WORDS, MAX_WORDS = 4, 80
COPIED_SHARE = 0.6
"""A text is a copy when this share of its runs of four words occur in another text."""
MIN_OUTPUT = 6
"""Characters from which on an expected output says which test it is of."""
NEAR = 0.005
"""Relative distance within which a number is the rounded answer."""


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)?", text.casefold())


# --- texts that say nothing ---------------------------------------------------------------------


def degenerate(text: str, sources: Sequence[str]) -> str:
    """Why `text` is no memory: too short, too long, repeating itself, or copied from a source."""
    tokens = words(text)
    if len(tokens) < MIN_WORDS:
        return "too short"
    if len(tokens) > MAX_WORDS:
        return "too long"
    if sum(c.isalpha() or c.isspace() for c in text) < 0.6 * len(text):
        return "not prose"
    if _repeats(tokens):
        return "repeats itself"
    if any(copied_share(text, source) >= COPIED_SHARE for source in sources):
        return "copied"
    return ""


def _repeats(tokens: Sequence[str]) -> bool:
    """A word three times in a row, few distinct words, or one run of three words three times."""
    if any(a == b == c for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False)):
        return True
    if len(tokens) >= 8 and len(set(tokens)) < 0.5 * len(tokens):
        return True
    return max(Counter(_runs(tokens, 3)).values(), default=0) >= 3


def copied_share(text: str, source: str) -> float:
    """Share of the runs of four words of `text` that occur in `source`; 0 where it has none."""
    runs = _runs(words(text), 4)
    known = set(_runs(words(source), 4))
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def _runs(tokens: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]


# --- texts that give an answer away -------------------------------------------------------------


def gives_away(text: str, problem: Problem) -> str:
    """Why `text` would tell the answer of `problem`, right or wrong: a letter, the number or the
    wording of the correct option, an expected output, or code. Numbers that the question itself
    gives are free.
    """
    check = problem.check
    if isinstance(check, UnitTests):
        return (
            holds_code(text) or holds_statement(text) or _states_output(text, problem.stem, check)
        )
    return (
        names_a_letter(text, check.letters)
        or states_a_number(text, check.correct_option, problem.stem)
        or _states_option(text, check.correct_option)
        or holds_code(text)
    )


def gives_away_any(text: str, problems: Sequence[Problem]) -> str:
    """The same for what is abstracted over several problems, where the wording of a single option
    is likely to be a word of the trade: a letter, the answer's number of any of them, or code.
    """
    choices = [(p.stem, p.check) for p in problems if isinstance(p.check, MultipleChoice)]
    tests = [(p.stem, p.check) for p in problems if isinstance(p.check, UnitTests)]
    letters = tuple(sorted({letter for _, check in choices for letter in check.letters}))
    numbers = (states_a_number(text, check.correct_option, stem) for stem, check in choices)
    outputs = (_states_output(text, stem, check) for stem, check in tests)
    return (
        names_a_letter(text, letters)
        or next(filter(None, numbers), "")
        or next(filter(None, outputs), "")
        or holds_code(text)
        or (holds_statement(text) if tests else "")
    )


def names_a_letter(text: str, letters: Sequence[str]) -> str:
    """Whether an option is named by its letter. "A" as a word of a sentence is free."""
    if not letters:
        return ""
    capital = rf"[{''.join(letters)}]\b"
    either = rf"[{''.join(letters)}{''.join(letters[1:]).lower()}]\b"  # "a" is an article
    verb = r"(?i:choos|chose|select|pick|mark|answer|guess|prefer)\w*"
    noun = r"(?i:answer|option|choice|letter|solution)s?"
    is_ = r"(?i:\s+(?:is|was|are)|\s+(?:should|would|must|could|will)\s+be)"
    article = r"(?i:(?:the\s+)?(?:option|answer|choice|letter)\s+)"
    patterns = (
        r"(?i:<\s*answer\s*>)",
        rf"\b{noun}\b{is_}?\W{{0,4}}{either}",
        rf"\b{verb}\W{{1,4}}{article}?\W{{0,2}}{either}",
        rf"(?:^|\s)\({capital}\)",
        rf"(?:^|\s){capital}[:)](?=\s|$)",
        rf"\b{capital}\s+(?:is|was)\s+(?:the\s+)?(?:correct|right|best|true|wrong|incorrect|answer)",
        rf"^\W*{capital}\W*$",
    )
    found = any(re.search(pattern, text, re.MULTILINE) for pattern in patterns)
    return "names a letter" if found else ""


def states_a_number(text: str, option: str, stem: str) -> str:
    """Whether a number of the correct option is stated, exactly or rounded."""
    given = numbers_in(stem)
    answers = numbers_in(option) - given
    for number in numbers_in(text) - given:
        if any(abs(number - answer) <= NEAR * abs(answer) for answer in answers):
            return "states the number"
    return ""


def numbers_in(text: str) -> set[float]:
    """Magnitudes of the numbers in a text: 1,000 = 1000.0 = 1e3 = 1 x 10^3 = $1 \\times 10^{3}$.

    Signs are dropped, since a dash may be a range; exponents of units (m^2) and digits within
    formulas (CO2) are not numbers.
    """
    superscripts = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
    text = re.sub(r"[⁻⁰¹²³⁴-⁹]+", lambda m: "^" + m[0].translate(superscripts), text)
    power = r"10\s*(?:\^|\*\*)\s*[{(]?\s*([+\-−]?\d+)\s*[})]?"
    times = r"\s*(?:\\times|\\cdot|×|⋅|·|x|\*)\s*"
    text = re.sub(rf"(?<=\d){times}{power}", lambda m: "e" + m[1].replace("−", "-"), text)
    text = re.sub(rf"(?<![\w.]){power}", lambda m: "1e" + m[1].replace("−", "-"), text)
    text = re.sub(r"\^\s*[{(]?[+\-−]?[\d./]+[})]?", " ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    plain = r"(?<![\w.])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    values = map(float, re.findall(plain, text))
    return {abs(value) for value in values if math.isfinite(value)}


def _states_option(text: str, option: str) -> str:
    """Whether the wording of the correct option occurs, or most of it where it is long.

    A single word of up to five letters (yes, no, true) only counts as an answer: the word "true"
    is too common to refuse whatever holds it.
    """
    wanted, found = words(option), words(text)
    if not any(c.isalpha() for c in option):  # a mere number, or nothing
        return ""
    if len(wanted) == 1 and len(wanted[0]) <= 5:
        near = r"(?i)\b(?:answer|correct|conclude|option|choose|result)\w*\W+(?:\w+\W+){0,3}"
        return "states the option" if re.search(near + re.escape(wanted[0]) + r"\b", text) else ""
    occurs = tuple(wanted) in _runs(found, len(wanted))
    return "states the option" if occurs or copied_share(option, text) >= COPIED_SHARE else ""


def _states_output(text: str, stem: str, check: UnitTests) -> str:
    """Whether an expected output stands in a text and not in the problem.

    Short ones, as 3 or Yes, are in every text and tell of no test.
    """
    outputs = (output.strip() for output in check.outputs)
    told = any(len(o) >= MIN_OUTPUT and o in text and o not in stem for o in outputs)
    return "states an output" if told else ""


def holds_statement(text: str) -> str:
    """Whether a text holds a line of a program amid its words, as return n * 7."""
    value = r"[\w\[\]().\"']+"
    operator = r"(?:\*\*|//|[-+*/%<>]|==|!=|<=|>=)"
    patterns = (
        rf"\breturn\s+{value}\s*{operator}",
        r"\bprint\s*\(",
        rf"\w\s*=\s*{value}\s*{operator}\s*\w",
    )
    return "holds code" if re.search("|".join(patterns), text) else ""


def holds_code(text: str) -> str:
    """Whether a text holds a program, or the beginning of one."""
    pattern = r"```|^\s*(?:def \w+\(|class \w+[:(]|import \w+|from \w+ import )"
    return "holds code" if re.search(pattern, text, re.MULTILINE) else ""
