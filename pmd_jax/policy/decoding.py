"""Attention of sampling: one new token a row, against the prompts' cache and the rows' own ring.

The rows that read one prompt are gathered, so that the prompt's keys and values are read once for
all of them. Prompt and ring are joined by one float32 maximum and one sum (never differentiated).

Axes: F shards, n prompt slots and b rows of a shard, N = F n, B = F b, M members of a slot,
K key-value heads, R query heads for each of them, P prompt columns, C ring columns, d head width.
See cache.py for the segments.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pmd_jax.policy.attention import MASKED, Window
from pmd_jax.policy.cache import Segment, gather


class Seats(NamedTuple):
    """Who reads what. members: the rows that read a slot. place: slot * M + member of each row.

    Both count within the shard. prompt_len: of each slot. filled: tokens of each row in its ring,
    the newest included, so that the reader's position is prompt_len + filled - 1.
    """

    members: Int[Array, "F n M"]
    place: Int[Array, "F b"]
    prompt_len: Int[Array, " N"]
    filled: Int[Array, " B"]


class Part(NamedTuple):
    """What a row took from one segment: weighted values, the sum of weights, their maximum."""

    value: Float[Array, "... d"]
    total: Float[Array, ...]
    top: Float[Array, ...]


def _attend(q: Float[Array, "X K m d"], segment: Segment, mask: Bool[Array, "#X #m S"]) -> Part:
    """Softmax weights of m queries on one segment, not yet divided by their sum.

    Of a query that sees nothing here, `top` is so low that the other segment takes it all. All is
    done on [X, K, J, m, W], as the keys are cut; the queries stand before each block.
    """
    k, v, k_scale, v_scale = segment
    blocks, width = k.shape[2], k.shape[-1]

    def cut(x: Array) -> Array:
        """[X, K, S, ...] -> [X, K, J, W, ...]"""
        return x.reshape(*x.shape[:2], blocks, width, *x.shape[3:])

    asking = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], blocks, *q.shape[2:]))
    s = jnp.einsum(
        "xkjmd,xkjdw->xkjmw", asking, k.astype(q.dtype), preferred_element_type=jnp.float32
    )
    s = s * q.shape[-1] ** -0.5
    if k_scale is not None:
        s = s * cut(k_scale)[..., None, :]
    mask = mask.reshape(*mask.shape[:2], blocks, width).swapaxes(1, 2)[:, None]
    s = jnp.where(mask, s, MASKED)
    top = jnp.max(s, axis=(2, 4))
    weights = jnp.exp(s - top[:, :, None, :, None])
    total = jnp.sum(weights, axis=(2, 4))
    if v_scale is not None:
        weights = weights * cut(v_scale)[..., None, :]
    value = jnp.einsum(
        "xkjmw,xkjwd->xkjmd",
        weights.astype(q.dtype),
        cut(v).astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return Part(jnp.sum(value, axis=2), total, top)


def cached(
    q: Float[Array, "B H d"],
    prompt: Segment,
    ring: Segment,
    seats: Seats,
    ring_age: Int[Array, " C"],
    window: Window = None,
) -> Float[Array, "B H d"]:
    """The context of one new token a row. Only idle rows see nothing, and get what nobody reads.

    ring_age: how many steps ago each column was written, 0 for the one of this step.
    """
    heads, width = ring.v.shape[1], q.shape[-1]
    own = q.reshape(len(q), heads, -1, width)  # [B, K, R, d]
    members, repeats = seats.members.shape[2], own.shape[2]

    asking = gather(own, seats.members).swapaxes(1, 2)  # [N, K, M, R, d]
    asking = asking.reshape(*asking.shape[:2], members * repeats, width)
    positions = jnp.arange(prompt.v.shape[2])
    seen = (positions < seats.prompt_len[:, None])[:, None]  # [N, 1, P]
    visible = seats.filled
    if window is not None:
        reader = seats.prompt_len[:, None] + gather(seats.filled, seats.members) - 1  # [N, M]
        near = reader[..., None] - positions < window
        seen = seen & jnp.repeat(near, repeats, axis=1)
        visible = jnp.minimum(visible, window)
    shared = _attend(asking, prompt, seen)

    def of_rows(x: Array) -> Array:
        """[N, K, M * R, ...] -> [B, K, R, ...]"""
        x = x.reshape(*x.shape[:2], members, repeats, *x.shape[3:]).swapaxes(1, 2)
        return gather(x.reshape(-1, *x.shape[2:]), seats.place)

    shared = Part(*(of_rows(x) for x in shared))
    mine = _attend(own, ring, (ring_age < visible[:, None])[:, None])

    top = jnp.maximum(shared.top, mine.top)
    parts = [(part, jnp.exp(part.top - top)) for part in (shared, mine)]
    total = sum(part.total * scale for part, scale in parts)
    value = sum(part.value * scale[..., None] for part, scale in parts)
    out = value / total[..., None]  # type: ignore[index]
    return out.reshape(q.shape).astype(q.dtype)
