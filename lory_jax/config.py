"""The schema of a run: every field with its default, its meaning and unit, and its check.

A recipe in `configs/` calls `base_config()`, sets what differs, and returns the `ConfigDict`.
`load_config` reads a recipe and applies `--config.field=value` overrides; `validate` checks every
field and how they fit together. All errors are `ConfigError`s that name the field.
"""

import difflib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections

from lory_jax.errors import ConfigError
from lory_jax.model.sparse.capacity import EXPERT_CHOICE, SPARSE, TOKEN_CHOICE


@dataclass(frozen=True)
class Field:
    """One config field: its default, what it means (with unit), and what it accepts."""

    default: Any
    meaning: str
    accepts: str
    check: Callable[[Any], bool]


def _int(default: int, meaning: str, low: int) -> Field:
    return Field(default, meaning, f"an integer of at least {low}", lambda v: v >= low)


def _float(default: float, meaning: str, low: float, high: float = math.inf) -> Field:
    accepts = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number from {low:g}"
    return Field(default, meaning, accepts, lambda v: math.isfinite(v) and low <= v <= high)


def _choice(meaning: str, *choices: str) -> Field:
    return Field(choices[0], meaning, "one of " + ", ".join(choices), lambda v: v in choices)


def _bool(default: bool, meaning: str) -> Field:
    return Field(default, meaning, "true or false", lambda v: isinstance(v, bool))


SCHEMA: dict[str, dict[str, Field]] = {
    "model": {
        "vocab_size": _int(32_000, "tokens in the vocabulary", 259),
        "num_layers": _int(24, "transformer layers", 1),
        "embed_dim": _int(1024, "model width D", 2),
        "num_heads": _int(16, "attention heads H", 1),
        "num_kv_heads": _int(0, "heads of keys and values G; 0 is as many as num_heads", 0),
        "mlp_dim": _int(2816, "hidden width F of the FFN, and of each expert", 1),
        "num_experts": _int(8, "expert FFNs per layer E; 0 is the dense baseline", 0),
        "sequence_length": _int(4096, "tokens per training instance L", 1),
        "segment_length": _int(256, "tokens per routing segment T", 1),
        "routing": _choice(
            "causal is Lory; the others are baselines (docs/baselines.md)",
            "causal",
            "prefix",
            *SPARSE,
        ),
        "first_segment_routing": _choice(
            "segment 1: its own mean (the paper) or 1/E each (strictly causal)", "self", "uniform"
        ),
        "capacity_factor": _float(
            1.0, "sparse baselines: slots of all experts over choices of all tokens", 0.0
        ),
        "routing_group": _int(
            0, "sparse baselines: sequences that compete for slots; 0 is a whole microbatch", 0
        ),
        "load_balancing_weight": _float(
            0.01, "top1, top2: weight of the load-balancing loss, summed over layers", 0.0
        ),
        "router_init_scale": _float(0.23, "router starts at N(0, (scale/sqrt(D))^2)", 0.0),
        "tie_embeddings": _bool(False, "the output head is the embedding, transposed"),
        "rope_theta": _float(10_000.0, "base of the rotary position embedding", 1.0),
        "rope_scaling": _choice(
            "which rotations are slowed: none, all, or slow ones (Llama 3.1)",
            "none",
            "linear",
            "llama3",
        ),
        "rope_factor": _float(1.0, "by how much rope_scaling slows them", 1.0),
        "rope_low_frequency_factor": _float(
            1.0, "llama3: slowed in full are waves longer than the original length over it", 1e-6
        ),
        "rope_high_frequency_factor": _float(
            4.0, "llama3: kept are waves shorter than the original length over it", 1e-6
        ),
        "rope_original_length": _int(8192, "llama3: positions before it was slowed", 1),
        "norm_epsilon": _float(1e-5, "added to the mean square in RMSNorm", 0.0, 1.0),
        "compute_dtype": _choice("type of matrix products", "bfloat16", "float32"),
        "remat": _choice("what the backward pass recomputes per layer", "none", "full", "dots"),
        "attention": _choice(
            "auto is cudnn on GPUs, splash on TPUs, else xla", "auto", "xla", "cudnn", "splash"
        ),
        "merged_ffn": _choice(
            "auto is kernel on TPUs if it fits, whole on CPUs, else blocks",
            "auto",
            "einsum",
            "whole",
            "blocks",
            "kernel",
        ),
        "attention_sharding": _choice(
            "over `tensor`: sequences, or heads (more devices than sequences)", "batch", "heads"
        ),
        "scan_layers": _bool(True, "scan over the layers rather than unroll them"),
    },
    "train": {
        "steps": _int(1000, "optimiser steps", 1),
        "global_batch_size": _int(256, "instances per step over all devices", 1),
        "microbatches": _int(1, "parts of a batch whose gradients are accumulated", 1),
        "seed": _int(0, "seed of initialisation and of the data order", 0),
        "learning_rate": _float(2e-4, "peak learning rate", 0.0),
        "warmup_fraction": _float(0.05, "share of the steps with linear warm-up", 0.0, 1.0),
        "final_learning_rate_fraction": _float(0.1, "last over peak learning rate", 0.0, 1.0),
        "dense_warmup_fraction": _float(
            0.05, "share of the steps that train the dense model before upcycling", 0.0, 1.0
        ),
        "beta1": _float(0.9, "AdamW: decay of the first moment", 0.0, 1.0),
        "beta2": _float(0.95, "AdamW: decay of the second moment", 0.0, 1.0),
        "epsilon": _float(1e-8, "AdamW: added to the root of the second moment", 0.0),
        "first_moment_dtype": _choice("AdamW: type of the first moment", "float32", "bfloat16"),
        "weight_decay": _float(0.1, "AdamW: decoupled decay of matrices (not of norms)", 0.0),
        "clip_norm": _float(1.0, "largest global gradient norm; 0 turns clipping off", 0.0),
        "log_every_steps": _int(10, "steps between console lines", 1),
        "validate_every_steps": _int(100, "steps between validations", 1),
        "validation_batches": _int(8, "batches per domain in a validation inside the loop", 1),
        "max_skipped_steps": _int(
            10, "steps in a row with a NaN or infinite loss or gradient that stop the run", 1
        ),
    },
    "checkpoint": {
        "every_steps": _int(1000, "steps between checkpoints", 1),
        "every_minutes": _float(0.0, "minutes between checkpoints as well; 0 for steps only", 0.0),
        "keep": _int(2, "newest checkpoints kept", 1),
        "keep_best": _int(0, "checkpoints kept as well: those of the lowest validation losses", 0),
        "keep_every_steps": _int(0, "kept for good: checkpoints at multiples of it; 0 for none", 0),
    },
    "parallel": {
        "data": _int(1, "devices on the mesh axis data", 1),
        "fsdp": _int(0, "devices on the mesh axis fsdp; 0 takes all that remain", 0),
        "tensor": _int(1, "devices on the mesh axis tensor", 1),
    },
    "data": {
        "min_document_bytes": _int(200, "shorter documents are dropped", 1),
        "max_document_bytes": _int(100_000, "longer documents are cut into pieces", 1),
        "max_domain_bytes": _int(0, "bytes kept per domain; 0 keeps all", 0),
        "validation_fraction": _float(0.04, "share of each domain's bytes for validation", 0, 0.5),
        "test_fraction": _float(0.06, "share of each domain's bytes for test", 0, 0.5),
        "embedding_dim": _int(256, "dimensions of the document embedding", 2),
        "num_neighbors": _int(20, "neighbours per document in the similarity graph", 1),
        "tokenizer_sample_bytes": _int(20_000_000, "bytes of train the tokenizer learns from", 1),
        "instances_per_shard": _int(8192, "instances in one ArrayRecord file", 1),
    },
}


def base_config() -> ml_collections.ConfigDict:
    """Returns a locked `ConfigDict` with every field of the schema at its default."""
    config = ml_collections.ConfigDict(
        {
            section: {name: field.default for name, field in fields.items()}
            for section, fields in SCHEMA.items()
        }
    )
    return config.lock()


def paper_recipe(config: ml_collections.ConfigDict, tokens: float) -> ml_collections.ConfigDict:
    """Sets what all models of the paper share (section 4.1): 1M-token batches, AdamW, L and T."""
    config.model.vocab_size = 32_000
    config.model.sequence_length = 4096
    config.model.segment_length = 256
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
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
        if name not in defaults or not text.isdigit():
            takes = ", ".join(f"{key}=<integer>" for key in defaults)
            raise ConfigError(f"--config: got argument {item!r}, takes {takes}")
        values[name] = int(text)
    return values


def load_config(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> ml_collections.ConfigDict:
    """Reads `path.py[:argument]`, applies overrides `("model.num_layers", "3")`, and validates.

    The file is Python that the user chose to run: it must define `get_config(argument)`.
    """
    path_text, _, argument = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ConfigError(f"--config: got {path_text!r}, takes the path of an existing .py file")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"--config: got {path_text!r}, takes a Python file ending in .py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = module.get_config(argument or None)
    for name, text in overrides:
        set_field(config, name, text)
    validate(config)
    return config


def set_field(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets the field `section.name` from text, by the type of the field's default."""
    field = find_field(name)
    section, _, key = name.partition(".")
    try:
        config[section][key] = _parse(text, type(field.default))
    except ValueError:
        raise ConfigError(f"config.{name}: got {text!r}, takes {field.accepts}") from None


def _parse(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)


def find_field(name: str) -> Field:
    """Returns the schema's field `section.name`, or raises with the nearest name."""
    section, _, key = name.partition(".")
    field = SCHEMA.get(section, {}).get(key)
    if field is None:
        known = [f"{s}.{k}" for s, fields in SCHEMA.items() for k in fields]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"config.{name}: no such field; did you mean config.{near}?")
    return field


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every field and how they fit; raises `ConfigError` at the first fault."""
    for section, fields in SCHEMA.items():
        for name, field in fields.items():
            value = config[section][name]
            if not field.check(value):
                raise ConfigError(f"config.{section}.{name}: got {value!r}, takes {field.accepts}")
    model, train = config.model, config.train
    if model.segment_length > model.sequence_length:
        raise ConfigError(
            f"config.model.segment_length: got {model.segment_length}, "
            f"takes at most config.model.sequence_length ({model.sequence_length})"
        )
    _validate_sparse(model, train)
    if model.embed_dim % model.num_heads or (model.embed_dim // model.num_heads) % 2:
        raise ConfigError(
            f"config.model.num_heads: got {model.num_heads}, takes a divisor of "
            f"config.model.embed_dim ({model.embed_dim}) that leaves an even head width"
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"config.model.num_kv_heads: got {model.num_kv_heads}, takes a divisor of "
            f"config.model.num_heads ({model.num_heads}), or 0 for as many"
        )
    if model.rope_low_frequency_factor >= model.rope_high_frequency_factor:
        raise ConfigError(
            f"config.model.rope_low_frequency_factor: got {model.rope_low_frequency_factor}, takes "
            f"less than rope_high_frequency_factor ({model.rope_high_frequency_factor})"
        )
    if train.global_batch_size % train.microbatches:
        raise ConfigError(
            f"config.train.microbatches: got {train.microbatches}, takes a divisor of "
            f"config.train.global_batch_size ({train.global_batch_size})"
        )
    if train.beta1 >= 1 or train.beta2 >= 1:
        raise ConfigError(
            f"config.train.beta1, beta2: got {train.beta1}, {train.beta2}, take numbers below 1"
        )
    if config.data.validation_fraction + config.data.test_fraction > 0.5:
        raise ConfigError(
            "config.data.validation_fraction + test_fraction: got "
            f"{config.data.validation_fraction + config.data.test_fraction}, take at most 0.5"
        )


def _validate_sparse(model: ml_collections.ConfigDict, train: ml_collections.ConfigDict) -> None:
    """Checks what only the sparse baselines need; a dense model (no experts) ignores it."""
    if model.routing not in SPARSE or not model.num_experts:
        return
    factor, experts = model.capacity_factor, model.num_experts
    choices = TOKEN_CHOICE.get(model.routing, max(1, round(factor)))
    if choices > experts:
        raise ConfigError(
            f"config.model.num_experts: got {experts}, takes at least {choices}: every token has "
            f"so many (config.model.routing={model.routing})"
        )
    if not factor:
        raise ConfigError("config.model.capacity_factor: got 0.0, takes a number above 0")
    if model.routing in EXPERT_CHOICE and model.first_segment_routing == "uniform":
        raise ConfigError(
            "config.model.first_segment_routing: got 'uniform', takes self with "
            f"config.model.routing={model.routing}: between equal weights there is no choice"
        )
    rows = train.global_batch_size // train.microbatches
    if model.routing_group and rows % model.routing_group:
        raise ConfigError(
            f"config.model.routing_group: got {model.routing_group}, takes a divisor of the {rows} "
            "sequences of a microbatch, or 0"
        )


def describe_fields() -> str:
    """Returns one line per field for `--help`."""
    lines = [
        f"  --config.{section}.{name}  {field.meaning} ({field.accepts}; {field.default!r})"
        for section, fields in SCHEMA.items()
        for name, field in fields.items()
    ]
    return "config fields (meaning, accepted values, default of the schema):\n" + "\n".join(lines)
