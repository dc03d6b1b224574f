"""Many processes, one run: the rules of their start, what they share, runs of real processes."""

import dataclasses
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from test_trainer import config_for, lines
from toys import TEXT_CONFIG, write_model_folder

from pmd_jax import distributed, settings
from pmd_jax.distributed import Cluster, PeerFailed, Stopped, by_main, exchange, launched, share
from pmd_jax.memory.bank import Bank
from pmd_jax.policy.sharding import MeshConfig, local_mesh, make_mesh
from tools.soak import are_going, kill, start, state_of

ROOT = Path(__file__).parents[1]

# --- alone, and beside processes that are made up -------------------------------------------


def test_alone_nothing_is_sent_and_errors_stay_what_they_are():
    assert exchange({"a": 1}) == [{"a": 1}]
    assert share(3, lambda own: [10 * i for i in own]) == [0, 10, 20]
    assert by_main(lambda: 5) == 5
    with pytest.raises(KeyError):
        share(1, lambda own: {}["nothing"])


@pytest.fixture
def as_one_of(monkeypatch):
    """This process as number `index` of several, the others of which say what the test says."""

    def be(index, count, others):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: index)

        def exchange(mine):
            told = list(others)
            told.insert(index, mine)
            return told

        monkeypatch.setattr(distributed, "exchange", exchange)

    return be


def test_pieces_are_dealt_in_turn_and_come_back_in_order(as_one_of):
    as_one_of(1, 3, [("", "", ["a", "d"]), ("", "", ["c"])])
    assert share(4, lambda own: [f"own {i}" for i in own]) == ["a", "own 1", "c", "d"]


def test_an_error_in_one_process_is_an_error_in_all(as_one_of):
    as_one_of(0, 2, [("ValueError", "no such thing", [])])
    with pytest.raises(PeerFailed, match=r"process 1 failed: no such thing \(ValueError\)"):
        share(2, list)
    with pytest.raises(KeyError):  # one's own is told as it is
        share(2, lambda own: {}["nothing"])


def test_what_stops_one_stops_all(as_one_of):
    as_one_of(0, 2, [("Stopped", "", [])])
    with pytest.raises(Stopped):
        share(2, list)


def test_what_the_first_finds_is_everyone_s(as_one_of):
    as_one_of(1, 2, [("found", None)])
    assert by_main(lambda: pytest.fail("only the first looks")) == "found"
    as_one_of(1, 2, [(None, ValueError("config.name: wrong"))])
    with pytest.raises(ValueError, match=r"config\.name: wrong"):
        by_main(lambda: None)


@pytest.mark.parametrize("lengths", [(0, 3), (100, 7), (64, 65), (1, 0)])
def test_records_are_sent_in_pieces(monkeypatch, lengths):
    """Two processes in one: each round, the other's piece lies beside one's own."""
    mine, theirs = (bytes(range(n)) for n in lengths)
    other = pickle.dumps(theirs, protocol=5)
    sent = []

    def gather(x):
        if x.dtype == np.int32:
            return np.stack([x, divmod(len(other), 16)])
        begin, row = 16 * len(sent), np.zeros_like(x)
        piece = other[begin : begin + len(x)]
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
        sent.append(x)
        return np.stack([x, row])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "PIECE", 16)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    assert exchange(mine) == [mine, theirs]
    assert max(map(len, sent)) <= 16


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, False),  # sbatch itself, not a step of it
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a.svc,b.svc"}, True),
    ],
)
def test_launchers_are_known_by_their_environment(environment, several):
    assert launched(environment) is several


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_processes": 2}, "must be given together, or none of them; got None, 2, None"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "--process-id: must be below --num-processes, 2; got 2",
        ),
        (
            {"coordinator": "a", "num_processes": 2, "process_id": 0},
            "--coordinator: must be HOST:PORT of process 0; got 'a'",
        ),
        ({"peer_timeout": 0}, "--peer-timeout: must be at least 1 second; got 0"),
    ],
)
def test_what_does_not_name_a_process_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**values)


def test_a_tensor_axis_stays_within_a_process():
    devices = [Mock(spec=jax.Device, process_index=p) for p in (0, 1) for _ in range(4)]
    with pytest.raises(ValueError, match=r"mesh\.tensor: .*\[4\].*got 8; .*work: 1, 2, 4"):
        make_mesh(MeshConfig(tensor=8), devices)


def test_alone_the_local_mesh_is_the_mesh():
    mesh = make_mesh(MeshConfig())
    assert local_mesh(mesh) is mesh


# --- real processes -------------------------------------------------------------------------

LAYOUTS = {  # processes, devices of each, fsdp x tensor
    "1 device": (1, 1, 1, 1),
    "8x1": (1, 8, 8, 1),
    "4x2": (1, 8, 4, 2),
    "2x4": (1, 8, 2, 4),
    "2 processes": (2, 4, 4, 2),
    "4 processes": (4, 2, 4, 2),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A model whose heads four devices can share."""
    config = dataclasses.replace(TEXT_CONFIG, num_kv_heads=4)
    return write_model_folder(tmp_path_factory.mktemp("models") / "toy", config)


def command(toy, output, name, fsdp=2, tensor=1, **changes):
    """The command line of a scripted run, and its folder."""
    config = config_for(toy, output, mesh=MeshConfig(1, fsdp, tensor), **changes)
    output.mkdir(exist_ok=True)
    file = output / f"{name}.json"
    file.write_text(json.dumps(settings.to_dict(config)))
    program = [sys.executable, str(ROOT / "tests" / "scripted.py")]
    return [*program, "--config", str(file), "--name", name], output / name


def begin(line, output, num_processes, num_devices, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(num_devices))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    monkeypatch.setenv("PYTHONPATH", paths)
    return start(line, num_processes, output / "log")


def ended(running, seconds=300):
    """The exit codes of processes that end by themselves."""
    until = time.monotonic() + seconds
    while are_going(running) and time.monotonic() < until:
        time.sleep(0.2)
    codes = [process.poll() for process in running]
    kill(running)
    return codes


def until(condition, running, seconds=300):
    limit = time.monotonic() + seconds
    while not condition():
        assert are_going(running) and time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.slow
def test_layouts_of_devices_and_processes_give_one_training(toy, tmp_path, monkeypatch):
    """The same bank, byte for byte; losses and weights but for the order of float32 sums."""
    found = {}
    for name, (processes, devices, fsdp, tensor) in LAYOUTS.items():
        line, folder = command(toy, tmp_path, name.replace(" ", "-"), fsdp, tensor)
        assert set(ended(begin(line, tmp_path, processes, devices, monkeypatch))) == {0}, name
        losses = np.array([row["loss"] for row in lines(folder)])
        found[name] = losses, Bank.load(folder / "memory").digest(), state_of(folder)
    losses, bank, state = found.pop("1 device")
    assert len(losses) == 4
    for name, (theirs, its_bank, its_state) in found.items():
        print(f"{name}: losses differ by at most {np.abs(theirs - losses).max():.1e}")
        np.testing.assert_allclose(theirs, losses, atol=1e-6, err_msg=name)
        assert its_bank == bank, name
        for one, other in zip(state, its_state, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5, err_msg=name)


LOCAL = """
import sys
import jax
import numpy as np
from pmd_jax.distributed import Cluster, start
folder, _, address, _, count, _, index = sys.argv[1:]
start(Cluster(address, int(count), int(index)))
from pmd_jax.policy.policy import load_policy
from pmd_jax.policy.sharding import MeshConfig, make_mesh

policy = load_policy(folder, "float32", make_mesh(MeshConfig(1, 4, 2)))
view = policy._to_local
view(policy.params)  # makes the program that gathers
gathered, real = view._gather(policy.params), view._gather
view._gather = lambda params: gathered
local = view(policy.params)
view._gather = real
for old, new in zip(jax.tree.leaves(gathered), jax.tree.leaves(local)):
    before = {s.device: s.data.unsafe_buffer_pointer() for s in old.addressable_shards}
    after = {s.device: s.data.unsafe_buffer_pointer() for s in new.addressable_shards}
    assert after == before and new.is_fully_addressable
matrix, whole = local["layers"]["gate"], policy.params["layers"]["gate"]
assert matrix.sharding.shard_shape(matrix.shape) == (2, 16, 32)  # two by two of its own devices
assert whole.sharding.shard_shape(whole.shape) == (2, 8, 32)  # of all: four by two
lengths = 3 + 4 * int(index)  # each process runs a loop of its own
[[sample]] = policy.generate([[1, 2, 3]], max_new_tokens=lengths, stop_tokens=[], seed=5)
alone = load_policy(folder, "float32")
[[same]] = alone.generate([[1, 2, 3]], max_new_tokens=lengths, stop_tokens=[], seed=5)
assert sample.tokens.tolist() == same.tokens.tolist() and len(sample.tokens) == lengths
np.testing.assert_allclose(sample.logprobs, same.logprobs, atol=1e-5)
print("as it should be", flush=True)
"""


@pytest.mark.slow
def test_a_process_samples_on_its_own_devices_from_the_buffers_of_the_gather(
    toy, tmp_path, monkeypatch
):
    running = begin([sys.executable, "-c", LOCAL, str(toy)], tmp_path, 2, 4, monkeypatch)
    assert ended(running) == [0, 0]
    assert (tmp_path / "log").read_text().count("as it should be") == 2


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(toy, tmp_path, monkeypatch):
    line, whole = command(toy, tmp_path, "whole")
    assert ended(begin(line, tmp_path, 1, 2, monkeypatch)) == [0]
    line, folder = command(toy, tmp_path, "moved", steps=2)
    assert ended(begin(line, tmp_path, 2, 1, monkeypatch)) == [0, 0]
    line, _ = command(toy, tmp_path, "moved", fsdp=1)
    assert ended(begin([*line, "--resume"], tmp_path, 1, 1, monkeypatch)) == [0]
    assert Bank.load(folder / "memory").digest() == Bank.load(whole / "memory").digest()
    rows = [[row["loss"] for row in lines(f)] for f in (folder, whole)]
    np.testing.assert_allclose(*rows, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stands still"])
def test_a_peer_that_is_gone_ends_the_job(toy, tmp_path, monkeypatch, number):
    line, folder = command(toy, tmp_path, "run", steps=500)
    line += ["--peer-timeout", "10"]
    running = begin(line, tmp_path, 2, 1, monkeypatch)
    until(lambda: (folder / "checkpoints" / "2").is_dir(), running)
    os.kill(running[1].pid, number)
    try:
        until(lambda: running[0].poll() is not None, running[:1] + running[1:], seconds=60)
    finally:
        code = running[0].poll()
        kill(running)
    log = (tmp_path / "log").read_text()
    assert code not in (0, None)
    assert "process 0: another process ended" in log or "heartbeat" in log.lower()


@pytest.mark.slow
def test_sigterm_to_all_saves_and_exits_0(toy, tmp_path, monkeypatch):
    line, folder = command(toy, tmp_path, "run", steps=500)
    running = begin(line, tmp_path, 2, 1, monkeypatch)
    until(lambda: (folder / "checkpoints" / "2").is_dir(), running)
    for process in running:
        process.terminate()
    assert ended(running, 60) == [0, 0]
    assert "SIGTERM: saved step" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_banks_that_differ_end_the_run_and_both_are_written(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("PMD_TEST_DIFFERENT_BANK", "1")
    line, folder = command(toy, tmp_path, "run")
    assert ended(begin(line, tmp_path, 2, 1, monkeypatch)) == [1, 1]
    log = (tmp_path / "log").read_text()
    assert "step 0: the processes hold different memories" in log
    both = [Bank.load(folder / "banks_differ_step_0" / f"process_{i}") for i in range(2)]
    assert both[0].digest() != both[1].digest()


@pytest.mark.slow
def test_a_failure_in_one_process_is_told_by_both(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("PMD_TEST_FAILING_PROCESS", "1")
    line, _ = command(toy, tmp_path, "run")
    assert ended(begin(line, tmp_path, 2, 1, monkeypatch)) == [1, 1]
    log = (tmp_path / "log").read_text()
    assert "error: process 1 failed: the judge is ill (SandboxError)" in log
    assert "error: the judge is ill" in log
