"""What goes into the sandbox and what comes out: programs, limits, protections, executions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any, Literal

from pmd_jax.tasks.sandbox.program import MAX_FRAMES, MAX_TEXT

Rules = Literal["official", "sdpo"]
End = Literal["done", "error", "time", "output", "crash"]


class SandboxError(RuntimeError):
    """The sandbox could not start or run. Never a program's fault, and never a verdict."""


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """Limits of each test of a program, and what must stand around it.

    require: "isolated" refuses to run without walls around files, network and processes;
        "none" runs with what the machine gives, and says what that is.
    wall: "auto" takes the best; another value takes that one alone.
    workers: servers, each with one test at a time; 0 for one per CPU.
    wall_factor: how many times its CPU time a test may last, for sleepers and busy machines.
    processes: of a test, threads included, where the pool may choose its user or user namespace.
    """

    require: Literal["isolated", "none"] = "none"
    wall: Literal["auto", "namespaces", "bubblewrap", "none"] = "auto"
    workers: int = 0
    memory_mib: int = 1024
    output_mib: int = 16
    file_mib: int = 64
    open_files: int = 64
    processes: int = 256
    wall_factor: float = 3.0

    def __post_init__(self) -> None:
        for name in ("memory_mib", "output_mib", "file_mib", "open_files", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1; got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers: must be at least 0; got {self.workers}")
        if self.wall_factor < 1:
            raise ValueError(f"wall_factor: must be at least 1; got {self.wall_factor}")


@dataclasses.dataclass(frozen=True)
class Protections:
    """By what each thing is kept from a program: "namespaces", "seccomp", ..., "" for nothing."""

    files: str = ""
    network: str = ""
    processes: str = ""
    calls: str = ""

    @property
    def isolated(self) -> bool:
        return all((self.files, self.network, self.processes))

    def __str__(self) -> str:
        parts = [
            f"{field.name} by {getattr(self, field.name)}"
            if getattr(self, field.name)
            else f"{field.name} NOT PROTECTED"
            for field in dataclasses.fields(self)
        ]
        return ", ".join(parts) + "; time, memory, output, file size by limits"


@dataclasses.dataclass(frozen=True)
class Program:
    """Code, and how to run it: function "" reads standard input, else it names what is called."""

    code: str
    function: str = ""
    rules: Rules = "official"


@dataclasses.dataclass(frozen=True)
class Raised:
    """An exception as the program's process tells it; a hostile one may have made it up.

    frames: (line, function, source) in the program, innermost first.
    """

    type: str
    message: str
    frames: tuple[tuple[int, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Execution:
    """One test's run. end: "done", an "error" raised, or out of "time", too much "output", "crash".

    returned: whether the function came to its end; value: what it returned, in the form of
    program.plain. status: exit code, negative for the signal that ended it.
    """

    end: End
    output: str
    returned: bool
    value: Any
    error: Raised | None
    status: int
    cpu_seconds: float


def read_execution(about: dict[str, Any], output: bytes, said: bytes) -> Execution:
    """One test's run; `said` is its process's own word, which may be anything."""
    report: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        report = json.loads(said or b"{}")
    report = report if isinstance(report, dict) else {}
    error, end = None, about["end"]
    if end == "done" and "error" in report:
        error, end = _raised(report["error"]), "error"
    returned = end == "done" and "value" in report
    return Execution(
        end,
        output.decode("utf-8", "replace"),
        returned,
        report["value"] if returned else None,
        error,
        about["status"],
        about["cpu_seconds"],
    )


def _raised(said: Any) -> Raised:
    """What a report says of an exception, whatever it says."""
    known = said if isinstance(said, dict) else {}
    frames = known.get("frames")
    return Raised(
        _text(known.get("type")),
        _text(known.get("message")),
        tuple(
            (frame[0], _text(frame[1]), _text(frame[2]))
            for frame in (frames if isinstance(frames, list) else ())[:MAX_FRAMES]
            if isinstance(frame, list) and len(frame) == 3 and type(frame[0]) is int
        ),
    )


def _text(said: Any) -> str:
    """A short text that every tokenizer takes."""
    text = said if isinstance(said, str) else ""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()
