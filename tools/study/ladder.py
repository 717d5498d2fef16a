"""The law that the ladder's losses follow, and how much Lory's experts are worth by it.

    L(N, E, D) = c(D) + a * N^-(alpha - gamma * ln E') * E'^-delta

N are the active parameters, embedding and head included; E' = max(E, 1); D the training tokens,
with a constant of its own for each of the two horizons, because two cannot tell c and b * D^-beta
apart. It is a reduced form of the joint law of Ludziejewski et al. (2025, arXiv 2502.05172):
experts act on the term of the model's size alone. gamma says whether the worth of experts shrinks
as the model grows. A Lory of N parameters is worth a dense model of m * N if both have the same
loss at the same D; m is its dense-equivalent parameter multiplier.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from tools.study.arms import LADDER_COST, LADDER_EXPERTS, LADDER_STEPS, ladder_name
from tools.study.results import Results, mean_loss

DRAWS = 200
NAMES = ("ln_a", "alpha", "gamma", "delta")  # of the law's parameters, before its constants
START, LOW, HIGH = (1.0, 0.2, 0.0, 0.05), (-5.0, 0.01, -0.2, -1.0), (5.0, 2.0, 0.2, 1.0)
START_CONSTANT, LARGEST_CONSTANT = 2.0, 8.0


@dataclass(frozen=True)
class Point:
    """One run of the ladder: width, experts, active parameters, tokens in millions, loss."""

    width: int
    experts: int
    active: float
    tokens: float
    loss: float


def read_points(results: Results, split: str) -> list[Point]:
    """The finished runs of the ladder; the mean over the seeds of each."""
    points = []
    for width in LADDER_COST:
        for experts in LADDER_EXPERTS:
            for steps in LADDER_STEPS:
                name = ladder_name(width, experts, steps)
                found = [r for s in range(9) if (r := results.read(f"{name}-s{s}")) is not None]
                found = [record for record in found if record["status"] == "finished"]
                if found:
                    loss = math.fsum(mean_loss(r, split) for r in found) / len(found)
                    active, tokens = found[0]["parameters"]["active"], found[0]["tokens"] / 1e6
                    points.append(Point(width, experts, active, tokens, loss))
    return points


def predict(law: np.ndarray, N: np.ndarray, E: np.ndarray, horizon: np.ndarray | int) -> np.ndarray:
    """The loss by the law's parameters: ln a, alpha, gamma, delta and the constant of each horizon.

    N is in units of 100,000 parameters, so that a is near 1; horizons are counted from 0.
    """
    ln_a, alpha, gamma, delta = law[: len(NAMES)]
    ln_E = np.log(np.maximum(E, 1.0))
    size = np.exp(ln_a - (alpha - gamma * ln_E) * np.log(N / 1e5) - delta * ln_E)
    return law[len(NAMES) :][horizon] + size


def fit(points: Sequence[Point]) -> np.ndarray:
    """The law's parameters by least squares."""
    N, E, horizon, loss = _arrays(points)
    constants = int(horizon.max()) + 1
    found = least_squares(
        lambda law: predict(law, N, E, horizon) - loss,
        [*START, *[START_CONSTANT] * constants],
        bounds=([*LOW, *[0.0] * constants], [*HIGH, *[LARGEST_CONSTANT] * constants]),
        x_scale=0.1,
    )
    return found.x


def _arrays(points: Sequence[Point]) -> tuple[np.ndarray, ...]:
    N, E, tokens, loss = (
        np.array([getattr(p, name) for p in points], float)
        for name in ("active", "experts", "tokens", "loss")
    )
    return N, E, np.unique(tokens, return_inverse=True)[1], loss


def multiplier(law: np.ndarray, active: float, experts: int) -> float:
    """How many times as large a dense model must be for the loss of a Lory."""
    ln_a, alpha, gamma, delta = law[: len(NAMES)]
    ln_E, ln_N = math.log(max(experts, 1)), math.log(active / 1e5)
    size = ln_a - (alpha - gamma * ln_E) * ln_N - delta * ln_E
    return math.exp((ln_a - size) / alpha - ln_N)


def summarize(points: Sequence[Point]) -> dict[str, Any] | None:
    """The ladder's entry in docs/study.json; None until all its arms have runs.

    Intervals are those of 95 % of laws that are fitted to the predictions with resampled residuals,
    which are scaled by the degrees of freedom that the fit took.
    """
    if len(points) < len(LADDER_COST) * len(LADDER_EXPERTS) * len(LADDER_STEPS):
        return None
    law = fit(points)
    N, E, horizon, loss = _arrays(points)
    predicted = predict(law, N, E, horizon)
    residuals = (loss - predicted) * math.sqrt(len(points) / (len(points) - len(law)))
    rng = np.random.default_rng(0)
    laws = []
    for _ in range(DRAWS):
        drawn = predicted + rng.choice(residuals, len(points))
        laws.append(fit([replace(p, loss=y) for p, y in zip(points, drawn, strict=True)]))
    rows = []
    for width, active in sorted({(p.width, p.active) for p in points if not p.experts}):
        for experts in sorted({p.experts for p in points if p.experts}):
            draws = [multiplier(of_draw, active, experts) for of_draw in laws]
            low, high = np.quantile(draws, [0.025, 0.975])
            value = multiplier(law, active, experts)
            rows.append(
                {
                    "width": width,
                    "experts": experts,
                    "multiplier": round(value, 3),
                    "interval": [round(float(low), 3), round(float(high), 3)],
                }
            )
    return {
        "points": [vars(p) for p in points],
        "law": {name: round(float(x), 4) for name, x in zip(NAMES, law, strict=False)},
        "constants": [round(float(x), 4) for x in law[len(NAMES) :]],
        "residual": round(float(np.std(residuals)), 5),
        "multipliers": rows,
    }
