"""Which fields of a config may change from one process of a run to the next."""

from collections.abc import Mapping
from typing import Any

from lory_jax.config import SCHEMA
from lory_jax.data.manifest import differences

# These fields decide how a run is computed, logged and saved, not what is computed; None means all
# fields of a section. The section `data` is for prepare: the digest of the manifest stands for it.
CHANGEABLE = {
    "model": {"remat", "attention", "attention_sharding"},
    "train": {
        "microbatches",
        "log_every_steps",
        "validate_every_steps",
        "validation_batches",
        "max_skipped_steps",
    },
    "checkpoint": None,
    "parallel": None,
    "data": None,
}


def config_changes(
    found: Mapping[str, Any], wanted: Mapping[str, Any], change_steps: bool
) -> tuple[list[str], list[str]]:
    """Compares the config of a run with the one it is to be resumed with.

    Args:
      found: the config of the run, section by section.
      wanted: the config to resume with.
      change_steps: whether `train.steps` may change.

    Returns:
      the differences that are allowed and those that are not, one line per field.
    """
    allowed: list[str] = []
    refused: list[str] = []
    for section in sorted(found.keys() | wanted.keys()):
        changeable = CHANGEABLE.get(section, set())
        fields, values = SCHEMA.get(section, {}), wanted.get(section, {})
        # The run may be older than a field; it then had the field's default.
        defaults = {name: fields[name].default for name in values if name in fields}
        for line in differences(defaults | found.get(section, {}), values):
            field = line.partition(":")[0]
            may_change = changeable is None or field in changeable
            may_change |= change_steps and (section, field) == ("train", "steps")
            (allowed if may_change else refused).append(f"{section}.{line}")
    if any(line.startswith("train.steps:") for line in refused):
        refused.append("change_steps allows another number of steps")
    return allowed, refused
