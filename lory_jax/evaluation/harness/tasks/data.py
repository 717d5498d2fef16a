"""The documents of the tasks: from the Hugging Face hub, or from a local directory.

    DIR/<task>/<split>.parquet   or   DIR/<task>/<split>.jsonl

`lory_paper.yaml` names the splits that a task reads; columns are those of its data set on the hub.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, load_dataset
from lm_eval.tasks._yaml_loader import load_yaml

from lory_jax.errors import InputError

GROUP = "lory_paper"
# Directories of lm_eval/tasks that hold the group's tasks.
SHIPPED = (
    "arc",
    "glue/mrpc",
    "glue/sst2",
    "hellaswag",
    "nq_open",
    "piqa",
    "race",
    "siqa",
    "super_glue/boolq",
    "triviaqa",
    "winogrande",
)
FETCH = "python -m lory_jax.evaluate --tasks={task} --fetch_tasks={directory}"


def group(resolve: bool = True) -> dict[str, Any]:
    """The group file; `resolve` imports the functions that it names."""
    return load_yaml(Path(__file__).parent / f"{GROUP}.yaml", resolve_func=resolve)


def members() -> dict[str, dict[str, Any]]:
    """The group's entry for each of its tasks, by name."""
    return {item["task"]: item for item in group(resolve=False)["task"]}


def load_task(
    task: str,
    path: str,
    splits: Iterable[str],
    name: str | None = None,
    tasks_data: str | Path | None = None,
    **metadata: Any,
) -> dict[str, Dataset]:
    """The splits of a task, by name; the harness calls this with its metadata.

    Args:
      task, path, splits, name: from the group file: the task, its data set on the hub, the splits
        that it reads, and the configuration of the data set.
      tasks_data: a local directory; None is the hub (or its cache on this machine).
      metadata: other facts that the harness passes about the run.

    Raises:
      InputError: a file is missing or damaged, or the hub cannot be reached.
    """
    if tasks_data is not None:
        return {split: read_split(Path(tasks_data), task, split) for split in splits}
    return _download(task, path, name, splits)


def read_split(directory: Path, task: str, split: str) -> Dataset:
    """One split of a task from the local directory."""
    path = directory / task / split
    if path.with_suffix(".parquet").is_file():
        path = path.with_suffix(".parquet")
        read: Callable[[Path], Dataset] = _parquet
    elif path.with_suffix(".jsonl").is_file():
        path = path.with_suffix(".jsonl")
        read = _json_lines
    else:
        command = FETCH.format(task=task, directory=directory)
        raise InputError(
            f"{path}.parquet: missing, and so is the .jsonl; where there is a network, {command} "
            "fetches it"
        )
    try:
        dataset = read(path)
    except pyarrow.lib.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not {path.suffix[1:]} of one type per column ({reason})"
        ) from None
    if not len(dataset):
        raise InputError(f"{path}: no documents, requires at least one")
    return dataset


def fetch_task_data(directory: Path, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the splits of these `members` into a local directory, from the hub.

    Raises:
      InputError: the hub cannot be reached.
    """
    for task, item in tasks.items():
        arguments = item["dataset_kwargs"]
        for split, dataset in load_task(**arguments).items():
            path = directory / task / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.tmp")
            dataset.to_parquet(str(temporary))
            temporary.replace(path)
            print(f"{path}: {len(dataset):,} documents")


def _download(task: str, path: str, name: str | None, splits: Iterable[str]) -> dict[str, Dataset]:
    splits = list(splits)
    try:
        return dict(zip(splits, load_dataset(path, name, split=splits), strict=True))
    except (OSError, ValueError) as error:  # ValueError: no such configuration or split
        raise InputError(
            f"{task}: cannot load the data set {path} from the Hugging Face hub "
            f"({str(error).splitlines()[0]}); a directory written by "
            f"{FETCH.format(task=task, directory='DIR')} can be read instead (tasks_data=DIR)"
        ) from None


def _parquet(path: Path) -> Dataset:
    return Dataset(pyarrow.parquet.read_table(path))


def _json_lines(path: Path) -> Dataset:
    rows = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: got {line[:40]!r}, must be a JSON object")
        rows.append(row)
    return Dataset.from_list(rows)
