"""Configuration files and command lines -> typed, checked, complete frozen dataclasses.

    configs/quickstart.py --get_config--> ConfigDict --overrides--> ConfigDict --build--> dataclass

A value is checked twice: here for its type and the spelling of its key, and in the dataclass's own
`__post_init__` for its meaning. Both fail at start, on one line, with the path of the value:
`config.optimizer.learning_rate: must be a float; got 'abc' (str)`.

Understood types: nested dataclasses, int, float, bool, str, Literal, tuple[T, ...],
tuple[S, T], and unions of these such as `float | None`. An int is accepted where a float is asked
for; a bool is never a number, and text is never a number unless it came from the command line.

Left out: what the settings are. This file knows no room; config.py composes the rooms' own.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

Settings = TypeVar("Settings")

SECTION_PREFIX = "--config."


class CommandLineText(str):
    """A value as typed on the command line, to be read by the type of the field it lands in."""

    __slots__ = ()


# --- mapping -> dataclass -------------------------------------------------------------------


def build(
    kind: type[Settings], values: Mapping[str, Any] | ConfigDict, where: str = "config"
) -> Settings:
    """The dataclass `kind` from `values`; keys that are absent keep the dataclass's default.

    where: path of `values`, which opens every error.
    Raises ValueError for an unknown or missing key, a value of another type, and whatever
    `kind.__post_init__` refuses: a message "name: rule; got value" gets the path before it.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in _init_fields(kind)}
    for key in values:
        if key not in fields:
            raise _unknown_key(f"{where}.{key}", fields)
    for name, field in fields.items():
        if name not in values and _is_required(field):
            raise ValueError(f"{where}.{name}: missing; give {_describe(hints[name])}")
    converted = {key: _convert(values[key], hints[key], f"{where}.{key}") for key in values}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` asks, or ValueError. Text of the command line is read first."""
    if isinstance(value, CommandLineText):
        value = _read_text(value, annotation)
    for member in _members(annotation):
        if member is Any:
            return value
        if dataclasses.is_dataclass(member):
            if isinstance(value, typing.cast(type, member)):
                return value
            if isinstance(value, Mapping | ConfigDict):
                return build(typing.cast(type, member), value, where)
        elif typing.get_origin(member) is tuple:
            if isinstance(value, tuple | list) and _fits_length(value, member):
                return tuple(
                    _convert(item, _element(member, i), f"{where}[{i}]")
                    for i, item in enumerate(value)
                )
        elif _is_plain(value, member):
            return float(value) if member is float else value
    shown = f"got {value!r}" if value is None else f"got {value!r} ({type(value).__name__})"
    raise ValueError(f"{where}: must be {_describe(annotation)}; {shown}")


def _is_plain(value: Any, member: Any) -> bool:
    """Whether a value without parts is one of `member`: a Literal, None, or a plain type."""
    if typing.get_origin(member) is Literal:
        return any(type(value) is type(option) and value == option for option in _args(member))
    if member is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if member in (bool, str, types.NoneType):
        return isinstance(value, member)
    raise TypeError(f"{member}: a type that settings cannot check; see the list in settings.py")


def _describe(annotation: Any) -> str:
    """A type in words, as it follows "must be": "a float or None", "one of 'run', 'step'"."""
    names = {
        int: "an int",
        float: "a float",
        bool: "true or false",
        str: "a str",
        types.NoneType: "None",
        Any: "any value",
    }
    parts = []
    for member in _members(annotation):
        if dataclasses.is_dataclass(member):
            parts.append(f"a section with keys {', '.join(f.name for f in _init_fields(member))}")
        elif typing.get_origin(member) is Literal:
            parts.append("one of " + ", ".join(repr(option) for option in _args(member)))
        elif typing.get_origin(member) is tuple:
            args = _args(member)
            length = "" if Ellipsis in args else f" of length {len(args)}"
            kinds = dict.fromkeys(_describe(arg) for arg in args if arg is not Ellipsis)
            parts.append(f"a tuple{length}, each item {' or '.join(kinds)}")
        else:
            parts.append(names.get(member, str(member)))
    return " or ".join(parts)


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _args(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation)


def _element(annotation: Any, index: int) -> Any:
    args = _args(annotation)
    return args[0] if Ellipsis in args else args[index]


def _fits_length(value: Sequence[Any], annotation: Any) -> bool:
    args = _args(annotation)
    return Ellipsis in args or len(value) == len(args)


def _init_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _unknown_key(path: str, known: Iterable[str]) -> ValueError:
    names = sorted(known)
    close = difflib.get_close_matches(path.rpartition(".")[2], names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ValueError(f"{path}: unknown key; {hint}known: {', '.join(names)}")


# --- dataclass -> mapping -------------------------------------------------------------------


def to_config_dict(instance: Any) -> ConfigDict:
    """A settings dataclass as a ConfigDict, defaults included; tuples stay tuples."""
    values = {field.name: getattr(instance, field.name) for field in _init_fields(instance)}
    return ConfigDict(
        {
            name: to_config_dict(value) if dataclasses.is_dataclass(value) else value
            for name, value in values.items()
        }
    )


def to_dict(instance: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values, defaults included; tuples become lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in _init_fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(instance)


# --- files and the command line -------------------------------------------------------------


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The ConfigDict that `spec` names, with `overrides` applied.

    spec: "path/to/file.py" or "path/to/file.py:argument"; the file defines
    `get_config(argument)`, or `get_config()` where no argument is meant. Or "path/to/config.json",
    a configuration as a run's folder keeps it.
    overrides: "--config.section.key=value", read by the type of the value that they replace:
    true or false, numbers, text, tuples as "a,b" or as a Python literal, and "none" where the
    dataclass allows it. A key that the file did not set is unknown, so a file should return a
    complete ConfigDict (`to_config_dict`). A str, or an empty value, stays `CommandLineText`
    until `build` knows its type.
    Raises ValueError, on one line, for all that is wrong with the file, a key or a value.
    """
    config = _call_get_config(spec)
    override(config, overrides)
    return config


def override(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Sets what "--config.section.key=value" says, as `load_config` does."""
    for text in overrides:
        _apply_override(config, text)


def _call_get_config(spec: str) -> ConfigDict:
    if spec.endswith(".json"):
        return _read_config(Path(spec))
    parts = re.fullmatch(r"(.+?\.py)(?::(.+))?", spec)
    if parts is None:
        raise ValueError(
            "--config: must be path/to/file.py, path/to/file.py:arg or a run's config.json; "
            f"got {spec!r}"
        )
    file, argument = Path(parts[1]), parts[2]
    if not file.is_file():
        raise _no_such_file(file)
    get_config = getattr(_import_file(file), "get_config", None)
    if get_config is None:
        raise ValueError(f"{file}: must define get_config() returning a ConfigDict; it does not")
    arguments = [] if argument is None else [argument]
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        rule = (
            f"get_config needs an argument; give it as {file}:argument"
            if argument is None
            else f"get_config takes no argument; got {argument!r}, use --config {file}"
        )
        raise ValueError(f"{file}: {rule}") from error
    config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        got = type(config).__name__
        raise ValueError(f"{file}: get_config must return a ConfigDict; got {got}")
    return config


def _read_config(file: Path) -> ConfigDict:
    """The inverse of `to_dict` in a file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _no_such_file(file) from error
    except ValueError as error:
        raise ValueError(f"{file}: must be JSON; {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must be one JSON object; got {str(values)[:40]!r}")

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return ConfigDict({name: plain(item) for name, item in value.items()})
        return tuple(map(plain, value)) if isinstance(value, list) else value

    return plain(values)


def _no_such_file(file: Path) -> ValueError:
    return ValueError(f"--config: no such file: {file}; paths are relative to {Path.cwd()}")


def _import_file(file: Path) -> types.ModuleType:
    name = f"_config_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


def _apply_override(config: ConfigDict, override: str) -> None:
    flag, equals, text = override.partition("=")
    if not flag.startswith(SECTION_PREFIX) or not equals:
        raise ValueError(f"override: must look like --config.section.key=value; got {override!r}")
    section, where = config, "config"
    *parents, name = flag.removeprefix(SECTION_PREFIX).split(".")
    for key in parents:
        if key not in section:
            raise _unknown_key(f"{where}.{key}", section)
        section, where = section[key], f"{where}.{key}"
        if not isinstance(section, ConfigDict):
            raise ValueError(f"{where}: is one value, not a section; got {override!r}")
    if name not in section:
        raise _unknown_key(f"{where}.{name}", section)
    existing, where = section[name], f"{where}.{name}"
    if isinstance(existing, ConfigDict):
        keys = ", ".join(existing)
        raise ValueError(f"{where}: is a section, set one of its keys: {keys}; got {text!r}")
    value = _read_as(existing, CommandLineText(text), where)
    with section.ignore_type():  # build checks types, against the dataclass
        section[name] = value


def _read_as(existing: Any, text: CommandLineText, where: str) -> Any:
    """`text` by the type of the value that it replaces, or still text where that is not enough."""
    if existing is None or isinstance(existing, str) or text.lower() == "none":
        return text
    if isinstance(existing, tuple | list):
        kinds = {type(item) for item in existing}
        if len(kinds) != 1 or kinds & {str, types.NoneType}:
            return text
        return _convert(text, tuple[kinds.pop(), ...], where)  # type: ignore[misc]
    if type(existing) is int:
        # A config file may write 0 for a float; what may replace it is for build to say.
        return _read_text(text, int | float) if _is_number(text) else text
    return _convert(text, type(existing), where)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_text(text: CommandLineText, annotation: Any) -> Any:
    """`text` as the first member of `annotation` that it reads as, else as a plain str."""
    members = _members(annotation)
    if types.NoneType in members and text.lower() == "none":
        return None
    for member in members:
        origin = typing.get_origin(member)
        if origin is tuple:
            return _read_tuple(text)
        if origin is Literal:
            for option in _args(member):
                if str(option) == text:
                    return option
        if member is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if member in (int, float):
            try:
                return member(text)
            except ValueError:  # not this kind of number: the next member, or plain text
                continue
    return str(text)


def _read_tuple(text: CommandLineText) -> Any:
    """ "a,b" -> its parts, still as text; "('a', 'b')" -> the literal; "" -> ()."""
    if text.startswith(("(", "[", "'", '"')):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # not a literal: reported by its caller as text
            return str(text)
        return value if isinstance(value, tuple | list) else (value,)
    parts = [part.strip() for part in text.split(",")]
    return tuple(CommandLineText(part) for part in parts if part)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="name of the run, and of its folder")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run of this name from its checkpoint"
    )
    parser.add_argument(
        "--resume-if-saved", action="store_true", help="continue it if it has one, else begin"
    )
    several = parser.add_argument_group("one run in several processes")
    several.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--num-processes", type=int, default=0, metavar="N")
    several.add_argument("--process-id", type=int, default=-1, metavar="I", help="0 to N-1")
    several.add_argument(
        "--multihost", action="store_true", help="let JAX find them: Cloud TPU, Slurm, Open MPI"
    )
    several.add_argument(
        "--peer-timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="without a sign of life from a process until the run ends (default 100)",
    )


def parse_arguments(
    argv: Sequence[str],
    description: str,
    add: Callable[[argparse.ArgumentParser], Any] | None = None,
    required: bool = True,
) -> tuple[str, list[str], argparse.Namespace]:
    """(spec, overrides, namespace) of a command line: the first two are for `load_config`.

    argv: without the program's name (`sys.argv[1:]`). `--config.x.y=value` and
    `--config.x.y value` are accepted anywhere; the namespace holds config, and name and resume or
    the flags that `add` puts in their place. required: whether --config must be
    given; where it is not, spec is "".
    Prints the usage and exits, as argparse does, for --help and for any other flag.
    """
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "any value of the configuration can be overridden:\n"
            "  --config.optimizer.learning_rate=1e-6    a number\n"
            "  --config.teacher.sources=sibling,insights    several values\n"
            "  --config.memory.path none    no value, where the setting allows it\n"
            "A key or value that does not fit is named, with what would fit, before work starts."
        ),
    )
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:ARG]",
        help="Python file with get_config(), ARG is handed to it; or a run's config.json",
    )
    (add or _add_run_flags)(parser)
    overrides, others = [], []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith(SECTION_PREFIX):
            others.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                parser.error(f"{argument}: needs a value; write {argument}=VALUE")
            overrides.append(f"{argument}={value}")
    namespace = parser.parse_args(others)
    return namespace.config or "", overrides, namespace
