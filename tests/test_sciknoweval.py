"""SciKnowEval rows: read byte for byte, split where they should be, refused by name."""

import json

import pytest

from pmd_jax.tasks.sciknoweval import split_options
from pmd_jax.tasks.task import Baselines, TaskConfig, baselines, load_task

SYSTEM = "\nGiven a question and four options, please select the right answer.\n"


def row(idx, answer="A", options=("1", "2", "3", "4"), stem="What is it?", **changes):
    listed = "\n".join(f"{letter}: {o}" for letter, o in zip("ABCD", options, strict=False))
    prompt = f"{stem}\n\n{listed}\nPlease reason step by step."
    return {"idx": idx, "answer": answer, "prompt": prompt, "system": SYSTEM, **changes}


def write(folder, train, test, subtasks=None):
    domain = folder / "chemistry"
    domain.mkdir(parents=True)
    for name, rows in {"train": train, "test": test}.items():
        text = "\n".join(json.dumps(r) if isinstance(r, dict) else r for r in rows)
        (domain / f"{name}.jsonl").write_text(text)
    if subtasks:
        (folder / "subtasks.json").write_text(json.dumps({"chemistry": subtasks}))
    return TaskConfig("sciknoweval", path=str(folder), subject="chemistry")


TRAIN = [row(i, "ABCD"[i % 4], stem=f"Question {i}?") for i in range(8)]


def test_a_row_becomes_a_problem_byte_for_byte(tmp_path):
    subtasks = [{"split": "test", "idx": 3, "subtask": "weights"}]
    task = load_task(write(tmp_path, TRAIN, [row(3, "B")], subtasks))
    [problem] = task.splits["test"]
    assert problem.id == "sciknoweval/chemistry/test/3"
    assert problem.subtask == "weights"
    assert (problem.stem, problem.check.options, problem.check.answer) == (
        "What is it?", ("1", "2", "3", "4"), "B",
    )  # fmt: skip
    assert task.student_messages(problem) == (
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": row(3)["prompt"]},
    )
    assert task.splits["train"][0].subtask == "chemistry"  # not joined: the domain's name


@pytest.mark.parametrize(
    ("prompt", "stem", "options"),
    [
        ("Q\n\nA: x\nB: y\nPlease reason step by step.", "Q", ("x", "y")),
        # Options that end in newlines leave blank lines between them.
        ("Q\n\nA: x\n\nB: y\n\nPlease reason step by step.", "Q", ("x\n", "y\n")),
        # The last list counts: the stem may hold one of its own.
        (
            "Given\n\nA: no\nB: no\n\nA: x\nB: y\nPlease reason step by step.",
            "Given\n\nA: no\nB: no",
            ("x", "y"),
        ),
        ("Q without options", "Q without options", ()),
    ],
)
def test_options_are_split_after_the_last_list_began(prompt, stem, options):
    found = split_options(prompt)
    assert found[0] == stem
    assert tuple(o.strip() for o in found[1]) == tuple(o.strip() for o in options)


def test_two_options_have_a_chance_of_a_half(tmp_path):
    task = load_task(write(tmp_path, TRAIN, [row(0, "B", ("yes", "no")), row(1, "A")]))
    scores = baselines(task.splits["test"])
    assert scores == Baselines(chance=0.375, constant=0.5, constant_letter="A")


def test_shots_and_validation_come_out_of_train_and_never_of_test(tmp_path):
    import dataclasses

    config = write(tmp_path, TRAIN, [row(99)])
    config = dataclasses.replace(config, format_shots=2, num_validation=3)
    task = load_task(config)
    assert [len(task.splits[s]) for s in ("train", "validation", "test")] == [3, 3, 1]
    shown = [m["content"] for m in task.shots if m["role"] == "user"]
    used = {p.question for s in task.splits.values() for p in s}
    assert len(set(shown)) == 2 and not set(shown) & used
    assert load_task(config).splits == task.splits
    assert len(load_task(dataclasses.replace(config, num_train=2)).splits["train"]) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"chemistry/train.jsonl:2: must be one JSON object"),
        (row(1, answer="E"), r"train.jsonl:2: answer must be one of its 4 options; got 'E'"),
        (row("1"), r"train.jsonl:2: idx must be int; got '1'"),
        (row(1, prompt="no options"), r"train.jsonl:2: prompt must list options"),
        (
            {"idx": 1, "answer": "A", "prompt": "Q"},
            r"train.jsonl:2: system must be str; got nothing",
        ),
        ("", r"train.jsonl:2: must be one JSON object"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        load_task(write(tmp_path, [TRAIN[0], bad, TRAIN[1]], [row(0)]))


def test_what_is_missing_is_named(tmp_path):
    config = write(tmp_path / "empty", TRAIN, [])
    with pytest.raises(ValueError, match=r"test\.jsonl: must hold at least one question"):
        load_task(config)
    with pytest.raises(ValueError, match=r"must be a folder with <domain>/train.jsonl"):
        load_task(TaskConfig("sciknoweval", path=str(tmp_path / "none"), subject="chemistry"))
    with pytest.raises(ValueError, match=r"lacks .*physics/train.jsonl"):
        load_task(TaskConfig("sciknoweval", path=str(tmp_path / "empty"), subject="physics"))
    with pytest.raises(ValueError, match=r"subject: must be one of biology.*got 'art'"):
        load_task(TaskConfig("sciknoweval", path=str(tmp_path / "empty"), subject="art"))
    with pytest.raises(ValueError, match=r"path: must name the folder"):
        TaskConfig("sciknoweval", subject="physics")
