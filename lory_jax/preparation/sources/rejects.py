"""How much of a corpus was rejected, and where a run must stop."""

from dataclasses import dataclass

from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources.records import Reject


@dataclass(frozen=True)
class ReadCounts:
    """What was read; the counts of all inputs add up to those of the corpus.

    Attributes:
      documents, document_bytes: documents and their UTF-8 bytes.
      rejects, reject_bytes: rejects and the bytes that are lost with them.
      example: a reject in words, "" if there is none.
    """

    documents: int = 0
    document_bytes: int = 0
    rejects: int = 0
    reject_bytes: int = 0
    example: str = ""

    @classmethod
    def of(cls, item: Document | Reject) -> "ReadCounts":
        """The counts of one document or reject."""
        if isinstance(item, Document):
            return cls(documents=1, document_bytes=len(item.text.encode()))
        example = f"{item.path}, {item.position}: {item.reason}"
        return cls(rejects=1, reject_bytes=item.lost_bytes, example=example)

    def __add__(self, other: "ReadCounts") -> "ReadCounts":
        return ReadCounts(
            self.documents + other.documents,
            self.document_bytes + other.document_bytes,
            self.rejects + other.rejects,
            self.reject_bytes + other.reject_bytes,
            self.example or other.example,
        )

    def rejected_share(self) -> float:
        """The rejected share of documents, or of bytes if that is more.

        A damaged file is one reject and may have held many documents; its bytes tell.
        """
        documents = self.rejects / max(self.documents + self.rejects, 1)
        return max(documents, self.reject_bytes / max(self.document_bytes + self.reject_bytes, 1))

    def check(self, max_rejected: float) -> None:
        """Raises `InputError` if more than this share was rejected."""
        share = self.rejected_share()
        if share > max_rejected:
            raise InputError(
                f"max_rejected: {self.rejects:,} of {self.documents + self.rejects:,} documents "
                f"cannot be used, a share of {share:.2g}, must be at most {max_rejected:g}; "
                f"the first one: {self.example}"
            )
