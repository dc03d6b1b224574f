"""The seven steps in order: attempt, verify, remember, reflect, abstract, teach, distill.

This is the only file where memory meets distillation. Memory is refreshed before the teacher reads
it in the same step; the student's prompt comes from the task alone. Everything the paper compares
(SDPO, PMD, PMD-Transient, frozen memory, frozen policy, single levels) is a value of RunConfig and
no branch here.

`Trainer` holds the state of a run and runs one step; run.py starts, resumes, evaluates and ends it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pmd_jax import ordering
from pmd_jax.checkpoint import Checkpoint
from pmd_jax.config import RunConfig
from pmd_jax.distill.batch import (
    DistillBatch,
    DistillGroup,
    build_batch,
    build_batches,
    padding_fraction,
    place,
)
from pmd_jax.distill.grpo import advantages
from pmd_jax.distill.objectives import check_micro_batch, response_mask
from pmd_jax.distill.update import (
    StepReport,
    TrainState,
    abstract_state,
    init_state,
    make_optimizer,
    make_probe,
    make_train_step,
)
from pmd_jax.distributed import Stopped
from pmd_jax.embedding import make_embed, query_prefix
from pmd_jax.endpoint import make_endpoint, parse_writer
from pmd_jax.health import Health
from pmd_jax.memory import Generate
from pmd_jax.memory.bank import Bank
from pmd_jax.memory.behaviors import abstract, cluster
from pmd_jax.memory.recall import Recall
from pmd_jax.memory.reflection import ReflectionConfig, reflect
from pmd_jax.memory.retrieval import Retriever
from pmd_jax.memory.teacher import (
    MEMORY,
    WRITTEN,
    TeacherConfig,
    build_memory_prompts,
    build_teacher_prompts,
    check_budget,
)
from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.policy import Policy, load_policy
from pmd_jax.policy.sharding import batch_shards
from pmd_jax.policy.tokenizer import Tokenizer
from pmd_jax.records import Experience, Message, Problem, TeacherPrompt
from pmd_jax.replay import save_failed_step
from pmd_jax.rollout import (
    Grading,
    Group,
    attempt,
    make_generate,
    name_seed,
    shared,
    shared_groups,
)
from pmd_jax.steplog import carries_loss, distillation, grades, rows, teacher_gain, teaching
from pmd_jax.tasks.task import Task
from pmd_jax.telemetry import Compilations, Progress, Span, Stopwatch


class NotFinite(RuntimeError):
    """Loss or gradient was NaN, infinite or too large; policy and optimizer are as before."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log: numbers by name, and one row per rollout."""

    metrics: dict[str, Any]
    samples: list[dict[str, Any]]


def problems_by_news(groups: Sequence[Group], step: int) -> dict[str, tuple[Problem, Any]]:
    """{problem id: (problem, its attempts as experiences)}: what reflection reads."""
    return {
        group.problem.id: (
            group.problem,
            tuple(
                Experience(rollout.id, rollout.problem_id, step, rollout.text, verdict)
                for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
            ),
        )
        for group in groups
    }


def make_writer(policy: Policy, config: ReflectionConfig, seed: int) -> Generate:
    """Who writes behaviors: the current policy, another local model, or a server."""
    if config.writer.startswith("openai:"):
        url, model = parse_writer(config.writer)
        return shared(
            make_endpoint(
                url,
                model,
                config.writer_timeout_seconds,
                config.writer_retries,
                config.behaviors_max_new_tokens,
            )
        )
    return make_generate(policy, config.behaviors_max_new_tokens, config.temperature, seed)


def check_fit(
    config: RunConfig, task: Task, tokenizer: Tokenizer, model: ModelConfig, shards: int
) -> None:
    """Rules that need the problems, the tokenizer or the mesh, before any weight is read.

    shards: parts that the mesh cuts a batch into. Raises ValueError, on one line.
    """
    check_micro_batch(config.distill, shards, config.rollout.problems_per_step)
    longest = config.teacher.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > model.max_positions:
        raise ValueError(
            f"config.teacher.max_prompt_tokens: with rollout.max_new_tokens, "
            f"{config.rollout.max_new_tokens}, must fit the model's {model.max_positions} "
            f"positions; got {config.teacher.max_prompt_tokens}"
        )
    problems = [p for split in task.splits.values() for p in split]
    tokenizer.render_chat(task.student_messages(problems[0]))  # a template that takes such turns
    check_budget(problems, task.student_messages, tokenizer, config.teacher)


class Trainer:
    """A run's state: policy and optimizer, bank, data position. `step` advances all of them."""

    def __init__(self, config: RunConfig, policy: Policy, task: Task, folder: Path):
        self.config, self.policy, self.task, self.folder = config, policy, task, folder
        self.problems = task.splits["train"]
        self.order = ordering.problem_order(
            len(self.problems), config.rollout.problems_per_step, config.seed
        )
        self.bank = Bank.open(config.memory)
        self.retriever = Retriever(make_embed(config.embedding), query_prefix(config.embedding))
        self.recall = Recall(
            self.problems,
            self.retriever,
            config.teacher.control,
            config.teacher.stale_steps,
            config.seed,
        )
        self.labels = cluster(self.problems, self.retriever.vectors, config.reflection, config.seed)
        self.writer_policy = policy
        if config.reflection.writer != "policy" and not config.reflection.writer.startswith(
            "openai:"
        ):
            self.writer_policy = load_policy(
                config.reflection.writer,
                config.model.dtype,
                policy.local_mesh,
                attention=config.model.attention,
            )
        self.grpo = config.distill.grpo if config.distill.objective == "grpo" else None
        self.updates = self.grpo.updates if self.grpo else 1
        self.shards = batch_shards(policy.mesh)
        optimizer = make_optimizer(config.optimizer, policy.config, self.updates)
        ema = config.distill.teacher == "ema"
        self.abstract_state = abstract_state(policy.config, optimizer, policy.mesh, ema)
        self.state: TrainState = init_state(
            policy.params, policy.config, optimizer, policy.mesh, ema
        )
        policy.params = self.state.params
        self._train_step = make_train_step(
            policy.config,
            config.optimizer,
            config.distill,
            policy.mesh,
            policy.dtype,
            config.health.max_loss or math.inf,
            config.health.max_grad_norm or math.inf,
        )
        self._probe = make_probe(policy.config, config.distill, policy.mesh, policy.dtype)
        self.health = Health(config.health)
        self.totals: Counter[str] = Counter()
        self.watch, self.updating, self.compilations = Stopwatch(), Span(), Compilations()

    @property
    def step_number(self) -> int:
        """Policy updates so far."""
        return int(self.state.step)

    def checkpoint(self) -> Checkpoint:
        run = {
            "step": self.step_number,
            "totals": dict(self.totals),
            "health": self.health.state,
        }
        return Checkpoint(self.state, self.bank, self.order, run)

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint."""
        self.state, self.bank = checkpoint.state, checkpoint.bank
        self.totals = Counter(checkpoint.run["totals"])
        self.health = Health(self.config.health, checkpoint.run["health"])
        self.policy.params = self.state.params

    # --- one step -------------------------------------------------------------------------------

    def step(self, progress: Progress) -> StepResult:
        """Runs the seven steps once.

        Raises NotFinite and Stopped, with policy, optimizer, bank and data position as before.
        """
        num_events, position = self.bank.num_events, self.order.get_state()
        try:
            return self._step(progress)
        except (Stopped, NotFinite):
            if self.bank.num_events > num_events:
                self.bank = self.bank.rewound(num_events)
            self.order.set_state(position)
            raise

    def _step(self, progress: Progress) -> StepResult:
        step, config = self.step_number, self.config
        began, compiled = time.perf_counter(), self.compilations.seconds
        busy, synced = self.busy_seconds(), self.policy.stats.sync_seconds
        problems = [self.problems[int(i)] for i in next(self.order)]
        self.bank.begin_step(step)
        groups = self.attempt_and_verify(step, problems, progress)
        metrics: dict[str, Any] = grades(groups)
        with self.phase("remember", progress):
            news = problems_by_news(groups, step)
            self.bank.remember(step, [e for _, attempts in news.values() for e in attempts])
        if WRITTEN & set(config.teacher.sources):
            metrics |= self.reflect(step, news, progress)
        if "behaviors" in config.teacher.sources:
            metrics |= self.abstract(step, progress)
        with self.phase("teach", progress):
            prompts = self.teach(step, groups)
        metrics |= self.probe(step, groups, prompts, progress)
        batch, report, padding = self.distill(step, groups, prompts, progress)
        metrics["padding_fraction"] = padding
        taught = teaching(prompts, carries_loss(batch, bool(self.grpo)))
        self.totals.update(taught, trained_tokens=int(batch.response_length.sum()))
        metrics |= distillation(batch, report, prompts, taught)
        metrics |= {f"memory/{level}": count for level, count in self.bank.sizes().items()}
        if not self.grpo:
            metrics |= teacher_gain(batch, report, groups)
        most, tokenizer = config.samples_per_step, self.policy.tokenizer
        samples = rows(groups, prompts, batch, report, self.task, tokenizer, bool(self.grpo), most)
        metrics["seconds/sync"] = self.policy.stats.sync_seconds - synced
        metrics["seconds/compile"] = self.compilations.seconds - compiled
        busy = self.busy_seconds() - busy
        metrics["seconds/idle"] = max(time.perf_counter() - began - busy, 0.0)
        return StepResult(metrics, samples)

    def busy_seconds(self) -> float:
        """Seconds so far in which the device had work: samples, weights to sync, an update.

        What is left of a step is `seconds/idle`, when it waits for the host. A program's
        compilation counts as its work; `seconds/compile` says how much that was.
        """
        policies = {id(p): p.stats for p in (self.policy, self.writer_policy)}.values()
        sampled = sum(stats.device_seconds + stats.sync_seconds for stats in policies)
        return sampled + self.updating.seconds

    def phase(self, name: str, progress: Progress) -> Any:
        progress.phase(name)
        return self.watch(name)

    def attempt_and_verify(
        self, step: int, problems: Sequence[Problem], progress: Progress
    ) -> list[Group]:
        """Each response is graded while the others are sampled; `verify` is what is left then.

        Each process attempts and grades its share of the problems, and knows all groups then.
        """
        rollout = self.config.rollout

        def work(own: Sequence[int]) -> list[Group]:
            mine = [problems[i] for i in own]
            with Grading(self.task) as grading:
                with self.phase("attempt", progress):
                    attempts = attempt(
                        self.policy,
                        self.task,
                        mine,
                        rollout.rollouts_per_problem,
                        rollout.max_new_tokens,
                        step,
                        name_seed(self.config.seed, step, "attempt"),
                        rollout.temperature,
                        on_rollout=grading,
                    )
                with self.phase("verify", progress):
                    return grading.groups(mine, attempts)

        return shared_groups(problems, work)

    def reflect(self, step: int, news: Mapping[str, Any], progress: Progress) -> dict[str, float]:
        """Insights from this step's groups, by the current policy, in one batch."""
        config = self.config.reflection
        seed = name_seed(self.config.seed, step, "reflect")
        with self.phase("reflect", progress):
            generate = make_generate(self.policy, config.max_new_tokens, config.temperature, seed)
            reflected = reflect(news, self.bank, generate, self.policy.tokenizer, step, config)
            for problem_id, insights in reflected.insights.items():
                self.bank.rewrite_insights(step, problem_id, insights)
        texts = [i.text.strip().lower() for new in reflected.insights.values() for i in new]
        duplicates = 1 - len(set(texts)) / max(len(texts), 1) if len(texts) > 1 else 0.0
        counts = reflected.counts.metrics() | {"duplicate_fraction": duplicates}
        return {f"reflect/{name}": n for name, n in counts.items()}

    def abstract(self, step: int, progress: Progress) -> dict[str, float]:
        """Behaviors from the cluster with the most news, when due."""
        config = self.config.reflection
        seed = name_seed(self.config.seed, step, "abstract")
        with self.phase("abstract", progress):
            generate = make_writer(self.writer_policy, config, seed)
            found = abstract(self.problems, self.labels, self.bank, generate, step, config)
            self.bank.apply_operations(step, found.operations, self.retriever.embed)
            self.bank.mark_abstracted(step, found.problem_ids)
        return {f"abstract/{name}": n for name, n in found.counts.metrics().items()}

    def teach(self, step: int, groups: Sequence[Group]) -> list[list[TeacherPrompt]]:
        """One teacher prompt per rollout, from this step's context and the refreshed memory."""
        prompts = self.teacher_prompts(step, groups, self.config.teacher)
        self.bank.cite(step, [name for group in prompts for p in group for name in p.cited])
        return prompts

    def teacher_prompts(
        self, step: int, groups: Sequence[Group], config: TeacherConfig
    ) -> list[list[TeacherPrompt]]:
        problems = [group.problem for group in groups]
        wanted = config.top_k if "behaviors" in config.sources else 0
        recalled = self.recall(step, self.bank, problems, wanted)
        return [
            build_teacher_prompts(
                list(zip(group.rollouts, group.verdicts, strict=True)),
                group.problem,
                found,
                self.task.student_messages(group.problem),
                self.policy.tokenizer,
                config,
                name_seed(self.config.seed, step, "teach", group.problem.id),
            )
            for group, found in zip(groups, recalled, strict=True)
        ]

    def memory_chats(self, problems: Sequence[Problem]) -> list[tuple[Message, ...]]:
        """What the policy reads where it answers with the bank in its prompt."""
        config = self.config.teacher
        recalled = self.recall(self.step_number, self.bank, problems, config.top_k)
        prompts = build_memory_prompts(
            problems, recalled, self.task.student_messages, self.policy.tokenizer, config
        )
        return [prompt.messages for prompt in prompts]

    def probe(
        self,
        step: int,
        groups: Sequence[Group],
        prompts: Sequence[Sequence[TeacherPrompt]],
        progress: Progress,
    ) -> dict[str, float]:
        """What the loss would be without memory, other context kept, when due.

        Over the tokens of the same rollouts and before the update, so that it stands beside `loss`:
        where it is as large, memory added nothing; where the loss falls to it, the policy holds
        what memory said.
        """
        every, sources = self.config.teacher.probe_every, self.config.teacher.sources
        if not every or step % every or not MEMORY & set(sources):
            return {}
        with self.phase("probe", progress):
            bare = tuple(name for name in sources if name not in MEMORY)
            config = dataclasses.replace(self.config.teacher, sources=bare)
            without = self.teacher_prompts(step, groups, config)
            taught = self.taught(groups, without)
            multiple = math.lcm(self.config.distill.micro_batch or 1, self.shards)
            batch = build_batch(taught, multiple, self.config.distill.bucket_tokens)
            placed = place(batch, self.policy.mesh)
            with self.updating:
                known = jax.device_get(self._probe(self.state, placed))
        guided = np.array([[[prompt.has_guidance] for prompt in group] for group in prompts])
        counted = np.asarray(response_mask(batch))[: len(groups)] * guided
        divergence = known.divergence[: len(groups)] * counted
        return {"loss_without_memory": float(divergence.sum() / max(counted.sum(), 1))}

    def taught(
        self, groups: Sequence[Group], prompts: Sequence[Sequence[TeacherPrompt]]
    ) -> list[DistillGroup]:
        encode = self.policy.tokenizer.encode_chat
        return [
            DistillGroup(
                group.prompt,
                [encode(prompt.messages) for prompt in teacher],
                [prompt.has_guidance for prompt in teacher],
                group.rollouts,
                self.advantages(group),
            )
            for group, teacher in zip(groups, prompts, strict=True)
        ]

    def distill(
        self,
        step: int,
        groups: Sequence[Group],
        prompts: Sequence[Sequence[TeacherPrompt]],
        progress: Progress,
    ) -> tuple[DistillBatch, StepReport, float]:
        """The fused student/teacher forward on the same tokens, and the update.

        Also returns the fraction of the computed tokens that was padding.
        """
        config, mesh = self.config.distill, self.policy.mesh
        with self.phase("distill", progress):
            taught = self.taught(groups, prompts)
            batches, rows = build_batches(
                taught,
                config.length_buckets,
                multiple_of=self.updates * math.lcm(config.micro_batch or 1, self.shards),
                bucket_tokens=config.bucket_tokens,
            )
            self.policy.release()
            placed = [place(batch, mesh) for batch in batches]
            with self.updating:
                self.state, report = self._train_step(self.state, *placed)
                self.policy.params = self.state.params
                report = jax.device_get(report)
        batch, padding = batches[0], padding_fraction(*batches)
        if len(batches) > 1:  # what is logged is of the groups in their order
            batch = build_batch(taught)
            per_token = jax.tree.map(lambda x: x[rows], report.per_token)
            report = report._replace(per_token=per_token)
        if not report.finite:
            raise NotFinite(self._explain(step, build_batch(taught), report))
        return batch, report, padding

    def advantages(self, group: Group) -> list[float]:
        """Of each rollout of a group, for GRPO; none otherwise."""
        if not self.grpo:
            return []
        return advantages([verdict.reward for verdict in group.verdicts], self.grpo)

    def _explain(self, step: int, batch: DistillBatch, report: StepReport) -> str:
        try:
            folder = save_failed_step(self.folder, step, self.state, batch, report)
            told = f"`python -m tools.replay {folder}` says where, on a CPU"
        except Exception as error:  # a full disk, say: the loss is what has to be told
            told = f"its batch could not be kept ({error})"
        health, limits = self.config.health, ""
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            limits = (
                f" (config.health.max_loss {health.max_loss}, max_grad_norm {health.max_grad_norm})"
            )
        return (
            f"step {step}: the loss is {report.loss} and the gradient norm {report.grad_norm}"
            f"{limits}; the update was not applied. {told}; lower config.optimizer.learning_rate "
            f"and --resume, or remove the newest step of checkpoints/ to go on from the one before"
        )
