"""What it costs to judge programs, beside the CPU time that they need by themselves.

By themselves: a plain `python -S -E program.py` for each test, which is how a contest's judge would
run it; a part of the tests is run so, and scaled. Also shown is the programs' work alone, without
any process: all that is left if interpreters cost nothing.

Left out: responses without code or with a cached judgement, which cost nothing.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pmd_jax.records import UnitTests
from pmd_jax.tasks.judge import Judge, JudgeConfig

PLAIN_RUNS = 100  # tests that are also run by themselves
LOOP = (
    "n = int(input())\nx = 0\nfor i in range({loops}):\n    x += i * i\nprint(2 * n)  # {number}\n"
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """responses x tests. milliseconds: a program's own work in each test, without a process."""

    responses: int = 256
    tests: int = 20
    milliseconds: float = 10.0


def cpu_seconds(of: int) -> float:
    usage = resource.getrusage(of)
    return usage.ru_utime + usage.ru_stime


def loops_for(milliseconds: float) -> int:
    """Rounds of LOOP that take so long here."""
    code, rounds = compile(LOOP.format(loops=1_000_000, number=0), "x", "exec"), 3
    best = min(_seconds_alone(code) for _ in range(rounds))
    return round(milliseconds / 1000 / best * 1_000_000)


def _seconds_alone(code: Any) -> float:
    began = time.process_time()
    exec(code, {"input": lambda: "1", "print": lambda *_: None})
    return time.process_time() - began


def plain_seconds(program: str) -> float:
    """CPU seconds of a test whose process is a fresh interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program)
        before = cpu_seconds(resource.RUSAGE_CHILDREN)
        for _ in range(PLAIN_RUNS):
            subprocess.run(
                [sys.executable, "-S", "-E", str(file)],
                input=b"1\n",
                capture_output=True,
                check=True,
            )
        return (cpu_seconds(resource.RUSAGE_CHILDREN) - before) / PLAIN_RUNS


def run(work: Workload) -> dict[str, Any]:
    """CPU seconds of all that judging does, threads of the host included, over what is needed."""
    loops = loops_for(work.milliseconds)
    programs = [LOOP.format(loops=loops, number=i) for i in range(work.responses)]
    tests = UnitTests(
        tuple(f"{i}\n" for i in range(work.tests)), tuple(str(2 * i) for i in range(work.tests))
    )
    alone = _seconds_alone(compile(programs[0], "x", "exec"))
    plain = plain_seconds(programs[0])
    threads = max(4, os.cpu_count() or 1)
    before = cpu_seconds(resource.RUSAGE_SELF) + cpu_seconds(resource.RUSAGE_CHILDREN)
    judge = Judge(JudgeConfig())
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        texts = [f"```python\n{program}```" for program in programs]
        verdicts = list(pool.map(lambda text: judge.verify(tests, text, False), texts))
    seconds = time.perf_counter() - began
    about = str(judge.sandbox.protections)
    judge.close()  # its servers, and through them all tests, are counted once they have ended
    spent = cpu_seconds(resource.RUSAGE_SELF) + cpu_seconds(resource.RUSAGE_CHILDREN) - before
    assert all(verdict.correct for verdict in verdicts)
    runs = work.responses * work.tests
    return {
        "bench": "judge",
        "workload": dataclasses.asdict(work),
        "protections": about,
        "wall_seconds": seconds,
        "cpu_seconds": spent,
        "cpu_seconds_per_test": spent / runs,
        "plain_process_seconds_per_test": plain,
        "work_alone_seconds_per_test": alone,
        "cpu_over_plain_processes": spent / (runs * plain),
        "cpu_over_work_alone": spent / (runs * alone),
    }
