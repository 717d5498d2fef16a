"""Draws docs/architecture.png: what flows from documents to an exported model, and through what.

python tools/architecture.py
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from tables import ROOT

from lory_jax.report import plots

PICTURE = ROOT / "docs" / "architecture.png"

WIDTH, HEIGHT = 108, 57  # of the drawing, in its own units
THING = {"facecolor": "#ffffff", "edgecolor": "#56606b"}  # what lies on disk or comes out
OBJECT = {"facecolor": "#e3eef7", "edgecolor": plots.COLOURS[1]}  # the two objects
VERB = plots.COLOURS[1]
ROOM = "#6b7580"
SHARED = {"facecolor": "#f4f5f7", "edgecolor": "#c5ccd4"}

# Each verb that reads a run, the room that does its work, and what comes out.
READERS = (
    ("evaluate", "evaluation/", "tables"),
    ("analyze", "analysis/", "pictures"),
    ("generate", "generation/", "text"),
    ("compare", "comparison/", "report"),
    ("convert", "conversion/", "LLaMA"),
)
TOP, STEP = 51.0, 9.0  # of the readers' rows


def main() -> None:
    with matplotlib.rc_context(plots.STYLE):
        plots.write_png(picture(), PICTURE)


def picture() -> Figure:
    figure = Figure(figsize=(10.8, 5.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.axis("off")
    middle = TOP - 2 * STEP

    box(axes, 9, middle, 14, 7, THING, "documents")
    arrow(axes, (16, middle), (29, middle), "prepare", "preparation/")
    box(axes, 37.5, middle, 17, 11, OBJECT, "PreparedData", "data/prepared.py")
    arrow(axes, (46, middle), (57, middle), "train", "training/")
    box(axes, 65, middle, 16, 11, OBJECT, "RunDirectory", "run/directory.py")
    for row, (verb, room, result) in enumerate(READERS):
        height = TOP - row * STEP
        axes.plot(
            [73, 76, 76], [middle, middle, height], color=VERB, linewidth=1.6, solid_capstyle="butt"
        )
        arrow(axes, (76, height), (92, height), verb, room)
        box(axes, 99.5, height, 15, 6, THING, result)

    note(
        axes,
        37.5,
        middle - 11.5,
        "tokenizer.json\ntrain/  validation/  test/\nmanifest.json, written last",
    )
    note(
        axes,
        65,
        middle - 11.5,
        "config.json\ncheckpoints/\nmetrics.jsonl",
    )
    box(axes, 9, TOP, 14, 6, THING, "recipe")
    arrow(axes, (16, TOP), (29, TOP), "plan", "planning/")
    box(axes, 37.5, TOP, 17, 6, THING, "memory, speed")
    axes.text(65, TOP + 0.8, "doctor", ha="center", color=VERB, fontsize=10, weight="bold")
    note(axes, 65, TOP - 2.2, "diagnosis/\nchecks machine, data and run")
    shared(axes)
    return figure


def box(
    axes: Axes, x: float, y: float, width: float, height: float, look: dict, *lines: str
) -> None:
    """A rounded box around its centre, with a title and perhaps a smaller line below."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=1.2",
            linewidth=1.5,
            zorder=3,
            **look,
        )
    )
    title, *small = lines
    shift = 1.6 if small else 0
    axes.text(x, y + shift, title, ha="center", va="center", fontsize=11, weight="bold", zorder=4)
    for line in small:
        axes.text(x, y - 2.0, line, ha="center", va="center", fontsize=8.5, color=ROOM, zorder=4)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], verb: str, room: str
) -> None:
    """An arrow to the right, with the verb above it and the room that does the work below."""
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": VERB,
            "linewidth": 1.6,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )
    x, y = (start[0] + end[0] - 1) / 2, start[1]
    axes.text(x, y + 0.8, verb, ha="center", va="bottom", color=VERB, fontsize=10, weight="bold")
    axes.text(x, y - 0.9, room, ha="center", va="top", color=ROOM, fontsize=8.5)


def note(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", color=ROOM, fontsize=8.5, linespacing=1.5)


def shared(axes: Axes) -> None:
    """What every room may use."""
    axes.add_patch(
        FancyBboxPatch(
            (2, 2), 104, 6, boxstyle="round,pad=0,rounding_size=1.2", linewidth=1.2, **SHARED
        )
    )
    axes.text(
        54,
        5,
        "model/  the network         parallel.py  mesh and sharding rules         "
        "schema.py  every field         storage.py  gs:// and s3://         report/  plots, pages",
        ha="center",
        va="center",
        fontsize=8.8,
    )


if __name__ == "__main__":
    main()
