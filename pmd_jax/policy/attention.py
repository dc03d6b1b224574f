"""Attention, in the two shapes that whole rows need, written once in plain XLA.

It runs everywhere, and is what the kernels of accelerators (kernels.py) are tested against.

causal   training and prefill: rows of right-padded tokens.
grouped  distillation: the responses of a group read one copy of each prompt of the group.

Sampling, one new token a row against a cache, is in decoding.py.

Axes: B rows, N groups, S prompts of a group, P prompt columns, G rollouts of a group, T response
tokens, K key-value heads, R query heads for each of them, d head width. Scores and softmax are
float32. Rows are right-padded, so causality alone keeps padding out of valid tokens.
`window`: how many tokens a reader sees, itself included; None for all before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite: a row that sees nothing gets a uniform softmax, never NaN
Window = Int[Array, ""] | int | None


def _split_heads(q: Array, num_kv_heads: int) -> Array:
    """[..., H, d] -> [..., K, R, d]"""
    return q.reshape(*q.shape[:-2], num_kv_heads, -1, q.shape[-1])


def _scores(equation: str, q: Array, k: Array) -> Array:
    scale = q.shape[-1] ** -0.5
    return jnp.einsum(equation, q, k, preferred_element_type=jnp.float32) * scale


def _causal_mask(readers: int, read: int, window: Window) -> Bool[Array, "T S"]:
    """[reader, read] within one row, the last of both being the same token."""
    behind = jnp.arange(read - readers, read)[:, None] - jnp.arange(read)
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def causal_blocks(tokens: int) -> int:
    """Into how many blocks the readers of a row are cut: at most 4, of 128 tokens or more.

    Each reads no further than its own end, so 4 blocks compute 5/8 of a row's square of scores.
    """
    return next((n for n in (4, 3, 2) if tokens % n == 0 and tokens // n >= 128), 1)


def causal(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    window: Window = None,
) -> Float[Array, "B T H d"]:
    """Each token sees itself and what stands before it in its row."""
    blocks = causal_blocks(q.shape[1])
    size = q.shape[1] // blocks

    def block(start: int) -> Array:
        end = start + size
        mask = _causal_mask(size, end, window)
        own = _split_heads(q[:, start:end], k.shape[2])
        scores = _scores("btkrd,bskd->bkrts", own, k[:, :end])
        weights = jax.nn.softmax(jnp.where(mask, scores, MASKED)).astype(v.dtype)
        return jnp.einsum("bkrts,bskd->btkrd", weights, v[:, :end])

    out = [block(i * size) for i in range(blocks)]
    return (out[0] if blocks == 1 else jnp.concatenate(out, axis=1)).reshape(q.shape)


def grouped(
    q: Float[Array, "N tokens H d"],
    k: Float[Array, "N tokens K d"],
    v: Float[Array, "N tokens K d"],
    prompts: int,
    rollouts: int,
    prompt_len: Int[Array, "N S"],
    prompt_of: Int[Array, "N G"],
    window: Window = None,
) -> Float[Array, "N tokens H d"]:
    """Groups of S prompts and G responses laid out as S*P prompt tokens, then G*T response tokens.

    Response g reads the prompt `prompt_of[g]` of its group and its own earlier tokens. Prompts are
    computed once however many responses share them; gradients flow into them from all.
    Each argument's tokens axis has length S*P + G*T; `prompts` is S*P and `rollouts` is G.
    """
    n, tokens, _, width = q.shape
    num_prompts, heads = prompt_len.shape[1], k.shape[2]
    length, response = prompts // num_prompts, (tokens - prompts) // rollouts

    def rows(x: Array) -> tuple[Array, Array]:
        ahead = x[:, :prompts].reshape(n, num_prompts, length, *x.shape[2:])
        behind = x[:, prompts:].reshape(n, rollouts, response, *x.shape[2:])
        return ahead, behind

    (prompt_q, own_q), (prompt_k, own_k), (prompt_v, own_v) = rows(q), rows(k), rows(v)
    each_q, each_k, each_v = (x.reshape(-1, *x.shape[2:]) for x in (prompt_q, prompt_k, prompt_v))
    ahead = causal(each_q, each_k, each_v, window).reshape(n, prompts, -1, width)

    own_q = _split_heads(own_q, heads)
    if num_prompts == 1:  # every response of the group reads the same prompt
        read, shared = "npkd", (prompt_k[:, 0], prompt_v[:, 0])
    else:
        index = prompt_of[:, :, None, None, None]
        gathered = [jnp.take_along_axis(x, index, axis=1) for x in (prompt_k, prompt_v)]
        read, shared = "ngpkd", (gathered[0], gathered[1])
    seen = jnp.take_along_axis(prompt_len, prompt_of, axis=1)  # [N, G]
    prompt_mask = (jnp.arange(length) < seen[..., None])[:, :, None]  # [N, G, 1 or T, P]
    if window is not None:
        reader = seen[..., None] + jnp.arange(response)  # positions of the response's tokens
        prompt_mask &= reader[..., None] - jnp.arange(length) < window
    own_mask = _causal_mask(response, response, window)
    scores = jnp.concatenate(
        [
            jnp.where(
                prompt_mask[:, :, None, None],
                _scores(f"ngtkrd,{read}->ngkrtp", own_q, shared[0]),
                MASKED,
            ),
            jnp.where(own_mask, _scores("ngtkrd,ngskd->ngkrts", own_q, own_k), MASKED),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores).astype(v.dtype)
    behind = jnp.einsum(f"ngkrtp,{read}->ngtkrd", weights[..., :length], shared[1])
    behind += jnp.einsum("ngkrts,ngskd->ngtkrd", weights[..., length:], own_v)
    return jnp.concatenate([ahead, behind.reshape(n, tokens - prompts, -1, width)], axis=1)
