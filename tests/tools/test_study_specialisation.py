"""Specialisation against shuffled labels, where it is there and where folders merely differ."""

import numpy as np

from tools.study.measure import mean_by_origin
from tools.study.specialisation import specialisation

FOLDERS = {"code": 12, "prose": 16, "stubs": 5}
LAYERS, EXPERTS, SEEDS = 2, 4, 3


def weights(rng, of_domain):
    """Routing weights that differ from folder to folder, and by `of_domain` between domains."""
    found = []
    for _ in range(SEEDS):
        logits = {d: rng.normal(0, 1, (n, LAYERS, EXPERTS)) for d, n in FOLDERS.items()}
        for number, domain in enumerate(logits):
            logits[domain][..., number] += of_domain
        found.append(
            {d: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for d, x in logits.items()}
        )
    return found


def sizes(rng):
    return {domain: rng.integers(1, 60, n) for domain, n in FOLDERS.items()}


def test_folders_that_differ_are_no_specialisation():
    """Domains of few folders differ always; if labels mean nothing, p must be as often small."""
    p = []
    for trial in range(12):
        rng = np.random.default_rng(trial)
        p.append(specialisation(weights(rng, 0.0), sizes(rng)).p)
    assert min(p) > 0.005 and sum(x < 0.1 for x in p) <= 4


def test_domains_that_are_routed_apart_are():
    rng = np.random.default_rng(0)
    effect = specialisation(weights(rng, 3.0), sizes(rng))
    assert effect.p < 0.002 and effect.mean > 0.2 and effect.seeds == SEEDS


def test_the_effect_is_the_distance_above_that_of_shuffled_labels():
    """Two domains of one folder each: shuffling swaps them, and the distance stays."""
    one = {"a": np.array([[[0.9, 0.1]]]), "b": np.array([[[0.2, 0.8]]])}
    effect = specialisation([one, one], {"a": np.array([3]), "b": np.array([5])})
    assert abs(effect.mean) < 1e-12 and effect.p == 1.0


def test_weights_of_a_folder_are_the_mean_of_its_instances():
    w_YxIxE = np.random.default_rng(0).dirichlet(np.ones(3), (2, 5))
    found = mean_by_origin(w_YxIxE, ["z", "a", "z", "m", "a"])
    expected = [w_YxIxE[:, rows].mean(axis=1) for rows in ([1, 4], [3], [0, 2])]
    np.testing.assert_allclose(found, expected)
