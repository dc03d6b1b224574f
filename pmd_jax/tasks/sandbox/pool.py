"""The host's side of the sandbox: warm servers, one job each at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from pmd_jax.tasks.sandbox import walls

Result = TypeVar("Result")
Wall = Literal["namespaces", "bubblewrap", "none"]
Rules = Literal["official", "sdpo"]
End = Literal["done", "error", "time", "output", "crash"]

WALLS: tuple[Wall, ...] = ("namespaces", "bubblewrap", "none")
PACKAGES = ("numpy", "numpy.libs", "sortedcontainers")  # what programs may import beside Python
FIRST_UID = 1_900_000_000  # of tests where the pool runs as root: no user's, and one a server
MAX_TEXT, MAX_FRAMES = 400, 4  # of what a program says that it raised
# Programs give the same output each time; threads share one arena of the limited address space.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
START_SECONDS = 30.0
SLACK_SECONDS = 30.0  # beyond a test's own, on a busy machine


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


_NUMBERS = itertools.count()  # of servers of this process, whose tests are different users
# bubblewrap's servers die with the thread that started them, so one thread starts all and lives.
_STARTER = ThreadPoolExecutor(1, "sandbox-starter")


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
        self._finalizer = weakref.finalize(self, _close_all, self._workers, os.getpid())
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
        worker = _Worker(self.config, wall)
        with self._lock:
            closed = self._closed
            self._workers.append(worker)
        if closed:
            worker.close()
            raise SandboxError("the sandbox was closed")
        known = getattr(self, "protections", worker.protections)
        if worker.protections != known:
            worker.close()
            raise SandboxError(f"protections changed from {known} to {worker.protections}")
        return worker

    def run(
        self,
        program: Program,
        inputs: Sequence[str],
        cpu_seconds: float,
        see: Callable[[int, Execution], Result],
    ) -> list[Result]:
        """What `see` makes of each input's number and run, one after another, so that no two
        outputs need be held. The first that takes too long or prints too much is the last.

        cpu_seconds: of each input. Raises SandboxError, after a second try, where the sandbox
        failed: a program that ends badly gives an Execution that says so.
        """
        job = {
            **dataclasses.asdict(program),
            "inputs": list(inputs),
            "cpu_seconds": cpu_seconds,
            "wall_seconds": cpu_seconds * self.config.wall_factor,
        }
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start(self.wall)
            try:
                return worker.ask(job, see)
            except SandboxError:
                worker.close()
                worker = None
                worker = self._start(self.wall)
                return worker.ask(job, see)
        except BaseException:
            if worker is not None:
                worker.close()
            worker = None
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends all servers and whatever they run; `run` then raises SandboxError."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork's copy; the servers are its parent's
    for worker in workers:
        worker.close()


def _execution(about: dict[str, Any], output: bytes, said: bytes) -> Execution:
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


class _Worker:
    """One server and the two pipes to it. One thread asks at a time; any may close."""

    def __init__(self, config: SandboxConfig, wall: Wall):
        self._box = tempfile.mkdtemp(prefix="pmd-sandbox-") if wall == "none" else ""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the worker
        self._asking = threading.Lock()
        self._buffer = bytearray()
        command = _command(wall, _settings(config, wall, next(_NUMBERS), self._box))
        try:
            self._process = _STARTER.submit(
                subprocess.Popen,
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=ENVIRONMENT,
                cwd="/",
                bufsize=0,
                start_new_session=True,
            ).result()
        except OSError as error:
            self._errors.close()
            self._remove_box()
            raise SandboxError(f"could not start {command[0]}: {error}") from error
        assert self._process.stdin and self._process.stdout
        self._jobs, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._jobs, False)
        try:
            hello = json.loads(self._line(time.monotonic() + START_SECONDS))
            if not hello["ready"]:
                raise SandboxError(hello["why"])
        except BaseException:
            self.close()
            raise
        known = {field.name for field in dataclasses.fields(Protections)}
        self.protections = Protections(
            **{name: by for name, by in hello["protections"].items() if name in known}
        )

    def ask(self, job: dict[str, Any], see: Callable[[int, Execution], Result]) -> list[Result]:
        """What `see` makes of each test. Raises SandboxError where the server dies or is late."""
        results = []
        data = json.dumps(job).encode()
        with self._asking:
            if self._errors.closed:
                raise SandboxError("the sandbox was closed")
            self._write(len(data).to_bytes(8, "big") + data, time.monotonic() + SLACK_SECONDS)
            for number in range(len(job["inputs"])):
                deadline = time.monotonic() + SLACK_SECONDS + job["wall_seconds"]
                about = json.loads(self._line(deadline))
                output = self._exactly(about["output"], deadline)
                said = self._exactly(about["report"], deadline)
                results.append(see(number, _execution(about, output, said)))
                if about["end"] in ("time", "output"):
                    break
        return results

    def _write(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            self._wait_for(self._jobs, select.POLLOUT, deadline)
            with contextlib.suppress(BlockingIOError):
                try:
                    rest = rest[os.write(self._jobs, rest) :]
                except BrokenPipeError as error:
                    raise SandboxError(self._obituary()) from error

    def _line(self, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            self._read(deadline)
        return self._taken(end + 1)

    def _exactly(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            self._read(deadline)
        return self._taken(count)

    def _taken(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _read(self, deadline: float) -> None:
        self._wait_for(self._replies, select.POLLIN, deadline)
        chunk = os.read(self._replies, 1 << 20)
        if not chunk:
            raise SandboxError(self._obituary())
        self._buffer += chunk

    def _wait_for(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise SandboxError("its server did not answer in time")

    def _obituary(self) -> str:
        """Why the server is gone, by what it said last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"its server ended with status {self._process.poll()}: {said or 'no message'}"

    def close(self) -> None:
        """Ends the server, and with it what it runs. Twice is once."""
        if self._errors.closed:
            return
        if self._asking.acquire(blocking=False):  # it idles, and ends with the pipe of jobs
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._asking.release()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with self._asking:  # who asked has been told by the pipe's end
            for file in (self._process.stdin, self._process.stdout, self._errors):
                if file is not None:
                    file.close()
            self._remove_box()

    def _remove_box(self) -> None:
        """The folder of tests goes too; what was killed a moment ago may still write into it."""
        deadline = time.monotonic() + 2.0
        while self._box and os.path.isdir(self._box) and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                walls.remove_contents(self._box)
                os.rmdir(self._box)


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


def _settings(config: SandboxConfig, wall: Wall, number: int, box: str) -> dict[str, Any]:
    return {
        "wall": wall,
        "box": box,
        "privileged": os.geteuid() == 0,
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
    folder = server.parent
    files = [str(folder / name) for name in ("server.py", "program.py", "walls.py", "seccomp.py")]
    own = sysconfig.get_path("stdlib"), os.path.join(sys.base_prefix, "lib")
    libraries = [p for p in (*own, *walls.SYSTEM_FILES, python[0]) if os.path.exists(p)]
    packages = list(settings["packages"].values())
    return [
        program,
        *("--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session"),
        *(part for path in libraries for part in _bound(path)),
        *(part for path in walls.others_packages(libraries) for part in ("--tmpfs", path)),
        *(part for path in walls.DEVICES for part in ("--dev-bind", path, path)),
        *("--size", str(settings["file_bytes"]), "--tmpfs", walls.BOX),
        *(part for path in (*packages, *files) for part in ("--ro-bind", path, path)),
        *("--remount-ro", "/", "--", *command),
    ]


def _bound(path: str) -> tuple[str, str, str]:
    """bubblewrap's words for a path; a link as the link that it is."""
    if os.path.islink(path):
        return "--symlink", os.readlink(path), path
    return "--ro-bind", path, path
