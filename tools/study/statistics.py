"""Paired differences between two arms of the study, with intervals and verdicts.

An arm is a configuration trained with several seeds. Two arms are compared on the same held-out
instances with the same seeds, so that everything is paired: the difference d[seed, instance] is
formed first. An effect is the mean of d over instances, then over domains (each counts alike), then
over seeds. Two things make it uncertain, and their variances add up:

- training noise: the variance of the effect between seeds, divided by the number of seeds;
- the choice of held-out documents: in every domain, a bootstrap of origins (what one folder of a
  package holds hangs together), then of the instances of an origin.

Intervals use Student's t. Its degrees of freedom combine those of the seeds and those of every
domain's origins by their shares of the variance (Welch and Satterthwaite). Origins of unequal sizes
count as fewer (`effective_origins`). Resampling three or four seeds would give narrower intervals.

Letters: S seeds, I instances of a domain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

DRAWS = 2_000
LEVEL = 0.95


@dataclass(frozen=True)
class Domain:
    """One domain's losses in two arms.

    Attributes:
      difference_SxI: mean loss of an instance in the first arm minus that in the second, in nats.
      origin_I: the origin of each instance, as integers from 0.
    """

    difference_SxI: np.ndarray
    origin_I: np.ndarray


@dataclass(frozen=True)
class Effect:
    """A difference in nats: negative where the first arm has the lower loss.

    `p` is two-sided, for the hypothesis of no difference; `error` is the standard error and
    `degrees` the degrees of freedom of Student's t. With one seed there is nothing that covers
    training noise: interval, `p` and `error` are NaN.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    by_domain: dict[str, float]
    error: float = math.nan
    degrees: float = math.nan


def paired_effect(domains: Mapping[str, Domain], seed: int = 0) -> Effect:
    """The effect over all domains, each of which counts alike.

    Raises:
      ValueError: there is no domain, or the domains have different numbers of seeds.
    """
    counts = {len(domain.difference_SxI) for domain in domains.values()}
    if len(counts) != 1:
        raise ValueError(f"seeds per domain: got {sorted(counts)}, must be the same everywhere")
    (S,) = counts
    by_domain = {
        name: float(domain.difference_SxI.mean(dtype=np.float64))
        for name, domain in domains.items()
    }
    mean = math.fsum(by_domain.values()) / len(by_domain)
    if S < 2:
        return student(mean, math.nan, math.nan, S, by_domain)
    rng = np.random.default_rng(seed)
    of_seeds_S = np.mean([d.difference_SxI.mean(axis=1) for d in domains.values()], axis=0)
    parts = [(float(np.var(of_seeds_S, ddof=1, dtype=np.float64)) / S, S - 1.0)]
    for domain in domains.values():
        variance, degrees = _choice(domain, rng)
        parts.append((variance / len(domains) ** 2, degrees))
    total = math.fsum(variance for variance, _ in parts)
    shares = math.fsum(variance**2 / degrees for variance, degrees in parts)
    degrees = total**2 / shares if shares else math.inf
    return student(mean, math.sqrt(total), degrees, S, by_domain)


def over_seeds(values: Sequence[float]) -> Effect:
    """The mean of one number per seed, which covers training noise alone."""
    S = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(S) if S > 1 else math.nan
    return student(float(np.mean(values)), error, S - 1.0, S, {})


def student(
    mean: float, error: float, degrees: float, seeds: int, by_domain: dict[str, float]
) -> Effect:
    """An effect with the interval and the p-value of Student's t."""
    if error == 0.0:
        return Effect(mean, mean, mean, float(mean == 0.0), seeds, by_domain, error, degrees)
    reach = error * float(stats.t.ppf(0.5 + LEVEL / 2, degrees))
    p = 2 * float(stats.t.sf(abs(mean) / error, degrees))
    return Effect(mean, mean - reach, mean + reach, p, seeds, by_domain, error, degrees)


def _choice(domain: Domain, rng: np.random.Generator) -> tuple[float, float]:
    """The variance of a domain's mean by the choice of its documents; its degrees of freedom.

    A bootstrap of n origins finds (n - 1) / n of the variance. A single origin has no spread to
    resample: its instances are all there is, and count as two origins.
    """
    origins = max(effective_origins(domain.origin_I), 2.0)
    found = float(np.var(_resampled_means(domain, rng)))
    return found * origins / (origins - 1), origins - 1


def effective_origins(origin_I: np.ndarray) -> float:
    """How many origins of one size would say as much: (sum of sizes)^2 / sum of squared sizes."""
    sizes = np.bincount(origin_I).astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _resampled_means(domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """`[DRAWS]`: the mean difference over all seeds, for resampled origins and instances."""
    weight_DRAWSxI = resampled_weights(domain.origin_I, rng, DRAWS)
    difference_I = domain.difference_SxI.mean(axis=0, dtype=np.float64)
    return weight_DRAWSxI @ difference_I / np.maximum(weight_DRAWSxI.sum(axis=1), 1.0)


def resampled_weights(origin_I: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """`[draws, I]`: how often every instance is drawn.

    Poisson bootstrap: an origin is drawn Poisson(1) times, and each of its instances as often as a
    Poisson variable with that mean says. For many origins this is resampling with replacement.
    """
    times_DRAWSxO = rng.poisson(1.0, (draws, int(origin_I.max()) + 1))
    return rng.poisson(times_DRAWSxO[:, origin_I]).astype(np.float64)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the family-wise p-value of every claim.

    A claim without a p-value yet (NaN) counts as one of the family, so that no other verdict gets
    weaker when it gets one; it stays NaN.
    """
    tested = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted = {name: math.nan for name in p_values}
    largest = 0.0
    for rank, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted


def p_within(effect: Effect, margin: float) -> float:
    """Of the claim that the effect lies within the margin: two one-sided tests, the worse of them.

    It is doubled, as the p-value of a difference is, so that it is below 0.05 where the interval
    lies within the margin.
    """
    return _tail(margin - abs(effect.mean), effect)


def p_outside(effect: Effect, margin: float) -> float:
    """Of the claim that the effect lies beyond the nearer end of the margin, doubled likewise."""
    return _tail(abs(effect.mean) - margin, effect)


def _tail(distance: float, effect: Effect) -> float:
    if effect.error == 0.0:
        return float(distance <= 0.0)
    return float(np.minimum(2 * stats.t.sf(distance / effect.error, effect.degrees), 1.0))


def p_of(effect: Effect, expected_sign: int, margin: float) -> float:
    """The p-value with which a claim enters Holm's adjustment; see `verdict` for the arguments."""
    if expected_sign:
        return effect.p
    return min(p_within(effect, margin), p_outside(effect, margin))


def is_within(effect: Effect, margin: float) -> bool:
    """Whether the whole interval lies within the margin."""
    return max(abs(effect.low), abs(effect.high)) < margin


def verdict(effect: Effect, adjusted_p: float, expected_sign: int, margin: float) -> str:
    """What the evidence says about a claim.

    Args:
      adjusted_p: family-wise, from `holm` over what `p_of` says of every claim.
      expected_sign: -1 where the claim says that the first arm has the lower loss, 1 the higher, 0
        that the two are equivalent.
      margin: in nats; effects whose whole interval is smaller count as equivalent.

    Returns:
      "supported", "contradicted", "equivalent" or "inconclusive".
    """
    is_decided = adjusted_p < 1 - LEVEL  # not where it is NaN
    if expected_sign == 0:
        if not is_decided:
            return "inconclusive"
        return "supported" if abs(effect.mean) < margin else "contradicted"
    if is_within(effect, margin):
        return "equivalent"
    if not is_decided:
        return "inconclusive"
    return "supported" if effect.mean * expected_sign > 0 else "contradicted"
