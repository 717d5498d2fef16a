"""The same documents in every format; parts of large files; broken documents; what is refused."""

import csv
import gzip
import json
import os
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources.formats import domain_of_records, format_of
from lory_jax.preparation.sources.inputs import list_inputs
from lory_jax.preparation.sources.read import read_input
from lory_jax.preparation.sources.records import ReadOptions, Reject
from lory_jax.preparation.sources.rejects import ReadCounts
from lory_jax.preparation.sources.streams import zstd
from lory_jax.storage import storage_path
from tests.support.emulators import object_store

EXPLICIT = ReadOptions(domain_key="domain", source_key="source")


def read(*sources, options=None, part_bytes=2**40):
    inputs = list_inputs([str(source) for source in sources], part_bytes)
    return [item for input in inputs for item in read_input(input, options or ReadOptions())]


def texts(items):
    return [item.text for item in items]


# ---------------------------------------------------------------- writers


def write_jsonl(path: Path, records) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


def write_array(path: Path, records) -> None:
    path.write_text(json.dumps(records, indent=1), "utf-8")


def write_objects(path: Path, records) -> None:
    path.write_text("\n".join(json.dumps(record, indent=2) for record in records), "utf-8")


def write_with_byte_order_mark(path: Path, records) -> None:
    write_jsonl(path, records)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def write_gz(path: Path, records) -> None:
    write_jsonl(path, records)
    contents = path.read_bytes()
    # Two members, as `cat a.gz b.gz` makes them.
    path.write_bytes(gzip.compress(contents[:7]) + gzip.compress(contents[7:]))


def write_zst(path: Path, records) -> None:
    write_jsonl(path, records)
    contents, compress = path.read_bytes(), zstd("test").compress
    path.write_bytes(compress(contents[:7]) + compress(contents[7:]))


def write_csv(path: Path, records, delimiter=",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["source", "text", "domain"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


def write_tsv(path: Path, records) -> None:
    write_csv(path, records, "\t")


def table_of(records):
    return pa.table({name: [r[name] for r in records] for name in ("text", "domain", "source")})


def write_parquet(path: Path, records) -> None:
    pq.write_table(table_of(records), path, row_group_size=2)


def write_arrow_file(path: Path, records) -> None:
    table = table_of(records)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_stream(path: Path, records) -> None:
    table = table_of(records)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_with_byte_order_mark,
    "lines.json": write_jsonl,
    "array.json": write_array,
    "objects.json": write_objects,
    "a.jsonl.gz": write_gz,
    "a.json.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.parquet": write_parquet,
    "file.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
}

SPECIAL = [
    "\0",
    "\r\n",
    "\n",
    '"',
    "'",
    ",",
    "\t",
    "\\",
    "\\n",
    "🦊👩‍👩‍👧",
    "שלום",
    "\u202e",
    "漢",
    " ",
    "\u2028",
    "ß",
    "}",
]
TEXTS = st.lists(
    st.sampled_from(SPECIAL) | st.text(st.characters(codec="utf-8"), max_size=6), max_size=8
)
RECORDS = st.lists(
    st.builds(
        lambda pieces, domain, source: {
            "text": "".join(pieces),
            "domain": domain,
            "source": source,
        },
        TEXTS,
        st.sampled_from(["news", "code, c++", "法"]),
        st.sampled_from(["site a", "b"]),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_every_format_gives_the_same_documents(tmp_path_factory, records):
    directory = tmp_path_factory.mktemp("formats")
    expected = [Document(r["text"], r["domain"], r["source"]) for r in records]
    for name, write in WRITERS.items():
        write(directory / name, records)
        assert read(directory / name, options=EXPLICIT) == expected, name
        assert read(directory / name) == expected, name


@settings(max_examples=40, deadline=None)
@given(RECORDS)
def test_text_files_hold_what_json_lines_hold(tmp_path_factory, records):
    root = tmp_path_factory.mktemp("texts")
    contents = [r["text"] for r in records if not r["text"].startswith("\ufeff")]
    for i, text in enumerate(contents):
        (root / f"{i:02d}.txt").write_bytes(text.encode())
        (root / f"{i:02d}.md.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    if contents:
        # A text file's line ends are those of one system or another.
        expected = [text.replace("\r\n", "\n") for text in contents]
        assert texts(read(root)) == [text for text in expected for _ in range(2)]


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.integers(1, 90))
def test_parts_hold_each_document_once(tmp_path_factory, records, part_bytes):
    directory = tmp_path_factory.mktemp("parts")
    for name in ("a.jsonl", "a.ndjson", "lines.json", "a.parquet", "file.arrow"):
        path = directory / name
        WRITERS[name](path, records)
        whole = read(path)
        assert read(path, part_bytes=part_bytes) == whole, name
        if name == "a.parquet" and len(records) > 2:
            assert len(list_inputs([str(path)], 1)) == -(-len(records) // 2)
    size = (directory / "a.jsonl").stat().st_size
    assert len(list_inputs([str(directory / "a.jsonl")], part_bytes)) == -(-size // part_bytes)


def test_a_saved_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", "two", "three"], "domain": ["a", "b", "a"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set", num_shards=2)
    (tmp_path / "set" / "cache-0123.arrow").write_bytes(b"left behind by a map")
    assert [(d.text, d.domain) for d in read(tmp_path / "set")] == list(
        zip(rows["text"], rows["domain"], strict=True)
    )
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name in ("x", "y")})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="splits x, y"):
        list_inputs([str(tmp_path / "both")])
    assert texts(read(tmp_path / "both" / "y")) == rows["text"]
    datasets.DatasetDict({"x": both["x"]}).save_to_disk(tmp_path / "one")
    assert texts(read(tmp_path / "one")) == rows["text"]


# ---------------------------------------------------------------- fields


def test_fields_are_found_by_their_names(tmp_path):
    record = {"raw": {"content": "a text"}, "meta": {"set": 7}, "a.b": "origin"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    options = ReadOptions(text_key="raw.content", domain_key="meta.set", source_key="a.b")
    for name in ("x.jsonl", "x.parquet"):
        assert read(tmp_path / name, options=options) == [Document("a text", "7", "origin")]


def test_a_field_that_was_asked_for_must_be_there(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one", "domain": null}\n{"text": "two", "domain": "d"}\n')
    assert [d.domain for d in read(path)] == ["x", "d"]
    reject, document = read(path, options=ReadOptions(domain_key="domain"))
    assert reject.reason == "has no domain" and document.domain == "d"


@pytest.mark.parametrize(
    ("name", "folder", "domain"),
    [
        ("web.jsonl", "f", "web"),
        ("c4-train.00001-of-01024.json.gz", "f", "c4-train"),
        ("news_2020-00017.jsonl.zst", "f", "news_2020"),
        ("part-00000.parquet", "f", "f"),
        ("000_00003.parquet", "f", "f"),
        ("data-00000-of-00002.arrow", "f", "f"),
        ("7.csv", "f", "f"),
    ],
)
def test_numbers_of_shards_are_no_domains(name, folder, domain):
    assert domain_of_records(format_of(name).stem, folder) == domain


# ---------------------------------------------------------------- broken documents

FINE = '{"text": "fine"}'
BROKEN_LINES = {
    '{"text": ': "not JSON",
    '{"text": null}': "NoneType",
    '{"text": 3}': "int",
    '{"body": "x"}': "its fields are: body",
    '["x"]': "list",
    '{"text": "half \\ud800"}': "not valid Unicode",
    '{"text": "x", "source": "\\udfff"}': "not valid Unicode",
    '{"text": "x", "domain": ["a", "b"]}': "domain is list",
    '{"text": "x", "domain": "\\ud800"}': "not valid Unicode",
    "[" * 100_000: "recursion",
    '{"text": "caf\udce9"}': "not UTF-8",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=lambda line: line[:25])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_broken_line_is_rejected_and_the_others_stay(tmp_path, name, line):
    path = tmp_path / name
    path.write_bytes(f"{FINE}\n{line}\n\n{FINE}\n".encode(errors="surrogateescape"))
    first, reject, last = read(path)
    assert first == last == Document("fine", "x", first.origin)
    assert isinstance(reject, Reject) and reject.path == str(path)
    assert reject.lost_bytes >= min(len(line) - 1, 1)
    if name == "x.jsonl":
        assert BROKEN_LINES[line] in reject.reason
        assert reject.position == f"byte {len(FINE) + 1}"
        parts = list_inputs([str(path)], 20)
        assert [item for part in parts for item in read_input(part, ReadOptions())] == [
            first,
            reject,
            last,
        ]


@pytest.mark.parametrize(
    ("contents", "documents"),
    [
        (f"[{FINE}, {FINE}, {{'text'}}, {FINE}]", 2),
        (f"[{FINE}, {FINE}", 2),
        (f'[{FINE}, {{"text": "no end', 1),
    ],
)
def test_the_rest_of_a_broken_array_is_lost_and_counted(tmp_path, contents, documents):
    (tmp_path / "x.json").write_text(contents)
    *fine, reject = read(tmp_path / "x.json")
    assert texts(fine) == ["fine"] * documents
    assert isinstance(reject, Reject) and reject.position == f"element {documents + 1}"


def test_broken_rows_of_tables(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'text,n\nfine,1\nshort\n"a" b,2\ncaf\xe9,3\n\n"two\nlines",4\n')
    items = read(path)
    assert texts(i for i in items if isinstance(i, Document)) == ["fine", "two\nlines"]
    rejects = [(i.position, i.reason) for i in items if isinstance(i, Reject)]
    assert [position for position, _ in rejects] == ["line 3", "line 4", "line 5"]
    assert "must have 2" in rejects[0][1] and "Unicode" in rejects[2][1]

    column = pa.array([b"fine", b"caf\xe9", None, b"last"])
    for name, table in {
        "binary": pa.table({"text": column}),
        "string": pa.table({"text": column.view(pa.string())}),
    }.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        first, second, third, last = read(tmp_path / f"{name}.parquet")
        assert texts([first, last]) == ["fine", "last"]
        assert "UTF-8" in second.reason and second.position == "row group 0, row 1"
        assert "NoneType" in third.reason


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.arrow"])
def test_a_table_without_the_column_names_those_it_has(tmp_path, name):
    writer = {"x.csv": write_csv, "x.parquet": write_parquet, "x.arrow": write_arrow_file}[name]
    writer(tmp_path / name, [{"text": "t", "domain": "d", "source": "s"}])
    (reject,) = read(tmp_path / name, options=ReadOptions(text_key="body"))
    assert "body" in reject.reason and "text" in reject.reason


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "file.arrow"])
def test_a_file_that_was_cut_counts_as_lost(tmp_path, name):
    path = tmp_path / name
    records = [{"text": os.urandom(40).hex(), "domain": "d", "source": "s"} for _ in range(2000)]
    WRITERS[name](path, records)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    *documents, reject = read(path)
    assert texts(documents) == [r["text"] for r in records[: len(documents)]]
    assert isinstance(reject, Reject) and reject.lost_bytes == path.stat().st_size
    assert read(path, part_bytes=1000)[-1] == reject


def test_texts_that_are_no_texts(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    (tmp_path / "part-00000").write_text(f"{FINE}\n{FINE}\n")
    (tmp_path / "c.txt").write_text("{braces} are no JSON")
    utf8, document, lines = read(tmp_path)
    assert utf8.position == "byte 2" and "0xff" in utf8.reason
    assert document.text == "{braces} are no JSON"
    assert "JSON lines" in lines.reason and lines.path.endswith("part-00000")


def test_too_many_rejects_stop_the_run():
    document, reject = Document("x" * 99, "d", "o"), Reject("f", "byte 0", "broken", 1)
    counts = sum(map(ReadCounts.of, [document] * 99 + [reject]), ReadCounts())
    counts.check(0.01)
    with pytest.raises(InputError, match=r"^max_rejected: 1 of 100 .*f, byte 0: broken"):
        counts.check(0.0099)
    # A damaged file is one reject, but its bytes count.
    with pytest.raises(InputError, match="max_rejected"):
        (counts + ReadCounts.of(Reject("g", "", "cut", 99 * 99))).check(0.4)
    ReadCounts().check(0)


# ---------------------------------------------------------------- which files


def test_patterns_several_sources_links_and_order(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/deep/3.txt", ".hidden/4.txt", "notes.md"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    (tmp_path / "d" / "b" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "z.txt").symlink_to(tmp_path / "d" / "b" / "1.txt")
    (tmp_path / "d" / "gone.txt").symlink_to(tmp_path / "nowhere")
    everything = ["a/deep/3.txt", "b/1.txt", "b/2.txt", "notes.md"]
    documents = read(tmp_path / "d")
    assert texts(documents) == everything
    assert [d.domain for d in documents] == ["a", "b", "b", "d"]
    assert [d.origin for d in documents] == ["a/deep", "b/1.txt", "b/2.txt", "notes.md"]
    assert read(tmp_path / "d", tmp_path / "d" / "b") == documents
    assert texts(read(tmp_path / "d/b", tmp_path / "d")) == [
        *["b/1.txt", "b/2.txt"],
        *["a/deep/3.txt", "notes.md"],
    ]
    assert read(tmp_path / "d" / "**" / "*.txt") == documents[:3]
    assert texts(read(tmp_path / "d" / "b" / "[12].txt")) == ["b/1.txt", "b/2.txt"]


@pytest.mark.parametrize("name", ["x.tfrecord", "x.tar.gz", "x.parquet.gz", "x.BZ2", "x.npy"])
def test_data_of_an_unknown_kind_are_refused_by_name(tmp_path, name):
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / name).write_text("data")
    with pytest.raises(InputError) as error:
        list_inputs([str(tmp_path)])
    assert name in str(error.value) and "fine.txt" not in str(error.value)


def test_sources_without_files_are_named(tmp_path):
    (tmp_path / "none").mkdir()
    for source in ("none", "missing", "*.txt"):
        with pytest.raises(InputError, match=r"^source: "):
            list_inputs([str(tmp_path / source)])


def test_a_file_that_changed_after_it_was_listed_is_not_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(FINE + "\n")
    (input,) = list_inputs([str(path)])
    assert len(list(read_input(input, ReadOptions()))) == 1
    path.write_text(FINE + "\n" + FINE + "\n")
    with pytest.raises(InputError, match=r"x\.jsonl: changed"):
        list(read_input(input, ReadOptions()))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_object_stores_give_what_local_files_give(tmp_path, scheme):
    records = [{"text": f"text {i}", "domain": "d", "source": "s"} for i in range(9)]
    local = tmp_path / "corpus"
    (local / "law").mkdir(parents=True)
    (local / "law" / "act.txt").write_text("an act")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "file.arrow", "array.json"):
        WRITERS[name](local / name, records)
    with object_store(scheme, tmp_path / "cache") as bucket:
        for path in (p for p in local.rglob("*") if p.is_file()):
            remote = storage_path(f"{bucket}/corpus/{path.relative_to(local).as_posix()}")
            remote.write_bytes(path.read_bytes())
        address = f"{bucket}/corpus"
        expected = read(local)
        assert len(expected) == 5 * 9 + 1
        assert read(address) == expected
        assert read(address, part_bytes=100) == expected
        assert read(f"{address}/*.jsonl") == read(local / "a.jsonl")
        assert read(f"{address}/law/act.txt") == [Document("an act", "law", "act.txt")]
        inputs = list_inputs([address])
        assert all(input.stamp and input.size for input in inputs)
        storage_path(f"{address}/a.jsonl").write_bytes((FINE + "\n").encode())
        changed = [i for i, j in zip(inputs, list_inputs([address]), strict=True) if i != j]
        assert [input.path for input in changed] == [f"{address}/a.jsonl"]
        with pytest.raises(InputError, match="holds no file"):
            list_inputs([f"{bucket}/nothing"])


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.jsonl.gz"])
def test_a_long_file_is_not_held_in_memory(tmp_path, name):
    records = [{"text": "x" * 10_000, "domain": "d", "source": "s"}] * 3000
    WRITERS[name](tmp_path / name, records)
    (input,) = list_inputs([str(tmp_path / name)])
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_input(input, ReadOptions()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 3000
    assert peak < 12 * 2**20  # of 30 MB


def test_a_long_value_is_scanned_few_times(tmp_path):
    """A value of many chunks is read in chunks that double, not in ever the same small ones."""
    (tmp_path / "x.json").write_text(json.dumps([{"text": "x" * (32 * 2**20)}]))
    start = time.process_time()
    (document,) = read(tmp_path / "x.json")
    assert len(document.text) == 32 * 2**20
    assert time.process_time() - start < 5
