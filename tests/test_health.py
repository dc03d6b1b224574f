"""Signs of ill health: each shows, lasts, is said once, and may end the run."""

import re
from pathlib import Path

import pytest

from pmd_jax import settings
from pmd_jax.config import RunConfig
from pmd_jax.health import SIGNS, Health, HealthConfig

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.py")
WELL = {
    "loss_fraction": 1.0,
    "groups/all_solved": 0.2,
    "groups/none_solved": 0.5,
    "response_tokens": 100.0,
    "truncated": 0.1,
    "entropy": 0.4,
    "logprob_gap": 0.01,
    "reflect/duplicate_fraction": 0.2,
    "reflect/parsed": 10,
    "reflect/leaked": 1,
}
ILL = {
    "no_loss": {"loss_fraction": 0.0},
    "all_solved": {"groups/all_solved": 0.95},
    "none_solved": {"groups/none_solved": 1.0},
    "short_responses": {"response_tokens": 15.0},
    "cut_responses": {"truncated": 0.9},
    "low_entropy": {"entropy": 0.01},
    "logprob_gap": {"logprob_gap": 0.3},
    "duplicates": {"reflect/duplicate_fraction": 0.9},
    "leakage": {"reflect/leaked": 6},
}


def after(health, numbers, steps):
    """All warnings, and the reasons to stop, of so many steps with the same numbers."""
    seen = [health.see(step, numbers) for step in range(steps)]
    return [w for _, warnings, _ in seen for w in warnings], [reason for *_, reason in seen]


def test_a_healthy_run_is_told_nothing():
    warnings, reasons = after(Health(HealthConfig(stop=("all",))), WELL, 20)
    assert warnings == [] and set(reasons) == {""}


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_is_said_once_when_it_has_lasted_and_stops_where_it_is_told_to(name):
    config = HealthConfig(patience=3)
    health = Health(config)
    after(health, WELL, 3)  # what a response's length is compared with
    warnings, reasons = after(health, WELL | ILL[name], 6)
    assert len(warnings) == 1 and set(reasons) == {""}
    assert warnings[0].startswith(f"step 2: {name} for 3 steps") and "; try " in warnings[0]
    assert f"config.health.{name}=" in warnings[0]
    stops = Health(HealthConfig(patience=3, stop=(name,)))
    after(stops, WELL, 3)
    _, reasons = after(stops, WELL | ILL[name], 3)
    assert reasons[:2] == ["", ""] and reasons[2].startswith(f"step 2: {name} for 3 steps")


def test_a_sign_that_goes_away_starts_anew():
    health = Health(HealthConfig(patience=3))
    for numbers in (WELL | ILL["no_loss"], WELL | ILL["no_loss"], WELL) * 3:
        _, warnings, _ = health.see(0, numbers)
        assert not warnings


def test_what_was_counted_goes_on_from_a_checkpoint():
    first = Health(HealthConfig(patience=3))
    after(first, WELL | ILL["no_loss"], 2)
    again = Health(HealthConfig(patience=3), first.state)
    assert len(after(again, WELL | ILL["no_loss"], 1)[0]) == 1


def test_a_run_without_reflection_has_no_such_signs():
    numbers = {name: value for name, value in WELL.items() if not name.startswith("reflect")}
    assert after(Health(HealthConfig()), numbers, 9)[0] == []


@pytest.mark.parametrize("name", SIGNS)
def test_what_to_try_is_a_setting_that_there_is(name):
    values = re.findall(r"([a-z_]+(?:\.[a-z_]+)+)=(\w+)", SIGNS[name].try_this)
    given = [f"--config.{key.removeprefix('config.')}={value}" for key, value in values]
    settings.build(RunConfig, settings.load_config(QUICKSTART, given))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop": ("entropy",)}, "stop: must be of no_loss, .*, or all; got 'entropy'"),
        ({"patience": 0}, "patience: must be at least 1; got 0"),
        ({"max_loss": -1.0}, "max_loss: must be at least 0"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        HealthConfig(**values)
