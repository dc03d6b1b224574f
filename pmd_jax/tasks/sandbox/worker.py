"""One server of the sandbox as the host sees it: its command, its two pipes, its end."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from pmd_jax.tasks.sandbox import walls
from pmd_jax.tasks.sandbox.execution import (
    Execution,
    Protections,
    SandboxConfig,
    SandboxError,
    read_execution,
)

Result = TypeVar("Result")
Wall = Literal["namespaces", "bubblewrap", "none"]

PACKAGES = ("numpy", "numpy.libs", "sortedcontainers")  # what programs may import beside Python
FIRST_UID = 1_900_000_000  # of tests where the pool runs as root: no user's, and one a server
# Programs give the same output each time; threads share one arena of the limited address space.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
START_SECONDS = 30.0
SLACK_SECONDS = 30.0  # beyond a test's own, on a busy machine
_NUMBERS = itertools.count()  # of servers of this process, whose tests are different users
# bubblewrap's servers die with the thread that started them, so one thread starts all and lives.
_STARTER = ThreadPoolExecutor(1, "sandbox-starter")


class Worker:
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
                results.append(see(number, read_execution(about, output, said)))
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
    specs = [importlib.util.find_spec(name) for name in PACKAGES if name.isidentifier()]
    places = {Path(spec.origin).parents[1] for spec in specs if spec and spec.origin}
    folders = [place / name for place in sorted(places) for name in PACKAGES]
    return {folder.name: str(folder) for folder in folders if folder.is_dir()}


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
