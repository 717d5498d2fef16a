"""The schema and the recipes: every field, and every mistake in one line that names it."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.config import (
    SCHEMA,
    base_config,
    describe_fields,
    fields_where,
    find_field,
    load_config,
    may_change,
    parse_argument,
    section_defaults,
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
    assert str(caught.value).startswith(f"config.{name}: got 'nonsense'")
    assert str(caught.value).endswith(field.accepts)


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
        ("train.learning_rate", "1e400"),
        ("train.seed", "9" * 5000),
        ("train.seed", str(2**63)),
        ("train.warmup_fraction", "1.1"),
        ("checkpoint.every_steps", "0"),
        ("parallel.tensor", "0"),
        ("data.test_fraction", "0.6"),
    ],
)
def test_a_wrong_value_names_the_field_what_it_got_and_what_it_accepts(name, text):
    message = fault((name, text))
    assert message.startswith(f"config.{name}: got ")
    assert message.endswith(find_field(name).accepts)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("model.segment_length", "257")], ["config.model.segment_length", "257", "256"]),
        ([("model.num_heads", "3")], ["config.model.num_heads", "3", "config.model.embed_dim"]),
        ([("model.num_heads", "128")], ["config.model.num_heads", "128"]),
        (
            [("model.routing", "top2"), ("model.num_experts", "1")],
            ["config.model.num_experts", "got 1", "top2"],
        ),
        (
            [("model.routing", "top1"), ("model.routing_group", "3")],
            ["config.model.routing_group", "got 3"],
        ),
        (
            [("model.routing", "top1"), ("model.capacity_factor", "0")],
            ["config.model.capacity_factor", "got 0"],
        ),
        (
            [
                ("model.routing", "expert_choice_segment"),
                ("model.first_segment_routing", "uniform"),
            ],
            ["config.model.first_segment_routing", "uniform", "self"],
        ),
        ([("model.num_kv_heads", "3")], ["config.model.num_kv_heads", "got 3", "num_heads ("]),
        (
            [("model.rope_low_frequency_factor", "4")],
            ["config.model.rope_low_frequency_factor", "4"],
        ),
        ([("train.beta2", "1")], ["config.train.beta1, beta2"]),
        (
            [("model.expert_layers", "every_second"), ("model.num_layers", "3")],
            ["config.model.expert_layers", "every_second", "upper_half", "num_layers (3)"],
        ),
        (
            [("model.expert_layers", "upper_half"), ("model.num_layers", "1")],
            ["config.model.expert_layers", "must be all", "num_layers=1"],
        ),
        (
            [("model.expert_rank", "32")],
            ["config.model.expert_rank", "got 32", "(32, 88)"],
        ),
        (
            [("model.expert_rank", "4"), ("model.routing", "top1")],
            ["config.model.expert_rank", "must be 0", "top1"],
        ),
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
        with pytest.raises(ConfigError, match=r"^--config: got "):
            load_config(str(path))


@pytest.mark.parametrize(
    "text",
    ["experts", "experts=", "experts=-1", "experts=x", "experts=²", "experts=" + "9" * 99, "exp=8"],
)
def test_a_wrong_recipe_argument_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--config: .*experts=<integer>"):
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


# ---------------------------------------------------------------- mistakes in a recipe


RECIPE = """from lory_jax.config import base_config

def get_config(argument=None):
    config = base_config()
    {line}
    return config
"""


def recipe_fault(directory: Path, text: str) -> str:
    path = directory / "recipe.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert caught.value.status == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.model.num_layer = 3", ["config.model.num_layer:", "config.model.num_layers?"]),
        ("config.steps = 3", ["config.steps:", "config.train.steps?"]),
        ("config.modle.num_layers = 3", ["config.modle", "config.model?"]),
        ("config.train.seed = config.train.sed", ["config.train.sed:", "config.train.seed?"]),
        ("config.train.steps = 6.0", ["config.train.steps:", "6.0", "integer"]),
        ("config.train.steps = '6'", ["config.train.steps:", "'6'", "integer"]),
        ("config.train.learning_rate = 10**5000", ["config.train.learning_rate:", "bits"]),
        ("config.model.tie_embeddings = 1", ["config.model.tie_embeddings:", "1", "true or false"]),
        ("config.model = 3", ["config.model:", "3"]),
        ("config.train.update(steps=6.0)", ["config.train.steps:", "6.0", "integer"]),
        ("import copy; copy.deepcopy(config).train.steps = 6.0", ["config.train.steps:", "6.0"]),
        ("1 / 0", ["division by zero"]),
        ("raise RuntimeError('two\\nlines')", ["two lines"]),
        ("import not_a_module", ["not_a_module"]),
    ],
)
def test_a_mistake_in_a_recipe_names_file_line_and_field(tmp_path, line, words):
    message = recipe_fault(tmp_path, RECIPE.format(line=line))
    assert message.startswith(f"{tmp_path / 'recipe.py'}, line 5: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("config.train.steps = True", "train.steps"),
        ("config.train.steps = None", "train.steps"),
        ("config.train.steps = 10**5000", "train.steps"),
        ("config.train.steps = 0", "train.steps"),
        ("config.train.learning_rate = 1e400", "train.learning_rate"),
        ("config.train.learning_rate = float('nan')", "train.learning_rate"),
        ("config.model.remat = 'some'", "model.remat"),
        ("config.model = None", "model"),
        ("config.unlock(); config.train.stps = 6", "train.stps"),
        ("config.unlock(); config.more = 6", "more"),
        ("config.unlock(); del config.train.steps", "train.steps"),
        (
            "from ml_collections import config_dict as d; "
            "config.train.steps = d.required_placeholder(int)",
            "train.steps",
        ),
    ],
)
def test_a_wrong_value_of_a_recipe_names_the_field(tmp_path, line, name):
    assert recipe_fault(tmp_path, RECIPE.format(line=line)).startswith(f"config.{name}: ")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("x = 1\ndef get_config(argument=None) return 3", ", line 2: "),
        ("x = '\0'", ""),
        ("x = 1", ": "),
        ("get_config = 3", ": "),
        ("def get_config(argument=None): pass", ": "),
        ("def get_config(argument=None): return {}", ": "),
        ("def get_config(): return 3", ": "),
    ],
)
def test_a_file_that_is_not_a_recipe_is_named(tmp_path, text, where):
    assert recipe_fault(tmp_path, text).startswith(f"{tmp_path / 'recipe.py'}{where}")


def test_a_recipe_that_builds_its_own_config_misses_fields(tmp_path):
    text = (
        "import ml_collections as m\ndef get_config(argument): return m.ConfigDict({'model': {}})"
    )
    assert recipe_fault(tmp_path, text).startswith("config.model.vocab_size: ")


def test_a_recipe_may_set_whole_numbers_and_references(tmp_path):
    path = tmp_path / "recipe.py"
    line = (
        "config.train.clip_norm = 2; config.model.mlp_dim = config.model.get_ref('embed_dim') * 3"
    )
    path.write_text(RECIPE.format(line=line))
    config = load_config(str(path), [("model.embed_dim", "64")])
    assert config.train.clip_norm == 2.0 and type(config.train.clip_norm) is float
    assert config.model.mlp_dim == 3 * 64


def test_a_config_is_a_config_dict_that_can_be_copied_and_asked():
    config = base_config()
    assert isinstance(config, ml_collections.ConfigDict)
    assert copy.deepcopy(config) == config.copy_and_resolve_references() == config
    assert not hasattr(config.model, "num_layer") and config.model.get("num_layer", 7) == 7


# ---------------------------------------------------------------- what the fields say


def test_the_model_has_the_fields_of_the_schema_and_no_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    assert fields == dict.fromkeys(SCHEMA["model"], dataclasses.MISSING)


def test_a_resumed_run_may_change_how_it_is_computed_logged_and_saved():
    assert fields_where("model", may_change=True) == [
        "remat",
        "attention",
        "grouped_product",
        "attention_sharding",
    ]
    assert fields_where("train", may_change=True) == [
        "microbatches",
        "log_every_steps",
        "validate_every_steps",
        "validation_batches",
        "max_skipped_steps",
    ]
    for section in ("checkpoint", "parallel", "data"):
        fixed = ["mixture"] if section == "data" else []
        changeable = [name for name in SCHEMA[section] if name not in fixed]
        assert fields_where(section, may_change=True) == changeable
        assert may_change(section, "a_field_of_an_older_version")
    assert not may_change("model", "a_field_of_an_older_version")
    assert not may_change("a_section_of_an_older_version", "steps")


def test_the_architecture_is_what_decides_the_parameters_and_their_meaning():
    architecture = fields_where("model", is_architecture=True)
    assert {name for name in SCHEMA["model"] if name.startswith("rope_")} < {*architecture}
    assert {*architecture} - {name for name in SCHEMA["model"] if name.startswith("rope_")} == {
        "vocab_size",
        "num_layers",
        "embed_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "attention_bias",
        "mlp_bias",
        "mlp_dim",
        "shared_expert",
        "token_deltas",
        "tie_embeddings",
        "norm_epsilon",
    }
    assert {*fields_where("model", of_experts=True)} == {"expert_layers", "expert_rank"}
    assert not any(
        fields_where(section, is_architecture=True) for section in SCHEMA.keys() - {"model"}
    )


def test_defaults_are_those_of_the_base_config():
    assert {section: section_defaults(section) for section in SCHEMA} == base_config().to_dict()


def test_importing_the_config_imports_nothing_heavy():
    code = "import sys, lory_jax.config; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert not {"jax", "numpy", "flax"} & {*result.stdout.split()}


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
