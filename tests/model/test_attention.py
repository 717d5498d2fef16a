"""Attention: the implementations agree, and the choice among them is explicit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.errors import ConfigError
from lory_jax.model.attention import (
    blocked_attention,
    causal_attention,
    document_starts,
    resolve_attention,
    splash_attention,
)
from tests.support.models import assert_close


def arrays(B, L, H, K, dtype=np.float32, kv_heads=None):
    """Queries, keys, values and a cotangent."""
    rng = np.random.default_rng(0)
    heads = (H, kv_heads or H, kv_heads or H, H)
    return [jnp.asarray(rng.normal(size=(B, L, h, K)), dtype) for h in heads]


def values_and_gradients(function, query, key, value, cotangent):
    result, pullback = jax.vjp(function, query, key, value)
    return result, *pullback(cotangent)


@pytest.mark.parametrize("L", [1, 5, 130, 300])
def test_blocks_equal_the_whole_square(L):
    query, key, value, cotangent = arrays(2, L, 2, 8)

    def whole(query, key, value):
        scores = jnp.einsum("blhk,bmhk->bhlm", query, key) / np.sqrt(8)
        scores = jnp.where(np.tril(np.ones((L, L), bool)), scores, -jnp.inf)
        return jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores), value)

    got = jax.jit(functools.partial(values_and_gradients, blocked_attention))
    expected = values_and_gradients(whole, query, key, value, cotangent)
    for a, e in zip(got(query, key, value, cotangent), expected, strict=True):
        assert_close(a, e, 1e-5)


def test_grouped_heads_equal_repeated_ones():
    """Values and gradients are those of keys and values that are repeated for every query head."""
    query, key, value, cotangent = arrays(2, 130, 6, 8, kv_heads=2)

    def repeated(query, key, value):
        return blocked_attention(query, *(jnp.repeat(x, 3, axis=2) for x in (key, value)))

    got, expected = (
        values_and_gradients(function, query, key, value, cotangent)
        for function in (blocked_attention, repeated)
    )
    for a, e in zip(got, expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize(("K", "heads", "kv_heads"), [(64, 2, 2), (128, 2, 2), (64, 4, 2)])
def test_splash_equals_blocks_in_values_and_gradients(K, heads, kv_heads):
    query, key, value, cotangent = arrays(2, 256, heads, K, kv_heads=kv_heads)
    splash = functools.partial(
        splash_attention, batch_axis="batch", heads_axis="heads", interpret=True
    )
    got = values_and_gradients(splash, query, key, value, cotangent)
    expected = values_and_gradients(blocked_attention, query, key, value, cotangent)
    for a, e in zip(got, expected, strict=True):
        assert_close(a, e, 1e-5)


DOCUMENTS = [0, 100, 128, 200, 201]  # where they begin in a row of 256


def starts_of(length):
    starts = np.array([max(s for s in DOCUMENTS if s <= i) for i in range(length)], np.int32)
    return jnp.stack([starts, np.zeros_like(starts)])  # a row of one document too


def test_starts_are_those_of_the_tokens():
    tokens = np.ones((2, 256), np.int32)
    tokens[0, DOCUMENTS] = 7
    np.testing.assert_array_equal(document_starts(jnp.asarray(tokens), 7), starts_of(256))


def test_a_branch_is_in_the_document_of_the_prefix_or_in_its_own():
    tokens = jnp.array([[7, 1, 7, 1, 1, 7, 1, 1, 1]])
    branch = jnp.array([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    expected = [[0, 0, 2, 2, 2, 5, 5, 2, 2]]
    np.testing.assert_array_equal(document_starts(tokens, 7, branch), expected)


def test_blocks_and_splash_stay_inside_documents():
    query, key, value, cotangent = arrays(2, 256, 2, 64)
    starts = starts_of(256)
    i = np.arange(256)
    mask = (i[None] <= i[:, None]) & (i[None, None] >= np.asarray(starts)[:, :, None])

    def whole(query, key, value):
        scores = jnp.einsum("blhk,bmhk->bhlm", query, key) / np.sqrt(64)
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        return jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores), value)

    expected = values_and_gradients(whole, query, key, value, cotangent)
    blocks = functools.partial(blocked_attention, starts_BxL=starts)
    splash = functools.partial(
        splash_attention,
        batch_axis="batch",
        heads_axis="heads",
        starts_BxL=starts,
        interpret=True,
    )
    for function in (blocks, splash):
        got = values_and_gradients(function, query, key, value, cotangent)
        for a, e in zip(got, expected, strict=True):
            assert_close(a, e, 1e-5)


def test_cudnn_is_never_chosen_for_documents():
    assert resolve_attention("auto", "gpu", "bfloat16", document_mask=True) == "xla"
    assert resolve_attention("auto", "tpu", "bfloat16", document_mask=True) == "splash"
    with pytest.raises(ConfigError, match=r"config\.model\.attention: got cudnn"):
        resolve_attention("cudnn", "gpu", "bfloat16", document_mask=True)


def test_cudnn_does_not_fall_back_where_there_is_none():
    query, key, value, _ = arrays(1, 128, 1, 64, jnp.bfloat16)
    with pytest.raises(RuntimeError, match="cuDNN"):
        causal_attention(query, key, value, implementation="cudnn")


@pytest.mark.parametrize(
    ("choice", "platform", "dtype", "expected"),
    [
        ("auto", "cpu", "float32", "xla"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),
        ("auto", "tpu", "bfloat16", "splash"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("splash", "tpu", "float32", "splash"),
    ],
)
def test_the_choice_goes_by_platform_and_type(choice, platform, dtype, expected):
    assert resolve_attention(choice, platform, dtype) == expected


@pytest.mark.parametrize(
    ("choice", "platform", "dtype", "words"),
    [
        ("cudnn", "cpu", "bfloat16", "got cudnn.* gpu.* cpu"),
        ("splash", "gpu", "bfloat16", "got splash.* tpu.* gpu"),
        ("cudnn", "gpu", "float32", "got cudnn.*compute_dtype=bfloat16"),
    ],
)
def test_what_a_platform_cannot_run_is_refused(choice, platform, dtype, words):
    with pytest.raises(ConfigError, match=f"config.model.attention: {words}"):
        resolve_attention(choice, platform, dtype)


def test_splash_names_the_length_it_takes():
    query, key, value, _ = arrays(1, 100, 1, 64)
    with pytest.raises(ConfigError, match=r"sequence_length: got 100.*128"):
        splash_attention(query, key, value, "batch", "heads", interpret=True)
