"""A loss or gradient that is NaN or infinite: the step leaves everything but its number alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.parallel import make_mesh
from lory_jax.training.state import new_state
from lory_jax.training.step import make_norms, make_train_step
from tests.support.models import constant_rate, params_of, random_tokens, tiny_config

OPTIMIZER = constant_rate(0.01)
POISON = 36  # a token whose embedding is broken below


@functools.cache
def step_of(experts: int, microbatches: int):
    config = tiny_config(num_experts=experts)
    return make_train_step(config, OPTIMIZER, make_mesh(1, 1, 1), microbatches)


def poisoned_params(experts: int, value: float):
    params = jax.tree.map(jnp.asarray, params_of(tiny_config(num_experts=experts)))
    return {**params, "embedding": params["embedding"].at[POISON].set(value)}


def bits(state) -> list[bytes]:
    kept = {name: leaf for name, leaf in state.items() if name != "step"}
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(kept))]


def clean(rows: int, seed: int):
    return jnp.asarray(random_tokens(rows, 15, seed) % POISON)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_batch_changes_nothing_but_the_step(value):
    """With experts, and with the bad row in only one of two microbatches."""
    step = step_of(4, 2)
    state = new_state(tiny_config(num_experts=4), OPTIMIZER, poisoned_params(4, value))
    bad = clean(4, 1).at[3, 5].set(POISON)
    state, metrics = step(state, clean(4, 0))
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    before = bits(state)
    state, metrics = step(state, bad)
    assert metrics["skipped"] == 1
    assert bits(state) == before and state["step"] == 2
    state, metrics = step(state, clean(4, 2))
    assert metrics["skipped"] == 0 and bits(state) != before


def test_skipping_is_as_if_the_batch_had_never_been():
    """Dense: nothing in the state but `step` depends on how many steps there were."""
    step, params = step_of(0, 1), poisoned_params(0, np.nan)
    bad = clean(4, 9).at[0, 0].set(POISON)
    ends = []
    for batches in ([clean(4, 0), clean(4, 2)], [clean(4, 0), bad, bad, clean(4, 2)]):
        state = new_state(tiny_config(num_experts=0), OPTIMIZER, jax.tree.map(jnp.copy, params))
        for batch in batches:
            state, _ = step(state, batch)
        ends.append(bits(state))
    assert ends[0] == ends[1]


@pytest.mark.faults
def test_norms_say_which_layer_it_was():
    config = tiny_config(num_experts=4)
    params = jax.tree.map(jnp.asarray, params_of(config))
    gate = params["layers"]["ffn"]["gate"]
    params["layers"]["ffn"]["gate"] = gate.at[1].set(np.nan)
    of_params, of_gradients = make_norms(config, make_mesh(1, 1, 1), 1)(params, clean(4, 0))
    gate_norms = np.asarray(of_params["layers"]["ffn"]["gate"])
    np.testing.assert_allclose(gate_norms[0], np.linalg.norm(np.asarray(gate[0])), rtol=1e-5)
    assert np.isnan(gate_norms[1]) and np.isfinite(of_params["layers"]["ffn"]["up"]).all()
    assert np.isnan(of_gradients["layers"]["ffn"]["gate"]).all()
