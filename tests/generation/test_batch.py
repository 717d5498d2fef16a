"""Prompts that join and leave a running batch: logits of the full forward pass, no neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.errors import InputError
from lory_jax.generation.batch import ContinuousBatch
from lory_jax.generation.merge import merged_params
from lory_jax.generation.settings import Settings
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import assemble, build
from lory_jax.parallel import make_mesh
from tests.support.models import params_of, tiny_config

CONFIG = tiny_config(vocab_size=64, embed_dim=16, sequence_length=48, segment_length=8)
GREEDY = Settings(temperature=0.0)
SLOTS = 3
LENGTHS = [5, 8, 13, 1, 9, 16, 3]
NEW_TOKENS = [11, 4, 20, 9, 1, 12, 17]


def prompt(number):
    rng = np.random.default_rng(number)
    return rng.integers(0, CONFIG.vocab_size, LENGTHS[number]).tolist()


def make_batch(config=CONFIG, params=None, **options):
    options = dict(slots=SLOTS, cache_length=48) | options
    return ContinuousBatch(config, params or params_of(config), **options)


def run(batch, numbers, settings=GREEDY, given=None):
    """Continues prompts as slots get free; their tokens, and the logits of each, by number."""
    waiting, slots = list(numbers), {}
    tokens, logits = {n: [] for n in numbers}, {n: [] for n in numbers}
    order = []
    while waiting or slots:
        batch.advance()
        while batch.free and waiting:
            number = waiting.pop(0)
            order.append(number)
            slots[batch.join(prompt(number), settings, given_YxE=given)] = number
        seen = np.asarray(batch._logits_SxV)
        for slot, token in batch.draw().items():
            number = slots[slot]
            tokens[number].append(token)
            logits[number].append(seen[slot])
            if len(tokens[number]) == NEW_TOKENS[number]:
                batch.leave(slot)
                del slots[slot]
    assert order == list(numbers) and batch.free == SLOTS
    return tokens, logits


def full_logits(config, params, sequence, length, routing):
    graph, _ = build(config)
    padded = np.zeros((1, config.sequence_length), np.int32)
    padded[0, : len(sequence)] = sequence

    @jax.jit
    def forward(params, tokens, lengths):
        return assemble(graph, params)(tokens, Routing(routing, lengths))[0]

    return np.asarray(forward(params, padded, jnp.array([length])))[0]


@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_every_row_equals_the_forward_pass(routing, ffn):
    """Seven prompts of mixed lengths through three slots."""
    tokens, logits = run(make_batch(routing=routing, ffn=ffn), range(7))
    for number, length in enumerate(LENGTHS):
        sequence = prompt(number) + tokens[number]
        full = full_logits(CONFIG, params_of(CONFIG), sequence, length, routing)
        expected = full[length - 1 : length - 1 + NEW_TOKENS[number]]
        np.testing.assert_allclose(logits[number], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 0},
        {"top_k_experts": 2},
        {"document_mask": True, "bos_id": 7},
        {"routing": "expert_choice_segment"},
        {"routing": "dropless_top1"},
    ],
    ids=str,
)
def test_other_models_equal_the_forward_pass(fields):
    config = dataclasses.replace(CONFIG, **fields)
    tokens, logits = run(make_batch(config, routing="segment"), [2, 0, 3, 5])
    for number in logits:
        sequence, length = prompt(number) + tokens[number], LENGTHS[number]
        full = full_logits(config, params_of(config), sequence, length, "segment")
        expected = full[length - 1 : length - 1 + NEW_TOKENS[number]]
        np.testing.assert_allclose(logits[number], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_no_row_depends_on_its_neighbours_in_any_bit(routing, ffn):
    together, logits = run(make_batch(routing=routing, ffn=ffn), range(7))
    for number in (2, 6):
        alone, own_logits = run(make_batch(routing=routing, ffn=ffn), [number])
        assert alone[number] == together[number]
        np.testing.assert_array_equal(own_logits[number], logits[number])


@pytest.mark.parametrize("ffn", ["merged", "experts"])
def test_given_weights_replace_the_prompts_routing(ffn):
    """They decode the dense model that is merged by them."""
    config, params = CONFIG, params_of(CONFIG)
    given = np.random.default_rng(0).dirichlet([0.3] * 4, 2).astype(np.float32)
    tokens, logits = run(make_batch(ffn=ffn), [2, 0], given=given)
    dense = dataclasses.replace(config, num_experts=0)
    merged = merged_params(config, params, given, make_mesh(1, 1, 1, jax.devices()[:1]))
    for number in logits:
        sequence, length = prompt(number) + tokens[number], LENGTHS[number]
        full = full_logits(dense, merged, sequence, length, "prompt")
        expected = full[length - 1 : length - 1 + NEW_TOKENS[number]]
        np.testing.assert_allclose(logits[number], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("slots", [1, 4])
def test_rows_draw_as_their_own_settings_say(slots):
    batch = make_batch(slots=slots)
    drawn = {}
    for number in range(slots):
        settings = [GREEDY, Settings(seed=1), Settings(seed=2, top_k=1), Settings(seed=1)][number]
        drawn[batch.join(prompt(2), settings)] = number
    for _ in range(8):
        tokens = batch.draw()
        batch.advance()
        by_number = {drawn[slot]: token for slot, token in tokens.items()}
        if slots == 4:
            assert by_number[2] == by_number[0] and by_number[1] == by_number[3]
            drawn.setdefault("differ", False)
            drawn["differ"] |= by_number[1] != by_number[0]
    assert slots == 1 or drawn["differ"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots: got 0"),
        ({"cache_length": 49}, "cache_length: got 49, must be 2 to 48"),
        ({"ffn": "none"}, "ffn: got 'none', must be one of auto, merged, experts"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_batch(**options)
