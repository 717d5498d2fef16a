"""Stage `deduplicate`: exact duplicates, found by hash; a task takes a range of all hashes.

Columns, N dropped rows sorted by where they were read: `drop_Nx2` (reading task and row), and
`starts_T1` (where the rows of each reading task begin).
"""

from pathlib import Path

import numpy as np

from lory_jax.preparation.deduplication import repeated
from lory_jax.preparation.engine.columns import read_array, write_array
from lory_jax.preparation.engine.work import Facts, Work
from lory_jax.preparation.stages import read

DOCUMENTS_PER_TASK = 2_000_000


def count(work: Work) -> int:
    """As many tasks as bound the memory of one, by the number of documents."""
    rows = read.check_not_empty(work)
    return -(-rows // DOCUMENTS_PER_TASK)


def run(work: Work, task: int, out: Path) -> Facts:
    """Keeps the first of the documents of a range that are equal."""
    tasks = count(work)
    low, high = (2**64 * bound // tasks for bound in (task, task + 1))
    digests, sources, rows = [], [], []
    readers = read.count(work)
    for reader in range(readers):
        directory = work.directory("read", reader)
        first_N = read_array(directory, "sorted_digest")[:, 0]
        start = int(np.searchsorted(first_N, np.uint64(low)))
        stop = len(first_N) if high == 2**64 else int(np.searchsorted(first_N, np.uint64(high)))
        digests.append(read_array(directory, "sorted_digest", start, stop))
        rows.append(read_array(directory, "by_digest", start, stop))
        sources.append(np.full(stop - start, reader))
    digest_Nx2 = np.concatenate(digests)
    place_Nx2 = np.stack([np.concatenate(sources), np.concatenate(rows)], axis=1)
    dropped = place_Nx2[repeated(digest_Nx2, place_Nx2)]
    dropped = dropped[np.lexsort((dropped[:, 1], dropped[:, 0]))]
    write_array(out, "drop", dropped)
    write_array(out, "starts", np.searchsorted(dropped[:, 0], np.arange(readers + 1)))
    return Facts(values={"exact_duplicates": len(dropped)})


def dropped_rows(work: Work, reader: int) -> np.ndarray:
    """Returns the rows of a reading task that are dropped."""
    rows = [np.empty(0, np.int64)]
    for task in range(count(work)):
        directory = work.directory("deduplicate", task)
        start, stop = read_array(directory, "starts", reader, reader + 2)
        rows.append(read_array(directory, "drop", int(start), int(stop))[:, 1])
    return np.concatenate(rows)
