"""Inputs that people trip over, one test per kind, named after it.

Each kind was found in a public problem report. The tests of a room's own directory go into the
details; here the right behaviour is stated once.
"""

import json
import random
import time

import numpy as np
import pytest

from lory_jax.data.manifest import domain_directory
from lory_jax.errors import InputError
from lory_jax.preparation.documents import split_long
from lory_jax.preparation.embedding.lsa import TOKEN, Embedder, _tokens
from lory_jax.preparation.sources.corpus import read_corpus
from lory_jax.preparation.split import split_by_origin
from lory_jax.preparation.tokenizer_training import LONGEST_WORD, train_tokenizer

WORDS = "amber boat cloud drum eagle field grain harbor iron jar kettle lamp".split()  # noqa: SIM905


def read(source, **settings):
    everything = dict(min_bytes=1, max_bytes=100_000, max_domain_bytes=0, seed=0)
    return read_corpus(str(source), **everything | settings)


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
        with pytest.raises(InputError, match=r"a\.jsonl:1") as caught:
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
