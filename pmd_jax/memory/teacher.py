"""The teacher's prompt: the student's, and what training knows beside it.

The last user turn is extended in this order: the problem, strategies, lessons, behaviors, a kept
solution of an earlier visit, a sibling's solution, feedback, a closing line. What differs between
the rollouts of a group comes last, so that their prompts share a long beginning; most are equal.
`layout = "system"` puts the same sections, without the closing line, into the system turn.

With `sources = ("sibling", "feedback")` the prompt is SDPO's, letter by letter (lasgroup/SDPO at
0e6d510). Two things differ on purpose: the demonstration is a seeded random success, where SDPO's
choice depends on batch layout and response length; and sections are cut to their budgets before
the chat template is applied, where SDPO cuts the end of the prompt, assistant header included.

Left out: what memory gives for a problem (recall.py); the chat template, which the policy applies.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from pmd_jax.memory import TextMeter
from pmd_jax.memory.prompts import without_thinking
from pmd_jax.memory.recall import Control, Recalled
from pmd_jax.records import Experience, Message, Problem, Rollout, TeacherPrompt, Verdict

WRITTEN = frozenset({"insights", "behaviors"})
"""Sources that the model wrote, for which it must reflect."""
MEMORY = WRITTEN | {"experience"}
"""Sources that are read from the bank."""
SOURCES = ("sibling", "feedback", "insights", "behaviors", "experience")

CLOSING = "\n\nCorrectly solve the original question."
SIBLING = "\nCorrect solution:\n\n"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
STRATEGIES = "\nStrategies from earlier correct attempts:\n\n"
LESSONS = "\nLessons from earlier failed attempts:\n\n"
BEHAVIORS = "\nRelevant behaviors:\n\n"
EXPERIENCE = "\nCorrect solution from an earlier visit:\n\n"

TEMPLATE_TOKENS_PER_MESSAGE = 8
"""Set aside for what a chat template puts round a message, and once more for the reply's header."""


@dataclasses.dataclass(frozen=True, slots=True)
class TeacherConfig:
    """What the self-teacher is shown beside the problem.

    sources: some of "sibling", "feedback", "insights", "behaviors" and "experience", a success
        that memory kept, for groups where no sibling's solution is shown.
    layout: where the sections stand. "user" extends the last user turn, as SDPO. "system" extends
        the system turn instead, so that worked examples and the bare question are read last: a
        small model that learned the answer's format from examples loses it behind a long turn.
    top_k: behaviors retrieved per problem.
    control: "none", or whose memory is shown instead of the problem's own: "shuffled", "random" or
        "stale" (recall.py), the last by stale_steps.
    max_prompt_tokens: the whole prompt. Where it is short, behaviors give way first, then
        insights, then experience, feedback and sibling.
    *_tokens: the most a section may take; insight_tokens is for strategies and lessons together.
    feedback_only_without_sibling: SDPO's rule.
    probe_every: steps between looks at what the loss would be if the teacher read the same without
        memory, 0 for none. A look costs a forward pass.
    """

    sources: tuple[str, ...] = ("sibling", "feedback", "insights", "behaviors")
    layout: Literal["user", "system"] = "user"
    top_k: int = 3
    max_prompt_tokens: int = 10240
    sibling_tokens: int = 8192
    feedback_tokens: int = 2048
    insight_tokens: int = 700
    behavior_tokens: int = 500
    experience_tokens: int = 4096
    feedback_only_without_sibling: bool = True
    probe_every: int = 0
    control: Control = "none"
    stale_steps: int = 10

    def __post_init__(self) -> None:
        for source in self.sources:
            if source not in SOURCES:
                close = difflib.get_close_matches(source, SOURCES, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ValueError(
                    f"sources: unknown source {source!r}; {hint}known: {', '.join(SOURCES)}"
                )
        if len(set(self.sources)) != len(self.sources):
            raise ValueError(f"sources: must name each source once; got {self.sources}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "probe_every" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{field.name}: must be at least {least}; got {value}")


def check_budget(
    problems: Iterable[Problem],
    student_messages: Callable[[Problem], tuple[Message, ...]],
    meter: TextMeter,
    config: TeacherConfig,
) -> None:
    """Check, before training, that every problem's bare prompt leaves the budget unbroken.

    Raises ValueError naming the first problem whose own prompt and closing line do not fit.
    """
    for problem in problems:
        _room(problem, student_messages(problem), meter, config)


def build_teacher_prompts(
    group: Sequence[tuple[Rollout, Verdict]],
    problem: Problem,
    recalled: Recalled,
    student_messages: tuple[Message, ...],
    meter: TextMeter,
    config: TeacherConfig,
    seed: int,
) -> list[TeacherPrompt]:
    """One teacher prompt per rollout of a problem's group, in order.

    recalled: what memory gives for the problem. student_messages: the student's prompt,
    whose last user turn is extended; turns before it (system, worked examples) are kept.
    Where nothing is to be shown, the messages are the student's own. Equal prompts are equal
    tuples, so a caller can compute them once.
    Raises ValueError where the problem alone does not fit.
    """
    room = _room(problem, student_messages, meter, config)
    demonstrations = _demonstrations(group, seed) if "sibling" in config.sources else {}
    kept = _kept_success(group, recalled) if "experience" in config.sources else None
    prompts = []
    for rollout, verdict in group:
        sibling = demonstrations.get(rollout.id)
        sections = _wanted(recalled, sibling, kept, verdict.feedback, config)
        prompts.append(_fitted(rollout.id, sections, student_messages, room, meter, config))
    return prompts


def build_memory_prompts(
    problems: Sequence[Problem],
    recalled: Sequence[Recalled],
    student_messages: Callable[[Problem], tuple[Message, ...]],
    meter: TextMeter,
    config: TeacherConfig,
) -> list[TeacherPrompt]:
    """Problems with memory alone beside them, no attempt: for inference with memory.

    Insights and behaviors stand where the teacher reads them. Raises ValueError where a problem
    alone does not fit.
    """
    prompts = []
    for problem, found in zip(problems, recalled, strict=True):
        messages = student_messages(problem)
        room = _room(problem, messages, meter, config)
        sections = _wanted(found, None, None, "", config)
        prompts.append(_fitted("", sections, messages, room, meter, config))
    return prompts


# --- what to show -------------------------------------------------------------------------------


def _demonstrations(group: Sequence[tuple[Rollout, Verdict]], seed: int) -> dict[str, Rollout]:
    """Rollout id -> the sibling whose solution it is shown. A lone success is shown none.

    One random success serves the whole group; it is itself shown another one, if there is any.
    """
    successes = [r for r, verdict in group if verdict.correct and without_thinking(r.text).strip()]
    if not successes:
        return {}
    first = successes[0]
    order = random.Random(f"{seed}:{first.problem_id}:{first.step}").sample(
        successes, len(successes)
    )
    shown = {rollout.id: order[0] for rollout, _ in group}
    if len(order) > 1:
        shown[order[0].id] = order[1]
    else:
        del shown[order[0].id]
    return shown


def _kept_success(
    group: Sequence[tuple[Rollout, Verdict]], recalled: Recalled
) -> Experience | None:
    """The latest success in memory that is not of this group."""
    own = {rollout.id for rollout, _ in group}
    others = [
        e
        for e in recalled.experiences
        if e.verdict.correct and e.id not in own and without_thinking(e.text).strip()
    ]
    return others[-1] if others else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Section:
    """A heading and what stands under it: (id, text) items that are shown whole, or one text
    that may be cut."""

    name: str
    heading: str
    items: tuple[tuple[str, str], ...]
    may_cut: bool = False

    def render(self, texts: Sequence[str]) -> str:
        return self.heading + ("\n".join(texts) if self.may_cut else _bullets(texts))


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _wanted(
    recalled: Recalled,
    sibling: Rollout | None,
    kept: Experience | None,
    feedback: str,
    config: TeacherConfig,
) -> list[_Section]:
    """The sections that have something to show, in the order of the prompt, before any cut."""
    insights = recalled.insights if "insights" in config.sources else ()
    strategies = tuple((i.id, i.text) for i in insights if i.kind == "strategy")
    lessons = tuple((i.id, i.text) for i in insights if i.kind == "lesson")
    skills = tuple((b.id, b.text) for b in recalled.behaviors[: config.top_k])
    if "behaviors" not in config.sources:
        skills = ()
    told = "feedback" in config.sources and not (sibling and config.feedback_only_without_sibling)
    demo = ((sibling.id, without_thinking(sibling.text)),) if sibling else ()
    memory = ((kept.id, without_thinking(kept.text)),) if kept and not sibling else ()
    said = (("", feedback),) if told and feedback else ()
    sections = [
        _Section("strategies", STRATEGIES, strategies),
        _Section("lessons", LESSONS, lessons),
        _Section("behaviors", BEHAVIORS, skills),
        _Section("experience", EXPERIENCE, memory, may_cut=True),
        _Section("sibling", SIBLING, demo, may_cut=True),
        _Section("feedback", FEEDBACK, said, may_cut=True),
    ]
    return [section for section in sections if section.items]


# --- what fits ----------------------------------------------------------------------------------


def _room(
    problem: Problem, messages: Sequence[Message], meter: TextMeter, config: TeacherConfig
) -> int:
    """Tokens left for sections beside the student's messages and the closing line."""
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{problem.id}: the student's prompt must end with the user's turn")
    own = meter.count(CLOSING) + TEMPLATE_TOKENS_PER_MESSAGE * (len(messages) + 1)
    own += sum(meter.count(message["content"]) for message in messages)
    if own > config.max_prompt_tokens:
        raise ValueError(
            f"teacher.max_prompt_tokens: {problem.id} alone takes {own} tokens; "
            f"got {config.max_prompt_tokens}, raise it or drop the problem"
        )
    return config.max_prompt_tokens - own


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """A section as it fits: its text, "" where nothing did."""

    text: str
    ids: tuple[str, ...]
    tokens: int
    cut_tokens: int


def _fitted(
    rollout_id: str,
    sections: Sequence[_Section],
    student_messages: tuple[Message, ...],
    room: int,
    meter: TextMeter,
    config: TeacherConfig,
) -> TeacherPrompt:
    """The prompt with what fits: the most important sections take their room first."""
    wanted = {section.name: section for section in sections}
    shown: dict[str, _Shown] = {}
    for name, budget in (
        ("sibling", config.sibling_tokens),
        ("feedback", config.feedback_tokens),
        ("experience", config.experience_tokens),
    ):
        if name in wanted:
            shown[name] = _cut_text(wanted[name], min(budget, room), meter)
            room -= shown[name].tokens
    insights = [wanted[name] for name in ("strategies", "lessons") if name in wanted]
    chosen = _choose_items(insights, min(config.insight_tokens, room), meter)
    room -= sum(section.tokens for section in chosen.values())
    skills = [wanted["behaviors"]] if "behaviors" in wanted else []
    shown |= chosen | _choose_items(skills, min(config.behavior_tokens, room), meter)
    in_order = [(s.name, shown[s.name]) for s in sections]
    text = "".join(section.text for _, section in in_order)
    return TeacherPrompt(
        rollout_id=rollout_id,
        messages=_extended(student_messages, text, config) if text else student_messages,
        cited=tuple(key for _, section in in_order for key in section.ids if key),
        section_tokens={name: section.tokens for name, section in in_order if section.text},
        cut_tokens={name: section.cut_tokens for name, section in in_order if section.cut_tokens},
    )


def _extended(
    messages: tuple[Message, ...], text: str, config: TeacherConfig
) -> tuple[Message, ...]:
    """The student's messages with the sections where the layout wants them."""
    first, last = messages[0], messages[-1]
    if config.layout == "user":
        return (*messages[:-1], {**last, "content": last["content"] + text + CLOSING})
    if first["role"] != "system":
        return ({"role": "system", "content": text.strip()}, *messages)
    return ({**first, "content": first["content"].rstrip() + "\n" + text}, *messages[1:])


def _cut_text(section: _Section, budget: int, meter: TextMeter) -> _Shown:
    """The beginning of a section's one text, within `budget` tokens, heading included."""
    ((key, text),) = section.items
    full = meter.count(section.render([text]))
    allowed = max(0, budget - meter.count(section.heading))
    if full > budget:
        text = meter.cut(text, allowed).rstrip() if allowed else ""
    if not text:
        return _Shown("", (), 0, full)
    rendered = section.render([text])
    tokens = meter.count(rendered)
    return _Shown(rendered, (key,), tokens, max(0, full - tokens))


def _choose_items(sections: Sequence[_Section], budget: int, meter: TextMeter) -> dict[str, _Shown]:
    """The items of sections that share a budget, whole or not at all, the first of each first."""
    chosen: dict[str, list[tuple[str, str]]] = {section.name: [] for section in sections}

    def tokens(section: _Section, items: Sequence[tuple[str, str]]) -> int:
        return meter.count(section.render([text for _, text in items])) if items else 0

    for rank in range(max((len(section.items) for section in sections), default=0)):
        for section in sections:
            if rank < len(section.items):
                chosen[section.name].append(section.items[rank])
                if sum(tokens(s, chosen[s.name]) for s in sections) > budget:
                    chosen[section.name].pop()
    result = {}
    for section in sections:
        items = chosen[section.name]
        used = tokens(section, items)
        text = section.render([text for _, text in items]) if items else ""
        missing = tokens(section, section.items) - used
        result[section.name] = _Shown(text, tuple(key for key, _ in items), used, missing)
    return result
