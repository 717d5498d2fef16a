import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from lory_jax.errors import InputError
from lory_jax.preparation.neighbors import BRUTE_FORCE_BELOW, find_neighbors, recall
from lory_jax.preparation.ordering import consecutive_similarity, order_by_similarity
from tests.support.tiny import ROOT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="ScaNN has wheels for Linux only; the rest works without it"
)


def clustered(num_docs, dim, clusters, noise, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    vectors = centres[rng.integers(0, clusters, num_docs)] + noise * rng.normal(
        size=(num_docs, dim)
    )
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def exact_ids(vectors_NxD, rows, k):
    cosines_RxN = vectors_NxD[rows] @ vectors_NxD.T
    cosines_RxN[np.arange(len(rows)), rows] = -np.inf
    return np.argsort(-cosines_RxN, axis=1, kind="stable")[:, :k]


@functools.cache
def large():
    vectors_NxD = clustered(24_000, 64, clusters=1_200, noise=0.3)
    return vectors_NxD, find_neighbors(vectors_NxD, 20)


def check_invariants(vectors_NxD, neighbors):
    ids_NxK, similarities_NxK = neighbors.ids_NxK, neighbors.similarities_NxK
    assert ids_NxK.dtype == np.int32 and similarities_NxK.dtype == np.float32
    assert not np.any(ids_NxK == np.arange(len(ids_NxK))[:, None])
    assert np.array_equal(ids_NxK == -1, similarities_NxK == -np.inf)
    assert not np.isnan(similarities_NxK).any()
    found = ids_NxK >= 0
    assert np.all(found[:, :-1] >= found[:, 1:])
    assert np.all(similarities_NxK[:, :-1] >= similarities_NxK[:, 1:])
    for row in ids_NxK:
        assert len(set(row[row >= 0].tolist())) == (row >= 0).sum()
    cosines_NxK = np.einsum("nd,nkd->nk", vectors_NxD, vectors_NxD[np.maximum(ids_NxK, 0)])
    np.testing.assert_allclose(similarities_NxK[found], cosines_NxK[found], atol=1e-5)


def test_tree_search_recalls_the_exact_neighbours():
    vectors_NxD, neighbors = large()
    assert len(vectors_NxD) >= BRUTE_FORCE_BELOW
    assert neighbors.method.startswith("ScaNN tree with asymmetric hashing")
    check_invariants(vectors_NxD, neighbors)
    rows = np.random.default_rng(1).choice(len(vectors_NxD), 2_000, replace=False)
    assert recall(neighbors.ids_NxK[rows], exact_ids(vectors_NxD, rows, 20)) >= 0.95


def test_order_from_the_tree_is_far_better_than_random():
    vectors_NxD, neighbors = large()
    order_N = order_by_similarity(neighbors.ids_NxK, neighbors.similarities_NxK, seed=0)
    assert np.array_equal(np.sort(order_N), np.arange(len(vectors_NxD)))
    random_N = np.random.default_rng(0).permutation(len(vectors_NxD))
    similar = consecutive_similarity(vectors_NxD, order_N)
    random = consecutive_similarity(vectors_NxD, random_N)
    assert similar > random + 0.5


def test_brute_force_is_exact():
    vectors_NxD = clustered(1_500, 24, clusters=60, noise=0.5)
    neighbors = find_neighbors(vectors_NxD, 7)
    assert neighbors.method == "ScaNN brute force"
    check_invariants(vectors_NxD, neighbors)
    assert recall(neighbors.ids_NxK, exact_ids(vectors_NxD, np.arange(1_500), 7)) > 0.9999


DIGEST = """
import hashlib, os, sys
if sys.argv[1] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.preparation.test_neighbors import clustered, find_neighbors
vectors = clustered(6_000, 32, clusters=200, noise=0.5)
vectors[::7] = vectors[0]
for threshold in (100, 20_000):
    found = find_neighbors(vectors, 10, brute_force_below=threshold)
    data = found.ids_NxK.tobytes() + found.similarities_NxK.tobytes()
    print(hashlib.sha256(data).hexdigest())
"""


def test_both_methods_repeat_bit_for_bit_in_new_processes_and_on_one_core():
    # Several processes: what depends on addresses in memory agrees by chance half of the time.
    digests = set()
    for cores in ("all cores", "all cores", "all cores", "all cores", "one core"):
        digests.add(
            subprocess.run(
                [sys.executable, "-c", DIGEST, cores],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            ).stdout
        )
    assert len(digests) == 1
    assert len(digests.pop().split()) == 2


@pytest.mark.parametrize("threshold", [0, 20_000])
def test_rows_are_padded_when_k_exceeds_the_other_documents(threshold):
    vectors_NxD = clustered(20, 5, clusters=20, noise=0.1)
    neighbors = find_neighbors(vectors_NxD, 30, brute_force_below=threshold)
    assert neighbors.ids_NxK.shape == (20, 30)
    check_invariants(vectors_NxD, neighbors)
    assert np.all(neighbors.ids_NxK[:, 19:] == -1)
    if threshold:
        assert np.all(neighbors.ids_NxK[:, :19] >= 0)


def test_leaves_with_too_few_candidates_give_padding_and_not_document_0():
    vectors_NxD = clustered(400, 8, clusters=40, noise=0.1)
    neighbors = find_neighbors(vectors_NxD, 200, brute_force_below=100)
    check_invariants(vectors_NxD, neighbors)
    assert np.any(neighbors.ids_NxK == -1)


@pytest.mark.parametrize("num_docs", [0, 1, 2, 3, 15])
def test_very_few_documents(num_docs):
    vectors_NxD = clustered(num_docs, 4, clusters=5, noise=0.2)
    neighbors = find_neighbors(vectors_NxD, 3, brute_force_below=0)
    check_invariants(vectors_NxD, neighbors)
    assert np.all((neighbors.ids_NxK >= 0).sum(axis=1) == min(3, max(num_docs - 1, 0)))


@pytest.mark.parametrize("threshold", [100, 20_000])
def test_exact_duplicates_are_neighbours_of_each_other_but_never_of_themselves(threshold):
    vectors_NxD = clustered(500, 16, clusters=50, noise=0.2)
    vectors_NxD[100:140] = vectors_NxD[100]
    neighbors = find_neighbors(vectors_NxD, 5, brute_force_below=threshold)
    check_invariants(vectors_NxD, neighbors)
    duplicates_5 = neighbors.ids_NxK[100:140]
    assert np.all((duplicates_5 >= 100) & (duplicates_5 < 140))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "row 3 has NaN or Inf"),
        (np.inf, "row 3 has NaN or Inf"),
        (-np.inf, "row 3 has NaN or Inf"),
        (2.0, "row 3 has finite values and length"),
        (1e30, "row 3 has finite values and length inf"),
    ],
)
def test_bad_vectors_raise_before_scann_sees_them(value, message):
    vectors_NxD = clustered(30, 4, clusters=5, noise=0.2)
    vectors_NxD[[3, 7], 2] = value
    with pytest.raises(InputError, match=message):
        find_neighbors(vectors_NxD, 3)


def test_bad_shape_and_k_raise():
    with pytest.raises(InputError, match="shape"):
        find_neighbors(np.ones(4, np.float32), 3)
    with pytest.raises(InputError, match="got 0"):
        find_neighbors(np.ones((4, 1), np.float32), 0)


def test_missing_scann_says_how_to_install_it_and_what_works_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(InputError, match=r"pip install scann.*aarch64.*random order"):
        find_neighbors(np.ones((4, 1), np.float32), 2)


def test_any_layout_and_float_type_gives_the_same():
    vectors_NxD = clustered(300, 12, clusters=20, noise=0.4)
    expected = find_neighbors(vectors_NxD, 4)
    for other in (np.asfortranarray(vectors_NxD), vectors_NxD.astype(np.float64)):
        found = find_neighbors(other, 4)
        np.testing.assert_array_equal(found.ids_NxK, expected.ids_NxK)


def test_recall_counts_shared_neighbours():
    assert recall(np.array([[1, 2], [0, -1]]), np.array([[2, 3], [0, -1]])) == pytest.approx(2 / 3)
    assert recall(np.zeros((0, 2)), np.zeros((0, 2))) == 0
