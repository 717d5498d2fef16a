"""The model as the harness sees it, against logits computed row by row without any padding."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from lory_jax.api import Model
from lory_jax.conversion.hf_directory import write_llama_directory
from lory_jax.data.special_tokens import SpecialTokens
from lory_jax.errors import ConfigError, InputError
from lory_jax.evaluation.harness.model import LoryLM
from lory_jax.model.transformer import build
from lory_jax.parallel import make_mesh, shardings
from lory_jax.preparation.tokenizer_training import train_tokenizer
from tests.support.models import params_of, tiny_config
from tests.support.tiny import ROOT, verb_environment

L = 48
TEXT = "The quick brown fox reads: how many words, and which? Answer: yes or no.\n"
NEVER = "never to be generated"
CASES = [
    ("The quick", " brown fox"),
    ("The quick", " brown"),
    ("The quick", " brown\n"),
    ("how many words, and which?", " no"),
    ("how many words, and which?", " yes"),
    ("Answer: ", "yes"),  # the space goes to the continuation
    ("", "The quick brown"),  # an empty prompt
    ("  ", "brown"),
    ("which?", " The quick brown fox reads: how many words, and which? Answer: no."),
    ("", "T"),
    ("fox", ""),
]


@functools.cache
def make_model(experts: int = 4, **fields) -> Model:
    tokenizer = train_tokenizer([TEXT * 4], 300)
    config = tiny_config(
        vocab_size=tokenizer.vocab_size + 5,  # more than the tokenizer has
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        mlp_dim=24,
        num_experts=experts,
        sequence_length=L,
        segment_length=8,
        **fields,
    )
    return Model(config, params_of(config), tokenizer)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(arguments)
    ]


def log_probabilities(model, tokens, routing, prompt_length):
    logits = model.logits([tokens], routing, [prompt_length])[0].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_score(model, routing, context, continuation):
    """Sum of log-softmax over the continuation, and whether each token is the likeliest known."""
    spaces = len(context) - len(context.rstrip())
    context, continuation = context.rstrip(), context[len(context) - spaces :] + continuation
    encode, bos = model.tokenizer.encode, model.tokenizer.bos_id
    before = [bos, *encode(context)]
    after = [bos, *encode(context + continuation)][len(before) :]
    tokens = (before + after)[-(L + 1) :]
    first = len(tokens) - len(after)
    table = log_probabilities(model, tokens[:-1], routing, first if context else 0)
    total, greedy = 0.0, True
    for position in range(first, len(tokens)):
        row = table[position - 1]
        total += row[tokens[position]]
        greedy &= row[: model.tokenizer.vocab_size].argmax() == tokens[position]
    return total, bool(greedy)


SCORED = [({"experts": n}, r) for n in (4, 0) for r in ("prompt", "segment")]
SCORED += [({"routing": "expert_choice_segment"}, "segment"), ({"routing": "top2"}, "prompt")]


@pytest.mark.parametrize(("fields", "routing"), SCORED, ids=str)
def test_loglikelihood_is_the_sum_of_log_softmax(fields, routing):
    model = make_model(**fields)
    found = LoryLM(model, routing, 4).loglikelihood(instances("loglikelihood", CASES))
    for case, (log_likelihood, is_greedy) in zip(CASES, found, strict=True):
        expected = expected_score(model, routing, *case) if case[1] else (0.0, True)
        assert log_likelihood == pytest.approx(expected[0], abs=1e-5), case
        assert is_greedy == expected[1], case


def test_a_greedy_continuation_is_recognised():
    for context in ("The quick", "fox", "how many words", "which?", "reads"):
        model = make_model()
        ids = greedy_ids(model, context, 3, "prompt", L)
        continuation = model.tokenizer.decode(ids)
        encoded = model.tokenizer.encode(context + continuation)
        if encoded == [*model.tokenizer.encode(context), *ids]:
            requests = instances("loglikelihood", [(context, continuation)])
            assert LoryLM(model).loglikelihood(requests)[0][1]
            return
    pytest.fail("no context whose greedy continuation is a text that encodes to it")


@settings(deadline=None, max_examples=15)
@given(
    order=st.permutations(range(len(CASES))),
    count=st.integers(1, len(CASES)),
    batch_size=st.sampled_from([1, 3, 16]),
    routing=st.sampled_from(["prompt", "segment"]),
)
def test_neither_batch_nor_padding_changes_a_score(order, count, batch_size, routing):
    model = make_model()
    chosen = order[:count]
    found = LoryLM(model, routing, batch_size).loglikelihood(
        instances("loglikelihood", [CASES[i] for i in chosen])
    )
    for i, (log_likelihood, is_greedy) in zip(chosen, found, strict=True):
        alone = scores_alone(routing)[i]
        assert log_likelihood == pytest.approx(alone[0], abs=1e-5)
        assert is_greedy == alone[1]


@functools.cache
def scores_alone(routing):
    lm = LoryLM(make_model(), routing, 1)
    return [lm.loglikelihood(instances("loglikelihood", [case]))[0] for case in CASES]


def sharded_answers() -> dict:
    """Scores and a text from parameters that lie over all devices, as `load` leaves them."""
    model = make_model()
    mesh = make_mesh(data=1, fsdp=0, tensor=1)
    params = jax.device_put(model.params, shardings(build(model.config)[1], mesh))
    lm = LoryLM(Model(model.config, params, model.tokenizer), "segment", batch_size=3)
    request = ("The quick", {"max_gen_toks": 12})
    return {
        "devices": jax.device_count(),
        "rows": lm.batch_size,
        "scores": [score[0] for score in lm.loglikelihood(instances("loglikelihood", CASES))],
        "texts": lm.generate_until(instances("generate_until", [request])),
    }


def test_eight_devices_answer_like_one():
    code = (
        "import json; from tests.evaluation.test_harness_model import sharded_answers; "
        "print(json.dumps(sharded_answers()))"
    )
    environment = {
        **verb_environment(),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT)
    found = json.loads(printed.splitlines()[-1])
    assert (found["devices"], found["rows"]) == (8, 8)
    assert found["scores"] == pytest.approx([s[0] for s in scores_alone("segment")], abs=1e-4)
    assert found["texts"] == [greedy(make_model(), "The quick", 12, "segment", L)]


def test_routing_is_by_the_context():
    prompt, segment = (scores_alone(routing) for routing in ("prompt", "segment"))
    assert abs(prompt[8][0] - segment[8][0]) > 1e-3  # longer than a segment
    # An empty context routes with 1/E, not by BOS.
    model = make_model()
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("The quick brown")]
    table = log_probabilities(model, ids[:-1], "prompt", 1)
    by_bos = sum(table[i][token] for i, token in enumerate(ids[1:]))
    assert abs(prompt[6][0] - by_bos) > 1e-4


def test_a_long_context_loses_its_beginning(capsys):
    model, long = make_model(), TEXT * 5
    lm = LoryLM(model)
    (found,) = lm.loglikelihood(instances("loglikelihood", [(long, " no")]))
    assert found[0] == pytest.approx(expected_score(model, "prompt", long, " no")[0], abs=1e-5)
    assert "1 of 1 requests are longer than the 48 tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"continuation: got .* at most 48"):
        lm.loglikelihood(instances("loglikelihood", [("a", long)]))


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_rolling_predicts_every_token_once(routing):
    model = make_model()
    texts = ["", "fox", TEXT, TEXT * 5]
    found = LoryLM(model, routing).loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts])
    )
    for text, log_likelihood in zip(texts, found, strict=True):
        stream = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(stream):
            end = min(done + L, len(stream))
            first = 0 if done == 1 else end - 1 - L
            prompt_length = 0 if done == 1 else done - first
            table = log_probabilities(model, stream[first : end - 1], routing, prompt_length)
            for position in range(done, end):
                total += table[position - 1 - first][stream[position]]
            done = end
        assert log_likelihood == pytest.approx(total, abs=1e-4), text


# ---------------------------------------------------------------- generation


def greedy_ids(model, context, count, routing, room):
    """The likeliest tokens, each from a forward pass of its own."""
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(context)][-room:]
    length = len(ids)
    for _ in range(count):
        padded = [ids + [0] * (L - len(ids))]  # what follows is never read
        logits = model.logits(padded, routing, [length])[0, len(ids) - 1]
        logits = logits[: model.tokenizer.vocab_size]
        if logits.argmax() == model.tokenizer.eos_id:
            break
        ids.append(int(logits.argmax()))
    return ids[length:]


def greedy(model, *arguments):
    ids = greedy_ids(model, *arguments)
    return model.tokenizer.decode_bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_generation_is_greedy_and_stops(routing):
    model = make_model()
    contexts = ["The quick", "", TEXT, "how many words", TEXT * 5]
    requests = [(context, {"max_gen_toks": 12, "until": []}) for context in contexts]
    lm = LoryLM(model, routing, 2)
    whole = lm.generate_until(instances("generate_until", requests))
    assert whole == [greedy(model, context, 12, routing, L - 12) for context in contexts]
    # A character of one byte: bytes in the middle of another one read as U+FFFD for a while.
    stops = [next((c for c in text[1:] if c.isascii()), NEVER) for text in whole]
    assert stops.count(NEVER) < len(stops)
    requests = [
        (context, {"max_gen_toks": 12, "until": [stop, NEVER], "do_sample": False})
        for context, stop in zip(contexts, stops, strict=True)
    ]
    assert lm.generate_until(instances("generate_until", requests)) == [
        text.split(stop)[0] for text, stop in zip(whole, stops, strict=True)
    ]
    row = next(i for i, stop in enumerate(stops) if stop != NEVER)
    requests = [(contexts[row], {"until": stops[row]})]  # one stop, and the default length
    (found,) = lm.generate_until(instances("generate_until", requests))
    assert found == whole[row].split(stops[row])[0]


def test_generation_ends_with_the_document():
    model = make_model()
    (first,) = greedy_ids(model, "The quick", 1, "prompt", L)
    ends = Model(model.config, model.params, train_tokenizer([TEXT * 4], 300))
    ends.tokenizer.special = SpecialTokens(ends.tokenizer.bos_id, (first,))
    assert LoryLM(ends).generate_until(instances("generate_until", [("The quick", {})])) == [""]


def test_a_context_that_is_no_text_is_refused():
    requests = instances("generate_until", [("a\udcff", {})])
    with pytest.raises(InputError, match=r"prompt: got '\\udcff' at character 1"):
        LoryLM(make_model()).generate_until(requests)


def test_draws_depend_on_the_request_alone():
    drawn = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 50}
    requests = instances("generate_until", [(text, drawn) for text in ("The", TEXT, "The")])
    model = make_model()
    texts = LoryLM(model, batch_size=1).generate_until(requests)
    assert texts == LoryLM(model, batch_size=3).generate_until(requests)
    assert texts[0] != texts[2]
    # A temperature without do_sample draws nothing.
    kwargs = {"max_gen_toks": 8, "temperature": 2.0}
    (still,) = LoryLM(model).generate_until(instances("generate_until", [("The", kwargs)]))
    assert still == greedy(model, "The", 8, "prompt", L)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"beams": 3}, "generation_kwargs: got beams, .*until, max_gen_toks"),
        ({"max_gen_toks": L}, "max_gen_toks: got 48, .*1 to 47"),
        ({"do_sample": True, "top_p": 0}, "top_p: got 0"),
    ],
)
def test_bad_generation_settings_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        LoryLM(make_model()).generate_until(instances("generate_until", [("a", kwargs)]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoryLM(make_model(), "training"), "routing: got 'training', .*prompt or"),
        (lambda: LoryLM(make_model(), batch_size=0), "batch_size: got 0"),
        (lambda: LoryLM(make_model(), batch_size="auto"), "batch_size: got 'auto'"),
        (lambda: LoryLM.create_from_arg_obj({"path": "x"}), "model_args: got path"),
        (lambda: LoryLM.create_from_arg_obj({}), "model_args: .*workdir="),
        (lambda: LoryLM.create_from_arg_obj({"workdir": "none"}), "config.json: no such file"),
    ],
)
def test_bad_model_settings_are_refused(make, message):
    with pytest.raises((InputError, ConfigError), match=message):
        make()


# ---------------------------------------------------------------- the same in transformers


def test_an_exported_model_scores_the_same_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM

    model = make_model(0)
    write_llama_directory(tmp_path / "llama", model.config, model.params, model.tokenizer, "a card")
    settings = {"pretrained": str(tmp_path / "llama"), "device": "cpu", "dtype": "float32"}
    theirs = HFLM(**settings, batch_size=2)
    cases = [case for case in CASES if case[0].strip() and case[1]] + [(TEXT * 5, " no")]
    requests = instances("loglikelihood", cases)
    for ours, other in zip(
        LoryLM(model).loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert ours[0] == pytest.approx(other[0], abs=1e-3)
        assert ours[1] == other[1]
    # Theirs puts a BOS of its own before the one of the tokenizer.
    theirs = HFLM(**settings, add_bos_token=False)
    texts = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 5,)])
    np.testing.assert_allclose(
        LoryLM(model).loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), atol=1e-3
    )
