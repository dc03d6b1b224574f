"""Abstraction: the insights of related problems become behaviors, on a slower clock.

The training problems are clustered once, by the meaning of their questions. When an abstraction
is due, the cluster with the most news is read, and one call proposes operations on behavior
memory: that one call per step is the paper's limit. Clusters without news wait, so over time every
cluster is read, and none twice for the same insights.

Left out: what becomes of the operations, merging and eviction (bank.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from pmd_jax.memory import Embed, Generate, guards, prompts, retrieval
from pmd_jax.memory.bank import Bank, Operation
from pmd_jax.memory.merging import behavior_id
from pmd_jax.memory.prompts import BehaviorKind, Draft, Note
from pmd_jax.memory.reflection import Counts, ReflectionConfig, Refused, Tally
from pmd_jax.records import Behavior, Insight, Message, Problem


@dataclasses.dataclass(frozen=True, slots=True)
class Abstracted:
    """operations: for `Bank.apply_operations`. problem_ids: read, for `Bank.mark_abstracted`.

    cluster: the label that was read, or None where none was due or had news.
    """

    operations: tuple[Operation, ...] = ()
    problem_ids: tuple[str, ...] = ()
    cluster: int | None = None
    counts: Counts = dataclasses.field(default_factory=Counts)
    refused: tuple[Refused, ...] = ()


def cluster(
    problems: Sequence[Problem], embed: Embed, config: ReflectionConfig, seed: int = 0
) -> Int[np.ndarray, " N"]:
    """A label per training problem, by spherical k-means on their questions.

    Questions do not change, so this is computed once and not, as in the paper, every K steps.
    """
    if not problems:
        raise ValueError("problems: must hold at least one to cluster; got none")
    k = min(config.clusters, len(problems)) or retrieval.cluster_count(len(problems))
    embeddings = np.asarray(embed([retrieval.query_text(p) for p in problems]))
    return retrieval.spherical_kmeans(embeddings, k, seed)


def is_due(step: int, config: ReflectionConfig) -> bool:
    """Whether behaviors are written at this step: after the warm-up, every so many steps."""
    since = step - config.behaviors_warmup
    return since >= 0 and since % config.behaviors_every == 0


def abstract(
    problems: Sequence[Problem],
    labels: Int[np.ndarray, " N"],
    bank: Bank,
    generate: Generate,
    step: int,
    config: ReflectionConfig,
) -> Abstracted:
    """Operations from the cluster with the most news. The bank is read, not changed.

    problems, labels: the training problems and their clusters. At most one call of `generate`,
    with one chat ("lines": one per kind of behavior).
    """
    if bank.is_frozen or not is_due(step, config):
        return Abstracted()
    label = _most_news(problems, labels, bank, config)
    if label is None:
        return Abstracted()
    members = [p for p, at in zip(problems, labels.tolist(), strict=True) if at == label]
    read = _worth_reading(members, bank)[: config.problems_per_call]
    chats = _chats(read, bank, config)
    tally = Tally()
    operations = []
    replies = generate([messages for _, messages, _ in chats])
    for (kind, _, insights), reply in zip(chats, replies, strict=True):
        for draft in _drafts(kind, reply, read, config, tally):
            operations.append(_operation(draft, insights, step))
    ids = tuple(p.id for p in read)
    return Abstracted(tuple(operations), ids, label, tally.counts(len(chats)), tuple(tally.refused))


def _has_news(problem: Problem, bank: Bank) -> bool:
    """Whether the problem has an insight newer than the last time its insights were read."""
    newest, last_read = bank.newest_insight(problem.id), bank.abstracted_at(problem.id)
    return newest is not None and (last_read is None or newest > last_read)


def _most_news(
    problems: Sequence[Problem],
    labels: Int[np.ndarray, " N"],
    bank: Bank,
    config: ReflectionConfig,
) -> int | None:
    """The cluster with the most problems with news; the lower label of equals."""
    with_insights = dict.fromkeys(sorted(set(labels.tolist())), 0)
    with_news = dict(with_insights)
    for problem, label in zip(problems, labels.tolist(), strict=True):
        with_insights[label] += bank.newest_insight(problem.id) is not None
        with_news[label] += _has_news(problem, bank)
    ready = [
        label
        for label, number in with_insights.items()
        if number >= config.min_problems_per_cluster and with_news[label]
    ]
    return max(ready, key=lambda label: with_news[label], default=None)


def _worth_reading(members: Sequence[Problem], bank: Bank) -> list[Problem]:
    """The members with insights: those with news first, then by their latest insight."""
    holding = [(newest, p) for p in members if (newest := bank.newest_insight(p.id)) is not None]
    holding.sort(key=lambda pair: (not _has_news(pair[1], bank), -pair[0], pair[1].id))
    return [problem for _, problem in holding]


_Chat = tuple[BehaviorKind | None, tuple[Message, ...], tuple[Insight, ...]]
"""The kind asked for (None: any), the messages, and the insights that they show."""


def _chats(read: Sequence[Problem], bank: Bank, config: ReflectionConfig) -> list[_Chat]:
    insights = tuple(i for p in read for i in bank.insights(p.id))
    if config.style == "json":
        names = [b.name for b in bank.behaviors]
        notes = [_note(p, bank) for p in read]
        messages = prompts.behaviors_prompt(notes, names, config.new_behaviors_per_call)
        return [(None, messages, insights)]
    chats: list[_Chat] = []
    kinds: tuple[tuple[BehaviorKind, Literal["strategy", "lesson"]], ...]
    kinds = (("skill", "strategy"), ("mistake", "lesson"))
    for kind, source in kinds:
        shown = tuple(i for i in insights if i.kind == source)[: config.problems_per_call]
        if shown:
            messages = prompts.behavior_line_prompt(kind, [i.text for i in shown])
            chats.append((kind, messages, shown))
    return chats


def _note(problem: Problem, bank: Bank) -> Note:
    insights = bank.insights(problem.id)
    newest = max(insights, key=lambda i: i.step)
    return Note(
        problem.stem,
        newest.success_ratio,
        tuple(i.text for i in insights if i.kind == "strategy"),
        tuple(i.text for i in insights if i.kind == "lesson"),
    )


def _drafts(
    kind: BehaviorKind | None,
    reply: str,
    read: Sequence[Problem],
    config: ReflectionConfig,
    tally: Tally,
) -> list[Draft]:
    """The operations of a reply that are fit for memory."""
    if kind is None:
        drafts, problems = prompts.parse_behaviors(reply, config.new_behaviors_per_call)
    else:
        drafts, problems = prompts.parse_behavior_line(kind, reply)
    about = ",".join(p.id for p in read)
    tally.unparsable(about, problems, reply)
    sources = [*(p.question for p in read), prompts.BEHAVIOR_RULES]
    fit = []
    for draft in drafts:
        text = f"{draft.when}. {draft.instruction}"
        leak = guards.gives_away_any(text, read)
        flaw = guards.degenerate(draft.instruction, ()) or guards.degenerate(text, sources)
        is_change = draft.operation != "NONE"
        if tally.admits(about, text, leak if is_change else "", flaw if is_change else ""):
            fit.append(draft)
    return fit


def _operation(draft: Draft, insights: Sequence[Insight], step: int) -> Operation:
    if draft.operation == "NONE":
        return Operation("NONE")
    behavior = Behavior(
        id=behavior_id(draft.name, step),
        name=draft.name,
        kind=draft.kind,
        when=draft.when,
        instruction=draft.instruction,
        step=step,
        insight_ids=tuple(i.id for i in insights),
        last_used=step,
    )
    return Operation(draft.operation, behavior)
