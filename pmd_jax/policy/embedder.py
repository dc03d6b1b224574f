"""Texts to vectors by a decoder: Qwen3-Embedding, run by the same model as the policy.

A text's vector is the final hidden state of its last token, the end-of-text token that the folder's
tokenizer appends, at length 1 (Qwen3-Embedding, arXiv 2506.05176). Queries carry an instruction,
documents none; that prefix is the caller's. One local device, so that each process can embed its
own texts.

Axes: N texts, D width, B texts of a batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pmd_jax.policy import model
from pmd_jax.policy.families import ModelConfig, read_config
from pmd_jax.policy.sampler import bucket
from pmd_jax.policy.sharding import MeshConfig, make_mesh
from pmd_jax.policy.tokenizer import Tokenizer
from pmd_jax.policy.weights import load_params

BATCH = 8  # texts at once, fewer where they are long
MAX_PAIRS = 1 << 22  # (reader, read) pairs of a batch: 0.3 GB of scores in 16 heads
MAX_TOKENS = 8192  # of a text; the rest is not read
END = "<|endoftext|>"


@partial(jax.jit, static_argnames=("config", "dtype"))
def _pooled(params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], config, dtype):
    """Unit vectors [B, D] of the last token of each right-padded row."""
    hidden = model.causal_hidden(params, tokens, config, dtype)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    last = last.astype(jnp.float32)
    return last / jnp.linalg.norm(last, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """An embedding model. Make it with `Embedder.load`; `embed` is memory's `Embed`."""

    config: ModelConfig
    params: model.Params
    tokenizer: Tokenizer
    dtype: Any

    @classmethod
    def load(cls, folder: Path) -> Embedder:
        """Reads a Hugging Face folder; bfloat16, or float32 on a CPU, where that is faster.

        Raises ValueError for a folder that is incomplete or of a family not implemented.
        """
        # Embedding models have no head; a tied one is the embedding, which is there anyway.
        config = dataclasses.replace(read_config(folder), tied_head=True)
        dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        mesh = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
        params = load_params(folder, config, mesh, dtype)
        return cls(config, params, Tokenizer.load(folder), dtype)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, ended once, whether or not the folder's tokenizer does so itself."""
        ids = self.tokenizer.encode(text)
        end = self.tokenizer.backend.token_id(END)
        end = self.tokenizer.stop_tokens[0] if end is None else end
        return [*ids[: min(MAX_TOKENS, self.config.max_positions) - 1], end]

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Rows of norm 1, float32. Texts of like length share a batch; neighbours change no row."""
        encoded = [self.tokens(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))
        rows = np.zeros((len(texts), self.config.width), np.float32)
        while order:
            # The longest first: the rows that fit it fit those after it.
            columns = bucket(len(encoded[order[0]]), 32)
            batch = max(1, min(BATCH, MAX_PAIRS // columns**2))
            chosen, order = order[:batch], order[batch:]
            lengths = np.ones(batch, np.int32)
            lengths[: len(chosen)] = [len(encoded[i]) for i in chosen]
            tokens = np.zeros((batch, columns), np.int32)
            for row, i in enumerate(chosen):
                tokens[row, : len(encoded[i])] = encoded[i]
            pooled = _pooled(self.params, tokens, lengths, config=self.config, dtype=self.dtype)
            rows[chosen] = np.asarray(pooled)[: len(chosen)]
        return rows
