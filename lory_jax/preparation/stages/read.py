"""Stage `read`: inputs to documents of bounded length, with the hashes that later stages go by.

Columns, N rows: `text`, `origin`, `domain_N` (a number into `values["domains"]`), `bytes_N`,
`digest_Nx2` (SHA-256 of the text without white space at its ends, first 128 bits), `rank_N`
(SHA-256 of seed and text, first 64 bits) and, for stage `deduplicate`, `by_digest_N`: the rows in
the order of their digests.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document, split_long
from lory_jax.preparation.engine.columns import TextWriter, write_array
from lory_jax.preparation.engine.work import Facts, Work, hash_sum
from lory_jax.preparation.sources.read import read_input
from lory_jax.preparation.sources.records import Reject
from lory_jax.preparation.sources.rejects import ReadCounts
from lory_jax.preparation.stages import plan
from lory_jax.preparation.stages.inputs import read_options

DROPPED_NAME = "dropped.jsonl"
REJECTS_NAME = "rejects.jsonl"
MAX_REJECTED = 0.001


def count(work: Work) -> int:
    """As many tasks as were planned."""
    return work.values("plan")["tasks"]


def describe(work: Work, task: int) -> str:
    """Names the inputs of a task."""
    paths = [each.path for each in plan.inputs_of(work, task)]
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]} ({len(paths)} inputs)"


def run(work: Work, task: int, out: Path) -> Facts:
    """Reads the inputs of a task."""
    settings, data = work.settings, work.data
    seed, options, read = settings["seed"], read_options(settings), ReadCounts()
    texts, origins = TextWriter(out, "text"), TextWriter(out, "origin")
    domains: dict[str, int] = {}
    domain_N, bytes_N, digest_N, rank_N = [], [], [], []
    pieces = dropped_hash = 0
    with (
        (out / DROPPED_NAME).open("w", encoding="utf-8") as dropped,
        (out / REJECTS_NAME).open("w", encoding="utf-8") as rejects,
    ):
        for each in plan.inputs_of(work, task):
            for document in read_input(each, options):
                read += ReadCounts.of(document)
                if isinstance(document, Reject):
                    rejects.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
                    continue
                for text in split_long(document.text, data["max_document_bytes"]):
                    pieces += 1
                    contents, digest = text.encode(), text_digest(text)
                    if len(contents) < data["min_document_bytes"]:
                        piece = Document(text, document.domain, document.origin)
                        dropped.write(drop_line(digest, piece.domain, piece.origin, "short"))
                        dropped_hash += int.from_bytes(digest[:8], "big")
                        continue
                    texts.append(contents)
                    origins.append(document.origin.encode())
                    domain_N.append(domains.setdefault(document.domain, len(domains)))
                    bytes_N.append(len(contents))
                    digest_N.append(digest[:16])
                    rank_N.append(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8])
    texts.close()
    origins.close()
    digest_Nx2 = np.frombuffer(b"".join(digest_N), ">u8").reshape(-1, 2).astype(np.uint64)
    write_array(out, "domain", np.array(domain_N, np.int32))
    write_array(out, "bytes", np.array(bytes_N, np.int64))
    write_array(out, "digest", digest_Nx2)
    write_array(out, "rank", np.frombuffer(b"".join(rank_N), ">u8").astype(np.uint64))
    by_digest_N = np.lexsort((digest_Nx2[:, 1], digest_Nx2[:, 0]))
    write_array(out, "by_digest", by_digest_N)
    write_array(out, "sorted_digest", digest_Nx2[by_digest_N])
    values = {
        "domains": list(domains),
        "pieces": pieces,
        "dropped_hash": dropped_hash,
        "read": asdict(read),
    }
    return Facts(len(domain_N), hash_sum(digest_Nx2[:, 0]), values)


def text_digest(text: str) -> bytes:
    """Returns the hash that equal documents share; white space at the ends makes no difference."""
    return hashlib.sha256(text.strip().encode()).digest()


def drop_line(digest: bytes, domain: str, origin: str, reason: str, of: str = "") -> str:
    """Returns a line of the drop list.

    Args:
      digest: that of the document's text.
      domain, origin: the document's.
      reason: why it is left out.
      of: the hash of the document that is kept instead.
    """
    line = {"sha256": digest[:16].hex(), "domain": domain, "origin": origin, "reason": reason}
    return json.dumps(line | ({"of": of} if of else {}), ensure_ascii=False) + "\n"


def digest_bytes(digest_2: np.ndarray) -> bytes:
    """Returns the bytes of a digest in a column."""
    return digest_2.astype(">u8").tobytes()


def check_not_empty(work: Work) -> int:
    """Returns the number of documents.

    Raises:
      InputError: there is none, or more were rejected than `max_rejected` allows.
    """
    markers = [work.marker("read", task) for task in range(count(work))]
    read = sum((ReadCounts(**marker["values"]["read"]) for marker in markers), ReadCounts())
    read.check(work.settings.get("reading", {}).get("max_rejected", MAX_REJECTED))
    rows = sum(marker["rows"] for marker in markers)
    if not rows:
        pieces = sum(marker["values"]["pieces"] for marker in markers)
        raise InputError(
            f"{work.settings['source']}: empty corpus: {pieces} documents, none of at least "
            f"{work.data['min_document_bytes']} bytes (config.data.min_document_bytes)"
        )
    return rows
