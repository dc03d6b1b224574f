"""Scores over repeated samples of each question, and their intervals: pure functions on numpy.

A metric returns one float64 score in [0, 1] per question, [N]; its mean over questions is the
number to report, and the same [N] scores go into `bootstrap_interval` and `paired_bootstrap`.
Questions are the unit of uncertainty: the samples of one question share its difficulty, so
resampling them as if they were independent would give intervals that are too narrow.

Axes: N questions, K samples of each question, R resamples of a bootstrap.

Left out: grading (tasks/verifiers.py), the choice of what is sampled and how (evaluate.py), and
uncertainty between seeds of training, which needs several runs.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Scores = Float[np.ndarray, " N"]


def avg_at_k(correct: Bool[np.ndarray, "N K"]) -> Scores:
    """avg@k: the share of a question's K samples that are correct."""
    _check_samples(correct)
    return correct.mean(axis=1, dtype=np.float64)


def pass_at_k(correct: Bool[np.ndarray, "N K"], k: int) -> Scores:
    """pass@k: the probability that at least one of k samples is correct, estimated from K >= k.

    1 - C(K - c, k) / C(K, k) for a question with c correct samples: unbiased, where raising
    (1 - c / K) to the power k is not (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    _check_samples(correct)
    num_samples = correct.shape[1]
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: must be between 1 and the {num_samples} samples given; got {k}")
    num_wrong = num_samples - correct.sum(axis=1)
    # C(w, k) / C(n, k) as a product of k ratios, which never overflows; 0 where w < k.
    drawn = np.arange(k)
    ratios = np.maximum(num_wrong[:, None] - drawn, 0) / (num_samples - drawn)
    return 1.0 - ratios.prod(axis=1)


def majority_at_k(
    answers: Sequence[Sequence[str]], gold: Sequence[str], k: int | None = None
) -> Scores:
    """majority@k: the probability that the most frequent of k answers is the gold one.

    Over the choice of k of a question's K answers without replacement, exactly, so a smaller k
    needs no drawing; None takes all K. A tie is broken uniformly at random: 1 / (number of tied
    answers) if gold is among them. The score depends neither on order nor on a seed.
    "" stands for a response without an answer. It casts no vote: a question is lost to it only
    where every sample is "".
    """
    if len(answers) != len(gold):
        raise ValueError(
            f"answers: must have one row per gold answer; got {len(answers)} and {len(gold)}"
        )
    if "" in gold:
        raise ValueError(
            f'gold: must not be ""; got "" for question {list(gold).index("")}, '
            "which no vote could answer"
        )
    fewest = min(map(len, answers), default=0)
    if k is not None and not 1 <= k <= fewest:
        raise ValueError(f"k: must be between 1 and the {fewest} samples given; got {k}")
    return np.array(
        [
            _majority_score(row, target, k or len(row))
            for row, target in zip(answers, gold, strict=True)
        ],
        dtype=np.float64,
    )


def _majority_score(answers: Sequence[str], gold: str, k: int) -> float:
    votes = Counter(answer for answer in answers if answer)
    silent = len(answers) - votes.total()
    of_gold = votes.pop(gold, 0)
    return _majority_of_counts(of_gold, tuple(sorted(votes.values())), silent, k)


@functools.lru_cache(maxsize=100_000)  # a set of questions has few different counts
def _majority_of_counts(of_gold: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """Counts the ways to draw k answers, by how often gold is drawn and by how many tie with it."""
    ways = 0.0
    for won in range(1, min(of_gold, k) + 1):
        # drawn[t, n]: ways to draw n answers that are not gold, with t of them tied at `won`
        drawn = np.zeros((len(others) + 1, k + 1))
        drawn[0, 0] = 1.0
        for count in others:
            fewer = [math.comb(count, n) for n in range(min(won, count + 1))]
            tied = math.comb(count, won)
            new = np.zeros_like(drawn)
            for n, choices in enumerate(fewer):
                new[:, n:] += choices * drawn[:, : k + 1 - n]
            if tied:
                new[1:, won:] += tied * drawn[:-1, : k + 1 - won]
            drawn = new
        rest = k - won
        quiet = np.array([math.comb(silent, rest - n) for n in range(rest + 1)], np.float64)
        shares = 1.0 / (1 + np.arange(len(drawn)))
        ways += math.comb(of_gold, won) * float(shares @ drawn[:, : rest + 1] @ quiet)
    return ways / math.comb(of_gold + sum(others) + silent, k)


def best_at_k(correct: Bool[np.ndarray, "N K"]) -> Scores:
    """best@k: 1 where any of the K samples is correct. Equals `pass_at_k` with k = K."""
    _check_samples(correct)
    return np.asarray(correct.any(axis=1), dtype=np.float64)


class SolvedSets(NamedTuple):
    """Questions by who solves them, ids sorted."""

    both: list[str]
    only_a: list[str]
    only_b: list[str]
    neither: list[str]


def solved_sets(a: Mapping[str, float], b: Mapping[str, float], least: float) -> SolvedSets:
    """Questions that two policies solve, by their avg@k: those above `least`.

    least 0: any sample is correct; 0.5: most are. Raises ValueError where they were not asked the
    same questions.
    """
    if set(a) != set(b):
        raise ValueError(
            f"a, b: must score the same questions; {len(set(a) ^ set(b))} are in one alone"
        )
    sets = SolvedSets([], [], [], [])
    for key in sorted(a):
        solved = a[key] > least, b[key] > least
        place = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[solved]
        sets[place].append(key)
    return sets


CONCEPTS = re.compile(r"\b(strateg|lesson|behavio)", re.IGNORECASE)


def concept_frequency(texts: Sequence[str], num_tokens: int) -> dict[str, float]:
    """How often the words of memory (strategy, lesson, behavior) stand in what a policy wrote.

    share: of the texts with one at least. per_1000_tokens: occurrences; num_tokens is of all texts.
    The paper finds them in memory-free rollouts as training goes on; ordinary language has some
    too, so read them beside step 0.
    """
    counts = [len(CONCEPTS.findall(text)) for text in texts]
    return {
        "concepts/share": sum(count > 0 for count in counts) / max(len(texts), 1),
        "concepts/per_1000_tokens": 1000 * sum(counts) / max(num_tokens, 1),
    }


def curve(num_samples: int) -> tuple[int, ...]:
    """The ks of a curve over samples: powers of two, and all of them."""
    return (*(1 << i for i in range((num_samples - 1).bit_length())), num_samples)


def bootstrap_interval(
    scores: Scores, level: float = 0.95, seed: int = 0, num_resamples: int = 2000
) -> tuple[float, float]:
    """(low, high): the percentile interval of the mean score, by resampling questions.

    The interval says how far another draw of N such questions could move the mean. With fewer
    than about 20 questions it is too narrow, and with equal scores it has no width.
    """
    return _percentile_interval(_resampled_means(scores, seed, num_resamples), level)


def paired_bootstrap(
    a: Float[np.ndarray, " _"],
    b: Float[np.ndarray, " _"],
    level: float = 0.95,
    seed: int = 0,
    num_resamples: int = 2000,
) -> tuple[float, float, float, float]:
    """(difference, low, high, p_two_sided) of mean(a) - mean(b) over the same questions.

    a, b: scores of two policies, [N] both, question by question. Pairing removes the difficulty
    of the questions from the comparison. p_two_sided is twice the share of resampled differences
    on the far side of zero, at most 1, with one added to count and total so that it is never 0.
    """
    if len(a) != len(b):
        raise ValueError(f"a, b: must score the same questions; got {len(a)} and {len(b)}")
    means = _resampled_means(a - b, seed, num_resamples)
    low, high = _percentile_interval(means, level)
    far_side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_two_sided = min(1.0, 2.0 * (1 + far_side) / (1 + num_resamples))
    return float(np.mean(a - b)), low, high, p_two_sided


def _resampled_means(scores: Scores, seed: int, num_resamples: int) -> Float[np.ndarray, " R"]:
    if len(scores) == 0 or not np.isfinite(scores).all():
        raise ValueError(f"scores: must be one finite number per question; got {scores}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples: must be at least 1; got {num_resamples}")
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(scores), size=(num_resamples, len(scores)))
    return scores[rows].mean(axis=1)


def _percentile_interval(means: Float[np.ndarray, " R"], level: float) -> tuple[float, float]:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: must be between 0 and 1; got {level}")
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _check_samples(correct: Bool[np.ndarray, "N K"]) -> None:
    if correct.shape[1] == 0:
        raise ValueError(
            f"correct: must hold at least one sample per question; got shape {correct.shape}"
        )
