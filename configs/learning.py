"""Does the policy learn? SmolLM2-135M on scicalc with one worked example, a quarter of an hour.

With one example in its prompt the model knows the answer format two times out of three. Evaluation
samples at temperature 1, where that shows. Eight steps: the format is learned by then, and from
there on reverse KL narrows the policy to one letter. experiments/README.md has the results.
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


def config() -> RunConfig:
    change = dataclasses.replace
    base = quickstart()
    return change(
        base,
        name="learning",
        steps=8,
        task=change(base.task, format_shots=1, num_train=64, num_test=256),
        rollout=RolloutConfig(problems_per_step=4, rollouts_per_problem=8, max_new_tokens=16),
        reflection=change(base.reflection, clusters=8, behaviors_every=4),
        distill=DistillConfig(bucket_tokens=128),
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=5),
        evaluation=EvaluationConfig(num_samples=4, temperature=1.0, top_p=1.0),
        checkpoint=CheckpointConfig(every=4, keep=1),
    )


def get_config() -> ConfigDict:
    return to_config_dict(config())
