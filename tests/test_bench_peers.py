"""Peers of the bench: the protocol between the two processes, and what is said when it fails.

Fake peers stand in for the libraries. The tests marked `peers` hold the tokens and losses of the
real ones against ours, each with requirements-bench.txt in an environment of its own.
"""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from toys import TEXT_CONFIG, make_sampler, params_on, toy_params, write_model_folder

from pmd_jax.distill.batch import DistillGroup, build_batch, place
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import loss_and_gradients
from pmd_jax.policy.sampler import SamplingConfig
from pmd_jax.policy.sharding import single_device_mesh
from pmd_jax.records import Rollout
from tools.bench import peers
from tools.bench.peers import Library, Peer, PeerError, available
from tools.bench.peers.batches import Row, cut, predicted, report, rows_of, sizes_for
from tools.bench.peers.calibration import climb, fastest

ECHO = """
    import os
    from tools.bench.peers.child import serve

    class Echo:
        def __init__(self, workload):
            print("loading")  # must not reach the parent
            os.system("echo from a C library")
            self.about = {"library": "echo", "version": "1", "setting": workload["words"]}
            self.times = 0

        def run(self):
            self.times += 1
            if self.times == 3:
                print("a warning")
                raise ValueError("the third run is one too many")
            return {"seconds": 0.5, "tokens": self.times, "wait": os.environ["OMP_WAIT_POLICY"]}

    serve({"echo": Echo})
"""
WORKLOAD = {"kind": "echo", "words": "ä b"}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Registers a module under the name of a peer."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)

    def add(source, name="echo", imports=()):
        (tmp_path / f"peer_{name}.py").write_text(textwrap.dedent(source))
        library = Library(f"peer_{name}", ("echo",), imports, ("torch==2", "trl"))
        monkeypatch.setitem(peers.PEERS, name, library)
        return name

    return add


def test_a_peer_answers_and_its_prints_stay_out_of_the_answers(fake):
    with Peer(fake(ECHO)) as peer:
        about = peer.prepare(WORKLOAD)
        runs = [peer.run(), peer.run()]
        printed = peer.stderr()
    assert about == {"library": "echo", "version": "1", "setting": "ä b"}
    assert runs == [{"seconds": 0.5, "tokens": n, "wait": "PASSIVE"} for n in (1, 2)]
    assert "loading" in printed and "from a C library" in printed


def test_the_first_run_of_a_peer_is_told_and_does_not_count(fake):
    with Peer(fake(ECHO)) as peer:
        about = peer.warm_up(WORKLOAD)
        assert about["setting"] == "ä b" and about["first_run_seconds"] == 0.5
        assert peer.run()["tokens"] == 2  # ECHO tells which run it is


def test_variables_are_of_the_peer_alone(fake):
    with Peer(fake(ECHO), variables={"OMP_WAIT_POLICY": "ACTIVE"}) as peer:
        peer.prepare(WORKLOAD)
        assert peer.run()["wait"] == "ACTIVE"
    assert "OMP_WAIT_POLICY" not in os.environ


def test_the_users_wait_policy_is_kept(fake, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with Peer(fake(ECHO)) as peer:
        peer.prepare(WORKLOAD)
        assert peer.run()["wait"] == "ACTIVE"


def test_a_crash_is_one_line_with_the_last_words(fake):
    with Peer(fake(ECHO)) as peer:
        peer.prepare(WORKLOAD)
        peer.run(), peer.run()
        with pytest.raises(PeerError) as error:
            peer.run()
        with pytest.raises(PeerError, match="crashed in run"):
            peer.run()  # the dead stay dead
    message = str(error.value)
    assert message.startswith("echo: crashed in run (exit status 1): ")
    assert message.endswith("ValueError: the third run is one too many")
    assert "\n" not in message


def test_a_peer_that_is_killed_names_the_signal(fake):
    source = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with (
        Peer(fake(source)) as peer,
        pytest.raises(PeerError, match=r"crashed in prepare \(signal 9\): it printed nothing"),
    ):
        peer.prepare(WORKLOAD)


def test_an_unknown_kind_is_named(fake):
    with (
        Peer(fake(ECHO)) as peer,
        pytest.raises(PeerError, match=r"kind: must be one of \['echo'\]; got 'distill'"),
    ):
        peer.prepare({"kind": "distill"})


def test_leaving_early_ends_the_process(fake):
    with Peer(fake(ECHO)) as peer:
        process = peer._process
    assert process.poll() is not None


def test_a_peer_ends_with_its_parent_in_the_middle_of_its_work(fake, tmp_path):
    fake("""
        import os, pathlib, time
        from tools.bench.peers.child import serve

        def prepare(workload):
            pathlib.Path(workload["note"]).write_text(str(os.getpid()))
            time.sleep(600)

        serve({"echo": prepare})
    """)
    note = tmp_path / "pid"
    code = f"""
        from tools.bench import peers
        peers.PEERS["echo"] = peers.Library("peer_echo", ("echo",), (), ())
        peers.Peer("echo").prepare({{"kind": "echo", "note": {str(note)!r}}})
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=peers.REPOSITORY)
    wait_for(lambda: note.exists() and note.read_text())
    parent.kill()
    parent.wait()
    child = int(note.read_text())
    wait_for(lambda: not is_alive(child))


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited for too long"
        time.sleep(0.1)


def is_alive(pid):
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_what_is_missing_is_named_with_the_command(fake):
    name = fake(ECHO, imports=("json", "no_such_package", "nor_this"))
    line = available(name)
    assert line == (
        f"echo: {sys.executable} has no no_such_package, no nor_this; "
        f"{sys.executable} -m pip install torch==2 trl"
    )
    with pytest.raises(PeerError, match="no_such_package"):
        Peer(name)


def test_an_available_peer_has_no_complaint(fake):
    assert available(fake(ECHO, imports=("json",))) is None


def test_an_interpreter_that_is_none_is_named(fake, tmp_path):
    name = fake(ECHO)
    assert "no-python cannot be started" in available(name, str(tmp_path / "no-python"))
    assert "is no working Python" in available(name, "/bin/false")


def test_every_peer_has_requirements_and_a_module():
    for name, library in peers.PEERS.items():
        assert any(
            package.startswith(("transformers", "trl", "google-tunix"))
            for package in library.packages
        ), name
        assert (peers.REPOSITORY / f"{library.module.replace('.', '/')}.py").exists()
    assert peers.packages("trl")[0].startswith("torch==") and "" not in peers.packages("trl")


def test_an_unknown_peer_is_named():
    with pytest.raises(PeerError, match="must be one of transformers, tunix, trl; got 'vllm'"):
        available("vllm")


# --- batches and settings -----------------------------------------------------------------

WORK = {"prompts": [[1], [2]], "num_samples": 2, "lengths": [[3, 9], [5, 4]]}


def test_batches_hold_rows_of_like_length_side_by_side_by_prompt():
    rows = rows_of(WORK)
    assert [row.length for row in rows] == [9, 5, 4, 3]
    assert cut(rows, 2) == [[Row(0, 1, 9), Row(1, 0, 5)], [Row(0, 0, 3), Row(1, 1, 4)]]
    assert sizes_for(4) == [4] and sizes_for(40) == [8, 16, 32, 40]


def test_the_predicted_time_is_that_of_prefills_and_of_the_longest_rows():
    """Prefill gives the first token: two batches at 10 s, and 8 + 3 steps of 1 s."""
    assert predicted(rows_of(WORK), 2, prefill=10.0, step=1.0) == 31


def test_lengths_must_fit_prompts_and_samples():
    with pytest.raises(ValueError, match="lengths: must be 2 prompts x 3 samples"):
        rows_of({**WORK, "num_samples": 3})


def test_responses_come_back_in_the_order_of_the_workload_with_their_lengths():
    rows = rows_of(WORK)
    made = [[row.prompt * 10 + row.sample] * row.length for row in rows]
    result = report(rows, made, 2.0)
    assert result["responses"] == [[0] * 3, [1] * 9, [10] * 5, [11] * 4]
    assert (result["seconds"], result["tokens"]) == (2.0, 21)
    with pytest.raises(ValueError, match="the library made 8 tokens"):
        report(rows, [made[0][1:], *made[1:]], 2.0)


def test_the_search_stops_where_more_does_not_help_and_passes_what_fails():
    seconds, tried, times = {1: 9.0, 2: 5.0, 8: 6.0, 16: 9.0, 32: 1.0}, [], {}

    def seconds_of(size):
        tried.append(size)
        return seconds[size]  # none for 4

    climb([1, 2, 4, 8, 16, 32], seconds_of, times)
    assert tried == [1, 2, 4, 8, 16]
    assert fastest(times) == 2
    with pytest.raises(RuntimeError, match="no setting works here"):
        fastest({})


# --- the real libraries ---------------------------------------------------------------------
# Run with `PEER_PYTHON=... python -m pytest -m peers -k trl`, where the interpreter of the peer's
# environment need not have our packages.


def real(name):
    """A peer in the environment that PEER_PYTHON names; skips where its library is missing."""
    python = os.environ.get("PEER_PYTHON")
    if complaint := available(name, python):
        pytest.skip(complaint)
    return Peer(name, python)


def toy_prompts(rng, count, low, high):
    return [rng.integers(1, 256, rng.integers(low, high)).tolist() for _ in range(count)]


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("transformers", {"way": "generate", "size": 5}),
        ("transformers", {"way": "generate", "size": 5, "cache": "static"}),
        ("transformers", {"way": "shared", "size": 5}),
        ("transformers", {"way": "continuous", "size": 4}),
        ("tunix", {"size": 5}),
    ],
)
def test_every_library_makes_our_tokens_and_no_more(name, choice, tmp_path):
    """Greedy, each response at its own length, rows of several lengths in a batch."""
    peer, rng = real(name), np.random.default_rng(0)
    folder = write_model_folder(tmp_path / "model", seed=1)
    prompts = toy_prompts(rng, 3, 20, 60)
    lengths = rng.integers(1, 20, (3, 4)).tolist()
    with peer:
        about = peer.prepare(
            {
                "kind": "rollout",
                "model": str(folder),
                "prompts": prompts,
                "num_samples": 4,
                "lengths": lengths,
                "dtype": "float32",
                "device": "cpu",
                "seed": 0,
                "temperature": 0,
                "choice": choice,
            }
        )
        result = peer.run()
    sampler, weights = make_sampler(params=toy_params(1, TEXT_CONFIG), config=TEXT_CONFIG)
    ours = sampler.generate(weights, prompts, lengths, SamplingConfig(temperature=0), [], 0)
    assert result["responses"] == [one.tokens.tolist() for each in ours for one in each]
    assert result["tokens"] == np.sum(lengths)
    assert about["library"] == name and about["choice"] == {**choice, **about["choice"]}


@pytest.mark.peers
@pytest.mark.parametrize("impl", ["trl", "plain"])
def test_the_loss_of_trl_is_ours(impl, tmp_path):
    """Value and norm of the gradient, responses and prompts of several lengths."""
    peer, rng = real("trl"), np.random.default_rng(0)
    folder = write_model_folder(tmp_path / "model", seed=1)
    students, teachers = toy_prompts(rng, 2, 10, 30), toy_prompts(rng, 6, 20, 60)
    responses = toy_prompts(rng, 6, 3, 12)
    with peer:
        peer.prepare(
            {
                "kind": "distill",
                "model": str(folder),
                "student_prompts": students,
                "teacher_prompts": teachers,
                "responses": responses,
                "prompt_of": [0, 0, 0, 1, 1, 1],
                "divergence": "reverse_kl",
                "dtype": "float32",
                "device": "cpu",
                "impl": impl,
                "choice": {"size": 4},
            }
        )
        theirs = peer.run()
        assert peer.run() == theirs | {"seconds": pytest.approx(theirs["seconds"], abs=60)}
    rollouts = [
        Rollout("toy", 0, i, "", np.int32(tokens), np.zeros(len(tokens), np.float32), "stop")
        for i, tokens in enumerate(responses)
    ]
    groups = [
        DistillGroup(student, teachers[i : i + 3], [True] * 3, rollouts[i : i + 3])
        for student, i in zip(students, (0, 3), strict=True)
    ]
    config, mesh = DistillConfig(), single_device_mesh()
    with jax.set_mesh(mesh):
        loss, _, gradients = loss_and_gradients(
            params_on(mesh, 1, TEXT_CONFIG),
            None,
            place(build_batch(groups), mesh),
            config,
            TEXT_CONFIG,
            np.dtype("float32"),
            1,
        )
    assert theirs["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert theirs["grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-4)
    assert theirs["tokens"] == sum(map(len, responses))
