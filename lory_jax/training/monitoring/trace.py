"""A trace of a few training steps, for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from types import TracebackType

import jax

from lory_jax.console import say


class Trace:
    """Traces steps `first` to `last` (counted from 1, both included) into `directory`."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps = steps
        self._directory = directory
        self._is_on = False

    def __enter__(self) -> "Trace":
        return self

    def before(self, step: int) -> None:
        """Call it before step `step` is dispatched."""
        if self._steps and not self._is_on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._directory))
            self._is_on = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Call it after step `step` was dispatched; the last one traced is waited for."""
        if self._is_on and self._steps and step == self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_on:  # the run ended before the last requested step
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_on = False
        say(f"wrote the profile to {self._directory}")
