import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lory_jax import prepare
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from tests.support.tiny import ROOT

WORDS = {
    "code": ["def", "return", "self", "import", "class", "None", "while", "yield", "lambda"],
    "prose": ["the", "river", "was", "slow", "and", "quiet", "under", "an", "old", "bridge"],
    "c++": ["template", "const", "struct", "void", "static", "inline", "namespace", "include"],
}
SETTINGS = [
    "--config.model.vocab_size=300",
    "--config.model.sequence_length=64",
    "--config.model.segment_length=16",
    "--config.data.validation_fraction=0.2",
    "--config.data.test_fraction=0.2",
    "--config.data.embedding_dim=8",
    "--config.data.num_neighbors=5",
    "--config.data.instances_per_shard=50",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A JSON-lines corpus of three domains, each from ten origins."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w") as file:
        for domain, words in WORDS.items():
            for i in range(60):
                text = " ".join(rng.choices(words, k=50)) + f" {domain} {i}\n"
                record = {"text": text, "domain": domain, "source": f"{domain}-{i % 10}"}
                file.write(json.dumps(record) + "\n")
    return path


def command(*flags, hash_seed="0"):
    return subprocess.run(
        [sys.executable, "-m", "lory_jax.prepare", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )


def again(corpus, out, *flags):
    prepare.main([f"--out={out}", f"--source={corpus}", *SETTINGS, *flags])


def contents(directory):
    """Returns the bytes of every file but the timings."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in files
        if path.name != "timings.json"
    }


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    done = command(f"--out={out}", f"--source={corpus}", *SETTINGS)
    assert done.returncode == 0, done.stderr
    (out.parent / "stdout.txt").write_text(done.stdout)
    return out


def test_twice_gives_the_same_bytes(prepared, corpus, tmp_path):
    out = tmp_path / "again"
    done = command(f"--out={out}", f"--source={corpus}", *SETTINGS, hash_seed="7")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(prepared)
    assert (out / "timings.json").is_file() and os.listdir(tmp_path) == ["again"]


def test_the_files_are_those_of_the_contract(prepared):
    names = set(contents(prepared))
    assert {"manifest.json", "tokenizer.json"} < names
    for split in ("validation", "test"):
        for domain in WORDS:
            assert any(name.startswith(f"{split}/{domain}/part-00000-of-") for name in names)
    assert any(name.startswith("train/part-00000-of-") for name in names)
    manifest = PreparedData.open(prepared).manifest
    assert set(manifest.files) == names - {"manifest.json"}


def test_the_counts_are_those_of_the_files(prepared):
    data = PreparedData.open(prepared)
    manifest, tokenizer = data.manifest, data.tokenizer
    train = read_train(prepared)
    counts = manifest.counts["train"]
    assert len(train) == counts["instances"]
    all_tokens = sum(domain["tokens"] for domain in counts["domains"].values())
    assert all_tokens == 1 + len(train) * 64 + counts["dropped_tokens"]
    used = tokenizer.token_bytes[train[:, 1:]].sum()
    all_bytes = sum(domain["bytes"] for domain in counts["domains"].values())
    assert 0 <= all_bytes - used <= counts["dropped_tokens"] * tokenizer.token_bytes.max()
    documents = sum(
        domain["documents"]
        for split in manifest.counts.values()
        for domain in split["domains"].values()
    )
    assert documents == 3 * 60


def test_held_out_instances_have_the_origins_of_their_documents(prepared, corpus):
    data = PreparedData.open(prepared)
    origin_of = {}
    for line in corpus.read_text().splitlines():
        fields = json.loads(line)
        origin_of[fields["text"]] = fields["source"]
    for split in ("validation", "test"):
        origins = data.held_out_origins(split)
        for domain, rows in data.held_out(split).items():
            stream = np.append(rows[:, :-1].ravel(), rows[-1, -1])
            texts = documents_of(stream, data.tokenizer)
            assert len(origins[domain]) == len(rows)
            assert set(origins[domain]) <= set(origin_of.values())
            # A document that is cut off at the end may fill the last instances.
            assert origins[domain][0] in {origin_of[text] for text in texts if text in origin_of}


def read_train(directory):
    data = PreparedData.open(directory)
    count = data.manifest.counts["train"]["instances"]
    batches = data.training_batches(
        sequence_length=64, vocab_size=300, global_batch_size=count, seed=0
    )
    batch = next(batches.iterate(0))
    return batch[np.argsort(batches.record_ids(0))]


def documents_of(stream, tokenizer):
    """Returns the texts of whole documents in a stream of tokens."""
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    starts = [0, *(ends[:-1] + 1)]
    assert all(stream[start] == tokenizer.bos_id for start in starts)
    return [tokenizer.decode(stream[s : e + 1]) for s, e in zip(starts, ends, strict=True)]


def test_orders_differ_and_hold_the_same_documents(prepared, corpus, tmp_path):
    out = tmp_path / "random"
    again(corpus, out, "--order=random")
    texts = []
    for directory in (prepared, out):
        tokenizer = PreparedData.open(directory).tokenizer
        rows = read_train(directory)
        texts.append(documents_of(np.append(rows[:, :-1].ravel(), rows[-1, -1]), tokenizer))
    lines = (json.loads(line)["text"] for line in corpus.read_text().splitlines())
    assert set(texts[0]) | set(texts[1]) <= set(lines)
    # The cut-off remainder holds at most one document of this size.
    assert len(set(texts[0]) ^ set(texts[1])) <= 4 and texts[0] != texts[1]
    similarity, other = (
        PreparedData.open(prepared).manifest.similarity,
        PreparedData.open(out).manifest.similarity,
    )
    assert similarity == other
    assert similarity["similar"]["mean_cosine"] > similarity["random"]["mean_cosine"]
    assert similarity["similar"]["same_domain_rate"] > 0.8
    assert similarity["random"]["same_domain_rate"] < 0.6


def test_train_and_test_share_no_origin(prepared, corpus):
    records = (json.loads(line) for line in corpus.read_text().splitlines())
    origin = {record["text"]: record["source"] for record in records}
    tokenizer = PreparedData.open(prepared).tokenizer
    rows = read_train(prepared)
    train = documents_of(np.append(rows[:, :-1].ravel(), rows[-1, -1]), tokenizer)
    train_origins = {origin[text] for text in train}
    for split in ("validation", "test"):
        for domain, instances in PreparedData.open(prepared).held_out(split).items():
            texts = documents_of(instances[:, :-1].ravel(), tokenizer)
            assert texts and all(origin[text].startswith(domain) for text in texts)
            assert not train_origins & {origin[text] for text in texts}


def test_the_report_is_on_the_screen(prepared):
    shown = (prepared.parent / "stdout.txt").read_text()
    for words in ("similar order: mean cosine", "random order: mean cosine", "bytes/token"):
        assert words in shown
    assert f"wrote {prepared}" in shown


def test_a_given_tokenizer_is_used(prepared, corpus, tmp_path):
    given = prepared / "tokenizer.json"
    out = tmp_path / "data"
    again(corpus, out, f"--tokenizer={given}")
    assert contents(out)["tokenizer.json"] == given.read_bytes()
    manifest = PreparedData.open(out).manifest
    assert manifest.settings["tokenizer"] == manifest.files["tokenizer.json"]["sha256"]
    with pytest.raises(InputError, match=r"^tokenizer: has 300 .*config.model.vocab_size \(280\)"):
        again(corpus, out, f"--tokenizer={given}", "--config.model.vocab_size=280")


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def test_a_second_run_says_done_and_changes_nothing(copy, corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    again(corpus, copy)
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_other_settings_are_shown(copy, corpus):
    with pytest.raises(InputError, match=r"order: found 'similar', wanted 'random'"):
        again(corpus, copy, "--order=random")
    with pytest.raises(InputError, match=r"data\.num_neighbors: found 5, wanted 6"):
        again(corpus, copy, "--config.data.num_neighbors=6")


def test_a_damaged_result_is_not_called_done(copy, corpus):
    shard = next((copy / "train").iterdir())
    os.truncate(shard, 1000)
    with pytest.raises(InputError, match=f"{shard.name}: truncated or damaged"):
        again(corpus, copy)


def test_what_an_interrupted_run_left_is_removed(corpus, prepared, tmp_path):
    left = tmp_path / "data.tmp-prepare" / "train"
    left.mkdir(parents=True)
    (left / "part-00000-of-00009.array_record").write_text("half")
    again(corpus, tmp_path / "data")
    assert os.listdir(tmp_path) == ["data"]
    assert contents(tmp_path / "data") == contents(prepared)


def test_a_directory_of_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"^out: .*manifest\.json"):
        again(corpus, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def empty(directory):
    directory.mkdir()
    return directory


def undecodable(directory):
    (directory / "domain").mkdir(parents=True)
    (directory / "domain" / "a.txt").write_bytes(b"plain text \xff\xfe\x80 and more " * 50)
    return directory


def small(directory):
    for domain in WORDS:
        for i in range(4):
            (directory / domain / str(i)).mkdir(parents=True)
            (directory / domain / str(i) / "a.txt").write_text(f"{domain} {i} " + "word " * 50)
    return directory


@pytest.mark.parametrize(
    ("make", "flags", "status", "message"),
    [
        (lambda d: d, [], 1, "source: got"),
        (empty, [], 1, "holds no file"),
        (undecodable, [], 1, "domain/a.txt"),
        (small, ["--config.model.sequence_length=20000"], 1, "corpus too small"),
        (small, ["--config.data.test_fraction=0.01"], 1, "corpus too small"),
        (small, ["--tokenizer=/none/tokenizer.json"], 1, "/none/tokenizer.json"),
        (small, ["--config.model.sequence_lenght=3"], 2, "config.model.sequence_length"),
        (small, ["--config.data.num_neighbors=-1"], 2, "config.data.num_neighbors"),
        (small, ["--order=sideways"], 2, "--order"),
    ],
)
def test_bad_input_is_one_line(tmp_path, make, flags, status, message):
    source = make(tmp_path / "source")
    done = command(f"--out={tmp_path / 'out'}", f"--source={source}", *SETTINGS, *flags)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == status, done.stderr
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr and message in errors[0]
    assert sorted(os.listdir(tmp_path)) in (["source"], [])


def test_the_flags_are_read_before_slow_imports():
    """What `--help` and a wrong flag do without: they answer at once."""
    code = (
        "import sys\n"
        "from lory_jax import cli, prepare\n"
        "sys.argv[1:] = ['--no_such_flag']\n"
        "try:\n"
        "    cli.run(prepare.main)\n"
        "except SystemExit as end:\n"
        "    print(end.code)\n"
        "slow = {'array_record', 'grain', 'numba', 'scann', 'scipy', 'sklearn', 'tokenizers'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2", "[]"], done.stderr
