"""Records become arrays: the rollouts of a step as padded groups, ready for the fused forward.

A group is one problem: its student prompt once, its distinct teacher prompts once each, and all its
responses. What identical siblings share is computed once (model.dual_hidden). Sizes are rounded up
to buckets so that a run compiles a handful of programs; `padding_fraction` says what that costs.

Axes: N groups, P student prompt columns, S teacher prompts, Q their columns, G rollouts, T tokens.
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

    teacher_prompts: one per rollout; equal ones are computed once. has_guidance: one per rollout.
    """

    student_prompt: Tokens
    teacher_prompts: Sequence[Tokens]
    has_guidance: Sequence[bool]
    rollouts: Sequence[Rollout]


class DistillBatch(NamedTuple):
    """Padded arrays, numpy on the host and jax on the devices.

    Rows are right-padded to their valid lengths; an empty group has response_length 0.
    """

    student_prompt: Int[Any, "N 1 P"]
    student_length: Int[Any, "N 1"]
    teacher_prompt: Int[Any, "N S Q"]
    teacher_length: Int[Any, "N S"]
    prompt_of: Int[Any, "N G"]
    response: Int[Any, "N G T"]
    response_length: Int[Any, "N G"]
    sampled_logprobs: Float[Any, "N G T"]
    has_guidance: Bool[Any, "N G"]


def _distinct(prompts: Sequence[Tokens]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different prompts in order of appearance, and which of them each entry is."""
    seen: dict[tuple[int, ...], int] = {}
    index = [seen.setdefault(tuple(prompt), len(seen)) for prompt in prompts]
    return list(seen), index


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
    distinct = [_distinct(group.teacher_prompts) for group in groups]
    most = max(len(prompts) for prompts, _ in distinct)
    num_prompts = 1 << (most - 1).bit_length()  # 1 or 2, unless feedback makes each one differ
    n = -(-len(groups) // multiple_of) * multiple_of
    p = bucket(max(len(group.student_prompt) for group in groups), bucket_tokens)
    q = bucket(max(len(prompt) for prompts, _ in distinct for prompt in prompts), bucket_tokens)
    t = bucket(max(len(r.tokens) for group in groups for r in group.rollouts), 16)
    batch = DistillBatch(
        student_prompt=np.zeros((n, 1, p), np.int32),
        student_length=np.ones((n, 1), np.int32),
        teacher_prompt=np.zeros((n, num_prompts, q), np.int32),
        teacher_length=np.ones((n, num_prompts), np.int32),
        prompt_of=np.zeros((n, num_rollouts), np.int32),
        response=np.zeros((n, num_rollouts, t), np.int32),
        response_length=np.zeros((n, num_rollouts), np.int32),
        sampled_logprobs=np.zeros((n, num_rollouts, t), np.float32),
        has_guidance=np.zeros((n, num_rollouts), bool),
    )
    for i, (group, (prompts, index)) in enumerate(zip(groups, distinct, strict=True)):
        batch.student_length[i, 0] = len(group.student_prompt)
        batch.student_prompt[i, 0, : len(group.student_prompt)] = group.student_prompt
        for s, prompt in enumerate(prompts):
            batch.teacher_length[i, s] = len(prompt)
            batch.teacher_prompt[i, s, : len(prompt)] = prompt
        batch.prompt_of[i] = index
        batch.has_guidance[i] = group.has_guidance
        for g, rollout in enumerate(group.rollouts):
            length = len(rollout.tokens)
            batch.response_length[i, g] = length
            batch.response[i, g, :length] = rollout.tokens
            batch.sampled_logprobs[i, g, :length] = rollout.logprobs
    return batch


def padding_fraction(batch: DistillBatch) -> float:
    """Share of the computed tokens, of student and teacher together, that are padding."""
    used = batch.student_length.sum() + 2 * batch.response_length.sum()
    used += sum(
        int(batch.teacher_length[i, sorted(set(batch.prompt_of[i]))].sum())
        for i in range(len(batch.prompt_of))
    )
    size = batch.student_prompt.size + batch.teacher_prompt.size + 2 * batch.response.size
    return 1 - float(used) / size


def place(batch: DistillBatch, mesh: Mesh) -> DistillBatch:
    """The batch on the devices, groups cut over the batch axes."""
    return DistillBatch(
        *(jax.device_put(x, named(mesh, "batch", *[None] * (x.ndim - 1))) for x in batch)
    )
