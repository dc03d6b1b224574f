"""The key-value cache of sampling, in two segments, and the state of every row.

prompt segment   per layer [N, K, P, d]: filled once per prompt, read by all rows of its group
response ring    per layer [N, G, K, C, d]: all rows write the same column, `clock % C`, at a step

A row that has sampled n tokens may read the ring columns of age < n, the current column having
age 0. So a finished row is refilled where it stands: nothing moves, nothing is padded on the left,
and the write is one dynamic_update_slice, never a scatter.

Axes: N group slots, G rows of a group, K key-value heads, P prompt columns, C ring columns,
d head width, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.sharding import named

State = dict[str, Any]
"""prompt, ring: a (k, v) pair per layer; first_hidden [N, D] predicts the first response token;
prompt_len [N]; rows: dict of [N, G] arrays (count: tokens sampled so far, limit, done, newest: the
last token, key: the request's key data) and [N, G, C] arrays (out: tokens, logp: log-probabilities
in nats); clock: decode steps so far."""


def empty_state(
    config: ModelConfig,
    groups: int,
    rows: int,
    prompt_columns: int,
    columns: int,
    mesh: Mesh,
    dtype: Any,
) -> State:
    """All rows done and nothing cached; groups are cut over the batch axes of the mesh."""

    def zeros(shape: tuple[int, ...], *logical: str | None, kind: Any = jnp.int32) -> Array:
        return jnp.zeros(shape, kind, device=named(mesh, *logical))

    def pairs(*shape: int, logical: tuple[str | None, ...]) -> list[tuple[Array, Array]]:
        def one() -> Array:
            return zeros(shape, *logical, kind=dtype)

        return [(one(), one()) for _ in range(config.num_layers)]

    heads, width = config.num_kv_heads, config.head_dim
    per_row, per_token = (groups, rows), (groups, rows, columns)
    return {
        "prompt": pairs(
            groups, heads, prompt_columns, width, logical=("batch", "kv_heads", None, None)
        ),
        "ring": pairs(
            groups, rows, heads, columns, width, logical=("batch", None, "kv_heads", None, None)
        ),
        "first_hidden": zeros((groups, config.width), "batch", None, kind=dtype),
        "prompt_len": zeros((groups,), "batch") + 1,
        "rows": {
            "count": zeros(per_row, "batch", None),
            "limit": zeros(per_row, "batch", None),
            "newest": zeros(per_row, "batch", None),
            "done": zeros(per_row, "batch", None) == 0,
            "key": zeros((*per_row, 2), "batch", None, None, kind=jnp.uint32),
            "out": zeros(per_token, "batch", None, None),
            "logp": zeros(per_token, "batch", None, None, kind=jnp.float32),
        },
        "clock": jnp.zeros((), jnp.int32),
    }


def insert_prompts(
    state: State, slots: Int[Array, " M"], hidden: Array, cache: Any, lengths: Array
) -> State:
    """Puts M prefilled prompts (cache [L, M, K, P, d]) into their group slots."""
    keys, values = cache
    prompt = [
        (old_k.at[slots].set(k), old_v.at[slots].set(v))
        for (old_k, old_v), k, v in zip(state["prompt"], keys, values, strict=True)
    ]
    return state | {
        "prompt": prompt,
        "first_hidden": state["first_hidden"].at[slots].set(hidden),
        "prompt_len": state["prompt_len"].at[slots].set(lengths),
    }


def ring_age(columns: int, clock: Array) -> Int[Array, " C"]:
    """How many steps ago each of the ring's columns was written, the current one being 0."""
    return (clock % columns - jnp.arange(columns)) % columns


def write_ring(ring: tuple[Array, Array], k: Array, v: Array, clock: Array) -> tuple[Array, Array]:
    """Writes k, v [N, G, K, d] of every row into the shared column."""
    write = partial(lax.dynamic_update_slice_in_dim, start_index=clock % ring[0].shape[3], axis=3)
    return write(ring[0], k[:, :, :, None]), write(ring[1], v[:, :, :, None])
