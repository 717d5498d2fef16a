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
      more: `shard_sizes`, `lengths` (histograms of tokens per training document), `examples` (pairs
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
        html.table(["documents", "tokens, at most"], _lengths(more["lengths"])),
        html.heading("Documents that were left out"),
        _dropped(manifest.dropped),
        html.heading("Order"),
        _order(manifest.similarity, more),
        html.heading("Examples of consecutive documents"),
    ]
    for example in more["examples"]:
        first, *rest = example["texts"]
        title = f"cosine {example['cosine']}"
        pieces.append(html.sample_box(title, first + "\n…\n\n", "".join(rest) + "\n…"))
    return html.page("Prepared data", pieces)


def _inputs(manifest: Manifest) -> str:
    size = sum(each["size"] for each in manifest.inputs)
    return f"{len(manifest.inputs):,} inputs" + (f" of {size:,} bytes together" if size else "")


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


def _lengths(histograms: Sequence[Sequence[Sequence[int]]]) -> list[list[str]]:
    joined: Counter[int] = Counter()
    for values, counts in histograms:
        joined.update(dict(zip(values, counts, strict=True)))
    total, seen, rows = sum(joined.values()), 0, []
    wanted = list(QUANTILES)
    for length, count in sorted(joined.items()):
        seen += count
        while wanted and seen >= wanted[0] * total:
            rows.append([f"{wanted.pop(0):.0%}", f"{length:,}"])
    return rows


def _dropped(dropped: Mapping[str, int]) -> str:
    if not dropped:
        return html.paragraph("None.")
    note = html.paragraph("The lists, one line per document, are in dropped/.", "note")
    rows = [[reason, f"{count:,}"] for reason, count in dropped.items()]
    return html.table(["reason", "documents"], rows) + note


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
    return html.paragraph(method) + html.table(header, rows)
