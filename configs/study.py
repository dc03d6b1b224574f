"""A small study of all rows on two CPU cores: SmolLM2-135M on scicalc, minutes a cell.

The run of configs/learning.py, cut to six steps: they end while the answer format is being learned,
where rows can differ. Run it with experiments.ablations; experiments/README.md has the results.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.learning import config as learning
from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.distill.update import OptimizerConfig
from pmd_jax.settings import to_config_dict


def get_config() -> ConfigDict:
    change = dataclasses.replace
    base = learning()
    config = change(
        base,
        name="study",
        steps=6,
        task=change(base.task, num_test=128),
        reflection=change(base.reflection, behaviors_every=2),
        teacher=change(base.teacher, probe_every=5),
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=2),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )
    return to_config_dict(config)
