"""Hugging Face directories against transformers itself: the same logits, the same tokens."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lory_jax.config import fields_where, load_config
from lory_jax.conversion.hf_directory import read_llama_directory, write_llama_directory
from lory_jax.conversion.llama import llama_tensors
from lory_jax.errors import InputError
from lory_jax.generation.merge import domain_routing, merged_params, text_routing
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from lory_jax.preparation.tokenizer_training import train_tokenizer
from tests.support.models import assert_close, forward, params_of, random_tokens, tiny_config
from tests.support.tiny import ROOT

TEXT = "def read(self, size):\n    return self.buffer[:size]  # naïve € "
TOKENIZER = train_tokenizer([TEXT] * 4, 300)
VOCAB = 300
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 0, 1, jax.devices()[:1])


def recipe_config(name: str, experts: int) -> ModelConfig:
    """A recipe's depth, heads, experts and FFN ratio; four dimensions per head."""
    fields = load_config(f"{ROOT / 'configs' / name}:experts={experts}").model.to_dict()
    width = 4 * fields["num_heads"]
    fields |= {
        "embed_dim": width,
        "mlp_dim": round(width * fields["mlp_dim"] / fields["embed_dim"]),
        "vocab_size": VOCAB,
        "sequence_length": 64,
        "segment_length": 16,
        "compute_dtype": "float32",
        "remat": "none",
    }
    return ModelConfig.for_platform(fields, "cpu")


def their_logits(directory: Path, tokens_BxL: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    with torch.no_grad():
        return model(torch.tensor(tokens_BxL, dtype=torch.int64)).logits.numpy()


def our_logits(config, params, tokens_BxL, prompt_length=None):
    if prompt_length is None or not config.num_experts:
        return forward(config)(params, tokens_BxL)[0]
    lengths_B = np.full(len(tokens_BxL), prompt_length, np.int32)
    return forward(config, "prompt")(params, tokens_BxL, lengths_B)[0]


def export(out: Path, config, params, prompt, mesh, **settings) -> None:
    if config.num_experts:
        weights_YxE = text_routing(config, params, prompt)
        params = merged_params(config, params, weights_YxE, mesh)
        config = dataclasses.replace(config, num_experts=0)
    write_llama_directory(out, config, params, TOKENIZER, "a card", **settings)


def assert_same_params(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---------------------------------------------------------------- to Hugging Face


# What a LLaMA may have that no recipe has.
VARIANTS = {
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "one head of keys": {"num_heads": 4, "num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "grouped, tied, llama3": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "tie_embeddings": True,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_length": 16,
    },
    "linear": {"rope_scaling": "linear", "rope_factor": 2.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("experts", [4, 0])
def test_exported_logits_are_ours_for_every_variant(variant, experts, mesh, tmp_path):
    config = tiny_config(
        vocab_size=VOCAB, num_experts=experts, sequence_length=64, **VARIANTS[variant]
    )
    check_export(config, mesh, tmp_path)


@pytest.mark.parametrize("experts", [8, 0])
@pytest.mark.parametrize("recipe", RECIPES)
def test_exported_logits_are_ours_for_every_recipe(recipe, experts, mesh, tmp_path):
    check_export(recipe_config(recipe, experts), mesh, tmp_path)


def check_export(config, mesh, tmp_path):
    params = params_of(config)
    tokens = random_tokens(2, 40)
    tokens[:, :20] = tokens[0, :20]  # the prompt that routes
    export(tmp_path / "hf", config, params, tokens[0, :20].tolist(), mesh)
    expected = our_logits(config, params, tokens, 20)
    np.testing.assert_allclose(their_logits(tmp_path / "hf", tokens), expected, atol=TOLERANCE)


def test_a_directory_is_the_standard_one_and_the_same_every_time(mesh, tmp_path):
    config = tiny_config(vocab_size=VOCAB, num_experts=0)
    params = params_of(config)
    for name in ("one", "two"):
        export(tmp_path / name, config, params, None, mesh, max_shard_bytes=20_000)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    shards = sorted(name for name in one if name.endswith(".safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(one) - set(shards) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    index = json.loads(one["model.safetensors.index.json"])
    sizes = {}
    for shard in shards:
        arrays = load_file(tmp_path / "one" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(arrays)
        sizes[shard] = sum(array.nbytes for array in arrays.values())
        assert sizes[shard] <= 20_000 or len(arrays) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "one").iterdir()}
    assert len(modes) == 1


def test_bfloat16_tensors_are_the_nearest_ones(mesh, tmp_path):
    config = tiny_config(vocab_size=VOCAB, num_experts=0)
    params = params_of(config)
    export(tmp_path / "hf", config, params, None, mesh, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    stored = model.model.embed_tokens.weight.float().detach().numpy()
    expected = torch.tensor(params["embedding"]).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(stored, expected)


def test_the_tokenizer_is_ours_with_bos(mesh, tmp_path):
    config = tiny_config(vocab_size=VOCAB, num_experts=0)
    export(tmp_path / "hf", config, params_of(config), None, mesh)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    for text in (TEXT, " a", "a  b\n\n\tc", "日本 \U0001f600", ""):
        ids = theirs(text).input_ids
        assert ids == [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_nothing_is_left_of_an_export_that_fails(mesh, tmp_path, monkeypatch):
    config = tiny_config(vocab_size=VOCAB, num_experts=0)

    def save_other_values(arrays, path, metadata):
        save_file({name: -array for name, array in arrays.items()}, path, metadata)

    monkeypatch.setattr("lory_jax.conversion.safetensors_files.save_file", save_other_values)
    with pytest.raises(InputError, match="reads back differently"):
        export(tmp_path / "hf", config, params_of(config), None, mesh)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_written_over(mesh, tmp_path):
    config = tiny_config(vocab_size=VOCAB, num_experts=0)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    with pytest.raises(InputError, match="already exists"):
        export(tmp_path / "hf", config, params_of(config), None, mesh)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]


# ---------------------------------------------------------------- the merge


def test_a_long_text_is_routed_piece_by_piece():
    config = tiny_config()  # 14 tokens at a time
    params = params_of(config)
    tokens = random_tokens(1, 33)[0].tolist()
    pieces = [tokens[:14], tokens[14:28], tokens[28:]]
    expected = 0.0
    for piece in pieces:
        run = forward(config, "prompt")
        weights = run(params, np.array([piece]), np.array([len(piece)]))[1]
        expected += np.asarray(weights)[:, 0, 0] * len(piece) / 33
    assert_close(text_routing(config, params, tokens), expected, 1e-5)


def test_a_domain_is_routed_by_its_mean_segment():
    config = tiny_config()
    params = params_of(config)
    tokens = random_tokens(11, 14)  # more than a batch
    weights = forward(config)(params, tokens)[1]  # [Y, B, N, E]
    expected = np.asarray(weights)[:, :, 1:].mean(axis=(1, 2))
    assert_close(domain_routing(config, params, tokens), expected, 1e-5)
    with pytest.raises(InputError, match=r"^domain: .*one segment"):
        domain_routing(config, params, tokens[:, :4])


# ---------------------------------------------------------------- from Hugging Face


def llama(directory: Path, max_shard_size: str = "20KB", **fields) -> transformers.LlamaForCausalLM:
    """A LLaMA as transformers makes and saves it, of random weights, with our tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "bos_token_id": TOKENIZER.bos_id,
        "eos_token_id": TOKENIZER.eos_id,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | fields))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    TOKENIZER.save(directory / "tokenizer.json")
    return model


# The waves of a head of width 4 at theta 100 are 6 and 63 positions long: one is kept, one blended.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_theta": 100.0}},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ],
    ids=["plain", "epsilon", "theta", "grouped and tied", "llama3", "linear"],
)
def test_imported_logits_are_theirs(fields, max_shard_size, mesh, tmp_path):
    llama(tmp_path / "hf", max_shard_size, **fields)
    directory = read_llama_directory(tmp_path / "hf")
    tokens = random_tokens(2, 40)
    found = our_logits(directory.model_config, directory.params(mesh), tokens)
    np.testing.assert_allclose(found, their_logits(tmp_path / "hf", tokens), atol=TOLERANCE)


def test_old_directories_are_read_alike(mesh, tmp_path):
    """Before transformers 5: no rope_parameters, no head_dim, rotary frequencies among tensors."""
    llama(tmp_path / "hf", "1GB", rope_parameters={"rope_theta": 500.0})
    expected = read_llama_directory(tmp_path / "hf")
    edit_config(tmp_path / "hf", rope_parameters=None, rope_theta=500.0, head_dim=None)
    edit_tensors(
        tmp_path / "hf",
        lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
    )
    found = read_llama_directory(tmp_path / "hf")
    assert found.fields == expected.fields
    assert_same_params(found.params(mesh), expected.params(mesh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype, mesh, tmp_path):
    model = llama(tmp_path / "hf").to(dtype)
    model.save_pretrained(tmp_path / "hf")
    directory = read_llama_directory(tmp_path / "hf")
    assert directory.model_config.compute_dtype == "bfloat16"
    expected = model.lm_head.weight.detach().float().numpy().T
    np.testing.assert_array_equal(directory.params(mesh)["head"], expected)


@pytest.mark.parametrize("variant", [None, "grouped", "grouped, tied, llama3", "linear"])
def test_there_and_back_is_bit_equal(variant, mesh, tmp_path):
    config = tiny_config(vocab_size=VOCAB, num_experts=0, **VARIANTS.get(variant, {}))
    params = params_of(config)
    export(tmp_path / "hf", config, params, None, mesh, max_shard_bytes=20_000)
    directory = read_llama_directory(tmp_path / "hf")
    expected = dataclasses.asdict(config) | {"segment_length": 7}
    assert directory.fields == {name: expected[name] for name in directory.fields}
    left_out = {*fields_where("model", is_architecture=True)} - directory.fields.keys()
    # A LLaMA says nothing of what it does not have.
    beyond = {"shared_expert", "token_deltas"}
    assert all(name.startswith("rope_") for name in left_out - beyond)
    assert not any(getattr(directory.model_config, name) for name in beyond)
    assert directory.tokenizer.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert_same_params(directory.params(mesh), params)


@pytest.mark.parametrize(
    "fields", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}], ids=str
)
def test_a_llama_comes_back_from_us_bit_equal(fields, mesh, tmp_path):
    model = llama(tmp_path / "hf", **fields)
    directory = read_llama_directory(tmp_path / "hf")
    export(tmp_path / "back", directory.model_config, directory.params(mesh), None, mesh)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ours, theirs = back.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_tied_head_that_is_stored_as_well_is_read(mesh, tmp_path):
    llama(tmp_path / "hf", "1GB", tie_word_embeddings=True)
    expected = read_llama_directory(tmp_path / "hf").params(mesh)
    edit_tensors(tmp_path / "hf", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    assert_same_params(read_llama_directory(tmp_path / "hf").params(mesh), expected)


def test_the_table_names_every_tensor_of_transformers(tmp_path):
    model = llama(tmp_path / "hf")
    config = read_llama_directory(tmp_path / "hf").model_config
    expected = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    assert {tensor.name: tensor.stored_shape for tensor in llama_tensors(config)} == expected


# ---------------------------------------------------------------- what is refused


def edit_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    contents = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in contents.items() if v is not None}))


def edit_tensors(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_index(directory: Path, change) -> None:
    """Makes the single file a shard behind an index, which `change` gets."""
    path = directory / "model.safetensors"
    names = list(load_file(path))
    path.rename(directory / "shard.safetensors")
    index = {"weight_map": change(dict.fromkeys(names, "shard.safetensors"))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


DOWN = "model.layers.1.mlp.down_proj.weight"


def without(name):
    return lambda tensors: {key: w for key, w in tensors.items() if key != name}


REFUSED = {
    "missing tensor": (lambda d: edit_tensors(d, without(DOWN)), f"{DOWN} is missing"),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: {**t, DOWN: t[DOWN][:, :-1].copy()}),
        rf"{DOWN}: got shape \[16, 23\].*\[16, 24\]",
    ),
    "wrong type": (
        lambda d: edit_tensors(d, lambda t: {**t, DOWN: t[DOWN].astype(np.int8)}),
        f"{DOWN}: stored as I8",
    ),
    "unknown tensor": (
        lambda d: edit_tensors(d, lambda t: {**t, "extra.bias": np.ones(2, np.float32)}),
        "extra.bias",
    ),
    "truncated": (truncate, "model.safetensors: damaged"),
    "missing in shard": (
        lambda d: edit_index(d, lambda m: {**m, "more": "shard.safetensors"}),
        "tensor more is missing",
    ),
    "missing shard": (
        lambda d: edit_index(d, lambda m: {**m, DOWN: "lost.safetensors"}),
        "lost.safetensors: missing",
    ),
    "shard elsewhere": (
        lambda d: edit_index(d, lambda m: {**m, DOWN: "../hf/shard.safetensors"}),
        r"names .*\.\./hf/shard\.safetensors",
    ),
    "empty index": (lambda d: edit_index(d, lambda m: {}), "has no weight_map"),
    "pickles": (only_pickles, "pytorch_model.bin, a pickle"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds neither"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    "no object": (lambda d: (d / "config.json").write_text("[]"), "config.json: .*JSON object"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: cannot read"),
    "architecture": (lambda d: edit_config(d, model_type="gpt2"), "model_type 'gpt2'"),
    "task": (
        lambda d: edit_config(d, architectures=["LlamaForSequenceClassification"]),
        "architectures.*LlamaForSequenceClassification",
    ),
    "rope scaling": (
        lambda d: edit_config(d, rope_scaling={"type": "longrope", "factor": 2.0}),
        "rope_scaling: got rope_type 'longrope'",
    ),
    "rope parameters": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "su", "factor": 2.0}),
        "rope_parameters: got rope_type 'su'",
    ),
    "partial rotation": (
        lambda d: edit_config(d, rope_parameters={"partial_rotary_factor": 0.5}),
        "partial_rotary_factor: got 0.5",
    ),
    "missing biases of the FFN": (
        lambda d: edit_config(d, mlp_bias=True),
        "mlp.gate_proj.bias is missing",
    ),
    "missing biases": (lambda d: edit_config(d, attention_bias=True), "bias is missing"),
    "activation": (lambda d: edit_config(d, hidden_act="gelu"), "hidden_act: got 'gelu'"),
    "quantized": (lambda d: edit_config(d, quantization_config={}), "quantization_config"),
    "rope factor": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "linear"}),
        "rope_parameters: factor: got None",
    ),
    "groups": (
        lambda d: edit_config(d, num_key_value_heads=3),
        r"num_key_value_heads: got 3.*num_attention_heads \(4\)",
    ),
    "fewer groups": (
        lambda d: edit_config(d, num_key_value_heads=2),
        r"k_proj.weight: got shape \[16, 16\].*\[8, 16\]",
    ),
    "tied to another head": (
        lambda d: edit_config(d, tie_word_embeddings=True),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "head width": (lambda d: edit_config(d, head_dim=8), r"q_proj.weight: got shape \[16, 16\]"),
    "odd head width": (lambda d: edit_config(d, head_dim=5), "head_dim: got 5"),
    "no size": (lambda d: edit_config(d, hidden_size=None), "hidden_size: got None"),
    "bad size": (lambda d: edit_config(d, vocab_size="many"), "vocab_size: got 'many'"),
    "small vocabulary": (lambda d: edit_config(d, vocab_size=2), "embed_tokens.*got shape"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_malformed_directories_are_refused_by_name(fault, tmp_path):
    damage, message = REFUSED[fault]
    llama(tmp_path / "hf", "1GB")
    damage(tmp_path / "hf")
    with pytest.raises(InputError, match=message):
        read_llama_directory(tmp_path / "hf")


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        read_llama_directory(tmp_path / "nowhere")
