"""How far routing differs between domains, and how far it would with shuffled labels."""

import itertools

import numpy as np
import pytest

from lory_jax.analysis.distances import (
    distance_table,
    label_distances,
    mean_by_origin,
    routing_distances,
    shuffled,
)
from lory_jax.analysis.routing import expert_use
from lory_jax.errors import InputError


def test_the_largest_distance_is_that_of_the_mean_of_origins():
    """Against loops, with origins of unequal sizes, which count alike."""
    rng = np.random.default_rng(0)
    sizes = {"a": (1, 5, 2), "b": (4, 4), "c": (3, 1, 1, 1)}
    origins = {
        d: [f"{d}{i}" for i, n in enumerate(ns) for _ in range(n)] for d, ns in sizes.items()
    }
    weights = {d: rng.dirichlet([1, 1, 1], (2, len(names))) for d, names in origins.items()}
    for layer, row in enumerate(routing_distances(weights, origins, seed=0)):
        far = {}
        for a, b in itertools.combinations(weights, 2):
            means = [
                [
                    np.mean(
                        [
                            weights[d][layer, [o == name for o in origins[d]], e].mean()
                            for name in {*origins[d]}
                        ]
                    )
                    for e in range(3)
                ]
                for d in (a, b)
            ]
            far[a, b] = sum(abs(x - y) for x, y in zip(*means, strict=True)) / 2
        assert row["between"] == pytest.approx(max(far.values()))
        assert tuple(row["domains"]) == max(far, key=far.get) and row["layer"] == layer


def test_domains_that_are_routed_apart_are_farther_than_shuffled_ones():
    same = np.tile([0.7, 0.2, 0.1], (2, 8, 1))
    other = np.tile([0.1, 0.2, 0.7], (2, 8, 1))
    origins = {name: [f"{name}{i // 2}" for i in range(8)] for name in "ab"}
    for row in routing_distances({"a": same, "b": other}, origins, seed=0):
        assert row["between"] == pytest.approx(0.6)
        assert 0.05 < row["shuffled"] < 0.4


def test_origins_that_differ_are_no_difference_between_domains():
    """Six folders a domain, alike inside: halves of instances would find domains apart."""
    exceeded = 0
    for trial in range(20):
        rng = np.random.default_rng(trial)
        weights, origins = {}, {}
        for name in "ab":
            weights[name] = rng.dirichlet([1, 1, 1], (1, 6)).repeat(10, axis=1)
            origins[name] = [f"{name}{i // 10}" for i in range(60)]
        (row,) = routing_distances(weights, origins, seed=0)
        exceeded += row["between"] > row["shuffled_high"]
    assert exceeded <= 4  # one in twenty is expected


def test_labels_change_places_among_origins_of_similar_size():
    """Or a domain of a few large origins would become one of small ones."""
    rng = np.random.default_rng(0)
    size_O = rng.permutation([*range(1, 25), *range(100, 116)])
    label_O = (size_O >= 100).astype(int)
    for _ in range(20):
        assert np.array_equal(shuffled(label_O, size_O, rng), label_O)
    apart_O = np.repeat([0, 1], 20)  # equal ones may be any of a block
    found = [shuffled(apart_O, np.full(40, 3), rng) for _ in range(20)]
    assert 0.4 < np.mean([found_O == apart_O for found_O in found]) < 0.6
    mixed_O = size_O % 2
    found = [shuffled(mixed_O, size_O, rng) for _ in range(20)]
    assert all(found_O.sum() == mixed_O.sum() for found_O in found)
    assert np.mean([found_O == mixed_O for found_O in found]) < 0.7


def test_a_single_origin_for_each_domain_cannot_tell():
    weights = {"a": np.tile([0.9, 0.1], (1, 3, 1)), "b": np.tile([0.2, 0.8], (1, 5, 1))}
    origins = {"a": ["x"] * 3, "b": ["y"] * 5}
    (row,) = routing_distances(weights, origins, seed=0)
    assert row["between"] == pytest.approx(row["shuffled"]) == row["shuffled_high"]
    with pytest.raises(InputError, match="at least 2 domains; got a"):
        routing_distances({"a": weights["a"]}, origins, seed=0)


def test_weights_of_an_origin_are_the_mean_of_its_instances():
    w_YxIxE = np.random.default_rng(0).dirichlet(np.ones(3), (2, 5))
    found = mean_by_origin(w_YxIxE, ["z", "a", "z", "m", "a"])
    expected = [w_YxIxE[:, rows].mean(axis=1) for rows in ([1, 4], [3], [0, 2])]
    np.testing.assert_allclose(found, expected)
    # More axes than one, as the study has them, are kept.
    assert label_distances(found, np.array([0, 1, 1])).shape == (1, 2)


def test_utilisation_leaves_dense_steps_out():
    lines = [{"step": 1, "experts_active": None}, {"step": 2, "experts_active": 7}]
    assert expert_use(lines, 8) == {"step": [2], "experts_active": [7], "pairs": 8}


def test_the_table_names_the_two_domains_that_differ_most():
    row = {"layer": 3, "between": 0.25, "domains": ["a", "b"]}
    row |= {"shuffled": 0.1, "shuffled_high": 0.15}
    expected = ["3", "0.250", "0.100", "0.150", "a", "and", "b"]
    assert distance_table([row]).splitlines()[1].split() == expected
