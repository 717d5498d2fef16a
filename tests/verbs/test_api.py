import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import lory_jax
from lory_jax.api import Model
from lory_jax.data.special_tokens import SpecialTokens
from lory_jax.errors import InputError
from lory_jax.model.transformer import init_params
from lory_jax.parallel import make_mesh
from lory_jax.preparation.tokenizer_training import train_tokenizer
from lory_jax.training.step import make_loss_step
from tests.support.models import tiny_config

TEXT = "def read(self, size):\n    return self.buffer[:size]  # naïve € "


def make_model(num_experts=4, **changes):
    tokenizer = train_tokenizer([TEXT] * 4, 300)
    sizes = {
        "vocab_size": 300,
        "num_layers": 2,
        "embed_dim": 16,
        "num_heads": 2,
        "mlp_dim": 24,
        "num_experts": num_experts,
        "sequence_length": 64,
        "segment_length": 8,
        "router_init_scale": 4.0,
    }
    config = tiny_config(**(sizes | changes))
    return Model(config, init_params(config, jax.random.key(0)), tokenizer)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 300, (3, 21))


def nll(logits, targets):
    logits = logits.astype(np.float64)
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(normalised, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("num_experts", [4, 0])
def test_training_logits_are_what_the_loss_sees(num_experts, tokens):
    model = make_model(num_experts)
    logits = model.logits(tokens[:, :-1])
    assert logits.dtype == np.float32 and logits.shape == (3, 20, 300)
    loss_step = make_loss_step(model.config, make_mesh(1, 0, 1))
    expected = loss_step(model.params, tokens)
    np.testing.assert_allclose(nll(logits, tokens[:, 1:]), expected, atol=1e-5)


def test_routing_weights_are_distributions_per_layer_and_segment(model, tokens):
    weights = model.routing_weights(tokens)
    assert weights.shape == (2, 3, 3, 4)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_prompt_and_segment_logits(model, tokens):
    training = model.logits(tokens)
    # A whole first segment as the prompt is what training does.
    segment = model.logits(tokens, "segment", [8, 8, 8])
    np.testing.assert_allclose(segment, training, atol=1e-5)
    assert np.abs(model.logits(tokens, "segment", [3, 3, 3]) - training).max() > 1e-3
    prompt = model.logits(tokens, "prompt", [3, 8, 0])
    np.testing.assert_allclose(prompt[1, :8], training[1, :8], atol=1e-5)
    # Tokens after the prompt do not route.
    changed = tokens.copy()
    changed[0, 3:] = 5
    np.testing.assert_allclose(
        model.logits(changed, "prompt", [3, 8, 0])[0, :3], prompt[0, :3], atol=1e-6
    )


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_the_prompt_is_the_whole_row_unless_lengths_are_given(model, tokens, routing):
    whole = model.logits(tokens, routing, [tokens.shape[1]] * len(tokens))
    np.testing.assert_array_equal(model.logits(tokens, routing), whole)
    assert np.abs(whole - model.logits(tokens, routing, [3] * len(tokens))).max() > 1e-3


def test_a_dense_model_has_no_routing(tokens):
    dense = make_model(0)
    np.testing.assert_array_equal(dense.logits(tokens, "prompt", [1, 2, 3]), dense.logits(tokens))
    with pytest.raises(InputError, match="dense model has none"):
        dense.routing_weights(tokens)


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_greedy_generation_follows_the_logits(model, routing):
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("def read")]
    length = len(ids)
    for _ in range(12):
        # Padded to one shape: what follows is never read.
        padded = [ids + [0] * (32 - len(ids))]
        logits = model.logits(padded, routing, [length])[0, len(ids) - 1]
        ids.append(int(logits[: model.tokenizer.vocab_size].argmax()))
    if model.tokenizer.eos_id in ids:
        ids = ids[: ids.index(model.tokenizer.eos_id)]
    expected = model.tokenizer.decode_bytes(ids[length:]).decode("utf-8", "replace")
    found = model.generate("def read", max_new_tokens=12, temperature=0.0, routing=routing)
    assert found == [expected]


def test_generation_depends_on_prompt_and_seed_alone(model):
    prompts = ["def", "return self.buffer and more", "", "def"]
    together = model.generate(prompts, max_new_tokens=10)
    assert together == model.generate(prompts, max_new_tokens=10)
    assert [together[1]] == model.generate([prompts[1]], max_new_tokens=10)
    assert [together[0]] == model.generate("def", max_new_tokens=10)
    assert together[0] != together[3]
    assert together != model.generate(prompts, max_new_tokens=10, seed=1)


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    model = make_model(vocab_size=2000)
    assert model.tokenizer.vocab_size <= 300
    texts = model.generate(["def"] * 4, max_new_tokens=30, temperature=5.0, top_p=1.0)
    assert len(set(texts)) > 1


def test_the_default_length_shrinks_to_what_the_model_reads(model):
    """The model reads 64 positions: fewer than the default of 128 new tokens."""
    prompts = ["def", "return self.buffer[:size]", "def"]
    room = [64 - len(model.encode(prompt)) for prompt in prompts]
    together = model.generate(prompts)
    # A row's length is its own, whatever the prompts beside it.
    alone = [model.generate([prompts[0]] * 2), model.generate(prompts[1])]
    assert together == [alone[0][0], *alone[1], alone[0][1]]
    for prompt, count, text in zip(prompts[:2], room, together, strict=False):
        assert model.generate(prompt, max_new_tokens=count) == [text]
        assert "".join(model.stream(prompt)) == text
        with pytest.raises(InputError, match="max_new_tokens: got"):
            model.generate(prompt, max_new_tokens=count + 1)


def test_streaming_gives_the_same_text(model):
    whole = model.generate("naïve", max_new_tokens=20)[0]
    pieces = list(model.stream("naïve", max_new_tokens=20))
    assert "".join(pieces) == whole and len(pieces) > 1


def test_a_stream_stops_where_the_whole_text_does(model):
    whole = model.generate("def", max_new_tokens=20)[0]
    for stop in ([whole[4:6]], [whole[3:9], whole[7:8]], [whole[-1]], ["not there"]):
        expected = model.generate("def", max_new_tokens=20, stop=stop)[0]
        assert "".join(model.stream("def", max_new_tokens=20, stop=stop)) == expected


def test_a_merged_model_is_dense_and_continues_its_own_prompt_alike(model, tokens):
    dense = model.merged("def read")
    assert dense.config.num_experts == 0 and "router" not in dense.params["layers"]["ffn"]
    ids = model.encode("def read")
    expected = model.logits([ids], "prompt", [len(ids)])
    np.testing.assert_allclose(dense.logits([ids]), expected, atol=1e-5)
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    assert dense.generate("def read", **settings) == model.generate("def read", **settings)
    with pytest.raises(InputError, match="nothing to merge"):
        dense.merged("a")


@pytest.mark.parametrize("prompt", ["", "d", "\x00\x7f\u200b\U0010ffff", "aaaa " * 5])
def test_odd_prompts_are_continued(model, prompt):
    (text,) = model.generate(prompt, max_new_tokens=4)
    assert isinstance(text, str) and text == "".join(model.stream(prompt, max_new_tokens=4))


def test_generation_stops_at_a_stop_text_and_at_the_end_of_the_document(model, monkeypatch):
    whole = model.generate("def", max_new_tokens=20)[0]
    stop = whole[4:6]
    assert model.generate("def", max_new_tokens=20, stop=[stop]) == [whole[: whole.index(stop)]]

    class EndsAtOnce(Model):
        def __init__(self, model):
            super().__init__(model.config, model.params, model.tokenizer)
            first = model.generate("def", max_new_tokens=1, temperature=0.0)[0]
            trained = train_tokenizer([TEXT] * 4, 300)
            ends = SpecialTokens(trained.bos_id, (trained.encode(first)[0],))
            monkeypatch.setattr(trained, "special", ends)
            self.tokenizer = trained

    assert EndsAtOnce(model).generate("def", max_new_tokens=5, temperature=0.0) == [""]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.logits([1, 2]), r"tokens: got int64 of shape \[2\]"),
        (lambda m: m.logits([[1, 2], [3]]), "tokens: .*different lengths"),
        (lambda m: m.logits([[0.5]]), "tokens: got float64"),
        (lambda m: m.logits([[]]), "at least one"),
        (lambda m: m.logits([[1, 300]]), "tokens: got ids from 1 to 300, .* 0 to 299"),
        (lambda m: m.logits([[1]], "token"), "routing: got 'token', .*training, prompt"),
        (
            lambda m: m.logits([[1]], "prompt", [2]),
            "prompt_lengths_B: got .*1 integers from 0 to 1",
        ),
        (lambda m: m.logits([[1]], prompt_lengths_B=[1]), "prompt_lengths_B: "),
        (lambda m: m.generate([]), "prompts: .*at least one"),
        (
            lambda m: m.generate("a", max_new_tokens=1000),
            "max_new_tokens: got 1000 after a prompt of 2 tokens",
        ),
        (lambda m: m.generate("a", temperature=-1), "temperature: got -1"),
        (lambda m: m.generate("a", top_p=0), "top_p: got 0"),
        (lambda m: m.generate("a", routing="training"), "routing: got .*prompt or segment"),
        (lambda m: m.generate("a", stop=[""]), "stop: got"),
        (lambda m: next(m.stream("a", stop="b")), "stop: got 'b'"),
        (lambda m: m.generate("a" * 10_000), "prompt: got .* tokens .* at most 63"),
        (lambda m: m.generate("a\udcff"), r"prompt: got '\\udcff' at character 1"),
        (lambda m: m.with_top_k_experts(5), "top_k_experts: got 5, .*1 to 4"),
    ],
)
def test_bad_arguments_are_refused_with_a_way_out(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_import_is_light():
    code = "import sys, json, lory_jax; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert not {"jax", "flax", "numpy", "tokenizers"} & set(modules)


def test_loading_from_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        lory_jax.load(tmp_path)
