"""Attention: the implementations agree, and the choice among them is explicit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lory_jax.errors import ConfigError
from lory_jax.model.attention import (
    Attention,
    AttentionShape,
    blocked_attention,
    document_starts,
    paired,
    paired_kernels,
    resolve_attention,
)
from lory_jax.model.attention.choice import PAIRED_LENGTH
from lory_jax.model.attention.paired import paired_attention
from lory_jax.model.attention.splash import splash_attention
from lory_jax.model.parameters import Initializer
from lory_jax.model.rope import Rope, rotate
from tests.support.models import assert_close, assert_trees_close, forward, params_of, tiny_config

PLAIN = Rope(10_000.0, "none", 1.0, 1.0, 4.0, 8192)
YARN = Rope(10_000.0, "yarn", 4.0, 1.0, 4.0, 64)  # multiplies by more than one


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


def test_no_square_of_scores_is_kept_for_the_backward_pass():
    query, key, value, _ = arrays(2, 256, 2, 8)
    _, pullback = jax.vjp(blocked_attention, query, key, value)
    kept = jax.tree.leaves(pullback)
    assert kept and max(x.size for x in kept) <= query.size


def test_half_precision_gradients_are_those_of_float32_rounded():
    exact = arrays(2, 130, 4, 16, kv_heads=2)
    got = values_and_gradients(blocked_attention, *(x.astype(jnp.bfloat16) for x in exact))
    for a, e in zip(got, values_and_gradients(blocked_attention, *exact), strict=True):
        assert a.dtype == jnp.bfloat16
        assert_close(a.astype(jnp.float32), e, 0.03)


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


def splash_by_rows(query, key, value, starts_BxL=None):
    """`splash_attention` of `[B, L, H, K]`."""
    columns = (x.transpose(0, 2, 3, 1) for x in (query, key, value))
    return splash_attention(*columns, "batch", "heads", starts_BxL, interpret=True).swapaxes(1, 2)


@pytest.mark.parametrize(("K", "heads", "kv_heads"), [(64, 2, 2), (128, 2, 2), (64, 4, 2)])
def test_splash_equals_blocks_in_values_and_gradients(K, heads, kv_heads):
    query, key, value, cotangent = arrays(2, 256, heads, K, kv_heads=kv_heads)
    got = values_and_gradients(splash_by_rows, query, key, value, cotangent)
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
    splash = functools.partial(splash_by_rows, starts_BxL=starts)
    for function in (blocks, splash):
        got = values_and_gradients(function, query, key, value, cotangent)
        for a, e in zip(got, expected, strict=True):
            assert_close(a, e, 1e-5)


# ---------------------------------------------------------------- two heads of 64 in 128 lanes


def rotated_blocks(query, key, value, rope):
    """The reference of `paired_attention`, whose heads lie side by side."""
    B, L, D = query.shape
    query, key, value = (x.reshape(B, L, D // 64, 64) for x in (query, key, value))
    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    query, key = (rotate(x, positions, rope) for x in (query, key))
    return blocked_attention(query, key, value).reshape(B, L, D)


def side_by_side(B, L, H, dtype=np.float32):
    return [x.reshape(B, L, H * 64) for x in arrays(B, L, H, 64, dtype)]


@pytest.mark.parametrize(
    ("L", "block", "strip", "rope"),
    [
        (128, 128, 128, PLAIN),  # one block
        (384, 128, 128, YARN),  # several
        (256, 256, 128, PLAIN),  # one block, several strips
        (512, 256, 128, YARN),  # both
    ],
)
def test_paired_heads_equal_rotation_and_blocks(monkeypatch, L, block, strip, rope):
    monkeypatch.setattr(paired, "BLOCKS", (block,))
    monkeypatch.setattr(paired_kernels, "STRIP", strip)
    *inputs, cotangent = side_by_side(2, L, 4)
    got, expected = (
        values_and_gradients(functools.partial(run, rope=rope), *inputs, cotangent)
        for run in (functools.partial(paired_attention, interpret=True), rotated_blocks)
    )
    for name, a, e in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        assert_close(a, e, 1e-5, name)


def test_paired_heads_in_bfloat16_are_within_a_hundredth():
    """Of the largest exact value. Scores, softmax and sums are float32; weights are rounded."""
    *inputs, cotangent = side_by_side(1, 256, 2, jnp.bfloat16)
    run = functools.partial(paired_attention, rope=PLAIN, interpret=True)
    got = values_and_gradients(run, *inputs, cotangent)
    exact = [x.astype(jnp.float32) for x in (*inputs, cotangent)]
    expected = values_and_gradients(functools.partial(rotated_blocks, rope=PLAIN), *exact)
    for name, a, e in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_close(a.astype(jnp.float32), e, 1e-2, name)


def test_the_schedule_visits_every_block_that_is_seen_once():
    for by_keys in (False, True):
        steps = paired_kernels.schedule(5, by_keys).T.tolist()
        assert sorted(steps) == [[i, j] for i in range(5) for j in range(i + 1)]
        outer = [step[1 if by_keys else 0] for step in steps]
        assert outer == sorted(outer), "sums of one block are accumulated in consecutive steps"


def layer_gradients(implementation, bias="none", heads=(2, 2), starts=None):
    """The value and all gradients of a layer's attention, of its input and its parameters."""
    H, G = heads
    D = 64 * H
    module = Attention(Initializer(jax.random.key(0)), D, H, G, 64, 1.0, bias)
    graph, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=w.shape) / 8, jnp.float32) for k, w in params.items()}
    x, cotangent = jnp.asarray(rng.normal(size=(2, 2, 128, D)), jnp.float32)

    def run(params, x):
        layer = nnx.merge(graph, params)
        return layer(x, PLAIN, implementation, starts, interpret=True)

    value, pull = jax.vjp(run, params, x)
    return {"value": value, "gradients": pull(cotangent)}


@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
def test_a_layer_with_paired_heads_equals_plain_attention(bias):
    got, expected = (layer_gradients(by, bias) for by in ("paired", "xla"))
    assert_trees_close(got, expected, 1e-5)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_layer_with_splash_equals_plain_attention(bias):
    starts = jnp.repeat(jnp.array([[0, 0, 64, 96]]), 32, axis=1)
    starts = jnp.concatenate([starts, starts * 0])
    got, expected = (layer_gradients(by, bias, (4, 2), starts) for by in ("splash", "xla"))
    assert_trees_close(got, expected, 1e-5)


@pytest.mark.parametrize("experts", [0, 4])
def test_logits_with_paired_heads_equal_those_of_plain_attention(interpreted, experts):
    config = functools.partial(
        tiny_config, num_experts=experts, embed_dim=128, sequence_length=128, segment_length=32
    )
    tokens = np.random.default_rng(0).integers(0, 37, (2, 128)).astype(np.int32)
    params = params_of(config())
    got, expected = (forward(config(attention=by))(params, tokens)[0] for by in ("paired", "xla"))
    assert_close(got, expected, 2e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernel of a model with attention=paired on this machine."""

    def run(query, key, value, rope, interpret):
        return paired_attention(query, key, value, rope, True)

    monkeypatch.setattr(paired, "paired_attention", run)


# ---------------------------------------------------------------- the choice

SHAPE = AttentionShape(heads=2, kv_heads=2, head_width=64, length=256)


def test_cudnn_is_never_chosen_for_documents():
    assert resolve_attention("auto", "gpu", "bfloat16", SHAPE, document_mask=True) == "xla"
    assert resolve_attention("auto", "tpu", "bfloat16", SHAPE, document_mask=True) == "splash"
    with pytest.raises(ConfigError, match=r"config\.model\.attention: got cudnn"):
        resolve_attention("cudnn", "gpu", "bfloat16", SHAPE, document_mask=True)


def test_cudnn_does_not_fall_back_where_there_is_none():
    with pytest.raises(RuntimeError, match="cuDNN"):
        layer_gradients("cudnn")


@pytest.mark.parametrize(
    ("choice", "platform", "dtype", "expected"),
    [
        ("auto", "cpu", "float32", "xla"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),
        ("auto", "tpu", "bfloat16", "paired"),
        ("paired", "tpu", "float32", "paired"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("splash", "tpu", "float32", "splash"),
    ],
)
def test_the_choice_goes_by_platform_and_type(choice, platform, dtype, expected):
    assert resolve_attention(choice, platform, dtype, SHAPE) == expected


@pytest.mark.parametrize(
    ("choice", "platform", "dtype", "words"),
    [
        ("cudnn", "cpu", "bfloat16", "got cudnn.* gpu.* cpu"),
        ("splash", "gpu", "bfloat16", "got splash.* tpu.* gpu"),
        ("paired", "cpu", "float32", "got paired.* tpu.* cpu"),
        ("cudnn", "gpu", "float32", "got cudnn.*compute_dtype=bfloat16"),
    ],
)
def test_what_a_platform_cannot_run_is_refused(choice, platform, dtype, words):
    with pytest.raises(ConfigError, match=f"config.model.attention: {words}"):
        resolve_attention(choice, platform, dtype, SHAPE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_width": 128}, "width 64, not 128"),
        ({"heads": 4}, r"as many heads of keys \(2\) as of queries \(4"),
        ({"heads": 3, "kv_heads": 3}, "even config.model.num_heads, not 3"),
        ({"sharding": "heads"}, "attention_sharding=batch"),
        ({"length": 200}, "multiples of 128 up to .*not 200"),
        ({"length": PAIRED_LENGTH + 128}, "multiples of 128 up to"),
        ({"document_mask": True}, "document_mask=False"),
    ],
    ids=str,
)
def test_where_heads_are_not_paired_splash_is_chosen(fields, words):
    document_mask = fields.pop("document_mask", False)
    shape = dataclasses.replace(SHAPE, **fields)
    assert resolve_attention("auto", "tpu", "bfloat16", shape, document_mask) == "splash"
    with pytest.raises(ConfigError, match=f"got paired, which requires .*{words}"):
        resolve_attention("paired", "tpu", "bfloat16", shape, document_mask)


@pytest.mark.parametrize("implementation", ["splash", "paired"])
def test_the_kernels_of_a_tpu_name_the_length_they_take(implementation):
    layer = Attention(Initializer(jax.random.key(0)), 128, 2, 2, 64, 1.0)
    with pytest.raises(ConfigError, match=r"sequence_length: got 100.*128"):
        layer(jnp.zeros((1, 100, 128)), PLAIN, implementation)
