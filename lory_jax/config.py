"""Configs: made from the schema, set by recipes and by `--config.field=value`, then validated.

A recipe in `configs/` calls `base_config()`, sets what differs, and returns the `ConfigDict`.
`load_config` runs a recipe and applies the overrides; `validate` checks every field (schema.py) and
how the fields fit together. Every mistake raises a `ConfigError` with a one-line message.
"""

import difflib
import importlib.util
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict, RequiredValueError

from lory_jax.config_checks import (
    check_expert_layers,
    check_expert_rank,
    check_model,
    check_phases,
    check_routing_source,
    check_segment_schedule,
    check_segments,
    check_sparse,
    check_top_k,
    check_train,
)
from lory_jax.errors import ConfigError
from lory_jax.schema import (
    SCHEMA,
    Field,
    describe_fields,
    fields_where,
    find_field,
    may_change,
    section_defaults,
    shorten,
)

__all__ = [
    "SCHEMA",
    "Field",
    "base_config",
    "check_model_fields",
    "describe_fields",
    "fields_where",
    "find_field",
    "load_config",
    "may_change",
    "paper_recipe",
    "parse_argument",
    "section_defaults",
    "set_field",
    "validate",
]


class SchemaConfig(ConfigDict):
    """A `ConfigDict` whose errors name the field, what it got and what it accepts."""

    def __setitem__(self, key: str, value: Any) -> None:
        try:
            super().__setitem__(key, value)
        except (KeyError, TypeError, OverflowError):
            name = self._section() + key
            if name in SCHEMA:
                raise TypeError(_wrong(name, value, "a section of fields")) from None
            try:
                field = find_field(name)
            except ConfigError as unknown:
                raise AttributeError(str(unknown)) from None
            raise TypeError(_wrong(name, value, field.accepts)) from None

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            section, keys = self._section(), [*self.keys(), ""]
            near = difflib.get_close_matches(attribute, keys, n=1, cutoff=0.0)[0]
            raise AttributeError(
                f"config.{section}{attribute}: no such field; did you mean config.{section}{near}?"
            ) from None

    def _section(self) -> str:
        """A section is recognised by its fields, so that copies of a config know their fields,
        too."""
        return next((f"{s}." for s, fields in SCHEMA.items() if fields.keys() == set(self)), "")


def base_config() -> ConfigDict:
    """Returns a locked `ConfigDict` with every field of the schema at its default."""
    sections = {section: SchemaConfig(section_defaults(section)) for section in SCHEMA}
    return SchemaConfig(sections).lock()


def paper_recipe(config: ConfigDict, tokens: float) -> ConfigDict:
    """Sets what all models of the paper share (section 4.1): 1M-token batches, AdamW, L and T."""
    config.model.vocab_size = 32_000
    config.model.sequence_length = 4096
    config.model.segment_length = 256
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "attention"  # as little memory as "full" where there is no flash kernel
    train = config.train
    train.global_batch_size = 256  # instances of 4096 tokens: 1M tokens
    train.steps = round(tokens / (256 * 4096))
    train.learning_rate = 2e-4
    train.beta1, train.beta2 = 0.9, 0.95
    train.warmup_fraction = train.dense_warmup_fraction = 0.05
    config.checkpoint.every_steps = 1000
    return config


def parse_argument(argument: str | None, **defaults: int) -> dict[str, int]:
    """Parses the part of `--config=file.py:experts=8,...` after the colon, by the names given."""
    values = dict(defaults)
    for item in filter(None, (argument or "").split(",")):
        name, _, text = item.partition("=")
        if name not in defaults or not text.isdecimal() or len(text) > 18:
            accepted = ", ".join(f"{key}=<integer>" for key in defaults)
            raise ConfigError(f"--config: got argument {shorten(item)!r}; must be {accepted}")
        values[name] = int(text)
    return values


def load_config(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Reads `path.py[:argument]`, applies overrides `("model.num_layers", "3")`, and validates.

    The file is Python that the user chose to run: it must define `get_config(argument)`.
    """
    path_text, _, argument = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ConfigError(f"--config: got {path_text!r}; must be the path of an existing .py file")
    config = _run_recipe(path, argument or None)
    _check_names(config)
    for name, text in overrides:
        set_field(config, name, text)
    validate(config)
    return config


def _run_recipe(path: Path, argument: str | None) -> ConfigDict:
    """What `get_config` of a recipe returns; a mistake in the file is reported with its line."""
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"--config: got {str(path)!r}; must be a Python file ending in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{path}: must define a function get_config(argument)")
        config = module.get_config(argument)
    except ConfigError:
        raise
    except SyntaxError as error:
        is_other = error.filename and error.filename != str(path.absolute())
        where = f"{error.filename if is_other else path}, line {error.lineno}"
        raise ConfigError(f"{where}: SyntaxError: {shorten(error.msg)}") from None
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path.absolute())
        ]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        message = f"{where}: {type(error).__name__}: {shorten(str(error))}"
        raise ConfigError(message) from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path}: get_config returned {_shown(config)}; must return the ConfigDict that "
            "base_config() makes"
        )
    return config


def set_field(config: ConfigDict, name: str, text: str) -> None:
    """Sets the field `section.name` from text, by the type of the field's default."""
    field = find_field(name)
    section, _, key = name.partition(".")
    try:
        config[section][key] = _parse(text, type(field.default))
    except ValueError:
        raise ConfigError(_wrong(name, text, field.accepts)) from None


def _parse(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)


def _wrong(name: str, value: Any, accepts: str) -> str:
    return f"config.{name}: got {_shown(value)}; must be {accepts}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 63:  # Python does not print very large ones
        return f"an integer of {value.bit_length()} bits (at most 63 fit)"
    return shorten(repr(value))


def validate(config: ConfigDict) -> None:
    """Checks every field and how they fit together; raises `ConfigError` at the first mistake."""
    _check_names(config)
    for section, fields in SCHEMA.items():
        for name, field in fields.items():
            try:
                value = config[section][name]
            except RequiredValueError:
                value = None
            if not field.check(value):
                raise ConfigError(_wrong(f"{section}.{name}", value, field.accepts))
    check_model(config.model)
    check_segments(config.model)
    check_expert_layers(config.model)
    check_expert_rank(config.model)
    check_segment_schedule(config.model, config.train)
    check_routing_source(config.model)
    check_sparse(config.model, config.train)
    check_top_k(config.model, config.train)
    check_train(config.train)
    if config.model.num_experts:
        check_phases(config.train)
    data = config.data
    held_out = data.validation_fraction + data.test_fraction + data.confirmation_fraction
    if held_out > 0.5:
        raise ConfigError(
            "config.data.validation_fraction + test_fraction + confirmation_fraction: got "
            f"{held_out}; must be at most 0.5"
        )


def check_fields(section: str, fields: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless each field of a section is usable by itself."""
    for name, field in SCHEMA[section].items():
        if not field.check(fields[name]):
            raise ConfigError(_wrong(f"{section}.{name}", fields[name], field.accepts))


def check_model_fields(fields: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless each field of `config.model` is usable, and all fit together.

    For the config of a run, whose fields may be those of an earlier version.
    """
    check_fields("model", fields)
    check_model(ConfigDict({name: fields[name] for name in SCHEMA["model"]}))


def _check_names(config: ConfigDict) -> None:
    """A recipe may have unlocked the config, or built its own."""
    for section in config:
        if section not in SCHEMA:
            raise ConfigError(
                f"config.{section}: no such section; must be one of {', '.join(SCHEMA)}"
            )
    for section, fields in SCHEMA.items():
        given = config.get(section)
        if not isinstance(given, ConfigDict):
            raise ConfigError(_wrong(section, given, "a section of fields"))
        for name in given:
            find_field(f"{section}.{name}")
        for name in fields:
            if name not in given:
                raise ConfigError(
                    f"config.{section}.{name}: missing; start the recipe from base_config()"
                )
