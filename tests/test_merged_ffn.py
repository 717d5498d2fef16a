"""Merging in parameter space against loops: the contract of `merged_ffn`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from models import assert_close, assert_trees_close, float64
from reference import central_differences

from lory_jax.model import merged_ffn as module
from lory_jax.model.merged_ffn import from_expert_major, merge_experts, merged_ffn, swiglu

S, T, D, F, E = 3, 2, 5, 8, 3
VALUES, GRADIENTS = 1e-5, 1e-4


def inputs(num_experts=E, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    expert_major = {
        name: rng.normal(size=(num_experts, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    x = rng.normal(size=(S, T, D)).astype(np.float32)
    # Any weights will do: merging is linear in them, they need not sum to one.
    r = rng.normal(size=(S, num_experts)).astype(np.float32)
    return x, expert_major, r


def loops(x, experts, r):
    return np.array([reference.merged_ffn(x[s], experts, r[s]) for s in range(len(x))])


@pytest.fixture(params=["einsum", "one block", "blocks and a rest", "whole blocks"])
def run(request, monkeypatch):
    """`merged_ffn` of expert-major weights, by every implementation and way of blocking F = 8."""
    implementation = "einsum" if request.param == "einsum" else "blocks"
    columns = {"blocks and a rest": 3, "whole blocks": 2}.get(request.param)
    if columns:
        monkeypatch.setattr(module, "block_size", lambda *shape: columns)

    def run(x, expert_major, r):
        return merged_ffn(x, from_expert_major(expert_major), r, implementation)

    return run


def test_equals_loops_in_value_and_every_gradient(run):
    x, experts, r = inputs()
    probe = np.random.default_rng(1).normal(size=(S, T, D)).astype(np.float32)

    def loss(x, experts, r):
        y = run(x, experts, r)
        return jnp.sum(y * probe), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, experts, r)
    of_x, of_experts, of_r = gradients
    x, experts, r = float64((x, experts, r))
    assert_close(y, loops(x, experts, r), VALUES)

    def scalar(x, experts, r):
        return np.sum(loops(x, experts, r) * probe)

    assert_close(of_x, central_differences(lambda v: scalar(v, experts, r), x), GRADIENTS)
    assert_close(of_r, central_differences(lambda v: scalar(x, experts, v), r), GRADIENTS)
    for name, w in experts.items():
        expected = central_differences(lambda v, n=name: scalar(x, {**experts, n: v}, r), w)
        assert_close(of_experts[name], expected, GRADIENTS, name)


def test_blocks_fit_their_memory_and_cover_f():
    for S, D, F, itemsize in ((64, 1024, 2816, 2), (4096, 4096, 11_008, 2), (1, 8, 100, 4)):
        size = module.block_size(S, D, F, itemsize)
        assert size == F or size % module.BLOCK_MULTIPLE == 0
        fits = 3 * S * D * size * itemsize <= module.MERGED_BYTES
        assert fits or size == module.BLOCK_MULTIPLE
    assert module.block_size(1, 8, 100, 4) == 100


def test_an_unknown_implementation_is_refused():
    x, experts, r = inputs()
    with pytest.raises(ValueError, match="takes blocks or einsum"):
        merged_ffn(x, experts, r, "magic")


def test_one_hot_weights_pick_one_expert():
    x, experts, _ = inputs()
    got = merged_ffn(x, from_expert_major(experts), jnp.eye(E)[jnp.array([2, 0, 1])])
    for s, expert in enumerate((2, 0, 1)):
        one = [experts[name][expert] for name in ("gate", "up", "down")]
        assert_close(got[s], swiglu(x[s], *one), VALUES)


def test_identical_experts_are_one_expert_for_any_distribution():
    x, experts, r = inputs()
    same = {name: np.repeat(w[:1], E, axis=0) for name, w in experts.items()}
    r = jax.nn.softmax(r)
    one = [w[0] for w in from_expert_major(experts).values()]
    assert_close(merged_ffn(x, from_expert_major(same), r), swiglu(x, *one), VALUES)


def test_a_single_expert_is_a_dense_ffn():
    x, experts, _ = inputs(num_experts=1)
    one = [experts[name][0] for name in ("gate", "up", "down")]
    got = merged_ffn(x, from_expert_major(experts), jnp.ones((S, 1)))
    assert_close(got, swiglu(x, *one), 1e-6)


def test_it_is_parameters_that_are_merged_not_outputs():
    x, experts, r = inputs()
    outputs = sum(
        r[:, i, None, None] * swiglu(x, *(experts[n][i] for n in ("gate", "up", "down")))
        for i in range(E)
    )
    got = merged_ffn(x, from_expert_major(experts), r)
    assert np.max(np.abs(got - outputs)) > 0.1 * np.max(np.abs(got))


def test_merging_in_half_precision_accumulates_in_float32():
    """Sixty-four experts whose sum would stall at 256 if it were kept in bfloat16."""
    ones = {
        name: jnp.full((64, *shape), 8.0, jnp.bfloat16)
        for name, shape in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items()
    }
    merged = merge_experts(ones, jnp.ones((S, 64)))
    for w in merged.values():
        assert w.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(w, np.float32), 512.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_and_gradients_have_the_types_of_their_inputs(dtype):
    x, experts, r = inputs()
    x = jnp.asarray(x, dtype)

    def loss(x, experts, r):
        y = merged_ffn(x, experts, r)
        assert y.dtype == dtype
        return jnp.sum(y.astype(jnp.float32) ** 2)

    got = jax.grad(loss, argnums=(0, 1, 2))(x, from_expert_major(experts), r)
    assert got[0].dtype == dtype and got[2].dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in got[1].values())
    if dtype == jnp.bfloat16:
        exact = jax.grad(lambda *a: jnp.sum(merged_ffn(*a) ** 2), argnums=(0, 1, 2))(
            x.astype(jnp.float32), from_expert_major(experts), r
        )
        assert_trees_close(got[1:], exact[1:], 0.03)
