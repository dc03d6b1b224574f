"""One training step: TrainState in, TrainState out, jitted, sharded, donated.

Micro-batches run in a scan with summed gradients; weights are normalised over the whole step
before. Batches of several sizes (length buckets) add to the same sums, a program for each size; one
more program divides the sums and updates. GRPO may update several times in a step, each time on its
own part of the groups; the step and the learning rate count rollout batches, not updates. A loss or
gradient that is not finite leaves the state as it was and says so, so that the last good weights
survive. The EMA teacher moves once per step, in float32: T <- T + rate (S - T).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pmd_jax.distill.batch import DistillBatch
from pmd_jax.distill.divergence import PerToken
from pmd_jax.distill.grpo import GrpoConfig
from pmd_jax.distill.objectives import (
    DistillConfig,
    distill_loss,
    loss_weights,
    response_mask,
    token_weights,
)
from pmd_jax.policy.families import ModelConfig, weight_table
from pmd_jax.policy.model import Params, abstract_params, tree_of
from pmd_jax.policy.sharding import batch_shards


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The learning rate rises linearly over warmup_steps, then stays.

    weight_decay leaves norms and embeddings alone. max_grad_norm: global norm to clip at.
    learning_rate 0 freezes the policy.
    """

    learning_rate: float = 1e-5
    warmup_steps: int = 10
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0; got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be in [0, 1); got {getattr(self, name)}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm: must be above 0; got {self.max_grad_norm}")


class TrainState(NamedTuple):
    """step: policy updates so far. params: float32 master weights. teacher: None, or the EMA."""

    step: Int[Any, ""]
    params: Params
    teacher: Params | None
    optimizer: Any


class StepReport(NamedTuple):
    """What a step found. per_token arrays are [N, G, T]; numbers are float32 scalars.

    logprob_gap: mean |log-probability under the trainer - under the sampler| of response tokens.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    finite: Array
    learning_rate: Float[Array, ""]
    entropy: Float[Array, ""]
    logprob_gap: Float[Array, ""]
    per_token: PerToken


def learning_rate(config: OptimizerConfig, step: Any) -> Array:
    """The rate of the update that follows `step` updates."""
    warm = (step + 1) / max(config.warmup_steps, 1)
    return config.learning_rate * jnp.minimum(1.0, warm)


def make_optimizer(
    config: OptimizerConfig, model: ModelConfig, updates: int = 1
) -> optax.GradientTransformation:
    """updates: those of one step."""
    decayed = tree_of({w.path: w.stacked and len(w.shape) > 1 for w in weight_table(model)})
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            lambda count: learning_rate(config, count // updates),
            config.beta1,
            config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def abstract_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool
) -> TrainState:
    """Shapes and shardings of the whole state, for creation and for checkpoints."""
    params = abstract_params(model, mesh, jnp.float32)
    whole = NamedSharding(mesh, P())

    def replicated(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=replicated,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, params, params if ema else None, moments)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def init_state(
    params: Params,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ema: bool,
) -> TrainState:
    """A state at step 0 around float32 `params`; the EMA teacher starts as their copy."""
    shardings = _shardings(abstract_state(model, optimizer, mesh, ema))

    def build(params: Params) -> TrainState:
        teacher = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(jnp.int32(0), params, teacher, optimizer.init(params))

    with jax.set_mesh(mesh):
        return jax.jit(build, out_shardings=shardings)(params)


def _micro_batches(tree: Any, count: int) -> Any:
    """[N, ...] -> [count, N / count, ...], each taking every count-th group: rows stay local."""

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(cut, tree)


def _whole_batch(tree: Any) -> Any:
    """The inverse of `_micro_batches`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def loss_and_gradients(
    params: Params,
    teacher: Params | None,
    batch: DistillBatch,
    config: DistillConfig,
    model: ModelConfig,
    dtype: Any,
    shards: int,
    weights: Float[Array, "N G T"] | None = None,
    start: tuple[Array, Params] | None = None,
    old: Float[Array, "N G T"] | None = None,
) -> tuple[Array, PerToken, Params]:
    """The loss of the whole batch, computed in micro-batches of `config.micro_batch` groups.

    weights: those of a batch that is a whole step, if None. start: a loss and gradients to add to.
    old: as `distill_loss`.
    """
    if weights is None:
        weights = loss_weights(batch, config)
    groups = batch.response.shape[0]
    count = groups // config.micro_batch if config.micro_batch else 1

    def one(batch: DistillBatch, weights: Array, old: Array | None):
        def loss(params: Params):
            return distill_loss(params, teacher, batch, weights, config, model, dtype, shards, old)

        (value, known), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, known, gradients

    if count <= 1:
        value, known, gradients = one(batch, weights, old)
        if start is not None:
            value, gradients = jax.tree.map(jnp.add, start, (value, gradients))
        return value, known, gradients

    def body(carry, xs):
        value, known, gradients = one(*xs)
        return jax.tree.map(jnp.add, carry, (value, gradients)), known

    if start is None:
        start = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    xs = _micro_batches((batch, weights, old), count)
    (value, gradients), known = lax.scan(body, start, xs)
    return value, _whole_batch(known), gradients


def per_token(
    params: Params,
    teacher: Params | None,
    batch: DistillBatch,
    config: DistillConfig,
    model: ModelConfig,
    dtype: Any,
    shards: int,
) -> PerToken:
    """What a forward pass in micro-batches finds of every response token; no gradient."""

    def one(batch: DistillBatch) -> PerToken:
        nothing = jnp.zeros(batch.response.shape)
        return distill_loss(params, teacher, batch, nothing, config, model, dtype, shards)[1]

    groups = batch.response.shape[0]
    count = groups // config.micro_batch if config.micro_batch else 1
    return _whole_batch(lax.map(one, _micro_batches(batch, count)))


def make_probe(
    model: ModelConfig, config: DistillConfig, mesh: Mesh, dtype: Any
) -> Callable[[TrainState, DistillBatch], PerToken]:
    """The jitted `per_token` under a state's weights, which stay as they are."""
    shards, everywhere = batch_shards(mesh), NamedSharding(mesh, P())

    @partial(jax.jit, out_shardings=everywhere)
    def known(params: Params, teacher: Params | None, batch: DistillBatch) -> PerToken:
        return per_token(params, teacher, batch, config, model, dtype, shards)

    def probe(state: TrainState, batch: DistillBatch) -> PerToken:
        with jax.set_mesh(mesh):
            return known(state.params, state.teacher, batch)

    return probe


class _Means(NamedTuple):
    """Sums over response tokens, and how many those are."""

    tokens: Float[Array, ""]
    entropy: Float[Array, ""]
    gap: Float[Array, ""]

    @classmethod
    def of(cls, batch: DistillBatch, known: PerToken) -> _Means:
        mask = response_mask(batch)
        gap = jnp.abs(known.student - batch.sampled_logprobs)
        return cls(mask.sum(), jnp.sum(known.entropy * mask), jnp.sum(gap * mask))


class _Sums(NamedTuple):
    """What the batches of a step add up to; `total` is what loss and gradients are divided by."""

    loss: Float[Array, ""]
    gradients: Params
    total: Float[Array, ""]
    means: _Means


def make_train_step(
    model: ModelConfig,
    optimizer_config: OptimizerConfig,
    config: DistillConfig,
    mesh: Mesh,
    dtype: Any,
    most_loss: float = math.inf,
    most_norm: float = math.inf,
) -> Callable[..., tuple[TrainState, StepReport]]:
    """The jitted step: (state, batch, *more batches) -> (state, report).

    The state is donated: use the one that comes back. Of several batches, which are one step
    together, per_token comes joined and padded, as numpy. A loss above most_loss or a gradient norm
    above most_norm counts as not finite.
    """
    updates = config.grpo.updates if config.objective == "grpo" else 1
    optimizer = make_optimizer(optimizer_config, model, updates)
    ema, shards = config.teacher == "ema", batch_shards(mesh)

    def update(
        state: TrainState, loss: Array, gradients: Params, means: _Means, known: Any
    ) -> tuple[TrainState, StepReport]:
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= most_loss) & (norm <= most_norm)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        teacher = None
        if ema:
            teacher = optax.incremental_update(params, state.teacher, config.ema_rate)
        new = TrainState(state.step + 1, params, teacher, moments)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        tokens = jnp.maximum(means.tokens, 1)
        return new, StepReport(
            loss=loss,
            grad_norm=norm,
            finite=finite,
            learning_rate=learning_rate(optimizer_config, state.step),
            entropy=means.entropy / tokens,
            logprob_gap=means.gap / tokens,
            per_token=known,
        )

    def whole(state: TrainState, batch: DistillBatch) -> tuple[TrainState, StepReport]:
        loss, known, gradients = loss_and_gradients(
            state.params, state.teacher, batch, config, model, dtype, shards
        )
        return update(state, loss, gradients, _Means.of(batch, known), known)

    def several(state: TrainState, batch: DistillBatch) -> tuple[TrainState, StepReport]:
        """Updates on parts of the batch in turn; the report is of the rollouts as they were made.

        Where one part is not finite, no update of the step is kept. The teacher moves at the end.
        """
        first = dataclasses.replace(config, grpo=GrpoConfig(), teacher="current")
        old = per_token(state.params, None, batch, first, model, dtype, shards).student

        def part(now: TrainState, xs: Any) -> tuple[TrainState, StepReport]:
            batch, old = xs
            loss, known, gradients = loss_and_gradients(
                now.params, state.teacher, batch, config, model, dtype, shards, old=old
            )
            new, report = update(now, loss, gradients, _Means.of(batch, known), known)
            return new._replace(step=state.step, teacher=state.teacher), report

        new, reports = lax.scan(part, state, _micro_batches((batch, old), updates))
        finite = jnp.all(reports.finite)
        teacher = None
        if ema:
            teacher = optax.incremental_update(new.params, state.teacher, config.ema_rate)
        new = new._replace(step=state.step + 1, teacher=teacher)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        known = _whole_batch(reports.per_token)._replace(student=old)
        nothing = jnp.float32(0)
        means = jax.tree.map(jnp.mean, reports._replace(per_token=known, finite=nothing))
        return new, means._replace(
            finite=finite,
            logprob_gap=_Means.of(batch, known).gap / jnp.maximum(response_mask(batch).sum(), 1),
            learning_rate=reports.learning_rate[0],
            per_token=known,
        )

    def zero(params: Params) -> _Sums:
        nothing = jnp.float32(0)
        gradients = jax.tree.map(jnp.zeros_like, params)
        return _Sums(nothing, gradients, nothing, _Means(nothing, nothing, nothing))

    def add(
        sums: _Sums, params: Params, teacher: Params | None, batch: DistillBatch
    ) -> tuple[_Sums, PerToken]:
        weights, total = token_weights(batch, config)
        start = sums.loss, sums.gradients
        loss, known, gradients = loss_and_gradients(
            params, teacher, batch, config, model, dtype, shards, weights, start
        )
        means = jax.tree.map(jnp.add, sums.means, _Means.of(batch, known))
        return _Sums(loss, gradients, sums.total + total, means), known

    def finish(state: TrainState, sums: _Sums) -> tuple[TrainState, StepReport]:
        total = jnp.maximum(sums.total, 1)
        loss, gradients = jax.tree.map(lambda x: x / total, (sums.loss, sums.gradients))
        return update(state, loss, gradients, sums.means, None)

    held, everywhere = (
        _shardings(abstract_state(model, optimizer, mesh, ema)),
        NamedSharding(mesh, P()),
    )
    summed: Any = _Sums(*[everywhere] * 4)._replace(gradients=held.params)  # type: ignore[arg-type]
    jitted = jax.jit(
        several if updates > 1 else whole, donate_argnums=0, out_shardings=(held, everywhere)
    )
    start = jax.jit(zero, out_shardings=summed)
    adding = jax.jit(add, donate_argnums=0, out_shardings=(summed, everywhere))
    finishing = jax.jit(finish, donate_argnums=0, out_shardings=(held, everywhere))

    def run(
        state: TrainState, batch: DistillBatch, *more: DistillBatch
    ) -> tuple[TrainState, StepReport]:
        with jax.set_mesh(mesh):
            if not more:
                return jitted(state, batch)
            sums, found = start(state.params), []
            for part in (batch, *more):
                sums, known = adding(sums, state.params, state.teacher, part)
                found.append(known)
            state, report = finishing(state, sums)
        return state, report._replace(per_token=_joined(found))

    run.jitted, run.adding = jitted, adding  # type: ignore[attr-defined]
    return run


def _joined(parts: Sequence[PerToken]) -> PerToken:
    """[N, G, T] of each batch -> one of all groups, batch by batch, padded to the longest T."""
    longest = max(part.divergence.shape[-1] for part in parts)

    def join(*arrays: Any) -> np.ndarray:
        return np.concatenate(
            [np.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[-1]))) for x in arrays]
        )

    return jax.tree.map(join, *jax.device_get(parts))


def rollout_losses(report: StepReport, batch: DistillBatch) -> Float[Any, "N G"]:
    """Mean divergence of each rollout's tokens, nats; what its teacher would have it change."""
    mask = jax.device_get(response_mask(batch))
    divergence = jax.device_get(report.per_token.divergence)
    return (divergence * mask).sum(-1) / mask.sum(-1).clip(1)
