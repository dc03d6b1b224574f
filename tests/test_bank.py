"""The bank: what it keeps, what it lets go, and that its history and its files tell the truth."""

import dataclasses
import json

import fakes
import pytest
from fakes import attempt, behavior, insight

from pmd_jax.memory import journal, store
from pmd_jax.memory.bank import Bank, MemoryConfig, Operation

KEY = "toy/chemistry/train/0"


def ids(items):
    return [item.id.removeprefix(f"{KEY}@") for item in items]


def lived_bank(config=None):
    """A bank with a history that touches every mutator, every eviction and a merge."""
    bank = Bank(config or MemoryConfig(successes_per_problem=1, behaviors=2))
    for step in range(4):
        bank.begin_step(step)
        bank.remember(step, [attempt(n, step, s, s == 0) for n in (1, 0) for s in range(7)])
        for n in (1, 0):
            new = [insight(n, step, "strategy", ratio=0.1 * step), insight(n, step, "lesson")]
            bank.rewrite_insights(step, f"toy/chemistry/train/{n}", new)
        bank.apply_operations(step, [Operation("ADD", told(step))], fakes.embed)
        bank.apply_operations(step, [Operation("ADD", behavior(step=step))], fakes.embed)
        bank.mark_abstracted(step, [KEY])
        bank.cite(step, [b.id for b in bank.behaviors if step % 2])
    return bank


def told(step):
    names = ["ionic charges", "photon wavelength", "lattice spacing", "gas pressure"]
    name = names[step].split()[0]
    instruction = f"balance {names[step]} before {names[step - 1]}"
    return behavior(f"behavior_{name}", step, when=f"When {names[step]}", instruction=instruction)


# --- experience -----------------------------------------------------------------------------


def test_experiences_keep_the_newest_per_outcome():
    bank = Bank(MemoryConfig(successes_per_problem=2, failures_per_problem=1))
    for step in range(3):
        bank.remember(step, [attempt(0, step, 0, True), attempt(0, step, 1, False)])
    assert ids(bank.experiences(KEY)) == ["1.0", "2.0", "2.1"]


def test_an_attempt_said_twice_is_kept_once_per_outcome():
    bank = Bank(MemoryConfig())
    bank.remember(0, [attempt(text="<answer>B</answer>"), attempt(sample=1, correct=False)])
    bank.remember(1, [attempt(step=1, text=" <answer>B</answer>\n")])
    bank.remember(1, [attempt(step=1, sample=2, correct=False, text="<answer>B</answer>")])
    assert ids(bank.experiences(KEY)) == ["0.0", "0.1", "1.2"]


def test_an_attempt_that_never_stayed_is_in_no_event():
    bank = Bank(MemoryConfig(successes_per_problem=1))
    bank.remember(0, [attempt(sample=s) for s in range(3)])
    assert [e["id"] for e in bank.events[-1]["added"]] == [f"{KEY}@0.2"]
    assert bank.events[-1]["evicted"] == []


# --- insight --------------------------------------------------------------------------------


def test_the_least_trusted_insight_goes_first_then_the_oldest():
    bank = Bank(MemoryConfig(strategies_per_problem=2))
    bank.rewrite_insights(0, KEY, [insight(step=0, ratio=0.5, text="When hot, cool it down.")])
    bank.rewrite_insights(1, KEY, [insight(step=1, ratio=0.9, text="When dark, light a lamp.")])
    bank.rewrite_insights(2, KEY, [insight(step=2, ratio=0.5, text="When wet, wait for sun.")])
    assert ids(bank.insights(KEY)) == ["1#strategy1", "2#strategy1"]
    assert bank.events[-1]["evicted"] == [f"{KEY}@0#strategy1"]


def test_strategies_and_lessons_have_room_of_their_own():
    bank = Bank(MemoryConfig(strategies_per_problem=1, lessons_per_problem=1))
    new = [
        insight(kind=k, n=n, text=f"{k} number {n}") for k in ("lesson", "strategy") for n in (1, 2)
    ]
    bank.rewrite_insights(0, KEY, new)
    assert ids(bank.insights(KEY)) == ["0#strategy1", "0#lesson1"]


def test_an_insight_said_again_confirms_the_old_one():
    bank = Bank(MemoryConfig())
    bank.rewrite_insights(0, KEY, [insight(text="When balancing, count the oxygen atoms.")])
    again = insight(step=3, ratio=0.9, text="when balancing count the oxygen atoms")
    bank.rewrite_insights(3, KEY, [again])
    (kept,) = bank.insights(KEY)
    assert kept.id == f"{KEY}@0#strategy1"
    assert kept.text == "When balancing, count the oxygen atoms."
    assert (kept.step, kept.success_ratio) == (3, 0.9)
    assert kept.experience_ids == (f"{KEY}@0.0", f"{KEY}@3.0")


def test_an_insight_of_another_problem_is_refused():
    with pytest.raises(ValueError, match=r"must be of toy/chemistry/train/0; got one of .*/1"):
        Bank(MemoryConfig()).rewrite_insights(0, KEY, [insight(1)])


# --- behavior -------------------------------------------------------------------------------


def test_alike_behaviors_of_one_kind_are_merged():
    bank = Bank(MemoryConfig(merge_similarity=0.9))
    bank.apply_operations(0, [Operation("ADD", behavior(ids=["i0"]))], fakes.embed)
    same = behavior("behavior_masses_sum", 1, ids=["i1"])
    other_kind = behavior("behavior_masses_forgotten", 1, kind="mistake")
    bank.apply_operations(1, [Operation("ADD", same), Operation("ADD", other_kind)], fakes.embed)
    assert [b.name for b in bank.behaviors] == ["behavior_masses_forgotten", "behavior_sum_masses"]
    assert bank.behaviors[1].insight_ids == ("i0", "i1")
    assert bank.behaviors[1].instruction == behavior().instruction
    assert bank.events[-1]["merged"] == [["behavior_masses_sum@1", "behavior_sum_masses@0"]]


def test_update_rewords_under_a_new_id_and_keeps_provenance_and_uses():
    bank = Bank(MemoryConfig())
    bank.apply_operations(0, [Operation("ADD", behavior(ids=["i0"]))], fakes.embed)
    bank.cite(0, ["behavior_sum_masses@0"] * 2)
    new = behavior(step=4, instruction="multiply before summing", ids=["i4"])
    bank.apply_operations(4, [Operation("NONE"), Operation("UPDATE", new)], fakes.embed)
    (kept,) = bank.behaviors
    assert (kept.id, kept.instruction) == ("behavior_sum_masses@4", "multiply before summing")
    assert (kept.insight_ids, kept.uses) == (("i4", "i0"), 2)


def test_adding_under_a_taken_name_destroys_nothing():
    bank = Bank(MemoryConfig())
    other = behavior(step=1, when="If light bends", instruction="apply the law of Snell")
    bank.apply_operations(0, [Operation("ADD", behavior())], fakes.embed)
    bank.apply_operations(1, [Operation("ADD", other)], fakes.embed)
    assert [b.id for b in bank.behaviors] == ["behavior_sum_masses@0", "behavior_sum_masses_2@1"]


def test_beyond_capacity_the_longest_unretrieved_behavior_goes():
    bank = Bank(MemoryConfig(behaviors=2))
    bank.apply_operations(0, [Operation("ADD", told(s)) for s in (0, 1)], fakes.embed)
    first, second = bank.behaviors
    bank.cite(5, [first.id, "an insight", first.id])
    bank.apply_operations(6, [Operation("ADD", told(2))], fakes.embed)
    assert second.id not in [b.id for b in bank.behaviors]
    kept = next(b for b in bank.behaviors if b.name == first.name)
    assert (kept.uses, kept.last_used) == (2, 5)


# --- lifetime -------------------------------------------------------------------------------


def test_lifetime_step_forgets_when_the_next_step_begins():
    bank = lived_bank(MemoryConfig(lifetime="step"))
    bank.begin_step(3)
    assert {e.step for e in bank.experiences(KEY)} == {3}
    assert {b.step for b in bank.behaviors} == {3}
    bank.begin_step(4)
    assert set(bank.sizes().values()) == {0}
    assert bank.abstracted_at(KEY) is None


def test_a_frozen_bank_never_changes(tmp_path):
    lived_bank().save(tmp_path / "bank")
    frozen = Bank.open(MemoryConfig(lifetime="frozen", path=str(tmp_path / "bank")))
    before = frozen.digest(), len(frozen.events)
    frozen.begin_step(9)
    frozen.remember(9, [attempt(5, 9)])
    frozen.rewrite_insights(9, KEY, [insight(step=9, ratio=1.0)])
    frozen.apply_operations(9, [Operation("ADD", told(3))], fakes.embed)
    frozen.mark_abstracted(9, [KEY])
    frozen.cite(0, [b.id for b in frozen.behaviors])
    assert (frozen.digest(), len(frozen.events)) == before
    assert frozen.records() == lived_bank().records()


def test_an_inherited_bank_lies_before_step_0(tmp_path):
    old = lived_bank()
    old.save(tmp_path / "bank")
    bank = Bank.open(MemoryConfig(path=str(tmp_path / "bank")))
    assert bank.sizes() == old.sizes()
    assert all(e.step < 0 and e.id.startswith("earlier:") for e in bank.experiences(KEY))
    assert all(b.last_used < 0 for b in bank.behaviors)
    assert bank.insights(KEY)[0].experience_ids[0].startswith(f"earlier:{KEY}")
    bank.begin_step(0)
    assert Bank.replay(bank.events, bank.config) == bank


def test_steps_do_not_go_back():
    bank = Bank(MemoryConfig())
    bank.begin_step(5)
    with pytest.raises(ValueError, match=r"step: the bank is at 5 and does not go back; got 4"):
        bank.remember(4, [attempt(step=4)])


# --- history and files ----------------------------------------------------------------------


def test_replaying_the_events_gives_the_same_bank():
    bank = lived_bank()
    events = json.loads(json.dumps(bank.events))
    replayed = Bank.replay(events, bank.config)
    assert replayed == bank
    assert replayed.digest() == bank.digest()
    assert {e["event"] for e in events} == {
        "begin_step", "remember", "rewrite_insights", "apply_operations", "mark_abstracted", "cite"
    }  # fmt: skip


def test_every_event_replays_to_the_state_of_its_moment():
    """Cut the history anywhere: the digests of the prefixes are those of a bank that lived it."""
    bank = lived_bank()
    digests = [Bank.replay(bank.events[:n], bank.config).digest() for n in range(len(bank.events))]
    assert len(set(digests)) > len(digests) // 2
    assert digests[0] == Bank(bank.config).digest()


def test_saved_and_loaded_banks_are_equal_and_saved_bytes_are_the_same(tmp_path):
    bank = lived_bank()
    bank.remember(9, [attempt(7, 9, text="Ω = 3\u2028half \ud83d surrogate")])
    bank.save(tmp_path / "a")
    loaded = Bank.load(tmp_path / "a")
    assert loaded == bank
    loaded.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    loaded.begin_step(10)
    bank.begin_step(10)
    assert loaded == bank


def test_the_digest_tells_who_saw_the_same_calls():
    first, second, other = (Bank(MemoryConfig()) for _ in range(3))
    for bank in (first, second):
        bank.remember(0, [attempt(0), attempt(1)])
    other.remember(0, [attempt(1), attempt(0)])
    assert first.digest() == second.digest() != other.digest()
    assert first.records() == other.records()


def test_a_missing_or_damaged_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 5000)
    lived_bank().save(tmp_path / "bank")
    files = sorted((tmp_path / "bank").iterdir())
    assert len(files) >= 4
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=rf"{file.name}: missing"):
            Bank.load(tmp_path / "bank")
        for damaged in (content[:-9], content.replace(b"0", b"1", 1)):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{file.name}: damaged"):
                Bank.load(tmp_path / "bank")
        file.write_bytes(content)
    assert Bank.load(tmp_path / "bank") == lived_bank()


def test_another_format_is_refused(tmp_path):
    lived_bank().save(tmp_path / "bank")
    path = tmp_path / "bank" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match=r"manifest.json: format_version must be 1 or 2; got 99"):
        Bank.load(tmp_path / "bank")


def test_a_bank_of_format_1_is_read_and_its_damage_named(tmp_path):
    """It held all events in one file, and the state in three others that events can do without."""
    bank = lived_bank()
    content = b"".join(map(store.line, bank.events))
    tables = {"events": {"records": len(bank.events), "sha256": store.sha256(content)}}
    manifest = {"config": dataclasses.asdict(bank.config), "step": 3, "digest": "of the state"}
    manifest |= {"format_version": 1, "tables": {**tables, "insights": {}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "events.jsonl").write_bytes(content)
    (tmp_path / "insights.jsonl").write_text("")
    assert Bank.load(tmp_path) == bank
    bank.save(tmp_path)
    assert Bank.load(tmp_path) == bank and not (tmp_path / "insights.jsonl").exists()
    bank.save(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "events.jsonl").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"events.jsonl: damaged"):
        Bank.load(tmp_path)


def test_saving_replaces_a_bank_and_what_an_interrupted_save_left(tmp_path):
    folder = tmp_path / "bank"
    Bank(MemoryConfig()).save(folder)
    for leftover in (".bank.partial", ".bank.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("a file")
    bank = lived_bank()
    bank.save(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]
    assert Bank.load(folder) == bank
    folder.rename(tmp_path / ".bank.old")  # as if it had died between the two renames
    bank.save(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


def test_saving_into_a_folder_of_other_files_is_refused(tmp_path):
    lived_bank().save(tmp_path / "bank")
    (tmp_path / "bank" / "thesis.tex").write_text("years of work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.jsonl").write_text("{}")
    for name in ("bank", "mine"):
        with pytest.raises(ValueError, match=r"holds other files"):
            lived_bank().save(tmp_path / name)
    assert (tmp_path / "bank" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    lived_bank().save(tmp_path / "empty")


# --- config ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lifetime": "frozen"}, r"path: must name a saved bank where lifetime is frozen; got ''"),
        ({"lifetime": "step", "path": "x"}, r"path: must be empty where lifetime is step"),
        ({"behaviors": -1}, r"behaviors: must be at least 0; got -1"),
        ({"merge_similarity": 1.5}, r"merge_similarity: must be above 0 and at most 1; got 1.5"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**values)


def test_sizes_count_levels_and_kinds():
    bank = Bank(MemoryConfig())
    bank.remember(0, [attempt(), attempt(sample=1, correct=False)])
    bank.rewrite_insights(0, KEY, [insight(), insight(kind="lesson")])
    bank.apply_operations(0, [Operation("ADD", behavior(kind="mistake"))], fakes.embed)
    assert bank.sizes() == {
        "problems": 1, "experiences": 2, "successes": 1, "failures": 1,
        "insights": 2, "strategies": 1, "lessons": 1, "behaviors": 1, "skills": 0, "mistakes": 1,
    }  # fmt: skip


def test_an_operation_has_a_behavior_unless_it_is_none():
    with pytest.raises(ValueError, match="ADD and UPDATE alone"):
        Operation("ADD")
    assert dataclasses.replace(Operation("NONE")).behavior is None
