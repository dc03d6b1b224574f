"""The bench on a toy: the same work, the same loss, FLOPs as needed, and one line for a mistake."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import CONFIG, F32, toy_params, write_model_folder

from pmd_jax.distill.batch import build_batch
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.policy import kernels
from tools.bench import __main__ as bench
from tools.bench import distill, machine, rollout
from tools.bench.__main__ import main
from tools.bench.peers import REPOSITORY, Peer
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


# --- too little memory --------------------------------------------------------------------------

TUNING = """NOT_FOUND: All configs failed during profiling or were excluded from selection.
Failures (3):
EXECUTION FAILED: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 37.98GiB with allocator
"""  # what an H100 said to the naive loss


@pytest.mark.parametrize(
    ("text", "lack"),
    [
        (TUNING, "an allocation of 37.98GiB failed"),
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 912 bytes.",
            "an allocation of 912 bytes failed",
        ),
        ("RESOURCE_EXHAUSTED: no more", "the device's memory is too small"),
        ("INTERNAL: Out of memory", "the device's memory is too small"),
        ("NOT_FOUND: All configs failed during profiling", ""),
    ],
)
def test_a_lack_of_memory_is_known_under_each_of_its_names(text, lack):
    assert machine.memory_lacked(RuntimeError(text)) == lack


def fail(text):
    def failing(*_, **__):
        raise jax.errors.JaxRuntimeError(text)

    return failing


SMALL = "--problems=1", "--samples=1", "--prompt=8", "--teacher=8", "--response=8", "--repeats=1"


def test_a_naive_loss_that_does_not_fit_is_said_and_ours_is_measured(model, capsys, monkeypatch):
    monkeypatch.setattr(distill, "naive_loss", fail(TUNING))
    code, result = run(capsys, "distill", "--model", model, *SMALL)
    assert code == 0 and result["seconds"] > 0
    assert result["naive"] == "does not fit: an allocation of 37.98GiB failed"
    assert "against_naive" not in result


def test_any_other_failure_of_the_naive_loss_is_one(model, monkeypatch):
    monkeypatch.setattr(distill, "naive_loss", fail("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        main(["distill", "--model", model, *SMALL])


# --- all ----------------------------------------------------------------------------------------


def told(what, args, on_cpu, peers):
    """In place of a measurement."""
    if (what, args.model) == ("distill", "qwen3-0.6b"):
        raise jax.errors.JaxRuntimeError(TUNING)
    return {"bench": what, "model": args.model, "peak_bytes": 7}


def test_a_failed_part_of_all_is_told_and_the_others_go_on(capsys, monkeypatch):
    monkeypatch.setattr(bench, "one", told)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert main(["all"]) == 1
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines() if line.startswith("{")]
    assert [(line["bench"], line["model"], "failed" in line) for line in lines] == [
        ("rollout", "smollm2-135m", False),
        ("distill", "smollm2-135m", False),
        ("step", "smollm2-135m", False),
        ("distill", "qwen3-0.6b", True),
        ("step", "qwen3-0.6b", False),
        ("distill", "qwen3-1.7b", False),
        ("step", "qwen3-1.7b", False),
        ("memory", "", False),
    ]
    assert lines[3]["failed"].startswith("JaxRuntimeError: NOT_FOUND: All configs failed")
    assert printed.err.endswith("tools.bench: all: failed: distill qwen3-0.6b\n")
    assert ["peak_bytes" in line for line in lines] == [True] + [False] * 7  # of the process


def test_all_on_a_cpu_is_of_the_small_model(capsys, monkeypatch):
    monkeypatch.setattr(bench, "one", told)
    assert main(["all"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {json.loads(line)["model"] for line in lines} == {"smollm2-135m", ""}


def test_the_set_takes_few_behaviors_and_only_ours_on_a_gpu():
    parts = list(bench.every(bench.parser().parse_args(["all"]), on_cpu=False))
    assert parts[-1][1].vectors == 100_000
    assert all(args.no_naive for what, args in parts if what == "distill")


def test_every_number_of_a_table_has_its_unit():
    result = {
        "weights_fraction_of_bytes": 0.0876,
        "fraction_of_flops": 0.45,
        "peak_bytes": 3 * 2**30,
        "bytes_per_second": 2.1e12,
        "phases": {"sync_seconds": 0.004},
    }
    assert list(bench.rows(result)) == [
        ("weights_fraction_of_bytes", "8.8%"),
        ("fraction_of_flops", "45.0%"),
        ("peak_bytes", "3.00 GiB"),
        ("bytes_per_second", "2,100.0 G/s"),
        ("phases: sync_seconds", "4.00 ms"),
    ]


# --- peers --------------------------------------------------------------------------------------


class Told(Peer):
    """A peer without a process, whose first run takes 9 s and all others 1 s."""

    def __init__(self):
        self.name, self.asked = "told", []

    def _ask(self, what, **values):
        self.asked.append(what)
        return {"seconds": 9.0 if self.asked.count("run") == 1 else 1.0, "loss": 0.5}


@pytest.mark.parametrize("what", ["rollout", "distill"])
def test_the_first_run_of_a_peer_does_not_count(model, what):
    peer, sizes = Told(), ("--problems=1", "--samples=1", "--prompt=8", "--response=8")
    command = what, "--model", model, *sizes, "--teacher=8", "--repeats=2", "--no-naive"
    result = bench.one(what, bench.parser().parse_args(command), True, [peer])
    theirs = result["against_told"]
    assert peer.asked == ["prepare", "run", "run", "run"]
    assert theirs["first_run_seconds"] == 9 and theirs["all_seconds"] == [1, 1]
    assert "against_naive" not in result


@pytest.fixture
def reserve(monkeypatch):
    """No variable says how much of a GPU JAX reserves; what a test sets is gone after it."""
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda: os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_memory_is_left_for_peers_before_jax_starts(model, reserve, monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "default_backend", lambda: seen.append(reserve()) or "gpu")
    command = "rollout", "--model", model
    assert main([*command, "--against=tunix", "--peer-python=/bin/false"]) == 2  # no Python
    assert seen == [".3"]


def test_without_peers_jax_reserves_as_ever(model, reserve, monkeypatch):
    monkeypatch.setattr(bench, "one", told)
    assert main(["rollout", "--model", model]) == 0
    assert reserve() is None


@pytest.mark.parametrize("name", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_the_users_reserve_is_kept(reserve, monkeypatch, name):
    assert bench.share_memory()["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".6"  # of a peer in JAX
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setenv(name, ".5")
    assert bench.share_memory() == {}
    assert reserve() == (".5" if "PYTHON" in name else None)


@pytest.mark.slow
def test_to_import_the_bench_does_not_start_jax():
    """JAX takes a number of devices only before it starts."""
    code = (
        "import tools.bench.__main__, jax; jax.config.update('jax_num_cpu_devices', 3); "
        "print(jax.device_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.stdout == b"3\n"


# --- steps and FLOPs ----------------------------------------------------------------------------


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


@pytest.mark.parametrize(("window", "pairs"), [(None, 64 * 65 // 2), (4, 1 + 2 + 3 + 61 * 4)])
def test_flops_of_cudnn_are_of_the_pairs_that_it_does_not_skip(monkeypatch, window, pairs):
    """Traced as for a GPU: two products of 8 columns in 3 rows of 2 heads, and backward five."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((3, 64, 2, 8), jnp.bfloat16)

    def attend(q):
        return kernels.cudnn_rows(q, q, q, window)

    once = 2 * 3 * 2 * 8 * pairs
    assert product_flops(attend, q) == 2 * once
    assert product_flops(jax.grad(lambda q: attend(q).astype(jnp.float32).sum()), q) == 7 * once


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
        (
            ("step", "--model=smollm2-135m/1", "--problems=1", "--attention=cudnn"),
            "attention: cudnn runs on NVIDIA GPUs alone; the devices are cpu; use attention auto",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
