"""What an environment says of a program that failed, for the teacher: SDPO's shapes and limits.

Of all failed tests the first run-time error counts, else the first that ran out of time or printed
too much, else a missing code block, else the two shortest wrong answers. Here and not in SDPO, each
names its test, and a process that was killed is a run-time error.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from typing import Literal

from pmd_jax.tasks.sandbox import Raised

Outcome = Literal["passed", "wrong", "error", "time", "output", "crash"]

MAX_CHARACTERS = 2000
MAX_INPUT_LINES, MAX_LINE, MAX_INPUT, MAX_OUTPUT = 8, 250, 1400, 250
MAX_WRONG = 2

NO_CODE = "Incorrect Format: Put your code inside a\n```python\n...\n```\nblock."
CUT_OFF = (
    "Truncated Attempt: Your previous response was too long and truncated: its code block does not "
    "end. Write a shorter response."
)


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One test: its number from 1, what came of it, its texts; error and status of what ended it.

    actual: what was printed, or the returned value.
    """

    number: int
    outcome: Outcome
    given: str
    actual: str
    expected: str
    error: Raised | None = None
    status: int = 0


def no_code(response: str) -> str:
    """What is said of a response without a program."""
    return CUT_OFF if response.count("```") == 1 else NO_CODE


def write_feedback(results: Sequence[CaseResult]) -> tuple[str, float]:
    """(text, the share of it that expected outputs make up); ("", 0) where all passed.

    results: of the tests that were run.
    """
    for wanted, write in ((("error", "crash"), _raised), (("time", "output"), _exceeded)):
        first = next((result for result in results if result.outcome in wanted), None)
        if first is not None:
            return write(first)[:MAX_CHARACTERS], 0.0
    wrong = [result for result in results if result.outcome == "wrong"]
    shortest = sorted(wrong, key=lambda r: (len(r.given) + len(r.actual), r.number))[:MAX_WRONG]
    text, revealed = "", 0
    for result in shortest:
        longer = f"{text}\n\n{_wrong(result)}" if text else _wrong(result)
        if len(longer) > MAX_CHARACTERS:
            break
        text, revealed = longer, revealed + len(_cut(result.expected))
    return text, revealed / max(len(text), 1)


def _raised(result: CaseResult) -> str:
    lines = [f"Test Case {result.number}: Runtime Error"]
    error = result.error
    if error is None:
        lines.append(f"Process Error: {_ending(result.status)}")
    else:
        lines.append(f"{error.type}: {error.message}" if error.message else error.type)
        for line, function, source in error.frames:
            lines += [f"  {source}", f"Line {line} in {function} (Solution.py)"]
    return "\n".join(lines) + f"\n\nLast Executed Input\n{_input(result)}"


def _ending(status: int) -> str:
    if status >= 0:
        return f"the process ended with exit code {status}"
    try:
        return f"the process was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"the process was killed by signal {-status}"


def _exceeded(result: CaseResult) -> str:
    what = "Time" if result.outcome == "time" else "Output"
    return (
        f"Test Case {result.number}: {what} Limit Exceeded\n\nLast Executed Input\n{_input(result)}"
    )


def _wrong(result: CaseResult) -> str:
    return (
        f"Test Case {result.number}: Wrong Answer\n\nInput\n{_input(result)}\n\n"
        f"Output\n{_cut(result.actual)}\n\nExpected\n{_cut(result.expected)}"
    )


def _input(result: CaseResult) -> str:
    lines = result.given.rstrip("\n").split("\n")
    shown = [_clip(line, MAX_LINE) for line in lines[:MAX_INPUT_LINES]]
    text = "\n".join([*shown, "..."] if len(lines) > MAX_INPUT_LINES else shown)
    return _clip(text, MAX_INPUT)  # so that one wrong answer always fits


def _cut(text: str) -> str:
    return _clip(text.strip(), MAX_OUTPUT)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
