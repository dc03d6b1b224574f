"""Memory dynamics, on banks small enough to count by hand."""

import math

import fakes
import pytest
from fakes import attempt, behavior, insight

from pmd_jax.memory.bank import Bank, MemoryConfig, Operation
from pmd_jax.memory.dynamics import citations, dynamics, entropy_nats, replay, utility
from pmd_jax.records import to_dict

ONE = "toy/chemistry/train/1"


def told(bank):
    return dynamics(bank.events, bank.config)[0]


def test_sizes_and_evictions_are_those_of_the_bank_at_every_step():
    """Two attempts a step with one outcome, room for two: from the second step on two go."""
    bank = Bank(MemoryConfig(successes_per_problem=2))
    sizes = []
    for step in range(3):
        bank.begin_step(step)
        bank.remember(step, [attempt(1, step, sample) for sample in (0, 1)])
        sizes.append(bank.sizes()["experiences"])
    steps = told(bank)
    assert [s.sizes["experience"] for s in steps] == sizes == [2, 2, 2]
    assert [s.added["experience"] for s in steps] == [2, 2, 2]
    assert [s.evicted["experience"] for s in steps] == [0, 2, 2]


def test_capacity_is_reached_by_share_of_problems():
    bank = Bank(MemoryConfig(successes_per_problem=2, failures_per_problem=1))
    bank.remember(0, [attempt(1, 0, 0), attempt(2, 0, 0), attempt(2, 0, 1, correct=False)])
    bank.remember(1, [attempt(1, 1, 0)])
    first, second = told(bank)
    assert (first.at_capacity["success"], first.at_capacity["failure"]) == (0, 0.5)
    assert (second.at_capacity["success"], second.at_capacity["failure"]) == (0.5, 0.5)
    assert second.at_capacity["strategy"] == 0


def test_age_is_the_mean_of_steps_since_entries_came():
    """One of step 0, one of step 3: at step 4 they are 4 and 1 old. None where nothing is."""
    bank = Bank(MemoryConfig())
    for step, new in ((0, [attempt(1, 0)]), (3, [attempt(1, 3)]), (4, [])):
        bank.begin_step(step)
        bank.remember(step, new)
    assert [s.mean_age["experience"] for s in told(bank)] == [0, 1.5, 2.5]
    assert told(bank)[0].mean_age["behavior"] is None


def test_a_confirmed_insight_is_a_duplicate_and_a_change_of_the_kept_one():
    bank = Bank(MemoryConfig())
    old = insight(1, 0, text="When asked, add the masses.", ratio=0.25)
    bank.rewrite_insights(0, ONE, [old])
    again = insight(1, 2, text="when asked add the masses", ratio=0.75)
    bank.rewrite_insights(2, ONE, [again, insight(1, 2, "lesson")])
    steps, entries = dynamics(bank.events, bank.config)
    assert (steps[1].confirmed, steps[1].added["insight"]) == (1, 1)
    assert steps[1].duplicate_rate["insight"] == 0.5
    entry = entries[old.id]
    assert entry.at(1)["success_ratio"] == 0.25 and entry.at(2)["success_ratio"] == 0.75
    assert list(entry.source_ids) == [f"{ONE}@0.0", f"{ONE}@2.0"]


def test_an_insight_beyond_capacity_is_evicted_and_one_never_kept_is_not():
    bank = Bank(MemoryConfig(lessons_per_problem=1))
    low = insight(1, 0, "lesson", "Check the units.", ratio=0.1)
    high = insight(1, 1, "lesson", "Square the radius first.", ratio=0.9)
    bank.rewrite_insights(0, ONE, [low])
    bank.rewrite_insights(1, ONE, [high, insight(1, 1, "lesson", "Do not round.", 0.2, 2)])
    last = told(bank)[-1]
    assert (last.added["insight"], last.evicted["insight"]) == (1, 1)
    assert replay(bank.events)[low.id].removed == 1
    assert replay(bank.events)[low.id].at(1) is None


def test_behaviors_merge_update_and_are_evicted():
    bank = Bank(MemoryConfig(behaviors=1))
    first = behavior(step=0)
    bank.apply_operations(0, [Operation("ADD", first)], fakes.embed)
    bank.apply_operations(1, [Operation("ADD", behavior("behavior_sum_again", 1))], fakes.embed)
    other = behavior(step=2, when="When gas expands", instruction="hold pressure times volume")
    bank.apply_operations(2, [Operation("UPDATE", other)], fakes.embed)
    third = behavior("behavior_light", 3, when="When light bends", instruction="compare indices")
    bank.apply_operations(3, [Operation("ADD", third)], fakes.embed)
    steps = told(bank)
    assert [s.merged for s in steps] == [0, 1, 0, 0]
    assert [s.updated for s in steps] == [0, 0, 1, 0]
    assert [s.added["behavior"] for s in steps] == [1, 0, 0, 1]
    assert [s.evicted["behavior"] for s in steps] == [0, 0, 0, 1]
    assert [s.duplicate_rate["behavior"] for s in steps] == [0, 1, None, 0]
    assert [s.at_capacity["behaviors"] for s in steps] == [1, 1, 1, 1]


def test_entropy_of_citations_is_log_n_where_all_are_cited_alike():
    bank = Bank(MemoryConfig())
    two = [
        behavior("behavior_sum", 0, when="When masses", instruction="add"),
        behavior("behavior_light", 0, when="Where light bends", instruction="compare indices"),
    ]
    bank.apply_operations(0, [Operation("ADD", b) for b in two], fakes.embed)
    bank.cite(1, [two[0].id, two[1].id, two[0].id, two[1].id])
    bank.cite(2, [two[0].id, two[0].id, two[0].id])
    bank.begin_step(3)
    none, even, single, silent = told(bank)
    assert none.citation_entropy_nats is None and none.citations == 0
    assert even.citations == 4 and even.cited_behaviors == 2
    assert even.citation_entropy_nats == pytest.approx(math.log(2))
    assert even.citation_evenness == pytest.approx(1)
    assert (single.citation_entropy_nats, single.citation_evenness) == (0, 0)
    assert silent.citation_evenness is None
    assert replay(bank.events)[two[0].id].at(1)["uses"] == 2
    assert replay(bank.events)[two[0].id].at(2)["uses"] == 5
    assert entropy_nats([1, 3]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_what_a_step_forgets_is_gone_at_the_next():
    bank = Bank(MemoryConfig(lifetime="step"))
    for step in (0, 1):
        bank.begin_step(step)
        bank.remember(step, [attempt(1, step)])
    steps, entries = dynamics(bank.events, bank.config)
    assert [s.sizes["experience"] for s in steps] == [1, 1]
    assert steps[1].evicted["experience"] == 1
    assert entries[f"{ONE}@0.0"].removed == 1


def test_the_end_of_a_replay_is_what_the_bank_holds():
    """The two readers of events agree, on a history with all of them."""
    from test_bank import lived_bank

    bank = lived_bank()
    entries = replay(bank.events).values()
    for level, items in list(bank.records().items())[:3]:
        here = [e for e in entries if f"{e.level}s" == level and e.removed is None]
        assert {e.id: e.fields for e in here} == {item["id"]: item for item in items}
    steps = told(bank)
    assert list(steps[-1].sizes.values()) == [
        bank.sizes()[name] for name in ("experiences", "insights", "behaviors")
    ]


def test_inherited_entries_come_with_the_first_step(tmp_path):
    earlier = Bank(MemoryConfig())
    earlier.remember(5, [attempt(1, 5)])
    earlier.save(tmp_path / "bank")
    bank = Bank.open(MemoryConfig(path=str(tmp_path / "bank")))
    (entry,) = replay(bank.events).values()
    assert (entry.id, entry.added) == (f"earlier:{ONE}@5.0", 0)


# --- rows -----------------------------------------------------------------------------------


def row(step, problem, correct, *cited):
    return {"step": step, "problem": problem, "correct": correct, "cited": list(cited)}


@pytest.fixture
def entries():
    bank = Bank(MemoryConfig())
    bank.rewrite_insights(0, ONE, [insight(1, 0)])
    bank.apply_operations(0, [Operation("ADD", behavior(step=0))], fakes.embed)
    return replay(bank.events)


def test_hits_are_shares_of_rollouts_by_level(entries):
    one, two = insight(1, 0).id, behavior(step=0).id
    rows = [row(0, "p", 1, one, two), row(0, "p", 0, one), row(0, "q", 0), row(0, "q", 1, "q@0.0")]
    rows += [row(1, "p", 1)]
    first, second = citations(rows, entries)
    assert first.rollouts == 4
    assert first.share == {"experience": 0.25, "insight": 0.5, "behavior": 0.25}
    assert second.share == {"experience": 0, "insight": 0, "behavior": 0}


def test_utility_is_the_change_to_the_next_visit_by_what_was_cited(entries):
    """p: 0/2 with memory, then 1/2, then 2/2 (+0.5, +0.5: cited, not). q: 1/1 then 0/1 (-1)."""
    one = insight(1, 0).id
    rows = [row(0, "p", False, one), row(0, "p", False)]
    rows += [row(4, "p", True), row(4, "p", False, "p@4.0"), row(7, "p", True), row(7, "p", True)]
    rows += [row(1, "q", True), row(2, "q", False, one)]
    found = utility(rows, entries)
    assert (found["cited"].visits, found["cited"].mean_change) == (1, 0.5)
    assert found["cited"].standard_error is None
    assert (found["not cited"].visits, found["not cited"].mean_change) == (2, -0.25)
    assert found["not cited"].standard_error == pytest.approx(0.75)
    assert utility([], entries)["cited"].mean_change is None


def test_what_memory_holds_is_told_from_its_records():
    bank = Bank(MemoryConfig())
    bank.remember(0, [attempt(1, 0, 0), attempt(1, 0, 1, correct=False)])
    kinds = [entry.kind for entry in replay(bank.events).values()]
    assert kinds == ["success", "failure"]
    assert to_dict(attempt(1, 0, 0)) == replay(bank.events)[f"{ONE}@0.0"].fields
