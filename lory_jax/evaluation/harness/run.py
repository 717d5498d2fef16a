"""Runs tasks of lm-evaluation-harness on a model, and reports their results."""

import difflib
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
from jinja2 import UndefinedError
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from yaml import YAMLError  # type: ignore[import-untyped]

from lory_jax.api import Model
from lory_jax.errors import ConfigError, InputError
from lory_jax.evaluation.harness.model import DEFAULT_BATCH_SIZE, LoryLM
from lory_jax.evaluation.harness.tasks.data import GROUP, SHIPPED, fetch_task_data, group, members
from lory_jax.storage import local_path

TASK_FILES = Path(__file__).parent / "tasks"
TASK_SUFFIXES = (".yaml", ".yml")
# The metric reported for a task is the first of these that it has; acc_norm is LLaMA's accuracy,
# normalised by characters.
HEADLINES = ("acc_norm", "acc", "exact_match")
NEAR_ENOUGH = 0.75  # similarity of names, from 0 to 1, above which one is suggested
BOOTSTRAP_DRAWS = 1000  # for the few metrics whose standard error has no formula


def run_tasks(
    model: Model,
    tasks: str,
    *,
    routing: str = "prompt",
    batch_size: int | None = None,
    limit: int | None = None,
    tasks_data: Path | None = None,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Runs tasks on a model, and returns their results in the harness's own JSON layout.

    Args:
      model: as `lory_jax.load` returns it.
      tasks: separated by commas: `lory_paper`, tasks in it, any others that the harness or
        `include_path` has, or task files (`my_task.yaml`).
      routing: how the context routes, "prompt" or "segment".
      batch_size: rows at a time; None is 16.
      limit: evaluates only the first documents of each task; None is all.
      tasks_data: where the documents of the group's tasks are; None is the Hugging Face hub.
      include_path: a directory of more task files.

    Raises:
      ConfigError: a name is unknown.
      InputError: a task file is missing or damaged, or a task's documents are missing, damaged or
        too few.
    """
    # The harness warns about the files of its own tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = LoryLM(model, routing, batch_size or DEFAULT_BATCH_SIZE)
    loaded = _load(_names(tasks), tasks_data, include_path)
    for name, task in loaded.items():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        _check_shots(name, task)
    results = evaluate(
        lm, {"tasks": loaded}, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=False
    )
    results["config"] = {
        "model": "lory",
        "model_args": {"routing": routing, "step": model.step},
        "batch_size": lm.batch_size,
        "limit": limit,
        "bootstrap_iters": BOOTSTRAP_DRAWS,
        "fewshot_seed": DEFAULT_OTHER_SEED,
    }
    results["lm_eval_version"] = version("lm_eval")
    return json.loads(json.dumps(results, default=handle_non_serializable))


def fetch_tasks(directory: Path, tasks: str) -> None:
    """Writes the documents of tasks of the group into a local directory, from the hub.

    Raises:
      ConfigError: a name is not in the group.
      InputError: the hub cannot be reached.
    """
    known = members()
    for name in _names(tasks):
        if name not in known:
            raise ConfigError(f"tasks: got {name!r}, must be {GROUP} or one of {', '.join(known)}")
    fetch_task_data(directory, {name: known[name] for name in _names(tasks)})


def task_summary(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each task: the harness's metrics, `shots`, `documents`, and the `metric` to report."""
    tasks = {}
    for name, found in results["results"].items():
        reported = [key for m in HEADLINES for key in found if key.split(",")[0] == m]
        tasks[name] = {key: value for key, value in found.items() if "," in key} | {
            "metric": reported[0] if reported else None,
            "shots": results["n-shot"][name],
            "documents": results["n-samples"][name]["effective"],
        }
    return tasks


def task_table(title: str, tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """What `summary` returns as an aligned table, with the mean of the reported metrics."""
    width = max(len(name) for name in [*tasks, title])
    lines = [f"{title:{width}}  shots  documents  metric         value  standard error"]
    values = []
    for name, task in tasks.items():
        line = f"{name:{width}}  {task['shots']:5}  {task['documents']:9,}"
        if task["metric"]:
            metric, _, kind = task["metric"].partition(",")
            values.append(task[task["metric"]])
            error = task.get(f"{metric}_stderr,{kind}")
            line += f"  {metric:11}  {values[-1]:7.4f}"
            line += f"  {error:14.4f}" if isinstance(error, float) else ""
        lines.append(line)
    if values:
        lines.append(f"{'mean':{width}}{'':31}  {statistics.fmean(values):7.4f}")
    return "\n".join(lines)


def list_tasks() -> str:
    """Lists the group's tasks, their shots, and where their documents come from."""
    lines = [f"{GROUP}:", f"  {'task':14}shots  data set"]
    for name, item in members().items():
        source = item["dataset_kwargs"]
        where = " ".join(filter(None, (source["path"], source.get("name"))))
        lines.append(f"  {name:14}{item['num_fewshot']:5}  {where} ({', '.join(source['splits'])})")
    lines.append("Any other task of lm-evaluation-harness runs by its name (lm-eval ls tasks).")
    return "\n".join(lines)


def _names(tasks: str) -> list[str]:
    """The names with the group replaced by its tasks; each occurs once."""
    names: dict[str, None] = {}
    for name in tasks.split(","):
        name = str(local_path(name)) if name.endswith(TASK_SUFFIXES) else name
        names.update(dict.fromkeys(members() if name == GROUP else [name]))
    return list(names)


def _load(
    names: Sequence[str], tasks_data: Path | None, include_path: Path | None = None
) -> dict[str, Task]:
    """Loads tasks in the order given; those of the group have its shots and documents."""
    known = {item["task"]: item for item in group()["task"]}
    others = [name for name in names if name not in known]
    manager = _manager(bool(others), tasks_data, include_path)
    for name in others:
        _check_known(name, manager)
    tasks: dict[str, Task] = {}
    for name in names:
        spec: Any = {**group(), "task": [known[name]]} if name in known else name
        try:
            # One by one: a name can be a group of the harness, and an error belongs to its task.
            tasks |= manager.load([spec])["tasks"]
        except InputError:
            raise
        except (KeyError, UndefinedError) as error:  # from the functions and templates of a task
            raise InputError(f"{name}: its documents lack a column ({error})") from None
        except (OSError, ValueError, TypeError, ImportError, AttributeError, YAMLError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(f"{name}: cannot load ({reason})") from None
    return tasks


def _manager(has_others: bool, tasks_data: Path | None, include_path: Path | None) -> TaskManager:
    """The harness's index of tasks; `has_others` says that some are not in the group."""
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"include_path: {include_path}: no such directory")
    shipped = Path(lm_eval.tasks.__file__).parent
    mine = [TASK_FILES, *([include_path] if include_path else [])]
    return TaskManager(
        # It takes the harness ten seconds to read all of its thousands of files.
        include_defaults=has_others,
        include_path=mine if has_others else [*(shipped / path for path in SHIPPED), TASK_FILES],
        metadata={"tasks_data": tasks_data} if tasks_data else {},
    )


def _check_known(name: str, manager: TaskManager) -> None:
    """Raises where a name is neither a task of the harness nor a task file."""
    if name.endswith(TASK_SUFFIXES):
        if not Path(name).is_file():
            raise InputError(f"tasks: {name}: no such file")
    elif name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [GROUP, *manager.all_tasks], n=1, cutoff=NEAR_ENOUGH)
        hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them"
        raise ConfigError(
            f"tasks: got {name!r}, must be {GROUP}, a task in it, another task of the harness or a "
            f"task file (.yaml); {hint}"
        )


def _check_shots(name: str, task: Task) -> None:
    """Raises where there are too few documents to draw demonstrations from.

    The harness draws one more than it needs, in case it draws the document in question.
    """
    shots = task.config.num_fewshot
    available = len(list(task.fewshot_docs() or []))
    if shots and available <= shots:
        raise InputError(
            f"{name}: got {available} documents for {shots} demonstrations, requires at least "
            f"{shots + 1}"
        )
