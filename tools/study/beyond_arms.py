"""The arms beyond the paper, most of them one change to the recipe that redraws its experts."""

from typing import Any

from lory_jax.model.routing_rules import SOURCES
from tools.study.kinds import RATE, STEPS, Arm

BEYOND_BASE = "lory_redrawn"
SOURCE, LAYERS, RANK = "model.routing_source", "model.expert_layers", "model.expert_rank"
SCHEDULE, DELTAS, EXPERTS = "train.segment_schedule", "model.token_deltas", "model.num_experts"
SHARED, WIDTH, REDRAW = "model.shared_expert", "model.mlp_dim", "train.upcycle_redraw"
DOMAINS = ("headers", "prose", "python", "stubs")
DELTAS_OVER_BASE = 1.117  # FLOPs of a token with eight deltas, by lory_jax.model.flops
GROWN_REDRAW = 0.25  # copies made in the middle of a run have learnt more than those of a warm-up


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
    # 2 dense FFNs and 2 x 15 experts are as many parameters as 4 x 8 experts.
    _arm("layers_upper_half", {LAYERS: "upper_half", EXPERTS: 15}, 1.2),
    _arm("layers_every_second", {LAYERS: "every_second", EXPERTS: 15}, 1.2),
    _arm("layers_upper_half_e8", {LAYERS: "upper_half"}, 1.1),
    # Half of each active FFN is shared, and half is merged from 15: as many parameters again.
    _arm("shared_half", {SHARED: True, WIDTH: 44, EXPERTS: 15}, 1.2),
    # Rank 1 costs the FLOPs of merging; 32 experts of rank 4 have nearly its parameters.
    *(_arm(f"rank_{rank}", {RANK: rank}, 1.2) for rank in (1, 4)),
    _arm("rank_4_e32", {RANK: 4, EXPERTS: 32}, 1.8),
    _arm("schedule_t128_t64", {SCHEDULE: "128:0.25,64:0.5"}, 1.1),
    _arm("deltas_8", {DELTAS: 8}, 1.5),
    # What tokens pick, without what segments merge; and what segments merge, for as many FLOPs.
    _arm("deltas_8_dense", {DELTAS: 8}, 1.3, family="dense"),
    _arm("longer", {}, 1.15, steps=round(STEPS * DELTAS_OVER_BASE)),
    # The same with a narrower FFN, which has the recipe's FLOPs and parameters; and without what
    # segments merge, with a wider FFN, which has the FLOPs of deltas_8.
    _arm("deltas_8_narrow", {DELTAS: 8, WIDTH: 63, EXPERTS: 11}, 1.5),
    _arm("deltas_8_dense_wide", {DELTAS: 8, WIDTH: 104}, 1.4, family="dense"),
    # Not tuned like the recipe: is its learning rate a good one for other parameters?
    *(
        _arm(f"{name}_rate_{word}", settings, 1.3, seeds=1, factors={RATE: factor})
        for name, settings in (("rank_4", {RANK: 4}), ("deltas_8", {DELTAS: 8}))
        for word, factor in (("halved", 0.5), ("doubled", 2.0))
    ),
]

# Growth: half of the steps with four experts, then eight: those, and a partly redrawn copy of each.
# The control has eight in both halves, because a run that starts again warms up and decays twice.
for name, first in (("grown", 4), ("restarted", 8)):
    start, half = f"{name}_start", STEPS // 2
    BEYOND_ARMS += [
        _arm(start, {EXPERTS: first}, 1.15, steps=half, keeps_run=True),
        _arm(
            name,
            {EXPERTS: 8, REDRAW: GROWN_REDRAW},
            1.15,
            group=6,
            steps=half,
            parents=(start,),
            reads_on=1,
        ),
    ]

# Branches: a dense start, one dense branch for each domain, and all of them as the experts of one
# model; as many steps in all as every other arm. The control goes on as one dense model, which
# reads the domains as often as the branches do, and is copied to as many experts.
BRANCHES = tuple(f"branches_{domain}" for domain in DOMAINS)
_TRUNK = "unbranched_dense"


def _dense_branch(name: str, mixture: str, steps: int) -> Arm:
    settings = {EXPERTS: 0, "data.mixture": mixture}
    parents = ("branches_start",)
    return _arm(
        name, settings, 1.0, group=6, steps=steps, parents=parents, reads_on=1, keeps_run=True
    )


BEYOND_ARMS += [
    _arm("branches_start", {EXPERTS: 0}, 1.0, steps=500, keeps_run=True),
    *(
        _dense_branch(name, f"{domain}=1", 150)
        for name, domain in zip(BRANCHES, DOMAINS, strict=True)
    ),
    _dense_branch(_TRUNK, ",".join(f"{domain}=1" for domain in DOMAINS), 150 * len(DOMAINS)),
    *(
        _arm(
            name,
            {EXPERTS: len(DOMAINS), **more},
            1.1,
            group=7,
            steps=400,
            parents=parents,
            reads_on=2,
        )
        # Nothing is redrawn where branches become experts, so nothing is in their control.
        for name, parents, more in (
            ("branches", BRANCHES, {}),
            ("unbranched", (_TRUNK,), {REDRAW: 0.0}),
        )
    ),
]

# What tells an arm's idea from what else sets it apart from the recipe.
CONTROLS = (
    ("grown", "restarted"),
    ("branches", "unbranched"),
    ("deltas_8", "longer"),
    ("deltas_8", "deltas_8_dense"),
    ("deltas_8", "deltas_8_dense_wide"),
    ("deltas_8_dense", "dense"),
)
