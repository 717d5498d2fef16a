"""All documents of sources in their order, for callers that accept no broken one."""

from collections.abc import Iterator, Sequence

from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources.inputs import list_inputs
from lory_jax.preparation.sources.read import read_input
from lory_jax.preparation.sources.records import ReadOptions, Reject


def read_documents(
    sources: Sequence[str], options: ReadOptions | None = None
) -> Iterator[Document]:
    """Yields the documents of all sources.

    Raises:
      InputError: a source is missing or of an unknown kind, or a document cannot be used.
    """
    for each in list_inputs(sources):
        for item in read_input(each, options or ReadOptions()):
            if isinstance(item, Reject):
                raise InputError(f"{item.path}: {item.position}: {item.reason}")
            yield item
