"""Plans what is compared with Lory for a v5e-64: the baselines, and the variants beyond the paper.

    python tools/variant_plans.py [--again | --no_compile]

Compiles the plans that docs/plans lacks (with --again all of them, with --no_compile none), which
requires libtpu (requirements-plan.txt), and writes the tables between the marks in
docs/baselines.md and docs/beyond.md. Every row changes the recipe of 0.3B with 8 experts.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scaling import PLANS, compile_plan
from tables import ROOT, markdown, replace_marked, write

from lory_jax.model.routing_rules import SOURCES

MARK, TOPOLOGY = "tools/variant_plans.py", "v5e-64"
RECIPE, EXPERTS = "lory_0_3b", 8
BASE = "as in the paper"
ONE_DEVICE = "model.routing_group=4"  # sequences that one of the 64 devices holds
BASELINES = {
    "uniform": "model.routing=uniform",
    "expert_choice_segment": f"model.routing=expert_choice_segment,{ONE_DEVICE}",
    "expert_choice_token": f"model.routing=expert_choice_token,{ONE_DEVICE}",
    "top1": f"model.routing=top1,{ONE_DEVICE}",
    "top2": f"model.routing=top2,{ONE_DEVICE}",
    # Not the dropless ones: `plan` cannot price the compiler's own kernel for ragged products.
    "remoe": "model.routing=remoe",
    # With the shared expert of its paper, as in the study.
    "expert_threshold": f"model.routing=expert_threshold,{ONE_DEVICE},model.shared_expert=true,"
    "model.mlp_dim=1408,model.num_experts=15",
    "dense_total": "model.num_experts=0,model.mlp_dim=22528",
}
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

Plan = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="compile everything again")
    parser.add_argument("--no_compile", action="store_true", help="only write the tables")
    args = parser.parse_args()
    base = json.loads((PLANS / f"{RECIPE}_{EXPERTS}e_{TOPOLOGY}.json").read_text())
    for page, prefix, variants, reference, header in (
        ("beyond.md", "beyond", VARIANTS, base, "of the paper's"),
        ("baselines.md", "baseline", BASELINES, base["dense"], "of the dense model's"),
    ):
        plans = {BASE: base}
        for name, changes in variants.items():
            path = PLANS / f"{prefix}_{name}_{TOPOLOGY}.json"
            if (args.again or not path.exists()) and not args.no_compile:
                print(f"{name}: {changes}", flush=True)
                compile_to(path, changes)
            if path.exists():
                plans[f"`{changes}`"] = json.loads(path.read_text())
        replace_marked(ROOT / "docs" / page, MARK, table(plans, reference, header))


def compile_to(path: Path, changes: str) -> None:
    fields = tuple(f"--config.{change}" for change in changes.split(","))
    write(path, compile_plan(sys.executable, RECIPE, EXPERTS, TOPOLOGY, fields))


def table(plans: dict[str, Plan], reference: Plan, last: str) -> str:
    """Parameters, memory and cycles of every plan; the last column divides by the reference's."""
    of_reference = reference["estimate"]["repriced_cycles"]["total"]
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
                f"{cycles['expert_ffn'] / 1e6:,.0f}" if "expert_ffn" in cycles else "",
                f"{cycles['total'] / 1e6:,.0f}",
                f"{cycles['total'] / of_reference:.2f}",
            ]
        )
    header = ["changed", "parameters, B", "active, B", "GFLOP per token", "GiB per device"]
    return markdown([*header, "FFN, M cycles", "step, M cycles", last], rows)


if __name__ == "__main__":
    main()
