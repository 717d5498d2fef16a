"""Shows whether the experts specialise: how routing differs between domains, and how many are used.

    python -m lory_jax.analyze --workdir=RUN_DIR [--out=DIR]
    python -m lory_jax.analyze --workdir=RUN_DIR --text=FILE [--out=DIR]

Writes DIR/analysis.html, a self-contained page, DIR/analysis.json and the pictures of the page. The
routing weights are those of the test set, over segments k > 1, which the segment before decides
(section 5.4 of the paper). The utilisation was logged during training (appendix G.1). With --text,
it writes DIR/text.html instead: the text, and under each of its segments which experts read it.
"""

import argparse
import json
from pathlib import Path

from lory_jax import cli
from lory_jax.storage import check_writable, local_path, write_atomically

PAGE, TEXT_PAGE = "analysis.html", "text.html"


def main(argv: list[str]) -> None:
    parser = cli.Parser("analyze", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, type=local_path, metavar="RUN_DIR", help="the run to analyze")
    parser.add_step_flag()
    add("--out", type=local_path, metavar="DIR", help="where to write (default: RUN_DIR/analysis)")
    add(
        "--data",
        type=local_path,
        metavar="DIR",
        help="where the prepared data are, if they were moved",
    )
    add("--seed", type=int, default=0, help="seed of the shuffled labels (default: 0)")
    add(
        "--text",
        type=local_path,
        metavar="FILE",
        help="show which experts each segment of FILE uses",
    )
    args = parser.parse(argv)
    if args.seed < 0:
        parser.error(f"--seed: got {args.seed}, must be an integer of at least 0")
    out = args.out or args.workdir / "analysis"
    if args.text:
        write_text_page(args, out)
    else:
        write_analysis(args, out)


def write_analysis(args: argparse.Namespace, out: Path) -> None:
    """Analyzes the run on its test set; writes the figures, the page and its pictures."""
    # Imported here so that --help and flag errors do not wait for JAX and matplotlib.
    from lory_jax.analysis.distances import distance_table
    from lory_jax.analysis.routing import ANALYSIS, analyze_run
    from lory_jax.report import plots
    from lory_jax.report.analysis import analysis_page
    from lory_jax.run.directory import RunDirectory

    check_writable(out / ANALYSIS, "out")
    analysis = analyze_run(RunDirectory(args.workdir, args.step), args.data, args.seed)
    print(distance_table(analysis["routing_distance"]))
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in (
        ("routing_weights", plots.routing_heat_map(analysis["routing_weights"])),
        ("distance", plots.distance_by_layer(analysis["routing_distance"])),
        ("utilisation", plots.utilisation(analysis["utilisation"])),
    ):
        plots.write_png(picture, out / f"{name}.png")
    write_atomically(out / PAGE, analysis_page(analysis))
    write_atomically(out / ANALYSIS, json.dumps(analysis, indent=1) + "\n")
    print(f"wrote {out / PAGE}, {out / ANALYSIS} and its pictures")


def write_text_page(args: argparse.Namespace, out: Path) -> None:
    """Writes the page of a text's routing, and prints the strongest experts of each segment."""
    text = cli.read_text(args.text, "--text")

    # Imported here for the same reason.
    from lory_jax import api
    from lory_jax.analysis.texts import strongest_experts, text_segments
    from lory_jax.report.analysis import text_page

    check_writable(out / TEXT_PAGE, "out")
    model = api.load(args.workdir, args.step)
    segments, r_YxNxE = text_segments(model, text)
    print(strongest_experts(r_YxNxE))
    out.mkdir(parents=True, exist_ok=True)
    title = f"Which experts read {args.text.name}"
    page = text_page(title, segments, r_YxNxE, model.config.layer_numbers)
    write_atomically(out / TEXT_PAGE, page)
    print(f"wrote {out / TEXT_PAGE}")


if __name__ == "__main__":
    cli.run(main)
