"""Writes into docs/beyond.md what was tried beyond the paper, each against the recipe it changes.

    python -m tools.study.beyond [--out=docs/study]

Makes the tables of the page and, beside it, beyond.png. The first table has the seeds by which the
best arms are chosen, and the validation losses that choose; those that confirm are in the third. An
arm with a diverged run has no effect, because the seeds that are left are not typical. Seconds come
from step_seconds_beyond.json (tools/study/step_seconds.py), because those of the runs depend on
what else the machine did.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lory_jax.report.plots import write_png
from tools import tables
from tools.study import arms, pictures
from tools.study.beyond_again import (
    ALL_SEEDS,
    CANDIDATES,
    CHOOSING_SEEDS,
    FINALISTS,
    NUMBER,
    SEEDS_AGAIN,
    WIDER,
    wider_name,
)
from tools.study.beyond_arms import BEYOND_ARMS, BEYOND_BASE, CONTROLS
from tools.study.claims import ByArm, contrast, diverged_runs, finished_runs, mean_of
from tools.study.kinds import Arm
from tools.study.report import OUT, ROOT
from tools.study.results import FIRST_CORPUS, SECOND_CORPUS, Record, Results, mean_loss
from tools.study.statistics import Effect, holm, paired_effect
from tools.study.tables import changes

PAGE = ROOT / "docs" / "beyond.md"
MARK = "tools/study/beyond.py"
REFERENCES = ("lory", "dense")  # tuned arms of stage A, for orientation
HEADER = [
    "arm",
    "changed",
    "effect in nats",
    "95 % interval",
    "seeds",
    "on validation",
    "FLOPs",
    "parameters",
    "seconds",
]
CONTROLS_HEADER = ["arm", "its control", *HEADER[2:5]]
AGAIN_HEADER = ["arm", "on", *HEADER[2:5], "adjusted p"]
CHOOSING = range(CHOOSING_SEEDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the results of the study")
    write_page(parser.parse_args().out)


@dataclass(frozen=True)
class Variant:
    """A change to the recipe, what it does, and its costs divided by the recipe's.

    Attributes:
      effect: on the loss of the test set.
      on_validation: the difference of the validation losses, by which finalists are chosen.
      seconds: of a training step on a CPU; None if they were not measured.
    """

    arm: Arm
    effect: Effect
    on_validation: float
    flops: float
    parameters: float
    seconds: float | None


def write_page(out: Path, page: Path = PAGE) -> None:
    """Writes the finished arms, best first, between the marks of the page, and their picture."""
    results = Results(out / "runs")
    variants, missing = finished(results, step_seconds(out))
    parts = []
    if variants:
        parts.append(tables.markdown(HEADER, [row(variant) for variant in variants]))
        picture = page.with_suffix(".png")
        drawn = [point(v) for v in variants if v.arm.stage == "beyond" and not v.arm.factors]
        if drawn:
            write_png(pictures.costs(drawn), picture)
            parts.append(f"![What each change gains, and what it costs]({picture.name})")
    if controls := against_controls(results):
        parts.append(
            "Some arms have controls that are closer to them than the recipe is. This is the arm's "
            "test loss minus its control's:"
        )
        parts.append(tables.markdown(CONTROLS_HEADER, controls))
    if again := tried_again(results):
        parts.append(
            f"The {NUMBER} best by validation are trained again and compared with the recipe under "
            "the same conditions: with seeds that did not choose them, on the second corpus, and "
            f"at twice the width (D = {WIDER}), where they have the learning rate that is best for "
            "the dense model. A row stays empty until all its runs are finished. P-values "
            "are adjusted by Holm's method over these arms, for each condition:"
        )
        parts.append(tables.markdown(AGAIN_HEADER, again))
    if diverged := diverged_ids(results):
        parts.append(f"Diverged, and left out: {', '.join(diverged)}.")
    if missing:
        parts.append(f"Without runs so far: {', '.join(missing)}.")
    tables.replace_marked(page, MARK, "\n\n".join(parts))


def step_seconds(out: Path) -> dict[str, float]:
    """By arm, the seconds of a step divided by those of the recipe's; empty if not measured."""
    path = out / arms.STEP_SECONDS_FILES["beyond"].name
    return json.loads(path.read_text("utf-8"))["over_base"] if path.is_file() else {}


def finished(
    results: Results, seconds: Mapping[str, float], split: str = "test"
) -> tuple[list[Variant], list[str]]:
    """The arms of the stage by their effect on the loss, and the names of those without runs.

    The references are among the first, where they have runs.
    """
    by_arm = finished_runs(results, seeds=CHOOSING)
    lost = diverged_runs(results, seeds=CHOOSING)
    found, missing = [], []
    base = by_arm.get(BEYOND_BASE, [])
    for arm in shown():
        own = by_arm.get(arm.name, [])
        effect = effect_of(arm.name, BEYOND_BASE, by_arm, results, split)
        if lost.keys() & chain_of(arm):
            continue
        if effect is None:
            missing += [arm.name] if arm.stage == "beyond" else []
            continue
        parameters = mean_of(own, "parameters") / mean_of(base, "parameters")
        flops = mean_flops(arm, by_arm) / mean_of(base, "flops_per_token")
        validation = on_validation(own, base)
        found.append(Variant(arm, effect, validation, flops, parameters, seconds.get(arm.name)))
    return sorted(found, key=lambda variant: variant.effect.mean), missing


def shown() -> list[Arm]:
    """The arms of the table: not those that others merely start from."""
    references = [arm for arm in arms.ARMS if arm.stage == "A" and arm.name in REFERENCES]
    return [*references, *(arm for arm in BEYOND_ARMS if not arm.keeps_run)]


def on_validation(own: Sequence[Record], base: Sequence[Record]) -> float:
    """The mean validation loss of an arm minus the recipe's, over the seeds that both have."""
    losses, of_base = ({r["seed"]: mean_loss(r) for r in runs} for runs in (own, base))
    return float(np.mean([losses[s] - of_base[s] for s in losses.keys() & of_base.keys()]))


def ranking(results: Results) -> list[str]:
    """The candidates that have all the seeds that choose, best first by validation."""
    by_arm = finished_runs(results, seeds=CHOOSING)
    base = by_arm.get(BEYOND_BASE, [])
    complete = [name for name in CANDIDATES if len(by_arm.get(name, [])) == CHOOSING_SEEDS]
    return sorted(complete, key=lambda name: on_validation(by_arm[name], base))


def effect_of(
    first: str,
    second: str,
    by_arm: ByArm,
    results: Results,
    split: str = "test",
    corpus: str = FIRST_CORPUS,
) -> Effect | None:
    """The loss of an arm minus another's; None where they have no seed in common."""
    if not (by_arm.get(first) and by_arm.get(second)):
        return None
    domains = contrast({first: 1.0, second: -1.0}, by_arm, results, split, corpus=corpus)
    return paired_effect(domains) if domains else None


@dataclass(frozen=True)
class Place:
    """Where finalists are tried again.

    Attributes:
      seeds: those of all its runs.
      is_wider: whether arms have the width `WIDER` there.
    """

    name: str
    seeds: range
    split: str = "test"
    corpus: str = FIRST_CORPUS
    is_wider: bool = False


PLACES = (
    Place("other seeds", range(CHOOSING_SEEDS, ALL_SEEDS), "confirmation"),
    Place("the second corpus", range(SEEDS_AGAIN), corpus=SECOND_CORPUS),
    Place(f"D = {WIDER}", range(SEEDS_AGAIN), is_wider=True),
)


def tried_again(results: Results, finalists: Sequence[str] = FINALISTS) -> list[list[str]]:
    """Lines of the third table: what remains of the best where they were not chosen."""
    rows = [row for place in PLACES for row in _in_place(place, results, finalists)]
    return sorted(rows, key=lambda row: finalists.index(row[0]))


def _in_place(place: Place, results: Results, finalists: Sequence[str]) -> list[list[str]]:
    """The lines of a place.

    An effect is shown once all of its seeds are there, so that nobody stops at a lucky one.
    """
    by_arm = finished_runs(results, place.corpus, place.seeds)
    lost = diverged_runs(results, place.corpus, place.seeds)
    named = {
        name: wider_name(name) if place.is_wider else name for name in (*finalists, BEYOND_BASE)
    }
    effects = {
        name: effect_of(named[name], named[BEYOND_BASE], by_arm, results, place.split, place.corpus)
        for name in finalists
    }
    planned = len(place.seeds)
    done = {name: e for name, e in effects.items() if e is not None and e.seeds == planned}
    adjusted = holm({name: done[name].p if name in done else np.nan for name in finalists})
    rows = []
    for name, effect in effects.items():
        where = [name, f"{place.name}, {place.split} set"]
        if name in done:
            rows.append([*where, *figures(done[name]), f"{adjusted[name]:.2g}"])
        elif lost.keys() & {named[name], named[BEYOND_BASE]}:
            rows.append([*where, "diverged", "", "", ""])
        else:
            rows.append([*where, "", "", f"{effect.seeds if effect else 0} of {planned}", ""])
    return rows


def against_controls(results: Results) -> list[list[str]]:
    """Lines of the second table: what remains of an effect beside the arm's control."""
    by_arm, lost = finished_runs(results), diverged_runs(results)
    by_name = {arm.name: arm for arm in arms.ARMS if arm.corpus == FIRST_CORPUS}
    rows = []
    for arm, control in CONTROLS:
        chains = chain_of(by_name[arm]).keys() | chain_of(by_name[control]).keys()
        effect = effect_of(arm, control, by_arm, results)
        if effect is not None and not lost.keys() & chains:
            rows.append([arm, control, *figures(effect)])
    return rows


def diverged_ids(results: Results) -> list[str]:
    """The runs of the stage that diverged, on both corpora."""
    of_stage = {arm.name for arm in arms.ARMS if arm.stage == "beyond"}
    return [
        run
        for corpus in (FIRST_CORPUS, SECOND_CORPUS)
        for arm, runs in diverged_runs(results, corpus).items()
        if arm in of_stage
        for run in runs
    ]


def mean_flops(arm: Arm, by_arm: ByArm) -> float:
    """FLOPs per token over a run and the runs that it starts from."""
    chain = chain_of(arm)
    flops = [mean_of(by_arm[name], "flops_per_token") for name in chain]
    return float(np.average(flops, weights=[before.steps for before in chain.values()]))


def chain_of(arm: Arm) -> dict[str, Arm]:
    """An arm and all that it starts from, by name."""
    arms_by_name = {other.name: other for other in arms.ARMS}
    chain = {arm.name: arm}
    while more := {p for before in chain.values() for p in before.parents} - chain.keys():
        chain |= {name: arms_by_name[name] for name in more}
    return chain


def row(variant: Variant) -> list[str]:
    """A line of the table."""
    arm = variant.arm
    costs = [f"{cost:.2f}" for cost in (variant.flops, variant.parameters)]
    costs.append("" if variant.seconds is None else f"{variant.seconds:.2f}")
    return [
        arm.name,
        changes(arm, BEYOND_BASE),
        *figures(variant.effect, min(arm.seeds, CHOOSING_SEEDS)),
        f"{variant.on_validation:+.4f}",
        *costs,
    ]


def figures(effect: Effect, planned: int = 0) -> list[str]:
    """Mean, interval and number of seeds, of those planned if they are fewer."""
    interval = "" if np.isnan(effect.low) else f"{effect.low:+.4f} to {effect.high:+.4f}"
    seeds = f"{effect.seeds} of {planned}" if effect.seeds < planned else str(effect.seeds)
    return [f"{effect.mean:+.4f}", interval, seeds]


def point(variant: Variant) -> pictures.Cost:
    """A variant in the picture."""
    effect = variant.effect
    interval = (effect.low, effect.high)
    return pictures.Cost(
        variant.arm.name, effect.mean, interval, variant.seconds, variant.parameters
    )


if __name__ == "__main__":
    main()
