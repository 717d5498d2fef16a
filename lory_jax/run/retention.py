"""Which checkpoints of a run stay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retention:
    """The newest, the best by validation loss, and every so many steps; the rest may go.

    Attributes:
      newest: at least 1: the newest checkpoint always stays.
      best: of those saved right after a validation, so many with the lowest loss.
      every_steps: those at a multiple of it stay for good; 0 for none.
    """

    newest: int
    best: int = 0
    every_steps: int = 0

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of all steps with their validation losses."""
        steps = sorted(losses)
        known = [(loss, step) for step, loss in losses.items() if _is_number(loss)]
        kept = set(steps[-self.newest :]) | {step for _, step in sorted(known)[: self.best]}
        if self.every_steps:
            kept |= {step for step in steps if step % self.every_steps == 0}
        return kept


def _is_number(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


@dataclass(frozen=True)
class OrbaxPolicy:
    """`Retention` as Orbax asks for it; `losses` is filled in by who saves."""

    retention: Retention
    losses: Mapping[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.retention.kept({step: self.losses.get(step) for step in steps})
        return [step in kept for step in steps]
