"""Generated questions: right answers, named mistakes, splits that share nothing, one seed."""

import math
import random
import re
from collections import Counter

import pytest

from pmd_jax.records import Problem
from pmd_jax.tasks.generated import Pool
from pmd_jax.tasks.scicalc import show
from pmd_jax.tasks.scicalc_families import FAMILIES
from pmd_jax.tasks.task import TaskConfig, baselines, load_task

SMALL = TaskConfig(num_train=92, num_validation=46, num_test=46)
ALL = [(subject, name, family) for subject, rows in FAMILIES.items() for name, family in rows]


@pytest.fixture(scope="module")
def task():
    return load_task(SMALL)


def draws(family, split="train", count=40):
    return [family(Pool(random.Random(f"{split}{i}"), split)) for i in range(count)]


def numbers(text: str) -> list[float]:
    """The numbers of a text; digits of formulas and units, as in HNO3 and m2, are none."""
    return [float(x) for x in re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?", text)]


def by_name(name):
    return next(family for _, other, family in ALL if other == name)


# Each formula is written out once more, from the numbers of the question itself.
FORMULAS = {
    "kinetic_energy": lambda m, v: 0.5 * m * v * v,
    "free_fall": lambda t, g: 0.5 * g * t * t,
    "electric_power": lambda r, v: v * v / r,
    "wavelength": lambda f, v: v / f,
    "centripetal": lambda r, v: v * v / r,
    "michaelis_menten": lambda vmax, km, s: vmax * s / (km + s),
    "hardy_weinberg": lambda q, n: 2 * q * (1 - q) * n,
    "half_life": lambda start, half, t: start * 0.5 ** (t / half),
    "population_doubling": lambda start, doubling, t: start * 2 ** (t / doubling),
    "dilution": lambda v, c, total: c * v / total,
    "strong_acid_ph": lambda c: -math.log10(c),
    "heat_conduction": lambda area, cm, k, gap: k * area * gap / (cm / 100),
    "dihybrid_cross": lambda n: n * 3 / 16,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_right_value_is_the_formula_of_the_question_s_own_numbers(name):
    for draw in draws(by_name(name)):
        found = numbers(draw.stem)[: FORMULAS[name].__code__.co_argcount]
        assert draw.value == pytest.approx(FORMULAS[name](*found), rel=1e-9), draw.stem


@pytest.mark.parametrize(
    ("name", "stem", "value"),
    [
        ("molar_mass", "What is the mass of 2 mol of CaCO3?", 200.18),  # 40.08 + 12.01 + 48.00
        ("moles_from_mass", "How many moles are in 98 g of H2SO4?", 98 / 98.076),
    ],
)
def test_molar_masses_worked_by_hand(name, stem, value):
    found = {d.stem: d.value for d in draws(by_name(name), count=6000)}
    assert found[stem] == pytest.approx(value, rel=1e-6)


def test_there_are_enough_families_in_four_subjects():
    assert set(FAMILIES) == {"chemistry", "physics", "biology", "material"}
    assert len(ALL) >= 20
    assert len({name for _, name, _ in ALL}) == len(ALL)


@pytest.mark.parametrize(("subject", "name", "family"), ALL, ids=[name for _, name, _ in ALL])
def test_every_family_draws_positive_values_and_names_at_least_three_mistakes(
    subject, name, family
):
    for split in ("train", "validation", "test"):
        for draw in draws(family, split, 20):
            assert draw.value > 0 and len(draw.mistakes) >= 3
            assert all(math.isfinite(value) for value in draw.mistakes.values())
            assert len(draw.stem.split()) <= 60


@pytest.mark.parametrize(("subject", "name", "family"), ALL, ids=[name for _, name, _ in ALL])
def test_splits_share_no_question(subject, name, family):
    stems = [{d.stem for d in draws(family, s)} for s in ("train", "validation", "test")]
    assert not stems[0] & stems[1] and not stems[0] & stems[2] and not stems[1] & stems[2]


def test_splits_share_no_number_and_no_entity():
    def drawn(split):
        pool = Pool(random.Random(0), split)
        entities = {pool.entity(list("abcdefghij")) for _ in range(200)}
        return entities, {pool.number(1, 30, 1) for _ in range(400)}

    parts = [drawn(split) for split in ("train", "validation", "test")]
    for kind in (0, 1):
        assert set.union(*(part[kind] for part in parts)) == set(
            "abcdefghij" if kind == 0 else range(1, 31)
        )
        assert sum(len(part[kind]) for part in parts) == (10, 30)[kind]


def test_problems_are_complete_and_different(task):
    everything = [p for split in task.splits.values() for p in split]
    assert len({p.id for p in everything}) == len(everything) == 92 + 46 + 46
    assert len({p.stem for p in everything}) == len(everything)
    for problem in everything:
        assert len(set(problem.check.options)) == 4
        listed = "\n".join(
            f"{letter}: {o}" for letter, o in zip("ABCD", problem.check.options, strict=True)
        )
        assert problem.question == f"{problem.stem}\n\n{listed}\nPlease reason step by step."


def test_any_prefix_is_balanced_over_families_and_letters(task):
    families = Counter(p.subtask for p in task.splits["train"])
    assert set(families.values()) == {92 // len(ALL)}
    letters = Counter(
        p.check.answer for p in load_task(TaskConfig(num_train=920, num_test=1)).splits["train"]
    )
    assert min(letters.values()) > 180


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(task):
    again, other = load_task(SMALL), load_task(TaskConfig(num_train=92, num_test=46, seed=1))
    assert again.splits == task.splits
    assert other.splits["test"] != task.splits["test"]


def test_these_exact_bytes_on_every_machine(task):
    first = task.splits["train"][0]
    assert first == Problem(
        id="scicalc/chemistry/train/0",
        subject="chemistry",
        subtask="molar_mass",
        stem=first.stem,
        question=first.question,
        system=first.system,
        check=first.check,
    )
    assert first.stem == "What is the mass of 1.6 mol of MgCl2?"
    assert first.check.correct_option == "152 g"  # 1.6 * (24.31 + 2 * 35.45)


@pytest.mark.parametrize("style", ["direct", "reasoning"])
def test_worked_examples_show_the_format_and_are_in_no_split(style):
    config = TaskConfig(num_train=23, num_test=23, format_shots=2, response_style=style)
    task = load_task(config)
    messages = task.student_messages(task.splits["test"][0])
    assert [m["role"] for m in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    questions = {p.question for split in task.splits.values() for p in split}
    for shown, reply in zip(messages[1:5:2], messages[2:5:2], strict=True):
        assert shown["content"] not in questions
        assert "<answer>" in reply["content"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123 g"), (45.64, "45.6 g"), (1234.0, "1230 g"), (1.2e-5, "1.20 x 10^-5 g"),
     (1.925e6, "1.93 x 10^6 g"), (99.96, "100.0 g")],
)  # fmt: skip
def test_numbers_are_shown_with_three_digits(value, text):
    assert show(value, "g") in (text, text.replace("100.0", "100"))


def test_baselines_by_hand(task):
    problems = [p for p in task.splits["train"] if p.check.answer in "AB"][:5]
    counts = Counter(p.check.answer for p in problems)
    scores = baselines(problems)
    assert scores.chance == 0.25
    assert scores.constant == max(counts.values()) / 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"families": ("kinetic_enrgy",)},
            "unknown family 'kinetic_enrgy'; did you mean kinetic_energy",
        ),
        ({"subject": "alchemy"}, "config.task.subject: must be one of chemistry"),
        ({"format_shots": 9}, "format_shots: must be between 0 and 4; got 9"),
        ({"num_test": 0}, "num_train and num_test must be at least 1; got 92 and 0"),
        (
            {"num_train": 90_000, "families": ("free_fall",)},
            "num_train: the family free_fall has no more",
        ),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        load_task(TaskConfig(**{"num_train": 92, "num_test": 4, **changes}))
