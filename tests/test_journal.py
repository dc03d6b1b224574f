"""Saves that write only what is new, and a past that leaves memory. Counted, not timed."""

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import attempt

from pmd_jax.memory import journal, store
from pmd_jax.memory.bank import Bank, MemoryConfig


@pytest.fixture
def written(monkeypatch):
    """Bytes of each file that is written, by name; segments are sealed at 4,000 bytes."""
    files: dict[str, int] = {}
    real = store.write

    def write(path, content):
        files[path.name] = len(content)
        real(path, content)

    monkeypatch.setattr(store, "write", write)
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 4000)
    return files


def visit(bank, steps):
    for step in steps:
        bank.begin_step(step)
        bank.remember(step, [attempt(n, step, s, text=f"{step} {s} " * 50) for n in (0, 1)
                             for s in (0, 1)])  # fmt: skip
    return bank


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_second_save_writes_only_what_is_new(tmp_path, written):
    bank = visit(Bank(MemoryConfig()), range(20))
    bank.save(tmp_path / "a")
    assert len(written) > 6
    written.clear()
    bank.remember(20, [attempt(0, 20)])
    bank.save(tmp_path / "b")
    num_bytes = sum(size for name, size in written.items() if name != "manifest.json")
    assert num_bytes < 4000 + len(store.line(bank.events[-1]))
    for file in (tmp_path / "a").glob("events-*"):
        if (tmp_path / "b" / file.name).exists():
            assert (tmp_path / "b" / file.name).stat().st_ino == file.stat().st_ino
    assert Bank.load(tmp_path / "b") == bank


def test_every_saved_folder_holds_all_by_itself(tmp_path, written):
    """Earlier folders may go, as those of old checkpoints do."""
    bank = visit(Bank(MemoryConfig()), range(20))
    for name in ("a", "b", "a", "c"):
        bank.save(tmp_path / name)
    for name in ("a", "b"):
        for file in (tmp_path / name).iterdir():
            file.unlink()
        (tmp_path / name).rmdir()
    assert Bank.load(tmp_path / "c") == bank
    bank.save(tmp_path / "d")
    assert files(tmp_path / "d") == files(tmp_path / "c")


def test_a_loaded_bank_links_what_it_was_loaded_from_and_can_do_without(tmp_path, written):
    visit(Bank(MemoryConfig()), range(20)).save(tmp_path / "a")
    first, second = (Bank.load(tmp_path / "a") for _ in range(2))
    written.clear()
    first.save(tmp_path / "b")
    assert len(written) == 2  # the open end and the manifest
    for file in (tmp_path / "a").iterdir():
        file.rename(tmp_path / file.name)
    second.save(tmp_path / "c")
    assert files(tmp_path / "c") == files(tmp_path / "b")


def test_where_nothing_can_be_linked_all_is_written_and_the_bytes_are_the_same(
    tmp_path, written, monkeypatch
):
    bank = visit(Bank(MemoryConfig()), range(20))
    bank.save(tmp_path / "a")

    def refuse(*paths):
        raise OSError("links are not supported")

    monkeypatch.setattr("os.link", refuse)
    bank.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_file_of_another_history_is_not_taken_for_ours(tmp_path, written):
    bank = visit(Bank(MemoryConfig()), range(20))
    bank.save(tmp_path / "a")
    visit(Bank(MemoryConfig(failures_per_problem=9)), range(1, 21)).save(tmp_path / "a")
    bank.save(tmp_path / "b")
    assert Bank.load(tmp_path / "b") == bank


def test_a_file_that_was_cut_short_is_written_anew(tmp_path, written):
    bank = visit(Bank(MemoryConfig()), range(12))
    bank.save(tmp_path / "a")
    first = min((tmp_path / "a").glob("events-*"))
    content = first.read_bytes()
    first.unlink()
    first.write_bytes(content[:-9])
    bank.save(tmp_path / "b")
    assert Bank.load(tmp_path / "b") == bank


def test_files_depend_on_the_events_and_not_on_when_they_were_saved(tmp_path, written):
    often, once = Bank(MemoryConfig()), Bank(MemoryConfig())
    for step in range(12):
        visit(often, [step]).save(tmp_path / "often")
    visit(once, range(12)).save(tmp_path / "once")
    assert files(tmp_path / "often") == files(tmp_path / "once")
    assert often.events == once.events and len(often.events) == 24


# --- memory -------------------------------------------------------------------------------------

PROGRAM = """
import gc, sys, tracemalloc
sys.path.insert(0, "tests")
from fakes import attempt, insight
from pmd_jax.memory import journal
from pmd_jax.memory.bank import Bank, MemoryConfig

journal.SEGMENT_BYTES = 2**14
tracemalloc.start()
bank = Bank(MemoryConfig())
for step in range({steps}):
    for n in range(50):
        key = f"toy/chemistry/train/{{n}}"
        told = [f"{words} {{step}}{{s}} " * 120 for s in range(6)]
        bank.remember(step, [attempt(n, step, s, s < 2, told[s]) for s in range(6)])
        bank.rewrite_insights(step, key, [insight(n, step, kind, told[k][:220], n=k)
            for kind in ("strategy", "lesson") for k in range(3)])
del told
gc.collect()  # empties the interpreter's lists of free objects too
used, _ = tracemalloc.get_traced_memory()
kept = [r.text for p in bank.problem_ids for r in (*bank.experiences(p), *bank.insights(p))]
assert len(kept) == 600
print(used / sum(len(text.encode()) for text in kept))
"""


@pytest.mark.parametrize("words", ["add all masses", "Δx → 5·10⁻³"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_full_bank_takes_little_more_than_its_text_however_much_was_evicted(steps, words):
    """Traced bytes over UTF-8 bytes of text; in a process of its own, without checked types."""
    program = PROGRAM.format(steps=steps, words=words)
    root = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 1.4


def test_a_call_reads_the_records_of_its_problems_alone(monkeypatch):
    bank = visit(Bank(MemoryConfig()), [0])
    bank.remember(0, [attempt(n) for n in range(2, 300)])
    read = []
    real = type(bank._experiences)._unpack

    def unpack(self, problem_id, pack):
        read.append(problem_id)
        return real(self, problem_id, pack)

    monkeypatch.setattr(type(bank._experiences), "_unpack", unpack)
    bank.remember(1, [attempt(7, 1), attempt(0, 1), attempt(0, 1, 1)])  # evicts both of problem 0
    assert set(read) == {attempt(0).problem_id, attempt(7).problem_id}
