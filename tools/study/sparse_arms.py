"""The arms of the stage `sparse`: merges of few experts, against all eight after as many tokens.

The fall from eight experts to k takes the first half of a run, or of the finishing phase of a
finished run.
"""

import itertools
from dataclasses import replace
from typing import Any

from tools.study.kinds import RATE, STEPS, Arm

SPARSE_PARENT, SPARSE_COUNTS = "sparse_parent", (2, 1)
SPARSE_GRADIENTS = ("renormalised", "straight_through")
FINISH_STEPS, FINISH_RATES = STEPS // 10, (0.1, 0.3, 1.0)  # rates as multiples of the run's own
# Not repeated with other seeds: with seed 0, their validation loss was above that of the best
# variant of the same k and way, by 0.03 nats or more, or although they were tried last.
SETTLED = (
    "sparse_all_finish1",
    "sparse_k1_renormalised_finish0.1",
    "sparse_k1_renormalised_finish0.3",
    "sparse_k1_straight_through_annealed_early",
    "sparse_k1_straight_through_finish0.1",
    "sparse_k1_straight_through_finish0.3",
    "sparse_k2_renormalised_annealed_early",
    "sparse_k2_renormalised_finish0.1",
    "sparse_k2_renormalised_finish1",
    "sparse_k2_straight_through_annealed",
    "sparse_k2_straight_through_finish0.1",
    "sparse_k2_straight_through_finish0.3",
    "sparse_k2_straight_through_finish1",
)
# On the second corpus, what validation on the first chose (tools/study/sparse.py).
SPARSE_ON_DEBIAN = (
    SPARSE_PARENT,
    "sparse_all_finish0.1",
    "sparse_k1_renormalised_finish1",
    "sparse_k1_straight_through_annealed",
    "sparse_k2_renormalised_annealed",
    "sparse_k2_renormalised_finish0.3",
)


def sparse_settings(k: int, gradient: str) -> dict[str, Any]:
    """Settings of a run that ends with k experts in every merge."""
    return {"model.top_k_experts": k, "train.top_k_gradient": gradient}


def _sparse_arms() -> list[Arm]:
    parent = Arm(SPARSE_PARENT, "lory", measures=("top1", "top2"), keeps_run=True)
    annealed = [
        Arm(f"sparse_k{k}_{gradient}_annealed", "lory", sparse_settings(k, gradient), group=3)
        for k, gradient in itertools.product(SPARSE_COUNTS, SPARSE_GRADIENTS)
    ]
    # The better gradient of each, with the fall to k in the first quarter.
    annealed += [
        Arm(
            f"sparse_k{k}_{gradient}_annealed_early",
            "lory",
            {**sparse_settings(k, gradient), "train.top_k_anneal_end": 0.25},
            group=3,
        )
        for k, gradient in ((2, "renormalised"), (1, "straight_through"))
    ]
    kinds: dict[str, dict[str, Any]] = {"all": {}} | {
        f"k{k}_{gradient}": sparse_settings(k, gradient)
        for k, gradient in itertools.product(SPARSE_COUNTS, SPARSE_GRADIENTS)
    }
    finished = [
        Arm(
            f"sparse_{name}_finish{rate:g}",
            "lory",
            settings,
            {RATE: rate},
            steps=FINISH_STEPS,
            group=2,
            parents=(SPARSE_PARENT,),
        )
        for (name, settings), rate in itertools.product(kinds.items(), FINISH_RATES)
    ]
    return [
        replace(arm, stage="sparse", seeds=1 if arm.name in SETTLED else 3, cost=1.15)
        for arm in (parent, *finished, *annealed)
    ]


SPARSE_ARMS = _sparse_arms()
SPARSE_ARMS_ON_DEBIAN = [
    replace(arm, corpus="debian", group=arm.group + 3)
    for arm in SPARSE_ARMS
    if arm.name in SPARSE_ON_DEBIAN
]
