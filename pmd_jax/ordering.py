"""In which order the problems come: Grain shuffles each epoch anew, and its position is saved.

The only file that imports Grain.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

from pmd_jax.records import Problem


def problem_order(
    problems: Sequence[Problem], problems_per_step: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of index arrays int [problems_per_step] into `problems`.

    Every epoch is a new permutation; what is left over at its end is dropped, so no step holds a
    problem twice. `get_state` and `set_state` continue it exactly.
    Raises ValueError when a step asks for more problems than there are.
    """
    if problems_per_step > len(problems):
        raise ValueError(
            f"config.rollout.problems_per_step: must be at most the {len(problems)} training "
            f"problems; got {problems_per_step}"
        )
    order = grain.MapDataset.source(np.arange(len(problems))).seed(seed).shuffle()
    batches = order.batch(problems_per_step, drop_remainder=True)
    return iter(batches.repeat(None, reseed_each_epoch=True).to_iter_dataset())
