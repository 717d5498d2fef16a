import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.errors import InputError
from lory_jax.generation.loop import decode
from lory_jax.generation.programs import make_decoder
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import assemble, build, init_params
from tests.support.models import params_of, tiny_config

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


def decoded_logits(config, params, tokens, routing, lengths):
    """Logits at positions >= length - 1 of every row, by decoding the given tokens."""
    rows, seen = np.arange(len(tokens)), []

    def choose(logits, positions):
        seen.append(np.asarray(logits))
        return tokens[rows, positions]

    prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    steps = tokens.shape[1] - max(lengths)
    for chosen in decode(config, params, prompts, choose, max_new_tokens=steps, routing=routing):
        assert chosen.shape == (len(tokens),)
    return np.stack(seen, axis=1)


def assert_decoding_equals_forward(config, params, routing, tolerance=1e-5):
    tokens = random_tokens(len(LENGTHS))
    full = full_logits(config, params, tokens, routing, LENGTHS)
    found = decoded_logits(config, params, tokens, routing, LENGTHS)
    for row, length in enumerate(LENGTHS):
        expected = full[row, length - 1 : length - 1 + found.shape[1]]
        np.testing.assert_allclose(found[row], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_decoding_equals_the_forward_pass(params, routing):
    assert_decoding_equals_forward(CONFIG, params, routing)


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


@pytest.mark.parametrize("routing", ["prompt", "segment"])
@pytest.mark.parametrize("fields", [{"document_mask": True, "bos_id": 7}, {"routing": "uniform"}])
def test_decoding_with_fields_of_the_controls_equals_the_forward_pass(params, fields, routing):
    config = dataclasses.replace(CONFIG, **fields)
    tokens = random_tokens(len(LENGTHS))
    tokens[:, ::11] = 7  # documents begin in prompts and after them
    lengths = jnp.asarray(LENGTHS)
    full = full_logits(config, params, tokens, routing, LENGTHS)
    found = decoded_logits(config, params, tokens, routing, LENGTHS)
    for row, length in enumerate(LENGTHS):
        expected = full[row, length - 1 : length - 1 + found.shape[1]]
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=0)
    assert np.abs(full - full_logits(CONFIG, params, tokens, routing, lengths)).max() > 1e-2


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_decoding_with_the_two_largest_experts_equals_the_forward_pass(params, routing):
    config = dataclasses.replace(CONFIG, top_k_experts=2)
    assert_decoding_equals_forward(config, params, routing)
    tokens = random_tokens(1)
    two, all_four = (full_logits(c, params, tokens, routing, [5]) for c in (config, CONFIG))
    assert np.abs(two - all_four).max() > 1e-2


def test_decoding_with_grouped_heads_and_a_tied_head_equals_the_forward_pass():
    config = dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=2, tie_embeddings=True)
    params = init_params(config, jax.random.key(2))
    assert_decoding_equals_forward(config, params, "segment")
    prompts = (np.ones((1, 8), np.int32), np.array([8], np.int32))
    _, _, cache = make_decoder(config, "segment").prefill(params, *prompts, 16, False)
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


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_a_row_does_not_depend_on_its_batch(params, routing):
    tokens = random_tokens(len(LENGTHS))
    together = decoded_logits(CONFIG, params, tokens, routing, LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone = decoded_logits(CONFIG, params, tokens[row : row + 1], routing, [length])[0]
        count = together.shape[1]
        np.testing.assert_allclose(together[row], alone[:count], atol=1e-5, rtol=0)


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_padding_is_never_read(params, routing):
    decoder = make_decoder(CONFIG, routing)
    tokens, lengths = random_tokens(2, 24), np.array([5, 13], np.int32)
    other = np.where(np.arange(24) < lengths[:, None], tokens, 7)
    (logits, weights, _), (other_logits, other_weights, _) = (
        decoder.prefill(params, t.astype(np.int32), lengths, 32, False) for t in (tokens, other)
    )
    np.testing.assert_array_equal(logits, other_logits)
    jax.tree.map(np.testing.assert_array_equal, weights, other_weights)


def dense_part(params):
    """The parameters of the dense baseline, those of expert 0 standing for its FFN."""
    ffn = {name: params["layers"]["ffn"][name][:, 0] for name in ("gate", "up", "down")}
    return {**params, "layers": {**params["layers"], "ffn": ffn}}


def test_after_the_merge_the_step_is_the_dense_models(params):
    """Equation by equation, and so of the same cost: for one row, or rows that share a merge."""
    prompts = np.ones((3, 8), np.int32), np.full(3, 8, np.int32)
    programs = []
    for config, mine in (
        (CONFIG, params),
        (dataclasses.replace(CONFIG, num_experts=0), dense_part(params)),
    ):
        decoder = make_decoder(config, "prompt")
        for rows in (1, 3):
            one = (x[:rows] for x in prompts)
            _, weights, cache = decoder.prefill(mine, *one, 16, True)
            tokens = np.ones(rows, np.int32)
            programs.append(str(jax.make_jaxpr(decoder.step)(weights, cache, tokens)))
    lory_one, lory_three, dense_one, dense_three = programs
    assert lory_one == dense_one and lory_three == dense_three
    assert "dot_general" in lory_one and lory_one != lory_three


def test_rows_of_one_prompt_share_one_merge(params):
    decoder = make_decoder(CONFIG, "prompt")
    tokens, lengths = random_tokens(1, 8).repeat(3, 0).astype(np.int32), np.full(3, 5, np.int32)
    found = {}
    for shared in (True, False):
        logits, weights, cache = decoder.prefill(params, tokens, lengths, 16, shared)
        assert weights["layers"][0]["ffn"]["gate"].shape == ((16, 24) if shared else (3, 16, 24))
        found[shared] = logits, decoder.step(weights, cache, tokens[:, 5])[0]
    for a, b in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_the_parameters_survive_remerging(params):
    """Some weights of the step are the parameters themselves, which no program may donate."""
    decoded_logits(CONFIG, params, random_tokens(1), "segment", [3])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_greedy_choice_of_many_steps_compiles_once(params):
    decoder = make_decoder(CONFIG, "segment")
    before = decoder.step._cache_size()

    def choose(logits, positions):
        return jnp.argmax(logits, -1)

    list(decode(CONFIG, params, [[1, 2, 3]] * 5, choose, max_new_tokens=30, routing="segment"))
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
