"""Rotary positions: which angle each pair of coordinates turns by per position, and by how much.

A family reads `Rope` from its config.json; a model has one, or a second one for its sliding layers.
Frequencies are float32 constants made on the host, in the order of operations of transformers
(modeling_rope_utils.py), since at position 100,000 the last bit of a frequency is visible.

default  angle = position / theta^(2i/d)                                   Su et al. 2021
linear   all frequencies divided by a factor
llama3   low frequencies divided by a factor, high ones kept, a ramp between
yarn     the same by rotations over the original context, and attention
         sharpened through longer cosines and sines                        Peng et al. 2023

Axes: d head width, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Kind = Literal["default", "linear", "llama3", "yarn"]
KNOWN = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer. original_positions: the context before scaling.

    low, high: llama3's frequency factors. beta_fast, beta_slow, truncate, attention_factor: yarn's.
    """

    theta: float
    kind: Kind = "default"
    factor: float = 1.0
    original_positions: int = 0
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def read_rope(entry: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    """A `rope_scaling` or `rope_parameters` entry of config.json; {} is unscaled.

    theta, max_positions: what holds where the entry does not say.
    Raises ValueError, without the file's name, for a kind or a field that is not implemented, and
    KeyError for a number that is missing.
    """
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind not in KNOWN:
        raise ValueError(f"rope type {kind!r}")
    if entry.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {entry['partial_rotary_factor']}")
    theta = float(entry.get("rope_theta") or theta)
    if kind == "default":
        return Rope(theta)
    original = int(entry.get("original_max_position_embeddings") or max_positions)
    if kind == "linear":
        return Rope(theta, "linear", float(entry["factor"]))
    if kind == "llama3":
        low, high = float(entry["low_freq_factor"]), float(entry["high_freq_factor"])
        return Rope(theta, "llama3", float(entry["factor"]), original, low, high)
    factor = float(entry.get("factor") or max_positions / original)
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=float(entry.get("beta_fast") or 32.0),
        beta_slow=float(entry.get("beta_slow") or 1.0),
        truncate=bool(entry.get("truncate", True)),
        attention_factor=_attention_factor(entry, factor),
    )


def _attention_factor(entry: Mapping[str, Any], factor: float) -> float:
    """What yarn multiplies cosines and sines by, given or as its paper suggests."""

    def suggested(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if entry.get("attention_factor") is not None:
        return float(entry["attention_factor"])
    if entry.get("mscale") and entry.get("mscale_all_dim"):
        return suggested(entry["mscale"]) / suggested(entry["mscale_all_dim"])
    return suggested(1.0)


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each of the d/2 pairs, float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # numpy's float32 power is off by a bit in one of five; torch's is not.
    wavelength_factor = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / wavelength_factor
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    stretched = np.float32(1) / (np.float32(rope.factor) * wavelength_factor)
    kept = 1 - _ramp(*_correction_range(rope, head_dim), head_dim // 2)
    return stretched * (1 - kept) + plain * kept


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    wavelength = np.float32(2 * math.pi) / plain
    longest, shortest = rope.original_positions / rope.low, rope.original_positions / rope.high
    divided = plain / np.float32(rope.factor)
    share = (np.float32(rope.original_positions) / wavelength - np.float32(rope.low)) / np.float32(
        rope.high - rope.low
    )
    between = (1 - share) * divided + share * plain
    result = np.where(wavelength > longest, divided, plain)
    return np.where((wavelength >= shortest) & (wavelength <= longest), between, result)


def _correction_range(rope: Rope, head_dim: int) -> tuple[float, float]:
    """The pairs between which yarn passes from kept to stretched frequencies."""

    def pair_that_turns(times: float) -> float:
        turned = rope.original_positions / (times * 2 * math.pi)
        return head_dim * math.log(turned) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _ramp(low: float, high: float, size: int) -> np.ndarray:
    """0 up to index `low`, 1 from `high` on, float32 [size]."""
    width = high - low if high != low else 0.001
    return np.clip((np.arange(size, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)


def rotary(positions: Int[Array, "... T"], rope: Rope, head_dim: int) -> tuple[Array, Array]:
    """Float32 cosine and sine of each position's angles, [..., T, 1, d/2] each."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim)
    return (
        jnp.cos(angles) * jnp.float32(rope.attention_factor),
        jnp.sin(angles) * jnp.float32(rope.attention_factor),
    )


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Half-split rotary positions, as Hugging Face stores q and k for."""
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
