"""Writes the picture and the tables of docs/performance.md from docs/performance/*.json.

    python tools/performance.py

Measures nothing: the JSON is what benchmarks/merged_ffn.py and benchmarks/train_step.py wrote with
--json. The picture is docs/performance.png.
"""

import json
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from tables import ROOT, markdown, replace_marked

from lory_jax.planning.topology import parse_topology
from lory_jax.report import plots

PAGE, FIGURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"
PICTURE = ROOT / "docs" / "performance.png"

EXPERTS = (8, 32)
SEGMENTS = (16, 64, 128)  # per device, of 256 tokens
DEVICES = {"v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "cpu": "CPU"}
AT_256 = {"T": 256, "F": 2816}  # the shape that the picture and most columns show
AT_512 = {"T": 512, "F": 2816}

Rows = list[dict[str, Any]]


def main() -> None:
    rows = [row for path in sorted(FIGURES.glob("*.json")) for row in json.loads(path.read_text())]
    layers = [row for row in rows if is_layer(row)]
    steps = [row for row in rows if "experts" in row]
    with matplotlib.rc_context(plots.STYLE):
        plots.write_png(picture(layers), PICTURE)
    replace_marked(PAGE, "tools/performance.py", f"{layer_table(layers)}\n\n{step_table(steps)}")
    replace_marked(PAGE, "tools/performance.py gpus", gpu_table(rows))


def is_layer(row: dict[str, Any]) -> bool:
    """Whether a row is a layer as `auto` computes it: kernels on TPUs, `whole` on CPUs."""
    if "topology" in row:
        return row["implementation"] == "kernel" and row["gathered"]
    return row.get("implementation") == "whole"


def device_of(row: dict[str, Any]) -> str:
    return row["topology"].split("-")[0] if "topology" in row else row["device"]


def find(layers: Rows, device: str, **shape: int) -> dict[str, Any] | None:
    """The row of this device with these E, S, T and F; None if that was not measured."""
    for row in layers:
        if device_of(row) == device and all(row[key] == size for key, size in shape.items()):
            return row
    return None


# ---------------------------------------------------------------- the picture


def picture(layers: Rows) -> Figure:
    """A panel per device: time of a merged layer over a dense one, by segments per device."""
    figure = Figure(figsize=(plots.WIDTH, 2.9), layout="constrained")
    panels = figure.subplots(1, len(DEVICES), sharey=True)
    for axes, (device, title) in zip(panels, DEVICES.items(), strict=True):
        axes.axhline(1, color=plots.COLOURS[0], linewidth=2, zorder=1)
        for experts, colour, marker in zip(
            EXPERTS, plots.COLOURS[1:], plots.MARKERS[1:], strict=False
        ):
            mine = [
                row
                for row in layers
                if device_of(row) == device
                and row["E"] == experts
                and all(row[key] == size for key, size in AT_256.items())
            ]
            mine.sort(key=lambda row: row["S"])
            axes.plot(
                [row["S"] for row in mine],
                [row["over_dense"] for row in mine],
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.6,
                label=f"{experts} experts",
            )
        axes.set_title(f"{title}\n{'measured' if device == 'cpu' else 'by the compiler'}")
        axes.set_xscale("log", base=2)
        axes.set_xlim(11, 185)
        axes.xaxis.set_major_locator(FixedLocator([16, 32, 64, 128]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels(["16", "32", "64", "128"])
    panels[0].set_ylim(0.8, 3.5)
    panels[0].set_ylabel("time relative to a dense layer")
    panels[-1].annotate("dense", (170, 1), va="bottom", ha="right", color=plots.COLOURS[0])
    panels[-1].legend(loc="upper right")
    figure.supxlabel("segments of 256 tokens per device", fontsize=9)
    return figure


# ---------------------------------------------------------------- the tables


def layer_table(layers: Rows) -> str:
    lines = []
    for device, title in DEVICES.items():
        for experts in EXPERTS:
            by_size = [find(layers, device, E=experts, S=size, **AT_256) for size in SEGMENTS]
            main = by_size[1]
            if device == "cpu":
                measured = find(layers, device, E=experts, S=32, T=256, F=2816)
                assert measured is not None, "docs/performance/layer_cpu.json lacks `whole`"
                lines.append([title, str(experts), "", ratio(measured), *[""] * 5])
                continue
            assert main is not None, f"docs/performance/layer_{device}.json lacks S = 64"
            lines.append(
                [
                    title,
                    str(experts),
                    ratio(by_size[0]),
                    "",
                    ratio(main),
                    ratio(by_size[2]),
                    ratio(find(layers, device, E=experts, S=32, **AT_512)),
                    f"{main['cycles'] / dense_at_peak(main):.2f}",
                    f"{main['bytes_over_dense']:.2f}",
                ]
            )
    header = ["one layer, forward and backward, over dense", "experts"]
    header += ["S = 16", "S = 32", "S = 64", "S = 128", "T = 512, S = 32"]
    return markdown([*header, "S = 64, over dense at peak", "S = 64, HBM bytes over dense"], lines)


def gpu_table(rows: Rows) -> str:
    """A layer on GPUs by its roofline: `whole` and `blocks` beside the dense layer."""
    on_gpus = [row for row in rows if "roofline_seconds" in row]
    lines = []
    for row in on_gpus:
        if row["implementation"] == "einsum":
            continue
        is_dense = row["implementation"] == "dense"
        lines.append(
            [
                row["topology"].split("-")[0].upper(),
                str(row["S"]),
                "-" if is_dense else str(row["E"]),
                row["implementation"],
                f"{row['tflop']:.2f}",
                f"{row['hbm_GB']:.1f}",
                f"{row['temporaries_MB'] / 1e3:.2f}",
                "1.00" if is_dense else f"{row['over_dense']:.2f}",
            ]
        )
    header = ["GPU", "segments", "experts", "implementation", "TFLOP", "memory traffic, GB"]
    return markdown([*header, "temporaries, GB", "roofline over dense"], lines)


def ratio(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['over_dense']:.2f}"


def dense_at_peak(row: dict[str, Any]) -> float:
    """Cycles of the dense layer if nothing but the matrix unit's peak bounded it."""
    device = parse_topology(row["topology"]).device
    return 18 * row["S"] * row["T"] * row["D"] * row["F"] / device.flops_per_cycle


def step_table(steps: Rows) -> str:
    header = ["whole step on a CPU, T = 128", "over dense", "quartiles", "FLOPs over dense"]
    return markdown(
        [*header, "tokens/s"],
        [
            [
                f"{row['experts']} experts" if row["experts"] else "dense",
                f"{row['over_dense']:.2f}",
                ", ".join(f"{quartile:.2f}" for quartile in row["quartiles"]),
                f"{row['flops_over_dense']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in steps
        ],
    )


if __name__ == "__main__":
    main()
