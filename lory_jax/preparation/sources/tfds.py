"""Reads TFDS data sets without TensorFlow; they must be prepared in the array_record format."""

from collections.abc import Iterator
from typing import Any

from lory_jax.errors import InputError

EXAMPLES = 1000  # at a time


def domain_of(source: str) -> str:
    """The domain of examples that name none: the name of the data set."""
    return source.removeprefix("tfds:").partition(":")[0].split("/")[0]


def describe(source: str) -> tuple[int, str]:
    """Returns size in bytes and version of `tfds:NAME/config:split`."""
    builder, _ = _open(source)
    return int(builder.info.dataset_size), str(builder.info.version)


def divide(source: str, part_bytes: int) -> list[int]:
    """Returns where parts begin and the last one ends, in examples."""
    builder, examples = _open(source)
    parts = max(1, -(-int(builder.info.dataset_size) // part_bytes))
    return [len(examples) * i // parts for i in range(parts + 1)]


def read_examples(
    source: str, part: tuple[int, int] | None, keys: tuple[str, ...]
) -> Iterator[tuple[str, int, Any]]:
    """Yields position, size (0: not known) and record of each example."""
    _, examples = _open(source)
    first, end = part or (0, len(examples))
    for start in range(first, end, EXAMPLES):
        numbers = range(start, min(start + EXAMPLES, end))
        for number, example in zip(numbers, examples.__getitems__(numbers), strict=True):
            yield f"example {number}", 0, _decoded(example)


def _decoded(example: Any) -> Any:
    try:
        return {k: v.decode() if isinstance(v, bytes) else v for k, v in example.items()}
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start}")


def _open(source: str) -> tuple[Any, Any]:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(f"{source}: requires pip install tensorflow-datasets") from None
    name, _, split = source.removeprefix("tfds:").partition(":")
    try:
        builder = tfds.builder(name)
        return builder, builder.as_data_source(split=split or "train")
    except (
        tfds.core.DatasetNotFoundError,
        ValueError,
        AssertionError,
        NotImplementedError,
    ) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source}: cannot be read ({reason}); must be a data set prepared with "
            "download_and_prepare(file_format='array_record') in $TFDS_DATA_DIR"
        ) from None
