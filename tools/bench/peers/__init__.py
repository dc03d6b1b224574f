"""Peers of the bench: other libraries that do the same work, each in a process of its own.

A peer may live in an environment of its own, so that its pins never meet ours: PYTHON -m
tools.bench.peers.NAME, started from the repository root, where PYTHON need not have pmd_jax. Parent
and child talk in lines of JSON, requests on the child's stdin and answers on its stdout; whatever
the libraries print goes to stderr (child.py is the other end).

    {"do": "prepare", "workload": {...}} -> {"library": ..., "version": ..., "setting": ...}
    {"do": "run"}                        -> {"seconds": ..., "tokens": ...}

This file is the parent's side and, like all of this folder, never imports pmd_jax.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
LAST_LINES = 3  # of a crashed peer's stderr, in the message


@dataclasses.dataclass(frozen=True)
class Library:
    """A peer: the module that runs it, what that module imports, and what pip is to install.

    kinds: the workloads that it knows.
    """

    module: str
    kinds: tuple[str, ...]
    imports: tuple[str, ...]
    packages: tuple[str, ...]


def packages(name: str) -> tuple[str, ...]:
    """What pip is to install for a peer: its lines of requirements-bench.txt."""
    lines = (REPOSITORY / "requirements-bench.txt").read_text().splitlines()
    first = lines.index(f"# {name}") + 1
    return tuple(lines[first : [*lines, ""].index("", first)])


def _library(name: str, kind: str, *imports: str) -> Library:
    return Library(f"tools.bench.peers.{name}", (kind,), imports, packages(name))


PEERS = {
    "transformers": _library("transformers", "rollout", "torch", "transformers"),
    "tunix": _library("tunix", "rollout", "jax", "flax", "tunix"),
    "trl": _library("trl", "distill", "torch", "transformers", "trl"),
}

FIND = """
import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])
"""


class PeerError(RuntimeError):
    """A peer that cannot be used or that crashed, said in one line."""


def find_peer(name: str) -> Library:
    if name not in PEERS:
        raise PeerError(f"peer: must be one of {', '.join(PEERS)}; got {name!r}")
    return PEERS[name]


def available(name: str, python: str | None = None) -> str | None:
    """None where the peer can be started, else one line: what is missing and how to get it.

    python: the interpreter of the peer's environment, ours by default.
    """
    library, python = find_peer(name), python or sys.executable
    try:
        found = subprocess.run(
            [python, "-c", FIND, *library.imports], capture_output=True, text=True, cwd=REPOSITORY
        )
    except OSError as error:
        return f"{name}: {python} cannot be started ({error.strerror}); name a Python interpreter"
    if found.returncode:
        return f"{name}: {python} is no working Python ({_last(found.stderr)})"
    if missing := found.stdout.split():
        command = shlex.join([python, "-m", "pip", "install", *library.packages])
        return f"{name}: {python} has no {', no '.join(missing)}; {command}"
    return None


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:]) or "it printed nothing"


class Peer:
    """A running peer, as a context: `with Peer("transformers") as peer: peer.prepare(...)`.

    python: the interpreter of its environment, ours by default. Its idle threads sleep rather than
    spin (OMP_WAIT_POLICY, unless set already), so that it can be kept while others are measured.
    variables: of its environment, in place of ours.
    """

    def __init__(
        self, name: str, python: str | None = None, variables: Mapping[str, str] | None = None
    ):
        self.name, self.python = name, python or sys.executable
        if complaint := available(name, self.python):
            raise PeerError(complaint)
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [self.python, "-m", find_peer(name).module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=REPOSITORY,
            env={
                "OMP_WAIT_POLICY": "PASSIVE",
                "PYTHONUNBUFFERED": "1",
                **os.environ,
                **(variables or {}),
            },
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it holds nothing that is worth a farewell
        self._process.communicate()
        self._errors.close()

    def prepare(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Loads the model and finds the best setting: {"library", "version", "setting"}."""
        return self._ask("prepare", workload=workload)

    def warm_up(self, workload: dict[str, Any]) -> dict[str, Any]:
        """prepare, then the work once before any that counts, as ours has its first run.

        A calibration does not do for that: it measures few steps of one batch, whose shapes a
        library with a static cache compiles for anew.
        """
        return {**self.prepare(workload), "first_run_seconds": self.run()["seconds"]}

    def run(self) -> dict[str, Any]:
        """Does the work once: {"seconds", "tokens"}, and what the peer adds."""
        return self._ask("run")

    def stderr(self) -> str:
        """All that it printed so far."""
        self._errors.seek(0)
        return self._errors.read()

    def _ask(self, what: str, **values: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        try:
            stdin.write(json.dumps({"do": what, **values}) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._process.wait()
            ended = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise PeerError(f"{self.name}: crashed in {what} ({ended}): {_last(self.stderr())}")
        return json.loads(answer)
