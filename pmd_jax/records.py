"""Every noun that flows between the rooms: frozen records with stable ids, no JAX.

Ids are made of what a record is about (problem, step, sample), never of a counter of a process,
so that each distilled token can be walked back:
teacher prompt -> behavior -> insight -> experience -> rollout -> problem, and forward again.
`step` means "policy updates so far" on every record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np

Message = dict[str, str]
"""One turn of a chat: {"role": "system" | "user" | "assistant", "content": text}."""

Split = Literal["train", "validation", "test"]
StopReason = Literal["stop", "length"]

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True, slots=True)
class MultipleChoice:
    """How a multiple-choice problem is graded. `answer` is a letter: "A" is options[0]."""

    options: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.letters:
            raise ValueError(
                f"answer: must be one of {', '.join(self.letters)}, "
                f"one letter for each of {len(self.options)} options; got {self.answer!r}"
            )

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(chr(ord("A") + i) for i in range(len(self.options)))

    @property
    def correct_option(self) -> str:
        return self.options[self.letters.index(self.answer)]


@dataclasses.dataclass(frozen=True, slots=True)
class UnitTests:
    """How a programming problem is graded: its code must pass every test.

    inputs, outputs: one text each per test, of standard input and output; or, where `function`
    names what is called, one JSON value a line per argument, and the JSON value that it returns.
    time_limit_seconds: CPU time of one test.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: str = ""
    time_limit_seconds: float = 6.0

    def __post_init__(self) -> None:
        if not self.inputs or len(self.inputs) != len(self.outputs):
            raise ValueError(
                f"inputs, outputs: must be as many, one or more; got {len(self.inputs)} and "
                f"{len(self.outputs)}"
            )
        if self.time_limit_seconds <= 0:
            raise ValueError(f"time_limit_seconds: must be above 0; got {self.time_limit_seconds}")


Check = MultipleChoice | UnitTests


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One question. `question` is the user's turn, options included; `stem` is without them.

    id: "<task>/<subject>/<split>/<name>", unique over everything that a run may read.
    """

    id: str
    subject: str
    subtask: str
    stem: str
    question: str
    system: str
    check: Check

    @property
    def split(self) -> str:
        return self.id.split("/")[-2]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response of the policy. tokens int32 [T]; logprobs float32 [T], nats, of the policy."""

    problem_id: str
    step: int
    sample: int
    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    stop: StopReason

    @property
    def id(self) -> str:
        return f"{self.problem_id}@{self.step}.{self.sample}"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response. reward in [0, 1]; feedback is "" when there is none.

    tests_passed: of a program, the share of its tests; None of other answers.
    revealed: the share of the feedback's characters that expected outputs make up.
    """

    correct: bool
    reward: float
    feedback: str
    well_formed: bool
    tests_passed: float | None = None
    revealed: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Experience:
    """Level 0: one attempt as it was. The id is the rollout's."""

    id: str
    problem_id: str
    step: int
    text: str
    verdict: Verdict


@dataclasses.dataclass(frozen=True, slots=True)
class Insight:
    """Level 1: one strategy or lesson of one problem.

    success_ratio: share of correct rollouts in the group it was read from (its confidence).
    experience_ids: the attempts that the reflector was shown.
    """

    id: str
    problem_id: str
    step: int
    kind: Literal["strategy", "lesson"]
    text: str
    success_ratio: float
    experience_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Behavior:
    """Level 2: a skill, or a mistake to avoid, abstracted over a cluster of problems.

    insight_ids: what it was abstracted from. uses: teacher prompts that showed it.
    last_used: step of the latest of them (or of its writing, before the first).
    """

    id: str
    name: str
    kind: Literal["skill", "mistake"]
    when: str
    instruction: str
    step: int
    insight_ids: tuple[str, ...]
    uses: int = 0
    last_used: int = 0

    @property
    def text(self) -> str:
        """What is embedded for retrieval and shown to the teacher."""
        name = self.name.removeprefix("behavior_").replace("_", " ")
        return ". ".join(part.rstrip(".") for part in (name, self.when, self.instruction) if part)


@dataclasses.dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """The problem as the self-teacher of one rollout reads it.

    cited: ids of the insights, behaviors and sibling experience that it shows.
    section_tokens: tokens shown per section; cut_tokens: tokens left out per section.
    has_guidance: whether anything beyond the student's prompt is shown.
    """

    rollout_id: str
    messages: tuple[Message, ...]
    cited: tuple[str, ...]
    section_tokens: Mapping[str, int]
    cut_tokens: Mapping[str, int]

    @property
    def has_guidance(self) -> bool:
        return bool(self.section_tokens)


def to_dict(record: Any) -> dict[str, Any]:
    """A record as plain JSON values; arrays become lists."""
    return _plain(record)


def _plain(value: Any) -> Any:
    # At module level: a function that calls itself from a closure is a cycle, and would keep what
    # it was called with until the collector comes by.
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def from_dict(kind: type[Record], fields: Mapping[str, Any]) -> Record:
    """The inverse of `to_dict` for the records that memory keeps on disk.

    Raises ValueError naming the fields that are missing or unknown.
    """
    declared = dataclasses.fields(kind)  # type: ignore[arg-type]
    known = {f.name for f in declared}
    needed = {f.name for f in declared if f.default is dataclasses.MISSING}
    if not needed <= set(fields) <= known:
        missing, unknown = sorted(needed - set(fields)), sorted(set(fields) - known)
        raise ValueError(f"{kind.__name__}: missing fields {missing}, unknown fields {unknown}")

    def restored(name: str, value: Any) -> Any:
        if name == "verdict":
            return from_dict(Verdict, value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: restored(name, value) for name, value in fields.items()})
