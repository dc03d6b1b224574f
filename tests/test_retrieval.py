"""Neighbours and clusters: small cases worked by hand."""

import fakes
import numpy as np
import pytest
from fakes import behavior

from pmd_jax.memory.bank import Bank, MemoryConfig, Operation
from pmd_jax.memory.nearest import nearest
from pmd_jax.memory.retrieval import Retriever, cluster_count, spherical_kmeans


def unit(angles):
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_nearest_by_angle():
    documents = unit(np.radians([0, 90, 30]))
    indices, cosines = nearest(unit(np.radians([10])), documents, k=2)
    assert indices.tolist() == [[0, 2]]
    np.testing.assert_allclose(
        cosines, [[np.cos(np.radians(10)), np.cos(np.radians(20))]], atol=1e-5
    )


def test_equally_near_documents_come_by_index():
    documents = unit(np.radians([20, 10, 10, -10, 9.9995]))  # the last by 2e-6 of cosine
    indices, _ = nearest(unit(np.zeros(1)), documents, k=9)
    assert indices.tolist() == [[1, 2, 3, 4, 0]]


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k: must be at least 1; got 0"):
        nearest(unit(np.zeros(1)), unit(np.zeros(1)), k=0)


@pytest.mark.parametrize(("n", "k"), [(3, 3), (100, 8), (500, 20), (10_000, 64)])
def test_about_25_problems_in_a_cluster(n, k):
    assert cluster_count(n) == k


def test_three_bundles_of_directions_are_found():
    rng = np.random.default_rng(0)
    middle = np.repeat([0, 120, 240], 20)
    order = rng.permutation(60)
    angles = np.radians(middle[order] + rng.normal(0, 5, 60))
    labels = spherical_kmeans(unit(angles), 3, seed=1)
    for bundle in (0, 120, 240):
        assert len(set(labels[middle[order] == bundle])) == 1
    assert len(set(labels)) == 3 and labels[0] == 0


def test_clusters_depend_on_the_seed_alone_and_length_of_rows_is_kept():
    points = np.random.default_rng(3).normal(size=(40, 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    first, second = (spherical_kmeans(points, 5, seed=7) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert np.allclose(np.linalg.norm(points, axis=1), 1)


def test_equal_points_share_a_cluster():
    assert spherical_kmeans(unit(np.zeros(4)), 3, seed=0).tolist() == [0, 0, 0, 0]


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ValueError, match="k: must be between 1 and the 2 points; got 3"):
        spherical_kmeans(unit(np.zeros(2)), 3, seed=0)


def test_behaviors_nearest_to_the_question_come_first_and_texts_are_embedded_once():
    bank = Bank(MemoryConfig())
    light = behavior(
        "behavior_bend_light", when="If light bends", instruction="apply the law of Snell"
    )
    bank.apply_operations(0, [Operation("ADD", b) for b in (behavior(), light)], fakes.embed)
    seen = []

    def embed(texts):
        seen.extend(texts)
        return fakes.embed(texts)

    retriever = Retriever(embed, query_prefix="Find: ")
    masses, optics = fakes.problem(0), fakes.problem(1, "By how much is light bent by the law?")
    for _ in range(2):
        found = retriever.behaviors_for([masses, optics], bank, k=1)
    assert [[b.name for b in row] for row in found] == [
        ["behavior_sum_masses"],
        ["behavior_bend_light"],
    ]
    assert len(seen) == len(set(seen)) == 4
    assert f"Find: {masses.question}" in seen


def test_a_behavior_that_changed_or_left_is_found_as_it_is_now():
    bank = Bank(MemoryConfig(behaviors=1))
    retriever = Retriever(fakes.embed)
    for step, name in enumerate(["behavior_sum_masses", "behavior_other", "behavior_other"]):
        new = behavior(name, step, kind="mistake" if step else "skill", instruction=f"count {step}")
        bank.apply_operations(step, [Operation("UPDATE", new)], retriever.embed)
        ((found,),) = retriever.behaviors_for([fakes.problem()], bank, k=3)
        assert found == bank.behaviors[0] and found.instruction == f"count {step}"
        bank.cite(step, [found.id])
        assert retriever.behaviors_for([fakes.problem()], bank, k=3) == [[bank.behaviors[0]]]


def test_merging_and_retrieval_share_the_vectors_of_behaviors():
    seen = []

    def embed(texts):
        seen.extend(texts)
        return fakes.embed(texts)

    bank, retriever = Bank(MemoryConfig()), Retriever(embed)
    for step in range(4):
        new = behavior(f"behavior_{step}", step, instruction=f"apply rule {step} " * 9)
        bank.apply_operations(step, [Operation("ADD", new)], retriever.embed)
        retriever.behaviors_for([fakes.problem()], bank, k=1)
    assert len(seen) == len(set(seen)) == 5


def test_an_empty_bank_has_nothing_to_retrieve():
    assert Retriever(fakes.embed).behaviors_for([fakes.problem()], Bank(MemoryConfig()), 3) == [[]]
