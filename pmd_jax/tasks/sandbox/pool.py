"""The pool: warm servers that threads share, one job each at a time."""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

from pmd_jax.tasks.sandbox.execution import Execution, Program, SandboxConfig, SandboxError
from pmd_jax.tasks.sandbox.worker import Result, Wall, Worker

WALLS: tuple[Wall, ...] = ("namespaces", "bubblewrap", "none")


class Sandbox:
    """A pool of servers that run untrusted programs. Threads may share it; they wait in turn.

    The first server is started at once, so that what is wrong with the machine is known before
    there is work; SandboxError then says why. Servers end with `close`, with the last reference to
    the pool, or with the process that made it, however that ends.
    """

    def __init__(self, config: SandboxConfig | None = None):
        self.config = config or SandboxConfig()
        self._size = self.config.workers or os.cpu_count() or 1
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._workers: list[Worker] = []
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

    def _first(self) -> tuple[Wall, Worker]:
        """The best wall that stands here, and a server behind it."""
        tried: list[str] = []
        for wall in WALLS if self.config.wall == "auto" else (self.config.wall,):
            try:
                return wall, self._start(wall)
            except SandboxError as error:
                tried.append(f"{wall}: {error}")
        raise SandboxError("sandbox.wall: cannot start; " + "; ".join(tried))

    def _start(self, wall: Wall) -> Worker:
        worker = Worker(self.config, wall)
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


def _close_all(workers: list[Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork's copy; the servers are its parent's
    for worker in workers:
        worker.close()
