"""The soak: a run killed a few times is the run that nobody disturbed."""

import dataclasses
import json

import pytest
from test_distributed import ROOT, command
from test_trainer import TASK
from toys import write_model_folder

from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.evaluate import EvaluationConfig
from tools import soak
from tools.soak import Kill, differences, growth, steps_logged, steps_saved


def test_what_a_runs_folder_says(tmp_path):
    assert (steps_logged(tmp_path), steps_saved(tmp_path)) == (0, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    for name in ("2", "4.orbax-checkpoint-tmp", "3.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert (steps_logged(tmp_path), steps_saved(tmp_path)) == (2, 2)
    assert soak.is_saving(tmp_path)
    assert Kill(in_save=True, logged=7, saved=4).lost == 3


def test_growth_is_of_the_last_quarter_over_the_second(tmp_path):
    rows = [{"gib": value} for value in (9, 9, 2, 2, 5, 5, 3, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert growth(tmp_path, "gib") == 1.5


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(
    tmp_path, monkeypatch, capsys
):
    toy = write_model_folder(tmp_path / "toy")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    line, _ = command(
        toy,
        tmp_path / "config",
        "soak",
        steps=40,
        task=dataclasses.replace(TASK, num_train=32),
        checkpoint=CheckpointConfig(every=2),
        evaluation=EvaluationConfig(num_samples=2, every=10),
    )
    line = line[: line.index("--name")]
    options = ["--kills", "3", "--in-save", "1", "--output", str(tmp_path / "soak")]
    soak.main([*options, "--", *line])  # so few steps say nothing about memory
    said = capsys.readouterr().out
    assert "unequal to the undisturbed run: nothing" in said and "3 kills" in said
    whole, killed = tmp_path / "soak" / "whole", tmp_path / "soak" / "killed"
    assert differences(whole, killed) == []
    metrics = (killed / "metrics.jsonl").read_text().replace('"step": 39', '"step": 38')
    (killed / "metrics.jsonl").write_text(metrics)
    assert differences(whole, killed) == ["metrics.jsonl"]
