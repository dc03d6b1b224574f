"""The whole loop on programs, on two CPU cores in minutes: SmolLM2-135M and generated exercises.

The same seven steps as configs/quickstart.py, with code that is run in a sandbox, feedback of the
environment, and one worked example of a function and of a program. Evaluation samples at
temperature 1, as training does. experiments/README.md has what came of it.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.quickstart import config as quickstart
from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.config import RunConfig
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import OptimizerConfig
from pmd_jax.evaluate import EvaluationConfig
from pmd_jax.rollout import RolloutConfig
from pmd_jax.settings import to_config_dict
from pmd_jax.tasks.judge import JudgeConfig
from pmd_jax.tasks.task import TaskConfig


def config() -> RunConfig:
    change = dataclasses.replace
    base = quickstart()
    return change(
        base,
        name="minicode",
        steps=8,
        task=TaskConfig(
            "minicode",
            judge=JudgeConfig(time_limit_seconds=2.0),
            feedback=True,
            format_shots=2,
            response_style="direct",
            num_train=64,
            num_validation=32,
            num_test=64,
        ),
        rollout=RolloutConfig(problems_per_step=4, rollouts_per_problem=8, max_new_tokens=48),
        reflection=change(base.reflection, clusters=8, behaviors_every=4),
        teacher=change(base.teacher, sibling_tokens=128, feedback_tokens=192),
        distill=DistillConfig(bucket_tokens=128, chunk_tokens=128),
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=5),
        evaluation=EvaluationConfig(num_samples=4, temperature=1.0, top_p=1.0),
        checkpoint=CheckpointConfig(every=4, keep=1),
    )


def get_config() -> ConfigDict:
    return to_config_dict(config())
