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
    while len(text.encode()) > max_bytes:
        head = text.encode()[:max_bytes].decode(errors="ignore")
        border = max(head.rfind("\n\n", len(head) // 2), 0) or max(head.rfind("\n"), 0)
        cut = border or len(head)
        yield text[:cut]
        text = text[cut:].lstrip("\n")
    if text:
        yield text
