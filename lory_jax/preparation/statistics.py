"""Figures about documents and what became of them: counts, similarity of neighbours, tables.

N documents, D dimensions, L tokens per instance.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from lory_jax.data.manifest import Manifest
from lory_jax.errors import InputError
from lory_jax.preparation.ordering import consecutive_similarity
from lory_jax.preparation.packing import count_instances
from lory_jax.preparation.split import Row

GOOD_DOMAIN_BYTES = 1_000_000


def corpus_table(documents: Iterable[Row]) -> str:
    """Returns a table of the documents, origins, bytes and median size of each domain."""
    lines = [f"{'domain':<16}{'documents':>10}{'origins':>9}{'bytes':>14}{'median bytes':>14}"]
    sizes: dict[str, list[int]] = defaultdict(list)
    origins: dict[str, set[str]] = defaultdict(set)
    for document in documents:
        sizes[document.domain].append(document.num_bytes)
        origins[document.domain].add(document.origin)
    for domain, mine in sorted(sizes.items()):
        lines.append(
            f"{domain:<16}{len(mine):>10,}{len(origins[domain]):>9,}{sum(mine):>14,}"
            f"{median(mine):>14,.0f}"
        )
    big = sum(sum(mine) >= GOOD_DOMAIN_BYTES for mine in sizes.values())
    if big < len(sizes):
        lines.append(
            f"only {big} of {len(sizes)} domains have at least {GOOD_DOMAIN_BYTES:,} bytes"
        )
    return "\n".join(lines)


def check_sizes(
    *,
    num_training_documents: int,
    training_tokens: int,
    held_out_tokens: Mapping[str, Mapping[str, int]],
    fractions: Mapping[str, float],
    domains: Sequence[str],
    sequence_length: int,
) -> None:
    """Raises `InputError` unless training and every evaluation set have at least one instance.

    Args:
      num_training_documents, training_tokens: those of the training side.
      held_out_tokens: the tokens of each domain, by split.
      fractions: the share of each split that was asked for.
      domains: all of them.
      sequence_length: L.
    """
    if count_instances(training_tokens, sequence_length) < 1:
        raise InputError(
            f"corpus too small: {num_training_documents} training documents with {training_tokens} "
            f"tokens, requires at least {sequence_length + 1} tokens; give more "
            "text or lower config.model.sequence_length"
        )
    for split, tokens in held_out_tokens.items():
        for domain in domains if fractions[split] > 0 else ():
            found = tokens.get(domain, 0)
            if count_instances(found, sequence_length) < 1:
                raise InputError(
                    f"corpus too small: domain {domain!r} has {found} {split} tokens, "
                    f"requires at least {sequence_length + 1}; give more text from more origins, "
                    f"raise config.data.{split}_fraction ({fractions[split]:g}) or lower "
                    "config.model.sequence_length"
                )


def split_counts(
    domains: Mapping[str, Mapping[str, int]],
    lengths: Sequence[Sequence[Sequence[int]]],
    streams: Sequence[int],
    sequence_length: int,
    *,
    by_domain: bool,
) -> dict[str, Any]:
    """Returns what a split holds, in the form of `counts` in the manifest.

    Args:
      domains: documents, tokens and bytes per domain.
      lengths: histograms of tokens per document, each a list of lengths and one of counts.
      streams: tokens of each stream that was cut into instances.
      sequence_length: L.
      by_domain: whether each domain is a stream, as in evaluation splits, so that its instances are
        counted.
    """
    counts = {name: dict(numbers) for name, numbers in domains.items()}
    for numbers in counts.values() if by_domain else ():
        numbers["instances"] = count_instances(numbers["tokens"], sequence_length)
    instances = sum(count_instances(tokens, sequence_length) for tokens in streams)
    targets = sum(max(tokens - 1, 0) for tokens in streams)
    return {
        "instances": instances,
        "dropped_tokens": targets - instances * sequence_length,
        "median_document_tokens": median_of_histograms(lengths),
        "domains": counts,
    }


def median_of_histograms(histograms: Sequence[Sequence[Sequence[int]]]) -> float:
    """Returns the median of what histograms count together, 0 if they count nothing.

    Args:
      histograms: each a list of values and one of how often each occurs.
    """
    joined: Counter[int] = Counter()
    for values, counts in histograms:
        joined.update(dict(zip(values, counts, strict=True)))
    if not joined:
        return 0.0
    values_V = np.array(sorted(joined))
    ends_V = np.cumsum([joined[value] for value in values_V.tolist()])
    middle = [(ends_V[-1] - 1) // 2, ends_V[-1] // 2]
    return float(np.mean(values_V[np.searchsorted(ends_V, middle, side="right")]))


def order_figures(
    domains_N: np.ndarray,
    vectors_NxD: np.ndarray,
    lengths_N: np.ndarray,
    order_N: np.ndarray,
    sequence_length: int,
) -> dict[str, float]:
    """Returns how similar consecutive documents of a stream are, with what `joined_figures` needs.

    Args:
      domains_N: a number or name per document.
      vectors_NxD: unit vectors.
      lengths_N: tokens per document.
      order_N: the documents of the stream.
      sequence_length: L.
    """
    pairs = max(len(order_N) - 1, 0)
    rate = same_domain_rate(lengths_N[order_N], domains_N[order_N], sequence_length)
    borders = np.cumsum(lengths_N[order_N])[:-1]
    used = count_instances(int(np.sum(lengths_N)), sequence_length) * sequence_length
    return {
        "mean_cosine": consecutive_similarity(vectors_NxD, order_N) if pairs else 0.0,
        "pairs": pairs,
        "same_domain_rate": rate or 0.0,
        "borders": int((borders <= used).sum()),
    }


def joined_figures(parts: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Returns the figures of several streams together, as the manifest holds them."""

    def mean(name: str, weight: str) -> float | None:
        if len(parts) == 1:
            return round(parts[0][name], 4) if parts[0][weight] else None
        total = sum(part[weight] for part in parts)
        return round(sum(p[name] * p[weight] for p in parts) / total, 4) if total else None

    return {
        "mean_cosine": mean("mean_cosine", "pairs"),
        "same_domain_rate": mean("same_domain_rate", "borders"),
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
    # A manifest on disk is sorted by name.
    splits = ["train", *sorted(manifest.counts.keys() - {"train"}, reverse=True)]
    counts_of = [manifest.counts[split] for split in splits]
    lines = [f"{'tokens':<24}" + "".join(f"{split:>14}" for split in splits)]
    for domain in domains:
        found = [split["domains"].get(domain, nothing) for split in counts_of]
        tokens, size = (sum(counts[key] for counts in found) for key in ("tokens", "bytes"))
        row = "".join(f"{counts['tokens']:>14,}" for counts in found)
        lines.append(f"{domain:<24}{row}   {size / tokens:.2f} bytes/token")
    instances = "".join(f"{split['instances']:>14,}" for split in counts_of)
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
    if manifest.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.dropped.items())
        lines.append(f"documents left out: {reasons}")
    return "\n".join(lines)
