"""Writes docs/beyond.md: what was tried beyond the paper, each against the recipe it changes.

python -m tools.study.beyond [--out=docs/study]
"""

import argparse
from pathlib import Path

import numpy as np

from tools import tables
from tools.study import arms
from tools.study.claims import contrast
from tools.study.kinds import Arm
from tools.study.report import OUT, ROOT
from tools.study.results import Record, Results
from tools.study.statistics import Effect, paired_effect

PAGE = ROOT / "docs" / "beyond.md"
MARK = "tools/study/beyond.py"
HEADER = ["changed", "effect in nats", "95 % interval", "seeds", "FLOPs", "parameters", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the results of the study")
    write_page(parser.parse_args().out)


def write_page(out: Path, page: Path = PAGE) -> None:
    """Writes the table of finished arms, best first, between the marks of the page."""
    tables.replace_marked(page, MARK, table(Results(out / "runs")))


def table(results: Results, split: str = "test") -> str:
    """The arms of the stage, by their effect on the loss of the recipe that they change."""
    by_arm: dict[str, list[Record]] = {}
    for record in results.records():
        if record["kind"] == "run" and record["status"] == "finished":
            by_arm.setdefault(record["arm"], []).append(record)
    found: list[tuple[float, list[str]]] = []
    missing = []
    for arm in arms.ARMS:
        if arm.stage != "beyond":
            continue
        domains = {}
        if arm.name in by_arm and arms.BEYOND_BASE in by_arm:
            weights = {arm.name: 1.0, arms.BEYOND_BASE: -1.0}
            domains = contrast(weights, by_arm, results, split)
        if domains:
            effect = paired_effect(domains)
            found.append((effect.mean, row(arm, effect, by_arm)))
        else:
            missing.append(arm.name)
    text = tables.markdown(HEADER, [cells for _, cells in sorted(found)]) if found else ""
    if missing:
        text += f"\n\nWithout runs so far: {', '.join(missing)}."
    return text.strip()


def row(arm: Arm, effect: Effect, by_arm: dict[str, list[Record]]) -> list[str]:
    """A line of the table; costs are divided by those of the recipe."""

    def ratio(name: str) -> str:
        own, base = (
            np.mean([total(record[name]) for record in by_arm[key]])
            for key in (arm.name, arms.BEYOND_BASE)
        )
        return f"{own / base:.2f}"

    changes = ", ".join(f"{name}={value}" for name, value in arm.settings.items())
    interval = "" if np.isnan(effect.low) else f"{effect.low:+.4f} to {effect.high:+.4f}"
    costs = [ratio(name) for name in ("flops_per_token", "parameters", "step_seconds")]
    return [changes, f"{effect.mean:+.4f}", interval, str(effect.seeds), *costs]


def total(value: float | dict[str, float]) -> float:
    """A number, or the total among the counts of parameters."""
    return value["total"] if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
