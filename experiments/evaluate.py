"""Scores one policy: avg@k, pass@k, majority@k, headroom, per subtask, strict and lenient.

    python -m experiments.evaluate --policy runs/quickstart --k 16
    python -m experiments.evaluate --policy my-policy --config configs/sciknoweval.py:physics --k 4
    python -m experiments.evaluate --policy runs/quickstart --memory runs/quickstart --top-k 0,1,3

A policy is whatever names a model: a run's folder, a Hugging Face folder, a hub id. The prompt
holds the problem alone; with --memory it is scored once for each --top-k, with the bank's insights
of the problem and its nearest behaviors in the prompt, 0 for the problem alone.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments import scoring
from experiments.scoring import Scores
from pmd_jax.evaluate import chosen_problems
from pmd_jax.tasks.task import load_task
from pmd_jax.telemetry import percent


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", required=True, help="a run, a folder, pypi:NAME or a hub id")
    parser.add_argument("--memory", help="a bank, or the run that has it")
    parser.add_argument("--top-k", default="0,3", help="behaviors in the prompt, by commas (0,3)")
    scoring.add_flags(parser)


def _run(spec: str, overrides: list[str], flags: argparse.Namespace) -> None:
    config = scoring.configuration(spec, overrides, flags.policy, flags)
    memories: list[scoring.Memory | None] = [None]
    if flags.memory:
        ks = scoring.whole_numbers("--top-k", flags.top_k, least=0)
        memories = [None] if 0 in ks else []
        memories += scoring.read_memory(flags.memory, [k for k in ks if k])
    task = load_task(config.task)
    policy = scoring.load(flags.policy, config, task, with_memory=bool(flags.memory))
    found = [scoring.scores_of(flags.policy, policy, task, config, memory) for memory in memories]
    asked = Counter(problem.subtask for problem in chosen_problems(task, config.evaluation))
    show(found, asked, Console())
    scoring.write(flags.out, found, task=config.task.name, seed=config.seed)


def show(found: Sequence[Scores], asked: Mapping[str, int], console: Console) -> None:
    """What a person reads. asked: questions by subtask."""
    first = found[0].first
    console.print(_main_table(found))
    console.print(_subtasks(found, asked))
    guesses = ""
    if first.constant is not None:
        guesses = f"chance {percent(first.chance)}, always {first.constant_letter} "
        guesses += f"{percent(first.constant)}; "
    print(
        f"{guesses}fresh: without the {first.num_problems - first.num_fresh} questions that have "
        f"a near copy in training",
        flush=True,
    )
    for scores in found[1:] if found[0].top_k == 0 else found:
        print(
            f"{_about(scores)}: {scores.cited:.1f} memories in a prompt, "
            f"{scores.cut_tokens:.0f} tokens of memory had no room",
            flush=True,
        )


def _about(scores: Scores) -> str:
    return f"top-k {scores.top_k}" if scores.top_k else "none"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        is_text = heading in ("memory", "verifier", "subtask")
        table.add_column(heading, justify="left" if is_text else "right")
    return table


def _main_table(found: Sequence[Scores]) -> Table:
    one = found[0].first
    k = one.num_samples
    table = _table(
        f"{found[0].policy}, {one.num_problems} {one.split} questions, in %",
        "memory",
        "verifier",
        f"avg@{k}",
        "95%",
        f"maj@{k}" if one.tests_passed is None else "tests",
        f"best@{k}",
        "headroom",
        "fresh",
        "format",
    )
    for scores in found:
        for mode, each in scores.by_verifier.items():
            low, high = each.interval
            third = each.majority if each.tests_passed is None else each.tests_passed
            numbers = (each.average, third, each.best, each.headroom, each.fresh)
            average, *rest = ("-" if x is None else f"{100 * x:.1f}" for x in numbers)
            interval = f"{100 * low:.1f} to {100 * high:.1f}"
            table.add_row(
                _about(scores),
                mode,
                average,
                interval,
                *rest,
                f"{100 * each.well_formed:.0f}",
            )
    return table


def _subtasks(found: Sequence[Scores], asked: Mapping[str, int]) -> Table:
    table = _table(
        f"by subtask and memory, {next(iter(found[0].by_verifier))}, in %",
        "subtask",
        "questions",
        *map(_about, found),
    )
    for name, count in sorted(asked.items()):
        values = (scores.first.by_subtask[name] for scores in found)
        table.add_row(name, str(count), *(f"{100 * value:.1f}" for value in values))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 1 failed, 2 bad input, 130 Ctrl-C."""
    return scoring.command(argv, __doc__ or "", _flags, _run)


if __name__ == "__main__":
    sys.exit(main())
