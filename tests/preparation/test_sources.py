"""Reading documents: text files, JSON lines, TFDS; cutting, duplicates, caps, bad input."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.errors import InputError
from lory_jax.preparation.documents import join_pieces, split_long
from lory_jax.preparation.sources.corpus import read_corpus
from tests.support.tiny import ROOT

CLEANING = {"min_bytes": 4, "max_bytes": 1000, "max_domain_bytes": 0, "seed": 0}


def read(source, **changes):
    return read_corpus(str(source), **{**CLEANING, **changes})


def write_files(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def write_lines(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


# ---------------------------------------------------------------- documents

TEXTS = st.text(st.sampled_from("ab\n é漢"), max_size=80)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(4, 30))
def test_cutting_loses_only_line_ends_and_keeps_the_limit(text, max_bytes):
    pieces = list(split_long(text, max_bytes))
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")


def test_cutting_prefers_empty_lines_then_line_ends():
    assert list(split_long("one\ntwo\n\nthree\nfour", 14)) == ["one\ntwo", "three\nfour"]
    assert list(split_long("one two\nthree four", 14)) == ["one two", "three four"]
    assert list(split_long("漢字漢字", 7)) == ["漢字", "漢字"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=9), max_size=12), st.integers(1, 20))
def test_joining_keeps_the_pieces_in_order_and_reaches_the_size(pieces, enough):
    joined = list(join_pieces(pieces, enough))
    assert all(len(text.encode()) >= enough for text in joined[:-1])
    expected = "".join(pieces).replace(" ", "")
    assert "".join(joined).replace("\n\n", "").replace(" ", "") == expected


# ---------------------------------------------------------------- sources


def test_a_directory_gives_its_top_folders_as_domains(tmp_path):
    root = write_files(
        tmp_path / "notes",
        {
            "law/acts/one.txt": "an act of law",
            "law/acts/deep/two.txt": "a second act",
            "law/loose.txt": "a loose paper",
            "top.txt": "on no shelf",
            ".hidden/secret.txt": "not to be read",
            "mail/box.jsonl": json.dumps({"text": "a letter", "domain": "letters"}),
        },
    )
    documents = read(root)
    found = {(document.domain, document.origin, document.text) for document in documents}
    assert {f for f in found if f[0] != "letters"} == {
        ("law", "law/acts", "an act of law"),
        ("law", "law/acts", "a second act"),
        ("law", "law/loose.txt", "a loose paper"),
        ("notes", "top.txt", "on no shelf"),
    }
    assert [f[2] for f in found if f[0] == "letters"] == ["a letter"]


def test_json_lines_take_domain_and_source(tmp_path):
    path = write_lines(
        tmp_path / "web.jsonl",
        {"text": "first text", "domain": "forum", "source": "site-a"},
        {"text": "second text"},
        {"text": "third text", "domain": None, "source": None, "more": 3},
    )
    path.write_text("\n" + path.read_text())  # an empty line is no document
    forum, *rest = read(path)
    assert (forum.domain, forum.origin, forum.text) == ("forum", "site-a", "first text")
    assert {d.domain for d in rest} == {"web"}
    assert len({d.origin for d in rest}) == 2  # without a source, a document is its own origin


BUILD_DATA_SET = """
import tensorflow_datasets as tfds

class ShelfOfBooks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"text": text, "domain": text, "source": text}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"B\u00fccher {i}", "domain": "books", "source": f"shelf {i % 2}"}

ShelfOfBooks(file_format="array_record").download_and_prepare()
"""
READ_SOURCE = """
import json, sys
from lory_jax.preparation.sources.corpus import read_corpus
documents = read_corpus(sys.argv[1], min_bytes=4, max_bytes=1000, max_domain_bytes=0, seed=0)
assert "tensorflow" not in sys.modules
print(json.dumps([[d.text, d.domain, d.origin] for d in documents]))
"""


def test_a_tfds_data_set_is_read(tmp_path):
    def python(program, *arguments):
        command = [sys.executable, "-c", program, *arguments]
        environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)

    built = python(BUILD_DATA_SET)
    assert built.returncode == 0, built.stderr
    result = python(READ_SOURCE, "tfds:shelf_of_books:train")
    assert result.returncode == 0, result.stderr
    documents = json.loads(result.stdout)
    assert sorted(text for text, _, _ in documents) == [f"Bücher {i}" for i in range(5)]
    assert {tuple(rest) for _, *rest in documents} == {("books", "shelf 0"), ("books", "shelf 1")}
    for source in ("tfds:shelf_of_books:nosuch", "tfds:no_such_data_set"):
        result = python(READ_SOURCE, source)
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f"lory_jax.errors.InputError: {source}: cannot be read"), last


# ---------------------------------------------------------------- cleaning


def test_exact_duplicates_and_short_documents_go(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"text": "the same text", "source": "1"},
        {"text": " the same text\n", "source": "2"},
        {"text": "the same text.", "source": "3"},
        {"text": "abc", "source": "4"},
    )
    assert [d.origin for d in read(path)] == ["1", "3"]


def test_a_cap_keeps_what_the_seed_picks_in_natural_order(tmp_path):
    records = [{"text": f"text {i:03d} " * 10, "source": f"{i:03d}"} for i in range(100)]
    path = write_lines(tmp_path / "a.jsonl", *records)
    size = len(records[0]["text"])
    kept = [d.origin for d in read(path, max_domain_bytes=20 * size)]
    assert len(kept) == 20 and kept == sorted(kept)
    assert kept == [d.origin for d in read(path, max_domain_bytes=20 * size)]
    assert kept != [d.origin for d in read(path, max_domain_bytes=20 * size, seed=1)]
    # More room only adds.
    assert set(kept) <= {d.origin for d in read(path, max_domain_bytes=30 * size)}


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    files = {f"d{i % 3}/{i}.txt": f"text of file {i}" for i in range(12)}
    one = read(write_files(tmp_path / "one", files))
    two = read(write_files(tmp_path / "two", dict(reversed(files.items()))))
    assert one == two
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert read(tmp_path / "one") == one


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b'{"text": "fine one"}\n{"text": ', ("bad.jsonl:2", "a JSON object")),
        (b'{"body": "no text"}', ("bad.jsonl:1", "`text`")),
        (b'{"text": 3}', ("bad.jsonl:1", "`text`")),
        (b'["a list"]', ("bad.jsonl:1", "a JSON object")),
        (b'{"text": "half \\ud800"}', ("bad.jsonl:1", "'\\\\ud800'", "valid Unicode")),
        (b'{"text": "fine", "source": "\\udfff"}', ("bad.jsonl:1", "'\\\\udfff'")),
        (b'{"text": "caf\xe9"}', ("bad.jsonl", "not UTF-8 at byte 13 (0xe9)")),
        (b"", ("bad.jsonl", "empty corpus")),
        (b'{"text": "abc"}', ("empty corpus", "none of at least 4 bytes")),
    ],
)
def test_bad_json_lines_are_named(tmp_path, contents, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(contents)
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word.replace("\\\\", "\\") in message


def test_bad_files_and_sources_are_named(tmp_path):
    write_files(tmp_path, {"a/good.txt": "good text", "a/bad.txt": b"ab\xff"})
    with pytest.raises(InputError, match=r"a/bad\.txt: not UTF-8 at byte 2 \(0xff\)"):
        read(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="empty corpus"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match=r"^source: got .*missing"):
        read(tmp_path / "missing")
