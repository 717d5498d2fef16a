"""The two kinds of things that the study trains.

A *family* is tuned: every one has the same number of trials, each a point of a grid, judged on
validation. The best of these short trials is repeated at full length, with its learning rate and
others, because the rate that is best after a quarter of the steps is too high for all of them. An
*arm* is trained with several seeds at the best point of its family, changed by the arm's own
settings. Settings are config fields without the `config.` before them; all else is
tools/study/recipe.py.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRIAL_STEPS, STEPS = 400, 1500
RATE = "train.learning_rate"

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Trials of one kind of model.

    Attributes:
      settings: what all its trials share.
      grid: the values of every field that is tuned; their product has `TRIALS` points.
      group: the place in the order of runs; lower comes first.
      cost: a guess of a step's seconds, as a multiple of the dense model's.
      steps: of a short trial.
      long_factors: what the best learning rate is multiplied by in the long ones.
      end_factors: others, above or below all of those, each tried only where the nearest of them
        was the best.
    """

    name: str
    settings: Settings
    grid: Mapping[str, tuple[float, ...]]
    group: int
    cost: float = 1.0
    steps: int = TRIAL_STEPS
    long_factors: tuple[float, ...] = ()
    end_factors: tuple[float, ...] = ()

    def trials(self) -> list[dict[str, Any]]:
        """The settings of every trial."""
        points = itertools.product(*self.grid.values())
        return [{**self.settings, **dict(zip(self.grid, point, strict=True))} for point in points]


@dataclass(frozen=True)
class Arm:
    """One line of the study's tables.

    Attributes:
      family: whose best trial it starts from.
      settings: what it changes.
      factors: tuned values that it multiplies, by field.
      seeds: how many seeds, from 0.
      group: the place in the order of runs; lower comes first.
      cost: a guess of a step's seconds, as a multiple of the dense model's.
      data: "similar" or "random", the order of the training documents.
      corpus: "packages" or "debian". Families are tuned on the first.
      measures: what is measured beside losses: "routing" (of folders), "prompt" (routing by it),
        "top1" and "top2" (keeping that many experts of the finished model).
      first_position: the first position that is scored, where arms have segments of several
        lengths; 0 for T.
      parents: the arms whose finished runs of the same seed and corpus it starts from.
      reads_on: how many runs before it, each a parent of the next, read batches that it must not
        read in the same order; 0 for a run with the batches of its seed.
      keeps_run: whether its run directories stay, for the arms that start from them.
    """

    name: str
    family: str
    settings: Settings = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    stage: str = "A"
    seeds: int = 4
    steps: int = STEPS
    group: int = 1
    cost: float = 1.0
    data: str = "similar"
    corpus: str = "packages"
    measures: tuple[str, ...] = ()
    first_position: int = 0
    parents: tuple[str, ...] = ()
    reads_on: int = 0
    keeps_run: bool = False


def shape_of_width(width: int) -> dict[str, Any]:
    """Settings of the recipe's shape at another width: heads of 16, F = 2.75 D."""
    shape = {"embed_dim": width, "num_heads": width // 16, "mlp_dim": 11 * width // 4}
    return {f"model.{name}": value for name, value in shape.items()}
