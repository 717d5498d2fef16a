"""How much of the held-out instances was seen in training: overlap of 13-grams of tokens.

    python -m tools.study.audit --data=DIR [--out=docs/study/audit.json]

A shingle is 13 tokens in a row. For every held-out instance it finds the share of its shingles that
occur anywhere in the training instances. Split by origin, two packages may still quote the same
licence or ship the same file. docs/study.md shows the main effects with and without instances of
high overlap. Shingles are compared by 64-bit hashes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.console import progress
from lory_jax.data.instances import read_instances
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.storage import write_atomically
from tools.study.results import SPLITS, Results, describe_held_out

AUDIT = "audit.json"
SHINGLE = 13
HIGH = 0.5  # the share of known shingles from which an instance counts as a near-duplicate
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, with well mixed bits
CHUNK = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    parser.add_argument("--out", type=Path, default=Path("docs/study/audit.json"))
    args = parser.parse_args()
    found = write_audit(PreparedData.open(args.data), args.out)
    for split, domains in found["overlap"].items():
        for domain, shares in domains.items():
            high = np.mean(np.array(shares) >= HIGH)
            print(
                f"{split:14}{domain:16}{np.mean(shares):8.1%} known, {high:6.1%} of instances high"
            )


def write_audit(data: PreparedData, path: Path) -> dict[str, Any]:
    """Audits prepared data and writes what was found."""
    found = audit(data)
    write_atomically(path, json.dumps(found) + "\n")
    return found


def read_audit(path: Path, results: Results) -> dict[str, Any] | None:
    """What was found, or None if nothing was written; `InputError` if it is of other documents."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8"))
    if found["digest"] != results.held_out()["digest"]:
        raise InputError(f"{path}: is of other held-out documents; remove it to audit again")
    return found


def audit(data: PreparedData) -> dict[str, Any]:
    """The overlap of every held-out instance with the training instances, by split and domain."""
    manifest = data.manifest
    train = read_instances(
        data.local_files("train/") / "train", manifest.sequence_length, manifest.dtype
    )
    known = training_shingles(train)
    overlap = {
        split: {
            domain: [round(float(share), 3) for share in overlaps(rows, known)]
            for domain, rows in data.held_out_with_instances(split).items()
        }
        for split in SPLITS
        if split in manifest.counts
    }
    return {
        "digest": describe_held_out(data)["digest"],
        "shingle": SHINGLE,
        "high": HIGH,
        "overlap": overlap,
    }


def training_shingles(train_NxL1: np.ndarray) -> np.ndarray:
    """The hashes of all shingles inside training instances, sorted, each once."""
    starts = range(0, len(train_NxL1), CHUNK)
    parts = [
        np.unique(hashes(train_NxL1[start : start + CHUNK]))
        for start in progress(starts, len(starts), "hashing", "chunks")
    ]
    return np.unique(np.concatenate(parts))


def overlaps(rows_NxL1: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The share of every instance's shingles that are among the sorted hashes `known`, `[N]`."""
    hashes_NxS = hashes(rows_NxL1)
    places = np.minimum(np.searchsorted(known, hashes_NxS), len(known) - 1)
    return np.mean(known[places] == hashes_NxS, axis=1)


def hashes(rows_NxL1: np.ndarray) -> np.ndarray:
    """The hash of every shingle, uint64 `[N, L + 2 - SHINGLE]`: a polynomial in `BASE`."""
    # Tokens are mixed first: small numbers in a polynomial alone would collide by design.
    mixed = (rows_NxL1.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(29)
    count = rows_NxL1.shape[1] + 1 - SHINGLE
    result = np.zeros((len(rows_NxL1), count), np.uint64)
    for offset in range(SHINGLE):
        result = result * BASE + mixed[:, offset : offset + count]
    return result


if __name__ == "__main__":
    main()
