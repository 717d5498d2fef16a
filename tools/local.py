"""Writes the figures of a finished local run to where the README shows them.

    bash launch/local.sh
    python tools/local.py [--run=runs/local]

Writes docs/local.json (the run's report without its texts, with the date and the processor),
docs/local.png and the table of the README.
"""

import argparse
import datetime
import json
import math
from pathlib import Path
from typing import Any

from tables import ROOT, markdown, replace_marked, write

from lory_jax.report import plots

FIGURES = ROOT / "docs" / "local.json"
LEFT_OUT = ("samples", "routing_distance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "local")
    run = parser.parse_args().run
    report = json.loads((run / "report.json").read_text("utf-8"))
    figures = {name: value for name, value in report.items() if name not in LEFT_OUT}
    figures |= {"date": datetime.date.today().isoformat(), "processor": processor()}
    write(FIGURES, json.dumps(figures, indent=1) + "\n")
    plots.write_png(plots.perplexity_change(report["perplexity"]), ROOT / "docs" / "local.png")
    replace_marked(
        ROOT / "README.md",
        "tools/local.py",
        perplexity_table(figures) + "\n\n" + summary_line(figures),
    )


def processor() -> str:
    """The name of the processor, if Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else "unknown processor"


def perplexity_table(figures: dict[str, Any]) -> str:
    measures = [figures["perplexity"], figures["bits_per_byte"]]
    rows = []
    for domain in measures[0]["dense"]:
        rows.append(
            [domain, *cells(*(measure[name][domain] for measure in measures for name in NAMES))]
        )
    means = [figures["geometric_mean"]["perplexity"], {n: mean(measures[1][n]) for n in NAMES}]
    rows.append(["**mean**", *cells(*(measure[name] for measure in means for name in NAMES))])
    header = ["test documents", "perplexity, dense", "Lory", "change"]
    return markdown([*header, "bits per byte, dense", "Lory", "change"], rows)


NAMES = ("dense", "lory")


def cells(*values: float) -> list[str]:
    """Dense, Lory and the change from one to the other, for perplexity and for bits per byte."""
    texts = []
    for dense, lory, digits in ((*values[:2], 2), (*values[2:], 3)):
        texts += [f"{dense:.{digits}f}", f"{lory:.{digits}f}", f"{100 * (lory / dense - 1):+.1f} %"]
    return texts


def mean(values: dict[str, float]) -> float:
    return math.fsum(values.values()) / len(values)


def summary_line(figures: dict[str, Any]) -> str:
    seconds = [figures["seconds"][name]["training"] / 60 for name in NAMES]
    cores = figures["versions"]["cores"]
    steps = figures["models"]["lory"]["steps"]
    return (
        f"Positions >= T; geometric mean of perplexity. {steps:,} steps; training took "
        f"{seconds[0]:.1f} minutes dense and {seconds[1]:.1f} Lory, side by side on {cores} cores "
        f"({figures['processor']}), {figures['date']}."
    )


if __name__ == "__main__":
    main()
