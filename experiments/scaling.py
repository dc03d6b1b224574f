"""Test-time scaling: how scores grow with the samples of a question, for one policy or several.

    python -m experiments.scaling --policy runs/pmd --policy runs/sdpo --k 64

pass@k, majority@k and their difference, the verifier's headroom, for k = 1, 2, 4, ..., K from K
samples: smaller k are expectations over all choices of k of the K, exactly, so they are unbiased
and need no further samples. Several policies answer the same questions; each is paired with the
first, and the questions that only one of them solves are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments import scoring
from experiments.scoring import Scores
from pmd_jax.evaluate import Evaluation, Interval
from pmd_jax.metrics import solved_sets
from pmd_jax.tasks.task import load_task
from pmd_jax.telemetry import percent


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy", action="append", required=True, help="a run, a folder, ...; again for more"
    )
    scoring.add_flags(parser)
    scoring.add_verifier(parser)


def _run(spec: str, overrides: list[str], flags: argparse.Namespace) -> None:
    config = scoring.configuration(spec, overrides, flags.policy[0], flags)
    task, console = load_task(config.task), Console()
    verifier = scoring.chosen_verifier(flags.verifier, task)
    found = []
    for path in flags.policy:
        policy = scoring.load(path, config, task)
        found.append(scoring.scores_of(path, policy, task, config))
        console.print(curve_table(path, found[-1].by_verifier[verifier]))
    if len(found) > 1:
        console.print(solved_table(found, verifier))
    scoring.write(flags.out, found, verifier=verifier, seed=config.seed)


def curve_table(policy: str, found: Evaluation) -> Table:
    table = Table(title=f"{policy}, {found.num_problems} {found.split} questions", box=SIMPLE_HEAD)
    votes = ("majority@k", "95%", "headroom") if found.majority_at else ()
    for heading in ("k", "pass@k", "95%", *votes):
        table.add_column(heading, justify="right")
    for k, passed in found.pass_at.items():
        cells = [k, percent(passed), _range(found.pass_at_interval[k])]
        if votes:
            voted = found.majority_at[k]
            cells += [percent(voted), _range(found.majority_at_interval[k])]
            cells.append(percent(passed - voted))
        table.add_row(*cells)
    return table


def _range(interval: Interval) -> str:
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def solved_table(found: Sequence[Scores], verifier: str) -> Table:
    """Each policy beside the first: which questions are solved by one alone."""
    first, *others = (each.by_verifier[verifier] for each in found)
    table = Table(title=f"solved, beside {found[0].policy}", box=SIMPLE_HEAD)
    for heading in ("policy", "solved by", "both", "the first only", "this only", "neither"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for scores, other in zip(found[1:], others, strict=True):
        for name, least in (("any sample", 0.0), ("most samples", 0.5)):
            sets = solved_sets(first.per_problem, other.per_problem, least)
            table.add_row(scores.policy, name, *(str(len(ids)) for ids in sets))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 1 failed, 2 bad input, 130 Ctrl-C."""
    return scoring.command(argv, __doc__ or "", _flags, _run)


if __name__ == "__main__":
    sys.exit(main())
