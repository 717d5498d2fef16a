"""Columns of a task's output: arrays in `.npy` files, of which any range of rows can be read.

A ragged column holds a piece of varying length per row: text, or tokens. Paths may be addresses in
an object store, where reading a range transfers nothing else.

N rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COPY_BYTES = 2**24


@dataclass(frozen=True)
class Ragged:
    """Rows of varying length.

    Attributes:
      values: the rows end to end.
      starts_N1: int64 `[N + 1]`; row i is `values[starts_N1[i]:starts_N1[i + 1]]`.
    """

    values: np.ndarray
    starts_N1: np.ndarray

    @classmethod
    def of(cls, pieces: Sequence[np.ndarray], dtype: np.dtype | type) -> "Ragged":
        """Returns the rows of `pieces`."""
        lengths = [len(piece) for piece in pieces]
        values = np.concatenate([np.empty(0, dtype), *pieces]).astype(dtype, copy=False)
        return cls(values, np.cumsum([0, *lengths], dtype=np.int64))

    @classmethod
    def of_strings(cls, strings: Sequence[str]) -> "Ragged":
        """Returns the UTF-8 bytes of `strings`."""
        return cls.of([np.frombuffer(s.encode(), np.uint8) for s in strings], np.uint8)

    @classmethod
    def joined(cls, parts: Sequence["Ragged"], dtype: np.dtype | type) -> "Ragged":
        """Returns the rows of all parts, one part after the other."""
        values = np.concatenate([np.empty(0, dtype), *(part.values for part in parts)])
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths_N for part in parts)])
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts_N1) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts_N1[row] : self.starts_N1[row + 1]]

    @property
    def lengths_N(self) -> np.ndarray:
        """The length of every row."""
        return np.diff(self.starts_N1)

    def take(self, rows: np.ndarray) -> "Ragged":
        """Returns some rows, in the order given."""
        return Ragged.of([self[row] for row in rows], self.values.dtype)

    def strings(self) -> list[str]:
        """Returns the rows of a column of UTF-8 bytes as strings."""
        return [self[row].tobytes().decode() for row in range(len(self))]


def write_array(directory: Path, name: str, array: np.ndarray) -> None:
    """Writes a column of numbers into a local directory."""
    array = np.ascontiguousarray(array)
    with (directory / f"{name}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # unlike np.save, it says why a disk refuses


def read_array(directory: Path, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads the rows from `start` to `stop` (default: all) of a column of numbers."""
    with (directory / f"{name}.npy").open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        stop = shape[0] if stop is None else min(stop, shape[0])
        row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        file.seek(file.tell() + start * row_bytes)
        contents = file.read(max(stop - start, 0) * row_bytes)
    return np.frombuffer(contents, dtype).reshape(max(stop - start, 0), *shape[1:])


def write_ragged(directory: Path, name: str, column: Ragged) -> None:
    """Writes a ragged column into a local directory."""
    write_array(directory, name, column.values)
    write_array(directory, f"{name}_starts", column.starts_N1)


def read_ragged(directory: Path, name: str, start: int = 0, stop: int | None = None) -> Ragged:
    """Reads the rows from `start` to `stop` (default: all) of a ragged column."""
    starts = read_array(directory, f"{name}_starts", start, None if stop is None else stop + 1)
    values = read_array(directory, name, int(starts[0]), int(starts[-1]))
    return Ragged(values, starts - starts[0])


class TextWriter:
    """Writes a ragged column of strings row by row, so that they are never all in memory."""

    def __init__(self, directory: Path, name: str):
        self._directory, self._name = directory, name
        self._body = (directory / f"{name}.tmp").open("wb+")
        self._starts = [0]

    def append(self, contents: bytes) -> None:
        """Adds a row."""
        self._body.write(contents)
        self._starts.append(self._starts[-1] + len(contents))

    def close(self) -> None:
        """Completes the column."""
        with (self._directory / f"{self._name}.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (self._starts[-1],)}
            np.lib.format.write_array_header_1_0(file, header)
            self._body.seek(0)
            while piece := self._body.read(COPY_BYTES):
                file.write(piece)
        self._body.close()
        (self._directory / f"{self._name}.tmp").unlink()
        write_array(self._directory, f"{self._name}_starts", np.array(self._starts, np.int64))


def batches(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the bounds of consecutive ranges of at most `size` rows."""
    for start in range(0, total, size):
        yield start, min(start + size, total)
