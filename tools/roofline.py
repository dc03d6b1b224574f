"""What a step takes on a chip, on paper: FLOPs, bytes of memory, bytes between devices, seconds.

Everything here is estimated and nothing measured. A part lasts as long as the slowest of what it
needs, where those go on at once, and the parts of a step follow one another:

    sync        parameters to the sampler          max(link, memory)
    prefill     prompts, call by call              calls x (max(products, gathers) + sums)
    decode      token by token                     max(memory, products) + sums
    reflection  the replies of a step's problems   as decode, with the prefill of what they read
    behaviors   one reply, by one process          the same
    update      student and teacher, gradients     max(products, gathers) + sums
    exchange    rollouts and replies to all        network

Gathers over `fsdp` are taken to hide behind products, or products behind them; sums over `tensor`
hide behind nothing. Each response is taken to have as many tokens as all others, so the tail of a
few long ones is left out; so are latencies, the optimizer's own reads and writes, verifying,
retrieval, evaluation, saving, and the compiler.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from pmd_jax.config import RunConfig
from pmd_jax.memory.teacher import WRITTEN
from pmd_jax.policy.families import ModelConfig, weight_table
from pmd_jax.policy.sampler import bucket, ring_columns
from pmd_jax.policy.scheduler import power_of_two, shape_for
from tools.account import (
    held_copy,
    held_params,
    held_view,
    num_bytes,
    row_pairs,
    sides,
    slots_of,
    whole_params,
)
from tools.work import F32, Work

BACKWARD = {"xla": 4, "cudnn": 5, "splash": 7}
"""Products of scores in attention's backward pass, of which there are two forward. cuDNN computes
the scores again; splash does so twice, and their gradients as well."""
TEXT_BYTES = 4
"""Of one token, about: English, and tokenizers of 150,000 words."""
RECORD_BYTES = 4 + 4 + TEXT_BYTES
"""Of one token of a rollout between processes: its id, its log-probability, its text."""


# --- chips --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. tflops: peak of bfloat16 products, 10^12/s. memory: GB. hbm: GB/s.

    link: GB/s that it takes in from the others of its slice or host. per_process: devices of a
    host. one_host: whether the link ends there.
    """

    platform: str
    tflops: float
    memory: float
    hbm: float
    link: float
    per_process: int
    one_host: bool = False


CHIPS = {
    "v5e": Chip("tpu", 197, 16, 819, 90, 4),
    "v5p": Chip("tpu", 459, 95, 2765, 180, 4),
    "v6e": Chip("tpu", 918, 32, 1640, 180, 8),
    "h100": Chip("gpu", 989, 80, 3350, 450, 8, one_host=True),
}
"""Peaks and memory of TPUs: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e. Their link is that of a
corner of a slice too small to close into rings, two neighbours, each 45, 90 and 90 GB/s one way
(jax-ml.github.io/scaling-book/tpus). H100 SXM: NVIDIA's data sheet, of NVLink's 900 GB/s one way.
A device of a TPU is a chip: v5e-16 and v6e-8 have 16 and 8; Google counts the two cores of a v5p
chip, so v5p-8 has 4 devices and v5p-64 has 32."""


class Rates(NamedTuple):
    """What one device gets done in a second: FLOPs, bytes of its memory, bytes from the others.

    network: bytes that one host takes in from other hosts.
    """

    flops: float
    hbm: float
    link: float
    network: float


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a step. bound: what decides. received: bytes that one device takes in."""

    name: str
    seconds: float
    bound: str
    received: float = 0.0


# --- FLOPs --------------------------------------------------------------------------------------


class Products(NamedTuple):
    """FLOPs of the whole model, two for each multiplication: of one token in all layers, of one
    (reader, read) pair of tokens in all layers, of one token's logits."""

    token: int
    pair: int
    logits: int


def products_of(model: ModelConfig) -> Products:
    return Products(
        2 * model.num_layers * sum(_matrices(model).values()),
        4 * model.num_layers * model.num_heads * model.head_dim,  # q with k, then with v
        2 * model.width * model.vocab_size,
    )


def _matrices(model: ModelConfig) -> dict[str, int]:
    table = weight_table(model)
    return {w.path[1]: math.prod(w.shape) for w in table if w.stacked and len(w.shape) > 1}


def flops(work: Work) -> dict[str, int]:
    """Of one step on all devices, by part."""
    model, config = work.model, work.config
    *_, g, t = work.sizes
    of = products_of(model)
    student, teacher = sides(work, work.groups)
    attended = of.pair * student.pairs
    own = of.token * student.tokens + attended
    backward = 2 * of.token * student.tokens + BACKWARD[model.attention] * attended // 2
    again = own
    if model.norms == "before":  # nothing reads the layer's last product again
        again -= 2 * model.num_layers * _matrices(model)["down"] * student.tokens
    if config.distill.remat == "context":
        again -= attended // 2 if model.attention == "xla" else attended
    prompt, ring = work.columns
    before = row_pairs(model.attention, prompt)
    sampled = work.problems * g * work.response_tokens
    shape = slots_of(work.local, config.engine.max_rows)
    places = shape.slots * shape.members
    return {
        "rollout: prefill": work.problems * (of.token * prompt + of.pair * before),
        "rollout: decode": sampled * (of.token + of.pair * ring)
        + sampled * places * of.pair * prompt // shape.rows,
        "rollout: output head": sampled * of.logits,
        "distill: student forward": own,
        "distill: student backward": backward,
        "distill: student recomputed": 0 if config.distill.remat == "none" else again,
        "distill: teacher forward": of.token * teacher.tokens + of.pair * teacher.pairs,
        "distill: output head, both ways": 4 * of.logits * work.groups * g * t,
    }


# --- bytes between devices ----------------------------------------------------------------------


def gathered(whole: float, parts: int) -> float:
    """What a device takes in of an array that lies in so many parts, of which it has one.

    The same where each device keeps one part of a sum; twice where all keep all of it.
    """
    return whole * (1 - 1 / parts)


def sums(work: Work, tokens: float, per_layer: int = 2) -> float:
    """Bytes that a device takes in to add up, over `tensor`, the output of attention and MLP."""
    model = work.model
    states = tokens * model.num_layers * model.width * work.dtype.itemsize
    return per_layer * 2 * gathered(states, work.tensor)


def update_gathers(work: Work) -> float:
    """Bytes that a device takes in over `fsdp` and `data` in the update.

    A step: the head, and that of an EMA teacher. A micro-batch: layers for the forward pass, the
    teacher's too, and again for the backward pass; their gradients, of which each device keeps its
    part; the head's gradient, float32, whole on all. All else is in the dtype of computation. (So
    it was, and so were the sums, when compiled for TPU v5e with libtpu 0.0.42.)
    """
    mesh, whole, copies = work.mesh.shape, whole_params(work), 2 if work.ema else 1
    layers, head = num_bytes(whole["layers"]), num_bytes(whole.get("head", whole["embed"]))
    times = -(-work.groups // work.micro_groups)
    over_fsdp = gathered((copies + 2) * layers, mesh["fsdp"])
    head_gradient = 2 * gathered(head / work.dtype.itemsize * F32.itemsize, work.shards)
    replicas = 2 * gathered(layers / mesh["fsdp"], mesh["data"])
    once = gathered(copies * head, mesh["fsdp"])
    return once + times * (over_fsdp + head_gradient + replicas)


def update_sums(work: Work) -> float:
    """Bytes that a device takes in over `tensor` in the update.

    Two sums a layer forward, for student and teacher, and two backward; where attention's context
    alone is kept, one more, since its output is computed again.
    """
    student, teacher = sides(work, work.groups // work.shards)
    again = 0 if work.config.distill.remat == "none" else 1
    return sums(work, student.tokens, 4 + again) + sums(work, teacher.tokens)


# --- seconds ------------------------------------------------------------------------------------


def slowest(**seconds: float) -> tuple[float, str]:
    """(seconds of the longest, its name)"""
    name = max(seconds, key=lambda name: seconds[name])
    return seconds[name], name


def sync(work: Work, rates: Rates) -> Part:
    """Weights for sampling: what lies elsewhere comes over the link; all is read and written once.

    In several processes the view of one process is gathered first, then its copy from that.
    """
    own, fsdp = work.local, work.mesh.shape["fsdp"]
    local = own.mesh.shape["fsdp"]
    copy, state = num_bytes(held_copy(own)), num_bytes(held_params(work.model, work.mesh, F32))
    view = num_bytes(held_view(work)) if work.processes > 1 else 0
    received = gathered(copy, local) + view * max(0.0, 1 - local / fsdp)
    seconds, bound = slowest(link=received / rates.link, memory=(state + view + copy) / rates.hbm)
    return Part("sync", seconds, bound, received)


def prefill(work: Work, rates: Rates, problems: int, tokens: int) -> Part:
    """Prompts of `problems` problems on one process: work of `Work.local`.

    engine.prefill_tokens sets how many a call takes, spread over the shards, each of which computes
    a power of two of them at least 1; each call gathers all layers.
    """
    columns, of = bucket(tokens, 64), products_of(work.model)
    most = max(work.config.engine.prefill_tokens // columns, 1)
    batch = 1 << (min(most, problems).bit_length() - 1)
    calls, each = -(-problems // batch), power_of_two(-(-batch // work.shards))
    pairs = row_pairs(work.model.attention, columns)
    computed = each * (of.token * columns + of.pair * pairs) / work.tensor
    layers = gathered(num_bytes(whole_params(work)["layers"]), work.mesh.shape["fsdp"])
    added = sums(work, each * columns)
    seconds, bound = slowest(products=computed / rates.flops, link=layers / rates.link)
    return Part("prefill", calls * (seconds + added / rates.link), bound, calls * (layers + added))


def decode(
    work: Work, rates: Rates, problems: int, samples: int, prompt: int, tokens: int, limit: int
) -> Part:
    """Responses of `tokens` tokens, of at most `limit`, on one process: work of `Work.local`.

    A step reads the layers and the head, the prompts in the slots and the ring of all rows, which
    grows in the first wave of responses and stays as it is in those that follow.
    """
    engine, of = work.config.engine, products_of(work.model)
    shape = shape_for(problems, samples, engine.max_rows, work.shards)
    waves = -(-problems * samples // (shape.shards * shape.rows))
    after = [(t // engine.chunk + 1) * engine.chunk for t in range(tokens)]
    rings = [ring_columns(needed, limit, engine) for needed in after]
    read = sum(rings) + (waves - 1) * tokens * rings[-1]
    steps, columns = waves * tokens, bucket(prompt, 64)
    weights = whole_params(work)
    each_step = num_bytes((weights["layers"], weights.get("head", weights["embed"])))
    each_step += shape.slots * columns * column_bytes(work)
    moved = steps * each_step + shape.rows * read * column_bytes(work)
    pairs = steps * shape.slots * shape.members * columns + shape.rows * read
    computed = steps * shape.rows * (of.token + of.logits) + pairs * of.pair
    added = sums(work, steps * shape.rows)
    seconds, bound = slowest(
        memory=moved / rates.hbm, products=computed / work.tensor / rates.flops
    )
    return Part("decode", seconds + added / rates.link, bound, added)


def column_bytes(work: Work) -> int:
    """Keys and values of one token in all layers on one device; int8 has two scales a head."""
    model = work.slice
    int8 = work.config.engine.kv_cache == "int8"
    head = model.head_dim + 4 if int8 else model.head_dim * work.dtype.itemsize
    return 2 * model.num_layers * model.num_kv_heads * head


def written(work: Work, rates: Rates, name: str, problems: int, prompt: int, tokens: int) -> Part:
    """Replies of `tokens` tokens, one to each of so many prompts, on one process."""
    first = prefill(work, rates, problems, prompt)
    then = decode(work, rates, problems, 1, prompt, tokens, tokens)
    received = first.received + then.received
    return Part(name, first.seconds + then.seconds, then.bound, received)


def update(work: Work, rates: Rates) -> Part:
    """Student and teacher forward, and backward, of all groups, on all devices."""
    counts = flops(work)
    computed = sum(count for name, count in counts.items() if name.startswith("distill"))
    moved, added = update_gathers(work), update_sums(work)
    products = computed / work.mesh.size / rates.flops
    seconds, bound = slowest(products=products, link=moved / rates.link)
    return Part("update", seconds + added / rates.link, bound, moved + added)


def exchange_bytes(config: RunConfig, processes: int, tokens: int) -> int:
    """What a process takes in from the others: `RECORD_BYTES` a token of theirs, and replies.

    tokens: of a response. All send as many bytes, the next power of two (distributed.exchange).
    Left out: ids, verdicts and feedback.
    """
    rollout, replies = config.rollout, config.reflection.max_new_tokens * TEXT_BYTES
    of_problem = rollout.rollouts_per_problem * tokens * RECORD_BYTES + replies
    problems = -(-rollout.problems_per_step // processes)
    return (processes - 1) * power_of_two(problems * of_problem)


def exchange(work: Work, rates: Rates) -> Part:
    sent = exchange_bytes(work.config, work.processes, work.response_tokens)
    return Part("exchange", sent / rates.network, "network")


def step_parts(work: Work, rates: Rates) -> list[Part]:
    """A step, part by part, of the process that has most to do."""
    own, config, reflection = work.local, work.config, work.config.reflection
    samples, limit = config.rollout.rollouts_per_problem, config.rollout.max_new_tokens
    prompt, tokens = work.prompt_tokens, work.response_tokens
    parts = [
        sync(work, rates),
        prefill(own, rates, own.problems, prompt),
        decode(own, rates, own.problems, samples, prompt, tokens, limit),
    ]
    if WRITTEN & set(config.teacher.sources):
        shown = 2 * reflection.attempts_per_outcome * min(reflection.attempt_tokens, tokens)
        sizes = own.problems, prompt + shown, reflection.max_new_tokens
        parts.append(written(own, rates, "reflection", *sizes))
    if "behaviors" in config.teacher.sources and reflection.writer == "policy":
        shown = reflection.problems_per_call * config.teacher.insight_tokens
        parts.append(
            written(own, rates, "behaviors", 1, shown, reflection.behaviors_max_new_tokens)
        )
    return [*parts, update(work, rates), exchange(work, rates)]
