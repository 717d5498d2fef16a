"""Stage `plan`: which inputs there are, and which of them each reading task gets."""

import json
from pathlib import Path
from typing import Any

from lory_jax.preparation.engine.work import Facts, Work
from lory_jax.preparation.sources.inputs import Input
from lory_jax.preparation.stages import inputs as corpus

PLAN_NAME = "plan.json"


def count(work: Work) -> int:
    """One task."""
    return 1


def run(work: Work, task: int, out: Path) -> Facts:
    """Lists the inputs and groups them."""
    inputs = corpus.inputs_of(work.settings)
    tasks = corpus.group_into_tasks(inputs)
    plan = {"inputs": corpus.to_records(inputs), "tasks": tasks}
    (out / PLAN_NAME).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return Facts(values={"tasks": len(tasks)})


def load(work: Work) -> dict[str, Any]:
    """Returns the inputs and the groups."""
    return json.loads((work.directory("plan") / PLAN_NAME).read_text("utf-8"))


def inputs_of(work: Work, task: int) -> list[Input]:
    """Returns the inputs of a reading task."""
    plan = load(work)
    return [Input(**plan["inputs"][i]) for i in plan["tasks"][task]]
