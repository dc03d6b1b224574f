"""The launchers, with stand-ins for what they start: gcloud, xpk, Slurm, and the run itself."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pmd_jax import settings

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "tools" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PARAMETER = re.compile(r'^: "\$\{(\w+):[=?]', re.MULTILINE)
PATIENCE = 60  # seconds until a test that hangs fails

STAND_IN = f"""#!{sys.executable} -SE
import json, os, signal, sys, time

def note(what, **more):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps({{"what": what, **more}}) + "\\n")

def told(*_):
    note("told", id=ID)
    if not os.environ.get("DEAF"):
        sys.exit(0)

arguments = sys.argv[1:]
ID = int(arguments[arguments.index("--process-id") + 1]) if "--process-id" in arguments else 0
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
names = [n for n in os.environ if n.startswith(("CUDA_", "JAX_LOCAL", "JAX_PLATFORMS", "JAX_NUM"))]
note("began", name=os.path.basename(sys.argv[0]), arguments=arguments, pid=os.getpid(),
     environment={{name: os.environ[name] for name in names}})
exec(os.environ.get("PLAN_" + os.path.basename(sys.argv[0]).upper(), ""))
"""
"""Notes its arguments in the file RECORD, then does what PLAN_<its name> says, in Python."""


class Stage:
    """Runs scripts among stand-ins, and reads what these noted."""

    def __init__(self, folder: Path):
        self.folder, self.record = folder, folder / "record"
        self.started: list[int] = []
        (folder / "bin").mkdir()
        for name in ("gcloud", "xpk", "srun", "squeue", "scontrol", "nvidia-smi", "stub"):
            file = folder / "bin" / name
            file.write_text(STAND_IN)
            file.chmod(0o755)

    def environment(self, **given: object) -> dict[str, str]:
        plain = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        given = {"RECORD": self.record, "PYTHON": "stub", "RESTART_WAIT": 0, **given}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**plain, "PATH": path, **{name: str(value) for name, value in given.items()}}

    def start(self, script: str, *arguments: str, **given: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            env=self.environment(**given),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process.pid)
        return process

    def end(self) -> None:
        """What a failed test left behind."""
        for pid in (*self.started, *(note["pid"] for note in self.notes())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, script: str, *arguments: str, **given: object) -> tuple[int, str]:
        process = self.start(script, *arguments, **given)
        output = process.communicate(timeout=PATIENCE)[0]
        return process.returncode, output

    def notes(self, what: str = "began", name: str = "") -> list[dict]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        notes = [json.loads(line) for line in lines]
        return [n for n in notes if n["what"] == what and name in n.get("name", "")]

    def wait_for(self, count: int, what: str = "began") -> list[dict]:
        until = time.monotonic() + PATIENCE
        while len(self.notes(what)) < count:
            assert time.monotonic() < until, f"only {self.notes(what)}"
            time.sleep(0.02)
        return self.notes(what)


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.end()


def flags(arguments, *names):
    """The values behind some flags, written as "--flag value" or "--flag=value"."""
    joined = {a.partition("=")[0]: a.partition("=")[2] for a in arguments if "=" in a}
    return [joined[n] if n in joined else arguments[arguments.index(n) + 1] for n in names]


def check_run(arguments, name, output):
    """[-u -m MODULE ARGUMENTS] must be a command line that the run understands."""
    assert (
        arguments[:2] == ["-u", "-m"] and (ROOT / f"{arguments[2].replace('.', '/')}.py").exists()
    )
    spec, overrides, parsed = settings.parse_arguments(arguments[3:], "")
    assert (ROOT / spec.partition(":")[0]).exists()
    assert parsed.name == name and f"--config.output={output}" in overrides
    assert parsed.resume_if_saved
    return parsed


# --- every script -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_read_by_bash_and_stops_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "pip install -r requirements-dev.txt"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_parameter_is_used(script):
    code = re.sub(r"(^|\s)#.*", "", script.read_text())
    parameters = PARAMETER.findall(code)
    assert parameters
    assert [n for n in parameters if len(re.findall(rf"\b{n}\b", code)) < 2] == []


def test_the_readme_names_every_file_and_no_other():
    named = set(re.findall(r"`([\w-]+\.(?:sh|sbatch|yaml)|Dockerfile)`", read("README.md")))
    assert named == {file.name for file in LAUNCH.iterdir()} - {"README.md"}


def read(name):
    return (LAUNCH / name).read_text()


# --- one command, kept going ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "restarts", "runs", "code"),
    [
        ([0], 3, 1, 0),
        ([1, 137, 0], 3, 3, 0),
        ([1, 1, 1], 2, 3, 1),
        ([1, 2], 3, 2, 2),  # bad input does not mend itself
        ([1], 0, 1, 1),
    ],
)
def test_a_failed_command_is_started_again(stage, codes, restarts, runs, code):
    plan = f"sys.exit({codes}[sum(1 for _ in open(os.environ['RECORD'])) - 1])"
    found, _ = stage.run("supervise.sh", "stub", "a b", MAX_RESTARTS=restarts, PLAN_STUB=plan)
    assert found == code
    assert [note["arguments"] for note in stage.notes()] == [["a b"]] * runs


@pytest.mark.parametrize(("stopped_code", "code"), [("", 0), ("143", 143)])
@pytest.mark.parametrize("stopping", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_stop_is_told_once_and_not_started_again(
    stage, stopping, stopped_code, code
):
    """In Kubernetes a pod that saved and left with 0 would count as done, so it leaves with 143.

    Ctrl-C goes to the terminal's whole process group: it must not reach the command twice.
    """
    plan = "while not os.path.exists('told'): time.sleep(0.02)"
    given = {"MAX_RESTARTS": 3, "DEAF": 1, "PLAN_STUB": plan}
    process = stage.start("supervise.sh", "stub", STOPPED_CODE=stopped_code, **given)
    stage.wait_for(1)
    send(process, stopping)
    stage.wait_for(1, "told")
    (stage.folder / "told").touch()
    assert process.wait(PATIENCE) == code
    assert len(stage.notes("told")) == len(stage.notes()) == 1


def send(process, number):
    """As a terminal does, or a machine that is taken back."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def test_a_restart_that_is_waited_for_is_given_up_when_told_to_stop(stage):
    given = {"MAX_RESTARTS": 3, "RESTART_WAIT": 600, "PLAN_STUB": "sys.exit(1)"}
    process = stage.start("supervise.sh", "stub", **given)
    assert "restart 1 of 3" in process.stdout.readline()
    process.terminate()
    assert process.wait(PATIENCE) == 1
    assert len(stage.notes()) == 1


# --- several GPUs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "visible"),
    [
        ({}, [None]),
        ({"DEVICES": "2,5"}, ["2,5"]),
        ({"PER_PROCESS": 1}, ["0", "1", "2", "3"]),
        ({"PER_PROCESS": 2}, ["0,1", "2,3"]),
        ({"DEVICES": "4,5,6,7", "PER_PROCESS": 2}, ["4,5", "6,7"]),
        ({"DEVICES": "cpu", "PROCESSES": 3, "PER_PROCESS": 2}, [None, None, None]),
    ],
)
def test_processes_share_the_gpus_and_know_their_numbers(stage, given, visible):
    given = {"NAME": "pmd", "OUTPUT": "out", "PORT": 1234, "MAX_RESTARTS": 0, **given}
    given["PLAN_NVIDIA-SMI"] = r"print('0\n1\n2\n3')"
    code, output = stage.run("multi-gpu.sh", "--config.steps=3", **given)
    assert code == 0, output
    notes = sorted(stage.notes(name="stub"), key=lambda n: n["arguments"])
    count = len(visible)
    for number, note in enumerate(notes):
        parsed = check_run(note["arguments"], "pmd", "out")
        assert note["arguments"][-1] == "--config.steps=3"
        if count > 1:
            assert (parsed.num_processes, parsed.process_id) == (count, number)
            assert parsed.coordinator == "127.0.0.1:1234"
        else:
            assert not parsed.coordinator
    assert [n["environment"].get("CUDA_VISIBLE_DEVICES") for n in notes] == visible
    if given.get("DEVICES") == "cpu":
        assert {n["environment"]["JAX_PLATFORMS"] for n in notes} == {"cpu"}
        assert {n["environment"]["JAX_NUM_CPU_DEVICES"] for n in notes} == {"2"}


def test_devices_that_cannot_be_shared_evenly_are_named(stage):
    code, output = stage.run("multi-gpu.sh", DEVICES="0,1,2", PER_PROCESS=2)
    assert code == 2 and "must divide the 3 GPUs" in output and not stage.notes()


CPU = {"DEVICES": "cpu", "PROCESSES": 3}


@pytest.mark.parametrize("deaf", ["", "1"])
def test_one_failed_process_ends_all(stage, deaf):
    """Those that do not listen are killed."""
    plan = "while len(open(os.environ['RECORD']).readlines()) < 3: time.sleep(0.02)\n"
    plan += "time.sleep(600) if ID != 1 else sys.exit(7)"
    given = {"MAX_RESTARTS": 0, "FAILURE_GRACE": 1, "DEAF": deaf, "PLAN_STUB": plan}
    code, output = stage.run("multi-gpu.sh", **CPU, **given)
    assert code == 7 and "process 1 of 3 ended with exit code 7" in output
    assert sorted(note["id"] for note in stage.notes("told")) == [0, 2]


def test_after_a_failure_all_start_again(stage):
    plan = "while len(open(os.environ['RECORD']).readlines()) < 3: time.sleep(0.02)\n"
    plan += "earlier = open(os.environ['RECORD']).read().count('\"--process-id\", \"1\"') - 1\n"
    plan += "sys.exit(ID == 1 and not earlier)"
    code, output = stage.run("multi-gpu.sh", MAX_RESTARTS=1, PLAN_STUB=plan, **CPU)
    assert code == 0, output
    ids = [flags(n["arguments"], "--process-id")[0] for n in stage.notes()]
    assert sorted(ids) == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("stopping", [signal.SIGTERM, signal.SIGINT])
def test_every_process_is_told_to_stop_once(stage, stopping, restarts):
    given = {"MAX_RESTARTS": restarts, "PLAN_STUB": "time.sleep(600)"}
    process = stage.start("multi-gpu.sh", **CPU, **given)
    stage.wait_for(3)
    send(process, stopping)
    assert process.wait(PATIENCE) == 0
    assert sorted(note["id"] for note in stage.notes("told")) == [0, 1, 2]
    assert len(stage.notes()) == 3


# --- Slurm ------------------------------------------------------------------------------------


def batch(stage, code, finished, state="RUNNING", restarts=0, **given):
    given = {
        "NAME": "pmd",
        "OUTPUT": stage.folder,
        "SLURM_JOB_ID": 7,
        "SLURM_GPUS_ON_NODE": 4,
        "SLURM_CPUS_ON_NODE": 96,
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_RESTART_COUNT": restarts,
        "PLAN_SRUN": f"sys.exit({code})",
        "PLAN_SQUEUE": f"print({state!r})",
        **given,
    }
    (stage.folder / "pmd").mkdir()
    if finished:
        (stage.folder / "pmd" / "totals.json").write_text("{}")
    return stage.run("slurm.sbatch", "--config.steps=3", **given)[0]


def test_slurm_starts_a_process_per_node_with_all_of_its_gpus(stage):
    assert batch(stage, 0, finished=True) == 0
    [step] = stage.notes(name="srun")
    arguments = step["arguments"]
    assert "--kill-on-bad-exit=1" in arguments and "--cpus-per-task=96" in arguments
    check_run(arguments[arguments.index("stub") + 1 :], "pmd", stage.folder)
    assert step["environment"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"
    directives = re.findall(r"^#SBATCH (.*)$", read("slurm.sbatch"), re.MULTILINE)
    assert {"--ntasks-per-node=1", "--requeue", "--signal=TERM@120"} <= set(directives)


@pytest.mark.parametrize(
    ("code", "finished", "state", "restarts", "requeued", "left"),
    [
        (0, True, "RUNNING", 0, False, 0),
        (0, False, "RUNNING", 0, True, 0),  # the time limit: told to stop, and saved
        (1, False, "RUNNING", 3, True, 0),
        (137, True, "RUNNING", 0, True, 0),  # killed, with the totals of an earlier end
        (2, False, "RUNNING", 0, False, 2),
        (0, False, "COMPLETING", 0, False, 0),  # scancel
        (1, False, "RUNNING", 20, False, 1),
        (0, False, "RUNNING", 20, False, 1),
    ],
)
def test_slurm_requeues_what_is_not_finished(
    stage, code, finished, state, restarts, requeued, left
):
    assert batch(stage, code, finished, state, restarts) == left
    asked = [note["arguments"] for note in stage.notes(name="scontrol")]
    assert asked == ([["requeue", "7"]] if requeued else [])


# --- Cloud TPU VMs ----------------------------------------------------------------------------


def test_tpu_vm_passes_its_parameters_on(stage):
    given = {
        "TPU": "t",
        "ZONE": "z",
        "PROJECT": "p",
        "TYPE": "v5p-32",
        "VERSION": "v",
        "NFS": "h:/s",
    }
    for command in ("create", "setup", "stop", "status", "logs", "delete"):
        assert stage.run("tpu-vm.sh", command, **given, SPOT="yes", OUTPUT="/m")[0] == 0
    calls = [note["arguments"] for note in stage.notes(name="gcloud")]
    assert all(call[:3] == ["compute", "tpus", "tpu-vm"] for call in calls)
    assert all({"--zone=z", "--project=p"} <= set(call) for call in calls)
    verbs = ["create", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "delete"]
    assert [call[3] for call in calls] == verbs
    assert {"t", "--accelerator-type=v5p-32", "--version=v", "--spot"} <= set(calls[0])
    workers = ["all", "all", "all", "all", "all", "0"]
    assert [flags(call, "--worker")[0] for call in calls[1:-1]] == workers
    assert "mount -t nfs h:/s /m" in flags(calls[3], "--command")[0]
    assert stage.run("tpu-vm.sh", "begin")[0] == 2


def test_tpu_vm_copies_what_git_tracks(stage):
    keep = f"import shutil; 'scp' in sys.argv and shutil.copy(sys.argv[5], {str(stage.folder)!r})"
    assert stage.run("tpu-vm.sh", "setup", PLAN_GCLOUD=keep)[0] == 0
    [archive] = stage.folder.glob("*.tgz")
    listed = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True).stdout.split()
    assert {"configs/quickstart.py", "requirements.txt"} <= set(listed)
    assert not [name for name in listed if name.startswith((".git/", "runs/"))]


def test_what_tpu_vm_runs_on_a_vm_runs_restarts_and_stops(stage):
    """The commands that gcloud would carry there, in a home of a VM made here."""
    home, record = stage.folder / "home", stage.record
    (home / "code" / "tools").mkdir(parents=True)
    (home / "code" / "tools" / "launch").symlink_to(LAUNCH)
    (home / "code" / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(stage.folder / "bin" / "stub", home / "code" / ".venv" / "bin" / "python")
    given = {"NAME": "a name", "OUTPUT": "/m", "REMOTE": "code", "MAX_RESTARTS": 1, "GRACE": 50}

    def there(command, *arguments, **more):
        record.unlink(missing_ok=True)
        assert stage.run("tpu-vm.sh", command, *arguments, **given)[0] == 0
        [text] = flags(stage.notes(name="gcloud")[-1]["arguments"], "--command")
        record.unlink()
        environment = stage.environment(HOME=home, **more)
        return subprocess.run(["bash", "-c", text], env=environment, cwd=home, timeout=PATIENCE)

    plan = "time.sleep(600) if len(open(os.environ['RECORD']).readlines()) > 1 else sys.exit(1)"
    assert there("run", "--config.x='1 2'", PLAN_PYTHON=plan).returncode == 0
    notes = stage.wait_for(2)
    for note in notes:
        parsed = check_run(note["arguments"], "a name", "/m")
        assert parsed.multihost and note["arguments"][-1] == "--config.x='1 2'"
    assert there("run").returncode == 1  # one is going on here
    assert there("stop").returncode == 0
    assert [note["id"] for note in stage.notes("told")] == [0]
    assert there("stop").returncode == 0  # nothing to stop


# --- GKE --------------------------------------------------------------------------------------


def test_xpk_passes_its_parameters_on(stage):
    given = {"CLUSTER": "c", "IMAGE": "i", "TPU_TYPE": "v5p-32", "NUM_SLICES": 2, "MAX_RESTARTS": 5}
    given |= {
        "PROJECT": "p",
        "ZONE": "z",
        "NAME": "pmd",
        "WORKLOAD": "w",
        "OUTPUT": "/m",
        "GRACE": 9,
    }
    assert stage.run("gke-xpk.sh", "--config.x=1 2", **given)[0] == 0
    [note] = stage.notes(name="xpk")
    arguments = note["arguments"]
    assert arguments[:2] == ["workload", "create"]
    assert {
        *("--cluster=c", "--docker-image=i", "--tpu-type=v5p-32", "--num-slices=2"),
        *("--project=p", "--zone=z", "--workload=w", "--max-restarts=5"),
        *("--termination-grace-period-seconds=9", "--restart-on-exit-codes=1"),
    } <= set(arguments)
    [command] = flags(arguments, "--command")
    assert "exec env STOPPED_CODE=143 bash tools/launch/supervise.sh python " in command
    stage.record.unlink()
    words = command.partition("supervise.sh python ")[2]
    subprocess.run(["bash", "-c", f"stub {words}"], env=stage.environment(), check=True)
    [note] = stage.notes()
    assert check_run(note["arguments"], "pmd", "/m").multihost
    assert note["arguments"][-1] == "--config.x=1 2"


@pytest.mark.parametrize("missing", ["CLUSTER", "IMAGE"])
def test_xpk_asks_for_what_has_no_default(stage, missing):
    given = {name: "x" for name in ("CLUSTER", "IMAGE") if name != missing}
    code, output = stage.run("gke-xpk.sh", **given)
    assert code != 0 and f"{missing}: must name" in output and not stage.notes()


def test_the_jobset_starts_one_process_on_every_host_and_restarts_all_or_none():
    jobset = yaml.safe_load(read("gke-jobset.yaml"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [slices] = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    chips = math.prod(
        int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    )
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts > 1
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert pod["terminationGracePeriodSeconds"] == 120
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    # A pod that was told to stop and saved does not count as done, and bad input is final.
    assert {"name": "STOPPED_CODE", "value": "143"} in container["env"]
    [final] = job["podFailurePolicy"]["rules"]
    assert final["onExitCodes"] == {"containerName": "run", "operator": "In", "values": [2]}
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_jobset_s_command_is_one_that_the_run_understands():
    jobset = yaml.safe_load(read("gke-jobset.yaml"))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == ["bash", "tools/launch/supervise.sh"]
    assert container["args"][0] == "python"
    assert check_run(container["args"][1:], jobset["metadata"]["name"], "/runs").multihost


def test_the_run_folder_is_on_a_volume_that_all_pods_write():
    jobset, claim = (yaml.safe_load(read(f"gke-{name}.yaml")) for name in ("jobset", "storage"))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    [mount], [volume] = pod["containers"][0]["volumeMounts"], pod["volumes"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], "/runs")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert (claim["kind"], claim["spec"]["accessModes"]) == (
        "PersistentVolumeClaim",
        ["ReadWriteMany"],
    )
