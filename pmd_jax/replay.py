"""A step that failed, kept so that it can be computed again: its batch, and the weights it met.

    runs/<name>/failed_step_<N>/batch.npz   the arrays of DistillBatch
                                report.json what the run found: loss, gradient norm
                                weights/    policy, and EMA teacher where there is one (Orbax)

`python -m tools.replay runs/<name>/failed_step_<N>` reads them. Nothing is resumed from here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from pmd_jax import distributed
from pmd_jax.distill.batch import DistillBatch, place
from pmd_jax.distill.divergence import PerToken
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import StepReport, TrainState, loss_and_gradients
from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.saved import Saved, load_saved
from pmd_jax.policy.sharding import batch_shards

WEIGHTS, BATCH, REPORT = "weights", "batch.npz", "report.json"


def save_failed_step(
    run: Path, step: int, state: TrainState, batch: DistillBatch, report: StepReport
) -> Path:
    """Writes the folder of a step that failed, in place of an earlier one of the same step.

    state: as it was before the step. All processes of a run call it together.
    """
    folder = run / f"failed_step_{step}"

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        np.savez_compressed(folder / BATCH, **batch._asdict())
        found = {"step": step, "loss": float(report.loss), "grad_norm": float(report.grad_norm)}
        (folder / REPORT).write_text(json.dumps(found))

    distributed.by_main(write)  # where the disk is full, none goes on to the weights
    weights = {"params": state.params} | ({"teacher": state.teacher} if state.teacher else {})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute() / WEIGHTS, args=ocp.args.PyTreeSave(weights))
    return folder


@dataclasses.dataclass(frozen=True)
class FailedStep:
    """What a run found at a step that failed, and what it computed that from."""

    step: int
    loss: float
    grad_norm: float
    batch: DistillBatch
    saved: Saved


def load_failed_step(folder: Path) -> FailedStep:
    """Raises ValueError where `folder` is not one that `save_failed_step` wrote."""
    try:
        found = json.loads((folder / REPORT).read_text())
        with np.load(folder / BATCH) as arrays:
            batch = DistillBatch(**arrays)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}: must be a failed_step_N of a run's folder; it has no {REPORT} and {BATCH} "
            f"of a step ({error})"
        ) from error
    saved = Saved(folder.parent / "model", folder / WEIGHTS)
    return FailedStep(found["step"], found["loss"], found["grad_norm"], batch, saved)


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A step computed again. per_token arrays are [N, G, T], gradients those of the whole loss."""

    loss: float
    grad_norm: float
    per_token: PerToken
    bad_gradients: list[str]


def replay(
    failed: FailedStep, config: DistillConfig, model: ModelConfig, mesh: Mesh, dtype: Any
) -> Replayed:
    """Loss and gradients of the failed step, on any mesh and in any dtype. Nothing is updated."""
    params = load_saved(failed.saved, model, mesh, np.dtype("float32"))
    teacher = None
    if config.teacher == "ema":
        teacher = load_saved(failed.saved, model, mesh, np.dtype("float32"), "teacher")

    @jax.jit
    def compute(params: Any, teacher: Any, batch: DistillBatch) -> Any:
        loss, known, gradients = loss_and_gradients(
            params, teacher, batch, config, model, dtype, batch_shards(mesh)
        )
        squares = jax.tree.map(lambda g: (g.astype(np.float32) ** 2).sum(), gradients)
        return loss, known, squares

    with jax.set_mesh(mesh):
        found = compute(params, teacher, place(failed.batch, mesh))
        loss, known, squares = jax.device_get(found)
    leaves = jax.tree.leaves_with_path(squares)
    bad = [jax.tree_util.keystr(path) for path, value in leaves if not np.isfinite(value)]
    norm = float(np.sqrt(sum(float(value) for _, value in leaves)))
    return Replayed(float(loss), norm, known, bad)
