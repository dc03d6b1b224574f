"""From logits to a token: temperature, top-k, top-p and Gumbel-max, with a key for each row.

A row's key is fold_in(fold_in(fold_in(seed, request), sample), count), so a draw depends on the
request and on how many tokens it has, never on the batch around it. Truncation finds a threshold
by bisection instead of sorting the vocabulary. temperature 0 is greedy.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from pmd_jax.policy.attention import MASKED

BISECTIONS = 32  # halves the range of logits to below the spacing of float32


def _threshold(values: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest cut t [B, 1] for which enough(values >= t) still holds, by bisection."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        fits = enough(values >= middle)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    top = values.max(-1, keepdims=True)
    low = values.min(-1, keepdims=True, where=values > MASKED / 2, initial=jnp.inf)
    low, _ = lax.fori_loop(0, BISECTIONS, halve, (jnp.minimum(low, top), top))
    return low


class Cuts(NamedTuple):
    """Which truncations are on; static, so that what is off costs nothing. greedy: no draw."""

    top_k: bool = False
    top_p: bool = False
    greedy: bool = False


def truncate(
    logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""], cuts: Cuts
) -> Float[Array, "B V"]:
    """Keeps the top_k largest logits, then the smallest set of them with mass >= top_p.

    The order is that of Hugging Face: top-p counts the mass that top-k left. Exact ties at the
    boundary are all kept.
    """
    if cuts.top_k:
        k = jnp.minimum(top_k, logits.shape[-1])
        cut = _threshold(logits, lambda kept: kept.sum(-1, keepdims=True) >= k)
        logits = jnp.where(logits >= cut, logits, MASKED)
    if not cuts.top_p:
        return logits
    probs = jax.nn.softmax(logits)

    def heavy(kept: Bool[Array, "B V"]) -> Bool[Array, "B 1"]:
        return jnp.sum(probs, axis=-1, keepdims=True, where=kept) >= top_p

    return jnp.where(logits >= _threshold(logits, heavy), logits, MASKED)


def select(
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    counts: Int[Array, " B"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    cuts: Cuts,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token a row and its log-probability in nats.

    The log-probability is that of the policy itself (temperature 1, nothing cut off), which is
    what distillation and importance ratios compare with.
    """

    def noise(key: Array, count: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    scores = logits
    if not cuts.greedy:
        scores = truncate(logits / temperature, top_k, top_p, cuts)
        scores = scores + jax.vmap(noise)(keys, counts)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return token, logp
