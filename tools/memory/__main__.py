"""A saved memory bank at hand: read it, search it, pass it on, compare it, check it.

    python -m tools.memory show runs/quickstart --level behavior
    python -m tools.memory search runs/quickstart "molar mass" --top-k 3
    python -m tools.memory export runs/quickstart bank.zip
    python -m tools.memory import bank.zip my-bank        # then --config.memory.path=my-bank
    python -m tools.memory diff runs/a runs/b
    python -m tools.memory diff runs/a --steps 2 5
    python -m tools.memory validate runs/quickstart

BANK is a run's folder, the folder of one of its steps (RUN/checkpoints/STEP), a bank's folder
(RUN/memory), or what export wrote, be it a folder or an archive. Tables on a terminal, plain lines
elsewhere, JSON lines with --json.

The exit code is 0; 1 where validate found a problem or diff a difference; 2 for bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pmd_jax.memory.bank import Bank
from tools.memory import artefact, views
from tools.memory.card import Card, origin_of, run_config
from tools.memory.validate import validate

LIMIT = 20
"""Entries of a level on a terminal, where no other number is asked for."""


def show(options: argparse.Namespace) -> int:
    bank = _bank(options.bank)
    form = _form(options)
    limit = options.limit if options.limit is not None else LIMIT if form == "table" else 0
    levels = [options.level] if options.level else views.LEVELS
    found = views.entries(bank, levels)
    chosen = views.selected(found, options.problem, options.subject, options.step, limit)
    views.show(bank, chosen, form, Console(highlight=False))
    return 0


def search(options: argparse.Namespace) -> int:
    with artefact.opened(options.bank) as folder:
        bank = Bank.load(folder)
        about = run_config(folder) or origin_of(folder)
    found = views.entries(bank, [options.level] if options.level else views.LEVELS)
    words = " ".join(options.words)
    near, how = views.nearest(found, words, options.top_k, about.get("embedding", {}))
    print(f"nearest by {how}", file=sys.stderr)
    views.print_entries(near, _form(options), Console(highlight=False))
    return 0


def export_bank(options: argparse.Namespace) -> int:
    card = artefact.export_bank(options.bank, options.out)
    print(f"artefact {options.out}: {_counted(card)}, digest {card.digest[:12]}\n{card.licence}")
    return 0


def import_bank(options: argparse.Namespace) -> int:
    card = artefact.import_bank(options.artefact, options.out)
    print(
        f"bank {options.out}: {_counted(card)}, digest {card.digest[:12]}; use it with "
        f"--config.memory.path={options.out}\n{card.licence}"
    )
    return 0


def diff(options: argparse.Namespace) -> int:
    if (options.other is None) == (options.steps is None):
        raise ValueError(
            "diff: must be given two banks, or one and --steps N M; got "
            + ("both" if options.steps else "one bank alone")
        )
    before = _bank(options.bank)
    if options.other is not None:
        after = _bank(options.other)
    else:
        before, after = (views.at_step(before, step) for step in options.steps)
    return views.diff(before, after, _form(options), Console(highlight=False))


def check(options: argparse.Namespace) -> int:
    with artefact.opened(options.bank) as folder:
        report = validate(folder)
    for line in report.checked:
        print(f"checked  {line}")
    for line in report.problems:
        print(f"PROBLEM  {views.one_line(line.replace(str(folder), str(options.bank)))}")
    print(f"{options.bank}: {len(report.problems) or 'no'} problems")
    return int(bool(report.problems))


def _bank(path: Path) -> Bank:
    with artefact.opened(path) as folder:
        return Bank.load(folder)


def _form(options: argparse.Namespace) -> views.Form:
    return "json" if options.json else "table" if sys.stdout.isatty() else "lines"


def _counted(card: Card) -> str:
    names = ("experiences", "insights", "behaviors")
    return ", ".join(f"{card.counts[name]:,} {name}" for name in names)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.memory", description=__doc__, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        one.set_defaults(run=run)
        return one

    def takes_bank(one: argparse.ArgumentParser, name: str = "bank") -> None:
        one.add_argument(name, metavar="BANK", type=Path, help="run, step, bank or artefact")

    def takes_json(one: argparse.ArgumentParser) -> None:
        one.add_argument("--json", action="store_true", help="one JSON object per line")

    one = command("show", show, "sizes per level, then entries")
    takes_bank(one)
    one.add_argument("--level", choices=views.LEVELS, help="of this level alone")
    one.add_argument("--problem", metavar="ID", help="of this problem, or abstracted from it")
    one.add_argument("--subject", help="of problems of this subject")
    one.add_argument("--step", type=int, help="written (or confirmed) at this step")
    one.add_argument(
        "--limit",
        type=lambda text: _at_least(0, text),
        help=f"at most so many of each level, 0 for all; on a terminal {LIMIT}, else all",
    )
    takes_json(one)

    one = command("search", search, "entries nearest to some words")
    takes_bank(one)
    one.add_argument("words", metavar="WORDS", nargs="+")
    one.add_argument("--top-k", type=lambda text: _at_least(1, text), default=5)
    one.add_argument("--level", choices=views.LEVELS, help="of this level alone")
    takes_json(one)

    one = command("export", export_bank, "a bank with a card that says where its texts come from")
    takes_bank(one)
    one.add_argument("out", metavar="OUT", type=Path, help="new folder, .zip or .tar.gz")

    one = command("import", import_bank, "check an artefact and make a bank's folder of it")
    one.add_argument("artefact", metavar="ARTEFACT", type=Path, help="what export wrote")
    one.add_argument("out", metavar="OUT", type=Path, help="new folder")

    one = command("diff", diff, "what two banks, or two steps of one, do not have in common")
    takes_bank(one)
    one.add_argument("other", metavar="OTHER", type=Path, nargs="?", help="the later bank")
    one.add_argument("--steps", type=int, nargs=2, metavar=("N", "M"), help="of BANK, by replay")
    takes_json(one)

    one = command("validate", check, "check every digest, event, reference and capacity")
    takes_bank(one)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {views.one_line(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
