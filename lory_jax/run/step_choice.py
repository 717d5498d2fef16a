"""Which checkpoint of a run to read: the newest, the best, or the one of a step.

This module imports nothing heavy, so that command lines can check a choice before JAX starts.
"""

from lory_jax.errors import ConfigError

NEWEST, BEST = "newest", "best"

Step = int | str  # NEWEST, BEST or the number of a step


def parse_step(step: Step) -> Step:
    """Returns the choice, with a number as an integer.

    Raises:
      ConfigError: it is neither a name nor a number.
    """
    if step in (NEWEST, BEST):
        return step
    if isinstance(step, str) and step.isascii() and step.isdigit():
        return int(step)
    if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
        return step
    raise ConfigError(f"step: got {step!r}, must be {NEWEST}, {BEST} or the number of a step")
