"""The sandbox against valid and hostile programs, behind each wall that this machine has."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from programs import FAILED_BY_SDPO, HOSTILE, SECRET, VALID

from pmd_jax.records import UnitTests
from pmd_jax.tasks.judge import Judge, JudgeConfig
from pmd_jax.tasks.sandbox import (
    Execution,
    Program,
    Protections,
    Sandbox,
    SandboxConfig,
    SandboxError,
)
from pmd_jax.tasks.sandbox import worker as worker_module

LIMIT_SECONDS = 0.5
LINUX = sys.platform == "linux"
pytestmark = pytest.mark.skipif(not LINUX, reason="the walls are Linux's")


def settings(wall: str = "auto", **changes) -> SandboxConfig:
    return SandboxConfig(
        **{"wall": wall, "workers": 1, "memory_mib": 512, "wall_factor": 2.0, **changes}
    )


@pytest.fixture(scope="module", autouse=True)
def own_temporary_folder(tmp_path_factory):
    """Other tests run at the same time, and have sandboxes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(
    scope="module",
    params=["auto", *(pytest.param(w, marks=pytest.mark.slow) for w in ("bubblewrap", "none"))],
)
def judge(request):
    try:
        made = Judge(JudgeConfig(sandbox=settings(request.param)))
    except SandboxError as error:
        pytest.skip(f"no {request.param} here: {error}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(settings()) as made:
        yield made


def fenced(code: str) -> str:
    return f"Here it is:\n\n```python\n{code}\n```\n"


def runs(sandbox: Sandbox, code: str, inputs: list[str], seconds: float) -> list[Execution]:
    return sandbox.run(Program(code), inputs, seconds, lambda _, ran: ran)


def servers() -> set[int]:
    """Process ids of this process's children and theirs."""
    found, new = set(), {os.getpid()}
    while new:
        parent = new.pop()
        try:
            tasks = list(Path(f"/proc/{parent}/task").glob("*/children"))
            children = {int(word) for task in tasks for word in task.read_text().split()}
        except OSError:
            continue  # it has ended meanwhile
        new |= children
        found |= children
    return found


@pytest.mark.parametrize("name", VALID)
def test_a_valid_program_passes(judge, name):
    one = VALID[name]
    check = UnitTests((one.given,), (one.wanted,), one.function, 2.0)
    verdict = judge.verify(check, fenced(one.code), feedback=True)
    assert (verdict.correct, verdict.feedback) == (True, "")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_and_leaves_nothing(judge, name, tmp_path, monkeypatch):
    one = HOSTILE[name]
    own_root = judge.sandbox.protections.files in ("namespaces", "bubblewrap")
    if one.own_root and not own_root:
        pytest.skip("what is written is bounded as a whole in a root of its own alone")
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    monkeypatch.setenv("PMD_SECRET", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = one.code
        for key, value in (
            ("file", secret),
            ("pid", os.getpid()),
            ("port", server.getsockname()[1]),
        ):
            code = code.replace(f"{{{key}}}", str(value))
        code = code.replace("{{", "{").replace("}}", "}")
        outputs = (json.dumps(SECRET) if one.function else SECRET,)
        check = UnitTests(("3\n",), outputs, one.function, LIMIT_SECONDS)
        before = servers(), set(os.listdir(tempfile.gettempdir()))
        verdict = judge.verify(check, fenced(code), feedback=True)
        deadline = time.monotonic() + 2
        while not servers() <= before[0] and time.monotonic() < deadline:
            time.sleep(0.01)  # the runner has told the end of its job, and is about to end
        after = servers(), set(os.listdir(tempfile.gettempdir()))
    [outcome] = judge._judged(code, check).outcomes
    assert (verdict.correct, verdict.tests_passed) == (False, 0.0)
    assert outcome in one.ends, verdict.feedback
    assert one.said in verdict.feedback and verdict.feedback.startswith("Test Case 1: ")
    assert after[0] <= before[0], "processes"
    assert after[1] <= before[1], "files"
    assert secret.read_text() == SECRET and oct(secret.stat().st_mode)[-3:] == "644"
    right = judge.verify(UnitTests(("3",), ("6",)), fenced(f"print(6)  # {name}"), True)
    assert right.correct, "the next program's verdict"


def test_there_are_sixty_programs_and_more():
    assert len(VALID) >= 45 and len(HOSTILE) >= 60


@pytest.mark.parametrize("name", FAILED_BY_SDPO)
def test_sdpo_fails_what_its_executor_fails(sandbox, name):
    one = VALID[name]
    judge = Judge(JudgeConfig(rules="sdpo"), sandbox)
    check = UnitTests((one.given,), (one.wanted,), one.function, 2.0)
    assert not judge.verify(check, fenced(one.code), feedback=False).correct


def test_sdpo_passes_plain_programs(sandbox):
    judge = Judge(JudgeConfig(rules="sdpo"), sandbox)
    programs = "import sys\nprint(sys.stdin.readline().strip())", "import math\nprint(input())"
    for code in programs:
        check = UnitTests(("ab\n",), ("ab",), "", 2.0)
        assert judge.verify(check, fenced(code), feedback=False).correct
    check = UnitTests(("[1,2]\n3",), ("[4,5]",), "f", 2.0)
    code = "def f(a, k):\n    return tuple(x + k for x in a)"
    assert judge.verify(check, fenced(code), feedback=False).correct


# --- what the pool promises ---------------------------------------------------------------------


def test_inputs_run_apart_and_in_order(sandbox):
    code = "try:\n    seen\nexcept NameError:\n    seen = input()\nprint(seen)"
    ran = runs(sandbox, code, [f"{i}\n" for i in range(5)], 1.0)
    assert [one.output for one in ran] == [f"{i}\n" for i in range(5)]


def test_nothing_runs_after_the_first_that_takes_too_long(sandbox):
    ran = runs(sandbox, "if input() == '1':\n    while True: pass", ["0", "1", "0"], 0.3)
    assert [one.end for one in ran] == ["done", "time"]


def test_the_same_program_gives_the_same_output_twice(sandbox):
    code = "import random\nprint(hash('a'), random.random(), {'b', 'a', 'c'})"
    first, second = (runs(sandbox, code, [""], 1.0)[0].output for _ in range(2))
    assert first == second


def test_cpu_time_is_that_of_the_program(sandbox):
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    [ran] = runs(sandbox, code, [""], 2.0)
    assert 0.3 <= ran.cpu_seconds < 0.6


def test_nothing_runs_after_the_first_that_prints_too_much(sandbox):
    ran = runs(sandbox, "while True:\n    print('x' * 9999)", ["", ""], 2.0)
    assert [one.end for one in ran] == ["output"]


THIEF = """
import ctypes, os, re
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
pattern = re.compile(b"honest[_]solution[_]of[_][0-9]")  # which does not match itself
read_end, write_end = os.pipe()
os.set_blocking(read_end, False)
top, found = libc.sbrk(0), 0
places = [(top - (32 << 20), top)] + [(id(x) & ~0xFFFFF, (id(x) | 0xFFFFF) + 1) for x in
          (object(), [], {}, "", b"x" * 600, os, re)]
for start, end in places:
    for address in range(start & ~4095, end, 4096):
        if libc.write(write_end, address, 4096) == 4096:
            found += len(pattern.findall(os.read(read_end, 4096)))
print(found)
"""


def test_a_program_finds_nothing_of_an_earlier_job_in_its_memory(judge):
    """A scan of its own heap, which it was forked with, for another program's text."""
    sandbox = judge.sandbox
    code = "\n".join(f"def honest_solution_of_{i}(): return {i}" for i in range(400))
    assert runs(sandbox, code + "\nprint(6)", ["a"] * 3, 2.0)[0].output == "6\n"
    [own] = runs(sandbox, THIEF + code, [""], 5.0)
    assert own.end == "done" and int(own.output) > 0, "the scan finds what is there"
    [ran] = runs(sandbox, THIEF, [""], 5.0)
    assert (ran.end, ran.output) == ("done", "0\n")


@pytest.mark.parametrize(
    "leave",
    [
        "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')",
        "import os\nos.mkdir('d', 0o300)\nopen('d/x', 'w').write('x')",
        "import os\nos.mkdir('n', 0)",
        "import os\np = os.getppid()\nfor i in range(40): open(f'.{p}.{i}', 'w').close()\n"
        "for i in range(4): os.makedirs(f'd{i}/x')",
        "import os\nos.makedirs('a/b/c')\nopen('a/b/c/x', 'w')\nos.symlink('/', 'a/l')\n"
        "os.chmod('a', 0) if hasattr(os, 'chmod') else None",
    ],
)
def test_what_a_program_leaves_is_gone_before_the_next(judge, leave):
    left, *rest = runs(judge.sandbox, leave, [""], 2.0)
    assert not rest and left.end in ("done", "error")
    [ran] = runs(judge.sandbox, "import os\nprint(os.listdir('.'))", [""], 2.0)
    assert ran.output == "[]\n"


def test_it_runs_where_the_host_ignores_its_children_and_has_few_descriptors():
    script = textwrap.dedent("""
        import resource, signal
        from pmd_jax.tasks.sandbox import Program, Sandbox, SandboxConfig
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        for wall in ("auto", "none"):
            with Sandbox(SandboxConfig(workers=1, wall=wall)) as sandbox:
                for _ in range(3):
                    print(*sandbox.run(Program("print(6)"), [""], 2.0, lambda _, ran: ran.output))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert (done.stdout.split(), done.stderr) == (["6"] * 6, "")


def test_close_ends_what_runs_and_its_runner_is_told():
    with Sandbox(settings()) as other:
        told = []

        def work() -> None:
            try:
                runs(other, "import time\ntime.sleep(600)", [""], 600.0)
            except SandboxError as error:
                told.append(str(error))

        before = servers()
        thread = threading.Thread(target=work)
        thread.start()
        while servers() <= before:
            time.sleep(0.01)
        other.close()
        thread.join(10)
    assert told and not thread.is_alive()


def test_threads_share_a_pool(sandbox):
    outputs = {}

    def work(number: int) -> None:
        [ran] = runs(sandbox, "print(int(input()) ** 2)", [str(number)], 2.0)
        outputs[number] = ran.output

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: f"{i * i}\n" for i in range(8)}


def test_a_server_that_is_killed_is_replaced_and_the_program_runs_again():
    with Sandbox(settings()) as sandbox:
        before = servers()
        for pid in sandbox._workers[0]._process.pid, *before:
            os.kill(pid, 9)
        [ran] = runs(sandbox, "print(6)", [""], 2.0)
        assert ran.output == "6\n"


def test_a_sandbox_that_cannot_run_is_an_error_and_never_a_verdict(monkeypatch):
    judge = Judge(JudgeConfig(sandbox=settings()))
    judge.close()
    with pytest.raises(SandboxError, match="closed"):
        judge.verify(UnitTests(("",), ("6",)), fenced("print(6)"), feedback=False)


def test_a_sandbox_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(worker_module, "_command", lambda *_: ["/nowhere/python"])
    with pytest.raises(SandboxError, match="cannot start; namespaces: could not start /nowhere"):
        Sandbox(settings())
    monkeypatch.setattr(
        worker_module, "_command", lambda *_: [sys.executable, "-c", "raise ValueError('broken')"]
    )
    with pytest.raises(SandboxError, match="status 1: ValueError: broken"):
        Sandbox(settings())


def test_isolation_that_is_required_and_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(Protections, "isolated", False)
    with pytest.raises(SandboxError, match=r"require: must be 'none' on this machine"):
        Sandbox(settings(require="isolated"))
    assert runs(Sandbox(settings()), "print(6)", [""], 2.0)[0].output == "6\n"


def test_isolated_means_files_network_and_processes():
    assert Protections("landlock", "seccomp", "seccomp").isolated
    for missing in ("files", "network", "processes"):
        known = {"files": "a", "network": "b", "processes": "c", missing: ""}
        assert not Protections(**known).isolated
        assert f"{missing} NOT PROTECTED" in str(Protections(**known))


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="memory_mib: must be at least 1; got 0"):
        SandboxConfig(memory_mib=0)
    with pytest.raises(ValueError, match=r"wall_factor: must be at least 1; got 0\.5"):
        SandboxConfig(wall_factor=0.5)


def test_servers_end_with_the_process_that_made_them_however_it_ends(tmp_path):
    script = textwrap.dedent("""
        import sys, threading
        from pmd_jax.tasks.sandbox import Execution, Program, Sandbox, SandboxConfig
        sandbox = Sandbox(SandboxConfig(workers=1))
        program = Program("import time\\nwhile True: time.sleep(1)")
        threading.Thread(target=sandbox.run, args=(program, [""], 600.0, print)).start()
        print("up", flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdout and process.stdout.readline() == b"up\n"
    time.sleep(0.5)
    running = servers() - {process.pid}
    assert running
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in running if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return "server.py" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
