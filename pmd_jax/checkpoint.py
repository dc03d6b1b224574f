"""Policy, optimizer, EMA teacher, bank and data position, saved as one.

Orbax writes each step into a folder under a temporary name and renames it when all parts are
there; a save that was cut short never counts. The bank rides along as its own JSON Lines files.
Restoring needs every part: a missing or damaged bank refuses to load, with the reason.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from pmd_jax.distill.update import TrainState
from pmd_jax.memory.bank import Bank, MemoryConfig

BANK = "bank"
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between saves, 0 saves only at the end. keep: how many of the newest stay."""

    every: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every: must be at least 0 (0: only at the end); got {self.every}")
        if self.keep < 1:
            raise ValueError(f"keep: must be at least 1; got {self.keep}")


class _BankHandler(ocp.CheckpointHandler):
    """Lets Orbax write a bank inside its atomic save."""

    def save(self, directory: Any, args: _BankSave) -> None:
        if jax.process_index() == 0:
            args.bank.save(Path(directory) / BANK)

    def restore(self, directory: Any, args: _BankRestore) -> Bank:
        return Bank.load(Path(directory) / BANK, args.config)


@ocp.args.register_with_handler(_BankHandler, for_save=True)
@dataclasses.dataclass
class _BankSave(ocp.args.CheckpointArgs):
    bank: Bank


@ocp.args.register_with_handler(_BankHandler, for_restore=True)
@dataclasses.dataclass
class _BankRestore(ocp.args.CheckpointArgs):
    config: MemoryConfig | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one save holds. run: plain JSON values of the trainer (step, totals, versions)."""

    state: TrainState
    bank: Bank
    order: grain.DatasetIterator
    run: dict[str, Any]


class Checkpointer:
    """Saves and restores `Checkpoint`s in one folder."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=False
        )
        self.folder, self.config = folder, config
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Writes a step whole, or not at all. A step that is already there is left as it is."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(checkpoint.state),
                order=grain.checkpoint.CheckpointSave(checkpoint.order),
                bank=_BankSave(checkpoint.bank),
                run=ocp.args.JsonSave(checkpoint.run),
            ),
        )
        self._manager.wait_until_finished()

    def restore(
        self, abstract: TrainState, order: grain.DatasetIterator, memory: MemoryConfig
    ) -> Checkpoint:
        """The newest step, onto the shardings of `abstract`. `order` is set to its position.

        Raises ValueError naming the folder and what is missing or damaged.
        """
        step = self.latest
        if step is None:
            raise ValueError(
                f"checkpoint {self.folder}: holds no complete step; start without --resume"
            )
        where = self.folder / str(step)
        if not (where / "bank" / BANK).is_dir():
            raise ValueError(
                f"checkpoint {where}: lacks its memory bank; a policy is not resumed without the "
                f"memory it learned with; delete this step's folder to resume from an earlier one"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                order=grain.checkpoint.CheckpointRestore(order),
                bank=_BankRestore(memory),
                run=ocp.args.JsonRestore(),
            ),
        )
        return Checkpoint(restored["state"], restored["bank"], order, restored["run"])

    def close(self) -> None:
        self._manager.close()
