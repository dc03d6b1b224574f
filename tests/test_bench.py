"""The bench on a toy: the same work, the same loss, FLOPs as needed, and one line for a mistake."""

import json

import jax
import numpy as np
import pytest
from toys import CONFIG, F32, toy_params, write_model_folder

from pmd_jax.distill.batch import build_batch
from pmd_jax.distill.objectives import DistillConfig
from tools.bench import distill, machine, rollout
from tools.bench.__main__ import main
from tools.flops import product_flops


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model_folder(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
    monkeypatch.setattr(
        machine, "roofline", lambda dtype: {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    )


def run(capsys, *arguments):
    """The exit code, and the result of the last line."""
    code = main(arguments)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_rollouts_have_their_lengths_and_settle(model, capsys):
    sizes = "--problems=3", "--samples=2", "--prompt=4-9", "--response=3-6", "--max-rows=2"
    code, result = run(capsys, "rollout", "--model", model, "--repeats=1", *sizes)
    assert code == 0
    _, lengths = rollout.Workload(3, 2, (4, 9), (3, 6)).draw(264)
    assert result["tokens"] == sum(map(sum, lengths))
    assert result["compilations"] > 0 and result["compilations_when_settled"] == 0
    assert 0 < result["rows_in_use"] <= 1 and result["versions"]["jax"] == jax.__version__


def test_a_share_of_the_samples_is_longer():
    plain, longer = (rollout.Workload(long_fraction=f).draw(99)[1] for f in (0.0, 0.1))
    factors = np.asarray(longer) / np.asarray(plain)
    assert sorted(set(factors.reshape(-1))) == [1, 8] and (factors == 8).sum() == 6


def test_the_naive_loss_is_ours(model, capsys):
    sizes = "--problems=2", "--samples=2", "--prompt=12", "--teacher=20", "--response=16"
    code, result = run(capsys, "distill", "--model", model, "--repeats=1", *sizes)
    naive = result["against_naive"]
    assert code == 0
    np.testing.assert_allclose(result["loss"], naive["loss"], rtol=1e-5)
    assert naive["flops"] > result["flops_needed"]  # it computes each prompt once a rollout


def test_a_step_reports_its_phases(model, capsys):
    sizes = "--problems=2", "--samples=2", "--prompt=8", "--teacher=12", "--response=3-6"
    code, result = run(capsys, "step", "--model", model, "--repeats=2", *sizes)
    assert code == 0 and result["compilations_when_settled"] == 0
    phases = {"sync", "rollout", "batch", "distill", "idle"}
    assert set(result["phases"]) == {f"{phase}_seconds" for phase in phases}
    assert result["logprob_gap"] < 1e-4


@pytest.mark.parametrize("remat", ["none", "context"])
def test_flops_are_those_of_student_both_ways_and_teacher_forward(remat):
    """To 1% where nothing is recomputed; prompts of 256 are cut into two blocks."""
    work = distill.Workload(groups=2, rollouts=3, student=256, teacher=384, response=32)
    config = DistillConfig(chunk_tokens=64, remat=remat)
    batch = build_batch(work.draw(CONFIG.vocab_size), bucket_tokens=1)
    params = toy_params()
    step = distill.steps(config, CONFIG, F32)["ours"]
    ratio = product_flops(step, params, batch) / distill.flops_needed(params, CONFIG, work)
    assert abs(ratio - 1) < 0.01 if remat == "none" else 1.05 < ratio < 1.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("rollout", "--against=trl"),
            "--against: must be of transformers, tunix for rollout; got 'trl'",
        ),
        (("step", "--against=tunix"), "must be of no peer for step"),
        (("rollout", "--against=tunix"), "--model smollm2-135m: has random weights"),
        (("rollout", "--model=/nowhere"), "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
