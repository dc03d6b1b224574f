"""One long step, told on standard error: a bar on a terminal, one plain line elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Count = Callable[[int, int], None]
"""progress(done, total)"""


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Count]:
    """Lends a function that moves the bar; until it is called the bar only shows life."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(description, file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
