"""Stage `select`: the side of every document that was read, or why it is dropped.

Column: `side_N`, int8, a number into `split.splits`, or -1 for a dropped document.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.preparation.engine.columns import read_array, read_ragged, write_array
from lory_jax.preparation.engine.work import Facts, Work, hash_sum
from lory_jax.preparation.split import side_by_threshold
from lory_jax.preparation.stages import read, split
from lory_jax.preparation.stages.deduplicate import dropped_rows
from lory_jax.preparation.stages.split import evaluation_splits, splits


def run(work: Work, task: int, out: Path) -> Facts:
    """Carries out, for the documents of a reading task, what `split` decided."""
    directory = work.directory("read", task)
    decided = split.load(work)
    is_capped_N = ~split.kept_by_rank(work, task, decided["rank_limits"])
    is_repeated_N = np.zeros(len(is_capped_N), bool)
    is_repeated_N[dropped_rows(work, task)] = True
    digest_Nx2, origins = read_array(directory, "digest"), read_ragged(directory, "origin")
    domain_N, bytes_N = read_array(directory, "domain"), read_array(directory, "bytes")
    names = work.values("read", task)["domains"]

    sides = decided["sides"] or _Thresholds(work)
    side_N = np.full(len(bytes_N), -1, np.int8)
    numbers = {name: i for i, name in enumerate(splits(work))}
    counts: dict[str, dict[str, Any]] = {name: {} for name in numbers}
    reasons: dict[str, int] = defaultdict(int)
    with (out / read.DROPPED_NAME).open("w", encoding="utf-8") as dropped:
        for row in range(len(side_N)):
            domain, origin = names[domain_N[row]], origins[row].tobytes().decode()
            if is_repeated_N[row] or is_capped_N[row]:
                reason = "exact duplicate" if is_repeated_N[row] else "over max_domain_bytes"
                reasons[reason] += 1
                digest = read.digest_bytes(digest_Nx2[row])
                dropped.write(read.drop_line(digest, domain, origin, reason))
                continue
            side = sides[origin]
            side_N[row] = numbers[side]
            of_domain = counts[side].setdefault(domain, {"documents": 0, "bytes": 0})
            of_domain["documents"] += 1
            of_domain["bytes"] += int(bytes_N[row])
    write_array(out, "side", side_N)
    values = {
        "counts": counts,
        "dropped": reasons,
        "dropped_hash": hash_sum(digest_Nx2[side_N < 0, 0]),
    }
    return Facts(int((side_N >= 0).sum()), hash_sum(digest_Nx2[side_N >= 0, 0]), values)


def num_training_documents(work: Work) -> int:
    """Returns the number of documents that are to be trained on, near duplicates included."""
    return sum(
        of_domain["documents"]
        for task in range(read.count(work))
        for of_domain in work.values("select", task)["counts"][split.TRAIN].values()
    )


class _Thresholds(dict[str, str]):
    """The side of each origin by its hash."""

    def __init__(self, work: Work):
        super().__init__()
        data = work.data
        self._seed = work.settings["seed"]
        self._fractions = {name: data[f"{name}_fraction"] for name in evaluation_splits(work)}

    def __missing__(self, origin: str) -> str:
        return side_by_threshold(origin, self._fractions, self._seed)
