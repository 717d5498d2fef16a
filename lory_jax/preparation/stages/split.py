"""Stage `split`: which documents are kept, and on which side of the split each origin is.

A corpus of at most one shard is split exactly by the bytes of each domain. A larger one is split by
a threshold on the hash of the origin, which needs no list of all origins.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.preparation.engine.columns import read_array, read_ragged
from lory_jax.preparation.engine.work import Facts, Work
from lory_jax.preparation.split import split_by_origin
from lory_jax.preparation.stages import read
from lory_jax.preparation.stages.deduplicate import dropped_rows
from lory_jax.preparation.statistics import corpus_table

TRAIN = "train"
SPLIT_NAME = "split.json"
COMPACT = 4_000_000  # documents whose ranks are held at once, unless more are kept


@dataclass(frozen=True)
class Row:
    """What the split goes by."""

    domain: str
    origin: str
    num_bytes: int


def evaluation_splits(work: Work) -> tuple[str, ...]:
    """The held-out sides; `confirmation` is one only if it gets a share."""
    has_confirmation = work.data.get("confirmation_fraction", 0) > 0
    return ("validation", "test", *(("confirmation",) if has_confirmation else ()))


def splits(work: Work) -> tuple[str, ...]:
    """All sides, by their number."""
    return (TRAIN, *evaluation_splits(work))


def count(work: Work) -> int:
    """One task."""
    return 1


def run(work: Work, task: int, out: Path) -> Facts:
    """Decides; what is decided for single documents is carried out by `select`."""
    data = work.data
    limits = _rank_limits(work, data["max_domain_bytes"]) if data["max_domain_bytes"] else {}
    kept = sum(int(_kept(work, reader, limits).sum()) for reader in range(read.count(work)))
    facts: dict[str, Any] = {"documents": kept, "is_small": kept <= data["shard_documents"]}
    say = []
    decided: dict[str, Any] = {"rank_limits": limits, "sides": {}}
    if facts["is_small"]:
        rows = list(_rows(work, limits))
        say.append(corpus_table(rows))
        sides = split_by_origin(
            rows,
            validation_fraction=data["validation_fraction"],
            test_fraction=data["test_fraction"],
            confirmation_fraction=data.get("confirmation_fraction", 0.0),
            seed=work.settings["seed"],
        )
        decided["sides"] = {row.origin: side for side, members in sides.items() for row in members}
    facts["domains"] = sorted(
        {name for reader in range(read.count(work)) for name in _kept_domains(work, reader, limits)}
    )
    text = json.dumps(decided, indent=0, sort_keys=True) + "\n"
    (out / SPLIT_NAME).write_text(text, encoding="utf-8")
    return Facts(values=facts, say=say)


def load(work: Work) -> dict[str, Any]:
    """Returns `rank_limits` and `sides`, as they were decided."""
    return json.loads((work.directory("split") / SPLIT_NAME).read_text("utf-8"))


def kept_by_rank(work: Work, reader: int, limits: dict[str, int]) -> np.ndarray:
    """Returns which rows of a reading task are within the limit of their domain."""
    directory = work.directory("read", reader)
    names = work.values("read", reader)["domains"]
    highest = 2**64 - 1
    limit_D = np.array([limits.get(name, highest) for name in names], np.uint64)
    domain_N = read_array(directory, "domain")
    return read_array(directory, "rank") <= limit_D[domain_N] if len(domain_N) else domain_N == 0


def _kept(work: Work, reader: int, limits: dict[str, int]) -> np.ndarray:
    kept_N = kept_by_rank(work, reader, limits)
    kept_N[dropped_rows(work, reader)] = False
    return kept_N


def _kept_domains(work: Work, reader: int, limits: dict[str, int]) -> list[str]:
    names = work.values("read", reader)["domains"]
    domain_N = read_array(work.directory("read", reader), "domain")
    return [names[i] for i in np.unique(domain_N[_kept(work, reader, limits)])]


def _rows(work: Work, limits: dict[str, int]) -> Iterator[Row]:
    for reader in range(read.count(work)):
        directory = work.directory("read", reader)
        names = work.values("read", reader)["domains"]
        domain_N = read_array(directory, "domain")
        bytes_N = read_array(directory, "bytes")
        origins = read_ragged(directory, "origin")
        for row in np.flatnonzero(_kept(work, reader, limits)).tolist():
            origin = origins[row].tobytes().decode()
            yield Row(names[domain_N[row]], origin, int(bytes_N[row]))


def _rank_limits(work: Work, max_domain_bytes: int) -> dict[str, int]:
    """Returns the highest rank that each domain's cap lets pass."""
    held: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    limits: dict[str, int] = {}
    num_held = 0

    def compact() -> int:
        total = 0
        for name, pieces in held.items():
            rank_N, bytes_N = (np.concatenate(column) for column in zip(*pieces, strict=True))
            limits[name] = rank_limit(rank_N, bytes_N, max_domain_bytes)
            below_N = rank_N <= np.uint64(limits[name])
            held[name] = [(rank_N[below_N], bytes_N[below_N])]
            total += int(below_N.sum())
        return total

    for reader in range(read.count(work)):
        directory = work.directory("read", reader)
        names = work.values("read", reader)["domains"]
        domain_N, rank_N = read_array(directory, "domain"), read_array(directory, "rank")
        bytes_N, kept_N = read_array(directory, "bytes"), _kept(work, reader, limits)
        for i in np.unique(domain_N[kept_N]):
            mine_N = kept_N & (domain_N == i)
            held.setdefault(names[i], []).append((rank_N[mine_N], bytes_N[mine_N]))
        num_held += int(kept_N.sum())
        if num_held > 2 * COMPACT:
            num_held = compact()
    compact()
    return limits


def rank_limit(rank_N: np.ndarray, bytes_N: np.ndarray, max_bytes: int) -> int:
    """Returns the rank up to which documents, in the order of their ranks, fill `max_bytes`."""
    order_N = np.argsort(rank_N, kind="stable")
    before_N = np.cumsum(bytes_N[order_N]) - bytes_N[order_N]
    return int(rank_N[order_N[np.count_nonzero(before_N < max_bytes) - 1]])
