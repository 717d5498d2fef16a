"""A document, and how text is cut and joined at natural borders."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A natural unit of text.

    Attributes:
      text: what the model learns from.
      domain: the kind of text; evaluation is per domain.
      origin: where the text comes from, such as a package, a directory or a source; the split keeps
        documents of one origin on one side.
    """

    text: str
    domain: str
    origin: str

    @property
    def num_bytes(self) -> int:
        """The size of the text in UTF-8."""
        return len(self.text.encode())


def join_pieces(pieces: Iterable[str], enough_bytes: int) -> Iterator[str]:
    """Joins neighbours, separated by an empty line, until each is at least `enough_bytes` long."""
    joined = ""
    for piece in pieces:
        piece = piece.strip("\n")
        joined = f"{joined}\n\n{piece}" if joined else piece
        if len(joined.encode()) >= enough_bytes:
            yield joined
            joined = ""
    if joined.strip():
        yield joined


def split_long(text: str, max_bytes: int) -> Iterator[str]:
    """Cuts text longer than `max_bytes` at empty lines, else at line ends, else anywhere."""
    start = 0
    while start < len(text):
        # A character has at least one byte, so nothing further on can matter to this piece: the
        # time grows in proportion to the text.
        encoded = text[start : start + max_bytes + 1].encode()
        if len(encoded) <= max_bytes:
            yield text[start:]
            return
        head = encoded[:max_bytes].decode(errors="ignore") or text[start]
        border = max(head.rfind("\n\n", len(head) // 2), 0) or max(head.rfind("\n"), 0)
        end = start + (border or len(head))
        yield text[start:end]
        while text.startswith("\n", end):
            end += 1
        start = end
