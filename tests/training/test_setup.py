"""What a training process checks before it starts."""

import time

import pytest

from lory_jax.config import load_config
from lory_jax.errors import ConfigError
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.setup import setup
from tests.support.tiny import write_prepared, write_recipe


def test_documents_must_begin_with_the_bos_of_the_data(tmp_path):
    write_recipe(tmp_path)
    write_prepared(tmp_path / "data")
    overrides = [("model.document_mask", "true"), ("model.bos_id", "5")]
    config = load_config(f"{tmp_path / 'tiny.py'}:experts=4", overrides)
    with pytest.raises(ConfigError, match=r"config\.model\.bos_id: got 5; must be 0"):
        setup(config, tmp_path / "data", tmp_path / "run", Goodput(since=time.monotonic()))
    assert not (tmp_path / "run").exists()
