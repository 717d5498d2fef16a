"""The pictures of a report. Every function returns a matplotlib figure.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines differ in
more than their colour.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lory_jax.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#56606b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "D", "s", "^", "v", "P", "X")
DIVERGING = ("#c8701f", "#f0c69c", "#f2f3f5", "#5aa6d6", "#00385c")
INK, FAINT = "#1f2933", "#d9dee3"
WIDTH = 7.2  # inches, of a picture as wide as the page
SMOOTHING = 0.02  # the share of the run that a point of the training loss averages over
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a domain's name is a dollar
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "lory_jax",  # the same ids in every run
    "svg.fonttype": "path",
}


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Training loss (thin, averaged over 2 % of the run) and validation loss of several runs.

    Args:
      runs: the lines of each run's metrics.jsonl, by the run's name.
    """
    with _style():
        figure, axes = _figure(3.6)
        values = []
        for (name, lines), colour, marker in zip(runs.items(), *_looks(len(runs)), strict=True):
            tokens = np.array([line["tokens"] for line in lines]) / 1e6
            loss = _smoothed(np.array([line["loss"] for line in lines]))
            axes.plot(
                tokens, loss, color=colour, linewidth=1, alpha=0.55, label=f"{name}, training"
            )
            checks = [line for line in lines if "validation_loss" in line]
            axes.plot(
                [line["tokens"] / 1e6 for line in checks],
                [line["validation_loss"] for line in checks],
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.8,
                label=f"{name}, validation",
            )
            # The first tenth falls so steeply that it would flatten the rest.
            values += [*loss[len(loss) // 10 :], *(line["validation_loss"] for line in checks)]
        margin = 0.05 * (max(values) - min(values)) + 1e-3
        axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens (millions)")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(ncols=2)
        return figure


def perplexity_change(perplexity: Mapping[str, Mapping[str, float]]) -> "Figure":
    """The percentage by which each run's perplexity differs from the first run's, per domain.

    Args:
      perplexity: `{run: {domain: perplexity}}`, at least two runs.
    """
    with _style():
        first, *others = perplexity
        domains = list(perplexity[first])
        figure, axes = _figure(0.9 + 0.4 * len(domains))
        rows = np.arange(len(domains))[::-1]
        axes.axvline(0, color=COLOURS[0], linewidth=1.8)
        colours, markers = _looks(len(perplexity))
        for run, (name, colour, marker) in enumerate(
            zip(others, colours[1:], markers[1:], strict=True)
        ):
            offset = 0.5 * ((run + 0.5) / len(others) - 0.5)
            values = [100 * (perplexity[name][d] / perplexity[first][d] - 1) for d in domains]
            axes.hlines(rows - offset, 0, values, color=colour, linewidth=2.5, alpha=0.5)
            look = {"color": colour, "marker": marker, "markersize": 8, "linestyle": "none"}
            axes.plot(values, rows - offset, label=name, **look)
        axes.set_yticks(rows, domains)
        axes.set_ylim(-0.6, len(domains) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_xlabel(f"test perplexity compared with {first}, in % (left is better)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0.1)
        return figure


def routing_heat_map(weights: Mapping[str, Sequence[Sequence[float]]]) -> "Figure":
    """A heat map of domain x expert for every layer, all on one scale: `{domain: [Y][E]}`.

    Pale stands for the uniform weight 1/E, so a layer that routes all domains alike is pale
    everywhere.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    with _style({"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        domains = list(weights)
        w_YxGxE = np.array([weights[domain] for domain in domains]).swapaxes(0, 1)
        Y, G, E = w_YxGxE.shape
        colours = LinearSegmentedColormap.from_list("routing", DIVERGING)
        scale = TwoSlopeNorm(1 / E, vmin=0, vmax=max(w_YxGxE.max(), 1.25 / E))
        columns = min(2 if Y <= 8 else 4, Y)
        rows = -(-Y // columns)
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(WIDTH, rows * (0.65 + 0.26 * G) + 0.35),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for layer, axes in enumerate(grid.flat):
            if layer >= Y:
                axes.set_visible(False)
                continue
            mesh = axes.pcolormesh(w_YxGxE[layer], cmap=colours, norm=scale, edgecolor="white")
            axes.set_title(f"layer {layer}")
            shown = range(0, E, max(1, E // 8))
            axes.set_xticks([e + 0.5 for e in shown], [str(e) for e in shown])
            axes.set_yticks(np.arange(G) + 0.5, domains)
            axes.tick_params(length=0)
        grid[0, 0].invert_yaxis()
        figure.supxlabel("expert", fontsize=9)
        bar = figure.colorbar(mesh, ax=grid, shrink=0.8, pad=0.02)
        bar.set_label(f"mean routing weight (uniform: {1 / E:.3g})", fontsize=9)
        bar.outline.set_visible(False)
        return figure


def distance_by_layer(distances: Sequence[Mapping[str, Any]]) -> "Figure":
    """Largest distance between two domains per layer, against that under shuffled labels."""
    with _style():
        figure, axes = _figure(2.8)
        layers = [row["layer"] for row in distances]
        series = (
            ("between", "two domains (largest)", COLOURS[1], "D", "-"),
            ("shuffled", "labels shuffled: mean", COLOURS[0], "o", "-"),
            ("shuffled_high", "95 % of shuffles lie below", COLOURS[0], "", "--"),
        )
        for key, label, colour, marker, line in series:
            heights = [row[key] for row in distances]
            axes.plot(
                layers, heights, line, color=colour, marker=marker, linewidth=1.8, label=label
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("total-variation distance")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0.1)
        return figure


def loss_by_position(series: Mapping[str, Sequence[float]], segment_length: int) -> "Figure":
    """Mean loss at the positions of an instance, by how its first segment is routed.

    It shows the first two segments, the first of them shaded. Only there do the two rules differ:
    with `self`, leakage makes the losses too low.
    """
    with _style():
        figure, axes = _figure(3.0)
        shown = 2 * segment_length
        axes.axvspan(0, segment_length, color="#eef1f4", zorder=0)
        labels = {"self": "segment 1 by its own mean (leaks)", "uniform": "segment 1 by 1/E"}
        for (name, losses_L), colour, style in zip(
            series.items(), (COLOURS[2], COLOURS[1]), ("-", "--"), strict=True
        ):
            losses = np.asarray(losses_L[:shown])
            axes.plot(np.arange(len(losses)) + 1, losses, style, color=colour, label=labels[name])
        axes.set_xscale("log")
        axes.set_xlabel("position in the instance (logarithmic); shaded: segment 1")
        axes.set_ylabel("mean loss (nats)")
        axes.legend()
        return figure


def utilisation(series: Mapping[str, Any]) -> "Figure":
    """Active (layer, expert) pairs over the steps: `step`, `experts_active`, `pairs`."""
    with _style():
        figure, axes = _figure(2.6)
        pairs = series["pairs"]
        axes.axhline(pairs, color="#9aa5b1", linestyle="--", linewidth=1)
        axes.annotate(
            f"all {pairs} pairs",
            (1, pairs),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        axes.plot(series["step"], series["experts_active"], color=COLOURS[1], linewidth=1.5)
        axes.set_ylim(0, pairs * 1.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("active (layer, expert) pairs")
        return figure


def to_svg(figure: "Figure") -> bytes:
    """The figure as SVG, the same bytes every time; closes it."""
    with _style():
        return _render(figure, "svg", metadata={"Date": None})


def to_png(figure: "Figure") -> bytes:
    """The figure as PNG at 160 dots per inch; closes it."""
    return _render(figure, "png", dpi=160, metadata={"Software": None})


def write_png(figure: "Figure", path: Path) -> None:
    """Writes the figure to a temporary name and moves it into place."""
    write_atomically(path, to_png(figure))


def _render(figure: "Figure", kind: str, **options: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, facecolor="white", **options)
    plt.close(figure)
    return buffer.getvalue()


def _style(changes: Mapping[str, Any] | None = None) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(STYLE | dict(changes or {}))


def _figure(height: float) -> tuple["Figure", Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(WIDTH, height), layout="constrained")


def _looks(count: int) -> tuple[list[str], list[str]]:
    """Colours and markers of `count` runs."""
    return (
        [COLOURS[i % len(COLOURS)] for i in range(count)],
        [MARKERS[i % len(MARKERS)] for i in range(count)],
    )


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of every value and those before it, over a window of 2 % of them."""
    window = max(1, round(SMOOTHING * len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
