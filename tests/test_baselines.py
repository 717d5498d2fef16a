"""The sparse baselines: against loops, under perturbation, and where they are the dense model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_reference
from flax import nnx
from models import (
    assert_close,
    assert_trees_close,
    float64,
    forward,
    params_of,
    random_tokens,
    tiny_config,
)

from lory_jax.model.baselines import SPARSE, load_balancing_loss
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import Block, build
from lory_jax.training.upcycle import upcycle_params

L, T, E = 14, 4, 4
VALUES, GRADIENTS = 2e-5, 1e-3  # float32 against float64; of a directional derivative
LENGTHS = np.array([0, 3, 9, 14])

# Routing, and the fields that go with it: slots for all, too few of them, several groups.
CASES = [
    ("expert_choice_segment", {}),
    ("expert_choice_segment", {"capacity_factor": 2.0, "routing_group": 2}),
    ("expert_choice_token", {}),
    ("expert_choice_token", {"routing_group": 1}),
    ("top1", {}),
    ("top1", {"capacity_factor": 0.5, "routing_group": 2}),
    ("top2", {}),
    ("top2", {"capacity_factor": 0.6, "routing_group": 1}),
]


@functools.cache
def layer(config):
    """The jitted `(ffn parameters, h, prompt lengths or None) -> (y, routed)` of one layer."""
    graph, _ = nnx.split(nnx.merge(build(config)[0], params_of(config)).layers)

    @jax.jit
    def run(ffn_params, h_BxLxD, lengths_B=None):
        params = jax.tree.map(lambda w: w[0], params_of(config)["layers"]) | {"ffn": ffn_params}
        block: Block = nnx.merge(graph, params)
        kind = config.routing if lengths_B is None else "segment"
        return block.ffn(h_BxLxD, Routing(kind, lengths_B))

    return run


def ffn_inputs(config, batch=4):
    ffn = jax.tree.map(lambda w: w[0], params_of(config)["layers"]["ffn"])
    h = np.random.default_rng(1).normal(size=(batch, L, config.embed_dim)).astype(np.float32)
    return ffn, h


# ------------------------------------------------------------------ against loops


@pytest.mark.parametrize(("routing", "fields"), CASES, ids=str)
def test_training_equals_loops(routing, fields):
    config = tiny_config(routing=routing, **fields)
    ffn, h = ffn_inputs(config)
    y, routed = layer(config)(ffn, h)
    expected, balance, dropped = sparse_reference.train(
        float64(h), float64(ffn), routing, T, config.capacity_factor, config.routing_group
    )
    assert_close(y, expected, VALUES)
    np.testing.assert_allclose(routed.dropped, dropped, atol=1e-6)
    assert (routed.balance is None) == (balance is None)
    if balance is not None:
        np.testing.assert_allclose(routed.balance, balance, rtol=1e-5)


@pytest.mark.parametrize(("routing", "fields"), CASES, ids=str)
def test_gradients_equal_central_differences_of_the_loops(routing, fields):
    """Of a weighted sum of the output and the load-balancing loss, along random directions."""
    config = tiny_config(routing=routing, **fields)
    ffn, h = ffn_inputs(config)
    rng = np.random.default_rng(2)
    upstream = rng.normal(size=h.shape)
    decided_by = sparse_reference.units_of(float64(h), float64(ffn["router"]), routing, T)
    frozen = [unit.p for unit in decided_by if unit.start == 0]

    def scalar(inputs):
        y, routed = layer(config)(*inputs)
        return jnp.sum(y * upstream) + (0.0 if routed.balance is None else 30 * routed.balance)

    def loops(inputs):
        ffn, h = inputs
        y, balance, _ = sparse_reference.train(
            h, ffn, routing, T, config.capacity_factor, config.routing_group, frozen, decided_by
        )
        return np.sum(y * upstream) + 30 * (balance or 0.0)

    gradients = float64(jax.grad(scalar)((ffn, h)))
    leaves, structure = jax.tree.flatten(float64((ffn, h)))
    for i, (w, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        direction = rng.normal(size=w.shape)

        def moved(step, i=i, direction=direction):
            return jax.tree.unflatten(
                structure, [x + step * direction if n == i else x for n, x in enumerate(leaves)]
            )

        expected = (loops(moved(1e-6)) - loops(moved(-1e-6))) / 2e-6
        got = np.sum(gradient * direction)
        assert np.linalg.norm(gradient) > 0
        assert abs(got - expected) <= GRADIENTS * np.linalg.norm(gradient), (i, got, expected)


@pytest.mark.parametrize(("routing", "choices"), [*((r, 1) for r in SPARSE[:3]), ("top2", 2)])
def test_evaluation_equals_loops(routing, choices):
    config = tiny_config(routing=routing)
    ffn, h = ffn_inputs(config)
    y, routed = layer(config)(ffn, h, LENGTHS)
    expected = sparse_reference.evaluate(
        float64(h), float64(ffn), routing, T, choices, LENGTHS.tolist()
    )
    assert_close(y, expected, VALUES)
    assert routed.balance is None and routed.dropped is None
    np.testing.assert_allclose(np.sum(routed.weights_BxNxE, axis=-1), 1.0, rtol=1e-5)


def test_expert_choice_with_more_capacity_evaluates_with_as_many_experts():
    config = tiny_config(routing="expert_choice_token", capacity_factor=2.0)
    ffn, h = ffn_inputs(config)
    y, _ = layer(config)(ffn, h, LENGTHS)
    expected = sparse_reference.evaluate(float64(h), float64(ffn), config.routing, T, 2, LENGTHS)
    assert_close(y, expected, VALUES)


# ------------------------------------------------------------------ what the slots mean


def test_dropped_tokens_pass_through_the_residual():
    """All tokens want expert 0, which has slots for a quarter: the others leave as they came."""
    config = tiny_config(routing="top1", num_layers=1)
    params = params_of(config)
    ffn, h = ffn_inputs(config)
    ffn = ffn | {"router": np.zeros_like(ffn["router"])}  # ties go to the first expert
    y, routed = layer(config)(ffn, h)
    slots = 4 * L // E
    assert np.all(np.any(np.asarray(y).reshape(-1, 16)[:slots], axis=1))
    np.testing.assert_array_equal(np.asarray(y).reshape(-1, 16)[slots:], 0.0)
    np.testing.assert_allclose(routed.dropped, 0.75)
    np.testing.assert_allclose(routed.balance, 1.0, rtol=1e-6)  # E * (1 * 1/E)

    # The whole block then is attention and its residual alone.
    graph, _ = nnx.split(nnx.merge(build(config)[0], params).layers)
    layers = jax.tree.map(lambda w: w[0], params["layers"])
    without = {**ffn, "down": np.zeros_like(ffn["down"])}
    block, bare = (nnx.merge(graph, layers | {"ffn": f}) for f in (ffn, without))
    got, expected = (b(h, Routing("top1"))[0].reshape(-1, 16)[slots:] for b in (block, bare))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("sharpness", [0.1, 3.0])
def test_load_balancing_loss_equals_its_formula(sharpness):
    p = jax.nn.softmax(sharpness * jax.random.normal(jax.random.key(0), (2, 50, E)))
    expected = []
    for of_group in np.asarray(p):
        f = np.bincount(of_group.argmax(axis=1), minlength=E) / 50
        expected.append(E * np.sum(f * of_group.mean(axis=0)))
    np.testing.assert_allclose(load_balancing_loss(p), np.mean(expected), rtol=1e-5)
    all_to_one = jnp.broadcast_to(jnp.eye(E)[0], (1, 50, E))
    np.testing.assert_allclose(load_balancing_loss(all_to_one), E)


@pytest.mark.parametrize("kind", [None, "segment"])
@pytest.mark.parametrize("routing", [r for r in SPARSE if r != "top2"])
def test_one_expert_equals_dense(routing, kind):
    dense, sparse = tiny_config(num_experts=0), tiny_config(num_experts=1, routing=routing)
    params, tokens = params_of(dense), random_tokens(2, L)
    one = upcycle_params(params, params_of(sparse)["layers"]["ffn"]["router"])
    lengths = None if kind is None else jnp.array([0, 5])
    got, _ = forward(sparse, kind)(one, tokens, lengths)
    assert_close(got, forward(dense)(params, tokens)[0], 1e-5)


@pytest.mark.parametrize("kind", [None, "segment"])
def test_two_copies_of_one_expert_equal_dense_under_top2(kind):
    """GShard's weights share 1, so that upcycling keeps the function where nothing is dropped."""
    dense = tiny_config(num_experts=0)
    sparse = tiny_config(routing="top2", capacity_factor=float(E))
    params, tokens = params_of(dense), random_tokens(2, L)
    copies = upcycle_params(params, params_of(sparse)["layers"]["ffn"]["router"])
    got, _ = forward(sparse, kind)(copies, tokens, None if kind is None else jnp.array([0, 5]))
    assert_close(got, forward(dense)(params, tokens)[0], 1e-5)


# ------------------------------------------------------------------ causality, by perturbation


def moved_logits(config, kind, length=L):
    """[j, l]: whether changing token j of row 0 moves, in any bit, the logits of row 0 at l.

    And whether it moves anything of row 1, which stays.
    """
    run, params = forward(config, kind), params_of(config)
    tokens = random_tokens(2, length, seed=3)
    lengths = None if kind is None else jnp.array([6, 6])
    before = np.asarray(run(params, tokens, lengths)[0])
    moved, other = np.zeros((length, length), bool), False
    for j in range(length):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 7) % 37
        after = np.asarray(run(params, changed, lengths)[0])
        moved[j] = np.any(before[0] != after[0], axis=-1)
        other |= bool(np.any(before[1] != after[1]))
    return moved, other


PAST = np.tril(np.ones((L, L), bool), -1)  # [j, l] with l < j
j_, l_ = np.indices((L, L))


@pytest.mark.parametrize("routing", SPARSE)
def test_evaluation_is_causal_and_rows_do_not_see_each_other(routing):
    moved, other = moved_logits(tiny_config(num_layers=3, routing=routing), "segment")
    assert np.all(np.diag(moved)) and not other
    # Segments: as in Lory, the prompt routes segment 1, which is not scored.
    leaks = PAST & (j_ < T) if routing == "expert_choice_segment" else np.zeros_like(PAST)
    np.testing.assert_array_equal(moved & PAST & ~leaks, False)
    assert np.any(moved & leaks) or routing != "expert_choice_segment"


@pytest.mark.parametrize("routing", ["expert_choice_token", "expert_choice_segment"])
def test_expert_choice_leaks_in_training(routing):
    """Whether a token is taken depends on later tokens, and on the other rows of its group."""
    moved, other = moved_logits(tiny_config(num_layers=3, routing=routing), None)
    assert np.any(moved & PAST & (j_ >= 2 * T)) and other
    _, other = moved_logits(tiny_config(num_layers=3, routing=routing, routing_group=1), None)
    assert not other


def test_top1_is_causal_in_training_and_second_choices_are_not():
    """First choices come before all second ones: a later token's may take an earlier one's slot."""
    moved, _ = moved_logits(tiny_config(num_layers=3, routing="top1"), None)
    assert not np.any(moved & PAST)
    config = tiny_config(num_layers=3, routing="top2", capacity_factor=0.6)
    assert np.any(moved_logits(config, None)[0] & PAST)


# ------------------------------------------------------------------ variants


@pytest.mark.parametrize("routing", SPARSE)
def test_remat_unrolled_and_bfloat16_agree(routing):
    config = tiny_config(routing=routing)
    params, tokens = params_of(config), random_tokens(2, L)
    expected, weights = forward(config)(params, tokens)
    assert weights.shape == (2, 2, -(-L // T), E) and weights.dtype == jnp.float32
    for fields in ({"remat": "full"}, {"scan_layers": False}):
        got = forward(tiny_config(routing=routing, **fields))(params, tokens)
        assert_trees_close(got, (expected, weights), 1e-5)
    half = tiny_config(routing=routing, compute_dtype="bfloat16", num_layers=1)
    ffn, h = ffn_inputs(half)
    for lengths in (None, LENGTHS):
        y, _ = layer(half)(ffn, h.astype(jnp.bfloat16), lengths)
        assert y.dtype == jnp.bfloat16 and np.all(np.isfinite(y.astype(jnp.float32)))


def test_a_batch_that_does_not_divide_into_groups_is_refused():
    config = tiny_config(routing="top1", routing_group=3)
    with pytest.raises(ValueError, match="batch of 4 sequences is no multiple of routing_group=3"):
        layer(config)(*ffn_inputs(config))
