"""The events of a bank: a sealed past that leaves memory, and an open end.

Events come as canonical lines. When the open end holds `SEGMENT_BYTES`, it is sealed: a segment
never changes again, so a save links those that an earlier save wrote and writes only what is new.
Where a segment ends depends on the lines alone, so equal histories give equal files.

In memory are the open end and one short note per segment. The sealed past waits in a file without a
name, which the system removes with the process; it is made when the first segment is sealed
(in TMPDIR, or /tmp).

Left out: what events mean and do (bank.py), and how a folder becomes whole (store.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pmd_jax.memory import store
from pmd_jax.memory.store import Segment

SEGMENT_BYTES = 2**20
"""From this size on, the open end is sealed. A save rewrites at most so much that is not new."""

HOMES = 3
"""Folders saved last, in which segments are looked for."""


class Journal:
    """Events in order, appended one by one."""

    def __init__(self) -> None:
        self._num_events = 0
        self._sha = hashlib.sha256()
        self._sealed: list[Segment] = []
        self._past: IO[bytes] | None = None
        self._open: list[bytes] = []
        self._open_bytes = 0
        self._homes: list[Path] = []

    def __len__(self) -> int:
        """Events so far."""
        return self._num_events

    def append(self, line: bytes) -> None:
        """Write down one event, a line of `store.line`."""
        self._sha.update(line)
        self._open.append(line)
        self._open_bytes += len(line)
        self._num_events += 1
        if self._open_bytes >= SEGMENT_BYTES:
            self._seal()

    def digest(self) -> str:
        """sha256 (hex) of all lines so far: equal where the same was written, in the same order."""
        return self._sha.hexdigest()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All events as plain JSON values, oldest first, read back from where they are."""
        for content in self._contents():
            yield from map(json.loads, content.splitlines())

    # --- segments -------------------------------------------------------------------------------

    def _end(self) -> tuple[Segment, bytes]:
        content = b"".join(self._open)
        sha = store.sha256(content)
        name = f"events-{len(self._sealed):05}-{sha[:12]}.jsonl"
        return Segment(name, len(self._open), len(content), sha), content

    def _seal(self) -> None:
        segment, content = self._end()
        if self._past is None:
            self._past = tempfile.TemporaryFile()  # noqa: SIM115  as long as the journal
        self._past.seek(0, os.SEEK_END)
        self._past.write(content)
        self._past.flush()
        self._sealed.append(segment)
        self._open, self._open_bytes = [], 0

    def _contents(self) -> Iterator[bytes]:
        """The bytes of each sealed segment, then those of the open end."""
        offset = 0
        for segment in list(self._sealed):
            yield self._sealed_bytes(offset, segment.num_bytes)
            offset += segment.num_bytes
        yield b"".join(self._open)

    def _sealed_bytes(self, offset: int, num_bytes: int) -> bytes:
        assert self._past is not None
        self._past.seek(offset)
        return self._past.read(num_bytes)

    # --- files ----------------------------------------------------------------------------------

    def save(self, folder: Path, header: Mapping[str, Any]) -> None:
        """A folder that holds all events by itself, or nothing; what is new is written.

        Raises ValueError where `folder` holds anything but a bank.
        """
        with store.whole_or_absent(folder) as partial:
            homes = [home for home in self._homes if home.is_dir()]
            offset = 0
            for segment in self._sealed:
                if not store.link(homes, segment, partial):
                    content = self._sealed_bytes(offset, segment.num_bytes)
                    store.write(partial / segment.file, content)
                    (partial / segment.file).chmod(0o444)  # several folders may share it
                offset += segment.num_bytes
            end, content = self._end()
            store.write(partial / end.file, content)
            store.write_manifest(partial, {**header, "digest": self.digest()}, [*self._sealed, end])
        self._remember(folder)

    @classmethod
    def load(cls, folder: Path) -> tuple[dict[str, Any], Journal]:
        """(header, journal) of a folder, every byte checked.

        Raises ValueError naming the file that is missing, damaged or of another format.
        """
        header, segments = store.read_manifest(folder)
        journal = cls()
        for segment in segments:
            for line in store.read_segment(folder, segment):
                journal.append(line)
        if header["format_version"] > 1 and header["digest"] != journal.digest():
            raise store.Damaged(
                f"{folder}: damaged, its events do not give the digest in manifest.json; "
                "take another copy"
            )
        journal._remember(folder)
        return header, journal

    def _remember(self, folder: Path) -> None:
        folder = folder.absolute()
        self._homes = [folder, *(home for home in self._homes if home != folder)][:HOMES]
