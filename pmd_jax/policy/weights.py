"""Weights in and out of Hugging Face safetensors, streamed shard by shard.

Loading asks for exactly the index of each local shard, so a process reads only its own bytes and
the host holds about one shard at a time. Every tensor of the files is used once and every
parameter is filled once; what is missing, left over or of another shape is named. Saving is written
to a temporary folder and renamed, so that a half-written model never looks like a model.

Left out: quantised files (hub.py converts the one that needs it), other formats than safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh
from safetensors.numpy import save_file

from pmd_jax.policy.families import ModelConfig, Weight, weight_table
from pmd_jax.policy.model import Params, stacked_axes, stacked_shape, tree_of
from pmd_jax.policy.sharding import named

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
IGNORED = ("rotary_emb.inv_freq",)  # a constant that some exports carry


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of the folder that holds it."""
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        files = {name: folder / file for name, file in names.items()}
    else:
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safetensors.safe_open(path, framework="np") as file:
                files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise ValueError(
            f"model folder {folder}: must hold safetensors weights; found none "
            f"(convert .bin weights with transformers first)"
        )
    return {name: path for name, path in files.items() if not name.endswith(IGNORED)}


def hf_names(weight: Weight, config: ModelConfig) -> list[str]:
    count = config.num_layers if weight.stacked else 1
    return [weight.hf_name.format(i) for i in range(count)]


def _check_names(folder: Path, found: set[str], config: ModelConfig) -> None:
    wanted = {name for weight in weight_table(config) for name in hf_names(weight, config)}
    if config.tied_head:
        found = found - {"lm_head.weight"}  # some files repeat the embedding under this name
    if missing := sorted(wanted - found):
        raise ValueError(f"model folder {folder}: lacks {len(missing)} tensors: {missing[:4]}")
    if extra := sorted(found - wanted):
        raise ValueError(
            f"model folder {folder}: holds {len(extra)} tensors that a {config.family} model of "
            f"this config.json does not have: {extra[:4]}"
        )


def load_params(
    folder: Path,
    config: ModelConfig,
    mesh: Mesh,
    dtype: Any,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """The parameters of a Hugging Face folder as sharded arrays of `dtype`.

    progress(done, total) is called after each parameter. Raises ValueError naming the folder and
    the tensors that are missing, unknown, or of another shape than config.json asks for.
    """
    files = tensor_files(folder)
    _check_names(folder, set(files), config)
    handles: dict[Path, Any] = {
        path: safetensors.safe_open(path, framework="np") for path in set(files.values())
    }
    table, leaves = weight_table(config), {}

    def read(weight: Weight) -> jax.Array:
        shape = stacked_shape(weight, config)
        names = hf_names(weight, config)
        slices = [handles[files[name]].get_slice(name) for name in names]
        expected = weight.shape[::-1] if weight.transposed else weight.shape
        for name, tensor in zip(names, slices, strict=True):
            if tuple(tensor.get_shape()) != expected:
                raise ValueError(
                    f"{files[name]}: {name} must have shape {expected} by config.json; "
                    f"got {tuple(tensor.get_shape())}"
                )

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # asked only for arrays without an index
            layers, inner = (index[0], index[1:]) if weight.stacked else (slice(0, 1), index)
            inner = inner[::-1] if weight.transposed else inner
            chosen = [slices[i][inner] for i in range(*layers.indices(len(slices)))]
            chosen = [x.T if weight.transposed else x for x in chosen]
            return np.asarray(np.stack(chosen) if weight.stacked else chosen[0]).astype(dtype)

        sharding = named(mesh, *stacked_axes(weight))
        return jax.make_array_from_callback(shape, sharding, part)

    for done, weight in enumerate(table, start=1):
        leaves[weight.path] = read(weight)
        if progress is not None:
            progress(done, len(table))
    return tree_of(leaves)


def leaf_of(params: Params, weight: Weight) -> jax.Array:
    node: Any = params
    for name in weight.path:
        node = node[name]
    return node


def save_params(
    folder: Path, params: Params, config: ModelConfig, source: Path, dtype: str = "bfloat16"
) -> None:
    """Writes a Hugging Face folder: weights of `dtype`, and every other file of `source`.

    source: the folder that the policy was loaded from (config, tokenizer, generation config).
    Raises ValueError when `folder` already holds files.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder {folder}: must be empty or new; choose another to save into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    shards: list[dict[str, np.ndarray]] = [{}]
    names: dict[str, int] = {}
    total = used = 0
    for weight in weight_table(config):
        leaf = np.asarray(jax.device_get(leaf_of(params, weight)))
        layers = leaf if weight.stacked else leaf[None]
        for name, value in zip(hf_names(weight, config), layers, strict=True):
            value = np.ascontiguousarray((value.T if weight.transposed else value).astype(kind))
            if used + value.nbytes > SHARD_BYTES and shards[-1]:
                shards.append({})
                used = 0
            shards[-1][name], names[name] = value, len(shards) - 1
            used, total = used + value.nbytes, total + value.nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, partial / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: files[i] for name, i in names.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=1))
    _copy_other_files(source, partial, dtype)
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)


def _copy_other_files(source: Path, folder: Path, dtype: str) -> None:
    """Config (with the dtype that was written), tokenizer and generation config."""
    kept = (".json", ".jinja", ".model", ".txt")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in kept and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=1))
