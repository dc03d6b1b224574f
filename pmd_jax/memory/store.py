"""Tables of JSON records in a folder that is whole or absent.

    folder/manifest.json     format version, the caller's header, records and sha256 of each table
    folder/<table>.jsonl     one record a line, canonical: the same records give the same bytes

A folder is written beside its place, flushed, and renamed: half a folder is never taken for a
whole one. Where it replaces an older one, that one stands aside as .<folder>.old until then, and is
there still if the process dies between the two renames.

Left out: what the tables mean (bank.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1

Table = Sequence[Mapping[str, Any]]


def lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Canonical JSON Lines. Escapes keep half surrogates and line separators harmless."""
    texts = (
        json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
        for record in records
    )
    return "".join(texts).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_tables(folder: Path, header: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
    """Write `tables` and `header` into `folder`, in place of tables that it held before.

    Raises ValueError where `folder` holds anything else.
    """
    if folder.exists() and not _may_replace(folder):
        raise ValueError(
            f"{folder}: must be new, empty, or written by this program; it holds other files, "
            "name another"
        )
    partial, old = (folder.with_name(f".{folder.name}.{part}") for part in ("partial", "old"))
    if partial.exists():  # left by a save that was interrupted
        shutil.rmtree(partial)
    if old.exists() and folder.exists():
        shutil.rmtree(old)
    partial.mkdir(parents=True)
    files = {}
    for name, records in tables.items():
        content = lines(records)
        files[name] = {"records": len(records), "sha256": sha256(content)}
        _write(partial / f"{name}.jsonl", content)
    manifest = {"format_version": FORMAT_VERSION, **header, "tables": files}
    _write(partial / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    if old.exists():
        shutil.rmtree(old)


def read_tables(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(header, tables) of a folder, every byte checked.

    Raises ValueError naming the file that is missing, damaged or of another format.
    """
    path = folder / "manifest.json"
    content = _read(path)
    try:
        manifest = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error}); take another copy") from error
    if (version := manifest.pop("format_version", None)) != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}; got {version!r}")
    tables = {
        name: _read_table(folder / f"{name}.jsonl", about["records"], about["sha256"])
        for name, about in manifest.pop("tables").items()
    }
    return manifest, tables


def _may_replace(folder: Path) -> bool:
    """Whether a folder holds tables of ours and nothing else; an empty one does."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    others = [name for name in names - {"manifest.json"} if not name.endswith(".jsonl")]
    return not names or ("manifest.json" in names and not others)


def _read_table(path: Path, num_records: int, digest: str) -> list[dict[str, Any]]:
    content = _read(path)
    if (found := sha256(content)) != digest:
        raise ValueError(
            f"{path}: damaged, sha256 must be {digest} as in manifest.json; got {found}; "
            "take another copy"
        )
    records = [json.loads(line) for line in content.split(b"\n") if line]
    if len(records) != num_records:
        raise ValueError(f"{path}: damaged, must hold {num_records} records; got {len(records)}")
    return records


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; without it the folder is not whole") from error


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
