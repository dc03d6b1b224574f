"""How large memory gets, on paper: state, journal, traffic, and when one bank is too much.

    python -m tools.memory_size --config configs/sciknoweval.py:chemistry --processes 4

--problems N          training problems (default 100000)
--epochs N            visits of each (default 20)
--processes N         of the run, each of which holds the whole bank (default 1)
--response-tokens N   of a response (default: rollout.max_new_tokens, the most there can be)
--host GB             of a host's memory for the bank (default 64)
--save-seconds N      in which a save should have gone over the bank's files (default 60)
--resume-seconds N    in which a resumed run should have its bank back (default 600)
--network Gbit/s      what a host takes in from other hosts (default 25)
--json                one JSON object instead of a table

A real bank of a few problems is filled for as many epochs, with texts of the lengths assumed, and
what it holds and writes is counted. All else is estimated from that by the formulas of `estimate`.
Each visit brings the most: as many attempts as the capacities keep, all new, and insights that say
something new. Texts are ASCII; a character beyond it takes two to four bytes of memory and six or
twelve of a journal.

Left out: vectors of questions and behaviors, Python's own share of a process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from pmd_jax import settings
from pmd_jax.config import RunConfig
from pmd_jax.memory import store
from pmd_jax.memory.bank import Bank, Operation
from pmd_jax.memory.journal import SEGMENT_BYTES
from pmd_jax.records import Behavior, Experience, Insight, Verdict
from tools.bench.memory import Text
from tools.plan import amount
from tools.roofline import TEXT_BYTES, exchange_bytes

SAMPLE = 4  # problems of the bank that is filled
OF_A_PROBLEM = {"remember", "rewrite_insights"}
"""Events that come with each visit; the others come with each step."""

REPLAY_SECONDS, REPLAY_BYTES_PER_SECOND = 0.6e-3, 77e6
"""Of a visit, to load its events again: for itself, and for its bytes (checked and parsed)."""
LINK_SECONDS = 35e-6
"""Of a save: to link a segment, which is done for the checkpoint and for memory/."""
# All three were measured once, on one core of a shared x86 machine and its local disk.


# --- a real bank --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a real bank. experience, insight, behavior: one record in memory, at capacity.

    state: a problem's records in memory. visit: events of a visit of one problem, the mean over the
    epochs. step: events of a step beside those of its visits.
    """

    experience: float
    insight: float
    behavior: float
    state: float
    visit: float
    step: float


def measured(config: RunConfig, epochs: int, tokens: int) -> Sizes:
    """Sizes of a bank whose problems were visited `epochs` times."""
    bank, text = Bank(config.memory), Text(seed=0, num_words=20_000)
    for step in range(epochs):
        visit(bank, config, step, tokens, text)
    written: Counter[str] = Counter()
    for event in bank.events:
        about = "visit" if event["event"] in OF_A_PROBLEM else "step"
        written[about] += len(store.line(event))
    shelves = bank._experiences, bank._insights
    experiences, insights = (
        [sys.getsizeof(pack) for packs in shelf._packs.values() for pack in packs]
        for shelf in shelves
    )
    behaviors = [sum(map(sys.getsizeof, b.insight_ids)) + len(b.text) for b in bank.behaviors]
    return Sizes(
        float(np.mean(experiences)),
        float(np.mean(insights)),
        float(np.mean(behaviors)),
        (sum(experiences) + sum(insights)) / SAMPLE,
        written["visit"] / SAMPLE / epochs,
        written["step"] / epochs,
    )


def visit(bank: Bank, config: RunConfig, step: int, tokens: int, text: Text) -> None:
    """One step that brings all sample problems the most that memory takes in."""
    reflection, memory = config.reflection, config.memory
    bank.begin_step(step)
    outcomes = [True] * memory.successes_per_problem + [False] * memory.failures_per_problem
    items: list[tuple[Literal["strategy", "lesson"], int]] = []
    items += [("strategy", n) for n in range(reflection.strategies)]
    items += [("lesson", n) for n in range(reflection.lessons)]
    length = reflection.max_new_tokens * TEXT_BYTES // max(len(items), 1)
    insights: list[str] = []
    for number in range(SAMPLE):
        key = f"sciknoweval/chemistry/train/{10_000 + number}"
        bank.remember(
            step,
            [
                Experience(f"{key}@{step}.{g}", key, step, text.cut(tokens * TEXT_BYTES), verdict)
                for g, correct in enumerate(outcomes)
                for verdict in [Verdict(correct, float(correct), "", True)]
            ],
        )
        shown = tuple(f"{key}@{step}.{g}" for g in range(2 * reflection.attempts_per_outcome))
        new = [
            Insight(f"{key}@{step}#{kind}{n}", key, step, kind, text.cut(length), 0.5, shown)
            for kind, n in items
        ]
        bank.rewrite_insights(step, key, new)
        insights += [insight.id for insight in new]
    abstract(bank, config, step, insights * (reflection.problems_per_call // SAMPLE), text)


def abstract(bank: Bank, config: RunConfig, step: int, ids: Sequence[str], text: Text) -> None:
    """As many new behaviors as a call may write; each rollout's teacher cites its top K."""
    reflection, rng = config.reflection, np.random.default_rng(step)
    length = reflection.behaviors_max_new_tokens * TEXT_BYTES // reflection.new_behaviors_per_call

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = rng.standard_normal((len(texts), 64)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    new = []
    for n in range(reflection.new_behaviors_per_call):
        name = f"behavior_of_some_words_{step}_{n}"
        said = "When " + text.cut(length // 4), text.cut(length - length // 4)
        made = Behavior(f"{name}@{step}", name, "skill", *said, step, tuple(ids), 0, step)
        new.append(Operation("ADD", made))
    bank.apply_operations(step, new, embed)
    bank.mark_abstracted(step, {key.partition("@")[0] for key in ids})
    prompts = config.rollout.problems_per_step * config.rollout.rollouts_per_problem
    known = [behavior.id for behavior in bank.behaviors]
    bank.cite(step, [known[i % len(known)] for i in range(prompts * config.teacher.top_k)])


# --- the formulas -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a bank may take: bytes of a host's memory, seconds of a save and of a resumption."""

    host: float
    save: float
    resume: float


def estimate(sizes: Sizes, config: RunConfig, problems: int, epochs: int) -> dict[str, float]:
    """Of a bank after `epochs` visits of each of n problems, P of them in a step. Bytes, seconds.

    state           n x sizes.state + capacity x sizes.behavior
    steps           epochs x n / P
    journal         epochs x n x sizes.visit + steps x sizes.step: events are kept for ever
    segments        journal / SEGMENT_BYTES
    save_seconds    2 x segments x LINK_SECONDS
    resume_seconds  epochs x n x REPLAY_SECONDS + journal / REPLAY_BYTES_PER_SECOND
    """
    each = config.rollout.problems_per_step
    steps, visits = epochs * problems / each, epochs * problems
    journal = visits * sizes.visit + steps * sizes.step
    segments = journal / SEGMENT_BYTES
    return {
        "state": problems * sizes.state + config.memory.behaviors * sizes.behavior,
        "behaviors": config.memory.behaviors * sizes.behavior,
        "steps": steps,
        "journal": journal,
        "journal_of_a_step": journal / steps,
        "segments": segments,
        "save_seconds": 2 * segments * LINK_SECONDS,
        "resume_seconds": visits * REPLAY_SECONDS + journal / REPLAY_BYTES_PER_SECOND,
    }


def too_many(sizes: Sizes, config: RunConfig, epochs: int, limits: Limits) -> dict[str, float]:
    """{limit: problems from which one bank exceeds it}; sharded over M processes, M times as many.

    All three grow with the problems in proportion, so the limit is divided by what one problem
    takes. What a step sends, hashes and writes does not depend on how many problems there are.
    """
    one = estimate(sizes, config, 1, epochs)
    return {
        "memory": (limits.host - one["behaviors"]) / sizes.state,
        "save": limits.save / one["save_seconds"],
        "resume": limits.resume / one["resume_seconds"],
    }


# --- the answer ---------------------------------------------------------------------------------


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    whole = {"problems": 100_000, "epochs": 20, "processes": 1, "response-tokens": 0}
    parts = {"host": 64.0, "save-seconds": 60.0, "resume-seconds": 600.0, "network": 25.0}
    for name, default in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, number in parts.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    for name in ("problems", "epochs", "processes", *parts):
        value = getattr(options, name.replace("-", "_"))
        if value <= 0:
            raise ValueError(f"--{name}: must be above 0; got {value}")
    return options, rest


def answer(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """All that is told, as JSON values."""
    tokens = options.response_tokens or config.rollout.max_new_tokens
    sizes = measured(config, options.epochs, tokens)
    limits = Limits(options.host * 1e9, options.save_seconds, options.resume_seconds)
    exchanged = exchange_bytes(config, options.processes, tokens)
    return {
        "assumed": {**vars(options), "response_tokens": tokens, "text_bytes_a_token": TEXT_BYTES},
        "measured": dataclasses.asdict(sizes),
        "estimated": {
            **estimate(sizes, config, options.problems, options.epochs),
            "exchanged": exchanged,
            "exchange_seconds": exchanged / (options.network * 1e9 / 8),
        },
        "too_many_problems": too_many(sizes, config, options.epochs, limits),
    }


def show(told: dict[str, Any], console: Console) -> None:
    of, found, limits = told["measured"], told["estimated"], told["too_many_problems"]
    assumed = told["assumed"]
    title = (
        f"{assumed['problems']:,} problems, {assumed['epochs']} epochs, responses of "
        f"{assumed['response_tokens']:,} tokens"
    )
    table = Table("memory", title=title, title_justify="left")
    table.add_column("", justify="right")
    table.add_column("how known")

    def row(name: str, value: str, known: str = "estimated") -> None:
        table.add_row(name, value, known)

    for name in ("experience", "insight", "behavior"):
        row(f"one {name} in memory", f"{of[name] / 1e3:,.1f} KB", "measured")
    row("events of one visit of a problem", f"{of['visit'] / 1e3:,.1f} KB", "measured")
    row("state, in the memory of each process", f"{found['state'] / 1e9:,.1f} GB")
    row("  behaviors alone", f"{found['behaviors'] / 1e6:,.1f} MB")
    row("journal, on disk", f"{found['journal'] / 1e9:,.0f} GB, {found['segments']:,.0f} files")
    row("  of one step", f"{found['journal_of_a_step'] / 1e6:,.1f} MB")
    row("a save goes over it in", f"{amount(found['save_seconds'])} s")
    row("a resumed run reads it in", f"{amount(found['resume_seconds'])} s")
    sent = f"{found['exchanged'] / 1e6:,.1f} MB, {1e3 * found['exchange_seconds']:,.0f} ms"
    row(f"each of {assumed['processes']} processes takes in, a step", sent)
    budgets = {
        "memory": f"{assumed['host']:g} GB of memory",
        "save": f"{assumed['save_seconds']:g} s of a save",
        "resume": f"{assumed['resume_seconds']:g} s of a resumption",
    }
    for name, budget in budgets.items():
        row(f"{budget} are for", f"{limits[name]:,.0f} problems")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0 answered and 2 bad input, named on one line."""
    try:
        options, rest = read_options(sys.argv[1:] if argv is None else argv)
        spec, overrides, _ = settings.parse_arguments(rest, __doc__ or "")
        config = settings.build(RunConfig, settings.load_config(spec, overrides))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = answer(config, options)
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        show(told, Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
