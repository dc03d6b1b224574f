"""From logits to a token: temperature, top-k, top-p and Gumbel-max, with a key for each row.

A row's key is fold_in(fold_in(fold_in(seed, request), sample), count), so a draw depends on the
request and on how many tokens it has, never on the batch around it. Truncation finds a threshold
by bisection instead of sorting the vocabulary, and the draw needs sums and maxima alone, so a
vocabulary that is cut over devices never travels. temperature 0 is greedy.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
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


def top_k_ids(values: Float[Array, "*batch V"], k: int) -> Int[Array, "*batch k"]:
    """The ids of the k largest values, largest first, the lower id of equal ones first.

    Where the vocabulary is cut over `tensor`, each part finds its own k and only these travel;
    lax.top_k alone would gather all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["tensor"]
    if parts == 1 or values.shape[-1] % parts or k > values.shape[-1] // parts:
        return lax.top_k(values, k)[1]

    def of_part(values: Array) -> Array:
        own, ids = lax.top_k(values, k)
        ids += lax.axis_index("tensor") * values.shape[-1]
        own, ids = (lax.all_gather(x, "tensor", axis=x.ndim - 1, tiled=True) for x in (own, ids))
        return jnp.take_along_axis(ids, lax.top_k(own, k)[1], axis=-1)

    cut = P(*[None] * (values.ndim - 1), "tensor")
    # check_vma: the result is the same on all parts, which JAX cannot infer.
    return jax.shard_map(
        of_part, in_specs=cut, out_specs=P(), axis_names={"tensor"}, check_vma=False
    )(values)


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


def num_blocks(size: int) -> int:
    """Into how many equal blocks a vocabulary is cut: near its root, a large power of two in it.

    So the blocks of a sharded vocabulary stay on their devices.
    """
    even = size & -size
    while even * even > 2 * size:
        even //= 2
    odd = size // even
    factors = [n for n in range(1, odd + 1) if odd % n == 0 and (even * n) ** 2 <= 2 * size]
    return even * factors[-1]


class Drawn(NamedTuple):
    """token, and its log-probability in nats: of the policy itself, and as it was sampled.

    logprob: at temperature 1 over the whole vocabulary, nothing cut off, which is what
    distillation and importance ratios compare with. sampling_logprob: under the distribution that
    the token was drawn from; 0 when greedy.
    """

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    sampling_logprob: Float[Array, " B"]


def _largest(x: Float[Array, "B N"]) -> tuple[Float[Array, "B 1"], Int[Array, " B"]]:
    """The largest value of each row and its index, the lowest of equal ones."""
    top = jnp.max(x, axis=-1, keepdims=True)
    index = jnp.where(x == top, jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1])
    return top, jnp.min(index, axis=-1)


def _two_levels(
    scores: Float[Array, "B V"], keys: UInt32[Array, "B 2"], counts: Int[Array, " B"], greedy: bool
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token drawn from softmax(scores), and its log-probability; the argmax when greedy.

    Gumbel-max twice: a block by its log-sum-exp, then a token of the block by its score. By the
    chain rule this is softmax(scores) exactly, and a row needs about 2 sqrt(V) random numbers.
    """
    blocks = num_blocks(scores.shape[-1])
    x = scores.reshape(len(scores), blocks, -1)
    top = jnp.max(x, axis=-1)
    mass = top if greedy else top + jnp.log(jnp.sum(jnp.exp(x - top[..., None]), axis=-1))

    def gumbel(key: Array, count: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        return jax.random.gumbel(key, (blocks + x.shape[-1],), jnp.float32)

    noise = 0 if greedy else jax.vmap(gumbel)(keys, counts)
    outer, inner = (0, 0) if greedy else (noise[:, :blocks], noise[:, blocks:])  # type: ignore[index]
    _, block = _largest(mass + outer)
    chosen = jnp.arange(blocks) == block[:, None]
    within = jnp.sum(jnp.where(chosen[..., None], x, 0), axis=1)  # a sum, so that shards agree
    _, token = _largest(within + inner)
    if greedy:
        logprob = jnp.zeros(len(scores))
    else:
        picked = jnp.take_along_axis(within, token[:, None], axis=-1)[:, 0]
        logprob = picked - jax.nn.logsumexp(mass, axis=-1)
    return block * x.shape[-1] + token, logprob


def select(
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    counts: Int[Array, " B"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    cuts: Cuts,
    num_tokens: int | None = None,
) -> Drawn:
    """One token a row. num_tokens: ids from there on pad the vocabulary and are never drawn."""
    scores = logits
    if num_tokens is not None and num_tokens < logits.shape[-1]:
        scores = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, MASKED)
    if not cuts.greedy:
        scores = truncate(scores / temperature, top_k, top_p, cuts)
    token, sampling_logprob = _two_levels(scores, keys, counts, cuts.greedy)
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return Drawn(token, picked - jax.nn.logsumexp(logits, axis=-1), sampling_logprob)
