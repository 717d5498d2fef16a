"""The metrics of a run, written to JSON lines, TensorBoard and the console."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lory_jax.console import duration, say
from lory_jax.errors import InputError
from lory_jax.run.directory import METRICS, RunDirectory
from lory_jax.run.metric_lines import read_lines
from lory_jax.storage import Staging, Uploads, is_remote
from lory_jax.training.monitoring.log_files import LogFiles
from lory_jax.training.monitoring.loss_watch import LossWatch

# Only sparse baselines have them, each some; and `experts_kept`, where training lowers it.
SPARSE_METRICS = (
    "experts_kept",
    "dropped_tokens",
    "load_balancing_loss",
    "load_violation",
    "experts_per_token",
)


class MetricsLog:
    """Reads the metrics of a step while the next one runs, and writes them down.

    Call `dispatched` after every step; it reads the step before. `settle` stops the clock of the
    current step, before anything else (validation, a save) makes it look slow.

    Object stores cannot append: with a remote work directory the files grow in the cache and are
    uploaded once a minute, after every validation and save, and at the end. What a killed process
    had not uploaded is still in the cache, and the next process on that machine uploads it.

    Attributes:
      watch: counts skipped steps; the same in all processes.
      repeated_seconds: how long an earlier process spent on steps that this one repeats.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        start_step: int,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        log_every_steps: int,
        counts: Mapping[str, int] | None = None,
    ):
        """Forgets what an earlier process logged after `start_step`: those steps run again.

        `counts` are `LossWatch.counts` at `start_step`.
        """
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._log_every_steps = log_every_steps
        self._start_step = start_step
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._seconds: float | None = None
        self._recent: list[dict[str, Any]] = []
        self._files: LogFiles | None = None
        self._staging: Staging | None = None
        self._uploads: Uploads | None = None
        logged = directory.read_metrics() if directory.metrics_file.exists() else []
        if is_remote(directory.path) and jax.process_index() == 0:
            self._staging = Staging("logs", str(directory.path))
            logged = with_unsent_lines(logged, self._staging.directory / METRICS)
        kept = [line for line in logged if line["step"] <= start_step]
        self.repeated_seconds = math.fsum(line["step_seconds"] for line in logged[len(kept) :])
        self.watch = LossWatch((line["loss"] for line in kept), counts)
        if jax.process_index() == 0:
            local = directory.path
            if self._staging is not None:
                local = self._staging.directory
                self._uploads = Uploads(local, directory.path)
            self._files = LogFiles(local, kept, start_step + 1)
        self._clock = time.perf_counter()

    def dispatched(self, step: int, metrics: dict[str, Any]) -> None:
        """Receives the metrics of a dispatched step; they are still on the device."""
        self.write()
        self._pending = (step, metrics)

    def settle(self) -> None:
        """Waits for the current step and stops its clock."""
        if self._pending is None or self._seconds is not None:
            return
        step, metrics = self._pending
        self._pending = (step, jax.device_get(metrics))
        now = time.perf_counter()
        self._seconds = now - self._clock
        self._clock = now

    def restart_clock(self) -> None:
        """Writes what is pending and starts the next step's clock, after a validation or a save."""
        self.write()
        if self._uploads is not None:
            self._uploads.start()
        self._clock = time.perf_counter()

    def write(self, **extra: Any) -> None:
        """Writes the pending step, with what `extra` adds to it."""
        self.settle()
        if self._pending is None or self._seconds is None:
            return
        step, metrics = self._pending
        rate = self._tokens_per_step / self._seconds
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            "loss": float(metrics["loss"]),
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            "step_seconds": self._seconds,
            "tokens_per_second": rate,
            "mfu": self._mfu(rate),
            "experts_active": None,
            "router_entropy": None,
        }
        if "experts_active" in metrics:
            line["experts_active"] = int(metrics["experts_active"])
            line["router_entropy"] = float(metrics["router_entropy"])
        line |= {name: float(metrics[name]) for name in SPARSE_METRICS if name in metrics}
        found = self.watch.saw(float(metrics["loss"]), bool(metrics["skipped"]))
        line |= found | {"skipped_steps": self.watch.skipped} | extra
        self._pending = self._seconds = None
        if self._files is None:
            return
        if "skipped" in found:
            say(
                f"step {step}: loss {line['loss']}, gradient norm {line['grad_norm']}: update "
                f"skipped ({self.watch.in_a_row} in a row, {self.watch.skipped} in total)",
                sys.stderr,
            )
        if "loss_spike" in found:
            say(
                f"step {step}: loss {line['loss']:.4f} is far above that of the steps before",
                sys.stderr,
            )
        self._files.write(line)
        if self._uploads is not None:
            self._uploads.poll()
        self._recent.append(line)
        if "validation_loss" in extra or step % self._log_every_steps == 0 or step == self._steps:
            say(self._console_line())
            self._recent.clear()

    def close(self) -> None:
        """Writes what is pending; raises `InputError` if lines could not be written."""
        self.write()
        lost = self._files.close() if self._files is not None else 0
        if self._uploads is not None and self._staging is not None:
            self._uploads.close()
            self._staging.close()
        if lost:
            raise InputError(f"the last {lost} lines of {METRICS} could not be written")

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._peak_flops is None:
            return None
        total = self._peak_flops * jax.device_count()
        return tokens_per_second * self._flops_per_token / total

    def _console_line(self) -> str:
        last, count = self._recent[-1], len(self._recent)
        loss = math.fsum(line["loss"] for line in self._recent) / count
        seconds = math.fsum(line["step_seconds"] for line in self._recent) / count
        step, remaining = last["step"], (self._steps - last["step"]) * seconds
        parts = [
            f"step {step:>{len(str(self._steps))}}/{self._steps} {step / self._steps:6.1%}",
            f"loss {loss:.4f}",
            f"lr {last['learning_rate']:.2e}",
            f"grad {last['grad_norm']:.2f}",
            f"{self._tokens_per_step / seconds:,.0f} tok/s",
        ]
        if last["mfu"] is not None:
            parts.append(f"MFU {last['mfu']:.1%}")
        if last["experts_active"] is not None:
            parts.append(f"active {last['experts_active']}")
        if "dropped_tokens" in last:
            parts.append(f"dropped {last['dropped_tokens']:.1%}")
        if "validation_loss" in last:
            parts.append(f"validation {last['validation_loss']:.4f}")
        parts.append(f"{duration(remaining)} left")
        return "  ".join(parts)


def with_unsent_lines(logged: list[dict[str, Any]], cached: Path) -> list[dict[str, Any]]:
    """The lines in the store, continued by those that a killed process left in the cache.

    What is in the cache is used only if it continues what is in the store: otherwise it belongs to
    another run, or this machine was not the last to write.
    """
    try:
        found = read_lines(cached) if cached.is_file() else []
    except InputError:
        return logged
    return found if found[: len(logged)] == logged else logged
