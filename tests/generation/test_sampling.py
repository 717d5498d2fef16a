import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.errors import InputError
from lory_jax.generation.sampling import check_settings, position_keys, sample


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def allowed_tokens(logits, temperature, top_k, top_p):
    """The tokens that may be drawn, by a loop over one row."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])[: top_k or None]
    weights = np.exp([(logits[v] - max(logits)) / temperature for v in order])
    weights /= weights.sum()
    kept, total = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if kept and total >= top_p:
            break
        kept.append(token)
        total += weight
    return kept


@given(
    st.integers(0, 2**20),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 6),
    st.sampled_from([0.01, 0.5, 0.9, 1.0]),
)
@settings(deadline=None, max_examples=30)
def test_only_allowed_tokens_are_drawn(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 2
    rows = jnp.tile(logits, (200, 1))
    drawn = sample(rows, keys(200, seed), temperature=temperature, top_k=top_k, top_p=top_p)
    assert set(np.asarray(drawn).tolist()) <= set(allowed_tokens(logits, temperature, top_k, top_p))


def test_frequencies_are_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    drawn = sample(jnp.tile(logits, (20_000, 1)), keys(20_000))
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, [0.5, 0.3, 0.15, 0.05], atol=0.012)
    drawn = sample(jnp.tile(logits, (20_000, 1)), keys(20_000), temperature=0.5, top_k=2)
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, [25 / 34, 9 / 34], atol=0.012)


def test_temperature_zero_top_1_and_tiny_top_p_are_greedy():
    logits = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    best = logits.argmax(-1)
    for setting in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}):
        np.testing.assert_array_equal(sample(logits, keys(7), **setting), best)


def test_a_row_does_not_depend_on_its_batch():
    logits = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32)
    all_keys = position_keys(keys(16), jnp.arange(16))
    together = sample(logits, all_keys, top_k=20, top_p=0.9)
    alone = [
        int(sample(logits[i : i + 1], all_keys[i : i + 1], top_k=20, top_p=0.9)[0])
        for i in range(16)
    ]
    assert together.tolist() == alone
    assert sample(logits, keys(16, 1)).tolist() != sample(logits, keys(16, 2)).tolist()


@pytest.mark.parametrize(
    "temperature, top_k, top_p, name",
    [
        (-1.0, 0, 1.0, "temperature"),
        (float("nan"), 0, 1.0, "temperature"),
        (1.0, -1, 1.0, "top_k"),
        (1.0, 0, 0.0, "top_p"),
        (1.0, 0, 1.5, "top_p"),
    ],
)
def test_bad_settings_are_refused(temperature, top_k, top_p, name):
    with pytest.raises(InputError, match=name):
        check_settings(temperature, top_k, top_p)
