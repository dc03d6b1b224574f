"""The sampler: a queue of requests, slots that hold them, and jitted chunks of decode steps.

A prompt is prefilled once and shared by its samples, which sit in the rows of one group slot. The
host drives: harvest finished rows, start waiting samples in them, replace groups that have none
left, run a chunk of decode steps. What is sampled depends on (seed, request, sample) alone, not on
slots, order or neighbours. cache.py holds the state, selection.py the draw of a token.

Left out (another day's tuning): several prefill lengths in one call, growing rings, compaction.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pmd_jax.policy import attention, cache, model
from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.selection import Cuts, select
from pmd_jax.policy.sharding import batch_shards

MAX_PREFILL = 8  # prompts prefilled at once
NUM_STOP_TOKENS = 8  # fixed width of the array of stop tokens, so that it never recompiles


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One response. tokens int32 [T], the stop token included when there is one.

    logprobs: float32 [T], nats, of each token under the policy at temperature 1, nothing cut off.
    stop: "stop" when it ended with a stop token, "length" when it met its limit.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stop: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 cut nothing off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: must be at least 0; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be above 0 and at most 1; got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 0 (0 keeps all); got {self.top_k}")

    @property
    def cuts(self) -> Cuts:
        return Cuts(self.top_k > 0, self.top_p < 1, self.temperature == 0)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the sampler. They change its speed and memory, never what is sampled.

    max_rows: responses decoded at once. chunk: decode steps between two looks of the host.
    """

    max_rows: int = 64
    chunk: int = 16

    def __post_init__(self) -> None:
        for name in ("max_rows", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1; got {getattr(self, name)}")


@dataclasses.dataclass
class SamplerStats:
    """What sampling cost so far: response and prompt tokens, decode steps, row slots, seconds."""

    response_tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    slots: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """What sampling reads: the whole tree for prefill; for decoding, its top and its layers.

    top: embedding, head and final norm. layers: one tree a layer. Both are cast once here, not at
    every token; where nothing is to be cast, top is the policy's own arrays.
    """

    params: model.Params
    top: model.Params
    layers: list[model.Params]


@partial(jax.jit, static_argnames=("num_layers", "dtype"))
def _unrolled(layers: model.Params, num_layers: int, dtype: Any) -> list[model.Params]:
    return [jax.tree.map(lambda w, i=i: w[i].astype(dtype), layers) for i in range(num_layers)]


def rollout_weights(params: model.Params, config: ModelConfig, mesh: Mesh, dtype: Any) -> Weights:
    """The weights of a policy as sampling wants them."""
    with jax.set_mesh(mesh):
        layers = _unrolled(params["layers"], config.num_layers, dtype)
        top = {name: leaf for name, leaf in params.items() if name != "layers"}
        for name in top.keys() & {"embed", "head"}:
            if top[name].dtype != dtype:
                top[name] = top[name].astype(dtype)
    return Weights(params, top, layers)


def bucket(length: int, step: int) -> int:
    """`length` rounded up to a multiple of `step`, and of a quarter of its power of two.

    So few sizes compile, four for each doubling, and at most a fifth of a large size is padding.
    """
    length = max(length, 1)
    unit = max(step, 1 << max(length.bit_length() - 3, 0))
    return -(-length // unit) * unit


def slots(prompts: int, samples: int, max_rows: int, shards: int) -> tuple[int, int]:
    """(groups, rows of each) that hold at most about `max_rows` responses at once.

    samples: the most that a prompt wants. The groups are cut evenly over `shards` devices.
    """
    rows = min(samples, max_rows)
    groups = min(1 << (prompts - 1).bit_length(), max(max_rows // rows, 1))
    return -(-groups // shards) * shards, rows


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="state")
def _insert(params, state, slots, tokens, lengths, config: ModelConfig, dtype):
    hidden, kv = model.prefill(params, tokens, lengths, config, dtype)
    return cache.insert_prompts(state, slots, hidden, kv, lengths)


def _draw(top, hidden, rows, sampling, cuts):
    """Samples the next token of every row from hidden [N, G, D]."""
    logits = model.logits(model.head_of(top), hidden)
    keys, counts = rows["key"].reshape(-1, 2), rows["count"].reshape(-1)
    token, logp = select(
        logits.reshape(-1, logits.shape[-1]),
        keys,
        counts,
        sampling["temperature"],
        sampling["top_k"],
        sampling["top_p"],
        cuts,
    )
    return token.reshape(rows["count"].shape), logp.reshape(rows["count"].shape)


def _append(rows, token, logp, live, stop_tokens):
    """Adds one token to every live row and says which rows are done."""
    count = rows["count"]
    here = (jnp.arange(rows["out"].shape[-1]) == count[..., None]) & live[..., None]
    stopped = jnp.any(token[..., None] == stop_tokens, axis=-1)
    return rows | {
        "count": count + live,
        "newest": jnp.where(live, token, rows["newest"]),
        "done": ~live | stopped | (count + 1 >= rows["limit"]),
        "out": jnp.where(here, token[..., None], rows["out"]),
        "logp": jnp.where(here, logp[..., None], rows["logp"]),
    }


@partial(jax.jit, static_argnames="cuts", donate_argnames="state")
def _start(top, state, start, keys, limits, sampling, stop_tokens, cuts):
    """Starts a request in each row of `start` [N, G]: its first token comes from the prompt."""
    rows = state["rows"]
    rows = rows | {
        "key": jnp.where(start[..., None], keys, rows["key"]),
        "limit": jnp.where(start, limits, rows["limit"]),
        "count": jnp.where(start, 0, rows["count"]),
    }
    hidden = jnp.broadcast_to(
        state["first_hidden"][:, None], (*start.shape, state["first_hidden"].shape[-1])
    )
    token, logp = _draw(top, hidden, rows, sampling, cuts)
    begun = _append(rows, token, logp, start, stop_tokens)
    begun["done"] = jnp.where(start, begun["done"], rows["done"])
    return state | {"rows": begun}


@partial(jax.jit, static_argnames=("config", "dtype", "chunk", "cuts"), donate_argnames="state")
def _decode(top, layers, state, sampling, stop_tokens, config, dtype, chunk, cuts):
    """Runs up to `chunk` steps, fewer when every row is done."""

    def step(carry):
        i, state = carry
        rows, clock = state["rows"], state["clock"]
        age, lengths = cache.ring_age(rows["out"].shape[-1], clock), state["prompt_len"]

        def attend_in(prompt, ring):
            def attend(q, k, v, window):
                new = cache.write_ring(ring, k, v, clock)
                out = attention.decode(q, prompt, new, lengths, age, rows["count"], window)
                return out, new

            return attend

        attends = [attend_in(*pair) for pair in zip(state["prompt"], state["ring"], strict=True)]
        positions = lengths[:, None] + rows["count"] - 1
        hidden, ring = model.decode_hidden(
            top, layers, rows["newest"], positions, attends, config, dtype
        )
        token, logp = _draw(top, hidden, rows, sampling, cuts)
        rows = _append(rows, token, logp, ~rows["done"], stop_tokens)
        return i + 1, state | {"ring": ring, "rows": rows, "clock": clock + 1}

    def going(carry):
        i, state = carry
        return (i < chunk) & ~jnp.all(state["rows"]["done"])

    return lax.while_loop(going, step, (0, state))[1]


@jax.jit
def _keys(seed, requests, samples):
    """Key data [N, G, 2] of each (request, sample)."""

    def one(request, sample):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), sample)
        return jax.random.key_data(key)

    return jax.vmap(jax.vmap(one))(requests, samples)


class Sampler:
    """Runs requests through the slots. Holds no weights: they come with each call."""

    def __init__(self, config: ModelConfig, engine: EngineConfig, mesh: Mesh, dtype: Any):
        self.config, self.engine, self.mesh, self.dtype = config, engine, mesh, dtype
        self.stats = SamplerStats()

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop_tokens: Sequence[int],
        seed: int,
        request_ids: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """limits[i][j]: the most tokens of sample j of prompt i. Results in the order given.

        request_ids (default: the position) name the prompts for their random draws.
        """
        self._check(prompts, limits, stop_tokens)
        if not prompts:
            return []
        began = time.perf_counter()
        ids = list(range(len(prompts))) if request_ids is None else list(request_ids)
        run = _Run(self, weights, prompts, limits, ids, sampling, stop_tokens, seed)
        with jax.set_mesh(self.mesh):
            results = run.to_the_end()
        self.stats.seconds += time.perf_counter() - began
        return results

    def _check(self, prompts, limits, stop_tokens) -> None:
        longest = self.config.max_positions
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not len(prompt):
                raise ValueError(f"prompts[{i}]: must hold at least one token; got none")
            if not limit or min(limit) < 1:
                raise ValueError(
                    f"max_new_tokens: must be at least 1 for each of at least one sample; "
                    f"got {list(limit)} for prompts[{i}]"
                )
            if len(prompt) + max(limit) > longest:
                raise ValueError(
                    f"prompts[{i}]: prompt and response must fit the model's {longest} positions; "
                    f"got {len(prompt)} + {max(limit)} tokens; shorten one of them"
                )
        if len(stop_tokens) > NUM_STOP_TOKENS:
            raise ValueError(
                f"stop_tokens: must be at most {NUM_STOP_TOKENS} tokens; got {len(stop_tokens)}"
            )


class _Run:
    """One call of `generate`: which request sits where, and what is still waiting."""

    def __init__(self, sampler, weights, prompts, limits, ids, sampling, stop_tokens, seed):
        engine, self.sampler, self.weights = sampler.engine, sampler, weights
        self.prompts, self.limits, self.ids, self.seed = prompts, limits, ids, seed
        samples, shards = max(len(limit) for limit in limits), batch_shards(sampler.mesh)
        self.num_groups, self.num_rows = slots(len(prompts), samples, engine.max_rows, shards)
        self.prompt_columns = bucket(max(map(len, prompts)), 64)
        longest = max(max(limit) for limit in limits)
        self.state = cache.empty_state(
            sampler.config,
            self.num_groups,
            self.num_rows,
            self.prompt_columns,
            bucket(longest, 16),
            sampler.mesh,
            sampler.dtype,
        )
        # The longest first: a short tail. Any order gives the same samples.
        self.queue = sorted(range(len(prompts)), key=lambda i: (-max(limits[i]), i))
        self.group: list[int | None] = [None] * self.num_groups
        self.waiting: list[list[int]] = [[] for _ in range(self.num_groups)]
        self.owner: dict[tuple[int, int], int] = {}  # (group, row) -> sample
        self.results: list[list[Sample | None]] = [[None] * len(limit) for limit in limits]
        self.sampling = {
            "temperature": jnp.float32(sampling.temperature),
            "top_k": jnp.int32(sampling.top_k),
            "top_p": jnp.float32(sampling.top_p),
        }
        self.cuts = sampling.cuts
        stops = [*stop_tokens] + [-1] * (NUM_STOP_TOKENS - len(stop_tokens))
        self.stop_tokens = jnp.asarray(stops, jnp.int32)
        self.stop_set = frozenset(stop_tokens)
        self.steps = 0

    def to_the_end(self) -> list[list[Sample]]:
        engine, config, dtype = self.sampler.engine, self.sampler.config, self.sampler.dtype
        while True:
            self.load_prompts()
            self.start_rows()
            if not self.owner:
                return [list(samples) for samples in self.results]  # type: ignore[arg-type]
            self.state = _decode(
                self.weights.top,
                self.weights.layers,
                self.state,
                self.sampling,
                self.stop_tokens,
                config=config,
                dtype=dtype,
                chunk=engine.chunk,
                cuts=self.cuts,
            )
            self.harvest()

    def load_prompts(self) -> None:
        """Prefills waiting prompts into empty group slots, in batches of a power of two."""
        free = [slot for slot, prompt in enumerate(self.group) if prompt is None]
        count = min(len(free), len(self.queue))
        while count:
            batch = min(1 << (count.bit_length() - 1), MAX_PREFILL)
            slots, free = free[:batch], free[batch:]
            chosen, self.queue = self.queue[:batch], self.queue[batch:]
            tokens = np.zeros((batch, self.prompt_columns), np.int32)
            for row, i in enumerate(chosen):
                tokens[row, : len(self.prompts[i])] = self.prompts[i]
                self.group[slots[row]] = i
                self.waiting[slots[row]] = list(range(len(self.limits[i])))[::-1]
            lengths = np.asarray([len(self.prompts[i]) for i in chosen], np.int32)
            self.state = _insert(
                self.weights.params,
                self.state,
                np.asarray(slots),
                tokens,
                lengths,
                config=self.sampler.config,
                dtype=self.sampler.dtype,
            )
            self.sampler.stats.prompt_tokens += int(lengths.sum())
            count -= batch

    def start_rows(self) -> None:
        """Gives every free row the next waiting sample of its group's prompt."""
        shape = (self.num_groups, self.num_rows)
        start, limits = np.zeros(shape, bool), np.zeros(shape, np.int32)
        requests, samples = np.zeros(shape, np.uint32), np.zeros(shape, np.uint32)
        for slot, row in np.ndindex(shape):
            if (slot, row) in self.owner or not self.waiting[slot]:
                continue
            prompt, sample = self.group[slot], self.waiting[slot].pop()
            assert prompt is not None
            self.owner[slot, row] = sample
            start[slot, row], limits[slot, row] = True, self.limits[prompt][sample]
            requests[slot, row], samples[slot, row] = self.ids[prompt], sample
        if not start.any():
            return
        self.state = _start(
            self.weights.top,
            self.state,
            start,
            _keys(np.uint32(self.seed), requests, samples),
            limits,
            self.sampling,
            self.stop_tokens,
            cuts=self.cuts,
        )

    def harvest(self) -> None:
        """Takes the responses of finished rows, and frees groups in which nothing is left."""
        rows = self.state["rows"]
        done, clock = jax.device_get((rows["done"], self.state["clock"]))
        finished = [place for place in self.owner if done[place]]
        if finished:
            counts, out, logp = jax.device_get((rows["count"], rows["out"], rows["logp"]))
        for slot, row in finished:
            prompt, sample = self.group[slot], self.owner.pop((slot, row))
            assert prompt is not None
            n = int(counts[slot, row])
            tokens = out[slot, row, :n].copy()
            stop: Literal["stop", "length"]
            stop = "stop" if int(tokens[-1]) in self.stop_set else "length"
            self.results[prompt][sample] = Sample(tokens, logp[slot, row, :n].copy(), stop)
            self.sampler.stats.response_tokens += n
        busy = {slot for slot, _ in self.owner}
        for slot, waiting in enumerate(self.waiting):
            if slot not in busy and not waiting:
                self.group[slot] = None
        stats, steps = self.sampler.stats, int(clock) - self.steps
        self.steps = int(clock)
        stats.steps += steps
        stats.slots += steps * self.num_groups * self.num_rows
