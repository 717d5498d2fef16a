"""What the study trains: its families of trials, and its arms (tools/study/kinds.py)."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

from tools.study.beyond_again import arms_again, with_all_seeds
from tools.study.beyond_arms import BEYOND_ARMS
from tools.study.kinds import RATE, STEPS, Arm, Family, shape_of_width
from tools.study.sparse_arms import SPARSE_ARMS, SPARSE_ARMS_ON_DEBIAN

FLOPS_OVER_DENSE = 1.064  # of a token in Lory with 8 experts, by lory_jax.model.flops
TRIALS = 12  # of every family
# Of the best short trial's learning rate, at full length; further out where the end was best.
LONG_FACTORS, END_FACTORS = (1.0, 0.5, 0.25), (2.0, 0.125)
COMMON = {
    "train.validate_every_steps": 500,
    "train.validation_batches": 16,
    "checkpoint.every_steps": 250,
    "checkpoint.keep": 1,
}

START, EXPERT_START = "model.ffn_init_scale", "model.expert_init_scale"
REWARM = "train.upcycle_rewarm_fraction"
REDRAW, WARMUP = "train.upcycle_redraw", "train.dense_warmup_fraction"
ROUTING, EXPERTS = "model.routing", "model.num_experts"

RATES = (8e-3, 1.6e-2, 2.4e-2, 3.2e-2)
# Independent experts under uniform weights merge to 1/sqrt(8) of a dense FFN: 0.354 is that.
STARTS = (1.0, 0.354, 0.1)
EXPERT_STARTS = (2.828, 1.0, 0.354)
# Gates that are no probabilities are larger, and want a smaller start.
GATED_STARTS = (1.0, 0.354, 0.1)


def expert_cost(experts: int) -> float:
    """How a step grows with merged experts: a guess, for the order of runs and the time left."""
    return 1.0 + experts / 60


SCRATCH = {WARMUP: 0.0}
FROM_SCRATCH = {RATE: RATES, EXPERT_START: EXPERT_STARTS}
GATED_FROM_SCRATCH = {RATE: RATES, EXPERT_START: GATED_STARTS}
# As in the paper of Expert Threshold: half of the active width is shared, and experts are half as
# wide. As many parameters as 8 experts, and nearly as many active ones.
THRESHOLD_SHAPE = {EXPERTS: 15, "model.mlp_dim": 44, "model.shared_expert": True, START: 0.1}
FAMILIES = [
    Family("dense", {EXPERTS: 0}, {RATE: RATES, START: STARTS}, group=0),
    Family("lory", {EXPERTS: 8}, {RATE: RATES, START: STARTS}, group=0, cost=1.15),
    Family(
        "lory_redrawn",
        {EXPERTS: 8, START: 0.354},
        {RATE: RATES, REDRAW: (0.25, 0.5, 0.75)},
        group=0,
        cost=1.15,
    ),
    Family("lory_scratch", {EXPERTS: 8, **SCRATCH}, FROM_SCRATCH, group=1, cost=1.15),
]
FAMILIES += [
    Family(name, {EXPERTS: 8, **SCRATCH, ROUTING: name}, FROM_SCRATCH, group=2, cost=cost)
    for name, cost in (("expert_choice_segment", 1.2), ("expert_choice_token", 1.2))
]
FAMILIES += [
    Family(
        name,
        {EXPERTS: 8, **SCRATCH, ROUTING: name, **more},
        grid,
        group=group,
        cost=cost,
    )
    for name, more, grid, group, cost in (
        ("dropless_top1", {"model.balancing": "loss_free"}, FROM_SCRATCH, 3, 1.2),
        ("dropless_top2", {"model.balancing": "loss_free"}, FROM_SCRATCH, 3, 1.4),
        ("remoe", {}, GATED_FROM_SCRATCH, 5, 1.3),
        ("expert_threshold", THRESHOLD_SHAPE, GATED_FROM_SCRATCH, 5, 1.5),
    )
]
FAMILIES += [
    Family("uniform", {EXPERTS: 8, **SCRATCH, ROUTING: "uniform"}, FROM_SCRATCH, 3, cost=1.1),
    Family(
        "dense_total", {EXPERTS: 0, "model.mlp_dim": 704}, {RATE: RATES, START: STARTS}, 5, cost=3.5
    ),
]

ARMS = [
    Arm("dense", "dense", seeds=10, group=0),
    Arm("lory", "lory", seeds=10, group=0, cost=1.15, measures=("routing", "prompt")),
    Arm("lory_redrawn", "lory_redrawn", seeds=10, group=0, cost=1.15),
    # The fair start, checked at full length: none of these may be better than dense by the margin.
    # With one seed, the other starts were within noise of the margin: four decide.
    *(
        Arm(
            f"dense_{what}_{word}",
            "dense",
            factors={name: factor},
            seeds=4 if name == START else 1,
            group=1,
        )
        for what, name in (("rate", RATE), ("start", START))
        for word, factor in (("halved", 0.5), ("doubled", 2.0))
    ),
    # As many FLOPs in all as Lory, whose merging costs some in every step.
    Arm("dense_flops", "dense", steps=round(STEPS * FLOPS_OVER_DENSE)),
    Arm("lory_scratch", "lory_scratch", cost=1.15),
    Arm("dense_random", "dense", data="random"),
    Arm("lory_random", "lory", data="random", cost=1.15),
    # Fewer steps want a higher learning rate: validation prefers twice the rate for both (seed 0).
    *(
        Arm(
            f"lory_{word}{end}",
            "lory",
            factors=factors,
            seeds=seeds,
            steps=round(share * STEPS),
            cost=1.15,
        )
        for word, share in (("half", 0.5), ("three_quarters", 0.75))
        for end, factors, seeds in (
            ("", {}, 4),
            ("_rate_doubled", {RATE: 2.0}, 4),
            ("_rate_quadrupled", {RATE: 4.0}, 1),
        )
    ),
    *(
        Arm(f"lory_e{E}", "lory", {EXPERTS: E}, group=2, cost=expert_cost(E))
        for E in (2, 4, 16, 32)
    ),
    Arm("prefix", "lory", {ROUTING: "prefix"}, group=2),
    Arm("expert_choice_segment", "expert_choice_segment", group=2, cost=1.2),
    Arm("expert_choice_token", "expert_choice_token", group=2, cost=1.2),
    Arm("dropless_top1", "dropless_top1", group=3, cost=1.3),
    Arm("dropless_top2", "dropless_top2", group=3, cost=1.5),
    # Twice as many experts of half the width: top-2 at the FLOPs and parameters of top-1.
    Arm(
        "dropless_top2_fine",
        "dropless_top2",
        {EXPERTS: 16, "model.mlp_dim": 44},
        group=4,
        cost=1.5,
    ),
    *(
        Arm(f"{name}_upcycled", name, {WARMUP: 0.05, START: 0.354}, group=4, cost=1.5)
        for name in ("dropless_top1", "dropless_top2", "remoe", "expert_threshold")
    ),
    Arm("remoe", "remoe", group=5, cost=1.3),
    Arm("expert_threshold", "expert_threshold", group=5, cost=1.3),
    Arm("uniform", "uniform", group=3),
    Arm("dense_total", "dense_total", group=5, cost=3.5),
    Arm("dense_masked", "dense", {"model.document_mask": True}, group=4),
    Arm("lory_masked", "lory", {"model.document_mask": True}, group=4, cost=1.15),
    Arm("lory_rewarmed", "lory", {REWARM: 0.05}, group=4, cost=1.15),
    Arm("lory_warmup_1_percent", "lory", {WARMUP: 0.01}, group=4, cost=1.15),
    *(
        Arm(
            f"{name}_t{T}",
            "lory",
            {ROUTING: routing, "model.segment_length": T},
            group=4,
            seeds=4,
            cost=32 / T + 0.8 if name == "lory" else 1.0,
            first_position=128,
        )
        for name, routing, lengths in (
            ("lory", "causal", (16, 64, 128)),
            ("prefix", "prefix", (16, 64)),
        )
        for T in lengths
    ),
]

# At equal seconds: as many steps as the time of Lory's run allows (step_seconds.py).
SECONDS_ARMS = ("dropless_top1", "dropless_top2", "remoe")
STEP_SECONDS_FILES = {
    stage: Path(__file__).parents[2] / "docs" / "study" / f"step_seconds{suffix}.json"
    for stage, suffix in (("A", ""), ("beyond", "_beyond"))
}


def _seconds_arms() -> list[Arm]:
    """With the tuned learning rate, and with twice that rate where many steps are lost."""
    over_lory = json.loads(STEP_SECONDS_FILES["A"].read_text("utf-8"))["over_base"]
    by_name = {arm.name: arm for arm in ARMS}
    found = []
    for name in SECONDS_ARMS:
        steps = round(STEPS / over_lory[name])
        arm = replace(by_name[name], name=f"{name}_seconds", steps=steps, group=6)
        found.append(arm)
        if steps < 0.9 * STEPS:
            found.append(replace(arm, name=f"{arm.name}_rate_doubled", factors={RATE: 2.0}))
    return found


ARMS += _seconds_arms()

# Stage D: the main contrasts again, on a corpus that is not Python, with the settings tuned before.
ON_DEBIAN = (
    *("dense", "lory", "lory_redrawn", "dense_random", "lory_random", "lory_scratch", "prefix"),
    *("uniform", "dropless_top1", "dropless_top2", "remoe", "expert_threshold", "dense_flops"),
    # Dense's settings were tuned on the first corpus: are they good ones here?
    *("dense_rate_halved", "dense_rate_doubled", "dense_start_halved", "dense_start_doubled"),
)
ARMS += [
    replace(
        arm,
        stage="D",
        corpus="debian",
        seeds=1 if arm.factors else 3,
        measures=(),
        group=0 if arm.name.startswith("dense_") and arm.factors else arm.group,
    )
    for arm in ARMS
    if arm.name in ON_DEBIAN
]

# Stage B: dense warm-up, router and learning rate, two values each (tools/study/factors.py). The
# rates are half and twice the one that was tuned.
FACTORS = {WARMUP: (0.01, 0.05), "model.router_init_scale": (0.23, 1.0), RATE: (6e-3, 2.4e-2)}


def factors_name(warmup: float, router: float, rate: float) -> str:
    return f"b_warmup{warmup:g}_router{router:g}_rate{rate:g}"


ARMS += [
    Arm(
        factors_name(*values),
        "lory",
        dict(zip(FACTORS, values, strict=True)),
        stage="B",
        seeds=3,
        cost=1.15,
    )
    for values in itertools.product(*FACTORS.values())
]

# Stage C: the ladder. Learning rate and start are tuned per width on the dense model at 1,500
# steps; at half of the steps every model has twice the rate, which validation preferred for Lory at
# D = 32 (lory_half_rate_doubled). Runs that other stages make already are not made again.
LADDER_KNOWN = {
    (32, 0, 1500): "dense",
    (32, 2, 1500): "lory_e2",
    (32, 8, 1500): "lory",
    (32, 32, 1500): "lory_e32",
    (32, 8, 750): "lory_half_rate_doubled",
}
LADDER_EXPERTS = (0, 2, 8, 32)
LADDER_STEPS = (750, 1500)
LADDER_COST = {16: 0.7, 32: 1.0, 64: 1.7, 96: 2.8}
LADDER_RATES = {
    16: (1.6e-2, 2.4e-2, 3.2e-2, 4.8e-2),
    64: (4e-3, 8e-3, 1.2e-2, 1.6e-2),
    96: (4e-3, 8e-3, 1.2e-2, 1.6e-2),
}


FAMILIES += [
    Family(
        f"dense_d{D}",
        {EXPERTS: 0, **shape_of_width(D)},
        {RATE: rates, START: STARTS},
        group=1,
        cost=LADDER_COST[D],
        steps=400,
    )
    for D, rates in LADDER_RATES.items()
]

FAMILIES = [
    replace(family, long_factors=LONG_FACTORS, end_factors=END_FACTORS) for family in FAMILIES
]


def ladder_name(width: int, experts: int, steps: int) -> str:
    return LADDER_KNOWN.get((width, experts, steps), f"c_d{width}_e{experts}_{steps}")


def _ladder_arm(width: int, experts: int, steps: int) -> Arm:
    # The ends of the ladder carry the claim about size: they have seeds enough for an interval.
    is_end = width in (16, 96) and experts in (0, 32) and steps == LADDER_STEPS[1]
    return Arm(
        ladder_name(width, experts, steps),
        "dense" if width == 32 else f"dense_d{width}",
        {EXPERTS: experts, **shape_of_width(width)},
        factors={RATE: 2.0} if steps == LADDER_STEPS[0] else {},
        stage="C",
        seeds=3 if is_end else 1,
        steps=steps,
        group=LADDER_STEPS.index(steps) + 2,
        cost=LADDER_COST[width] * expert_cost(experts),
    )


LADDER_POINTS = tuple(itertools.product(LADDER_COST, LADDER_EXPERTS, LADDER_STEPS))
ARMS += [_ladder_arm(*point) for point in LADDER_POINTS if point not in LADDER_KNOWN]


def _beside(point: tuple[int, int, int], word: str, factor: float) -> Arm:
    arm = _ladder_arm(*point)
    rate = factor * arm.factors.get(RATE, 1.0)
    return replace(arm, name=f"{arm.name}_rate_{word}", factors={RATE: rate}, seeds=1)


# The rates were tuned on dense models at one horizon: are they good ones at the far ends?
LADDER_CHECKS = {
    ladder_name(*point): [_beside(point, word, factor) for word, factor in factors]
    for point, factors in {
        (16, 32, 1500): (("halved", 0.5), ("doubled", 2.0)),
        (96, 32, 1500): (("halved", 0.5), ("doubled", 2.0)),
        (32, 0, 750): (("halved", 0.5),),
    }.items()
}
ARMS += [arm for checks in LADDER_CHECKS.values() for arm in checks]

ARMS += [*with_all_seeds(BEYOND_ARMS), *arms_again(), *SPARSE_ARMS, *SPARSE_ARMS_ON_DEBIAN]
