"""A toy model solves nothing and writes noise: the doubles that grade for it and write for it.

Also a program, with the command line of an experiment: a process of a run that tests start, kill
and stop. `python tests/scripted.py toy FOLDER` writes a model and FOLDER/soak.json, a run of it.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax

from pmd_jax import trainer
from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.distributed import share
from pmd_jax.evaluate import EvaluationConfig
from pmd_jax.policy.sharding import MeshConfig
from pmd_jax.records import Verdict
from pmd_jax.tasks.sandbox import SandboxError

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
        if os.environ.get("PMD_TEST_FAILING_PROCESS") == str(jax.process_index()):
            raise SandboxError("the judge is ill")
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


def write_toy(folder: Path) -> None:
    """The model and the run of the soak in experiments/README.md."""
    from test_trainer import TASK, config_for
    from toys import write_model_folder

    from pmd_jax.settings import to_dict

    config = config_for(
        write_model_folder(folder.absolute() / "model"),
        folder / "runs",
        steps=300,
        mesh=MeshConfig(1, 2),
        task=dataclasses.replace(TASK, num_train=32),
        checkpoint=CheckpointConfig(every=2, keep=3),
        evaluation=EvaluationConfig(num_samples=2, every=50),
        samples_per_step=4,
    )
    (folder / "soak.json").write_text(json.dumps(to_dict(config)))


def main() -> int:
    if sys.argv[1:2] == ["toy"]:
        write_toy(Path(sys.argv[2]))
        return 0
    trainer.make_generate, trainer.Grading = make_generate, Grading
    if "PMD_TEST_DIFFERENT_BANK" in os.environ:
        differ()
    from experiments.command import main as run

    return run(__doc__ or "")


def differ() -> None:
    """Lets each process remember something of its own."""
    real = trainer.Trainer.teach

    def teach(self, step, groups):
        own = f"problem of process {jax.process_index()}"
        self.bank.mark_abstracted(step, [own])
        return real(self, step, groups)

    trainer.Trainer.teach = teach


if __name__ == "__main__":
    sys.exit(main())
