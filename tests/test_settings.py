"""Settings: what is accepted, what is refused, and that a refusal says how to go on."""

import dataclasses
import json
import re
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from pmd_jax import settings


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Memory:
    lifetime: Literal["run", "step", "frozen"] = "run"
    path: str | None = None
    sources: tuple[str, ...] = ("sibling", "insights")
    levels: tuple[Literal[0, 1, 2], ...] = ()

    def __post_init__(self) -> None:
        if self.lifetime == "frozen" and self.path is None:
            raise ValueError('path: must name a bank when lifetime is "frozen"; got None')


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    steps: int = 3
    shuffle: bool = True
    optimizer: Optimizer = Optimizer()
    memory: Memory = Memory()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: must be at least 0; got {self.steps}")


def refusal(values: Any, kind: type = Run) -> str:
    with pytest.raises(ValueError) as error:
        settings.build(kind, {"name": "a", **values} if kind is Run else values)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- build ----------------------------------------------------------------------------------


def test_absent_keys_keep_their_defaults():
    assert settings.build(Run, {"name": "a"}) == Run("a")


def test_nested_values_land_in_their_dataclasses():
    values = {"name": "a", "optimizer": {"learning_rate": 0.5}, "memory": {"sources": ["x"]}}
    run = settings.build(Run, ConfigDict(values))
    assert run.optimizer == Optimizer(learning_rate=0.5)
    assert run.memory.sources == ("x",)


def test_an_instance_is_accepted_as_it_is():
    assert settings.build(Run, {"name": "a", "memory": Memory("step")}).memory.lifetime == "step"


def test_an_int_becomes_the_float_that_is_asked_for():
    run = settings.build(Run, {"name": "a", "optimizer": {"learning_rate": 1}})
    assert type(run.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": {"lerning_rate": 1.0}},
            "config.optimizer.lerning_rate: unknown key; did you mean learning_rate? "
            "known: betas, clip, learning_rate, warmup_steps",
        ),
        (
            {"zzz": 1},
            "config.zzz: unknown key; known: memory, name, optimizer, shuffle, steps",
        ),
        (
            {"optimizer": {"learning_rate": "abc"}},
            "config.optimizer.learning_rate: must be a float; got 'abc' (str)",
        ),
        (
            {"optimizer": {"learning_rate": "1e-6"}},
            "config.optimizer.learning_rate: must be a float; got '1e-6' (str)",
        ),
        ({"steps": True}, "config.steps: must be an int; got True (bool)"),
        ({"steps": 2.0}, "config.steps: must be an int; got 2.0 (float)"),
        ({"steps": None}, "config.steps: must be an int; got None"),
        ({"shuffle": 1}, "config.shuffle: must be true or false; got 1 (int)"),
        (
            {"optimizer": {"clip": "no"}},
            "config.optimizer.clip: must be a float or None; got 'no' (str)",
        ),
        (
            {"optimizer": {"betas": (0.9,)}},
            "config.optimizer.betas: must be a tuple of length 2, each item a float; "
            "got (0.9,) (tuple)",
        ),
        (
            {"memory": {"lifetime": "forever"}},
            "config.memory.lifetime: must be one of 'run', 'step', 'frozen'; got 'forever' (str)",
        ),
        (
            {"memory": {"sources": "sibling"}},
            "config.memory.sources: must be a tuple, each item a str; got 'sibling' (str)",
        ),
        (
            {"memory": {"sources": ("sibling", 3)}},
            "config.memory.sources[1]: must be a str; got 3 (int)",
        ),
        (
            {"memory": {"levels": (True,)}},
            "config.memory.levels[0]: must be one of 0, 1, 2; got True (bool)",
        ),
        (
            {"memory": 3},
            "config.memory: must be a section with keys lifetime, path, sources, levels; "
            "got 3 (int)",
        ),
        # What a dataclass refuses itself, with the path put before it.
        ({"steps": -1}, "config.steps: must be at least 0; got -1"),
        (
            {"memory": {"lifetime": "frozen"}},
            'config.memory.path: must name a bank when lifetime is "frozen"; got None',
        ),
    ],
)
def test_a_refusal_names_path_rule_and_value(values, message):
    assert refusal(values) == message


def test_a_missing_value_is_asked_for():
    assert refusal({}, Bare) == "config.name: missing; give a str"


@dataclasses.dataclass(frozen=True)
class Bare:
    name: str


@dataclasses.dataclass(frozen=True)
class Unsupported:
    table: dict[str, int] = dataclasses.field(default_factory=dict)


def test_a_field_of_an_unsupported_type_is_an_error_of_the_programmer():
    with pytest.raises(TypeError, match=re.escape("dict[str, int]: a type that settings cannot")):
        settings.build(Unsupported, {"table": {}})


# --- back again -----------------------------------------------------------------------------


def test_to_config_dict_is_complete_and_builds_the_same_instance():
    run = Run("a", steps=7, memory=Memory(sources=()))
    config = settings.to_config_dict(run)
    assert isinstance(config.optimizer, ConfigDict)
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.memory.path is None
    assert settings.build(Run, config) == run


def test_to_dict_is_plain_json_and_builds_the_same_instance():
    run = Run("a")
    values = settings.to_dict(run)
    assert values["memory"]["sources"] == ["sibling", "insights"]
    assert settings.build(Run, json.loads(json.dumps(values))) == run


# --- files and overrides --------------------------------------------------------------------

CONFIG_FILE = """
from ml_collections import ConfigDict

def get_config():
    optimizer = {"learning_rate": 1, "warmup_steps": 10, "betas": (0.9, 0.999), "clip": 1.0}
    memory = {"lifetime": "run", "path": None, "sources": ("sibling",), "levels": ()}
    return ConfigDict(
        {"name": "a", "steps": 3, "shuffle": True, "optimizer": optimizer, "memory": memory}
    )
"""


@pytest.fixture
def config_file(tmp_path):
    return write(tmp_path / "experiment.py", CONFIG_FILE)


def write(path, source):
    path.write_text(source)
    return str(path)


def overridden(config_file, *overrides):
    config = settings.load_config(config_file, [f"--config.{text}" for text in overrides])
    return settings.build(Run, config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=5", "5"),
        ("steps=5", 5),
        ("shuffle=false", False),
        ("optimizer.learning_rate=1e-6", 1e-6),  # the file wrote an int, 1
        ("optimizer.learning_rate=2", 2.0),
        ("optimizer.betas=0.5,0.25", (0.5, 0.25)),
        ("optimizer.betas=(0.5, 1)", (0.5, 1.0)),
        ("optimizer.clip=none", None),
        ("memory.lifetime=step", "step"),
        ("memory.path=/data/a=b", "/data/a=b"),  # the file wrote None
        ("memory.path=None", None),
        ("memory.sources=a,b", ("a", "b")),
        ("memory.sources=['a', 'b']", ("a", "b")),
        ("memory.sources=", ()),
        ("memory.levels=0,2", (0, 2)),  # the file wrote ()
    ],
)
def test_overrides_are_read_by_type(config_file, override, expected):
    value = overridden(config_file, override)
    for name in override.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_have_the_type_of_what_they_replace_before_any_build(config_file):
    overrides = ["--config.steps=5", "--config.optimizer.betas=0.5,1", "--config.shuffle=False"]
    config = settings.load_config(config_file, overrides)
    assert (config.steps, config.optimizer.betas, config.shuffle) == (5, (0.5, 1.0), False)


def test_later_overrides_win(config_file):
    assert overridden(config_file, "steps=5", "steps=6").steps == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lerning_rate=1",
            "config.optimizer.lerning_rate: unknown key; did you mean learning_rate? "
            "known: betas, clip, learning_rate, warmup_steps",
        ),
        (
            "optimiser.clip=1",
            "config.optimiser: unknown key; did you mean optimizer? "
            "known: memory, name, optimizer, shuffle, steps",
        ),
        ("optimizer.clip=abc", "config.optimizer.clip: must be a float; got 'abc' (str)"),
        ("shuffle=maybe", "config.shuffle: must be true or false; got 'maybe' (str)"),
        ("steps=1.5", "config.steps: must be an int; got 1.5 (float)"),
        ("steps=none", "config.steps: must be an int; got 'none' (str)"),
        ("optimizer.betas=1,x", "config.optimizer.betas[1]: must be a float; got 'x' (str)"),
        (
            "memory.sources=(a,b)",
            "config.memory.sources: must be a tuple, each item a str; got '(a,b)' (str)",
        ),
        (
            "memory=x",
            "config.memory: is a section, set one of its keys: levels, lifetime, path, sources; "
            "got 'x'",
        ),
        (
            "steps.x=1",
            "config.steps: is one value, not a section; got '--config.steps.x=1'",
        ),
        (
            "steps",
            "override: must look like --config.section.key=value; got '--config.steps'",
        ),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(config_file, override, message):
    with pytest.raises(ValueError) as error:
        overridden(config_file, override)
    assert str(error.value) == message


def test_an_override_reaches_the_values_that_refer_to_it(tmp_path):
    source = """
from ml_collections import ConfigDict, FieldReference

def get_config():
    steps = FieldReference(3)
    return ConfigDict({"steps": steps, "warmup": steps * 2})
"""
    file = write(tmp_path / "linked.py", source)
    assert settings.load_config(file, ["--config.steps=5"]).warmup == 10


def test_the_argument_is_handed_to_get_config(tmp_path):
    source = (
        "from ml_collections import ConfigDict\n"
        "def get_config(row='pmd'):\n    return ConfigDict({'row': row})\n"
    )
    file = write(tmp_path / "rows.py", source)
    assert settings.load_config(file).row == "pmd"
    assert settings.load_config(f"{file}:sdpo:3").row == "sdpo:3"


@pytest.mark.parametrize(
    ("source", "argument", "message"),
    [
        ("x = 1", "", "must define get_config() returning a ConfigDict; it does not"),
        ("get_config = lambda: 3", "", "get_config must return a ConfigDict; got int"),
        ("get_config = lambda: 3", ":a", "get_config takes no argument; got 'a', use --config"),
        ("get_config = lambda a: 3", "", "get_config needs an argument; give it as"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, source, argument, message):
    file = write(tmp_path / "wrong.py", source)
    with pytest.raises(ValueError, match=re.escape(f"{file}: {message}")) as error:
        settings.load_config(file + argument)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--config: no such file: .*absent\.py; paths are rel"):
        settings.load_config(str(tmp_path / "absent.py"))
    with pytest.raises(ValueError, match=r"must be path/to/file\.py, .* got 'quickstart'"):
        settings.load_config("quickstart")


def test_an_error_inside_get_config_is_not_dressed_up(tmp_path):
    file = write(tmp_path / "broken.py", "def get_config():\n    return {}['absent']\n")
    with pytest.raises(KeyError, match="absent"):
        settings.load_config(file)


# --- command line ---------------------------------------------------------------------------


def test_overrides_are_found_anywhere_in_both_forms():
    argv = ["--config.a=1", "--config", "f.py:x", "--config.b.c", "-2", "--resume", "--name", "n"]
    spec, overrides, namespace = settings.parse_arguments(argv, "")
    assert (spec, overrides) == ("f.py:x", ["--config.a=1", "--config.b.c=-2"])
    assert (namespace.name, namespace.resume) == ("n", True)


def test_name_and_resume_are_optional():
    _, overrides, namespace = settings.parse_arguments(["--config=f.py"], "")
    assert (overrides, namespace.name, namespace.resume) == ([], None, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", "f.py", "--stepz=3"], "unrecognized arguments: --stepz=3"),
        (["--config", "f.py", "--res"], "unrecognized arguments: --res"),
        (["--config", "f.py", "--config.a"], "--config.a: needs a value; write --config.a=VALUE"),
        (["--config.a", "--config", "f.py"], "--config.a: needs a value; write --config.a=VALUE"),
    ],
)
def test_any_other_flag_is_an_error_of_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        settings.parse_arguments(argv, "")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_explains_overrides(capsys):
    with pytest.raises(SystemExit) as stop:
        settings.parse_arguments(["--help"], "Trains a policy.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Trains a policy." in text
    assert "--config.optimizer.learning_rate=1e-6" in text
