"""What is planned: the settings of a run, its model's numbers, a mesh without devices, lengths.

Of a run in several processes, `Work.local` is what one of them samples, on its own devices.

Axes as in model.py: N groups, S teacher prompts, P and Q prompt columns, G rollouts, U suffix
columns, T response tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
from huggingface_hub import errors
from jax.sharding import AbstractMesh, AxisType

from pmd_jax.config import RunConfig
from pmd_jax.distill.batch import DistillBatch, DistillGroup, build_batch
from pmd_jax.distill.objectives import check_micro_batch
from pmd_jax.policy.families import ModelConfig, read_config
from pmd_jax.policy.policy import find_model
from pmd_jax.policy.sampler import bucket
from pmd_jax.policy.sharding import MESH_AXES, MeshConfig, batch_shards, check_divides, mesh_sizes
from pmd_jax.records import Rollout

F32 = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Work:
    """The settings of a run, its model's numbers, a mesh without devices and assumed lengths.

    processes: to which the devices belong, each having as many. problems: sampled in a step, all of
    it if 0. held: dtype of the parameters that sampling finds.
    """

    config: RunConfig
    model: ModelConfig
    mesh: AbstractMesh
    prompt_tokens: int = 1024
    teacher_tokens: int = 0
    response_tokens: int = 0
    processes: int = 1
    problems: int = 0
    held: Any = F32

    def __post_init__(self) -> None:
        check_divides(self.model, self.mesh)
        check_processes(self.mesh, self.processes)
        all_problems = self.config.rollout.problems_per_step
        object.__setattr__(self, "problems", self.problems or all_problems)
        defaults = {
            "teacher_tokens": self.config.teacher.max_prompt_tokens,
            "response_tokens": self.config.rollout.max_new_tokens,
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        for name in ("prompt_tokens", *defaults):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}: must be at least 1; got {getattr(self, name)}")
        check_micro_batch(self.config.distill, self.shards, self.config.rollout.problems_per_step)
        if self.response_tokens > self.config.rollout.max_new_tokens:
            raise ValueError(
                f"--response-tokens: must be at most rollout.max_new_tokens, "
                f"{self.config.rollout.max_new_tokens}; got {self.response_tokens}"
            )
        longest = max(self.prompt_tokens, self.teacher_tokens) + self.response_tokens
        if longest > self.model.max_positions:
            raise ValueError(
                f"--prompt-tokens and --teacher-tokens: with a response must fit the model's "
                f"{self.model.max_positions} positions; got {longest}; shorten one of them"
            )

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    @property
    def shards(self) -> int:
        return batch_shards(self.mesh)

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    @functools.cached_property
    def local(self) -> Work:
        """What one process samples by itself: on its own devices, the most problems that one has.

        In one process that is everything. One of several finds the parameters cast and cut over
        its own devices (programs.LocalView).
        """
        if self.processes == 1:
            return self
        own = self.mesh.size // self.processes
        return dataclasses.replace(
            self,
            mesh=abstract_mesh(MeshConfig(1, own // self.tensor, self.tensor), own),
            processes=1,
            problems=-(-self.problems // self.processes),
            held=self.dtype,
        )

    @property
    def ema(self) -> bool:
        return self.config.distill.teacher == "ema"

    @property
    def groups(self) -> int:
        """Of a step, those included that pad it to the mesh."""
        return -(-self.config.rollout.problems_per_step // self.shards) * self.shards

    @property
    def micro_groups(self) -> int:
        """Of one micro-batch, or of the largest batch of a step, on all devices."""
        config = self.config.distill
        batches = -(-self.groups // (self.shards * config.length_buckets)) * self.shards
        return config.micro_batch or batches

    @property
    def slice(self) -> ModelConfig:
        """The model as one device computes it: its share of heads, MLP and vocabulary."""
        ways, model = self.tensor, self.model
        return dataclasses.replace(
            model,
            num_heads=model.num_heads // ways,
            num_kv_heads=model.num_kv_heads // ways,
            mlp_width=model.mlp_width // ways,
            vocab_size=model.vocab_size // ways,
        )

    @property
    def own_tokens(self) -> int:
        """The most tokens at a teacher prompt's end that its siblings lack (memory/teacher.py).

        Feedback, a closing line and the template's end; 0 where no rollout is told feedback.
        """
        config = self.config.teacher
        if "feedback" not in config.sources or not self.config.task.feedback:
            return 0
        after = 64 if config.layout == "user" else self.prompt_tokens
        both = "sibling" in config.sources and not config.feedback_only_without_sibling
        own = config.feedback_tokens + after + (config.sibling_tokens if both else 0)
        return min(own, self.teacher_tokens - 1)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """P, S, Q, G, T of its groups."""
        one = self.group
        return one.student_prompt.shape[2], *one.teacher_prompt.shape[1:], *one.response.shape[1:]

    @property
    def suffix(self) -> int:
        """U of its groups."""
        return self.group.suffix.shape[2]

    @property
    def columns(self) -> tuple[int, int]:
        """Of the sampler's cache: those of a prompt, and those of a ring that is full-grown."""
        return bucket(self.prompt_tokens, 64), bucket(self.config.rollout.max_new_tokens, 16)

    @functools.cached_property
    def group(self) -> DistillBatch:
        """One group, padded as the run would pad it beside groups of the other kind.

        One kind is shown a sibling's solution, all of them that of one and this one another's; in
        the other, each rollout is told its own feedback.
        """
        shown = 2 if "sibling" in self.config.teacher.sources else 1
        response = np.zeros(self.response_tokens)
        rollouts = [
            Rollout("", 0, g, "", response.astype(np.int32), response.astype(np.float32), "length")
            for g in range(self.config.rollout.rollouts_per_problem)
        ]
        kinds = [[(g % shown, *[0] * (self.teacher_tokens - 1)) for g in range(len(rollouts))]]
        if own := self.own_tokens:
            alike = [0] * (self.teacher_tokens - own)
            kinds.append([(*alike, *[g] * own) for g in range(len(rollouts))])
        groups = [
            DistillGroup([0] * self.prompt_tokens, teachers, [True] * len(rollouts), rollouts)
            for teachers in kinds
        ]
        batch = build_batch(groups, bucket_tokens=self.config.distill.bucket_tokens)
        return DistillBatch(*(x[:1] for x in batch))


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The mesh that `make_mesh` would give on `num_devices`, without them."""
    return AbstractMesh(mesh_sizes(config, num_devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def check_processes(mesh: AbstractMesh, processes: int) -> None:
    """Raises ValueError where the processes cannot share the mesh (sharding.make_mesh)."""
    if processes < 1 or mesh.size % processes:
        raise ValueError(
            f"--processes: must divide the number of devices, {mesh.size}; got {processes}"
        )
    own = mesh.size // processes
    if own % mesh.shape["tensor"]:
        fits = [str(n) for n in range(1, own + 1) if own % n == 0]
        raise ValueError(
            f"mesh.tensor: must divide the devices of each process, {own}, since each samples on "
            f"its own; got {mesh.shape['tensor']}; sizes that work: {', '.join(fits)}"
        )


def read_model(path: str) -> ModelConfig:
    """The model's numbers. Of a hub id config.json is fetched, and nothing else.

    Raises ValueError or RuntimeError, on one line, for a model that is missing or unknown.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or Path(path).exists():
        return read_config(find_model(path).files)
    huggingface_hub.logging.set_verbosity_error()  # it tells of each of its retries, twice
    try:
        file = huggingface_hub.hf_hub_download(path, "config.json")
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        said = " ".join(str(error).split())[:160]
        raise RuntimeError(
            f"{path}: its config.json could not be fetched from the hub ({said}); check the id and "
            f"the network, or set model.path to a folder that holds the file"
        ) from None
    return read_config(Path(file).parent)
