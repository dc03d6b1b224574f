"""Judges a response to a programming problem: its code must pass every unit test.

official  the documented rules of LiveCodeBench's harness (at 28fef95): the last fenced block; a
          program reads standard input, or `Solution().f` or a function `f` is called with one JSON
          value a line; output is compared line by line, and where lines differ, token by token as
          exact decimals. All of Python can be used.
sdpo      the rules of SDPO's executor (lasgroup/SDPO at 0e6d510), for comparison with its numbers
          alone: the longest block, few builtins and modules, functions of the top level only,
          inputs split at blanks, output equal as one line. It fails many valid programs.

Here and not there: tests run one after another in a sandbox, up to the first that takes too long,
after which none counts as passed; the limit is CPU time, so that a busy machine fails nobody; all
tests run, so that the share passed is known; and standard input is real, so that `open(0)`,
`sys.stdin.buffer` and threads work as they do for a contestant.

Left out: problems with several right outputs, or with a tolerance; the data has no checkers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from pmd_jax.records import UnitTests, Verdict
from pmd_jax.tasks.feedback import CaseResult, Outcome, no_code, write_feedback
from pmd_jax.tasks.sandbox import Execution, Program, Rules, Sandbox, SandboxConfig

MAX_LINE = 10_000  # characters, beyond which tokens are counted before any is read
MAX_KEPT = 4000  # characters of a test's texts while others run
CACHED = 8192  # judgements that are kept, by code and tests


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """rules: "official" or "sdpo". sandbox: where programs run, and under which limits.

    time_limit_seconds: CPU time of one test, the official harness's by default.
    """

    rules: Rules = "official"
    time_limit_seconds: float = 6.0
    sandbox: SandboxConfig = SandboxConfig()  # noqa: RUF009, frozen

    def __post_init__(self) -> None:
        if self.time_limit_seconds <= 0:
            raise ValueError(f"time_limit_seconds: must be above 0; got {self.time_limit_seconds}")


# --- a response's code --------------------------------------------------------------------------


def extract_code(text: str, rules: Rules = "official") -> str:
    """The program that a response hands in, "" for none."""
    if rules == "sdpo":
        blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
        return max((body for _, body in blocks), key=len, default="")
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else ""


# --- comparison ---------------------------------------------------------------------------------


def same_output(printed: str, expected: str, rules: Rules = "official") -> bool:
    """Whether what a program printed is what a test wants."""
    if rules == "sdpo":
        return _one_line(printed) == _one_line(expected)
    printed, expected = printed.strip(), expected.strip()
    if printed.count("\n") != expected.count("\n"):
        return False
    return all(map(_same_line, _stripped_lines(printed), _stripped_lines(expected)))


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")


def _stripped_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n")]


def _same_line(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    tokens = wanted.split()
    if len(found) > MAX_LINE and len(found.split(None, len(tokens))) > len(tokens):
        return False
    try:
        return [Decimal(t) for t in found.split()] == [Decimal(t) for t in tokens]
    except InvalidOperation:
        return False


def same_value(value: Any, expected: str, rules: Rules = "official") -> bool:
    """Whether a function's value, in the form of sandbox/program.plain, is the expected JSON."""
    try:
        wanted = json.loads(expected)
        if rules == "sdpo":
            return _canonical(_restored(value, list)) == _canonical(wanted)
        return bool(_restored(value, tuple) == wanted)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _restored(value: Any, sequence: type) -> Any:
    """A plain value as Python has it; `sequence` is what its tuples become.

    A dict's keys must be texts, as JSON's are; lists stand for tuples where JSON's own writing is
    compared, and numbers are written as keys there. Other keys could be chosen to collide.
    """
    if isinstance(value, list):
        return [_restored(item, sequence) for item in value]
    if not isinstance(value, dict):
        return value
    [(tag, content)] = value.items()
    if tag == "t":
        return sequence(_restored(item, sequence) for item in content)
    if tag == "d":
        written = (lambda key: key) if sequence is tuple else _as_key
        pairs = [(written(key), _restored(item, sequence)) for key, item in content]
        if all(type(key) is str for key, _ in pairs):
            return dict(pairs)
    raise ValueError(f"not a value that JSON could have given: {tag}")


def _as_key(key: Any) -> Any:
    """A key as json.dumps writes it."""
    return json.dumps(key) if key is None or type(key) in (bool, int, float) else key


# --- judgement ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What came of each test that was run, in order; what is said of it, and how much that reveals.

    It is kept for long, so it holds none of the tests' texts but what is said.
    """

    outcomes: tuple[Outcome, ...] = ()
    feedback: str = ""
    revealed: float = 0.0


class Judge:
    """Grades responses in a sandbox, its own unless one is given. Threads may share it."""

    def __init__(self, config: JudgeConfig | None = None, sandbox: Sandbox | None = None):
        self.config = config or JudgeConfig()
        self.sandbox = sandbox or Sandbox(self.config.sandbox)
        self._judged = functools.lru_cache(CACHED)(
            functools.partial(judge, self.sandbox, self.config.rules)
        )

    @property
    def about(self) -> str:
        """What a run says of it at its start."""
        return f"programs are judged by {self.config.rules} rules; {self.sandbox.protections}"

    def verify(self, check: UnitTests, text: str, feedback: bool) -> Verdict:
        """Reward 1 when every test passes, else 0. Raises SandboxError, never for the program."""
        code = extract_code(text, self.config.rules)
        well_formed = bool(code.strip())
        found = self._judged(code, check) if well_formed else Judgement(feedback=no_code(text))
        passed = found.outcomes.count("passed")
        correct = passed == len(check.inputs)
        said, revealed = (found.feedback, found.revealed) if feedback else ("", 0.0)
        share = passed / len(check.inputs)
        return Verdict(correct, float(correct), said, well_formed, share, revealed)

    def answer(self, check: UnitTests, text: str) -> str:
        """Programs are not voted on: two that differ in every letter may do the same."""
        return ""

    def by(self, rules: Rules) -> Judge:
        """The judge of other rules, in the same sandbox."""
        return Judge(dataclasses.replace(self.config, rules=rules), self.sandbox)

    def close(self) -> None:
        self.sandbox.close()


def judge(sandbox: Sandbox, rules: Rules, code: str, check: UnitTests) -> Judgement:
    """Runs the program on the tests in order; after one out of time or output there are none."""
    program = Program(code, check.function, rules)

    def see(number: int, ran: Execution) -> CaseResult:
        return _result(number, ran, check, rules)

    results = sandbox.run(program, check.inputs, check.time_limit_seconds, see)
    return Judgement(tuple(result.outcome for result in results), *write_feedback(results))


def _result(number: int, ran: Execution, check: UnitTests, rules: Rules) -> CaseResult:
    expected, shown = check.outputs[number], ran.output
    if check.function and ran.end == "done":
        passed = ran.returned and same_value(ran.value, expected, rules)
        shown = "nothing: the process ended by itself"
        if ran.returned:
            shown = "" if passed else _shown(ran.value)
    else:
        passed = ran.end == "done" and same_output(shown, expected, rules)
    outcome: Outcome = ran.end if ran.end != "done" else "passed" if passed else "wrong"
    # What feedback cannot show is not held until all tests have run.
    given, shown, expected = (_kept(text) for text in (check.inputs[number], shown, expected))
    return CaseResult(number + 1, outcome, given, shown, expected, ran.error, ran.status)


def _kept(text: str) -> str:
    return text if len(text) <= MAX_KEPT else text[:MAX_KEPT] + "..."


def _shown(value: Any) -> str:
    """A plain value as a reader of feedback knows it."""
    try:
        text = json.dumps(value)
        if '{"' not in text or len(text) > MAX_KEPT:  # JSON's own, or too long to be shown
            return text
        return repr(_restored(value, tuple))
    except (ValueError, TypeError, KeyError, RecursionError):
        return "a value that JSON could not have given"
