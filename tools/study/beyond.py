"""Writes into docs/beyond.md what was tried beyond the paper, each against the recipe it changes.

    python -m tools.study.beyond [--out=docs/study]

Makes the table of the page and, beside it, beyond.png. Seconds come from step_seconds_beyond.json
(tools/study/step_seconds.py), because those of the runs depend on what else the machine did.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lory_jax.report.plots import write_png
from tools import tables
from tools.study import arms, pictures
from tools.study.beyond_arms import BEYOND_BASE
from tools.study.claims import ByArm, contrast, finished_runs, mean_of
from tools.study.kinds import Arm
from tools.study.report import OUT, ROOT
from tools.study.results import Results
from tools.study.statistics import Effect, paired_effect

PAGE = ROOT / "docs" / "beyond.md"
MARK = "tools/study/beyond.py"
HEADER = [
    "arm",
    "changed",
    "effect in nats",
    "95 % interval",
    "seeds",
    "FLOPs",
    "parameters",
    "seconds",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the results of the study")
    write_page(parser.parse_args().out)


@dataclass(frozen=True)
class Variant:
    """A change to the recipe, what it does, and its costs divided by the recipe's.

    Attributes:
      seconds: of a training step on a CPU; None if they were not measured.
    """

    arm: Arm
    effect: Effect
    flops: float
    parameters: float
    seconds: float | None


def write_page(out: Path, page: Path = PAGE) -> None:
    """Writes the finished arms, best first, between the marks of the page, and their picture."""
    variants, missing = finished(Results(out / "runs"), step_seconds(out))
    text = tables.markdown(HEADER, [row(variant) for variant in variants]) if variants else ""
    if variants:
        picture = page.with_suffix(".png")
        write_png(pictures.costs([point(variant) for variant in variants]), picture)
        text += f"\n\n![What each change gains, and what it costs]({picture.name})"
    if missing:
        text += f"\n\nWithout runs so far: {', '.join(missing)}."
    tables.replace_marked(page, MARK, text.strip())


def step_seconds(out: Path) -> dict[str, float]:
    """By arm, the seconds of a step divided by those of the recipe's; empty if not measured."""
    path = out / arms.STEP_SECONDS_FILES["beyond"].name
    return json.loads(path.read_text("utf-8"))["over_base"] if path.is_file() else {}


def finished(
    results: Results, seconds: Mapping[str, float], split: str = "test"
) -> tuple[list[Variant], list[str]]:
    """The arms of the stage by their effect on the loss, and the names of those without runs."""
    by_arm = finished_runs(results)
    found, missing = [], []
    base = by_arm.get(BEYOND_BASE, [])
    for arm in arms.ARMS:
        if arm.stage != "beyond" or arm.keeps_run:  # what others start from is no variant
            continue
        own = by_arm.get(arm.name, [])
        weights = {arm.name: 1.0, BEYOND_BASE: -1.0}
        domains = contrast(weights, by_arm, results, split) if own and base else {}
        if not domains:
            missing.append(arm.name)
            continue
        parameters = mean_of(own, "parameters") / mean_of(base, "parameters")
        flops = mean_flops(arm, by_arm) / mean_of(base, "flops_per_token")
        effect = paired_effect(domains)
        found.append(Variant(arm, effect, flops, parameters, seconds.get(arm.name)))
    return sorted(found, key=lambda variant: variant.effect.mean), missing


def mean_flops(arm: Arm, by_arm: ByArm) -> float:
    """FLOPs per token over a run and the runs that it starts from."""
    arms_by_name = {other.name: other for other in arms.ARMS}
    chain = {arm.name}
    while more := {p for name in chain for p in arms_by_name[name].parents} - chain:
        chain |= more
    flops = [mean_of(by_arm[name], "flops_per_token") for name in chain]
    return float(np.average(flops, weights=[arms_by_name[name].steps for name in chain]))


def row(variant: Variant) -> list[str]:
    """A line of the table."""
    effect = variant.effect
    arm = variant.arm
    changes = ", ".join(f"{name}={value}" for name, value in arm.settings.items())
    if arm.parents:
        changes += f", {arm.steps} steps from {' + '.join(arm.parents)}"
    interval = "" if np.isnan(effect.low) else f"{effect.low:+.4f} to {effect.high:+.4f}"
    costs = [f"{cost:.2f}" for cost in (variant.flops, variant.parameters)]
    costs.append("" if variant.seconds is None else f"{variant.seconds:.2f}")
    return [arm.name, changes, f"{effect.mean:+.4f}", interval, str(effect.seeds), *costs]


def point(variant: Variant) -> pictures.Cost:
    """A variant in the picture."""
    effect = variant.effect
    interval = (effect.low, effect.high)
    return pictures.Cost(
        variant.arm.name, effect.mean, interval, variant.seconds, variant.parameters
    )


if __name__ == "__main__":
    main()
