"""Reads CSV and TSV with a header; fields in quotes may hold line ends."""

import csv
import io
from collections.abc import Iterator
from typing import IO, Any

LONGEST_FIELD = 1 << 28  # characters; whatever seems longer is a quote without an end


def read_table(
    stream: IO[bytes], delimiter: str, text_key: str, size: int
) -> Iterator[tuple[str, int, Any]]:
    """Yields position, size and record of each row.

    Args:
      stream: the file.
      delimiter: "," or a tab.
      text_key: a column that the header must have; without it, the whole file is one broken record.
      size: that of the file.
    """
    csv.field_size_limit(LONGEST_FIELD)
    # What is not UTF-8 becomes surrogates, which no document may hold.
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header = next(rows, [])
    if header and text_key not in header:
        found = ", ".join(header)[:200]
        yield "line 1", size, ValueError(f"has no column {text_key}; its columns are: {found}")
        return
    while True:
        position = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield position, 0, ValueError(str(error))
            continue
        if row is None:
            return
        if not row:  # an empty line
            continue
        length = sum(map(len, row))
        if len(row) != len(header):
            problem = f"has {len(row)} fields, must have {len(header)}, as the header"
            yield position, length, ValueError(problem)
        else:
            yield position, length, dict(zip(header, row, strict=True))
