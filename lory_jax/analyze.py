"""Whether the experts specialise: how routing differs between domains, and how many are in use.

    python -m lory_jax.analyze --workdir=W [--out=DIR]
    python -m lory_jax.analyze --workdir=W --text=FILE [--out=DIR]

Writes DIR/analysis.html, one page with everything inside, DIR/analysis.json and pictures. Routing
weights are those of segments k > 1 of the test set, which the segment before decides (paper,
section 5.4); utilisation is the training run's (G.1). With --text, writes DIR/text.html instead:
the text, and under each of its segments which experts read it.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax import api, cli
from lory_jax.analysis.texts import telling_texts, text_segments
from lory_jax.console import progress
from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import batches_of, held_out_sets
from lory_jax.report import plots
from lory_jax.report.analysis import analysis_page, text_page
from lory_jax.run.directory import (
    data_directory,
    read_config,
    read_metrics,
    write_atomically,
)
from lory_jax.run.step_choice import NEWEST, Step

ANALYSIS, PAGE, TEXT_PAGE = "analysis.json", "analysis.html", "text.html"
HALVINGS = 100


def main(argv: list[str]) -> None:
    parser = cli.Parser("analyze", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="a run of the verb train")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: W/analysis")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the prepared data are now")
    parser.add_argument("--seed", type=int, default=0, help="of the random halves (default: 0)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="show which experts each segment of it uses"
    )
    parser.add_step_flag()
    args = parser.parse(argv)
    out = args.out or args.workdir / "analysis"
    if args.text:
        analyze_text(args.workdir, args.text, out, args.step)
        return
    analysis = analyze(args.workdir, args.data, args.seed, args.step)
    out.mkdir(parents=True, exist_ok=True)
    plots.write_png(plots.routing_weights(analysis["routing_weights"]), out / "routing_weights.png")
    plots.write_png(plots.routing_distance(analysis["routing_distance"]), out / "distance.png")
    plots.write_png(plots.utilisation(analysis["utilisation"]), out / "utilisation.png")
    write_atomically(out / PAGE, analysis_page(analysis))
    write_atomically(out / ANALYSIS, json.dumps(analysis, indent=1) + "\n")
    print(table(analysis["routing_distance"]))
    print(f"wrote {out / PAGE}, {out / ANALYSIS} and its pictures")


def analyze(
    workdir: Path, data: Path | None = None, seed: int = 0, step: Step = NEWEST
) -> dict[str, Any]:
    """Returns what `analysis.json` holds.

    routing_weights: `{domain: [Y][E]}`, mean weights of every layer.
    routing_distance: per layer, see `routing_distances`.
    telling_texts: see `evaluation.specialisation.telling_texts`.
    utilisation: `step` and `experts_active` lists, and the number of `pairs` (layer, expert).
    """
    model = api.load(workdir, step)
    if not model.config.num_experts:
        raise InputError(f"{workdir}: a dense model, which routes nothing; give a run with experts")
    if model.config.sequence_length <= model.config.segment_length:
        raise InputError(f"{workdir}: instances are one segment, so none is routed by another")
    sets = held_out_sets(data_directory(workdir, data), "test")
    by_segment = segment_weights(model, sets, read_config(workdir)["train"]["global_batch_size"])
    weights = {
        d: r_YxIxNxE[:, :, 1:].mean(axis=2, dtype=np.float64) for d, r_YxIxNxE in by_segment.items()
    }
    lines = [m for m in read_metrics(workdir) if m["experts_active"] is not None]
    return {
        "step": model.step,
        "checkpoint": step,
        "instances": {domain: len(rows) for domain, rows in sets.items()},
        "routing_weights": {d: w_YxIxE.mean(axis=1).tolist() for d, w_YxIxE in weights.items()},
        "routing_distance": routing_distances(weights, seed),
        "telling_texts": telling_texts(by_segment, sets, model),
        "utilisation": {
            "step": [line["step"] for line in lines],
            "experts_active": [line["experts_active"] for line in lines],
            "pairs": model.config.num_layers * model.config.num_experts,
        },
    }


def analyze_text(workdir: Path, text: Path, out: Path, step: Step = NEWEST) -> None:
    """Writes the page of a text's routing, and prints the strongest experts of each segment.

    Raises:
      InputError: the run or the text cannot be read, or routes nothing.
    """
    contents = cli.read_text(text, "--text")
    segments, r_YxNxE = text_segments(api.load(workdir, step), contents)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out / TEXT_PAGE, text_page(f"Which experts read {text.name}", segments, r_YxNxE)
    )
    print("segment  strongest expert of each layer, and its weight")
    for n in range(len(segments)):
        best = [f"{r_E.argmax()} ({r_E.max():.2f})" for r_E in r_YxNxE[:, n]]
        print(f"{n + 1:7}  " + "  ".join(best))
    print(f"wrote {out / TEXT_PAGE}")


def segment_weights(
    model: api.Model, sets: dict[str, np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
    """Routing weights of every segment of every instance: `{domain: [Y, I, N, E]}`."""
    batches = batches_of(sets, batch_size)
    weights: dict[str, list[np.ndarray]] = {domain: [] for domain in sets}
    for domain, rows in progress(batches, len(batches), "routing", "batches"):
        # Filled up with the last instance, so that one shape is compiled.
        filled = rows[np.minimum(np.arange(batch_size), len(rows) - 1)]
        weights[domain].append(model.routing_weights(filled[:, :-1])[:, : len(rows)])
    return {domain: np.concatenate(parts, axis=1) for domain, parts in weights.items()}


def routing_distances(weights: dict[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """How far routing differs between domains, against how far it differs within one.

    Args:
      weights: `{domain: [Y, I, E]}`, mean weights of every instance.
      seed: of the random halves.

    Returns:
      for every layer `between`, the largest total-variation distance between the mean weights of
      two `domains`; and `within`, the same distance between random halves of one domain, the mean
      of many halvings, for the domain where it is largest (`within_domain`).

    Raises:
      InputError: fewer than two domains, or a domain with fewer than two instances.
    """
    small = [domain for domain, w_YxIxE in weights.items() if w_YxIxE.shape[1] < 2]
    if len(weights) < 2 or small:
        raise InputError(
            "test set: routing is compared between domains, and between halves of each: takes at "
            f"least 2 domains (got {len(weights)}) of at least 2 instances"
            + (f" (too few in {', '.join(small)})" if small else "")
        )
    between = {
        (a, b): total_variation(weights[a].mean(axis=1), weights[b].mean(axis=1))
        for a, b in itertools.combinations(weights, 2)
    }
    rng = np.random.default_rng(seed)
    within = {domain: _half_distance(w_YxIxE, rng) for domain, w_YxIxE in weights.items()}
    num_layers = next(iter(weights.values())).shape[0]
    distances = []
    for layer in range(num_layers):
        most_between, pair = max((distance[layer], pair) for pair, distance in between.items())
        most_within, domain = max((distance[layer], name) for name, distance in within.items())
        distances.append(
            {
                "layer": layer,
                "between": float(most_between),
                "domains": list(pair),
                "within": float(most_within),
                "within_domain": domain,
            }
        )
    return distances


def total_variation(p_xE: np.ndarray, q_xE: np.ndarray) -> np.ndarray:
    """Half the sum of absolute differences: 0 for equal distributions, 1 for disjoint ones."""
    return 0.5 * np.abs(p_xE - q_xE).sum(axis=-1)


def _half_distance(w_YxIxE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = w_YxIxE.shape[1]
    distances = []
    for _ in range(HALVINGS):
        order = rng.permutation(count)
        first, second = w_YxIxE[:, order[: count // 2]], w_YxIxE[:, order[count // 2 :]]
        distances.append(total_variation(first.mean(axis=1), second.mean(axis=1)))
    return np.mean(distances, axis=0)


def table(distances: list[dict[str, Any]]) -> str:
    """Routing distances as an aligned table."""
    lines = ["layer  between domains  within a domain  most different"]
    for row in distances:
        lines.append(
            f"{row['layer']:5}  {row['between']:15.3f}  {row['within']:15.3f}  "
            + " and ".join(row["domains"])
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
