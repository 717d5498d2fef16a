"""Whether a directory is prepared already."""

from pathlib import Path
from typing import Any

from lory_jax.config import section_defaults
from lory_jax.data.manifest import MANIFEST_NAME, differences
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.preparation.stages.inputs import changes, inputs_of, to_records
from lory_jax.storage import is_remote

ONCE = {"drop_near_duplicates": False}  # fields of `config.data` in directories that lack them


def is_prepared(out: Path, settings: dict[str, Any]) -> bool:
    """Returns whether `out` is complete, intact and made with these settings from this corpus.

    Raises:
      InputError: `out` is neither prepared data nor new: it holds something else, was prepared with
        other settings or from another state of the corpus, or is damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).exists():
        if is_remote(out):
            return False  # an upload that was interrupted
        raise InputError(
            f"out: {out} exists and has no {MANIFEST_NAME}; must be a new or empty directory, "
            "or one that prepare wrote"
        )
    data = PreparedData.open(out)
    # A field younger than the directory had its default, unless it changed what is done.
    found = dict(data.manifest.settings)
    if "data" in found:
        found["data"] = section_defaults("data") | ONCE | found["data"]
        found["data"].pop("mixture", None)  # says how `train` reads the directory
    if differs := differences(found, settings):
        raise InputError(
            f"out: {out} was prepared with other settings ({'; '.join(differs)}); "
            "choose another directory or remove it"
        )
    if data.manifest.inputs:
        inputs = to_records(inputs_of(settings))
        if changed := changes(data.manifest.inputs, inputs):
            raise InputError(
                f"out: {out} was prepared from another state of the corpus ({changed}); "
                "choose another directory or remove it"
            )
    data.verify(hashes=True)
    return True
