"""The best arms beyond the paper, tried again where they were not chosen.

They are chosen by validation on the first corpus, with the first seeds. Then they are trained with
other seeds and judged on the confirmation set, on a second corpus, and at twice the width with the
learning rate that is tuned for the dense model there. The recipe that they change is, too.

Arms that change the recipe in one run can be chosen, and neither those that are made of several
runs nor the controls.
"""

from collections.abc import Sequence
from dataclasses import replace

from tools.study.beyond_arms import BEYOND_ARMS, BEYOND_BASE, CONTROLS, EXPERTS, RANK, REDRAW, WIDTH
from tools.study.kinds import Arm, shape_of_width

FINALISTS = ("deltas_8", "source_average", "source_attention")  # by beyond.ranking
NUMBER = 3
CHOOSING_SEEDS, SEEDS_AGAIN, ALL_SEEDS = 4, 3, 10
ADDED_LATER = ("deltas_8_narrow",)  # after the finalists had been chosen
WIDER, TIMES = 64, 2  # times the study's width
BASE_WIDER = {EXPERTS: 8, "model.ffn_init_scale": 0.354, REDRAW: 0.75}  # as tuned for the recipe
CANDIDATES = tuple(
    arm.name
    for arm in BEYOND_ARMS
    if arm.family == BEYOND_BASE
    and arm.seeds == CHOOSING_SEEDS
    and not (arm.parents or arm.keeps_run or arm.factors)
    and arm.name not in {*ADDED_LATER, *(control for _, control in CONTROLS)}
)


def arms_again(finalists: Sequence[str] = FINALISTS) -> list[Arm]:
    """What the stage trains once the finalists are named.

    Raises:
      ValueError: a name is none of `CANDIDATES`, whose runs can be repeated elsewhere.
    """
    unfit = [name for name in finalists if name not in CANDIDATES]
    if unfit:
        raise ValueError(f"finalists: got {', '.join(unfit)}, must be of {', '.join(CANDIDATES)}")
    chosen = [arm for arm in BEYOND_ARMS if arm.name in finalists]
    if not chosen:
        return []
    base = Arm(BEYOND_BASE, BEYOND_BASE, cost=1.15)
    return [
        *(replace(arm, corpus="debian", seeds=SEEDS_AGAIN, group=8) for arm in chosen),
        *(_wider(arm) for arm in (base, *chosen)),
    ]


def with_all_seeds(arms: Sequence[Arm], finalists: Sequence[str] = FINALISTS) -> list[Arm]:
    """The arms of the stage, in which finalists have seeds that did not choose them."""
    return [replace(arm, seeds=ALL_SEEDS) if arm.name in finalists else arm for arm in arms]


def wider_name(name: str) -> str:
    return f"{name}_d{WIDER}"


def _wider(arm: Arm) -> Arm:
    """An arm at twice the width; what it says about widths and ranks is doubled, too."""
    doubled = {name: TIMES * value for name, value in arm.settings.items() if name in (WIDTH, RANK)}
    return Arm(
        wider_name(arm.name),
        f"dense_d{WIDER}",
        {**BASE_WIDER, **shape_of_width(WIDER), **arm.settings, **doubled},
        stage="beyond",
        seeds=SEEDS_AGAIN,
        steps=arm.steps,
        group=9,
        cost=1.7 * arm.cost,
    )
