"""Signs that self-distillation is dying, read from a step's own numbers.

Each sign is a number of metrics.jsonl beyond a threshold. One that lasts `patience` steps is said
once, with what to try, and ends the run where `stop` names it. `health/<sign>` in metrics.jsonl
counts the steps in a row so far.

    sign             number                    default   why it matters
    no_loss          loss_fraction             <= 0      nothing is learned
    all_solved       groups/all_solved         >= 0.9    no mistake is left to learn from
    none_solved      groups/none_solved        >= 0.9    no solution to show, lessons alone
    short_responses  response_tokens / first   <= 0.2    the policy stops reasoning
    cut_responses    truncated                 >= 0.9    responses end at their limit, not at an end
    low_entropy      entropy, nats             <= 0.02   samples of a group become one
    logprob_gap      logprob_gap, nats         >= 0.1    sampler and trainer are two policies
    duplicates       reflect/duplicate_...     >= 0.8    memory says one thing of all problems
    leakage          leaked / parsed           >= 0.5    reflection writes answers, not insights

`first` is the mean of the run's first `patience` steps. The paper names no thresholds; these are
ours, far from what healthy runs showed, and not tuned.

Leaves out a loss that is not finite or explodes: distill/update.py keeps the weights from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Numbers = Mapping[str, Any]


class Unhealthy(RuntimeError):
    """A sign that was told to stop the run lasted too long."""


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """patience: steps in a row that a sign must last. stop: signs that end the run, or "all".

    The rest are the thresholds of health.py's table. max_loss, max_grad_norm: a step beyond them is
    not applied and ends the run, as one that is not finite does; 0 for no limit.
    """

    patience: int = 5
    stop: tuple[str, ...] = ()
    no_loss: float = 0.0
    all_solved: float = 0.9
    none_solved: float = 0.9
    short_responses: float = 0.2
    cut_responses: float = 0.9
    low_entropy: float = 0.02
    logprob_gap: float = 0.1
    duplicates: float = 0.8
    leakage: float = 0.5
    max_loss: float = 0.0
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience: must be at least 1; got {self.patience}")
        for name in ("max_loss", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0 (0: none); got {getattr(self, name)}")
        for name in self.stop:
            if name not in (*SIGNS, "all"):
                raise ValueError(f"stop: must be of {', '.join(SIGNS)}, or all; got {name!r}")


@dataclasses.dataclass(frozen=True)
class Sign:
    """number: what is compared, None where a step has no such number. low: whether small is bad."""

    number: Callable[[Numbers], float | None]
    low: bool
    means: str
    try_this: str

    def shows(self, value: float | None, threshold: float) -> bool:
        if value is None:
            return False
        return value <= threshold if self.low else value >= threshold


def _leaked(numbers: Numbers) -> float | None:
    parsed = numbers.get("reflect/parsed", 0)
    return numbers["reflect/leaked"] / parsed if parsed else None


def _named(name: str) -> Callable[[Numbers], float | None]:
    return lambda numbers: numbers.get(name)


SIGNS: dict[str, Sign] = {
    "no_loss": Sign(
        _named("loss_fraction"),
        True,
        "no rollout carries loss",
        "config.task.format_shots=2, task.verifier=lenient or more rollouts per problem",
    ),
    "all_solved": Sign(
        _named("groups/all_solved"),
        False,
        "nearly all groups are solved whole",
        "harder problems, or end here: what is left is noise",
    ),
    "none_solved": Sign(
        _named("groups/none_solved"),
        False,
        "nearly no group has a solution",
        "easier problems first, more rollouts per problem, config.task.feedback=true",
    ),
    "short_responses": Sign(
        _named("health/length"),
        True,
        "responses are a fraction of their first length",
        "a lower optimizer.learning_rate, distill.teacher=ema, a teacher with less of the answer",
    ),
    "cut_responses": Sign(
        _named("truncated"),
        False,
        "nearly all responses meet their limit",
        "a larger rollout.max_new_tokens, or look for repetition in samples.jsonl",
    ),
    "low_entropy": Sign(
        _named("entropy"),
        True,
        "the policy is nearly certain of every token",
        "a lower optimizer.learning_rate or distill.divergence.name=jensen_shannon",
    ),
    "logprob_gap": Sign(
        _named("logprob_gap"),
        False,
        "the sampler's log-probabilities are not the trainer's",
        "engine.kv_cache=dtype, model.attention=xla, model.dtype=float32 to find out which",
    ),
    "duplicates": Sign(
        _named("reflect/duplicate_fraction"),
        False,
        "reflection writes the same insight for different problems",
        "a higher reflection.temperature, reflection.style=lines for a small model",
    ),
    "leakage": Sign(
        _leaked,
        False,
        "reflections give answers away, and are refused",
        "another reflection.style or writer; see samples of memory in the report",
    ),
}


class Health:
    """Counts how long each sign has lasted. `state` is what a checkpoint keeps of it."""

    def __init__(self, config: HealthConfig, state: Mapping[str, Any] | None = None):
        self.config = config
        state = state or {}
        self._lasted = {name: int(state.get("lasted", {}).get(name, 0)) for name in SIGNS}
        self._lengths: list[float] = list(state.get("lengths", ()))

    @property
    def state(self) -> dict[str, Any]:
        return {"lasted": dict(self._lasted), "lengths": list(self._lengths)}

    def see(self, step: int, numbers: Numbers) -> tuple[dict[str, float], list[str], str]:
        """(numbers for the log, warnings, why the run should stop or "") of a step.

        A sign is warned of at the step in which it has lasted `patience` steps, not again later.
        """
        config, length = self.config, numbers["response_tokens"]
        if len(self._lengths) < config.patience:
            self._lengths.append(length)
        seen = {**numbers, "health/length": length * len(self._lengths) / sum(self._lengths)}
        warnings, reason = [], ""
        for name, sign in SIGNS.items():
            value, threshold = sign.number(seen), getattr(config, name)
            self._lasted[name] = self._lasted[name] + 1 if sign.shows(value, threshold) else 0
            if self._lasted[name] >= config.patience:
                text = (
                    f"step {step}: {name} for {self._lasted[name]} steps, {sign.means} "
                    f"({value:.3g}, threshold config.health.{name}={threshold:g}); "
                    f"try {sign.try_this}"
                )
                if {name, "all"} & set(config.stop):
                    reason = reason or text
                elif self._lasted[name] == config.patience:
                    warnings.append(text)
        log = {f"health/{name}": float(count) for name, count in self._lasted.items()}
        return {"health/length": seen["health/length"], **log}, warnings, reason
