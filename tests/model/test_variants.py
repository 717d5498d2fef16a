"""The models beyond the paper: against loops, under perturbation, scanned and unrolled, counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.model.flops import flops_per_token, parameter_counts
from tests.model.test_flops import built_size
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
from tests.support.variants import VARIANTS

VALUES = 5e-5  # float32 against float64, relative to the largest logit
GRADIENTS = 2e-3  # of a directional derivative
L, T = 14, 4  # the last segment is short

ALL = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


@ALL
@pytest.mark.parametrize(("kind", "prompts"), [(None, None), ("segment", (0, 3, 9))])
def test_logits_and_weights_equal_loops(fields, kind, prompts):
    config, tokens = tiny_config(**fields), random_tokens(3, L)
    params = params_of(config)
    lengths = None if prompts is None else jnp.array(prompts)
    logits, weights = forward(config, kind)(params, tokens, lengths)
    expected = reference.transformer(float64(params), tokens, config, kind, prompts)
    assert_close(logits, expected[0], VALUES, "logits")
    assert_close(weights, expected[1], VALUES, "weights")


@ALL
def test_gradients_equal_central_differences_of_the_loops_scanned_and_unrolled(fields):
    """Along a random direction each; weights that the paper stops the gradient of are frozen."""
    config, tokens = tiny_config(**fields), random_tokens(1, 10)
    params = params_of(config)
    loss, gradients = loss_and_gradients(config)(params, tokens)
    unrolled = tiny_config(**fields, scan_layers=False, remat="full")
    assert_trees_close(loss_and_gradients(unrolled)(params, tokens)[1], gradients, 2e-5)
    params64 = float64(params)
    base, weights = reference.transformer(params64, tokens[:, :-1], config)
    expected_loss = np.mean(reference.token_losses(base, tokens[:, 1:]))
    np.testing.assert_allclose(loss, expected_loss, rtol=VALUES)

    leaves, structure = jax.tree_util.tree_flatten_with_path(params64)
    rng = np.random.default_rng(5)
    for i, (path, w) in enumerate(leaves):
        direction = rng.normal(size=w.shape)

        def scalar(step, i=i, direction=direction):
            moved = [
                leaf + step * direction if n == i else leaf for n, (_, leaf) in enumerate(leaves)
            ]
            logits, _ = reference.transformer(
                jax.tree.unflatten(structure, moved),
                tokens[:, :-1],
                config,
                frozen=weights[:, :, 0],
            )
            return np.mean(reference.token_losses(logits, tokens[:, 1:]))

        expected = (scalar(1e-5) - scalar(-1e-5)) / 2e-5
        gradient = float64(jax.tree.leaves(gradients)[i])
        got, scale = np.sum(gradient * direction), np.linalg.norm(gradient)
        assert scale > 0, jax.tree_util.keystr(path)
        assert abs(got - expected) <= GRADIENTS * scale, (jax.tree_util.keystr(path), got, expected)


@ALL
def test_no_logit_depends_on_later_tokens(fields):
    """With equal weights in segment 1, which otherwise routes itself."""
    config = tiny_config(**fields, first_segment_routing="uniform")
    run, params = forward(config), params_of(config)
    base = np.repeat(random_tokens(1, L, seed=3), L, axis=0)
    changed = base.copy()
    changed[np.arange(L), np.arange(L)] = (changed[np.arange(L), np.arange(L)] + 7) % 37
    before, after = (np.asarray(run(params, tokens)[0]) for tokens in (base, changed))
    moved = np.any(before != after, axis=-1)
    assert np.all(np.diag(moved))
    assert not np.any(np.tril(moved, -1))


@ALL
def test_counts_equal_the_size_of_a_built_model(fields):
    config = tiny_config(**fields)
    assert parameter_counts(config)["total"] == built_size(config)


@ALL
def test_flops_equal_a_count_of_every_matrix_product(fields):
    config = tiny_config(**fields, sequence_length=16)
    D, F, E, L, T = 16, config.mlp_dim, 4, 16, 4
    f = F // 16
    products = D * config.vocab_size  # multiplications of one token
    for number in range(config.num_layers):
        products += 4 * D * D + 2 * D * L + 3 * D * F
        if reference.holds_experts(config, number):
            rank = config.expert_rank
            products += 3 * E * rank * (D + F) if rank else 3 * E * D * F / T
        products += 3 * D * F * config.shared_expert
        products += config.token_deltas * (3 * D * f + D)
    assert flops_per_token(config) == pytest.approx(6 * products)
