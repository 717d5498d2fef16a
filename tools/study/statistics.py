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
count as fewer: (sum of sizes)^2 / sum of squared sizes.

Letters: S seeds, I instances of a domain.
"""

import math
from collections.abc import Mapping
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

    `p` is two-sided, for the hypothesis of no difference. With one seed there is neither an
    interval nor a p-value that covers training noise: both are NaN.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    by_domain: dict[str, float]


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
        return Effect(mean, math.nan, math.nan, math.nan, S, by_domain)
    rng = np.random.default_rng(seed)
    of_seeds_S = np.mean([d.difference_SxI.mean(axis=1) for d in domains.values()], axis=0)
    parts = [(float(np.var(of_seeds_S, ddof=1, dtype=np.float64)) / S, S - 1.0)]
    for domain in domains.values():
        variance, degrees = _choice(domain, rng)
        parts.append((variance / len(domains) ** 2, degrees))
    total = math.fsum(variance for variance, _ in parts)
    if total == 0.0:
        return Effect(mean, mean, mean, 1.0 if mean == 0.0 else 0.0, S, by_domain)
    error = math.sqrt(total)
    degrees = total**2 / math.fsum(variance**2 / degrees for variance, degrees in parts)
    reach = error * float(stats.t.ppf(0.5 + LEVEL / 2, degrees))
    p = 2 * float(stats.t.sf(abs(mean) / error, degrees))
    return Effect(mean, mean - reach, mean + reach, p, S, by_domain)


def _choice(domain: Domain, rng: np.random.Generator) -> tuple[float, float]:
    """The variance of a domain's mean by the choice of its documents; its degrees of freedom.

    A bootstrap of n origins finds (n - 1) / n of the variance. A single origin has no spread to
    resample: its instances are all there is, and count as two origins.
    """
    sizes = np.bincount(domain.origin_I).astype(np.float64)
    origins = max(float(sizes.sum() ** 2 / (sizes**2).sum()), 2.0)
    found = float(np.var(_resampled_means(domain, rng)))
    return found * origins / (origins - 1), origins - 1


def _resampled_means(domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """`[DRAWS]`: the mean difference over all seeds, for resampled origins and instances.

    Poisson bootstrap: an origin is drawn Poisson(1) times, and each of its instances as often as a
    Poisson variable with that mean says. For many origins this is resampling with replacement.
    """
    num_origins = int(domain.origin_I.max()) + 1
    times_DRAWSxO = rng.poisson(1.0, (DRAWS, num_origins))
    weight_DRAWSxI = rng.poisson(times_DRAWSxO[:, domain.origin_I]).astype(np.float64)
    difference_I = domain.difference_SxI.mean(axis=0, dtype=np.float64)
    return weight_DRAWSxI @ difference_I / np.maximum(weight_DRAWSxI.sum(axis=1), 1.0)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the family-wise p-value of every claim.

    A claim without a p-value yet (NaN) counts as one of the family, so that no verdict changes when
    it gets one; it stays NaN.
    """
    tested = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted = {name: math.nan for name in p_values}
    largest = 0.0
    for rank, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted


def verdict(effect: Effect | None, adjusted_p: float, expected_sign: int, margin: float) -> str:
    """What the evidence says about a claim.

    Args:
      effect: None where no runs exist that could test the claim.
      adjusted_p: family-wise, from `holm`.
      expected_sign: -1 where the claim says that the first arm has the lower loss, 1 the higher, 0
        that the two are equivalent.
      margin: in nats; effects whose whole interval is smaller count as equivalent.

    Returns:
      "supported", "contradicted", "equivalent", "inconclusive" or "not testable here".
    """
    if effect is None:
        return "not testable here"
    if math.isnan(adjusted_p):
        return "inconclusive"
    is_within_margin = max(abs(effect.low), abs(effect.high)) < margin
    is_different = adjusted_p < 1 - LEVEL
    if expected_sign == 0:
        if is_within_margin:
            return "supported"
        return "contradicted" if is_different and abs(effect.mean) > margin else "inconclusive"
    if is_within_margin:
        return "equivalent"
    if not is_different:
        return "inconclusive"
    return "supported" if effect.mean * expected_sign > 0 else "contradicted"
