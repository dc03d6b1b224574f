"""Every prompt that memory sends to a model, each beside the parser of its reply.

No prompt of the paper is public; these are ours, within what is known of it: strategies and
lessons, contrasted where both outcomes exist; behaviors as skills or mistakes to avoid, with names
`behavior_<snake_case>`.

Two styles. "json" asks for everything in one reply, for models of about 8B parameters. "lines"
asks for one sentence of one kind, and begins the reply itself ("Lesson: When"), for models too
small to keep to a format.

A parser returns (items, problems): what could be read, and a count by reason of what could not. It
forgives only what cannot change the meaning: code fences, trailing commas, bullets and numbering,
one item in place of a list, a reply cut off behind whole items.

Left out: whether an item is fit for memory (guards.py), calls and counts (reflection.py,
behaviors.py), and the teacher's prompt (teacher.py).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pmd_jax.records import Message

Style = Literal["json", "lines"]
InsightKind = Literal["strategy", "lesson"]
BehaviorKind = Literal["skill", "mistake"]
Problems = Counter[str]

VERSION = 1
"""Goes up with every change of a prompt's wording. A saved bank names the one that wrote it."""

PLURAL: Mapping[InsightKind, str] = {"strategy": "strategies", "lesson": "lessons"}
MAX_NAME_CHARS = 60
MAX_STEM_CHARS = 1200


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt as the reflector is shown it, already cut to length."""

    text: str
    feedback: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """One problem of a cluster as the writer of behaviors is shown it."""

    stem: str
    success_ratio: float
    strategies: tuple[str, ...]
    lessons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """One behavior operation as read from a reply. The name is "" where the reply gave none."""

    operation: Literal["ADD", "UPDATE", "NONE"]
    name: str = ""
    kind: BehaviorKind = "skill"
    when: str = ""
    instruction: str = ""


# --- insights, all in one JSON object -----------------------------------------------------------

INSIGHT_RULES = """\
Rules for every item:
- One or two sentences of the form "When <situation>, <what to do or avoid>, because <why>."
- It must help on similar problems, so describe the method and not the result.
- Never name an option letter, the final answer or its value, and never write complete code."""


def reflection_prompt(
    question: str,
    correct: Sequence[Attempt],
    wrong: Sequence[Attempt],
    num_correct: int,
    num_attempts: int,
    previous: Mapping[InsightKind, Sequence[str]],
    limits: Mapping[InsightKind, int],
) -> tuple[Message, ...]:
    """Ask for at most `limits[kind]` items of each kind in `limits`.

    correct, wrong: the attempts shown, out of `num_correct` and the rest of `num_attempts`.
    """
    parts = [
        f"Below are graded attempts at one problem; {num_correct} of {num_attempts} were correct. "
        "Write down what to remember for the next time.",
        f"Problem:\n{question}",
        *_attempts("Correct attempt", correct),
        *_attempts("Wrong attempt", wrong),
    ]
    if any(previous.values()):
        notes = [f"{PLURAL[k].capitalize()}:\n{_bullets(v)}" for k, v in previous.items() if v]
        parts.append("Notes from earlier visits to this problem:\n" + "\n".join(notes))
    asked = {
        "strategy": "strategies: what led to the correct attempts",
        "lesson": "lessons: mistakes in the wrong attempts, and why they fail",
    }
    parts.append(
        "Write "
        + " and ".join(f"at most {number} {asked[kind]}" for kind, number in limits.items())
        + "."
        + (" Name what separates right from wrong." if correct and wrong else "")
        + (" No attempt was correct, so do not claim what the answer is." if not correct else "")
        + (" Keep earlier notes that still hold, better worded." if any(previous.values()) else "")
    )
    form = {PLURAL[kind]: ["When ..., ..."] for kind in limits}
    parts += [INSIGHT_RULES, f"Reply with JSON alone, in this form:\n{json.dumps(form)}"]
    return ({"role": "user", "content": "\n\n".join(parts)},)


def parse_reflection(
    reply: str, limits: Mapping[InsightKind, int]
) -> tuple[list[tuple[InsightKind, str]], Problems]:
    """The items of each kind in `limits`, in the order of the reply."""
    value, problems = _read_json(reply, "{")
    if value is None:
        return [], problems
    items: list[tuple[InsightKind, str]] = []
    for kind, limit in limits.items():
        if (listed := value.pop(PLURAL[kind], None)) is None:
            problems["missing key"] += 1
            continue
        listed = [listed] if isinstance(listed, str) else listed
        if not isinstance(listed, list):
            problems["not a list"] += 1
            continue
        texts = [_clean(item) for item in listed if isinstance(item, str) and _clean(item)]
        problems["not text"] += len(listed) - len(texts)
        problems["too many"] += max(0, len(texts) - limit)
        items += [(kind, text) for text in texts[:limit]]
    problems["unknown key"] += len(value)
    return items, +problems


def _attempts(title: str, attempts: Sequence[Attempt]) -> list[str]:
    return [
        f"{title} {i}:\n{a.text}" + (f"\nFeedback on it:\n{a.feedback}" if a.feedback else "")
        for i, a in enumerate(attempts, start=1)
    ]


# --- one insight, as a line ---------------------------------------------------------------------

LINE_ASKS: Mapping[InsightKind, str] = {
    "strategy": "Write one short strategy for solving questions like this. Do not give the answer.",
    "lesson": "Write one short lesson about the mistake in the wrong answer. "
    "Do not give the answer.",
}
OPENING = "When"


def reflection_line_prompt(
    kind: InsightKind, stem: str, correct: Sequence[Attempt], wrong: Sequence[Attempt]
) -> tuple[Message, ...]:
    """Ask for one insight, showing at most one attempt of each outcome and no options."""
    parts = [f"Question: {stem}"]
    parts += [f"A right answer:\n{a.text}" for a in correct[:1]]
    parts += [f"A wrong answer:\n{a.text}" for a in wrong[:1]]
    return _begun(parts, LINE_ASKS[kind], kind.capitalize())


def parse_line(reply: str) -> tuple[list[str], Problems]:
    """The sentence that the reply makes of the opening: [] or [text]."""
    line, newline, _ = reply.partition("\n")
    gap = " " if line[:1].isalnum() else ""  # some tokenizers lose the space that leads
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"“(])", f"{OPENING}{gap}{line}".strip())
    text = _clean(sentences[0])
    if text == OPENING:
        return [], Counter({"empty": 1})
    if not newline and not re.search(r"[.!?][\"”')\]]*$", text):
        return [], Counter({"cut off": 1})
    return [text], Counter()


def _begun(parts: Sequence[str], ask: str, label: str) -> tuple[Message, ...]:
    return (
        {"role": "user", "content": "\n\n".join([*parts, ask])},
        {"role": "assistant", "content": f"{label}: {OPENING}"},
    )


# --- behaviors, all in one JSON list ------------------------------------------------------------

BEHAVIOR_RULES = """\
Rules for every behavior:
- It must hold for the whole family of problems, not for one of them.
- kind is "skill" (what to do) or "mistake" (what to avoid).
- name is behavior_<snake_case>, three to six words; when says in which situation it applies;
  instruction has at most 40 words.
- Never name an option letter or the answer of a problem, and never write complete code."""

BEHAVIOR_FORM = (
    '[{"op": "ADD", "name": "behavior_...", "kind": "skill", "when": "When ...", '
    '"instruction": "..."}]'
)


def behaviors_prompt(
    notes: Sequence[Note], existing_names: Sequence[str], max_new: int
) -> tuple[Message, ...]:
    """Ask for operations on behavior memory from the insights of related problems."""
    shown = []
    for i, note in enumerate(notes, start=1):
        parts = [f"Problem {i} ({note.success_ratio:.0%} solved):\n{note.stem[:MAX_STEM_CHARS]}"]
        if note.strategies:
            parts.append(f"Strategies:\n{_bullets(note.strategies)}")
        if note.lessons:
            parts.append(f"Lessons:\n{_bullets(note.lessons)}")
        shown.append("\n".join(parts))
    content = [
        "Below are related problems with what was learned on each. Abstract it into behaviors: "
        "reusable skills, or mistakes to avoid.",
        *shown,
        f"Behaviors that exist already:\n{_bullets(existing_names) or '(none)'}",
        f"Write at most {max_new} operations. ADD a behavior that is missing; UPDATE one that "
        "exists, under its name, if you can word it better; "
        'write [{"op": "NONE"}] if nothing is worth changing.',
        BEHAVIOR_RULES,
        f"Reply with JSON alone, in this form:\n{BEHAVIOR_FORM}",
    ]
    return ({"role": "user", "content": "\n\n".join(content)},)


def parse_behaviors(reply: str, max_new: int) -> tuple[list[Draft], Problems]:
    """The operations of a reply, at most `max_new`."""
    value, problems = _read_json(reply, "[{")
    if value is None:
        return [], problems
    listed = [value] if isinstance(value, dict) else value
    drafts = []
    for item in listed:
        draft, problem = _read_draft(item)
        if draft is None:
            problems[problem] += 1
        else:
            drafts.append(draft)
    problems["too many"] += max(0, len(drafts) - max_new)
    return drafts[:max_new], +problems


def _read_draft(item: Any) -> tuple[Draft | None, str]:
    if not isinstance(item, dict):
        return None, "not an object"
    if any(not isinstance(value, str) for value in item.values()):
        return None, "not text"
    operation = item.get("op", "").strip().upper()
    if operation not in ("ADD", "UPDATE", "NONE"):
        return None, "unknown operation"
    if operation == "NONE":
        return Draft("NONE"), ""
    if missing := {"name", "kind", "when", "instruction"} - item.keys():
        return None, f"missing {min(missing)}"
    kind = item["kind"].strip().lower()
    if kind not in ("skill", "mistake"):
        return None, "unknown kind"
    name = snake_name(item["name"])
    if not name:
        return None, "no name"
    return Draft(operation, name, kind, _clean(item["when"]), _clean(item["instruction"])), ""


# --- one behavior, as a line --------------------------------------------------------------------

BEHAVIOR_LINES: Mapping[BehaviorKind, tuple[str, str]] = {
    "skill": ("Skill", "Write one short skill that helps with all questions of this kind."),
    "mistake": (
        "Mistake to avoid",
        "Write one short mistake to avoid in all questions of this kind.",
    ),
}

_COMMON_WORDS = """
a an and any are as at avoid be by can do does don for from given has have if in is it its make not
of on or that the their them then there these this to use using was we what when which will with you
your should must need problem problems question questions
""".split()  # noqa: SIM905  # thirty lines of one word each read no better


def behavior_line_prompt(kind: BehaviorKind, insights: Sequence[str]) -> tuple[Message, ...]:
    """Ask for one behavior of one kind, from insights of that kind."""
    label, ask = BEHAVIOR_LINES[kind]
    return _begun([f"Notes on similar questions:\n{_bullets(insights)}"], ask, label)


def parse_behavior_line(kind: BehaviorKind, reply: str) -> tuple[list[Draft], Problems]:
    """The behavior that a sentence "When <situation>, <instruction>." states: [] or [draft].

    The name is made of the first words of the instruction that are not common ones.
    """
    texts, problems = parse_line(reply)
    if not texts:
        return [], problems
    when, comma, instruction = texts[0].partition(", ")
    if not comma or not instruction:
        return [], Counter({"no instruction": 1})
    telling = [w for w in re.findall(r"[a-z]+", instruction.lower()) if w not in _COMMON_WORDS]
    name = snake_name(" ".join(telling[:4]))
    if not name:
        return [], Counter({"no name": 1})
    return [Draft("ADD", name, kind, when, instruction)], problems


def snake_name(text: str) -> str:
    """`behavior_<snake_case>` of any wording, at whole words; "" where nothing is left."""
    parts = re.findall(r"[a-z0-9]+", text.lower().removeprefix("behavior"))
    name = "behavior"
    for part in parts:
        if len(name) + 1 + len(part) > MAX_NAME_CHARS:
            break
        name += f"_{part}"
    return "" if name == "behavior" else name


# --- reading --------------------------------------------------------------------------------------


def without_thinking(text: str) -> str:
    """A text less the thinking that a model puts before it (SDPO's rule for demonstrations)."""
    return re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _clean(text: str) -> str:
    """One line without bullet, number, label or emphasis."""
    text = re.sub(r"\s+", " ", text.replace("**", "")).strip()
    text = re.sub(r"^(?:[-•*]|\(?\d{1,2}[.)])\s+", "", text)
    return re.sub(r"^(?i:strategy|lesson|skill|mistake(?: to avoid)?)\s*\d*:\s*", "", text).strip()


def _read_json(reply: str, openers: str) -> tuple[Any, Problems]:
    """The first JSON value that begins with one of `openers`, or None; and what was wrong."""
    text = without_thinking(reply)
    if fenced := re.search(r"```(?:json)?\s*\n(.*?)(?:\n\s*```|$)", text, re.DOTALL):
        text = fenced[1]
    start = re.search(f"[{re.escape(openers)}]", text)
    if start is None:
        return None, Counter({"not JSON": 1})
    text = text[start.start() :]
    decoder = json.JSONDecoder(strict=False)
    for candidate, problems in (
        (text, Counter[str]()),
        (_without_trailing_commas(text), Counter[str]()),
        (_without_trailing_commas(_closed(text)), Counter({"cut off": 1})),
    ):
        try:
            return decoder.raw_decode(candidate)[0], problems
        except json.JSONDecodeError:  # the next, more forgiving reading
            continue
    return None, Counter({"not JSON": 1})


def _without_trailing_commas(text: str) -> str:
    return re.sub(r",(\s*[}\]])", r"\1", text)


def _closed(text: str) -> str:
    """JSON that breaks off, cut behind its last whole item and closed; "" where nothing is whole.

    Items are the strings and objects of a list, and lists; half a string is no item.
    """
    closers: list[str] = []
    whole: tuple[int, str] | None = None
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|"|[\[\]{}]', text, re.DOTALL):
        token = match[0]
        if token == '"':  # a string that never ends
            break
        if token in "[{":
            closers.append("]" if token == "[" else "}")
        elif token in "]}" and closers:
            closers.pop()
        if closers and (token in ("[", "]", "}") or closers[-1] == "]"):
            whole = match.end(), "".join(reversed(closers))
    return text[: whole[0]] + whole[1] if whole and closers else ""
