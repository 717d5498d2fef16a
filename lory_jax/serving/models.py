"""The names under which a run is served, and the routing that each of them stands for.

Letters: Y layers, E experts.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lory_jax.api import Model
from lory_jax.errors import InputError
from lory_jax.generation.merge import domain_routing
from lory_jax.run.directory import RunDirectory
from lory_jax.run.step_choice import Step

NAME = "lory"


def domain_weights(
    model: Model, workdir: Path, step: Step, domains: str, data: Path | None = None
) -> Mapping[str, np.ndarray]:
    """The mean routing weights `[Y, E]` of domains, by name.

    Args:
      model: the model of the run.
      workdir, step: the run and its checkpoint.
      domains: "all", "none", or names separated by commas. A dense or sparse model has none.
      data: where the run's prepared data are, if they were moved.

    Raises:
      InputError: a domain does not exist, or the data cannot be read.
    """
    has_merges = model.config.num_experts > 0 and not model.config.is_sparse
    if domains == "none" or (domains == "all" and not has_merges):
        return {}
    if not has_merges:
        raise InputError(f"domains: got {domains}, must be none: {workdir} merges no experts")
    sets = RunDirectory(workdir, step).open_data(data).held_out_with_instances("validation")
    names = sorted(sets) if domains == "all" else domains.split(",")
    for name in names:
        if name not in sets:
            raise InputError(f"domains: got {name!r}, must be of {', '.join(sorted(sets))}")
    return {name: domain_routing(model.config, model.params, sets[name][:, :-1]) for name in names}
