"""The result, and the work itself, in an object store."""

import pytest

from lory_jax import prepare
from lory_jax.data.prepared import PreparedData
from lory_jax.preparation.stages import inputs
from tests.support.corpora import SHARDED, TASK_BYTES, prepare_here, write_corpus
from tests.support.emulators import object_store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents")


MORE_STORES = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("s3", "out"), ("gs", "out"), ("gs", "out and work"))
]
STORES = [("s3", "out and work"), *MORE_STORES]


@pytest.mark.parametrize(("scheme", "where"), STORES)
def test_an_object_store_gets_the_same_bytes(corpus, tmp_path, monkeypatch, scheme, where):
    expected = prepare_here(corpus, tmp_path / "data", *SHARDED, "--workers=1")
    monkeypatch.setattr(inputs, "TASK_BYTES", TASK_BYTES)
    with object_store(scheme, tmp_path / "cache") as bucket:
        flags = [f"--source={corpus}", f"--out={bucket}/staged", *SHARDED, "--workers=1"]
        flags += [f"--work={bucket}/work"] if "work" in where else []
        prepare.main(flags)
        data = PreparedData.open(f"{bucket}/staged")
        data.verify(hashes=True)
        assert (data.directory / "manifest.json").read_bytes() == expected["manifest.json"]
        prepare.main(flags)  # says that it is done
