"""Peers of the bench: the protocol between the two processes, and what is said when it fails.

Fake peers stand in for the libraries. The test marked `peers` holds TRL's loss against ours and
needs an environment with torch, transformers and trl beside our own packages.
"""

import sys
import textwrap

import pytest

from tools.bench import peers
from tools.bench.peers import Library, Peer, PeerError, available

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


def test_an_unknown_peer_is_named():
    with pytest.raises(PeerError, match="must be one of transformers, tunix, trl; got 'vllm'"):
        available("vllm")
