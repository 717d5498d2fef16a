"""Stages `cluster` and `assign`: the leaves of a k-means tree, and the documents of each.

`assign` writes the training rows of a reading task sorted by leaf; `starts_C1` says where each leaf
begins. A corpus of at most one shard has one leaf. For random order, documents are dealt to leaves
by their hashes instead, so that every shard is a random sample of the corpus.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from lory_jax.preparation.clustering import leaf_centres, nearest
from lory_jax.preparation.engine.columns import read_array, write_array
from lory_jax.preparation.engine.work import Facts, Work, hash_sum
from lory_jax.preparation.stages import read, select
from lory_jax.preparation.stages.rows import read_rows
from lory_jax.preparation.stages.split import TRAIN, evaluation_splits, splits
from lory_jax.preparation.statistics import check_sizes

# Leaves are aimed at an eighth of a shard: small ones are cut through topics less often, and shards
# joined from them are of more even size.
LEAF_SHARE = 1 / 8
# Leaves of random order are shards as they are: neither small enough to be joined nor too large.
RANDOM_LEAF_SHARE = 3 / 4


def count(work: Work) -> int:
    """One task."""
    return 1


def run(work: Work, task: int, out: Path) -> Facts:
    """Finds the centres of the leaves; first of all, it checks that there are tokens enough."""
    _check(work)
    documents, largest = select.num_training_documents(work), work.data["shard_documents"]
    if deals_at_random(work):
        return Facts(values={"leaves": -(-documents // max(int(largest * RANDOM_LEAF_SHARE), 1))})
    dim = work.data["embedding_dim"]
    centres_CxD = np.zeros((1, dim), np.float32)
    if documents > largest:
        readers = range(read.count(work))
        sample = [read_array(work.directory("encode", reader), "sample") for reader in readers]
        vectors_SxD = np.concatenate(sample).astype(np.float32)
        leaf = max(int(largest * LEAF_SHARE), 1)
        centres_CxD = leaf_centres(vectors_SxD, documents, leaf, work.settings["seed"])
    write_array(out, "centres", centres_CxD)
    return Facts(values={"leaves": len(centres_CxD)})


def run_assign(work: Work, task: int, out: Path) -> Facts:
    """Sorts the training documents of a reading task by leaf."""
    rows, leaves = read_rows(work.directory("encode", task) / "train"), num_leaves(work)
    leaf_N = np.zeros(len(rows), np.int64)
    if deals_at_random(work):
        leaf_N = (rows.digest_Nx2[:, 1] % np.uint64(leaves)).astype(np.int64)
    elif leaves > 1:
        centres_CxD = read_array(work.directory("cluster"), "centres")
        leaf_N = nearest(rows.vectors_NxD.astype(np.float32), centres_CxD)
    by_leaf_N = np.argsort(leaf_N, kind="stable")
    (rows.take(by_leaf_N) if leaves > 1 else rows).write(out / "train")
    write_array(out, "starts", np.searchsorted(leaf_N[by_leaf_N], np.arange(leaves + 1)))
    return Facts(len(rows), hash_sum(rows.digest_Nx2[:, 0]))


def num_leaves(work: Work) -> int:
    """Returns the number of leaves."""
    return work.values("cluster")["leaves"]


def deals_at_random(work: Work) -> bool:
    """Whether documents go to shards by their hashes: random order of more than one shard."""
    documents = select.num_training_documents(work)
    return work.settings["order"] == "random" and documents > work.data["shard_documents"]


def _check(work: Work) -> None:
    tokens: dict[str, Counter[str]] = {name: Counter() for name in splits(work)}
    for task in range(read.count(work)):
        for name, by_domain in work.values("encode", task)["tokens"].items():
            tokens[name].update(by_domain)
    fractions = {name: work.data[f"{name}_fraction"] for name in evaluation_splits(work)}
    check_sizes(
        num_training_documents=select.num_training_documents(work),
        training_tokens=sum(tokens[TRAIN].values()),
        held_out_tokens={name: tokens[name] for name in evaluation_splits(work)},
        fractions=fractions,
        domains=work.values("split")["domains"],
        sequence_length=work.settings["sequence_length"],
    )
