"""A whole training step: rollouts of a batch, then the distillation update on what was sampled."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmd_jax.distill.batch import DistillGroup, build_batch, padding_fraction, place
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import OptimizerConfig, init_state, make_optimizer, make_train_step
from pmd_jax.policy.programs import rollout_weights
from pmd_jax.policy.sampler import EngineConfig, Sampler, SamplingConfig
from pmd_jax.policy.sharding import single_device_mesh
from pmd_jax.records import Rollout
from pmd_jax.telemetry import Compilations
from tools.bench import machine, models


@dataclasses.dataclass(frozen=True)
class Workload:
    """prompt, teacher, response: tokens, (least, most) for responses, drawn uniformly."""

    problems: int = 8
    samples: int = 8
    prompt: int = 256
    teacher: int = 768
    response: tuple[int, int] = (16, 256)
    seed: int = 0


def run(
    name: str,
    dtype: str,
    engine: EngineConfig,
    config: DistillConfig,
    workload: Workload,
    repeats: int,
    attention: str = "auto",
) -> dict[str, Any]:
    """Seconds of each phase of a step, and tokens/s over all of them.

    idle: of rollout and batch, while the device waited for the host.
    """
    mesh, kind = single_device_mesh(), jnp.dtype(dtype)
    of, params = models.load(name, "float32", dtype, attention)
    optimizer = OptimizerConfig(learning_rate=1e-6)
    state = init_state(params, of, make_optimizer(optimizer, of), mesh, ema=False)
    update = make_train_step(of, optimizer, config, mesh, kind)
    sampler = Sampler(of, engine, mesh, kind)
    rng = np.random.default_rng(workload.seed)
    shape = workload.problems, workload.samples
    limits = rng.integers(*workload.response, shape, endpoint=True).tolist()
    prompts = rng.integers(0, of.vocab_size, (workload.problems, workload.prompt)).tolist()
    teachers = rng.integers(0, of.vocab_size, (workload.problems, workload.teacher)).tolist()
    phases: dict[str, list[float]] = {}
    totals, settled = [], None
    padding = 0.0

    for i in range(repeats + 1):
        if i == 1:
            settled = Compilations()
        marks, sampled_before = [("", time.perf_counter())], sampler.stats.device_seconds

        def mark(phase: str, marks: list[tuple[str, float]] = marks) -> None:
            marks.append((phase, time.perf_counter()))

        weights = rollout_weights(state.params, of, mesh, kind)
        jax.block_until_ready(weights.layers)
        mark("sync")
        sampled = sampler.generate(weights, prompts, limits, SamplingConfig(), [], seed=i)
        del weights
        mark("rollout")
        groups = [
            DistillGroup(
                prompt,
                [teacher] * workload.samples,
                [True] * workload.samples,
                [
                    Rollout("", i, g, "", sample.tokens, sample.logprobs, sample.stop)
                    for g, sample in enumerate(samples)
                ],
            )
            for prompt, teacher, samples in zip(prompts, teachers, sampled, strict=True)
        ]
        batch = build_batch(groups, bucket_tokens=config.bucket_tokens)
        padding = padding_fraction(batch)
        placed = jax.block_until_ready(place(batch, mesh))
        mark("batch")
        state, report = update(state, placed)
        gap = float(report.logprob_gap)
        mark("distill")
        if i:
            totals.append(marks[-1][1] - marks[0][1])
            taken = {b: after - before for (_, before), (b, after) in itertools.pairwise(marks)}
            on_device = sampler.stats.device_seconds - sampled_before
            taken["idle"] = taken["rollout"] - on_device + taken["batch"]
            for phase, spent in taken.items():
                phases.setdefault(phase, []).append(spent)
    seconds, tokens = statistics.median(totals), sum(map(sum, limits))
    assert settled is not None
    return {
        "bench": "step",
        "model": name,
        "dtype": dtype,
        "workload": dataclasses.asdict(workload),
        "engine": dataclasses.asdict(engine),
        "config": dataclasses.asdict(config),
        "attention": of.attention,
        **machine.describe(),
        "seconds": seconds,
        "all_seconds": totals,
        "phases": {f"{n}_seconds": statistics.median(values) for n, values in phases.items()},
        "idle_fraction": statistics.median(phases["idle"]) / seconds,
        "response_tokens": tokens,
        "response_tokens_per_second": tokens / seconds,
        "padding_fraction": padding,
        "logprob_gap": gap,
        "compilations_when_settled": settled.count,
        "peak_bytes": machine.peak_bytes(),
    }
