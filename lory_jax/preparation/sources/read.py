"""Reads one input: the only place that knows which reader belongs to which kind."""

from collections.abc import Iterator
from typing import IO

from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources import arrow_files, csv_files, json_files, tfds
from lory_jax.preparation.sources.inputs import Input, is_special
from lory_jax.preparation.sources.records import ReadOptions, Reject, read_records
from lory_jax.preparation.sources.streams import damage_errors, describe, open_stream
from lory_jax.preparation.sources.text_files import read_text


def read_input(input: Input, options: ReadOptions) -> Iterator[Document | Reject]:
    """Yields the documents of an input in their order, and a reject for each broken one.

    It can be called again and yields the same. Except for texts, which are read whole, the memory
    it needs depends on the longest record (of tables: on a thousand rows), not on the file.

    Args:
      input: from `list_inputs`.
      options: which fields hold what.

    Raises:
      InputError: the file changed since it was listed, or a package that reads it is missing.
      OSError: the file cannot be reached; trying again may help.
    """
    if input.kind == "python":
        from lory_jax.preparation.sources.python_installation import read_python_installation

        yield from read_python_installation(options.max_domain_bytes, options.seed)
        return
    if not is_special(input) and (found := describe(input.path)) != (input.size, input.stamp):
        raise InputError(
            f"{input.path}: changed after it was listed (it had {input.size:,} bytes, and has "
            f"{found[0]:,}); start with a new directory"
        )
    try:
        if input.kind == "tfds":
            examples = tfds.read_examples(input.path, input.part, options.keys)
            yield from read_records(examples, input, options)
        else:
            with open_stream(input.path, input.compression) as stream:
                yield from _read_stream(stream, input, options)
    except Exception as error:
        if not _is_damage(error, input):
            raise
        # How many documents are lost is not known: the whole file counts.
        reason = f"truncated or damaged ({str(error).splitlines()[0] if str(error) else error!r})"
        yield Reject(input.path, "the rest of the file", reason, input.size)


def _read_stream(
    stream: IO[bytes], input: Input, options: ReadOptions
) -> Iterator[Document | Reject]:
    kind = input.kind
    if kind == "text":
        yield read_text(stream, input, options.text_key)
        return
    if kind == "jsonl":
        records = json_files.read_lines(stream, input.part)
    elif kind == "json":
        records = json_files.read_values(stream)
    elif kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        records = csv_files.read_table(stream, delimiter, options.text_key, input.size)
    elif kind == "parquet":
        records = arrow_files.read_parquet(stream, input.part, options.keys, input.path)
    else:
        records = arrow_files.read_arrow(stream, input.part, options.keys, input.path)
    yield from read_records(records, input, options)


def _is_damage(error: Exception, input: Input) -> bool:
    if input.kind in ("parquet", "arrow"):
        return arrow_files.is_damage(error)
    return bool(input.compression) and isinstance(error, damage_errors(input.compression))
