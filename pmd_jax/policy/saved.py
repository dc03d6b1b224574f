"""Policies in Orbax checkpoints: the layout of a run's folder, and one policy out of it.

    <run>/model/                 config.json, tokenizer and generation config, as the model came
    <run>/checkpoints/<step>/state/    an Orbax tree that holds `params`, and `teacher` where EMA

A run writes more beside these (checkpoint.py); an imported model has nothing else, at step 0.
Either names a model anywhere a Hugging Face folder does, and so does a step's own folder. Weights
are restored onto any mesh, each process reading its own shards.

Left out: optimizer, bank and data position, which only a run can use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.model import Params, abstract_params

MODEL, CHECKPOINTS, STATE = "model", "checkpoints", "state"
Which = Literal["params", "teacher"]
OF_WEIGHTS = (".index.json", "_manifest.json")  # about the files of the weights as they came


@dataclasses.dataclass(frozen=True)
class Saved:
    """files: the folder of config.json and tokenizer. state: the Orbax tree of one step."""

    files: Path
    state: Path


def find_saved(folder: Path) -> Saved | None:
    """The policy saved in a run's folder (its newest step) or in a step's own folder.

    None where `folder` is neither. Raises ValueError where it is, and lacks a part.
    """
    if (folder / STATE).is_dir() and folder.parent.name == CHECKPOINTS:
        run, state = folder.parent.parent, folder / STATE
    elif (folder / CHECKPOINTS).is_dir():
        steps = [
            step
            for step in (folder / CHECKPOINTS).iterdir()
            if step.name.isdigit() and (step / STATE).is_dir()
        ]
        if not steps:
            raise ValueError(f"{folder}: holds no complete checkpoint; name a run that saved one")
        run, state = folder, max(steps, key=lambda p: int(p.name)) / STATE
    else:
        return None
    if not (run / MODEL / "config.json").is_file():
        raise ValueError(
            f"{run}: lacks {MODEL}/config.json; copy config.json and the tokenizer files of the "
            f"model that it was trained from into {run / MODEL}"
        )
    return Saved(run / MODEL, state)


def load_saved(
    saved: Saved, config: ModelConfig, mesh: Mesh, dtype: Any, which: Which = "params"
) -> Params:
    """The weights of a saved policy, or of its EMA teacher, as sharded arrays of `dtype`.

    Raises ValueError for a checkpoint that is damaged, of another model, or has no such weights.
    """
    abstract = {which: abstract_params(config, mesh, dtype)}
    arguments = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    damaged = f"{saved.state}: damaged or incomplete; restore it from a copy, or name another step"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(saved.state.absolute()).item_metadata
        if metadata is None:
            raise ValueError(damaged)
        tree = metadata.tree
        if not tree.get(which):
            raise ValueError(
                f"{saved.state}: holds no {which}; it was saved by a run without an EMA teacher"
            )
        wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), abstract[which])
        found = jax.tree.map(lambda leaf: tuple(leaf.shape), tree[which])
        if wanted != found:
            raise ValueError(
                f"{saved.state}: its {which} are not those of a model of {saved.files}/config.json"
            )
        try:
            return checkpointer.restore(saved.state.absolute(), args=arguments)[which]
        except Exception as error:  # Orbax and its store raise all kinds for bytes that are off
            raise ValueError(damaged) from error


def save_imported(folder: Path, params: Params, files: Path) -> None:
    """Writes a policy in the layout above, at step 0, all of it or nothing.

    Raises ValueError when `folder` already holds files.
    """
    with whole_folder(folder) as partial:
        copy_model_files(files, partial / MODEL)
        state = partial.absolute() / CHECKPOINTS / "0" / STATE
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(state, args=ocp.args.PyTreeSave({"params": params}))


def check_new(folder: Path) -> None:
    """Raises ValueError where `folder` holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder {folder}: must be empty or new; choose another to save into")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Lends a folder beside `folder` that takes its place at the end, or is gone on failure.

    Raises ValueError where `folder` holds anything.
    """
    check_new(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)


def copy_model_files(source: Path, folder: Path) -> None:
    """Everything of a Hugging Face folder but its weights: config, tokenizer, generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = (".json", ".jinja", ".model", ".txt")
    for file in sorted(source.iterdir()):
        belongs = file.suffix in kept or file.name.startswith("LICENSE")
        if file.is_file() and belongs and not file.name.endswith(OF_WEIGHTS):
            shutil.copyfile(file, folder / file.name)
