"""Requests to stop or save, and how several processes act on them at the same step."""

import signal
import sys
import time
from types import FrameType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lory_jax.parallel import MESH_AXES, place_local, replicated


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to the loop; a second one kills."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print(
            "stopping after this step; send the signal again to stop immediately",
            file=sys.stderr,
            flush=True,
        )


class SaveTimer:
    """Requests a save every `minutes` minutes; only process 0's clock counts."""

    def __init__(self, minutes: float):
        self._seconds = minutes * 60 if jax.process_index() == 0 else 0.0
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._last >= self._seconds


class Wishes(NamedTuple):
    """What a process requests after a step; 0 means nothing."""

    signal: int = 0  # stop: this signal came
    damage: int = 0  # stop: a batch ahead cannot be read
    save: int = 0


class Agreement:
    """Combines the requests of all processes, so that all act on them at the same step.

    A single process gets its own requests at once. Several processes get the maximum of each
    request one step later: the devices reduce them after the step, like its metrics, so that no
    host waits.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._local_devices = len(mesh.local_devices)
        self._largest = jax.jit(lambda rows: jnp.max(rows, axis=0), out_shardings=replicated(mesh))
        self._before: Array | None = None

    def after_step(self, mine: Wishes) -> Wishes:
        """Call it once after every step is dispatched."""
        if jax.process_count() == 1:
            return mine
        before, self._before = self._before, self._reduce(mine)
        return Wishes() if before is None else Wishes(*jax.device_get(before).tolist())

    def now(self, mine: Wishes) -> Wishes:
        """As `after_step`, but without the delay: waits for all processes."""
        if jax.process_count() == 1:
            return mine
        return Wishes(*jax.device_get(self._reduce(mine)).tolist())

    def _reduce(self, mine: Wishes) -> Array:
        rows = np.tile(np.array(mine, np.int32), (self._local_devices, 1))
        return self._largest(place_local(rows, self._sharding))
