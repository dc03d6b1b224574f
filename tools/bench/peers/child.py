"""The child's side of a peer: answers the parent's requests, one line of JSON each.

An exception is not caught: it ends the process, and the parent reads its last lines from stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Work(Protocol):
    """A workload that was prepared: what the peer tells of itself, and the work."""

    about: dict[str, Any]

    def run(self) -> dict[str, Any]: ...


def _end_with(parent: int) -> None:
    """Ends this process when the parent is gone, in the middle of its work if need be."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def serve(kinds: Mapping[str, Callable[[dict[str, Any]], Work]]) -> None:
    """Answers until stdin ends. kinds: for each workload["kind"], what prepares it."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints, those of C libraries too, go to stderr
    sys.stdout = sys.stderr
    work = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            workload = request["workload"]
            if workload["kind"] not in kinds:
                raise ValueError(f"kind: must be one of {list(kinds)}; got {workload['kind']!r}")
            work = kinds[workload["kind"]](workload)
            answer = work.about
        elif request["do"] == "run":
            if work is None:
                raise ValueError("run: nothing was prepared")
            answer = work.run()
        else:
            raise ValueError(f"do: must be prepare or run; got {request['do']!r}")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
