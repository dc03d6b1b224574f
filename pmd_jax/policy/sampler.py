"""The sampler: a queue of requests, rows that hold them, and jitted chunks of decode steps.

A prompt is prefilled once and read by all of its samples. The host drives: take finished responses
out of their rows, seat waiting ones there, run a chunk of decode steps. The ring of the responses
grows as they do, and when nothing waits and half of the rows are idle, the live ones move together
into a smaller program. What is sampled depends on (seed, request, sample) alone, not on rows, order
or neighbours. scheduler.py decides who sits where, programs.py is what runs on the devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pmd_jax.policy import cache, programs
from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.programs import Weights
from pmd_jax.policy.scheduler import Scheduler, Seat, Shape, power_of_two, shape_for
from pmd_jax.policy.selection import Cuts, Drawn
from pmd_jax.policy.sharding import batch_shards

NUM_STOP_TOKENS = 8  # fixed width of the array of stop tokens, so that it never recompiles


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One response. tokens int32 [T], the stop token included when there is one.

    logprobs: float32 [T], nats, of each token under the policy at temperature 1, nothing cut off.
    sampling_logprobs: float32 [T], nats, under the distribution it was drawn from, which is another
    one where temperature, top-k or top-p are set; 0 when greedy.
    stop: "stop" when it ended with a stop token, "length" when it met its limit.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    stop: Literal["stop", "length"]


OnSample = Callable[[int, int, Sample], None]
"""Told of a response that is done: its prompt, its sample's index, and it."""


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
    """Sizes of the sampler. They change its speed and memory; what is sampled only with int8.

    max_rows: responses decoded at once. chunk: the most decode steps between two looks of the host.
    prefill_tokens: about how many prompt tokens, padding included, are computed at once.
    min_rows: a batch that runs empty is made smaller down to this; max_rows keeps it as it is.
    min_columns: the response cache starts with so many and doubles.
    kv_cache: "int8" halves the cache of a bfloat16 model. It changes the behaviour policy, so the
        sampler's log-probabilities differ from the trainer's by more than rounding.
    """

    max_rows: int = 64
    chunk: int = 16
    prefill_tokens: int = 2048
    min_rows: int = 8
    min_columns: int = 128
    kv_cache: Literal["dtype", "int8"] = "dtype"

    def __post_init__(self) -> None:
        for name in ("max_rows", "chunk", "prefill_tokens", "min_rows", "min_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1; got {getattr(self, name)}")


@dataclasses.dataclass
class SamplerStats:
    """What sampling cost so far.

    prefill_tokens: prompt tokens computed, padding included. slots: rows computed, idle ones
    included, over all steps. seconds: of the calls; device_seconds: of them, while the device had
    prefills or decode steps to run. sync_seconds: of casting and gathering the weights for it, once
    an update.
    """

    response_tokens: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    steps: int = 0
    slots: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    sync_seconds: float = 0.0


def bucket(length: int, step: int) -> int:
    """`length` rounded up to a multiple of `step`, and of a quarter of its power of two.

    So few sizes compile, four for each doubling, and at most a fifth of a large size is padding.
    """
    length = max(length, 1)
    unit = max(step, 1 << max(length.bit_length() - 3, 0))
    return -(-length // unit) * unit


def ring_columns(needed: int, longest: int, engine: EngineConfig) -> int:
    """Columns of the ring for `needed` tokens of a row, of the `longest` that it may have."""
    return min(max(power_of_two(needed), engine.min_columns), bucket(longest, 16))


def request_keys(
    seed: int, ids: Sequence[int], limits: Sequence[Sequence[int]]
) -> dict[tuple[int, int], np.ndarray]:
    """{(prompt, sample): its key data}: all at once, before the devices have anything else to do.

    Asked for later, they would wait behind the prefill.
    """
    seats = [(i, j) for i, row in enumerate(limits) for j in range(len(row))]
    named = np.zeros((2, power_of_two(len(seats))), np.uint32)
    named[:, : len(seats)] = np.array([(ids[i], j) for i, j in seats]).T
    found = np.asarray(programs.keys(np.uint32(seed), *named))
    return dict(zip(seats, found, strict=False))


class Sampler:
    """Runs requests through the rows. Holds no weights: they come with each call.

    num_tokens: ids that the tokenizer defines; those above only pad the vocabulary.
    between_chunks: called after each chunk of steps; what it raises ends the call.
    """

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        mesh: Mesh,
        dtype: Any,
        num_tokens: int | None = None,
    ):
        self.config, self.engine, self.mesh, self.dtype = config, engine, mesh, dtype
        self.num_tokens = num_tokens
        self.stats = SamplerStats()
        self.between_chunks: Callable[[], None] = lambda: None

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop_tokens: Sequence[int],
        seed: int,
        request_ids: Sequence[int] | None = None,
        expected: Sequence[Sequence[float]] | None = None,
        on_sample: OnSample | None = None,
    ) -> list[list[Sample]]:
        """limits[i][j]: the most tokens of sample j of prompt i. Results in the order given.

        request_ids (default: the position) name the prompts for their random draws. expected
        (default: the limits): tokens that each sample is thought to take; the longest go first.
        on_sample(i, j, sample) hears of each as soon as it is done, while the device goes on.
        """
        self._check(prompts, limits, stop_tokens)
        if not prompts:
            return []
        began = time.perf_counter()
        ids = list(range(len(prompts))) if request_ids is None else list(request_ids)
        with jax.set_mesh(self.mesh):
            run = _Run(
                self, weights, prompts, limits, ids, sampling, stop_tokens, seed, expected or limits
            )
            results = run.to_the_end(on_sample or (lambda *_: None))
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
    """One call of `generate`: the state on the devices, and what the host knows of each row."""

    def __init__(
        self, sampler, weights, prompts, limits, ids, sampling, stop_tokens, seed, expected
    ):
        engine, self.sampler, self.weights = sampler.engine, sampler, weights
        self.prompts, self.limits = prompts, limits
        self.keys = request_keys(seed, ids, limits)
        samples = max(len(limit) for limit in limits)
        shape = shape_for(len(prompts), samples, engine.max_rows, batch_shards(sampler.mesh))
        self.scheduler = Scheduler(expected, shape)
        self.prompt_columns = bucket(max(map(len, prompts)), 64)
        self.longest = max(max(limit) for limit in limits)
        self.columns = ring_columns(engine.chunk, self.longest, engine)
        self.state = cache.empty_state(
            sampler.config,
            shape,
            self.prompt_columns,
            self.columns,
            sampler.mesh,
            sampler.dtype,
            engine.kv_cache == "int8",
        )
        self.rows = self.idle_rows(shape)
        self.parts: dict[tuple[int, int], list[Drawn]] = {}  # (prompt, sample) -> its chunks
        self.results: list[list[Sample | None]] = [[None] * len(limit) for limit in limits]
        self.finished: list[tuple[int, int, Sample]] = []  # not yet told to on_sample
        self.sampling = {
            "temperature": jnp.float32(sampling.temperature),
            "top_k": jnp.int32(sampling.top_k),
            "top_p": jnp.float32(sampling.top_p),
        }
        self.cuts = sampling.cuts
        stops = [*stop_tokens] + [-1] * (NUM_STOP_TOKENS - len(stop_tokens))
        self.stop_tokens = jnp.asarray(stops, jnp.int32)
        self.stop_set = frozenset(stop_tokens)

    @staticmethod
    def idle_rows(shape: Shape) -> dict[str, np.ndarray]:
        rows = shape.shards, shape.rows
        return {
            "count": np.zeros(rows, np.int32),
            "limit": np.zeros(rows, np.int32),
            "newest": np.zeros(rows, np.int32),
            "done": np.ones(rows, bool),
            "key": np.zeros((*rows, 2), np.uint32),
            "prompt_len": np.zeros((shape.shards, shape.slots), np.int32),
        }

    def to_the_end(self, on_sample: OnSample) -> list[list[Sample]]:
        while True:
            self.load_prompts()
            self.start_rows()
            if any(True for _ in self.scheduler.live()):
                self.fit()
                pending = self.decode()
            else:
                pending = None
            for prompt, sample, result in self.finished:  # the device is at work meanwhile
                on_sample(prompt, sample, result)
            self.finished.clear()
            if pending is None:
                return [list(samples) for samples in self.results]  # type: ignore[arg-type]
            self.harvest(*pending)
            self.sampler.between_chunks()

    def load_prompts(self) -> None:
        """Prefills waiting prompts into free slots, those of like length together.

        A batch is as wide as the longest prompt of the call, or so many quarters of it, so that the
        lengths of another call's prompts hardly ask for programs of their own.
        """
        loads = sorted(self.scheduler.load(), key=lambda load: len(self.prompts[load[2]]))
        while loads:
            longest, quarter = len(self.prompts[loads[-1][2]]), self.prompt_columns // 4
            columns = -(-longest // quarter) * quarter
            most = max(self.sampler.engine.prefill_tokens // columns, 1)
            batch = 1 << (min(most, len(loads)).bit_length() - 1)
            self.prefill(loads[-batch:], columns)
            del loads[-batch:]

    def prefill(self, loads: list[tuple[int, int, int]], columns: int) -> None:
        shape, stats = self.scheduler.shape, self.sampler.stats
        of_shard = [[load for load in loads if load[0] == f] for f in range(shape.shards)]
        each = power_of_two(max(map(len, of_shard)))
        slots = np.full((shape.shards, each), shape.slots, np.int32)  # beyond the last: dropped
        tokens = np.zeros((shape.shards, each, columns), np.int32)
        lengths = np.ones((shape.shards, each), np.int32)
        for shard, own in enumerate(of_shard):
            for i, (_, slot, prompt) in enumerate(own):
                ids = self.prompts[prompt]
                slots[shard, i], lengths[shard, i] = slot, len(ids)
                tokens[shard, i, : len(ids)] = ids
                self.rows["prompt_len"][shard, slot] = len(ids)
                stats.prompt_tokens += len(ids)
        stats.prefill_tokens += tokens.size
        began = time.perf_counter()
        self.state = programs.insert(
            self.weights.params,
            self.state,
            slots,
            tokens,
            lengths,
            config=self.sampler.config,
            dtype=self.sampler.dtype,
        )
        stats.device_seconds += time.perf_counter() - began  # where prefills run within the call

    def start_rows(self) -> None:
        """Seats waiting samples in free rows; their first token comes with the next step."""
        for shard, row, seat in self.scheduler.start():
            at = shard, row
            self.rows["count"][at], self.rows["newest"][at] = 0, 0
            self.rows["limit"][at] = self.limits[seat.prompt][seat.sample]
            self.rows["done"][at] = False
            self.rows["key"][at] = self.keys[seat.prompt, seat.sample]
            self.parts[seat.prompt, seat.sample] = []

    def fit(self) -> None:
        """Moves the live rows into a smaller program when half are idle; grows the ring."""
        scheduler, engine = self.scheduler, self.sampler.engine
        needed = int(self.rows["count"][~self.rows["done"]].max()) + engine.chunk
        columns = ring_columns(needed, self.longest, engine)
        shape, rows = scheduler.smaller(engine.min_rows), None
        state, before = self.state, self.columns
        if shape is not None:
            rows, slots = scheduler.move(shape)
            self.rows = self.moved(shape, rows, slots)
            state["first_hidden"] = programs.pick(state["first_hidden"], slots)
            for i, old in enumerate(state["prompt"]):
                state["prompt"][i] = programs.pick(old, slots)
        elif columns <= before:
            return
        width = cache.block_width(columns, self.sampler.mesh)
        for i, old in enumerate(state["ring"]):  # layer by layer, so that little exists twice
            state["ring"][i] = programs.resize(
                old, state["column"], rows, columns=columns, width=width
            )
        self.columns = columns
        state["column"] = cache.resized_column(state["column"], before, columns)

    def moved(self, shape: Shape, rows: np.ndarray, slots: np.ndarray) -> dict[str, np.ndarray]:
        """What the host knows of the rows, after `Scheduler.move`."""
        shard = np.arange(shape.shards)[:, None]
        new = {
            name: x[shard, slots if name == "prompt_len" else rows] for name, x in self.rows.items()
        }
        new["done"] = np.ones((shape.shards, shape.rows), bool)
        for f, row, _ in self.scheduler.live():
            new["done"][f, row] = False
        return new

    def decode(self) -> tuple[Any, ...]:
        """Sends off a chunk of steps; while responses wait, only till a row falls free."""
        sampler, rows = self.sampler, self.rows
        members, place = self.scheduler.tables()
        live = ~rows["done"]
        steps = sampler.engine.chunk
        if self.scheduler.has_waiting:
            least = int((rows["limit"] - rows["count"])[live].min())
            steps = min(steps, max(least, steps // 4, 1))
        began = time.perf_counter()
        self.state, *pending = programs.decode(
            self.weights.top,
            self.weights.layers,
            self.state,
            rows | {"members": members, "place": place},
            np.int32(steps),
            self.sampling,
            self.stop_tokens,
            config=sampler.config,
            dtype=sampler.dtype,
            chunk=sampler.engine.chunk,
            cuts=self.cuts,
            num_tokens=sampler.num_tokens,
            turned=self.weights.turned,
        )
        return began, *pending

    def harvest(self, began: float, after: Any, ran: Any, drawn: Any) -> None:
        """Waits for a chunk, appends what each row drew, and takes the finished responses out."""
        after, ran, drawn = jax.device_get((after, ran, drawn))
        stats = self.sampler.stats
        stats.device_seconds += time.perf_counter() - began
        stats.steps += int(ran)
        stats.slots += int(ran) * self.rows["done"].size
        grown = after["count"] - self.rows["count"]
        self.rows |= {name: np.array(x) for name, x in after.items()}
        for shard, row, seat in list(self.scheduler.live()):
            parts = self.parts[seat.prompt, seat.sample]
            parts.append(Drawn(*(x[: grown[shard, row], shard, row] for x in drawn)))
            if self.rows["done"][shard, row]:
                self.finish(self.scheduler.finish(shard, row))

    def finish(self, seat: Seat) -> None:
        tokens, logprobs, sampling_logprobs = (
            np.concatenate(x) for x in zip(*self.parts.pop((seat.prompt, seat.sample)), strict=True)
        )
        stop: Literal["stop", "length"]
        stop = "stop" if int(tokens[-1]) in self.stop_set else "length"
        sample = Sample(tokens, logprobs, sampling_logprobs, stop)
        self.results[seat.prompt][seat.sample] = sample
        self.finished.append((seat.prompt, seat.sample, sample))
        self.sampler.stats.response_tokens += len(tokens)
