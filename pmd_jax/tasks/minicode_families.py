"""The families of minicode: one small function per kind of programming exercise.

A family draws numbers, letters and words from its pool and returns a statement, reference code and
the inputs of its tests. A pool serves one split only, so statements of train, validation and test
never share a number, a letter or a word. The exercises are for models that write one line at best.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import sys
from collections.abc import Callable, Iterable
from string import ascii_lowercase
from typing import Any

from pmd_jax.tasks.generated import Pool

TESTS = 8  # at least so many of each exercise

# What statements name.
WORDS = (
    "sun", "river", "apple", "stone", "cloud", "lamp", "tiger", "bread", "green", "piano",
    "moon", "chair", "honey", "grass", "train", "salt", "robot", "candy", "north", "glove",
    "star", "bridge", "lemon", "sand", "plane", "rain", "zebra", "cheese", "blue", "violin",
    "fire", "table", "sugar", "leaf", "wagon", "snow", "horse", "soup", "west", "button",
)  # fmt: skip
# What tests are made of; none of the above is part of one of these.
TEXTS = ("cat", "hello", "a", "mouse", "level", "ok", "python", "two words", "banana", "xyz")
LONG = "One longer line, with 7 words inside"


@dataclasses.dataclass(frozen=True)
class Exercise:
    """What is to be written, and what its tests are called with.

    function: "" for a program, which reads standard input and prints. inputs: the arguments of each
    test, JSON values; of a program the one text that it reads.
    """

    stem: str
    function: str
    parameters: tuple[str, ...]
    solution: str
    inputs: tuple[tuple[Any, ...], ...]


def outputs(exercise: Exercise) -> list[Any]:
    """What the reference code returns, or prints, for each input. Replaces sys.stdin meanwhile."""
    return [_output(exercise, copy.deepcopy(arguments)) for arguments in exercise.inputs]


def _output(exercise: Exercise, arguments: tuple[Any, ...]) -> Any:
    names: dict[str, Any] = {"__name__": "__main__"}
    if exercise.function:
        exec(exercise.solution, names)
        return names[exercise.function](*arguments)
    before, printed = sys.stdin, io.StringIO()
    sys.stdin = io.StringIO(arguments[0])
    try:
        with contextlib.redirect_stdout(printed):
            exec(exercise.solution, names)
    finally:
        sys.stdin = before
    return printed.getvalue()


# --- parts of exercises -------------------------------------------------------------------------


def function(
    signature: str, what: str, returned: str, inputs: Iterable[tuple[Any, ...]]
) -> Exercise:
    """A function that returns `what`, in words; `returned` says it in Python."""
    name, _, rest = signature.rstrip(")").partition("(")
    return Exercise(
        stem=f"Write a function `{signature}` that returns {what}.",
        function=name,
        parameters=tuple(rest.split(", ")),
        solution=f"def {signature}:\n    return {returned}\n",
        inputs=tuple(inputs),
    )


def program(what: str, solution: str, inputs: Iterable[str]) -> Exercise:
    """A program that reads and prints what `what` says."""
    return Exercise(f"Read {what}.", "", (), solution, tuple((i,) for i in inputs))


def whole(pool: Pool, low: int = 2, high: int = 60) -> int:
    """A whole number of this split."""
    return int(pool.number(low, high, 1))


def numbers(pool: Pool, k: int) -> list[int]:
    """Different numbers: 0, negative ones, `k`, its neighbours and multiples, and others."""
    found = [0, -1, k - 1, k, k + 1, 3 * k, -2 * k]
    while len(set(found)) < TESTS:
        found.append(pool.rng.randint(-100, 100))
    return list(dict.fromkeys(found))


def alone(values: Iterable[Any]) -> list[tuple[Any]]:
    """Each value as the only argument of a test."""
    return [(value,) for value in values]


def pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    """Each value with the one that follows, the last with the first."""
    return list(zip(values, values[1:] + values[:1], strict=True))


def texts(pool: Pool, *own: str) -> list[str]:
    """Different texts: the empty one, a long one, `own`, and others."""
    others = pool.rng.sample(TEXTS, len(TEXTS))
    return list(dict.fromkeys(["", LONG, *own, *others]))[: max(TESTS, len(own) + 4)]


def lists(pool: Pool, k: int) -> list[list[int]]:
    """Lists of numbers: the empty one, those with `k` at different places, and others."""
    found = [[], [k], [k - 1, k, k + 1], [-k, k, 0, k], [k + 1, 2 * k]]
    for length in (3, 4, 5):
        found.append([pool.rng.randint(-60, 99) for _ in range(length)])
    return found


# --- numbers ------------------------------------------------------------------------------------


def times(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"the product of a and b multiplied by {k}"
    return function("scaled_product(a, b)", what, f"a * b * {k}", pairs(numbers(pool, k)))


def minus(pool: Pool) -> Exercise:
    k = whole(pool)
    return function(f"minus_{k}(n)", f"n minus {k}", f"n - {k}", alone(numbers(pool, k)))


def scale_and_shift(pool: Pool) -> Exercise:
    k, b = whole(pool, 2, 12), whole(pool)
    what = f"n multiplied by {k}, plus {b}"
    return function("scale_and_shift(n)", what, f"n * {k} + {b}", alone(numbers(pool, b)))


def square_plus(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"the square of n plus {k}"
    return function(f"square_plus_{k}(n)", what, f"n**2 + {k}", alone(numbers(pool, k)))


def remainder(pool: Pool) -> Exercise:
    k = whole(pool, 3)
    what = f"the remainder of n divided by {k}, where n is not negative"
    values = [*map(abs, numbers(pool, k)), k + 2]
    return function("remainder(n)", what, f"n % {k}", alone(dict.fromkeys(values)))


def is_multiple(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"True if n is divisible by {k} and False otherwise"
    return function(f"divisible_by_{k}(n)", what, f"n % {k} == 0", alone(numbers(pool, k)))


def is_above(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"True if n is greater than {k} and False otherwise"
    return function(f"is_above_{k}(n)", what, f"n > {k}", alone(numbers(pool, k)))


def at_least(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"n, or {k} if n is less than {k}"
    return function(f"at_least_{k}(n)", what, f"max(n, {k})", alone(numbers(pool, k)))


def sum_plus(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"the sum of a and b plus {k}"
    return function("sum_plus(a, b)", what, f"a + b + {k}", pairs(numbers(pool, k)))


# --- strings ------------------------------------------------------------------------------------


def repeat(pool: Pool) -> Exercise:
    k = whole(pool, 2, 30)
    what = f"text multiplied by {k}, so that it is repeated {k} times"
    return function(f"repeat_{k}_times(text)", what, f"text * {k}", alone(texts(pool)))


def prefix(pool: Pool) -> Exercise:
    word = pool.entity(WORDS)
    what = f'the string "{word}" followed by text'
    return function(f"add_{word}(text)", what, f'"{word}" + text', alone(texts(pool, word)))


def suffix(pool: Pool) -> Exercise:
    word = pool.entity(WORDS)
    what = f'text with "{word}" added at its end'
    return function(f"append_{word}(text)", what, f'text + "{word}"', alone(texts(pool, word)))


def join(pool: Pool) -> Exercise:
    word = pool.entity(WORDS)
    what = f'the string a plus "{word}" plus the string b'
    returned = f'a + "{word}" + b'
    return function(f"join_with_{word}(a, b)", what, returned, pairs(texts(pool, word)))


def count_letter(pool: Pool) -> Exercise:
    letter = pool.entity(ascii_lowercase)
    what = f'how many times the letter "{letter}" occurs in text'
    own = letter, letter * 3, f"m{letter}n", f"{letter}p{letter}q"
    return function("count(text)", what, f'text.count("{letter}")', alone(texts(pool, *own)))


def replace_letter(pool: Pool) -> Exercise:
    old, new = pool.entity(ascii_lowercase), pool.entity(ascii_lowercase)
    new = new if new != old else new.upper()
    what = f'text with every "{old}" replaced by "{new}"'
    own = old, old * 3, f"m{old}n", f"{old}p{old}q", new
    return function(
        "replace(text)", what, f'text.replace("{old}", "{new}")', alone(texts(pool, *own))
    )


def first_characters(pool: Pool) -> Exercise:
    k = whole(pool, 1, 40)
    what = f"the first {k} characters of text, or all of text if it is shorter"
    long = "".join(pool.rng.choices(ascii_lowercase, k=k + 9))
    own = long, long[: k - 1], long[1 : k + 1], long[2 : k + 3]
    return function(f"first_{k}(text)", what, f"text[:{k}]", alone(texts(pool, *own)))


def contains_word(pool: Pool) -> Exercise:
    word = pool.entity(WORDS)
    what = f'True if "{word}" is in text and False otherwise'
    own = word, f"the {word}", f"{word}s", word[1:]
    return function(f"has_{word}(text)", what, f'"{word}" in text', alone(texts(pool, *own)))


def starts_with(pool: Pool) -> Exercise:
    word = pool.entity(WORDS)
    what = f'True if text starts with "{word}" and False otherwise'
    own = word, f"the {word}", f"{word}s", word[1:]
    returned = f'text.startswith("{word}")'
    return function(f"starts_with_{word}(text)", what, returned, alone(texts(pool, *own)))


# --- lists --------------------------------------------------------------------------------------


def sum_times(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"the sum of the list numbers, multiplied by {k}"
    return function("scaled_sum(numbers)", what, f"sum(numbers) * {k}", alone(lists(pool, k)))


def length_plus(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"the length of the list items plus {k}"
    return function(f"length_plus_{k}(items)", what, f"len(items) + {k}", alone(lists(pool, k)))


def count_value(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"the count of {k} in the list numbers"
    return function(f"count_{k}(numbers)", what, f"numbers.count({k})", alone(lists(pool, k)))


def contains_value(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"True if {k} is in the list numbers and False otherwise"
    return function(f"contains_{k}(numbers)", what, f"{k} in numbers", alone(lists(pool, k)))


def append_value(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"the list numbers plus the list [{k}]"
    return function(f"append_{k}(numbers)", what, f"numbers + [{k}]", alone(lists(pool, k)))


def add_to_each(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"a list of the numbers with {k} added to each"
    returned = f"[n + {k} for n in numbers]"
    return function(f"add_{k}_to_each(numbers)", what, returned, alone(lists(pool, k)))


def keep_above(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"a list of the numbers that are greater than {k}, in the same order"
    returned = f"[n for n in numbers if n > {k}]"
    return function(f"keep_above_{k}(numbers)", what, returned, alone(lists(pool, k)))


# --- standard input -----------------------------------------------------------------------------


def print_scaled(pool: Pool) -> Exercise:
    k, b = whole(pool, 2, 12), whole(pool)
    what = f"an integer n with input() and print n multiplied by {k}, plus {b}"
    code = f"n = int(input())\nprint(n * {k} + {b})\n"
    return program(what, code, (f"{n}\n" for n in numbers(pool, b)))


def print_minus(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"an integer n with input() and print n minus {k}"
    code = f"n = int(input())\nprint(n - {k})\n"
    return program(what, code, (f"{n}\n" for n in numbers(pool, k)))


def print_square_plus(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"an integer n with input() and print the square of n plus {k}"
    code = f"n = int(input())\nprint(n**2 + {k})\n"
    return program(what, code, (f"{n}\n" for n in numbers(pool, k)))


def print_sum_plus(pool: Pool) -> Exercise:
    k = whole(pool)
    what = f"two integers a and b, each on its own line, with input() and print a + b + {k}"
    code = f"a = int(input())\nb = int(input())\nprint(a + b + {k})\n"
    return program(what, code, (f"{a}\n{b}\n" for a, b in pairs(numbers(pool, k))))


def print_suffixed(pool: Pool) -> Exercise:
    word = pool.entity(WORDS)
    what = f'a string s with input() and print s + "{word}"'
    code = f's = input()\nprint(s + "{word}")\n'
    return program(what, code, (f"{text}\n" for text in texts(pool, word)))


def print_repeated(pool: Pool) -> Exercise:
    k = whole(pool, 2, 30)
    what = f"a string s with input() and print s * {k}, which repeats it {k} times"
    code = f"s = input()\nprint(s * {k})\n"
    return program(what, code, (f"{text}\n" for text in texts(pool)))


def print_compared(pool: Pool) -> Exercise:
    k, word, other = whole(pool), pool.entity(WORDS[:20]), pool.entity(WORDS[20:])
    what = f'an integer n with input() and print "{word}" if n is greater than {k}, else "{other}"'
    code = f'n = int(input())\nprint("{word}" if n > {k} else "{other}")\n'
    return program(what, code, (f"{n}\n" for n in numbers(pool, k)))


Family = Callable[[Pool], Exercise]
FAMILIES: dict[str, tuple[tuple[str, Family], ...]] = {
    "numbers": (
        ("times", times),
        ("scale_and_shift", scale_and_shift),
        ("minus", minus),
        ("square_plus", square_plus),
        ("remainder", remainder),
        ("is_multiple", is_multiple),
        ("is_above", is_above),
        ("at_least", at_least),
        ("sum_plus", sum_plus),
    ),
    "stdin": (
        ("print_scaled", print_scaled),
        ("print_minus", print_minus),
        ("print_square_plus", print_square_plus),
        ("print_sum_plus", print_sum_plus),
        ("print_suffixed", print_suffixed),
        ("print_repeated", print_repeated),
        ("print_compared", print_compared),
    ),
    "strings": (
        ("repeat", repeat),
        ("prefix", prefix),
        ("suffix", suffix),
        ("join", join),
        ("count_letter", count_letter),
        ("replace_letter", replace_letter),
        ("first_characters", first_characters),
        ("contains_word", contains_word),
        ("starts_with", starts_with),
    ),
    "lists": (
        ("sum_times", sum_times),
        ("length_plus", length_plus),
        ("count_value", count_value),
        ("contains_value", contains_value),
        ("append_value", append_value),
        ("add_to_each", add_to_each),
        ("keep_above", keep_above),
    ),
}
