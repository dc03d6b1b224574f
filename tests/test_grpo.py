"""GRPO: its numbers by hand, and what no split of the work may change."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import CONFIG, F32, eight_devices, params_on, toy_batch, toy_params

from pmd_jax.distill.batch import DistillBatch, place
from pmd_jax.distill.divergence import DivergenceConfig, Facts
from pmd_jax.distill.grpo import GrpoConfig, advantages, surrogate
from pmd_jax.distill.objectives import DistillConfig, response_mask
from pmd_jax.distill.update import (
    OptimizerConfig,
    abstract_state,
    init_state,
    loss_and_gradients,
    make_optimizer,
    make_train_step,
)
from pmd_jax.policy.model import causal_hidden, head_of, logits
from pmd_jax.policy.sharding import single_device_mesh

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)


def grpo(distill=None, **changes):
    return DistillConfig(objective="grpo", grpo=GrpoConfig(**changes), **(distill or {}))


def rewarded_batch(groups=4) -> DistillBatch:
    """A toy batch in which the first rollout of each group is right and the others are wrong."""
    batch = toy_batch(num_groups=groups, same_prompts=True)
    advantage = np.tile([0.75, -0.25, -0.25, -0.25], (groups, 1)).astype(np.float32)
    return batch._replace(advantage=advantage)


@pytest.mark.parametrize(
    ("scale", "rewards", "expected"),
    [
        ("none", [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        ("none", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        ("std", [1, 0, 0, 1], [0.866025, -0.866025, -0.866025, 0.866025]),  # 0.5 / sqrt(1 / 3)
        ("none", [1, 1, 1], [0, 0, 0]),
        ("std", [0.1] * 3, [0, 0, 0]),
    ],
)
def test_advantages_by_hand(scale, rewards, expected):
    np.testing.assert_allclose(advantages(rewards, GrpoConfig(scale=scale)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 1, -1.1),
        (1.5, 1, -1.28),  # above 1 + 0.28 nothing more is gained
        (0.5, 1, -0.5),  # below, there is all to gain
        (0.9, -1, 0.9),
        (0.5, -1, 0.8),  # below 1 - 0.2 nothing more is gained
        (2.0, -1, 2.0),
        (5.0, -1, 3.0),  # the dual clip
        (5.0, -2, 6.0),
    ],
)
def test_the_surrogate_by_hand(ratio, advantage, expected):
    old, advantage = jnp.float32(-2), jnp.float32(advantage)
    new = old + jnp.float32(math.log(ratio))
    value, slope = jax.value_and_grad(lambda new: surrogate(GrpoConfig(), new, old, advantage))(new)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    clipped = not math.isclose(value, -advantage * ratio, rel_tol=1e-5)
    np.testing.assert_allclose(slope, 0 if clipped else -advantage * ratio, rtol=1e-5)


def test_without_a_dual_clip_the_loss_has_no_bound():
    config = GrpoConfig(dual_clip=0)
    loss = surrogate(config, jnp.log(5.0), jnp.float32(0), jnp.float32(-1))
    np.testing.assert_allclose(loss, 5, rtol=1e-5)


def of_one_token(config, student, teacher, **facts):
    """The loss of token 0, whose probability is `student`, and `teacher` for the anchor."""

    def logprobs(p):
        return jnp.log(jnp.array([p, 1 - p]))

    facts = {name: jnp.float32(x) for name, x in facts.items()}
    facts = Facts(jnp.int32(0), jnp.float32(1), **facts)
    return float(config.of_tokens(logprobs(student), logprobs(teacher), facts))


def test_importance_weights_and_the_anchor_by_hand():
    """The ratio of new to old is 1: only what stands around the surrogate counts."""
    told = {"advantage": 1.0, "old": math.log(0.3)}
    same, rare = {"sampled": math.log(0.3)}, {"sampled": math.log(0.2)}
    assert of_one_token(GrpoConfig(), 0.3, 0.5, **told, **same) == pytest.approx(-1)
    assert of_one_token(GrpoConfig(), 0.3, 0.5, **told, **rare) == pytest.approx(-1.5)
    rare["sampled"] = math.log(0.1)  # 3 times, cut at 2
    assert of_one_token(GrpoConfig(), 0.3, 0.5, **told, **rare) == pytest.approx(-2)
    assert of_one_token(GrpoConfig(max_importance=0), 0.3, 0.5, **told, **rare) == pytest.approx(-1)
    ratio = 0.5 / 0.3  # k3: r - 1 - log r
    expected = -1 + 0.1 * (ratio - 1 - math.log(ratio))
    anchored = of_one_token(GrpoConfig(kl_weight=0.1), 0.3, 0.5, **told, **same)
    assert anchored == pytest.approx(expected, rel=1e-5)


def sampled_logprobs(params, batch):
    """[N, G, T] by a plain forward over prompt and response, one row at a time."""
    found = np.zeros(batch.response.shape, np.float32)
    for n, g in np.ndindex(*batch.response.shape[:2]):
        prompt = batch.student_prompt[n, 0, : batch.student_length[n, 0]]
        response = batch.response[n, g, : batch.response_length[n, g]]
        tokens = jnp.asarray(np.concatenate([prompt, response]))[None]
        hidden = causal_hidden(params, tokens, CONFIG, F32)[0, len(prompt) - 1 : -1]
        scores = jax.nn.log_softmax(logits(head_of(params), hidden))
        found[n, g, : len(response)] = scores[jnp.arange(len(response)), response]
    return found


def test_the_first_gradient_is_that_of_reinforce():
    """At the policy that sampled, ratios are 1: minus advantage times the mean log-probability."""
    batch = rewarded_batch(groups=1)
    batch = batch._replace(sampled_logprobs=sampled_logprobs(toy_params(), batch))
    on_device = DistillBatch(*map(jnp.asarray, batch))
    loss, known, found = jax.jit(loss_and_gradients, static_argnums=(3, 4, 5, 6))(
        toy_params(), None, on_device, grpo(), CONFIG, F32, 1
    )
    np.testing.assert_allclose(
        known.student * response_mask(batch), batch.sampled_logprobs, atol=1e-4
    )
    lengths = batch.response_length[0]
    np.testing.assert_allclose(
        loss, -(batch.advantage[0] * lengths).sum() / lengths.sum(), rtol=1e-4
    )

    def reinforce(params):
        total = 0.0
        for g, length in enumerate(lengths):
            prompt = batch.student_prompt[0, 0, : batch.student_length[0, 0]]
            tokens = jnp.asarray(np.concatenate([prompt, batch.response[0, g, :length]]))[None]
            hidden = causal_hidden(params, tokens, CONFIG, F32)[0, len(prompt) - 1 : -1]
            scores = jax.nn.log_softmax(logits(head_of(params), hidden))
            own = scores[jnp.arange(length), batch.response[0, g, :length]]
            total -= batch.advantage[0, g] * own.sum()
        return total / lengths.sum()

    expected = jax.jit(jax.grad(reinforce))(toy_params())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
    )


def trained(config, mesh=None, batch=None):
    mesh, batch = mesh or single_device_mesh(), batch or rewarded_batch()
    optimizer = make_optimizer(OPTIMIZER, CONFIG, config.grpo.updates)
    state = init_state(params_on(mesh), CONFIG, optimizer, mesh, config.teacher == "ema")
    return make_train_step(CONFIG, OPTIMIZER, config, mesh, F32)(state, place(batch, mesh))


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=tolerance), a, b)


@pytest.mark.slow
def test_two_updates_are_two_by_hand_against_the_same_old_policy():
    """The first on groups 0 and 2, the second on 1 and 3, with the ratio to the first policy."""
    batch = rewarded_batch()
    batch = batch._replace(sampled_logprobs=sampled_logprobs(toy_params(), batch))
    state, report = trained(grpo(updates=2), batch=batch)
    assert int(state.step) == 1 and bool(report.finite)
    np.testing.assert_allclose(
        report.per_token.student * response_mask(batch), batch.sampled_logprobs, atol=1e-4
    )
    optimizer, params = make_optimizer(OPTIMIZER, CONFIG, 2), toy_params()
    moments = optimizer.init(params)
    gradients_of = jax.jit(loss_and_gradients, static_argnums=(3, 4, 5, 6))
    losses = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        own = DistillBatch(*(jnp.asarray(x[part]) for x in batch))
        loss, _, found = gradients_of(
            params, None, own, grpo(updates=2), CONFIG, F32, 1, old=own.sampled_logprobs
        )
        changes, moments = optimizer.update(found, moments, params)
        params = optax.apply_updates(params, changes)
        losses.append(float(loss))
    np.testing.assert_allclose(report.loss, np.mean(losses), rtol=1e-4)
    assert_close(state.params, params, 1e-4)


@pytest.mark.parametrize("updates", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_step_on_eight_devices_equals_one_on_one(updates):
    config = grpo({"teacher": "ema", "micro_batch": 8}, updates=updates, kl_weight=0.1)
    batch = rewarded_batch(groups=16)
    one, report = trained(config, batch=batch)
    eight, other = trained(config, eight_devices(), batch)
    np.testing.assert_allclose(other.loss, report.loss, rtol=1e-4)
    # Adam makes an update of 1e-2 of any gradient, so of a tiny one rounding shows.
    assert_close(jax.device_get(eight.params), jax.device_get(one.params), 5e-4)
    assert_close(jax.device_get(eight.teacher), jax.device_get(one.teacher), 5e-4)


def test_the_anchor_moves_once_a_step():
    config = grpo({"teacher": "ema", "ema_rate": 0.25}, updates=2, kl_weight=0.1)
    state, _ = trained(config)
    start = toy_params()
    expected = jax.tree.map(lambda a, b: a + 0.25 * (b - a), start, state.params)
    assert_close(state.teacher, expected, 1e-6)


def test_an_update_that_is_not_finite_leaves_the_state_as_it_was():
    batch = rewarded_batch()
    batch.advantage[1] = np.inf  # of the second update
    state, report = trained(grpo(updates=2), batch=batch)
    assert not report.finite and int(state.step) == 0
    assert_close(state.params, toy_params(), 0)


def flops(config):
    mesh = single_device_mesh()
    optimizer = make_optimizer(OPTIMIZER, CONFIG)
    state = abstract_state(CONFIG, optimizer, mesh, config.teacher == "ema")
    batch = DistillBatch(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rewarded_batch()))
    step = make_train_step(CONFIG, OPTIMIZER, config, mesh, F32).jitted
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile().cost_analysis()["flops"]


def test_without_an_anchor_no_teacher_is_computed():
    """Student forward and backward are three forward passes; the anchor's would be a fourth."""
    shape = {"remat": "none", "teacher": "ema"}
    bare, anchored = flops(grpo(shape)), flops(grpo(shape, kl_weight=0.1))
    assert bare / anchored == pytest.approx(3 / 4, abs=0.03)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GrpoConfig(clip_low=1.5), "clip_low: must be at most 1; got 1.5"),
        (lambda: GrpoConfig(dual_clip=1.0), "dual_clip: must be above 1, or 0 for none; got 1.0"),
        (lambda: GrpoConfig(updates=0), "updates: must be at least 1; got 0"),
        (lambda: grpo(kl_weight=0.1), 'grpo.kl_weight: needs teacher = "ema"'),
        (lambda: grpo({"length_buckets": 2}, updates=2), "grpo.updates: must be 1 where"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value).startswith(message)


def test_grpo_reads_its_own_loss_and_a_distillation_the_divergence():
    assert isinstance(grpo().token_loss, GrpoConfig)
    assert isinstance(
        dataclasses.replace(grpo(), objective="divergence").token_loss, DivergenceConfig
    )
