"""Kills a run again and again, and compares what is left with a run that nobody disturbed.

    python -m tools.soak --kills 50 --in-save 10 -- \\
        python -m experiments.sciknoweval --config configs/quickstart.py --config.checkpoint.every=2

The command after -- is run twice, as --name whole to its end, and as --name killed, which gets
`kill -9` at random moments and is started again with --resume-if-saved. Some of the kills wait for
a save to begin and fall into it. At the end the two must have the same metrics (times left aside),
samples, evaluations, bank and state, bit for bit. Told are also the steps that each kill cost, and
whether the memory of the undisturbed run stays flat.

--kills N     in all (default 50)       --in-save N   of them within a save (default 10)
--seed N      of the moments            --processes N of each run, joined over loopback (default 1)
--output DIR  of the runs (default runs/soak); an undisturbed run that is there is used again

The exit code is 0 where all is equal and no kill cost more than it may: the steps since the last
save that was complete.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TIMES = ("seconds", "tokens_per_second", "peak_memory", "host_memory", "live_arrays")
FLAT = 1.05
"""Memory is flat where the last quarter of the steps needs at most this times the second. Resident
memory goes up and down by a tenth with saves and evaluations: give it many hundred steps."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """in_save: whether a save was going on. logged: steps done when it came. saved: the newest
    complete save then, which is where the run goes on."""

    in_save: bool
    logged: int
    saved: int

    @property
    def lost(self) -> int:
        return self.logged - self.saved


# --- processes ------------------------------------------------------------------------------


def start(command: Sequence[str], num_processes: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """The processes of one run, each leader of its own group."""
    joined = []
    if num_processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        joined = ["--coordinator", address, "--num-processes", str(num_processes), "--process-id"]
    with log.open("ab") as file:
        return [
            subprocess.Popen(
                [*command, *joined, *([str(i)] if joined else [])],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for i in range(num_processes)
        ]


def kill(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in running:
        process.wait()


def are_going(running: Sequence[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() is None for process in running)


# --- what a run's folder says ---------------------------------------------------------------


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] + 1 if whole else 0


def steps_saved(run: Path) -> int:
    """The newest complete save; 0 where there is none."""
    folder = run / "checkpoints"
    names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def is_saving(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any("tmp" in f.name for f in folder.iterdir())


# --- the kills ------------------------------------------------------------------------------


def log_of(run: Path) -> int:
    """Which file metrics.jsonl is: a run that goes on replaces it when it is ready to."""
    file = run / "metrics.jsonl"
    return file.stat().st_ino if file.exists() else 0


def waits(run: Path, in_save: bool, before: int, after: int, rng: random.Random) -> Iterator[float]:
    """Pauses until the moment of a kill: some time after a number of steps, or in the next save.

    before: the log that the last kill left, with whose steps and half saves nothing is to do.
    """
    while log_of(run) == before or steps_logged(run) < after:
        yield 0.02
    if in_save:
        while not is_saving(run):
            yield 0.002
        yield rng.uniform(0, 0.15)
    else:
        yield rng.uniform(0, 1.0)


def kill_once(
    command: Sequence[str],
    run: Path,
    in_save: bool,
    most_steps: int,
    rng: random.Random,
    args: argparse.Namespace,
) -> Kill | None:
    """Starts the run where it is, and kills it after up to `most_steps`; None when it was over."""
    before = log_of(run)
    running = start(command, args.processes, args.output / "killed.log")
    after = steps_saved(run) + rng.randint(1, most_steps)
    try:
        for pause in waits(run, in_save, before, after, rng):
            time.sleep(pause)
            if not are_going(running):
                return None
        hit = is_saving(run)
    finally:
        kill(running)
    return Kill(hit, steps_logged(run), steps_saved(run))


def finish(command: Sequence[str], args: argparse.Namespace, log: str) -> None:
    """Lets the run come to its end. Raises RuntimeError when it fails."""
    running = start(command, args.processes, args.output / log)
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"the run ended with {codes}; {args.output / log} says why")


# --- comparison -----------------------------------------------------------------------------


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in found]


def scores(run: Path) -> dict[str, Any]:
    saved = json.loads((run / "evaluation.json").read_text())
    return {
        name: {k: v for k, v in of.items() if k != "seconds"} for name, of in sorted(saved.items())
    }


def state_of(run: Path) -> list[Any]:
    """All arrays of the newest checkpoint: policy, EMA teacher, moments, step."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # a manager's step has no notes of its own
    folder = (run / "checkpoints" / str(steps_saved(run)) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return jax.tree.leaves(checkpointer.restore(folder, args=args))


def differences(whole: Path, killed: Path) -> list[str]:
    """What of two runs is not equal, by name."""
    import numpy as np

    from pmd_jax.memory.bank import Bank

    found = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        if rows(whole, name) != rows(killed, name):
            found.append(name)
    if scores(whole) != scores(killed):
        found.append("evaluation.json")
    if len({Bank.load(run / "memory").digest() for run in (whole, killed)}) > 1:
        found.append("bank")
    one, two = state_of(whole), state_of(killed)
    if len(one) != len(two) or not all(map(np.array_equal, one, two)):
        found.append("state")
    return found


def growth(run: Path, name: str) -> float:
    """Mean of a number over the last quarter of the steps, by that over the second quarter."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line)[name] for line in lines]
    quarter = len(values) // 4
    return statistics.mean(values[3 * quarter :]) / statistics.mean(values[quarter : 2 * quarter])


# --- the command line -----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    own, command = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--in-save", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    args = parser.parse_args(own)
    if not command:
        parser.error("the command of a run must follow after --")
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        return soak(command, args)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def soak(command: Sequence[str], args: argparse.Namespace) -> int:
    whole, killed = args.output / "whole", args.output / "killed"
    runs = {
        run: [*command, f"--config.output={args.output}", "--name", run.name, "--resume-if-saved"]
        for run in (whole, killed)
    }
    if not (whole / "totals.json").is_file():
        finish(runs[whole], args, "whole.log")
    rng = random.Random(args.seed)
    kills: list[Kill] = []
    while len(kills) < args.kills:
        wanted = args.in_save - sum(k.in_save for k in kills)
        in_save = rng.random() < 1.5 * wanted / (args.kills - len(kills))
        left = steps_logged(whole) - steps_saved(killed)
        most_steps = max(3 * left // (4 * (args.kills - len(kills))), 1)  # the last finds one, too
        one = kill_once(runs[killed], killed, in_save, most_steps, rng, args)
        if one is None:
            print(f"the run was over after {len(kills)} kills; give it more steps")
            break
        kills.append(one)
        print(
            f"kill {len(kills)}{' in a save' if one.in_save else ''}: at step {one.logged}, "
            f"goes on from {one.saved}",
            flush=True,
        )
    finish(runs[killed], args, "killed.log")
    return told(whole, killed, kills, args)


def told(whole: Path, killed: Path, kills: Sequence[Kill], args: argparse.Namespace) -> int:
    """Prints what came of it; the exit code."""
    every = json.loads((killed / "config.json").read_text())["checkpoint"]["every"]
    unequal = differences(whole, killed)
    most = max((k.lost for k in kills), default=0)
    in_save = sum(k.in_save for k in kills)
    grown = {name: growth(whole, name) for name in ("host_memory_gib", "live_arrays_gib")}
    print(
        f"{len(kills)} kills, {in_save} of them in a save; a save every {every} steps\n"
        f"steps lost by a kill: most {most}, mean {statistics.mean(k.lost for k in kills):.2f}\n"
        f"unequal to the undisturbed run: {', '.join(unequal) or 'nothing'}\n"
        + "\n".join(
            f"{name}: {100 * (by - 1):+.1f}% from the second to the last quarter"
            for name, by in grown.items()
        )
    )
    enough = len(kills) == args.kills and in_save >= args.in_save
    # While a save is written, training goes on: up to the next one, which waits for it.
    ok = not unequal and most <= 2 * every and enough and max(grown.values()) <= FLAT
    print("as it should be" if ok else "NOT as it should be")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
