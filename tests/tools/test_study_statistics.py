import math

import numpy as np
import pytest
from scipy import stats

from tools.study.statistics import (
    Domain,
    Effect,
    holm,
    over_seeds,
    p_of,
    p_outside,
    p_within,
    paired_effect,
    student,
    verdict,
)

TRUE = -0.05


def sample(rng, seeds, noise):
    """Losses as a study sees them: training noise per seed, origins that hang together."""
    of_seed_S = rng.normal(0, noise, seeds)
    domains = {}
    for name in "abc":
        origin_I = np.repeat(np.arange(30), rng.integers(1, 12, 30))
        of_origin_I = rng.normal(0, 0.05, 30)[origin_I]
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


UNEQUAL = (200, 150, 60, 30, 20, 10, 8, 5, 5, 4, 3, 2, 2)  # much like the instances of headers


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
            sampled[name] = Domain(TRUE + of_origin_I + noise_SxI, origin_I)
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
    effect = student(0.0115, 0.0055, 60.0, 4, {})
    assert effect.low > 0 and effect.p < 0.05
    assert verdict(effect, p_of(effect, 0, 0.01), 0, 0.01) == "inconclusive"


def test_one_seed_decides_nothing_about_equality():
    assert math.isnan(p_of(over_seeds([0.3]), 0, 0.01))
