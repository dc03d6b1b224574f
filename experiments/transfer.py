"""Does a memory help another policy? Every bank in the prompt of every policy, for each top-k.

    python -m experiments.transfer --policy small --policy large --bank runs/pmd \\
        --bank runs/frozen-policy --top-k 1,3,5 --config configs/sciknoweval.py:physics

Banks are runs (a co-evolved memory, that of a frozen policy) or folders of banks. Each policy is
also scored without memory; what a bank adds is the paired difference to that, question by question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments import scoring
from experiments.scoring import Scores
from pmd_jax.metrics import paired_bootstrap
from pmd_jax.tasks.task import load_task
from pmd_jax.telemetry import percent


def _flags(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("policy", "a run, a folder, pypi:NAME or a hub id"),
        ("bank", "a run, ..."),
    ):
        parser.add_argument(
            f"--{name}", action="append", required=True, help=f"{what}; again for more"
        )
    parser.add_argument("--top-k", default="1,3,5", help="behaviors in the prompt (1,3,5)")
    scoring.add_flags(parser)
    scoring.add_verifier(parser)


def _run(spec: str, overrides: list[str], flags: argparse.Namespace) -> None:
    config = scoring.configuration(spec, overrides, flags.policy[0], flags)
    ks = scoring.whole_numbers("--top-k", flags.top_k, least=1)
    memories = [memory for bank in flags.bank for memory in scoring.read_memory(bank, ks)]
    task, console = load_task(config.task), Console()
    verifier = scoring.chosen_verifier(flags.verifier, task)
    found = []
    for path in flags.policy:
        policy = scoring.load(path, config, task, with_memory=True)
        of_policy = [
            scoring.scores_of(path, policy, task, config, memory) for memory in (None, *memories)
        ]
        console.print(grid(of_policy, verifier))
        found += of_policy
    scoring.write(flags.out, found, verifier=verifier, seed=config.seed)


def grid(found: Sequence[Scores], verifier: str) -> Table:
    """One policy's scores: first without memory, then with each bank."""
    alone = found[0].by_verifier[verifier]
    table = Table(title=f"{found[0].policy}, avg@{alone.num_samples} in %", box=SIMPLE_HEAD)
    for heading in ("memory", "top-k", "cited", "mean", "less none", "95%", "p"):
        table.add_column(heading, justify="left" if heading == "memory" else "right")
    table.add_row("none", "", "", percent(alone.average))
    ids = sorted(alone.per_problem)
    for scores in found[1:]:
        one = scores.by_verifier[verifier]
        a, b = (np.array([each.per_problem[i] for i in ids]) for each in (one, alone))
        value, low, high, p = paired_bootstrap(a, b)
        table.add_row(
            scores.memory,
            str(scores.top_k),
            f"{scores.cited:.1f}",
            percent(one.average),
            f"{100 * value:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{p:.3f}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 1 failed, 2 bad input, 130 Ctrl-C."""
    return scoring.command(argv, __doc__ or "", _flags, _run)


if __name__ == "__main__":
    sys.exit(main())
