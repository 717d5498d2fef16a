"""Held-out instances by domain, and going through them in batches."""

import sys
from pathlib import Path

import numpy as np

from lory_jax.data.batches import evaluation_sets
from lory_jax.errors import InputError


def held_out_sets(directory: Path, split: str) -> dict[str, np.ndarray]:
    """The instances of each domain that fills at least one, int32 `[N, L + 1]`.

    Domains without any are named on standard error.

    Raises:
      InputError: no domain has an instance, or the directory is not prepared or damaged.
    """
    sets = evaluation_sets(directory, split)
    empty = [domain for domain, rows in sets.items() if not len(rows)]
    if len(empty) == len(sets):
        raise InputError(f"{directory}: no instance in the {split} split; prepare more documents")
    if empty:
        print(f"left out, no whole {split} instance: {', '.join(empty)}", file=sys.stderr)
    return {domain: rows for domain, rows in sets.items() if len(rows)}


def batches_of(sets: dict[str, np.ndarray], batch_size: int) -> list[tuple[str, np.ndarray]]:
    """`(domain, rows)` for every batch of at most `batch_size` instances, in order."""
    return [
        (domain, rows[start : start + batch_size])
        for domain, rows in sets.items()
        for start in range(0, len(rows), batch_size)
    ]
