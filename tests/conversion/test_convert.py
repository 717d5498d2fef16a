"""The verb convert: a trained run to a LLaMA directory, and a LLaMA to the start of a run."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import lory_jax
from lory_jax import convert
from lory_jax.conversion import runs
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError, InputError
from lory_jax.evaluation.measure import evaluate_run
from lory_jax.run.directory import RunDirectory
from tests.conversion.test_hf_directory import llama, their_logits
from tests.support.in_process import write_run
from tests.support.tiny import (
    ROOT,
    SEQUENCE_LENGTH,
    assert_one_line_error,
    verb,
    verb_environment,
    write_prepared,
    write_recipe,
)
from tests.support.variants import VARIANTS

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("convert") / "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return write_run(tmp_path_factory.mktemp("run") / "lory", data)


def prompt_tokens(model, text):
    return [model.tokenizer.bos_id, *model.tokenizer.encode(text)]


@pytest.mark.parametrize("flag", ["--prompt", "--text"])
def test_a_lory_merged_by_a_text_is_the_llama_that_decodes_it(run, flag, tmp_path):
    text = "counting by steps"
    given = text
    if flag == "--text":
        given = str(tmp_path / "text.txt")
        (tmp_path / "text.txt").write_text(text)
    convert.main(["to-hf", f"--workdir={run}", f"--out={tmp_path / 'hf'}", f"{flag}={given}"])
    model = lory_jax.load(run)
    prompt = prompt_tokens(model, text)
    assert len(prompt) < SEQUENCE_LENGTH
    rest = np.random.default_rng(0).integers(0, 256, SEQUENCE_LENGTH - len(prompt))
    tokens = np.array([[*prompt, *rest]])
    expected = model.logits(tokens, "prompt", [len(prompt)])
    np.testing.assert_allclose(their_logits(tmp_path / "hf", tokens), expected, atol=TOLERANCE)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"    {text}\n" in card and "step 7" in card
    assert len(re.findall(r"^\| [01] \|( 0\.\d{3} \|){4}$", card, re.MULTILINE)) == 2


def test_a_run_begun_before_a_field_existed_resumes(data, tmp_path):
    workdir = write_run(tmp_path / "old", data)
    config = json.loads((workdir / "config.json").read_text())
    old = {**config, "model": dict(config["model"])}
    del old["model"]["num_kv_heads"]
    (workdir / "config.json").write_text(json.dumps(old))
    RunDirectory(workdir).open_for_training(config, PreparedData.open(data))
    config["model"]["num_kv_heads"] = 1
    with pytest.raises(InputError, match="num_kv_heads: found 0, wanted 1"):
        RunDirectory(workdir).open_for_training(config, PreparedData.open(data))


def test_the_largest_experts_alone_are_merged(run, tmp_path):
    text = "counting by steps"
    runs.export_run(RunDirectory(run), tmp_path / "hf", prompt=text, top_k_experts=2)
    model = lory_jax.load(run).with_top_k_experts(2)
    tokens = np.array([prompt_tokens(model, text)])
    expected = model.logits(tokens, "prompt", [tokens.shape[1]])
    np.testing.assert_allclose(their_logits(tmp_path / "hf", tokens), expected, atol=TOLERANCE)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert re.search(r"the 2 .* in each layer are merged", card)
    assert all(line.count("0.000") == 2 for line in re.findall(r"^\| [01] \|.*$", card, re.M))


def test_a_lory_merged_by_a_domain(run, tmp_path):
    outs = {}
    for domain in ("ones", "threes"):
        out = tmp_path / domain
        convert.main(["to-hf", f"--workdir={run}", f"--out={out}", f"--domain={domain}"])
        outs[domain] = their_logits(out, np.arange(20)[None])
        assert f"the domain '{domain}' (3 validation instances)" in (out / "README.md").read_text()
    assert np.abs(outs["ones"] - outs["threes"]).max() > 1e-3


MERGEABLE = {name: fields for name, fields in VARIANTS.items() if "token_deltas" not in fields}


@pytest.mark.parametrize("fields", MERGEABLE.values(), ids=MERGEABLE)
def test_a_variant_merged_by_a_text_is_the_llama_that_decodes_it(data, fields, tmp_path):
    fields = {"num_layers": 2, **fields}
    workdir = write_run(tmp_path / "W", data, **{name: str(v) for name, v in fields.items()})
    runs.export_run(RunDirectory(workdir), tmp_path / "hf", prompt="counting")
    model = lory_jax.load(workdir)
    tokens = np.array([prompt_tokens(model, "counting")])
    expected = model.logits(tokens, "prompt", [tokens.shape[1]])
    np.testing.assert_allclose(their_logits(tmp_path / "hf", tokens), expected, atol=TOLERANCE)


@pytest.mark.parametrize("experts", [0, 4])
def test_a_model_whose_tokens_pick_deltas_is_refused(data, experts, tmp_path):
    workdir = write_run(tmp_path / "W", data, experts, token_deltas="3")
    with pytest.raises(InputError, match=r"config\.model\.token_deltas is 3.* must be 0"):
        runs.export_run(RunDirectory(workdir), tmp_path / "hf", prompt="a")
    assert not (tmp_path / "hf").exists()


def test_a_dense_run_needs_no_routing(data, tmp_path):
    dense = write_run(tmp_path / "dense", data, experts=0)
    convert.main(["to-hf", f"--workdir={dense}", f"--out={tmp_path / 'hf'}"])
    tokens = np.arange(20)[None]
    expected = lory_jax.load(dense).logits(tokens)
    np.testing.assert_allclose(their_logits(tmp_path / "hf", tokens), expected, atol=TOLERANCE)
    with pytest.raises(InputError, match=r"prompt: .* is a dense model"):
        runs.export_run(RunDirectory(dense), tmp_path / "no", prompt="a")


def test_the_script_of_the_documentation_runs(run, tmp_path):
    convert.main(["to-hf", f"--workdir={run}", f"--out={tmp_path / 'exported'}", "--prompt=a"])
    documentation = (ROOT / "docs" / "interchange.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", documentation, re.DOTALL)
    assert len(script.splitlines()) <= 10
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip()


def test_a_sparse_baseline_is_refused(data, tmp_path):
    workdir = write_run(tmp_path / "sparse", data, routing="top1")
    with pytest.raises(
        InputError, match="routing is top1, which chooses experts instead of merging"
    ):
        runs.export_run(RunDirectory(workdir), tmp_path / "hf", prompt="a")


def test_the_script_of_the_python_page_runs(run, tmp_path):
    documentation = (ROOT / "docs" / "api.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", documentation, re.DOTALL)
    script = script.replace('"runs/local/lory"', repr(str(run)))
    # The tiny run reads 24 tokens at most.
    script = script.replace("max_new_tokens=20", "max_new_tokens=4")
    script = script.replace('"def read(self, size):"', '"def"').replace("[4]", "[2]")
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=verb_environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "exactly one of prompt, text, domain"),
        (["--domain=fours"], "domain: got 'fours', .* ones, threes"),
        (["--text=nowhere.txt"], "--text: nowhere.txt: "),
        (["--prompt=a", "--top_k_experts=9"], "top_k_experts: got 9"),
    ],
)
def test_what_cannot_be_merged_by_is_refused(run, arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        convert.main(["to-hf", f"--workdir={run}", f"--out={tmp_path / 'hf'}", *arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "direction"),
        (["to-gguf"], "to-gguf"),
        (["to-hf", "--workdir=a", "--out=b", "--prompt=c", "--domain=d"], "not allowed with"),
        (["from-hf", "--hf=a", "--workdir=b", "--experts=-1"], "--experts: got -1"),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(ConfigError, match=message):
        convert.main(argv)


# ---------------------------------------------------------------- from-hf


@pytest.fixture(scope="module")
def hf(tmp_path_factory, data):
    """A LLaMA of transformers' making with the tokenizer of the prepared data."""
    directory = tmp_path_factory.mktemp("llama") / "hf"
    llama(directory, max_position_embeddings=SEQUENCE_LENGTH)
    (directory / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    return directory


@pytest.fixture(scope="module")
def start(tmp_path_factory, hf):
    """What the verb makes of it, with eight experts."""
    workdir = tmp_path_factory.mktemp("start") / "W"
    result = verb("convert", "from-hf", f"--hf={hf}", f"--workdir={workdir}", "--experts=8")
    assert result.returncode == 0, result.stderr
    return workdir


def test_an_upcycled_llama_computes_what_the_llama_does(start, hf):
    model = lory_jax.load(start)
    assert (model.step, model.config.num_experts) == (0, 8)
    tokens = np.random.default_rng(0).integers(0, 300, (2, SEQUENCE_LENGTH))
    # All experts are the same yet: any merge of them is the dense FFN.
    for routing in ((), ("segment", [5, 9])):
        found = model.logits(tokens, *routing)
        np.testing.assert_allclose(found, their_logits(hf, tokens), atol=TOLERANCE)
    assert model.generate("counting", max_new_tokens=5)


def test_the_seed_draws_the_router(hf, start, tmp_path):
    runs.import_llama(hf, tmp_path / "same", experts=8)
    runs.import_llama(hf, tmp_path / "other", experts=8, seed=1)
    routers = [
        np.asarray(lory_jax.load(workdir).params["layers"]["ffn"]["router"])
        for workdir in (start, tmp_path / "same", tmp_path / "other")
    ]
    np.testing.assert_array_equal(routers[0], routers[1])
    assert not np.any(routers[0] == routers[2])


def test_a_dense_start_evaluates_and_goes_back(hf, data, tmp_path):
    workdir = tmp_path / "W"
    runs.import_llama(hf, workdir)
    result = evaluate_run(RunDirectory(workdir), data=data)
    assert set(result["perplexity"]) == {"ones", "threes"}
    with pytest.raises(InputError, match=r"^data: .*does not record its data"):
        evaluate_run(RunDirectory(workdir))
    runs.export_run(RunDirectory(workdir), tmp_path / "back")
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(their_logits(tmp_path / "back", tokens), their_logits(hf, tokens))


@pytest.mark.slow
def test_training_starts_from_it(start, hf, data, tmp_path):
    recipe = write_recipe(tmp_path)
    common = [f"--data={data}", f"--workdir={tmp_path / 'W'}", "--config.train.steps=20"]
    refused = verb("train", f"--config={recipe}:experts=8", f"--init_from={start}", *common)
    fields = ("config.model.num_heads=4", "config.model.norm_epsilon=1e-06")
    assert_one_line_error(refused, 2, "init_from", *fields)
    assert not (tmp_path / "W").exists()
    result = verb(
        "train",
        f"--config={recipe}:experts=8",
        f"--init_from={start}",
        *common,
        *(f"--{field}" for field in fields),
    )
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "W" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines if "grad_norm" in line]
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert all(line["experts_active"] is not None for line in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    trained = lory_jax.load(tmp_path / "W").params["layers"]["ffn"]["gate"]
    assert np.any(trained[:, 0] != trained[:, 1])  # the experts have parted
    grown = verb(
        "train",
        f"--config={recipe}:experts=16",
        f"--init_from={tmp_path / 'W'}",
        f"--data={data}",
        f"--workdir={tmp_path / 'grown'}",
        "--config.train.steps=1",
        "--config.train.learning_rate=0",
        *(f"--{field}" for field in fields),
    )
    assert grown.returncode == 0, grown.stderr
    copies = lory_jax.load(tmp_path / "grown").params["layers"]["ffn"]["gate"]
    np.testing.assert_array_equal(copies, np.concatenate([trained, trained], axis=1))


def test_a_malformed_directory_leaves_no_work_directory(hf, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((hf / "config.json").read_bytes())
    (tmp_path / "hf" / "pytorch_model.bin").touch()
    result = verb("convert", "from-hf", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'W'}")
    assert_one_line_error(result, 1, "pytorch_model.bin", "safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
