"""What asks a run to end before its end: Ctrl-C, and SIGTERM.

Left out: what the run then does (run.py).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pmd_jax.distributed import Stopped


class Interrupts:
    """What asks a run to end.

    The first Ctrl-C asks to stop after the step in progress, the second stops at once. SIGTERM asks
    to leave that step: `check`, which is called often, raises Stopped then.
    """

    def __init__(self, note: Callable[[str], None]):
        self.asked, self._note = "", note

    def check(self) -> None:
        if self.asked == "SIGTERM":
            raise Stopped

    @contextlib.contextmanager
    def caught(self, number: signal.Signals) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread; a notebook's worker has none to catch
            return
        before = signal.signal(number, self._handle)
        try:
            yield
        finally:
            signal.signal(number, before)

    def _handle(self, number: int, _: Any) -> None:
        if "SIGTERM" in (self.asked, signal.Signals(number).name):
            self.asked = "SIGTERM"
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = "Ctrl-C"
        self._note("stopping after this step; Ctrl-C again stops at once, without saving")
