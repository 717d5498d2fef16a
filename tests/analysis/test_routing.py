"""How far routing differs between domains and within them."""

import numpy as np
import pytest

from lory_jax.analysis.routing import distance_table, expert_use, routing_distances
from lory_jax.errors import InputError


def test_random_halves_of_equal_instances_do_not_differ():
    same = np.tile([0.7, 0.2, 0.1], (2, 6, 1))
    other = np.tile([0.1, 0.2, 0.7], (2, 6, 1))
    for row in routing_distances({"a": same, "b": other}, seed=0):
        assert row["between"] == pytest.approx(0.6)
        assert row["within"] == pytest.approx(0.0, abs=1e-12)
    rng = np.random.default_rng(0)
    noise = {name: rng.dirichlet([1, 1, 1], (2, 40)) for name in "abc"}
    for row in routing_distances(noise, seed=0):
        assert 0.02 < row["within"] < 0.3 and row["between"] < 0.3
    with pytest.raises(InputError, match="at least 2 domains"):
        routing_distances({"a": same}, seed=0)
    with pytest.raises(InputError, match="too few instances in b"):
        routing_distances({"a": same, "b": other[:, :1]}, seed=0)


def test_utilisation_leaves_dense_steps_out():
    lines = [{"step": 1, "experts_active": None}, {"step": 2, "experts_active": 7}]
    assert expert_use(lines, 8) == {"step": [2], "experts_active": [7], "pairs": 8}


def test_the_table_names_the_two_domains_that_differ_most():
    row = {"layer": 3, "between": 0.25, "domains": ["a", "b"], "within": 0.1}
    assert distance_table([row]).splitlines()[1].split() == ["3", "0.250", "0.100", "a", "and", "b"]
