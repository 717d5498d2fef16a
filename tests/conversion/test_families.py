"""Families beside plain LLaMA: the logits of transformers, there and back, upcycled and trained."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import torch
import transformers

import lory_jax
from lory_jax.conversion import runs
from lory_jax.conversion.hf_directory import read_llama_directory, write_llama_directory
from lory_jax.errors import InputError
from lory_jax.generation.loop import decode
from lory_jax.parallel import make_mesh
from tests.conversion.test_hf_directory import TOKENIZER, VOCAB, edit_config, their_logits
from tests.support.models import forward, random_tokens
from tests.support.tiny import SEQUENCE_LENGTH, verb, write_prepared, write_recipe

LENGTH = SEQUENCE_LENGTH

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}
FAMILIES = {
    "attention_bias": ("Llama", {"attention_bias": True}),
    "mlp_bias": ("Llama", {"mlp_bias": True}),
    "every bias": ("Llama", {"mlp_bias": True, "attention_bias": True, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2, tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "wide heads": ("Llama", {"head_dim": 8, "num_key_value_heads": 2}),
    "narrow heads, bias": ("Llama", {"head_dim": 2, "attention_bias": True}),
    "nemo": ("Mistral", {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral, wide window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": LENGTH}),
    "yarn": ("Llama", {"head_dim": 8, "rope_parameters": YARN}),
    "yarn, attention factor": (
        "Llama",
        {"head_dim": 8, "rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}},
    ),
    "yarn, mscale": (
        "Llama",
        {"head_dim": 8, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    ),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 0, 1, jax.devices()[:1])


def save(directory, name, fields):
    """A model of a family as transformers makes and saves it, of random weights and biases."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.5,
        "bos_token_id": TOKENIZER.bos_id,
        "eos_token_id": TOKENIZER.eos_id,
    }
    config = getattr(transformers, f"{name}Config")(**sizes | fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    TOKENIZER.save(directory / "tokenizer.json")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_theirs_and_tensors_come_back_bit_equal(family, mesh, tmp_path):
    model = save(tmp_path / "hf", *FAMILIES[family])
    found = read_llama_directory(tmp_path / "hf")
    params = found.params(mesh)
    tokens = random_tokens(2, LENGTH)
    expected = their_logits(tmp_path / "hf", tokens)
    ours = forward(found.model_config)(params, tokens)[0]
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    write_llama_directory(tmp_path / "back", found.model_config, params, TOKENIZER, "a card")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_allclose(their_logits(tmp_path / "back", tokens), expected, atol=1e-5)
    again = read_llama_directory(tmp_path / "back")
    assert dataclasses.asdict(again.model_config) == dataclasses.asdict(found.model_config)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("families") / "data")


MORE = ["attention_bias", "mlp_bias", "qwen2", "yarn"]


@pytest.mark.parametrize(
    "family", ["nemo", *(pytest.param(f, marks=pytest.mark.slow) for f in MORE)]
)
def test_upcycled_and_trained(family, data, tmp_path):
    """Four copies compute what the model did, train, and are exported as the family again."""
    save(tmp_path / "hf", *FAMILIES[family])
    (tmp_path / "hf" / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    runs.import_llama(tmp_path / "hf", tmp_path / "start", experts=4)
    start = lory_jax.load(tmp_path / "start")
    tokens = random_tokens(2, LENGTH)
    found = start.logits(tokens, "prompt", [5, 9])
    np.testing.assert_allclose(found, their_logits(tmp_path / "hf", tokens), atol=1e-4)
    fields = json.loads((tmp_path / "start" / "config.json").read_text())["model"]
    result = verb(
        "train",
        f"--config={write_recipe(tmp_path)}:experts=4",
        *(f"--config.model.{name}={value}" for name, value in fields.items()),
        f"--init_from={tmp_path / 'start'}",
        f"--data={data}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=20",
    )
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines if "grad_norm" in line]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    trained = lory_jax.load(tmp_path / "run")
    text = "counting by"
    runs.export_run(trained_run(tmp_path), tmp_path / "out", prompt=text)
    prompt = trained.encode(text)
    row = np.array([[*prompt, *tokens[0, : LENGTH - len(prompt)]]])
    expected = trained.logits(row, "prompt", [len(prompt)])
    np.testing.assert_allclose(their_logits(tmp_path / "out", row), expected, atol=1e-4)
    for part in ("attention", "ffn"):
        moved = trained.params["layers"][part]
        for name in [name for name in moved if name.endswith("bias")]:
            assert np.any(moved[name] != start.params["layers"][part][name])
    assert_decodes_its_logits(trained, [text, "by steps, in words"])


def assert_decodes_its_logits(model, prompts):
    """Token by token, each row decodes what the whole sequence gives."""
    ids = [model.encode(text) for text in prompts]
    lengths = np.array([len(row) for row in ids])
    steps = LENGTH - int(max(lengths))
    for routing, ffn in itertools.product(("prompt", "segment"), ("merged", "experts")):
        seen = []

        def choose(logits, positions, seen=seen):
            seen.append(np.asarray(logits))
            return logits.argmax(axis=-1)

        drawn = decode(
            model.config, model.params, ids, choose, max_new_tokens=steps, routing=routing, ffn=ffn
        )
        tokens = np.stack(list(drawn), axis=1)
        rows = np.zeros((len(ids), LENGTH), np.int32)
        for row, prompt, new in zip(rows, ids, tokens, strict=True):
            row[: len(prompt) + steps] = [*prompt, *new]
        whole = model.logits(rows, routing, lengths)
        for i, length in enumerate(lengths):
            for step, logits in enumerate(seen):
                np.testing.assert_allclose(logits[i], whole[i, length - 1 + step], atol=1e-4)


def trained_run(tmp_path):
    from lory_jax.run.directory import RunDirectory

    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "fields", "change", "message"),
    [
        ("Mistral", {}, {"sliding_window": LENGTH - 1}, "sliding_window: got 23"),
        ("Mistral", {}, {"max_position_embeddings": 8192}, "sliding_window: got 4096"),
        ("Qwen2", {}, {"use_sliding_window": True, "sliding_window": 8}, "sliding_window: got 8"),
        ("Llama", {"attention_bias": True}, {"attention_bias": False}, "bias is not one of"),
        ("Llama", {}, {"attention_bias": True}, "bias is missing"),
        ("Llama", {}, {"attention_bias": "yes"}, "attention_bias: got 'yes'"),
        ("Llama", {"mlp_bias": True}, {"mlp_bias": False}, "bias is not one of"),
        ("Llama", {}, {"mlp_bias": True}, "bias is missing"),
        ("Llama", {}, {"mlp_bias": 1}, "mlp_bias: got 1"),
        ("Mistral", {}, {"sliding_window": None, "mlp_bias": True}, "mlp_bias: got True"),
        ("Llama", {}, {"model_type": "gemma"}, "model_type 'gemma'"),
        ("Llama", {}, {"head_dim": 3}, "head_dim: got 3; must be even"),
        ("Llama", {}, {"rope_theta": 1e999}, "rope_theta"),
        ("Llama", {}, {"num_hidden_layers": 2**70}, "num_hidden_layers"),
    ],
)
def test_what_the_model_cannot_compute_is_refused_by_name(name, fields, change, message, tmp_path):
    if name != "Llama":
        fields = fields | {"num_key_value_heads": 2}
    save(tmp_path / "hf", name, fields)
    edit_config(tmp_path / "hf", **change)
    if "rope_theta" in change:
        edit_config(tmp_path / "hf", rope_parameters=None)
    with pytest.raises(InputError, match=message):
        read_llama_directory(tmp_path / "hf")
