"""A run from start to end: check, load, evaluate, train, save, resume, evaluate, summarise.

Everything that can be wrong with the configuration is found before the model is loaded, and
everything that can be wrong with model and task before the first rollout. Ctrl-C lets the step in
progress finish, saves, and says how to go on; a second Ctrl-C stops at once. SIGTERM, with which
clusters take a machine back, leaves the step in progress and saves the one before it.

Of several processes all do the same here, and the first one writes and talks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from pmd_jax import distributed, settings
from pmd_jax.checkpoint import Checkpointer, SaveFailed
from pmd_jax.config import RunConfig
from pmd_jax.distributed import PeerFailed, PeerLost, Stopped
from pmd_jax.endpoint import EndpointError
from pmd_jax.evaluate import Evaluation, chosen_problems, evaluate
from pmd_jax.health import Unhealthy
from pmd_jax.interrupts import Interrupts
from pmd_jax.ordering import problem_order
from pmd_jax.policy.bar import progress_bar
from pmd_jax.policy.families import read_config
from pmd_jax.policy.policy import Policy, find_model, load_policy
from pmd_jax.policy.saved import CHECKPOINTS, MODEL, copy_model_files
from pmd_jax.policy.sharding import batch_shards, make_mesh
from pmd_jax.policy.tokenizer import Tokenizer
from pmd_jax.records import Message
from pmd_jax.runfolder import Lock, check_folder, check_own
from pmd_jax.tasks.sandbox import SandboxError
from pmd_jax.tasks.task import Task, load_task
from pmd_jax.telemetry import (
    Bystander,
    EvaluationRow,
    Progress,
    RunWriter,
    StepReport,
    host_memory_gib,
    peak_memory_gib,
    summary_table,
)
from pmd_jax.tracking import Tracking, TrackingConfig, check_installed, start_tracking
from pmd_jax.trainer import NotFinite, StepResult, Trainer, check_fit


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. interrupted: by what it was stopped and can be resumed from, "" if not."""

    folder: Path
    steps: int
    interrupted: str


class NothingLearned(RuntimeError):
    """The run came to its end, and not one of its rollouts carried loss."""


class ReplicasDiffer(RuntimeError):
    """The processes of a run no longer hold the same memory."""


FINAL = (NotFinite, NothingLearned, Unhealthy)
"""Failures that the same command would meet again."""

FAILURES = (
    *FINAL,
    SaveFailed,
    EndpointError,
    SandboxError,
    PeerFailed,
    PeerLost,
    ReplicasDiffer,
    OSError,
)
"""How a run may fail that was well prepared: the world's fault or the settings', and no bug."""


Resume = bool | Literal["if saved"]


def train(config: RunConfig, resume: Resume = False) -> Outcome:
    """Runs `config` to its end, or until it is told to stop: `prepare`, then `Run.to_the_end`."""
    return prepare(config, resume).to_the_end()


def prepare(config: RunConfig, resume: Resume = False) -> Run:
    """Everything before the first rollout. What is wrong with the input is found here.

    resume: continue the run of this name; "if saved", or begin where it has no checkpoint.
    Raises ValueError for what is wrong with configuration, files or checkpoint, hub.FetchError
    where a model could not be fetched, each on one line.
    """
    folder = Path(config.output) / config.name
    distributed.by_main(lambda: check_own(folder))
    with contextlib.ExitStack() as stack:
        writer = RunWriter(folder) if distributed.is_main() else Bystander(folder)
        stack.callback(writer.close)
        lock = Lock(folder / "run.lock")
        distributed.by_main(lock.take)
        stack.callback(lock.release)
        checkpointer = Checkpointer(folder / CHECKPOINTS, config.checkpoint)
        stack.callback(checkpointer.close)
        latest = distributed.by_main(lambda: checkpointer.latest)
        resumes = latest is not None if resume == "if saved" else bool(resume)
        aside = checkpointer.set_aside
        distributed.by_main(lambda: check_folder(folder, config, latest, aside, resumes))
        check_installed(config.tracking)
        task = load_task(config.task)
        problem_order(len(task.splits["train"]), config.rollout.problems_per_step, config.seed)
        policy = _load(config, task)
        trainer = Trainer(config, policy, task, folder)
        if resumes:
            restored = checkpointer.restore(trainer.abstract_state, trainer.order, config.memory)
            trainer.adopt(restored)
        writer.rewind(trainer.step_number)
        writer.write_config(settings.to_dict(config))
        tracked = TrackingConfig()
        if distributed.is_main():
            copy_model_files(policy.folder, folder / MODEL)
            tracked = config.tracking
        tracking = start_tracking(tracked, folder, settings.to_dict(config), resumes)
        stack.enter_context(tracking)
        return Run(config, trainer, task, writer, checkpointer, tracking, stack.pop_all())


def _load(config: RunConfig, task: Task) -> Policy:
    """The policy, its weights read only after everything that does not need them was checked."""
    mesh = make_mesh(config.mesh)
    files = find_model(config.model.path).files
    check_fit(config, task, Tokenizer.load(files), read_config(files), batch_shards(mesh))
    path, dtype, attention = config.model.path, config.model.dtype, config.model.attention
    with progress_bar(f"reading {path}") as progress:
        return load_policy(
            path, dtype, mesh, "float32", config.engine, progress, attention=attention
        )


class Run:
    """The outer loop around `Trainer.step`. Made by `prepare`; `closing` closes its files."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        task: Task,
        writer: RunWriter,
        checkpointer: Checkpointer,
        tracking: Tracking,
        closing: contextlib.ExitStack,
    ):
        self.config, self.trainer, self.task = config, trainer, task
        self.writer, self.checkpointer, self._closing = writer, checkpointer, closing
        self.tracking = tracking
        self.began = time.monotonic()
        self.asked_to_stop = ""
        self.last: Evaluation | None = None

    @property
    def is_over(self) -> bool:
        most, sampled = self.config.max_sampled_tokens, self.trainer.totals["sampled_tokens"]
        return self.trainer.step_number >= self.config.steps or 0 < most <= sampled

    def to_the_end(self) -> Outcome:
        """Raises one of FAILURES, on one line, when the run comes to nothing."""
        with contextlib.ExitStack() as stack:
            stack.push(self._close)
            with distributed.peers_are_there("training"):
                return self._run()

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where this process failed, the others cannot be waited for, as checkpoints would."""
        if kind is not None and jax.process_count() > 1:
            self.writer.close()
            return
        try:
            self._closing.close()
        except SaveFailed as error:
            if kind is None:
                raise
            print(f"error: {error}", file=sys.stderr)  # beside what the run failed with

    def _run(self) -> Outcome:
        config, trainer = self.config, self.trainer
        steps, quiet = trainer.step_number, not distributed.is_main()
        with Progress(config.steps, steps, quiet=quiet) as progress:
            for note in (self.task.verifier.about, *self.checkpointer.notes):
                if note:
                    progress.note(note)
            interrupts = Interrupts(progress.note)
            for policy in (trainer.policy, trainer.writer_policy):
                policy.between_chunks(interrupts.check)
            with interrupts.caught(signal.SIGTERM):
                try:
                    self._to_the_last_step(progress, interrupts)
                    self.save(progress)
                    if not self.asked_to_stop:
                        self.evaluate("after", progress)
                except Stopped:
                    self.asked_to_stop = "SIGTERM"
                    self.save(progress)
                except NotFinite:
                    self.save(progress)
                    self.checkpointer.wait()
                    raise
                self.checkpointer.wait()
            if self.asked_to_stop:
                progress.note(
                    f"{self.asked_to_stop}: saved step {trainer.step_number} in "
                    f"{self.checkpointer.folder}; continue with the same command and --resume"
                )
                return Outcome(self.writer.folder, trainer.step_number, self.asked_to_stop)
        if distributed.is_main():
            self.summarise()
        if not trainer.totals["rollouts_with_loss"]:
            raise NothingLearned(
                f"run {self.writer.folder}: no rollout carried loss, so nothing was learned; see "
                f"metrics.jsonl (accuracy, well_formed) and try config.task.format_shots=2, "
                f"config.task.verifier=lenient or more rollouts per problem"
            )
        self.writer.write_totals({"steps": trainer.step_number, **trainer.totals})
        return Outcome(self.writer.folder, trainer.step_number, "")

    def _to_the_last_step(self, progress: Progress, interrupts: Interrupts) -> None:
        """Until the run is over or asked to stop."""
        trainer, every = self.trainer, self.config.evaluation.every
        if trainer.step_number == 0 and self.config.evaluation.before:
            self.evaluate("before", progress)
        with interrupts.caught(signal.SIGINT):
            while not self.is_over and not self.hears(interrupts):
                done = trainer.step_number
                if every and done and done % every == 0 and not self.was_evaluated(done):
                    self.evaluate(f"step {done}", progress)
                else:
                    self.step(progress)

    def hears(self, interrupts: Interrupts) -> str:
        """What this process or another was asked to stop by, "" for nothing."""
        told = distributed.exchange(interrupts.asked)
        self.asked_to_stop = next(filter(None, told), "")
        return self.asked_to_stop

    def was_evaluated(self, step: int) -> bool:
        """Whether a run that was killed after the evaluation of this step has its scores."""
        file, last = self.writer.folder / "evaluation.json", f"step {step}"
        if self.config.evaluation.with_memory:
            last = f"{last}, with memory"
        return distributed.by_main(lambda: file.is_file() and last in json.loads(file.read_text()))

    def step(self, progress: Progress) -> None:
        trainer, stats = self.trainer, self.trainer.policy.stats
        step, sampled, began = trainer.step_number, stats.response_tokens, time.monotonic()
        result = trainer.step(progress)
        sampled = self.agree(step, stats.response_tokens - sampled)
        seconds = time.monotonic() - began
        trainer.totals["sampled_tokens"] += sampled
        trainer.totals["milliseconds"] += round(1000 * seconds)
        health, warnings, unhealthy = trainer.health.see(step, result.metrics)
        self.log(
            step, dataclasses.replace(result, metrics=result.metrics | health), sampled / seconds
        )
        progress.step_done(step, _report(result.metrics, sampled / seconds))
        if not result.metrics["loss_fraction"]:
            progress.note(f"step {step}: no rollout carried loss; its update changed nothing")
        for note in (*warnings, *self.tracking.notes()):
            progress.note(note)
        done, every = trainer.step_number, self.config.checkpoint.every
        if every and done % every == 0:
            self.save(progress)
        if unhealthy:
            self.save(progress)
            self.checkpointer.wait()
            raise Unhealthy(f"{unhealthy}. Step {done} is saved; resume with another configuration")

    def agree(self, step: int, sampled: int) -> int:
        """Tokens that all processes sampled in a step.

        Raises ReplicasDiffer when their banks are not the same, after each wrote its own.
        """
        told = distributed.exchange((sampled, self.trainer.bank.digest()))
        if len({digest for _, digest in told}) > 1:
            folder = self.writer.folder / f"banks_differ_step_{step}"
            self.trainer.bank.save(folder / f"process_{jax.process_index()}")
            distributed.exchange("written")
            raise ReplicasDiffer(
                f"step {step}: the processes hold different memories; each wrote its own below "
                f"{folder}, compare them with `python -m tools.memory diff`; machines that differ "
                f"in software or hardware can be why"
            )
        return sum(tokens for tokens, _ in told)

    def save(self, progress: Progress) -> None:
        """A checkpoint, and its bank once more in memory/ where a person finds it.

        `seconds/save` of the next line of metrics.jsonl is how long training waited for it.
        """
        trainer = self.trainer
        with trainer.phase("save", progress):
            self.writer.sync()
            self.checkpointer.save(trainer.step_number, trainer.checkpoint())
            if distributed.is_main():
                trainer.bank.save(self.writer.folder / "memory")

    def log(self, step: int, result: StepResult, tokens_per_second: float) -> None:
        metrics = result.metrics | {
            "tokens_per_second": tokens_per_second,
            "peak_memory_gib": peak_memory_gib(),
            "host_memory_gib": host_memory_gib(),
            "live_arrays_gib": sum(x.nbytes for x in jax.live_arrays()) / 2**30,
            **{f"seconds/{name}": s for name, s in self.trainer.watch.take().items()},
        }
        self.tracking.log(step, self.writer.log_step(step, metrics))
        self.writer.log_samples(step, result.samples)

    def evaluate(self, name: str, progress: Progress) -> None:
        """Without memory, and once more with it where the configuration says so."""
        self.last = self._score(name, None, "no memory in the prompt", progress)
        if self.config.evaluation.with_memory:
            chats = self.trainer.memory_chats(chosen_problems(self.task, self.config.evaluation))
            self._score(f"{name}, with memory", chats, "memory in the prompt", progress)

    def _score(
        self,
        name: str,
        chats: Sequence[Sequence[Message]] | None,
        about: str,
        progress: Progress,
    ) -> Evaluation:
        progress.phase(f"evaluate {name}")
        config = self.config
        scores = evaluate(
            self.trainer.policy,
            self.task,
            config.evaluation,
            config.rollout.max_new_tokens,
            config.seed,
            chats,
        )
        step = self.trainer.step_number
        self.writer.write_evaluation(name, {"step": step, **scores.to_dict()})
        self.tracking.log_evaluation(step, name, scores.to_dict())
        low, high = scores.interval
        progress.note(
            f"evaluation {name}: avg@{scores.num_samples} {100 * scores.average:.1f}% "
            f"({100 * low:.1f} to {100 * high:.1f}), well-formed {100 * scores.well_formed:.0f}%, "
            f"on {scores.num_problems} {scores.split} problems, {about}"
        )
        return scores

    def summarise(self) -> None:
        assert self.last is not None
        totals = self.trainer.totals
        saved = json.loads((self.writer.folder / "evaluation.json").read_text())
        sizes = self.trainer.bank.sizes()
        summary_table(
            [
                EvaluationRow(
                    name,
                    s["average"],
                    tuple(s["interval"]),
                    s["majority"],
                    s["well_formed"],
                    s["tests_passed"],
                )
                for name, s in saved.items()
            ],
            num_samples=self.last.num_samples,
            chance=self.last.chance,
            constant_letter=self.last.constant,
            memory_sizes={name: sizes[name] for name in ("experiences", "insights", "behaviors")},
            loss_fraction=totals["rollouts_with_loss"] / max(totals["rollouts"], 1),
            seconds=time.monotonic() - self.began,
            num_tokens=totals["sampled_tokens"],
        )
        print(
            f"teacher prompts that carried loss and cited an insight: {totals['with_insight']}, "
            f"a behavior: {totals['with_behavior']}, of {totals['rollouts']} rollouts\n"
            f"run folder: {self.writer.folder}"
        )


def _report(metrics: dict[str, Any], tokens_per_second: float) -> StepReport:
    return StepReport(
        accuracy=metrics["accuracy"],
        loss_nats=metrics["loss"] if metrics["loss_fraction"] else None,
        usable_insights=metrics.get("reflect/usable_fraction"),
        memory_sizes={
            level: metrics[f"memory/{level}"] for level in ("experiences", "insights", "behaviors")
        },
        tokens_per_second=tokens_per_second,
    )
