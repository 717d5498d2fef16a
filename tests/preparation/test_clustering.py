import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lory_jax.preparation.clustering import kmeans, leaf_centres, merge_small, nearest
from lory_jax.preparation.neighbors import find_neighbors
from lory_jax.preparation.ordering import consecutive_similarity, order_by_similarity


def clustered(num_docs, topics, dim=32, noise=1.0, seed=0):
    """Returns unit vectors around random centres, and the topic of each."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(topics, dim))
    topic = rng.integers(topics, size=num_docs)
    vectors = centres[topic] + noise * rng.normal(size=(num_docs, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), topic


def order(vectors):
    found = find_neighbors(vectors, 20)
    return order_by_similarity(found.ids_NxK, found.similarities_NxK, seed=0)


def test_sixteen_shards_lose_at_most_two_percent():
    vectors, _ = clustered(12_000, topics=300, dim=64, noise=0.6)
    whole = consecutive_similarity(vectors, order(vectors))
    centres = leaf_centres(vectors[:6000], len(vectors), 120, seed=0)
    leaf = nearest(vectors, centres)
    counts = np.bincount(leaf, minlength=len(centres))
    shards = merge_small(counts.tolist(), 500, 1000)
    assert len(shards) >= 16
    rows = [np.flatnonzero((leaf >= first) & (leaf < end)) for first, end in shards]
    assert max(map(len, rows)) <= 1000
    joined = np.concatenate([mine[order(vectors[mine])] for mine in rows])
    assert sorted(joined.tolist()) == list(range(len(vectors)))
    assert consecutive_similarity(vectors, joined) >= 0.98 * whole


def test_clear_clusters_are_found():
    vectors, topic = clustered(2000, topics=5, noise=0.05)
    labels = kmeans(vectors, 5, seed=0)
    pairs = set(zip(labels.tolist(), topic.tolist(), strict=True))
    assert len(pairs) == 5


def test_leaves_beside_each_other_are_similar():
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(4, 32))
    vectors = np.concatenate([g + 0.3 * rng.normal(size=(12, 32)) for g in groups])
    vectors = np.repeat(vectors, 40, axis=0) + 0.02 * rng.normal(size=(48 * 40, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    centres = leaf_centres(vectors, len(vectors), 60, seed=0)
    beside = np.mean(np.sum(centres[:-1] * centres[1:], axis=1))
    shuffled = centres[rng.permutation(len(centres))]
    assert len(centres) > 16
    assert beside > np.mean(np.sum(shuffled[:-1] * shuffled[1:], axis=1)) + 0.2


def test_equal_vectors_are_one_leaf():
    vectors = np.tile(np.eye(4, dtype=np.float32)[:1], (500, 1))
    assert len(leaf_centres(vectors, 500, 100, seed=0)) == 1


def test_the_result_is_the_same_again():
    vectors, _ = clustered(3000, topics=50)
    first, second = (leaf_centres(vectors, 3000, 300, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 100))
def test_merged_ranges_cover_all_leaves(counts, smallest):
    largest = 300
    ranges = merge_small(counts, smallest, largest)
    assert ranges[0][0] == 0 and ranges[-1][1] == len(counts)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    sizes = [sum(counts[first:end]) for first, end in ranges]
    for i, (size, (first, end)) in enumerate(zip(sizes, ranges, strict=True)):
        assert size <= largest or end == first + 1
        if size < smallest:
            beside = [sizes[j] for j in (i - 1, i + 1) if 0 <= j < len(sizes)]
            assert all(size + other > largest for other in beside)


@pytest.mark.parametrize("chunk", [1, 7, 5000])
def test_nearest_is_the_nearest(monkeypatch, chunk):
    monkeypatch.setattr("lory_jax.preparation.clustering.CHUNK", chunk)
    vectors, _ = clustered(50, topics=5)
    np.testing.assert_array_equal(nearest(vectors, vectors), np.arange(50))
