"""A run's folder as typed records, whatever state the run is in.

A run that is going on, was killed, or has not finished a step is read as far as it goes; what is
missing or damaged becomes a warning on the page. Only a folder that is no run's is an error.

Rows of samples.jsonl are large, so they are read twice: here for what statistics need, and again
by their place in the file for those that the page shows (browser.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmd_jax.memory.bank import MemoryConfig
from pmd_jax.memory.dynamics import Entry, StepDynamics, dynamics
from pmd_jax.memory.journal import Journal
from pmd_jax.telemetry import duration

SLIM = ("step", "rollout", "problem", "subject", "correct", "cited", "loss_nats")
"""Fields of a row that statistics need."""


class NoRun(ValueError):
    """A folder that is not a run's."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """A bank's life. source: where it was read from. last_step: of its events, None without."""

    source: str
    steps: list[StepDynamics]
    entries: dict[str, Entry]

    @property
    def last_step(self) -> int | None:
        return self.steps[-1].step if self.steps else None


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    rows: slim rows of samples.jsonl, with `offset`, where the whole row begins in the file,
        and `size`, its bytes.
    memory: None where no bank could be read. state: in words, for the top of the page.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    memory: Memory | None
    state: str
    finished: bool
    warnings: tuple[str, ...]

    def subject(self, problem_id: str) -> str:
        """From the problem's id, "<task>/<subject>/<split>/<number>"."""
        parts = problem_id.removeprefix("earlier:").split("/")
        return parts[1] if len(parts) >= 4 else "unknown"

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, where it was logged and finite."""
        found = [(row["step"], row[name]) for row in self.metrics if is_number(row.get(name))]
        return [step for step, _ in found], [value for _, value in found]

    def points(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, scores) of the evaluations, by step."""
        return sorted(self.evaluations.items(), key=lambda item: item[1].get("step", 0))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs under names that differ. Raises NoRun, on one line."""
    runs: list[Run] = []
    for folder in folders:
        run = read_run(folder)
        taken = {other.name for other in runs}
        names = itertools.chain([run.name], (f"{run.name} ({n})" for n in itertools.count(2)))
        runs.append(dataclasses.replace(run, name=next(n for n in names if n not in taken)))
    return runs


def read_run(folder: Path) -> Run:
    """Raises NoRun, on one line, for a folder that holds no run."""
    if not folder.is_dir():
        raise NoRun(f"run {folder}: must be a run's folder, such as runs/quickstart; there is none")
    if not (folder / "config.json").exists() and not (folder / "metrics.jsonl").exists():
        held = ", ".join(sorted(file.name for file in folder.iterdir())[:4]) or "nothing"
        raise NoRun(
            f"run {folder}: must hold config.json or metrics.jsonl; it holds {held}; name the "
            "folder of one run, such as runs/quickstart"
        )
    warnings: list[str] = []
    config = read_object(folder / "config.json", warnings)
    evaluations = read_object(folder / "evaluation.json", warnings)
    metrics = [row for _, _, row in read_lines(folder / "metrics.jsonl", warnings)]
    rows = [
        {**{name: row.get(name) for name in SLIM}, "offset": offset, "size": size}
        for offset, size, row in read_lines(folder / "samples.jsonl", warnings)
        if row.get("rollout") and row.get("problem")
    ]
    for row in rows:
        row["cited"] = row["cited"] or []
    memory = read_memory(folder, config.get("memory", {}), warnings)
    state, finished = state_of(folder, config, metrics, evaluations)
    warnings += judge(config, metrics, evaluations, memory)
    return Run(
        folder,
        str(config.get("name") or folder.resolve().name),
        config,
        metrics,
        evaluations,
        rows,
        memory,
        state,
        finished,
        tuple(warnings),
    )


# --- files --------------------------------------------------------------------------------------


def read_object(path: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        warnings.append(f"{path.name} is missing.")
        return {}
    except ValueError:
        warnings.append(f"{path.name} is damaged and was left out.")
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path, warnings: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(offset, bytes, row) of each whole line; others are passed over with a warning."""
    if not path.exists():
        warnings.append(f"{path.name} is missing.")
        return
    damaged, offset = 0, 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    damaged += 1
                else:
                    warnings.append(
                        f"The last line of {path.name} was cut short, as a run leaves it that is "
                        "still writing or was killed; it was left out."
                    )
                row = None
            if isinstance(row, dict) and is_number(row.get("step")):
                yield offset, len(line), row
            offset += len(line)
    if damaged:
        warnings.append(f"{damaged} damaged lines of {path.name} were left out.")


def read_row(path: Path, offsets: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The whole rows that begin at these places."""
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            yield json.loads(file.readline())


def read_memory(folder: Path, config: Mapping[str, Any], warnings: list[str]) -> Memory | None:
    """The newest bank that can be read: memory/, or a checkpoint's."""
    checkpoints = sorted(
        (path for path in (folder / "checkpoints").glob("*/bank/bank") if path.is_dir()),
        key=lambda path: int(path.parts[-3]) if path.parts[-3].isdigit() else -1,
        reverse=True,
    )
    for path in (folder / "memory", *checkpoints):
        if not path.is_dir():
            continue
        try:
            header, journal = Journal.load(path)
            known = {field.name for field in dataclasses.fields(MemoryConfig)}
            settings = {n: v for n, v in {**header["config"], **config}.items() if n in known}
            steps, entries = dynamics(journal, MemoryConfig(**settings))
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.append(f"The bank in {path.relative_to(folder)} could not be read: {error}")
            continue
        return Memory(str(path.relative_to(folder)), steps, entries)
    return None


# --- what to say at the top ---------------------------------------------------------------------


def state_of(
    folder: Path,
    config: Mapping[str, Any],
    metrics: list[dict[str, Any]],
    evaluations: Mapping[str, Any],
) -> tuple[str, bool]:
    """(in words, whether it is finished). From files alone a killed run looks like a going one."""
    total = config.get("steps")
    over = (folder / "totals.json").exists()  # a run with a budget of tokens ends before `steps`
    last = folder / "metrics.jsonl"
    written = ""
    if last.exists():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.stat().st_mtime))
        written = f"; last written {when}"
    if not metrics:
        return f"empty: no step was finished{written}", False
    done = int(metrics[-1]["step"]) + 1
    of = f" of {total}" if is_number(total) else ""
    if over:
        return f"finished, {done} steps", True
    if total is not None and is_number(total) and done >= total:
        if "after" in evaluations:
            return f"finished, {done} steps", True
        return (
            f"still running or killed after all {done} steps, before their evaluation{written}",
            False,
        )
    return f"still running or killed at step {done}{of}{written}", False


def judge(
    config: Mapping[str, Any],
    metrics: list[dict[str, Any]],
    evaluations: Mapping[str, Mapping[str, Any]],
    memory: Memory | None,
) -> list[str]:
    """What a reader should know before believing a figure."""
    found = []
    bad = sum(bool(row.get("non_finite")) for row in metrics)
    if bad:
        found.append(f"{bad} steps logged numbers that were not finite; charts leave them out.")
    idle = sum(row.get("loss_fraction") == 0 for row in metrics)
    if idle:
        found.append(f"In {idle} of {len(metrics)} steps no rollout carried loss.")
    last = evaluations.get("after")
    if last and is_number(last.get("constant")) and last["average"] < last["constant"]:
        found.append(
            f"The last evaluation, {last['average']:.1%}, is below the best constant answer, "
            f"{last['constant']:.1%}."
        )
    if config.get("memory", {}).get("lifetime") == "frozen":
        found.append(
            "Memory is frozen: the steps of its entries are those of the run that made it."
        )
    if memory and memory.last_step is not None and metrics:
        step = int(metrics[-1]["step"])
        if memory.last_step < step:
            found.append(
                f"The newest saved bank ends at step {memory.last_step}, "
                f"the metrics at step {step}."
            )
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) lines of a run's header."""
    config, metrics = run.config, run.metrics
    task = config.get("task", {})
    about = [task.get("name"), task.get("subject"), task.get("path")]
    rollout = config.get("rollout", {})
    lines = [
        ("Model", config.get("model", {}).get("path", "not recorded")),
        ("Task", " ".join(str(part) for part in about if part) or "not recorded"),
        ("Seed", str(config.get("seed", "not recorded"))),
        ("Objective", _objective(config)),
    ]
    if rollout:
        size = (
            f"{rollout.get('problems_per_step')} problems x {rollout.get('rollouts_per_problem')}"
        )
        lines.append(("Step", f"{size} rollouts"))
    for name in ("before", "after"):
        if scores := run.evaluations.get(name):
            low, high = scores.get("interval") or (None, None)
            interval = f" (95%: {low:.1%} to {high:.1%})" if is_number(low) else ""
            label = f"avg@{scores.get('num_samples', '?')} {name}"
            lines.append((label, f"{scores['average']:.1%}{interval}"))
    if metrics:
        cost = f"{duration(metrics[-1].get('seconds') or 0)} of wall clock"
        peak = [row["peak_memory_gib"] for row in metrics if is_number(row.get("peak_memory_gib"))]
        if peak:
            cost += f", {max(peak):.1f} GiB of host memory"
        lines.append(("Cost", cost))
    return lines


def _objective(config: Mapping[str, Any]) -> str:
    distill, teacher = config.get("distill", {}), config.get("teacher", {})
    if not distill:
        return "not recorded"
    if distill.get("objective") == "grpo":
        return "grpo"
    name = distill.get("divergence", {}).get("name", "divergence")
    return f"{name}, teacher shown {', '.join(teacher.get('sources', ())) or 'nothing'}"
