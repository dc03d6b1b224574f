"""What fits a question, found by the angles between embeddings: neighbours and clusters.

Axes: Q queries, N documents or points, D dimensions of an embedding, K results or clusters.
All rows have length 1, so a dot product is a cosine.

Everything here is deterministic, and cosines are compared after rounding, because the last bits of
a matrix product depend on the machine and on the shape of the batch.

Left out: the embedding model, which is borrowed; what is asked and what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from pmd_jax.memory import Embed
from pmd_jax.memory.bank import Bank
from pmd_jax.memory.nearest import DECIMALS
from pmd_jax.records import Behavior, Problem


def cluster_count(
    num_problems: int, problems_per_cluster: int = 25, least: int = 8, most: int = 64
) -> int:
    """How many clusters suit so many problems: about 25 problems in each, and 8 to 64 clusters.

    Ours; sized so that one cluster fits one prompt. The paper names neither number nor algorithm.
    """
    wanted = round(num_problems / problems_per_cluster)
    return min(max(least, min(wanted, most)), num_problems)


def spherical_kmeans(
    embeddings: Float[np.ndarray, "N D"],
    k: int,
    seed: int,
    num_starts: int = 4,
    max_iterations: int = 100,
) -> Int[np.ndarray, " N"]:
    """Labels 0..k-1 that maximise the sum of cosines between points and their cluster's direction.

    Lloyd's iterations with centroids of length 1 (Dhillon & Modha 2001), the best of `num_starts`
    k-means++ starts. Labels are numbered by their first point, so label 0 is that of point 0.
    Fewer than k labels occur where fewer than k points are distinct.
    """
    if not 1 <= k <= len(embeddings):
        raise ValueError(f"k: must be between 1 and the {len(embeddings)} points; got {k}")
    points = embeddings.astype(np.float64)
    rng = np.random.default_rng(seed)
    best, best_score = np.zeros(len(points), np.int64), -np.inf
    for _ in range(num_starts):
        labels, score = _lloyd(points, _spread_start(points, k, rng), max_iterations)
        if score > best_score + 10**-DECIMALS:
            best, best_score = labels, score
    order = dict.fromkeys(best.tolist())
    number = {label: i for i, label in enumerate(order)}
    return np.array([number[label] for label in best.tolist()], np.int64)


def _spread_start(
    points: Float[np.ndarray, "N D"], k: int, rng: np.random.Generator
) -> Float[np.ndarray, "K D"]:
    """k-means++: each next centroid is a point drawn by its distance to those already drawn."""
    chosen = [int(rng.integers(len(points)))]
    for _ in range(k - 1):
        distance = np.maximum(1 - (points @ points[chosen].T).max(axis=1), 0)
        distance = np.round(distance, DECIMALS)
        distance[chosen] = 0
        if distance.sum() > 0:
            chosen.append(int(rng.choice(len(points), p=distance / distance.sum())))
    return points[chosen]


def _lloyd(
    points: Float[np.ndarray, "N D"], centroids: Float[np.ndarray, "K D"], max_iterations: int
) -> tuple[Int[np.ndarray, " N"], float]:
    """(labels, sum of cosines) where Lloyd's iterations come to rest."""
    labels = np.full(len(points), -1)
    for _ in range(max_iterations):
        cosines = np.round(points @ centroids.T, DECIMALS)
        moved = cosines.argmax(axis=1)
        if (moved == labels).all():
            break
        labels = moved
        for label in np.unique(labels):  # a cluster that lost its points keeps its centroid
            total = points[labels == label].sum(axis=0)
            centroids[label] = total / max(np.linalg.norm(total), 1e-12)
    return labels, float(cosines.max(axis=1).sum())


def query_text(problem: Problem) -> str:
    """What is embedded for a problem: the question as asked, options included."""
    return problem.question


class Retriever:
    """Behaviors for problems, with every text embedded once.

    embed: to be lent to `Bank.apply_operations` too, so that both share the vectors of behaviors.
    query_prefix: put before questions when they look for behaviors, where the embedding model was
        trained with an instruction (Qwen3-Embedding).
    """

    def __init__(self, embed: Embed, query_prefix: str = "") -> None:
        self.embed = embed
        self._query_prefix = query_prefix
        self._vectors: dict[str, np.ndarray] = {}

    def vectors(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """`embed`, asked only for texts that are new. For questions, which stay the same."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            self._vectors.update(zip(new, self.embed(new), strict=True))
        return np.stack([self._vectors[text] for text in texts])

    def behaviors_for(
        self, problems: Sequence[Problem], bank: Bank, k: int
    ) -> list[list[Behavior]]:
        """The k behaviors nearest to each problem, nearest first; fewer where the bank has fewer.

        No threshold: the paper retrieves the top 3 whatever their cosine.
        """
        if not bank.sizes()["behaviors"] or not problems or k == 0:
            return [[] for _ in problems]
        queries = self.vectors([self._query_prefix + query_text(p) for p in problems])
        return bank.nearest_behaviors(queries, k, self.embed)
