"""The nearest neighbours of documents: ScaNN, as `prepare` uses it, and FAISS at equal recall.

    pip install faiss-cpu scann==1.4.2   # in an environment of their own
    python benchmarks/neighbors.py --file=VECTORS.npy --made=100000,1000000 [--json=FILE]

VECTORS.npy are unit vectors, such as WORK/encode/00000/train/vectors.npy that `prepare` writes;
--made makes others of 256 dimensions, of which each lies in a topic of about 250. Recall is the
share of the 20 exact neighbours that are found, on 1,000 of the queries. FAISS searches more lists,
and then rescores more candidates, until its recall is that of ScaNN. Times are CPU-seconds on one
thread each, and the searches take turns.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from prepare import machine

from lory_jax.preparation.neighbors import REORDERED, build_searcher

K, DIM, CHECKED, ROUNDS = 20, 256, 1000, 3
SPREAD = 1.2  # length of what sets a document apart from its topic, over that of the topic
RESCORED = (1, 2, 4, 8)  # times as many candidates as ScaNN rescores
Search = Callable[[np.ndarray], np.ndarray]  # queries to ids


def make_vectors(count: int, seed: int = 0) -> np.ndarray:
    """Returns float32 `[count, DIM]` in count / 250 topics, a few of which are large."""
    rng = np.random.default_rng(seed)
    topics = max(count // 250, 4)
    weights = 1 / np.arange(1, topics + 1) ** 0.5
    topic_N = rng.choice(topics, count, p=weights / weights.sum())
    centres = _unit(rng.normal(size=(topics, DIM)).astype(np.float32))
    spread = SPREAD * _unit(rng.normal(size=(count, DIM)).astype(np.float32))
    return _unit(centres[topic_N] + spread)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact(vectors_NxD: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The ids of the K nearest neighbours of some rows, themselves included."""
    found = []
    for start in range(0, len(queries), 100):
        similarity = vectors_NxD[queries[start : start + 100]] @ vectors_NxD.T
        found.append(np.argpartition(-similarity, K, axis=1)[:, : K + 1])
    return np.concatenate(found)


def share_found(found: np.ndarray, truth: np.ndarray) -> float:
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def scann_search(vectors_NxD: np.ndarray) -> tuple[Search, dict[str, Any]]:
    searcher, method = build_searcher(vectors_NxD, K + 1, True)
    return lambda queries: searcher.search_batched(queries)[0], {"method": method}


def faiss_searches(vectors_NxD: np.ndarray) -> Iterator[tuple[str, float, Any, Any]]:
    """Yields name, CPU-seconds of building, index, and the part whose `nprobe` is set."""
    import faiss

    faiss.omp_set_num_threads(1)
    lists, dim = int(len(vectors_NxD) ** 0.5), vectors_NxD.shape[1]
    metric = faiss.METRIC_INNER_PRODUCT
    for name in ("FAISS IVF-Flat", "FAISS IVF-PQ fast-scan, refined"):
        started = time.process_time()
        quantizer = faiss.IndexFlatIP(dim)
        if name.endswith("Flat"):
            inner = index = faiss.IndexIVFFlat(quantizer, dim, lists, metric)
        else:
            inner = faiss.IndexIVFPQFastScan(quantizer, dim, lists, dim // 2, 4, metric)
            index = faiss.IndexRefineFlat(inner)
        index.train(vectors_NxD[:100_000])
        index.add(vectors_NxD)
        yield name, time.process_time() - started, index, inner


def measure(name: str, vectors_NxD: np.ndarray, queries: int) -> list[dict[str, Any]]:
    count = len(vectors_NxD)
    rows = np.sort(np.random.default_rng(1).choice(count, min(queries, count), replace=False))
    checked = rows[np.linspace(0, len(rows) - 1, CHECKED).astype(int)]
    truth = exact(vectors_NxD, checked)
    started = time.process_time()
    search, more = scann_search(vectors_NxD)
    build = time.process_time() - started
    wanted = share_found(search(vectors_NxD[checked]), truth)
    results = [{"name": "ScaNN", "build": build, "recall": wanted, **more}]
    searches = [search]
    for peer, build, index, inner in faiss_searches(vectors_NxD):
        recall, method = reach(wanted, index, inner, vectors_NxD[checked], truth)
        results.append({"name": peer, "build": build, "recall": recall, "method": method})
        searches.append(lambda q, index=index: index.search(q, K + 1)[1])
    times: list[list[float]] = [[] for _ in searches]
    for _ in range(ROUNDS):
        for mine, search in zip(times, searches, strict=True):
            started = time.process_time()
            search(vectors_NxD[rows])
            mine.append(time.process_time() - started)
    for result, mine in zip(results, times, strict=True):
        result |= {"set": name, "vectors": count, "search_ms": 1000 * median(mine) / len(rows)}
        result["all_ms"] = result["search_ms"] + 1000 * result["build"] / count
        print(json.dumps(result), flush=True)
    return results


def reach(
    wanted: float, index: Any, inner: Any, queries: np.ndarray, truth: np.ndarray
) -> tuple[float, str]:
    """Searches as little as it takes to have the recall that is wanted, or as much as possible."""
    recall = 0.0
    for factor in RESCORED if index is not inner else (1,):
        if index is not inner:
            index.k_factor = factor * REORDERED / (K + 1)
        probes = 1
        while recall < wanted and probes <= inner.nlist // 2:
            inner.nprobe = probes
            recall = share_found(index.search(queries, K + 1)[1], truth)
            probes = max(probes + 1, int(probes * 1.3))
        if recall >= wanted:
            break
    more = f", {factor * REORDERED} rescored" if index is not inner else ""
    return recall, f"{inner.nprobe} of {inner.nlist} lists searched{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, metavar="VECTORS.npy")
    parser.add_argument("--made", default="", metavar="NUMBERS")
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    sets = [("documents", lambda: np.load(args.file).astype(np.float32))] if args.file else []
    for count in map(int, args.made.split(",") if args.made else []):
        sets.append(("made", lambda count=count: make_vectors(count)))
    for name, make in sets:
        rows += measure(name, make(), args.queries)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
