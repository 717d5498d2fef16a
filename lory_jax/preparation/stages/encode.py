"""Stage `encode`: the tokens of every kept document, and the vectors of training documents.

Writes rows (rows.py) of the training documents into `train/`, of the held-out documents, sorted by
side and domain, into `held_out/`, where `starts` says where each of them begins, and the vectors of
a random sample of the training documents into `sample.npy`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lory_jax.preparation.engine.columns import Ragged, read_array, read_ragged, write_array
from lory_jax.preparation.engine.work import Facts, Work, hash_sum
from lory_jax.preparation.packing import tokenize
from lory_jax.preparation.stages import fit, select
from lory_jax.preparation.stages.rows import Rows
from lory_jax.preparation.stages.split import splits
from lory_jax.preparation.stages.texts import Texts

CLUSTER_SAMPLE = 100_000


def run(work: Work, task: int, out: Path) -> Facts:
    """Encodes the documents of a reading task."""
    side_N = read_array(work.directory("select", task), "side")
    kept_N = np.flatnonzero(side_N >= 0)
    texts = Texts(work, ((task, row) for row in kept_N.tolist()))
    tokenized = tokenize(texts, fit.load_tokenizer(work), f"tokenizing, task {task}")
    rows = _rows(work, task, kept_N, Ragged(tokenized.tokens_T, tokenized.starts_N1))

    is_train_N = side_N[kept_N] == 0
    train = rows.take(np.flatnonzero(is_train_N))
    training_texts = Texts(work, ((task, row) for row in kept_N[is_train_N].tolist()))
    embedder = fit.load_embedder(work)
    vectors_NxD = np.zeros((len(train), 1), np.float32)
    if embedder is not None:
        vectors_NxD = embedder.embed(training_texts)
    # Half the bytes, where vectors travel between machines.
    precision = np.float32 if work.values("split")["is_small"] else np.float16
    vectors_NxD = vectors_NxD.astype(precision, copy=False)
    train = replace(train, vectors_NxD=vectors_NxD)
    train.write(out / "train")
    write_array(out, "sample", vectors_NxD[_in_sample(work, task, train.place_Nx2[:, 1])])

    domains = len(work.values("split")["domains"])
    key_N = (side_N[kept_N].astype(np.int64) - 1) * domains + rows.domain_N
    held_N = np.flatnonzero(~is_train_N)
    held_N = held_N[np.argsort(key_N[held_N], kind="stable")]
    rows.take(held_N).write(out / "held_out")
    keys = np.arange((len(splits(work)) - 1) * domains + 1)
    write_array(out, "starts", np.searchsorted(key_N[held_N], keys))
    for each in (texts, training_texts):
        each.close()
    values = {"train": len(train), "tokens": _tokens_by_split(rows, side_N[kept_N], work)}
    return Facts(len(rows), hash_sum(rows.digest_Nx2[:, 0]), values)


def _rows(work: Work, task: int, kept_N: np.ndarray, tokens: Ragged) -> Rows:
    directory = work.directory("read", task)
    names = work.values("read", task)["domains"]
    numbers = {name: i for i, name in enumerate(work.values("split")["domains"])}
    # A domain may have lost all its documents.
    number_D = np.array([numbers.get(name, -1) for name in names], np.int32)
    return Rows(
        tokens,
        read_ragged(directory, "origin").take(kept_N),
        number_D[read_array(directory, "domain")[kept_N]],
        read_array(directory, "bytes")[kept_N],
        read_array(directory, "digest")[kept_N],
        np.stack([np.full(len(kept_N), task), kept_N], axis=1),
        np.zeros((len(kept_N), 0), np.float32),
    )


def _in_sample(work: Work, task: int, rows_N: np.ndarray) -> np.ndarray:
    """Returns which training documents clusters are made of: those of low rank."""
    share = CLUSTER_SAMPLE / max(select.num_training_documents(work), 1)
    limit = np.uint64(min(int(share * 2**64), 2**64 - 1))
    return read_array(work.directory("read", task), "rank")[rows_N] <= limit


def _tokens_by_split(rows: Rows, side_N: np.ndarray, work: Work) -> dict[str, dict[str, int]]:
    names = work.values("split")["domains"]
    tokens: dict[str, dict[str, int]] = {name: {} for name in splits(work)}
    lengths_N = rows.tokens.lengths_N
    for side, name in enumerate(splits(work)):
        mine = side_N == side
        sums = np.bincount(rows.domain_N[mine], lengths_N[mine], len(names))
        present = np.unique(rows.domain_N[mine])
        tokens[name] = {names[i]: int(sums[i]) for i in present}
    return tokens
