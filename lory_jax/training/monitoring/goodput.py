"""How the wall time of a run was spent, over all of its processes."""

import contextlib
import time
from collections.abc import Iterator, Mapping

# start_up: until the first step of a phase is dispatched, compilation included. restart: the same
# in a process that resumed, and the steps repeated after a kill. stall: waiting for data.
KINDS = ("productive", "start_up", "restart", "save", "validation", "stall")


class Goodput:
    """Seconds by kind; at any moment exactly one kind is running, so they add up to the wall time.

    The time that a killed process spent after its last save counts only for the steps that are
    repeated.
    """

    def __init__(self, since: float):
        """`since` is the `time.monotonic()` at which this process began."""
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._starting = self._kind = "start_up"
        self._since = since

    def resume(self, earlier: Mapping[str, float]) -> None:
        """Adds to the seconds of earlier processes: this start is a restart."""
        self.seconds()
        self._seconds["restart"] += self._seconds.pop("start_up")
        self._seconds = {k: self._seconds.get(k, 0.0) + earlier.get(k, 0.0) for k in KINDS}
        self._starting = self._kind = "restart"

    def repeats(self, seconds: float) -> None:
        """Counts the seconds of steps that are repeated as restart."""
        self._seconds["restart"] += seconds

    def begin(self) -> None:
        """From now on, time is productive unless `during` or `starting` says otherwise."""
        self._switch("productive")

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`."""
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    def starting(self) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside as start-up, or as restart where this process resumed."""
        return self.during(self._starting)

    def seconds(self) -> dict[str, float]:
        """Seconds by kind up to now."""
        self._switch(self._kind)
        return dict(self._seconds)

    def __str__(self) -> str:
        seconds = self.seconds()
        total = sum(seconds.values())
        parts = ", ".join(f"{kind.replace('_', '-')} {s:,.0f}" for kind, s in seconds.items())
        return f"goodput {seconds['productive'] / total:.1%} of {total:,.0f} s ({parts})"

    def _switch(self, kind: str) -> str:
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        before, self._kind, self._since = self._kind, kind, now
        return before
