"""Files of a data set on the Hugging Face hub, named "hf:ORG/DATASET" in task.path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def download(path: str, patterns: Sequence[str]) -> Path:
    """The local folder of those of the data set's files that match. Raises ValueError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = path.removeprefix("hf:")
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"config.task.path: could not fetch the dataset {name!r} ({type(error).__name__}); "
            f"give a local folder instead"
        ) from error
