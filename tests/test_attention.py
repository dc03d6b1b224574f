"""Attention's backends against the plain XLA code of attention.py, forward and backward.

splash runs as it is, interpreted. Of cuDNN the arguments are tested, by XLA's code behind the same
function, and that it lowers for CUDA; a test that needs a GPU compares the numbers themselves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toys import CONFIG, F32, GEMMA, OLMO, eight_devices, params_on, toy_batch, toy_params

from pmd_jax.policy import attention, kernels, model
from pmd_jax.policy.kernels import choose_attention

KERNELS = ("splash", "cudnn")
WINDOW = 6


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """cuDNN's arguments are computed by XLA, and splash has several blocks in short rows."""
    monkeypatch.setattr(kernels, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 128)


def with_attention(name, config=CONFIG):
    return dataclasses.replace(config, attention=name, window=WINDOW)


def normals(*shapes, dtype=F32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def out_and_gradients(attend, valid, *qkv):
    """Of a loss that reads the valid rows alone, its weights unlike at each place."""
    (weights,) = normals(qkv[0].shape)

    def loss(*qkv):
        out = attend(*qkv)
        return jnp.sum(jnp.where(valid[..., None, None], out * weights, 0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return jnp.where(valid[..., None, None], out, 0), *gradients


def assert_same(attend, reference, valid, *qkv, atol=2e-5):
    ours, theirs = (out_and_gradients(f, valid, *qkv) for f in (attend, reference))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 2, None), (3, 3, WINDOW)])
def test_causal_equals_the_reference(name, heads, kv_heads, window):
    q, k, v = normals((2, 150, heads, 8), (2, 150, kv_heads, 8), (2, 150, kv_heads, 8))
    valid = jnp.arange(150) < jnp.array([150, 70])[:, None]
    config = with_attention(name)
    assert_same(
        lambda *qkv: kernels.causal(*qkv, window, config),
        lambda *qkv: attention.causal(*qkv, window),
        valid,
        q,
        k,
        v,
    )


P, T, G = 21, 140, 3  # each response has two blocks of queries, and two of keys


def groups(num_prompts, heads=4, kv_heads=2, n=2, dtype=F32):
    """q, k, v of groups, which tokens are real, and what `grouped` takes beside them."""
    rng = np.random.default_rng(num_prompts)
    tokens = num_prompts * P + G * T
    qkv = normals(*((n, tokens, h, 8) for h in (heads, kv_heads, kv_heads)), dtype=dtype)
    prompt_len = rng.integers(1, P + 1, (n, num_prompts)).astype(np.int32)
    prompt_len[0, 0] = P
    prompt_of = rng.integers(0, num_prompts, (n, G)).astype(np.int32)
    response_len = rng.integers(1, T + 1, (n, G))
    valid = [np.arange(P) < prompt_len[..., None], np.arange(T) < response_len[..., None]]
    valid = np.concatenate([x.reshape(n, -1) for x in valid], axis=1)
    rest = (num_prompts * P, G, jnp.asarray(prompt_len), jnp.asarray(prompt_of))
    return qkv, jnp.asarray(valid), rest


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_prompts", [1, 2])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_grouped_equals_the_reference(name, num_prompts, window):
    qkv, valid, rest = groups(num_prompts)
    config = with_attention(name)
    assert_same(
        lambda *qkv: kernels.grouped(*qkv, *rest, window, config),
        lambda *qkv: attention.grouped(*qkv, *rest, window),
        valid,
        *qkv,
    )


# --- in the model -------------------------------------------------------------------------------


def dual_batch(batch):
    return {
        "student_prompt": batch.student_prompt,
        "student_length": batch.student_length,
        "teacher_prompt": batch.teacher_prompt,
        "teacher_length": batch.teacher_length,
        "prompt_of": batch.prompt_of,
        "response": batch.response,
    }


def student_and_gradients(params, batch, config, remat="context"):
    """Hidden states of both sides where the responses are real, and gradients of the student."""
    (weights,) = normals((*batch.response.shape, config.width))
    real = (jnp.arange(batch.response.shape[-1]) < batch.response_length[..., None])[..., None]

    def loss(params):
        both = model.dual_hidden(
            params, None, **dual_batch(batch), config=config, dtype=F32, remat=remat
        )
        both = [jnp.where(real, h, 0) for h in both]
        return jnp.sum(both[0] * weights), both

    (_, both), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return both, gradients


def assert_trees_close(ours, theirs, atol=3e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol), ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("config", [CONFIG, GEMMA, OLMO], ids=lambda c: c.family)
def test_students_and_teachers_equal_the_reference_whatever_their_layers_see(name, config):
    """Layers are scanned: which of them slide is known only while the program runs."""
    batch, params = toy_batch(num_groups=2), toy_params(config=config)
    other = dataclasses.replace(config, attention=name)
    assert_trees_close(
        student_and_gradients(params, batch, other), student_and_gradients(params, batch, config)
    )


@pytest.mark.parametrize("remat", ["full", "none"])
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(remat):
    batch, config = toy_batch(num_groups=2), with_attention("splash", OLMO)
    assert_trees_close(
        student_and_gradients(toy_params(config=OLMO), batch, config, remat),
        student_and_gradients(toy_params(config=OLMO), batch, OLMO, remat),
    )


@pytest.mark.parametrize("name", KERNELS)
def test_eight_devices_equal_one(name):
    mesh, batch, config = eight_devices(), toy_batch(), dataclasses.replace(OLMO, attention=name)
    with jax.set_mesh(mesh):
        ours = student_and_gradients(params_on(mesh, config=OLMO), batch, config)
    assert_trees_close(ours, student_and_gradients(toy_params(config=OLMO), batch, OLMO))
