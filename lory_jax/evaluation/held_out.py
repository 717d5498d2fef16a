"""Held-out instances: in batches, and their losses in a file.

N instances.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def batches_of(sets: dict[str, np.ndarray], batch_size: int) -> list[tuple[str, np.ndarray]]:
    """Returns `(domain, rows)` for every batch of at most `batch_size` instances, in order."""
    return [
        (domain, rows[start : start + batch_size])
        for domain, rows in sets.items()
        for start in range(0, len(rows), batch_size)
    ]


def encode_instances(losses: Mapping[str, np.ndarray], origins: Mapping[str, list[str]]) -> bytes:
    """The loss and the origin of every instance as a file, so that runs can be compared in pairs.

    It is a compressed NPZ with two arrays per domain: `loss/DOMAIN`, float32 `[N]`, and
    `origin/DOMAIN`, strings `[N]`.
    """
    arrays: dict[str, Any] = {f"loss/{domain}": loss_N for domain, loss_N in losses.items()}
    arrays |= {f"origin/{domain}": np.array(origins[domain], dtype=str) for domain in losses}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_instances(path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """The losses and the origins of a file that `encode_instances` made, by domain."""
    with np.load(path, allow_pickle=False) as arrays:
        domains = [name.removeprefix("loss/") for name in arrays.files if name.startswith("loss/")]
        losses = {domain: arrays[f"loss/{domain}"] for domain in domains}
        return losses, {domain: arrays[f"origin/{domain}"].tolist() for domain in domains}
