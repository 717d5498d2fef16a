"""The law that the ladder's losses follow, and how much Lory's experts are worth by it.

    L(N, E, D) = c + a * N^-(alpha - gamma * ln E') * E'^-delta + b * D^-beta

N are the active parameters, embedding and head included; D the training tokens in millions; E' =
max(E, 1). It is a reduced form of the joint law of Ludziejewski et al. (2025, arXiv 2502.05172):
experts act on the term of the model's size alone, not on that of the tokens. gamma says whether the
worth of experts shrinks as the model grows. A Lory of N parameters is worth a dense model of m * N
if both have the same loss at the same D; m is its dense-equivalent parameter multiplier.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from tools.study.arms import LADDER_COST, LADDER_EXPERTS, LADDER_STEPS, ladder_name
from tools.study.results import Results, mean_loss

DRAWS = 200
FEWEST_POINTS = 14  # twice the number of the law's parameters
START = np.array([1.5, 1.0, 0.2, 0.0, 0.05, 0.5, 0.3])
LOW = np.array([0.0, -5.0, 0.01, -0.2, -1.0, -5.0, 0.01])
HIGH = np.array([5.0, 5.0, 2.0, 0.2, 1.0, 5.0, 2.0])


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


def predict(law: np.ndarray, N: np.ndarray, E: np.ndarray, D: np.ndarray) -> np.ndarray:
    """The loss by the law's parameters (c, ln a, alpha, gamma, delta, ln b, beta).

    N is in units of 100,000 parameters and D in 10 million tokens, so that a and b are near 1.
    """
    c, ln_a, alpha, gamma, delta, ln_b, beta = law
    ln_E = np.log(np.maximum(E, 1.0))
    size = np.exp(ln_a - (alpha - gamma * ln_E) * np.log(N / 1e5) - delta * ln_E)
    return c + size + np.exp(ln_b - beta * np.log(D / 10))


def fit(points: Sequence[Point]) -> np.ndarray:
    """The law's parameters by least squares."""
    N, E, D, loss = (
        np.array([getattr(p, name) for p in points], float)
        for name in ("active", "experts", "tokens", "loss")
    )
    found = least_squares(
        lambda law: predict(law, N, E, D) - loss, START, bounds=(LOW, HIGH), x_scale=0.1
    )
    return found.x


def multiplier(law: np.ndarray, active: float, experts: int) -> float:
    """How many times as large a dense model must be for the loss of a Lory."""
    _, ln_a, alpha, gamma, delta, _, _ = law
    ln_E, ln_N = math.log(max(experts, 1)), math.log(active / 1e5)
    size = ln_a - (alpha - gamma * ln_E) * ln_N - delta * ln_E
    return math.exp((ln_a - size) / alpha - ln_N)


def summarize(points: Sequence[Point]) -> dict[str, Any] | None:
    """The ladder's entry in docs/study.json; None as long as there are too few runs.

    Intervals are those of 95 % of laws that are fitted to the predictions with resampled residuals.
    """
    if len(points) < FEWEST_POINTS:
        return None
    law = fit(points)
    N, E, D, loss = (
        np.array([getattr(p, name) for p in points], float)
        for name in ("active", "experts", "tokens", "loss")
    )
    predicted = predict(law, N, E, D)
    rng = np.random.default_rng(0)
    laws = []
    for _ in range(DRAWS):
        drawn = predicted + rng.choice(loss - predicted, len(points))
        laws.append(
            fit(
                [
                    Point(p.width, p.experts, p.active, p.tokens, y)
                    for p, y in zip(points, drawn, strict=True)
                ]
            )
        )
    names = ("c", "ln_a", "alpha", "gamma", "delta", "ln_b", "beta")
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
        "law": {name: round(float(x), 4) for name, x in zip(names, law, strict=True)},
        "residual": round(float(np.std(loss - predicted)), 5),
        "multipliers": rows,
    }
