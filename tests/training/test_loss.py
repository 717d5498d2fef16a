"""The chunked cross-entropy against the plain one: values, gradients, any number of chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.training import loss

D, V = 6, 11


def plain(x, head, targets):
    return optax.softmax_cross_entropy_with_integer_labels(x @ head, targets)


def arrays(B, L, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, L, D)) * scale, jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    return x, head, jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)


@settings(deadline=None, max_examples=5)
@given(B=st.integers(1, 3), L=st.integers(1, 9), positions_at_once=st.integers(1, 30))
def test_values_and_gradients_equal_the_plain_loss(B, L, positions_at_once):
    x, head, targets = arrays(B, L)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS_BYTES", 4 * V * positions_at_once)
        got = loss.token_losses(x, head, targets)
        np.testing.assert_allclose(got, plain(x, head, targets), rtol=1e-5, atol=1e-6)
        # The factor 3 shows that the gradient kept in the forward pass is scaled in the backward.
        mine = jax.grad(lambda x, h: 3 * loss.mean_loss(x, h, targets), (0, 1))(x, head)
    reference = jax.grad(lambda x, h: 3 * plain(x, h, targets).mean(), (0, 1))(x, head)
    for a, b in zip(mine, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_large_logits_stay_finite():
    x, head, targets = arrays(2, 5, scale=1e4)
    losses, gradient = jax.value_and_grad(lambda x: loss.mean_loss(x, head, targets))(x)
    assert np.isfinite(losses) and np.all(np.isfinite(gradient))


def test_no_array_of_the_whole_batch_of_logits_is_made(monkeypatch):
    """In the compiled gradient no float32 array is as large as [B, L, V]."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 4 * 8 * 1000)
    x = jnp.zeros((4, 64, 16))
    head, targets = jnp.zeros((16, 1000)), jnp.zeros((4, 64), jnp.int32)
    gradient = jax.jit(jax.grad(loss.mean_loss, (0, 1)))
    memory = gradient.lower(x, head, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * 64 * 1000
