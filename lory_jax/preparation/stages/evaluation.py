"""Stage `evaluation`: the instances of held-out sets, one set per domain.

A task takes some domains of all sides. Writes `SIDE/DOMAIN/part-*.array_record` and `dropped.jsonl`
(documents beyond `config.data.eval_instances`).

S sets of one side, R reading tasks, N documents.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from lory_jax.data.manifest import domain_directory, write_origins
from lory_jax.preparation.engine.columns import read_array, write_array
from lory_jax.preparation.engine.work import Facts, Work, hash_sum
from lory_jax.preparation.packing import (
    count_instances,
    cut_instances,
    instance_origins,
    write_shards,
)
from lory_jax.preparation.stages import read
from lory_jax.preparation.stages.order import domain_counts
from lory_jax.preparation.stages.rows import Rows, join_rows, read_rows
from lory_jax.preparation.stages.split import evaluation_splits, rank_limit

DOMAINS_PER_TASK = 64
# Small sets are read together, because opening the files of every reading task is what they cost.
# A set with more documents is read alone.
DOCUMENTS_AT_ONCE = 10_000
NO_LIMIT = 2**64 - 1


def count(work: Work) -> int:
    """As many tasks as bound the number of domains of one."""
    return -(-len(work.values("split")["domains"]) // DOMAINS_PER_TASK)


def run(work: Work, task: int, out: Path) -> Facts:
    """Writes the sets of some domains."""
    names = work.values("split")["domains"]
    splits = evaluation_splits(work)
    first = task * DOMAINS_PER_TASK
    domains = range(first, min(first + DOMAINS_PER_TASK, len(names)))
    counts: dict[str, dict[str, Any]] = {split: {} for split in splits}
    lengths: dict[str, list[np.ndarray]] = {split: [np.empty(0, np.int64)] for split in splits}
    places, total, dropped_total, beyond = [np.empty((0, 2), np.int64)], 0, 0, 0
    with (out / read.DROPPED_NAME).open("w", encoding="utf-8") as dropped:
        for side, split in enumerate(splits):
            first_set = side * len(names) + first
            for rows, left_out in _read(work, range(first_set, first_set + len(domains))):
                _write_dropped(dropped, left_out, names)
                dropped_total += hash_sum(left_out.digest_Nx2[:, 0])
                beyond += len(left_out)
                _write_sets(out / split, rows, names, work)
                counts[split] |= domain_counts(rows, names)
                lengths[split].append(rows.tokens.lengths_N)
                places.append(rows.place_Nx2)
                total += hash_sum(rows.digest_Nx2[:, 0])
    write_array(out, "places", np.concatenate(places))
    values = {
        "counts": counts,
        "lengths": {split: _histogram(np.concatenate(each)) for split, each in lengths.items()},
        "dropped": beyond,
        "dropped_hash": dropped_total,
    }
    return Facts(sum(map(len, places)), total, values)


def _read(work: Work, sets: range) -> Iterator[tuple[Rows, Rows]]:
    """Yields the kept and the dropped documents of some sets at a time.

    Kept documents are in natural order, in which the units of one file follow each other and read
    as one text.
    """
    directories = [work.directory("encode", reader) for reader in range(read.count(work))]
    starts_RxS1 = np.stack(
        [read_array(directory, "starts", sets.start, sets.stop + 1) for directory in directories]
    )
    sizes_S = np.diff(starts_RxS1).sum(axis=0)
    for first, end in _groups(sizes_S.tolist()):
        limits_S = _limits(work, directories, starts_RxS1[:, first : end + 1])
        kept, left_out = [], []
        for directory, starts_S1 in zip(directories, starts_RxS1[:, first : end + 1], strict=True):
            rows = read_rows(directory / "held_out", int(starts_S1[0]), int(starts_S1[-1]))
            is_kept_N = rows.digest_Nx2[:, 0] <= np.repeat(limits_S, np.diff(starts_S1))
            kept.append(rows if is_kept_N.all() else rows.take(np.flatnonzero(is_kept_N)))
            left_out.append(rows.take(np.flatnonzero(~is_kept_N)))
        joined = join_rows(kept)
        yield joined.take(joined.natural_order()), join_rows(left_out)


def _groups(sizes_S: list[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges of sets that have few documents together, or are one set; skips empty sets."""
    first, documents = 0, 0
    for each, size in enumerate(sizes_S):
        if documents and documents + size > DOCUMENTS_AT_ONCE:
            yield first, each
            documents = 0
        if not documents:
            first = each
        documents += size
    if documents:
        yield first, len(sizes_S)


def _limits(work: Work, directories: list[Path], starts_RxS1: np.ndarray) -> np.ndarray:
    """Returns the highest hash of each set that is kept, uint64 `[S]`.

    Kept are the documents of lowest hash, until they fill the instances wanted. Only hashes and
    lengths are read, so that no set needs to fit into memory.
    """
    num_sets = starts_RxS1.shape[1] - 1
    limits_S = np.full(num_sets, NO_LIMIT, np.uint64)
    wanted, length = work.data["eval_instances"], work.settings["sequence_length"]
    if not wanted:
        return limits_S
    hashes, lengths, sets = [], [], []
    for directory, starts_S1 in zip(directories, starts_RxS1, strict=True):
        start, stop = int(starts_S1[0]), int(starts_S1[-1])
        hashes.append(read_array(directory / "held_out", "digest", start, stop)[:, 0])
        ends = read_array(directory / "held_out", "tokens_starts", start, stop + 1)
        lengths.append(np.diff(ends))
        sets.append(np.repeat(np.arange(num_sets), np.diff(starts_S1)))
    hash_N, length_N, set_N = (np.concatenate(each) for each in (hashes, lengths, sets))
    for each in range(num_sets):
        mine_N = set_N == each
        if count_instances(int(length_N[mine_N].sum()), length) > wanted:
            most = wanted * length + 1
            limits_S[each] = rank_limit(hash_N[mine_N], length_N[mine_N], most)
    return limits_S


def _write_dropped(file: IO[str], rows: Rows, names: list[str]) -> None:
    for row in range(len(rows)):
        digest, origin = rows.digest_Nx2[row], rows.origin[row].tobytes().decode()
        line = (read.digest_bytes(digest), names[rows.domain_N[row]], origin)
        file.write(read.drop_line(*line, "over eval_instances"))


def _write_sets(directory: Path, rows: Rows, names: list[str], work: Work) -> None:
    """Writes the instances of each domain's documents, and the origin of each instance."""
    length, per_shard = work.settings["sequence_length"], work.data["instances_per_shard"]
    origins, lengths_N, starts_N1 = (
        rows.origin.strings(),
        rows.tokens.lengths_N,
        rows.tokens.starts_N1,
    )
    domains, firsts = np.unique(rows.domain_N, return_index=True)
    ends = [*firsts[1:].tolist(), len(rows)]
    for domain, first, end in zip(domains, firsts.tolist(), ends, strict=True):
        target = directory / domain_directory(names[domain])
        stream_T = rows.tokens.values[starts_N1[first] : starts_N1[end]]
        write_shards(target, cut_instances(stream_T, length), per_shard)
        of_instances = instance_origins(lengths_N[first:end], origins[first:end], length)
        write_origins(target, of_instances)


def _histogram(lengths_N: np.ndarray) -> list[list[int]]:
    lengths, counts = np.unique(lengths_N, return_counts=True)
    return [lengths.tolist(), counts.tolist()]
