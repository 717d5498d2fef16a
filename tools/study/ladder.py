"""The law that the ladder's losses follow, and how much Lory's experts are worth by it.

    L(N, E, D) = c(D) + a * N^-(alpha - gamma * ln E') * E'^-delta

N are the active parameters; E' = max(E, 1); D the training tokens, with a constant of its own for
each of the two horizons, because two cannot tell c and b * D^-beta apart. It is a reduced form of
the joint law of Ludziejewski et al. (2025, arXiv 2502.05172): experts act on the term of the
model's size alone. gamma says whether the worth of experts shrinks as the model grows. A Lory of N
parameters is worth a dense model of m * N if both have the same loss at the same D; m is its
dense-equivalent parameter multiplier.

At these sizes, embedding and head are a large part of N, and a smaller one the larger the model is.
So the law is fitted twice, with and without them in N, and says something about size only where
both agree.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from lory_jax.config import load_config
from tools.study import arms
from tools.study.claims import diverged_runs, finished_runs
from tools.study.results import FIRST_CORPUS, Results
from tools.study.statistics import resampled_means

RECIPE = str(Path(__file__).with_name("recipe.py"))
DRAWS = 500
NAMES = ("ln_a", "alpha", "gamma", "delta")  # of the law's parameters, before its constants
START, LOW, HIGH = (1.0, 0.2, 0.0, 0.05), (-5.0, 0.01, -0.2, -1.0), (5.0, 2.0, 0.2, 1.0)
START_CONSTANT, LARGEST_CONSTANT = 2.0, 8.0
COUNTS = ("active", "inner")  # with and without embedding and head


@dataclass(frozen=True)
class Point:
    """One model of the ladder at one horizon.

    Attributes:
      active: the active parameters; `inner` leaves embedding and head out.
      tokens: in millions.
      of_seeds: the loss of every seed.
      losses: by domain, the mean loss of every held-out instance over the seeds.
    """

    width: int
    experts: int
    active: float
    inner: float
    tokens: float
    of_seeds: Mapping[int, float]
    losses: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return math.fsum(self.of_seeds.values()) / len(self.of_seeds)

    @property
    def seeds(self) -> int:
        return len(self.of_seeds)


@dataclass(frozen=True)
class Ladder:
    """The points that have all their seeds, and the names of the others."""

    points: list[Point]
    missing: list[str]
    diverged: list[str]


@dataclass(frozen=True)
class Noise:
    """The variance of the loss between seeds: what they do to all points alike, and the rest."""

    common: float
    own: float

    def covariance(self, points: Sequence[Point]) -> np.ndarray:
        """`[points, points]`, of their mean losses."""
        seeds = [{*point.of_seeds} for point in points]
        shared = [[len(a & b) / (len(a) * len(b)) for b in seeds] for a in seeds]
        return self.common * np.array(shared) + np.diag([self.own / len(a) for a in seeds])


def read_points(results: Results, split: str) -> Ladder:
    """The points of the ladder.

    A point with a diverged run is none: the seeds that are left are not typical.
    """
    by_name = {arm.name: arm for arm in arms.ARMS if arm.corpus == FIRST_CORPUS}
    vocabulary = load_config(RECIPE).model.vocab_size
    by_arm, lost = finished_runs(results), diverged_runs(results)
    points, missing, diverged = [], [], []
    for width, experts, steps in arms.LADDER_POINTS:
        name = arms.ladder_name(width, experts, steps)
        runs = by_arm.get(name, [])
        if name in lost:
            diverged.append(name)
            continue
        if len(runs) < by_name[name].seeds:
            missing.append(name)
            continue
        of_seeds = [results.instances(record["id"], split) for record in runs]
        active = runs[0]["parameters"]["active"]
        points.append(
            Point(
                width,
                experts,
                active,
                active - 2 * vocabulary * width,
                runs[0]["tokens"] / 1e6,
                {
                    record["seed"]: float(np.mean([x.mean() for x in losses.values()]))
                    for record, losses in zip(runs, of_seeds, strict=True)
                },
                {d: np.mean([losses[d] for losses in of_seeds], axis=0) for d in of_seeds[0]},
            )
        )
    return Ladder(points, missing, diverged)


def predict(law: np.ndarray, N: np.ndarray, E: np.ndarray, horizon: np.ndarray | int) -> np.ndarray:
    """The loss by the law's parameters: ln a, alpha, gamma, delta and the constant of each horizon.

    N is in units of 100,000 parameters, so that a is near 1; horizons are counted from 0.
    """
    ln_a, alpha, gamma, delta = law[: len(NAMES)]
    ln_E = np.log(np.maximum(E, 1.0))
    size = np.exp(ln_a - (alpha - gamma * ln_E) * np.log(N / 1e5) - delta * ln_E)
    return law[len(NAMES) :][horizon] + size


@dataclass(frozen=True)
class Fit:
    """The law's parameters by least squares.

    Attributes:
      jacobian: of the predictions, `[points, parameters]`.
      at_bound: the names of parameters that would go on beyond their bound; such a fit is no
        estimate of them.
    """

    law: np.ndarray
    jacobian: np.ndarray
    at_bound: tuple[str, ...]


def fit(N: np.ndarray, E: np.ndarray, horizon: np.ndarray, loss: np.ndarray) -> Fit:
    """Fits the law; every point counts alike.

    Raises:
      ValueError: the fit did not converge.
    """
    constants = int(horizon.max()) + 1
    found = least_squares(
        lambda law: predict(law, N, E, horizon) - loss,
        [*START, *[START_CONSTANT] * constants],
        bounds=([*LOW, *[0.0] * constants], [*HIGH, *[LARGEST_CONSTANT] * constants]),
        x_scale=0.1,
    )
    if found.status <= 0:
        raise ValueError(f"the ladder's law: no fit after {found.nfev} evaluations")
    names = [*NAMES, *["constant"] * constants]
    at_bound = [name for name, side in zip(names, found.active_mask, strict=True) if side]
    return Fit(found.x, found.jac, tuple(dict.fromkeys(at_bound)))


def multiplier(law: np.ndarray, active: float, experts: int) -> float:
    """How many times as large a dense model must be for the loss of a Lory."""
    ln_a, alpha, gamma, delta = law[: len(NAMES)]
    ln_E, ln_N = math.log(max(experts, 1)), math.log(active / 1e5)
    size = ln_a - (alpha - gamma * ln_E) * ln_N - delta * ln_E
    return math.exp((ln_a - size) / alpha - ln_N)


def seed_noise(points: Sequence[Point]) -> Noise:
    """The noise of the points that have several seeds.

    What a seed does to all points alike cancels in the difference of two points with the same
    seeds: half of its variance is the rest. Every pair and every point counts by its seeds minus 1.
    """
    repeated = [point for point in points if point.seeds > 1]
    variances = [np.var([*point.of_seeds.values()], ddof=1) for point in repeated]
    total = float(np.average(variances, weights=[point.seeds - 1 for point in repeated]))
    own, weights = [], []
    for first, second in itertools.combinations(repeated, 2):
        shared = sorted(first.of_seeds.keys() & second.of_seeds.keys())
        if len(shared) > 1:
            differences = [first.of_seeds[seed] - second.of_seeds[seed] for seed in shared]
            own.append(float(np.var(differences, ddof=1)) / 2)
            weights.append(len(shared) - 1)
    rest = float(np.average(own, weights=weights)) if own else total
    return Noise(max(total - rest, 0.0), rest)


def document_deviations(
    points: Sequence[Point], origins: Mapping[str, Sequence[int]], rng: np.random.Generator
) -> np.ndarray:
    """`[DRAWS, points]`: how losses change with the choice of held-out documents.

    All points are measured on the same documents, so a draw resamples them for all alike.
    """
    domains = list(points[0].losses)
    values = [np.stack([point.losses[domain] for point in points]) for domain in domains]
    drawn = resampled_means(values, [np.array(origins[d]) for d in domains], rng, DRAWS)
    pairs = zip(drawn, values, strict=True)
    return np.mean([means - of_domain.mean(axis=1) for means, of_domain in pairs], axis=0)


def summarize(points: Sequence[Point], origins: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The ladder's entry in docs/study.json.

    Intervals are those of 95 % of laws that are fitted to drawn losses: the law's own, changed by
    resampled documents (`document_deviations`), by the noise of seeds, most of which points with
    the same seeds have in common (`seed_noise`), and by what the residuals show beyond that noise
    (lack of fit), independently for every point.
    """
    E, tokens, loss = (
        np.array([getattr(p, name) for p in points], float)
        for name in ("experts", "tokens", "loss")
    )
    horizon = np.unique(tokens, return_inverse=True)[1]
    noise = seed_noise(points)
    covariance = noise.covariance(points)
    rng = np.random.default_rng(0)
    shape = (DRAWS, len(points))
    deviations = document_deviations(points, origins, rng)
    zeros = np.zeros(len(points))
    deviations += rng.multivariate_normal(zeros, covariance, DRAWS, method="eigh")
    variances = {"common": noise.common, "own": noise.own}
    summary: dict[str, Any] = {
        "seed_noise": {name: round(math.sqrt(x), 5) for name, x in variances.items()},
        "laws": {},
    }
    for count in COUNTS:
        N = np.array([getattr(p, count) for p in points], float)
        found = fit(N, E, horizon, loss)
        predicted = predict(found.law, N, E, horizon)
        lack = lack_of_fit(loss - predicted, found.jacobian, covariance)
        drawn = predicted + deviations + math.sqrt(lack) * rng.normal(size=shape)
        fits = [fit(N, E, horizon, of_draw) for of_draw in drawn]
        laws = np.array([of_draw.law for of_draw in fits])
        ends = np.quantile(laws, [0.025, 0.975], axis=0).T
        named = zip(NAMES, found.law, ends, strict=False)  # without the constants
        summary["laws"][count] = {
            "parameters": {
                name: {"value": round(float(value), 4), "interval": _rounded(interval)}
                for name, value, interval in named
            },
            "at_bound": list(found.at_bound),
            "draws_at_bound": round(sum(bool(of_draw.at_bound) for of_draw in fits) / DRAWS, 3),
            "lack_of_fit": round(math.sqrt(lack), 5),
            "multipliers": _multipliers(points, count, found.law, laws),
        }
    fields = ("width", "experts", "active", "inner", "tokens", "loss", "seeds")
    summary["points"] = [{name: getattr(p, name) for name in fields} for p in points]
    return summary


def lack_of_fit(residual: np.ndarray, jacobian: np.ndarray, covariance: np.ndarray) -> float:
    """The variance of the residuals beyond what noise leaves after the fit has followed it."""
    count = len(residual)
    left = np.eye(count) - jacobian @ np.linalg.pinv(jacobian)
    expected = float(np.trace(left @ covariance))
    return max(0.0, (float(residual @ residual) - expected) / (count - jacobian.shape[1]))


def _multipliers(
    points: Sequence[Point], count: str, law: np.ndarray, laws: np.ndarray
) -> list[dict[str, Any]]:
    """By width and experts; `beyond` where no dense model of the ladder is as large as that."""
    largest = max(getattr(p, count) for p in points if not p.experts)
    rows = []
    for width, N in sorted({(p.width, getattr(p, count)) for p in points}):
        for experts in sorted({p.experts for p in points if p.experts}):
            draws = [multiplier(of_draw, N, experts) for of_draw in laws]
            value = multiplier(law, N, experts)
            rows.append(
                {
                    "width": width,
                    "experts": experts,
                    "multiplier": round(value, 3),
                    "interval": _rounded(np.quantile(draws, [0.025, 0.975])),
                    "beyond": bool(value * N > largest),
                }
            )
    return rows


def _rounded(interval: np.ndarray) -> list[float]:
    return [round(float(end), 4) for end in interval]
