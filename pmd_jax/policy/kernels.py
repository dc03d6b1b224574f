"""Attention by the accelerator's own kernels, which never write the scores: splash and cuDNN.

xla      attention.py, everywhere: the reference that the kernels are tested against
splash   on TPU: JAX's Pallas kernel, its masks static; elsewhere it is interpreted, for tests
cudnn    on NVIDIA GPUs: flash attention of cuDNN, bfloat16

`choose_attention` picks one; `ModelConfig.attention` carries it; `causal` and `grouped` compute
what their namesakes in attention.py do. Both kernels want masks that hold for all rows alike,
though prompts differ in length. So a response's prompt is moved until distances are those of
columns: against the response for splash, [pad, prompt, response], with segment ids to hide the pad;
to the start of the row for cuDNN, [prompt, response, pad], which causality hides, with queries that
nobody reads in the prompt's columns, since cuDNN aligns queries and keys by their first columns.

Axes as in attention.py: B rows, N groups, S prompts of a group, P prompt columns, G rollouts of a
group, T response tokens, H query heads, K key-value heads, d head width; also C key columns.
Left out: decoding, which reads a cache and writes few scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pmd_jax.policy import attention
from pmd_jax.policy.attention import Window
from pmd_jax.policy.families import Attention, ModelConfig
from pmd_jax.policy.sharding import batch_shards, spec

LANES = 128  # of a TPU: splash's blocks are multiples of it
LARGEST_BLOCK = 512
CUDNN_COLUMNS = 64  # cuDNN's tiles: columns are padded to a multiple
CONTEXT = "context"  # what remat "context" keeps, by name

# --- the choice ---------------------------------------------------------------------------------


def unfit(name: Attention, config: ModelConfig, dtype: Any, platform: str, capability: str) -> str:
    """The rule that forbids a kernel for this model here, with what it met; "" if there is none.

    platform: of the devices, "cpu", "gpu" or "tpu". capability: of a GPU, such as "9.0".
    """
    width, dtype = config.head_dim, jnp.dtype(dtype).name
    if name == "splash":
        if platform != "tpu":
            return f"splash runs on TPU alone; the devices are {platform}"
        if width > LANES and width % LANES:
            return f"splash needs a head_dim of at most {LANES} or a multiple of it; got {width}"
    if name == "cudnn":
        if platform != "gpu" or not re.fullmatch(r"\d+\.\d+", capability):
            return f"cudnn runs on NVIDIA GPUs alone; the devices are {platform}"
        if dtype not in ("bfloat16", "float16"):
            return f"cudnn computes in bfloat16 alone; model.dtype is {dtype}"
        if float(capability) < 8:
            return f"cudnn needs a GPU of compute capability 8.0 or later; got {capability}"
        most = 256 if float(capability) >= 9 else 128
        if width > most or width % 8:
            return f"cudnn needs a head_dim of at most {most}, a multiple of 8; got {width}"
    return ""


def choose_attention(
    asked: str, config: ModelConfig, dtype: Any, platform: str, capability: str = ""
) -> tuple[Attention, str]:
    """The backend to run, and why "auto" did not take the platform's kernel, or "".

    Raises ValueError for a backend asked for by name that cannot run here, or is unknown.
    """
    if asked not in ("auto", "xla", "splash", "cudnn"):
        raise ValueError(f"attention: must be one of auto, xla, splash, cudnn; got {asked!r}")
    own: dict[str, Attention] = {"tpu": "splash", "gpu": "cudnn"}
    names: dict[str, Attention] = {"xla": "xla", "splash": "splash", "cudnn": "cudnn"}
    name = own.get(platform, "xla") if asked == "auto" else names[asked]
    rule = unfit(name, config, dtype, platform, capability)
    if rule and asked != "auto":
        raise ValueError(f"attention: {rule}; use attention auto or xla")
    return ("xla", f"attention: plain xla, since {rule}") if rule else (name, "")


def choose_for(
    asked: str, config: ModelConfig, dtype: Any, device: jax.Device
) -> tuple[Attention, str]:
    """`choose_attention` for the device that will compute."""
    capability = str(getattr(device, "compute_capability", ""))
    return choose_attention(asked, config, dtype, device.platform, capability)


# --- the interface ------------------------------------------------------------------------------


def causal(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    window: Window,
    config: ModelConfig,
) -> Float[Array, "B T H d"]:
    """attention.causal by the backend of the model's configuration."""
    if config.attention == "xla":
        return checkpoint_name(attention.causal(q, k, v, window), CONTEXT)
    rows = ROWS[config.attention]

    def attend(window: int | None) -> Array:
        return _on_each_device(partial(rows, window=window), q, k, v)

    return _by_window(attend, window, config)


def grouped(
    q: Float[Array, "N tokens H d"],
    k: Float[Array, "N tokens K d"],
    v: Float[Array, "N tokens K d"],
    prompts: int,
    rollouts: int,
    prompt_len: Int[Array, "N S"],
    prompt_of: Int[Array, "N G"],
    window: Window,
    config: ModelConfig,
) -> Float[Array, "N tokens H d"]:
    """attention.grouped by the backend of the model's configuration."""
    if config.attention == "xla":
        out = attention.grouped(q, k, v, prompts, rollouts, prompt_len, prompt_of, window)
        return checkpoint_name(out, CONTEXT)

    def attend(window: int | None) -> Array:
        run = partial(
            _grouped, prompts=prompts, rollouts=rollouts, window=window, backend=config.attention
        )
        return _on_each_device(run, q, k, v, prompt_len, prompt_of)

    return _by_window(attend, window, config)


def saveable(primitive: Any, *_: Any, **params: Any) -> bool:
    """The policy of remat "context": keep what attention made, and what its backward pass needs.

    Splash's output and log-sum-exp carry the name; those of cuDNN are known by their operation.
    """
    named = jax.checkpoint_policies.save_only_these_names(CONTEXT)
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *_, **params)


def _by_window(attend: Callable[[int | None], Array], window: Window, config: ModelConfig) -> Array:
    """Kernels know their window when compiled; in a scan over layers it is known when run."""
    if window is None or isinstance(window, int):
        return attend(window)
    slides = window == config.window
    return lax.cond(slides, lambda: attend(config.window), lambda: attend(None))


def _on_each_device(
    attend: Callable[..., Array], q: Array, k: Array, v: Array, *rest: Array
) -> Array:
    """Runs on each device's rows and heads: the partitioner cannot look into a kernel.

    Rows that the devices do not divide, as few prompts of a prefill, are computed on all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v, *rest)
    batch = None if q.shape[0] % batch_shards(mesh) else "batch"
    heads, rows = spec(batch, None, "heads", None), PartitionSpec(*spec(batch))
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, *[rows] * len(rest)),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, *rest)


# --- groups as rows -----------------------------------------------------------------------------


def _slices(x: Float[Array, "B C ..."], start: Int[Array, " B"], length: int) -> Array:
    """x[b, start[b] : start[b] + length] of each row b."""
    return jax.vmap(lambda row, first: lax.dynamic_slice_in_dim(row, first, length))(x, start)


def _columns(x: Array, before: int, after: int) -> Array:
    """Zeros before and after the columns of each row."""
    return jnp.pad(x, ((0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)))


def _grouped(
    q: Array,
    k: Array,
    v: Array,
    prompt_len: Int[Array, "N S"],
    prompt_of: Int[Array, "N G"],
    prompts: int,
    rollouts: int,
    window: int | None,
    backend: Attention,
) -> Array:
    """The prompts as rows of their own, then each response as a row behind its prompt."""
    n, num_prompts = prompt_len.shape
    length = prompts // num_prompts

    def rows(x: Array) -> tuple[Array, Array]:
        ahead = x[:, :prompts].reshape(n * num_prompts, length, *x.shape[2:])
        return ahead, x[:, prompts:].reshape(n * rollouts, -1, *x.shape[2:])

    def behind_prompt(ahead: Array, own: Array) -> Array:
        """[pad, prompt, own] of each response."""
        aligned = _slices(_columns(ahead, length, 0), prompt_len.reshape(-1), length)
        aligned = aligned.reshape(n, num_prompts, *aligned.shape[1:])
        if num_prompts == 1:
            each = jnp.broadcast_to(aligned, (n, rollouts, *aligned.shape[2:]))
        else:
            index = prompt_of.reshape(n, rollouts, *[1] * (aligned.ndim - 2))
            each = jnp.take_along_axis(aligned, index, axis=1)
        return jnp.concatenate([each.reshape(n * rollouts, *aligned.shape[2:]), own], axis=1)

    (prompt_q, own_q), (prompt_k, own_k), (prompt_v, own_v) = rows(q), rows(k), rows(v)
    ahead = ROWS[backend](prompt_q, prompt_k, prompt_v, window=window)
    own_k, own_v = behind_prompt(prompt_k, own_k), behind_prompt(prompt_v, own_v)
    seen = jnp.take_along_axis(prompt_len, prompt_of, axis=1).reshape(-1)
    behind = RESPONSES[backend](own_q, own_k, own_v, length - seen, window=window)
    return jnp.concatenate([x.reshape(n, -1, *q.shape[2:]) for x in (ahead, behind)], axis=1)


# --- splash -------------------------------------------------------------------------------------


def _interpreted() -> bool:
    """Whether splash runs without a TPU: exactly, and slowly."""
    return jax.default_backend() != "tpu"


def _blocks(columns: int) -> tuple[int, int]:
    """The size of splash's blocks for so many columns, and the columns that they fill."""
    count = -(-columns // LARGEST_BLOCK)
    size = -(-columns // (count * LANES)) * LANES
    return size, count * size


def _splash(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B C K d"],
    v: Float[Array, "B C K d"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B C"]] | None,
    window: int | None,
) -> Float[Array, "B T H d"]:
    """The last query stands at the last key. T and C are multiples of their blocks.

    Only keys of a query's own segment are read; None: all are of one.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # slow to import
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (readers, heads, width), read = q.shape[1:], k.shape[1]
    (own, _), (other, _) = _blocks(readers), _blocks(read)
    shape, offset = (readers, read), read - readers
    mask = (
        masks.CausalMask(shape, offset)
        if window is None
        else masks.LocalMask(shape, (window - 1, 0), offset)
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=own,
            block_kv=other,
            block_q_dkv=own,
            block_kv_dkv=other,
            block_q_dq=own,
            block_kv_dq=other,
        ),
        residual_checkpoint_name=CONTEXT,
        interpret=_interpreted(),
    )
    ids = None if segments is None else splash.SegmentIds(*segments)
    q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))  # the kernel does not scale
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


def splash_rows(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Causal rows. Their padding stands behind, where causality hides it."""
    columns = q.shape[1]
    more = _blocks(columns)[1] - columns
    q, k, v = (_columns(x, 0, more) for x in (q, k, v))
    return _splash(q, k, v, None, window)[:, :columns]


def splash_responses(
    q: Array, k: Array, v: Array, first: Int[Array, " B"], window: int | None
) -> Array:
    """Responses that read [pad, prompt, own]; `first` is the column where the prompt begins.

    Padding to blocks stands before: then the last query still stands at the last key.
    """
    (readers, read), columns = (q.shape[1], k.shape[1]), q.shape[1]
    more_q, more = _blocks(readers)[1] - readers, _blocks(read)[1] - read
    q, k, v = _columns(q, more_q, 0), _columns(k, more, 0), _columns(v, more, 0)
    seen = jnp.arange(k.shape[1]) >= more + first[:, None]
    ids = jnp.ones(q.shape[:2], jnp.int32), seen.astype(jnp.int32)
    return _splash(q, k, v, ids, window)[:, -columns:]


# --- cuDNN --------------------------------------------------------------------------------------

IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"  # tests put "xla", which runs anywhere


def cudnn_rows(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Causal rows. Their padding stands behind, where causality hides it."""
    columns = q.shape[1]
    q, k, v = (_columns(x, 0, -columns % CUDNN_COLUMNS) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=IMPLEMENTATION,
    )
    return out[:, :columns]


def cudnn_responses(
    q: Array, k: Array, v: Array, first: Int[Array, " B"], window: int | None
) -> Array:
    """Responses that read [pad, prompt, own]; `first` is the column where the prompt begins."""
    (readers, read), length = (q.shape[1], k.shape[1]), k.shape[1] - q.shape[1]
    q, k, v = _columns(q, length, length), _columns(k, 0, length), _columns(v, 0, length)
    q, k, v = (_slices(x, first, read) for x in (q, k, v))
    out = cudnn_rows(q, k, v, window)
    return _slices(out, length - first, readers)


ROWS: dict[str, Callable[..., Array]] = {"splash": splash_rows, "cudnn": cudnn_rows}
RESPONSES: dict[str, Callable[..., Array]] = {
    "splash": splash_responses,
    "cudnn": cudnn_responses,
}
