"""What a step found, for the log: numbers by name, and one row per rollout.

Left out: where they go (telemetry.py), and what a step does (trainer.py).

Axes: N groups, G rollouts, T response tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from pmd_jax.distill.batch import DistillBatch
from pmd_jax.distill.objectives import response_mask
from pmd_jax.distill.update import StepReport, rollout_losses
from pmd_jax.metrics import concept_frequency
from pmd_jax.policy.tokenizer import Tokenizer
from pmd_jax.records import MultipleChoice, Problem, TeacherPrompt, Verdict
from pmd_jax.rollout import Group
from pmd_jax.tasks.task import Task

Prompts = Sequence[Sequence[TeacherPrompt]]
"""Of each rollout of each group."""


def grades(groups: Sequence[Group]) -> dict[str, float]:
    """What the verifier says of a step's rollouts, and what they look like."""
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    solved = [[v.correct for v in group.verdicts] for group in groups]
    num_tokens = sum(len(rollout.tokens) for rollout in rollouts)
    return {
        "accuracy": float(np.mean([v.correct for v in verdicts])),
        "reward": float(np.mean([v.reward for v in verdicts])),
        "well_formed": float(np.mean([v.well_formed for v in verdicts])),
        "truncated": float(np.mean([r.stop == "length" for r in rollouts])),
        "response_tokens": num_tokens / len(rollouts),
        "groups/all_solved": float(np.mean([all(group) for group in solved])),
        "groups/none_solved": float(np.mean([not any(group) for group in solved])),
        **_of_programs(verdicts),
        **concept_frequency([rollout.text for rollout in rollouts], num_tokens),
    }


def _of_programs(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """What only programs have: tests passed, and how much of the feedback gives outputs away."""
    passed = [v.tests_passed for v in verdicts if v.tests_passed is not None]
    if not passed:
        return {}
    said = [v.revealed for v in verdicts if v.feedback]
    return {
        "tests_passed": float(np.mean(passed)),
        "feedback/share": len(said) / len(verdicts),
        "feedback/revealed": float(np.mean(said)) if said else 0.0,
    }


def right_answer(problem: Problem) -> str:
    """The letter of a choice; "" of a programming problem, which has no one answer."""
    return problem.check.answer if isinstance(problem.check, MultipleChoice) else ""


def carries_loss(batch: DistillBatch, grpo: bool) -> Bool[np.ndarray, "N G"]:
    """Which rollouts move the policy: those with an advantage, or those with guidance."""
    return np.asarray(batch.advantage != 0 if grpo else batch.has_guidance)


def teaching(prompts: Prompts, with_loss: Bool[np.ndarray, "N G"]) -> Counter[str]:
    """Rollouts of a step, how many carried loss, and what their teachers were shown of memory."""
    teachers = [prompt for group in prompts for prompt in group]
    shown = [prompt.section_tokens.keys() for prompt in teachers if prompt.has_guidance]
    return Counter(
        rollouts=len(teachers),
        rollouts_with_loss=int(with_loss.sum()),
        with_insight=sum(bool(names & {"strategies", "lessons"}) for names in shown),
        with_behavior=sum("behaviors" in names for names in shown),
    )


def distillation(
    batch: DistillBatch, report: StepReport, prompts: Prompts, taught: Counter[str]
) -> dict[str, Any]:
    """The update, and what the teachers read."""
    size = max(taught["rollouts"], 1)
    read = np.take_along_axis(batch.teacher_length, batch.prompt_of, axis=1)
    read = (read + batch.suffix_length)[: len(prompts)]
    cut = sum(sum(prompt.cut_tokens.values()) for group in prompts for prompt in group)
    return {
        "loss": float(report.loss),
        "grad_norm": float(report.grad_norm),
        "learning_rate": float(report.learning_rate),
        "entropy": float(report.entropy),
        "logprob_gap": float(report.logprob_gap),
        "loss_fraction": taught["rollouts_with_loss"] / size,
        "teacher/with_insight": taught["with_insight"] / size,
        "teacher/with_behavior": taught["with_behavior"] / size,
        "teacher/prompt_tokens": float(read.mean()),
        "teacher/cut_tokens": cut / size,
    }


def teacher_gain(
    batch: DistillBatch, report: StepReport, groups: Sequence[Group]
) -> dict[str, float]:
    """By how many nats per token the teacher likes the student's responses better than it does.

    Apart for correct and for wrong ones, where there are any: a teacher that knows more gains on
    the correct. A number near zero on both says that it was shown nothing of use.
    """
    known, mask = report.per_token, np.asarray(response_mask(batch))
    gain = ((known.teacher - known.student) * mask).sum(-1) / mask.sum(-1).clip(1)
    correct = np.array([[v.correct for v in group.verdicts] for group in groups])
    gain = gain[: len(groups)]
    parts = {"teacher/gain_correct": gain[correct], "teacher/gain_wrong": gain[~correct]}
    return {name: float(values.mean()) for name, values in parts.items() if values.size}


def rows(
    groups: Sequence[Group],
    prompts: Prompts,
    batch: DistillBatch,
    report: StepReport,
    task: Task,
    tokenizer: Tokenizer,
    grpo: bool,
    most: int,
) -> list[dict[str, Any]]:
    """One row per rollout, up to `most` of them."""
    made: list[dict[str, Any]] = []
    has_loss, losses = carries_loss(batch, grpo), rollout_losses(report, batch)
    nats: Float[np.ndarray, "N G T"] = np.asarray(report.per_token.divergence).round(4)
    render = tokenizer.render_chat
    for i, (group, teachers) in enumerate(zip(groups, prompts, strict=True)):
        student_prompt = render(task.student_messages(group.problem))
        for j, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
            if len(made) == most:
                return made
            teacher = teachers[j]
            made.append(
                {
                    "rollout": rollout.id,
                    "problem": group.problem.id,
                    "subject": group.problem.subject,
                    "subtask": group.problem.subtask,
                    "answer": right_answer(group.problem),
                    "student_prompt": student_prompt,
                    "response": rollout.text,
                    "pieces": tokenizer.pieces(rollout.tokens),
                    "token_nats": nats[i, j, : len(rollout.tokens)],
                    "stop": rollout.stop,
                    "correct": verdict.correct,
                    "reward": verdict.reward,
                    "well_formed": verdict.well_formed,
                    "tests_passed": verdict.tests_passed,
                    "feedback": verdict.feedback,
                    "revealed": verdict.revealed,
                    "has_guidance": teacher.has_guidance,
                    "teacher_prompt": render(teacher.messages),
                    "cited": list(teacher.cited),
                    "section_tokens": dict(teacher.section_tokens),
                    "cut_tokens": dict(teacher.cut_tokens),
                    "advantage": float(batch.advantage[i, j]) if grpo else None,
                    "loss_nats": float(losses[i, j]) if has_loss[i, j] else None,
                }
            )
    return made
