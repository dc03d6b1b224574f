"""Policy, optimizer, EMA teacher, bank and data position, saved as one.

    checkpoints/<step>/state/ bank/ run/   one save; run holds the data position too
    checkpoints/<step>/digests.json        size and CRC-32 of its files, those of the bank aside
    checkpoints/<step>.damaged/            one that was set aside, since it could not be read

Orbax writes each step into a folder under a temporary name and renames it when all parts are
there; a save that was cut short never counts. Training goes on while files are written: a save
copies the arrays to the host, and waits for the save before it. The bank rides along as its own
JSON Lines files, which know their own sha256 and are linked from save to save.

Restoring needs every part, as it was written: a step of which anything is missing or changed is set
aside under another name, and the one before it is taken.

Of several processes each writes its own shards, on a file system that all of them see; process 0
writes all else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp

from pmd_jax import distributed
from pmd_jax.distill.update import TrainState
from pmd_jax.memory.bank import Bank, Damaged, MemoryConfig

BANK, DIGESTS = "bank", "digests.json"
PIECE = 2**24
logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax fails at, SaveFailed says


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often, and what stays.

    every: steps between saves, 0 saves only at the end. keep: how many of the newest stay.
    keep_every: steps at multiples of this stay for good; 0 for none.
    asynchronous: files are written while training goes on. timeout_seconds: for the files of one
    save; a file system that takes longer ends the run.
    """

    every: int = 10
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    timeout_seconds: int = 1200

    def __post_init__(self) -> None:
        for name in ("every", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}: must be at least 0 (0: never); got {getattr(self, name)}"
                )
        for name in ("keep", "timeout_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1; got {getattr(self, name)}")


class _BankHandler(ocp.CheckpointHandler):
    """Lets Orbax write a bank inside its atomic save. `Bank.load` reads it."""

    def save(self, directory: Any, args: _BankSave) -> None:
        if distributed.is_main():
            args.bank.save(Path(directory) / BANK)

    def restore(self, directory: Any, args: Any) -> Bank:
        return Bank.load(Path(directory) / BANK)


@ocp.args.register_with_handler(_BankHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _BankSave(ocp.args.CheckpointArgs):
    bank: Bank


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one save holds. run: plain JSON values of the trainer (step, totals, versions)."""

    state: TrainState
    bank: Bank
    order: grain.DatasetIterator
    run: dict[str, Any]


class Checkpointer:
    """Saves and restores `Checkpoint`s in one folder. All processes of a run call it together."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder.absolute(), config
        self.notes: list[str] = []
        self._newest: int | None = None  # the step whose files are being written
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                keep_period=config.keep_every or None,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=config.timeout_seconds,
                    post_finalization_callback=self._finalised,
                    create_directories_asynchronously=False,  # what forbids it is said at once
                ),
            ),
        )

    @property
    def steps(self) -> list[int]:
        """The complete steps, oldest first: not the one that is being written."""
        return sorted(int(f.name) for f in self.folder.glob("*") if f.name.isdigit())

    @property
    def latest(self) -> int | None:
        """The newest complete step, None when there is none."""
        return max(self.steps, default=None)

    @property
    def set_aside(self) -> list[str]:
        """The names of steps that were damaged."""
        return sorted(f.name for f in self.folder.glob("*.damaged*"))

    # --- saving ---------------------------------------------------------------------------------

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Writes a step whole, or not at all. A step that is already there is left as it is.

        The bank and a copy of the arrays are taken before it returns. Raises SaveFailed, also for
        the save before, of which it waits for the end.
        """
        self.wait()
        if step in self.steps:
            return
        self._newest = step
        run = {"order": checkpoint.order.get_state(), "run": checkpoint.run}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(checkpoint.state),
                    bank=_BankSave(checkpoint.bank),
                    run=ocp.args.JsonSave(run),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the files of the last save are there. Raises SaveFailed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> SaveFailed:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if len(reason) > 300:  # long for its paths; what went wrong stands at the end
            reason = f"{reason[:80]} ... {reason[-160:]}"
        whole = ", ".join(map(str, self.steps))
        left = f"steps {whole} there are untouched" if whole else "there is no other"
        return SaveFailed(
            f"checkpoint {self.folder / str(self._newest)}: could not be written ({reason}); "
            f"{left}; see to the space, the rights and the speed of that file system, "
            f"then --resume"
        )

    def _finalised(self) -> None:
        """In Orbax's thread, when all files of a step are there, before it gets its name."""
        if distributed.is_main():
            named = self.folder / str(self._newest)
            write_digests(next(self.folder.glob(f"{self._newest}.*-tmp*"), named))

    # --- restoring ------------------------------------------------------------------------------

    def restore(
        self, abstract: TrainState, order: grain.DatasetIterator, memory: MemoryConfig
    ) -> Checkpoint:
        """The newest step that is whole, onto the shardings of `abstract`; `order` is set to it.

        A newer one that is damaged is set aside, and told in `notes`. Raises ValueError naming the
        folder when none is left.
        """
        self.wait()
        told = ""
        while (step := distributed.by_main(lambda: self.latest)) is not None:
            damage, found = self._read(step, abstract, memory)
            if found is not None:
                order.set_state(found["run"]["order"])
                return Checkpoint(found["state"], found["bank"], order, found["run"]["run"])
            aside = distributed.by_main(lambda: self._set_aside(step))
            self._manager.reload()
            told = f"; {aside.name}: {damage}"
            self.notes.append(f"checkpoint {step} is damaged ({damage}); set aside as {aside}")
        raise ValueError(
            f"checkpoint {self.folder}: holds no complete step{told}; start without --resume in "
            f"another folder (--name), or bring a copy of a step back"
        )

    def _read(
        self, step: int, abstract: TrainState, memory: MemoryConfig
    ) -> tuple[str, dict[str, Any] | None]:
        """(what is damaged, None) or ("", the parts).

        Damage is bytes that are not those that were written; whatever else keeps whole files from
        being restored (rights, memory, another model) is raised, and nothing is set aside.
        """
        if (self.folder / str(step) / "order").is_dir():
            raise ValueError(
                f"checkpoint {self.folder / str(step)}: was saved by an earlier version, whose "
                f"runs this one does not resume; start a new run from its policy with "
                f"--config.model.path={self.folder.parent}"
            )
        damage = distributed.by_main(lambda: find_damage(self.folder / str(step)))
        if damage:
            return damage, None
        try:
            bank = Bank.load(self.folder / str(step) / BANK / BANK, memory)
        except Damaged as error:
            damage = str(error)
        if told := [text for text in distributed.exchange(damage) if text]:
            return told[0], None
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore()
            ),
        )
        return "", {"state": restored["state"], "bank": bank, "run": restored["run"]}

    def _set_aside(self, step: int) -> Path:
        aside = self.folder / f"{step}.damaged"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        return (self.folder / str(step)).rename(aside)

    def close(self) -> None:
        """Waits for the last save. Raises SaveFailed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # of a save that failed it would tell once more
                self._manager.close()


# --- what was written -----------------------------------------------------------------------


def write_digests(folder: Path) -> None:
    """Notes size and CRC-32 of all files below a step's folder, in it."""
    files = {str(f.relative_to(folder)): _digest(f) for f in _files(folder)}
    (folder / DIGESTS).write_text(json.dumps(files))


def find_damage(folder: Path) -> str:
    """What differs from when it was written, in words; "" where nothing does."""
    if not (folder / BANK / BANK).is_dir():
        return "it lacks its memory bank, and a policy is not resumed without the memory it had"
    try:
        files = json.loads((folder / DIGESTS).read_text())
    except (FileNotFoundError, ValueError):
        return f"{DIGESTS} is missing or cannot be read"
    for name, (size, crc) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
        if _digest(file)[1] != crc:
            return f"{name} does not have the bytes that were written"
    return ""


def _files(folder: Path) -> Iterator[Path]:
    """All but the bank's, and Orbax's own note, which changes when the step gets its name."""
    notes = folder / DIGESTS, folder / "_CHECKPOINT_METADATA"
    parts = (f for f in sorted(folder.rglob("*")) if f.is_file() and f not in notes)
    return (f for f in parts if BANK not in f.relative_to(folder).parts)


def _digest(file: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with file.open("rb") as content:
        while piece := content.read(PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc
