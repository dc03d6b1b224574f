"""Files of a bank in a folder that is whole or absent.

    folder/manifest.json             format version, the caller's header, sha256 of each file
    folder/events-<number>-<sha>.jsonl   events, oldest first, one a line, canonical

A folder is written beside its place, flushed, and renamed: half a folder is never taken for a
whole one. Where it replaces an older one, that one stands aside as .<folder>.old until then, and is
there still if the process dies between the two renames.

Left out: what the lines mean (bank.py), and where one file ends and the next begins (journal.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def line(record: Mapping[str, Any]) -> bytes:
    """Canonical JSON and a line feed. Escapes keep half surrogates and separators harmless."""
    return (_encode(record) + "\n").encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Damaged(ValueError):
    """A file is missing, or does not have the bytes that were written."""


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One file of events. file: its name, which holds part of the sha256 of its content."""

    file: str
    num_events: int
    num_bytes: int
    sha256: str


def find_bank(path: Path) -> Path:
    """The folder of the bank that `path` names: a bank's own, a run's, or that of one of its steps.

    Raises ValueError for any other.
    """
    for folder in (path, path / "memory", path / "bank", path / "bank" / "bank"):
        if (folder / "manifest.json").is_file():
            return folder
    raise ValueError(
        f"bank {path}: must be a bank's folder, a run's, or a step's (RUN/checkpoints/STEP); no "
        "manifest.json is there; a run saves its bank with its first checkpoint"
    )


@contextlib.contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends well.

    Raises ValueError where `folder` holds anything but a bank.
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
    yield partial
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    if old.exists():
        shutil.rmtree(old)


def _may_replace(folder: Path) -> bool:
    """Whether a folder holds files of ours and nothing else; an empty one does."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    others = [name for name in names - {"manifest.json"} if not name.endswith(".jsonl")]
    return not names or ("manifest.json" in names and not others)


def write(path: Path, content: bytes) -> None:
    """Write a file, down to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link(homes: Sequence[Path], segment: Segment, folder: Path) -> bool:
    """Give `folder` a segment that one of `homes` holds, without writing it again.

    False where no home has it or the file system has no such links.
    """
    for home in homes:
        try:
            if (home / segment.file).stat().st_size == segment.num_bytes:
                os.link(home / segment.file, folder / segment.file)
                return True
        except OSError:
            continue
    return False


def write_manifest(folder: Path, header: Mapping[str, Any], segments: Sequence[Segment]) -> None:
    files = [dataclasses.asdict(segment) for segment in segments]
    manifest = {"format_version": FORMAT_VERSION, **header, "segments": files}
    manifest["sha256"] = sha256(line(manifest))
    write(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(folder: Path) -> tuple[dict[str, Any], list[Segment]]:
    """(header, segments) of a folder. Version 1 kept its events in one file, beside other tables.

    Raises ValueError naming the file that is missing, damaged or of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(_read(path))
        version, digest = manifest["format_version"], manifest.pop("sha256", "")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        if not path.exists():
            raise
        raise Damaged(f"{path}: damaged, not a manifest ({error}); take another copy") from error
    if version not in READABLE_VERSIONS:
        raise ValueError(f"{path}: format_version must be 1 or 2; got {version!r}")
    if version == 1:
        about = manifest["tables"]["events"]
        return manifest, [Segment("events.jsonl", about["records"], -1, about["sha256"])]
    if sha256(line(manifest)) != digest:
        raise Damaged(f"{path}: damaged, it does not give its own sha256; take another copy")
    return manifest, [Segment(**fields) for fields in manifest.pop("segments")]


def read_segment(folder: Path, segment: Segment) -> list[bytes]:
    """The lines of a segment, every byte checked. Raises ValueError naming the file."""
    path = folder / segment.file
    content = _read(path)
    if (found := sha256(content)) != segment.sha256:
        raise Damaged(
            f"{path}: damaged, sha256 must be {segment.sha256} as in manifest.json; got {found}; "
            "take another copy"
        )
    lines = content.splitlines(keepends=True)
    if len(lines) != segment.num_events:
        raise Damaged(f"{path}: damaged, must hold {segment.num_events} events; got {len(lines)}")
    return lines


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{path}: missing; without it the folder is not whole") from error
