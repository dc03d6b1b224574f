"""A bank that travels: its files beside a card that says where its texts come from.

    OUT/card.json               what this bank is, sha256 and size of each file, its own sha256
    OUT/README.md               the card for a person
    OUT/manifest.json, events-*.jsonl    the bank as it was saved (memory/store.py)

OUT is a folder, or an archive (.zip, .tar.gz) of these files with the card first; equal banks give
equal bytes. An artefact's folder is a bank's folder too, so `memory.path` takes it.

What comes in is not trusted: of an archive only plain files that the card names are unpacked, each
up to its size, and README.md is written anew from the card. The digests tell damage, not who
wrote the card.

Left out: what a bank holds and whether it makes sense (validate.py).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from pmd_jax.memory import store
from tools.memory.card import (
    CARD,
    MAX_CARD_BYTES,
    README,
    Card,
    card_problems,
    is_plain,
    make_card,
    read_card,
    readme,
    to_bytes,
)

ARCHIVES = (".zip", ".tar.gz", ".tgz")
UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    gzip.BadGzipFile,
    RuntimeError,  # zipfile's word for an encrypted member, and for a compression it lacks
)


# --- where a bank is ----------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of the bank that `path` names; an archive is unpacked for as long as the block.

    path: a run's folder, a step's, a bank's, or an artefact. Raises ValueError for anything else.
    """
    if not path.is_file():
        yield store.find_bank(path)
        return
    with tempfile.TemporaryDirectory(prefix="bank-") as scratch:
        try:
            _unpack(path, Path(scratch))
            yield Path(scratch)
        except ValueError as error:  # in the words of who asked
            raise ValueError(str(error).replace(scratch, str(path))) from error


# --- out ----------------------------------------------------------------------------------------


def export_bank(source: Path, out: Path) -> Card:
    """Writes the bank that `source` names as an artefact. `out` must be new or empty."""
    check_new(out)
    with opened(source) as folder:
        card = make_card(folder)
        texts = {CARD: to_bytes(card), README: readme(card).encode()}
        if out.name.endswith(ARCHIVES):
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_name(f".{out.name}.partial")
            _pack(partial, out.name.endswith(".zip"), texts, folder, card)
            os.replace(partial, out)
        else:
            _write_folder(out, texts, folder, card)
    return card


def check_new(out: Path) -> None:
    """Raises ValueError where `out` holds anything: nothing is ever overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: must be new or an empty folder; name another, or remove it")


def _write_folder(out: Path, texts: Mapping[str, bytes], folder: Path, card: Card) -> None:
    with store.whole_or_absent(out) as partial:
        for name, content in texts.items():
            store.write(partial / name, content)
        for name in card.files:
            shutil.copyfile(folder / name, partial / name)


def _pack(path: Path, as_zip: bool, texts: Mapping[str, bytes], folder: Path, card: Card) -> None:
    """An archive whose bytes depend on its content alone: no times, no owners."""
    with contextlib.ExitStack() as stack:
        if as_zip:
            packed = stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED))
        else:
            raw = stack.enter_context(path.open("wb"))
            zipped = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            tarred = stack.enter_context(tarfile.open(fileobj=zipped, mode="w"))
        for name in (*texts, *card.files):
            size = len(texts[name]) if name in texts else card.files[name]["num_bytes"]
            with _content(name, texts, folder) as content:
                if as_zip:
                    about = zipfile.ZipInfo(name)
                    about.compress_type, about.file_size = zipfile.ZIP_DEFLATED, size
                    with packed.open(about, "w") as member:
                        shutil.copyfileobj(content, member)
                else:
                    entry = tarfile.TarInfo(name)
                    entry.size = size
                    tarred.addfile(entry, content)


def _content(name: str, texts: Mapping[str, bytes], folder: Path) -> IO[bytes]:
    return io.BytesIO(texts[name]) if name in texts else (folder / name).open("rb")


# --- in -----------------------------------------------------------------------------------------


def import_bank(artefact: Path, out: Path) -> Card:
    """Checks all of an artefact and writes it into the folder `out`, which must be new or empty."""
    check_new(out)
    with opened(artefact) as folder:
        if not (folder / CARD).is_file():
            raise ValueError(
                f"{artefact}: must be an artefact, with {CARD}; make one of a bank with export"
            )
        card = read_card(folder / CARD)
        for problem in card_problems(folder, card):
            raise ValueError(problem)
        texts = {CARD: (folder / CARD).read_bytes(), README: readme(card).encode()}
        _write_folder(out, texts, folder, card)
    return card


def _unpack(archive: Path, folder: Path) -> None:
    """The files of an archive that its card names; ValueError for any other member."""
    if not archive.name.endswith(ARCHIVES):
        raise ValueError(f"{archive}: must be a folder, or end in {', '.join(ARCHIVES)}")
    allowed = {CARD: MAX_CARD_BYTES}
    seen: set[str] = set()
    try:
        for name, is_file, content in _members(archive):
            if not is_plain(name) or not is_file:
                raise ValueError(
                    f"{archive}: must hold plain files without folders, as export writes them; got "
                    f"{name!r}; do not unpack it"
                )
            if name in seen or name not in allowed:
                rule = "must hold card.json first" if not seen else "must hold what its card names"
                raise ValueError(f"{archive}: {rule}, each file once; got {name!r}")
            seen.add(name)
            read = content.read(allowed[name] + 1)
            if len(read) > allowed[name]:
                raise ValueError(f"{archive}: {name} must have at most {allowed[name]} bytes")
            (folder / name).write_bytes(read)
            if name == CARD:
                files = read_card(folder / CARD).files
                allowed |= {key: about["num_bytes"] for key, about in files.items()}
                allowed[README] = MAX_CARD_BYTES
    except UNREADABLE as error:
        raise ValueError(f"{archive}: damaged ({error}); take another copy") from error
    if not seen:
        raise ValueError(f"{archive}: must hold {CARD} and a bank; it is empty")


def _members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes]]]:
    """(name, whether it is a regular file, content) of each member, in order."""
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)
                is_file = not info.is_dir() and mode in (0, stat.S_IFREG)
                with zipped.open(info) as content:
                    yield info.filename, is_file, content
        return
    with tarfile.open(archive, "r:gz") as tarred:
        for member in tarred:
            packed = tarred.extractfile(member) if member.isreg() else None
            yield member.name, member.isreg(), packed or io.BytesIO()
