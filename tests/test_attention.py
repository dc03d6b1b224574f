"""Attention's backends against the plain XLA code of attention.py, forward and backward.

splash runs as it is, interpreted. Of cuDNN the arguments are tested, by XLA's code behind the same
function, and that it lowers for CUDA; a test that needs a GPU compares the numbers themselves.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import (
    CONFIG,
    F32,
    GEMMA,
    OLMO,
    eight_devices,
    params_on,
    told_apart,
    toy_batch,
    toy_groups,
    toy_params,
    write_model_folder,
)

from pmd_jax.distill.batch import DistillBatch, build_batch, place
from pmd_jax.policy import attention, kernels, model
from pmd_jax.policy.kernels import choose_attention
from pmd_jax.policy.policy import load_policy
from pmd_jax.policy.sharding import constrain, single_device_mesh

KERNELS = ("splash", "cudnn")
BF16 = jnp.dtype("bfloat16")
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
        "suffix": batch.suffix,
        "suffix_length": batch.suffix_length,
        "response": batch.response,
    }


def student_and_gradients(params, batch, config, remat="context"):
    """Hidden states of both sides where the responses are real, and gradients of the student."""
    batch = DistillBatch(*map(jnp.asarray, batch))
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


@pytest.mark.parametrize(
    ("name", "config", "remat"),
    [
        ("splash", CONFIG, "context"),
        ("splash", OLMO, "context"),
        ("cudnn", OLMO, "context"),
        pytest.param("splash", GEMMA, "full", marks=pytest.mark.slow),
        pytest.param("splash", OLMO, "none", marks=pytest.mark.slow),
        pytest.param("cudnn", GEMMA, "none", marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else x.family,
)
def test_student_and_teacher_equal_the_reference_whatever_their_layers_see(name, config, remat):
    """Layers are scanned: which of them slide is known only while the program runs."""
    batch, params = toy_batch(num_groups=2), toy_params(config=config)
    ours = student_and_gradients(params, batch, dataclasses.replace(config, attention=name), remat)
    assert_trees_close(ours, student_and_gradients(params, batch, config, remat))


@pytest.mark.parametrize("name", KERNELS)
def test_ends_of_teacher_prompts_in_the_rows_of_responses_equal_the_reference(name):
    batch, params = build_batch(told_apart(toy_groups(num_groups=2))), toy_params(config=OLMO)
    assert batch.suffix.shape[2] > 0
    ours, _ = student_and_gradients(params, batch, dataclasses.replace(OLMO, attention=name))
    assert_trees_close(ours, student_and_gradients(params, batch, OLMO)[0])


@pytest.mark.parametrize("name", KERNELS)
def test_eight_devices_equal_one(name):
    """Rows and heads are cut over the mesh, and the kernel runs on each part."""
    qkv, valid, rest = groups(2, n=4)
    config = with_attention(name)

    def cut(*qkv):
        *qkv, index = (constrain(x, "batch") for x in (*qkv, rest[3]))
        qkv = [constrain(x, "batch", None, "heads", None) for x in qkv]
        return kernels.grouped(*qkv, *rest[:3], index, WINDOW, config)

    reference = out_and_gradients(lambda *qkv: attention.grouped(*qkv, *rest, WINDOW), valid, *qkv)
    with jax.set_mesh(eight_devices()):
        ours = out_and_gradients(cut, valid, *qkv)
    assert len(ours[0].sharding.device_set) == 8
    assert_trees_close(ours, reference, atol=2e-5)


def test_rows_that_the_devices_do_not_divide_are_computed_on_all():
    q, k, v = normals((3, 20, 4, 8), (3, 20, 2, 8), (3, 20, 2, 8))
    with jax.set_mesh(eight_devices()):
        out = jax.jit(lambda *qkv: kernels.causal(*qkv, None, with_attention("cudnn")))(q, k, v)
    np.testing.assert_allclose(out, attention.causal(q, k, v), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_student_and_teacher_on_eight_devices_equal_those_on_one(name):
    mesh, batch, config = eight_devices(), toy_batch(), dataclasses.replace(OLMO, attention=name)
    params = params_on(mesh, config=OLMO)  # random numbers want no mesh of Auto axes around them
    with jax.set_mesh(mesh):
        ours = student_and_gradients(params, place(batch, mesh), config)
    assert_trees_close(ours, student_and_gradients(toy_params(config=OLMO), batch, OLMO))


@pytest.fixture
def on_cuda(monkeypatch):
    """Programs are traced as for a GPU; JAX asks the machine for its cuDNN, which it may lack."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "IMPLEMENTATION", "cudnn")


def gradient_of_a_student(config, remat):
    params = model.abstract_params(config, single_device_mesh(), BF16)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in dual_batch(toy_batch()).items()
    }

    def loss(params, batch):
        run = functools.partial(model.dual_hidden, config=config, dtype=BF16, remat=remat)
        return run(params, None, **batch)[0].sum()

    return jax.jit(jax.grad(loss)).trace(params, shapes)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("splash", "name=splash_mha_fwd"), ("cudnn", "dot_product_attention_fwd_wrapper[")],
)
def test_remat_context_computes_no_attention_twice(on_cuda, name, kernel):
    """One kernel for prompts and one for responses; nothing reads what the teacher computes."""
    from jax._src.interpreters.partial_eval import dce_jaxpr  # as XLA will drop what nothing reads

    count = {}
    for remat in ("context", "full", "none"):
        traced = gradient_of_a_student(dataclasses.replace(CONFIG, attention=name), remat)
        program, _ = dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars))
        count[remat] = str(program).count(kernel)
    assert count == {"context": 2, "full": 4, "none": 2}


@pytest.mark.parametrize("config", [CONFIG, OLMO], ids=lambda c: c.family)
def test_cudnn_lowers_for_cuda(on_cuda, config):
    config = dataclasses.replace(config, attention="cudnn")
    program = gradient_of_a_student(config, "context").lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn$fmhaSoftmax(" in program and "cudnn$fmhaSoftmaxBackward(" in program
    calls = {line for line in program.splitlines() if "cudnn$fmha" in line}
    windows = {0, config.window} if any(config.sliding) else {0}
    found = {
        int(n) for line in calls for n in re.findall(r"sliding_window_length\\22: (\d+)", line)
    }
    assert found == windows


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU and PMD_TEST_PLATFORM=cuda")
@pytest.mark.parametrize("window", [None, WINDOW])
def test_cudnn_on_a_gpu_equals_the_reference(monkeypatch, window):
    """Run it there with JAX_PLATFORMS=cuda; conftest.py asks for CPUs."""
    monkeypatch.setattr(kernels, "IMPLEMENTATION", "cudnn")
    qkv, valid, rest = groups(2, dtype=BF16)
    config = with_attention("cudnn")
    assert_same(
        lambda *qkv: kernels.grouped(*qkv, *rest, window, config),
        lambda *qkv: attention.grouped(*qkv, *rest, window),
        valid,
        *qkv,
        atol=0.1,
    )


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "chosen", "reason"),
    [
        ("cpu", "", "bfloat16", 128, "xla", ""),
        ("tpu", "", "float32", 64, "splash", ""),
        ("tpu", "", "bfloat16", 256, "splash", ""),
        ("tpu", "", "bfloat16", 192, "xla", "at most 128 or a multiple of it; got 192"),
        ("gpu", "9.0", "bfloat16", 256, "cudnn", ""),
        ("gpu", "8.0", "bfloat16", 128, "cudnn", ""),
        ("gpu", "8.0", "bfloat16", 256, "xla", "at most 128, a multiple of 8; got 256"),
        ("gpu", "9.0", "bfloat16", 100, "xla", "at most 256, a multiple of 8; got 100"),
        ("gpu", "7.5", "bfloat16", 64, "xla", "capability 8.0 or later; got 7.5"),
        ("gpu", "9.0", "float32", 64, "xla", "bfloat16 alone; model.dtype is float32"),
        ("gpu", "gfx942", "bfloat16", 64, "xla", "NVIDIA GPUs alone"),
    ],
)
def test_auto_takes_the_platform_s_kernel_or_says_why_not(
    platform, capability, dtype, head_dim, chosen, reason
):
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    name, said = choose_attention("auto", config, dtype, platform, capability)
    assert name == chosen and reason in said and bool(reason) == bool(said)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("asked", "platform", "message"),
    [
        (
            "splash",
            "cpu",
            "splash runs on TPU alone; the devices are cpu; use attention auto or xla",
        ),
        (
            "cudnn",
            "tpu",
            "cudnn runs on NVIDIA GPUs alone; the devices are tpu; use .* auto or xla",
        ),
        ("cudnn", "gpu", "bfloat16 alone; model.dtype is float32; use attention auto or xla"),
        ("flash", "cpu", "must be one of auto, xla, splash, cudnn; got 'flash'"),
    ],
)
def test_a_backend_asked_for_by_name_runs_or_is_refused(asked, platform, message):
    with pytest.raises(ValueError, match=f"^attention: .*{message}"):
        choose_attention(asked, CONFIG, "float32", platform, "9.0")
    assert choose_attention("xla", CONFIG, "float32", platform) == ("xla", "")


def test_the_setting_reaches_the_model(tmp_path):
    folder = write_model_folder(tmp_path / "toy")
    assert load_policy(folder, dtype="float32").config.attention == "xla"
    with pytest.raises(ValueError, match="splash runs on TPU alone; the devices are cpu"):
        load_policy(folder, dtype="float32", attention="splash")
