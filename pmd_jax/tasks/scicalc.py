"""scicalc: generated multiple-choice science questions, in SciKnowEval's schema and subjects.

The embedded task: no download, any size, a seed. Every family of scicalc_families.py asks one kind
of calculation; its wrong options come from named mistakes. Splits share formulas, and neither
numbers nor entities. The same configuration gives the same problems, byte for byte, on every
machine: randomness comes from `random.Random` seeded with text.

Left out: questions that need no calculation, and more than four options.
"""

from __future__ import annotations

import difflib
import math
import random
from itertools import zip_longest

from pmd_jax.records import MultipleChoice, Problem, Split
from pmd_jax.tasks.scicalc_families import FAMILIES, Draw, Family, Pool
from pmd_jax.tasks.task import Task, TaskConfig, worked_examples
from pmd_jax.tasks.verifiers import LetterVerifier

SYSTEM = {
    "direct": "Choose the right option and reply with <answer>LETTER</answer> only.",
    "reasoning": (
        "Choose the right option. Respond in the following format:\n<reasoning>\n...\n</reasoning>"
        "\n<answer>\nLETTER\n</answer>"
    ),
}
CLOSING = {"direct": "", "reasoning": "\nPlease reason step by step."}
TRIES = 400  # draws until one is new and its options differ
APART = 0.02  # options differ by at least this share, so that rounding never decides


def show(value: float, unit: str) -> str:
    """Three significant digits and the unit: 0.0123 M, 45.6 g, 1.23 x 10^7 CFU/mL."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    if -3 <= exponent <= 4:
        digits = f"{round(value, 2 - exponent):.{max(2 - exponent, 0)}f}"
    else:
        digits = f"{value / 10**exponent:.2f} x 10^{exponent}"
    return f"{digits} {unit}".rstrip()


def options_of(draw: Draw, rng: random.Random) -> tuple[list[str], int] | None:
    """Four options and the place of the right one, or None where they are too close."""
    wrong = rng.sample(list(draw.mistakes.values()), 3)
    values = [draw.value, *wrong]
    pairs = [(a, b) for i, a in enumerate(values) for b in values[:i]]
    if any(abs(a - b) <= APART * max(abs(a), abs(b)) for a, b in pairs) or min(values) <= 0:
        return None
    place = rng.randrange(4)
    wrong.insert(place, draw.value)
    shown = [show(value, draw.unit) for value in wrong]
    return (shown, place) if len(set(shown)) == 4 else None


def make_problem(
    family: Family, name: str, subject: str, key: str, split: Split, style: str, seen: set[str]
) -> Problem:
    """A question of `family` that is not in `seen`; `key` seeds it and ends with its number."""
    rng = random.Random(key)
    for _ in range(TRIES):
        draw = family(Pool(rng, split))
        options = options_of(draw, rng)
        if draw.stem in seen or options is None:
            continue
        seen.add(draw.stem)
        shown, place = options
        listed = "\n".join(f"{'ABCD'[i]}: {text}" for i, text in enumerate(shown))
        return Problem(
            id=f"scicalc/{subject}/{split}/{key.rpartition('/')[2]}",
            subject=subject,
            subtask=name,
            stem=draw.stem,
            question=f"{draw.stem}\n\n{listed}{CLOSING[style]}",
            system=SYSTEM[style],
            check=MultipleChoice(tuple(shown), "ABCD"[place]),
        )
    raise ValueError(
        f"config.task.num_{split}: the family {name} has no more different questions than asked "
        f"before number {key.rpartition('/')[2]}; ask for fewer, or for more families"
    )


def chosen_families(config: TaskConfig) -> list[tuple[str, str, Family]]:
    """(subject, name, family), subjects taking turns, so that any prefix is balanced."""
    if config.subject and config.subject not in FAMILIES:
        raise ValueError(
            f"config.task.subject: must be one of {', '.join(FAMILIES)}, or '' for all; "
            f"got {config.subject!r}"
        )
    subjects = [config.subject] if config.subject else list(FAMILIES)
    known = [name for subject in subjects for name, _ in FAMILIES[subject]]
    for name in config.families:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"config.task.families: unknown family {name!r}; {hint}known: {', '.join(known)}"
            )
    columns = [[(subject, *family) for family in FAMILIES[subject]] for subject in subjects]
    turns = [entry for row in zip_longest(*columns) for entry in row if entry is not None]
    return [entry for entry in turns if not config.families or entry[1] in config.families]


def load_scicalc(config: TaskConfig) -> Task:
    """Generates all splits; the worked examples come first, so train never repeats them."""
    families = chosen_families(config)
    seen: set[str] = set()

    def generate(split: Split, count: int, label: str) -> tuple[Problem, ...]:
        problems = []
        for i in range(count):
            subject, name, family = families[i % len(families)]
            key = f"{config.seed}/{label}/{name}/{i}"
            problems.append(
                make_problem(family, name, subject, key, split, config.response_style, seen)
            )
        return tuple(problems)

    examples = generate("train", config.format_shots, "shots")
    splits: dict[Split, tuple[Problem, ...]] = {
        "train": generate("train", config.num_train, "train"),
        "validation": generate("validation", config.num_validation, "validation"),
        "test": generate("test", config.num_test, "test"),
    }
    shots = worked_examples(examples, config.response_style)
    return Task(config, splits, shots, LetterVerifier(config.verifier))
