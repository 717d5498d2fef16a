"""Writes the tables of docs/performance.md from docs/performance/*.json; measures nothing.

    python tools/performance.py

The JSON is what benchmarks/merged_ffn.py and benchmarks/train_step.py wrote with --json.
"""

import json
from typing import Any

from tables import ROOT, markdown, replace_marked

from lory_jax.planning.topology import parse_topology

PAGE, FIGURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"

Rows = list[dict[str, Any]]


def main() -> None:
    layers: Rows = []
    clocked: Rows = []
    steps: Rows = []
    for path in sorted(FIGURES.glob("*.json")):
        for row in json.loads(path.read_text()):
            group = layers if "topology" in row else clocked if "implementation" in row else steps
            group.append(row)
    tables = [clock_table(clocked)] if clocked else []
    tables += [layer_table(layers), kernel_table(layers)] if layers else []
    tables += [step_table(steps)] if steps else []
    replace_marked(PAGE, "tools/performance.py", "\n\n".join(tables))


def clock_table(rows: Rows) -> str:
    header = ["by the clock", "E", "S", "forward over dense", "forward and backward over dense"]
    header += ["quartiles", "fastest over dense's fastest", "temporaries, MB", "device"]
    return markdown(
        header,
        [
            [
                row["implementation"],
                str(row["E"]),
                str(row["S"]),
                f"{row['forward_over_dense']:.2f}",
                f"{row['over_dense']:.2f}",
                ", ".join(f"{q:.2f}" for q in row["quartiles"]),
                f"{row['fastest_over_dense']:.2f}",
                f"{row['temporaries_MB']:,.0f}",
                f"{row['device']}, {row['dtype']}",
            ]
            for row in rows
        ],
    )


def layer_table(rows: Rows) -> str:
    header = ["one layer, forward and backward", "experts", "TPU", "E", "S", "T", "F"]
    header += [
        "M cycles",
        "over dense",
        "over dense at peak",
        "of them XLA's",
        "HBM, GB",
        "over dense",
        "temporaries, MB",
    ]
    return markdown(
        header,
        [
            [
                row["implementation"],
                "gathered" if row["gathered"] else "stored",
                row["topology"].split("-")[0],
                *(str(row[name]) for name in "ESTF"),
                f"{row['cycles'] / 1e6:.2f}",
                f"{row['over_dense']:.2f}" if "over_dense" in row else "1",
                f"{row['cycles'] / dense_at_peak(row):.2f}",
                f"{row['xla_cycles'] / 1e6:.2f}",
                f"{row['hbm_GB']:.2f}",
                f"{row['bytes_over_dense']:.2f}" if "bytes_over_dense" in row else "1",
                f"{row['temporaries_MB']:,.0f}",
            ]
            for row in rows
        ],
    )


def dense_at_peak(row: dict[str, Any]) -> float:
    """Cycles of the dense layer if nothing but the matrix unit's peak bounded it."""
    device = parse_topology(row["topology"]).device
    return 18 * row["S"] * row["T"] * row["D"] * row["F"] / device.flops_per_cycle


def kernel_table(rows: Rows) -> str:
    lines = []
    for row in rows:
        if (row["S"], row["T"], row["F"]) != (64, 256, 2816):
            continue  # the same kernels, other sizes
        for name, cost in row["kernels"].items():
            lines.append(
                [
                    name,
                    row["topology"].split("-")[0],
                    *(str(row[key]) for key in "EST"),
                    str(cost["calls"]),
                    *(f"{cost[key] / 1e6:.2f}" for key in ("bundles", "matrix_unit", "dma")),
                    cost["bound_by"].replace("_", " "),
                    ", ".join(f"{kind} {share:.0%}" for kind, share in _busiest(cost["busy"])),
                ]
            )
    header = ["kernel", "TPU", "E", "S", "T", "calls a layer", "M bundles a call"]
    header += ["matrix unit at peak, M cycles", "DMA, M cycles", "bound by", "slots used"]
    return markdown(header, lines)


def _busiest(busy: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(busy.items(), key=lambda item: -item[1])[:3]


def step_table(rows: Rows) -> str:
    header = ["whole step", "merged FFN by", "T", "remat", "device"]
    header += ["over dense", "quartiles", "FLOPs over dense's", "tokens/s"]
    return markdown(
        header,
        [
            [
                f"{row['experts']} experts" if row["experts"] else "dense",
                row["merged_ffn"] or "",
                str(row["T"]),
                row["remat"],
                row["device"],
                f"{row['over_dense']:.2f}",
                ", ".join(f"{q:.2f}" for q in row["quartiles"]),
                f"{row['flops_over_dense']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
