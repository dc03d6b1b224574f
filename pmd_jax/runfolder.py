"""Whose a run's folder is: no run writes among other files, beside another, or over another.

Left out: what is in it (telemetry.py, checkpoint.py).
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pmd_jax import settings
from pmd_jax.config import RunConfig

MAY_CHANGE = (
    "steps",
    "max_sampled_tokens",
    "optimizer",
    "evaluation",
    "checkpoint",
    "engine",
    "mesh",
    "health",
    "samples_per_step",
    "output",
    "tracking",
)
"""What a resumed run may set anew; all else must be as it was."""


def check_own(folder: Path) -> None:
    """A run's files never land among others: its config.json would replace a model's."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if names and "metrics.jsonl" not in names:
        raise ValueError(
            f"run folder {folder}: must be new, empty, or a run's own; it holds other files "
            f"({', '.join(sorted(names)[:3])}); give another --name or config.output"
        )


class Lock:
    """A file that one living process holds, so that no two runs write into one folder."""

    def __init__(self, file: Path):
        self.file = file
        self._held: IO[str] | None = None

    def take(self) -> None:
        """Raises ValueError where another process holds it, if the file system can tell."""
        self._held = self.file.open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"run folder {self.file.parent}: is in use by a run that is going on; wait for it, "
                f"stop it, or give another --name"
            ) from None
        except OSError:
            pass  # a network file system without locks

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


def check_folder(
    folder: Path, config: RunConfig, latest: int | None, aside: Sequence[str], resume: bool
) -> None:
    """A run never writes over another, and goes on only as the run that it was.

    aside: checkpoints that were damaged.
    """
    if latest is None and aside:
        raise ValueError(
            f"run folder {folder}: its checkpoints are damaged ({', '.join(aside)}); bring a copy "
            f"of one back under its number, or give another --name"
        )
    if not resume:
        if latest is not None:
            raise ValueError(
                f"run folder {folder}: holds a run of {latest} steps; continue it with --resume, "
                f"give another --name, or delete the folder"
            )
        return
    file = folder / "config.json"
    if latest is None or not file.is_file():
        raise ValueError(
            f"run folder {folder}: has no checkpoint to resume; start it without --resume"
        )
    before, now = json.loads(file.read_text()), settings.to_dict(config)
    changed = sorted(
        name for name in now if now[name] != before.get(name) and name not in MAY_CHANGE
    )
    if changed:
        raise ValueError(
            f"config.{changed[0]}: must be as it was when the run {folder} began; resume with the "
            f"same configuration, or start a new run under another --name"
        )
