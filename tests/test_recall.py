"""What the teacher is given: a problem's own memory, or a control's."""

import fakes
import pytest

from pmd_jax.memory.bank import Bank, MemoryConfig
from pmd_jax.memory.merging import Operation
from pmd_jax.memory.recall import Recall, Recalled
from pmd_jax.memory.retrieval import Retriever

STEMS = ("molar mass of water", "speed of a falling stone", "current through a resistor", "pH")
PROBLEMS = [fakes.problem(i, stem) for i, stem in enumerate(STEMS)]
NEW = fakes.problem(9, "molar mass of air")


def bank(steps=1, problems=PROBLEMS):
    """One strategy and two lessons per problem and step, and one behavior named after its stem."""
    made = Bank(MemoryConfig(lessons_per_problem=9, strategies_per_problem=9))
    for step in range(steps):
        made.begin_step(step)
        for i, problem in enumerate(problems):
            made.remember(step, [fakes.attempt(i, step)])
            new = [fakes.insight(i, step)]
            new += [fakes.insight(i, step, "lesson")]
            new += [fakes.insight(i, step, "lesson", f"Units of {step} in {i} get lost.", n=2)]
            made.rewrite_insights(step, problem.id, new)
            behavior = fakes.behavior(f"behavior_{i}", step, when=problem.stem, instruction=str(i))
            made.apply_operations(step, [Operation("ADD", behavior)], fakes.embed)
    return made


def recall(control="none", **about):
    return Recall(PROBLEMS, Retriever(fakes.embed), control, **about)


def owners(recalled):
    return {insight.problem_id for insight in recalled.insights}


def test_without_a_control_a_problem_is_given_its_own_and_the_nearest():
    made = bank()
    found = recall()(0, made, PROBLEMS, 1)
    for i, (problem, own) in enumerate(zip(PROBLEMS, found, strict=True)):
        assert own.insights == made.insights(problem.id)
        assert own.experiences == made.experiences(problem.id)
        assert [b.name for b in own.behaviors] == [f"behavior_{i}"]


def test_a_problem_that_memory_has_not_seen_is_given_behaviors_alone():
    [found] = recall()(0, bank(), [NEW], 1)
    assert found.insights == found.experiences == ()
    assert [b.name for b in found.behaviors] == ["behavior_0"]


def test_shuffled_is_all_of_one_other_problem_and_stays_with_it():
    made = bank(steps=2)
    shuffled = recall("shuffled")
    for i, (problem, found) in enumerate(
        zip(PROBLEMS, shuffled(1, made, PROBLEMS, 1), strict=True)
    ):
        [other] = owners(found)
        assert other != problem.id
        assert found.insights == made.insights(other)
        assert found.behaviors[0].name == f"behavior_{other[-1]}" != f"behavior_{i}"
        [again] = shuffled(5, bank(steps=1), [problem], 1)
        assert owners(again) == {other}
    other_seed = recall("shuffled", seed=1)(1, made, PROBLEMS, 0)
    assert list(map(owners, other_seed)) != list(map(owners, shuffled(1, made, PROBLEMS, 0)))


def test_shuffled_gives_nothing_where_nothing_belongs_elsewhere():
    assert recall("shuffled")(0, bank(problems=PROBLEMS[:1]), PROBLEMS[:1], 1) == [Recalled()]


def test_random_gives_as_many_of_each_kind_from_anywhere_else():
    made = bank()
    drawn = recall("random")
    seen = set()
    for step in range(20):
        [found] = drawn(step, made, PROBLEMS[:1], 2)
        assert [i.kind for i in found.insights] == ["strategy", "lesson", "lesson"]
        assert len(found.behaviors) == 2 and len(found.experiences) == 1
        seen |= owners(found) | {attempt.problem_id for attempt in found.experiences}
    assert seen == {p.id for p in PROBLEMS[1:]}
    assert drawn(3, made, PROBLEMS, 1) == recall("random")(3, made, PROBLEMS, 1)


def test_stale_is_memory_as_it_was():
    made, stale = bank(steps=1), recall("stale", stale_steps=2)
    assert stale(0, made, PROBLEMS, 1)[0] == Recalled()
    made = bank(steps=4)
    past = bank(steps=2)
    found = stale(3, made, PROBLEMS, 1)
    assert [r.insights for r in found] == [past.insights(p.id) for p in PROBLEMS]
    assert found == recall("stale", stale_steps=2)(3, made, PROBLEMS, 1)  # as after a resume
    assert found != recall()(3, made, PROBLEMS, 1)


@pytest.mark.parametrize("control", ["none", "shuffled", "random", "stale"])
def test_reading_changes_nothing(control):
    made = bank(steps=3)
    before = made.digest(), made.records()
    recall(control, stale_steps=1)(2, made, PROBLEMS, 2)
    assert (made.digest(), made.records()) == before
