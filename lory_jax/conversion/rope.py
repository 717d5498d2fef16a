"""The rotary embedding in a Hugging Face config.json, and in `config.model`."""

import math
from collections.abc import Mapping
from typing import Any

from lory_jax.conversion.hf_fields import flag, number, size
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig

# Hugging Face's names for the fields of rope scaling, our names, and the rope types that read them.
ROPE_SCALING = {
    "factor": ("rope_factor", ("linear", "llama3", "yarn", "dynamic")),
    "low_freq_factor": ("rope_low_frequency_factor", ("llama3",)),
    "high_freq_factor": ("rope_high_frequency_factor", ("llama3",)),
    "original_max_position_embeddings": ("rope_original_length", ("llama3", "yarn")),
    "beta_fast": ("rope_beta_fast", ("yarn",)),
    "beta_slow": ("rope_beta_slow", ("yarn",)),
    "attention_factor": ("rope_attention_factor", ("yarn",)),
    "truncate": ("rope_truncate", ("yarn",)),
}
# What transformers takes for fields that may be missing.
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def rope_parameters(model_config: ModelConfig) -> dict[str, Any]:
    """The rope type and what it reads, under Hugging Face's names."""
    kind = model_config.rope_scaling
    if kind == "none":
        return {"rope_type": "default"}
    read = {theirs: ours for theirs, (ours, kinds) in ROPE_SCALING.items() if kind in kinds}
    values = {theirs: getattr(model_config, ours) for theirs, ours in read.items()}
    if not values.get("attention_factor"):
        values.pop("attention_factor", None)  # theirs is computed alike
    return {"rope_type": kind} | values


def rope_fields(contents: Mapping[str, Any], length: int, name: str) -> dict[str, Any]:
    """Our fields of the rotary embedding, for a model of `length` positions."""
    # As in transformers 5, rope_scaling (the older name) wins; either may hold the base or omit it.
    field = "rope_scaling" if contents.get("rope_scaling") else "rope_parameters"
    rope = contents.get(field) or {}
    inside = f"{name}: {field}"
    if not isinstance(rope, Mapping):
        raise InputError(f"{inside}: got {rope!r}; must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn", "dynamic"):
        raise InputError(
            f"{inside}: got rope_type {kind!r}; must be 'default', 'linear', 'llama3', 'yarn' or "
            "'dynamic'"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{inside}.partial_rotary_factor: got {rope['partial_rotary_factor']}; must be 1.0"
        )
    theta = number(contents, "rope_theta", name, 10_000.0)
    fields: dict[str, Any] = {"rope_theta": number(rope, "rope_theta", name, theta)}
    if kind == "default":
        return fields
    rope = _with_rope_defaults(rope, contents, length, kind, inside)
    for theirs, (ours, kinds) in ROPE_SCALING.items():
        if kind not in kinds or (theirs == "attention_factor" and rope.get(theirs) is None):
            continue
        if ours == "rope_original_length":
            fields[ours] = size(rope, theirs, inside)
        elif ours == "rope_truncate":
            fields[ours] = flag(rope, theirs, inside)
        else:
            fields[ours] = number(rope, theirs, inside)
    return fields | {"rope_scaling": kind}


def _with_rope_defaults(
    rope: Mapping[str, Any], contents: Mapping[str, Any], length: int, kind: str, inside: str
) -> dict[str, Any]:
    """The fields of rope scaling with what transformers takes for missing ones."""
    original = "original_max_position_embeddings"
    found = {key: value for key, value in rope.items() if value is not None}
    if contents.get(original) is not None:
        found[original] = contents[original]
    if kind != "yarn":
        return found
    found = {original: length} | YARN_DEFAULTS | found
    found.setdefault("factor", length / size(found, original, inside))
    scales = [found.get(key) for key in ("mscale", "mscale_all_dim")]
    if all(scales) and "attention_factor" not in found:
        factor = number(found, "factor", inside)
        above, below = (
            1.0 if factor <= 1 else 0.1 * number(found, key, inside) * math.log(factor) + 1.0
            for key in ("mscale", "mscale_all_dim")
        )
        found["attention_factor"] = above / below
    return found
