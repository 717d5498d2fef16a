import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lory_jax.preparation.ordering import consecutive_similarity, order_by_similarity


def reference_order(neighbors, similarities, seed, backtrack):
    """The same rule with sets and full scans."""
    num_docs = len(neighbors)
    unused = set(range(num_docs))
    lost_at = {}
    clock = 0
    for doc in np.random.default_rng(seed).permutation(num_docs).tolist():
        lost_at[doc] = clock = clock + 1
    order = []
    while unused:
        doc = None
        for previous in order[::-1][: backtrack + 1]:
            candidates = [
                (-similarity, neighbor)
                for neighbor, similarity in zip(
                    neighbors[previous], similarities[previous], strict=True
                )
                if neighbor in unused
            ]
            if candidates:
                doc = min(candidates)[1]
                break
        if doc is None:
            doc = min(unused, key=lambda d: (sum(n in unused for n in neighbors[d]), -lost_at[d]))
        order.append(doc)
        unused.remove(doc)
        for other in range(num_docs):
            if doc in neighbors[other]:
                lost_at[other] = clock = clock + 1
    return order


@st.composite
def graphs(draw):
    num_docs = draw(st.integers(0, 25))
    width = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids_NxK = rng.integers(-1, max(num_docs, 1), (num_docs, width)).astype(np.int32)
    ids_NxK[rng.random(num_docs) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1  # isolated
    # Few distinct values, so that ties are common.
    similarities_NxK = rng.choice([-0.5, 0.0, 0.25, 1.0], (num_docs, width)).astype(np.float32)
    similarities_NxK[ids_NxK < 0] = -np.inf
    return ids_NxK, similarities_NxK


@settings(deadline=None, max_examples=200)
@given(graphs(), st.integers(0, 3), st.sampled_from([0, 1, 3, 64]))
def test_order_equals_the_reference(graph, seed, backtrack):
    ids_NxK, similarities_NxK = graph
    order_N = order_by_similarity(ids_NxK, similarities_NxK, seed=seed, backtrack=backtrack)
    assert order_N.dtype == np.int64
    assert sorted(order_N.tolist()) == list(range(len(ids_NxK)))
    expected = reference_order(ids_NxK.tolist(), similarities_NxK.tolist(), seed, backtrack)
    assert order_N.tolist() == expected


def test_two_rings_are_followed_one_after_the_other():
    ids_NxK = np.array([[(i + 1) % 50 + 50 * ring] for ring in (0, 1) for i in range(50)])
    order_N = order_by_similarity(ids_NxK, np.ones((100, 1), np.float32), seed=0)
    assert len(set((order_N[:50] // 50).tolist())) == 1
    assert np.all(np.diff(order_N[:50]) % 50 == 1)


def test_seed_decides_the_start_and_nothing_is_left_to_chance():
    ids_NxK = np.full((200, 3), -1)
    similarities_NxK = np.full((200, 3), -np.inf, np.float32)
    orders = [order_by_similarity(ids_NxK, similarities_NxK, seed=s).tolist() for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_backtracking_returns_to_the_latest_document_with_an_unused_neighbour():
    # 0 -> 1 -> 2 is a dead end; 1 still has 3, and 0 still has 4.
    ids_NxK = np.array([[1, 4], [2, 3], [0, 1], [1, 2], [0, 1]])
    similarities_NxK = np.tile(np.array([0.9, 0.5], np.float32), (5, 1))
    for seed in range(20):
        order = order_by_similarity(ids_NxK, similarities_NxK, seed=seed).tolist()
        if order[0] == 0:
            assert order == [0, 1, 2, 3, 4]
            return
    pytest.fail("no seed started at document 0")


@pytest.mark.parametrize("bad_id", [-2, 3])
def test_ids_outside_the_documents_raise(bad_id):
    with pytest.raises(ValueError, match="outside"):
        order_by_similarity(np.array([[1], [bad_id], [0]]), np.ones((3, 1)), seed=0)


def test_shapes_that_differ_raise():
    with pytest.raises(ValueError, match="similarities"):
        order_by_similarity(np.zeros((3, 2), np.int32), np.zeros((3, 1), np.float32), seed=0)


@pytest.mark.parametrize("num_docs", [2, 3, 65_537, 70_000])
def test_consecutive_similarity_equals_the_plain_mean(num_docs):
    rng = np.random.default_rng(num_docs)
    vectors_NxD = rng.normal(size=(num_docs, 3)).astype(np.float32)
    vectors_NxD /= np.linalg.norm(vectors_NxD, axis=1, keepdims=True)
    order_N = rng.permutation(num_docs)
    chain = vectors_NxD[order_N].astype(np.float64)
    expected = np.mean(np.sum(chain[:-1] * chain[1:], axis=1))
    assert consecutive_similarity(vectors_NxD, order_N) == pytest.approx(expected, abs=1e-6)


def test_consecutive_similarity_needs_two_documents():
    with pytest.raises(ValueError, match="1 documents"):
        consecutive_similarity(np.ones((1, 1)), np.array([0]))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 25), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_both_ways_adds_the_documents_that_have_one_as_a_neighbour(num_docs, width, seed):
    rng = np.random.default_rng(seed)
    ids_NxK = np.full((num_docs, width), -1, np.int32)
    similarities_NxK = np.full((num_docs, width), -np.inf, np.float32)
    for doc in range(num_docs):
        others = rng.permutation([other for other in range(num_docs) if other != doc])
        others = others[: rng.integers(0, width + 1)]
        ids_NxK[doc, : len(others)] = others
        similarities_NxK[doc, : len(others)] = np.sort(rng.random(len(others)))[::-1]
    wide = np.full((num_docs, 2 * width), -1, np.int32)
    similar = np.full((num_docs, 2 * width), -np.inf, np.float32)
    for doc in range(num_docs):
        edges = {i: s for i, s in zip(ids_NxK[doc], similarities_NxK[doc], strict=True) if i >= 0}
        for other in range(num_docs):
            for i, similarity in zip(ids_NxK[other], similarities_NxK[other], strict=True):
                if i == doc:
                    edges.setdefault(other, similarity)
        best = sorted(edges.items(), key=lambda edge: -edge[1])[: 2 * width]
        for i, (other, similarity) in enumerate(best):
            wide[doc, i], similar[doc, i] = other, similarity
    found = order_by_similarity(ids_NxK, similarities_NxK, seed=0, both_ways=True)
    assert found.tolist() == order_by_similarity(wide, similar, seed=0).tolist()


def test_both_ways_makes_consecutive_documents_more_similar():
    rng = np.random.default_rng(0)
    vectors_NxD = rng.normal(size=(600, 8)).astype(np.float32)
    vectors_NxD /= np.linalg.norm(vectors_NxD, axis=1, keepdims=True)
    similarity_NxN = vectors_NxD @ vectors_NxD.T
    np.fill_diagonal(similarity_NxN, -np.inf)
    ids_NxK = np.argsort(-similarity_NxN, axis=1)[:, :5].astype(np.int32)
    similarities_NxK = np.take_along_axis(similarity_NxN, ids_NxK, axis=1)
    one_way, both_ways = (
        consecutive_similarity(
            vectors_NxD, order_by_similarity(ids_NxK, similarities_NxK, seed=0, both_ways=both)
        )
        for both in (False, True)
    )
    assert both_ways > 1.01 * one_way
