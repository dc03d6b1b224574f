"""The process inside the sandbox: takes jobs from the pool, forks one process a test, reports.

    python -S -s server.py SETTINGS        settings: what pool.py's _Worker sends, as JSON

Standard library only, and no import of the package, so that it starts in tens of milliseconds and
holds nothing of the run. It never holds an expected output. A job is one line of JSON on its
standard input, answered by one line; it ends when that closes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __name__ != "__main__":
    from pmd_jax.tasks.sandbox import program, seccomp, walls
else:  # started by its path
    import program
    import seccomp
    import walls

    del sys.path[0]  # the folder of this file, which is not the programs' business

CHUNK = 1 << 16
TURN_SECONDS = 0.05  # between two looks at a running test's clocks
MAX_DESCRIPTOR = 256
READY = b"+"  # opens a report once the walls are up
PRELOADED = "numpy", "sortedcontainers"  # packages that may be there, read once for all tests


class Server:
    """What one server knows between jobs: its walls, and where programs may write."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.protections: dict[str, str] = {}
        self.ruleset: int | None = None
        self.uid: int | None = None
        self.processes: int | None = None
        self.own_root = self.own_pids = False
        self.box = ""

    # --- walls ----------------------------------------------------------------------------------

    def build(self, wall: str) -> None:
        """Puts up `wall` around this process, and finds out what else there is."""
        readable = [*walls.stdlib(), *self.settings["packages"].values()]
        hidden = [*walls.others_packages(readable), *self.settings["hidden"]]
        if wall == "namespaces":
            walls.enter_own_root(readable, hidden)
        self.own_root = self.own_pids = wall in ("namespaces", "bubblewrap")
        if self.own_root:
            self.protections |= {name: wall for name in ("files", "network", "processes")}
            self.protections["memory"] = "limits"
            if os.geteuid() == 0 and self.settings["uid"]:
                with contextlib.suppress(OSError):
                    self._try_uid(self.settings["uid"])
                    self.uid, self.processes = self.settings["uid"], self.settings["processes"]
        if not self.own_root or wall == "bubblewrap":
            self.box = tempfile.mkdtemp(prefix="pmd-sandbox-")
            with contextlib.suppress(OSError):
                files = walls.readable_parts([*readable, *walls.SYSTEM_FILES], hidden)
                self.ruleset = walls.landlock(files, readable, self.box)
                self.protections.setdefault("files", "landlock")
        with contextlib.suppress(OSError):
            self._try_seccomp()
            self.protections["calls"] = "seccomp"
            self.protections.setdefault("network", "seccomp")
            self.protections.setdefault("processes", "seccomp")
        sys.path += sorted({os.path.dirname(p) for p in self.settings["packages"].values()})

    def _in_child(self, work: Any) -> None:
        """Whether `work` succeeds, found out in a process that it may ruin. Raises OSError."""
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                work()
                os._exit(0)
            os._exit(1)
        if os.waitpid(pid, 0)[1]:
            raise OSError("not possible here")

    def _try_uid(self, uid: int) -> None:
        def work() -> None:
            walls.drop_privileges(uid)
            with open(os.__file__):  # modules can be read
                pass

        self._in_child(work)

    def _try_seccomp(self) -> None:
        def work() -> None:
            walls.drop_privileges(None)
            seccomp.install()

        self._in_child(work)

    # --- jobs -----------------------------------------------------------------------------------

    def serve(self, jobs: int, replies: int) -> None:
        """Answers jobs until their pipe closes."""
        walls.prctl(walls.PR_SET_DUMPABLE, 0)
        names = program.prelude()
        gc.freeze()
        _send(replies, {"ready": True, "protections": self.protections})
        with open(jobs, "rb", closefd=False) as lines:
            for line in lines:
                _send(replies, self.results(json.loads(line), names, jobs))

    def results(
        self, job: dict[str, Any], names: dict[str, Any], jobs: int
    ) -> list[dict[str, Any]]:
        """What came of each input, up to the first that took too long."""
        for package in PRELOADED:
            if package in job["code"] and package in self.settings["packages"]:
                with contextlib.suppress(ImportError):
                    __import__(package)
        ran: list[dict[str, Any]] = []
        for text in job["inputs"]:
            ran.append(self.test(job, text, names, jobs))
            if ran[-1]["end"] == "time":
                break
        return ran

    def test(
        self, job: dict[str, Any], text: str, names: dict[str, Any], jobs: int
    ) -> dict[str, Any]:
        """Forks a process for one input, waits for it and leaves nothing of it behind."""
        given = os.memfd_create("input", os.MFD_CLOEXEC)
        with open(given, "wb", closefd=False) as file:
            file.write(text.encode())
        os.lseek(given, 0, os.SEEK_SET)
        printed, prints = os.pipe()
        reported, reports = os.pipe()
        with self._box() as box:
            pid = os.fork()
            if pid == 0:
                self._become(job, given, prints, reports, box)
                program.run(job, text, names)
            for descriptor in (given, prints, reports):
                os.close(descriptor)
            try:
                return self._watch(job, pid, printed, reported, jobs)
            finally:
                os.close(printed)
                os.close(reported)

    @contextlib.contextmanager
    def _box(self) -> Iterator[str]:
        """The empty folder in which a test may write."""
        if self.own_root and not self.box:
            with walls.fresh_tmp(self.settings["file_bytes"]) as box:
                yield box
            return
        yield self.box
        for entry in os.scandir(self.box):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)

    def _become(self, job: dict[str, Any], given: int, prints: int, reports: int, box: str) -> None:
        """Makes this process a test's: its descriptors, its folder, its limits, no way back."""
        settings = self.settings
        try:
            for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing raises OSError
            os.setsid()
            os.chdir(box)
            os.environ.clear()
            os.environ.update(TMPDIR=box, HOME=box, LANG="C.UTF-8")
            tempfile.tempdir = None
            nothing = os.open("/dev/null", os.O_RDWR)
            high = [os.dup2(fd, 200 + i) for i, fd in enumerate((given, prints, nothing, reports))]
            ruleset = os.dup2(self.ruleset, 210) if self.ruleset is not None else None
            for target, source in enumerate(high):
                os.dup2(source, target, inheritable=False)
            os.closerange(program.REPORT + 1, 210)
            os.closerange(211, MAX_DESCRIPTOR)
            walls.limit_resources(
                settings["memory_bytes"],
                job["cpu_seconds"],
                settings["file_bytes"],
                settings["open_files"],
                self.processes,
            )
            walls.drop_privileges(self.uid)
            if ruleset is not None:
                walls.enter_landlock(ruleset)
                os.close(ruleset)
            if "calls" in self.protections:
                seccomp.install()
            os.write(program.REPORT, READY)
        except BaseException:
            os.write(reports, traceback.format_exc().encode())
            os._exit(1)

    def _watch(
        self, job: dict[str, Any], pid: int, printed: int, reported: int, jobs: int
    ) -> dict[str, Any]:
        """Collects what a test says until it ends, or is ended."""
        began, end = time.monotonic(), ""
        said: dict[int, bytearray] = {printed: bytearray(), reported: bytearray()}
        poll = select.poll()
        for pipe in said:
            poll.register(pipe, select.POLLIN)
        poll.register(jobs, 0)  # POLLHUP alone: the host is gone
        clock = (~pid << 3) | 2
        open_pipes = set(said)
        while not end:
            for pipe, event in poll.poll(1000 * TURN_SECONDS):
                if pipe == jobs:
                    if event & select.POLLHUP:
                        self._reap(pid, 0.0)
                        os._exit(0)
                    continue
                chunk = os.read(pipe, CHUNK)
                said[pipe] += chunk
                if not chunk:
                    poll.unregister(pipe)
                    open_pipes.discard(pipe)
                elif len(said[pipe]) > self.settings["output_bytes"]:
                    end = "output"
            if not open_pipes or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            with contextlib.suppress(OSError):
                if time.clock_gettime(clock) > job["cpu_seconds"]:
                    end = "time"
            if time.monotonic() - began > job["wall_seconds"]:
                end = "time"
        deadline = began + job["wall_seconds"]
        status, cpu = self._reap(pid, 0.0 if end else deadline - time.monotonic())
        self._drain(said, open_pipes)
        if not end and (status == -signal.SIGXCPU or cpu > job["cpu_seconds"]):
            end = "time"
        if not end and not said[reported].startswith(READY):
            raise RuntimeError(f"a test's process could not be made: {said[reported].decode()}")
        return result_of(end, status, said[printed], said[reported], cpu)

    def _drain(self, said: dict[int, bytearray], pipes: set[int]) -> None:
        """What is in the pipes already, without waiting for more."""
        for pipe in pipes:
            os.set_blocking(pipe, False)
            with contextlib.suppress(BlockingIOError):
                while len(said[pipe]) <= self.settings["output_bytes"] and (
                    chunk := os.read(pipe, CHUNK)
                ):
                    said[pipe] += chunk

    def _reap(self, pid: int, seconds: float) -> tuple[int, float]:
        """(exit status, negative for a signal; CPU seconds), once nothing of the test is left.

        seconds: how long it may take to end by itself.
        """
        _wait(pid, seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            os.killpg(pid, signal.SIGKILL)  # the id is no other group's before it is reaped
        _, status, usage = os.wait4(pid, 0)
        self._kill_rest()
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

    def _kill_rest(self) -> None:
        """Whatever a test started, and is still there."""
        if self.own_pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all but process 1, which this is
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, 0)
        # Without namespaces nor seccomp, orphans come to this process, a subreaper.
        with contextlib.suppress(OSError):
            while children := _children():
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)


def result_of(
    end: str, status: int, printed: bytearray, reported: bytearray, cpu: float
) -> dict[str, Any]:
    """What the pool is told of one test. report is the program's own word, and may be anything."""
    return {
        "end": end or ("done" if status == 0 else "crash"),
        "output": printed.decode("utf-8", "replace"),
        "report": reported[len(READY) :].decode("utf-8", "replace"),
        "status": status,
        "cpu_seconds": cpu,
    }


def _wait(pid: int, seconds: float) -> None:
    """Until a process has ended, though not reaped, or the time is up."""
    deadline = time.monotonic() + seconds
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            return
        time.sleep(0.0005)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def _send(pipe: int, message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def main() -> None:
    settings = json.loads(sys.argv[1])
    jobs, replies = os.dup(0), os.dup(1)
    with open(os.devnull, "r+b", buffering=0) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    server, wall = Server(settings), settings["wall"]
    try:
        program.prelude()  # reads the modules while their files are at hand
        if wall == "namespaces":
            walls.enter_namespaces()
            pid = os.fork()
            if pid:
                os.close(jobs)
                os.close(replies)
                os._exit(min(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), 255))
            walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)
        elif wall == "none":
            walls.prctl(walls.PR_SET_CHILD_SUBREAPER, 1)
        server.build(wall)
    except OSError as error:
        _send(replies, {"ready": False, "why": str(error)})
        return
    try:
        server.serve(jobs, replies)
    finally:
        if server.box:
            shutil.rmtree(server.box, ignore_errors=True)


if __name__ == "__main__":
    main()
