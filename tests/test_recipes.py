"""Recipes by name and by path."""

import pytest

from lory_jax import recipes
from lory_jax.cli import Parser
from lory_jax.errors import ConfigError
from tests.support.tiny import ROOT, write_recipe


def load(spec: str):
    parser = Parser("verb", None)
    parser.add_config_flag()
    return parser.parse([f"--config={spec}"]).config


def test_every_recipe_of_the_repository_has_its_name():
    assert recipes.names() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    for name in recipes.names():
        assert load(name) == load(str(ROOT / "configs" / f"{name}.py"))


def test_a_name_takes_the_argument_of_a_recipe():
    assert load("local:experts=3").model.num_experts == 3


def test_a_file_of_the_same_name_is_opened_by_its_path_only(tmp_path, monkeypatch):
    write_recipe(tmp_path).rename(tmp_path / "local.py")
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("local.py").model.vocab_size == load("./local.py").model.vocab_size == 300
    assert load("local").model.vocab_size == 512


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("locall:experts=2", ["--config", "'locall'", "did you mean local?", *recipes.names()]),
        ("xyz", ["--config", "'xyz'", *recipes.names()]),
        ("configs/missing.py", ["--config", "'configs/missing.py'", *recipes.names()]),
    ],
)
def test_an_unknown_recipe_lists_those_there_are(spec, words):
    with pytest.raises(ConfigError) as caught:
        load(spec)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
