"""Writes the figures of finished local runs to where the README shows them.

    bash launch/local.sh
    for seed in 1 2 3; do bash launch/local.sh --seed=$seed --out=runs/local-$seed; done
    python -m tools.local [--run=runs/local] [--more=runs/local-1,runs/local-2,runs/local-3]

Writes docs/local.json (the first run's report without its texts, with the date, the processor and
the difference over all seeds), docs/local.png and the table of the README.
"""

import argparse
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.data.prepared import PreparedData
from lory_jax.evaluation.held_out import read_instances
from lory_jax.report import plots
from tools.study.audit import HIGH, audit
from tools.study.statistics import Domain, Effect, paired_effect
from tools.tables import ROOT, markdown, replace_marked, write

FIGURES = ROOT / "docs" / "local.json"
LEFT_OUT = ("samples", "routing_distance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "local")
    parser.add_argument(
        "--more", type=lambda text: [Path(name) for name in text.split(",")], default=[]
    )
    args = parser.parse_args()
    run = args.run
    report = json.loads((run / "report.json").read_text("utf-8"))
    figures = {name: value for name, value in report.items() if name not in LEFT_OUT}
    figures |= {"date": datetime.date.today().isoformat(), "processor": processor()}
    figures["over_seeds"] = over_seeds([run, *args.more], near_duplicates(run / "data"))
    write(FIGURES, json.dumps(figures, indent=1) + "\n")
    plots.write_png(plots.perplexity_change(report["perplexity"]), ROOT / "docs" / "local.png")
    replace_marked(
        ROOT / "README.md",
        "tools/local.py",
        perplexity_table(figures) + "\n\n" + summary_line(figures),
    )


def near_duplicates(data: Path) -> dict[str, np.ndarray]:
    """Which test instances repeat training text, by domain (tools/study/audit.py)."""
    overlap = audit(PreparedData.open(data))["overlap"]["test"]
    return {domain: np.array(shares) >= HIGH for domain, shares in overlap.items()}


def over_seeds(runs: Sequence[Path], is_near: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Lory's test loss minus the dense model's in nats, with the study's interval.

    The mean of the domains, over positions >= T; a run for each seed, on the same documents. Also
    without the domain whose gain is the largest, and without the instances that `is_near` says.
    """
    found = {name: [instances(run / name) for run in runs] for name in NAMES}
    domains = {}
    names = sorted({name for origins in found["lory"][0][1].values() for name in origins})
    numbers = {name: number for number, name in enumerate(names)}
    for domain, origins in found["lory"][0][1].items():
        if any(of_run[1][domain] != origins for name in NAMES for of_run in found[name]):
            raise SystemExit(f"{domain}: the runs were evaluated on different documents")
        lory, dense = (
            np.stack([losses[domain] for losses, _ in found[n]]) for n in ("lory", "dense")
        )
        domains[domain] = Domain(lory - dense, np.array([numbers[origin] for origin in origins]))
    effect = paired_effect(domains)
    largest = min(domains, key=lambda name: domains[name].difference_SxI.mean())
    rest = {name: domain for name, domain in domains.items() if name != largest}
    new = {
        name: Domain(domain.difference_SxI[:, ~is_near[name]], domain.origin_I[~is_near[name]])
        for name, domain in domains.items()
        if not is_near[name].all()
    }
    of_seeds = np.mean([d.difference_SxI.mean(axis=1) for d in domains.values()], axis=0)
    return {
        "seeds": effect.seeds,
        **_of_effect(effect),
        "by_seed": of_seeds.tolist(),
        "without_largest": {"domain": largest, **_of_effect(paired_effect(rest))},
        "without_near_duplicates": _of_effect(paired_effect(new)),
    }


def _of_effect(effect: Effect) -> dict[str, Any]:
    interval = None if effect.seeds < 2 else [effect.low, effect.high]
    return {"effect": effect.mean, "interval": interval}


def instances(workdir: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """The loss and the origin of every test instance that a run was evaluated on, by domain."""
    losses, origins = read_instances(workdir / "evaluation_instances.npz")
    return losses, origins


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
        f"{seeds_sentence(figures['over_seeds'])}Perplexity counts the positions from T on, and "
        f"its means are geometric. Training of {steps:,} steps took {seconds[0]:.1f} (dense) and "
        f"{seconds[1]:.1f} minutes (Lory), side by side on {cores} cores "
        f"({figures['processor']}), {figures['date']}."
    )


def seeds_sentence(found: dict[str, Any]) -> str:
    """The change of perplexity over several seeds; nothing for one."""
    if found["seeds"] < 2:
        return ""
    by_seed = [100 * (1 - math.exp(nats)) for nats in found["by_seed"]]
    rest, new = found["without_largest"], found["without_near_duplicates"]
    low, high = found["interval"]
    no_gain = ", so it includes zero" if low < 0 < high else ""
    return (
        f"Over {found['seeds']} seeds, of which the table shows the first, Lory's perplexity is "
        f"{_change(found['effect'])} than the dense model's; single seeds give {min(by_seed):.1f} "
        f"to {max(by_seed):.1f} %. The 95 % interval reaches {_range(found)}{no_gain}: it also "
        "covers the choice of test documents, which come from few folders. Without "
        f"{rest['domain']}, where the gain is largest, it is {_change(rest['effect'])} "
        f"({_range(rest)}), and without the test instances that repeat training text "
        f"{_change(new['effect'])} ({_range(new)}). "
    )


def _range(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"from {_change(low)} to {_change(high)}"


def _change(nats: float) -> str:
    percent = 100 * (1 - math.exp(nats))
    return f"{abs(percent):.1f} % {'lower' if percent > 0 else 'higher'}"


if __name__ == "__main__":
    main()
