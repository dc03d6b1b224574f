"""In which order the problems come: Grain shuffles each epoch anew, and its position is saved.

The only file that imports Grain.
"""

from __future__ import annotations

import grain
import numpy as np


def problem_order(num_problems: int, problems_per_step: int, seed: int) -> grain.DatasetIterator:
    """An endless iterator of index arrays int [problems_per_step], each below num_problems.

    Every epoch is a new permutation; what is left over at its end is dropped, so no step holds a
    problem twice. `get_state` and `set_state` continue it exactly.
    Raises ValueError when a step asks for more problems than there are.
    """
    if problems_per_step > num_problems:
        raise ValueError(
            f"config.rollout.problems_per_step: must be at most the {num_problems} training "
            f"problems; got {problems_per_step}"
        )
    order = grain.MapDataset.source(np.arange(num_problems)).seed(seed).shuffle()
    batches = order.batch(problems_per_step, drop_remainder=True)
    return iter(batches.repeat(None, reseed_each_epoch=True).to_iter_dataset())
