import math

import numpy as np
import pytest
from scipy import stats

from tools.study import statistics
from tools.study.statistics import (
    Domain,
    Effect,
    Part,
    holm,
    over_seeds,
    p_of,
    p_outside,
    p_within,
    paired_effect,
    resampled_means,
    upper_tail,
    verdict,
    with_interval,
)

TRUE = -0.05


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 400)


def sample(rng, seeds, noise):
    """Losses as a study sees them: training noise per seed, origins that hang together."""
    of_seed_S = rng.normal(0, noise, seeds)
    domains = {}
    for number, name in enumerate("abc"):
        origin_I = 30 * number + np.repeat(np.arange(30), rng.integers(1, 12, 30))
        of_origin_I = rng.normal(0, 0.05, 90)[origin_I]
        error_SxI = rng.normal(0, 0.05, (seeds, len(origin_I)))
        domains[name] = Domain(TRUE + of_seed_S[:, None] + of_origin_I + error_SxI, origin_I)
    return domains


@pytest.mark.parametrize(("seeds", "noise"), [(3, 0.012), (4, 0.03), (10, 0.0)])
def test_intervals_cover_the_true_effect_as_often_as_they_say(seeds, noise):
    rng = np.random.default_rng(seeds)
    effects = [paired_effect(sample(rng, seeds, noise), seed=i) for i in range(60)]
    covered = sum(effect.low <= TRUE <= effect.high for effect in effects)
    assert covered >= 51  # of 60 at 95 %: fewer happens once in 2,000 times
    widths = [effect.high - effect.low for effect in effects]
    assert np.mean(widths) < 0.2


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        (Part(1.0, 2.0), Part(1.0, 20.0), 3.0),
        (Part(0.1, 3.0), Part(4.0, 12.0), 9.0),
        (Part(5.0, 2.0), Part(0.1, 25.0), 20.0),
        (Part(0.01, 2.0), Part(1.0, 27.0), 12.0),
    ],
)
def test_the_tail_averages_normal_tails_over_what_the_variances_may_be(first, second, distance):
    """Against a sum over a grid of both chi-squared variables."""

    def nodes(degrees):
        ends = stats.chi2.ppf([1e-12, 1 - 1e-12], degrees)
        at = np.exp(np.linspace(*np.log(ends), 1_000))
        weight = stats.chi2.pdf(at, degrees) * at
        return at, weight / weight.sum()

    (x, x_weight), (y, y_weight) = nodes(first.degrees), nodes(second.degrees)
    variance = (first.variance * first.degrees / x)[:, None] + second.variance * second.degrees / y
    expected = x_weight @ stats.norm.sf(distance / np.sqrt(variance)) @ y_weight
    assert upper_tail(distance, [first, second]) == pytest.approx(expected, rel=1e-3)
    assert upper_tail(distance, [second, first]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("degrees", [2.0, 9.0])
def test_the_tail_is_students_where_one_variance_is_all(degrees):
    expected = stats.t.sf(4.0, degrees)
    assert upper_tail(4.0, [Part(1.0, degrees)]) == pytest.approx(expected)
    parts = [Part(1.0, degrees), Part(1e-9, 30.0)]
    assert upper_tail(4.0, parts) == pytest.approx(expected, rel=1e-3)


def test_small_p_values_are_no_more_frequent_than_they_say():
    """Where it counts, after the adjustment for many claims: p < 0.002, with three seeds.

    By Welch's approximation, this happens about three times as often.
    """
    rng = np.random.default_rng(0)
    trials, degrees = 60_000, (2, 20)
    variances = np.array([0.5, 1.0])
    found = variances * np.stack([rng.chisquare(f, trials) / f for f in degrees], axis=1)
    mean = rng.normal(0, math.sqrt(variances.sum()), trials)
    # Only far ones can be that rare: all others are spared the time.
    far = np.flatnonzero(abs(mean) > 2.5 * np.sqrt(found.sum(axis=1)))
    p = [
        2 * upper_tail(abs(mean[i]), [Part(v, f) for v, f in zip(found[i], degrees, strict=True)])
        for i in far
    ]
    rate = np.count_nonzero(np.array(p) < 0.002) / trials
    assert 0 < rate < 0.0025


def test_an_origin_in_two_domains_is_drawn_for_both():
    value_I = np.arange(12.0)[None]
    origin_I = np.repeat(np.arange(6), 2)
    rng = np.random.default_rng(0)
    shared = resampled_means([value_I] * 2, [origin_I, origin_I], rng, 2_000)
    apart = resampled_means([value_I] * 2, [origin_I, origin_I + 6], rng, 2_000)
    assert np.corrcoef(shared[0][:, 0], shared[1][:, 0])[0, 1] > 0.6
    assert abs(np.corrcoef(apart[0][:, 0], apart[1][:, 0])[0, 1]) < 0.1
    # What origins share makes the mean of the domains less certain.
    differences = np.repeat(np.array([-0.2, -0.1, 0.0, 0.0, 0.1, 0.2]), 2)[None].repeat(10, axis=0)
    one = Domain(differences, origin_I)
    other = Domain(differences, origin_I + 6)
    widths = [e.high - e.low for e in (paired_effect({"a": one, "b": d}) for d in (one, other))]
    assert widths[0] > 1.2 * widths[1]
    # Twice the same six origins are no more of them.
    degrees = [paired_effect({"a": one, "b": d}).parts[-1].degrees for d in (one, other)]
    assert degrees[0] == pytest.approx(5.0) and degrees[1] > 8.0


def test_no_draw_leaves_a_domain_without_documents():
    """Of a domain with two origins, one draw in seven would have none, and count as no effect."""
    (means,) = resampled_means(
        [np.full((1, 8), 3.0)], [np.repeat([0, 1], 4)], np.random.default_rng(0), 500
    )
    assert np.all(means == 3.0)


UNEQUAL = (60, 45, 18, 9, 6, 3, 3, 2, 2, 1, 1, 1, 1)  # much like the folders of headers


@pytest.mark.parametrize("domains", [1, 4])
def test_intervals_cover_the_true_effect_with_few_unequal_origins(domains):
    rng = np.random.default_rng(domains)
    origin_I = np.repeat(np.arange(len(UNEQUAL)), UNEQUAL)
    covered = 0
    for i in range(60):
        sampled = {}
        for name in "abcd"[:domains]:
            of_origin_I = rng.normal(0, 0.12, len(UNEQUAL))[origin_I]
            noise_SxI = rng.normal(0, 0.1, (10, len(origin_I)))
            own_I = origin_I + len(UNEQUAL) * "abcd".index(name)
            sampled[name] = Domain(TRUE + of_origin_I + noise_SxI, own_I)
        effect = paired_effect(sampled, seed=i)
        covered += effect.low <= TRUE <= effect.high
    assert covered >= 51


def test_every_domain_counts_alike_however_many_instances_it_has():
    domains = {
        "small": Domain(np.full((2, 3), 1.0), np.arange(3)),
        "large": Domain(np.full((2, 300), 3.0), np.arange(300)),
    }
    effect = paired_effect(domains)
    assert effect.mean == 2.0
    assert effect.by_domain == {"small": 1.0, "large": 3.0}


def test_one_seed_has_no_interval():
    effect = paired_effect({"a": Domain(np.full((1, 9), -1.0), np.arange(9))})
    assert effect.mean == -1.0
    assert math.isnan(effect.low) and math.isnan(effect.p)
    assert verdict(effect, effect.p, -1, 0.01) == "inconclusive"


def test_domains_must_have_the_same_seeds():
    domains = {n: Domain(np.zeros((n, 4)), np.arange(4)) for n in (2, 3)}
    with pytest.raises(ValueError, match="seeds per domain"):
        paired_effect({str(n): domain for n, domain in domains.items()})


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    # Sorted: 3 x 0.01, 2 x 0.03, then 1 x 0.04, which may not be below what came before it.
    assert adjusted["a"] == pytest.approx(0.03)
    assert adjusted["c"] == adjusted["b"] == pytest.approx(0.06)


def test_a_claim_that_waits_for_its_runs_counts_in_holms_family():
    adjusted = holm({"a": 0.01, "b": 0.04, "waits": math.nan})
    assert adjusted["a"] == pytest.approx(0.03) and adjusted["b"] == pytest.approx(0.08)
    assert math.isnan(adjusted["waits"])
    # No result of another claim makes a verdict weaker later.
    for p in (0.001, 0.02, 0.9):
        later = holm({"a": 0.01, "b": 0.04, "waits": p})
        assert later["a"] <= adjusted["a"] and later["b"] <= adjusted["b"]


@pytest.mark.parametrize(
    ("low", "high", "p", "sign", "expected"),
    [
        (-0.08, -0.04, 0.001, -1, "supported"),
        (-0.08, -0.04, 0.001, 1, "contradicted"),
        (-0.008, 0.006, 0.9, -1, "equivalent"),
        (-0.008, -0.002, 0.01, -1, "equivalent"),
        (-0.08, 0.01, 0.2, -1, "inconclusive"),
        (-0.008, 0.006, 0.001, 0, "supported"),
        (0.03, 0.05, 0.001, 0, "contradicted"),
        (-0.02, 0.03, 0.9, 0, "inconclusive"),
        (-0.02, 0.03, math.nan, 0, "inconclusive"),
    ],
)
def test_verdicts(low, high, p, sign, expected):
    effect = Effect((low + high) / 2, low, high, p, 4, {})
    assert verdict(effect, p, sign, 0.01) == expected


@pytest.mark.parametrize("mean", [0.0, 0.004, -0.0099, 0.0115, -0.02, 0.05])
@pytest.mark.parametrize("error", [0.001, 0.0053])
def test_a_claim_of_equality_is_tested_against_the_margin(mean, error):
    """Twice the one-sided tests of scipy at the ends of the margin."""
    values = [mean + error * math.sqrt(4) * x for x in (-1.0, -0.5, 0.5, 1.0)]
    effect = over_seeds(values)
    below, above = (
        stats.ttest_1samp(values, end, alternative=side).pvalue
        for end, side in ((0.01, "less"), (-0.01, "greater"))
    )
    outside = min(
        stats.ttest_1samp(values, end, alternative=side).pvalue
        for end, side in ((0.01, "greater"), (-0.01, "less"))
    )
    assert p_within(effect, 0.01) == pytest.approx(min(1.0, 2 * max(below, above)))
    assert p_outside(effect, 0.01) == pytest.approx(min(1.0, 2 * outside))
    # The verdict of the claim alone is what its interval says.
    said = verdict(effect, p_of(effect, 0, 0.01), 0, 0.01)
    if max(abs(effect.low), abs(effect.high)) < 0.01:
        assert said == "supported"
    elif effect.low > 0.01 or effect.high < -0.01:
        assert said == "contradicted"
    else:
        assert said == "inconclusive"


def test_a_difference_that_is_not_zero_need_not_contradict_equality():
    effect = with_interval(0.0115, [Part(0.0055**2, 60.0)], 4, {})
    assert effect.low > 0 and effect.p < 0.05
    assert verdict(effect, p_of(effect, 0, 0.01), 0, 0.01) == "inconclusive"


def test_one_seed_decides_nothing_about_equality():
    assert math.isnan(p_of(over_seeds([0.3]), 0, 0.01))
