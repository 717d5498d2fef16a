"""Checks that the dense baseline is well started: no neighbour of its settings is much better.

    python -m tools.study.fair_start [--out=docs/study]

The neighbours halve or double the start of the FFN or the learning rate, at full length. Exit
status 1 if one of them has a validation loss lower by more than the margin, or is missing.
"""

import argparse
import math
import sys
from pathlib import Path

from tools.study.results import Results, mean_loss

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
        print(f"{name:22} {f'{found[name]:+.4f} nats' if name in found else 'not trained yet'}")
    if set(found) != set(NEIGHBOURS) or min(found.values()) < -MARGIN:
        sys.exit(f"the dense baseline is not shown to be within {MARGIN} nats of its neighbours")


def differences(results: Results) -> dict[str, float]:
    """Validation loss of every neighbour that was trained minus that of the baseline, seed 0.

    Infinite for a neighbour that diverged.
    """
    base = results.read(f"{BASE}-s0")
    if base is None or math.isinf(mean_loss(base)):
        return {}
    records = {name: results.read(f"{name}-s0") for name in NEIGHBOURS}
    return {
        name: mean_loss(record) - mean_loss(base)
        for name, record in records.items()
        if record is not None
    }


if __name__ == "__main__":
    main()
