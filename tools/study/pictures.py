"""The pictures of the study's page, in the style of lory_jax/report/plots.py."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib

from lory_jax.report.plots import COLOURS, INK, MARKERS, STYLE, WIDTH

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def forest(rows: Sequence[tuple[str, float, float, float]], margin: float) -> "Figure":
    """Effects with their intervals, `(label, effect, low, high)`; the margin is shaded."""
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + 0.3 * len(rows)), layout="constrained")
        axes.axvspan(-margin, margin, color="#eef1f4", zorder=0)
        axes.axvline(0, color=COLOURS[0], linewidth=1)
        for y, (_, effect, low, high) in enumerate(rows):
            axes.hlines(y, low, high, color=COLOURS[1], linewidth=2.2, alpha=0.6)
            axes.plot(effect, y, "o", color=COLOURS[1], markersize=6)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("effect in nats, with 95 % interval; shaded: the margin of equivalence")
        return figure


def curves(of_arms: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> "Figure":
    """Validation loss over the steps: one thin line per seed, arms told apart by colour."""
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
        for number, (name, seeds) in enumerate(of_arms.items()):
            look: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
            }
            for seed, curve in enumerate(seeds):
                label = name if seed == 0 else None
                steps, losses = zip(*curve, strict=True)
                axes.plot(steps, losses, linewidth=1, markersize=3, label=label, **look)
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss (nats)")
        axes.legend(ncols=2)
        return figure


def multipliers(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """The dense-equivalent parameter multiplier over the model's width, by number of experts."""
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        axes.axhline(1, color=INK, linewidth=1)
        for number, experts in enumerate(sorted({row["experts"] for row in rows})):
            mine = [row for row in rows if row["experts"] == experts]
            widths = [row["width"] * (1 + 0.02 * number) for row in mine]
            values = [row["multiplier"] for row in mine]
            below = [row["multiplier"] - row["interval"][0] for row in mine]
            above = [row["interval"][1] - row["multiplier"] for row in mine]
            errors = [[max(x, 0.0) for x in side] for side in (below, above)]
            axes.errorbar(
                widths,
                values,
                yerr=errors,
                color=COLOURS[number + 1],
                marker=MARKERS[number],
                capsize=3,
                label=f"{experts} experts",
            )
        axes.set_xlabel("width D of the model")
        axes.set_ylabel("dense-equivalent size, times")
        axes.legend()
        return figure


class Cost(NamedTuple):
    """What a change to a recipe gains and costs; costs are divided by the recipe's."""

    name: str
    effect: float
    interval: tuple[float, float]
    seconds: float | None
    memory: float


def costs(rows: Sequence[Cost]) -> "Figure":
    """Effects in nats against seconds a step and against the memory of parameters and optimizer.

    Points have numbers, which a list below the panels explains.
    """
    columns = 4
    lines = -(-len(rows) // columns)
    with matplotlib.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, 4.4 + 0.16 * lines), layout="constrained")
        heights = (4.4, 0.16 * lines)
        grid = figure.add_gridspec(2, 2, height_ratios=heights)
        left = figure.add_subplot(grid[0, 0])
        panels = (left, figure.add_subplot(grid[0, 1], sharey=left))
        for axes, cost, label in (
            (panels[0], "seconds", "seconds a step on a CPU, times the recipe's"),
            (panels[1], "memory", "training state, times the recipe's"),
        ):
            axes.axhline(0, color=COLOURS[0], linewidth=1)
            axes.plot(1, 0, MARKERS[0], color=COLOURS[0], markersize=7)
            points: dict[str, tuple[float, float]] = {}
            for number, row in enumerate(rows, 1):
                x = getattr(row, cost)
                if x is None:
                    continue
                axes.vlines(x, *row.interval, color=COLOURS[1], linewidth=1.6, alpha=0.3)
                axes.plot(x, row.effect, "o", color=COLOURS[1], markersize=4)
                points[str(number)] = (x, row.effect)
            for text, place in label_places(points).items():
                axes.annotate(
                    text,
                    points[text],
                    place,
                    fontsize=7,
                    va="center",
                    arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.4, "shrinkB": 2},
                )
            axes.set_xlabel(label)
        panels[0].set_ylabel("effect on the test loss in nats (below 0: better)")
        panels[1].tick_params(labelleft=False)
        _list_names(figure.add_subplot(grid[1, :]), [row.name for row in rows], columns)
        return figure


def label_places(points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Where the labels of points go: to the right of them, and apart from each other.

    Points that are close to each other in x have their labels in one column, in the order of y.
    """
    if not points:
        return {}
    xs, ys = ([point[i] for point in points.values()] for i in (0, 1))
    wide, high = (max(max(v) - min(v), 1e-9) for v in (xs, ys))
    columns: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name]):
        is_near = columns and points[name][0] - points[columns[-1][0]][0] < 0.05 * wide
        if is_near:
            columns[-1].append(name)
        else:
            columns.append([name])
    found: dict[str, tuple[float, float]] = {}
    for column in columns:
        x = max(points[name][0] for name in column) + 0.035 * wide
        column.sort(key=lambda name: points[name][1])
        heights = apart([points[name][1] for name in column], 0.045 * high)
        found |= {name: (x, y) for name, y in zip(column, heights, strict=True)}
    return found


def apart(heights: Sequence[float], step: float) -> list[float]:
    """Rising heights, moved so that neighbours are at least a step apart.

    Those that touch are moved together, so that their mean stays.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], step) < _top(groups[-2], step) + step:
            group = groups.pop()
            groups[-1] += group
    return [
        _bottom(group, step) + step * number for group in groups for number in range(len(group))
    ]


def _bottom(group: Sequence[float], step: float) -> float:
    return sum(group) / len(group) - step * (len(group) - 1) / 2


def _top(group: Sequence[float], step: float) -> float:
    return sum(group) / len(group) + step * (len(group) - 1) / 2


def _list_names(axes: "Axes", names: Sequence[str], columns: int) -> None:
    """The names with their numbers, in columns."""
    axes.axis("off")
    lines = -(-len(names) // columns)
    for number, name in enumerate(names):
        column, line = divmod(number, lines)
        place = (column / columns, 1 - (line + 0.5) / lines)
        axes.text(*place, f"{number + 1}  {name}", fontsize=7, transform=axes.transAxes)
