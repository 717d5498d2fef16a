"""The page about a prepared directory: what was read, what was left out, and how it is ordered."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lory_jax.data.manifest import Manifest
from lory_jax.report import html

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def render(manifest: Manifest, more: Mapping[str, Any]) -> str:
    """Returns the page.

    Args:
      manifest: that of the directory.
      more: `shard_sizes`, `lengths` and `cosines` (histograms, of tokens per training document and
        of the cosines of consecutive ones), `rejects` (their number by reason), `examples` (pairs
        of consecutive documents), `sample` (documents that the embedder was fitted on).
    """
    train = manifest.counts["train"]
    documents = sum(domain["documents"] for domain in train["domains"].values())
    similar = manifest.similarity.get("similar", {})
    lead = (
        f"{train['instances']:,} training instances of {manifest.sequence_length} tokens from "
        f"{documents:,} documents."
    )
    if similar:
        lead += f" The mean cosine of consecutive documents is {similar['mean_cosine']}."
    pieces = [
        html.paragraph(lead, "lead"),
        html.paragraph(f"From {manifest.settings['source']}, {_inputs(manifest)}.", "note"),
        html.heading("Domains"),
        _domains(manifest.counts),
        html.heading("Length of the training documents"),
        html.table(["documents", "tokens, at most"], _quantiles(more["lengths"])),
        html.heading("Documents that were left out"),
        _left_out(manifest.dropped, documents, "dropped"),
        html.heading("Documents that are broken"),
        _left_out(more["rejects"], documents, "rejects"),
        html.heading("Order"),
        _order(manifest.similarity, more),
        html.heading("Examples of consecutive documents"),
        html.paragraph("The beginning of a document and, marked, that of the next one.", "note"),
    ]
    for example in more["examples"]:
        first, *rest = example["texts"]
        title = f"cosine {example['cosine']}: " + " → ".join(example["origins"])
        pieces.append(html.sample_box(title, first + "\n…\n\n", "".join(rest) + "\n…"))
    return html.page("Prepared data", pieces)


def _inputs(manifest: Manifest) -> str:
    size = sum(each["size"] for each in manifest.inputs)
    count = len(manifest.inputs)
    together = f" of {size:,} bytes together" if size else ""
    return f"{count:,} input{'s' if count != 1 else ''}{together}"


def _domains(counts: Mapping[str, Any]) -> str:
    names = sorted({name for split in counts.values() for name in split["domains"]})
    columns = [(split, key) for split in counts for key in ("documents", "tokens")]
    rows = [
        [
            name,
            *(f"{counts[s]['domains'].get(name, {}).get(key, 0):,}" for s, key in columns),
        ]
        for name in names
    ]
    sums = [
        sum(domain[key] for domain in counts[split]["domains"].values()) for split, key in columns
    ]
    rows.append(["all", *(f"{total:,}" for total in sums)])
    return html.table(
        ["", *(key for _, key in columns)],
        rows,
        groups=[("", 1), *((split, 2) for split in counts)],
        strong_rows=[len(rows) - 1],
    )


def _quantiles(histograms: Sequence[Sequence[Sequence[float]]]) -> list[list[str]]:
    """Returns rows of a share of what is counted, and the value that so many have at most."""
    joined: Counter[float] = Counter()
    for values, counts in histograms:
        joined.update(dict(zip(values, counts, strict=True)))
    total, seen, rows = sum(joined.values()), 0, []
    wanted = list(QUANTILES)
    for value, count in sorted(joined.items()):
        seen += count
        while wanted and seen >= wanted[0] * total:
            rows.append([f"{wanted.pop(0):.0%}", f"{value:,}"])
    return rows


def _left_out(by_reason: Mapping[str, int], used: int, folder: str) -> str:
    if not by_reason:
        return html.paragraph("None.")
    note = html.paragraph(f"The lists, one line per document, are in {folder}/.", "note")
    rows = [
        [reason, f"{count:,}", f"{count / max(used, 1):.2%}"] for reason, count in by_reason.items()
    ]
    return html.table(["reason", "documents", "over training documents"], rows) + note


def _order(similarity: Mapping[str, Any], more: Mapping[str, Any]) -> str:
    sizes = more["shard_sizes"]
    shards = (
        f"All {sizes[0]:,} documents (near duplicates included) are one shard."
        if len(sizes) == 1
        else f"{len(sizes)} shards of {min(sizes):,} to {max(sizes):,} documents."
    )
    rows = [
        [name, str(figures["mean_cosine"]), str(figures["same_domain_rate"])]
        for name, figures in similarity.items()
        if isinstance(figures, Mapping)
    ]
    header = ["order", "mean cosine of consecutive documents", "same domain inside an instance"]
    method = f"{shards} Neighbours were found by {similarity['method']}."
    spread = ["consecutive documents", "cosine, at most"]
    return (
        html.paragraph(method)
        + html.table(header, rows)
        + html.table(spread, _quantiles(more["cosines"]))
    )
