"""Policy and bank are saved as one: all of it comes back, or the reason why not."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from toys import CONFIG, eight_devices, params_on

from pmd_jax import checkpoint
from pmd_jax.checkpoint import Checkpoint, CheckpointConfig, Checkpointer, SaveFailed
from pmd_jax.distill.update import OptimizerConfig, abstract_state, init_state, make_optimizer
from pmd_jax.memory.bank import Bank, MemoryConfig
from pmd_jax.ordering import problem_order
from pmd_jax.policy.sharding import single_device_mesh
from pmd_jax.records import Experience, Verdict

MEMORY = MemoryConfig()


def order():
    return problem_order(10, 3, seed=4)


def a_checkpoint(mesh, step=2):
    optimizer = make_optimizer(OptimizerConfig(), CONFIG)
    state = init_state(params_on(mesh), CONFIG, optimizer, mesh, ema=True)
    state = state._replace(step=jnp.int32(step))
    bank = Bank(MEMORY)
    bank.remember(0, [Experience("a@0.0", "a", 0, "text", Verdict(True, 1.0, "", True))])
    position = order()
    for _ in range(step):
        next(position)
    return Checkpoint(state, bank, position, {"step": step, "totals": {"rollouts": 7}})


def abstract(mesh):
    return abstract_state(CONFIG, make_optimizer(OptimizerConfig(), CONFIG), mesh, ema=True)


def test_everything_comes_back_also_on_another_mesh(tmp_path):
    saved = a_checkpoint(eight_devices())
    store = Checkpointer(tmp_path, CheckpointConfig())
    store.save(2, saved)
    position = order()
    restored = store.restore(abstract(single_device_mesh()), position, MEMORY)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (restored.state, saved.state)))
    assert restored.bank == saved.bank and restored.run == saved.run
    assert next(position).tolist() == next(saved.order).tolist()
    assert restored.state.params["embed"].sharding.mesh.size == 1
    store.close()


def test_the_newest_stay_and_every_mth(tmp_path):
    store = Checkpointer(tmp_path, CheckpointConfig(keep=2, keep_every=3))
    for step in range(1, 6):
        store.save(step, a_checkpoint(single_device_mesh(), step))
    store.wait()
    assert store.latest == 5
    assert sorted(f.name for f in tmp_path.iterdir()) == ["3", "4", "5"]
    store.close()


def test_training_goes_on_while_files_are_written(tmp_path, monkeypatch):
    """The state is donated to updates meanwhile; what is saved is the state as it was."""
    written, real = threading.Event(), checkpoint.write_digests

    def waits(folder):
        assert written.wait(60)
        real(folder)

    monkeypatch.setattr(checkpoint, "write_digests", waits)
    saved = a_checkpoint(eight_devices())
    expected = jax.tree.map(np.array, saved.state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    store = Checkpointer(tmp_path, CheckpointConfig())
    store.save(2, saved)
    state = update(update(saved.state))
    assert not (tmp_path / "2").exists()
    written.set()
    store.wait()
    restored = store.restore(abstract(eight_devices()), order(), MEMORY).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), expected)
    assert int(state.step) == int(expected.step) + 2
    store.close()


def test_a_save_that_fails_midway_does_not_count(tmp_path, monkeypatch):
    store = Checkpointer(tmp_path, CheckpointConfig())
    store.save(1, a_checkpoint(single_device_mesh(), 1))
    store.wait()

    def full_disk(self, folder):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Bank, "save", full_disk)
        with pytest.raises(SaveFailed, match=r"2: could not be .*no space left.* 1 there are unt"):
            store.save(2, a_checkpoint(single_device_mesh(), 2))
    store.close()
    again = Checkpointer(tmp_path, CheckpointConfig())
    assert again.latest == 1
    assert again.restore(abstract(single_device_mesh()), order(), MEMORY).run["step"] == 1
    again.close()


class WrittenInTwentySeconds:
    """What Orbax waits for, of files on a file system so slow."""

    def result(self, timeout=None):
        if timeout is not None and timeout < 20:
            raise TimeoutError("the files are not written in time")


def test_a_file_system_that_is_too_slow_is_a_save_that_failed(tmp_path, monkeypatch):
    real = ocp.StandardCheckpointHandler.async_save

    async def slow(self, *given, **named):
        return [*(await real(self, *given, **named) or ()), WrittenInTwentySeconds()]

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", slow)
    for step, seconds in enumerate((60, 10), start=1):
        config = CheckpointConfig(asynchronous=False, timeout_seconds=seconds)
        store = Checkpointer(tmp_path, config)
        if seconds > 20:
            store.save(step, a_checkpoint(single_device_mesh(), step))
            store.close()
            continue
        with pytest.raises(SaveFailed, match=r"2: could not be .*timed out.* 1 there"):
            store.save(step, a_checkpoint(single_device_mesh(), step))


def flip_a_byte(folder):
    [*_, largest] = sorted((f for f in folder.rglob("*") if f.is_file()), key=size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def size(file):
    return file.stat().st_size


def cut_the_end(folder):
    [*_, largest] = sorted((f for f in folder.rglob("*") if f.is_file()), key=size)
    os.truncate(largest, size(largest) - 1)


DAMAGE = {
    "a bit": (flip_a_byte, "does not have the bytes that were written"),
    "an end": (cut_the_end, r"has \d+ bytes of \d+"),
    "the state": (lambda folder: shutil.rmtree(folder / "state"), "state/.* is missing"),
    "the bank": (lambda folder: shutil.rmtree(folder / "bank"), "it lacks its memory bank"),
    "the digests": (lambda folder: (folder / "digests.json").unlink(), "digests.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_set_aside_by_name_and_the_one_before_is_taken(tmp_path, damage):
    harm, said = DAMAGE[damage]
    store = Checkpointer(tmp_path, CheckpointConfig())
    for step in (1, 2):
        store.save(step, a_checkpoint(single_device_mesh(), step))
    store.close()
    harm(tmp_path / "2")
    store = Checkpointer(tmp_path, CheckpointConfig())
    position = order()
    restored = store.restore(abstract(single_device_mesh()), position, MEMORY)
    assert restored.run["step"] == 1 and position.get_state() == {"next_index": 1}
    assert re.search(rf"checkpoint 2 is damaged \(.*{said}.*\); set aside as", store.notes[0])
    assert (tmp_path / "2.damaged").is_dir() and store.latest == 1
    store.save(2, a_checkpoint(single_device_mesh(), 2))  # the name is free again
    store.wait()
    assert store.latest == 2
    store.close()


def test_what_is_no_damage_sets_nothing_aside(tmp_path, monkeypatch):
    store = Checkpointer(tmp_path, CheckpointConfig())
    store.save(1, a_checkpoint(single_device_mesh(), 1))
    store.wait()

    def out_of_memory(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(store._manager, "restore", out_of_memory)
    with pytest.raises(ValueError, match="Out of memory"):
        store.restore(abstract(single_device_mesh()), order(), MEMORY)
    assert store.steps == [1] and store.set_aside == []
    store.close()


IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=$1 none "$2"
shift 2
exec "$@"
"""


def on_a_disk(folder, megabytes, program):
    """Runs Python in a mount namespace of its own, where `folder` is a disk of that size."""
    folder.mkdir()
    shell = ["sh", "-c", IN_A_SMALL_DISK, "sh", f"{megabytes}m", str(folder)]
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False).returncode
    ):
        pytest.skip("needs mount namespaces")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return subprocess.run(
        [*unshare, *shell, sys.executable, "-c", program, str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_old_steps_stay_whole(tmp_path):
    program = """
import sys
from pathlib import Path
from test_checkpoint import *
folder = Path(sys.argv[1])
store = Checkpointer(folder / "checkpoints", CheckpointConfig(keep=9))
for step in range(1, 99):
    try:
        store.save(step, a_checkpoint(single_device_mesh(), step))
        store.wait()
    except SaveFailed as error:
        print(error)
        break
again = Checkpointer(folder / "checkpoints", CheckpointConfig(keep=9))
print(step, again.restore(abstract(single_device_mesh()), order(), MEMORY).run["step"], again.notes)
"""
    done = on_a_disk(tmp_path / "disk", 2, program)
    said, after = done.stdout.strip().splitlines()[-2:]
    step = int(after.split()[0])
    assert step > 1 and after == f"{step} {step - 1} []"
    assert f"{step}: could not be written (" in said and "No space left on device" in said
    assert "there are untouched; see to the space" in said


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    program = """
import subprocess, sys
from pathlib import Path
from test_checkpoint import *
folder = Path(sys.argv[1])
store = Checkpointer(folder / "checkpoints", CheckpointConfig())
store.save(1, a_checkpoint(single_device_mesh(), 1))
store.wait()
subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
try:
    store.save(2, a_checkpoint(single_device_mesh(), 2))
    store.wait()
except SaveFailed as error:
    print(error)
print(store.restore(abstract(single_device_mesh()), order(), MEMORY).run["step"])
"""
    done = on_a_disk(tmp_path / "disk", 8, program)
    said, after = done.stdout.strip().splitlines()[-2:]
    assert after == "1"
    assert "2: could not be written (" in said and "Read-only file system" in said


def test_nothing_to_restore_is_said(tmp_path):
    store = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(ValueError, match="holds no complete step"):
        store.restore(abstract(single_device_mesh()), order(), MEMORY)
    store.close()


def test_each_epoch_is_a_new_permutation_and_no_step_repeats_a_problem():
    steps = [next(it).tolist() for it in [order()] for _ in range(9)]
    assert all(len(set(step)) == 3 for step in steps)
    epochs = [[p for step in steps[i : i + 3] for p in step] for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)  # the tenth is left over
    assert steps[:3] != steps[3:6] != steps[6:9]
    position = order()
    with pytest.raises(ValueError, match="at most the 10 training problems; got 11"):
        problem_order(10, 11, seed=0)
    assert next(position).tolist() == steps[0]
