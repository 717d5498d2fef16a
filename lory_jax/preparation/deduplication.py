"""Exact duplicates by hash, and near duplicates among the neighbours of each document.

Two documents are near duplicates if their vectors are almost parallel **and** they share most of
their shingles (runs of a few tokens) **and** what lies between their common beginning and their
common end is short, or shares its shingles too. The last condition keeps files apart that are alike
only in a long licence header.

N documents, K neighbours.
"""

from collections.abc import Iterator

import numpy as np
from numba import njit

from lory_jax.preparation.engine.columns import Ragged

COSINE = 0.95
JACCARD = 0.7
SHINGLE_BYTES = 24  # about; a shingle is a number of tokens
# What lies between the common beginning and the common end of two documents.
SHORT_DIFFERENCE_SHINGLES = 2
SHORT_DIFFERENCE_SHARE = 0.01
DIFFERENCE_JACCARD = 0.4
DIFFERENCE_SHINGLE = 1 / 3  # shingles are shorter there, since there is less between two edits
# Of a group of near duplicates so many kept documents are compared with the next one.
COMPARED = 32
# An estimate by so many bins has a standard deviation of 0.06; pairs estimated lower are left out.
BINS = 64
LIKELY = 0.45
PAIRS_AT_ONCE = 100_000
EMPTY = np.uint64(2**64 - 1)
MULTIPLIER = 0x9E3779B97F4A7C15


def repeated(digest_Nx2: np.ndarray, place_Nx2: np.ndarray) -> np.ndarray:
    """Returns the indices of documents that are equal to one of a lower place.

    Args:
      digest_Nx2: the documents' hashes.
      place_Nx2: where each was read: task and row.
    """
    order_N = np.lexsort((place_Nx2[:, 1], place_Nx2[:, 0], digest_Nx2[:, 1], digest_Nx2[:, 0]))
    sorted_Nx2 = digest_Nx2[order_N]
    is_repeated_N = np.zeros(len(order_N), bool)
    is_repeated_N[1:] = (sorted_Nx2[1:] == sorted_Nx2[:-1]).all(axis=1)
    return order_N[is_repeated_N]


def near_duplicates(
    ids_NxK: np.ndarray,
    similarities_NxK: np.ndarray,
    tokens: Ragged,
    width: int,
) -> dict[int, int]:
    """Returns which documents repeat another one, and which.

    Of each group of near duplicates the document of lowest number is kept.

    Args:
      ids_NxK: the neighbours of each document, -1 for none.
      similarities_NxK: their cosines.
      tokens: those of each document.
      width: tokens of a shingle.
    """
    rows, columns = np.nonzero((similarities_NxK > COSINE) & (ids_NxK >= 0))
    ids = ids_NxK[rows, columns]
    likely = _estimated_jaccard(tokens, width, rows, ids) > LIKELY
    repeats: dict[int, int] = {}
    for group in _groups(len(ids_NxK), rows[likely], ids[likely]):
        kept: list[int] = []
        for doc in group:
            others = reversed(kept[-COMPARED:])
            of = next((o for o in others if is_near(tokens[doc], tokens[o], width)), None)
            if of is None:
                kept.append(doc)
            else:
                repeats[doc] = of
    return repeats


def _estimated_jaccard(tokens: Ragged, width: int, a_P: np.ndarray, b_P: np.ndarray) -> np.ndarray:
    """Returns, for pairs of documents, about the share of shingles that both have.

    The shingles are dealt into bins by their hashes. The lowest hash of a bin is the same in two
    documents as often as they share a shingle. Documents of one topic are close to each other by
    the thousand; this tells at little cost that they are not copies.
    """
    if not len(a_P):
        return np.empty(0)
    sketches_NxB = _sketches(tokens.values, tokens.starts_N1, width, BINS)
    pieces = []
    for start in range(0, len(a_P), PAIRS_AT_ONCE):
        pair = slice(start, start + PAIRS_AT_ONCE)
        a_CxB, b_CxB = sketches_NxB[a_P[pair]], sketches_NxB[b_P[pair]]
        filled_C = ((a_CxB != EMPTY) | (b_CxB != EMPTY)).sum(axis=1)
        same_C = ((a_CxB == b_CxB) & (a_CxB != EMPTY)).sum(axis=1)
        pieces.append(same_C / np.maximum(filled_C, 1))
    return np.concatenate(pieces)


@njit
def _sketches(values, starts_N1, width, bins):  # type: ignore[no-untyped-def]
    sketches = np.full((len(starts_N1) - 1, bins), EMPTY)
    for doc in range(len(starts_N1) - 1):
        start, stop = starts_N1[doc], starts_N1[doc + 1]
        for first in range(start, max(stop - width, start) + 1):
            mixed = np.uint64(0)
            for at in range(first, min(first + width, stop)):
                mixed = (mixed + np.uint64(values[at]) + np.uint64(1)) * np.uint64(MULTIPLIER)
                mixed ^= mixed >> np.uint64(29)
            slot = mixed % np.uint64(bins)
            sketches[doc, slot] = min(sketches[doc, slot], mixed)
    return sketches


def shingle_width(bytes_per_token: float) -> int:
    """Returns the tokens of a shingle; of fewer bytes, all texts of few words would share them."""
    return max(1, round(SHINGLE_BYTES / bytes_per_token))


def is_near(a: np.ndarray, b: np.ndarray, width: int) -> bool:
    """Whether the tokens of two documents are nearly the same, by shingles of `width` tokens."""
    shorter, longer = sorted((len(a), len(b)))
    if shorter < JACCARD * longer or _jaccard(a, b, width) < JACCARD:
        return False
    a, b = _differing_parts(a, b)
    short = max(SHORT_DIFFERENCE_SHINGLES * width, SHORT_DIFFERENCE_SHARE * longer)
    narrow = max(1, round(width * DIFFERENCE_SHINGLE))
    return max(len(a), len(b)) <= short or _jaccard(a, b, narrow) >= DIFFERENCE_JACCARD


def _differing_parts(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is left of both without their common beginning and their common end."""
    width = min(len(a), len(b))
    head = int(np.argmin(np.append(a[:width] == b[:width], False)))
    a, b = a[head:], b[head:]
    width = min(len(a), len(b))
    same = a[len(a) - width :][::-1] == b[len(b) - width :][::-1]
    tail = int(np.argmin(np.append(same, False)))
    return a[: len(a) - tail], b[: len(b) - tail]


def _jaccard(a: np.ndarray, b: np.ndarray, width: int) -> float:
    """Returns the share of distinct shingles that both have."""
    a_shingles, b_shingles = _shingles(a, width), _shingles(b, width)
    union = np.union1d(a_shingles, b_shingles)
    if not len(union):
        return float(np.array_equal(a, b))
    return (len(a_shingles) + len(b_shingles) - len(union)) / len(union)


def _shingles(tokens: np.ndarray, width: int) -> np.ndarray:
    """Returns the distinct shingles as hashes; documents shorter than a shingle have one."""
    if not len(tokens):
        return np.empty(0, np.uint64)
    count = max(len(tokens) - width + 1, 1)
    hashes = np.zeros(count, np.uint64)
    for shift in range(min(width, len(tokens))):
        # Wraps around: only equality matters.
        following = tokens[shift : shift + count].astype(np.uint64)
        hashes = (hashes + following + np.uint64(1)) * np.uint64(MULTIPLIER)
    return np.unique(hashes)


def _groups(num_docs: int, rows: np.ndarray, ids: np.ndarray) -> Iterator[list[int]]:
    """Yields the members, ascending, of every group of at least two that pairs connect."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    if not len(rows):
        return
    graph = csr_array((np.ones(len(rows), bool), (rows, ids)), shape=(num_docs, num_docs))
    _, label_N = connected_components(graph, directed=False)
    members = np.unique(np.concatenate([rows, ids]))
    by_label = members[np.argsort(label_N[members], kind="stable")]
    borders = np.flatnonzero(np.diff(label_N[by_label])) + 1
    for group in np.split(by_label, borders):
        yield [int(doc) for doc in group]
