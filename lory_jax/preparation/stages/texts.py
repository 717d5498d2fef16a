"""Documents that were read, one at a time, so that a list of them takes no memory."""

from collections.abc import Iterable, Sequence
from typing import IO, overload

import numpy as np

from lory_jax.preparation.engine.columns import read_array
from lory_jax.preparation.engine.work import Work


class Texts(Sequence[str]):
    """The texts at some places, each a reading task and a row; read when they are asked for."""

    def __init__(self, work: Work, places: Iterable[tuple[int, int]]):
        self._work = work
        self._places = [(int(reader), int(row)) for reader, row in places]
        self._files: dict[int, tuple[IO[bytes], int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._read(*place) for place in self._places[index]]
        return self._read(*self._places[index])

    def _read(self, reader: int, row: int) -> str:
        if reader not in self._files:
            directory = self._work.directory("read", reader)
            file: IO[bytes] = (directory / "text.npy").open("rb")
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._files[reader] = (file, file.tell(), read_array(directory, "text_starts"))
        opened, offset, starts = self._files[reader]
        start, stop = int(starts[row]), int(starts[row + 1])
        if opened.tell() != offset + start:
            opened.seek(offset + start)
        return opened.read(stop - start).decode()

    def close(self) -> None:
        """Closes the files."""
        for file, _, _ in self._files.values():
            file.close()
        self._files.clear()
