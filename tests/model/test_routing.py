"""Routing weights and the whole Lory layer against loops: values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lory_jax.model import routing
from lory_jax.model.ffn import MergedFFN
from lory_jax.model.parameters import Initializer
from lory_jax.model.routing import Routing, keep_top_k
from lory_jax.model.routing_rules import SOURCES
from lory_jax.model.routing_source import add_token, after_prompt, at_border, summaries
from lory_jax.model.transformer import assemble
from tests.support.models import assert_close, float64, tiny_config
from tests.support.reference import central_differences, lory_layer, routing_weights

B, D, F, E = 3, 6, 5, 3
VALUES = 2e-5  # relative to the largest entry: float32 against float64
GRADIENTS = 2e-4

# (L, T): L not divisible by T, divisible, L = T, L < T, T = 1.
LENGTHS = [(7, 3), (6, 3), (4, 4), (3, 5), (4, 1)]

# How it is routed, the first segment, the prompt of each row (longer than T, too), and the source.
RULES = [
    ("causal", "self", None, "last"),
    ("causal", "uniform", None, "last"),
    ("prefix", "self", None, "last"),
    ("prefix", "uniform", None, "last"),
    ("prompt", "self", (0, 2, 6), "last"),
    ("segment", "self", (0, 2, 6), "last"),
]
BEYOND = [source for source in SOURCES if source != "last"]
RULES += [("causal", "self", None, source) for source in BEYOND]
RULES += [("segment", "self", (0, 2, 6), source) for source in BEYOND]


def layer(segment_length, kind, first_segment, source="last"):
    """The layer as `(h, params, prompts) -> (y, weights)`, and parameters for it."""
    config = tiny_config(
        embed_dim=D,
        mlp_dim=F,
        num_experts=E,
        segment_length=segment_length,
        first_segment_routing=first_segment,
        routing_source=source,
    )
    abstract = nnx.eval_shape(lambda: MergedFFN(Initializer(jax.random.key(0)), config, 1.0))
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state)
    )

    def apply(h, params, prompts):
        y, routed = assemble(graph, params)(h, Routing(kind, prompts))
        return y, routed.weights_BxNxE

    return apply, params


@pytest.mark.parametrize(("L", "T"), LENGTHS)
@pytest.mark.parametrize(("kind", "first", "prompts", "source"), RULES)
def test_layer_equals_loops_in_value_and_every_gradient(L, T, kind, first, prompts, source):
    apply, params = layer(T, kind, first, source)
    rng = np.random.default_rng(0)
    h = rng.normal(size=(B, L, D)).astype(np.float32)
    probe = rng.normal(size=(B, L, D)).astype(np.float32)
    lengths = None if prompts is None else jnp.minimum(jnp.array(prompts), L)

    def loss(h, params):
        y, weights = apply(h, params, lengths)
        return jnp.sum(y * probe), (y, weights)

    (_, (y, weights)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        h, params
    )

    h64, params64 = float64(h), float64(params)
    prompts = None if lengths is None else list(map(int, lengths))
    reference = functools.partial(
        lory_layer,
        segment_length=T,
        kind=kind,
        first_segment=first,
        prompts=prompts,
        source=source,
    )
    y64, weights64 = reference(h64, params64)
    assert_close(y, y64, VALUES, "y")
    assert_close(weights, weights64, VALUES, "weights")
    np.testing.assert_allclose(np.sum(weights, axis=-1), 1.0, rtol=1e-6)

    # Training with "self" blocks the gradient of exactly these weights.
    frozen = weights64[:, 0] if (kind, first) in (("causal", "self"), ("prefix", "self")) else None

    def scalar(h, params):
        return np.sum(reference(h, params, frozen=frozen)[0] * probe)

    expected = central_differences(lambda h: scalar(h, params64), h64)
    assert_close(gradients[0], expected, GRADIENTS, "hidden states")
    for name in params:
        expected = central_differences(
            lambda w, n=name: scalar(h64, {**params64, n: w}), params64[name]
        )
        assert_close(gradients[1][name], expected, GRADIENTS, name)


@pytest.mark.parametrize("kind", ["causal", "prefix"])
def test_stop_gradient_blocks_the_weights_of_segment_1_and_nothing_else(kind):
    apply, params = layer(4, kind, "self")
    h = jax.random.normal(jax.random.key(2), (B, 4, D))

    def gradients(h):
        return jax.grad(lambda h, p: jnp.sum(apply(h, p, None)[0] ** 2), argnums=(0, 1))(h, params)

    # A single segment: the router learns nothing, everything else does.
    of_h, of_params = gradients(h)
    assert not np.any(of_params["router"])
    for gradient in (of_h, of_params["gate"], of_params["up"], of_params["down"]):
        assert np.all(np.any(np.asarray(gradient), axis=-1))
    # With one more token the router learns from what segment 1 does for segment 2.
    _, of_params = gradients(jnp.concatenate([h, h[:, :1]], axis=1))
    assert np.any(of_params["router"])


def test_weights_without_the_stop_gradient_would_have_another_gradient():
    """The comparison with loops can see the stop-gradient: without it the numbers differ."""
    T, rng = 3, np.random.default_rng(3)
    h, router = rng.normal(size=(1, 5, D)), rng.normal(size=(D, E))
    experts = {
        n: rng.normal(size=s)
        for n, s in {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}.items()
    }

    def scalar(router, frozen):
        params = {**experts, "router": router}
        return np.sum(lory_layer(h, params, T, "causal", "self", frozen=frozen)[0])

    frozen = lory_layer(h, {**experts, "router": router}, T, "causal", "self")[1][:, 0]
    blocked = central_differences(lambda r: scalar(r, frozen), router)
    through = central_differences(lambda r: scalar(r, None), router)
    assert np.max(np.abs(blocked - through)) > 0.01 * np.max(np.abs(blocked))


def test_a_prompt_longer_than_a_segment_routes_segment_1_by_its_own_tokens():
    h = jax.random.normal(jax.random.key(4), (3, 9, D))
    router = jax.random.normal(jax.random.key(5), (D, E))
    lengths = [0, 4, 7]
    got = routing.segment_routing(h, router, 4, jnp.array(lengths))
    for b, prompt in enumerate(lengths):
        expected = routing_weights(float64(h)[b], float64(router), 4, "segment", prompt=prompt)
        assert_close(got[b], np.array(expected), VALUES)
    np.testing.assert_array_equal(got[0, 0], np.full(E, 1 / E, np.float32))


def test_padding_after_the_prompt_has_no_influence():
    h = jax.random.normal(jax.random.key(6), (2, 8, D))
    router = jax.random.normal(jax.random.key(7), (D, E))
    lengths = jnp.array([3, 5])
    padded = h.at[0, 3:].set(1e6).at[1, 5:].set(jnp.nan)
    np.testing.assert_array_equal(
        routing.prompt_routing(h, router, lengths), routing.prompt_routing(padded, router, lengths)
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_changed_token_reaches_later_segments_only(source):
    T, N = 4, 5
    h = jax.random.normal(jax.random.key(9), (1, T * N, D))
    router = jax.random.normal(jax.random.key(10), (D, E))
    route = functools.partial(
        routing.causal_routing, router_DxE=router, segment_length=T, first_segment="self"
    )
    before = np.asarray(route(h, source=source))[0]
    for position in range(T, T * N):
        after = np.asarray(route(h.at[0, position].add(3.0), source=source))[0]
        is_changed_N = np.any(before != after, axis=1)
        k = position // T  # counted from 0
        reached = range(k + 1, N) if source in ("cumulative", "average") else range(k + 1, k + 2)
        assert np.flatnonzero(is_changed_N).tolist() == [n for n in reached if n < N]


@pytest.mark.parametrize("source", SOURCES)
def test_running_summaries_equal_those_of_whole_sequences(source):
    T, L = 3, 14
    h = jax.random.normal(jax.random.key(11), (4, L, D))
    expected = summaries(h, T, source)
    lengths = jnp.array([1, 3, 7, 9])
    running = after_prompt(h, lengths, T, source)
    for offset in range(int(L - lengths.max())):
        positions = lengths + offset
        summary, running = at_border(running, positions, T, source)
        for row, position in enumerate(positions.tolist()):
            if position % T == 0:
                assert_close(summary[row], np.asarray(expected)[row, position // T - 1], VALUES)
        running = add_token(running, h[jnp.arange(4), positions], positions % T == 0)


def test_means_and_weights_are_float32_for_half_precision_input():
    h = jax.random.normal(jax.random.key(8), (2, 300, D)).astype(jnp.bfloat16) + 1
    mean = routing.segment_means(h, 300)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean[:, 0], np.mean(float64(h), axis=1), rtol=1e-5)
    assert routing.route(mean, jnp.ones((D, E), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(("L", "T", "N"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 4, 3)])
def test_num_segments(L, T, N):
    assert routing.num_segments(L, T) == N


def test_unknown_names_are_refused():
    h, router = jnp.zeros((1, 4, D)), jnp.zeros((D, E))
    with pytest.raises(ValueError, match=r"first_segment: got .*'self' or 'uniform'"):
        routing.causal_routing(h, router, 2, "none")
    apply, params = layer(2, "sideways", "self")
    with pytest.raises(ValueError, match="causal, prefix, prompt or segment"):
        apply(h, params, jnp.zeros(1, int))
    apply, params = layer(2, "prompt", "self")
    with pytest.raises(ValueError, match="prompt_lengths_B"):
        apply(h, params, None)


def test_the_k_largest_weights_are_kept_and_renormalised():
    r = jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    for k, expected in (
        (1, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (2, [[0, 4 / 7, 3 / 7, 0], [0.5, 0.5, 0, 0]]),
        (3, [[0, 4 / 9, 3 / 9, 2 / 9], [1 / 3, 1 / 3, 1 / 3, 0]]),
    ):
        np.testing.assert_allclose(keep_top_k(r, k), expected, rtol=1e-6)
    for k in (0, 4):
        np.testing.assert_array_equal(keep_top_k(r, k), r)
