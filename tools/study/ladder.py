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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from lory_jax.config import load_config
from tools.study import arms
from tools.study.claims import finished_runs
from tools.study.results import FIRST_CORPUS, Results
from tools.study.statistics import resampled_weights

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
      loss: the mean of its seeds.
      seeds: their number.
      variance: of the loss between them; NaN for a single one.
      losses: by domain, the mean loss of every held-out instance over the seeds.
    """

    width: int
    experts: int
    active: float
    inner: float
    tokens: float
    loss: float
    seeds: int = 1
    variance: float = math.nan
    losses: Mapping[str, np.ndarray] = field(default_factory=dict)


def read_points(results: Results, split: str) -> tuple[list[Point], list[str]]:
    """The points that have all their seeds, and the names of those that have not.

    A point with a diverged run stays among the others: the seeds that are left are not typical.
    """
    by_name = {arm.name: arm for arm in arms.ARMS if arm.corpus == FIRST_CORPUS}
    vocabulary = load_config(RECIPE).model.vocab_size
    by_arm = finished_runs(results)
    points, missing = [], []
    for width, experts, steps in arms.LADDER_POINTS:
        name = arms.ladder_name(width, experts, steps)
        runs = by_arm.get(name, [])
        if len(runs) < by_name[name].seeds:
            missing.append(name)
            continue
        of_seeds = [results.instances(record["id"], split) for record in runs]
        losses = {d: np.mean([of_seed[d] for of_seed in of_seeds], axis=0) for d in of_seeds[0]}
        values = [float(np.mean([x.mean() for x in s.values()])) for s in of_seeds]
        active = runs[0]["parameters"]["active"]
        points.append(
            Point(
                width,
                experts,
                active,
                active - 2 * vocabulary * width,
                runs[0]["tokens"] / 1e6,
                float(np.mean(values)),
                len(runs),
                float(np.var(values, ddof=1)) if len(runs) > 1 else math.nan,
                losses,
            )
        )
    return points, missing


def predict(law: np.ndarray, N: np.ndarray, E: np.ndarray, horizon: np.ndarray | int) -> np.ndarray:
    """The loss by the law's parameters: ln a, alpha, gamma, delta and the constant of each horizon.

    N is in units of 100,000 parameters, so that a is near 1; horizons are counted from 0.
    """
    ln_a, alpha, gamma, delta = law[: len(NAMES)]
    ln_E = np.log(np.maximum(E, 1.0))
    size = np.exp(ln_a - (alpha - gamma * ln_E) * np.log(N / 1e5) - delta * ln_E)
    return law[len(NAMES) :][horizon] + size


def fit(N: np.ndarray, E: np.ndarray, horizon: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The law's parameters by least squares; every point counts alike."""
    constants = int(horizon.max()) + 1
    found = least_squares(
        lambda law: predict(law, N, E, horizon) - loss,
        [*START, *[START_CONSTANT] * constants],
        bounds=([*LOW, *[0.0] * constants], [*HIGH, *[LARGEST_CONSTANT] * constants]),
        x_scale=0.1,
    )
    return found.x


def multiplier(law: np.ndarray, active: float, experts: int) -> float:
    """How many times as large a dense model must be for the loss of a Lory."""
    ln_a, alpha, gamma, delta = law[: len(NAMES)]
    ln_E, ln_N = math.log(max(experts, 1)), math.log(active / 1e5)
    size = ln_a - (alpha - gamma * ln_E) * ln_N - delta * ln_E
    return math.exp((ln_a - size) / alpha - ln_N)


def document_deviations(
    points: Sequence[Point], origins: Mapping[str, Sequence[int]], rng: np.random.Generator
) -> np.ndarray:
    """`[DRAWS, points]`: how losses change with the choice of held-out documents.

    All points are measured on the same documents, so a draw resamples them for all alike.
    """
    deviations = np.zeros((DRAWS, len(points)))
    domains = list(points[0].losses)
    for domain in domains:
        loss_PxI = np.stack([point.losses[domain] for point in points])
        weight = resampled_weights(np.array(origins[domain]), rng, DRAWS)
        drawn = weight @ loss_PxI.T / np.maximum(weight.sum(axis=1, keepdims=True), 1.0)
        deviations += (drawn - loss_PxI.mean(axis=1)) / len(domains)
    return deviations


def summarize(points: Sequence[Point], origins: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The ladder's entry in docs/study.json.

    Intervals are those of 95 % of laws that are fitted to drawn losses: the law's own, changed by
    resampled documents (`document_deviations`) and by independent noise, whose variance is that
    between seeds divided by their number, and what the residuals show beyond it (lack of fit).
    """
    E, tokens, loss = (
        np.array([getattr(p, name) for p in points], float)
        for name in ("experts", "tokens", "loss")
    )
    horizon = np.unique(tokens, return_inverse=True)[1]
    seeds = np.array([point.seeds for point in points])
    repeated = [point for point in points if point.seeds > 1]
    of_seeds = np.average([p.variance for p in repeated], weights=[p.seeds - 1 for p in repeated])
    rng = np.random.default_rng(0)
    deviations = document_deviations(points, origins, rng)
    summary: dict[str, Any] = {"seed_noise": round(math.sqrt(of_seeds), 5), "laws": {}}
    for count in COUNTS:
        N = np.array([getattr(p, count) for p in points], float)
        law = fit(N, E, horizon, loss)
        predicted = predict(law, N, E, horizon)
        unexplained = float(np.sum((loss - predicted) ** 2)) / (len(points) - len(law))
        lack = max(0.0, unexplained - float(np.mean(of_seeds / seeds)))
        noise = np.sqrt(of_seeds / seeds + lack)
        drawn = predicted + deviations + noise * rng.normal(size=deviations.shape)
        laws = np.array([fit(N, E, horizon, of_draw) for of_draw in drawn])
        ends = np.quantile(laws, [0.025, 0.975], axis=0).T
        named = zip(NAMES, law, ends, strict=False)  # without the constants
        summary["laws"][count] = {
            "parameters": {
                name: {"value": round(float(value), 4), "interval": _rounded(interval)}
                for name, value, interval in named
            },
            "lack_of_fit": round(math.sqrt(lack), 5),
            "multipliers": _multipliers(points, count, law, laws),
        }
    fields = ("width", "experts", "active", "inner", "tokens", "loss", "seeds")
    summary["points"] = [{name: getattr(p, name) for name in fields} for p in points]
    return summary


def _multipliers(
    points: Sequence[Point], count: str, law: np.ndarray, laws: np.ndarray
) -> list[dict[str, Any]]:
    rows = []
    for width, N in sorted({(p.width, getattr(p, count)) for p in points}):
        for experts in sorted({p.experts for p in points if p.experts}):
            draws = [multiplier(of_draw, N, experts) for of_draw in laws]
            interval = _rounded(np.quantile(draws, [0.025, 0.975]))
            value = round(multiplier(law, N, experts), 3)
            rows.append(
                {"width": width, "experts": experts, "multiplier": value, "interval": interval}
            )
    return rows


def _rounded(interval: np.ndarray) -> list[float]:
    return [round(float(end), 4) for end in interval]
