"""FLOPs of matrix products, counted in a traced program."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""Products over pairs of query and key in cuDNN's attention: the scores and the output; backward
the scores again, and the gradients of weights, queries, keys and values."""


def product_flops(run: Callable[..., Any], *arguments: Any) -> int:
    """Of all matrix products of run(*arguments), as often as a scan repeats them.

    Those of cuDNN's attention are counted too, by what it does not skip. Bodies of other loops
    count once, of splash's kernels too, so next to nothing of those is seen; of the branches of a
    choice, the one with the most counts. What XLA itself adds or saves is not seen: its own count
    takes the body of every loop once, so it cannot tell the work of a program with scans.
    """
    return _of_jaxpr(jax.make_jaxpr(run)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            summed = math.prod(sizes[axis] for axis in contracted)
            total += 2 * summed * equation.outvars[0].aval.size
        if name in CUDNN:
            total += CUDNN[name] * _of_scores(equation)
        times = equation.params["length"] if name == "scan" else 1
        inner = [_of_jaxpr(j) for value in equation.params.values() for j in _inner(value)]
        total += times * (max(inner) if name == "cond" else sum(inner))
    return total


def _of_scores(equation: Any) -> int:
    """Of one product of queries [B, T, H, d] with keys [B, C, K, d], without masked pairs.

    cuDNN skips those, but for parts of tiles, which are not counted.
    """
    rows, readers, heads, width = equation.invars[0].aval.shape
    read = equation.invars[1].aval.shape[1]
    window = equation.params["sliding_window_length"] or read
    pairs = readers * read
    if "CAUSAL" in equation.params["mask_type"].name:
        pairs = sum(min(i + 1, window, read) for i in range(readers))
    return 2 * rows * heads * width * pairs


def _inner(value: Any) -> Iterator[Any]:
    """The programs among the parameters of an operation."""
    for part in value if isinstance(value, tuple | list) else (value,):
        if hasattr(getattr(part, "jaxpr", part), "eqns"):
            yield getattr(part, "jaxpr", part)
