"""Computes a step that failed once more, on a CPU, and says where it goes wrong.

    python -m tools.replay runs/NAME/failed_step_12 [--dtype float32]

A run whose loss is not finite, or beyond config.health.max_loss or max_grad_norm, leaves such a
folder: the batch and the weights that it met. Shown are loss and gradient norm beside what the run
found, the parameters whose gradient is not finite, and the rollouts with the largest loss, with the
first token at which student or teacher is not finite.

--dtype     of computation: the run's own unless given. What is finite in float32 and not in
            bfloat16 is a matter of precision, what is neither is in the weights or the batch.
--rollouts  how many to show (default 5)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.replay",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rollouts", type=int, default=5)
    args = parser.parse_args(argv)
    try:
        print("\n".join(report(args.folder, args.dtype, args.rollouts)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(folder: Path, dtype: str | None, num_rollouts: int) -> list[str]:
    """The lines to print. Raises ValueError for a folder of another kind."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from pmd_jax import settings
    from pmd_jax.config import RunConfig
    from pmd_jax.policy.families import read_config
    from pmd_jax.policy.sharding import single_device_mesh
    from pmd_jax.policy.tokenizer import Tokenizer
    from pmd_jax.replay import load_failed_step, replay

    failed = load_failed_step(folder)
    config = settings.build(
        RunConfig, settings.load_config(str(folder.parent / "config.json")).to_dict()
    )
    kind = dtype or config.model.dtype
    files = failed.saved.files
    found = replay(
        failed, config.distill, read_config(files), single_device_mesh(), jax.numpy.dtype(kind)
    )
    lines = [
        f"step {failed.step} in {kind} on a CPU",
        f"loss           {found.loss:.6g} (the run: {failed.loss:.6g})",
        f"gradient norm  {found.grad_norm:.6g} (the run: {failed.grad_norm:.6g})",
    ]
    if found.bad_gradients:
        lines.append("not finite: gradients of " + ", ".join(found.bad_gradients))
    tokenizer = Tokenizer.load(files)
    rows = worst(failed.batch, found.per_token)[:num_rollouts]
    for group, sample, nats, token in rows:
        ids = failed.batch.response[group, sample]
        where = ""
        if token is not None:
            piece = tokenizer.decode(ids[max(token - 3, 0) : token + 1])
            where = f", not finite from token {token} on: ...{json.dumps(piece)}"
        lines.append(f"group {group} rollout {sample}: {nats:.4g} nats per token{where}")
    return lines


def worst(batch: Any, known: Any) -> list[tuple[int, int, float, int | None]]:
    """(group, rollout, mean divergence, first token that is not finite), the worst first."""
    length = batch.response_length
    mask = np.arange(batch.response.shape[-1]) < length[..., None]
    broken = mask & ~(
        np.isfinite(known.divergence) & np.isfinite(known.student) & np.isfinite(known.teacher)
    )
    mean = np.where(mask, known.divergence, 0).sum(-1) / np.maximum(length, 1)
    rows = [
        (g, s, float(mean[g, s]), int(broken[g, s].argmax()) if broken[g, s].any() else None)
        for g, s in np.argwhere(length > 0)
    ]
    return sorted(rows, key=lambda row: (row[3] is None, -np.nan_to_num(row[2], nan=np.inf)))


if __name__ == "__main__":
    sys.exit(main())
