"""Tokenized documents with what is known about them, as columns of one directory.

Columns, N rows: `tokens` (BOS and EOS included), `origin`, `domain_N` (a number into the sorted
domains of the corpus), `bytes_N`, `digest_Nx2`, `place_Nx2` (reading task and row) and, for
training documents, `vectors_NxD`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lory_jax.preparation.engine.columns import (
    Ragged,
    read_array,
    read_ragged,
    write_array,
    write_ragged,
)


@dataclass(frozen=True)
class Rows:
    """Columns of equal length; see the top of this module."""

    tokens: Ragged
    origin: Ragged
    domain_N: np.ndarray
    bytes_N: np.ndarray
    digest_Nx2: np.ndarray
    place_Nx2: np.ndarray
    vectors_NxD: np.ndarray

    def __len__(self) -> int:
        return len(self.domain_N)

    def take(self, rows: np.ndarray) -> "Rows":
        """Returns some rows, in the order given."""
        return Rows(
            self.tokens.take(rows),
            self.origin.take(rows),
            self.domain_N[rows],
            self.bytes_N[rows],
            self.digest_Nx2[rows],
            self.place_Nx2[rows],
            self.vectors_NxD[rows],
        )

    def natural_order(self) -> np.ndarray:
        """Returns the rows by domain, origin and place; the units of one file follow each other."""
        origins, domains = self.origin.strings(), self.domain_N.tolist()
        places = self.place_Nx2.tolist()
        keys = list(zip(domains, origins, places, strict=True))
        return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)

    def write(self, directory: Path) -> None:
        """Writes the columns into a new local directory."""
        directory.mkdir()
        write_ragged(directory, "tokens", self.tokens)
        write_ragged(directory, "origin", self.origin)
        write_array(directory, "domain", self.domain_N)
        write_array(directory, "bytes", self.bytes_N)
        write_array(directory, "digest", self.digest_Nx2)
        write_array(directory, "place", self.place_Nx2)
        write_array(directory, "vectors", self.vectors_NxD)


def read_rows(directory: Path, start: int = 0, stop: int | None = None) -> Rows:
    """Reads the rows from `start` to `stop` (default: all)."""
    return Rows(
        read_ragged(directory, "tokens", start, stop),
        read_ragged(directory, "origin", start, stop),
        read_array(directory, "domain", start, stop),
        read_array(directory, "bytes", start, stop),
        read_array(directory, "digest", start, stop),
        read_array(directory, "place", start, stop),
        read_array(directory, "vectors", start, stop),
    )


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        Ragged.joined([part.tokens for part in parts], parts[0].tokens.values.dtype),
        Ragged.joined([part.origin for part in parts], np.uint8),
        np.concatenate([part.domain_N for part in parts]),
        np.concatenate([part.bytes_N for part in parts]),
        np.concatenate([part.digest_Nx2 for part in parts]),
        np.concatenate([part.place_Nx2 for part in parts]),
        np.concatenate([part.vectors_NxD for part in parts]),
    )
