"""FLOPs of matrix products, counted in a traced program."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def product_flops(run: Callable[..., Any], *arguments: Any) -> int:
    """Of all matrix products of run(*arguments), as often as a scan repeats them.

    Bodies of other loops count once. What XLA itself adds or saves is not seen: its own count
    takes the body of every loop once, so it cannot tell the work of a program with scans.
    """
    return _of_jaxpr(jax.make_jaxpr(run)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            summed = math.prod(sizes[axis] for axis in contracted)
            total += 2 * summed * equation.outvars[0].aval.size
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [j for value in equation.params.values() for j in _inner(value)]
        total += times * sum(_of_jaxpr(j) for j in inner)
    return total


def _inner(value: Any) -> Iterator[Any]:
    """The programs among the parameters of an operation."""
    for part in value if isinstance(value, tuple | list) else (value,):
        if hasattr(getattr(part, "jaxpr", part), "eqns"):
            yield getattr(part, "jaxpr", part)
