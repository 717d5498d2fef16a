"""Writes the table of docs/baselines.md from docs/comparison/comparison.json; measures nothing.

    python tools/comparison.py

launch/baselines.sh writes the JSON.
"""

import json
from typing import Any

from tables import ROOT, markdown, replace_marked

PAGE, FIGURES = ROOT / "docs" / "baselines.md", ROOT / "docs" / "comparison" / "comparison.json"


def main() -> None:
    replace_marked(PAGE, "tools/comparison.py", runs_table(json.loads(FIGURES.read_text())))


def runs_table(figures: dict[str, Any]) -> str:
    """One row per run: its perplexity, the change from the first run, and its costs."""
    domains = figures["test"]["instances"]
    rows = []
    first = next(iter(figures["models"]))
    for name, model in figures["models"].items():
        perplexity = figures["perplexity"][name]
        mean = figures["geometric_mean"]["perplexity"]
        dropped = model["dropped_tokens"]
        tokens = figures["tokens_to_first_loss"][name]
        flops = model["flops_per_token"] / figures["models"][first]["flops_per_token"]
        rows.append(
            [
                name.replace("_", " "),
                *(f"{perplexity[domain]:.2f}" for domain in domains),
                f"{mean[name]:.2f}",
                f"{mean[name] / mean[first] - 1:+.1%}" if name != first else "",
                f"{tokens / 1e6:.1f} M" if tokens else "never",
                f"{dropped:.0%}" if dropped is not None else "",
                f"{flops:.2f}",
            ]
        )
    header = ["run", *domains, "mean", f"against {first}", f"tokens to {first}'s last loss"]
    return markdown([*header, "dropped", "FLOPs a token"], rows)


if __name__ == "__main__":
    main()
