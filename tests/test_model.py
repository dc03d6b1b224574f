"""The policy's forward passes agree with each other, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toys import (
    CONFIG,
    F32,
    VARIANTS,
    eight_devices,
    full_logprobs,
    params_on,
    told_apart,
    toy_groups,
    toy_params,
)

from pmd_jax.distill.batch import DistillBatch, build_batch
from pmd_jax.policy import model
from pmd_jax.policy.sharding import single_device_mesh


def test_the_module_and_the_functions_are_the_same_model():
    with jax.set_mesh(single_device_mesh()):
        decoder = model.Decoder(CONFIG, nnx.Rngs(jax.random.key(1)))
        tokens = jnp.arange(12).reshape(2, 6)
        hidden = model.causal_hidden(decoder.params, tokens, CONFIG, F32)
        expected = model.logits(model.head_of(decoder.params), hidden)
        np.testing.assert_array_equal(decoder(tokens), expected)


def test_parameters_are_created_in_their_shards():
    mesh = eight_devices()
    params = model.init_params(CONFIG, jax.random.key(0), mesh)
    wanted = model.abstract_params(CONFIG, mesh, F32)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert params["layers"]["q"].addressable_shards[0].data.shape == (3, 16, 16)


def test_right_padding_and_later_tokens_change_nothing():
    params, tokens = toy_params(), np.arange(1, 11)
    padded = np.pad(tokens, (0, 6))
    np.testing.assert_allclose(
        full_logprobs(params, padded)[:10], full_logprobs(params, tokens), atol=1e-5
    )


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.family)
def test_eight_devices_give_the_logits_of_one(config):
    mesh = eight_devices()
    tokens = jnp.arange(96).reshape(8, 12)
    one = model.causal_hidden(toy_params(0, config), tokens, config, F32)
    with jax.set_mesh(mesh):
        eight = jax.jit(model.causal_hidden, static_argnums=(2, 3))(
            params_on(mesh, 0, config), tokens, config, F32
        )
    np.testing.assert_allclose(eight, one, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.family)
@pytest.mark.parametrize(
    ("own_teacher", "told"), [(False, False), (True, False), (False, True)], ids=str
)
def test_teacher_and_student_scores_equal_a_naive_pass_over_each_row(own_teacher, told, config):
    """Prompts shared by a group, packed and padded: the same numbers as row by row."""
    student = toy_params(0, config)
    teacher = toy_params(1, config) if own_teacher else None
    groups = toy_groups(num_groups=3)
    groups = told_apart(groups) if told else groups
    batch = DistillBatch(*map(jnp.asarray, build_batch(groups)))
    hidden = jax.jit(model.dual_hidden, static_argnums=(10, 11))(
        student,
        teacher,
        batch.student_prompt,
        batch.student_length,
        batch.teacher_prompt,
        batch.teacher_length,
        batch.prompt_of,
        batch.suffix,
        batch.suffix_length,
        batch.response,
        config,
        F32,
    )
    views = [(student, hidden[0]), (student if teacher is None else teacher, hidden[1])]
    for n, group in enumerate(groups):
        for g, rollout in enumerate(group.rollouts):
            prompts = [group.student_prompt, group.teacher_prompts[g]]
            for prompt, (params, packed) in zip(prompts, views, strict=True):
                row = [*prompt, *rollout.tokens]
                expected = full_logprobs(params, row, config)[len(prompt) - 1 : len(row) - 1]
                head = model.head_of(params)
                got = jax.nn.log_softmax(model.logits(head, packed[n, g, : len(rollout.tokens)]))
                np.testing.assert_allclose(got, expected, atol=2e-5)
