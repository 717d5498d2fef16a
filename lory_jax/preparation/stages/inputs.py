"""The inputs of a corpus as stages see them: grouped into tasks, and compared with earlier ones."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lory_jax.preparation.sources.inputs import Input, list_inputs
from lory_jax.preparation.sources.records import ReadOptions

TASK_BYTES = 64 * 2**20
NAMED = 3  # inputs that a message about a changed corpus names

Settings = dict[str, Any]


def sources(settings: Settings) -> list[str]:
    """The sources that were given; a single one is stored as it is."""
    given = settings["source"]
    return [given] if isinstance(given, str) else list(given)


def read_options(settings: Settings) -> ReadOptions:
    """How records become documents; what is not in the settings has its default."""
    keys = settings.get("reading", {})
    names = ("text_key", "domain_key", "source_key")
    return ReadOptions(
        **{name: keys[name] for name in names if name in keys},
        max_domain_bytes=settings["data"]["max_domain_bytes"],
        seed=settings["seed"],
    )


def inputs_of(settings: Settings) -> list[Input]:
    """Everything that is read, in order."""
    return list_inputs(sources(settings))


def group_into_tasks(inputs: Sequence[Input]) -> list[list[int]]:
    """Groups inputs into tasks of about 64 MiB; the grouping depends on nothing but the inputs."""
    groups: list[list[int]] = []
    size = 0
    for i, each in enumerate(inputs):
        # A part of a file is a task of its own.
        mine = each.size if each.part is None else TASK_BYTES
        if not groups or size + mine > TASK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += mine
    return groups


def to_records(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Returns the inputs as the plan holds them."""
    return [asdict(each) for each in inputs]


def to_files(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the files of the inputs as the manifest holds them: path, size and stamp."""
    files = {each["path"]: each for each in records}
    return [{key: each[key] for key in ("path", "size", "stamp")} for each in files.values()]


def changes(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> str:
    """Returns in words how a corpus differs from what it was, or "" if it does not."""
    before, now = ({each["path"]: each for each in to_files(files)} for files in (found, wanted))
    kinds = {
        "new": [path for path in now if path not in before],
        "missing": [path for path in before if path not in now],
        "changed": [path for path in now if path in before and now[path] != before[path]],
    }
    if not any(kinds.values()):
        return ""
    counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in kinds.items() if paths)
    named = [path for paths in kinds.values() for path in paths][:NAMED]
    return f"{counts}: {', '.join(named)}{', …' if sum(map(len, kinds.values())) > NAMED else ''}"
