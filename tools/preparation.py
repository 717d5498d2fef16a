"""Writes the tables of docs/data.md from docs/preparation/*.json, which benchmarks/ write.

python tools/preparation.py
"""

import json
import math
from collections.abc import Callable
from typing import Any

from tables import ROOT, markdown, replace_marked

PAGE, FIGURES = ROOT / "docs" / "data.md", ROOT / "docs" / "preparation"
STAGES = ("read", "fit", "encode", "assign", "order")

Result = dict[str, Any]


def cost(result: Result) -> str:
    """What the stages take, from benchmarks/prepare.py."""
    rows = result["rows"]
    header = ["documents", *STAGES, "all CPU-s", "peak MiB (stage)", "neighbours, ms a document"]
    lines = []
    for row in rows:
        stages = row["stages"]
        worst = max(stages, key=lambda name: stages[name]["peak_mib"])
        lines.append(
            [
                f"{row['documents']:,}",
                *(f"{stages[name]['cpu_seconds']:.1f}" for name in STAGES),
                f"{row['cpu_seconds']:.0f}",
                f"{stages[worst]['peak_mib']:,} ({worst})",
                f"{row['neighbour_ms']:.3f}",
            ]
        )
    text = markdown([*header, "largest shard", "mean cosine"], _with_order(lines, rows))
    if len(rows) < 2:
        return text
    first, last = rows[0], rows[-1]
    exponent = math.log(last["cpu_seconds"] / first["cpu_seconds"]) / math.log(
        last["documents"] / first["documents"]
    )
    peaks = [max(stage["peak_mib"] for stage in row["stages"].values()) for row in (first, last)]
    return (
        f"{text}\n\nFrom {first['documents']:,} to {last['documents']:,} documents the exponent of "
        f"CPU time is {exponent:.2f}, and the peak grows by a factor of {peaks[1] / peaks[0]:.2f}."
    )


def _with_order(lines: list[list[str]], rows: list[Result]) -> list[list[str]]:
    return [
        [*line, f"{row['largest_shard']:,}", str(row["similarity"]["similar"]["mean_cosine"])]
        for line, row in zip(lines, rows, strict=True)
    ]


def neighbors(result: Result) -> str:
    """ScaNN and FAISS, from benchmarks/neighbors.py."""
    header = ["vectors", "library", "recall", "build, CPU-s", "search, ms", "both, ms", "settings"]
    rows = [
        [
            f"{row['vectors']:,} ({row['set']})",
            row["name"],
            f"{row['recall']:.3f}",
            f"{row['build']:.1f}",
            f"{row['search_ms']:.3f}",
            f"{row['all_ms']:.3f}",
            row["method"],
        ]
        for row in result["rows"]
    ]
    return markdown(header, rows)


def order(result: Result) -> str:
    """The order's quality, from benchmarks/ordering.py."""
    names = list(result["rows"][0]["mean_cosine"])
    header = ["vectors", *names, "shards over one graph"]
    rows = [
        [
            f"{row['documents']:,} ({row['set']})",
            *(f"{row['mean_cosine'][name]:.4f}" for name in names),
            f"{row['shards_over_one_graph']:.3f} ({row['shards'][0]} shards)",
        ]
        for row in result["rows"]
    ]
    return markdown(header, rows)


TABLES: dict[str, Callable[[Result], str]] = {"cost": cost, "neighbors": neighbors, "order": order}


def main() -> None:
    for name, table in TABLES.items():
        path = FIGURES / f"{name}.json"
        if path.exists():
            replace_marked(
                PAGE, f"tools/preparation.py {name}", table(json.loads(path.read_text()))
            )


if __name__ == "__main__":
    main()
