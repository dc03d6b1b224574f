"""LiveCodeBench from the files of its official release, code_generation_lite: JSON Lines.

v6 of the paper, as SDPO has it: the 131 problems of contests from 2025-02-01 up to 2025-05-01. Both
splits hold the same problems: training has a seeded half of a problem's private tests, evaluation
all of them (`unit_tests = "nested"`) or the other half ("disjoint", where a problem of one test is
not trained on). Which half is not SDPO's draw, whose tests are not published.

The private tests are a compressed pickle. It is read by an unpickler that knows no class and no
function: a payload that would call anything is refused by name.

A malformed row is an error that names file, line and field: nothing is dropped.

Left out: starter code of other languages, and problems with several right outputs (judge.py).
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import io
import json
import pickle
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmd_jax.records import Problem, Split, UnitTests
from pmd_jax.tasks.hubfiles import download
from pmd_jax.tasks.task import Task, TaskConfig, start_judge

PLATFORMS = ("atcoder", "codeforces", "leetcode")
NEWEST = ("test5.jsonl", "test6.jsonl")
"""What is fetched from the hub: contests from October 2024 on. Older ones need a local folder."""

FIELDS = (
    *("question_content", "platform", "question_id", "contest_date", "starter_code"),
    *("difficulty", "public_test_cases", "private_test_cases", "metadata"),
)

# What SDPO asks for, in our words: its own prompt is not quoted here.
PROMPT = (
    "You are an expert programmer. Write a correct Python program for the problem below. It is run "
    "on hidden tests with a time limit of 1 second each. You may first outline your thoughts. End "
    "with the complete program in one code block that opens with ```python and closes with ```."
)
DIRECT = "Write a Python program for the problem below. Reply with one ```python code block only."
SIGNATURE = "\n\nYour solution should have the following signature:\n\n```python\n{}\n```"

Tests = tuple[tuple[str, ...], tuple[str, ...]]
"""(inputs, expected outputs), as many of both."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem of the release, decoded."""

    name: str
    platform: str
    difficulty: str
    text: str
    starter_code: str
    function: str
    public: Tests
    private: Tests


# --- decoding -----------------------------------------------------------------------------------


class _NothingToCall(pickle.Unpickler):
    """Reads texts, numbers, lists and dicts alone."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and may ask for nothing")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it asks for the persistent object {pid!r}")


def decode_tests(text: str) -> list[dict[str, str]]:
    """Tests as JSON, or as base64 of zlib of a pickled JSON text. Raises ValueError.

    Never runs anything that the text holds.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        try:
            packed = zlib.decompress(base64.b64decode(text, validate=True))
            found = _NothingToCall(io.BytesIO(packed)).load()
            found = json.loads(found) if isinstance(found, str | bytes) else found
        except pickle.UnpicklingError as error:
            raise ValueError(f"a pickle that is refused: {error}") from error
        except Exception as error:  # what a damaged pickle raises has no list
            raise ValueError(f"neither JSON nor base64 of zlib of a pickle ({error})") from error
    if not isinstance(found, list) or not found:
        raise ValueError("not a list of one test or more")
    for test in found:
        if not isinstance(test, dict) or not all(
            isinstance(test.get(name), str) for name in ("input", "output", "testtype")
        ):
            raise ValueError("a test lacks input, output or testtype, which must be texts")
    return found


def read_rows(file: Path, start: datetime.date, end: datetime.date) -> Iterator[Row]:
    """The file's problems of contests from `start` up to `end`. Raises ValueError naming a line."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: must be one JSON object; {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: must be one JSON object; got {line[:40]!r}")
            for name in FIELDS:
                if not isinstance(row.get(name), str):
                    got = repr(row[name])[:60] if name in row else "nothing"
                    raise ValueError(f"{place}: {name} must be str; got {got}")
            if start <= _date(row["contest_date"], f"{place}: contest_date") < end:
                yield _decoded(row, place)


def _date(text: str, name: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text[:10])
    except ValueError as error:
        raise ValueError(f"{name}: must be a date, YYYY-MM-DD; got {text!r}") from error


def _decoded(row: Mapping[str, str], place: str) -> Row:
    found: dict[str, Tests] = {}
    kinds = set()
    for name in ("public_test_cases", "private_test_cases"):
        try:
            tests = decode_tests(row[name])
        except ValueError as error:
            raise ValueError(f"{place}: {name}: {error}") from error
        found[name] = (tuple(t["input"] for t in tests), tuple(t["output"] for t in tests))
        kinds |= {test["testtype"] for test in tests}
    try:
        function = json.loads(row["metadata"] or "{}").get("func_name", "")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{place}: metadata must be a JSON object; {error}") from error
    if kinds != ({"functional"} if function else {"stdin"}):
        raise ValueError(
            f"{place}: testtype must be functional with metadata.func_name and stdin without; got "
            f"{', '.join(sorted(kinds))} and func_name {function!r}"
        )
    return Row(
        row["question_id"],
        row["platform"],
        row["difficulty"],
        row["question_content"],
        row["starter_code"],
        function,
        found["public_test_cases"],
        found["private_test_cases"],
    )


# --- problems -----------------------------------------------------------------------------------


def split_tests(row: Row, config: TaskConfig) -> tuple[Tests | None, Tests]:
    """(training's, evaluation's) tests; None where there is none to train on."""
    count = len(row.private[0])
    rng = random.Random(f"{config.seed}/{row.name}")
    half = sorted(rng.sample(range(count), max(1, count // 2)))
    train: Tests | None = _chosen(row.private, half)
    held = row.private
    if config.unit_tests == "disjoint":
        rest = [i for i in range(count) if i not in half]
        train, held = (train, _chosen(row.private, rest)) if rest else (None, row.private)
    if config.public_tests:
        held = (row.public[0] + held[0], row.public[1] + held[1])
    return train, held


def _chosen(tests: Tests, places: list[int]) -> Tests:
    inputs, outputs = tests
    return tuple(inputs[i] for i in places), tuple(outputs[i] for i in places)


def question_of(row: Row, style: str) -> str:
    """The student's whole turn: what is asked for, the statement, and the signature of a function.

    The signature is that of a plain function, as in SDPO; the official rules take either form.
    """
    text = f"{DIRECT if style == 'direct' else PROMPT}\n\n{row.text}"
    if row.function:
        found = re.search(rf"def {re.escape(row.function)}\(.*", row.starter_code)
        line = found[0].rstrip() if found else f"def {row.function}(...):"
        text += SIGNATURE.format(line.replace("(self, ", "(").replace("(self)", "()"))
    return text


def to_problem(row: Row, split: Split, tests: Tests, config: TaskConfig) -> Problem:
    return Problem(
        id=f"livecodebench/{row.platform}/{split}/{row.name}",
        subject=row.platform,
        subtask=row.difficulty,
        stem=row.text,
        question=question_of(row, config.response_style),
        system="",
        check=UnitTests(*tests, row.function, config.judge.time_limit_seconds),
    )


def _files(path: str) -> list[Path]:
    if path.startswith("hf:"):
        folder = download(path, NEWEST)
        return sorted(folder.glob("*.jsonl"))
    place = Path(path).expanduser()
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise ValueError(
            f"config.task.path: must be a JSON Lines file of code_generation_lite or a folder of "
            f"them (test6.jsonl holds v6), or hf:livecodebench/code_generation_lite to fetch it; "
            f"got {path!r}"
        )
    return files


def load_livecodebench(config: TaskConfig) -> Task:
    """The problems of the date window; validation ones are taken out of training by the seed."""
    start = _date(config.start_date, "config.task.start_date")
    end = _date(config.end_date, "config.task.end_date")
    if config.subject and config.subject not in PLATFORMS:
        raise ValueError(
            f"config.task.subject: must be one of {', '.join(PLATFORMS)}, or '' for all; "
            f"got {config.subject!r}"
        )
    rows: dict[str, Row] = {}
    for file in _files(config.path):
        for row in read_rows(file, start, end):
            if row.name in rows:
                raise ValueError(f"{file}: question_id {row.name} stands twice in {config.path}")
            if not config.subject or row.platform == config.subject:
                rows[row.name] = row
    if not rows:
        raise ValueError(
            f"config.task.start_date: {config.path} has no contest from {start} up to {end}"
            + (f" of {config.subject}" if config.subject else "")
        )
    trainable, test = [], []
    for row in rows.values():
        train, held = split_tests(row, config)
        test.append(to_problem(row, "test", held, config))
        if train is not None:
            trainable.append((row, train, held))
    shuffled = random.Random(config.seed).sample(trainable, len(trainable))
    count = config.num_validation
    if count >= len(trainable):
        raise ValueError(
            f"config.task.num_validation: must leave some of the {len(trainable)} training "
            f"problems; got {count}"
        )
    chosen = {row.name for row, *_ in shuffled[count:][: config.num_train or None]}
    splits: dict[Split, tuple[Problem, ...]] = {
        "train": tuple(
            to_problem(row, "train", tests, config)
            for row, tests, _ in trainable
            if row.name in chosen
        ),
        "validation": tuple(
            to_problem(row, "validation", held, config) for row, _, held in shuffled[:count]
        ),
        "test": tuple(test[: config.num_test or None]),
    }
    return Task(config, splits, (), start_judge(config.judge))
