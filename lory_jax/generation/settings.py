"""What a user may choose about a generation, checked once for every caller."""

from collections.abc import Sequence
from dataclasses import dataclass

from lory_jax.errors import InputError
from lory_jax.fields import LARGEST_INTEGER
from lory_jax.generation.sampling import check_settings

ROUTINGS = ("prompt", "segment")
FFNS = ("auto", "merged", "experts")
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Settings:
    """How prompts are continued.

    Attributes:
      max_new_tokens: the most tokens a row gains; None is 128, or fewer where the model cannot read
        that many positions.
      temperature, top_k, top_p: how tokens are drawn, as in `sampling.sample`.
      routing: "prompt" or "segment"; a dense model ignores it.
      seed: decides the draws.
      stop: texts that end a continuation; they are cut off.
      ffn: what a step computes with: FFNs "merged" for each row, or all "experts", unmerged, for
        all rows. They differ by rounding only; "auto" is the faster one (`cost.py`).

    Raises:
      InputError: a setting is out of its range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    routing: str = "prompt"
    seed: int = 0
    stop: Sequence[str] = ()
    ffn: str = "auto"

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.top_k, self.top_p)
        check_routing(self.routing)
        if abs(self.seed) > LARGEST_INTEGER:
            raise InputError("seed: got more than 63 bits, must be an integer that fits in them")
        check_ffn(self.ffn)
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"stop: got {self.stop!r}, must be a list of non-empty texts")

    def new_tokens(self, prompt_length: int, sequence_length: int) -> int:
        """The most tokens that may follow a prompt in a model with this many positions."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return max(1, min(DEFAULT_NEW_TOKENS, sequence_length - prompt_length))


def check_routing(routing: str) -> None:
    """Raises `InputError` for a routing that generation does not have."""
    if routing not in ROUTINGS:
        raise InputError(f"routing: got {routing!r}, must be {' or '.join(ROUTINGS)}")


def check_ffn(ffn: str) -> None:
    """Raises `InputError` for a choice of FFNs that generation does not have."""
    if ffn not in FFNS:
        raise InputError(f"ffn: got {ffn!r}, must be one of {', '.join(FFNS)}")
