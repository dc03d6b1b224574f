"""The distillation step: loss and gradients of a batch, beside the same loss written plainly."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmd_jax.distill.batch import DistillBatch, DistillGroup, build_batch
from pmd_jax.distill.divergence import DIVERGENCES
from pmd_jax.distill.objectives import DistillConfig, loss_weights
from pmd_jax.distill.update import loss_and_gradients
from pmd_jax.policy import model
from pmd_jax.policy.families import ModelConfig
from pmd_jax.records import Rollout
from tools.account import row_pairs
from tools.bench import machine, models
from tools.bench.peers import Peer
from tools.flops import product_flops


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tokens of each prompt and response, all of one length; one teacher prompt for a group."""

    groups: int = 4
    rollouts: int = 1
    student: int = 256
    teacher: int = 768
    response: int = 128
    seed: int = 0

    def draw(self, vocab_size: int) -> list[DistillGroup]:
        rng = np.random.default_rng(self.seed)

        def tokens(size: int) -> list[int]:
            return rng.integers(0, vocab_size, size).tolist()

        def rollout(i: int, g: int) -> Rollout:
            ids = np.asarray(tokens(self.response), np.int32)
            return Rollout(f"{i}", 0, g, "", ids, np.zeros(len(ids), np.float32), "length")

        def group(i: int) -> DistillGroup:
            shared = tokens(self.teacher)
            rollouts = [rollout(i, g) for g in range(self.rollouts)]
            guided = [True] * self.rollouts
            return DistillGroup(tokens(self.student), [shared] * self.rollouts, guided, rollouts)

        return [group(i) for i in range(self.groups)]


def plain_hidden(params: model.Params, rows: Any, of: ModelConfig, dtype: Any) -> jax.Array:
    """Hidden states [B, T, D] with textbook attention: every score of a row, then a mask."""
    turns = model.Turns.of(jnp.arange(rows.shape[1]), of)
    mask = jnp.tril(jnp.ones((rows.shape[1],) * 2, bool))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, None]:
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        scores = jnp.einsum("btkrd,bskd->bkrts", grouped, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -1e30))
        context = jnp.einsum("bkrts,bskd->btkrd", weights.astype(v.dtype), v)
        return context.reshape(q.shape), None

    def layer(h: jax.Array, weights: model.Params) -> tuple[jax.Array, None]:
        return model.block(weights, h, turns, None, attend, of)

    h, _ = jax.lax.scan(layer, model.embed(params, rows, of, dtype), params["layers"])
    return model.final_norm(params, h, of)


def naive_loss(
    params: model.Params, batch: DistillBatch, config: DistillConfig, of: ModelConfig, dtype: Any
) -> jax.Array:
    """What one writes first: every rollout a row with its prompt, all logits at once.

    For batches in which no prompt and no response is padded.
    """
    n, g, t = batch.response.shape

    def log_probs(params: model.Params, prompt: Any, index: Any) -> jax.Array:
        prompts = jnp.take_along_axis(prompt, index[..., None], axis=1)
        rows = jnp.concatenate([prompts, batch.response], axis=-1).reshape(n * g, -1)
        hidden = plain_hidden(params, rows, of, dtype)[:, -t - 1 : -1]
        return jax.nn.log_softmax(model.logits(model.head_of(params), hidden))

    student = log_probs(params, batch.student_prompt, jnp.zeros_like(batch.prompt_of))
    fixed = jax.lax.stop_gradient(params)
    teacher = log_probs(fixed, batch.teacher_prompt, jnp.asarray(batch.prompt_of))
    each = DIVERGENCES[config.divergence.name](student, teacher)
    return jnp.sum(each * loss_weights(batch, config).reshape(n * g, t))


Step = Callable[[model.Params, DistillBatch], tuple[jax.Array, model.Params]]


def steps(config: DistillConfig, of: ModelConfig, dtype: Any) -> dict[str, Step]:
    """Ours and the naive one: (params, batch) -> (loss, gradients)."""

    def ours(params: model.Params, batch: DistillBatch) -> tuple[jax.Array, model.Params]:
        loss, _, gradients = loss_and_gradients(params, None, batch, config, of, dtype, 1)
        return loss, gradients

    def naive(params: model.Params, batch: DistillBatch) -> tuple[jax.Array, model.Params]:
        return jax.value_and_grad(naive_loss)(params, batch, config, of, dtype)

    return {"ours": ours, "naive": naive}


def flops_needed(params: model.Params, of: ModelConfig, workload: Workload) -> int:
    """Of matrix products: student forward and backward, teacher forward, prompts once a group.

    Attention counts the pairs of reader and token that plain XLA computes, masked ones too.
    """
    layers = sum(leaf.size for leaf in params["layers"].values() if leaf.ndim == 3)
    n, g, t = workload.groups, workload.rollouts, workload.response

    def forward(prompt: int) -> int:
        tokens = n * (prompt + g * t)
        pairs = n * (row_pairs("xla", prompt) + g * row_pairs("xla", t, prompt))
        return 2 * layers * tokens + 4 * of.num_layers * of.num_heads * of.head_dim * pairs

    head = 2 * of.width * of.vocab_size * n * g * t
    return 3 * forward(workload.student) + forward(workload.teacher) + 4 * head


def build(step: Step, params: model.Params, batch: DistillBatch) -> dict[str, Any]:
    """A step that was compiled and ran once, and what that took."""
    lowered, began = jax.jit(step).lower(params, batch), time.perf_counter()
    compiled: Any = lowered.compile()
    compile_seconds = time.perf_counter() - began
    return {
        "run": compiled,
        "loss": float(compiled(params, batch)[0]),
        "compile_seconds": compile_seconds,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": machine.peak_bytes(),
        "flops": product_flops(step, params, batch),
    }


def run(
    name: str,
    dtype: str,
    config: DistillConfig,
    workload: Workload,
    repeats: int,
    peers: list[Peer],
    with_naive: bool = True,
    attention: str = "auto",
) -> dict[str, Any]:
    """Seconds and temporary memory of loss and gradients, ours, naive and of each peer.

    Where the naive loss does not fit the device's memory, the result says so in its place.
    flops_over_needed is left out with splash, whose products are not counted (tools/flops.py).
    """
    of, params = models.load(name, "float32", dtype, attention)
    groups = workload.draw(of.vocab_size)
    batch = jax.device_put(build_batch(groups, bucket_tokens=1))
    made = steps(config, of, jnp.dtype(dtype))
    found, lack = {"ours": build(made["ours"], params, batch)}, ""
    if with_naive:
        try:
            found["naive"] = build(made["naive"], params, batch)
        except jax.errors.JaxRuntimeError as error:
            lack = machine.memory_lacked(error)
            if not lack:
                raise
    roofs = machine.roofline(jnp.dtype(dtype))
    answers = [
        peer.warm_up(
            {
                "kind": "distill",
                "model": str(models.folder(name)),
                "student_prompts": [group.student_prompt for group in groups],
                "teacher_prompts": [p for group in groups for p in group.teacher_prompts],
                "responses": [r.tokens.tolist() for group in groups for r in group.rollouts],
                "prompt_of": [i for i, group in enumerate(groups) for _ in group.rollouts],
                "divergence": config.divergence.name,
                "dtype": dtype,
                "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
            }
        )
        for peer in peers
    ]
    taken: dict[str, list[float]] = {kind: [] for kind in [*found, *(p.name for p in peers)]}
    for _ in range(repeats):
        for kind, made_one in found.items():
            taken[kind].append(machine.timed(lambda m=made_one: m["run"](params, batch)))  # type: ignore[misc]
        for peer, answer in zip(peers, answers, strict=True):
            done = peer.run()
            taken[peer.name].append(done["seconds"])
            answer["loss"] = done["loss"]
    seconds = {kind: statistics.median(values) for kind, values in taken.items()}
    ours = found["ours"]
    needed = flops_needed(params, of, workload)
    result = {
        "bench": "distill",
        "model": name,
        "dtype": dtype,
        "workload": dataclasses.asdict(workload),
        "config": dataclasses.asdict(config),
        "attention": of.attention,
        **machine.describe(),
        **roofs,
        "loss": ours["loss"],
        "seconds": seconds["ours"],
        "all_seconds": taken["ours"],
        "response_tokens_per_second": workload.groups
        * workload.rollouts
        * workload.response
        / seconds["ours"],
        "flops_needed": needed,
        **({} if of.attention == "splash" else {"flops_over_needed": ours["flops"] / needed}),
        "fraction_of_flops": needed / seconds["ours"] / roofs["flops_per_second"],
        "temporary_bytes": ours["temporary_bytes"],
        "compile_seconds": ours["compile_seconds"],
        "peak_bytes": ours["peak_bytes"],
        **({"naive": f"does not fit: {lack}"} if lack else {}),
    }
    others = {peer.name: answer for peer, answer in zip(peers, answers, strict=True)}
    if "naive" in found:
        names = "loss", "temporary_bytes", "compile_seconds", "flops"
        others["naive"] = {key: found["naive"][key] for key in names}
    for kind, answer in others.items():
        result[f"against_{kind}"] = {
            **answer,
            "seconds": seconds[kind],
            "all_seconds": taken[kind],
            "times_faster": seconds[kind] / seconds["ours"],
        }
        if "temporary_bytes" in answer:
            share = ours["temporary_bytes"] / answer["temporary_bytes"]
            result[f"against_{kind}"]["share_of_its_memory"] = share
    return result
