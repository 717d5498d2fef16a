"""AdamW, its schedule, mask and clipping, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lory_jax.config import base_config
from lory_jax.training.optimizer import decay_mask, make_optimizer
from tests.support import reference
from tests.support.models import assert_trees_close, constant_rate, params_of, tiny_config

SCHEDULE = dict(
    steps=200, learning_rate=3e-4, warmup_fraction=0.05, final_learning_rate_fraction=0.1
)


def rate(step, **fields):
    return float(optimizer_of(**{**SCHEDULE, **fields}).schedule(jnp.asarray(step)))


def optimizer_of(**fields):
    train = base_config().train
    train.update(fields)
    return make_optimizer(train)


def test_schedule_warms_up_from_above_zero_to_the_peak_then_falls_to_the_final_fraction():
    """The warm-up is the straight line from peak / 10 at step 0 to the peak at step 10."""
    warmup = 10
    for step in range(warmup + 1):
        expected = 3e-4 * (1 + (warmup - 1) * step / warmup) / warmup
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)
    np.testing.assert_allclose(rate(200), 0.1 * 3e-4, rtol=1e-5)
    np.testing.assert_allclose(rate(500), 0.1 * 3e-4, rtol=1e-5)
    # Half-way between the end of the warm-up and the end: half-way between peak and final.
    np.testing.assert_allclose(rate(105), 0.55 * 3e-4, rtol=1e-5)
    rates = np.array([rate(step) for step in range(201)])
    assert np.all(np.diff(rates[: warmup + 1]) > 0) and np.all(np.diff(rates[warmup:]) < 0)


@pytest.mark.parametrize(
    "fields", [{"warmup_fraction": 0.0}, {"warmup_fraction": 1.0}, {"steps": 1}]
)
def test_schedule_is_positive_and_at_most_the_peak_in_extreme_runs(fields):
    for step in range(fields.get("steps", 200)):
        assert 0 < rate(step, **fields) <= 3e-4 * (1 + 1e-6)


def test_rewarming_multiplies_the_schedule_by_a_line_from_upcycling_on():
    train = base_config().train
    train.update({**SCHEDULE, "upcycle_rewarm_fraction": 0.1})
    plain = make_optimizer(train).schedule  # a dense run: nothing is upcycled
    rewarmed = make_optimizer(train, dense_steps=30).schedule
    for step in range(200):
        ramp = 1.0 if step < 30 else min(1.0, (step - 29) / 20)
        np.testing.assert_allclose(rewarmed(step), ramp * rate(step), rtol=1e-5)
        np.testing.assert_allclose(plain(step), rate(step), rtol=1e-6)


@pytest.mark.parametrize("experts", [0, 4])
def test_decay_covers_every_matrix_and_no_norm(experts):
    params = params_of(tiny_config(num_experts=experts))
    mask = decay_mask(params)
    for path, is_decayed in jax.tree_util.tree_leaves_with_path(mask):
        assert is_decayed == ("norm" not in path[-1].key), path


def test_an_unknown_parameter_is_refused():
    with pytest.raises(KeyError, match="bias"):
        decay_mask({"layers": {"bias": np.zeros(3)}})


def clipped(gradients, limit):
    result, _ = optimizer_of(clip_norm=limit).clip.update(gradients, optax.EmptyState())
    return result


def test_clipping_scales_down_to_the_norm_and_never_up():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    small = clipped(gradients, 1.0)
    np.testing.assert_allclose(optax.tree.norm(small), 1.0, rtol=1e-6)
    np.testing.assert_allclose(small["a"] / small["b"][0, 0], [0.75, 0.0], rtol=1e-6)
    for limit in (5.0, 100.0, 0.0):  # 0 turns it off
        assert_trees_close(clipped(gradients, limit), gradients, 1e-6)
    zero = jax.tree.map(jnp.zeros_like, gradients)
    assert_trees_close(clipped(zero, 1.0), zero, 0.0)


def test_the_stored_state_is_that_of_adam_alone():
    """Checkpoints of every version have these leaves; the schedule and clipping add none."""
    params = {"gate": np.ones((3, 2), np.float32)}
    leaves = jax.tree_util.tree_leaves_with_path(optimizer_of().init(params))
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    assert names == ["[0].count", "[0].mu['gate']", "[0].nu['gate']"]


def test_adamw_equals_a_numpy_loop():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 2)) for name in ("gate", "final_norm")}
    decay = {"gate": 0.1, "final_norm": 0.0}
    settings = dict(beta1=0.8, beta2=0.9, epsilon=1e-3)
    optimizer = constant_rate(0.05, **settings, clip_norm=0.0)
    state = {
        "count": 0,
        "m": {n: np.zeros((3, 2)) for n in params},
        "v": {n: np.zeros((3, 2)) for n in params},
    }
    got = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    opt_state = optimizer.init(got)
    for _ in range(5):
        gradients = {name: rng.normal(size=(3, 2)) for name in params}
        params = reference.adamw(
            params, gradients, state, rate=0.05, weight_decay=decay, **settings
        )
        gradients = jax.tree.map(jnp.float32, gradients)
        updates, opt_state = optimizer.update(gradients, opt_state, got, 0)
        got = optax.apply_updates(got, updates)
    assert_trees_close(got, params, 1e-5)
