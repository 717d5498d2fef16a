"""`config.data.mixture`: which share of the training instances comes from which domain.

This file imports nothing heavy, because the config's schema checks the field with it.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm

from lory_jax.errors import ConfigError

FIELD = "config.data.mixture"
LONGEST_CYCLE = 2**20  # instances; shares are exact to one part in so many


def parse_mixture(text: str) -> dict[str, Fraction]:
    """Returns the share of each domain in "name=weight,…", sorted by name; they sum to 1.

    Raises:
      ConfigError: the text has another form, a name twice, or no weight above 0.
    """
    weights: dict[str, Fraction] = {}
    for item in text.split(","):
        name, _, number = item.rpartition("=")
        weight = _weight(number)
        if not name.strip() or weight is None or name.strip() in weights:
            raise ConfigError(
                f"{FIELD}: got {item[:60]!r}; must be name=weight,… with each domain once and "
                "weights such as 3 or 0.25"
            )
        weights[name.strip()] = weight
    total = sum(weights.values())
    if not total:
        raise ConfigError(f"{FIELD}: got no weight above 0; must have at least one")
    return {name: weights[name] / total for name in sorted(weights) if weights[name]}


def is_mixture(value: object) -> bool:
    """Whether a value of the field has the right form; "" is no mixture."""
    if not isinstance(value, str):
        return False
    try:
        return value == "" or bool(parse_mixture(value))
    except ConfigError:
        return False


def whole_shares(shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Returns how many instances of each domain a cycle has, the shortest that gives the shares.

    Where that is longer than 2^20 instances, shares are rounded to a cycle of that length.

    Raises:
      ConfigError: a share is too small for such a cycle.
    """
    length = lcm(*(share.denominator for share in shares.values()))
    if length > LONGEST_CYCLE:
        return _rounded(shares)
    counts = {name: int(share * length) for name, share in shares.items()}
    divisor = gcd(*counts.values())
    return {name: count // divisor for name, count in counts.items()}


def _rounded(shares: Mapping[str, Fraction]) -> dict[str, int]:
    counts = {name: int(share * LONGEST_CYCLE) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name] * LONGEST_CYCLE)
    for name in by_remainder[: LONGEST_CYCLE - sum(counts.values())]:
        counts[name] += 1
    if too_small := [name for name, count in counts.items() if not count]:
        raise ConfigError(
            f"{FIELD}: the share of {too_small[0]!r} is {float(shares[too_small[0]]):.1g}; must be "
            f"0 or at least 1/{LONGEST_CYCLE}"
        )
    return counts


def _weight(number: str) -> Fraction | None:
    try:
        weight = Fraction(number.strip())
    except (ValueError, ZeroDivisionError):
        return None
    return weight if weight >= 0 and len(number) < 40 else None
