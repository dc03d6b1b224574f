"""Reflection: the attempts of a step become insights, one group at a time.

The policy reads its own graded attempts at a problem and writes what led to the right ones
(strategies) and what went wrong in the others (lessons), in contrast where the group has both.
All calls of a step go to the model as one batch. What the guards refuse is counted, not kept.

Left out: keeping insights (bank.py), and who writes: `generate` is borrowed.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pmd_jax.memory import Generate, TextMeter, guards, prompts
from pmd_jax.memory.bank import Bank
from pmd_jax.memory.prompts import Attempt, InsightKind
from pmd_jax.records import Experience, Insight, Message, Problem

Group = tuple[Problem, tuple[Experience, ...]]
"""A problem and all of its attempts of this step."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReflectionConfig:
    """How insights and behaviors are written.

    style: how a reply is asked for, see prompts.py.
    max_new_tokens, behaviors_max_new_tokens: length of a reply; for whoever lends `generate`.
    temperature: of the reply; likewise.
    attempts_per_outcome: right and wrong attempts shown, at most so many of each ("lines": one).
    attempt_tokens: what is shown of one attempt, and of its feedback.
    skip_solved: no reflection on a group that is all correct where strategies are full.
    strategies, lessons: asked for per reply ("lines": one); 0 turns the kind off.
    behaviors_every, behaviors_warmup: steps between two abstractions, and before the first.
    clusters: number of clusters of training problems; 0 chooses by their number.
    min_problems_per_cluster: with insights, before a cluster is abstracted.
    problems_per_call, new_behaviors_per_call: problems read, and operations allowed, per call.
    writer: of behaviors. "policy", the folder of a local model, or "openai:URL#MODEL" for a
        server; the paper used GPT-5.4.
    writer_timeout_seconds, writer_retries: patience with a server.
    """

    style: Literal["json", "lines"] = "json"
    max_new_tokens: int = 512
    temperature: float = 0.7
    attempts_per_outcome: int = 2
    attempt_tokens: int = 1500
    skip_solved: bool = True
    strategies: int = 3
    lessons: int = 3
    behaviors_every: int = 1
    behaviors_warmup: int = 0
    behaviors_max_new_tokens: int = 768
    clusters: int = 0
    min_problems_per_cluster: int = 3
    problems_per_call: int = 8
    new_behaviors_per_call: int = 3
    writer: str = "policy"
    writer_timeout_seconds: float = 60.0
    writer_retries: int = 3

    def __post_init__(self) -> None:
        may_be_zero = ("strategies", "lessons", "behaviors_warmup", "clusters", "writer_retries")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in may_be_zero else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{field.name}: must be at least {least}; got {value}")
        if self.temperature < 0:
            raise ValueError(f"temperature: must be at least 0; got {self.temperature}")
        if self.writer_timeout_seconds <= 0:
            raise ValueError(
                f"writer_timeout_seconds: must be above 0; got {self.writer_timeout_seconds}"
            )
        if not self.writer or (
            self.writer.startswith("openai:")
            and not re.fullmatch(r"openai:https?://[^#\s]+#\S+", self.writer)
        ):
            raise ValueError(
                'writer: must be "policy", the folder of a model, or '
                f'"openai:http://host/v1#model"; got {self.writer!r}'
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """What became of the replies. parsed = leaked + degenerate + usable.

    calls: chats sent. parsed: items read. unparsable: items, or whole replies, that could not be.
    reasons: why, for all that was not usable.
    """

    calls: int = 0
    parsed: int = 0
    unparsable: int = 0
    leaked: int = 0
    degenerate: int = 0
    usable: int = 0
    reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def usable_fraction(self) -> float:
        """usable / (parsed + unparsable): share of all that was written; 0 where nothing was."""
        return self.usable / max(1, self.parsed + self.unparsable)

    def metrics(self) -> dict[str, float]:
        """The counts and the fraction, by name."""
        names = ("calls", "parsed", "unparsable", "leaked", "degenerate", "usable")
        return {**{n: getattr(self, n) for n in names}, "usable_fraction": self.usable_fraction}


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """A text that was kept out of memory, and why; for the log."""

    about: str
    reason: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reflected:
    """insights: new ones per problem that was reflected on; problems that gave none hold ()."""

    insights: Mapping[str, tuple[Insight, ...]]
    counts: Counts
    refused: tuple[Refused, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """One chat, and what is needed to read its reply."""

    problem: Problem
    limits: Mapping[InsightKind, int]
    success_ratio: float
    experience_ids: tuple[str, ...]
    messages: tuple[Message, ...]


def reflect(
    groups: Mapping[str, Group],
    bank: Bank,
    generate: Generate,
    meter: TextMeter,
    step: int,
    config: ReflectionConfig,
) -> Reflected:
    """New insights for the problems of this step. The bank is read, not changed.

    groups: per problem id, the whole group of this step. A frozen bank is not written for.
    """
    calls = [
        call
        for problem, group in groups.values()
        if not _skipped(problem, group, bank, config)
        for call in _calls(problem, group, bank, meter, config)
    ]
    replies = generate([call.messages for call in calls]) if calls else []
    insights: dict[str, tuple[Insight, ...]] = {}
    tally = Tally()
    for call, reply in zip(calls, replies, strict=True):
        items = _read(call, reply, config, tally)
        new = _as_insights(call, items, step)
        insights[call.problem.id] = (*insights.get(call.problem.id, ()), *new)
    return Reflected(insights, tally.counts(len(calls)), tuple(tally.refused))


def _skipped(
    problem: Problem, group: Sequence[Experience], bank: Bank, config: ReflectionConfig
) -> bool:
    if bank.is_frozen or not group:
        return True
    strategies = [i for i in bank.insights(problem.id) if i.kind == "strategy"]
    is_full = len(strategies) >= bank.config.strategies_per_problem
    return config.skip_solved and is_full and all(e.verdict.correct for e in group)


def _calls(
    problem: Problem,
    group: Sequence[Experience],
    bank: Bank,
    meter: TextMeter,
    config: ReflectionConfig,
) -> list[_Call]:
    """The chats for one group: one, or one per kind where the style is "lines"."""
    per_outcome = 1 if config.style == "lines" else config.attempts_per_outcome
    correct = _distinct([e for e in group if e.verdict.correct])[:per_outcome]
    wrong = _distinct([e for e in group if not e.verdict.correct])[:per_outcome]
    limits: dict[InsightKind, int] = {}
    if correct and config.strategies:
        limits["strategy"] = config.strategies
    if wrong and config.lessons:
        limits["lesson"] = config.lessons
    if not limits:
        return []
    num_correct = sum(e.verdict.correct for e in group)
    ratio = num_correct / len(group)
    ids = tuple(e.id for e in (*correct, *wrong))
    shown_correct, shown_wrong = (
        [
            Attempt(
                meter.cut(e.text.strip(), config.attempt_tokens),
                meter.cut(e.verdict.feedback.strip(), config.attempt_tokens),
            )
            for e in outcome
        ]
        for outcome in (correct, wrong)
    )
    if config.style == "lines":
        return [
            _Call(
                problem,
                {kind: 1},
                ratio,
                ids,
                prompts.reflection_line_prompt(kind, problem.stem, shown_correct, shown_wrong),
            )
            for kind in limits
        ]
    previous = {
        kind: [i.text for i in bank.insights(problem.id) if i.kind == kind] for kind in limits
    }
    messages = prompts.reflection_prompt(
        problem.question, shown_correct, shown_wrong, num_correct, len(group), previous, limits
    )
    return [_Call(problem, limits, ratio, ids, messages)]


def _distinct(experiences: Sequence[Experience]) -> list[Experience]:
    """The first attempt of each text, in order, so that what is shown differs."""
    first: dict[str, Experience] = {}
    for experience in experiences:
        first.setdefault(experience.text.strip(), experience)
    return list(first.values())


def _read(
    call: _Call, reply: str, config: ReflectionConfig, tally: Tally
) -> list[tuple[InsightKind, str]]:
    """The items of a reply that are fit for memory."""
    items: list[tuple[InsightKind, str]]
    if config.style == "lines":
        texts, problems = prompts.parse_line(reply)
        items = [(kind, text) for kind in call.limits for text in texts]
    else:
        items, problems = prompts.parse_reflection(reply, call.limits)
    tally.unparsable(call.problem.id, problems, reply)
    sources = [call.problem.question, prompts.INSIGHT_RULES, *prompts.LINE_ASKS.values()]
    return [
        (kind, text)
        for kind, text in items
        if tally.admits(
            call.problem.id,
            text,
            leak=guards.gives_away(text, call.problem),
            flaw=guards.degenerate(text, sources),
        )
    ]


def _as_insights(
    call: _Call, items: Sequence[tuple[InsightKind, str]], step: int
) -> tuple[Insight, ...]:
    numbers: Counter[str] = Counter()
    insights = []
    for kind, text in items:
        numbers[kind] += 1
        key = f"{call.problem.id}@{step}#{kind}{numbers[kind]}"
        insights.append(
            Insight(key, call.problem.id, step, kind, text, call.success_ratio, call.experience_ids)
        )
    return tuple(insights)


class Tally:
    """Counts what becomes of replies, and keeps what was refused."""

    def __init__(self) -> None:
        self.refused: list[Refused] = []
        self._found: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def unparsable(self, about: str, problems: Mapping[str, int], reply: str) -> None:
        """Note what a parser could not read in a reply."""
        self._reasons.update(problems)
        self._found["unparsable"] += sum(problems.values())
        self.refused += [Refused(about, reason, reply) for reason in problems]

    def admits(self, about: str, text: str, leak: str, flaw: str) -> bool:
        """Count one item that was read; whether no guard refuses it."""
        self._found["parsed"] += 1
        self._found["leaked" if leak else "degenerate" if flaw else "usable"] += 1
        if reason := leak or flaw:
            self._reasons[reason] += 1
            self.refused.append(Refused(about, reason, text))
        return not (leak or flaw)

    def counts(self, num_calls: int) -> Counts:
        return Counts(calls=num_calls, reasons=dict(self._reasons), **self._found)
