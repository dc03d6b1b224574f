"""The peer tunix: a rollout by the vanilla Sampler of google-tunix, at its fastest batch size.

Its loop ends when every row has, so each batch, sorted by length, runs to the longest of its rows;
what the others make beyond their own lengths is cut off and not counted. Prompts of all batches are
padded to one length and the cache is as long as a batch needs it. Everything is compiled before.

Models: Llama and Qwen3 shapes, by tunix's own classes. Their `apply_rope` takes a fixed theta, for
which the model's is set here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.bench.peers.batches import STEPS, Row, cut, predicted, report, rows_of, sizes_for
from tools.bench.peers.calibration import climb, fastest
from tools.bench.peers.child import serve


class Numbers:
    """A tokenizer whose texts are token ids with spaces between them: the Sampler takes texts."""

    def __init__(self, pad: int):
        self.pad = pad

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is put in front

    def eos_id(self) -> int:
        return -1  # none is ever sampled

    def pad_id(self) -> int:
        return self.pad


def load_model(folder: Path, dtype: Any) -> Any:
    """The model of a Hugging Face folder, with tunix's classes."""
    values = json.loads((folder / "config.json").read_text())
    family, theta = values["model_type"], values.get("rope_theta")
    scaled = values.get("rope_scaling")
    if theta is None:  # as transformers 5 writes it
        theta = values["rope_parameters"]["rope_theta"]
        scaled = values["rope_parameters"].get("rope_type", "default") != "default"
    if family == "llama":
        from tunix.models.llama3 import model, params

        kind: dict[str, Any] = {"weight_tying": values.get("tie_word_embeddings", False)}
    elif family == "qwen3":
        from tunix.models.qwen3 import model, params

        tied = values.get("tie_word_embeddings", False)
        kind = {"use_tied_embedding": tied, "dtype": dtype, "param_dtype": dtype}
    else:
        raise ValueError(f"model: must be of family llama or qwen3 for tunix; got {family}")
    if scaled:
        raise ValueError(f"model: tunix knows no scaled rotary positions; got {scaled}")
    config = model.ModelConfig(
        num_layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        rope_theta=theta,
        norm_eps=values["rms_norm_eps"],
        **kind,
    )
    model.apply_rope = functools.partial(model.apply_rope, rope_theta=theta)
    return params.create_model_from_safe_tensors(str(folder), config, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Choice:
    """size: rows of a batch."""

    size: int

    def __str__(self) -> str:
        return f"vanilla Sampler, sorted by length, batches of {self.size}"


class Rollout:
    """A prepared workload of kind "rollout"."""

    def __init__(self, workload: dict[str, Any]):
        os.environ["JAX_PLATFORMS"] = workload["device"]
        import jax

        self.prompts, self.rows = workload["prompts"], rows_of(workload)
        self.columns = max(map(len, self.prompts))
        self.model = load_model(Path(workload["model"]), jax.numpy.dtype(workload["dtype"]))
        used = {token for prompt in self.prompts for token in prompt}
        self.pad = next(token for token in range(self.model.config.vocab_size) if token not in used)
        self.temperature, self.seed = workload["temperature"], workload["seed"]
        self.samplers: dict[int, Any] = {}
        self.calibration: dict[str, float] = {}
        self.choice = Choice(**workload["choice"]) if "choice" in workload else self.calibrate()
        for batch in cut(self.rows, self.choice.size):
            self.warm(batch)
        versions = [f"{name} {metadata.version(name)}" for name in ("jax", "flax")]
        self.about = {
            "library": "tunix",
            "version": ", ".join([metadata.version("google-tunix"), *versions]),
            "setting": f"{self.choice}, each to the end of its longest row, compiled before",
            "choice": dataclasses.asdict(self.choice),
            "calibration": self.calibration,
        }

    def run(self) -> dict[str, Any]:
        """Does the work once; the tokens have come to the host when the clock stops."""
        began = time.perf_counter()
        rows: list[Row] = []
        responses: list[list[int]] = []
        for batch in cut(self.rows, self.choice.size):
            made = self.sampler(batch)(
                self.texts(batch),
                max_generation_steps=longest(batch),
                max_prompt_length=self.columns,
                seed=self.seed + len(rows),
                **self.sampling(),
            )
            rows += batch
            pairs = zip(made.tokens, batch, strict=True)
            responses += [tokens[: row.length].tolist() for tokens, row in pairs]
        return report(rows, responses, time.perf_counter() - began)

    def texts(self, batch: list[Row]) -> list[str]:
        return [" ".join(map(str, self.prompts[row.prompt])) for row in batch]

    def sampling(self) -> dict[str, Any]:
        """top_p None is greedy for tunix; 1 cuts nothing off."""
        if self.temperature == 0:
            return {"top_p": None, "top_k": None, "temperature": 0.0}
        return {"top_p": 1.0, "top_k": None, "temperature": self.temperature}

    def sampler(self, batch: list[Row]) -> Any:
        """The Sampler with as much cache as the batch needs."""
        from tunix.generate.sampler import CacheConfig, Sampler

        config, size = self.model.config, self.columns + longest(batch)
        if size not in self.samplers:
            cache = CacheConfig(size, config.num_layers, config.num_kv_heads, config.head_dim)
            self.samplers[size] = Sampler(self.model, Numbers(self.pad), cache)
        return self.samplers[size]

    def calibrate(self) -> Choice:
        """The batch size with the shortest predicted time."""
        times: dict[Choice, float] = {}
        climb([Choice(size) for size in sizes_for(len(self.rows))], self.seconds_of, times)
        self.calibration = {str(choice): round(t, 3) for choice, t in times.items()}
        return fastest(times)

    def seconds_of(self, choice: Choice) -> float:
        """The predicted time of the workload."""
        batches = cut(self.rows, choice.size)
        return predicted(self.rows, choice.size, *self.warm(batches[len(batches) // 2]))

    def warm(self, batch: list[Row]) -> tuple[float, float]:
        """Compiles what a batch runs, with few steps: seconds of its prefill and of a step.

        As Sampler.__call__ does it, whose number of steps is data, not shape, once the state is
        made.
        """
        import jax
        import numpy as np

        sampler, total = self.sampler(batch), self.columns + longest(batch)
        sampler.eos_ids = jax.numpy.array([sampler.tokenizer.eos_id()])
        ids = np.full((len(batch), self.columns), self.pad, np.int32)
        for i, row in enumerate(batch):
            ids[i, self.columns - len(self.prompts[row.prompt]) :] = self.prompts[row.prompt]
        weights = sampler._flattened_transformer_state
        times = (0.0, 0.0)
        for _ in range(2):  # the first compiles
            state = sampler.init_sample_state(
                jax.numpy.array(ids),
                total_sampling_steps=total,
                include_logits=False,
                forbidden_token_ids=None,
                seed=jax.random.PRNGKey(self.seed),
                beam_size=None,
                **self.sampling(),
            )
            few = min(STEPS, longest(batch) - 1)
            state = dataclasses.replace(state, total_sampling_steps=self.columns + few)
            began = time.perf_counter()
            state = jax.block_until_ready(
                sampler._compiled_prefill_fn(weights, state, None, echo=False)
            )
            prefilled = time.perf_counter()
            jax.block_until_ready(sampler._compiled_decode_fn(weights, state))
            times = prefilled - began, (time.perf_counter() - prefilled) / max(few, 1)
        return times


def longest(batch: list[Row]) -> int:
    return max(row.length for row in batch)


if __name__ == "__main__":
    serve({"rollout": Rollout})
