"""Which fields of a config may change from one process of a run to the next."""

from collections.abc import Mapping
from typing import Any

from lory_jax.config import may_change, section_defaults
from lory_jax.data.manifest import differences


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
        # The run may be older than a field; it then had the field's default.
        values, known = wanted.get(section, {}), section_defaults(section)
        defaults = {name: known[name] for name in values if name in known}
        for line in differences(defaults | found.get(section, {}), values):
            field = line.partition(":")[0]
            is_allowed = may_change(section, field)
            is_allowed |= change_steps and (section, field) == ("train", "steps")
            (allowed if is_allowed else refused).append(f"{section}.{line}")
    if any(line.startswith("train.steps:") for line in refused):
        refused.append("change_steps allows another number of steps")
    return allowed, refused
