"""The whole model: against loops, under perturbation, and against its own variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.model.attention import attend, blocked_attention
from lory_jax.model.rope import rotate
from lory_jax.model.transformer import init_params
from lory_jax.training.upcycle import upcycle_params
from tests.support import reference
from tests.support.models import (
    assert_close,
    assert_trees_close,
    float64,
    forward,
    loss_and_gradients,
    params_of,
    random_tokens,
    tiny_config,
)

VALUES = 5e-5  # float32 against float64, two layers, relative to the largest logit
GRADIENTS = 2e-3  # of a directional derivative
L, T = 14, 4  # the last segment is short


# ------------------------------------------------------------------ against loops


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [(None, None), ("prefix", None), ("prompt", (0, 3, 9)), ("segment", (0, 3, 9))],
)
def test_lory_logits_and_weights_equal_loops(kind, prompts):
    config, tokens = tiny_config(), random_tokens(3, L)
    params = params_of(config)
    lengths = None if prompts is None else jnp.array(prompts)
    logits, weights = forward(config, kind)(params, tokens, lengths)
    expected = reference.transformer(float64(params), tokens, config, kind, prompts)
    assert logits.dtype == weights.dtype == jnp.float32
    assert_close(logits, expected[0], VALUES, "logits")
    assert_close(weights, expected[1], VALUES, "weights")


def tokens_of_documents(batch, length, seed=0):
    """Random tokens with a BOS in every row, between other documents and their neighbours."""
    tokens = 1 + random_tokens(batch, length, seed) % 36
    for b in range(batch):
        tokens[b, [3 + b, 9]] = 0
    return tokens


@pytest.mark.parametrize("experts", [0, 4])
def test_attention_inside_documents_equals_loops(experts):
    # With equal weights in segment 1, nothing of a later document reaches its first tokens.
    fields = {"num_experts": experts, "first_segment_routing": "uniform"}
    config = tiny_config(document_mask=True, **fields)
    params, tokens = params_of(config), tokens_of_documents(3, L)
    logits, _ = forward(config)(params, tokens)
    expected, _ = reference.transformer(float64(params), tokens, config)
    assert_close(logits, expected, VALUES)
    across, _ = forward(tiny_config(**fields))(params, tokens)
    assert np.abs(across - logits)[:, 9:].max() > 1e-2
    np.testing.assert_allclose(across[:, :3], logits[:, :3], atol=1e-5)


def test_attention_never_leaves_a_document():
    """In the dense model nothing else joins positions: later documents do not move by a bit."""
    config = tiny_config(num_experts=0, document_mask=True)
    run, params, tokens = forward(config), params_of(config), tokens_of_documents(1, L)
    before = np.asarray(run(params, tokens)[0])[0]
    starts = reference.document_starts(tokens[0], 0)
    for j in (j for j in range(L) if tokens[0, j]):
        changed = tokens.copy()
        changed[0, j] = 1 + (changed[0, j] + 6) % 36
        moved = np.any(np.asarray(run(params, changed)[0])[0] != before, axis=-1)
        expected = [starts[i] == starts[j] and i >= j for i in range(L)]
        np.testing.assert_array_equal(moved, expected)


LLAMAS = {"num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True}  # what other LLaMAs have


@pytest.mark.parametrize("fields", [{}, LLAMAS], ids=["plain", "grouped and tied"])
def test_dense_logits_equal_loops(fields):
    config, tokens = tiny_config(num_experts=0, **fields), random_tokens(2, L)
    params = params_of(config)
    logits, weights = forward(config)(params, tokens)
    assert weights is None
    expected, _ = reference.transformer(float64(params), tokens, config)
    assert_close(logits, expected, VALUES)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"first_segment_routing": "uniform"},
        {"routing": "prefix"},
        {"routing": "uniform"},
        {"document_mask": True},
        {"num_experts": 0},
        LLAMAS,
    ],
)
def test_gradient_of_every_parameter_equals_central_differences_of_the_loops(fields):
    """Along a random direction each; weights that the paper stops the gradient of are frozen."""
    config = tiny_config(**fields)
    tokens = (tokens_of_documents if config.document_mask else random_tokens)(1, 10)
    params = params_of(config)
    loss, gradients = loss_and_gradients(config)(params, tokens)
    params64 = float64(params)
    base, weights = reference.transformer(params64, tokens[:, :-1], config)
    np.testing.assert_allclose(
        loss, np.mean(reference.token_losses(base, tokens[:, 1:])), rtol=VALUES
    )
    is_blocked = config.num_experts and config.first_segment_routing == "self"
    frozen = weights[:, :, 0] if is_blocked else None

    leaves, structure = jax.tree_util.tree_flatten_with_path(params64)
    rng = np.random.default_rng(5)
    for i, (path, w) in enumerate(leaves):
        direction = rng.normal(size=w.shape)

        def scalar(step, i=i, direction=direction):
            moved = [
                leaf + step * direction if n == i else leaf for n, (_, leaf) in enumerate(leaves)
            ]
            logits, _ = reference.transformer(
                jax.tree.unflatten(structure, moved), tokens[:, :-1], config, frozen=frozen
            )
            return np.mean(reference.token_losses(logits, tokens[:, 1:]))

        expected = (scalar(1e-5) - scalar(-1e-5)) / 2e-5
        gradient = float64(jax.tree.leaves(gradients)[i])
        got = np.sum(gradient * direction)
        scale = np.linalg.norm(gradient)
        assert abs(got - expected) <= GRADIENTS * scale, (jax.tree_util.keystr(path), got, expected)


# ------------------------------------------------------------------ causality, by perturbation


def moved_logits(config, kind, prompts=None):
    """[j, l]: whether changing token j moves, in any bit, the logits at position l."""
    run, params = forward(config, kind), params_of(config)
    tokens = random_tokens(1, L, seed=3)
    base = np.repeat(tokens, L, axis=0)
    changed = base.copy()
    changed[np.arange(L), np.arange(L)] = (changed[np.arange(L), np.arange(L)] + 7) % 37
    lengths = None if prompts is None else jnp.full(L, prompts)
    before, _ = run(params, base, lengths)
    after, _ = run(params, changed, lengths)
    return np.any(np.asarray(before) != np.asarray(after), axis=-1)


PAST = np.tril(np.ones((L, L), bool), -1)  # [j, l] with l < j
j_, l_ = np.indices((L, L))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("routing", ["causal", "prefix", "uniform"])
@pytest.mark.parametrize("first", ["self", "uniform"])
def test_training_is_causal_except_in_segment_1_with_self(first, routing, scan_layers):
    config = tiny_config(
        num_layers=3, first_segment_routing=first, routing=routing, scan_layers=scan_layers
    )
    moved = moved_logits(config, None)
    assert np.all(np.diag(moved)), "every token moves the logits at its own position"
    is_leaky = first == "self" and routing != "uniform"
    leaks = PAST & (j_ < T) if is_leaky else np.zeros_like(PAST)
    np.testing.assert_array_equal(moved & PAST, leaks)


def test_dense_is_causal():
    assert not np.any(moved_logits(tiny_config(num_experts=0), None) & PAST)


@pytest.mark.parametrize("prompt", [0, 1, 3, 6, L])
def test_prompt_routing_is_causal_after_the_prompt(prompt):
    moved = moved_logits(tiny_config(num_layers=3), "prompt", prompt)
    np.testing.assert_array_equal(moved & PAST, PAST & (j_ < prompt))


@pytest.mark.parametrize("prompt", [0, 1, 3, 6])
def test_segment_routing_is_causal_after_the_prompt_or_segment_1(prompt):
    moved = moved_logits(tiny_config(num_layers=3), "segment", prompt)
    np.testing.assert_array_equal(moved & PAST, PAST & (j_ < min(prompt, T)))


def test_segment_k_is_routed_by_segment_k_minus_1_and_nothing_later():
    """Layer 1's weights, whose input no other layer has mixed beyond attention's causality."""
    config = tiny_config()
    run, params, tokens = forward(config), params_of(config), random_tokens(1, L)
    _, before = run(params, tokens, None)
    for j in range(L):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 7) % 37
        _, after = run(params, changed, None)
        moved = np.any(np.asarray(before) != np.asarray(after), axis=(0, 1, 3))
        k = j // T
        assert not np.any(moved[1 : k + 1]), j  # segments up to its own, except the first
        assert moved[0] == (k == 0), j
        assert np.all(moved[k + 1 :]), j


# ------------------------------------------------------------------ dense equivalences


def test_one_expert_equals_dense():
    dense, lory = tiny_config(num_experts=0), tiny_config(num_experts=1)
    params, tokens = params_of(dense), random_tokens(2, L)
    one = upcycle_params(params, params_of(lory)["layers"]["ffn"]["router"])
    expected, _ = forward(dense)(params, tokens)
    got, weights = forward(lory)(one, tokens)
    np.testing.assert_array_equal(weights, 1.0)
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("kind", [None, "prefix", "prompt", "segment"])
def test_identical_experts_equal_dense_for_any_routing(kind):
    dense, lory = tiny_config(num_experts=0), tiny_config()
    params, tokens = params_of(dense), random_tokens(2, L)
    copies = upcycle_params(params, params_of(lory)["layers"]["ffn"]["router"])
    expected, _ = forward(dense)(params, tokens)
    got, weights = forward(lory, kind)(copies, tokens, jnp.array([0, 5]))
    assert np.ptp(weights) > 0.3, "routing is far from uniform"
    assert_close(got, expected, 1e-5)


def test_uniform_weights_equal_the_dense_model_of_the_mean_expert():
    dense, lory = tiny_config(num_experts=0), tiny_config()
    params, tokens = params_of(lory), random_tokens(2, L)
    ffn = params["layers"]["ffn"]
    uniform = {**ffn, "router": np.zeros_like(ffn["router"])}
    mean = {name: ffn[name].mean(axis=1) for name in ("gate", "up", "down")}
    got, weights = forward(lory)({**params, "layers": {**params["layers"], "ffn": uniform}}, tokens)
    np.testing.assert_array_equal(weights, 0.25)
    dense_params = {**params, "layers": {**params["layers"], "ffn": mean}}
    assert_close(got, forward(dense)(dense_params, tokens)[0], 1e-5)


# ------------------------------------------------------------------ variants of one computation


@pytest.mark.parametrize(
    "fields", [{"num_experts": 0}, {}, LLAMAS], ids=["dense", "lory", "grouped and tied"]
)
@pytest.mark.parametrize(
    "variant",
    [
        {"scan_layers": False},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "attention"},
        {"remat": "attention+hidden"},
    ],
    ids=str,
)
def test_scan_unrolled_and_remat_agree(variant, fields):
    tokens = random_tokens(2, L + 1)
    config = tiny_config(**fields)
    params = params_of(config)
    loss, gradients = loss_and_gradients(config)(params, tokens)
    other_loss, other = loss_and_gradients(tiny_config(**fields, **variant))(params, tokens)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert_trees_close(other, gradients, 2e-5)


@pytest.mark.parametrize("experts", [0, 4])
def test_bfloat16_is_close_to_float32(experts):
    tokens = random_tokens(2, L + 1)
    config = tiny_config(num_experts=experts)
    half = tiny_config(num_experts=experts, compute_dtype="bfloat16")
    params = params_of(config)
    logits, _ = forward(config)(params, tokens)
    half_logits, weights = forward(half)(params, tokens)
    assert half_logits.dtype == jnp.float32
    assert weights is None or weights.dtype == jnp.float32
    assert_close(half_logits, logits, 0.05, "logits")
    loss, gradients = loss_and_gradients(config)(params, tokens)
    half_loss, half_gradients = loss_and_gradients(half)(params, tokens)
    np.testing.assert_allclose(half_loss, loss, rtol=0.01)
    for g, h in zip(jax.tree.leaves(gradients), jax.tree.leaves(half_gradients), strict=True):
        assert h.dtype == jnp.float32
        cosine = np.vdot(g, h) / np.linalg.norm(g) / np.linalg.norm(h)
        assert cosine > 0.98


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match=r"remat: got 'some'.*full, dots"):
        forward(tiny_config(remat="some"))(params_of(tiny_config()), random_tokens(1, L))


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("length", [1, 128, 300])
def test_blocked_attention_equals_the_library_for_one_and_many_blocks(length):
    shape = (2, length, 3, 4)
    query, key, value = (jax.random.normal(jax.random.key(i), shape) * 2 for i in range(3))

    def gradients(attention):
        run = jax.jit(
            lambda *a: (
                attention(*a),
                jax.grad(lambda *a: jnp.sum(attention(*a) ** 3), argnums=(0, 1, 2))(*a),
            )
        )
        return run(query, key, value)

    got = gradients(blocked_attention)
    expected = gradients(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    assert_trees_close(got, expected, 2e-5)


def test_blocked_attention_equals_loops():
    query, key, value = (jax.random.normal(jax.random.key(i), (1, 9, 2, 4)) for i in range(3))
    got = blocked_attention(query, key, value)
    for head in range(2):
        one = (float64(x)[0, :, head] for x in (query, key, value))
        assert_close(got[0, :, head], reference.causal_attention(*one), 1e-5)


def test_masked_keys_have_no_weight_at_all():
    query, key = (jax.random.normal(jax.random.key(i), (1, 1, 4, 4)) for i in range(2))
    value = jnp.ones((1, 1, 4, 4)).at[..., 2:, :].set(1e30)
    mask = jnp.arange(4)[None] < jnp.array([[1], [2], [2], [2]])
    np.testing.assert_allclose(attend(query, key, value, mask), 1.0, rtol=1e-6)


def test_rotation_depends_on_the_distance_only_and_keeps_lengths():
    K = 8
    query, key = (jax.random.normal(jax.random.key(i), (1, 1, 1, K)) for i in range(2))

    def turned(x, position):
        return rotate(x, jnp.array([[position]]), tiny_config().rope)

    def score(m, n):
        return float(jnp.sum(turned(query, m) * turned(key, n)))

    for distance in (0, 1, 7):
        scores = [score(start + distance, start) for start in (0, 3, 50, 400)]
        np.testing.assert_allclose(scores, scores[0], rtol=2e-4, atol=2e-4)
    assert abs(score(1, 0) - score(0, 1)) > 1e-3  # the order matters, not only the distance
    np.testing.assert_array_equal(turned(query, 0), query)
    np.testing.assert_allclose(np.linalg.norm(turned(query, 999)), np.linalg.norm(query), rtol=1e-5)
    expected = reference.rotate(float64(query)[0, 0, 0], 11, 10_000.0)
    np.testing.assert_allclose(turned(query, 11)[0, 0, 0], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ initialisation


def test_initialisation_has_the_stated_deviations_and_no_two_draws_are_alike():
    config = tiny_config(embed_dim=64, mlp_dim=96, num_layers=3, router_init_scale=0.23)
    init = jax.jit(init_params, static_argnums=0)
    params = init(config, jax.random.key(1))
    layers, D, F = params["layers"], 64, 96
    output_scale = (2 * 3) ** -0.5
    expected = [
        (params["embedding"], D**-0.5),
        (params["head"], D**-0.5),
        (layers["attention"]["query"], D**-0.5),
        (layers["attention"]["output"], D**-0.5 * output_scale),
        (layers["ffn"]["gate"], D**-0.5),
        (layers["ffn"]["up"], D**-0.5),
        (layers["ffn"]["down"], F**-0.5 * output_scale),
        (layers["ffn"]["router"], 0.23 * D**-0.5),
    ]
    for w, deviation in expected:
        np.testing.assert_allclose(np.std(w), deviation, rtol=0.1)
        assert abs(np.mean(w)) < 0.1 * deviation
    assert not np.array_equal(params["head"], init(config, jax.random.key(2))["head"])
    # No two matrices, layers or experts start alike.
    gate = layers["ffn"]["gate"]
    rows = [gate[y, e] for y in range(3) for e in range(4)] + [layers["ffn"]["up"][0, 0]]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(("field", "experts"), [("ffn_init_scale", 0), ("expert_init_scale", 4)])
def test_init_scales_multiply_the_ffn_and_nothing_else(field, experts):
    key = jax.random.key(3)
    usual = init_params(tiny_config(num_experts=experts), key)
    scaled = init_params(tiny_config(num_experts=experts, **{field: 0.5}), key)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(scaled), jax.tree.leaves(usual), strict=True
    ):
        factor = 0.5 if path[-1].key in ("gate", "up", "down") else 1.0
        np.testing.assert_allclose(a, factor * np.asarray(b), rtol=1e-6)
