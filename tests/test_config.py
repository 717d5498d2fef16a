"""The schema: every field, every fault, in one line that names it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.config import (
    SCHEMA,
    base_config,
    describe_fields,
    find_field,
    load_config,
    parse_argument,
    set_field,
    validate,
)
from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.py"))
FIELDS = [f"{section}.{name}" for section, fields in SCHEMA.items() for name in fields]


def load(*overrides: tuple[str, str]):
    return load_config(str(ROOT / "configs" / "local.py"), overrides)


def fault(*overrides: tuple[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("experts", [0, 4])
def test_every_recipe_is_valid_and_takes_experts(path, experts):
    config = load_config(f"{path}:experts={experts}")
    assert config.model.num_experts == experts
    ModelConfig(**config.model)
    assert {s: set(fields) for s, fields in SCHEMA.items()} == {s: set(config[s]) for s in config}


def test_every_default_passes_its_own_check():
    validate(base_config())
    for name in FIELDS:
        field = find_field(name)
        assert field.check(field.default) and field.meaning and field.accepts


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_reads_its_default_from_text_and_refuses_nonsense(name):
    section, key = name.split(".")
    config, field = base_config(), find_field(name)
    set_field(config, name, str(field.default))
    assert config[section][key] == field.default
    assert type(config[section][key]) is type(field.default)
    if isinstance(field.default, str):
        set_field(config, name, "nonsense")
        with pytest.raises(ConfigError) as caught:
            validate(config)
    else:
        with pytest.raises(ConfigError) as caught:
            set_field(config, name, "nonsense")
    assert str(caught.value) == f"config.{name}: got 'nonsense', takes {field.accepts}"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model.num_layers", "3", 3),
        ("train.learning_rate", "1e-3", 1e-3),
        ("train.learning_rate", "1", 1.0),
        ("model.scan_layers", "False", False),
        ("model.scan_layers", "true", True),
        ("model.routing", "prefix", "prefix"),
    ],
)
def test_overrides_take_the_type_of_the_field(name, text, value):
    section, key = name.split(".")
    got = load((name, text))[section][key]
    assert got == value and type(got) is type(value)


def test_the_last_override_of_a_field_counts():
    assert load(("train.steps", "5"), ("train.steps", "7")).train.steps == 7


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.num_experts", "-1"),
        ("model.num_experts", "2.5"),
        ("model.num_layers", "0"),
        ("model.vocab_size", "3"),
        ("model.scan_layers", "1"),
        ("model.routing", "Causal"),
        ("model.remat", ""),
        ("model.first_segment_routing", "none"),
        ("train.steps", ""),
        ("train.learning_rate", "nan"),
        ("train.learning_rate", "inf"),
        ("train.learning_rate", "-1e-4"),
        ("train.warmup_fraction", "1.1"),
        ("checkpoint.every_steps", "0"),
        ("parallel.tensor", "0"),
        ("data.test_fraction", "0.6"),
    ],
)
def test_a_wrong_value_names_the_field_what_it_got_and_what_it_takes(name, text):
    message = fault((name, text))
    assert message.startswith(f"config.{name}: got ")
    assert message.endswith(f"takes {find_field(name).accepts}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("model.segment_length", "513")], ["config.model.segment_length", "513", "512"]),
        ([("model.num_heads", "3")], ["config.model.num_heads", "3", "config.model.embed_dim"]),
        ([("model.num_heads", "128")], ["config.model.num_heads", "even head width"]),
        (
            [("model.routing", "top2"), ("model.num_experts", "1")],
            ["config.model.num_experts", "at least 2", "top2"],
        ),
        (
            [("model.routing", "top1"), ("model.routing_group", "3")],
            ["config.model.routing_group", "got 3", "divisor of the "],
        ),
        (
            [("model.routing", "top1"), ("model.capacity_factor", "0")],
            ["config.model.capacity_factor", "above 0"],
        ),
        (
            [
                ("model.routing", "expert_choice_segment"),
                ("model.first_segment_routing", "uniform"),
            ],
            ["config.model.first_segment_routing", "takes self"],
        ),
        ([("model.num_kv_heads", "3")], ["config.model.num_kv_heads", "divisor", "num_heads ("]),
        ([("model.rope_low_frequency_factor", "4")], ["rope_low_frequency_factor", "4", "less"]),
        ([("train.beta2", "1")], ["config.train.beta1, beta2", "below 1"]),
        (
            [("data.test_fraction", "0.3"), ("data.validation_fraction", "0.3")],
            ["validation_fraction + test_fraction", "0.6", "0.5"],
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(overrides, words):
    message = fault(*overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.num_expert", "model.num_experts"),
        ("model.numexperts", "model.num_experts"),
        ("train.learning_rte", "train.learning_rate"),
        ("trian.steps", "train.steps"),
        ("num_layers", "model.num_layers"),
        ("model", "model."),
        ("", ""),
        ("model.num_layers.x", "model.num_layers"),
    ],
)
def test_an_unknown_field_suggests_the_nearest(wrong, right):
    assert f"config.{wrong}: no such field; did you mean config.{right}" in fault((wrong, "1"))


def test_a_missing_recipe_or_one_that_is_not_python_is_refused(tmp_path):
    other = tmp_path / "recipe.txt"
    other.write_text("experts: 8")
    for path in (tmp_path / "none.py", tmp_path, other):
        with pytest.raises(ConfigError, match=r"^--config: got .*, takes "):
            load_config(str(path))


@pytest.mark.parametrize("text", ["experts", "experts=", "experts=-1", "experts=x", "expert=8"])
def test_a_wrong_recipe_argument_is_refused(text):
    with pytest.raises(ConfigError, match="takes experts=<integer>"):
        parse_argument(text, experts=8)


def test_recipe_arguments_are_read_by_name():
    assert parse_argument(None, experts=8, layers=2) == {"experts": 8, "layers": 2}
    assert parse_argument("layers=4", experts=8, layers=2) == {"experts": 8, "layers": 4}
    assert parse_argument("layers=4,experts=0", experts=8, layers=2) == {"experts": 0, "layers": 4}


def test_the_description_names_every_field_with_what_it_accepts():
    text = describe_fields()
    for name in FIELDS:
        assert f"--config.{name}  " in text
        assert find_field(name).accepts in text


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(FIELDS), text=st.text(max_size=8) | st.integers().map(str))
def test_any_text_for_any_field_is_taken_or_refused_in_one_line(name, text):
    config = base_config()
    try:
        set_field(config, name, text)
        validate(config)
    except ConfigError as error:
        assert str(error).startswith("config.")
        assert "\n" not in str(error)
