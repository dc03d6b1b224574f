"""Rows as values, a study's cells and its table. The runs themselves are test_trainer's."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import config_for
from toys import write_model_folder

from experiments import ablations
from experiments.ablations import Study, main
from experiments.rows import ROWS, config_of, in_order
from experiments.table import Cell, compare
from pmd_jax import settings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def base(tmp_path):
    config = config_for(tmp_path / "no model is read here", tmp_path / "runs")
    rollout = dataclasses.replace(config.rollout, problems_per_step=4)
    return dataclasses.replace(config, rollout=rollout)


def of(name, base, seed=0, bank="bank", tokens=1):
    return config_of(name, base, "out", seed, bank, tokens)


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_value_that_changes_nothing_but_what_it_is_about(name, base):
    row, pmd = of(name, base), of("pmd", base)
    may = {
        "grpo": {"distill", "teacher"},
        "sdpo": {"distill", "teacher"},
        "frozen-policy": {"optimizer", "evaluation"},
        "frozen-memory": {"memory"},
        "transient": {"memory"},
    }.get(name, {"distill", "teacher"} if name.startswith(("grpo", "sdpo")) else {"teacher"})
    changed = {
        f.name for f in dataclasses.fields(row) if getattr(row, f.name) != getattr(pmd, f.name)
    }
    assert changed <= may
    assert changed or name == "pmd"


def test_rows_by_what_the_teacher_reads(base):
    context = ("sibling", "feedback")
    expected = {
        "sdpo": context,
        "insights": (*context, "insights"),
        "behaviors": (*context, "behaviors"),
        "experience": (*context, "experience"),
        "pmd": (*context, "insights", "behaviors"),
        "shuffled": (*context, "insights", "behaviors"),
        "grpo": (),
    }
    for name, sources in expected.items():
        assert of(name, base).teacher.sources == sources
    assert of("shuffled", base).teacher.control == "shuffled"
    assert of("frozen-policy", base).optimizer.learning_rate == 0
    assert of("frozen-policy", base).evaluation.with_memory
    memory = of("frozen-memory", base, bank="theirs").memory
    assert (memory.lifetime, memory.path) == ("frozen", "theirs")
    assert of("transient", base).memory.lifetime == "step"
    assert of("grpo-kl", base).distill.grpo.kl_weight > 0


def test_a_row_with_tokens_ends_by_tokens(base):
    row = of("sdpo+tokens", base, tokens=1234)
    assert row.max_sampled_tokens == 1234 and row.steps > 10 * base.steps
    assert of("sdpo", base).max_sampled_tokens == 0


def test_rows_come_after_what_they_need():
    assert in_order(["frozen-memory", "sdpo+tokens", "pmd"], "pmd") == [
        "frozen-policy",
        "frozen-memory",
        "pmd",
        "sdpo+tokens",
    ]
    with pytest.raises(ValueError, match=r"unknown row 'shufled'; did you mean shuffled\?"):
        in_order(["shufled"], "pmd")


# --- the table -----------------------------------------------------------------------------------


def cell(row, seed, scores, sampled=30, well_formed=1.0):
    evaluation = {
        "per_problem": {str(i): score for i, score in enumerate(scores)},
        "average": sum(scores) / len(scores),
        "interval": (0.0, 1.0),
        "well_formed": well_formed,
        "num_samples": 4,
        "num_problems": len(scores),
        "split": "test",
        "chance": 0.25,
        "constant": 0.3,
    }
    totals = {"steps": 2, "rollouts": 8, "trained_tokens": 20, "sampled_tokens": sampled}
    return Cell(row, seed, evaluation, totals | {"milliseconds": 1000})


def test_a_line_is_the_mean_over_seeds_and_differs_by_question():
    cells = [
        cell("pmd", 0, [1, 0, 1, 1]),
        cell("pmd", 1, [1, 1, 1, 1]),
        cell("sdpo", 0, [0, 0, 1, 0], sampled=20),
        cell("sdpo", 1, [1, 0, 1, 0], sampled=20),
    ]
    pmd, sdpo = compare(cells, "pmd")
    assert pmd.average == 7 / 8 and pmd.per_seed == (0.75, 1.0)
    assert pmd.difference is None
    assert (pmd.rollout_tokens, pmd.memory_tokens, sdpo.memory_tokens) == (20, 10, 0)
    value, low, high, p = sdpo.difference
    assert value == 3 / 8 - 7 / 8  # by question: -0.5, -0.5, 0, -1
    assert -1 <= low < value < high <= 0 and 0 < p < 0.2


def test_only_common_seeds_are_compared():
    cells = [cell("pmd", 0, [1, 1]), cell("pmd", 1, [0, 0]), cell("sdpo", 1, [0, 0])]
    _, sdpo = compare(cells, "pmd")
    assert sdpo.difference[0] == 0
    [alone] = compare([cell("sdpo", 1, [0, 0])], "pmd")
    assert alone.difference is None


def test_cells_of_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="must all be scored on the same questions"):
        compare([cell("pmd", 0, [1, 1]), cell("sdpo", 0, [1])], "pmd")


# --- a study -------------------------------------------------------------------------------------


@pytest.fixture
def study(base):
    """Its cells are written by `finish`, without a run."""
    return Study(Path(base.output) / "study", base, ("pmd", "sdpo"), (0, 1), "pmd")


def finish(study, row, seed):
    folder = study.cell_folder(row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    done = cell(row, seed, [1.0, 0.0])
    (folder / "config.json").write_text(json.dumps(settings.to_dict(study.config(row, seed))))
    (folder / "evaluation.json").write_text(json.dumps({"after": done.evaluation}))
    (folder / "totals.json").write_text(json.dumps(done.totals))
    return ""


@pytest.fixture
def command(base, monkeypatch):
    """The command line over a configuration file, and the cells that it ran, in order."""
    ran = []

    def run_cell(study, row, seed):
        ran.append((row, seed))
        return finish(study, row, seed)

    monkeypatch.setattr(ablations, "run_cell", run_cell)
    file = Path(base.output).parent / "base.json"
    file.write_text(json.dumps(settings.to_dict(base)))

    def call(*arguments):
        return main(["--config", str(file), "--name", "study", *arguments])

    return call, ran


def test_the_same_command_runs_only_what_is_missing(command, base, capsys):
    call, ran = command
    assert call("--rows", "pmd,sdpo", "--seeds", "2") == 0
    assert ran == [("pmd", 0), ("sdpo", 0), ("pmd", 1), ("sdpo", 1)]
    assert "less pmd" in capsys.readouterr().out
    ran.clear()
    assert call("--rows", "pmd,sdpo,grpo", "--seeds", "2") == 0
    assert ran == [("grpo", 0), ("grpo", 1)]
    table = json.loads((Path(base.output) / "study" / "table.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["pmd", "sdpo", "grpo"]


def test_a_cell_that_fails_is_told_and_does_not_stop_the_others(command, monkeypatch, capsys):
    call, _ = command

    def run_cell(study, row, seed):
        return "the verifier is away" if row == "frozen-policy" else finish(study, row, seed)

    monkeypatch.setattr(ablations, "run_cell", run_cell)
    assert call("--rows", "frozen-memory,sdpo") == 1
    output = capsys.readouterr().out
    assert "frozen-policy, seed 0: the verifier is away" in output
    assert "frozen-memory, seed 0: needs frozen-policy, which failed" in output
    assert "sdpo" in output.split("less pmd")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "pdm"], "did you mean pmd?"),
        (
            ["--rows", "grpo-4", "--config.rollout.problems_per_step=3"],
            "row grpo-4: distill.grpo.updates",
        ),
        (["--rows", "pmd", "--seeds", "0"], "--seeds: must be at least 1"),
        (["--rows", "pmd", "--config.stepz=3"], "did you mean steps?"),
        (["--rows", "pmd", "--config", "none.json"], "no such file"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(command, capsys, arguments, message):
    call, ran = command
    assert call(*arguments) == 2 and not ran
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_study_is_not_continued_as_another_nor_among_other_files(command, base, capsys):
    call, _ = command
    assert call("--rows", "pmd") == 0
    assert call("--rows", "pmd", "--config.steps=2") == 2
    assert "config.steps: must be as it was" in capsys.readouterr().err
    other = Path(base.output) / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    assert call("--rows", "pmd", "--name", "other") == 2
    assert "thesis.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_of_real_runs(tmp_path):
    """Frozen memory reads the bank of the frozen policy; a row by tokens samples as many.

    A toy earns no reward, so GRPO learns nothing: a cell that fails, and stops no other.
    """
    model = write_model_folder(tmp_path / "toy")
    file = tmp_path / "base.json"
    base = config_for(model, tmp_path / "runs", steps=2)
    file.write_text(json.dumps(settings.to_dict(base)))
    command = [sys.executable, "-m", "experiments.ablations", "--config", str(file)]
    command += ["--rows", "grpo,frozen-memory,sdpo+tokens"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    study = tmp_path / "runs" / "ablations"
    assert done.returncode == 1, done.stdout + done.stderr
    assert "grpo, seed 0: failed" in done.stdout and "no rollout carried loss" in done.stdout
    table = json.loads((study / "table.json").read_text())
    rows = {row["row"]: row for row in table["rows"]}
    assert list(rows) == ["pmd", "frozen-policy", "frozen-memory", "sdpo+tokens"]
    sampled = {name: row["rollout_tokens"] + row["memory_tokens"] for name, row in rows.items()}
    assert sampled["sdpo+tokens"] >= sampled["pmd"] > rows["pmd"]["rollout_tokens"]
    assert rows["frozen-memory"]["memory_tokens"] == 0
    assert "after, with memory" in json.loads(
        (study / "frozen-policy" / "seed-0" / "evaluation.json").read_text()
    )
