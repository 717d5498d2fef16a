"""Stage `order`: the documents of a shard in similarity order, without near duplicates, packed.

Writes `train/part-*.array_record`, `dropped.jsonl` (near duplicates) and the column `places_Nx2`:
reading task and row of every document of the stream, in its order.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.errors import shorten
from lory_jax.preparation.deduplication import near_duplicates, shingle_width
from lory_jax.preparation.engine.columns import write_array
from lory_jax.preparation.engine.work import Facts, Work, hash_sum
from lory_jax.preparation.neighbors import Neighbors, find_neighbors, has_scann
from lory_jax.preparation.ordering import consecutive_cosines, order_by_similarity
from lory_jax.preparation.packing import cut_instances, instance_domains, write_shards
from lory_jax.preparation.stages import balance, cluster, read
from lory_jax.preparation.stages.rows import Rows
from lory_jax.preparation.stages.texts import Texts
from lory_jax.preparation.statistics import order_figures

# Above this share of near duplicates, the neighbours of what is left are found again.
SEARCH_AGAIN = 0.05
EXAMPLES = 3
EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class Ordered:
    """The documents of a shard that are kept, and their orders.

    Attributes:
      rows: the documents, in natural order.
      orders: `random` and, where there are neighbours to follow, `similar`.
      method: how neighbours were found, in words.
      near: the place in the shard of every near duplicate, and of the document it repeats.
      cpu_seconds: what finding neighbours took, of all threads together.
    """

    rows: Rows
    orders: dict[str, np.ndarray]
    method: str
    near: dict[int, int]
    cpu_seconds: float = 0.0


def count(work: Work) -> int:
    """One task per shard."""
    return work.values("balance")["shards"]


def run(work: Work, task: int, out: Path) -> Facts:
    """Orders and packs a shard."""
    settings = work.settings
    wanted, length = settings["order"], settings["sequence_length"]
    shard = balance.read_shard(work, task)
    shard = shard.take(shard.natural_order())
    ordered = _order(shard, work)
    rows, order_N = ordered.rows, ordered.orders[wanted]
    stream_T = rows.tokens.take(order_N).values
    write_shards(out / "train", cut_instances(stream_T, length), work.data["instances_per_shard"])
    lengths_N = rows.tokens.lengths_N[order_N]
    domains = instance_domains(lengths_N, rows.domain_N[order_N], length)
    write_array(out, "instance_domains", domains)
    write_array(out, "places", rows.place_Nx2[order_N])
    names = work.values("split")["domains"]
    _write_dropped(out, shard, ordered.near, names)

    figures = {
        name: order_figures(rows.domain_N, rows.vectors_NxD, rows.tokens.lengths_N, each_N, length)
        for name, each_N in ordered.orders.items()
        if len(rows) > 1
    }
    lengths, counts = np.unique(rows.tokens.lengths_N, return_counts=True)
    values = {
        "domains": domain_counts(rows, names),
        "tokens": len(stream_T),
        "lengths": [lengths.tolist(), counts.tolist()],
        "figures": figures,
        "cosines": _cosines(rows, order_N),
        "method": ordered.method,
        "neighbour_cpu_seconds": round(ordered.cpu_seconds, 3),
        "near_duplicates": len(ordered.near),
        "dropped_hash": hash_sum(shard.digest_Nx2[list(ordered.near), 0]),
        "examples": _examples(work, rows, order_N) if task == 0 else [],
    }
    say = [f"neighbours found by {ordered.method}"] if task == 0 else []
    return Facts(len(rows), hash_sum(rows.digest_Nx2[:, 0]), values, say)


def _order(rows: Rows, work: Work) -> Ordered:
    """Finds the random order and, if it is wanted or can be found, the similarity order."""
    seed, data = work.settings["seed"], work.data
    random_N = np.random.default_rng(seed).permutation(len(rows))
    if len(rows) == 1:
        return Ordered(rows, {"random": random_N, "similar": random_N}, "none: one document", {})
    if cluster.deals_at_random(work):
        return Ordered(rows, {"random": random_N}, "none: random order of several shards", {})
    if work.settings["order"] == "random" and not has_scann():
        return Ordered(rows, {"random": random_N}, "none: ScaNN is not installed", {})
    started = time.process_time()
    found = find_neighbors(rows.vectors_NxD.astype(np.float32), data["num_neighbors"])
    seconds = time.process_time() - started
    near: dict[int, int] = {}
    if data["drop_near_duplicates"]:
        bytes_per_token = int(rows.bytes_N.sum()) / max(len(rows.tokens.values), 1)
        near = near_duplicates(
            found.ids_NxK,
            found.similarities_NxK,
            rows.tokens,
            shingle_width(bytes_per_token),
        )
    if near:
        is_kept_N = np.ones(len(rows), bool)
        is_kept_N[list(near)] = False
        number_N = np.cumsum(is_kept_N) - 1
        random_N = number_N[random_N[is_kept_N[random_N]]]
        rows = rows.take(np.flatnonzero(is_kept_N))
        if len(near) > SEARCH_AGAIN * len(is_kept_N):
            found = find_neighbors(rows.vectors_NxD.astype(np.float32), data["num_neighbors"])
        else:
            found = _without(found, is_kept_N, number_N)
    # One shard keeps the order of earlier versions.
    similar_N = order_by_similarity(
        found.ids_NxK, found.similarities_NxK, seed=seed, both_ways=count(work) > 1
    )
    return Ordered(rows, {"random": random_N, "similar": similar_N}, found.method, near, seconds)


def _without(found: Neighbors, is_kept_N: np.ndarray, number_N: np.ndarray) -> Neighbors:
    """Removes documents from the lists of neighbours and numbers the others anew."""
    ids_NxK, similarities_NxK = found.ids_NxK[is_kept_N], found.similarities_NxK[is_kept_N]
    stays_NxK = (ids_NxK >= 0) & is_kept_N[ids_NxK]
    return Neighbors(
        np.where(stays_NxK, number_N[ids_NxK], -1).astype(np.int32),
        np.where(stays_NxK, similarities_NxK, -np.inf).astype(np.float32),
        found.method,
    )


def domain_counts(rows: Rows, names: list[str]) -> dict[str, dict[str, int]]:
    """Returns documents, tokens and bytes per domain."""
    columns = {
        "documents": np.bincount(rows.domain_N, minlength=len(names)),
        "tokens": np.bincount(rows.domain_N, rows.tokens.lengths_N, len(names)),
        "bytes": np.bincount(rows.domain_N, rows.bytes_N, len(names)),
    }
    return {
        names[i]: {key: int(column[i]) for key, column in columns.items()}
        for i in np.unique(rows.domain_N)
    }


def _write_dropped(out: Path, rows: Rows, near: dict[int, int], names: list[str]) -> None:
    with (out / read.DROPPED_NAME).open("w", encoding="utf-8") as file:
        for doc, of in sorted(near.items()):
            origin = rows.origin[doc].tobytes().decode()
            digest, kept = (read.digest_bytes(rows.digest_Nx2[i]) for i in (doc, of))
            domain = names[rows.domain_N[doc]]
            file.write(read.drop_line(digest, domain, origin, "near duplicate", kept.hex()))


def _cosines(rows: Rows, order_N: np.ndarray) -> list[list[float]]:
    """Returns a histogram of the cosines of consecutive documents, in hundredths."""
    pieces = [
        np.floor(100 * cosines_C.astype(np.float32)) / 100
        for cosines_C in consecutive_cosines(rows.vectors_NxD, order_N)
    ]
    values, counts = np.unique(np.concatenate([np.empty(0), *pieces]), return_counts=True)
    return [np.round(values, 2).tolist(), counts.tolist()]


def _examples(work: Work, rows: Rows, order_N: np.ndarray) -> list[dict[str, Any]]:
    """Returns the beginnings of a few pairs of consecutive documents, for the report."""
    names = work.values("split")["domains"]
    pairs = []
    for at in np.linspace(0, max(len(order_N) - 2, 0), EXAMPLES).astype(int):
        pair = order_N[at : at + 2]
        texts = Texts(work, (tuple(rows.place_Nx2[i]) for i in pair))
        vectors_2xD = rows.vectors_NxD[pair].astype(np.float32)
        pairs.append(
            {
                "cosine": round(float(vectors_2xD[0] @ vectors_2xD[-1]), 3),
                "origins": [
                    f"{names[rows.domain_N[i]]}, {shorten(rows.origin[i].tobytes().decode())}"
                    for i in pair
                ],
                "texts": [text[:EXAMPLE_CHARACTERS] for text in texts],
            }
        )
        texts.close()
    return pairs
