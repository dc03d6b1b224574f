"""A toy model solves nothing and writes noise: the doubles that grade for it and write for it.

Also a program, `python tests/scripted.py FILE ...`, with the command line of an experiment: a
process of a run that tests start, kill and stop.
"""

import dataclasses
import os
import sys
from pathlib import Path

from pmd_jax import trainer
from pmd_jax.distributed import share
from pmd_jax.records import Verdict

LESSONS = (
    "you divide by a time, check the unit of the answer before choosing",
    "a quantity is squared, write the square down before you multiply",
    "two options differ by ten, count the powers of ten once more",
    "the ratio is asked, keep numerator and denominator in their places",
)


def make_generate(policy, max_new_tokens, temperature, seed):
    """Each reply is one of LESSONS, by its position; the processes of a run share them."""

    def generate(chats):
        return share(len(chats), lambda own: [LESSONS[(seed + i) % 4] + "." for i in own])

    return generate


class Grading(trainer.Grading):
    """Every second sample of a group is correct."""

    def groups(self, problems, attempts):
        return [
            dataclasses.replace(
                group,
                verdicts=tuple(
                    Verdict(r.sample % 2 == 0, float(r.sample % 2 == 0), "", True)
                    for r in group.rollouts
                ),
            )
            for group in super().groups(problems, attempts)
        ]


def main() -> int:
    trainer.make_generate, trainer.Grading = make_generate, Grading
    pause = float(os.environ.get("PMD_TEST_SLOW_SAVE", 0))
    if pause:
        slow_down_saves(pause)
    from experiments.command import main as run

    return run(__doc__ or "")


def slow_down_saves(seconds: float) -> None:
    """Makes the middle of every save last, so that a kill is likely to meet it."""
    import time

    from pmd_jax import checkpoint

    real = checkpoint.write_digests

    def slow(folder: Path) -> None:
        time.sleep(seconds)
        real(folder)

    checkpoint.write_digests = slow


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
