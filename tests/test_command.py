"""The command line as a person meets it: exit codes, and one clear line for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import write_model_folder

from experiments.command import main
from pmd_jax import settings
from pmd_jax.checkpoint import SaveFailed
from pmd_jax.config import RunConfig
from pmd_jax.trainer import NotFinite

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
WHOLE = "--config.distill.micro_batch=0"  # the tests' eight devices do not cut one group
SCIKNOWEVAL = str(ROOT / "configs" / "sciknoweval.py")
LIVECODEBENCH = str(ROOT / "configs" / "livecodebench.py")
MINICODE = str(ROOT / "configs" / "minicode.py")


def run(*arguments, config=QUICKSTART):
    return main("test", ["--config", config, *arguments])


@pytest.mark.parametrize("domain", ["biology", "chemistry", "material", "physics"])
@pytest.mark.parametrize("size", ["", ",small"])
def test_the_configurations_of_all_domains_are_valid(domain, size):
    config = settings.build(RunConfig, settings.load_config(f"{SCIKNOWEVAL}:{domain}{size}"))
    assert config.task.subject == domain
    assert config.distill.divergence.name == "jensen_shannon"


def test_the_paper_s_numbers_are_in_the_configuration():
    config = settings.build(RunConfig, settings.load_config(f"{SCIKNOWEVAL}:chemistry"))
    rollout, optimizer = config.rollout, config.optimizer
    assert (rollout.problems_per_step, rollout.rollouts_per_problem) == (32, 8)
    assert rollout.max_new_tokens == 8192
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-5, 10)
    assert (config.steps, config.teacher.top_k, config.evaluation.num_samples) == (1180, 3, 16)


def test_the_configurations_of_programs_are_valid_and_the_paper_s():
    paper = settings.build(RunConfig, settings.load_config(LIVECODEBENCH))
    assert (paper.task.start_date, paper.task.end_date) == ("2025-02-01", "2025-05-01")
    assert (paper.steps, paper.evaluation.num_samples, paper.teacher.top_k) == (80, 4, 3)
    assert (paper.optimizer.learning_rate, paper.optimizer.warmup_steps) == (1e-6, 0)
    assert (paper.distill.divergence.name, paper.distill.divergence.top_k) == ("reverse_kl", 20)
    assert (paper.distill.teacher, paper.distill.ema_rate) == ("ema", 0.01)
    assert paper.task.feedback and "feedback" in paper.teacher.sources
    small = settings.build(RunConfig, settings.load_config(f"{LIVECODEBENCH}:small"))
    assert small.model.path.startswith("pypi:")
    isolated = ["--config.task.judge.sandbox.require=isolated", "--config.task.judge.rules=sdpo"]
    for file in (LIVECODEBENCH, MINICODE):
        judge = settings.build(RunConfig, settings.load_config(file, isolated)).task.judge
        assert (judge.sandbox.require, judge.rules) == ("isolated", "sdpo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.lerning_rate=1"], "did you mean learning_rate"),
        (["--config.steps=many"], "config.steps: must be an int; got 'many'"),
        (["--config.model.path=./none"], "none"),
        (["--config.teacher.sources=sibling,insight"], "did you mean insights?"),
        (["--config.rollout.rollouts_per_problem=1"], "must be at least 2"),
        (["--config.teacher.max_prompt_tokens=64"], "alone takes"),
        (["--config.task.families=free_fal"], "did you mean free_fall"),
        (["--resume"], "has no checkpoint to resume"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    model = write_model_folder(tmp_path / "toy")
    given = [f"--config.output={tmp_path}/runs", f"--config.model.path={model}", WHOLE]
    assert run(*given, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_tokenizer_without_chat_template_is_named(tmp_path, capsys):
    model = write_model_folder(tmp_path / "toy")
    (model / "tokenizer_config.json").write_text("{}")
    code = run(f"--config.output={tmp_path}/runs", f"--config.model.path={model}", WHOLE)
    error = capsys.readouterr().err
    assert code == 2 and "chat" in error and "template" in error and error.count("\n") == 1


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file, not a folder")
    assert run(f"--config.output={tmp_path}/runs") == 2
    error = capsys.readouterr().err
    assert "run folder: must be writable" in error and error.count("\n") == 1


def test_an_unknown_domain_and_a_missing_file_are_named(tmp_path, capsys):
    assert run(config=f"{SCIKNOWEVAL}:alchemy") == 2
    assert "must be one of biology, chemistry" in capsys.readouterr().err
    assert run(config=str(tmp_path / "none.py")) == 2
    assert "no such file" in capsys.readouterr().err
    given = ["--config.task.path=none", f"--config.output={tmp_path}/runs"]
    assert run(*given, config=f"{SCIKNOWEVAL}:physics,small") == 2
    assert "task.path: must be a folder" in capsys.readouterr().err


def test_help_and_a_typo_answer_without_loading_jax():
    """A person who mistypes waits for Python alone."""
    program = (
        "import sys; from experiments.command import main\n"
        "code = main('x', ['--config', 'none.py'])\n"
        "sys.exit(code if 'jax' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no such file" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFinite("step 3: the loss is nan"), 2),  # starting again would not mend it
        (SaveFailed("checkpoint 3: could not be written"), 1),
        (ValueError("a bug"), None),
    ],
)
def test_a_failed_run_is_one_line_and_a_bug_keeps_its_traceback(
    tmp_path, capsys, monkeypatch, error, code
):
    def fails(self):
        raise error

    monkeypatch.setattr("pmd_jax.run.Run.to_the_end", fails)
    model = write_model_folder(tmp_path / "toy")
    given = [f"--config.output={tmp_path}/runs", f"--config.model.path={model}", WHOLE]
    if code is None:
        with pytest.raises(ValueError, match="a bug"):
            run(*given)
    else:
        assert run(*given) == code
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {error}"


def test_a_runs_config_json_is_a_configuration(tmp_path):
    """What `to_dict` wrote comes back, tuples too, and can be overridden."""
    file = tmp_path / "config.json"
    config = settings.build(RunConfig, settings.load_config(QUICKSTART))
    file.write_text(json.dumps(settings.to_dict(config)))
    assert settings.build(RunConfig, settings.load_config(str(file))) == config
    other = settings.load_config(str(file), ["--config.teacher.sources=insights"])
    assert settings.build(RunConfig, other).teacher.sources == ("insights",)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="must be one JSON object"):
        settings.load_config(str(file))
    file.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        settings.load_config(str(file))
