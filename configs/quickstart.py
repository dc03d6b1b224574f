"""The whole loop on two CPU cores in under ten minutes, with a real model and generated questions.

SmolLM2-135M-Instruct comes from the package index. At this size the answers are near chance; what
the run shows is the loop: every one of the seven steps, memory at three levels, a teacher that
reads it, and a policy that is distilled. Two worked examples teach the model the answer format.
"""

from ml_collections import ConfigDict

from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import OptimizerConfig
from pmd_jax.evaluate import EvaluationConfig
from pmd_jax.memory.reflection import ReflectionConfig
from pmd_jax.memory.teacher import TeacherConfig
from pmd_jax.policy.sampler import EngineConfig
from pmd_jax.policy.sharding import MeshConfig
from pmd_jax.rollout import RolloutConfig
from pmd_jax.settings import to_config_dict
from pmd_jax.tasks.task import TaskConfig


def config() -> RunConfig:
    return RunConfig(
        name="quickstart",
        steps=6,
        model=ModelSection("pypi:smollm2-135m-instruct", dtype="float32"),
        mesh=MeshConfig(data=-1, fsdp=1),
        engine=EngineConfig(max_rows=32, chunk=16),
        task=TaskConfig(
            "scicalc",
            format_shots=2,
            response_style="direct",
            num_train=16,
            num_validation=16,
            num_test=32,
        ),
        rollout=RolloutConfig(problems_per_step=4, rollouts_per_problem=4, max_new_tokens=16),
        reflection=ReflectionConfig(
            style="lines",
            max_new_tokens=48,
            behaviors_max_new_tokens=48,
            clusters=4,
            min_problems_per_cluster=1,
        ),
        teacher=TeacherConfig(
            layout="system",
            top_k=1,
            max_prompt_tokens=1024,
            sibling_tokens=64,
            feedback_tokens=64,
            insight_tokens=128,
            behavior_tokens=96,
        ),
        distill=DistillConfig(bucket_tokens=128, chunk_tokens=128),  # logits in 0.1 GiB
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=2),
        evaluation=EvaluationConfig(num_problems=32, num_samples=4),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )


def get_config() -> ConfigDict:
    return to_config_dict(config())
