"""LiveCodeBench v6 as in the paper: Qwen3-8B, 131 problems, 32 x 8 rollouts, 20 epochs.

    configs/livecodebench.py          the paper's settings; task.path names the release's files
    configs/livecodebench.py:small    the same problems within what a CPU and a 135M model can do

What is from the paper: group sizes, lengths, learning rate, alpha 1 (reverse KL), top-K 3, score@4,
which is avg@4 here. Inherited from SDPO: K = 20, EMA rate 0.01, no warm-up, weight decay, clipping,
sequence mean, feedback of the environment where there is no solution. Not inherited: SDPO makes an
update for each of a batch's 32 prompts; here a batch is one update. Chosen by us: capacities and
the slower clock, as in configs/sciknoweval.py.
"""

from ml_collections import ConfigDict

from configs.sciknoweval import small
from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.distill.divergence import DivergenceConfig
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import OptimizerConfig
from pmd_jax.evaluate import EvaluationConfig
from pmd_jax.memory.reflection import ReflectionConfig
from pmd_jax.memory.teacher import TeacherConfig
from pmd_jax.policy.sampler import EngineConfig
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


def get_config(argument: str = "") -> ConfigDict:
    if argument not in ("", "small"):
        raise ValueError(
            f"configs/livecodebench.py: the argument must be small or nothing; got {argument!r}"
        )
    config = paper()
    return to_config_dict(small(config, 192, 6144) if argument else config)
