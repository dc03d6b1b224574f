"""Records become arrays: the rollouts of a step as padded groups, ready for the fused forward.

A group is one problem: its student prompt once, its teacher prompts, and all its responses. What
siblings share is computed once (model.dual_hidden): equal teacher prompts, or the beginning of ones
that differ further on, of which each rollout then computes the end in its own row. `build_batch`
takes whichever computes fewer tokens. Sizes are rounded up to buckets so that a run compiles a
handful of programs; `padding_fraction` says what that costs.

Axes: N groups, P student prompt columns, S teacher prompts, Q their columns, G rollouts, U columns
of suffixes, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from pmd_jax.policy.sampler import bucket
from pmd_jax.policy.sharding import named
from pmd_jax.records import Rollout

Tokens = Sequence[int]


@dataclasses.dataclass(frozen=True)
class DistillGroup:
    """One problem of a batch: its prompts as tokens, and its rollouts.

    teacher_prompts: one per rollout; what is equal is computed once. has_guidance: one per rollout.
    advantages: one per rollout, for policy gradients; none for a distillation.
    """

    student_prompt: Tokens
    teacher_prompts: Sequence[Tokens]
    has_guidance: Sequence[bool]
    rollouts: Sequence[Rollout]
    advantages: Sequence[float] = ()


class DistillBatch(NamedTuple):
    """Padded arrays, numpy on the host and jax on the devices.

    The teacher of a rollout reads teacher_prompt[prompt_of], then the rollout's suffix. Rows are
    right-padded to their valid lengths; an empty group has response_length 0.
    """

    student_prompt: Int[Any, "N 1 P"]
    student_length: Int[Any, "N 1"]
    teacher_prompt: Int[Any, "N S Q"]
    teacher_length: Int[Any, "N S"]
    prompt_of: Int[Any, "N G"]
    suffix: Int[Any, "N G U"]
    suffix_length: Int[Any, "N G"]
    response: Int[Any, "N G T"]
    response_length: Int[Any, "N G"]
    sampled_logprobs: Float[Any, "N G T"]
    has_guidance: Bool[Any, "N G"]
    advantage: Float[Any, "N G"]


class _Teachers(NamedTuple):
    """The teacher prompts of a group, which of them each rollout reads, and how it goes on."""

    prompts: Sequence[tuple[int, ...]]
    prompt_of: Sequence[int]
    suffixes: Sequence[tuple[int, ...]]


def _whole(prompts: Sequence[Tokens]) -> _Teachers:
    """The different prompts in order of appearance, and empty suffixes."""
    seen: dict[tuple[int, ...], int] = {}
    index = [seen.setdefault(tuple(prompt), len(seen)) for prompt in prompts]
    return _Teachers(list(seen), index, [()] * len(index))


def _shared(whole: _Teachers) -> _Teachers:
    """One prompt, the longest beginning that all have, and suffixes."""
    first, last = min(whole.prompts), max(whole.prompts)  # no other two part earlier
    pairs = enumerate(zip(first, last, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), len(first))
    suffixes = [whole.prompts[i][common:] for i in whole.prompt_of]
    return _Teachers([first[:common]], [0] * len(suffixes), suffixes)


def _lay_out(groups: Sequence[DistillGroup], step: int) -> tuple[list[_Teachers], int, int, int]:
    """The layout of all teacher prompts that computes the fewest tokens, and its S, Q and U.

    In room for S prompts, groups with no more than that have theirs whole, and others the shared
    beginning, which must not be empty. Of layouts that cost the same, the one with most room.
    """
    whole = [_whole(group.teacher_prompts) for group in groups]
    shared = [_shared(teachers) for teachers in whole]
    most = max(len(teachers.prompts) for teachers in whole)
    layouts: list[tuple[int, list[_Teachers], int, int, int]] = []
    for power in reversed(range((most - 1).bit_length() + 1)):  # most room first: all whole
        s = 1 << power
        chosen = [a if len(a.prompts) <= s else b for a, b in zip(whole, shared, strict=True)]
        lengths = [len(prompt) for teachers in chosen for prompt in teachers.prompts]
        longest = max(len(suffix) for teachers in chosen for suffix in teachers.suffixes)
        q, u = bucket(max(lengths), step), bucket(longest, 16) if longest else 0
        if not layouts or min(lengths) > 0:
            layouts.append((s * q + len(groups[0].rollouts) * u, chosen, s, q, u))
    return min(layouts, key=lambda layout: layout[0])[1:]


def build_batch(
    groups: Sequence[DistillGroup], multiple_of: int = 1, bucket_tokens: int = 64
) -> DistillBatch:
    """Pads groups into one batch; the number of groups is rounded up to `multiple_of`.

    Raises ValueError when there is no group or the groups differ in size.
    """
    sizes = {len(group.rollouts) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"batch: groups must all have the same number of rollouts; got {sizes}")
    num_rollouts = sizes.pop()
    teachers, num_prompts, q, u = _lay_out(groups, bucket_tokens)
    n = -(-len(groups) // multiple_of) * multiple_of
    p = bucket(max(len(group.student_prompt) for group in groups), bucket_tokens)
    t = bucket(max(len(r.tokens) for group in groups for r in group.rollouts), 16)
    batch = DistillBatch(
        student_prompt=np.zeros((n, 1, p), np.int32),
        student_length=np.ones((n, 1), np.int32),
        teacher_prompt=np.zeros((n, num_prompts, q), np.int32),
        teacher_length=np.ones((n, num_prompts), np.int32),
        prompt_of=np.zeros((n, num_rollouts), np.int32),
        suffix=np.zeros((n, num_rollouts, u), np.int32),
        suffix_length=np.zeros((n, num_rollouts), np.int32),
        response=np.zeros((n, num_rollouts, t), np.int32),
        response_length=np.zeros((n, num_rollouts), np.int32),
        sampled_logprobs=np.zeros((n, num_rollouts, t), np.float32),
        has_guidance=np.zeros((n, num_rollouts), bool),
        advantage=np.zeros((n, num_rollouts), np.float32),
    )
    for i, (group, (prompts, prompt_of, suffixes)) in enumerate(zip(groups, teachers, strict=True)):
        batch.student_length[i, 0] = len(group.student_prompt)
        batch.student_prompt[i, 0, : len(group.student_prompt)] = group.student_prompt
        for s, prompt in enumerate(prompts):
            batch.teacher_length[i, s] = len(prompt)
            batch.teacher_prompt[i, s, : len(prompt)] = prompt
        batch.prompt_of[i] = prompt_of
        batch.has_guidance[i] = group.has_guidance
        batch.advantage[i] = group.advantages or 0
        for g, (rollout, suffix) in enumerate(zip(group.rollouts, suffixes, strict=True)):
            batch.suffix_length[i, g] = len(suffix)
            batch.suffix[i, g, : len(suffix)] = suffix
            length = len(rollout.tokens)
            batch.response_length[i, g] = length
            batch.response[i, g, :length] = rollout.tokens
            batch.sampled_logprobs[i, g, :length] = rollout.logprobs
    return batch


def build_batches(
    groups: Sequence[DistillGroup], count: int, multiple_of: int = 1, bucket_tokens: int = 64
) -> tuple[list[DistillBatch], list[int]]:
    """Groups of like size in up to `count` batches; for each group its row in all of them, joined.

    The largest come first, so that empty groups are among the smallest.
    """
    units = -(-len(groups) // multiple_of)
    if min(count, units) <= 1:
        return [build_batch(groups, multiple_of, bucket_tokens)], list(range(len(groups)))

    def size(i: int) -> int:
        group = groups[i]
        longest = max(len(rollout.tokens) for rollout in group.rollouts)
        prompts = len(group.student_prompt) + max(map(len, group.teacher_prompts))
        return prompts + 2 * len(group.rollouts) * longest

    order = sorted(range(len(groups)), key=size, reverse=True)
    batches: list[DistillBatch] = []
    rows: dict[int, int] = {}
    for part in np.array_split(np.arange(units), min(count, units)):
        chosen = order[part[0] * multiple_of : (part[-1] + 1) * multiple_of]
        first = sum(len(batch.response) for batch in batches)
        rows |= {i: first + place for place, i in enumerate(chosen)}
        batches.append(build_batch([groups[i] for i in chosen], multiple_of, bucket_tokens))
    return batches, [rows[i] for i in range(len(groups))]


def padding_fraction(*batches: DistillBatch) -> float:
    """Share of the computed tokens, of student and teacher together, that are padding."""
    used, size = np.sum([_used_and_computed(batch) for batch in batches], axis=0)
    return 1 - float(used / size)


def _used_and_computed(batch: DistillBatch) -> tuple[int, int]:
    """Tokens of both sides, without and with padding."""
    used = batch.student_length.sum() + batch.suffix_length.sum() + 2 * batch.response_length.sum()
    used += sum(
        int(batch.teacher_length[i, sorted(set(batch.prompt_of[i]))].sum())
        for i in range(len(batch.prompt_of))
    )
    size = batch.student_prompt.size + batch.teacher_prompt.size + batch.suffix.size
    size += 2 * batch.response.size
    return int(used), size


def place(batch: DistillBatch, mesh: Mesh) -> DistillBatch:
    """The batch on the devices, groups cut over the batch axes. All processes hold all of it."""

    def put(x: np.ndarray) -> jax.Array:
        sharding = named(mesh, "batch", *[None] * (x.ndim - 1))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return DistillBatch(*map(put, batch))
