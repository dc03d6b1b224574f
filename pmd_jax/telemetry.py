"""Where numbers and samples go: a run's files, the progress a person watches, the end table.

    runs/<name>/config.json        the resolved configuration
                metrics.jsonl      one JSON object per step
                samples.jsonl      one JSON object per sample: what was asked, answered, taught
                evaluation.json    name of an evaluation -> its scores
                totals.json        what the run has cost, once it is over
                tensorboard/       the numbers of metrics.jsonl as scalars

JSON Lines are the record; TensorBoard and the terminal are views of it. Numbers that are not
finite are written as null, since JSON has no other word for them.

Left out: which metrics there are (trainer.py names them), checkpoints (checkpoint.py), and the
choice of the process that writes: of many processes, one opens a `RunWriter`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jax
import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from tensorboardX import SummaryWriter

from pmd_jax.tracking import scalars

RESERVED = ("step", "seconds", "non_finite")

# --- files ----------------------------------------------------------------------------------


class RunWriter:
    """Writes the files of one run into `folder`, which it makes.

    Raises ValueError at once if the folder cannot be written. Lines are appended and flushed, so
    a run that is killed loses at most the line it was writing; `rewind` removes such a line.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = True):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._metrics = _open_lines(self.folder / "metrics.jsonl")
            self._samples = _open_lines(self.folder / "samples.jsonl")
        except OSError as error:
            raise ValueError(
                f"run folder: must be writable; got {self.folder} ({error.strerror}); "
                "choose another output folder"
            ) from error
        self._use_tensorboard = tensorboard
        self._tensorboard: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._started = time.monotonic()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """The resolved configuration, as plain values, into config.json."""
        _replace(self.folder / "config.json", _document(config))

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """One line of metrics.jsonl, returned, and the numbers among `metrics` to TensorBoard.

        metrics: int, float, str, or a scalar array, by name; "loss/kl_nats" goes to the group
        "loss" in TensorBoard, a name without "/" to the group "run".
        The line also holds `step`, `seconds` (wall clock since the run started, the time of the
        steps kept by `rewind` included), and `non_finite`, the names written as null, if any.
        """
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        non_finite = [name for name, value in values.items() if _is_non_finite(value)]
        line: dict[str, Any] = {
            "step": step,
            "seconds": round(time.monotonic() - self._started, 3),
            **values,
        }
        line |= {"non_finite": non_finite} if non_finite else {}
        self._metrics.write(_line(line))
        self._metrics.flush()
        if self._use_tensorboard:
            self._log_scalars(step, values)
        return line

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One line of samples.jsonl per row, with the step put first. Arrays become lists."""
        for row in rows:
            if row.get("step", step) != step:
                raise ValueError(
                    f"samples: step is the step of the log, {step}; got {row['step']} in a row, "
                    "give it another name"
                )
            self._samples.write(_line({"step": step, **row}))
        self._samples.flush()

    def write_evaluation(self, name: str, scores: Mapping[str, Any]) -> None:
        """Sets `name` of evaluation.json to `scores` and keeps the other names."""
        path = self.folder / "evaluation.json"
        evaluations = json.loads(path.read_text()) if path.exists() else {}
        _replace(path, _document({**evaluations, name: scores}))

    def write_totals(self, totals: Mapping[str, Any]) -> None:
        """Steps, tokens and time of a run that is over, into totals.json."""
        _replace(self.folder / "totals.json", _document(totals))

    def sync(self) -> None:
        """Down to the disk: a checkpoint must not know of steps that the log lost."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """For a run that resumes at `step`: forgets what was logged of `step` and later.

        Drops those lines of metrics.jsonl and samples.jsonl, and a last line that was cut short
        when the run was killed, evaluations of later steps and of the end, and totals.json.
        TensorBoard hides its own from there on. Raises ValueError for a damaged line elsewhere.
        """
        self.close()
        path = self.folder / "evaluation.json"
        if path.exists():
            kept = {
                name: scores
                for name, scores in json.loads(path.read_text()).items()
                if 0 < step >= scores.get("step", 0) and not name.startswith("after")
            }
            _replace(path, _document(kept))
        (self.folder / "totals.json").unlink(missing_ok=True)
        last = _rewind_lines(self.folder / "metrics.jsonl", step)
        _rewind_lines(self.folder / "samples.jsonl", step)
        self._metrics = _open_lines(self.folder / "metrics.jsonl")
        self._samples = _open_lines(self.folder / "samples.jsonl")
        self._purge_step = step
        self._started = time.monotonic() - (last["seconds"] if last else 0.0)

    def close(self) -> None:
        """Closes the files; nothing is lost without it, but TensorBoard's last seconds."""
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _log_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if self._tensorboard is None:  # opened late, so that `rewind` can say what to hide
            folder = str(self.folder / "tensorboard")
            self._tensorboard = SummaryWriter(logdir=folder, purge_step=self._purge_step)
        for tag, value in scalars(values).items():
            self._tensorboard.add_scalar(tag, value, global_step=step)


class Bystander(RunWriter):
    """Of a process that leaves the files to another: the same calls, and nothing is written."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def write_config(self, config: Mapping[str, Any]) -> None: ...

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def write_evaluation(self, name: str, scores: Mapping[str, Any]) -> None: ...

    def write_totals(self, totals: Mapping[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


def _open_lines(path: Path) -> IO[str]:
    # Half a surrogate pair, which a response may hold, becomes its JSON escape.
    return path.open("a", encoding="utf-8", errors="backslashreplace")


def _scalar(name: str, value: Any) -> int | float | str:
    if name in RESERVED:
        raise ValueError(f"metrics.{name}: must not be one of {', '.join(RESERVED)}; rename it")
    array = np.asarray(value)
    scalar = array.item() if array.ndim == 0 else None
    if not isinstance(scalar, int | float | str):
        raise ValueError(f"metrics.{name}: must be one number or a str; got {value!r}")
    return scalar


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _plain(value: Any) -> Any:
    """`value` in the words of JSON: arrays and tuples as lists, non-finite numbers as null."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if _is_non_finite(value) else value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _document(content: Mapping[str, Any]) -> str:
    return json.dumps(_plain(content), ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, whole."""
    part = _part(path)
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _rewind_lines(path: Path, step: int) -> dict[str, Any] | None:
    """Keeps the lines before `step`, as they are, and returns the last one's row."""
    part, last = _part(path), None
    with path.open("rb") as lines, part.open("wb") as kept:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):  # the line that was being written
                    break
                raise ValueError(f"{path}:{number}: must be JSON; got {line[:60]!r}") from error
            if row["step"] < step:
                kept.write(line.rstrip(b"\n") + b"\n")
                last = row
    os.replace(part, path)
    return last


# --- time per phase -------------------------------------------------------------------------


class Stopwatch:
    """Seconds per phase of a step: `with watch("rollout"): ...`, then `take()`.

    A phase entered twice adds up; a phase inside another counts in both. JAX returns before its
    work is done, so a phase of arrays must wait for its result (`jax.block_until_ready`).
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last take, which they are no longer counted in."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


class Span:
    """Seconds spent within it so far: `with span: ...`, then `span.seconds`."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def __enter__(self) -> Span:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


# --- compilations ---------------------------------------------------------------------------


class Compilations:
    """Programs that XLA was asked for since this was made, and the seconds that took.

    Those found in the compilation cache on disk count too: they are new to the process.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    @property
    def count(self) -> int:
        return len(self.names)

    def _heard(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(details.get("fun_name", event)))
            self.seconds += duration_secs


# --- what a person watches ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What the progress shows of one step. A value that is None was not measured.

    accuracy: share of this step's rollouts that are correct. loss_nats: divergence per token
    that counts. usable_insights: share of the reflections that could be read as an insight.
    memory_sizes: entries by level, e.g. {"experience": 32, "insight": 8, "behavior": 2}.
    """

    accuracy: float
    loss_nats: float | None
    usable_insights: float | None
    memory_sizes: Mapping[str, int]
    tokens_per_second: float

    def fields(self) -> list[str]:
        sizes = " ".join(f"{level} {size}" for level, size in self.memory_sizes.items())
        return [
            f"accuracy {percent(self.accuracy)}",
            "loss -" if self.loss_nats is None else f"loss {self.loss_nats:.4f}",
            f"usable insights {percent(self.usable_insights)}",
            *([sizes] if sizes else []),
            f"{self.tokens_per_second:,.0f} tokens/s",
        ]


class Progress:
    """Shows a run as it goes: a live bar on a terminal, one plain line per step elsewhere.

        with Progress(num_steps=100) as progress:
            progress.phase("attempt")
            progress.step_done(0, report)

    num_steps: of the whole run; first_step: where this process starts, above 0 on resume.
    console: where it writes, standard output by default. quiet: it shows nothing.
    On a terminal the phase and its seconds are redrawn several times a second, so that a slow
    machine shows life within a step.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        quiet: bool = False,
    ):
        self._quiet = quiet
        self._num_steps = num_steps
        self._num_done = first_step
        self._console = console or Console(highlight=False)
        self._fields = ""
        self._phase = "start"
        self._phase_started = self._step_started = time.monotonic()
        self._durations: list[float] = []
        self._live: Live | None = None
        self._finished = False
        self._spinner = Spinner("dots")

    def __enter__(self) -> Progress:
        is_terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        if is_terminal and not self._quiet:
            self._live = Live(console=self._console, get_renderable=self._render)
            self._live.start()
        self._phase_started = self._step_started = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finished = True
        if self._live is not None:
            self._live.stop()  # draws the bar a last time, and leaves it there
            self._live = None

    def phase(self, name: str) -> None:
        """What the step is doing now: attempt, verify, remember, reflect, ..."""
        self._phase, self._phase_started = name, time.monotonic()

    def step_done(self, step: int, report: StepReport) -> None:
        """Step `step`, counted from 0, is over."""
        now = time.monotonic()
        self._durations.append(now - self._step_started)
        self._step_started, self._num_done = now, step + 1
        self._fields = " | ".join(report.fields())
        if self._live is None:
            self.note(f"step {self._count()} | {self._fields} | {self._time_left()} left")

    def note(self, text: str) -> None:
        """One line that stays: an evaluation, a checkpoint, a warning."""
        if self._quiet:
            return
        if self._live is None:
            print(text, file=self._console.file, flush=True)
        else:
            self._console.print(text, markup=False, highlight=False)

    def _count(self) -> str:
        return f"{self._num_done}/{self._num_steps}"

    def _time_left(self) -> str:
        """From the median of the last ten steps: the first one compiles and would mislead."""
        steps_left = self._num_steps - self._num_done
        recent = self._durations[1:][-10:] or self._durations
        return duration(statistics.median(recent) * steps_left) if recent else "-"

    def _render(self) -> RenderableType:
        seconds = time.monotonic() - self._phase_started
        self._spinner.text = Text(f"{self._phase} {duration(seconds)}")
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"step {self._count()}",
            ProgressBar(total=self._num_steps, completed=self._num_done, width=30),
            f"{self._time_left()} left",
        )
        fields = [Text(self._fields)] if self._fields else []
        phase = [] if self._finished else [self._spinner]
        return Group(head, *fields, *phase)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """65 -> "1:05", 3665 -> "1:01:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- the end table --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluationRow:
    """One row of the end table. Shares in [0, 1]; None where it was not measured.

    name: e.g. "before", "after". average: avg@k, with the interval (low, high) of its mean.
    """

    name: str
    average: float
    interval: tuple[float, float] | None = None
    majority: float | None = None
    well_formed: float | None = None
    tests_passed: float | None = None


def summary_table(
    evaluations: Sequence[EvaluationRow],
    *,
    num_samples: int,
    chance: float | None,
    constant_letter: float | None,
    memory_sizes: Mapping[str, int],
    loss_fraction: float | None,
    seconds: float,
    num_tokens: int,
    console: Console | None = None,
) -> None:
    """Prints what a run came to, with the scores that need no policy beside its own.

    num_samples: the k of avg@k and majority@k. chance: expected score of a uniform guess.
    constant_letter: score of the best constant answer, None of both where answers are programs,
    which have the share of tests passed instead of majority@k. loss_fraction: share of all rollouts
    that carried loss. num_tokens: sampled in training, reflections included.
    """
    with_memory = any("with memory" in row.name for row in evaluations)
    title = "evaluation" if with_memory else "evaluation, no memory in the prompt"
    table = Table(title=title, title_justify="left")
    programs = any(row.tests_passed is not None for row in evaluations)
    third = "tests passed" if programs else f"majority@{num_samples}"
    columns = (f"avg@{num_samples}", "95% interval", third, "well-formed")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in evaluations:
        low_high = [percent(bound) for bound in row.interval or ()]
        table.add_row(
            row.name,
            percent(row.average),
            " to ".join(low_high) or "-",
            percent(row.tests_passed if programs else row.majority),
            percent(row.well_formed),
        )
    if not programs:
        table.add_row("chance", percent(chance))
        table.add_row("best constant letter", percent(constant_letter))

    costs = Table.grid(padding=(0, 2))
    sizes = ", ".join(f"{size:,} {level}" for level, size in memory_sizes.items())
    costs.add_row("memory", sizes or "none")
    costs.add_row("rollouts with loss", percent(loss_fraction))
    costs.add_row("cost", f"{duration(seconds)} of wall clock, {num_tokens:,} sampled tokens")
    console = console or Console(highlight=False)
    console.print(table)
    console.print(costs)


# --- memory of the process ------------------------------------------------------------------


def host_memory_gib() -> float:
    """The resident size of this process; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_gib()
    return pages * resource.getpagesize() / 2**30


def peak_memory_gib() -> float:
    """The largest resident size of this process so far."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30
