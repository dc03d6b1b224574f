"""The nearest by blocks are the nearest by a full sort, whatever the blocks and the order."""

import numpy as np
import pytest

from pmd_jax.memory import nearest as module
from pmd_jax.memory.nearest import DECIMALS, Index, nearest


def rows(seed, n, d=16):
    points = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def by_full_sort(queries, documents, k):
    cosines = np.round(queries.astype(np.float64) @ documents.astype(np.float64).T, DECIMALS)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k].tolist()


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_nearest_by_blocks_is_nearest_by_a_full_sort(monkeypatch, block, k):
    monkeypatch.setattr(module, "BLOCK", block)
    queries, documents = rows(0, 9), rows(1, 300)
    documents[250:] = documents[:50]  # every one of these ties
    indices, cosines = nearest(queries, documents, k)
    assert indices.tolist() == by_full_sort(queries, documents, k)
    expected = (queries @ documents.T)[np.arange(9)[:, None], indices]
    np.testing.assert_allclose(cosines, expected, atol=1e-5)


def test_cosines_below_zero_are_ranked_too(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    documents = -np.ones((5, 1), np.float32) * [[1.0], [0.5], [0.25], [0.75], [0.5]]
    indices, _ = nearest(np.ones((1, 1), np.float32), documents, 3)
    assert indices.tolist() == [[2, 1, 4]]


def test_only_what_beats_the_held_is_looked_at(monkeypatch):
    """Of 64 blocks of 100, few hold one of the three nearest so far."""
    monkeypatch.setattr(module, "BLOCK", 100)
    looked = []
    real = np.partition
    monkeypatch.setattr(np, "partition", lambda *a: looked.append(1) or real(*a))
    nearest(rows(0, 1), rows(1, 6400), 3)
    assert 1 <= len(looked) <= 25  # expected: sum of 3 / i over 64 blocks, about 12


def test_an_index_answers_by_what_it_holds_whatever_its_history():
    """Keys come and go at random; a fresh index with the same keys gives the same answer."""
    documents = rows(1, 60)
    documents[30:40] = documents[20:30]
    names = [f"b{n:02}" for n in range(60)]
    rng = np.random.default_rng(2)
    lived, held = Index(), set()
    for _ in range(300):
        n = int(rng.integers(60))
        if n in held:
            lived.drop(names[n])
            held.remove(n)
        else:
            lived.add({names[n]: documents[n]})
            held.add(n)
    fresh = Index()
    fresh.add({names[n]: documents[n] for n in sorted(held)})
    lived.drop("unknown")
    assert len(lived) == len(held) > 10
    kept = np.array(sorted(held))
    expected = by_full_sort(rows(0, 5), documents[kept], 4)
    for index in (lived, fresh):
        found = index.nearest(rows(0, 5), 4)
        assert [[key for _, key in row] for row in found] == [
            [names[kept[i]] for i in row] for row in expected
        ]


def test_an_index_of_nothing_finds_nothing():
    index = Index()
    assert index.nearest(rows(0, 2), 3) == [[], []]
    index.add({"a": rows(1, 1)[0]})
    index.drop("a")
    assert index.nearest(rows(0, 2), 3) == [[], []]
