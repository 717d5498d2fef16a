"""How similar consecutive documents are: one graph, shards, and the rule of In-Context Pretraining.

    python benchmarks/ordering.py --file=VECTORS.npy [--noise=N] [--json=FILE]

VECTORS.npy are unit vectors, such as WORK/encode/00000/train/vectors.npy that `prepare` writes;
--noise makes N vectors that hardly have topics (64 dimensions, a random direction as long as that
of the topic). Every order walks over the graph of the 20 nearest neighbours, except that the last
one has the settings of the public script: 9 neighbours, and a restart every 21 documents. Both
rules are written anew from their descriptions (arXiv 2310.10638, section 2.2).
"""

import argparse
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from prepare import machine

from lory_jax.preparation.clustering import leaf_centres, nearest
from lory_jax.preparation.neighbors import Neighbors, find_neighbors
from lory_jax.preparation.ordering import consecutive_similarity, order_by_similarity
from lory_jax.preparation.stages.balance import make_shards
from lory_jax.preparation.stages.cluster import LEAF_SHARE
from lory_jax.preparation.stages.encode import CLUSTER_SAMPLE

K, SHARDS = 20, 16
SCRIPT_K, SCRIPT_RUN = 9, 21


def noise(count: int, dim: int = 64, topics: int = 1000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    topic_N = rng.integers(topics, size=count)
    centres, spread = (_unit(rng.normal(size=(n, dim))) for n in (topics, count))
    return _unit(centres[topic_N] + spread).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def shards_of(vectors_NxD: np.ndarray, largest: int) -> Iterator[np.ndarray]:
    """Yields the rows of every shard, as stages `cluster`, `assign` and `balance` divide them."""
    count = len(vectors_NxD)
    rows = np.random.default_rng(0).permutation(count)[:CLUSTER_SAMPLE]
    centres = leaf_centres(vectors_NxD[np.sort(rows)], count, max(int(largest * LEAF_SHARE), 1), 0)
    leaf_N = nearest(vectors_NxD, centres)
    for shard in make_shards(np.bincount(leaf_N, minlength=len(centres)), largest):
        mine = np.flatnonzero((leaf_N >= shard.first) & (leaf_N < shard.end))
        yield mine[shard.start : shard.stop]


def ours(found: Neighbors, both_ways: bool) -> np.ndarray:
    ids_NxK, similarities_NxK = found.ids_NxK, found.similarities_NxK
    return order_by_similarity(ids_NxK, similarities_NxK, seed=0, both_ways=both_ways)


def by_degree(ids_NxK: np.ndarray, longest: int = 0) -> np.ndarray:
    """Goes to the nearest unused neighbour in the graph without directions; where there is none,
    it starts again at the unused document of lowest degree. With `longest`, it starts again at the
    lowest unused number after so many documents, too."""
    neighbours: list[dict[int, int]] = [{} for _ in ids_NxK]
    for doc, ids in enumerate(ids_NxK.tolist()):
        for rank, other in enumerate(ids):
            if other >= 0:
                neighbours[doc][other] = min(rank, neighbours[doc].get(other, rank))
                neighbours[other].setdefault(doc, rank)
    degree = [len(each) for each in neighbours]
    heap = [(0 if longest else degree[doc], doc) for doc in range(len(degree))]
    heapq.heapify(heap)
    used, order = [False] * len(degree), []
    doc, run = -1, 0
    while len(order) < len(degree):
        unused = [o for o in neighbours[doc] if not used[o]] if doc >= 0 else []
        if unused and not (longest and run == longest):
            doc, run = min(unused, key=neighbours[doc].__getitem__), run + 1
        else:
            while used[heap[0][1]] or (not longest and heap[0][0] != degree[heap[0][1]]):
                heapq.heappop(heap)
            doc, run = heapq.heappop(heap)[1], 1
        used[doc] = True
        order.append(doc)
        for other in neighbours[doc]:
            degree[other] -= 1
            if not longest and not used[other]:
                heapq.heappush(heap, (degree[other], other))
    return np.array(order)


def measure(name: str, vectors_NxD: np.ndarray) -> dict[str, Any]:
    count = len(vectors_NxD)
    shards = list(shards_of(vectors_NxD, round(count / SHARDS / 0.7)))
    found = find_neighbors(vectors_NxD, K)
    ids_NxK = found.ids_NxK
    in_shards = [rows[ours(find_neighbors(vectors_NxD[rows], K), True)] for rows in shards]
    orders = {
        "random": np.random.default_rng(0).permutation(count),
        "one graph": ours(found, False),
        "one graph, both ways": ours(found, True),
        "shards, both ways": np.concatenate(in_shards),
        "rule of In-Context Pretraining": by_degree(ids_NxK),
        "settings of its public script": by_degree(ids_NxK[:, :SCRIPT_K], SCRIPT_RUN),
    }
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(count))
    cosines = {
        order_name: round(consecutive_similarity(vectors_NxD, order), 4)
        for order_name, order in orders.items()
    }
    sizes = [len(rows) for rows in shards]
    result = {
        "set": name,
        "documents": count,
        "shards": [len(sizes), min(sizes), max(sizes)],
        "mean_cosine": cosines,
        "shards_over_one_graph": round(cosines["shards, both ways"] / cosines["one graph"], 4),
    }
    print(json.dumps(result, indent=1), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, metavar="VECTORS.npy")
    parser.add_argument("--first", type=int, metavar="N", help="of them only")
    parser.add_argument("--noise", type=int, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    if args.file:
        rows.append(measure("documents", np.load(args.file)[: args.first].astype(np.float32)))
    if args.noise:
        rows.append(measure("noise", noise(args.noise)))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
