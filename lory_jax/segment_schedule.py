"""Segment lengths that change over training (`config.train.segment_schedule`), beyond the paper.

"128:0.25,64:0.5" trains experts with segments of 128 tokens in the first quarter of the steps, of
64 until half of them, and of `config.model.segment_length` from then on. No parameter depends on
the length, so nothing is converted; each length has a compiled step of its own. The length is a
function of the step alone, so a resumed run continues with the same one. The dense warm-up, which
has no segments, counts as steps. Validation uses `config.model.segment_length` throughout.

This file imports nothing heavy, because the config's schema checks the field with it.
"""

import itertools
from dataclasses import dataclass

from lory_jax.errors import ConfigError, shorten

FIELD = "config.train.segment_schedule"
FORM = "length:share,… with shares of the steps that rise between 0 and 1, or empty"


def parse_schedule(text: str) -> tuple[tuple[int, float], ...]:
    """The pairs of "length:share,…": segments of that length until that share of the steps.

    Raises:
      ConfigError: the text has another form.
    """
    pairs = []
    for item in filter(None, text.split(",")):
        length, _, share = item.partition(":")
        try:
            pairs.append((int(length), float(share)))
        except ValueError:
            raise ConfigError(f"{FIELD}: got {shorten(item)!r}; must be {FORM}") from None
    shares = [0.0, *(share for _, share in pairs), 1.0]
    rises = all(before < after for before, after in itertools.pairwise(shares))
    if any(length < 1 for length, _ in pairs) or not rises:
        raise ConfigError(f"{FIELD}: got {shorten(text)!r}; must be {FORM}")
    return tuple(pairs)


def is_schedule(value: object) -> bool:
    """Whether a value of the field has the right form; "" is no schedule."""
    if not isinstance(value, str):
        return False
    try:
        return len(parse_schedule(value)) >= 0
    except ConfigError:
        return False


@dataclass(frozen=True)
class SegmentSchedule:
    """The segment length of every step.

    Attributes:
      borders: `(length, step)`: that length is used in the steps before.
      last: the length from the last border on.
    """

    borders: tuple[tuple[int, int], ...]
    last: int

    @classmethod
    def of(cls, text: str, last: int, steps: int) -> "SegmentSchedule":
        """The schedule that a field of a run of so many steps describes."""
        borders = tuple((length, round(share * steps)) for length, share in parse_schedule(text))
        return cls(borders, last)

    def at(self, step: int) -> int:
        """The length in the step after so many completed ones."""
        return next((length for length, border in self.borders if step < border), self.last)

    def changes_at(self, step: int) -> bool:
        """Whether that step has another length than the one before it."""
        return step > 0 and self.at(step) != self.at(step - 1)

    @property
    def lengths(self) -> frozenset[int]:
        """Every length of the schedule."""
        return frozenset((*(length for length, _ in self.borders), self.last))


def shares_of_lengths(text: str, last: int) -> dict[int, float]:
    """The share of the steps that have each length."""
    shares: dict[int, float] = {}
    start = 0.0
    for length, end in (*parse_schedule(text), (last, 1.0)):
        shares[length] = shares.get(length, 0.0) + end - start
        start = end
    return shares
