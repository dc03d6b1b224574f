"""Divergences against golden values, and the chunked loss against the plain one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import eight_devices

from pmd_jax.distill.divergence import (
    DivergenceConfig,
    Facts,
    forward_kl,
    jensen_shannon,
    on_student_top_k,
    reverse_kl,
    token_divergence,
    weighted_loss,
)
from pmd_jax.policy.model import logits
from pmd_jax.policy.sharding import named

STUDENT = jax.nn.log_softmax(jnp.array([2.0, 1.0, 0.0, -1.0]))
TEACHER = jax.nn.log_softmax(jnp.array([1.0, 2.0, -0.5, 0.5]))
VOCAB, WIDTH, ROWS, LENGTH = 96, 16, 8, 16
NAMES = ["reverse_kl", "forward_kl", "jensen_shannon"]


def at(alpha, student, teacher):
    if alpha == 0:
        return forward_kl(student, teacher)
    return reverse_kl(student, teacher) if alpha == 1 else jensen_shannon(student, teacher, alpha)


@pytest.mark.parametrize(
    ("support", "expected"),
    [
        ("full", [0.478845, 0.086505, 0.114036, 0.477001]),
        ("tail", [0.394543, 0.073049, 0.098013, 0.421915]),
        ("renormalised", [0.462117, 0.084007, 0.110944, 0.462117]),
    ],
)
def test_golden_values_of_sdpo(support, expected):
    pair = (STUDENT, TEACHER)
    if support != "full":
        pair = on_student_top_k(*pair, top_k=2, tail=support == "tail")
    got = [float(at(alpha, *pair)) for alpha in (0, 0.25, 0.5, 1)]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_case_worked_by_hand():
    half, quarter = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    # KL(half || quarter) = 0.5 ln 2 + 0.5 ln(2/3) = 0.3466 - 0.2027
    np.testing.assert_allclose(reverse_kl(half, quarter), 0.143841, atol=1e-6)
    np.testing.assert_allclose(forward_kl(half, quarter), 0.130812, atol=1e-6)


def test_top_k_with_tail_grows_to_the_full_divergence():
    values = [
        float(token_divergence(DivergenceConfig(top_k=k), STUDENT, TEACHER)) for k in (1, 2, 3, 4)
    ]
    full = float(reverse_kl(STUDENT, TEACHER))
    assert values == sorted(values)
    np.testing.assert_allclose(values[-1], full, rtol=1e-4)


def arguments(rows=ROWS):
    keys = jax.random.split(jax.random.key(0), 6)
    head, teacher_head = (jax.random.normal(k, (VOCAB, WIDTH)) for k in keys[:2])
    student, teacher = (jax.random.normal(k, (rows, LENGTH, WIDTH)) / 2 for k in keys[2:4])
    tokens = jax.random.randint(keys[4], (rows, LENGTH), 0, VOCAB)
    weights = jax.random.uniform(keys[5], (rows, LENGTH)) * (tokens % 3 > 0)
    return head, student, teacher_head, teacher, tokens, weights


def chunked_loss(config, chunk, shards, head, student, teacher_head, teacher, tokens, weights):
    facts = Facts(tokens, weights)
    return weighted_loss(config, chunk, shards, head, student, teacher_head, teacher, facts)


def plain(config, head, student, teacher_head, teacher, tokens, weights):
    student, teacher = (
        jax.nn.log_softmax(logits(h, x) / config.temperature)
        for h, x in ((head, student), (teacher_head, teacher))
    )
    return jnp.sum(token_divergence(config, student, teacher) * weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("top_k", "tail"), [(0, True), (7, True), (7, False)])
@pytest.mark.parametrize(("chunk", "shards"), [(16, 1), (2, 1), (4, 4)])
def test_chunked_equals_unchunked_in_value_and_gradient(name, top_k, tail, chunk, shards):
    config = DivergenceConfig(name, top_k, tail, temperature=0.7)
    inputs = arguments()

    def chunked(head, student):
        # The factor 3 asks the backward pass to scale.
        total, _ = chunked_loss(config, chunk, shards, head, student, *inputs[2:])
        return 3 * total

    def whole(head, student):
        return 3 * plain(config, head, student, *inputs[2:])

    got = jax.value_and_grad(chunked, argnums=(0, 1))(*inputs[:2])
    expected = jax.value_and_grad(whole, argnums=(0, 1))(*inputs[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)
    np.testing.assert_allclose(chunked(*inputs[:2]), got[0], rtol=1e-6)


def test_what_is_known_per_token():
    head, student, teacher_head, teacher, tokens, weights = inputs = arguments(rows=2)
    config = DivergenceConfig()
    _, known = chunked_loss(config, 4, 1, *inputs)
    log_p = jax.nn.log_softmax(logits(head, student))
    log_q = jax.nn.log_softmax(logits(teacher_head, teacher))
    expected = (
        reverse_kl(log_p, log_q),
        jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0],
        jnp.take_along_axis(log_q, tokens[..., None], -1)[..., 0],
        -jnp.sum(jnp.exp(log_p) * log_p, -1),
    )
    for got, wanted in zip(known, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    total, _ = chunked_loss(config, 4, 1, *inputs)
    np.testing.assert_allclose(total, jnp.sum(known.divergence * weights), rtol=1e-5)


@pytest.mark.parametrize("top_k", [0, 7])
def test_eight_devices_give_the_loss_of_one_and_send_no_logits(top_k):
    """Half of the vocabulary on each part of `tensor`: 48 of 96 logits, which stay there."""
    inputs = arguments()
    mesh, config = eight_devices(), DivergenceConfig(top_k=top_k)
    step = jax.jit(jax.value_and_grad(lambda *a: chunked_loss(config, 4, 4, *a)[0], argnums=(0, 1)))
    one = jax.value_and_grad(lambda *a: plain(config, *a), argnums=(0, 1))(*inputs)
    with jax.set_mesh(mesh):
        heads = named(mesh, "vocab", None)
        placed = [jax.device_put(x, heads) if i in (0, 2) else x for i, x in enumerate(inputs)]
        text = step.lower(*placed).compile().as_text()
        eight = step(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one)
    sent = re.findall(r"= (.*?) all-gather\(", text)
    widths = [int(n) for shapes in sent for n in re.findall(r",(\d+)\]", shapes)]
    assert VOCAB not in widths and (not top_k or 2 * top_k in widths)


def test_no_array_of_all_logits_is_made():
    """Temporaries of a long response stay those of a chunk: far below B x T x V floats."""
    shape = jax.ShapeDtypeStruct
    hidden = shape((4, 512, WIDTH), jnp.float32)
    head = shape((8192, WIDTH), jnp.float32)
    rest = shape((4, 512), jnp.int32), shape((4, 512), jnp.float32)
    step = jax.jit(
        jax.grad(
            lambda h, s, th, t, i, w: chunked_loss(DivergenceConfig(), 8, 1, h, s, th, t, i, w)[0],
            argnums=(0, 1),
        )
    )
    compiled = step.lower(head, hidden, head, hidden, *rest).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512 * 8192 * 4 / 4
