"""Clusters of similar documents, small enough to be ordered on their own.

A tree of k-means splits a sample until every leaf stands for few enough documents. Its leaves are
numbered from left to right, so that leaves with close numbers hold similar documents.

S documents of a sample, N documents, C leaves, D dimensions.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 20
WIDEST = 8  # parts that a node is split into at once
FEWEST_IN_SAMPLE = 16  # a node with fewer sampled documents is not split
CHUNK = 8192


def leaf_centres(
    vectors_SxD: np.ndarray, num_documents: int, largest: int, seed: int
) -> np.ndarray:
    """Returns the centres of the leaves, `[C, D]`, from left to right.

    Args:
      vectors_SxD: a sample, with rows of length 1.
      num_documents: documents that the sample stands for.
      largest: documents that a leaf should stand for at most.
      seed: decides the first centres.
    """
    scale = num_documents / len(vectors_SxD)
    return np.stack(_split(vectors_SxD, scale, largest, seed % 2**16))


def _split(vectors_SxD: np.ndarray, scale: float, largest: int, seed: int) -> list[np.ndarray]:
    """The centres of the leaves of one node, each of whose rows stands for `scale` documents."""
    stands_for = len(vectors_SxD) * scale
    if stands_for <= largest or len(vectors_SxD) < FEWEST_IN_SAMPLE:
        return [_centre(vectors_SxD)]
    parts = min(WIDEST, 1 + int(stands_for // largest))
    labels = kmeans(vectors_SxD, parts, seed)
    if len(set(labels.tolist())) == 1:  # equal vectors
        return [_centre(vectors_SxD)]
    return [
        centre
        for part in range(parts)
        if (labels == part).any()
        for centre in _split(vectors_SxD[labels == part], scale, largest, seed * WIDEST + part + 1)
    ]


def kmeans(vectors_SxD: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Returns the part of each row, `[S]`, by k-means on the sphere from k-means++ centres."""
    rng = np.random.default_rng(seed)
    centres = vectors_SxD[rng.integers(len(vectors_SxD))][None]
    while len(centres) < parts:
        distance_S = np.maximum(1 - (vectors_SxD @ centres.T).max(axis=1), 0).astype(np.float64)
        if distance_S.sum() < 1e-9:
            break
        chosen = rng.choice(len(vectors_SxD), p=distance_S / distance_S.sum())
        centres = np.concatenate([centres, vectors_SxD[chosen][None]])
    labels_S = nearest(vectors_SxD, centres)
    for _ in range(ROUNDS):
        centres = np.stack(
            [
                _centre(vectors_SxD[labels_S == part]) if (labels_S == part).any() else centre
                for part, centre in enumerate(centres)
            ]
        )
        before, labels_S = labels_S, nearest(vectors_SxD, centres)
        if np.array_equal(before, labels_S):
            break
    return labels_S


def nearest(vectors_NxD: np.ndarray, centres_CxD: np.ndarray) -> np.ndarray:
    """Returns the number of the nearest centre of each row, int64 `[N]`.

    The result is the same with any number of threads.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    pieces = [np.empty(0, np.int64)]
    with threadpool_limits(1):
        for start in range(0, len(vectors_NxD), CHUNK):
            similarity_BxC = vectors_NxD[start : start + CHUNK] @ centres_CxD.T
            pieces.append(similarity_BxC.argmax(axis=1))
    return np.concatenate(pieces)


def merge_small(counts_C: Sequence[int], smallest: int, largest: int) -> list[tuple[int, int]]:
    """Returns ranges of leaves, `(first, last + 1)`, that cover all leaves from left to right.

    A range of fewer than `smallest` documents is joined with its smaller neighbour, unless they
    would have more than `largest` together.
    """
    ranges = [(leaf, leaf + 1) for leaf in range(len(counts_C))]
    sizes = list(counts_C)
    stuck: set[tuple[int, int]] = set()
    while True:
        small = [i for i, size in enumerate(sizes) if size < smallest and ranges[i] not in stuck]
        if not small:
            return ranges
        i = min(small, key=lambda i: sizes[i])
        beside = [j for j in (i - 1, i + 1) if 0 <= j < len(sizes)]
        fitting = [j for j in beside if sizes[i] + sizes[j] <= largest]
        if not fitting:
            stuck.add(ranges[i])
            continue
        j = min(fitting, key=lambda j: sizes[j])
        low, high = min(i, j), max(i, j)
        ranges[low : high + 1] = [(ranges[low][0], ranges[high][1])]
        sizes[low : high + 1] = [sizes[low] + sizes[high]]


def _centre(vectors_SxD: np.ndarray) -> np.ndarray:
    mean_D = vectors_SxD.mean(axis=0, dtype=np.float64)
    return (mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)).astype(np.float32)
