"""Inputs that people trip over, one test per kind, named after it.

Each kind was found in a public problem report. The tests of a room's own directory go into the
details; here the right behaviour is stated once.
"""

import errno
import importlib
import json
import os
import random
import re
import subprocess
import time

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

import lory_jax
from lory_jax import analyze, cli, evaluate, generate, plan, prepare, train
from lory_jax.__main__ import VERBS
from lory_jax.config import load_config
from lory_jax.conversion import runs
from lory_jax.data.manifest import domain_directory
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import ConfigError, InputError
from lory_jax.generation.settings import Settings
from lory_jax.preparation.documents import split_long
from lory_jax.preparation.embedding.lsa import TOKEN, Embedder, _tokens
from lory_jax.preparation.packing import tokenize, write_shards
from lory_jax.preparation.sources.corpus import read_documents
from lory_jax.preparation.split import split_by_origin
from lory_jax.preparation.tokenizer_training import LONGEST_WORD, train_tokenizer
from lory_jax.run.directory import RunDirectory
from lory_jax.storage import local_path, storage_path
from lory_jax.training.validation import sets_to_validate
from tests.conversion.test_hf_directory import edit_config, llama
from tests.support.tiny import (
    ROOT,
    SEQUENCE_LENGTH,
    verb,
    verb_command,
    verb_environment,
    write_prepared,
    write_recipe,
)

WORDS = "amber boat cloud drum eagle field grain harbor iron jar kettle lamp".split()  # noqa: SIM905


def read(source):
    return list(read_documents([str(source)]))


# ---------------------------------------------------------------- similarity


def share_of_topic(texts, topic_N):
    vectors = Embedder.fit(texts, dim=32, seed=0).embed(texts)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    near = np.argsort(-similarity, axis=1)[:, :5]
    return (topic_N[near] == topic_N[:, None]).mean()


@pytest.mark.parametrize(
    ("topics", "common", "stop"),
    [
        (
            ["河船 海港 风浪 渔网 帆桨", "山田 麦犁 牛羊 谷仓 石墙"],
            "我们 他们 可以 因为 所以",
            "，",
        ),
        (["เรือ ทะเล คลื่น ปลา ท่า", "ภูเขา นา วัว ข้าว หิน"], "ของ ที่ และ เป็น ได้", " "),
        (
            ["ふね みなと なみ あみ ほ", "やま たんぼ うし こめ いし"],
            "これは それで だから しかし",
            "。",
        ),
    ],
    ids=["Chinese", "Thai", "Japanese"],
)
def test_zh_similarity(topics, common, stop):
    """Scripts without spaces: documents of a topic find each other."""
    rng = random.Random(11)

    def document(topic):
        words = topics[topic].split() * 2 + common.split() * 3
        clauses = ("".join(rng.choices(words, k=rng.randint(4, 8))) for _ in range(40))
        return stop.join(clauses)

    topic_N = np.arange(100) % 2
    assert share_of_topic([document(t) for t in topic_N], topic_N) > 0.9


def test_zh_similarity_leaves_other_scripts_alone():
    for text in (
        "class A_b: x2 = ünder_the 2024 — ok!\n    return",
        "naïve Straße Ελληνικά 한국어",
    ):
        assert _tokens(text) == TOKEN.findall(text)
    assert _tokens("版本2024年 ok字") == ["版本", "2024", "年", "ok", "字"]


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.jsonl", "a.JSONL", "a.ndjson"])
@pytest.mark.parametrize("in_directory", [True, False])
def test_json_suffix(name, in_directory, tmp_path):
    documents = [{"text": f"document {i} of some words"} for i in range(5)]
    if name.lower() == "a.json":
        text = json.dumps(documents, indent=1)
    else:
        text = "".join(json.dumps(document) + "\n" for document in documents)
    (tmp_path / name).write_text(text)
    found = read(tmp_path if in_directory else tmp_path / name)
    assert sorted(d.text for d in found) == [d["text"] for d in documents]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl.gz", "A.ZIP", "package.json"])
def test_json_suffix_of_what_holds_no_documents(name, tmp_path):
    (tmp_path / "b.txt").write_text("some text")
    (tmp_path / name).write_text('{"name": "not a document"}')
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_bom(name, tmp_path):
    (tmp_path / "in").mkdir()
    text = "words of a document" if name == "a.txt" else '{"text": "words of a document"}\n'
    (tmp_path / "in" / name).write_text(text, encoding="utf-8-sig")
    assert [d.text for d in read(tmp_path / "in")] == ["words of a document"]


def test_windows_line_ends(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree")
    (tmp_path / "in" / "b.jsonl").write_bytes(b'{"text": "four"}\r\n\r\n{"text": "five"}\r\n')
    assert {d.text for d in read(tmp_path / "in")} == {"one\ntwo\n\nthree", "four", "five"}


def test_deeply_nested_or_cut_json(tmp_path):
    for line in (
        "[" * 100_000,
        '{"text": ' + "[" * 100_000,
        '{"text": "a',
        '{"text": ' + "9" * 5000,
    ):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(InputError, match=r"a\.jsonl: byte 0") as caught:
            read(tmp_path / "a.jsonl")
        assert len(str(caught.value)) < 400


# ---------------------------------------------------------------- sizes


def quadratic_split(text, max_bytes):
    """What `split_long` returned when it encoded the whole rest for every piece."""
    while len(text.encode()) > max_bytes:
        head = text.encode()[:max_bytes].decode(errors="ignore")
        border = max(head.rfind("\n\n", len(head) // 2), 0) or max(head.rfind("\n"), 0)
        cut = border or len(head)
        yield text[:cut]
        text = text[cut:].lstrip("\n")
    if text:
        yield text


def test_big_document():
    """The time grows in proportion, and the pieces are what they were."""
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab é漢\n\n\n", k=rng.randint(0, 80)))
        size = rng.randint(4, 30)
        assert list(split_long(text, size)) == list(quadratic_split(text, size))

    def seconds(words):
        text = " ".join(rng.choices(WORDS, k=words))
        start = time.process_time()
        assert "".join(split_long(text, 10_000)) == text
        return time.process_time() - start

    assert seconds(4_000_000) < 12 * max(seconds(1_000_000), 0.01)


def test_a_piece_has_at_least_one_character():
    assert list(split_long("漢字", 1)) == ["漢", "字"]


def test_single_file(tmp_path):
    """One origin is enough where nothing is held out."""
    (tmp_path / "input.txt").write_text("a few words")
    documents = read(tmp_path)
    split = split_by_origin(documents, validation_fraction=0, test_fraction=0, seed=0)
    assert split == {"train": documents, "validation": [], "test": []}
    with pytest.raises(InputError, match="requires at least 2"):
        split_by_origin(documents, validation_fraction=0, test_fraction=0.1, seed=0)


def test_long_domain():
    names = ["日" * 80, "日" * 80 + "a", "x" * 201, "x" * 202, "x" * 200, "日"]
    directories = [domain_directory(name) for name in names]
    assert len(set(directories)) == len(names)
    assert all(len(name.encode()) <= 200 for name in directories)
    assert directories[4:] == ["x" * 200, "%E6%97%A5"]  # what fits is as it was


def test_unspaced_tokenizer():
    rng = random.Random(5)

    def seconds(letters):
        text = "".join(rng.choices("ACGT", k=letters))
        start = time.process_time()
        tokenizer = train_tokenizer([text], 400)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return time.process_time() - start

    assert seconds(800_000) < 20 * max(seconds(100_000), 0.02)
    short = [" ".join(rng.choices(WORDS, k=200)), "x" * LONGEST_WORD]
    assert train_tokenizer(short, 300).json_text == train_tokenizer(iter(short), 300).json_text


# ---------------------------------------------------------------- tokenizers


def byte_level(*special: str, added: tuple[str, ...] = (), vocab_size: int = 290) -> str:
    """The JSON of a byte-level BPE with these special tokens, from id 0, and added ones."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer.to_str()


def test_added_tokens():
    """An added token stands for its own text in UTF-8."""
    added = ("Zürich", "đem", "New York", "naïve")
    tokenizer = Tokenizer(byte_level("<s>", "</s>", added=added))
    for text in added:
        ids = tokenizer.encode(f"in {text} now")
        assert tokenizer.decode(ids) == f"in {text} now"
        assert tokenizer.decode_bytes(ids) == f"in {text} now".encode()
        (own,) = tokenizer.encode(text)
        assert tokenizer.token_bytes[own] == len(text.encode())


def without_bytes(**model) -> Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE(**model))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<s>", "</s>", *model.values()]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    raw.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    return Tokenizer(raw.to_str())


@pytest.mark.parametrize("model", [{}, {"unk_token": "<unk>"}], ids=["no unk", "unk"])
def test_tokenizer_drops_text(model):
    """Refused with the share of bytes that have no token: spaces, and letters never seen."""
    with pytest.raises(InputError, match=r"tokenizer: .*10 of 19 bytes"):
        tokenize(["amber 河船 boat 9"], without_bytes(**model), "")


def imported(tmp_path, json_text, **fields) -> lory_jax.api.Model:
    llama(tmp_path / "hf", vocab_size=400, max_position_embeddings=24, **fields)
    (tmp_path / "hf" / "tokenizer.json").write_text(json_text)
    runs.import_llama(tmp_path / "hf", tmp_path / "run")
    return lory_jax.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("special", "bos", "eos"),
    [
        (["<unk>", "<s>", "</s>", "<|endoftext|>"], 1, 3),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], 0, 1),
        (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], 0, 1),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], 0, [1, 2, 3]),
    ],
    ids=["other names are there", "chatml", "unknown names", "a list"],
)
def test_hf_bos_eos(special, bos, eos, tmp_path):
    """The ids of config.json count, from the import to the export; a list stays a list."""
    fields = {"bos_token_id": bos, "eos_token_id": eos}
    model = imported(tmp_path, byte_level(*special), **fields)
    ends = eos if isinstance(eos, list) else [eos]
    assert (model.tokenizer.bos_id, list(model.tokenizer.eos_ids)) == (bos, ends)
    assert model.tokenizer.token_bytes[[bos, *ends]].sum() == 0
    runs.export_run(RunDirectory(tmp_path / "run"), tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert {field: found[field] for field in fields} == fields
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (bos, ends[0])
    again = Tokenizer.load_foreign(tmp_path / "out" / "tokenizer.json")
    assert again.special == model.tokenizer.special and again.same_ids(model.tokenizer)


def test_every_eos_ends_a_text(tmp_path):
    from lory_jax.generation.loop import GrowingText

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    model = imported(tmp_path, byte_level(*special), bos_token_id=0, eos_token_id=[1, 2])
    for eos in (1, 2):
        row = GrowingText(model.tokenizer, (), 9)
        row.add(eos)
        assert row.is_done


def test_tokenizer_names(tmp_path):
    """Without ids anywhere, names known to nobody are refused, and flags give the ids."""
    llama(tmp_path / "hf", vocab_size=400)
    edit_config(tmp_path / "hf", bos_token_id=None, eos_token_id=None)
    (tmp_path / "hf" / "generation_config.json").unlink()
    (tmp_path / "hf" / "tokenizer.json").write_text(byte_level("[START]", "[STOP]"))
    with pytest.raises(InputError, match="requires bos_id and eos_id"):
        runs.import_llama(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(InputError, match="eos_id: got 77, which is not a special token"):
        runs.import_llama(tmp_path / "hf", tmp_path / "run", bos_id=0, eos_id=77)
    runs.import_llama(tmp_path / "hf", tmp_path / "run", bos_id=0, eos_id=1)
    tokenizer = lory_jax.load(tmp_path / "run").tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    names = {"bos_token": "[START]", "eos_token": {"content": "[STOP]"}}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(names))
    named = Tokenizer.load_foreign(tmp_path / "hf" / "tokenizer.json")
    assert named.special == tokenizer.special


def test_an_id_of_an_ordinary_token_is_refused(tmp_path):
    llama(tmp_path / "hf", vocab_size=400, bos_token_id=0, eos_token_id=50)
    (tmp_path / "hf" / "tokenizer.json").write_text(byte_level("<s>", "</s>"))
    with pytest.raises(InputError, match="eos_id: got 50"):
        runs.import_llama(tmp_path / "hf", tmp_path / "run")


def test_export_token_type_ids(tmp_path):
    """An export generates from what its tokenizer returns, and pads."""
    import torch

    imported(tmp_path, byte_level("<s>", "</s>"), bos_token_id=0, eos_token_id=1)
    runs.export_run(RunDirectory(tmp_path / "run"), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["a", "the boat left"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs.input_ids.shape[1]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["pad_token"] == "</s>"


def test_chat_template(tmp_path):
    """A chat template, and a pad token, come through the import and the export."""
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    llama(tmp_path / "hf", vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    (tmp_path / "hf" / "tokenizer.json").write_text(byte_level("<s>", "</s>", "<pad>"))
    settings = {"chat_template": template}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    runs.import_llama(tmp_path / "hf", tmp_path / "run", experts=2)
    runs.export_run(RunDirectory(tmp_path / "run"), tmp_path / "out", prompt="a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user] hello\n"
    assert tokenizer.pad_token_id == 2


# ---------------------------------------------------------------- runs


def metrics_of(tmp_path, *arguments, experts=0):
    data = write_prepared(tmp_path / "data")
    recipe = write_recipe(tmp_path)
    result = verb(
        "train",
        f"--config={recipe}:experts={experts}",
        f"--data={data}",
        f"--workdir={tmp_path / 'run'}",
        *arguments,
    )
    assert result.returncode == 0, result.stderr
    return result, (tmp_path / "run" / "metrics.jsonl").read_text()


def test_no_validation(tmp_path):
    """Without a position to measure there is no validation_loss, which is said once."""
    result, metrics = metrics_of(tmp_path, f"--config.model.segment_length={SEQUENCE_LENGTH}")
    assert (result.stdout + result.stderr).count("no validation_loss") == 1
    assert "Warning" not in result.stderr
    assert "NaN" not in metrics and "validation_loss" not in metrics


def test_no_validation_of_sets_without_instances(capsys):
    empty = {"a": np.zeros((0, SEQUENCE_LENGTH + 1), np.int32)}
    full = {"b": np.zeros((3, SEQUENCE_LENGTH + 1), np.int32)}
    assert sets_to_validate(empty, 8, 8) == {}
    assert capsys.readouterr().out.count("no validation_loss") == 1
    assert list(sets_to_validate(empty | full, 2, 8)) == ["b"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model.segment_length", "64", "segment_length"),
        ("train.dense_warmup_fraction", "1", "dense_warmup_fraction"),
        ("train.dense_warmup_fraction", "0.9999", "dense_warmup_fraction"),
        ("train.learning_rate", "1e999", "learning_rate"),
        ("train.steps", "9" * 5000, "steps"),
        ("train.steps", str(2**63), "steps"),
        ("model.rope_theta", "nan", "rope_theta"),
    ],
)
def test_a_phase_or_number_that_swallows_the_run(field, value, named, tmp_path):
    recipe = write_recipe(tmp_path)
    overrides = [("model.sequence_length", "64"), (field, value)]
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(f"{recipe}:experts=4", overrides)
    assert len(str(caught.value)) < 500
    if not field.startswith("train.steps") and "1e999" not in value and value != "nan":
        load_config(f"{recipe}:experts=0", overrides)  # a dense model has no such phase


@pytest.mark.parametrize(
    ("verb_main", "arguments", "named"),
    [
        (plan.main, ["--topology=v5e-4", "--mesh=1," + "9" * 5000 + ",1"], "--mesh"),
        (plan.main, ["--topology=v5e-4", "--mesh=1,²,1"], "--mesh"),
        (plan.main, ["--topology=v5e-" + "9" * 5000], "topology"),
        (analyze.main, ["--workdir=w", "--seed=-1"], "--seed"),
        (prepare.main, ["--out=o", "--task=" + "9" * 5000 + "/2"], "--task"),
        (prepare.main, ["--out=o", "--workers=²"], "--workers"),
        (prepare.main, ["--out=o", "--max_rejected=nan"], "--max_rejected"),
        (evaluate.main, ["--workdir=w", "--top_k_experts=²"], "--top_k_experts"),
        (train.main, ["--data=d", "--workdir=w", "--profile=" + "9" * 5000 + ":1"], "--profile"),
        (generate.main, ["--workdir=w", "--prompt=a", "--seed=" + "9" * 5000], "--seed"),
        (generate.main, ["--workdir=w", "--prompt=a", "--step=" + "9" * 5000], "--step"),
    ],
    ids=range(11),
)
def test_a_flag_with_a_number_that_overflows(verb_main, arguments, named):
    if verb_main in (plan.main, train.main):
        arguments = [f"--config={ROOT / 'configs' / 'local.py'}", *arguments]
    with pytest.raises(ConfigError, match=named) as caught:
        verb_main(arguments)
    assert len(str(caught.value)) <= 1500


@pytest.mark.parametrize(
    "settings",
    [{"seed": 2**63}, {"temperature": float("inf")}, {"top_p": float("nan")}, {"top_k": -(2**70)}],
    ids=str,
)
def test_a_setting_of_generation_that_overflows(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Settings(**settings)
    Settings(seed=2**63 - 1, top_k=2**70, temperature=1e300)


# ---------------------------------------------------------------- paths, terminals and disks


def test_home_directories_and_spaces_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage_path("~/my run") == local_path("~/my run") == tmp_path / "my run"
    for text in ("", "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(InputError, match=r"must be the path|unknown user"):
            storage_path(text)


PATHS = (
    *("out", "workdir", "data", "text", "hf", "tokenizer", "encoder", "work", "init_from"),
    *("include_path", "tasks_data", "fetch_tasks", "perplexity_sets", "scratch"),
)


@pytest.mark.parametrize("name", [*VERBS, "convert to-hf", "convert from-hf"])
def test_home_directories_and_spaces_in_every_path_flag(name, tmp_path, monkeypatch):
    """A shell leaves the ~ of --flag=~/x as it is, so each flag that names a path expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parsers = []

    def parse(parser, argv):
        parsers.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Parser, "parse", parse)
    verb_name, _, direction = name.partition(" ")
    argv = [direction] if direction else ["to-hf"] if name == "convert" else []
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(f"lory_jax.{verb_name}").main(argv)
    for action in parsers[0]._actions:
        if action.dest in PATHS:
            assert action.type("~/a b") == tmp_path / "a b", action.dest
        elif action.dest not in (
            "source",
            "config",
            "tasks",
            "runs",
        ):  # expanded later
            assert not re.search("DIR|FILE|path", str(action.metavar)), action.dest


def test_a_terminal_that_is_not_utf8(tmp_path):
    """Names beyond ASCII are escaped, not a traceback; a link with a space is a path like any."""
    (tmp_path / "köln 河").mkdir()
    for i in range(9):
        lines = [f"{word} {i}" for word in WORDS] * 9
        (tmp_path / "köln 河" / f"é{i}.txt").write_text("\n".join(lines))
    (tmp_path / "a link").symlink_to(tmp_path / "köln 河")
    recipe = write_recipe(tmp_path)
    result = subprocess.run(
        verb_command(
            "prepare",
            f"--config={recipe}",
            f"--source={tmp_path / 'a link'}",
            f"--out={tmp_path / 'köln 河 out'}",
            "--order=random",
            "--config.data.test_fraction=0.2",
            "--config.data.validation_fraction=0.2",
            "--config.data.min_document_bytes=1",
        ),
        capture_output=True,
        cwd=ROOT,
        env=verb_environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert result.returncode == 0, result.stderr
    assert rb"k\xf6ln" in result.stdout


def test_names_that_are_not_utf8(tmp_path):
    """A file's name may be any bytes; a flag must be text."""
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("some words")
    (document,) = read(tmp_path)
    assert document.origin == "\\udcff.txt"
    with pytest.raises(ConfigError, match=r"'\\udcff'.*UTF-8"):
        cli.Parser("verb", None).parse(["--out", "\udcff"])


def test_a_disk_error_of_any_verb_is_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/x.json")

    with pytest.raises(SystemExit) as caught:
        cli.run(full)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: /somewhere/x.json: No space left on device\n"


def test_full_disk_prepare(tmp_path, monkeypatch):
    """What the library of the shards raises when a disk is full."""

    class Full:
        def __init__(self, path, options):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr("lory_jax.preparation.packing.array_record_module.ArrayRecordWriter", Full)
    with pytest.raises(InputError, match=r"part-00000.*No space left on device"):
        write_shards(tmp_path / "train", np.zeros((2, 3), np.uint16), 8)
