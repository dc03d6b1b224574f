"""Rollouts: P problems x G samples through the sampler, every sample to a length of its own."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmd_jax.policy.programs import rollout_weights
from pmd_jax.policy.sampler import EngineConfig, Sampler, SamplingConfig
from pmd_jax.policy.sharding import single_device_mesh
from pmd_jax.telemetry import Compilations
from tools.bench import machine, models
from tools.bench.peers import Peer


@dataclasses.dataclass(frozen=True)
class Workload:
    """prompt, response: (least, most) tokens, drawn uniformly. long_fraction of the samples are
    `long_factor` times longer."""

    problems: int = 8
    samples: int = 8
    prompt: tuple[int, int] = (200, 400)
    response: tuple[int, int] = (16, 256)
    long_fraction: float = 0.0
    long_factor: int = 8
    seed: int = 0

    def draw(self, vocab_size: int) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, lengths [prompt][sample])"""
        rng = np.random.default_rng(self.seed)
        sizes = rng.integers(self.prompt[0], self.prompt[1], self.problems, endpoint=True)
        prompts = [rng.integers(0, vocab_size, n).tolist() for n in sizes]
        shape = self.problems, self.samples
        lengths = rng.integers(self.response[0], self.response[1], shape, endpoint=True)
        flat = lengths.reshape(-1)
        chosen = rng.permutation(flat.size)[: round(self.long_fraction * flat.size)]
        flat[chosen] *= self.long_factor
        return prompts, lengths.tolist()


class Ours:
    """The sampler of this project, ready to run a workload again and again."""

    def __init__(self, name: str, dtype: str, engine: EngineConfig, attention: str):
        self.config, params = models.load(name, dtype, dtype, attention)
        mesh = single_device_mesh()
        self.num_parameters = models.num_parameters(params)
        self.weights = rollout_weights(params, self.config, mesh, jnp.dtype(dtype))
        self.engine, self.itemsize = engine, jnp.dtype(dtype).itemsize
        self.sampler = Sampler(self.config, engine, mesh, jnp.dtype(dtype))
        self.runs = 0

    def run(self, prompts: list[list[int]], lengths: list[list[int]]) -> None:
        """No stop token: every sample gets its length."""
        self.runs += 1
        out = self.sampler.generate(
            self.weights, prompts, lengths, SamplingConfig(), [], seed=self.runs
        )
        assert [[len(sample.tokens) for sample in group] for group in out] == lengths


def run(
    name: str,
    dtype: str,
    engine: EngineConfig,
    workload: Workload,
    repeats: int,
    peers: list[Peer],
    attention: str = "auto",
) -> dict[str, Any]:
    """Tokens/s of the workload, and of each peer on the same one, interleaved.

    weights_fraction_of_bytes: the reading of all weights in every decode step, over what the device
    copies in that time. Reading the cache is left out.
    """
    ours = Ours(name, dtype, engine, attention)
    prompts, lengths = workload.draw(ours.config.vocab_size)
    roofs = machine.roofline(jnp.dtype(dtype))
    compiled = Compilations()
    first = machine.timed(lambda: ours.run(prompts, lengths))
    compilations, compile_seconds = compiled.count, compiled.seconds
    answers = [
        peer.warm_up(
            {
                "kind": "rollout",
                "model": str(models.folder(name)),
                "prompts": prompts,
                "num_samples": workload.samples,
                "lengths": lengths,
                "dtype": dtype,
                "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
                "seed": workload.seed,
                "temperature": 1.0,
                "ways": ["generate"],
            }
        )
        for peer in peers
    ]
    before, settled = dataclasses.replace(ours.sampler.stats), Compilations()
    own, theirs = [], [[] for _ in peers]  # type: ignore[var-annotated]
    for _ in range(repeats):
        own.append(machine.timed(lambda: ours.run(prompts, lengths)))
        for peer, taken in zip(peers, theirs, strict=True):
            taken.append(peer.run()["seconds"])
    stats, seconds = ours.sampler.stats, statistics.median(own)
    tokens = sum(map(sum, lengths))
    steps, slots = ((getattr(stats, n) - getattr(before, n)) / repeats for n in ("steps", "slots"))
    prefilled = (stats.prefill_tokens - before.prefill_tokens) / repeats
    flops = 2 * ours.num_parameters * (slots + prefilled)
    read = ours.num_parameters * ours.itemsize * steps
    result = {
        "bench": "rollout",
        "model": name,
        "dtype": dtype,
        "workload": dataclasses.asdict(workload),
        "engine": dataclasses.asdict(engine),
        "attention": ours.config.attention,
        **machine.describe(),
        **roofs,
        "tokens": tokens,
        "seconds": seconds,
        "all_seconds": own,
        "tokens_per_second": tokens / seconds,
        "steps": steps,
        "rows_in_use": tokens / slots,
        "prefill_tokens": prefilled,
        "fraction_of_flops": flops / seconds / roofs["flops_per_second"],
        "weights_fraction_of_bytes": read / seconds / roofs["bytes_per_second"],
        "first_run_seconds": first,
        "compilations": compilations,
        "compile_seconds": compile_seconds,
        "compilations_when_settled": settled.count,
        "peak_bytes": machine.peak_bytes(),
    }
    for peer, answer, taken in zip(peers, answers, theirs, strict=True):
        result[f"against_{peer.name}"] = {
            **answer,
            "seconds": statistics.median(taken),
            "all_seconds": taken,
            "tokens_per_second": tokens / statistics.median(taken),
            "times_faster": statistics.median(taken) / seconds,
        }
    return result
