"""Stage `evaluation`: the instances of held-out sets, one set per domain.

A task takes some domains of all sides. Writes `SIDE/DOMAIN/part-*.array_record` and `dropped.jsonl`
(documents beyond `config.data.eval_instances`).
"""

from pathlib import Path
from typing import Any

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
from lory_jax.preparation.stages.split import evaluation_splits

DOMAINS_PER_TASK = 64


def count(work: Work) -> int:
    """As many tasks as bound the number of domains of one."""
    return -(-len(work.values("split")["domains"]) // DOMAINS_PER_TASK)


def run(work: Work, task: int, out: Path) -> Facts:
    """Writes the sets of some domains."""
    names = work.values("split")["domains"]
    splits = evaluation_splits(work)
    counts: dict[str, dict[str, Any]] = {split: {} for split in splits}
    lengths: dict[str, list[np.ndarray]] = {split: [np.empty(0, np.int64)] for split in splits}
    places, total, dropped_total, beyond = [np.empty((0, 2), np.int64)], 0, 0, 0
    first = task * DOMAINS_PER_TASK
    with (out / read.DROPPED_NAME).open("w", encoding="utf-8") as dropped:
        for domain in range(first, min(first + DOMAINS_PER_TASK, len(names))):
            for side, split in enumerate(splits):
                rows = _read(work, side * len(names) + domain)
                if not len(rows):
                    continue
                kept_N = _within_limit(work, rows)
                for row in np.flatnonzero(~kept_N).tolist():
                    digest, origin = rows.digest_Nx2[row], rows.origin[row].tobytes().decode()
                    line = (read.digest_bytes(digest), names[domain], origin)
                    dropped.write(read.drop_line(*line, "over eval_instances"))
                dropped_total += hash_sum(rows.digest_Nx2[~kept_N, 0])
                beyond += int((~kept_N).sum())
                rows = rows.take(np.flatnonzero(kept_N))
                # In natural order, the units of one file follow each other and read as one text.
                rows = rows.take(rows.natural_order())
                write_held_out(out / split / domain_directory(names[domain]), rows, work)
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


def write_held_out(directory: Path, rows: Rows, work: Work) -> None:
    """Writes the instances of one domain of a held-out set, and the origin of each."""
    instances = cut_instances(rows.tokens.values, work.settings["sequence_length"])
    write_shards(directory, instances, work.data["instances_per_shard"])
    origins = instance_origins(
        rows.tokens.lengths_N, rows.origin.strings(), work.settings["sequence_length"]
    )
    write_origins(directory, origins)


def _read(work: Work, key: int) -> Rows:
    parts = []
    for reader in range(read.count(work)):
        directory = work.directory("encode", reader)
        start, stop = read_array(directory, "starts", key, key + 2)
        parts.append(read_rows(directory / "held_out", int(start), int(stop)))
    return join_rows(parts)


def _within_limit(work: Work, rows: Rows) -> np.ndarray:
    """Returns which rows are kept: those of lowest hash, until they fill the instances wanted."""
    wanted, length = work.data["eval_instances"], work.settings["sequence_length"]
    lengths_N = rows.tokens.lengths_N
    if not wanted or count_instances(int(lengths_N.sum()), length) <= wanted:
        return np.ones(len(rows), bool)
    order_N = np.lexsort((rows.digest_Nx2[:, 1], rows.digest_Nx2[:, 0]))
    before_N = np.cumsum(lengths_N[order_N]) - lengths_N[order_N]
    kept_N = np.zeros(len(rows), bool)
    kept_N[order_N[before_N < wanted * length + 1]] = True
    return kept_N


def _histogram(lengths_N: np.ndarray) -> list[list[int]]:
    lengths, counts = np.unique(lengths_N, return_counts=True)
    return [lengths.tolist(), counts.tolist()]
