"""GRPO: the baseline that learns from rewards alone, without a teacher.

A rollout's advantage is its reward beside those of its group; every token of it is pushed up or
down by that, within the clipped surrogate of PPO. The defaults are those of the GRPO that SDPO and
PMD compare with: no division by the standard deviation (Dr.GRPO, arXiv 2503.20783), clip 0.2 below
and 0.28 above (DAPO, arXiv 2503.14476), dual clip 3 (arXiv 1912.09729), importance weights between
sampler and trainer cut at 2, no KL, no entropy bonus.

A KL to an anchor is that of `distill.teacher = "ema"`: its average of the policy, or, with
`ema_rate = 0`, the policy that the run began with. It reads the student's own prompt.

Axes: V vocabulary; everything else is a token, whatever the batch around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pmd_jax.distill.divergence import Facts, LogProbs, of_token

LOG_RATIO_BOUND = 20.0  # of log ratios before exp, as verl


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """The clipped surrogate.

    scale: "none" is Dr.GRPO's advantage, reward - mean of the group; "std" divides it by the
    group's standard deviation. clip_low, clip_high: the ratio of new to old probability moves the
    policy only between 1 - clip_low and 1 + clip_high. dual_clip: a token of negative advantage
    costs at most so many times it, 0 for no bound. max_importance: bound of the weight old /
    sampler that corrects for the sampler's rounding, 0 for no weight. updates: optimizer steps
    per batch of rollouts, each on its own part of the problems. kl_weight: of the KL to the
    anchor, estimated as Schulman's k3.
    """

    temperature: ClassVar[float] = 1.0  # of the rollouts

    scale: Literal["none", "std"] = "none"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    max_importance: float = 2.0
    updates: int = 1
    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "max_importance", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0; got {getattr(self, name)}")
        if self.clip_low > 1:
            raise ValueError(f"clip_low: must be at most 1; got {self.clip_low}")
        if self.dual_clip != 0 and self.dual_clip <= 1:
            raise ValueError(f"dual_clip: must be above 1, or 0 for none; got {self.dual_clip}")
        if self.updates < 1:
            raise ValueError(f"updates: must be at least 1; got {self.updates}")

    @property
    def reads_teacher(self) -> bool:
        return self.kl_weight > 0

    def of_tokens(self, student: LogProbs, teacher: LogProbs, facts: Facts) -> Array:
        """The loss of each token, nats: surrogate times importance weight, and the KL."""
        new = of_token(student, facts.token)
        fixed = lax.stop_gradient(new)
        old = fixed if facts.old is None else facts.old
        assert facts.advantage is not None and facts.sampled is not None
        loss = surrogate(self, new, old, facts.advantage)
        if self.max_importance:
            weight = jnp.exp(jnp.minimum(old - facts.sampled, LOG_RATIO_BOUND))
            loss = loss * jnp.minimum(weight, self.max_importance)
        if self.kl_weight:
            apart = of_token(teacher, facts.token) - new
            loss = loss + self.kl_weight * (jnp.expm1(apart) - apart)
        return loss


def surrogate(
    config: GrpoConfig,
    new: Float[Array, "*batch"],
    old: Float[Array, "*batch"],
    advantage: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """PPO's clipped loss, and its dual bound where the advantage is negative."""
    ratio = jnp.exp(jnp.clip(new - old, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    near = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = jnp.maximum(-advantage * ratio, -advantage * near)
    if config.dual_clip:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * config.dual_clip), loss)
    return loss


def advantages(rewards: Sequence[float], config: GrpoConfig) -> list[float]:
    """Of the rollouts of one group. With equal rewards all are 0 and nothing is learned.

    "std" divides by the sample's standard deviation (n - 1) plus 1e-6, as verl does.
    """
    reward = np.asarray(rewards, np.float64)
    apart = reward - reward.mean()
    if config.scale == "std" and len(reward) > 1:
        apart = apart / (reward.std(ddof=1) + 1e-6)
    return [0.0 if abs(a) < 1e-12 else float(a) for a in apart]
