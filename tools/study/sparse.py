"""Writes the tables of docs/evaluation.md on merges of few experts, from the stage sparse.

    python -m tools.study.sparse [--out=docs/study]

Every way to k experts is compared with all eight experts after the same number of tokens. Where a
way has several variants (the routers' gradient, the finishing phase's learning rate), the mean
validation loss on the first corpus picks one for both corpora, of those that have all seeds; tables
show the test loss.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools import tables
from tools.study import sparse_arms
from tools.study.claims import ByArm, contrast, diverged_runs, finished_runs
from tools.study.report import OUT, ROOT
from tools.study.results import FIRST_CORPUS, Results, mean_loss
from tools.study.statistics import Effect, paired_effect

PAGE = ROOT / "docs" / "evaluation.md"
MARK = "tools/study/sparse.py"
CORPORA = (FIRST_CORPUS, "debian")
AIMS = {2: 0.02, 1: 0.05}  # nats above all eight experts
SPLIT = "test"


@dataclass(frozen=True)
class Way:
    """One way to k experts: its variants, and what they are compared with, by arm.

    A name "ARM:top2" is the arm, evaluated with the 2 largest experts.
    """

    k: int
    how: str
    variants: tuple[str, ...]
    baselines: tuple[str, ...]


def ways() -> list[Way]:
    """All ways of the stage."""
    names = [arm.name for arm in sparse_arms.SPARSE_ARMS]
    controls = tuple(name for name in names if name.startswith("sparse_all_"))
    parent = (sparse_arms.SPARSE_PARENT,)
    found = []
    for k in sparse_arms.SPARSE_COUNTS:
        own = [name for name in names if name.startswith(f"sparse_k{k}_")]
        annealed = tuple(name for name in own if "_annealed" in name)
        finished = tuple(name for name in own if name not in annealed)
        found += [
            Way(k, "kept of the finished model", (f"{sparse_arms.SPARSE_PARENT}:top{k}",), parent),
            Way(k, "a finishing phase of 10 %", finished, controls),
            Way(k, "annealed in training", annealed, parent),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the results of the study")
    write_page(parser.parse_args().out)


def write_page(out: Path, page: Path = PAGE) -> None:
    """Writes the tables between the marks of the page."""
    tables.replace_marked(page, MARK, text(Results(out / "runs")))


def text(results: Results) -> str:
    """The table of effects, that of all variants, and whether the parents equal earlier runs."""
    by_corpus = {corpus: finished_runs(results, corpus) for corpus in CORPORA}
    first = by_corpus[FIRST_CORPUS]
    rows = [row for way in ways() if (row := effect_row(way, results, by_corpus))]
    if not rows:
        return "Without runs so far."
    header = ["k", "how", "chosen on validation", *CORPORA, f"aim met ({', '.join(CORPORA)})"]
    parts = [tables.markdown(header, rows)]
    trained = [name for way in ways() for name in (*way.baselines, *way.variants)]
    variants = []
    for name in dict.fromkeys(trained):
        if ":" not in name and name in first:
            losses = validation_losses(name, first)
            own = f"{losses[0]:.4f}" if 0 in losses else ""
            variants.append([name, str(len(losses)), own, f"{np.mean([*losses.values()]):.4f}"])
    columns = ["arm", "seeds", f"validation loss, {FIRST_CORPUS}, seed 0", "mean of its seeds"]
    parts.append(tables.markdown(columns, variants))
    for corpus in CORPORA:
        runs = diverged_runs(results, corpus)
        ids = [run for name in dict.fromkeys(trained) for run in runs.get(name, [])]
        parts += [f"Diverged, and left out: {', '.join(ids)}."] if ids else []
    return "\n\n".join([*parts, *parent_lines(results, first)])


def effect_row(way: Way, results: Results, by_corpus: Mapping[str, ByArm]) -> list[str] | None:
    """The line of a way; None where it has no runs on the first corpus."""
    variant, baseline = (
        best(names, by_corpus[FIRST_CORPUS]) for names in (way.variants, way.baselines)
    )
    if variant is None or baseline is None:
        return None
    effects = [effect(variant, baseline, results, by_corpus[c], c) for c in CORPORA]
    said = variant if ":" not in variant else ""
    aims = ", ".join(_is_met(found, AIMS[way.k]) for found in effects)
    return [str(way.k), way.how, said, *(_figures(found) for found in effects), aims]


def best(names: tuple[str, ...], by_arm: ByArm) -> str | None:
    """The name with the lowest mean validation loss, of those with the most seeds.

    The others were left out because of their loss with fewer seeds. None where none has runs.
    """
    losses = {
        name: validation_losses(name, by_arm) for name in names if name.partition(":")[0] in by_arm
    }
    most = max(map(len, losses.values()), default=0)
    full = {name: of_seed for name, of_seed in losses.items() if len(of_seed) == most}
    return min(full, key=lambda name: sum(full[name].values()), default=None)


def validation_losses(name: str, by_arm: ByArm) -> dict[int, float]:
    """By seed."""
    arm, _, kept = name.partition(":")
    split = f"validation_{kept}" if kept else "validation"
    return {record["seed"]: mean_loss(record, split) for record in by_arm[arm]}


def effect(
    variant: str, baseline: str, results: Results, by_arm: ByArm, corpus: str
) -> Effect | None:
    """The test loss of a variant minus that of its baseline; None without seeds in common."""
    if any(name.partition(":")[0] not in by_arm for name in (variant, baseline)):
        return None
    domains = contrast({variant: 1.0, baseline: -1.0}, by_arm, results, SPLIT, corpus=corpus)
    return paired_effect(domains) if domains else None


def parent_lines(results: Results, by_arm: ByArm) -> list[str]:
    """Whether the parents repeat the study's runs of `lory`, which had the same settings."""
    distances = []
    for record in by_arm.get(sparse_arms.SPARSE_PARENT, []):
        earlier = next((r for r in by_arm.get("lory", []) if r["seed"] == record["seed"]), None)
        if earlier is not None:
            pairs = [results.instances(r["id"], SPLIT) for r in (record, earlier)]
            distances += [float(np.abs(x - pairs[1][d]).max()) for d, x in pairs[0].items()]
    if not distances:
        return []
    largest = max(distances)
    return [
        f"The parents were trained like `lory` of [the study](study.md) with the same seeds: the "
        f"largest difference of the loss of any test instance is {largest:.2g} nats. Losses are "
        "stored with 11 bits, so their steps are 0.0039 from 4 nats on."
    ]


def _figures(found: Effect | None) -> str:
    if found is None:
        return ""
    if np.isnan(found.low):
        return f"{found.mean:+.4f} (one seed)"
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}; {found.seeds} seeds)"


def _is_met(found: Effect | None, aim: float) -> str:
    """Whether the whole interval is at most the aim, or above it; "open" if the aim lies in it."""
    if found is None:
        return "no figure"
    if found.high <= aim:
        return "yes"
    return "no" if found.low > aim else "open"


if __name__ == "__main__":
    main()
