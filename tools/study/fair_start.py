"""Checks that the dense baseline is well started: no neighbour of its settings is much better.

    python -m tools.study.fair_start [--out=docs/study]

The neighbours halve or double the start of the FFN or the learning rate, at full length. Each is
compared with the runs of the baseline that have its seeds. Exit status 1 if one of them has a mean
validation loss lower by more than the margin, or is missing.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.study.results import FIRST_CORPUS, Results, mean_loss

BASE = "dense"
NEIGHBOURS = tuple(
    f"{BASE}_{what}_{word}" for what in ("rate", "start") for word in ("halved", "doubled")
)
MARGIN = 0.01  # nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/study"))
    found = differences(Results(parser.parse_args().out / "runs"))
    for name in NEIGHBOURS:
        difference, seeds = found.get(name, (math.nan, 0))
        text = f"{difference:+.4f} nats ({seeds} seed{'s' if seeds > 1 else ''})"
        print(f"{name:22} {text if seeds else 'no runs yet'}")
    if {*found} != {*NEIGHBOURS} or min(difference for difference, _ in found.values()) < -MARGIN:
        sys.exit(f"the dense baseline is not shown to be within {MARGIN} nats of its neighbours")


def differences(
    results: Results,
    corpus: str = FIRST_CORPUS,
    base: str = BASE,
    neighbours: Sequence[str] = NEIGHBOURS,
) -> dict[str, tuple[float, int]]:
    """Validation loss of every neighbour minus that of the base, and over how many seeds.

    Infinite for a neighbour that diverged.
    """
    losses: dict[str, dict[int, float]] = {}
    for record in results.records(corpus):
        if record["kind"] == "run":
            losses.setdefault(record["arm"], {})[record["seed"]] = mean_loss(record)
    found = {}
    for name in neighbours:
        pairs = [
            loss - losses[base][seed]
            for seed, loss in losses.get(name, {}).items()
            if seed in losses.get(base, {})
        ]
        if pairs:
            found[name] = statistics.mean(pairs), len(pairs)
    return found


if __name__ == "__main__":
    main()
