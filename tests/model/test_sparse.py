"""The sparse baselines: against loops, under perturbation, and where they are the dense model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.model.merged_ffn import swiglu
from lory_jax.model.routing import Routing
from lory_jax.model.routing_rules import DROPLESS, GATED, SPARSE, TOKEN_CHOICE
from lory_jax.model.sparse.blocks import BLOCK, block_ffn
from lory_jax.model.sparse.capacity import load_balancing_loss
from lory_jax.model.sparse.gated import BELOW_ALL, cutoffs, gated_ffn
from lory_jax.model.transformer import Block, build
from lory_jax.training.upcycle import gradient_divisor
from tests.support import reference, sparse_reference
from tests.support.models import (
    assert_close,
    assert_trees_close,
    float64,
    forward,
    params_of,
    random_tokens,
    tiny_config,
)

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
    ("top2", {"capacity_factor": 0.6, "balancing": "loss_free"}),
    ("dropless_top1", {}),
    ("dropless_top1", {"balancing": "loss_free"}),
    ("dropless_top2", {}),
    ("dropless_top2", {"balancing": "loss_free"}),
    ("dropless_top2", {"grouped_product": "ragged"}),
    *((routing, {"experts_per_token": k}) for routing in GATED for k in (1, 2)),
    *((routing, {"grouped_product": "ragged"}) for routing in GATED),
]
CHOICES = sparse_reference.CHOICES


@functools.cache
def layer(config, by_cutoff=False):
    """The jitted `(ffn parameters, h, prompt lengths or None) -> (y, routed)` of one layer."""
    graph, _ = nnx.split(nnx.merge(build(config)[0], params_of(config)).layers)

    @jax.jit
    def run(ffn_params, h_BxLxD, lengths_B=None):
        params = jax.tree.map(lambda w: w[0], params_of(config)["layers"]) | {"ffn": ffn_params}
        block: Block = nnx.merge(graph, params)
        kind = config.routing if lengths_B is None else "segment"
        return block.ffn(h_BxLxD, Routing(kind, lengths_B, by_cutoff=by_cutoff))

    return run


def ffn_inputs(config, batch=4):
    ffn = jax.tree.map(lambda w: w[0], params_of(config)["layers"]["ffn"])
    h = np.random.default_rng(1).normal(size=(batch, L, config.embed_dim)).astype(np.float32)
    return ffn, h


# ------------------------------------------------------------------ against loops


@pytest.mark.parametrize(("routing", "fields"), CASES, ids=str)
def test_training_equals_loops(routing, fields):
    """Values, and gradients of a weighted sum of output and load-balancing loss.

    Gradients are compared along random directions with central differences of the loops.
    """
    config = tiny_config(routing=routing, **fields)
    ffn, h = ffn_inputs(config)
    rng = np.random.default_rng(2)
    upstream = rng.normal(size=h.shape)
    decided_by = sparse_reference.units_of(float64(h), float64(ffn["router"]), routing, T)
    frozen = [unit.p for unit in decided_by if unit.start == 0]
    is_loss_free = config.balancing == "loss_free"

    def loops(inputs):
        ffn, h = inputs
        group = config.routing_group
        if routing in GATED:
            return sparse_reference.gated(h, ffn, routing, config.experts_per_token)[:3]
        return sparse_reference.train(
            h, ffn, routing, T, config.capacity_factor, group, frozen, decided_by
        )

    def scalar(y, balance):
        counts = balance is not None and not is_loss_free
        return (y * upstream).sum() + (30 * balance if counts else 0.0)

    def run(inputs):
        y, routed = layer(config)(*inputs)
        return scalar(y, routed.balance), (y, routed)

    (_, (y, routed)), gradients = jax.value_and_grad(run, has_aux=True)((ffn, h))
    expected, balance, dropped = loops(float64((ffn, h)))
    assert_close(y, expected, VALUES)
    np.testing.assert_allclose(0.0 if routing in DROPLESS else routed.dropped, dropped, atol=1e-6)
    assert (routed.balance is not None) == (balance is not None and not is_loss_free)
    if routed.balance is not None:
        np.testing.assert_allclose(routed.balance, balance, rtol=1e-5)

    leaves, structure = jax.tree.flatten(float64((ffn, h)))
    for i, (w, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        direction = rng.normal(size=w.shape)

        def moved(step, i=i, direction=direction):
            nudged = [x + step * direction if n == i else x for n, x in enumerate(leaves)]
            return scalar(*loops(jax.tree.unflatten(structure, nudged))[:2])

        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
        norm = np.linalg.norm(gradient)
        assert abs(np.sum(gradient * direction) - expected) <= GRADIENTS * norm, i
        assert (norm > 0) == (w.ndim > 1), i  # the bias alone is a vector


@settings(deadline=None, max_examples=8)
@given(
    st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7]),
    st.lists(st.sampled_from([0.0, 0.02, 0.5, 1.0]), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_blocks_of_open_gates_equal_all_experts(M, shares, seed):
    """Values and gradients, whatever share of the tokens an expert has: none, some or all."""
    E, D, F = len(shares), 3, 4
    rng = np.random.default_rng(seed)
    shapes = ((1, M, D), (E, D, F), (E, D, F), (E, F, D))
    x, *matrices = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    gates = rng.uniform(0.1, 1, (1, M, E)) * (rng.uniform(size=(1, M, E)) < shares)
    upstream = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def run(grouped_product):
        def value(x, raw, experts):  # a ReLU closes gates, as ReMoE's does
            y = gated_ffn(x, jax.nn.relu(raw), experts, grouped_product)
            return jnp.sum(upstream * y), y

        experts = dict(zip(("gate", "up", "down"), matrices, strict=True))
        differentiate = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
        return differentiate(x, jnp.asarray(gates, jnp.float32), experts)

    assert_trees_close(run("blocks"), run("ragged"), 1e-5)


def test_blocks_leave_closed_experts_alone():
    """An expert without an open gate is not computed: its NaNs reach nothing."""
    M, E, D, F = 5, 3, 3, 4
    shapes = ((M, D), (E, D, F), (E, D, F), (E, F, D))
    x, *matrices = (
        jnp.ones(shape).at[..., 1, :, :].set(jnp.nan) if len(shape) == 3 else jnp.ones(shape)
        for shape in shapes
    )
    gates = jnp.ones((M, E)).at[:, 1].set(0.0)
    run = jax.value_and_grad(lambda *inputs: jnp.sum(block_ffn(*inputs)), (0, 1, 2, 3, 4))
    value, gradients = run(x, gates, *matrices)
    assert jnp.isfinite(value)
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)
    assert not jnp.any(gradients[2][1]) and jnp.all(gradients[2][0] != 0)


@pytest.mark.parametrize(
    ("routing", "balancing"),
    [(name, "auxiliary") for name in SPARSE] + [(name, "loss_free") for name in TOKEN_CHOICE],
)
def test_evaluation_equals_loops(routing, balancing):
    config = tiny_config(routing=routing, balancing=balancing)
    ffn, h = ffn_inputs(config)
    y, routed = layer(config)(ffn, h, LENGTHS)
    if routing in GATED:
        expected = sparse_reference.gated(float64(h), float64(ffn), routing, 1)[0]
    else:
        expected = sparse_reference.evaluate(
            float64(h), float64(ffn), routing, T, CHOICES[routing], LENGTHS.tolist()
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


@pytest.mark.parametrize("routing", SPARSE)
def test_a_model_with_a_shared_expert_evaluates_as_loops(routing):
    """The whole model, as Expert Threshold's authors have it and as the study trains it."""
    config = tiny_config(routing=routing, shared_expert=True)
    params, tokens = params_of(config), random_tokens(len(LENGTHS), L)

    def mixture_of_experts(h, ffn):
        if routing in GATED:
            return sparse_reference.gated(h, ffn, routing, 1)[0]
        choices = CHOICES[routing]
        return sparse_reference.evaluate(h, ffn, routing, T, choices, LENGTHS.tolist())

    expected, _ = reference.transformer(
        float64(params), tokens, config, mixture_of_experts=mixture_of_experts
    )
    logits, _ = forward(config, "segment")(params, tokens, LENGTHS)
    assert_close(logits, expected, 5e-5)


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
    run = jax.jit(lambda ffn: nnx.merge(graph, layers | {"ffn": ffn})(h, Routing("top1"))[0])
    got, expected = (run(f).reshape(-1, 16)[slots:] for f in (ffn, without))
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


@pytest.mark.parametrize("lengths", [None, np.array([0, 3, 9, 14])], ids=["training", "segment"])
@pytest.mark.parametrize("routing", [r for r in SPARSE if CHOICES.get(r) == 1])
def test_one_expert_equals_dense(routing, lengths):
    config = tiny_config(num_experts=1, routing=routing)
    ffn, h = ffn_inputs(config)
    y, _ = layer(config)(ffn, h, lengths)
    assert_close(y, swiglu(h, *(ffn[name][0] for name in ("gate", "up", "down"))), 1e-5)


# All tokens go through all experts, or each through its own: with weights near 1/E.
EVEN = [*((r, {}) for r in TOKEN_CHOICE), ("expert_choice_token", {"capacity_factor": float(E)})]


@pytest.mark.parametrize(("routing", "fields"), EVEN, ids=str)
def test_upcycled_experts_get_the_stated_part_of_the_dense_gradient(routing, fields):
    """And under top2, whose weights share 1, upcycling keeps the function."""
    config = tiny_config(routing=routing, **({"capacity_factor": float(E)} | fields))
    ffn, h = ffn_inputs(config)
    matrices = [ffn[name][0] for name in ("gate", "up", "down")]
    copies = {name: np.stack([ffn[name][0]] * E) for name in ("gate", "up", "down")}
    copies["router"] = 1e-4 * ffn["router"]
    upstream = np.random.default_rng(3).normal(size=h.shape)
    gradients = jax.grad(lambda ffn: jnp.sum(layer(config)(ffn, h)[0] * upstream))(copies)
    dense = jax.grad(lambda w: jnp.sum(swiglu(h, *w) * upstream))(matrices)
    for name, expected in zip(("gate", "up", "down"), dense, strict=True):
        got = np.mean(gradients[name], axis=0) * gradient_divisor(config)
        assert_close(got, expected, 2e-3, name)
    if CHOICES[routing] == 2:
        assert_close(layer(config)(copies, h)[0], swiglu(h, *matrices), 1e-5)


@pytest.mark.parametrize(("group", "k"), [(0, 1), (2, 1), (1, 3), (0, E)])
def test_cutoffs_leave_every_expert_its_share(group, k):
    p = np.asarray(jax.random.normal(jax.random.key(0), (4, L, E)))
    expected = np.zeros(E)
    groups = p.reshape(-1, (group or 4) * L, E)
    for of_group in groups:
        slots = -(-k * len(of_group) // E)
        for e in range(E):
            left_out = sorted(of_group[:, e])[::-1][slots:]
            expected[e] += (left_out[0] if left_out else BELOW_ALL) / len(groups)
    np.testing.assert_allclose(cutoffs(p, k, group), expected, rtol=1e-6)


def test_by_cutoff_experts_take_their_share_of_the_batch():
    """As in expert choice, but weighted with a sigmoid: against a loop."""
    config = tiny_config(routing="expert_threshold", experts_per_token=2)
    ffn, h = ffn_inputs(config)
    y, routed = layer(config, by_cutoff=True)(ffn, h)
    np.testing.assert_allclose(routed.load_E, 0.5)
    params = float64(ffn)
    scores = float64(h) @ params["router"]
    chosen = [np.argsort(-scores[..., e], axis=None)[: 4 * L // 2] for e in range(E)]
    expected = np.zeros(h.shape)
    for e in range(E):
        for b, i in zip(*np.unravel_index(chosen[e], (4, L)), strict=True):
            output = sparse_reference.expert_output(float64(h[b, i]), params, e)
            expected[b, i] += output / (1 + np.exp(-scores[b, i, e]))
    assert_close(y, expected, VALUES)
    # By thresholds, the batch has no say.
    other, _ = layer(config)(ffn, np.concatenate([h[:1], 3 * h[1:]]))
    same, _ = layer(config)(ffn, h)
    np.testing.assert_array_equal(other[0], same[0])


def test_remoe_experts_get_the_stated_part_of_the_dense_gradient_on_average():
    """Over many routers as they are drawn, at hidden states of unit size as the norm makes them."""
    config = tiny_config(routing="remoe", router_init_scale=0.5)
    ffn, h = ffn_inputs(config)
    h = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True))
    matrices = [ffn[name][0] for name in ("gate", "up", "down")]
    copies = {name: np.stack([ffn[name][0]] * E) for name in ("gate", "up", "down")}
    upstream = np.random.default_rng(3).normal(size=h.shape)
    dense = jax.grad(lambda down: jnp.sum(swiglu(h, *matrices[:2], down) * upstream))(matrices[2])

    @jax.jit
    def of_router(router):
        def total(down):
            fields = {**copies, "down": down, "router": router, "l1_weight": np.float32(1.0)}
            return jnp.sum(layer(config)(fields, h)[0] * upstream)

        return jnp.mean(jax.grad(total)(copies["down"]), axis=0)

    rng = np.random.default_rng(4)
    routers = rng.normal(size=(200, *ffn["router"].shape)) * 0.5 / np.sqrt(config.embed_dim)
    got = np.mean([of_router(router.astype(np.float32)) for router in routers], axis=0)
    assert_close(got * gradient_divisor(config), dense, 0.1)


# ------------------------------------------------------------------ causality, by perturbation


def moved_logits(config, kind, seed=3):
    """[j, l]: whether changing token j of row 0 moves, in any bit, the logits of row 0 at l.

    And whether it moves anything of row 1, which stays.
    """
    run, params = forward(config, kind), params_of(config)
    tokens = random_tokens(2, L, seed)
    lengths = None if kind is None else jnp.array([6, 6])
    before = np.asarray(run(params, tokens, lengths)[0])
    moved, other = np.zeros((L, L), bool), False
    for j in range(L):
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
    moved, other = moved_logits(tiny_config(routing=routing), "segment")
    assert np.all(np.diag(moved)) and not other
    # Segments: as in Lory, the prompt routes segment 1, which is not scored.
    leaks = PAST & (j_ < T) if routing == "expert_choice_segment" else np.zeros_like(PAST)
    np.testing.assert_array_equal(moved & PAST & ~leaks, False)
    assert np.any(moved & leaks) or routing != "expert_choice_segment"


@pytest.mark.parametrize("routing", ["expert_choice_token", "expert_choice_segment"])
def test_expert_choice_leaks_in_training(routing):
    """Whether a token is taken depends on later tokens, and on the other rows of its group."""
    found = [moved_logits(tiny_config(routing=routing), None, seed) for seed in range(6)]
    # Lory's own leak is from the tokens of segment 1 alone.
    assert any(np.any(moved & PAST & (j_ >= T)) for moved, _ in found)
    assert any(other for _, other in found)


def test_no_row_sees_another_of_another_group():
    config = tiny_config(routing="expert_choice_token", routing_group=1)
    assert not moved_logits(config, None)[1]


@pytest.mark.parametrize("balancing", ["auxiliary", "loss_free"])
@pytest.mark.parametrize("routing", [*DROPLESS, *GATED])
def test_rules_without_slots_are_causal_in_training_too(routing, balancing):
    if balancing == "loss_free" and routing in GATED:
        pytest.skip("tokens do not choose")
    moved, other = moved_logits(tiny_config(routing=routing, balancing=balancing), None)
    assert np.all(np.diag(moved)) and not np.any(moved & PAST) and not other


def test_top1_is_causal_in_training_and_second_choices_are_not():
    """First choices come before all second ones: a later token's may take an earlier one's slot."""
    moved, _ = moved_logits(tiny_config(routing="top1"), None)
    assert not np.any(moved & PAST)
    config = tiny_config(routing="top2", capacity_factor=0.6)
    assert np.any(moved_logits(config, None)[0] & PAST)


# ------------------------------------------------------------------ variants


@pytest.mark.parametrize("routing", ["expert_choice_segment", "top2", "dropless_top2", "remoe"])
def test_remat_unrolled_and_bfloat16_agree(routing):
    config = tiny_config(routing=routing)
    params, tokens = params_of(config), random_tokens(2, L)
    expected = forward(config)(params, tokens, None)
    assert expected[1].shape == (2, 2, -(-L // T), E) and expected[1].dtype == jnp.float32
    other = tiny_config(routing=routing, remat="full", scan_layers=False)
    assert_trees_close(forward(other)(params, tokens, None), expected, 1e-5)
    half = tiny_config(routing=routing, compute_dtype="bfloat16")
    ffn, h = ffn_inputs(half)
    for lengths in (None, LENGTHS):
        y, _ = layer(half)(ffn, h.astype(jnp.bfloat16), lengths)
        exact, _ = layer(config)(ffn, h, lengths)
        assert y.dtype == jnp.bfloat16
        # But for the few units whose choice rounding turns.
        assert np.median(np.abs(y.astype(jnp.float32) - exact)) < 0.02 * np.max(np.abs(exact))


def test_a_batch_that_does_not_divide_into_groups_is_refused():
    config = tiny_config(routing="top1", routing_group=3)
    with pytest.raises(ValueError, match="routing_group=3"):
        layer(config)(*ffn_inputs(config))
