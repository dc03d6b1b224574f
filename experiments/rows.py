"""The rows of the paper's tables, and controls that it lacks, as values of a configuration.

A row turns the configuration of PMD into its own; nothing else differs, so rows of one study have
equal rollouts, updates and evaluation. What the policy writes into memory costs tokens that SDPO
and GRPO do not spend: `NAME+tokens` is a row that goes on until it has sampled as many tokens as
the reference row of its seed.

Left out: running them (ablations.py) and comparing them (table.py).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import Literal

from pmd_jax.config import RunConfig
from pmd_jax.distill.grpo import GrpoConfig
from pmd_jax.memory.recall import Control

TOKENS = "+tokens"
MOST_STEPS = 100  # times those of the reference, before a "+tokens" row gives up
Change = Callable[[RunConfig], RunConfig]


@dataclasses.dataclass(frozen=True)
class Row:
    """about: the row in words. change: PMD's configuration -> the row's.

    bank_of: the row whose bank, of the same seed, this one starts from and never changes.
    scored_with_memory: whether its score is that with memory in the prompt.
    """

    about: str
    change: Change
    bank_of: str = ""
    scored_with_memory: bool = False


def _context(config: RunConfig) -> tuple[str, ...]:
    """What the teacher is shown that is no memory."""
    return tuple(name for name in config.teacher.sources if name in ("sibling", "feedback"))


def _memory(*sources: str) -> Change:
    def change(config: RunConfig) -> RunConfig:
        teacher = dataclasses.replace(config.teacher, sources=(*_context(config), *sources))
        return dataclasses.replace(config, teacher=teacher)

    return change


def _control(control: Control) -> Change:
    def change(config: RunConfig) -> RunConfig:
        teacher = dataclasses.replace(config.teacher, control=control)
        if control == "stale":  # in a short run, a third of it
            teacher = dataclasses.replace(
                teacher, stale_steps=min(teacher.stale_steps, max(1, config.steps // 3))
            )
        return dataclasses.replace(config, teacher=teacher)

    return change


def _grpo(
    teacher: Literal["current", "ema"] = "current", ema_rate: float = 0.0, **about: object
) -> Change:
    def change(config: RunConfig) -> RunConfig:
        grpo = GrpoConfig(**about)  # type: ignore[arg-type]
        distill = dataclasses.replace(
            config.distill, objective="grpo", grpo=grpo, teacher=teacher, ema_rate=ema_rate
        )
        shown = dataclasses.replace(config.teacher, sources=(), control="none", probe_every=0)
        return dataclasses.replace(config, distill=distill, teacher=shown)

    return change


def _teacher(kind: Literal["current", "ema"], rate: float) -> Change:
    def change(config: RunConfig) -> RunConfig:
        distill = dataclasses.replace(config.distill, teacher=kind, ema_rate=rate)
        return _memory()(dataclasses.replace(config, distill=distill))

    return change


def _lifetime(lifetime: Literal["run", "step", "frozen"]) -> Change:
    def change(config: RunConfig) -> RunConfig:
        memory = dataclasses.replace(config.memory, lifetime=lifetime, path="")
        return dataclasses.replace(config, memory=memory)

    return change


def _frozen_policy(config: RunConfig) -> RunConfig:
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.0)
    evaluation = dataclasses.replace(config.evaluation, with_memory=True)
    return dataclasses.replace(config, optimizer=optimizer, evaluation=evaluation)


ROWS: dict[str, Row] = {
    "pmd": Row("all three levels, memory of the run", lambda config: config),
    "sdpo": Row("no memory: what the teacher reads is of this step's group", _memory()),
    "grpo": Row("rewards alone, Dr.GRPO, one update a batch", _grpo()),
    "transient": Row("memory is forgotten after each step", _lifetime("step")),
    "frozen-memory": Row(
        "the bank of frozen-policy, never changed", lambda c: c, bank_of="frozen-policy"
    ),
    "frozen-policy": Row(
        "memory evolves, the policy does not; scored with memory in the prompt",
        _frozen_policy,
        scored_with_memory=True,
    ),
    "insights": Row("the teacher reads insights, no behaviors", _memory("insights")),
    "behaviors": Row("the teacher reads behaviors, no insights", _memory("behaviors")),
    "experience": Row("the teacher reads kept attempts, no insights", _memory("experience")),
    "shuffled": Row("control: another problem's memory", _control("shuffled")),
    "random": Row("control: memory drawn at random", _control("random")),
    "stale": Row("control: memory as it was some steps ago", _control("stale")),
    "grpo-std": Row("GRPO, advantages over the standard deviation", _grpo(scale="std")),
    "grpo-4": Row("GRPO, four updates a batch", _grpo(updates=4)),
    "grpo-kl": Row("GRPO, KL to the first policy", _grpo("ema", 0.0, kl_weight=0.01)),
    "grpo-ema": Row("GRPO, KL to an EMA of the policy", _grpo("ema", 0.05, kl_weight=0.01)),
    "sdpo-ema": Row("SDPO, EMA teacher, rate 0.05", _teacher("ema", 0.05)),
    "sdpo-first": Row("SDPO, teacher of the first weights", _teacher("ema", 0.0)),
}
"""By name: the paper's rows, its levels, controls, and what makes baselines fair."""


def row_of(name: str) -> Row:
    """The row that a name, with or without "+tokens", stands for. Raises ValueError."""
    base = name.removesuffix(TOKENS)
    if base not in ROWS:
        close = difflib.get_close_matches(base, ROWS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"--rows: unknown row {name!r}; {hint}known: {', '.join(ROWS)}, each also as "
            f"NAME{TOKENS}"
        )
    return ROWS[base]


def in_order(names: Sequence[str], reference: str) -> list[str]:
    """The rows to run, each once, after those that it needs, which are added where missing."""
    order: list[str] = []

    def add(name: str) -> None:
        row = row_of(name)
        if row.bank_of:
            add(row.bank_of)
        if name.endswith(TOKENS):
            add(reference)
        if name not in order:
            order.append(name)

    for name in names:
        add(name)
    return order


def config_of(
    name: str, base: RunConfig, folder: str, seed: int, bank: str, max_sampled_tokens: int
) -> RunConfig:
    """The configuration of one cell: a row under one seed. Raises ValueError where it has none.

    bank: the bank that `Row.bank_of` asks for. max_sampled_tokens: where a "+tokens" row ends.
    """
    row = row_of(name)
    config = dataclasses.replace(base, output=folder, name=f"seed-{seed}", seed=seed)
    config = row.change(config)
    if row.bank_of:
        memory = dataclasses.replace(config.memory, lifetime="frozen", path=bank)
        config = dataclasses.replace(config, memory=memory)
    if name.endswith(TOKENS):
        steps = MOST_STEPS * base.steps
        config = dataclasses.replace(config, steps=steps, max_sampled_tokens=max_sampled_tokens)
    return config
