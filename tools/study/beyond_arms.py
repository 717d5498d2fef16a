"""The arms beyond the paper, most of them one change to the recipe that redraws its experts."""

from typing import Any

from lory_jax.model.routing_rules import EXPERT_LAYERS, SOURCES
from tools.study.kinds import STEPS, Arm

BEYOND_BASE = "lory_redrawn"
SOURCE, LAYERS, RANK = "model.routing_source", "model.expert_layers", "model.expert_rank"
SCHEDULE, DELTAS, EXPERTS = "train.segment_schedule", "model.token_deltas", "model.num_experts"
SHARED, WIDTH = "model.shared_expert", "model.mlp_dim"
DOMAINS = ("headers", "prose", "python", "stubs")


def _arm(
    name: str,
    settings: dict[str, Any],
    cost: float,
    family: str = BEYOND_BASE,
    group: int = 5,
    **more: Any,
) -> Arm:
    return Arm(name, family, settings, stage="beyond", group=group, cost=cost, **more)


BEYOND_ARMS = [
    *(_arm(f"source_{name}", {SOURCE: name}, 1.15) for name in SOURCES if name != "last"),
    *(_arm(f"layers_{name}", {LAYERS: name}, 1.1) for name in EXPERT_LAYERS if name != "all"),
    *(_arm(f"rank_{rank}", {RANK: rank}, 1.3) for rank in (4, 8)),
    # As many parameters as 8 full experts, nearly: 6.5 FFNs.
    _arm("rank_4_e32", {RANK: 4, EXPERTS: 32}, 1.8),
    _arm("schedule_t64", {SCHEDULE: "64:0.5"}, 1.1),
    _arm("schedule_t128_t64", {SCHEDULE: "128:0.25,64:0.5"}, 1.1),
    *(_arm(f"deltas_{k}", {DELTAS: k}, 1.5) for k in (4, 8)),
    # What tokens pick, without what segments merge.
    _arm("deltas_8_dense", {DELTAS: 8}, 1.3, family="dense"),
    # As many active parameters and FLOPs: half of each FFN is shared, and half is merged.
    _arm("shared_half", {SHARED: True, WIDTH: 44}, 1.15),
]

# Growth: half of the steps with four experts, then eight: those, and a partly redrawn copy of each.
# The control has eight in both halves, because a run that starts again warms up and decays twice.
for name, first in (("grown", 4), ("restarted", 8)):
    start, half = f"{name}_start", STEPS // 2
    BEYOND_ARMS += [
        _arm(start, {EXPERTS: first}, 1.15, steps=half, keeps_run=True),
        _arm(name, {EXPERTS: 8}, 1.15, group=6, steps=half, parents=(start,), reads_on=True),
    ]

# Branches: a dense start, one dense branch for each domain, and all of them as the experts of one
# model; as many steps in all as every other arm.
BRANCHES = tuple(f"branches_{domain}" for domain in DOMAINS)
BEYOND_ARMS += [
    _arm("branches_start", {EXPERTS: 0}, 1.0, steps=500, keeps_run=True),
    *(
        _arm(
            branch,
            {EXPERTS: 0, "data.mixture": f"{domain}=1"},
            1.0,
            group=6,
            steps=150,
            parents=("branches_start",),
            reads_on=True,
            keeps_run=True,
        )
        for branch, domain in zip(BRANCHES, DOMAINS, strict=True)
    ),
    _arm(
        "branches",
        {EXPERTS: len(DOMAINS)},
        1.1,
        group=7,
        steps=400,
        parents=BRANCHES,
        reads_on=True,
    ),
]
