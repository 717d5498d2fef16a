"""Which domain, and which of its instances, is at a position of a mixture.

Positions count the instances of all batches. The schedule repeats a cycle in which every domain
has its number of places, spread as evenly as whole numbers allow: so has every batch.

C places of a cycle, D domains.
"""

from collections.abc import Sequence

import numpy as np


class Schedule:
    """A pure function of the position.

    Attributes:
      counts_D: places of each domain in a cycle.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts_D = np.array(counts, np.int64)
        domain_C = np.repeat(np.arange(len(counts)), self.counts_D)
        rank_C = np.concatenate([np.arange(count) for count in self.counts_D])
        # Place r of n lies in the middle of the r-th of n equal pieces of the cycle.
        order_C = np.argsort((rank_C + 0.5) / self.counts_D[domain_C], kind="stable")
        self._domain_C, self._rank_C = domain_C[order_C], rank_C[order_C]

    def at(self, position: int) -> tuple[int, int]:
        """Returns the domain at a position, and how many of its instances came before."""
        cycle, place = divmod(position, len(self._domain_C))
        domain = int(self._domain_C[place])
        return domain, cycle * int(self.counts_D[domain]) + int(self._rank_C[place])
