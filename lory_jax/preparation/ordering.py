"""The similarity order: a greedy chain through the graph of nearest neighbours.

Shapes: N documents, D dimensions, K neighbours.
"""

from collections.abc import Iterator

import numpy as np
from numba import njit

BACKTRACK = 64
CHUNK = 65_536


def order_by_similarity(
    neighbors_NxK: np.ndarray,
    similarities_NxK: np.ndarray,
    *,
    seed: int,
    backtrack: int = BACKTRACK,
    both_ways: bool = False,
) -> np.ndarray:
    """Returns a permutation of the documents in which each is followed by a similar one.

    The chain continues with the most similar unused neighbour of its last document (the lowest id
    among equals). If that document has none left, the chain continues from the latest of the
    `backtrack` documents before it that has one. If none of them has one, it restarts at the unused
    document with the fewest unused neighbours, which would become unreachable soonest. Among
    equals, it restarts at the one that lost a neighbour last, which is related to the end of the
    chain. Before any document has lost a neighbour, `seed` decides.

    Args:
      neighbors_NxK: ids of each document's neighbours, -1 for none.
      similarities_NxK: their similarities.
      seed: decides between documents that nothing else distinguishes.
      backtrack: how many documents to go back before a restart, at least 0.
      both_ways: whether the chain may go from a document to one that has it as a neighbour, too.
        This makes consecutive documents more similar; without it, the order is that of earlier
        versions.

    Returns:
      int64 `[N]`.
    """
    num_docs = len(neighbors_NxK)
    if neighbors_NxK.shape != similarities_NxK.shape:
        raise ValueError(f"got {neighbors_NxK.shape} ids but {similarities_NxK.shape} similarities")
    if neighbors_NxK.size and not -1 <= neighbors_NxK.min() <= neighbors_NxK.max() < num_docs:
        raise ValueError(f"neighbour ids outside -1..{num_docs - 1}")
    if both_ways:
        neighbors_NxK, similarities_NxK = _both_ways(neighbors_NxK, similarities_NxK)
    first_ranks_N = np.random.default_rng(seed).permutation(num_docs)
    return _chain(neighbors_NxK, similarities_NxK, first_ranks_N, backtrack)


def consecutive_similarity(vectors_NxD: np.ndarray, order_N: np.ndarray) -> float:
    """Returns the mean cosine of consecutive documents, for rows of length 1 and N ≥ 2."""
    if len(order_N) < 2:
        raise ValueError(f"{len(order_N)} documents have no consecutive pair")
    cosines = consecutive_cosines(vectors_NxD, order_N)
    total = sum(float(cosines_C.sum(dtype=np.float64)) for cosines_C in cosines)
    return total / (len(order_N) - 1)


def consecutive_cosines(vectors_NxD: np.ndarray, order_N: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the cosines of consecutive documents in pieces, for rows of length 1."""
    for start in range(0, len(order_N) - 1, CHUNK):
        chain_CxD = vectors_NxD[order_N[start : start + CHUNK + 1]]
        yield np.einsum("cd,cd->c", chain_CxD[:-1], chain_CxD[1:])


@njit
def _chain(neighbors_NxK, similarities_NxK, first_ranks_N, backtrack):  # type: ignore[no-untyped-def]
    num_docs, width = neighbors_NxK.shape
    starts, sources = _reverse(neighbors_NxK)

    # The unused documents are in one doubly linked list per number of unused neighbours (a bucket),
    # so that each of the N x K changes of such a number takes constant time.
    unused_neighbors = np.zeros(num_docs, np.int64)
    used = np.zeros(num_docs, np.bool_)
    heads = np.full(width + 1, -1, np.int64)
    before = np.full(num_docs, -1, np.int64)
    after = np.full(num_docs, -1, np.int64)
    for doc in first_ranks_N:
        unused_neighbors[doc] = (neighbors_NxK[doc] >= 0).sum()
        _push(doc, unused_neighbors[doc], heads, before, after)

    order = np.empty(num_docs, np.int64)
    for position in range(num_docs):
        doc = -1
        for back in range(1, min(backtrack + 1, position) + 1):
            previous = order[position - back]
            if unused_neighbors[previous] > 0:
                doc = _best_unused(neighbors_NxK[previous], similarities_NxK[previous], used)
                break
        if doc < 0:
            doc = _first_of_lowest(heads)
        order[position] = doc
        used[doc] = True
        _remove(doc, unused_neighbors[doc], heads, before, after)
        for i in range(starts[doc], starts[doc + 1]):
            source = sources[i]
            if not used[source]:
                _remove(source, unused_neighbors[source], heads, before, after)
                _push(source, unused_neighbors[source] - 1, heads, before, after)
            unused_neighbors[source] -= 1
    return order


@njit
def _reverse(neighbors_NxK):  # type: ignore[no-untyped-def]
    """Returns, in compressed rows, which documents have each document as a neighbour."""
    num_docs = len(neighbors_NxK)
    starts = np.zeros(num_docs + 1, np.int64)
    for doc in range(num_docs):
        for target in neighbors_NxK[doc]:
            if target >= 0:
                starts[target + 1] += 1
    starts = np.cumsum(starts)
    sources = np.empty(starts[-1], np.int32)
    ends = starts.copy()
    for doc in range(num_docs):
        for target in neighbors_NxK[doc]:
            if target >= 0:
                sources[ends[target]] = doc
                ends[target] += 1
    return starts, sources


@njit
def _both_ways(neighbors_NxK, similarities_NxK):  # type: ignore[no-untyped-def]
    """Adds to each document those that have it as a neighbour; keeps the 2 K most similar."""
    num_docs, width = neighbors_NxK.shape
    starts, sources = _reverse(neighbors_NxK)
    ids = np.full((num_docs, 2 * width), -1, np.int32)
    similarities = np.full((num_docs, 2 * width), -np.inf, np.float32)
    for doc in range(num_docs):
        mine = neighbors_NxK[doc]
        found_ids = np.empty(width + starts[doc + 1] - starts[doc], np.int32)
        found = np.empty(len(found_ids), np.float32)
        count = 0
        for i in range(width):
            if mine[i] >= 0:
                found_ids[count], found[count] = mine[i], similarities_NxK[doc, i]
                count += 1
        for source in sources[starts[doc] : starts[doc + 1]]:
            if not (mine == source).any():
                for i in range(width):
                    if neighbors_NxK[source, i] == doc:
                        found_ids[count], found[count] = source, similarities_NxK[source, i]
                count += 1
        best = np.argsort(-found[:count], kind="mergesort")[: 2 * width]
        for i in range(len(best)):
            ids[doc, i], similarities[doc, i] = found_ids[best[i]], found[best[i]]
    return ids, similarities


@njit
def _best_unused(ids_K, similarities_K, used):  # type: ignore[no-untyped-def]
    best = -1
    best_similarity = -np.inf
    for i in range(len(ids_K)):
        doc, similarity = ids_K[i], similarities_K[i]
        if doc < 0 or used[doc]:
            continue
        tie = similarity == best_similarity and doc < best
        if best < 0 or similarity > best_similarity or tie:
            best, best_similarity = doc, similarity
    return best


@njit
def _first_of_lowest(heads):  # type: ignore[no-untyped-def]
    for head in heads:
        if head >= 0:
            return head
    return -1


@njit
def _push(doc, bucket, heads, before, after):  # type: ignore[no-untyped-def]
    head = heads[bucket]
    before[doc], after[doc] = -1, head
    if head >= 0:
        before[head] = doc
    heads[bucket] = doc


@njit
def _remove(doc, bucket, heads, before, after):  # type: ignore[no-untyped-def]
    if before[doc] >= 0:
        after[before[doc]] = after[doc]
    else:
        heads[bucket] = after[doc]
    if after[doc] >= 0:
        before[after[doc]] = before[doc]
