"""The standard error of a perplexity: what it estimates, and where it says nothing."""

import numpy as np
import pytest

from lory_jax.evaluation.perplexity import standard_error


def test_independent_instances_have_the_error_of_their_mean():
    nll_NxL = np.random.default_rng(0).normal(3, 0.5, (50, 12))
    mean_N = nll_NxL[:, 4:].mean(axis=1)
    expected = np.exp(mean_N.mean()) * mean_N.std(ddof=1) / 50**0.5
    assert standard_error(nll_NxL, 4) == pytest.approx(expected)
    own = [f"file {i}" for i in range(50)]
    assert standard_error(nll_NxL, 4, own) == pytest.approx(expected)


def test_it_is_the_spread_over_other_draws_of_origins_of_unlike_sizes():
    """Simulated: every origin has a level of its own, around which its instances lie."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 20, 60)
    origin_N = np.repeat(np.arange(60), sizes)
    names = [f"folder {i}" for i in origin_N]
    means, of_origins, of_instances = [], [], []
    for _ in range(400):
        level_N = rng.normal(0, 0.05, 60)[origin_N]
        nll_NxL = (level_N + rng.normal(0, 0.02, len(origin_N)))[:, None]
        means.append(np.exp(nll_NxL.mean()))
        of_origins.append(standard_error(nll_NxL, 0, names))
        of_instances.append(standard_error(nll_NxL, 0))
    assert np.mean(of_origins) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(of_instances) < 0.5 * np.std(means)


def test_one_sample_has_no_error():
    nll_NxL = np.random.default_rng(0).normal(3, 0.5, (5, 12))
    assert standard_error(nll_NxL[:1], 4) is None
    assert standard_error(nll_NxL, 4, ["one folder"] * 5) is None
