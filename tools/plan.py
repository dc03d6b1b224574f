"""What a run needs, before a device is rented: bytes per device, what would fit, FLOPs of a step.

    python -m tools.plan --config configs/sciknoweval.py:chemistry --devices 8 --memory 80 \\
        --config.mesh.tensor=2
    python -m tools.plan --config configs/sciknoweval.py:chemistry --devices 16 --chip v5e \\
        --config.mesh.tensor=4

--devices N           devices of the mesh that config.mesh describes (default 8)
--chip NAME           v5e, v5p, v6e or h100 (roofline.CHIPS): its platform, memory, peak and
                      bandwidths, processes after its hosts, and the seconds of a step. A device is
                      a chip: v5e-16 has 16 and v6e-8 has 8, but v5p-8 has 4 and v5p-64 has 32
--processes N         to which the devices belong, each samples with its own (default 1)
--platform NAME       of the devices, gpu, tpu or cpu: auto attention goes by it (default gpu, H100)
--memory GB           of one device, 10^9 bytes each (default 80); 16, 32, 80 and 95 are told too
--prompt-tokens N     length of the student's prompts (default 1024)
--teacher-tokens N    of the teacher's (default: teacher.max_prompt_tokens, the most there can be)
--response-tokens N   of the responses distilled (default: rollout.max_new_tokens, likewise)
--peak-tflops X       of one device: adds seconds, at --mfu of it (default 0.4)
--hbm GB/s            bandwidth of one device's memory, used to --mbu of it (default 0.5)
--link GB/s           what one device takes in from the others
--network Gbit/s      what one host takes in from other hosts (default 25)
--json                one JSON object instead of tables

Only config.json of the model is read; no weights, and no device but the CPU. The command line of a
run works here as it is.

Every line says whether its bytes are counted or estimated (account.py). All FLOPs are those of
matrix products; attention counts masked scores where plain XLA computes them, and for kernels what
causality shows, windows left aside, with what they compute again in their backward pass. Decoding
counts what its program computes with every row in use and the ring full-grown: every place of the
table of members reads its prompt, and there are more of them than rows. The seconds of a step are
estimates by the formulas of roofline.py, in which the ring grows as it would.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from pmd_jax import settings
from pmd_jax.config import RunConfig
from pmd_jax.policy.families import ModelConfig, weight_table
from pmd_jax.policy.kernels import choose_attention
from pmd_jax.policy.model import stacked_shape
from tools.account import Phase, sampling, scores_bytes, sides, training
from tools.roofline import CHIPS, Rates, flops, step_parts
from tools.work import Work, abstract_mesh, read_model

BUDGETS = (16, 32, 80, 95)  # GB of a device: v5e, v6e, H100, v5p


# --- what fits ----------------------------------------------------------------------------------


def with_micro_batch(work: Work, micro_batch: int) -> Work:
    distill = dataclasses.replace(work.config.distill, micro_batch=micro_batch)
    return dataclasses.replace(work, config=dataclasses.replace(work.config, distill=distill))


def micro_batches(work: Work) -> dict[int, int]:
    """{groups at once: bytes of the training phase} of each size that the run would accept.

    All groups at once are always accepted, as micro_batch 0.
    """
    problems = work.config.rollout.problems_per_step
    sizes = [m for m in range(1, problems + 1) if problems % m == 0 and m % work.shards == 0]
    return {m or problems: training(with_micro_batch(work, m)).bytes for m in sizes or [0]}


def row_counts(work: Work) -> dict[int, int]:
    """{engine.max_rows: bytes of the sampling phase}, up to all rollouts of a process at once."""
    rollouts, problems = work.config.rollout.rollouts_per_problem, work.local.problems
    counts = [*range(1, rollouts), *(n * rollouts for n in range(1, problems + 1))]
    return {rows: sampling(work, rows).bytes for rows in counts}


def largest(sizes: Mapping[int, int], gigabytes: float) -> int | None:
    return max((n for n, size in sizes.items() if size <= gigabytes * 1e9), default=None)


# --- the answer ---------------------------------------------------------------------------------


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this tool, and what is left of the command line. A chip fills in the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--chip", choices=sorted(CHIPS))
    parser.add_argument("--processes", type=int)
    parser.add_argument("--platform", choices=("gpu", "tpu", "cpu"))
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--teacher-tokens", type=int, default=0)
    parser.add_argument("--response-tokens", type=int, default=0)
    above = {"memory": None, "peak-tflops": None, "hbm": None, "link": None}
    for name, default in {**above, "mfu": 0.4, "mbu": 0.5, "network": 25.0}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    for name in (*above, "mfu", "mbu", "network"):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value <= 0:
            raise ValueError(f"--{name}: must be above 0; got {value}")
    return with_chip(options), rest


def with_chip(options: argparse.Namespace) -> argparse.Namespace:
    """What the command line leaves out, from the chip or by default.

    Raises ValueError for devices beyond the chip's link.
    """
    filled: dict[str, Any] = {"platform": "gpu", "memory": 80.0, "processes": 1}
    if options.chip:
        chip = CHIPS[options.chip]
        if chip.one_host and options.devices > chip.per_process and options.link is None:
            raise ValueError(
                f"--devices: must be at most {chip.per_process} with --chip {options.chip}, whose "
                f"link ends with its host; got {options.devices}; give --link, the GB/s that a "
                "device has of its host's network"
            )
        filled |= {
            "platform": chip.platform,
            "memory": chip.memory,
            "processes": max(options.devices // chip.per_process, 1),
            "peak_tflops": chip.tflops,
            "hbm": chip.hbm,
            "link": chip.link,
        }
    for name, value in filled.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def with_attention(model: ModelConfig, config: RunConfig, platform: str) -> tuple[ModelConfig, str]:
    """The model with the attention that the run would choose there, and why not the devices' own.

    Raises ValueError for one asked for by name that cannot run there.
    """
    asked, capability = config.model.attention, "9.0" if platform == "gpu" else ""
    name, reason = choose_attention(asked, model, config.model.dtype, platform, capability)
    return dataclasses.replace(model, attention=name), reason


def parameters(model: ModelConfig) -> dict[str, int]:
    """How many there are: in layers and final norm, in the embedding, in a head of its own."""
    of = {w.path[0]: 0 for w in weight_table(model)} | {"head": 0}
    for weight in weight_table(model):
        of[weight.path[0]] += math.prod(stacked_shape(weight, model))
    return {"body": of["layers"] + of["final_norm"], "embedding": of["embed"], "head": of["head"]}


def answer(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """All that is told, as JSON values."""
    rollout, micro, rows = work.config.rollout, micro_batches(work), row_counts(work)

    def phase(of: Phase) -> dict[str, Any]:
        return {
            "fullest_in": of.moment,
            "bytes": of.bytes,
            "lines": [dataclasses.asdict(line) for line in of.lines],
        }

    told: dict[str, Any] = {
        "model": {"path": work.config.model.path, **dataclasses.asdict(work.model)},
        "parameters": parameters(work.model),
        "mesh": dict(work.mesh.shape),
        "processes": work.processes,
        "assumed": {
            "prompt_tokens": work.prompt_tokens,
            "teacher_tokens": work.teacher_tokens,
            "response_tokens": work.response_tokens,
            "teacher_prompts_per_group": work.sizes[1],
            "teacher_tokens_of_each_rollout": work.suffix,
        },
        "problems_per_step": rollout.problems_per_step,
        "rollouts_per_problem": rollout.rollouts_per_problem,
        "memory_gigabytes": options.memory,
        "attention_scores_bytes": max(
            scores_bytes(work, side) for side in sides(work, work.micro_groups // work.shards)
        ),
        "sampling": phase(sampling(work, work.config.engine.max_rows)),
        "training": phase(training(work)),
        "fits": [
            {
                "gigabytes": gigabytes,
                "max_rows": largest(rows, gigabytes),
                "micro_batch": largest(micro, gigabytes),
            }
            for gigabytes in sorted({*BUDGETS, options.memory})
        ],
        "flops": flops(work),
    }
    if options.peak_tflops:
        rate = options.peak_tflops * 1e12 * options.mfu * math.prod(work.mesh.shape.values())
        told["seconds"] = {name: count / rate for name, count in told["flops"].items()}
        told["seconds_assume"] = {"peak_tflops": options.peak_tflops, "mfu": options.mfu}
    if options.peak_tflops and options.hbm and options.link:
        told["step"] = step(work, options)
    return told


def step(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """The seconds of a step, all estimated, and the rates that they assume."""
    names = "chip", "peak_tflops", "mfu", "hbm", "mbu", "link", "network"
    rates = Rates(
        options.peak_tflops * 1e12 * options.mfu,
        options.hbm * 1e9 * options.mbu,
        options.link * 1e9,
        options.network * 1e9 / 8,
    )
    parts = step_parts(work, rates)
    return {
        "assumed": {name: getattr(options, name) for name in names},
        "parts": [dataclasses.asdict(part) for part in parts],
        "seconds": sum(part.seconds for part in parts),
        "received": sum(part.received for part in parts),
    }


def show(told: Mapping[str, Any], console: Console) -> None:
    """The answer as tables of at most 80 columns."""
    model, assumed, sizes = told["model"], told["assumed"], told["parameters"]
    head = f"{sizes['head'] / 1e9:.3f} head" if sizes["head"] else "the head is the embedding"
    about = Table.grid(padding=(0, 2))
    about.add_row("model", f"{model['path']} ({model['family']}), {model['num_layers']} layers")
    about.add_row(
        "parameters",
        f"{sum(sizes.values()) / 1e9:.3f} billion: {sizes['body'] / 1e9:.3f} body, "
        f"{sizes['embedding'] / 1e9:.3f} embedding, {head}",
    )
    mesh = " x ".join(f"{name} {size}" for name, size in told["mesh"].items())
    several = f", {told['processes']} processes" if told["processes"] > 1 else ""
    about.add_row("mesh", mesh + several)
    rollouts = f"{told['problems_per_step']} problems x {told['rollouts_per_problem']} rollouts"
    about.add_row("a step", rollouts)
    own = assumed["teacher_tokens_of_each_rollout"]
    about.add_row(
        "assumed",
        f"student prompts of {assumed['prompt_tokens']:,} tokens, "
        f"{assumed['teacher_prompts_per_group']} teacher prompts a group of "
        f"{assumed['teacher_tokens']:,}"
        + (f" and ends of {own:,} for each rollout" if own else "")
        + f", responses of {assumed['response_tokens']:,}",
    )
    scores = told["attention_scores_bytes"] / 1e9
    about.add_row(
        "attention",
        told["attention_reason"].removeprefix("attention: ")
        or {"xla": "plain xla"}.get(told["attention"], f"{told['attention']}, writes no scores"),
    )
    if scores:
        about.add_row("", f"scores of one layer, once, in training: {scores:,.3f} GB a device")
    console.print(about)
    for name in ("sampling", "training"):
        console.print(memory_table(name, told[name], told["memory_gigabytes"]))
    console.print(fits_table(told))
    console.print(flops_table(told))
    if "step" in told:
        console.print(step_table(told["step"]))


def memory_table(name: str, phase: Mapping[str, Any], gigabytes: float) -> Table:
    fits = "fits" if phase["bytes"] <= gigabytes * 1e9 else "does not fit"
    title = f"{name}: {fits} in {gigabytes:g} GB; fullest in {phase['fullest_in']}"
    table = Table("one device holds", title=title, title_justify="left", show_footer=True)
    table.columns[0].footer = "in all"
    table.add_column("GB", f"{phase['bytes'] / 1e9:.3f}", justify="right")
    table.add_column("how known")
    for line in phase["lines"]:
        known = "counted" if line["exact"] else "estimated"
        table.add_row(line["name"], f"{line['bytes'] / 1e9:.3f}", known)
    return table


def fits_table(told: Mapping[str, Any]) -> Table:
    problems = told["problems_per_step"]
    rollouts = -(-problems // told["processes"]) * told["rollouts_per_problem"]
    title = "the largest that fits in a device's memory"
    title += "; max_rows of each process" if told["processes"] > 1 else ""
    table = Table(title=title, title_justify="left")
    for name in ("GB", "engine.max_rows", "distill.micro_batch"):
        table.add_column(name, justify="right")
    for row in told["fits"]:
        counts = (row["max_rows"], rollouts), (row["micro_batch"], problems)
        table.add_row(f"{row['gigabytes']:g}", *(share(n, most) for n, most in counts))
    return table


def share(n: int | None, most: int) -> str:
    if n is None:
        return "none"
    return f"all {most:,}" if n == most else f"{n:,} of {most:,}"


def flops_table(told: Mapping[str, Any]) -> Table:
    """By part. Seconds are those of products alone: decoding waits for memory as well."""
    counts, seconds = told["flops"], told.get("seconds")
    total = sum(counts.values())
    title = "matrix products of a step, all devices together"
    if seconds:
        stated = told["seconds_assume"]
        title += f"; at {stated['mfu']:g} of {stated['peak_tflops']:g} TFLOP/s a device"
    table = Table("part", title=title, title_justify="left", show_footer=True)
    table.columns[0].footer = "in all"
    table.add_column("TFLOPs", amount(total / 1e12), justify="right")
    table.add_column("share", justify="right")
    if seconds:
        table.add_column("seconds", amount(sum(seconds.values())), justify="right")
    for name, count in counts.items():
        row = [name, amount(count / 1e12), f"{100 * count / total:.1f}%"]
        table.add_row(*row, *([amount(seconds[name])] if seconds else []))
    return table


def step_table(told: Mapping[str, Any]) -> Table:
    """The parts of a step, which follow one another."""
    rates = told["assumed"]
    title = (
        f"a step, estimated: {rates['mfu']:g} of {rates['peak_tflops']:g} TFLOP/s, "
        f"{rates['mbu']:g} of {rates['hbm']:g} GB/s,\n"
        f"link {rates['link']:g} GB/s a device, network {rates['network']:g} Gbit/s a host"
    )
    table = Table("part", title=title, title_justify="left", show_footer=True)
    table.columns[0].footer = "in all"
    table.add_column("seconds", amount(told["seconds"]), justify="right")
    table.add_column("GB taken in", amount(told["received"] / 1e9), justify="right")
    table.add_column("bound by")
    table.add_column("how known")
    for part in told["parts"]:
        received = amount(part["received"] / 1e9)
        table.add_row(part["name"], amount(part["seconds"]), received, part["bound"], "estimated")
    return table


def amount(x: float) -> str:
    """Three digits at least, and no exponent for what is large."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0 answered, whatever the answer is, and 2 bad input, named on one line."""
    jax.config.update("jax_platforms", "cpu")  # beside a run that holds the accelerator, too
    try:
        options, rest = read_options(sys.argv[1:] if argv is None else argv)
        spec, overrides, _ = settings.parse_arguments(rest, __doc__ or "")
        config = settings.build(RunConfig, settings.load_config(spec, overrides))
        model, reason = with_attention(read_model(config.model.path), config, options.platform)
        work = Work(
            config,
            model,
            abstract_mesh(config.mesh, options.devices),
            options.prompt_tokens,
            options.teacher_tokens,
            options.response_tokens,
            options.processes,
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = answer(work, options) | {"attention": model.attention, "attention_reason": reason}
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        show(told, Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
