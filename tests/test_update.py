"""The training step: what it must not change, and what no split of the work may change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import (
    CONFIG,
    F32,
    each_alone,
    eight_devices,
    params_on,
    told_apart,
    toy_batch,
    toy_groups,
    toy_params,
)

from pmd_jax.distill.batch import (
    DistillBatch,
    DistillGroup,
    build_batch,
    build_batches,
    padding_fraction,
    place,
)
from pmd_jax.distill.divergence import DivergenceConfig
from pmd_jax.distill.objectives import DistillConfig, distill_loss, loss_weights
from pmd_jax.distill.update import (
    OptimizerConfig,
    init_state,
    learning_rate,
    loss_and_gradients,
    make_optimizer,
    make_probe,
    make_train_step,
    rollout_losses,
)
from pmd_jax.policy.sharding import single_device_mesh
from pmd_jax.records import Rollout

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)


@functools.partial(jax.jit, static_argnums=2)
def _gradients(params, batch, config):
    return loss_and_gradients(params, None, batch, config, CONFIG, F32, 1)


def gradients(batch, config=None):
    return _gradients(
        toy_params(), DistillBatch(*map(jnp.asarray, batch)), config or DistillConfig()
    )


def trained(config=None, mesh=None, batch=None, steps=1, optimizer=OPTIMIZER):
    """The state after some steps on the same batch, the reports, and the step function."""
    mesh, config = mesh or single_device_mesh(), config or DistillConfig()
    ema = config.teacher == "ema"
    state = init_state(params_on(mesh), CONFIG, make_optimizer(optimizer, CONFIG), mesh, ema)
    step = make_train_step(CONFIG, optimizer, config, mesh, F32)
    batch = batch if batch is not None else toy_batch()
    placed = [place(part, mesh) for part in (batch if isinstance(batch, list) else [batch])]
    reports = []
    for _ in range(steps):
        state, report = step(state, *placed)
        reports.append(report)
    return state, reports, step


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=tolerance), a, b)


def test_the_same_prompt_and_weights_give_no_loss_and_no_gradient():
    loss, known, grads = gradients(toy_batch(same_prompts=True))
    assert abs(float(loss)) < 1e-6
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5
    assert float(jnp.abs(known.divergence).max()) < 1e-5


def test_another_prompt_gives_a_loss_and_a_gradient():
    loss, _, grads = gradients(toy_batch())
    assert float(loss) > 0.05
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


def test_no_gradient_reaches_the_teacher():
    batch = DistillBatch(*map(jnp.asarray, toy_batch()))
    weights = loss_weights(batch, DistillConfig())

    def loss(teacher):
        config = DistillConfig()
        return distill_loss(toy_params(0), teacher, batch, weights, config, CONFIG, F32, 1)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(toy_params(1))
    assert value > 0.05
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_a_rollout_without_guidance_has_no_weight_and_no_effect():
    batch = toy_batch()
    changed = batch.response.copy()
    changed[:, -1] = (changed[:, -1] + 7) % CONFIG.vocab_size  # the unguided rollouts
    loss, _, grads = gradients(batch)
    other_loss, _, other_grads = gradients(batch._replace(response=changed))
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    assert_close(grads, other_grads, 1e-7)


def test_a_probe_reads_what_the_step_would_and_changes_nothing():
    mesh, config = single_device_mesh(), DistillConfig()
    _, [report], _ = trained()
    state = init_state(params_on(mesh), CONFIG, make_optimizer(OPTIMIZER, CONFIG), mesh, False)
    known = make_probe(CONFIG, config, mesh, F32)(state, place(toy_batch(), mesh))
    assert_close(known, report.per_token)
    assert float(jnp.abs(known.divergence).max()) > 0.05
    assert_close(state.params, toy_params(), 0)


def test_weights_by_hand():
    """Two rollouts of 3 and 1 tokens and one of 2 without guidance."""
    batch = toy_batch()._replace(
        response=np.zeros((1, 3, 4), np.int32),
        response_length=np.array([[3, 1, 2]]),
        has_guidance=np.array([[True, True, False]]),
    )
    token = loss_weights(batch, DistillConfig())[0]
    np.testing.assert_allclose(token, [[0.25] * 3 + [0], [0.25, 0, 0, 0], [0] * 4])
    sequence = loss_weights(batch, DistillConfig(normalisation="sequence_mean"))[0]
    np.testing.assert_allclose(sequence, [[1 / 9] * 3 + [0], [1 / 3, 0, 0, 0], [0] * 4])


@pytest.mark.parametrize("normalisation", ["token_mean", "sequence_mean"])
def test_one_micro_batch_equals_four(normalisation):
    config = DistillConfig(normalisation=normalisation)
    whole = gradients(toy_batch(), config)
    cut = gradients(toy_batch(), dataclasses.replace(config, micro_batch=1))
    assert_close(cut, whole, 1e-6)


def test_empty_groups_change_nothing():
    plain, padded = gradients(toy_batch()), gradients(toy_batch(multiple_of=8))
    np.testing.assert_allclose(plain[0], padded[0], rtol=1e-5)
    assert_close(plain[2], padded[2], 1e-6)


@pytest.mark.parametrize("teacher", ["current", "ema"])
def test_one_step_on_eight_devices_equals_one_on_one(teacher):
    config = DistillConfig(teacher=teacher, micro_batch=4, chunk_tokens=32)
    batch = toy_batch(num_groups=8)
    one, (report,), _ = trained(config, batch=batch)
    eight, (other,), _ = trained(config, eight_devices(), batch)
    np.testing.assert_allclose(other.loss, report.loss, rtol=1e-5)
    np.testing.assert_allclose(other.grad_norm, report.grad_norm, rtol=1e-4)
    assert_close(jax.device_get(eight.params), jax.device_get(one.params), 1e-4)
    assert_close(other.per_token, report.per_token)


def test_the_loss_falls_when_trained_and_the_batch_is_repeated():
    optimizer = dataclasses.replace(OPTIMIZER, learning_rate=3e-3)
    config = DistillConfig(teacher="ema", ema_rate=0.0)
    _, reports, _ = trained(config, steps=12, optimizer=optimizer)
    losses = [float(r.loss) for r in reports]
    assert losses[-1] < 0.5 * losses[0]


def test_learning_rate_zero_freezes_the_policy():
    frozen = dataclasses.replace(OPTIMIZER, learning_rate=0.0)
    state, _, _ = trained(optimizer=frozen)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), toy_params())
    assert int(state.step) == 1


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_ema_teacher_moves_by_its_rate(rate):
    state, _, _ = trained(DistillConfig(teacher="ema", ema_rate=rate))
    expected = jax.tree.map(lambda t, s: t + rate * (s - t), toy_params(), state.params)
    assert_close(state.teacher, expected, 1e-6)
    moved = np.abs(np.asarray(state.teacher["embed"]) - toy_params()["embed"]).max()
    assert (moved > 0) == (rate > 0)


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
    mesh = single_device_mesh()
    optimizer = make_optimizer(OPTIMIZER, CONFIG)
    params = params_on(mesh)
    params["final_norm"] = params["final_norm"].at[0].set(jnp.nan)
    before = jax.device_get(params)
    state = init_state(params, CONFIG, optimizer, mesh, False)
    step = make_train_step(CONFIG, OPTIMIZER, DistillConfig(), mesh, F32)
    state, report = step(state, place(toy_batch(), mesh))
    assert not report.finite
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_warm_up_is_linear_then_constant():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    rates = [float(learning_rate(config, i)) for i in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_norms_and_embeddings_do_not_decay():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, CONFIG)
    params = toy_params()
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layers"]["q"], -0.5 * params["layers"]["q"], rtol=1e-6)
    for still in (updates["embed"], updates["final_norm"], updates["layers"]["attn_norm"]):
        assert (np.asarray(still) == 0).all()


def test_repeated_shapes_compile_once():
    _, _, step = trained(steps=3)
    assert step.jitted._cache_size() == 1


def test_rollout_losses_are_means_over_their_tokens():
    batch = toy_batch()
    _, (report,), _ = trained(batch=batch)
    losses = rollout_losses(report, batch)
    n = batch.response_length[0, 1]
    np.testing.assert_allclose(
        losses[0, 1], report.per_token.divergence[0, 1, :n].mean(), rtol=1e-5
    )


def test_the_gap_to_the_sampler_is_measured():
    batch = toy_batch()
    _, (report,), _ = trained(batch=batch)
    exact = batch._replace(sampled_logprobs=np.asarray(report.per_token.student))
    _, (matched,), _ = trained(batch=exact)
    assert float(report.logprob_gap) > 0.1
    assert float(matched.logprob_gap) < 1e-5


def test_identical_teacher_prompts_are_stored_once():
    batch = build_batch(toy_groups(num_groups=2))
    assert batch.teacher_prompt.shape[1] == 2
    assert batch.prompt_of.tolist() == [[0, 1, 0, 1]] * 2
    assert 0 < padding_fraction(batch) < 1


# --- teacher prompts that begin alike ------------------------------------------------------------


def rollouts(*responses):
    return [
        Rollout("toy", 0, 0, "", np.int32(r), np.zeros(len(r), np.float32), "stop")
        for r in responses
    ]


def laid_out(*teachers, bucket_tokens=4):
    """The batch of groups with these teacher prompts, each group a list."""
    groups = [
        DistillGroup([1, 2], prompts, [True] * len(prompts), rollouts(*[[8, 9]] * len(prompts)))
        for prompts in teachers
    ]
    return build_batch(groups, bucket_tokens=bucket_tokens)


def test_a_common_beginning_is_stored_once_and_the_ends_by_rollout():
    alike = list(range(10, 46))
    batch = laid_out([[*alike, 5, 6, 7], [*alike, 5], [*alike, 4], [*alike]])
    assert batch.teacher_prompt.tolist() == [[alike + [0] * 4]]
    assert batch.teacher_length.tolist() == [[36]]
    assert batch.prompt_of.tolist() == [[0, 0, 0, 0]]
    assert batch.suffix.shape == (1, 4, 16)
    assert batch.suffix[0, :, :4].tolist() == [[5, 6, 7, 0], [5, 0, 0, 0], [4, 0, 0, 0], [0] * 4]
    assert batch.suffix_length.tolist() == [[3, 1, 1, 0]]
    used = 2 + 36 + 5 + 2 * 4 * 2  # student, teacher's beginning, ends, responses on both sides
    size = 4 + 40 + 4 * 16 + 2 * 4 * 16
    assert padding_fraction(batch) == pytest.approx(1 - used / size)


def test_the_layout_that_computes_fewer_tokens_is_chosen():
    def ending(length, size):
        return [[3] * length + [4 + g] * size for g in range(4)]

    def shapes(*teachers):
        batch = laid_out(*teachers)
        return batch.teacher_prompt.shape[1:], batch.suffix.shape[2]

    assert shapes(ending(19, 1)) == ((4, 20), 0)  # 4 x 20 against 20 + 4 x 16: equal
    assert shapes(ending(23, 1)) == ((1, 24), 16)  # 4 x 24 against 24 + 4 x 16
    assert shapes(ending(23, 17)) == ((1, 24), 32)  # 4 x 40 against 24 + 4 x 32
    assert shapes(ending(0, 40)) == ((4, 40), 0)  # nothing is shared
    assert shapes([[3] * 40] * 4) == ((1, 40), 0)
    two = [[3] * 40, [4] * 40, [4] * 40, [4] * 40]
    assert shapes(two) == ((2, 40), 0)
    assert shapes(two, ending(39, 1)) == ((2, 40), 16)  # whole and shared in one batch
    assert shapes(two, ending(0, 40)) == ((4, 40), 0)


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_shared_beginning_changes_no_number(micro_batch):
    groups = told_apart(toy_groups())
    batch, alone = build_batch(groups), build_batch(each_alone(groups))
    assert batch.suffix.shape[2] == 32 and batch.teacher_prompt.shape[1] == 1
    assert alone.suffix.shape[2] == 0 and len(alone.suffix) == 16
    loss, known, grads = gradients(batch, DistillConfig(micro_batch=micro_batch))
    expected, known_alone, grads_alone = gradients(alone)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_close(grads, grads_alone, 1e-5)
    assert_known_close(known, known_alone, batch)


def assert_known_close(known, other, batch):
    """Of the response tokens; `other` may be of each rollout alone."""
    mask = np.arange(batch.response.shape[2]) < batch.response_length[..., None]
    for name, a, b in zip(known._fields, known, other, strict=True):
        a, b = np.asarray(a)[mask], np.asarray(b).reshape(mask.shape)[mask]
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_whole_prompts_and_shared_beginnings_in_one_batch_change_no_number():
    groups = told_apart(toy_groups(), beginning=60)
    long = [[5] * 70, [6] * 70, [5] * 70, [6] * 70]
    groups[1] = dataclasses.replace(groups[1], teacher_prompts=long)
    batch = build_batch(groups)
    assert batch.teacher_prompt.shape[1] == 2 and batch.suffix.shape[2] == 32
    assert batch.prompt_of.tolist() == [[0] * 4, [0, 1, 0, 1], [0] * 4, [0] * 4]
    loss, known, grads = gradients(batch)
    expected, known_alone, grads_alone = gradients(build_batch(each_alone(groups)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_close(grads, grads_alone, 1e-5)
    assert_known_close(known, known_alone, batch)


@pytest.mark.slow
def test_a_shared_beginning_on_eight_devices_equals_each_rollout_alone_on_one():
    groups = told_apart(toy_groups(num_groups=8))
    batch = build_batch(groups)
    config = DistillConfig(micro_batch=4)
    eight, (report,), _ = trained(config, eight_devices(), batch)
    one, (other,), _ = trained(batch=build_batch(each_alone(groups)))
    np.testing.assert_allclose(report.loss, other.loss, rtol=1e-5)
    np.testing.assert_allclose(report.grad_norm, other.grad_norm, rtol=1e-4)
    assert_close(jax.device_get(eight.params), jax.device_get(one.params), 1e-4)
    assert_known_close(report.per_token, other.per_token, batch)


# --- length buckets ------------------------------------------------------------------------------


def of_lengths(*lengths):
    """Groups of one prompt token and two responses, the second of the given length."""
    return [
        DistillGroup([i], [[i]] * 2, [True] * 2, rollouts([1], [1] * length))
        for i, length in enumerate(lengths)
    ]


def test_groups_of_like_size_share_a_batch_and_keep_their_place():
    batches, rows = build_batches(of_lengths(3, 40, 20, 5, 30), count=2)
    assert [b.student_prompt[:, 0, 0].tolist() for b in batches] == [[1, 4, 2], [3, 0]]
    assert [b.response.shape for b in batches] == [(3, 2, 48), (2, 2, 16)]
    assert rows == [4, 0, 2, 3, 1]
    used = sum(2 + 2 * (1 + length) for length in (3, 40, 20, 5, 30))
    size = 3 * (2 * 64 + 4 * 48) + 2 * (2 * 64 + 4 * 16)
    assert padding_fraction(*batches) == pytest.approx(1 - used / size)


def test_empty_groups_are_among_the_smallest():
    batches, rows = build_batches(of_lengths(3, 40, 20, 5, 30), count=2, multiple_of=4)
    assert [b.student_prompt[:, 0, 0].tolist() for b in batches] == [[1, 4, 2, 3], [0, 0, 0, 0]]
    assert rows == [4, 0, 2, 3, 1]
    assert len(build_batches(of_lengths(3, 40), count=3, multiple_of=4)[0]) == 1


def uneven_groups(count):
    """Groups whose responses, up to 60 tokens, and prompts fall into several buckets."""
    groups = told_apart(toy_groups(num_groups=count))
    rng = np.random.default_rng(2)
    for i in range(0, count, 2):
        tokens = [rng.integers(1, 90, 30 + 7 * g + i) for g in range(4)]
        groups[i] = dataclasses.replace(groups[i], rollouts=rollouts(*tokens))
    return groups


@pytest.mark.parametrize(
    ("num_buckets", "devices", "config"),
    [
        (2, 1, DistillConfig()),
        pytest.param(
            3,
            1,
            DistillConfig(normalisation="sequence_mean", micro_batch=1, teacher="ema"),
            marks=pytest.mark.slow,
        ),
        pytest.param(2, 8, DistillConfig(micro_batch=4), marks=pytest.mark.slow),
    ],
    ids=["two", "sequences", "eight devices"],
)
def test_length_buckets_equal_one_batch(num_buckets, devices, config):
    groups = uneven_groups(4 * devices if devices > 1 else 6)
    mesh = eight_devices() if devices == 8 else single_device_mesh()
    batches, rows = build_batches(groups, num_buckets, 4 if devices == 8 else 1)
    assert len(batches) == num_buckets
    assert batches[0].response.shape[2] > batches[-1].response.shape[2]
    whole = build_batch(groups)
    one, (report,), _ = trained(dataclasses.replace(config, micro_batch=0), batch=whole)
    cut, (other,), _ = trained(config, mesh, batches)
    for name in ("loss", "grad_norm", "entropy", "logprob_gap", "learning_rate"):
        np.testing.assert_allclose(getattr(other, name), getattr(report, name), rtol=1e-5)
    assert_close(jax.device_get(cut), jax.device_get(one), 1e-5)
    in_order = type(other.per_token)(*(x[rows] for x in other.per_token))
    assert_known_close(in_order, report.per_token, whole)


def test_each_size_of_batch_compiles_once():
    batches, _ = build_batches(uneven_groups(4), 2)
    _, _, step = trained(batch=[*batches, batches[1]], steps=3)
    assert step.adding._cache_size() == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=-1), "learning_rate: must be at least 0; got -1"),
        (lambda: OptimizerConfig(beta2=1.0), r"beta2: must be in \[0, 1\); got 1.0"),
        (lambda: DistillConfig(length_buckets=0), "length_buckets: must be at least 1; got 0"),
        (lambda: DistillConfig(ema_rate=2), "ema_rate: must be between 0 and 1; got 2"),
        (lambda: DivergenceConfig(top_k=-1), "top_k: must be at least 0"),
    ],
)
def test_impossible_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
