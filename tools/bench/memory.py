"""What memory costs when it is large: retrieval, adding, evicting, saving, bytes.

    run(...) -> flat dict of numbers      table(result) -> rows to print

Retrieval is `Retriever.behaviors_for` on a bank, against one product `queries @ documents.T` of
the same size; the two take turns, and medians are compared. Vectors are random, made by a function
in place of an embedding model; behaviors come by replay, which needs no model.

Left out: embedding the questions (they are embedded once in a run), and the model.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import shutil
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pmd_jax.memory import store
from pmd_jax.memory.bank import Bank, MemoryConfig, Operation
from pmd_jax.memory.retrieval import Retriever
from pmd_jax.records import (
    Behavior,
    Experience,
    Insight,
    MultipleChoice,
    Problem,
    Verdict,
    from_dict,
)

PROBLEMS_PER_STEP = 32
EXPERIENCE_CHARACTERS, INSIGHT_CHARACTERS, FEEDBACK_CHARACTERS = 2000, 225, 100
TOP_K = 3


def run(
    num_vectors: int = 1_000_000,
    dims: int = 384,
    num_queries: int = 32,
    num_problems: int = 10_000,
    repeats: int = 5,
) -> dict[str, float]:
    """Seconds, bytes and ratios by name. Takes minutes and about 6 GB at the default sizes."""
    result: dict[str, float] = {"num_vectors": num_vectors, "num_problems": num_problems}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:  # a process that held nothing yet
        result |= pool.submit(resident_bytes, num_problems).result()
    result |= changes(num_problems, repeats)
    result |= retrieval(num_vectors, dims, num_queries, repeats)
    return result


def table(result: dict[str, float]) -> list[tuple[str, str]]:
    """(name, value) rows for people."""
    n = int(result["num_problems"]) // 4
    at = {size: f"at {size * n:,} problems" for size in (1, 2, 4)}
    rows = [
        (f"top {TOP_K} of {int(result['num_vectors']):,} behaviors, over one product",
         f"{result['retrieval_over_matmul']:.2f}x"),
        ("  the product, the retrieval",
         f"{result['matmul_seconds']:.3f} s, {result['retrieval_seconds']:.3f} s"),
        ("  first retrieval, which takes in all vectors",
         f"{result['first_retrieval_seconds']:.1f} s"),
        ("  one more behavior: merge check, eviction, event",
         f"{result['operation_seconds']:.3f} s"),
    ]  # fmt: skip
    for name, unit in (("add", "record"), ("evict", "record"), ("save", "record")):
        values = [f"{result[f'{name}_{size}n_microseconds']:.1f}" for size in (1, 2, 4)]
        where = ", ".join(at.values()) if name == "add" else "the same"
        rows.append((f"{name}, microseconds per {unit}, {where}", " / ".join(values)))
    rows += [
        ("a whole save over writing the same bytes", f"{result['save_over_write']:.2f}x"),
        ("a save after one more step over writing all bytes",
         f"{result['next_save_over_write']:.3f}x"),
        ("  bytes in the folder, bytes that this save wrote",
         f"{result['saved_bytes']:,.0f}, {result['next_save_bytes']:,.0f}"),
        ("resident bytes of a full bank over bytes of its text",
         f"{result['resident_over_text']:.2f}x"),
        ("  the text, the growth of the process",
         f"{result['text_bytes'] / 1e6:.0f} MB, {result['resident_bytes'] / 1e6:.0f} MB"),
    ]  # fmt: skip
    return rows


# --- retrieval ----------------------------------------------------------------------------------


def retrieval(num_vectors: int, dims: int, num_queries: int, repeats: int) -> dict[str, float]:
    """The path of a training step against one product, in turns."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        """Rows by number, "... #17" -> row 17."""
        return rows[[int(text.rpartition("#")[2]) for text in texts]]

    rows = unit_rows(num_vectors + num_queries, dims, seed=0)
    documents, queries = rows[:num_vectors], rows[num_vectors:]
    problems = [a_problem(num_vectors + i) for i in range(num_queries)]
    bank = Bank.replay(behavior_events(num_vectors), MemoryConfig(behaviors=num_vectors))
    retriever = Retriever(embed)
    first = seconds(lambda: retriever.behaviors_for(problems, bank, TOP_K))
    products, retrievals = [], []
    for _ in range(repeats):
        products.append(seconds(lambda: queries @ documents.T))
        retrievals.append(seconds(lambda: retriever.behaviors_for(problems, bank, TOP_K)))
    found = retriever.behaviors_for(problems[:1], bank, TOP_K)[0]
    best = np.argsort(-(documents @ queries[0]))[:TOP_K]
    assert [int(b.text.rpartition("#")[2]) for b in found] == best.tolist()
    (event,) = behavior_events(num_vectors + 1, start=num_vectors)
    new = Operation("ADD", from_dict(Behavior, event["put"][0]))
    operation = seconds(lambda: bank.apply_operations(1, [new], embed))
    assert bank.sizes()["behaviors"] == num_vectors
    return {
        "first_retrieval_seconds": first,
        "operation_seconds": operation,
        "matmul_seconds": statistics.median(products),
        "retrieval_seconds": statistics.median(retrievals),
        "retrieval_over_matmul": statistics.median(retrievals) / statistics.median(products),
    }


def unit_rows(num_rows: int, dims: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.empty((num_rows, dims), np.float32)
    for start in range(0, num_rows, 65_536):
        some = rng.standard_normal(rows[start : start + 65_536].shape, dtype=np.float32)
        rows[start : start + 65_536] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return rows


def behavior_events(stop: int, start: int = 0, per_event: int = 10_000) -> Iterator[dict[str, Any]]:
    """As `apply_operations` would have written them, half skills and half mistakes."""
    advice = "name what is asked, write the known quantities with units, then solve for the unknown"
    for first in range(start, stop, per_event):
        yield {
            "event": "apply_operations", "step": 0, "removed": [], "merged": [],
            "put": [
                {
                    "id": f"behavior_{i}@0", "name": f"behavior_{i}",
                    "kind": ("skill", "mistake")[i % 2], "when": "When a quantity is asked for",
                    "instruction": f"{advice} #{i}", "step": 0, "insight_ids": [],
                    "uses": 0, "last_used": 0,
                }
                for i in range(first, min(first + per_event, stop))
            ],
        }  # fmt: skip


def a_problem(number: int) -> Problem:
    check = MultipleChoice(("1", "2"), "A")
    return Problem(f"bench/{number}", "chemistry", "", "", f"What is it? #{number}", "", check)


# --- adding, evicting, saving -------------------------------------------------------------------


def changes(num_problems: int, repeats: int) -> dict[str, float]:
    """Microseconds per record at a quarter, a half and all of the problems; saves against bytes.

    Of adding and evicting those of the CPU, whoever else computes; of saving those of the clock.
    """
    sizes = {size: size * (num_problems // 4) for size in (1, 2, 4)}
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size, count in sizes.items():
            runs[size].append(one_life(count))

    def median(size: int, name: str) -> float:
        return statistics.median(life[name] for life in runs[size])

    result = {
        f"{name}_{size}n_microseconds": 1e6 * median(size, name)
        for name in ("add", "evict", "save")
        for size in sizes
    }
    write, whole, following = (median(4, n) for n in ("write", "whole_save", "next_save"))
    return result | {
        "save_over_write": whole / write,
        "next_save_over_write": following / write,
        "saved_bytes": median(4, "saved_bytes"),
        "next_save_bytes": median(4, "next_save_bytes"),
    }


def one_life(num_problems: int) -> dict[str, float]:
    """A bank that is filled, overfilled by one attempt per problem, saved, and saved again."""
    bank, text = Bank(MemoryConfig()), Text(seed=0)
    folder = Path(tempfile.mkdtemp(prefix="pmd_jax_bench"))
    try:
        add = fill(bank, num_problems, text)
        before = bank.sizes()["experiences"]
        new = [[attempt(n, 1, 0, text) for n in step] for step in steps(num_problems)]
        began = time.process_time()
        each(lambda some: bank.remember(1, some), new)
        evict = time.process_time() - began
        assert bank.sizes()["experiences"] == before
        whole = seconds(lambda: bank.save(folder / "a"))
        files = {file.name: file.read_bytes() for file in (folder / "a").iterdir()}
        (folder / "b").mkdir()
        write = seconds(
            lambda: each(lambda file: store.write(folder / "b" / file[0], file[1]), files.items())
        )
        bank.remember(2, [attempt(n, 2, 0, text) for n in range(PROBLEMS_PER_STEP)])
        following = seconds(lambda: bank.save(folder / "c"))
        fresh = [f for f in (folder / "c").iterdir() if f.stat().st_nlink == 1]
        return {
            "add": add / sum(bank.sizes()[level] for level in ("experiences", "insights")),
            "evict": evict / num_problems,
            "save": whole / sum(bank.sizes()[level] for level in ("experiences", "insights")),
            "whole_save": whole,
            "write": write,
            "next_save": following,
            "saved_bytes": float(sum(map(len, files.values()))),
            "next_save_bytes": float(sum(file.stat().st_size for file in fresh)),
        }
    finally:
        shutil.rmtree(folder)


def fill(bank: Bank, num_problems: int, text: Text) -> float:
    """CPU seconds to bring a bank to full capacity, step by step, beside making the records."""
    config, spent = bank.config, 0.0
    outcomes = [True] * config.successes_per_problem + [False] * config.failures_per_problem
    for step in steps(num_problems):
        attempts = [attempt(n, 0, s, text, ok) for n in step for s, ok in enumerate(outcomes)]
        insights = {key(n): insights_of(n, config, text) for n in step}
        began = time.process_time()
        bank.remember(0, attempts)
        for problem_id, items in insights.items():
            bank.rewrite_insights(0, problem_id, items)
        spent += time.process_time() - began
    return spent


def steps(num_problems: int) -> Iterator[range]:
    for start in range(0, num_problems, PROBLEMS_PER_STEP):
        yield range(start, min(start + PROBLEMS_PER_STEP, num_problems))


def key(number: int) -> str:
    return f"sciknoweval/chemistry/train/{number}"


def attempt(number: int, step: int, sample: int, text: Text, correct: bool = True) -> Experience:
    verdict = Verdict(correct, float(correct), text.cut(FEEDBACK_CHARACTERS), True)
    name = f"{key(number)}@{step}.{sample}"
    return Experience(name, key(number), step, text.cut(EXPERIENCE_CHARACTERS), verdict)


def insights_of(number: int, config: MemoryConfig, text: Text) -> list[Insight]:
    kinds: list[Literal["strategy", "lesson"]] = ["strategy"] * config.strategies_per_problem
    kinds += ["lesson"] * config.lessons_per_problem
    ids = tuple(f"{key(number)}@0.{sample}" for sample in range(8))
    return [
        Insight(f"{key(number)}@0#{kind}{i}", key(number), 0, kind, text.cut(INSIGHT_CHARACTERS),
                0.5, ids)
        for i, kind in enumerate(kinds)
    ]  # fmt: skip


class Text:
    """Pieces of random words, quick to make: cut from one long text at random places."""

    def __init__(self, seed: int, num_words: int = 200_000) -> None:
        self._random = random.Random(seed)
        letters = self._random.choices(string.ascii_lowercase, k=40_000)
        vocabulary = ["".join(letters[i : i + 2 + i % 9]) for i in range(0, 40_000, 10)]
        self._long = " ".join(self._random.choices(vocabulary, k=num_words))

    def cut(self, num_characters: int) -> str:
        start = self._random.randrange(len(self._long) - num_characters)
        return self._long[start : start + num_characters]


def each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    for item in items:
        work(item)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- bytes --------------------------------------------------------------------------------------


def resident_bytes(num_problems: int) -> dict[str, float]:
    """Growth of this process's resident memory by a full bank, over the UTF-8 bytes of all texts.

    Text is that of experiences, their feedback, and insights. The log of events is part of the
    bank and of the growth. Reads /proc, so on Linux alone; 0 elsewhere.
    """
    text = Text(seed=0)
    fill(Bank(MemoryConfig()), PROBLEMS_PER_STEP, text)  # modules and caches come before
    gc.collect()
    before = _resident()
    bank = Bank(MemoryConfig())
    fill(bank, num_problems, text)
    gc.collect()
    grown = _resident() - before
    num_bytes = 0
    for problem_id in bank.problem_ids:
        for attempt in bank.experiences(problem_id):
            num_bytes += len(attempt.text.encode()) + len(attempt.verdict.feedback.encode())
        num_bytes += sum(len(i.text.encode()) for i in bank.insights(problem_id))
    return {
        "resident_bytes": float(grown),
        "text_bytes": float(num_bytes),
        "resident_over_text": grown / num_bytes,
    }


def _resident() -> int:
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
