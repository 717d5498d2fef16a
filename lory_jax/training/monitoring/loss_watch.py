"""Watches the losses of a run for skipped steps and spikes."""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lory_jax.errors import Diverged
from lory_jax.storage import write_atomically

WINDOW = 50  # a loss is compared with those of this many previous steps
FEWEST = 20  # no comparison with fewer previous steps
SPIKE = 6.0  # a spike is this many standard deviations above their mean


class LossWatch:
    """Counts skipped steps, and says which losses stand out.

    Attributes:
      recent: the losses of the last good steps.
      skipped: steps skipped since the run began.
      in_a_row: how many of the latest steps were skipped without a good step in between.
    """

    def __init__(self, losses: Iterable[float], counts: Mapping[str, int] | None = None):
        """`losses` of the steps before this process, and its `counts` at the checkpoint."""
        self.recent = deque((loss for loss in losses if math.isfinite(loss)), WINDOW)
        counts = counts or {"skipped": 0, "in_a_row": 0}
        self.skipped, self.in_a_row = counts.get("skipped", 0), counts.get("in_a_row", 0)

    def counts(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def saw(self, loss: float, was_skipped: bool) -> dict[str, Any]:
        """Reads the next step's loss; returns what to add to its line of metrics."""
        if was_skipped:
            self.skipped += 1
            self.in_a_row += 1
            return {"skipped": True}
        self.in_a_row = 0
        is_spike = len(self.recent) >= FEWEST and loss > self._limit()
        self.recent.append(loss)
        return {"loss_spike": True} if is_spike else {}

    def _limit(self) -> float:
        return statistics.fmean(self.recent) + SPIKE * statistics.pstdev(self.recent)


def diverged(
    path: Path, step: int, watch: LossWatch, norms: tuple[Any, Any], record_ids: np.ndarray
) -> Diverged:
    """Writes down what is known about the last of many skipped steps; returns the error.

    Args:
      path: where to write.
      step: the last step skipped.
      watch: knows how many steps were skipped.
      norms: those of parameters and gradients, leaf by leaf, layer by layer (`step.make_norms`).
      record_ids: the instances of its batch.
    """
    params, gradients = ({name: leaf.tolist() for name, leaf in _named(tree)} for tree in norms)
    contents = {
        "step": step,
        **watch.counts(),
        "recent_losses": list(watch.recent),
        "parameter_norms": params,
        "gradient_norms": gradients,
        "record_ids": record_ids.tolist(),
    }
    if jax.process_index() == 0:
        write_atomically(path, json.dumps(contents, indent=1) + "\n")
    return Diverged(
        f"step {step}: the loss or gradient was NaN or infinite {watch.in_a_row} times in a row; "
        f"norms and record ids are in {path}. Resuming would fail again at this step: lower "
        "config.train.learning_rate in a new run, which may start from this one's parameters"
    )


def _named(tree: Any) -> list[tuple[str, np.ndarray]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
    return [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves]
