"""Reflection and abstraction, with a model that says what it is told to say."""

import json

import fakes
import numpy as np
import pytest
from fakes import Scripted, WordMeter, attempt, behavior, insight, problem

from pmd_jax.memory import behaviors
from pmd_jax.memory.bank import Bank, MemoryConfig, Operation
from pmd_jax.memory.reflection import ReflectionConfig, reflect

JSON, LINES = ReflectionConfig(), ReflectionConfig(style="lines")
GOOD = "When summing masses, multiply each atom by its count first."
LESSON = "When hydrogen is hidden in a formula, do not forget to count it."
LEAK = "When asked for this mass, the answer is B as always."


def group(number, outcomes, step=1):
    return {
        problem(number).id: (
            problem(number),
            tuple(attempt(number, step, s, ok) for s, ok in enumerate(outcomes)),
        )
    }


def both(strategies=(), lessons=()):
    return json.dumps({"strategies": list(strategies), "lessons": list(lessons)})


# --- reflect ---------------------------------------------------------------------------------


def test_one_batch_for_all_groups_and_each_outcome_its_kinds():
    groups = group(0, [1, 0]) | group(1, [1, 1]) | group(2, [0, 0])
    lone = [json.dumps({"strategies": [GOOD]}), json.dumps({"lessons": [LESSON]})]
    generate = Scripted([both([GOOD], [LESSON]), *lone])
    result = reflect(groups, Bank(MemoryConfig()), generate, WordMeter(), 1, JSON)
    assert [len(chats) for chats in generate.calls] == [3]
    kinds = [[i.kind for i in items] for items in result.insights.values()]
    assert kinds == [["strategy", "lesson"], ["strategy"], ["lesson"]]
    assert result.counts.metrics() == {
        "calls": 3, "parsed": 4, "unparsable": 0, "leaked": 0, "degenerate": 0, "usable": 4,
        "usable_fraction": 1.0,
    }  # fmt: skip


def test_an_insight_tells_where_it_comes_from():
    generate = Scripted([both([GOOD], [LESSON])])
    result = reflect(group(0, [0, 0, 0, 1]), Bank(MemoryConfig()), generate, WordMeter(), 1, JSON)
    strategy, lesson = result.insights["toy/chemistry/train/0"]
    key = "toy/chemistry/train/0@1"
    assert (strategy.id, lesson.id) == (f"{key}#strategy1", f"{key}#lesson1")
    assert (strategy.step, strategy.success_ratio, strategy.text) == (1, 0.25, GOOD)
    assert strategy.experience_ids == (f"{key}.3", f"{key}.0", f"{key}.1")


def test_bad_items_are_counted_and_kept_out():
    generate = Scripted([both([LEAK, GOOD, "Too short."], ["Bad."] * 4), "nothing at all"])
    groups = group(0, [1, 0]) | group(1, [1, 0])
    result = reflect(groups, Bank(MemoryConfig()), generate, WordMeter(), 1, JSON)
    assert [i.text for items in result.insights.values() for i in items] == [GOOD]
    counts = result.counts
    assert (counts.parsed, counts.unparsable) == (6, 2)
    assert (counts.leaked, counts.degenerate, counts.usable) == (1, 4, 1)
    assert counts.usable_fraction == 1 / 8
    assert ("names a letter", LEAK) in [(r.reason, r.text) for r in result.refused]
    assert counts.parsed == counts.leaked + counts.degenerate + counts.usable


def test_attempts_are_distinct_cut_and_few_and_old_insights_are_shown():
    bank = Bank(MemoryConfig())
    bank.rewrite_insights(0, problem().id, [insight(text="When new, look at the old.")])
    long = attempt(0, 1, 0, text="first " * 50)
    others = [attempt(0, 1, s, text=f"unlike {s}") for s in (2, 3)]
    same = attempt(0, 1, 1, text=long.text)
    generate = Scripted([json.dumps({"strategies": [GOOD]})])
    config = ReflectionConfig(attempt_tokens=5)
    groups = {problem().id: (problem(), (long, same, *others))}
    result = reflect(groups, bank, generate, WordMeter(), 1, config)
    text = generate.calls[0][0][0]["content"]
    assert text.count("first") == 5 and "unlike 2" in text and "unlike 3" not in text
    assert "When new, look at the old." in text
    (new,) = result.insights[problem().id]
    assert new.experience_ids == (long.id, others[0].id)


def test_a_solved_problem_with_full_strategies_is_skipped():
    bank = Bank(MemoryConfig(strategies_per_problem=1))
    bank.rewrite_insights(0, problem().id, [insight()])
    generate = Scripted([])
    assert reflect(group(0, [1, 1]), bank, generate, WordMeter(), 1, JSON).insights == {}
    assert generate.calls == []
    keen = ReflectionConfig(skip_solved=False)
    generate = Scripted([json.dumps({"strategies": [GOOD]})])
    assert reflect(group(0, [1, 1]), bank, generate, WordMeter(), 1, keen).counts.usable == 1


def test_nobody_writes_for_a_frozen_bank(tmp_path):
    Bank(MemoryConfig()).save(tmp_path / "bank")
    bank = Bank.open(MemoryConfig(lifetime="frozen", path=str(tmp_path / "bank")))
    generate = Scripted([])
    assert reflect(group(0, [1, 0]), bank, generate, WordMeter(), 1, JSON).insights == {}
    assert (
        behaviors.abstract([problem()], np.zeros(1, int), bank, generate, 1, JSON).cluster is None
    )
    assert generate.calls == []


def test_lines_ask_for_one_kind_per_chat_in_one_batch():
    generate = Scripted([" summing masses, multiply each atom by its count.", " unsure, guess"])
    result = reflect(group(0, [1, 0, 0]), Bank(MemoryConfig()), generate, WordMeter(), 1, LINES)
    (chats,) = generate.calls
    assert [c[-1]["content"] for c in chats] == ["Strategy: When", "Lesson: When"]
    (only,) = result.insights[problem().id]
    assert only.text == "When summing masses, multiply each atom by its count."
    assert (result.counts.calls, result.counts.unparsable, result.counts.usable) == (2, 1, 1)


def test_a_kind_that_is_turned_off_is_not_asked_for():
    generate = Scripted([json.dumps({"lessons": [LESSON]})])
    config = ReflectionConfig(strategies=0)
    groups = group(0, [1, 0]) | group(1, [1, 1])
    result = reflect(groups, Bank(MemoryConfig()), generate, WordMeter(), 1, config)
    assert [k for k, items in result.insights.items() if items] == [problem(0).id]


# --- cluster and abstract --------------------------------------------------------------------


def adding(name="behavior_multiply_by_count", instruction=GOOD[5:], operation="ADD"):
    about = {"kind": "skill", "when": "When masses add up", "instruction": instruction}
    return {"op": operation, "name": name, **about}


def informed_bank(numbers, step=0):
    bank = Bank(MemoryConfig())
    for n in numbers:
        bank.rewrite_insights(step, problem(n).id, [insight(n, step), insight(n, step, "lesson")])
    return bank


PROBLEMS = [problem(n) for n in range(8)]
LABELS = np.array([0, 1, 0, 1, 0, 1, 2, 2])


def test_problems_cluster_by_their_questions():
    masses = [problem(n, stem=f"What is the molar mass of compound {n}?") for n in range(4)]
    light = [problem(n, stem=f"At which angle does light ray {n} bend?") for n in range(4, 8)]
    labels = behaviors.cluster([*masses, *light], fakes.embed, ReflectionConfig(clusters=2))
    assert labels.tolist() == [0] * 4 + [1] * 4


def test_the_cluster_with_the_most_news_is_read_and_then_rests():
    bank = informed_bank([0, 1, 2, 3, 4, 5])
    bank.rewrite_insights(1, problem(5).id, [insight(5, 1, text="When late, say so to all.")])
    generate = Scripted(lambda chat: json.dumps([adding()]))
    first = behaviors.abstract(PROBLEMS, LABELS, bank, generate, 1, JSON)
    assert (first.cluster, len(generate.calls)) == (0, 1)  # both have 3 with news: the lower label
    bank.mark_abstracted(1, first.problem_ids)
    second = behaviors.abstract(PROBLEMS, LABELS, bank, generate, 2, JSON)
    assert second.cluster == 1
    assert second.problem_ids[0] == problem(5).id  # the latest insight first
    bank.mark_abstracted(2, second.problem_ids)
    assert behaviors.abstract(PROBLEMS, LABELS, bank, generate, 3, JSON).cluster is None
    bank.rewrite_insights(4, problem(3).id, [insight(3, 4, text="When news comes, read it.")])
    assert behaviors.abstract(PROBLEMS, LABELS, bank, generate, 4, JSON).cluster == 1


def test_a_behavior_tells_where_it_comes_from():
    bank = informed_bank([0, 2, 4])
    bank.apply_operations(0, [Operation("ADD", behavior("behavior_known"))], fakes.embed)
    generate = Scripted(
        [json.dumps([adding(), adding("known", operation="UPDATE"), {"op": "NONE"}])]
    )
    result = behaviors.abstract(PROBLEMS, LABELS, bank, generate, 7, JSON)
    assert [op.kind for op in result.operations] == ["ADD", "UPDATE", "NONE"]
    made = result.operations[0].behavior
    assert (made.id, made.step, made.last_used) == ("behavior_multiply_by_count@7", 7, 7)
    assert set(made.insight_ids) == {i.id for n in (0, 2, 4) for i in bank.insights(problem(n).id)}
    text = generate.calls[0][0][0]["content"]
    assert "behavior_known" in text and insight(2).text in text
    bank.apply_operations(7, result.operations, fakes.embed)
    assert bank.sizes()["behaviors"] == 1  # both say the same, and one of them is kept


def test_too_few_problems_with_insights_make_no_behavior():
    generate = Scripted([])
    for numbers in ([0, 2], [6, 7], []):
        result = behaviors.abstract(PROBLEMS, LABELS, informed_bank(numbers), generate, 1, JSON)
        assert result == behaviors.Abstracted()


def test_warm_up_and_interval():
    config = ReflectionConfig(behaviors_warmup=3, behaviors_every=2)
    assert [s for s in range(9) if behaviors.is_due(s, config)] == [3, 5, 7]
    generate = Scripted([])
    early = behaviors.abstract(PROBLEMS, LABELS, informed_bank([0, 2, 4]), generate, 2, config)
    assert early.cluster is None


def test_behaviors_that_give_away_or_say_nothing_are_counted():
    items = [
        adding(instruction="write 18.02 and be done with it"),
        adding(instruction="choose option C whenever it is there"),
        adding(instruction="be careful"),
    ]
    generate = Scripted([json.dumps(items)])
    result = behaviors.abstract(PROBLEMS, LABELS, informed_bank([0, 2, 4]), generate, 1, JSON)
    assert result.operations == ()
    assert (result.counts.leaked, result.counts.degenerate, result.counts.usable) == (2, 1, 0)
    assert len(result.problem_ids) == 3  # read all the same, so not read for ever


def test_few_problems_are_read_per_call():
    config = ReflectionConfig(problems_per_call=2)
    generate = Scripted([json.dumps([{"op": "NONE"}])])
    result = behaviors.abstract(PROBLEMS, LABELS, informed_bank([0, 2, 4]), generate, 1, config)
    assert result.problem_ids == (problem(0).id, problem(2).id)


def test_lines_give_a_skill_and_a_mistake_from_one_batch():
    said = " weighing molecules, multiply every mass by its count."
    generate = Scripted([said, " weighing molecules, never drop hidden hydrogen atoms."])
    result = behaviors.abstract(PROBLEMS, LABELS, informed_bank([0, 2, 4]), generate, 1, LINES)
    (chats,) = generate.calls
    assert [c[-1]["content"] for c in chats] == ["Skill: When", "Mistake to avoid: When"]
    skill, mistake = (op.behavior for op in result.operations)
    assert (skill.kind, skill.name) == ("skill", "behavior_multiply_every_mass_count")
    assert (mistake.kind, mistake.name) == ("mistake", "behavior_never_drop_hidden_hydrogen")
    assert all("#lesson" in key for key in mistake.insight_ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"behaviors_every": 0}, r"behaviors_every: must be at least 1; got 0"),
        ({"lessons": -1}, r"lessons: must be at least 0; got -1"),
        ({"writer": "openai:localhost"}, r'writer: must be "policy".*got \'openai:localhost\''),
        ({"writer_timeout_seconds": 0.0}, r"writer_timeout_seconds: must be above 0; got 0"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReflectionConfig(**values)
    assert ReflectionConfig(writer="openai:http://localhost:8000/v1#qwen").writer
