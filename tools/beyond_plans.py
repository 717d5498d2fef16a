"""Plans the variants of docs/beyond.md for a v5e-64, and writes their table.

    python tools/beyond_plans.py [--again | --no_compile]

Compiles the plans that docs/plans lacks (with --again all of them, with --no_compile none), which
requires libtpu (requirements-plan.txt), and writes the table between the marks in docs/beyond.md.
Every variant changes the recipe of 0.3B with 8 experts.
"""

import argparse
import json
import sys
from typing import Any

from scaling import PLANS, compile_plan
from tables import ROOT, markdown, replace_marked, write

from lory_jax.model.routing_rules import SOURCES

PAGE, TOPOLOGY = ROOT / "docs" / "beyond.md", "v5e-64"
RECIPE, EXPERTS = "lory_0_3b", 8
BASE = "as in the paper"
VARIANTS = {
    **{f"source_{name}": f"model.routing_source={name}" for name in SOURCES if name != "last"},
    # As many parameters as with 8 experts everywhere, as in the study.
    "upper_half": "model.expert_layers=upper_half,model.num_experts=15",
    "every_second": "model.expert_layers=every_second,model.num_experts=15",
    "shared_half": "model.shared_expert=true,model.mlp_dim=1408,model.num_experts=15",
    "upper_half_8": "model.expert_layers=upper_half",
    # The study's rank 1 and 4 for D = 32, as shares of D.
    "rank_32": "model.expert_rank=32",
    "rank_128": "model.expert_rank=128",
    "deltas_8": "model.token_deltas=8",
    "t1024": "model.segment_length=1024",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="compile everything again")
    parser.add_argument("--no_compile", action="store_true", help="only write the table")
    args = parser.parse_args()
    plans = {BASE: json.loads((PLANS / f"{RECIPE}_{EXPERTS}e_{TOPOLOGY}.json").read_text())}
    for name, changes in VARIANTS.items():
        path = PLANS / f"beyond_{name}_{TOPOLOGY}.json"
        if (args.again or not path.exists()) and not args.no_compile:
            print(f"{name}: {changes}", flush=True)
            fields = tuple(f"--config.{change}" for change in changes.split(","))
            write(path, compile_plan(sys.executable, RECIPE, EXPERTS, TOPOLOGY, fields))
        if path.exists():
            plans[f"`{changes}`"] = json.loads(path.read_text())
    replace_marked(PAGE, "tools/beyond_plans.py", table(plans))


def table(plans: dict[str, dict[str, Any]]) -> str:
    """Parameters, memory and cycles of every plan; the last column divides by the first plan's."""
    first = plans[BASE]["estimate"]["repriced_cycles"]["total"]
    rows = []
    for name, plan in plans.items():
        cycles = plan["estimate"]["repriced_cycles"]
        rows.append(
            [
                name,
                f"{plan['parameters']['total'] / 1e9:.2f}",
                f"{plan['parameters']['active'] / 1e9:.2f}",
                f"{plan['flops_per_token'] / 1e9:.2f}",
                f"{plan['bytes_per_device']['total'] / 2**30:.2f}",
                f"{cycles['expert_ffn'] / 1e6:,.0f}",
                f"{cycles['total'] / 1e6:,.0f}",
                f"{cycles['total'] / first:.2f}",
            ]
        )
    header = ["changed", "parameters, B", "active, B", "GFLOP per token", "GiB per device"]
    return markdown([*header, "FFN, M cycles", "step, M cycles", "of the paper's"], rows)


if __name__ == "__main__":
    main()
