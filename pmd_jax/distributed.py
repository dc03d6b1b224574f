"""Many processes, one run: how they start, how work is shared, what they tell each other.

JAX's runtime is the engine: every process runs this same program, and each device belongs to one of
them. Rollouts and replies are made by one process each (`share`), on a mesh of its own devices;
what came of them goes to all as records (`exchange`), so that every process holds the same memory
and builds the same batch; the update is one program over all devices. In one process all of this
does nothing.

Every function here that exchanges is called by all processes, at the same place and in the same
order. Records travel pickled: they come from this program alone. A process that fails tells the
others at the next exchange (`PeerFailed`); one that dies is noticed by the collective that waits
for it (`PeerLost`), or, where it merely stands still, by JAX's heartbeats, which end the process
after `peer_timeout` seconds.

Left out: which devices form which mesh (policy/sharding.py), and what is done when a run ends early
(run.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
PIECE = 2**26
"""Bytes that a process sends at once; its devices hold as many for each process."""


class PeerFailed(RuntimeError):
    """Another process of the run raised an error, which its own output explains."""


class PeerLost(RuntimeError):
    """Another process of the run ended, or cannot be reached."""


class Stopped(Exception):
    """Work was left because the run was told to stop at once, here or in another process."""


# --- start ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Which processes form a run, from the command line.

    coordinator, num_processes, process_id: host:port of process 0, how many there are, which one
        this is; all three or none.
    multihost: JAX finds them out: Cloud TPU, GKE, Slurm, Open MPI. Assumed where a launcher's
        environment tells of several processes.
    peer_timeout: seconds after which a process that gives no sign of life counts as dead.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    multihost: bool = False
    peer_timeout: int = 100

    def __post_init__(self) -> None:
        explicit = (bool(self.coordinator), self.num_processes > 0, self.process_id >= 0)
        if any(explicit) and not all(explicit):
            raise ValueError(
                "--coordinator, --num-processes, --process-id: must be given together, or none of "
                f"them; got {self.coordinator or None}, {self.num_processes or None}, "
                f"{self.process_id if self.process_id >= 0 else None}"
            )
        if all(explicit) and self.process_id >= self.num_processes:
            raise ValueError(
                f"--process-id: must be below --num-processes, {self.num_processes}; "
                f"got {self.process_id}"
            )
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(
                f"--coordinator: must be HOST:PORT of process 0; got {self.coordinator!r}"
            )
        if self.peer_timeout < 1:
            raise ValueError(f"--peer-timeout: must be at least 1 second; got {self.peer_timeout}")


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started several processes: a Slurm step, mpirun, a TPU slice of GKE."""
    tasks = (
        environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return any(n.isdecimal() and int(n) > 1 for n in tasks) or "," in hosts


def start(cluster: Cluster) -> None:
    """Joins the processes of the run, before JAX looks for devices. Alone it does nothing.

    Raises PeerLost when they cannot be joined.
    """
    explicit: dict[str, Any] = {}
    if cluster.coordinator:
        explicit = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.num_processes,
            "process_id": cluster.process_id,
            "cluster_detection_method": "deactivate",
        }
    elif not (cluster.multihost or launched(os.environ)):
        return
    # JAX's own handler would take SIGTERM, and leave nothing of it to Interrupts of run.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **explicit,
            heartbeat_timeout_seconds=cluster.peer_timeout,
            shutdown_timeout_seconds=max(cluster.peer_timeout, 300),
        )
    except (RuntimeError, ValueError) as error:
        raise PeerLost(
            f"processes: could not be joined ({_first_line(error)}); give every one the same "
            f"--coordinator HOST:PORT and --num-processes, and its own --process-id"
        ) from error


def is_joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def leave(code: int) -> None:
    """Ends a process of several at once; alone it does nothing.

    An ordinary exit waits for the others, which wait for this one.
    """
    if is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- exchange -------------------------------------------------------------------------------


def exchange(mine: T) -> list[T]:
    """What every process gave, in the order of their numbers, at all of them.

    Raises PeerLost when one of them is gone.
    """
    if jax.process_count() == 1:
        return [mine]
    content = pickle.dumps(mine, protocol=5)
    with peers_are_there("exchanging records"):
        halves = multihost_utils.process_allgather(np.array(divmod(len(content), PIECE), np.int32))
        sizes = [pieces * PIECE + rest for pieces, rest in halves.tolist()]
        parts: list[list[bytes]] = [[] for _ in sizes]
        for begin in range(0, max(sizes), PIECE):
            width = min(1 << (max(sizes) - begin - 1).bit_length(), PIECE)  # few programs
            piece = np.zeros(width, np.uint8)
            own = content[begin : begin + width]
            piece[: len(own)] = np.frombuffer(own, np.uint8)
            for part, row in zip(parts, multihost_utils.process_allgather(piece), strict=True):
                part.append(row.tobytes())
    return [pickle.loads(b"".join(part)[:size]) for part, size in zip(parts, sizes, strict=True)]


def share(count: int, work: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
    """The results of `count` pieces of work, in order: each done by one process, known to all.

    work: positions of this process's pieces -> their results. An error in one process is raised in
    all: there as it is, elsewhere as PeerFailed; Stopped everywhere. An error of the devices ends
    this process, since others may be waiting in a collective that it missed.
    """
    processes, index = jax.process_count(), jax.process_index()
    if processes == 1:
        return list(work(range(count)))
    failure: BaseException | None = None
    mine: Sequence[T] = ()
    try:
        mine = work(range(index, count, processes))
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        failure = error
    told = exchange((type(failure).__name__ if failure else "", _first_line(failure), mine))
    if failure is not None and not isinstance(failure, Stopped):
        raise failure
    names = [name for name, _, _ in told]
    for number, (name, text, _) in enumerate(told):
        if name and name != Stopped.__name__:
            raise PeerFailed(f"process {number} failed: {text} ({name}); its output says more")
    if Stopped.__name__ in names:
        raise Stopped
    results: list[Any] = [None] * count
    for number, (_, _, theirs) in enumerate(told):
        results[number::processes] = theirs
    return results


def by_main(work: Callable[[], T]) -> T:
    """What process 0 makes of it, at all of them; the others do nothing. Its error is theirs."""
    if jax.process_count() == 1:
        return work()
    result: Any = None
    failure: Exception | None = None
    if is_main():
        try:
            result = work()
        except Exception as error:
            failure = error
    result, failure = exchange((result, failure))[0]
    if failure is not None:
        raise failure
    return result


@contextlib.contextmanager
def peers_are_there(doing: str) -> Iterator[None]:
    """Errors of collectives, of which there are many kinds, as PeerLost. Alone they stay.

    On CPUs a peer that is gone is a ValueError of Gloo's, elsewhere an error of JAX's runtime.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        is_collective = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if jax.process_count() == 1 or not is_collective:
            raise
        raise PeerLost(
            f"process {jax.process_index()}: another process ended or cannot be reached while "
            f"{doing} ({_first_line(error)}); start all of them again with --resume"
        ) from error


def _first_line(error: BaseException | None) -> str:
    return str(error).partition("\n")[0][:300] if error is not None else ""
