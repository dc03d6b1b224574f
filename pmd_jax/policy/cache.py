"""The key-value cache of sampling, in two segments.

prompt segment   per layer: filled once per prompt, read by all rows that answer it
response ring    per layer: all rows write the same column, `column % C`, at a step

A row that has sampled n tokens may read the ring columns of age < n, the current column having
age 0. So a finished row is refilled where it stands: nothing moves, nothing is padded on the left,
and the write is one dynamic_update_slice, never a scatter. The ring starts short and grows, so that
columns nobody has written are not read.

Keys are kept as [d, S] and values as [S, d]: scores and sums over the cache then run along its
contiguous axis (on two CPU cores, the scores of 32 rows and 256 columns in 0.2 ms against 1.6). A
CPU keeps the keys in blocks of 64 columns, [J, d, W], which it reads from memory in order (the
scores of 30 layers, 32 rows and 256 columns in 6.7 ms against 11.2); elsewhere there is one block.

Slots and rows of all shards stand behind one another, and each shard reads its own alone. (With a
shard axis of its own XLA:CPU copies the ring at every step: 266 ms for 32 rows instead of 126.)

Axes: F shards of the batch, n prompt slots and b rows of a shard, N = F n, B = F b, X either,
L layers, K key-value heads, P prompt columns, C ring columns, S = J W columns of either, d head
width, D width, m prompts of a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.scheduler import Shape
from pmd_jax.policy.sharding import named

State = dict[str, Any]
"""prompt, ring: a Segment per layer; first_hidden [N, D] predicts the first response token of a
slot; column: the ring column of the next step, any int32 modulo C."""

LEVELS = 127  # of int8, on each side of zero
CPU_BLOCK = 64  # columns of a block of keys


class Segment(NamedTuple):
    """Keys [X, K, J, d, W] and values [X, K, S, d] of X slots or rows.

    Where they are int8, each token and head has a float32 scale [X, K, S]; else None.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


def quantise(x: Float[Array, "... d"]) -> tuple[Array, Float[Array, ...]]:
    """int8 and one scale for each vector, symmetric about zero."""
    scale = jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32) / LEVELS
    scaled = x.astype(jnp.float32) / jnp.maximum(scale, 1e-20)[..., None]
    return jnp.round(scaled).astype(jnp.int8), scale


def _entries(k: Float[Array, "... d"], v: Float[Array, "... d"], int8: bool) -> Segment:
    """Keys and values of new tokens, the layout of each still [..., d]."""
    if not int8:
        return Segment(k, v)
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return Segment(k, v, k_scale, v_scale)


def block_width(columns: int, mesh: Mesh) -> int:
    """Columns of a block of keys, of a segment of so many.

    At least two blocks on a CPU: XLA:CPU copies a ring of one at every step.
    """
    if mesh.devices.flat[0].platform != "cpu" or columns % 2:
        return columns
    return CPU_BLOCK if columns > CPU_BLOCK and columns % CPU_BLOCK == 0 else columns // 2


def in_blocks(keys: Shaped[Array, "... S d"], width: int) -> Shaped[Array, "... J d W"]:
    """Keys as a segment holds them."""
    blocks = keys.reshape(*keys.shape[:-2], -1, width, keys.shape[-1])
    return blocks.swapaxes(-1, -2)


def in_line(blocks: Shaped[Array, "... J d W"]) -> Shaped[Array, "... S d"]:
    """Undoes `in_blocks`."""
    keys = blocks.swapaxes(-1, -2)
    return keys.reshape(*keys.shape[:-3], -1, keys.shape[-1])


def empty_segment(
    size: int, columns: int, config: ModelConfig, mesh: Mesh, dtype: Any, int8: bool
) -> Segment:
    """Zeros for `size` slots or rows, cut over the batch and the heads of the mesh."""

    def zeros(*shape: int, kind: Any) -> Array:
        sharding = named(mesh, "batch", "kv_heads", *[None] * len(shape))
        return jnp.zeros((size, config.num_kv_heads, *shape), kind, device=sharding)

    d, kind = config.head_dim, jnp.int8 if int8 else dtype
    scales = [zeros(columns, kind=jnp.float32) for _ in range(2)] if int8 else [None, None]
    width = block_width(columns, mesh)
    keys = zeros(columns // width, d, width, kind=kind)
    return Segment(keys, zeros(columns, d, kind=kind), *scales)


def empty_state(
    config: ModelConfig,
    shape: Shape,
    prompt_columns: int,
    columns: int,
    mesh: Mesh,
    dtype: Any,
    int8: bool = False,
) -> State:
    """Nothing cached yet."""

    def segments(rows: int, columns: int) -> list[Segment]:
        size = shape.shards * rows
        return [
            empty_segment(size, columns, config, mesh, dtype, int8)
            for _ in range(config.num_layers)
        ]

    hidden = (shape.shards * shape.slots, config.width)
    return {
        "prompt": segments(shape.slots, prompt_columns),
        "ring": segments(shape.rows, columns),
        "first_hidden": jnp.zeros(hidden, dtype, device=named(mesh, "batch", None)),
        "column": jnp.zeros((), jnp.int32),
    }


def by_shard(x: Array, shards: int) -> Array:
    """[F X, ...] -> [F, X, ...]"""
    return x.reshape(shards, -1, *x.shape[1:])


def gather(x: Array, index: Int[Array, "F ..."]) -> Array:
    """x [F X, ...] at index [F, I, ...], which counts within each shard -> [F I, ...]"""
    picked = jax.vmap(lambda x, i: x[i])(by_shard(x, len(index)), index)
    return picked.reshape(-1, *picked.shape[2:])


def insert_prompts(
    state: State, slots: Int[Array, "F m"], hidden: Float[Array, "F m D"], cache: Any
) -> State:
    """Puts prefilled prompts into their slots; a slot that does not exist takes none.

    cache: keys and values [L, F, m, K, p, d] with p <= P; columns from p on keep what they held,
    which no row reads.
    """

    def put(old: Any, new: Array, axis: int | None = None) -> Array:
        """old [N, ...], new [F, m, ...], which may be shorter than old along `axis`."""

        def one(old: Array, at: Array, new: Array) -> Array:
            where: tuple[Any, ...] = (at,)
            if axis is not None:
                where = (at, *[slice(None)] * (axis - 1), slice(new.shape[axis]))
            return old.at[where].set(new, mode="drop")

        return jax.vmap(one)(by_shard(old, len(slots)), slots, new).reshape(old.shape)

    def layer(old: Segment, k: Array, v: Array) -> Segment:
        new = _entries(k, v, old.k_scale is not None)
        width = old.k.shape[-1]
        missing = -new.k.shape[3] % width
        padded = jnp.pad(new.k, [(0, missing if axis == 3 else 0) for axis in range(5)])
        keys, values = put(old.k, in_blocks(padded, width), 2), put(old.v, new.v, 2)
        if new.k_scale is None or new.v_scale is None:
            return Segment(keys, values)
        scales = put(old.k_scale, new.k_scale, 2), put(old.v_scale, new.v_scale, 2)
        return Segment(keys, values, *scales)

    prompt = [layer(old, k, v) for old, k, v in zip(state["prompt"], *cache, strict=True)]
    return state | {
        "prompt": prompt,
        "first_hidden": put(state["first_hidden"], hidden),
    }


def ring_age(columns: int, column: Array) -> Int[Array, " C"]:
    """How many steps ago each of the ring's columns was written, the current one being 0."""
    return (column - jnp.arange(columns)) % columns


def write_ring(
    ring: Segment, k: Float[Array, "B K d"], v: Float[Array, "B K d"], column: Array
) -> Segment:
    """Writes one token of every row into the shared column."""
    new = _entries(k, v, ring.k_scale is not None)
    at = column % ring.v.shape[2]

    def write(old: Any, new: Array, axis: int) -> Array:
        return lax.dynamic_update_slice_in_dim(old, jnp.expand_dims(new, axis), at, axis)

    width = ring.k.shape[-1]
    where = (0, 0, at // width, 0, at % width)
    keys = lax.dynamic_update_slice(ring.k, new.k[:, :, None, :, None], where)
    values = write(ring.v, new.v, 2)
    if new.k_scale is None or new.v_scale is None:
        return Segment(keys, values)
    return Segment(
        keys, values, write(ring.k_scale, new.k_scale, 2), write(ring.v_scale, new.v_scale, 2)
    )


def pick(tree: Any, index: Int[Array, "F I"]) -> Any:
    """The slots or rows at `index`, which counts within each shard, of every array of a tree."""
    return jax.tree.map(lambda x: gather(x, index), tree)


def resize(
    ring: Segment,
    column: Int[Array, ""],
    rows: Int[Array, "F b"] | None,
    columns: int,
    width: int,
) -> Segment:
    """One layer's ring of these rows alone (None: all) and of `columns`, keys in blocks of `width`.

    column: the next to be written, which is the oldest of all. The newest columns are kept, oldest
    first from 0; the next step writes behind them, at `resized_column`.
    """
    before = ring.v.shape[2]
    kept = min(before, columns)
    newest = (column + before - kept + jnp.arange(kept)) % before
    ring = ring if rows is None else pick(ring, rows)

    def lined_up(x: Any, axis: int) -> Any:
        if x is None or columns == before:
            return x
        widths = [(0, columns - kept if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(jnp.take(x, newest, axis=axis), widths)

    k, v, k_scale, v_scale = ring
    if columns != before:
        k = in_blocks(lined_up(in_line(k), 2), width)
    return Segment(k, lined_up(v, 2), lined_up(k_scale, 2), lined_up(v_scale, 2))


def resized_column(column: Int[Array, ""], before: int, columns: int) -> Int[Array, ""]:
    """Where the next step writes in a ring that had `before` columns and now has `columns`."""
    return column if columns == before else jnp.int32(min(before, columns))
