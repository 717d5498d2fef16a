"""Paired differences between two arms of the study, with intervals and verdicts.

An arm is a configuration trained with several seeds. Two arms are compared on the same held-out
instances with the same seeds, so that everything is paired: the difference d[seed, instance] is
formed first. An effect is the mean of d over instances, then over domains (each counts alike), then
over seeds. Two things make it uncertain, and their variances add up:

- training noise: the variance of the effect between seeds, divided by the number of seeds;
- the choice of held-out documents: a bootstrap draws origins, then the instances of each. Documents
  of one folder are alike, also in different domains, so a folder is drawn for all domains together.

Both variances are estimated, from few seeds and few origins. Intervals and p-values take that into
account as Behrens and Fisher do. Each true variance is treated as its estimate times f over a
chi-squared variable with f degrees of freedom, independently of the other, and the distribution of
the effect is averaged over both. If one variance is zero, this is Student's t. Welch's
approximation gives p-values that are too small for three or four seeds: if seeds agree by chance,
it uses the degrees of freedom of the documents.

Letters: S seeds, I instances of a domain, N domains, O origins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

DRAWS = 2_000
LEVEL = 0.95
NODES = 200  # of the average over how the true variances divide


@dataclass(frozen=True)
class Domain:
    """One domain's losses in two arms.

    Attributes:
      difference_SxI: mean loss of an instance in the first arm minus that in the second, in nats.
      origin_I: the origin of each instance; a number is the same origin in every domain.
    """

    difference_SxI: np.ndarray
    origin_I: np.ndarray


@dataclass(frozen=True)
class Part:
    """An estimated variance of an effect, and its degrees of freedom."""

    variance: float
    degrees: float


@dataclass(frozen=True)
class Effect:
    """A difference in nats: negative where the first arm has the lower loss.

    `p` is two-sided, for the hypothesis of no difference; `parts` are the variances that add up.
    With one seed there is nothing that covers training noise: interval and `p` are NaN, and there
    are no parts.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    by_domain: dict[str, float]
    parts: tuple[Part, ...] = ()


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
        return with_interval(mean, (), S, by_domain)
    of_seeds_S = np.mean([d.difference_SxI.mean(axis=1) for d in domains.values()], axis=0)
    of_training = Part(float(np.var(of_seeds_S, ddof=1, dtype=np.float64)) / S, S - 1.0)
    parts = (of_training, _choice([*domains.values()], np.random.default_rng(seed)))
    return with_interval(mean, parts, S, by_domain)


def over_seeds(values: Sequence[float]) -> Effect:
    """The mean of one number per seed, which covers training noise alone."""
    S = len(values)
    parts = (Part(float(np.var(values, ddof=1)) / S, S - 1.0),) if S > 1 else ()
    return with_interval(float(np.mean(values)), parts, S, {})


def with_interval(
    mean: float, parts: Sequence[Part], seeds: int, by_domain: dict[str, float]
) -> Effect:
    """An effect with the interval and the p-value that its variances give it."""
    kept = tuple(part for part in parts if part.variance > 0.0)
    if not parts:
        return Effect(mean, math.nan, math.nan, math.nan, seeds, by_domain)
    if not kept:
        return Effect(mean, mean, mean, float(mean == 0.0), seeds, by_domain, tuple(parts))
    p, reach = 2 * upper_tail(abs(mean), kept), _reach(kept)
    return Effect(mean, mean - reach, mean + reach, p, seeds, by_domain, kept)


def upper_tail(distance: float, parts: Sequence[Part]) -> float:
    """The probability that an effect is estimated by more than `distance` too high.

    With two parts, B = chi-squared(f1) / (chi-squared(f1) + chi-squared(f2)) has a beta
    distribution, and given B, the distance divided by its scale has Student's t with f1 + f2
    degrees of freedom. The average over B is taken at its quantiles, which lie closer to each other
    towards both ends.
    """
    if len(parts) == 1:
        (part,) = parts
        return float(stats.t.sf(distance / math.sqrt(part.variance), part.degrees))
    first, second = parts
    node = (np.arange(NODES) + 0.5) / NODES
    quantile, weight = node**3 * (10 - 15 * node + 6 * node**2), 30 * (node * (1 - node)) ** 2
    share = stats.beta.ppf(quantile, first.degrees / 2, second.degrees / 2)
    total = first.degrees + second.degrees
    scale = first.variance * first.degrees / share + second.variance * second.degrees / (1 - share)
    return float(np.mean(weight * stats.t.sf(distance * np.sqrt(total / scale), total)))


def _reach(parts: Sequence[Part]) -> float:
    """Half of the interval's width."""
    widest = math.sqrt(math.fsum(part.variance for part in parts)) * float(
        stats.t.ppf(0.5 + LEVEL / 2, min(part.degrees for part in parts))
    )
    tail = (1 - LEVEL) / 2
    return float(optimize.brentq(lambda x: upper_tail(x, parts) - tail, 0.0, 2 * widest))


def _choice(domains: Sequence[Domain], rng: np.random.Generator) -> Part:
    """The variance of the mean of the domains by the choice of their documents.

    A bootstrap of n origins finds (n - 1) / n of the variance. A single origin has no spread to
    resample: its instances are all there is, and count as two origins. The degrees of freedom are
    those of the domains, combined by their shares of the variance (Satterthwaite), and at most
    those of all origins together, some of which may be in several domains.
    """
    drawn = resampled_means(
        [domain.difference_SxI.mean(axis=0, dtype=np.float64)[None] for domain in domains],
        [domain.origin_I for domain in domains],
        rng,
        DRAWS,
    )
    origins = np.array([max(effective_origins(domain.origin_I), 2.0) for domain in domains])
    deviation_DRAWSxN = np.stack([means[:, 0] - means[:, 0].mean() for means in drawn], axis=1)
    deviation_DRAWSxN *= np.sqrt(origins / (origins - 1)) / len(domains)
    variance_N = np.mean(deviation_DRAWSxN**2, axis=0)
    if not variance_N.any():
        return Part(0.0, math.inf)
    degrees = variance_N.sum() ** 2 / np.sum(variance_N**2 / (origins - 1))
    shares = [np.bincount(d.origin_I) / len(d.origin_I) / len(domains) for d in domains]
    share_O = np.zeros(max(map(len, shares)))
    for share in shares:
        share_O[: len(share)] += share
    of_all = max(1 / float(np.sum(share_O**2)), 2.0) - 1
    variance = float(np.mean(deviation_DRAWSxN.sum(axis=1) ** 2))
    return Part(variance, min(float(degrees), of_all))


def effective_origins(origin_I: np.ndarray) -> float:
    """How many origins of one size would say as much: (sum of sizes)^2 / sum of squared sizes."""
    sizes = np.bincount(origin_I).astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def resampled_means(
    values: Sequence[np.ndarray],
    origins: Sequence[np.ndarray],
    rng: np.random.Generator,
    draws: int,
) -> list[np.ndarray]:
    """By domain, the means of `values` over resampled origins and instances.

    Poisson bootstrap: an origin is drawn Poisson(1) times, for all domains alike, and each of its
    instances as often as a Poisson variable with that mean says. For many origins this is
    resampling with replacement. A draw that leaves a domain without instances is drawn again.

    Args:
      values: by domain, `[points, I]`.
      origins: by domain, `[I]`; a number means the same origin everywhere.

    Returns:
      By domain, `[draws, points]`.
    """
    number = 1 + max(int(origin_I.max()) for origin_I in origins)
    times = [np.zeros((draws, len(origin_I)), np.uint8) for origin_I in origins]
    wanted = np.arange(draws)
    while len(wanted):
        of_origin = rng.poisson(1.0, (len(wanted), number))
        for times_DRAWSxI, origin_I in zip(times, origins, strict=True):
            times_DRAWSxI[wanted] = rng.poisson(of_origin[:, origin_I])
        is_empty = np.any([~times_DRAWSxI[wanted].any(axis=1) for times_DRAWSxI in times], axis=0)
        wanted = wanted[is_empty]
    return [
        times_DRAWSxI.astype(np.float64) @ of_domain.T / times_DRAWSxI.sum(axis=1, keepdims=True)
        for times_DRAWSxI, of_domain in zip(times, values, strict=True)
    ]


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
    if not effect.parts:
        return math.nan
    if all(part.variance == 0.0 for part in effect.parts):
        return float(distance <= 0.0)
    return min(2 * upper_tail(distance, effect.parts), 1.0)


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
