"""Specialisation against shuffled labels, where it is there and where folders merely differ."""

import numpy as np
import pytest

import tools.study.specialisation
from tools.study.specialisation import specialisation

FOLDERS = {"code": 12, "prose": 16, "stubs": 5}
LAYERS, EXPERTS, SEEDS = 2, 4, 3


def weights(rng, of_domain, sizes):
    """Routing weights that differ from folder to folder, small ones more than large ones, and by
    `of_domain` between domains."""
    found = []
    for _ in range(SEEDS):
        spread = {d: 0.3 + 2 / np.sqrt(n)[:, None, None] for d, n in sizes.items()}
        logits = {d: s * rng.normal(size=(len(s), LAYERS, EXPERTS)) for d, s in spread.items()}
        for number, domain in enumerate(logits):
            logits[domain][..., number] += of_domain
        found.append(
            {d: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for d, x in logits.items()}
        )
    return found


def sizes(rng):
    """Stubs have a few large folders, and the others many small ones, as in the study."""
    largest = {"code": 20, "prose": 40, "stubs": 200}
    return {domain: rng.integers(1, largest[domain], n) for domain, n in FOLDERS.items()}


@pytest.fixture(autouse=True)
def few_shuffles(monkeypatch):
    monkeypatch.setattr(tools.study.specialisation, "SHUFFLES", 999)


def test_folders_that_differ_are_no_specialisation():
    """Domains of few folders differ always; if labels mean nothing, p must be as often small."""
    effects = []
    for trial in range(40):
        rng = np.random.default_rng(trial)
        of_folders = sizes(rng)
        effects.append(specialisation(weights(rng, 0.0, of_folders), of_folders))
    p = [effect.p for effect in effects]
    assert min(p) > 0.005 and sum(x < 0.2 for x in p) <= 12
    # Distances are neither larger nor much smaller than those of shuffled labels.
    assert -0.01 < np.mean([effect.mean for effect in effects]) < 0.005


def test_domains_that_are_routed_apart_are():
    rng = np.random.default_rng(0)
    of_folders = sizes(rng)
    effect = specialisation(weights(rng, 3.0, of_folders), of_folders)
    assert effect.p <= 0.002 and effect.mean > 0.2 and effect.seeds == SEEDS


def test_the_effect_is_the_distance_above_that_of_shuffled_labels():
    """Two domains of one folder each: shuffling swaps them, and the distance stays."""
    one = {"a": np.array([[[0.9, 0.1]]]), "b": np.array([[[0.2, 0.8]]])}
    effect = specialisation([one, one], {"a": np.array([3]), "b": np.array([5])})
    assert abs(effect.mean) < 1e-12 and effect.p == 1.0
