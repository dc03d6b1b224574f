"""The policy: a Flax module that owns the weights, and pure functions that run them.

`Decoder` owns names, shapes, initialisation and sharding of the parameters. What computes is a
pure function over the same tree as a plain dict, so that jitted code never pays for module
handling and the files' names map to ours one to one (families.weight_table).

block            one layer; the attention is lent by the caller
causal_hidden    tokens -> hidden states, scanned over layers (logits, tests, padded rows)
prefill          prompts -> last hidden state and the key-value cache of every layer
dual_hidden      student and teacher in one scan over layers, prompts shared by their group
decode_hidden    one new token a row, unrolled over layers

Axes: B rows, T tokens, D width, V vocabulary, L layers, H query heads, K key-value heads, d head
width; N groups, S prompts of a group, P prompt columns, G rollouts of a group, U suffix columns, R
columns of a row behind its prompt: T, or U + T.
Weights may be float32 and are cast layer by layer to the dtype of the hidden states; norms, rotary
angles and logits are float32. Left out: dropout, biases, mixture of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pmd_jax.policy import kernels
from pmd_jax.policy.attention import Window
from pmd_jax.policy.families import ModelConfig, Weight, weight_table
from pmd_jax.policy.rope import rotary, rotate
from pmd_jax.policy.sharding import constrain, named, spec

Params = dict[str, Any]
Attend = Callable[[Array, Array, Array, Window], tuple[Array, Any]]
Remat = Literal["full", "context", "none"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
EVERYTHING = 1 << 30  # a window that no row reaches


class Decoder(nnx.Module):
    """The parameters of a policy, randomly initialised under the mesh that is set.

    Attributes carry the names of `weight_table`; those of layers are stacked, [L, ...], in
    `self.layers`. Call it with tokens [B, T] for float32 logits [B, T, V].
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        self.layers: Any = nnx.Dict({})
        for weight in weight_table(config):
            shape, axes = stacked_shape(weight, config), stacked_axes(weight)
            if len(weight.shape) == 1:
                value = jnp.full(shape, 1 - config.norm_offset, dtype)
            else:
                value = 0.02 * jax.random.normal(rngs.params(), shape, dtype)
            param = nnx.Param(value, out_sharding=tuple(spec(*axes)))
            if weight.stacked:
                self.layers[weight.path[1]] = param
            else:
                setattr(self, weight.path[0], param)

    @property
    def params(self) -> Params:
        """The weights as the plain tree that every function below takes."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        params = self.params
        hidden = causal_hidden(params, tokens, self.config, jax.tree.leaves(params)[0].dtype)
        return logits(head_of(params), hidden)


def stacked_shape(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    """The shape of a parameter in our tree, layers included."""
    return (config.num_layers, *weight.shape) if weight.stacked else weight.shape


def stacked_axes(weight: Weight) -> tuple[str | None, ...]:
    """The logical axes of a parameter in our tree, None for its layers."""
    return (None, *weight.axes) if weight.stacked else weight.axes


def tree_of(leaves: Mapping[tuple[str, ...], Any]) -> Params:
    """{("layers", "q"): x, ("embed",): y} -> {"layers": {"q": x}, "embed": y}"""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Shapes, dtype and shardings of the parameters, without their values."""
    return tree_of(
        {
            weight.path: jax.ShapeDtypeStruct(
                stacked_shape(weight, config), dtype, sharding=named(mesh, *stacked_axes(weight))
            )
            for weight in weight_table(config)
        }
    )


def init_params(
    config: ModelConfig, key: jax.Array, mesh: Mesh, dtype: Any = jnp.float32
) -> Params:
    """Random parameters, created in their shards."""
    with jax.set_mesh(mesh):
        return jax.jit(lambda key: Decoder(config, nnx.Rngs(key), dtype).params)(key)


def head_of(params: Params) -> Float[Array, "V D"]:
    """The output matrix: the embedding itself where the model ties them."""
    return params["head"] if "head" in params else params["embed"]


def logits(head: Float[Array, "V D"], hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 logits from products in the dtype of the hidden states."""
    head = head.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def rms_norm(x: Array, scale: Array, config: ModelConfig) -> Array:
    """x / rms(x) times (scale + the family's offset), in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    return (wide * (scale.astype(jnp.float32) + config.norm_offset)).astype(x.dtype)


class Turns(NamedTuple):
    """Cosines and sines of some positions: for full layers, and for sliding ones if there are."""

    full: tuple[Array, Array]
    sliding: tuple[Array, Array] | None

    @classmethod
    def of(cls, positions: Int[Array, "... T"], config: ModelConfig) -> Turns:
        full = rotary(positions, config.rope, config.head_dim)
        if not any(config.sliding):
            return cls(full, None)
        rope = config.sliding_rope or config.rope
        return cls(full, full if rope == config.rope else rotary(positions, rope, config.head_dim))

    def on(self, slides: Any, config: ModelConfig) -> tuple[tuple[Array, Array], Window]:
        """What one layer reads with: its cosines and sines, and its window.

        slides: None where no layer does, a bool in unrolled layers, a traced one in a scan.
        """
        if slides is None or slides is False or self.sliding is None:
            return self.full, None
        if slides is True:
            return self.sliding, config.window
        cos, sin = (jnp.where(slides, a, b) for a, b in zip(self.sliding, self.full, strict=True))
        return (cos, sin), jnp.where(slides, config.window, EVERYTHING)


def sliding_of(config: ModelConfig) -> Bool[Array, " L"] | None:
    """Per layer, for scans: whether it slides. None where none does, which costs nothing."""
    return jnp.asarray(config.sliding) if any(config.sliding) else None


def outputs_first(x: Float[Array, "B I"], weight: Float[Array, "O I"]) -> Float[Array, "B O"]:
    """x @ weight.T for few rows, the weight standing on the left of the product.

    XLA:CPU packs the right side of a product at every call. With the rows there instead of the
    weight, 8 to 32 rows take 0.8 of the time; the barrier keeps XLA from turning it round.
    """
    return lax.optimization_barrier(jnp.einsum("oi,bi->ob", weight, x)).T


def block(
    layer: Params,
    h: Array,
    turns: Turns,
    slides: Any,
    attend: Attend,
    config: ModelConfig,
    project: Callable[[Array, Array], Array] = jnp.matmul,
) -> tuple[Array, Any]:
    """One layer on h [..., T, D]. attend(q, k, v, window) -> (context like q, anything to hand on).

    project(x, matrix): the product with a matrix of the layer.

    Norms stand where the family has them: `attn_norm` and `mlp_norm` before, `*_out_norm` after.
    """
    layer = jax.tree.map(lambda w: w.astype(h.dtype), layer)

    def norm(x: Array, name: str) -> Array:
        return rms_norm(x, layer[name], config) if name in layer else x

    def heads(x: Array, name: str) -> Array:
        projected = project(x, layer[name])
        whole = config.qk_norm == "projection"
        projected = norm(projected, f"{name}_norm") if whole else projected
        split = projected.reshape(*projected.shape[:-1], -1, config.head_dim)
        return split if whole else norm(split, f"{name}_norm")

    cos_sin, window = turns.on(slides, config)
    x = norm(h, "attn_norm")
    q, k, v = (heads(x, name) for name in "qkv")
    scale = 1.0  # of scores, beside the 1 / sqrt(d) of attention itself
    if config.query_scale is not None:
        scale = config.query_scale * config.head_dim**0.5
    turned = rotate(q, (scale * cos_sin[0], scale * cos_sin[1])), rotate(k, cos_sin)
    context, handed = attend(*turned, v, window)
    h = h + norm(project(context.reshape(*h.shape[:-1], -1), layer["o"]), "attn_out_norm")
    x = norm(h, "mlp_norm")
    inner = ACTIVATIONS[config.activation](project(x, layer["gate"])) * project(x, layer["up"])
    return h + norm(project(inner, layer["down"]), "mlp_out_norm"), handed


def embed(params: Params, tokens: Array, config: ModelConfig, dtype: Any) -> Array:
    """The first hidden states [..., D], scaled where the family does."""
    h = params["embed"][tokens].astype(dtype)
    return h if config.embed_scale == 1 else h * jnp.asarray(config.embed_scale, dtype)


def final_norm(params: Params, h: Array, config: ModelConfig) -> Array:
    """The norm before the head."""
    return rms_norm(h, params["final_norm"], config)


def causal_hidden(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig, dtype: Any
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm; right padding does not reach what stands before it."""
    turns = Turns.of(jnp.arange(tokens.shape[1]), config)

    def attend(q: Array, k: Array, v: Array, window: Window) -> tuple[Array, None]:
        return kernels.causal(q, k, v, window, config), None

    def body(h: Array, xs: Any) -> tuple[Array, None]:
        return block(xs[0], h, turns, xs[1], attend, config)

    h = constrain(embed(params, tokens, config, dtype), "batch", None, None)
    h, _ = lax.scan(body, h, (params["layers"], sliding_of(config)))
    return final_norm(params, h, config)


def prefill(
    params: Params,
    tokens: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    config: ModelConfig,
    dtype: Any,
) -> tuple[Float[Array, "N D"], tuple[Float[Array, "L N K P d"], Float[Array, "L N K P d"]]]:
    """The last valid hidden state of each right-padded prompt, and the cache of all layers."""
    turns = Turns.of(jnp.arange(tokens.shape[1]), config)

    def attend(q: Array, k: Array, v: Array, window: Window) -> tuple[Array, Any]:
        return kernels.causal(q, k, v, window, config), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def body(h: Array, xs: Any) -> tuple[Array, Any]:
        return block(xs[0], h, turns, xs[1], attend, config)

    h = constrain(embed(params, tokens, config, dtype), "batch", None, None)
    h, cache = lax.scan(body, h, (params["layers"], sliding_of(config)))
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return final_norm(params, last, config), cache


def decode_hidden(
    params: Params,
    layers: list[Params],
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    attends: list[Attend],
    config: ModelConfig,
    dtype: Any,
    turned: bool = False,
) -> tuple[Float[Array, "B D"], list[Any]]:
    """One new token a row through unrolled layers; returns what each layer's attend handed on.

    turned: the matrices of the layers are [out, in], for `outputs_first`.
    """
    project = outputs_first if turned else jnp.matmul
    turns = Turns.of(positions, config)
    h, handed = embed(params, tokens, config, dtype), []
    slides = config.sliding or (False,) * config.num_layers
    for layer, attend, slide in zip(layers, attends, slides, strict=True):
        h, new = block(layer, h, turns, slide, attend, config, project)
        handed.append(new)
    return final_norm(params, h, config), handed


def _grouped_inputs(
    params: Params,
    prompts: Array,
    lengths: Array,
    prompt_of: Array,
    rows: Array,
    config: ModelConfig,
    dtype: Any,
) -> tuple[Array, Array]:
    """Embedded tokens [N, S*P + G*R, D] and their positions, prompts first."""
    n, length = prompts.shape[0], prompts.shape[-1]
    start = jnp.take_along_axis(lengths, prompt_of, axis=1)[..., None]  # [N, G, 1]
    ahead = jnp.broadcast_to(jnp.arange(length), prompts.shape).reshape(n, -1)
    behind = (start + jnp.arange(rows.shape[-1])).reshape(n, -1)
    tokens = jnp.concatenate([prompts.reshape(n, -1), rows.reshape(n, -1)], axis=1)
    hidden = constrain(embed(params, tokens, config, dtype), "batch", None, None)
    return hidden, jnp.concatenate([ahead, behind], axis=1)


def _behind_suffix(
    suffix: Int[Array, "N G U"], length: Int[Array, "N G"], response: Int[Array, "N G T"]
) -> Int[Array, "N G R"]:
    """Rows of a suffix and, without a gap, the response; what is left at the end is padding."""
    most = suffix.shape[-1]
    if most == 0:
        return response
    tokens = jnp.concatenate([suffix, response], axis=-1)
    column, length = jnp.arange(tokens.shape[-1]), length[..., None]
    source = jnp.where(column < length, column, column + most - length)
    return jnp.take_along_axis(tokens, jnp.minimum(source, tokens.shape[-1] - 1), axis=-1)


def _before_each_token(
    h: Array, prompts: Array, lengths: Array, prompt_of: Array, rows: Array
) -> Float[Array, "N G R D"]:
    """The hidden state that predicts each token of the rows: one token earlier in its own row."""
    n, _, length = prompts.shape
    ahead, behind = jnp.split(h, [prompts.shape[1] * length], axis=1)
    last = prompt_of * length + jnp.take_along_axis(lengths, prompt_of, axis=1) - 1
    first = jnp.take_along_axis(ahead, last[..., None], axis=1)  # [N, G, D]
    rest = behind.reshape(n, *rows.shape[1:], -1)[:, :, :-1]
    return jnp.concatenate([first[:, :, None], rest], axis=2)


def _of_response(
    h: Float[Array, "N G R D"], suffix_length: Int[Array, "N G"], tokens: int
) -> Float[Array, "N G T D"]:
    """The columns of each row that stand behind its suffix."""
    if h.shape[2] == tokens:
        return h
    column = suffix_length[..., None] + jnp.arange(tokens)
    return jnp.take_along_axis(h, column[..., None], axis=2)


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "context": kernels.saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}


def dual_hidden(
    student: Params,
    teacher: Params | None,
    student_prompt: Int[Array, "N 1 P"],
    student_length: Int[Array, "N 1"],
    teacher_prompt: Int[Array, "N S Q"],
    teacher_length: Int[Array, "N S"],
    prompt_of: Int[Array, "N G"],
    suffix: Int[Array, "N G U"],
    suffix_length: Int[Array, "N G"],
    response: Int[Array, "N G T"],
    config: ModelConfig,
    dtype: Any,
    remat: Remat = "context",
) -> tuple[Float[Array, "N G T D"], Float[Array, "N G T D"]]:
    """Hidden states of student and teacher that predict the same response tokens.

    One scan over layers carries both; the teacher is under `stop_gradient`, so the matrix work is
    exactly student forward + backward + teacher forward. Each distinct prompt is run once and read
    by all rollouts of its group. teacher None is the student itself: then each layer's weights are
    gathered once for both. prompt_of says which teacher prompt each rollout reads, and suffix how
    that prompt goes on for it alone: those tokens are computed in the rollout's own row.
    """
    frozen = lax.stop_gradient(student if teacher is None else teacher)
    views = (
        (student, student_prompt, student_length, jnp.zeros_like(prompt_of), response),
        (
            frozen,
            teacher_prompt,
            teacher_length,
            prompt_of,
            _behind_suffix(suffix, suffix_length, response),
        ),
    )
    sides = []
    for params, prompts, lengths, index, rows in views:
        h, positions = _grouped_inputs(params, prompts, lengths, index, rows, config, dtype)

        def attend(q, k, v, window, prompts=prompts, lengths=lengths, index=index):
            sizes = prompts.shape[1] * prompts.shape[2], response.shape[1]
            return kernels.grouped(q, k, v, *sizes, lengths, index, window, config), None

        sides.append((h, Turns.of(positions, config), attend))
    (h_student, turn_student, attend_student), (h_teacher, turn_teacher, attend_teacher) = sides

    def student_block(layer: Params, h: Array, slides: Any) -> Array:
        return block(layer, h, turn_student, slides, attend_student, config)[0]

    student_block = jax.checkpoint(student_block, policy=REMAT_POLICIES[remat])

    def body(carry: tuple[Array, Array], xs: Any) -> tuple[tuple[Array, Array], None]:
        h_student, h_teacher = carry
        layer, own, slides = xs
        own = lax.stop_gradient(layer if own is None else own)
        h_teacher = block(own, h_teacher, turn_teacher, slides, attend_teacher, config)[0]
        return (student_block(layer, h_student, slides), lax.stop_gradient(h_teacher)), None

    own = None if teacher is None else frozen["layers"]
    xs = (student["layers"], own, sliding_of(config))
    final, _ = lax.scan(body, (h_student, h_teacher), xs)
    before = [_before_each_token(h, *view[1:]) for h, view in zip(final, views, strict=True)]
    before[1] = _of_response(before[1], suffix_length, response.shape[-1])
    predicting = [final_norm(view[0], h, config) for h, view in zip(before, views, strict=True)]
    return predicting[0], lax.stop_gradient(predicting[1])
