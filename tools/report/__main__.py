"""A run, or several side by side, as one HTML file that needs no network.

    python -m tools.report runs/quickstart
    python -m tools.report runs/pmd runs/sdpo --out comparison.html

The page holds figures of learning, test-time scaling, memory and cost, and a browser of the bank
with its provenance. By default it is report.html in the folder of the run, or, of several, beside
the first run. A run that is still going, was killed, or has no memory gives a page that says so.
A file that is no report of this program is never overwritten.

Needs plotly: pip install -r requirements-report.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GENERATOR = b'<meta name="generator" content="pmd_jax tools.report">'


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0 written, and 2 bad input or a missing package, named on one line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("plotly") is None:
        print(
            "error: tools.report needs plotly; pip install -r requirements-report.txt",
            file=sys.stderr,
        )
        return 2
    try:
        out = options.out or default_out(options.runs)
        check_out(out)
        print(write(options.runs, out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def default_out(folders: Sequence[Path]) -> Path:
    return (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"


def check_out(path: Path) -> None:
    """Raises ValueError where writing would destroy something else."""
    if path.is_dir():
        raise ValueError(f"--out {path}: must be a file; it is a folder, add a name to it")
    if path.exists() and GENERATOR not in path.read_bytes()[:2000]:
        raise ValueError(
            f"--out {path}: must be new or a report of this program; it is another file, "
            "give another name with --out"
        )


def write(folders: Sequence[Path], out: Path) -> str:
    """Builds the page and puts it in place whole. Returns what to tell."""
    from tools.report.page import build
    from tools.report.runs import read_runs

    began = time.perf_counter()
    text = build(read_runs(folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, out)
    seconds, size = time.perf_counter() - began, out.stat().st_size / 2**20
    return f"{out}: {size:.1f} MiB in {seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
