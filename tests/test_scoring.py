"""experiments.evaluate, scaling and transfer on a toy policy: what they print, write and refuse."""

import dataclasses
import json

import fakes
import pytest
from test_trainer import config_for
from toys import write_model_folder

from experiments import evaluate, scaling, transfer
from pmd_jax import settings
from pmd_jax.memory.bank import Bank, MemoryConfig
from pmd_jax.memory.merging import Operation


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a policy, `model`, a configuration, `base.json`, and a bank, `bank`."""
    place = tmp_path_factory.mktemp("scoring")
    model = write_model_folder(place / "model")
    config = config_for(model, place / "runs")
    (place / "base.json").write_text(json.dumps(settings.to_dict(config)))
    bank = Bank(MemoryConfig())
    for i, when in enumerate(("When heat flows", "When atoms are counted", "When a current runs")):
        behavior = fakes.behavior(f"behavior_{i}", when=when, instruction=f"do the {i}th thing")
        bank.apply_operations(0, [Operation("ADD", behavior)], fakes.embed)
    bank.save(place / "bank")
    return place


def call(command, place, *arguments, policies=1):
    given = ["--config", str(place / "base.json")]
    for _ in range(policies):
        given += ["--policy", str(place / "model")]
    return command.main([*given, *arguments])


def test_a_policy_is_scored_strictly_and_leniently_with_and_without_memory(place, tmp_path, capsys):
    out = tmp_path / "scores.json"
    arguments = ["--k", "3", "--memory", str(place / "bank"), "--top-k", "0,2", "--out", str(out)]
    assert call(evaluate, place, *arguments) == 0
    output = capsys.readouterr().out
    assert "avg@3" in output and "lenient" in output and "chance 25.0%" in output
    assert "top-k 2: 2.0 memories in a prompt" in output
    alone, shown = json.loads(out.read_text())["scores"]
    assert (alone["memory"], alone["top_k"], alone["cited"]) == ("", 0, 0.0)
    assert (shown["memory"], shown["top_k"], shown["cited"]) == (str(place / "bank"), 2, 2.0)
    strict, lenient = alone["by_verifier"]["strict"], alone["by_verifier"]["lenient"]
    assert strict["pass_at"].keys() == {"1", "2", "3"}
    assert strict["pass_at"]["1"] == pytest.approx(strict["average"])
    assert strict["pass_at"]["3"] == strict["best"] <= lenient["best"]
    assert strict["per_problem"].keys() == shown["by_verifier"]["strict"]["per_problem"].keys()


def test_curves_of_two_policies_and_what_only_one_solves(place, capsys):
    assert call(scaling, place, "--k", "4", policies=2) == 0
    output = capsys.readouterr().out
    assert "majority@k" in output and "headroom" in output
    assert "most samples" in output and "the first only" in output


def test_every_bank_with_every_policy_and_top_k(place, tmp_path, capsys):
    out = tmp_path / "grid.json"
    arguments = ["--bank", str(place / "bank"), "--top-k", "1,2", "--k", "2", "--out", str(out)]
    assert call(transfer, place, *arguments) == 0
    assert "less none" in capsys.readouterr().out
    scores = json.loads(out.read_text())["scores"]
    assert [(each["top_k"], each["cited"]) for each in scores] == [(0, 0.0), (1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "1,x", "--memory", "{bank}"], "--top-k: must be whole numbers from 0 on"),
        (["--memory", "{place}/nowhere"], "no manifest.json is there"),
        (["--k", "0"], "num_samples: must be at least 1; got 0"),
        (["--task", "scicalk"], "config.task.name: must be one of 'scicalc'"),
        (["--task", "sciknoweval"], "path: must name the folder"),
        (["--out", "{place}/base.json"], "must be a new file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_overwritten(place, capsys, arguments, message):
    before = (place / "base.json").read_text()
    given = [a.format(bank=place / "bank", place=place) for a in arguments]
    assert call(evaluate, place, *given) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert (place / "base.json").read_text() == before


def test_a_bank_of_another_version_and_a_run_without_checkpoints_are_refused(
    place, tmp_path, capsys
):
    bank = tmp_path / "bank"
    Bank(MemoryConfig()).save(bank)
    manifest = json.loads((bank / "manifest.json").read_text())
    (bank / "manifest.json").write_text(json.dumps(manifest | {"format_version": 9}))
    assert call(evaluate, place, "--memory", str(bank)) == 2
    assert "format_version must be 1 or 2; got 9" in capsys.readouterr().err
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    (run / "config.json").write_text((place / "base.json").read_text())
    assert evaluate.main(["--policy", str(run)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_the_configuration_of_a_run_is_its_own(place, tmp_path, monkeypatch):
    """Without --config, and with what the command line sets on top."""
    from experiments import scoring

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    own = json.loads((place / "base.json").read_text()) | {"seed": 7}
    (run / "config.json").write_text(json.dumps(own))
    flags = scoring.argparse.Namespace(task=None, k=5)
    config = scoring.configuration("", ["--config.evaluation.top_p=0.5"], str(run), flags)
    assert (config.seed, config.evaluation.num_samples, config.evaluation.top_p) == (7, 5, 0.5)
    other = scoring.configuration("", [], "some/model", flags)
    assert other.model.path == "some/model" and other.evaluation == dataclasses.replace(
        type(other.evaluation)(), num_samples=5
    )
