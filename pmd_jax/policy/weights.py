"""Weights in and out of Hugging Face safetensors, streamed piece by piece.

Loading asks for exactly the index of each local shard, so a process reads only its own bytes; files
are mapped for one piece at a time, and the host holds one parameter beside those already on their
devices. Every tensor of the files is used once and every parameter is filled once; what is missing,
left over, of another shape or type, or damaged is named before anything is read. Saving streams
layer by layer into a temporary folder and renames it, so that a half-written model never looks like
a model.

Left out: quantised files (hub.py converts those that need it), other formats than safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh

from pmd_jax.policy.bar import Count
from pmd_jax.policy.families import ModelConfig, Weight, weight_table
from pmd_jax.policy.model import Params, stacked_axes, stacked_shape, tree_of
from pmd_jax.policy.saved import copy_model_files, whole_folder
from pmd_jax.policy.sharding import named

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a file, what hubs and loaders expect at most
PIECE_BYTES = 64 * 2**20  # of a file, read at once
IGNORED = ("rotary_emb.inv_freq",)  # a constant that some exports carry
FLOATS = ("F32", "BF16", "F16")
KINDS = {"float32": (np.float32, "F32"), "bfloat16": (ml_dtypes.bfloat16, "BF16")}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and its shape and type there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


# --- reading ------------------------------------------------------------------------------------


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by its name as `weight_table` has it; headers alone are read.

    A model saved without its head, as embedding models are, lacks "model." before every name.
    Raises ValueError naming the file that is absent or damaged.
    """
    files = _weight_files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping
                    if name.endswith(IGNORED):
                        continue
                    if name in found:
                        raise ValueError(
                            f"model folder {folder}: {name} is in {found[name].file.name} and in "
                            f"{file.name}; keep the files of one model"
                        )
                    tensor = tensors.get_slice(name)
                    shape = tuple(tensor.get_shape())
                    found[name] = Stored(file, name, shape, tensor.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged ({error}); fetch it again") from error
    if not any(name.startswith("model.") for name in found):
        found = {f"model.{name}": tensor for name, tensor in found.items()}
    return found


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"model folder {folder}: must hold safetensors weights; found none "
                f"(convert .bin weights with transformers first)"
            )
        return files
    try:
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder / INDEX}: damaged ({error}); fetch it again") from error
    files = [folder / name for name in sorted(names)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"model folder {folder}: lacks {', '.join(absent)}, which {INDEX} names; fetch it again"
        )
    return files


def hf_names(weight: Weight, config: ModelConfig) -> list[str]:
    """The names of a parameter in the files, one for each layer where it is stacked."""
    count = config.num_layers if weight.stacked else 1
    return [weight.hf_name.format(i) for i in range(count)]


def _check(folder: Path, found: dict[str, Stored], config: ModelConfig) -> None:
    """Every tensor used once, every parameter filled once, each of the shape of config.json."""
    wanted = {name: w for w in weight_table(config) for name in hf_names(w, config)}
    left = found.keys() - wanted.keys()
    if config.tied_head:
        left = left - {"lm_head.weight"}  # some files repeat the embedding under this name
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"model folder {folder}: lacks {len(missing)} tensors: {missing[:4]}")
    if extra := sorted(left):
        raise ValueError(
            f"model folder {folder}: holds {len(extra)} tensors that a {config.family} model of "
            f"this config.json does not have: {extra[:4]}"
        )
    for name, weight in wanted.items():
        tensor, expected = found[name], weight.shape[::-1] if weight.transposed else weight.shape
        if tensor.shape != expected:
            raise ValueError(
                f"{tensor.file}: {name} must have shape {expected} by config.json; "
                f"got {tensor.shape}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.file}: {name} must be one of {', '.join(FLOATS)}; got {tensor.dtype}; "
                f"use the model as it was before it was quantised"
            )


def load_params(
    folder: Path,
    config: ModelConfig,
    mesh: Mesh,
    dtype: Any,
    progress: Count | None = None,
) -> Params:
    """The parameters of a Hugging Face folder as sharded arrays of `dtype`.

    Raises ValueError naming the folder and the tensors that are missing, unknown, of another shape
    than config.json asks for, or damaged.
    """
    found = stored_tensors(folder)
    _check(folder, found, config)
    table = weight_table(config)
    # The largest first, while there is room for it beside its copy.
    order = sorted(table, key=lambda w: -math.prod(stacked_shape(w, config)))
    leaves = {}
    for done, weight in enumerate(order, start=1):
        stored = [found[name] for name in hf_names(weight, config)]
        leaf = _load(weight, stored, config, mesh, dtype)
        # A transfer still under way holds its copy on the host: a second would be beside it.
        leaves[weight.path] = jax.block_until_ready(leaf)
        if progress is not None:
            progress(done, len(table))
    return tree_of({weight.path: leaves[weight.path] for weight in table})


def _load(
    weight: Weight, stored: Sequence[Stored], config: ModelConfig, mesh: Mesh, dtype: Any
) -> jax.Array:
    shape = stacked_shape(weight, config)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # asked only for arrays without an index
        bounds = [i.indices(size)[:2] for i, size in zip(index, shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], dtype)
        if not weight.stacked:
            _read(stored[0], bounds, out)
            return out
        (first, last), inner = bounds[0], bounds[1:]
        for tensor, layer in zip(stored[first:last], out, strict=True):
            if weight.transposed:
                _read(tensor, inner[::-1], layer.T)
            else:
                _read(tensor, inner, layer)
        return out

    return jax.make_array_from_callback(shape, named(mesh, *stacked_axes(weight)), part)


def _read(tensor: Stored, bounds: Sequence[tuple[int, int]], out: np.ndarray) -> None:
    """Fills `out` with the part of a stored tensor within `bounds`, a piece of rows at a time.

    The file is mapped anew for each piece, so that no more of it than that stays in memory.
    """
    (start, stop), rest = bounds[0], tuple(slice(*pair) for pair in bounds[1:])
    rows = max(1, PIECE_BYTES // (4 * math.prod(tensor.shape[1:])))
    for at in range(start, stop, rows):
        end = min(at + rows, stop)
        with safetensors.safe_open(tensor.file, framework="np") as tensors:
            out[at - start : end - start] = tensors.get_slice(tensor.name)[(slice(at, end), *rest)]


# --- writing ------------------------------------------------------------------------------------


def leaf_of(params: Params, weight: Weight) -> jax.Array:
    """The parameter's array in our tree."""
    node: Any = params
    for name in weight.path:
        node = node[name]
    return node


@partial(jax.jit, static_argnames="count")
def _rows(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count)


def _on_host(leaf: jax.Array, start: int, stop: int) -> np.ndarray:
    """leaf[start:stop], taken shard by shard, so that no device holds more than its own."""
    out = np.empty((stop - start, *leaf.shape[1:]), leaf.dtype)
    for shard in leaf.addressable_shards:
        first, last, _ = shard.index[0].indices(leaf.shape[0])
        low, high = max(first, start), min(last, stop)
        if shard.replica_id == 0 and low < high:
            rows = _rows(shard.data, np.int32(low - first), high - low)
            out[(slice(low - start, high - start), *shard.index[1:])] = np.asarray(rows)
    return out


def hf_pieces(params: Params, config: ModelConfig, kind: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, rows) of every tensor as a file holds it: a layer, or some rows of a large table."""
    for weight in weight_table(config):
        leaf, names = leaf_of(params, weight), hf_names(weight, config)
        if weight.stacked:
            for layer, name in enumerate(names):
                [value] = _on_host(leaf, layer, layer + 1).astype(kind, copy=False)
                yield name, np.ascontiguousarray(value.T if weight.transposed else value)
            continue
        rows = max(1, PIECE_BYTES // (leaf.nbytes // len(leaf)))
        for start in range(0, len(leaf), rows):
            stop = min(start + rows, len(leaf))
            yield names[0], _on_host(leaf, start, stop).astype(kind, copy=False)


def save_params(
    folder: Path,
    params: Params,
    config: ModelConfig,
    source: Path,
    dtype: str = "bfloat16",
    progress: Count | None = None,
) -> None:
    """Writes a Hugging Face folder: weights of `dtype`, and every other file of `source`.

    source: the folder that the policy was loaded from (config, tokenizer, generation config).
    Raises ValueError when `folder` already holds files.
    """
    if dtype not in KINDS:
        raise ValueError(f"dtype: must be one of {', '.join(KINDS)}; got {dtype!r}")
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "params: must lie in this process alone to be written as safetensors; export the "
            "run's checkpoint with tools.convert_hf from one process"
        )
    with whole_folder(folder) as partial:
        _save_weights(partial, params, config, dtype, progress)
        copy_model_files(source, partial)
        config_file = partial / "config.json"
        content = json.loads(config_file.read_text(encoding="utf-8"))
        content["dtype" if "dtype" in content else "torch_dtype"] = dtype
        config_file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _save_weights(
    folder: Path, params: Params, config: ModelConfig, dtype: str, progress: Count | None
) -> None:
    kind, code = KINDS[dtype]
    tensors = [(name, w) for w in weight_table(config) for name in hf_names(w, config)]
    shapes = {name: w.shape[::-1] if w.transposed else w.shape for name, w in tensors}
    size = {name: math.prod(shape) * np.dtype(kind).itemsize for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    used = 0
    for name in shapes:
        if files[-1] and used + size[name] > SHARD_BYTES:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size[name]
    paths = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    paths = paths if len(files) > 1 else ["model.safetensors"]
    place = {name: path for path, names in zip(paths, files, strict=True) for name in names}
    written = set()
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context((folder / path).open("wb")) for path in paths}
        for path, names in zip(paths, files, strict=True):
            opened[path].write(_header(names, shapes, size, code))
        for name, rows in hf_pieces(params, config, kind):
            opened[place[name]].write(rows.view(np.uint8).data)
            written.add(name)
            if progress is not None:
                progress(len(written), len(shapes))
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": place}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _header(
    names: Sequence[str], shapes: dict[str, tuple[int, ...]], size: dict[str, int], code: str
) -> bytes:
    """The beginning of a safetensors file: the length of a JSON object, and it.

    Written here because the library's writer wants all tensors of a file in memory at once.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        entries[name] = {
            "dtype": code,
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + size[name]],
        }
        offset += size[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text
