"""Reading documents in order: text files, JSON lines, TFDS."""

import json
import os
import subprocess
import sys

from lory_jax.preparation.sources.corpus import read_documents
from tests.support.tiny import ROOT


def read(source):
    return list(read_documents([str(source)]))


def write_files(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def write_lines(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


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
from lory_jax.preparation.sources.corpus import read_documents
documents = list(read_documents([sys.argv[1]]))
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
