import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.errors import InputError
from lory_jax.generation.loop import decode
from lory_jax.generation.programs import make_decoder, spread
from lory_jax.model.routing import Routing
from lory_jax.model.routing_rules import SOURCES
from lory_jax.model.transformer import assemble, build, init_params
from tests.support.models import params_of, tiny_config
from tests.support.variants import VARIANTS

T = 8
CONFIG = tiny_config(
    vocab_size=300,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    num_experts=4,
    sequence_length=100,
    segment_length=T,
    router_init_scale=8.0,  # decided routers: a wrong decision shows
)
# Shorter than, equal to and longer than a segment, on and off a border.
LENGTHS = [1, 5, 8, 9, 16, 21, 24]


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def random_tokens(count, length=64, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (count, length))


def full_logits(config, params, tokens, routing, lengths):
    graph, _ = build(config)
    rule = Routing(routing, jnp.asarray(lengths))
    return jax.jit(lambda params: assemble(graph, params)(tokens, rule)[0])(params)


def decoded_logits(config, params, tokens, routing, lengths, ffn="merged"):
    """Logits at positions >= length - 1 of every row, by decoding the given tokens."""
    rows, seen = np.arange(len(tokens)), []

    def choose(logits, positions):
        seen.append(np.asarray(logits))
        return tokens[rows, positions]

    prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    steps = tokens.shape[1] - max(lengths)
    limits = dict(max_new_tokens=steps, routing=routing, ffn=ffn)
    for chosen in decode(config, params, prompts, choose, **limits):
        assert chosen.shape == (len(tokens),)
    return np.stack(seen, axis=1)


def assert_decoding_equals_forward(
    config, params, routing, tolerance=1e-5, ffn="merged", tokens=None, lengths=LENGTHS
):
    tokens = random_tokens(len(lengths)) if tokens is None else tokens
    full = full_logits(config, params, tokens, routing, lengths)
    found = decoded_logits(config, params, tokens, routing, lengths, ffn)
    for row, length in enumerate(lengths):
        expected = full[row, length - 1 : length - 1 + found.shape[1]]
        np.testing.assert_allclose(found[row], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_decoding_equals_the_forward_pass(params, routing, ffn):
    assert_decoding_equals_forward(CONFIG, params, routing, ffn=ffn)


@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_rows_of_equal_prompts_equal_the_forward_pass(params, routing, ffn):
    """Rows 0, 2 and 5 have the prompt of row 0, rows 1 and 4 that of row 1; then they differ."""
    tokens, lengths = random_tokens(6), [9, 5, 9, 12, 5, 9]
    for row, other in ((2, 0), (5, 0), (4, 1)):
        tokens[row, : lengths[row]] = tokens[other, : lengths[row]]
    assert_decoding_equals_forward(CONFIG, params, routing, ffn=ffn, tokens=tokens, lengths=lengths)


def test_unmerged_experts_in_bfloat16_are_as_exact_as_merged_ones():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params = params_of(config)
    tokens = random_tokens(len(LENGTHS))
    exact = full_logits(CONFIG, params, tokens, "prompt", LENGTHS)
    errors = {}
    for ffn in ("merged", "experts"):
        found = decoded_logits(config, params, tokens, "prompt", LENGTHS, ffn)
        rows = range(len(LENGTHS))
        expected = [exact[b, LENGTHS[b] - 1 : LENGTHS[b] - 1 + found.shape[1]] for b in rows]
        errors[ffn] = np.sqrt(np.mean((found - np.stack(expected)) ** 2))
    assert errors["experts"] < 1.1 * errors["merged"]


@pytest.mark.parametrize(
    ("model", "routing"),
    [
        ("expert_choice_segment", "prompt"),
        ("expert_choice_segment", "segment"),
        ("top2", "prompt"),
        ("dropless_top1", "segment"),
    ],
)
def test_decoding_a_sparse_baseline_equals_the_forward_pass(params, model, routing):
    config = dataclasses.replace(CONFIG, routing=model)
    assert_decoding_equals_forward(config, params, routing, tolerance=5e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"routing": "dropless_top2", "balancing": "loss_free"},
        {"routing": "remoe"},
        {"routing": "expert_threshold"},
    ],
    ids=str,
)
def test_decoding_with_an_adapted_router_equals_the_forward_pass(fields):
    config = dataclasses.replace(CONFIG, **fields)
    params = params_of(config)
    assert_decoding_equals_forward(config, params, "prompt", tolerance=5e-5)
    if config.adapted_parameter == "l1_weight":  # of the loss alone
        return
    ffn = params["layers"]["ffn"]
    zeros = np.zeros_like(ffn[config.adapted_parameter])
    without = {**params["layers"], "ffn": {**ffn, config.adapted_parameter: zeros}}
    one, other = (
        full_logits(config, p, random_tokens(1), "prompt", [5])
        for p in (params, {**params, "layers": without})
    )
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize(
    ("routing", "ffn"),
    [
        ("segment", "merged"),
        *(
            pytest.param(routing, ffn, marks=pytest.mark.slow)
            for routing, ffn in [
                ("prompt", "merged"),
                ("prompt", "experts"),
                ("segment", "experts"),
            ]
        ),
    ],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"document_mask": True, "bos_id": 7},
        {"routing": "uniform"},
        *({"routing_source": source} for source in SOURCES if source != "last"),
    ],
)
def test_decoding_with_fields_of_the_controls_equals_the_forward_pass(params, fields, routing, ffn):
    config = dataclasses.replace(CONFIG, **fields)
    # Attention sums its weights token by token, which the decided routers here amplify.
    atol = 2e-5 if config.routing_source == "attention" else 1e-5
    tokens = random_tokens(len(LENGTHS))
    tokens[:, ::11] = 7  # documents begin in prompts and after them
    lengths = jnp.asarray(LENGTHS)
    full = full_logits(config, params, tokens, routing, LENGTHS)
    found = decoded_logits(config, params, tokens, routing, LENGTHS, ffn)
    for row, length in enumerate(LENGTHS):
        expected = full[row, length - 1 : length - 1 + found.shape[1]]
        np.testing.assert_allclose(found[row], expected, atol=atol, rtol=0)
    if "routing_source" not in fields or routing == "segment":
        assert np.abs(full - full_logits(CONFIG, params, tokens, routing, lengths)).max() > 1e-2


@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_decoding_with_the_two_largest_experts_equals_the_forward_pass(params, routing, ffn):
    config = dataclasses.replace(CONFIG, top_k_experts=2)
    assert_decoding_equals_forward(config, params, routing, ffn=ffn)
    tokens = random_tokens(1)
    two, all_four = (full_logits(c, params, tokens, routing, [5]) for c in (config, CONFIG))
    assert np.abs(two - all_four).max() > 1e-2


@pytest.mark.parametrize(
    ("routing", "ffn"),
    [
        ("segment", "merged"),
        ("segment", "experts"),
        pytest.param("prompt", "merged", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_decoding_a_variant_equals_the_forward_pass(fields, routing, ffn):
    """Rows 0 and 2 have one prompt, and so may share a merge."""
    config = dataclasses.replace(CONFIG, **{"num_layers": 2, **fields})
    tokens, lengths = random_tokens(4, 40), [9, 5, 9, 8]
    tokens[2, :9] = tokens[0, :9]
    params = params_of(config)
    assert_decoding_equals_forward(config, params, routing, 5e-5, ffn, tokens, lengths)


def test_decoding_with_grouped_heads_and_a_tied_head_equals_the_forward_pass():
    config = dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=2, tie_embeddings=True)
    params = init_params(config, jax.random.key(2))
    assert_decoding_equals_forward(config, params, "segment")
    prompts = (np.ones((1, 8), np.int32), np.array([8], np.int32))
    _, _, cache = make_decoder(config, "segment").prefill(params, *prompts, 16, None)
    assert cache.keys[0].shape == (1, 2, 16, 4)  # heads are cached, not repeated


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_decoding_a_dense_model_equals_the_forward_pass(routing):
    config = dataclasses.replace(CONFIG, num_experts=0)
    assert_decoding_equals_forward(config, init_params(config, jax.random.key(1)), routing)


def test_the_two_routings_differ_after_the_first_segment(params):
    tokens = random_tokens(2)
    prompt, segment = (
        decoded_logits(CONFIG, params, tokens, routing, [5, 5]) for routing in ("prompt", "segment")
    )
    np.testing.assert_allclose(prompt[:, : T - 5 + 1], segment[:, : T - 5 + 1], atol=1e-5)
    assert np.abs(prompt - segment)[:, T - 5 + 1 :].max() > 1e-2


@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_a_row_does_not_depend_on_its_batch(params, routing, ffn):
    tokens = random_tokens(len(LENGTHS))
    together = decoded_logits(CONFIG, params, tokens, routing, LENGTHS, ffn)
    for row, length in enumerate(LENGTHS):
        alone = decoded_logits(CONFIG, params, tokens[row : row + 1], routing, [length], ffn)[0]
        count = together.shape[1]
        np.testing.assert_allclose(together[row], alone[:count], atol=1e-5, rtol=0)


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_padding_is_never_read(params, routing):
    decoder = make_decoder(CONFIG, routing)
    tokens, lengths = random_tokens(2, 24), np.array([5, 13], np.int32)
    other = np.where(np.arange(24) < lengths[:, None], tokens, 7)
    (logits, merged, _), (other_logits, other_merged, _) = (
        decoder.prefill(params, t.astype(np.int32), lengths, 32, None) for t in (tokens, other)
    )
    np.testing.assert_array_equal(logits, other_logits)
    jax.tree.map(np.testing.assert_array_equal, merged, other_merged)


def dense_part(params):
    """The parameters of the dense baseline, those of expert 0 standing for its FFN."""
    ffn = {name: params["layers"]["ffn"][name][:, 0] for name in ("gate", "up", "down")}
    return {**params, "layers": {**params["layers"], "ffn": ffn}}


def test_after_the_merge_the_step_is_the_dense_models(params):
    """Equation by equation, and so of the same cost: for one row, or rows that share a merge."""
    prompt = np.ones((1, 8), np.int32), np.full(1, 8, np.int32)
    programs = []
    for config, mine in (
        (CONFIG, params),
        (dataclasses.replace(CONFIG, num_experts=0), dense_part(params)),
    ):
        decoder = make_decoder(config, "prompt")
        for rows in (1, 3):
            state = decoder.prefill(mine, *prompt, 16, None)
            _, merged, cache = spread(np.zeros(rows, int), *state, False)
            weights, tokens = decoder.weights(mine, merged), np.ones(rows, np.int32)
            programs.append(str(jax.make_jaxpr(decoder.step)(weights, cache, tokens)))
    lory_one, lory_three, dense_one, dense_three = programs
    assert lory_one == dense_one and lory_three == dense_three
    assert "dot_general" in lory_one and lory_one != lory_three


def weights_read(params, prompts, ffn):
    """The shape of the first layer's gate that a step of these prompts reads, and its bytes."""
    seen = {}

    def choose(logits, positions):
        frame = steps.gi_frame.f_locals
        layer = frame["weights"]["layers"][0]["ffn"]
        seen["shape"] = layer["gate"].shape
        seen["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(frame["weights"]))
        return jnp.argmax(logits, -1)

    steps = decode(CONFIG, params, prompts, choose, max_new_tokens=1, ffn=ffn)
    list(steps)
    return seen["shape"], seen["bytes"]


def test_rows_share_merges_and_unmerged_experts_do_not_grow_with_the_batch(params):
    one, two, three = [1, 2], [3], [4, 5, 6]
    assert weights_read(params, [one] * 3, "merged")[0] == (16, 24)
    assert weights_read(params, [one, two, one, two, one], "merged")[0] == (2, 16, 24)
    assert weights_read(params, [one, two, three], "merged")[0] == (3, 16, 24)
    (shape, few), (_, many) = (
        weights_read(params, prompts, "experts")
        for prompts in ([one], [[1, 2, token] for token in range(9)])
    )
    assert shape == (4, 16, 24) and few == many


def test_the_program_of_unmerged_experts_holds_no_merged_ffn(params):
    """The most that a step needs beside weights and cache is less than the FFNs of the rows."""
    B, tokens = 32, np.ones((32, 8), np.int32)
    needed = {}
    for ffn in ("merged", "experts"):
        decoder = make_decoder(CONFIG, "segment", None, ffn)
        _, merged, cache = decoder.prefill(params, tokens, np.full(B, 8, np.int32), 16, None)
        weights = decoder.weights(params, merged)
        step = decoder.step.lower(weights, cache, tokens[:, 0]).compile()
        assert step.memory_analysis().temp_size_in_bytes < B * 3 * 16 * 24 * 4
        needed[ffn] = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        before = jax.tree.map(np.asarray, (weights, cache))
        rerouted, cache = decoder.reroute(params, weights, cache)
        assert jax.tree.structure(before) == jax.tree.structure((rerouted, cache))
    assert needed["experts"] < needed["merged"] / 3


@pytest.mark.parametrize("ffn", ["merged", "experts"])
def test_the_parameters_survive_rerouting(params, ffn):
    """Some weights of the step are the parameters themselves, which no program may donate."""
    decoded_logits(CONFIG, params, random_tokens(1), "segment", [3], ffn)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_greedy_choice_of_many_steps_compiles_once(params):
    decoder = make_decoder(CONFIG, "segment", None, "experts")
    before = decoder.step._cache_size()

    def choose(logits, positions):
        return jnp.argmax(logits, -1)

    prompts = [[1, 2, 3]] * 5
    steps = dict(max_new_tokens=30, routing="segment", ffn="experts")
    list(decode(CONFIG, params, prompts, choose, **steps))
    assert decoder.step._cache_size() - before <= 1


@pytest.mark.parametrize(
    "prompts, count, message",
    [
        ([], 1, "at least one"),
        ([[1], []], 1, "at least one"),
        ([[1] * 60], 41, "max_new_tokens: got 41 after a prompt of 60 tokens .* 1 to 40"),
        ([[1]], 0, "max_new_tokens: got 0 after"),
        ([[1], [1] * 60], [99, 41], "max_new_tokens: got 41 after a prompt of 60"),
        ([[1], [1] * 60], [100, 40], "max_new_tokens: got 100 after a prompt of 1 "),
        ([[1] * 100], 1, "prompt: got 100 tokens .* at most 99"),
    ],
)
def test_bad_requests_are_refused(params, prompts, count, message):
    with pytest.raises(InputError, match=message):
        list(decode(CONFIG, params, prompts, lambda logits, _: logits, max_new_tokens=count))


def test_an_unknown_routing_is_refused():
    with pytest.raises(InputError, match=r"routing: got 'token', .*prompt or segment"):
        make_decoder(CONFIG, "token")


def test_the_last_position_is_reached(params):
    def choose(logits, positions):
        return jnp.argmax(logits, -1)

    assert len(list(decode(CONFIG, params, [[1] * 96], choose, max_new_tokens=4))) == 4


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_a_row_that_has_all_its_tokens_disturbs_no_other(params, routing):
    """Beside a row of few tokens, one goes on beyond where the first one's cache ends."""

    def choose(logits, positions):
        return jnp.argmax(logits, -1)

    def continued(prompts, counts):
        steps = decode(CONFIG, params, prompts, choose, max_new_tokens=counts, routing=routing)
        return np.stack(list(steps), axis=1)

    long, short = [2] * 96, [1, 5, 9]
    together = continued([long, short], [4, 40])
    assert together.shape == (2, 40)
    np.testing.assert_array_equal(together[0, :4], continued([long], 4)[0])
    np.testing.assert_array_equal(together[1], continued([short], 40)[0])
