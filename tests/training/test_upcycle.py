"""From dense to experts: the same function, the same next update."""

import dataclasses

import jax
import numpy as np
import pytest

from lory_jax.model.transformer import init_params
from lory_jax.parallel import make_mesh
from lory_jax.training.state import NEVER, new_state
from lory_jax.training.step import make_train_step
from lory_jax.training.upcycle import FFN_MATRICES, grow, make_upcycle, upcycle_params
from tests.support.models import (
    assert_close,
    assert_trees_close,
    constant_rate,
    forward,
    params_of,
    random_tokens,
    tiny_config,
)

E, RATE, BETA1, BETA2, DECAY = 4, 1e-2, 0.9, 0.95, 0.1
# With a router of zeros the weights stay 1/E, whatever the hidden states.
DENSE, LORY = tiny_config(num_experts=0), tiny_config(num_experts=E, router_init_scale=0.0)


def adamw(rate: float, epsilon: float):
    """Without clipping."""
    fields = dict(beta1=BETA1, beta2=BETA2, epsilon=epsilon, weight_decay=DECAY, clip_norm=0.0)
    return constant_rate(rate, **fields)


@pytest.fixture(scope="module")
def runs():
    """The dense state after 3 steps, Lory's made of it, and both after one step more."""
    mesh = make_mesh(1, 1, 1)
    # So small that it plays no part; a large one has a test of its own.
    optimizer = adamw(RATE, 1e-12)
    dense_step, lory_step = (make_train_step(config, optimizer, mesh) for config in (DENSE, LORY))
    dense = new_state(DENSE, optimizer, params_of(DENSE))
    for i in range(3):
        dense, _ = dense_step(dense, random_tokens(2, 15, seed=i))
    lory = make_upcycle(LORY, optimizer, mesh, seed=0)(dense)
    # Copied out: the steps below take their states' memory.
    dense, lory = jax.tree.map(np.array, (dense, lory))
    tokens = random_tokens(2, 15, seed=3)
    after = jax.device_get((dense_step(dense, tokens), lory_step(lory, tokens)))
    return dense, lory, *after


def ffn(params):
    return params["layers"]["ffn"]


def without_ffn(params):
    layers = {k: v for k, v in params["layers"].items() if k != "ffn"}
    return {**params, "layers": layers}


def test_every_expert_is_a_copy_and_the_rest_is_untouched(runs):
    dense, lory, _, _ = runs
    for name in FFN_MATRICES:
        for expert in range(E):
            np.testing.assert_array_equal(
                ffn(lory["params"])[name][:, expert], ffn(dense["params"])[name]
            )
    for a, b in zip(
        jax.tree.leaves(without_ffn(lory["params"])),
        jax.tree.leaves(without_ffn(dense["params"])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert lory["step"] == dense["step"] == 3
    np.testing.assert_array_equal(lory["last_active_YxE"], np.full((2, E), NEVER))


def test_moments_are_carried_at_the_scale_of_an_expert_and_the_routers_start_at_zero(
    runs,
):
    dense, lory, _, _ = runs
    old, new = dense["opt_state"][0], lory["opt_state"][0]
    assert new.count == old.count == 3
    for moment, divisor in (("mu", E), ("nu", E**2)):
        a, b = getattr(new, moment), getattr(old, moment)
        assert not np.any(ffn(a)["router"])
        for name in FFN_MATRICES:
            assert np.any(ffn(b)[name])
            for expert in range(E):
                np.testing.assert_allclose(
                    ffn(a)[name][:, expert], ffn(b)[name] / divisor, rtol=1e-6
                )
        assert_trees_close(without_ffn(a), without_ffn(b), 0.0)


def test_first_update_moves_the_merged_function_as_the_dense_one_would(runs):
    dense, _, (next_dense, dense_metrics), (next_lory, metrics) = runs
    np.testing.assert_allclose(metrics["loss"], dense_metrics["loss"], rtol=1e-6)
    before, after = ffn(dense["params"]), ffn(next_dense["params"])
    experts = ffn(next_lory["params"])
    for name in FFN_MATRICES:
        moved = after[name] - before[name]
        assert np.median(np.abs(moved)) > 0.1 * RATE
        merged = np.mean(experts[name], axis=1, dtype=np.float64)
        # 0.1 % of the largest update: gradients differ in float32 rounding only.
        assert_close(merged - before[name], moved, 1e-3, name)
        # Under uniform weights no expert differs from another yet.
        assert np.ptp(experts[name], axis=1).max() < 1e-3 * RATE
    dense_rest, lory_rest = without_ffn(next_dense["params"]), without_ffn(next_lory["params"])
    for a, b in zip(jax.tree.leaves(lory_rest), jax.tree.leaves(dense_rest), strict=True):
        assert np.max(np.abs(a - b)) < 2e-3 * RATE


def test_a_large_epsilon_weighs_e_times_as_much_after_upcycling(runs):
    """The stated exception: the merged update is m / (sqrt(v) + E * epsilon)."""
    dense, lory, _, _ = runs
    epsilon = 1e-3
    optimizer = adamw(1.0, epsilon)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(
        lambda w: 1e-2 * rng.normal(size=w.shape).astype(np.float32), dense["params"]
    )
    router = np.zeros_like(ffn(lory["params"])["router"])
    # What an expert sees under uniform weights.
    gradients = upcycle_params(gradient, router, divisor=E)
    updates, _ = jax.jit(optimizer.update)(gradients, lory["opt_state"], lory["params"], 3)
    adam = dense["opt_state"][0]
    count = int(adam.count) + 1
    for name in FFN_MATRICES:
        g, w = ffn(gradient)[name], ffn(dense["params"])[name]
        m = (BETA1 * ffn(adam.mu)[name] + (1 - BETA1) * g) / (1 - BETA1**count)
        v = (BETA2 * ffn(adam.nu)[name] + (1 - BETA2) * g**2) / (1 - BETA2**count)
        merged = np.mean(-np.asarray(ffn(updates)[name]), axis=1, dtype=np.float64)
        assert_close(merged, m / (np.sqrt(v) + E * epsilon) + DECAY * w, 1e-4, name)
        dense_update = m / (np.sqrt(v) + epsilon) + DECAY * w
        assert np.max(np.abs(merged - dense_update)) > 0.02 * np.max(np.abs(dense_update))


def test_the_router_is_drawn_from_the_seed_and_shares_no_draw_with_the_dense_model():
    config = tiny_config(num_experts=E)
    optimizer = adamw(RATE, 1e-8)
    dense_params = jax.jit(init_params, static_argnums=0)(DENSE, jax.random.key(7))
    state = new_state(DENSE, optimizer, dense_params)

    def router(seed):
        lory = make_upcycle(config, optimizer, make_mesh(1, 1, 1), seed)(state)
        return np.asarray(ffn(lory["params"])["router"])

    first = router(7)
    np.testing.assert_allclose(np.std(first), 0.23 / 4, rtol=0.2)
    assert not np.array_equal(first, router(8))
    for leaf in jax.tree.leaves(dense_params):
        draws = np.ravel(leaf)[: first.size]
        if np.std(draws) and draws.size == first.size:  # not a norm
            assert abs(np.corrcoef(first.ravel(), draws)[0, 1]) < 0.5


def test_nothing_redrawn_is_the_same_upcycling_bit_for_bit(runs):
    dense, lory, _, _ = runs
    got = make_upcycle(LORY, adamw(RATE, 1e-12), make_mesh(1, 1, 1), seed=0, redraw=0.0)(dense)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), lory)


def test_redrawn_entries_have_their_share_their_distribution_and_no_moments(runs):
    dense, lory, _, _ = runs
    share = 0.3
    got = make_upcycle(LORY, adamw(RATE, 1e-12), make_mesh(1, 1, 1), seed=0, redraw=share)(dense)
    got = jax.device_get(got)
    adam, kept_adam = got["opt_state"][0], lory["opt_state"][0]
    for a, b in zip(
        jax.tree.leaves(without_ffn(got["params"])),
        jax.tree.leaves(without_ffn(lory["params"])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ffn(got["params"])["router"], ffn(lory["params"])["router"])
    for name in FFN_MATRICES:
        new, copied = ffn(got["params"])[name], ffn(lory["params"])[name]
        is_new = new != copied
        for expert in range(E):  # of 768 entries: five standard deviations
            assert abs(is_new[:, expert].mean() - share) < 0.085
        # Experts are redrawn at different places.
        assert 0.5 < np.mean(is_new[:, 0] != is_new[:, 1]) / (2 * share * (1 - share)) < 1.5
        for layer in range(2):
            drawn, matrix = new[layer][is_new[layer]], ffn(dense["params"])[name][layer]
            np.testing.assert_allclose(drawn.std(), matrix.std(), rtol=0.2)
            assert abs(drawn.mean() - matrix.mean()) < 0.2 * matrix.std()
        for moment in ("mu", "nu"):
            value = ffn(getattr(adam, moment))[name]
            assert not np.any(value[is_new])
            carried = ffn(getattr(kept_adam, moment))[name]
            np.testing.assert_array_equal(value[~is_new], carried[~is_new])


def test_redrawing_follows_the_seed(runs):
    dense = runs[0]
    first, second, other = (
        make_upcycle(LORY, adamw(RATE, 1e-12), make_mesh(1, 1, 1), seed, redraw=0.5)(dense)
        for seed in (1, 1, 2)
    )
    gate = [np.asarray(ffn(state["params"])["gate"]) for state in (first, second, other)]
    np.testing.assert_array_equal(gate[0], gate[1])
    assert not np.array_equal(gate[0], gate[2])


@pytest.mark.parametrize(
    ("routing", "experts"), [("uniform", E), ("uniform", 1), ("causal", 1), ("prefix", 1)]
)
def test_experts_that_are_not_routed_train_as_the_dense_model(routing, experts):
    """Step after step: with equal weights, or a single expert, the merge is the dense FFN."""
    config = tiny_config(num_experts=experts, routing=routing)
    mesh, optimizer = make_mesh(1, 1, 1), adamw(RATE, 1e-12)
    dense_step, step = (make_train_step(c, optimizer, mesh) for c in (DENSE, config))
    dense = new_state(DENSE, optimizer, params_of(DENSE))
    dense, _ = dense_step(dense, random_tokens(2, 15))
    state = make_upcycle(config, optimizer, mesh, seed=0)(dense)
    losses, expected = [], []
    for i in range(1, 8):
        tokens = random_tokens(2, 15, seed=i)
        (dense, of_dense), (state, metrics) = dense_step(dense, tokens), step(state, tokens)
        losses.append(float(metrics["loss"]))
        expected.append(float(of_dense["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("bias", [False, True])
def test_growing_the_experts_preserves_the_function(bias):
    small = tiny_config(num_experts=2, router_init_scale=4.0, mlp_bias=bias, merged_ffn="einsum")
    large = dataclasses.replace(small, num_experts=6)
    params, tokens = params_of(small), random_tokens(2, 21)
    expected, r_small = forward(small)(params, tokens)
    grown = grow(params, 3, jax.random.key(1), 0.0)
    logits, r_large = forward(large)(grown, tokens)
    assert_close(logits, expected, 1e-5)
    # An original and its two copies share its weight.
    assert_close(np.asarray(r_large).reshape(*r_large.shape[:-1], 3, 2).sum(-2), r_small, 1e-6)


def test_a_share_of_the_copies_entries_is_drawn_anew_and_the_originals_stay():
    small = tiny_config(num_experts=2)
    before, after = ffn(params_of(small)), ffn(grow(params_of(small), 2, jax.random.key(1), 0.25))
    for name in FFN_MATRICES:
        old, new = np.asarray(before[name]), np.asarray(after[name])
        np.testing.assert_array_equal(new[:, :2], old)
        changed = np.mean(new[:, 2:] != old)
        assert 0.15 < changed < 0.35
        for expert in range(2):  # as spread out as the expert that it copies
            ratio = np.std(new[:, 2 + expert]) / np.std(old[:, expert])
            assert 0.8 < ratio < 1.25
    np.testing.assert_array_equal(after["router"], np.tile(before["router"], (1, 1, 2)))
