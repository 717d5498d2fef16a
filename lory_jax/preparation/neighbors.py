"""The nearest neighbours of every document, by ScaNN.

Shapes: N documents, D dimensions, K neighbours, B documents of a batch.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from lory_jax.console import progress
from lory_jax.errors import InputError

BRUTE_FORCE_BELOW = 20_000
SEARCHED_SHARE = 0.1  # share of the tree's leaves that are searched
TRAINING_SAMPLE = 100_000
REORDERED = 120
HASH_CODES = 16  # per block of ScaNN; it cannot learn them from fewer documents
BATCH = 4096


@dataclass(frozen=True)
class Neighbors:
    """The neighbours of N documents, most similar first.

    Attributes:
      ids_NxK: int32; never the document itself; -1 where fewer than K were found.
      similarities_NxK: float32 cosines; -inf where the id is -1.
      method: how they were found, in words.
    """

    ids_NxK: np.ndarray
    similarities_NxK: np.ndarray
    method: str


def find_neighbors(
    vectors_NxD: np.ndarray, k: int, *, brute_force_below: int = BRUTE_FORCE_BELOW
) -> Neighbors:
    """Finds the `k` documents with the largest cosine for each document.

    Fewer than `brute_force_below` documents are compared with each other exactly. For more
    documents, the search uses ScaNN's tree with asymmetric hashing and rescores the best candidates
    exactly. Both give the same result, bit for bit, in every process and with any number of threads
    on one machine.

    Args:
      vectors_NxD: rows of length 1.
      k: neighbours per document, at least 1; may exceed N - 1.
      brute_force_below: from this number of documents on, the search is approximate.

    Raises:
      InputError: a row has a value that is not finite or a length other than 1, `k` is below 1, or
        ScaNN is not installed.
    """
    if k < 1:
        raise InputError(f"k: got {k} neighbours per document, must be at least 1")
    _check_unit_rows(vectors_NxD)
    num_docs = len(vectors_NxD)
    ids_NxK = np.full((num_docs, k), -1, np.int32)
    similarities_NxK = np.full((num_docs, k), -np.inf, np.float32)
    if num_docs < 2:
        return Neighbors(ids_NxK, similarities_NxK, "none: fewer than 2 documents")

    vectors_NxD = np.ascontiguousarray(vectors_NxD, np.float32)
    use_tree = num_docs >= max(brute_force_below, HASH_CODES)
    searcher, method = build_searcher(vectors_NxD, min(k + 1, num_docs), use_tree)
    starts = range(0, num_docs, BATCH)
    for start in progress(starts, len(starts), "finding neighbours", "batches"):
        rows = slice(start, min(start + BATCH, num_docs))
        found_ids_BxC, found_BxC = searcher.search_batched_parallel(vectors_NxD[rows])
        own_ids_B = np.arange(rows.start, rows.stop)
        ids_BxC, similarities_BxC = _keep_others(found_ids_BxC, found_BxC, own_ids_B)
        width = min(k, ids_BxC.shape[1])
        ids_NxK[rows, :width] = ids_BxC[:, :width]
        similarities_NxK[rows, :width] = similarities_BxC[:, :width]
    return Neighbors(ids_NxK, similarities_NxK, method)


def has_scann() -> bool:
    """Whether ScaNN is installed."""
    return importlib.util.find_spec("scann") is not None


def recall(approximate_ids_NxK: np.ndarray, exact_ids_NxK: np.ndarray) -> float:
    """Returns the share of the exact neighbours that are among the approximate ones.

    An id of -1 stands for no neighbour.
    """
    exact_per_doc = [set(row) - {-1} for row in exact_ids_NxK.tolist()]
    hits = sum(
        len(exact.intersection(row))
        for row, exact in zip(approximate_ids_NxK.tolist(), exact_per_doc, strict=True)
    )
    return hits / max(sum(map(len, exact_per_doc)), 1)


def _check_unit_rows(vectors_NxD: np.ndarray) -> None:
    """Raises at the first row whose length is not 1; NaN or Inf would crash ScaNN."""
    if vectors_NxD.ndim != 2:
        raise InputError(f"vectors: got shape {vectors_NxD.shape}, must be [documents, dimensions]")
    with np.errstate(over="ignore", invalid="ignore"):
        norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_NxD, vectors_NxD))
    good_N = np.abs(norms_N - 1) < 1e-3  # false for NaN too
    if not good_N.all():
        row = int(np.argmin(good_N))
        finite = "finite values" if np.isfinite(vectors_NxD[row]).all() else "NaN or Inf"
        raise InputError(
            f"vectors: row {row} has {finite} and length {norms_N[row]:g}, must have finite "
            "values and length 1"
        )


def build_searcher(vectors_NxD: np.ndarray, num_neighbors: int, use_tree: bool) -> tuple[Any, str]:
    """Returns a searcher that finds `num_neighbors` for a query, and its name."""
    builder = _import_scann().scann_ops_pybind.builder(vectors_NxD, num_neighbors, "dot_product")
    if not use_tree:
        return builder.score_brute_force().build(), "ScaNN brute force"
    leaves = int(len(vectors_NxD) ** 0.5)
    searched = max(1, round(leaves * SEARCHED_SHARE))
    # k-means++ (random_init=False): random initial centres would differ from process to process,
    # since ScaNN draws them through a hash of addresses in memory.
    builder.tree(leaves, searched, training_sample_size=TRAINING_SAMPLE, random_init=False)
    # Two dimensions per block: with four, recall falls by half.
    builder.score_ah(2, training_sample_size=TRAINING_SAMPLE)
    builder.reorder(max(REORDERED, 2 * num_neighbors))
    method = f"ScaNN tree with asymmetric hashing ({searched} of {leaves} leaves searched)"
    return builder.build(), method


def _import_scann() -> Any:
    try:
        import scann
    except ImportError as error:
        raise InputError(
            f"similarity order requires ScaNN ({error}): pip install scann==1.4.2, which has "
            "wheels for Linux on x86-64 and aarch64 with Python up to 3.13; random order, training "
            "and evaluation work without it"
        ) from None
    return scann


def _keep_others(
    ids_BxC: np.ndarray, similarities_BxC: np.ndarray, own_ids_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Moves each query itself and ScaNN's padding to the end of the row as (-1, -inf).

    A query is recognized by its id, not by its column: a duplicate may come before it or take its
    place.
    ScaNN pads with id 0 and similarity NaN.
    """
    drop_BxC = (ids_BxC == own_ids_B[:, None]) | ~np.isfinite(similarities_BxC)
    ids_BxC = np.where(drop_BxC, -1, ids_BxC.astype(np.int64))
    similarities_BxC = np.where(drop_BxC, -np.inf, similarities_BxC)
    kept_first_BxC = np.argsort(drop_BxC, axis=1, kind="stable")
    return (
        np.take_along_axis(ids_BxC, kept_first_BxC, axis=1),
        np.take_along_axis(similarities_BxC, kept_first_BxC, axis=1),
    )
