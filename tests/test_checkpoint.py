"""Policy and bank are saved as one: all of it comes back, or the reason why not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import CONFIG, eight_devices, params_on

from pmd_jax.checkpoint import Checkpoint, CheckpointConfig, Checkpointer
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


def test_only_the_newest_stay(tmp_path):
    store = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    for step in (1, 2, 3):
        store.save(step, a_checkpoint(single_device_mesh(), step))
    assert store.latest == 3
    assert sorted(f.name for f in tmp_path.iterdir()) == ["2", "3"]
    store.close()


def test_a_save_that_fails_midway_does_not_count(tmp_path, monkeypatch):
    store = Checkpointer(tmp_path, CheckpointConfig())
    store.save(1, a_checkpoint(single_device_mesh(), 1))

    def full_disk(self, folder):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Bank, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            store.save(2, a_checkpoint(single_device_mesh(), 2))
    store.close()
    again = Checkpointer(tmp_path, CheckpointConfig())
    assert again.latest == 1
    assert again.restore(abstract(single_device_mesh()), order(), MEMORY).run["step"] == 1
    again.close()


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
