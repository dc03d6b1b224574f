"""scicalc: generated multiple-choice science questions, in SciKnowEval's schema and subjects.

The embedded task: no download, any size, a seed. Every family of scicalc_families.py asks one kind
of calculation; its wrong options come from named mistakes. Splits share formulas, and neither
numbers nor entities.

Left out: questions that need no calculation, and more than four options.
"""

from __future__ import annotations

import math
import random

from pmd_jax.records import MultipleChoice, Problem
from pmd_jax.tasks.generated import Place, Pool, generate
from pmd_jax.tasks.scicalc_families import FAMILIES, Draw, Family
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


def load_scicalc(config: TaskConfig) -> Task:
    """Generates all splits."""
    style = config.response_style

    def make(family: Family, pool: Pool, place: Place) -> Problem | None:
        draw = family(pool)
        options = options_of(draw, pool.rng)
        if options is None:
            return None
        shown, right = options
        listed = "\n".join(f"{'ABCD'[i]}: {text}" for i, text in enumerate(shown))
        return Problem(
            id=f"scicalc/{place.subject}/{place.split}/{place.number}",
            subject=place.subject,
            subtask=place.name,
            stem=draw.stem,
            question=f"{draw.stem}\n\n{listed}{CLOSING[style]}",
            system=SYSTEM[style],
            check=MultipleChoice(tuple(shown), "ABCD"[right]),
        )

    examples, splits = generate(config, FAMILIES, make)
    return Task(config, splits, worked_examples(examples, style), LetterVerifier(config.verifier))
