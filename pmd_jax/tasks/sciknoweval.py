"""SciKnowEval, level 3 multiple choice, from files: <folder>/<domain>/{train,test}.jsonl.

The files are those of lasgroup/SDPO (datasets/sciknoweval); the split is theirs. `subtasks.json`
beside the domains, where present, names each row's subtask. The system prompt and the question of a
row are kept byte for byte; response_style "direct" replaces the row's request to reason and its
system prompt by a shorter one, and is a task of its own whose scores do not compare.

A malformed row is an error that names file, line and field: nothing is dropped.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmd_jax.records import MultipleChoice, Problem, Split
from pmd_jax.tasks.hubfiles import download
from pmd_jax.tasks.task import Task, TaskConfig, worked_examples
from pmd_jax.tasks.verifiers import LetterVerifier

DOMAINS = ("biology", "chemistry", "material", "physics")
REASON = "\nPlease reason step by step."
DIRECT = "\nAnswer with the letter alone, as <answer>X</answer>."
DIRECT_SYSTEM = "Choose the right option and reply with <answer>LETTER</answer> only."
FIELDS: dict[str, type] = {"idx": int, "answer": str, "prompt": str, "system": str}


def dataset_folder(path: str) -> Path:
    """The local folder of a task.path; "hf:ORG/DATASET" is downloaded through huggingface_hub."""
    if path.startswith("hf:"):
        return download(path, ("*/train.jsonl", "*/test.jsonl", "subtasks.json"))
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"config.task.path: must be a folder with <domain>/train.jsonl and test.jsonl of "
            f"SciKnowEval (datasets/sciknoweval of the repository lasgroup/SDPO); got {path!r}"
        )
    return folder


def split_options(prompt: str) -> tuple[str, tuple[str, ...]]:
    """(stem, options) of a row's prompt. Options may hold blank lines; the last list counts."""
    start = prompt.rfind("\n\nA: ")
    if start < 0:
        return prompt, ()
    body = prompt[start + 2 :].removesuffix(REASON)
    options = re.split(r"(?m)^[A-D]: ", body)[1:]
    return prompt[:start], tuple(option.removesuffix("\n") for option in options)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, checked. Raises ValueError naming file, line and field."""
    if not file.is_file():
        raise ValueError(f"config.task.path: lacks {file}; it must hold the domain's two files")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: must be one JSON object; {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number}: must be one JSON object; got {line[:40]!r}")
        for name, kind in FIELDS.items():
            if not isinstance(row.get(name), kind):
                got = repr(row.get(name)) if name in row else "nothing"
                raise ValueError(f"{file}:{number}: {name} must be {kind.__name__}; got {got}")
        _, options = split_options(row["prompt"])
        if len(options) < 2:
            raise ValueError(f"{file}:{number}: prompt must list options A: and B:; it does not")
        if row["answer"] not in "ABCD"[: len(options)]:
            raise ValueError(
                f"{file}:{number}: answer must be one of its {len(options)} options; "
                f"got {row['answer']!r}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: must hold at least one question; it is empty")
    return rows


def to_problem(
    row: Mapping[str, Any], domain: str, split: Split, subtask: str, style: str
) -> Problem:
    stem, options = split_options(row["prompt"])
    question, system = row["prompt"], row["system"]
    if style == "direct":
        question, system = question.removesuffix(REASON) + DIRECT, DIRECT_SYSTEM
    return Problem(
        id=f"sciknoweval/{domain}/{split}/{row['idx']}",
        subject=domain,
        subtask=subtask,
        stem=stem,
        question=question,
        system=system,
        check=MultipleChoice(options, row["answer"]),
    )


def load_sciknoweval(config: TaskConfig) -> Task:
    """One domain; shots and validation are taken out of train by `config.seed`."""
    domain = config.subject
    if domain not in DOMAINS:
        raise ValueError(
            f"config.task.subject: must be one of {', '.join(DOMAINS)}; got {domain!r}"
        )
    folder = dataset_folder(config.path)
    names: dict[tuple[str, int], str] = {}
    if (folder / "subtasks.json").is_file():
        joined = json.loads((folder / "subtasks.json").read_text(encoding="utf-8"))
        names = {(row["split"], row["idx"]): row["subtask"] for row in joined.get(domain, ())}

    def read(split: Split) -> list[Problem]:
        rows = read_rows(folder / domain / f"{split}.jsonl")
        return [
            to_problem(
                row, domain, split, names.get((split, row["idx"]), domain), config.response_style
            )
            for row in rows
        ]

    train, test = read("train"), read("test")
    shuffled = random.Random(config.seed).sample(train, len(train))
    held = config.format_shots + config.num_validation
    if held >= len(train):
        raise ValueError(
            f"config.task.num_validation: with format_shots must leave some of the {len(train)} "
            f"training problems; got {config.num_validation} and {config.format_shots}"
        )
    examples, validation = shuffled[: config.format_shots], shuffled[config.format_shots : held]
    kept = {p.id for p in (shuffled[held:][: config.num_train or None])}
    splits: dict[Split, tuple[Problem, ...]] = {
        "train": tuple(p for p in train if p.id in kept),
        "validation": tuple(validation),
        "test": tuple(test[: config.num_test or None]),
    }
    shots = worked_examples(examples, config.response_style)
    return Task(config, splits, shots, LetterVerifier(config.verifier))
