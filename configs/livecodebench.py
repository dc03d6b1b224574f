"""LiveCodeBench v6 as in the paper: Qwen3-8B, 131 problems, 32 x 8 rollouts, 20 epochs.

    configs/livecodebench.py          the paper's settings; task.path names the release's files
    configs/livecodebench.py:small    the same problems within what a CPU and a 135M model can do

What is from the paper: group sizes, lengths, learning rate, alpha 1 (reverse KL), top-K 3, score@4,
which is avg@4 here. Inherited from SDPO: K = 20, EMA rate 0.01, no warm-up, weight decay, clipping,
sequence mean, feedback of the environment where there is no solution. Not inherited: SDPO makes an
update for each of a batch's 32 prompts; here a batch is one update. Chosen by us: capacities and
the slower clock, as in configs/sciknoweval.py.
"""

import dataclasses

from ml_collections import ConfigDict

from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.distill.divergence import DivergenceConfig
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

STEPS = 80
"""20 epochs of 131 problems, 32 a step, what is left of an epoch dropped."""


def paper() -> RunConfig:
    return RunConfig(
        name="livecodebench",
        steps=STEPS,
        model=ModelSection("Qwen/Qwen3-8B", dtype="bfloat16"),
        engine=EngineConfig(max_rows=256, chunk=64),
        task=TaskConfig("livecodebench", path="data/livecodebench", feedback=True),
        rollout=RolloutConfig(problems_per_step=32, rollouts_per_problem=8, max_new_tokens=8192),
        reflection=ReflectionConfig(behaviors_warmup=STEPS // 20),
        teacher=TeacherConfig(
            sources=("sibling", "feedback", "insights", "behaviors"),
            top_k=3,
            max_prompt_tokens=10240,
        ),
        distill=DistillConfig(
            divergence=DivergenceConfig("reverse_kl", top_k=20),
            teacher="ema",
            ema_rate=0.01,
            normalisation="sequence_mean",
            micro_batch=8,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=0),
        evaluation=EvaluationConfig(num_samples=4, every=5),
    )


def small(config: RunConfig) -> RunConfig:
    change = dataclasses.replace
    return change(
        config,
        name=config.name + "-small",
        steps=2,
        model=ModelSection("pypi:smollm2-135m-instruct", dtype="float32"),
        mesh=MeshConfig(data=-1, fsdp=1),
        engine=EngineConfig(max_rows=32, chunk=16),
        task=change(config.task, response_style="direct"),
        rollout=RolloutConfig(problems_per_step=2, rollouts_per_problem=4, max_new_tokens=192),
        reflection=ReflectionConfig(
            style="lines",
            max_new_tokens=48,
            behaviors_max_new_tokens=48,
            min_problems_per_cluster=1,
        ),
        teacher=change(
            config.teacher,
            layout="system",
            max_prompt_tokens=6144,
            insight_tokens=128,
            behavior_tokens=96,
            top_k=1,
        ),
        distill=change(config.distill, teacher="current", micro_batch=1, bucket_tokens=256),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=0),
        evaluation=EvaluationConfig(num_problems=8, num_samples=2),
    )


def get_config(argument: str = "") -> ConfigDict:
    if argument not in ("", "small"):
        raise ValueError(
            f"configs/livecodebench.py: the argument must be small or nothing; got {argument!r}"
        )
    return to_config_dict(small(paper()) if argument else paper())
