"""What is minimised: a batch and two sets of weights -> one loss in nats, and its statistics.

The loss of PMD is the divergence between student and self-teacher on the student's own tokens
(method: reverse KL, the teacher under stop-gradient); that of GRPO a clipped surrogate of the
rewards (grpo.py), on the same tokens. Normalisation is global: the weights of all
tokens of the step are known before the batch is cut, so the result does not depend on
micro-batches or devices.

Axes: N groups, G rollouts, T response tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pmd_jax.distill.batch import DistillBatch
from pmd_jax.distill.divergence import (
    DivergenceConfig,
    Facts,
    PerToken,
    TokenLoss,
    weighted_loss,
)
from pmd_jax.distill.grpo import GrpoConfig
from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.model import Params, Remat, dual_hidden, head_of


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What is minimised: "divergence" distils the teacher, "grpo" learns from rewards alone.

    teacher: "current" shares the student's weights, "ema" keeps its own average, moved by
    ema_rate towards the student once per step. normalisation: "token_mean" divides by all tokens
    that count; "sequence_mean" averages each rollout first and divides by all rollouts, those
    without guidance too (what SDPO effectively does). micro_batch: groups computed at once, 0 for
    all. chunk_tokens: tokens whose logits exist at once. bucket_tokens: prompt lengths are rounded
    up to multiples of it. length_buckets: batches that the groups of a step are sorted into by
    size, each padded to its own; their gradients are summed. remat: what the backward pass
    recomputes. With "grpo" the teacher is the anchor of its KL, and what else stands here holds for
    it too.
    """

    objective: Literal["divergence", "grpo"] = "divergence"
    grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)
    divergence: DivergenceConfig = dataclasses.field(default_factory=DivergenceConfig)
    teacher: Literal["current", "ema"] = "current"
    ema_rate: float = 0.05
    normalisation: Literal["token_mean", "sequence_mean"] = "token_mean"
    micro_batch: int = 0
    chunk_tokens: int = 512
    bucket_tokens: int = 64
    length_buckets: int = 1
    remat: Remat = "context"

    def __post_init__(self) -> None:
        if not 0 <= self.ema_rate <= 1:
            raise ValueError(f"ema_rate: must be between 0 and 1; got {self.ema_rate}")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch: must be at least 0 (0: all); got {self.micro_batch}")
        for name in ("chunk_tokens", "bucket_tokens", "length_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1; got {getattr(self, name)}")
        if self.objective == "grpo":
            self._check_grpo()

    def _check_grpo(self) -> None:
        if self.grpo.kl_weight and self.teacher != "ema":
            raise ValueError(
                'grpo.kl_weight: needs teacher = "ema" for an anchor, with ema_rate 0 for the '
                f"policy that the run began with; got {self.grpo.kl_weight} and "
                f"teacher = {self.teacher!r}"
            )
        if self.grpo.updates > 1 and self.length_buckets > 1:
            raise ValueError(
                "grpo.updates: must be 1 where length_buckets is above 1; got "
                f"{self.grpo.updates} and {self.length_buckets}"
            )

    @property
    def token_loss(self) -> TokenLoss:
        return self.grpo if self.objective == "grpo" else self.divergence


def check_micro_batch(config: DistillConfig, shards: int, groups: int) -> None:
    """Raises ValueError, on one line, where the mesh cannot cut a micro-batch into its parts.

    groups: of a step, which a micro-batch divides.
    """
    if config.micro_batch % shards:
        fits = [str(m) for m in range(shards, groups + 1, shards) if groups % m == 0]
        raise ValueError(
            f"config.distill.micro_batch: must be a multiple of the {shards} parts that the mesh "
            f"cuts a batch into (data x fsdp); got {config.micro_batch}; sizes that work with "
            f"{groups} problems a step: {', '.join(['0', *fits])}"
        )


def response_mask(batch: DistillBatch) -> Float[Array, "N G T"]:
    """1 for every response token, its end-of-turn token included."""
    return (jnp.arange(batch.response.shape[-1]) < batch.response_length[..., None]) * 1.0


def token_weights(
    batch: DistillBatch, config: DistillConfig
) -> tuple[Float[Array, "N G T"], Float[Array, ""]]:
    """What each token's divergence counts, and what the sum over a step is divided by.

    A rollout without guidance counts nothing; for GRPO all count. token_mean: 1, and tokens that
    count. sequence_mean: 1 / tokens of the rollout, and all rollouts.
    """
    mask = response_mask(batch)
    counted = mask if config.objective == "grpo" else mask * batch.has_guidance[..., None]
    if config.normalisation == "token_mean":
        return counted, counted.sum()
    rollouts = jnp.sum(batch.response_length > 0, dtype=jnp.float32)
    return counted / jnp.maximum(mask.sum(-1, keepdims=True), 1), rollouts


def loss_weights(batch: DistillBatch, config: DistillConfig) -> Float[Array, "N G T"]:
    """The weight of each token's divergence, where the batch is the whole step."""
    weights, total = token_weights(batch, config)
    return weights / jnp.maximum(total, 1)


def chunk_length(batch: DistillBatch, chunk_tokens: int) -> int:
    """Time steps per chunk: a power of two that divides T (a multiple of 16 or more)."""
    rows, t = batch.response.shape[0] * batch.response.shape[1], batch.response.shape[2]
    wanted = max(chunk_tokens // rows, 1)
    chunk = 1 << (wanted.bit_length() - 1)
    while t % chunk:
        chunk //= 2
    return min(chunk, t)


def distill_loss(
    params: Params,
    teacher: Params | None,
    batch: DistillBatch,
    weights: Float[Array, "N G T"],
    config: DistillConfig,
    model: ModelConfig,
    dtype: jnp.dtype,
    shards: int,
    old: Float[Array, "N G T"] | None = None,
) -> tuple[Float[Array, ""], PerToken]:
    """Sum of weight * loss of each token, and PerToken of shape [N, G, T].

    teacher None distils from the current weights. old: log-probabilities before the first update of
    the step, for GRPO with several. Differentiable in `params` only.
    """
    token_loss = config.token_loss
    student_hidden, teacher_hidden = dual_hidden(
        params,
        teacher,
        batch.student_prompt,
        batch.student_length,
        batch.teacher_prompt,
        batch.teacher_length,
        batch.prompt_of,
        batch.suffix,
        batch.suffix_length,
        batch.response,
        model,
        dtype,
        config.remat,
    )
    rows = batch.response.shape[0] * batch.response.shape[1]

    def flat(x: Array) -> Array:
        return x.reshape(rows, *x.shape[2:])

    facts = Facts(batch.response, weights)
    if config.objective == "grpo":
        advantage = jnp.broadcast_to(batch.advantage[..., None], weights.shape)
        facts = facts._replace(advantage=advantage, old=old, sampled=batch.sampled_logprobs)
    total, known = weighted_loss(
        token_loss,
        chunk_length(batch, config.chunk_tokens),
        shards,
        head_of(params),
        flat(student_hidden),
        jax.lax.stop_gradient(head_of(params if teacher is None else teacher)),
        flat(teacher_hidden),
        jax.tree.map(flat, facts),
    )
    return total, PerToken(*(x.reshape(batch.response.shape) for x in known))
