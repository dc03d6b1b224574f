"""The loop on programs, with a toy model that is lent its code: judge, feedback, objectives."""

import dataclasses
import json
import re

import pytest
from scripted import make_generate
from test_trainer import config_for, lines
from toys import write_model_folder

from experiments.rows import config_of
from pmd_jax import trainer
from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.memory.teacher import TeacherConfig
from pmd_jax.run import train
from pmd_jax.tasks.judge import JudgeConfig
from pmd_jax.tasks.sandbox import SandboxConfig
from pmd_jax.tasks.task import TaskConfig

TASK = TaskConfig(
    "minicode",
    families=("minus",),
    judge=JudgeConfig(time_limit_seconds=2.0, sandbox=SandboxConfig(workers=2)),
    response_style="direct",
    num_train=8,
    num_validation=4,
    num_test=4,
    feedback=True,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = write_model_folder(tmp_path_factory.mktemp("models") / "toy")
    config = config_for(model, "runs")
    rollout = dataclasses.replace(config.rollout, problems_per_step=4)
    teacher = TeacherConfig(max_prompt_tokens=3000, top_k=1)
    checkpoint = CheckpointConfig(every=0, keep=1)
    return dataclasses.replace(
        config, steps=1, task=TASK, rollout=rollout, teacher=teacher, checkpoint=checkpoint
    )


@pytest.fixture(scope="module", autouse=True)
def lent():
    """Of each group one response is right, one wrong, one raises, and one has no code."""

    def code_of(problem, sample):
        signature, less = re.search(r"`(.*)`.* (\d+)", problem.stem).groups()
        body = (f"return n - {less}", f"return n + {less}", "return unknown")[sample]
        return f"```python\ndef {signature}:\n    {body}\n```"

    def written(problem, rollout):
        text = code_of(problem, rollout.sample) if rollout.sample < 3 else "I do not know."
        return dataclasses.replace(rollout, text=text)

    def attempt(policy, task, problems, *rest, on_rollout, **named):
        def hear(problem, rollout):
            on_rollout(problem, written(problem, rollout))

        made = real_attempt(policy, task, problems, *rest, on_rollout=hear, **named)
        return {
            p.id: (made[p.id][0], tuple(written(p, r) for r in made[p.id][1])) for p in problems
        }

    real_attempt = trainer.attempt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "attempt", attempt)
        patch.setattr(trainer, "make_generate", make_generate)
        yield


@pytest.fixture(scope="module")
def ran(base, lent, tmp_path_factory):
    """The folder of a step of PMD."""
    return run(base, tmp_path_factory.mktemp("pmd"))


def run(config, tmp_path):
    return train(dataclasses.replace(config, output=str(tmp_path))).folder


def test_a_step_on_programs_from_the_judge_to_the_loss(ran):
    [row] = lines(ran)
    assert row["accuracy"] == 0.25 and row["well_formed"] == 0.75
    assert 0.25 <= row["tests_passed"] < 0.5
    assert row["feedback/share"] == 0.75 and 0 < row["feedback/revealed"] < 0.1
    assert row["loss_fraction"] == 1.0
    samples = {s["rollout"][-2:]: s for s in lines(ran, "samples.jsonl")[:4]}
    assert samples[".0"]["correct"] and samples[".0"]["feedback"] == ""
    assert samples[".0"]["tests_passed"] == 1.0 and samples[".0"]["answer"] == ""
    assert "Wrong Answer" in samples[".1"]["feedback"] and samples[".1"]["revealed"] > 0
    assert "NameError" in samples[".2"]["feedback"] and samples[".2"]["revealed"] == 0
    assert "Incorrect Format" in samples[".3"]["feedback"]
    # A failed attempt's teacher reads the sibling that passes; the one success has none to read.
    assert (
        "return n - " in samples[".1"]["teacher_prompt"]
        and "sibling" in samples[".1"]["section_tokens"]
    )
    assert "sibling" not in samples[".0"]["section_tokens"]


def test_evaluation_of_programs_has_tests_and_no_votes(ran):
    after = json.loads((ran / "evaluation.json").read_text())["after"]
    assert after["tests_passed"] == after["average"] == 0.0  # a toy writes no code
    assert after["majority"] is after["chance"] is after["headroom"] is None
    assert after["majority_at"] == {} and after["pass_at"].keys() == {"1", "2"}


@pytest.mark.slow
@pytest.mark.parametrize("row", ["grpo", "sdpo", "transient"])
def test_other_rows_run_on_programs_unchanged(base, tmp_path, capsys, row):
    folder = run(config_of(row, base, str(tmp_path), 0, "", 1), tmp_path)
    said = capsys.readouterr().out
    assert "programs are judged by official rules; files by" in said
    assert "tests passed" in said and "best constant letter" not in said
    [metrics] = lines(folder)
    # SDPO's teacher has nothing for a group's only success.
    assert metrics["loss_fraction"] == (0.75 if row == "sdpo" else 1.0)
    shown = {name for s in lines(folder, "samples.jsonl") for name in s["section_tokens"]}
    assert shown == {"grpo": set(), "sdpo": {"sibling"}}.get(row, shown)
    if row == "sdpo":
        alone = [s for s in lines(folder, "samples.jsonl") if s["correct"]]
        assert all(not s["section_tokens"] for s in alone)
