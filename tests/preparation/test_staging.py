import shutil

import pytest

from lory_jax.errors import InputError
from lory_jax.preparation.staging import is_prepared
from tests.support.tiny import write_prepared

SETTINGS = {"seed": 0}  # those of `write_prepared`


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
