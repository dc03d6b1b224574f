"""Who may import whom: the import graph of pmd_jax, read from its source.

The policy cannot import memory, so inference is free of memory by construction; memory and tasks
cannot import JAX, so half of the project runs in milliseconds. Imports inside functions count.

RULES names, for each room (a folder or a file of pmd_jax), what it may import of ours and whether
it may import JAX and its libraries. A file without a rule fails: give it one, on its level.
Rooms that do not exist yet are allowed to be absent.
"""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "pmd_jax"

JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
OUTSIDE = ("configs", "experiments", "tools", "tests")  # they import the library, never it them
OPTIONAL = (
    "torch",
    "transformers",
    "wandb",
    "mlflow",
)  # may be imported in a function, never on load
WATCHED = ("pmd_jax", *JAX, *OUTSIDE)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a room may import of ours, as dotted prefixes below pmd_jax, and whether JAX too."""

    ours: tuple[str, ...]
    jax: bool = True

    def allows(self, name: str) -> bool:
        ours = tuple(f"pmd_jax.{prefix}" if prefix else "pmd_jax" for prefix in self.ours)
        return within(name, ours + (JAX if self.jax else ()))


CORRIDOR = (
    "distributed",
    "rollout",
    "metrics",
    "telemetry",
    "tracking",
    "embedding",
    "endpoint",
    "ordering",
)
LEVEL_3 = Rule(("policy", "tasks", "records", *CORRIDOR))
LEVEL_4 = Rule((*LEVEL_3.ours, "distill.update", "memory.bank"))
ROOMS = ("records", "settings", "tasks", "memory", "policy", "distill")

RULES = {
    "__init__.py": Rule(("policy",), jax=False),
    # 0: the nouns, and the machinery of configurations
    "records.py": Rule((), jax=False),
    "settings.py": Rule((), jax=False),
    "health.py": Rule((), jax=False),
    # 1: the two wings, blind to each other
    "tasks": Rule(("records", "tasks"), jax=False),
    "memory": Rule(("records", "memory"), jax=False),
    "policy": Rule(("policy",)),
    # 2: sees teacher prompts, never the bank
    "distill": Rule(("policy", "records", "distill")),
    # 3 and 4: the corridor, then what measures and saves
    **{f"{name}.py": LEVEL_3 for name in CORRIDOR},
    "evaluate.py": LEVEL_4,
    "checkpoint.py": LEVEL_4,
    # 5: composes the configurations of all rooms
    "config.py": Rule((*ROOMS, *CORRIDOR, "evaluate", "checkpoint", "health")),
    # 5: what a step found, for the log and for who asks why it failed
    "replay.py": Rule((*LEVEL_3.ours, "distill")),
    "steplog.py": Rule((*LEVEL_3.ours, "distill")),
    # 6: the only file where memory meets distillation, and the run around it
    "interrupts.py": Rule(("distributed",)),
    "runfolder.py": Rule(("settings", "config")),
    "trainer.py": Rule(("",)),
    "run.py": Rule(("",)),
}


# --- reading imports ------------------------------------------------------------------------


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every name that is imported below `tree`, `importlib.import_module("x")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: imports must be absolute")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield str(name.value)


def imported_on_load(tree: ast.AST) -> Iterator[str]:
    """The names imported when the module is: all but those in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign):
            yield from imported_names(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_on_load(node)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def broken_rules(package: Path) -> list[str]:
    """One line for each file without a rule, and for each import that its rule does not allow."""
    broken = []
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package)
        rule = RULES.get(relative.parts[0])
        if rule is None:
            broken.append(f"{relative} has no rule in tests/test_layers.py")
            continue
        tree = ast.parse(file.read_text())
        broken += [
            f"{relative} imports {name}"
            for name in imported_names(tree)
            if within(name, WATCHED) and not rule.allows(name)
        ]
        broken += [
            f"{relative} imports {name} on load; import it in the function that needs it"
            for name in imported_on_load(tree)
            if within(name, OPTIONAL)
        ]
    return broken


# --- the package ----------------------------------------------------------------------------


def test_every_file_imports_only_what_its_room_may():
    broken = broken_rules(PACKAGE)
    assert not broken, "\n".join(broken)


def test_memory_and_tasks_run_without_jax():
    """Not only in their own source: nothing that they import brings JAX in."""
    rooms = [room for room, rule in RULES.items() if not rule.jax and (PACKAGE / room).exists()]
    files = [
        file
        for room in rooms
        for file in ((PACKAGE / room).rglob("*.py") if "." not in room else [PACKAGE / room])
    ]
    modules = [
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted(files)
    ]
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        f"print([name for name in {JAX} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


# --- the rules themselves, on packages made up here -----------------------------------------


@pytest.fixture
def broken(tmp_path):
    def of(path: str, source: str) -> list[str]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
        return broken_rules(tmp_path)

    return of


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("memory/bank.py", "import json\nfrom pmd_jax.records import Insight"),
        ("memory/bank.py", "import numpy as np\nfrom pmd_jax.memory import retrieval"),
        ("policy/model.py", "import jax\nfrom pmd_jax.policy import cache"),
        ("policy/model.py", "def check():\n    import transformers"),
        ("distill/update.py", "import optax\nfrom pmd_jax import policy"),
        ("rollout.py", "from pmd_jax import records, telemetry\nfrom pmd_jax.tasks import scicalc"),
        ("evaluate.py", "from pmd_jax.memory.bank import Bank\nfrom pmd_jax.distill import update"),
        ("config.py", "from pmd_jax import checkpoint, memory, settings"),
        ("trainer.py", "import pmd_jax\nfrom pmd_jax.memory import teacher"),
    ],
)
def test_what_a_room_may_import_passes(broken, path, source):
    assert broken(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        ("records.py", "from pmd_jax import settings", "pmd_jax.settings"),
        ("settings.py", "import jax", "jax"),
        ("memory/bank.py", "def score():\n    import jax.numpy as jnp", "jax.numpy"),
        ("memory/bank.py", "from pmd_jax.tasks.scicalc import make", "pmd_jax.tasks.scicalc.make"),
        ("memory/bank.py", "from pmd_jax import policy", "pmd_jax.policy"),
        ("memory/bank.py", "import pmd_jax", "pmd_jax"),
        ("tasks/scicalc.py", "from pmd_jax.memory import bank", "pmd_jax.memory.bank"),
        ("tasks/scicalc.py", "import flax", "flax"),
        ("policy/model.py", "from pmd_jax import records", "pmd_jax.records"),
        ("policy/model.py", "import_module('pmd_jax.memory')", "pmd_jax.memory"),
        ("distill/batch.py", "from pmd_jax.memory import bank", "pmd_jax.memory.bank"),
        ("rollout.py", "from pmd_jax.distill import update", "pmd_jax.distill.update"),
        ("rollout.py", "from pmd_jax.memory import bank", "pmd_jax.memory.bank"),
        ("evaluate.py", "from pmd_jax.memory import teacher", "pmd_jax.memory.teacher"),
        ("evaluate.py", "from pmd_jax.distill import batch", "pmd_jax.distill.batch"),
        ("config.py", "from pmd_jax import trainer", "pmd_jax.trainer"),
        ("trainer.py", "from configs import quickstart", "configs.quickstart"),
        ("trainer.py", "def f():\n    import tests.fakes", "tests.fakes"),
    ],
)
def test_any_other_import_is_named_even_inside_a_function(broken, path, source, name):
    assert broken(path, source) == [f"{path} imports {name}"]


@pytest.mark.parametrize("path", ["surprise.py", "attic/old.py"])
def test_a_file_without_a_rule_is_named(broken, path):
    assert broken(path, "") == [f"{path} has no rule in tests/test_layers.py"]


@pytest.mark.parametrize(
    "source",
    ["import torch", "try:\n    from torch import nn\nexcept ImportError:\n    nn = None"],
)
def test_an_optional_package_is_not_imported_on_load(broken, source):
    (line,) = broken("policy/weights.py", source)
    assert line.endswith("on load; import it in the function that needs it")


def test_a_relative_import_is_refused(broken):
    with pytest.raises(ValueError, match="line 1: imports must be absolute"):
        broken("records.py", "from . import policy")
