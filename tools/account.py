"""The bytes that one device holds while a run samples and while it trains: tools/plan.py's account.

Counted: what the library's own code allocates, from the shapes that it allocates: weights,
moments, EMA, the sampler's copy, its cache and the one that follows it, the batch, what JAX keeps
for the backward pass.
Estimated: what XLA makes of the rest; tests/test_plan.py says how well.

Left out: evaluation, reflection and a second model that writes behaviors, with prompts and lengths
of their own; buffers of collectives; the framework's own share of a device's memory, so leave a
tenth free.

Axes as in model.py: N groups, S teacher prompts, P and Q prompt columns, G rollouts, U suffix
columns, T response tokens, D width, V vocabulary, L layers, H heads, d head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding

from pmd_jax.distill.objectives import chunk_length
from pmd_jax.distill.update import TrainState, make_optimizer
from pmd_jax.policy import cache
from pmd_jax.policy.attention import causal_blocks
from pmd_jax.policy.families import Attention, ModelConfig, weight_table
from pmd_jax.policy.model import Params, dual_hidden, stacked_axes, stacked_shape, tree_of
from pmd_jax.policy.scheduler import Shape, power_of_two, shape_for
from pmd_jax.policy.sharding import MeshConfig, single_device_mesh, spec
from tools.work import F32, Work, abstract_mesh


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of an account. exact: counted; else estimated."""

    name: str
    bytes: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one device holds at the fullest moment of a phase, which `moment` names."""

    moment: str
    lines: tuple[Line, ...]

    @property
    def bytes(self) -> int:
        return sum(line.bytes for line in self.lines)


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held_params(model: ModelConfig, mesh: AbstractMesh, dtype: Any) -> Params:
    """The shards of the parameters that one device holds, as shapes."""
    return tree_of(
        {
            weight.path: jax.ShapeDtypeStruct(
                NamedSharding(mesh, spec(*stacked_axes(weight))).shard_shape(
                    stacked_shape(weight, model)
                ),
                dtype,
            )
            for weight in weight_table(model)
        }
    )


def held_state(work: Work) -> TrainState:
    """What one device holds of the training state, as shapes (update.init_state)."""
    optimizer = make_optimizer(work.config.optimizer, work.model)

    def build(params: Params) -> TrainState:
        teacher = params if work.ema else None
        return TrainState(jnp.int32(0), params, teacher, optimizer.init(params))

    return jax.eval_shape(build, held_params(work.model, work.mesh, F32))


def whole_params(work: Work) -> Params:
    """The parameters in the dtype of computation, cut over `tensor` alone, as shapes."""
    whole = abstract_mesh(MeshConfig(1, 1, work.tensor), work.tensor)
    return held_params(work.model, whole, work.dtype)


def held_copy(work: Work) -> list[Any]:
    """What sampling adds to the weights, as shapes: whole over fsdp (programs.rollout_weights)."""
    params = whole_params(work)
    top = [leaf for name, leaf in params.items() if name in ("embed", "head")]
    new = work.dtype != work.held or work.mesh.shape["fsdp"] > 1
    return [params["layers"], *(top if new else [])]


def held_view(work: Work) -> Params:
    """The parameters once more, cut over the devices of one of several processes, as shapes.

    Prefill reads them; the sampler's copy is made of them (programs.LocalView).
    """
    cast = held_params(work.model, work.local.mesh, work.dtype)
    return cast | {"final_norm": jax.ShapeDtypeStruct(cast["final_norm"].shape, F32)}


def held_cache(work: Work, shape: Shape, columns: int = 0) -> Any:
    """One device's part of the state of sampling, as shapes (cache.empty_state).

    columns: of the ring; 0 is the full-grown one.
    """
    sizes = shape._replace(shards=1), work.columns[0], columns or work.columns[1]
    int8 = work.config.engine.kv_cache == "int8"
    return jax.eval_shape(
        lambda: cache.empty_state(work.slice, *sizes, single_device_mesh(), work.dtype, int8)
    )


def slots_of(work: Work, max_rows: int) -> Shape:
    """The tables in which the sampler of one process (`work.local`) puts its rollouts."""
    samples = work.config.rollout.rollouts_per_problem
    return shape_for(work.problems, samples, max_rows, work.shards)


def state_lines(work: Work) -> tuple[Line, ...]:
    state = held_state(work)
    lines = [
        Line("weights, float32", num_bytes(state.params)),
        Line("AdamW moments, float32", num_bytes((state.optimizer, state.step))),
    ]
    ema = [Line("EMA teacher, float32", num_bytes(state.teacher))] if work.ema else []
    return (*lines, *ema)


@dataclasses.dataclass(frozen=True)
class Side:
    """What one forward pass is about: tokens, and the (reader, read) pairs that it computes.

    Pairs of prompts and of responses exist one after the other, those of prompts in blocks, of
    which `block_pairs` exist at once. read: the columns of keys that all responses read together,
    where a kernel has them as rows.
    """

    tokens: int
    prompt_pairs: int
    block_pairs: int
    response_pairs: int = 0
    read: int = 0

    @property
    def pairs(self) -> int:
        return self.prompt_pairs + self.response_pairs


def row_pairs(attention: Attention, tokens: int, before: int = 0) -> int:
    """The pairs that a row computes, behind so many tokens that it reads as well.

    XLA computes all of them, of a prompt those of its blocks; kernels leave out what causality
    hides, but for parts of blocks, and cuDNN computes the tokens before as readers too. What
    windows hide is counted.
    """
    if attention == "xla":
        blocks = causal_blocks(tokens) if not before else 1
        return tokens * before + tokens * tokens * (blocks + 1) // (2 * blocks)
    hidden = tokens * (tokens - 1) // 2
    readers = before * (before + 1) // 2 if attention == "cudnn" else 0
    return readers + tokens * (before + tokens) - hidden


def block_pairs(tokens: int) -> int:
    """The pairs of a prompt that exist at once: XLA works on about two of its blocks together."""
    blocks = causal_blocks(tokens)
    return (tokens // blocks) ** 2 * (2 * blocks - 1 if blocks > 1 else 1)


def sides(work: Work, groups: int) -> tuple[Side, Side]:
    """Student and teacher of the fused forward over so many groups."""
    p, s, q, g, t = work.sizes
    pairs = functools.partial(row_pairs, work.model.attention)

    def side(prompts: int, length: int, own: int) -> Side:
        rows, responses = groups * prompts, groups * g
        return Side(
            rows * length + responses * own,
            rows * pairs(length),
            rows * block_pairs(length),
            responses * pairs(own, length),
            responses * (length + own),
        )

    return side(1, p, t), side(s, q, work.suffix + t)


# Arrays of one kind that XLA keeps at once, found by compiling (tests/test_plan.py).
SCORES_FORWARD = 3
SCORES_BACKWARD = 1  # beside those that the backward pass recomputes
SCORES_SAMPLED = 2
LOGITS_SAMPLED = 3
LOGITS_DISTILLED = 6
LOGITS_MIXED = 8  # with the mixture of jensen_shannon over the whole vocabulary


def scores_bytes(work: Work, side: Side) -> int:
    """One array of one layer's attention scores, float32, which kernels never write."""
    if work.model.attention != "xla":
        return 0
    return 4 * work.slice.num_heads * max(side.block_pairs, side.response_pairs)


def rows_bytes(work: Work, side: Side) -> int:
    """What a kernel reads and writes: queries, keys, values and output, in its layout and ours.

    Each response has its prompt's keys and values in its row; with cuDNN, queries as well.
    """
    model, attention = work.slice, work.model.attention
    if attention == "xla":
        return 0
    queries = side.read if attention == "cudnn" else side.tokens
    heads = 4 * queries * model.num_heads + 4 * side.read * model.num_kv_heads
    return heads * model.head_dim * work.dtype.itemsize


def forward_bytes(work: Work, side: Side) -> int:
    """The working set of one layer: what attention makes, or else the MLP's arrays."""
    model, size = work.slice, work.dtype.itemsize
    attended = SCORES_FORWARD * scores_bytes(work, side) + rows_bytes(work, side)
    mlp, stream = 3 * side.tokens * model.mlp_width * size, 4 * side.tokens * model.width * size
    return max(attended, mlp) + stream


def cast_bytes(work: Work) -> int:
    """All layers in the dtype of computation: XLA casts them before a scan, not inside."""
    layers = held_params(work.model, work.mesh, work.dtype)["layers"]
    return num_bytes(layers) if work.dtype != work.held else 0


def gathered_bytes(work: Work, dtype: Any) -> int:
    """One layer, whole but for its cut over `tensor`, where its parts lie on several devices."""
    one = sum(math.prod(w.shape) for w in weight_table(work.slice) if w.stacked)
    return one * dtype.itemsize if work.mesh.shape["fsdp"] > 1 else 0


def prefill_bytes(work: Work, shape: Shape) -> int:
    """The working set of one prefill, whose prompts may all be those of one shard."""
    model, (prompt, _) = work.slice, work.columns
    most = max(work.config.engine.prefill_tokens // prompt, 1)
    loads = min(work.problems, shape.shards * shape.slots)
    prompts = min(power_of_two(min(most, loads) + 1) // 2, power_of_two(shape.slots))
    new = 2 * model.num_layers * model.num_kv_heads * model.head_dim * work.dtype.itemsize
    pairs = prompts * row_pairs(work.model.attention, prompt), prompts * block_pairs(prompt)
    forward = forward_bytes(work, Side(prompts * prompt, *pairs))
    layers = cast_bytes(work) + gathered_bytes(work, work.dtype)
    return prompts * prompt * new + layers + forward


def decoding_bytes(work: Work, shape: Shape) -> int:
    """The working set of one decode step, of which attention and head come one after the other.

    A cache in int8 is read in the dtype of computation: XLA (on the CPU) casts one layer's ring at
    a time, and all prompts before the loop over steps, because no step changes them.
    """
    model, (prompt, ring) = work.slice, work.columns
    scores = model.num_heads * max(shape.slots * shape.members * prompt, shape.rows * ring)
    column = 2 * model.num_kv_heads * model.head_dim * work.dtype.itemsize
    column *= work.config.engine.kv_cache == "int8"
    attended = 4 * SCORES_SAMPLED * scores + column * shape.rows * ring
    logits = 4 * LOGITS_SAMPLED * shape.rows * model.vocab_size
    return column * model.num_layers * shape.slots * prompt + max(attended, logits)


def sampling(work: Work, max_rows: int) -> Phase:
    """The rollouts of a step: the state, the sampler's copy of the weights, and its cache.

    max_rows: of one process. Of several, each also holds the parameters once more, cut over its own
    devices. The ring is full-grown in all moments; while it grows, one layer of it exists twice.
    """
    own = work.local
    shape = slots_of(own, max_rows)
    moments = {
        "prefill": prefill_bytes(own, shape),
        "decoding": decoding_bytes(own, shape),
    }
    fullest = max(moments, key=lambda name: moments[name])
    cached = num_bytes(held_cache(own, shape))
    rows, prompts = shape.shards * shape.rows, shape.shards * shape.slots
    view = Line("weights of this process, cut", num_bytes(held_view(work)))
    return Phase(
        fullest,
        (
            *state_lines(work),
            *([view] if work.processes > 1 else []),
            Line("the sampler's copy of the weights", num_bytes(held_copy(own))),
            Line(f"key-value cache of {rows} rows, {prompts} prompts", cached),
            Line(f"working set of {fullest}", moments[fullest], exact=False),
        ),
    )


def kept_bytes(model: ModelConfig, sizes: tuple[int, ...], remat: Any, dtype: Any) -> int:
    """What JAX keeps of one group for the student's backward pass through all layers.

    sizes: P, S, Q, G, T. cuDNN cannot be traced without a GPU: it keeps what splash does, and
    outputs in the columns of each response's prompt, too.
    """
    if model.attention != "cudnn":
        return traced_bytes(model, sizes, remat, dtype)
    p, _, _, g, _ = sizes
    unread = g * p * model.num_heads * (model.head_dim * dtype.itemsize + 4)
    more = 0 if remat == "full" else model.num_layers * unread
    return more + traced_bytes(dataclasses.replace(model, attention="splash"), sizes, remat, dtype)


@functools.cache
def traced_bytes(model: ModelConfig, sizes: tuple[int, ...], remat: Any, dtype: Any) -> int:
    """Asked of JAX: what two groups make it keep, less what one does."""
    p, s, q, g, t = sizes
    params = tree_of(
        {w.path: jax.ShapeDtypeStruct(stacked_shape(w, model), F32) for w in weight_table(model)}
    )

    def backward(params: Params, batch: Mapping[str, Any]) -> Any:
        def student(params: Params) -> Any:
            return dual_hidden(params, None, config=model, dtype=dtype, remat=remat, **batch)[0]

        return jax.vjp(student, params)[1]

    def kept(n: int) -> int:
        shapes = {
            "student_prompt": (n, 1, p),
            "student_length": (n, 1),
            "teacher_prompt": (n, s, q),
            "teacher_length": (n, s),
            "prompt_of": (n, g),
            "suffix": (n, g, 0),  # a teacher's, of which nothing is kept
            "suffix_length": (n, g),
            "response": (n, g, t),
        }
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
        return num_bytes(jax.eval_shape(backward, params, batch))

    return kept(2) - kept(1)


def backward_bytes(work: Work, side: Side, groups: int) -> int:
    """The working set of one layer's backward pass: what is recomputed, and cotangents."""
    model, size = work.slice, work.dtype.itemsize
    arrays = side.tokens * (2 * model.mlp_width + 4 * model.width) * size
    scores = 4 * SCORES_BACKWARD * model.num_heads * side.pairs
    attended = scores if model.attention == "xla" else rows_bytes(work, side)
    cotangents = attended + arrays
    if work.config.distill.remat == "none":
        return cotangents
    whole = groups * kept_bytes(model, work.sizes, "none", work.dtype)
    return cotangents + whole // model.num_layers


def logits_bytes(work: Work) -> int:
    """The working set of one chunk of the divergence, and the hidden states that it reads."""
    config, (*_, g, t) = work.config.distill, work.sizes
    response = np.broadcast_to(np.int32(0), (work.micro_groups, g, t))
    rows = work.micro_groups // work.shards * g
    chunk = chunk_length(work.group._replace(response=response), config.chunk_tokens)
    mixed = config.divergence.name == "jensen_shannon" and not config.divergence.top_k
    copies = LOGITS_MIXED if mixed else LOGITS_DISTILLED
    hidden = 3 * rows * t * work.model.width * work.dtype.itemsize
    return 4 * copies * rows * chunk * work.slice.vocab_size + hidden


def training(work: Work) -> Phase:
    """The distillation step, at the fullest of its moments."""
    n, fsdp = work.micro_groups // work.shards, work.mesh.shape["fsdp"]
    student, teacher = sides(work, n)
    params, copies = held_params(work.model, work.mesh, F32), 2 if work.ema else 1
    kept = n * kept_bytes(work.slice, work.sizes, work.config.distill.remat, work.dtype)
    head = work.slice.vocab_size * work.model.width
    head_copies = head * work.dtype.itemsize if fsdp > 1 or work.dtype != F32 else 0
    cast, gathered = cast_bytes(work), gathered_bytes(work, work.dtype)
    # gradients, kept, weights in other forms, gradient of the output head, working set
    moments = {
        "the forward pass": (
            0,
            kept,
            copies * (cast + gathered),
            0,
            max(forward_bytes(work, student), forward_bytes(work, teacher)),
        ),
        "the divergence": (0, kept, copies * head_copies, 4 * head, logits_bytes(work)),
        "the backward pass": (
            num_bytes(params["layers"]),
            kept,
            cast + gathered + gathered_bytes(work, F32),
            4 * head // fsdp,
            backward_bytes(work, student, n),
        ),
        "the update": (num_bytes(params), 0, 0, 0, 0),
    }
    fullest = max(moments, key=lambda name: sum(moments[name]))
    gradients, kept, forms, of_head, working = moments[fullest]
    summed = num_bytes(params) if work.groups > work.micro_groups else 0
    lines = (
        Line("batch", work.groups // work.shards * num_bytes(work.group)),
        Line("gradients, summed over batches", summed),
        Line("gradients", gradients),
        Line(f"kept for the backward pass, remat {work.config.distill.remat}", kept),
        Line("weights cast or gathered", forms, exact=False),
        Line("gradient of the output head", of_head, exact=False),
        Line(f"working set of {fullest}", working, exact=False),
    )
    return Phase(fullest, (*state_lines(work), *(line for line in lines if line.bytes)))
