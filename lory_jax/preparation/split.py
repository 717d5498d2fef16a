"""The split into train and held-out sets by origin: no origin is ever on two sides."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from lory_jax.errors import InputError

# An origin joins an evaluation split if it fills no domain beyond this multiple of its share.
OVERSHOOT = 1.5


class Row(Protocol):
    """What the split must know of a document."""

    @property
    def domain(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


AnyRow = TypeVar("AnyRow", bound=Row)


def split_by_origin(
    documents: Sequence[AnyRow],
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    confirmation_fraction: float = 0.0,
) -> dict[str, list[AnyRow]]:
    """Splits documents into `train`, `validation` and `test`, in the order given.

    Origins are assigned in the order of their hashes with the seed. A second run gives the same
    split, and a corpus with more documents gives nearly the same. With a `confirmation_fraction`
    there is a fourth side, `confirmation`: it takes origins from `train` only, so the other sets
    stay what they are without it.

    Raises:
      InputError: a domain has fewer origins than there are sides: train, and each held-out set
        whose fraction is not 0.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    for document in documents:
        size = document.num_bytes
        sizes[document.origin][document.domain] += size
        totals[document.domain] += size
    fractions = {
        "test": test_fraction,
        "validation": validation_fraction,
        "confirmation": confirmation_fraction,
    }
    sides = ["train", *(name for name, fraction in fractions.items() if fraction > 0)]
    num_origins = Counter(domain for of_origin in sizes.values() for domain in of_origin)
    for domain in sorted(totals):
        origins = num_origins[domain]
        if origins < len(sides):
            raise InputError(
                f"domain {domain!r}: has {origins} origins, requires at least {len(sides)} "
                f"(packages, directories or sources), one each for {', '.join(sides)}"
            )
    order = sorted(sizes, key=lambda origin: hashlib.sha256(f"{seed}:{origin}".encode()).digest())
    side: dict[str, str] = {}
    for split, fraction in fractions.items():
        if fraction > 0:
            _fill(split, fraction, order, sizes, totals, side)
    result: dict[str, list[AnyRow]] = {"train": [], "validation": [], "test": []}
    if confirmation_fraction > 0:
        result["confirmation"] = []
    for document in documents:
        result[side.get(document.origin, "train")].append(document)
    return result


def side_by_threshold(origin: str, fractions: Mapping[str, float], seed: int) -> str:
    """Returns the side of an origin by its hash alone, without knowing the other origins.

    Args:
      origin: the documents' origin.
      fractions: the share of each side but `train`, in a fixed order.
      seed: that of the split.
    """
    digest = hashlib.sha256(f"{seed}:{origin}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for side, fraction in fractions.items():
        if place < fraction:
            return side
        place -= fraction
    return "train"


def _fill(
    split: str,
    fraction: float,
    order: Sequence[str],
    sizes: dict[str, Counter[str]],
    totals: Counter[str],
    side: dict[str, str],
) -> None:
    """Assigns origins to a split until it has its share of every domain."""
    filled: Counter[str] = Counter()

    def needs(domain: str) -> bool:
        return filled[domain] < fraction * totals[domain]

    for origin in order:
        fits = all(
            filled[domain] + size <= OVERSHOOT * fraction * totals[domain]
            for domain, size in sizes[origin].items()
        )
        if origin not in side and fits and any(map(needs, sizes[origin])):
            side[origin] = split
            filled.update(sizes[origin])
    # A domain with only a few big origins may have received none: it gives its smallest.
    origins_of: dict[str, list[str]] = defaultdict(list)
    for origin in order:
        for domain in sizes[origin]:
            origins_of[domain].append(origin)
    for domain in sorted(totals):
        if not filled[domain]:
            free = [origin for origin in origins_of[domain] if origin not in side]
            if len(free) < 2:
                raise InputError(
                    f"domain {domain!r}: shares its origins with other domains, and none is left "
                    f"for {split}; give text from more origins"
                )
            smallest = min(free, key=lambda o: sizes[o][domain])
            side[smallest] = split
            filled.update(sizes[smallest])
