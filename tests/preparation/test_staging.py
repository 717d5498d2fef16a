import json
import os
import shutil

import pytest

from lory_jax.config import section_defaults
from lory_jax.errors import InputError
from lory_jax.preparation.staging import is_prepared, staging_directory
from tests.support.tiny import write_prepared

SETTINGS = {"seed": 0}  # those of `write_prepared`


def test_a_directory_appears_whole(tmp_path):
    out = tmp_path / "deep" / "data"
    with staging_directory(out) as staging:
        (staging / "file").write_text("contents")
        assert not out.exists()
    assert os.listdir(out.parent) == ["data"] and os.listdir(out) == ["file"]


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error), staging_directory(tmp_path / "data") as staging:
        (staging / "file").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_empty_directory_may_be_given(tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    with staging_directory(out) as staging:
        (staging / "file").write_text("contents")
    assert os.listdir(out) == ["file"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    left = tmp_path / "data.tmp-prepare"
    (left / "train").mkdir(parents=True)
    (left / "train" / "half").write_text("half")
    (left / "tokenizer.json").write_text("half")
    with staging_directory(tmp_path / "data") as staging:
        assert os.listdir(staging) == []


def test_two_processes_do_not_write_one_directory(tmp_path):
    out = tmp_path / "data"
    with staging_directory(out) as staging:
        (staging / "file").write_text("contents")
        with pytest.raises(InputError, match=r"^out: "), staging_directory(out):
            pass
        assert (staging / "file").exists()


def test_fields_younger_than_a_directory_count_at_their_default(tmp_path):
    out, defaults = write_prepared(tmp_path / "data"), section_defaults("data")
    manifest = json.loads((out / "manifest.json").read_text())
    younger = {n: value for n, value in defaults.items() if n != "confirmation_fraction"}
    manifest["settings"]["data"] = younger
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert is_prepared(out, SETTINGS | {"data": defaults})
    with pytest.raises(InputError, match="confirmation_fraction"):
        is_prepared(out, SETTINGS | {"data": defaults | {"confirmation_fraction": 0.1}})


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with (
        pytest.raises(InputError, match=r"^out: .*file/data"),
        staging_directory(tmp_path / "file" / "data"),
    ):
        pass


def test_new_and_empty_directories_are_not_prepared(tmp_path):
    assert not is_prepared(tmp_path, SETTINGS)
    assert not is_prepared(tmp_path / "none", SETTINGS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data")


def test_the_same_settings_are_done(prepared):
    assert is_prepared(prepared, SETTINGS)
    with pytest.raises(InputError, match=r"^out: .*seed: found 0, wanted 1"):
        is_prepared(prepared, {"seed": 1})


def test_a_damaged_result_is_not_done(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "data")
    shard = next((copy / "train").iterdir())
    contents = bytearray(shard.read_bytes())
    contents[100] ^= 1
    shard.write_bytes(contents)
    with pytest.raises(InputError, match=f"{shard.name}: damaged"):
        is_prepared(copy, SETTINGS)


def test_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"^out: .*manifest\.json"):
        is_prepared(tmp_path, SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
