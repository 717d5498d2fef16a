"""Stage `balance`: leaves to shards, by their counts: small ones merged, too large ones cut."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lory_jax.preparation.clustering import merge_small
from lory_jax.preparation.engine.columns import read_array
from lory_jax.preparation.engine.work import Facts, Work
from lory_jax.preparation.stages import cluster, read
from lory_jax.preparation.stages.rows import Rows, join_rows, read_rows

SHARDS_NAME = "shards.json"
SMALLEST_SHARE = 0.5  # of the largest shard


class Shard(NamedTuple):
    """Some of the documents of a range of leaves.

    Attributes:
      first, end: the leaves, `first` to `end - 1`.
      start, stop: the documents, in the order of reading tasks; all of them, unless one leaf has
        more than a shard may have.
    """

    first: int
    end: int
    start: int
    stop: int


def count(work: Work) -> int:
    """One task."""
    return 1


def run(work: Work, task: int, out: Path) -> Facts:
    """Makes the shards."""
    largest = work.data["shard_documents"]
    counts_C = np.zeros(cluster.num_leaves(work), np.int64)
    for reader in range(read.count(work)):
        counts_C += np.diff(read_array(work.directory("assign", reader), "starts"))
    shards = make_shards(counts_C, largest)
    (out / SHARDS_NAME).write_text(json.dumps(shards) + "\n", encoding="utf-8")
    sizes = [shard.stop - shard.start for shard in shards]
    say = []
    if len(shards) > 1:
        say = [f"{len(shards)} shards of {min(sizes):,} to {max(sizes):,} documents"]
    return Facts(values={"shards": len(shards), "sizes": sizes}, say=say)


def make_shards(counts_C: np.ndarray, largest: int) -> list[Shard]:
    """Returns the shards of leaves that hold so many documents each."""
    shards = []
    smallest = max(int(largest * SMALLEST_SHARE), 1)
    for first, end in merge_small(counts_C.tolist(), smallest, largest):
        documents = int(counts_C[first:end].sum())
        pieces = max(1, -(-documents // largest))
        bounds = [documents * piece // pieces for piece in range(pieces + 1)]
        shards += [Shard(first, end, *pair) for pair in itertools.pairwise(bounds)]
    return shards


def read_shard(work: Work, number: int) -> Rows:
    """Returns the rows of a shard, in the order of reading tasks."""
    shards = json.loads((work.directory("balance") / SHARDS_NAME).read_text("utf-8"))
    shard = Shard(*shards[number])
    return join_rows(list(_pieces(work, shard)))


def _pieces(work: Work, shard: Shard) -> Iterator[Rows]:
    seen = 0
    for reader in range(read.count(work)):
        directory = work.directory("assign", reader)
        starts = read_array(directory, "starts")
        first, end = int(starts[shard.first]), int(starts[shard.end])
        skip = min(max(shard.start - seen, 0), end - first)
        leave = min(max(seen + end - first - shard.stop, 0), end - first - skip)
        seen += end - first
        yield read_rows(directory / "train", first + skip, end - leave)
