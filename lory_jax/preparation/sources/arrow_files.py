"""Reads Parquet and Arrow (IPC files, and the streams that `save_to_disk` writes) with pyarrow."""

from collections.abc import Iterator
from types import ModuleType
from typing import IO, Any

from lory_jax.errors import InputError
from lory_jax.preparation.sources.streams import open_stream

ROWS = 1000  # at a time
FILE_MAGIC = b"ARROW1"


def pyarrow(path: str) -> ModuleType:
    """The package, with its submodules; raises `InputError` if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: requires the package pyarrow; pip install pyarrow") from None
    return pyarrow


def read_parquet(
    stream: IO[bytes], part: tuple[int, int] | None, keys: tuple[str, ...], path: str
) -> Iterator[tuple[str, int, Any]]:
    """Yields position, size (0: not known) and record of each row of a range of row groups.

    Only the columns that `keys` reach are read.
    """
    table = pyarrow(path).parquet.ParquetFile(stream, pre_buffer=False)
    columns = _columns(table.schema_arrow.names, keys)
    for group in range(*(part or (0, table.num_row_groups))):
        batches = table.iter_batches(ROWS, row_groups=[group], columns=columns)
        yield from _rows(batches, f"row group {group}, row")


def read_arrow(
    stream: IO[bytes], part: tuple[int, int] | None, keys: tuple[str, ...], path: str
) -> Iterator[tuple[str, int, Any]]:
    """As `read_parquet`, of a range of record batches; a stream has no parts."""
    ipc = pyarrow(path).ipc
    magic = stream.read(len(FILE_MAGIC))
    stream.seek(0)
    if magic != FILE_MAGIC:
        with ipc.open_stream(stream) as reader:
            columns = _columns(reader.schema.names, keys)
            for number, batch in enumerate(reader):
                yield from _rows(_slices(batch, columns), f"batch {number}, row")
        return
    with ipc.open_file(stream) as reader:
        columns = _columns(reader.schema.names, keys)
        for number in range(*(part or (0, reader.num_record_batches))):
            batch = reader.get_batch(number)
            yield from _rows(_slices(batch, columns), f"batch {number}, row")


def divide(path: str, kind: str, part_bytes: int) -> list[int]:
    """Returns where parts begin and the last one ends, in row groups or record batches.

    The list is empty for what cannot be divided: a stream, or a damaged file.
    """
    arrow = pyarrow(path)
    with open_stream(path) as stream:
        try:
            if kind == "parquet":
                metadata = arrow.parquet.ParquetFile(stream).metadata
                groups = range(metadata.num_row_groups)
                sizes = [metadata.row_group(group).total_byte_size for group in groups]
            elif stream.read(len(FILE_MAGIC)) == FILE_MAGIC:
                count = arrow.ipc.open_file(stream).num_record_batches
                sizes = [-(-stream.seek(0, 2) // max(count, 1))] * count
            else:
                return []
        except Exception as error:
            if not is_damage(error):
                raise
            return []
    bounds, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > part_bytes:
            bounds.append(i)
            filled = 0
        filled += size
    return [*bounds, len(sizes)]


def is_damage(error: Exception) -> bool:
    """Whether an error of pyarrow is about the contents of a file, and not about reaching it."""
    is_from_pyarrow = type(error).__module__.startswith("pyarrow")
    return is_from_pyarrow or (isinstance(error, OSError) and error.errno is None)


def _columns(names: list[str], keys: tuple[str, ...]) -> list[str]:
    """The columns that hold the fields, or the beginning of their dotted paths."""
    found = [key if key in names else key.partition(".")[0] for key in keys]
    chosen = [name for name in dict.fromkeys(found) if name in names]
    # Without the text every row is broken, and the message lists what there is.
    return chosen if found[0] in names else list(names)


def _slices(batch: Any, columns: list[str]) -> Iterator[Any]:
    batch = batch.select(columns)
    for start in range(0, batch.num_rows, ROWS):
        yield batch.slice(start, ROWS)


def _rows(batches: Iterator[Any], label: str) -> Iterator[tuple[str, int, Any]]:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:  # in one of the rows
            rows = [_row(batch, i) for i in range(batch.num_rows)]
        for row in rows:
            yield f"{label} {number}", 0, _decoded(row)
            number += 1


def _row(batch: Any, i: int) -> Any:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return ValueError("not UTF-8")


def _decoded(row: Any) -> Any:
    """A row whose binary values, in which some writers store texts, are strings."""
    if isinstance(row, ValueError) or not any(isinstance(v, bytes) for v in row.values()):
        return row
    try:
        return {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start}")
