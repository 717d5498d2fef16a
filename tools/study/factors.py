"""Stage B: what the dense warm-up, the router's start and the learning rate do to Lory together.

Each has two values, and all eight combinations are trained. The effect of a factor is the loss at
its higher value minus that at its lower one, the mean over the values of the other two. Two factors
interact by how much the effect of one differs between the higher and the lower value of the other.
"""

import itertools

from tools.study.arms import ARMS, FACTORS, RATE, WARMUP, factors_name
from tools.study.claims import contrast, diverged_runs, finished_runs
from tools.study.results import Results
from tools.study.statistics import Effect, paired_effect

WORDS = {
    WARMUP: "dense warm-up of {1:.0%} instead of {0:.0%} of the steps",
    "model.router_init_scale": "router started at {1:g} instead of {0:g}",
    RATE: "learning rate of {1:g} instead of {0:g}",
}
SHORT = {WARMUP: "warm-up", "model.router_init_scale": "router", RATE: "learning rate"}


def weights_of(factors: tuple[str, ...]) -> dict[str, float]:
    """The contrast of a factor, or of the interaction of two."""
    weights = {}
    for values in itertools.product(*FACTORS.values()):
        value_of = dict(zip(FACTORS, values, strict=True))
        sign = 1
        for name in factors:
            sign *= 1 if value_of[name] == max(FACTORS[name]) else -1
        weights[factors_name(*values)] = sign * 2 ** len(factors) / 8
    return weights


def unfinished(results: Results) -> tuple[list[str], list[str]]:
    """The combinations that lack runs, and those with a run that diverged."""
    by_arm, lost = finished_runs(results), diverged_runs(results)
    planned = {arm.name: arm.seeds for arm in ARMS if arm.stage == "B"}
    diverged = [name for name in planned if name in lost]
    missing = [
        name
        for name, seeds in planned.items()
        if name not in lost and len(by_arm.get(name, [])) < seeds
    ]
    return missing, diverged


def effects(results: Results, split: str) -> dict[str, Effect]:
    """Every effect and interaction in words; empty until all combinations have all their seeds."""
    if any(unfinished(results)):
        return {}
    by_arm = finished_runs(results)
    found = {}
    mains = [(name,) for name in FACTORS]
    for factors in (*mains, *itertools.combinations(FACTORS, 2)):
        domains = contrast(weights_of(factors), by_arm, results, split)
        if not domains:
            return {}
        if len(factors) == 1:
            (name,) = factors
            words = WORDS[name].format(*FACTORS[name])
        else:
            words = "interaction of " + " and ".join(SHORT[name] for name in factors)
        found[words] = paired_effect(domains)
    return found
