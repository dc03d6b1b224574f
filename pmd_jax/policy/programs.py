"""The compiled programs of sampling, and the weights that they read.

insert           prefills prompts and puts them into their slots
decode           a chunk of steps: attention to the cache, the next token of every row
resize, pick     move the cache of one layer into larger or smaller tables
keys             names the random draws of a response

The host part, which calls them, is sampler.py.

Axes: F shards of the batch, n prompt slots and b rows of a shard, B = F b, m prompts of a prefill,
p their columns.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from pmd_jax.policy import cache, decoding, model
from pmd_jax.policy.families import ModelConfig, weight_table
from pmd_jax.policy.selection import Drawn, select
from pmd_jax.policy.sharding import constrain, named


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """What sampling reads: the whole tree for prefill; for decoding, its top and its layers.

    top: embedding, head and final norm. layers: one tree a layer. Both are cast once here, not at
    every token, and are whole on every shard of the batch, so that a decode step sends no weights;
    where nothing is to be cast or sent, top is the policy's own arrays. turned: the matrices of the
    layers are [out, in], as a CPU multiplies few rows fastest (model.outputs_first).
    """

    params: model.Params
    top: model.Params
    layers: list[model.Params]
    turned: bool


@partial(jax.jit, static_argnames=("config", "dtype", "turned"))
def _unrolled(
    layers: model.Params, config: ModelConfig, dtype: Any, turned: bool
) -> list[model.Params]:
    """One tree a layer, cast, and whole on every shard of the batch."""
    axes = {w.path[1]: w.axes for w in weight_table(config) if w.stacked}

    def one(name: str, weight: jax.Array) -> jax.Array:
        weight = constrain(weight.astype(dtype), *_whole(axes[name]))
        return weight.T if turned else weight

    return [{name: one(name, w[i]) for name, w in layers.items()} for i in range(config.num_layers)]


def _whole(axes: tuple[str | None, ...]) -> list[str | None]:
    """Logical axes of a weight that is not cut by "embed", the axis of fsdp."""
    return [None if axis == "embed" else axis for axis in axes]


def rollout_weights(params: model.Params, config: ModelConfig, mesh: Mesh, dtype: Any) -> Weights:
    """The weights of a policy as sampling wants them."""
    top = {name: leaf for name, leaf in params.items() if name != "layers"}
    axes = {w.path[0]: w.axes for w in weight_table(config) if not w.stacked}
    turned = mesh.devices.flat[0].platform == "cpu"
    with jax.set_mesh(mesh):
        layers = _unrolled(params["layers"], config, dtype, turned)
        for name in top.keys() & {"embed", "head"}:
            if top[name].dtype != dtype:
                top[name] = top[name].astype(dtype)
            if mesh.shape["fsdp"] > 1:
                top[name] = jax.device_put(top[name], named(mesh, *_whole(axes[name])))
    return Weights(params, top, layers, turned)


class LocalView:
    """Parameters on a mesh of several processes -> the same on this process's own devices.

    One program over all devices casts them and gathers what lies in other processes, so
    that each process holds them once, cut over its own devices; its buffers then are the arrays of
    the local mesh, without another copy. In one process both meshes are the same, and so are the
    parameters. All processes call it together.
    """

    def __init__(self, mesh: Mesh, local: Mesh, dtype: Any):
        self.mesh, self.local, self.dtype = mesh, local, dtype
        self._gather: Any = None

    def __call__(self, params: model.Params) -> model.Params:
        if self.mesh is self.local:
            return params
        if self._gather is None:
            own = self.local.devices
            devices = self.mesh.devices.reshape(-1, *own.shape)
            kinds = (AxisType.Auto,) * devices.ndim
            everywhere = Mesh(devices, ("process", *self.local.axis_names), axis_types=kinds)
            held = jax.tree.map(lambda x: NamedSharding(everywhere, x.sharding.spec), params)
            self._gather = jax.jit(self._cast, out_shardings=held)
        return jax.tree.map(self._view, self._gather(params))

    def _cast(self, params: model.Params) -> model.Params:
        """As the forward pass does itself, which reads the final norm in float32."""
        cast = jax.tree.map(lambda x: x.astype(self.dtype), params)
        return cast | {"final_norm": params["final_norm"]}

    def _view(self, x: jax.Array) -> jax.Array:
        buffers = {shard.device: shard.data for shard in x.addressable_shards}
        spec = x.sharding.spec  # type: ignore[attr-defined]  # of a NamedSharding
        return jax.make_array_from_single_device_arrays(
            x.shape,
            NamedSharding(self.local, spec),
            [buffers[device] for device in self.local.devices.flat],
        )


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="state")
def insert(params, state, slots, tokens, lengths, config: ModelConfig, dtype):
    """Prefills tokens [F, m, p] into the slots [F, m], which count within their shard."""
    f, m = slots.shape
    hidden, kv = model.prefill(
        params, tokens.reshape(f * m, -1), lengths.reshape(-1), config, dtype
    )
    by_shard = [x.reshape(x.shape[0], f, m, *x.shape[2:]) for x in kv]
    return cache.insert_prompts(state, slots, hidden.reshape(f, m, -1), by_shard)


pick = jax.jit(cache.pick)
resize = jax.jit(cache.resize, static_argnames=("columns", "width"))


def draw(top, hidden, rows, sampling, cuts, num_tokens) -> Drawn:
    """Samples the next token of every row from hidden [B, D]."""
    return select(
        model.logits(model.head_of(top), hidden),
        rows["key"],
        rows["count"],
        sampling["temperature"],
        sampling["top_k"],
        sampling["top_p"],
        cuts,
        num_tokens,
    )


@partial(
    jax.jit,
    static_argnames=("config", "dtype", "chunk", "cuts", "num_tokens", "turned"),
    donate_argnames="state",
)
def decode(
    top,
    layers,
    state,
    rows,
    steps,
    sampling,
    stop_tokens,
    config,
    dtype,
    chunk,
    cuts,
    num_tokens=None,
    turned=False,
):
    """Runs up to `steps` <= chunk steps, fewer when every row is done.

    rows: arrays over [F, b] (count: tokens sampled so far, limit, newest: the last token, done,
    key: the request's key data [F, b, 2]) and the tables of decoding.Seats. Returns the state, the
    rows, the steps that ran, and a Drawn of arrays [chunk, F, b]; of a row, the first entries that
    its count grew by are its new tokens. A row of count 0 draws its first token from its prompt.
    """
    tables = {name: constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in rows.items()}
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in tables.items()}
    shape = tables["count"].shape
    slot = tables["place"] // tables["members"].shape[2]
    first = cache.gather(state["first_hidden"], slot)
    prompt_len = cache.gather(flat["prompt_len"], slot)

    def step(carry):
        i, column, ring, count, newest, done, out = carry
        seats = decoding.Seats(tables["members"], tables["place"], flat["prompt_len"], count)
        age = cache.ring_age(ring[0].v.shape[2], column)

        def attend_in(prompt, old):
            def attend(q, k, v, window):
                new = cache.write_ring(old, k, v, column)
                return decoding.cached(q, prompt, new, seats, age, window), new

            return attend

        attends = [attend_in(*pair) for pair in zip(state["prompt"], ring, strict=True)]
        positions = prompt_len + count - 1
        hidden, ring = model.decode_hidden(
            top, layers, newest, positions, attends, config, dtype, turned
        )
        hidden = jnp.where((count == 0)[:, None], first, hidden)
        drawn = draw(top, hidden, flat | {"count": count}, sampling, cuts, num_tokens)
        out = jax.tree.map(lambda o, new: lax.dynamic_update_index_in_dim(o, new, i, 0), out, drawn)
        stopped = jnp.any(drawn.token[..., None] == stop_tokens, axis=-1)
        newest = jnp.where(done, newest, drawn.token)
        count = count + ~done
        done = done | stopped | (count >= flat["limit"])
        return i + 1, column + 1, ring, count, newest, done, out

    def going(carry):
        return (carry[0] < steps) & ~jnp.all(carry[5])

    kinds = jnp.int32, jnp.float32, jnp.float32
    empty = Drawn(*(jnp.zeros((chunk, flat["count"].size), kind) for kind in kinds))
    begin = (0, state["column"], state["ring"], flat["count"], flat["newest"], flat["done"])
    ran, column, ring, *after, out = lax.while_loop(going, step, (*begin, empty))
    names = "count", "newest", "done"
    after = {name: x.reshape(shape) for name, x in zip(names, after, strict=True)}
    out = jax.tree.map(lambda x: x.reshape(chunk, *shape), out)
    return state | {"ring": ring, "column": column}, after, ran, out


@jax.jit
def keys(seed, requests, samples):
    """Key data [N, 2] of each (request, sample)."""

    def one(request, sample):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), sample)
        return jax.random.key_data(key)

    return jax.vmap(one)(requests, samples)
