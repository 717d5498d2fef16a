"""Figures about documents and what became of them: counts, similarity of neighbours, tables.

N documents, D dimensions, L tokens per instance.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from lory_jax.data.manifest import Manifest
from lory_jax.preparation.documents import Document
from lory_jax.preparation.ordering import consecutive_similarity
from lory_jax.preparation.packing import TokenizedDocuments, count_instances

GOOD_DOMAIN_BYTES = 1_000_000


def corpus_table(documents: Sequence[Document]) -> str:
    """Returns a table of the documents, origins, bytes and median size of each domain."""
    lines = [f"{'domain':<16}{'documents':>10}{'origins':>9}{'bytes':>14}{'median bytes':>14}"]
    domains = Counter(document.domain for document in documents)
    big = 0
    for domain in sorted(domains):
        mine = [document for document in documents if document.domain == domain]
        sizes = [len(document.text.encode()) for document in mine]
        origins = len({document.origin for document in mine})
        big += sum(sizes) >= GOOD_DOMAIN_BYTES
        lines.append(
            f"{domain:<16}{len(mine):>10,}{origins:>9,}{sum(sizes):>14,}{median(sizes):>14,.0f}"
        )
    if big < len(domains):
        lines.append(
            f"only {big} of {len(domains)} domains have at least {GOOD_DOMAIN_BYTES:,} bytes"
        )
    return "\n".join(lines)


def split_counts(
    documents: Sequence[Document],
    tokenized: TokenizedDocuments,
    sequence_length: int,
    *,
    by_domain: bool,
) -> dict[str, Any]:
    """Returns what a split holds, in the form of `counts` in the manifest.

    Args:
      documents: those of the split.
      tokenized: their tokens.
      sequence_length: L.
      by_domain: whether each domain is cut into instances of its own, as in evaluation splits, or
        all documents together, as in training.
    """
    domain_of_N = np.array([document.domain for document in documents], dtype=object)
    bytes_N = np.array([len(document.text.encode()) for document in documents], np.int64)
    domains: dict[str, dict[str, int]] = {}
    for domain in sorted(set(domain_of_N)):
        mine = domain_of_N == domain
        tokens = int(tokenized.lengths_N[mine].sum())
        domains[domain] = {
            "documents": int(mine.sum()),
            "tokens": tokens,
            "bytes": int(bytes_N[mine].sum()),
        }
        if by_domain:
            domains[domain]["instances"] = count_instances(tokens, sequence_length)
    streams = [len(tokenized.tokens_T)]
    if by_domain:
        streams = [counts["tokens"] for counts in domains.values()]
    instances = sum(count_instances(tokens, sequence_length) for tokens in streams)
    targets = sum(max(tokens - 1, 0) for tokens in streams)
    return {
        "instances": instances,
        "dropped_tokens": targets - instances * sequence_length,
        "median_document_tokens": float(np.median(tokenized.lengths_N)) if len(documents) else 0.0,
        "domains": domains,
    }


def order_similarity(
    documents: Sequence[Document],
    vectors_NxD: np.ndarray,
    tokenized: TokenizedDocuments,
    order_N: np.ndarray,
    sequence_length: int,
) -> dict[str, float | None]:
    """Returns how similar consecutive documents are in an order, by cosine and by domain."""
    domains_N = np.array([document.domain for document in documents])[order_N]
    rate = same_domain_rate(tokenized.lengths_N[order_N], domains_N, sequence_length)
    return {
        "mean_cosine": round(consecutive_similarity(vectors_NxD, order_N), 4),
        "same_domain_rate": None if rate is None else round(rate, 4),
    }


def same_domain_rate(
    lengths_N: np.ndarray, domains_N: np.ndarray, sequence_length: int
) -> float | None:
    """Returns the share of neighbouring documents inside an instance that have the same domain.

    Two documents are neighbours inside an instance if it holds the last token of one and the
    first of the next.

    Args:
      lengths_N: tokens per document, in the order of the stream.
      domains_N: a number or name per document, in the same order.
      sequence_length: L.

    Returns:
      0 to 1, or None if no instance holds two documents.
    """
    borders = np.cumsum(lengths_N)[:-1]
    # Instances overlap by one token, so each border is inside one of them; those in the dropped
    # remainder are in none.
    used = count_instances(int(np.sum(lengths_N)), sequence_length) * sequence_length
    inside = borders <= used
    if not inside.any():
        return None
    return float(np.mean((domains_N[:-1] == domains_N[1:])[inside]))


def preparation_summary(manifest: Manifest) -> str:
    """Returns a table of the tokens per domain and split, and how similar neighbours are."""
    domains = sorted({name for split in manifest.counts.values() for name in split["domains"]})
    nothing = {"tokens": 0, "bytes": 0}
    lines = [f"{'tokens':<24}" + "".join(f"{split:>14}" for split in manifest.counts)]
    for domain in domains:
        found = [split["domains"].get(domain, nothing) for split in manifest.counts.values()]
        tokens, size = (sum(counts[key] for counts in found) for key in ("tokens", "bytes"))
        row = "".join(f"{counts['tokens']:>14,}" for counts in found)
        lines.append(f"{domain:<24}{row}   {size / tokens:.2f} bytes/token")
    instances = "".join(f"{split['instances']:>14,}" for split in manifest.counts.values())
    lines.append(f"{'instances':<24}{instances}")
    train = manifest.counts["train"]
    documents = sum(counts["documents"] for counts in train["domains"].values())
    lines.append(
        f"train: {documents / train['instances']:.1f} documents per instance of "
        f"{manifest.sequence_length} tokens, median document {train['median_document_tokens']:g} "
        "tokens"
    )
    for order in ("similar", "random"):
        if order in manifest.similarity:
            figures = manifest.similarity[order]
            lines.append(
                f"{order} order: mean cosine of consecutive documents {figures['mean_cosine']}, "
                f"same domain inside an instance {figures['same_domain_rate']}"
            )
    return "\n".join(lines)
