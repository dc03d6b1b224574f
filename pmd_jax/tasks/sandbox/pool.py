"""The host's side of the sandbox: warm servers, one job each at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Wall = Literal["namespaces", "bubblewrap", "none"]
Rules = Literal["official", "sdpo"]
End = Literal["done", "error", "time", "output", "crash"]

WALLS: tuple[Wall, ...] = ("namespaces", "bubblewrap", "none")
PACKAGES = ("numpy", "numpy.libs", "sortedcontainers")  # what programs may import beside Python
FIRST_UID = 1_900_000_000  # of tests where the pool runs as root: no user's, and one a server
START_SECONDS = 30.0
SLACK_SECONDS = 30.0  # of a server that has other tests' processes beside it


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
    processes: of a test's user, threads included, where the pool may choose that user.
    """

    require: Literal["isolated", "none"] = "none"
    wall: Literal["auto", "namespaces", "bubblewrap", "none"] = "auto"
    workers: int = 0
    memory_mib: int = 1024
    output_mib: int = 16
    file_mib: int = 64
    open_files: int = 64
    processes: int = 64
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


class Sandbox:
    """A pool of servers that run untrusted programs. Threads may share it; they wait in turn.

    The first server is started at once, so that what is wrong with the machine is known before
    there is work; SandboxError then says why. Servers end with `close`, with the last reference to
    the pool, or with the process that made it, however that ends.
    """

    def __init__(self, config: SandboxConfig | None = None):
        self.config = config or SandboxConfig()
        self._size = self.config.workers or os.cpu_count() or 1
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._workers: list[_Worker] = []
        self._closed = False
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._workers)
        self.wall, first = self._first()
        self.protections = first.protections
        if self.config.require == "isolated" and not self.protections.isolated:
            self.close()
            raise SandboxError(
                f"sandbox.require: must be 'none' on this machine; 'isolated' was asked, and it "
                f"has: {self.protections}; run on a Linux kernel with user namespaces or "
                f"Landlock, or install bubblewrap"
            )
        for _ in range(self._size - 1):
            self._idle.put(None)  # a server not started yet
        self._idle.put(first)

    def _first(self) -> tuple[Wall, _Worker]:
        """The best wall that stands here, and a server behind it."""
        tried: list[str] = []
        for wall in WALLS if self.config.wall == "auto" else (self.config.wall,):
            try:
                return wall, self._start(wall)
            except SandboxError as error:
                tried.append(f"{wall}: {error}")
        raise SandboxError("the sandbox cannot start; " + "; ".join(tried))

    def _start(self, wall: Wall) -> _Worker:
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox was closed")
            number = len(self._workers)
            worker = _Worker(self.config, wall, number)
            self._workers.append(worker)
        return worker

    def run(self, program: Program, inputs: Sequence[str], cpu_seconds: float) -> list[Execution]:
        """Runs the program on each input, up to and with the first that exceeds its time.

        cpu_seconds: of each input. Raises SandboxError, after a second try, where the sandbox
        failed: a program that ends badly gives an Execution that says so.
        """
        job = {
            **dataclasses.asdict(program),
            "inputs": list(inputs),
            "cpu_seconds": cpu_seconds,
            "wall_seconds": cpu_seconds * self.config.wall_factor,
        }
        seconds = SLACK_SECONDS + len(inputs) * job["wall_seconds"]
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start(self.wall)
            try:
                replies = worker.ask(job, seconds)
            except SandboxError:
                worker.close()
                worker = None
                worker = self._start(self.wall)
                replies = worker.ask(job, seconds)
        except BaseException:
            if worker is not None:
                worker.close()
            worker = None
            raise
        finally:
            self._idle.put(worker)
        return [_execution(reply) for reply in replies]

    def close(self) -> None:
        """Ends all servers and whatever they run; `run` then raises SandboxError."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()


def _execution(reply: dict[str, Any]) -> Execution:
    report: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        report = json.loads(reply.pop("report") or "{}")
    report = report if isinstance(report, dict) else {}
    error = None
    if reply["end"] == "done" and "error" in report:
        error, reply["end"] = _raised(report["error"]), "error"
    returned = reply["end"] == "done" and "value" in report
    return Execution(
        returned=returned, value=report["value"] if returned else None, error=error, **reply
    )


def _raised(said: Any) -> Raised:
    """What a report says of an exception, whatever it says."""
    known = said if isinstance(said, dict) else {}
    frames = []
    with contextlib.suppress(TypeError, ValueError):
        frames = [
            (int(line), str(function), str(source))
            for line, function, source in known.get("frames", ())
        ]
    return Raised(str(known.get("type")), str(known.get("message")), tuple(frames))


class _Worker:
    """One server process and the two pipes to it."""

    def __init__(self, config: SandboxConfig, wall: Wall, number: int):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the worker
        command = _command(wall, _settings(config, wall, number))
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise SandboxError(f"could not start {command[0]}: {error}") from error
        self._buffer = bytearray()
        try:
            hello = self._receive(time.monotonic() + START_SECONDS)
            if not hello["ready"]:
                raise SandboxError(hello["why"])
        except BaseException:
            self.close()
            raise
        known = {field.name for field in dataclasses.fields(Protections)}
        self.protections = Protections(
            **{name: by for name, by in hello["protections"].items() if name in known}
        )

    def ask(self, job: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        """A job's results. Raises SandboxError where the server dies, or is not done in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise SandboxError(self._obituary()) from error
        return self._receive(time.monotonic() + seconds)

    def _receive(self, deadline: float) -> Any:
        assert self._process.stdout is not None
        try:
            pipe = self._process.stdout.fileno()
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            while not self._buffer.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise SandboxError("its server did not answer in time")
                if poll.poll(1000 * left):
                    chunk = os.read(pipe, 1 << 20)
                    if not chunk:
                        raise SandboxError(self._obituary())
                    self._buffer += chunk
        except (OSError, ValueError) as error:
            raise SandboxError(self._obituary()) from error
        line = bytes(self._buffer)
        self._buffer.clear()
        return json.loads(line)

    def _obituary(self) -> str:
        """Why the server is gone, by what it said last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        said = ""
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"its server ended with status {self._process.poll()}: {said or 'no message'}"

    def close(self) -> None:
        """Ends the server, which ends what it runs. Twice is once."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
        self._errors.close()


def _packages() -> dict[str, str]:
    """{name: folder} of the installed packages that programs may import."""
    found: dict[str, str] = {}
    spec = importlib.util.find_spec("numpy")
    places = [Path(spec.origin).parent.parent] if spec and spec.origin else []
    spec = importlib.util.find_spec("sortedcontainers")
    places += [Path(spec.origin).parent.parent] if spec and spec.origin else []
    for place in places:
        for name in PACKAGES:
            if (place / name).is_dir():
                found[name] = str(place / name)
    return found


def _settings(config: SandboxConfig, wall: Wall, number: int) -> dict[str, Any]:
    return {
        "wall": wall,
        "uid": FIRST_UID + (os.getpid() % 100_000) * 1000 + number % 1000,
        "packages": _packages(),
        "hidden": [str(Path(__file__).parents[2])],
        "memory_bytes": config.memory_mib << 20,
        "output_bytes": config.output_mib << 20,
        "file_bytes": config.file_mib << 20,
        "open_files": config.open_files,
        "processes": config.processes,
    }


def _command(wall: Wall, settings: dict[str, Any]) -> list[str]:
    server = Path(__file__).with_name("server.py")
    python = [os.path.realpath(sys.executable), "-S", "-s", "-B", "-X", "utf8"]
    command = [*python, str(server), json.dumps(settings)]
    if wall != "bubblewrap":
        return command
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bubblewrap (bwrap) is not installed")
    folder = str(server.parent)
    shown = [*_system_paths(), *settings["packages"].values(), folder]
    return [
        program,
        *("--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session"),
        *("--dev", "/dev", "--size", str(settings["file_bytes"]), "--tmpfs", "/tmp"),
        *(part for path in shown for part in ("--ro-bind-try", path, path)),
        *("--", *command),
    ]


def _system_paths() -> list[str]:
    """What Python needs to start where only this is shown."""
    prefix = os.path.realpath(sys.base_prefix)
    return ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", prefix]
