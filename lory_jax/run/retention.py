"""Which checkpoints of a run are kept, and which of them is the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retention:
    """Keeps the newest checkpoints, the best ones, and one every `every_steps` steps.

    Attributes:
      newest: how many of the newest are kept; at least 1.
      best: how many are kept of those with the lowest validation loss. Only checkpoints saved
        right after a validation have one.
      every_steps: checkpoints at a multiple of this step are kept for good; 0 for none.
    """

    newest: int
    best: int = 0
    every_steps: int = 0

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps to keep, out of all steps with their validation losses."""
        steps = sorted(losses)
        kept = set(steps[-self.newest :]) | set(best_first(losses)[: self.best])
        if self.every_steps:
            kept |= {step for step in steps if step % self.every_steps == 0}
        return kept


def best_first(losses: Mapping[int, float | None]) -> list[int]:
    """The steps that have a validation loss, the lowest loss first."""
    known = [
        (loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)
    ]
    return [step for _, step in sorted(known)]


@dataclass(frozen=True)
class OrbaxPolicy:
    """`Retention` in the form that Orbax requires; the caller fills in `losses` as it saves."""

    retention: Retention
    losses: Mapping[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.retention.kept({step: self.losses.get(step) for step in steps})
        return [step in kept for step in steps]
