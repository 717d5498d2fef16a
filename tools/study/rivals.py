"""Writes into docs/baselines.md how the study's arms compare with the dense model and with Lory.

python -m tools.study.rivals [--out=docs/study]
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tools import tables
from tools.study import arms
from tools.study.claims import ByArm, contrast, diverged_runs, finished_runs, mean_of
from tools.study.report import OUT, ROOT
from tools.study.results import FIRST_CORPUS, SECOND_CORPUS, Results
from tools.study.statistics import paired_effect

PAGE = ROOT / "docs" / "baselines.md"
MARK = "tools/study/rivals.py"
DENSE, LORY = "dense", "lory"
HEADER = ["arm", "against dense", "against Lory", "seeds", "FLOPs", "parameters", "seconds"]
# Arms that train for as many steps on the same tokens; the first is what the others are divided by.
SHOWN = (
    *(LORY, "lory_redrawn", "lory_scratch", "prefix", "uniform"),
    *("expert_choice_segment", "expert_choice_token", "dropless_top1", "dropless_top2"),
    "dropless_top2_fine",
    *("dropless_top1_upcycled", "dropless_top2_upcycled"),
    *("remoe", "remoe_upcycled", "expert_threshold", "expert_threshold_upcycled"),
    "dense_total",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the results of the study")
    write_page(parser.parse_args().out)


def write_page(out: Path, page: Path = PAGE) -> None:
    """Writes the table between the marks of the page."""
    path = out / arms.STEP_SECONDS_FILES["A"].name
    seconds = json.loads(path.read_text("utf-8"))["over_base"] if path.is_file() else {}
    tables.replace_marked(page, MARK, text(Results(out / "runs"), seconds))


def text(results: Results, seconds: Mapping[str, float]) -> str:
    """A table of the arms with runs for each corpus, and the names of the others."""
    parts, missing = table(results, seconds, FIRST_CORPUS)
    again, _ = table(results, seconds, SECOND_CORPUS)
    if missing:
        parts.append(f"Without runs so far: {', '.join(missing)}.")
    parts += ["On the second corpus:", *again] if again else []
    for corpus in (FIRST_CORPUS, SECOND_CORPUS):
        lost = diverged_runs(results, corpus)
        ids = [run for arm in (DENSE, *SHOWN) for run in lost.get(arm, [])]
        parts += [f"Diverged, and left out: {', '.join(ids)}."] if ids else []
    return "\n\n".join(parts)


def table(
    results: Results, seconds: Mapping[str, float], corpus: str
) -> tuple[list[str], list[str]]:
    """The table of a corpus, nothing if there are no rows, and the arms without runs."""
    by_arm, lost = finished_runs(results, corpus), diverged_runs(results, corpus)
    rows, missing = [], []
    for name in SHOWN:
        if lost.keys() & {name, DENSE, LORY}:
            continue
        if name not in by_arm or DENSE not in by_arm or LORY not in by_arm:
            missing.append(name)
            continue
        effects = [_effect(name, base, by_arm, results, corpus) for base in (DENSE, LORY)]
        costs = [
            f"{mean_of(by_arm[name], cost) / mean_of(by_arm[LORY], cost):.2f}"
            for cost in ("flops_per_token", "parameters")
        ]
        costs.append(f"{seconds[name]:.2f}" if name in seconds else "")
        rows.append([name, *effects, str(len(by_arm[name])), *costs])
    return [tables.markdown(HEADER, rows)] if rows else [], missing


def _effect(name: str, base: str, by_arm: ByArm, results: Results, corpus: str) -> str:
    """The difference of the test losses with its interval, over the seeds that both have."""
    if name == base:
        return ""
    domains = contrast({name: 1.0, base: -1.0}, by_arm, results, "test", corpus=corpus)
    if not domains:
        return ""
    effect = paired_effect(domains)
    if np.isnan(effect.low):
        return f"{effect.mean:+.3f} (one seed)"
    return f"{effect.mean:+.3f} ({effect.low:+.3f} to {effect.high:+.3f})"


if __name__ == "__main__":
    main()
