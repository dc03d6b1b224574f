"""Policies scored on a task, with or without memory: what evaluate, scaling and transfer share.

What is asked, and how, is a configuration: the one that `--config` names, else that of the run
which `--policy` names, else the defaults. Scores of several policies are of the same questions and
the same draws.

Left out: how scores are computed (pmd_jax/evaluate.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pmd_jax import settings
from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.embedding import make_embed, query_prefix
from pmd_jax.evaluate import Evaluation, answer, chosen_problems, score
from pmd_jax.memory.bank import Bank
from pmd_jax.memory.recall import Recall
from pmd_jax.memory.retrieval import Retriever
from pmd_jax.memory.store import find_bank
from pmd_jax.memory.teacher import build_memory_prompts
from pmd_jax.policy.bar import progress_bar
from pmd_jax.policy.families import read_config
from pmd_jax.policy.hub import FetchError
from pmd_jax.policy.policy import Policy, find_model, load_policy
from pmd_jax.policy.sharding import make_mesh
from pmd_jax.policy.tokenizer import Tokenizer
from pmd_jax.records import Message
from pmd_jax.rollout import Group
from pmd_jax.tasks.task import Task, TaskConfig
from pmd_jax.trainer import check_fit


@dataclasses.dataclass(frozen=True)
class Memory:
    """A bank as inference reads it. name: where it lies. top_k: behaviors in a prompt."""

    name: str
    bank: Bank
    top_k: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """One policy, with one memory or none. by_verifier: of the same samples, as each grades them.

    cited: memories in a prompt, on average; cut_tokens: of memory that found no room there.
    """

    policy: str
    memory: str
    top_k: int
    cited: float
    cut_tokens: float
    by_verifier: dict[str, Evaluation]

    @property
    def first(self) -> Evaluation:
        """As the strictest, or the official, verifier grades."""
        return next(iter(self.by_verifier.values()))

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds; a tuple becomes its list."""
        return dataclasses.asdict(self)


# --- the command line ---------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the commands share."""
    parser.add_argument(
        "--task",
        metavar="NAME[:SUBJECT]",
        help="scicalc, sciknoweval:physics, ...; the configuration's own by default",
    )
    parser.add_argument("--k", type=int, help="samples of each question")
    parser.add_argument("--out", type=Path, help="a new JSON file for all scores")


def add_verifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verifier",
        default="",
        help="strict or lenient of letters, official or sdpo of programs; the first by default",
    )


def chosen_verifier(name: str, task: Task) -> str:
    """The verifier that `--verifier` names, or the task's first. Raises ValueError."""
    known = list(task.verifiers())
    if name and name not in known:
        raise ValueError(
            f"--verifier: must be one of {', '.join(known)} for {task.config.name}; got {name!r}"
        )
    return name or known[0]


def configuration(spec: str, overrides: Sequence[str], policy: str, flags: Any) -> RunConfig:
    """What is asked and how. Raises ValueError, on one line."""
    own = Path(policy).expanduser() / "config.json"
    if spec:
        config = settings.load_config(spec)
    elif (own.parent / "metrics.jsonl").is_file():
        config = settings.load_config(str(own))
    else:
        config = settings.to_config_dict(
            RunConfig(model=ModelSection(policy), task=TaskConfig(num_train=64, num_test=256))
        )
    if flags.task:
        _set(config.task, *flags.task.partition(":")[::2])
    if flags.k is not None:
        config.evaluation.num_samples = flags.k
    settings.override(config, overrides)
    return settings.build(RunConfig, config)


def _set(task: ConfigDict, name: str, subject: str) -> None:
    with task.ignore_type():
        task.name, task.subject = settings.CommandLineText(name), subject


def command(
    argv: Sequence[str] | None,
    description: str,
    add: Callable[[argparse.ArgumentParser], Any],
    run: Callable[[str, list[str], argparse.Namespace], None],
) -> int:
    """Reads a command line and runs it; exit code 0 done, 1 failed, 2 bad input, 130 Ctrl-C."""
    given = sys.argv[1:] if argv is None else argv
    spec, overrides, flags = settings.parse_arguments(given, description, add, required=False)
    try:
        if flags.out and flags.out.exists():
            raise ValueError(f"--out {flags.out}: must be a new file; it exists, name another")
        run(spec, overrides, flags)
    except (ValueError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def whole_numbers(flag: str, text: str, least: int) -> list[int]:
    """ "1,3,5" -> [1, 3, 5]. Raises ValueError for anything else, or a number below `least`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= least for part in parts):
        raise ValueError(
            f"{flag}: must be whole numbers from {least} on, by commas, such as 1,3,5; got {text!r}"
        )
    return list(dict.fromkeys(map(int, parts)))


def write(file: Path | None, scores: Sequence[Scores], **about: Any) -> None:
    """All scores as one JSON document, where a file was asked for."""
    if file is not None:
        content = {**about, "scores": [each.to_dict() for each in scores]}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {file}")


# --- scores -------------------------------------------------------------------------------------


def read_memory(path: str, top_k: Sequence[int]) -> list[Memory]:
    """The bank of a run, a step or a folder, once for each k. Raises ValueError."""
    bank = Bank.load(find_bank(Path(path).expanduser()))
    return [Memory(path, bank, k) for k in top_k]


def load(path: str, config: RunConfig, task: Task, with_memory: bool = False) -> Policy:
    """A policy for inference, checked before its weights are read, on one line."""
    files = find_model(path).files
    if with_memory:
        check_fit(config, task, Tokenizer.load(files), read_config(files), 1)
    mesh, model = make_mesh(config.mesh), config.model
    with progress_bar(f"reading {path}") as bar:
        return load_policy(
            path, model.dtype, mesh, None, config.engine, bar, attention=model.attention
        )


def scores_of(
    name: str, policy: Policy, task: Task, config: RunConfig, memory: Memory | None = None
) -> Scores:
    """The policy's answers, graded by each verifier."""
    chats: list[tuple[Message, ...]] | None = None
    cited = cut = 0.0
    if memory is not None:
        chats, cited, cut = _with_memory(memory, policy, task, config)
    began = time.perf_counter()
    groups = answer(
        policy, task, config.evaluation, config.rollout.max_new_tokens, config.seed, chats
    )
    seconds = time.perf_counter() - began
    return Scores(
        policy=name,
        memory=memory.name if memory else "",
        top_k=memory.top_k if memory else 0,
        cited=cited,
        cut_tokens=cut,
        by_verifier={
            name: _graded(groups, dataclasses.replace(task, verifier=verifier), config, seconds)
            for name, verifier in task.verifiers().items()
        },
    )


def _graded(groups: Sequence[Group], task: Task, config: RunConfig, seconds: float) -> Evaluation:
    graded = [
        dataclasses.replace(
            group,
            verdicts=tuple(task.verify(group.problem, rollout.text) for rollout in group.rollouts),
        )
        for group in groups
    ]
    return score(graded, task, config.evaluation.split, seconds)


def _with_memory(
    memory: Memory, policy: Policy, task: Task, config: RunConfig
) -> tuple[list[tuple[Message, ...]], float, float]:
    """(chats, memories cited in each on average, tokens of memory left out on average)."""
    problems = chosen_problems(task, config.evaluation)
    retriever = Retriever(make_embed(config.embedding), query_prefix(config.embedding))
    recall = Recall([p for split in task.splits.values() for p in split], retriever)
    shown = dataclasses.replace(
        config.teacher, sources=("insights", "behaviors"), top_k=memory.top_k
    )
    prompts = build_memory_prompts(
        problems,
        recall(0, memory.bank, problems, memory.top_k),
        task.student_messages,
        policy.tokenizer,
        shown,
    )
    cited = sum(len(prompt.cited) for prompt in prompts) / len(prompts)
    cut = sum(sum(prompt.cut_tokens.values()) for prompt in prompts) / len(prompts)
    return [prompt.messages for prompt in prompts], cited, cut
