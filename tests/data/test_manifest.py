import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.data.manifest import (
    Manifest,
    describe_files,
    differences,
    domain_directory,
    write_manifest,
)
from lory_jax.errors import InputError


def make_manifest(files=None):
    counts = {"train": {"instances": 3, "domains": {}}}
    return Manifest({"seed": 1, "data": {"a": 2}}, 7, 300, counts, {"method": "none"}, files or {})


def fields_of(tmp_path, **changes):
    write_manifest(make_manifest(), tmp_path)
    return json.loads((tmp_path / "manifest.json").read_text()) | changes


def test_what_is_written_is_read_again(tmp_path):
    manifest = make_manifest({"train/x": {"sha256": "0" * 64, "bytes": 5}})
    write_manifest(manifest, tmp_path)
    path = tmp_path / "manifest.json"
    assert Manifest.from_json(path.read_bytes(), path) == manifest
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe"])
def test_what_is_no_manifest_is_refused(tmp_path, contents):
    with pytest.raises(InputError, match=r"manifest\.json: malformed") as caught:
        Manifest.from_json(contents, tmp_path / "manifest.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": {"train/x": 3}}, "malformed"),
        ({"files": {"train/x": {}}}, "malformed"),
        ({"sequence_length": "7"}, "malformed"),
        ({"surprise": 1}, "malformed"),
        ({"format_version": 99}, "format version 99"),
        ({"files": {"../x": {"sha256": "", "bytes": 1}}}, "outside the directory"),
        ({"files": {"/etc/x": {"sha256": "", "bytes": 1}}}, "outside the directory"),
    ],
)
def test_wrong_fields_are_named(tmp_path, changes, message):
    contents = json.dumps(fields_of(tmp_path, **changes)).encode()
    with pytest.raises(InputError, match=message) as caught:
        Manifest.from_json(contents, tmp_path / "manifest.json")
    assert "\n" not in str(caught.value)


def test_verify_checks_what_the_prefix_and_hashes_ask_for(tmp_path):
    for name in ("train/a", "test/b"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("contents")
    manifest = make_manifest(describe_files(tmp_path))
    manifest.verify(tmp_path, hashes=True)
    (tmp_path / "test" / "b").write_text("CONTENTS")  # the same size
    manifest.verify(tmp_path, hashes=False)
    manifest.verify(tmp_path, hashes=True, prefix="train/")
    with pytest.raises(InputError, match="test/b: damaged"):
        manifest.verify(tmp_path, hashes=True)
    (tmp_path / "test" / "b").write_text("short")
    with pytest.raises(InputError, match="test/b: truncated or damaged"):
        manifest.verify(tmp_path, hashes=False)
    (tmp_path / "test" / "b").unlink()
    with pytest.raises(InputError, match="test/b: missing"):
        manifest.verify(tmp_path, hashes=False)


def test_a_link_that_leads_out_of_the_directory_is_refused(tmp_path):
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "train" / "a").write_text("contents")
    manifest = make_manifest(describe_files(data))
    (tmp_path / "link").symlink_to(data)
    manifest.verify(tmp_path / "link", hashes=True)  # the directory itself may be a link
    (data / "train").rename(data / "inside")
    (data / "train").symlink_to(data / "inside")
    manifest.verify(data, hashes=True)
    (data / "inside").rename(tmp_path / "outside")
    (data / "train").unlink()
    for target in (tmp_path / "outside", "../outside", "../data/../outside"):
        (data / "train").symlink_to(target)
        with pytest.raises(InputError, match="train/a: a symbolic link that leads out"):
            manifest.verify(data, hashes=True)
        (data / "train").unlink()


def test_differences_are_named_with_their_section():
    found = {"seed": 1, "data": {"a": 2, "b": 3}, "old": 0}
    wanted = {"seed": 1, "data": {"a": 2, "b": 4}, "new": 0}
    lines = differences(found, wanted)
    assert [line.partition(":")[0] for line in lines] == ["data.b", "new", "old"]
    assert differences(found, found) == []


@given(st.text(min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_a_domain_directory_is_one_safe_name(domain):
    name = domain_directory(domain)
    assert "/" not in name and "\0" not in name and not name.startswith(".") and name.isascii()


def test_domain_directories_differ():
    names = ["a/b", "a b", "a%2Fb", "..", ".", "A", "a"]
    assert len({domain_directory(name) for name in names}) == len(names)
    with pytest.raises(InputError, match="domain"):
        domain_directory("")
