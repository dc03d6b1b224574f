"""The report of small runs: what it says of their state, and that their text stays text."""

import json
import re

import pytest

from pmd_jax.telemetry import RunWriter
from tools.report.__main__ import main

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def write_run(folder, steps=2, evaluations=("before", "after"), of=2):
    """A run's files without a bank. of: the steps that it was to have."""
    writer = RunWriter(folder, tensorboard=False)
    writer.write_config({"name": folder.name, "seed": 0, "steps": of, "model": {"path": HOSTILE}})
    for step in range(steps):
        writer.log_step(step, {"accuracy": 0.5, "loss": 0.1, "loss_fraction": 1.0})
        writer.log_samples(step, [{"rollout": f"p@{step}.0", "problem": "p", "response": HOSTILE}])
    for name in evaluations:
        scores = {"step": 0, "average": 0.5, "interval": [0.4, 0.6], "per_problem": {"p": 0.5}}
        writer.write_evaluation(name, scores | {"num_samples": 2, "chance": 0.25, "constant": 0.3})
    writer.close()
    return folder


def state(page):
    """What stands under the run's name."""
    [said] = re.findall(r'class="state[^>]*>([^<]*)<', page)
    return said


def report(*folders, out):
    assert main([*map(str, folders), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_a_finished_run_is_one_file_that_asks_for_nothing(tmp_path):
    page = report(write_run(tmp_path / "done"), out=tmp_path / "report.html")
    assert state(page) == "finished, 2 steps"
    assert "<script src=" not in page and "<link rel=" not in page


def test_text_of_a_run_is_never_markup(tmp_path):
    page = report(write_run(tmp_path / "hostile"), out=tmp_path / "report.html")
    assert "window.hacked" in page and HOSTILE not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize(
    ("steps", "evaluations", "said"),
    [
        (1, ("before",), "still running or killed at step 1 of 2"),
        (0, (), "empty: no step was finished"),
    ],
)
def test_a_run_that_was_stopped_or_is_empty_says_so(tmp_path, steps, evaluations, said):
    folder = write_run(tmp_path / "run", steps, evaluations)
    assert state(report(folder, out=tmp_path / "report.html")).startswith(said)


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "run", 1, ("before",))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "accu')
    assert "step 1 of 2" in state(report(folder, out=tmp_path / "report.html"))


def test_runs_side_by_side_are_named(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("pmd", "sdpo")]
    page = report(*folders, out=tmp_path / "report.html")
    assert "Runs pmd, sdpo" in page


def test_what_is_no_run_and_what_is_no_report_are_one_line(tmp_path, capsys):
    (tmp_path / "thesis.html").write_text("mine")
    run = write_run(tmp_path / "run")
    assert main([str(run), "--out", str(tmp_path / "thesis.html")]) == 2
    assert (tmp_path / "thesis.html").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    assert main([str(tmp_path / "folder"), "--out", str(tmp_path / "new.html")]) == 2
    assert not (tmp_path / "new.html").exists()
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)


def test_json_of_a_config_with_other_fields_is_read(tmp_path):
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"unheard_of": 1}))
    report(folder, out=tmp_path / "report.html")
