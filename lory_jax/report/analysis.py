"""The pages of `analyze`: what the experts of a run do, and which of them a text uses.

Letters: Y layers, N segments, E experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lory_jax.report import html, plots

STYLE = """
.strip { display: flex; height: .6rem; margin: .12rem 0; border-radius: 2px; overflow: hidden; }
.strip i { display: block; height: 100%; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; font-size: .85rem; }
.key b { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
  border-radius: 2px; vertical-align: -1px; }
.segment { margin: 1rem 0; }
.segment pre { margin-bottom: .3rem; color: #1f2933; }
@media print { .strip, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def analysis_page(analysis: dict[str, Any]) -> str:
    """The page of a run.

    Args:
      analysis: the contents of analysis.json.
    """
    weights, texts = analysis["routing_weights"], analysis["telling_texts"]
    folders = ", ".join(f"{count} of {domain}" for domain, count in analysis["origins"].items())
    pieces = [
        html.style(STYLE),
        html.paragraph(
            f"Step {analysis['step']:,}. The routing weights are those of the test set, over "
            "segments k > 1, each of which is routed by the segment before it.",
            "lead",
        ),
        html.heading("Routing by domain and layer"),
        html.figure(
            plots.to_svg(plots.routing_heat_map(weights)),
            "Mean routing weight of every expert, by domain and layer.",
        ),
        html.heading("Do domains differ more than folders do?"),
        html.figure(
            plots.to_svg(plots.distance_by_layer(analysis["routing_distance"])),
            "The largest distance between the mean routing weights of two domains, and what it is "
            "if folders (or other origins) keep their documents, and their labels are shuffled. "
            f"The test set has {folders}.",
        ),
        html.heading("Experts in use during training"),
        html.figure(
            plots.to_svg(plots.utilisation(analysis["utilisation"])),
            "Pairs of layer and expert that had a routing weight above 2/E at least once in the "
            "last 10 steps.",
        ),
        html.heading("The texts that each expert is chosen for"),
        html.paragraph(
            "For each expert of the bottom, the middle and the top layer: the segments of the test "
            "set that give it the largest weights in the segment after them, at most one segment "
            "per instance.",
            "note",
        ),
    ]
    for layer, experts in texts.items():
        rows = [
            [f"expert {expert}", f"{found['weight']:.3f}", found["domain"], found["text"]]
            for expert, best in enumerate(experts)
            for found in best
        ]
        pieces.append(html.paragraph(f"Layer {layer}"))
        pieces.append(html.table(["", "weight", "domain", "text"], rows, text_columns=(1, 2, 3)))
    return html.page("What the experts do", pieces)


def text_page(
    title: str, segments: Sequence[str], r_YxNxE: np.ndarray, layer_numbers: Sequence[int]
) -> str:
    """The page of a text: under each segment, one strip per layer shows the weights of the experts.

    Args:
      title: the title of the page.
      segments: the texts of the segments.
      r_YxNxE: the routing weights of every segment.
      layer_numbers: the number of each of the layers with experts.
    """
    num_experts = r_YxNxE.shape[-1]
    colours = [
        f"hsl({360 * e / num_experts:.0f} 60% {45 + 20 * (e % 2)}%)" for e in range(num_experts)
    ]
    pieces = [
        html.style(STYLE),
        html.paragraph(
            "Under each segment is one strip per layer with experts, the bottom one first. The "
            "width of a colour is the weight of its expert in the merged FFN that processes the "
            "segment. Each segment is routed by the one before it; the first is routed by itself.",
            "note",
        ),
        _key(colours),
    ]
    for n, text in enumerate(segments):
        strips = [
            _strip(r_NxE[n], number, colours)
            for number, r_NxE in zip(layer_numbers, r_YxNxE, strict=True)
        ]
        pieces.append(f'<div class="segment"><pre>{html.escape(text)}</pre>{"".join(strips)}</div>')
    return html.page(title, pieces)


def _key(colours: Sequence[str]) -> str:
    names = [
        f'<span><b style="background:{colour}"></b>expert {e}</span>'
        for e, colour in enumerate(colours)
    ]
    return f'<div class="key">{"".join(names)}</div>'


def _strip(r_E: np.ndarray, layer: int, colours: Sequence[str]) -> str:
    """One bar; its label says what it shows, for readers who cannot see it."""
    parts = [
        f'<i style="width:{100 * weight:.2f}%;background:{colour}"></i>'
        for weight, colour in zip(r_E, colours, strict=True)
    ]
    label = f"layer {layer}: " + ", ".join(f"expert {e} {w:.2f}" for e, w in enumerate(r_E))
    return (
        f'<div class="strip" role="img" aria-label="{label}" title="{label}">{"".join(parts)}</div>'
    )
