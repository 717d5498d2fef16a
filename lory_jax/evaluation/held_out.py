"""Held-out instances in batches."""

import numpy as np

from lory_jax.data.prepared import PreparedData


def held_out_sets(data: PreparedData, split: str) -> dict[str, np.ndarray]:
    """Returns `data.held_out_with_instances(split)`."""
    return data.held_out_with_instances(split)


def batches_of(sets: dict[str, np.ndarray], batch_size: int) -> list[tuple[str, np.ndarray]]:
    """Returns `(domain, rows)` for every batch of at most `batch_size` instances, in order."""
    return [
        (domain, rows[start : start + batch_size])
        for domain, rows in sets.items()
        for start in range(0, len(rows), batch_size)
    ]
