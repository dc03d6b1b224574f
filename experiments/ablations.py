"""Rows of the paper's tables under the same budget, several seeds of each, compared.

    python -m experiments.ablations --config configs/study.py --rows pmd,sdpo,grpo --seeds 3
    python -m experiments.ablations --list

Each row is a value of the configuration (rows.py); each cell, a row under a seed, is a run in a
process and a folder of its own: OUTPUT/NAME/ROW/seed-N, as any run leaves it; seed-N.log beside it
has what it printed. The same command again goes on where it was stopped, runs what failed, and
adds the rows or seeds that are new. A cell that fails is reported and does not stop the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.rows import ROWS, TOKENS, config_of, in_order, row_of
from experiments.table import Cell, compare, read_cell, rendered
from pmd_jax import settings
from pmd_jax.config import RunConfig
from pmd_jax.telemetry import duration, percent

COMPILED = ".compiled"  # programs that the cells share


@dataclasses.dataclass(frozen=True)
class Study:
    """Which cells there are, and where."""

    folder: Path
    base: RunConfig
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str

    def cell_folder(self, row: str, seed: int) -> Path:
        return self.folder / row / f"seed-{seed}"

    def config(self, row: str, seed: int) -> RunConfig:
        """Raises ValueError where the row's configuration does not hold."""
        of, budget = row_of(row), 0
        if row.endswith(TOKENS):
            totals = self.cell_folder(self.reference, seed) / "totals.json"
            budget = json.loads(totals.read_text())["sampled_tokens"] if totals.exists() else 1
        bank = self.cell_folder(of.bank_of, seed) / "memory" if of.bank_of else ""
        try:
            config = config_of(row, self.base, str(self.folder / row), seed, str(bank), budget)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
        before = row == self.reference and self.base.evaluation.before
        evaluation = dataclasses.replace(config.evaluation, before=before)
        return dataclasses.replace(config, evaluation=evaluation)

    def needs(self, row: str) -> str:
        """The row whose cell of the same seed must be done before, "" for none."""
        return row_of(row).bank_of or (self.reference if row.endswith(TOKENS) else "")

    def done(self, row: str, seed: int) -> Cell | None:
        """The cell, if its run is over and was of this configuration."""
        folder = self.cell_folder(row, seed)
        if not (folder / "totals.json").is_file():
            return None
        if json.loads((folder / "config.json").read_text()) != settings.to_dict(
            self.config(row, seed)
        ):
            return None
        name = "after, with memory" if row_of(row).scored_with_memory else "after"
        return read_cell(folder, row, seed, name)


def open_study(study: Study) -> None:
    """Notes what the study is, or checks that it is the one that its folder began as.

    Raises ValueError for a folder that holds other files or another study.
    """
    file, now = study.folder / "study.json", settings.to_dict(study.base)
    names = {path.name for path in study.folder.iterdir()} if study.folder.is_dir() else set()
    if not names:
        study.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now, indent=2) + "\n")
        return
    if not file.is_file():
        raise ValueError(
            f"study folder {study.folder}: must be new, empty, or a study's own; it holds other "
            f"files ({', '.join(sorted(names)[:3])}); give another --name"
        )
    before = json.loads(file.read_text())
    changed = sorted(name for name in now if now[name] != before.get(name))
    if changed:
        raise ValueError(
            f"config.{changed[0]}: must be as it was when the study {study.folder} began; run the "
            "same configuration, or give another --name"
        )


def run_cell(study: Study, row: str, seed: int) -> str:
    """Runs a cell to its end in a process of its own. Returns what went wrong, "" for nothing."""
    folder, config = study.cell_folder(row, seed), study.config(row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"seed-{seed}.json"
    file.write_text(json.dumps(settings.to_dict(config), indent=2) + "\n")
    command = [sys.executable, "-m", "experiments.command", "--config", str(file)]
    command.append("--resume-if-saved")
    compiled = {"JAX_COMPILATION_CACHE_DIR": str((study.folder / COMPILED).absolute())}
    log = folder.parent / f"seed-{seed}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**compiled, **os.environ}
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the process got it too: it ends its step and saves
            process.wait()
            raise
    if code == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
    return f"{lines[-1].removeprefix('error: ')} (exit code {code}; {log})"


def run_cells(study: Study) -> tuple[list[Cell], dict[tuple[str, int], str]]:
    """(the cells that are done, what went wrong with the others)."""
    cells, failed = [], {}
    order = [(row, seed) for seed in study.seeds for row in study.rows]
    for number, (row, seed) in enumerate(order, start=1):
        began, about = time.monotonic(), f"cell {number}/{len(order)} {row}, seed {seed}"
        cell = study.done(row, seed)
        if cell is None:
            need = study.needs(row)
            wrong = f"needs {need}, which failed" if (need, seed) in failed else ""
            wrong = wrong or run_cell(study, row, seed)
            cell = None if wrong else study.done(row, seed)
            if cell is None:
                failed[row, seed] = wrong or "its run left no totals"
                print(f"{about}: failed: {failed[row, seed]}", flush=True)
                continue
        cells.append(cell)
        low, high = cell.evaluation["interval"]
        print(
            f"{about}: avg@{cell.evaluation['num_samples']} "
            f"{percent(cell.evaluation['average'])} ({percent(low)} to {percent(high)}), "
            f"well-formed {percent(cell.evaluation['well_formed'])}, "
            f"{duration(time.monotonic() - began)}",
            flush=True,
        )
    return cells, failed


def report(study: Study, cells: Sequence[Cell], failed: dict[tuple[str, int], str]) -> None:
    """The table on the console and, as JSON, in the study's folder."""
    ordered = sorted(cells, key=lambda cell: (study.rows.index(cell.row), cell.seed))
    rows = compare(ordered, study.reference)
    first = ordered[0].evaluation
    guesses = (
        f"chance {percent(first['chance'])}, best constant letter {percent(first['constant'])}; "
        if first["constant"] is not None
        else ""
    )
    Console().print(rendered(rows, study.reference, first["num_samples"]))
    print(
        f"{first['num_problems']} {first['split']} questions; {guesses}intervals over questions",
        flush=True,
    )
    for (row, seed), wrong in failed.items():
        print(f"failed: {row}, seed {seed}: {wrong}", flush=True)
    content: dict[str, Any] = {
        "reference": study.reference,
        "chance": first["chance"],
        "constant": first["constant"],
        "rows": [dataclasses.asdict(row) for row in rows],
        "failed": [{"row": r, "seed": s, "error": wrong} for (r, s), wrong in failed.items()],
    }
    file = study.folder / "table.json"
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"study folder: {study.folder}, its table in {file.name}", flush=True)


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", required=True, help=f"some of {', '.join(ROWS)}, by commas")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on (1)")
    parser.add_argument("--reference", default="pmd", help="the row to compare with (pmd)")
    parser.add_argument("--name", default="ablations", help="name of the study, and of its folder")


def _study(argv: Sequence[str]) -> Study:
    spec, overrides, flags = settings.parse_arguments(argv, __doc__ or "", _flags)
    base = settings.build(RunConfig, settings.load_config(spec, overrides))
    if flags.seeds < 1:
        raise ValueError(f"--seeds: must be at least 1; got {flags.seeds}")
    names = [name.strip() for name in flags.rows.split(",") if name.strip()]
    rows = tuple(in_order([flags.reference, *names], flags.reference))
    study = Study(
        Path(base.output) / flags.name, base, rows, tuple(range(flags.seeds)), flags.reference
    )
    for row in rows:
        study.config(row, 0)
    return study


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 all cells done, 1 some failed, 2 bad input, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if "--list" in argv:
        for name, row in ROWS.items():
            print(f"{name:16} {row.about}")
        return 0
    try:
        study = _study(argv)
        open_study(study)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        cells, failed = run_cells(study)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        return 130
    if cells:
        report(study, cells, failed)
    else:
        print("error: every cell failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
