"""The processes inside the sandbox: one that reads no job, one for each job, one for each test.

    python -S -s server.py SETTINGS        settings: what worker.py sends, as JSON

Programs are forked from what forks them, so a test's memory holds whatever its ancestors ever read.
The server therefore reads nothing: when a job waits in its pipe it forks a runner, which reads the
job, forks a process for each test, reports each, and ends. A test finds its own program and inputs
there, and nothing of other jobs; expected outputs are never sent.

Standard library only, and no import of the package, so that it starts in tens of milliseconds. A
job is its length in 8 bytes and that much JSON. A reply is one line of JSON for each test, followed
by as many bytes of output and report as it says. The server ends when the pipe of jobs closes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from fcntl import F_ADD_SEALS, F_DUPFD_CLOEXEC, F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
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
FIRST_FREE = 10  # descriptors from here on are out of the way of a test's own
LAST_DESCRIPTOR = 1 << 20
READY = b"+"  # opens a report once the walls are up
REPORT_BYTES = 2 << 20
PRELOADED = "numpy", "sortedcontainers"  # packages that may be there, read once for a job's tests


class Server:
    """What is the same for all jobs: the walls, and where programs may write."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.protections: dict[str, str] = {}
        self.ruleset: int | None = None
        self.uid: int | None = None
        self.processes: int | None = None
        self.own_root = self.own_tmp = False
        self.box = ""

    # --- walls ----------------------------------------------------------------------------------

    def build(self, wall: str) -> None:
        """Puts up `wall` around this process, and finds out what else there is."""
        settings = self.settings
        readable, packages = walls.stdlib(), list(settings["packages"].values())
        hidden = [*walls.others_packages(readable), *settings["hidden"]]
        self.own_root = wall != "none"
        self.own_tmp = wall == "namespaces"
        self.box = settings["box"] or walls.BOX
        if self.own_tmp:
            walls.enter_own_root(readable, hidden, packages)
        if self.own_root:
            self.protections |= {name: wall for name in ("files", "network", "processes")}
            self._choose_user()
        with contextlib.suppress(OSError):
            if self.own_root:
                self.ruleset = walls.landlock_scope()
            else:
                everything = sorted({*map(os.path.realpath, (*readable, *walls.SYSTEM_FILES))})
                parts = walls.readable_parts(
                    filter(os.path.exists, everything), [*map(os.path.realpath, hidden)]
                )
                self.ruleset = walls.landlock((*parts, *packages), everything, self.box)
                self.protections["files"] = "landlock"
        with contextlib.suppress(OSError):
            self._in_child(_filtered)
            self.protections["calls"] = "seccomp"
            self.protections.setdefault("network", "seccomp")
            self.protections.setdefault("processes", "seccomp")
        sys.path += sorted({os.path.dirname(path) for path in packages})

    def _choose_user(self) -> None:
        """A user of the tests' own where this process may take it, and a limit for that user."""

        def work() -> None:
            walls.drop_privileges(uid)
            with open(os.__file__):  # modules can be read
                pass

        uid = self.settings["uid"] if self.settings["privileged"] else None
        if uid is not None:
            with contextlib.suppress(OSError):
                self._in_child(work)
                self.uid = uid
        # Without one the limit counts the user's processes in this user namespace alone.
        if self.uid is not None or not self.settings["privileged"]:
            self.processes = self.settings["processes"]

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

    # --- jobs -----------------------------------------------------------------------------------

    def serve(self, jobs: int, replies: int) -> None:
        """Forks a runner whenever a job waits, until the pipe of jobs closes."""
        walls.prctl(walls.PR_SET_DUMPABLE, 0)
        names = program.prelude()
        gc.collect()
        gc.freeze()
        _send(replies, json.dumps({"ready": True, "protections": self.protections}).encode())
        poll = select.poll()
        poll.register(jobs, select.POLLIN)
        while True:
            [(_, event)] = poll.poll()
            if not event & select.POLLIN:
                return
            pid = os.fork()
            if pid == 0:
                try:
                    Runner(self, jobs, replies).run(names)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            if _reap_until(pid):
                os._exit(1)  # the runner has said why


def _filtered() -> None:
    walls.drop_privileges(None)
    seccomp.install(metadata=True)


class Runner:
    """One job: its program, and a process for each of its inputs."""

    def __init__(self, server: Server, jobs: int, replies: int):
        self.server, self.jobs, self.replies = server, jobs, replies
        walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if not server.own_root:
            walls.prctl(walls.PR_SET_CHILD_SUBREAPER, 1)
        length = int.from_bytes(_read(jobs, 8), "big")
        self.job: dict[str, Any] = json.loads(_read(jobs, length))

    def run(self, names: dict[str, Any]) -> None:
        """Tests each input, up to the first that takes too long or prints too much."""
        for package in PRELOADED:
            if package in self.job["code"] and package in self.server.settings["packages"]:
                with contextlib.suppress(ImportError):
                    __import__(package)
        for text in self.job["inputs"]:
            if self.test(text, names) in ("time", "output"):
                break

    def test(self, text: str, names: dict[str, Any]) -> str:
        """Forks a process for one input, reports how it ended, and leaves nothing of it behind."""
        given = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        _send(given, text.encode(), line=False)
        os.lseek(given, 0, os.SEEK_SET)
        fcntl(given, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE)
        printed, prints = os.pipe()
        reported, reports = os.pipe()
        with self._folder() as folder:
            pid = os.fork()
            if pid == 0:
                self._become_test(given, prints, reports, folder)
                program.run(self.job, text, names)
            for descriptor in (given, prints, reports):
                os.close(descriptor)
            end, status, cpu, output, report = self._watch(pid, printed, reported)
        os.close(printed)
        os.close(reported)
        about = {"end": end, "status": status, "cpu_seconds": cpu}
        about |= {"output": len(output), "report": len(report)}
        _send(self.replies, json.dumps(about).encode())
        _send(self.replies, output, line=False)
        _send(self.replies, report, line=False)
        return end

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """The empty folder in which a test may write."""
        if self.server.own_tmp:
            with walls.fresh_box(self.server.settings["file_bytes"]) as folder:
                yield folder
        else:
            yield self.server.box
            walls.remove_contents(self.server.box)

    def _become_test(self, given: int, prints: int, reports: int, folder: str) -> None:
        """Makes this process a test's: its descriptors, its folder, its limits, no way back."""
        server, settings, job = self.server, self.server.settings, self.job
        told = reports
        try:
            for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing raises OSError
            os.setsid()
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(TMPDIR=folder, HOME=folder, LANG="C.UTF-8")
            tempfile.tempdir = None
            nothing = os.open("/dev/null", os.O_RDWR)
            wanted = [given, prints, nothing, reports]
            if server.ruleset is not None:
                wanted.append(server.ruleset)
            for target, source in enumerate(
                [fcntl(fd, F_DUPFD_CLOEXEC, FIRST_FREE) for fd in wanted]
            ):
                os.dup2(source, target, inheritable=False)
            told = program.REPORT
            os.closerange(len(wanted), LAST_DESCRIPTOR)
            walls.limit_resources(
                settings["memory_bytes"],
                job["cpu_seconds"],
                settings["file_bytes"],
                settings["open_files"],
                server.processes,
            )
            walls.drop_privileges(server.uid)
            walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user clears it
            if server.ruleset is not None:
                walls.enter_landlock(program.REPORT + 1)
                os.close(program.REPORT + 1)
            if "calls" in server.protections:
                seccomp.install(metadata=server.own_root)
            os.write(program.REPORT, READY)
        except BaseException:
            os.write(told, traceback.format_exc().encode())
            os._exit(1)

    def _watch(self, pid: int, printed: int, reported: int) -> tuple[str, int, float, bytes, bytes]:
        """(end, status, CPU seconds, output, report) of a test, which it ends if it must."""
        limits = {printed: self.server.settings["output_bytes"], reported: REPORT_BYTES}
        said: dict[int, bytearray] = {printed: bytearray(), reported: bytearray()}
        deadline, end = time.monotonic() + self.job["wall_seconds"], ""
        process = os.pidfd_open(pid)
        poll = select.poll()
        for pipe in (*said, process):
            poll.register(pipe, select.POLLIN)
        poll.register(self.jobs, 0)  # POLLHUP alone: the host is gone
        open_pipes, ended = set(said), False
        while not end and not ended:
            for pipe, _ in poll.poll(1000 * TURN_SECONDS):
                if pipe == process:
                    ended = True
                elif pipe == self.jobs:
                    self._reap(pid)
                    os._exit(0)
                elif chunk := os.read(pipe, CHUNK):
                    said[pipe] += chunk
                    end = "output" if len(said[pipe]) > limits[pipe] else end
                else:
                    poll.unregister(pipe)
                    open_pipes.discard(pipe)
            with contextlib.suppress(OSError):  # it has ended
                if time.clock_gettime((~pid << 3) | 2) > self.job["cpu_seconds"]:
                    end = "time"
            if time.monotonic() > deadline:
                end = "time"
        os.close(process)
        status, cpu = self._reap(pid)
        for pipe in open_pipes:  # what is in the pipes already
            os.set_blocking(pipe, False)
            with contextlib.suppress(BlockingIOError):
                while len(said[pipe]) <= limits[pipe] and (chunk := os.read(pipe, CHUNK)):
                    said[pipe] += chunk
        if not end and (status == -signal.SIGXCPU or cpu > self.job["cpu_seconds"]):
            end = "time"
        if not end and any(len(said[pipe]) > limits[pipe] for pipe in said):
            end = "output"
        if not end and not said[reported].startswith(READY):
            why = said[reported].decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"a test's process could not be made: {why}")
        output = bytes(said[printed][: limits[printed]])
        report = bytes(said[reported][len(READY) : limits[reported]])
        return end or ("done" if status == 0 else "crash"), status, cpu, output, report

    def _reap(self, pid: int) -> tuple[int, float]:
        """(exit status, negative for a signal; CPU seconds), once nothing of the test is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            os.killpg(pid, signal.SIGKILL)  # the id is no other group's before it is reaped
        _, status, usage = os.wait4(pid, 0)
        if self.server.own_root:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of this PID namespace but process 1 and this one
        with contextlib.suppress(OSError):  # orphans, where seccomp does not forbid children
            while children := _children():
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _reap_until(pid: int) -> int:
    """The exit status of `pid`; whatever else ends meanwhile is reaped too."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return status


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def _read(pipe: int, count: int) -> bytes:
    """Exactly so many bytes, so that the next job stays in the pipe. Raises EOFError."""
    data = bytearray()
    while len(data) < count:
        chunk = os.read(pipe, min(count - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the pipe of jobs closed within a job")
        data += chunk
    return bytes(data)


def _send(pipe: int, data: bytes, line: bool = True) -> None:
    rest = memoryview(data + b"\n" if line else data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def main() -> None:
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the host may ignore it
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # or block others
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # ends come by the pipe, or SIGKILL
    jobs, replies = (fcntl(fd, F_DUPFD_CLOEXEC, FIRST_FREE) for fd in (0, 1))
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
        server.build(wall)
    except OSError as error:
        _send(replies, json.dumps({"ready": False, "why": str(error)}).encode())
        return
    server.serve(jobs, replies)
    if settings["box"]:  # the host may have been killed
        with contextlib.suppress(OSError):
            walls.remove_contents(server.box)
            os.rmdir(server.box)


if __name__ == "__main__":
    main()
