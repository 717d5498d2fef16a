"""Progress of long loops: one line updated in place on a terminal, a line every 10 s elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 10.0


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line, once for all processes of a run; `file` is standard output if None."""
    import jax  # slow to import, and nothing else here needs it

    if jax.process_index() == 0:
        print(text, file=file, flush=True)


def progress(iterable: Iterable[T], total: int, label: str, unit: str = "docs") -> Iterator[T]:
    """Yields the items of `iterable` and reports count, rate and time left on standard error.

    Args:
      iterable: the items.
      total: the number of items; may be 0.
      label: what is being done, such as "embedding".
      unit: the plural name of the items.
    """
    on_terminal = sys.stderr.isatty()
    interval = TERMINAL_SECONDS if on_terminal else LOG_SECONDS
    start = time.monotonic()
    last_report = start
    done = 0
    for item in iterable:
        now = time.monotonic()
        if now - last_report >= interval:
            last_report = now
            _write(_running(label, unit, done, total, now - start), on_terminal, end=False)
        yield item
        done += 1
    _write(_finished(label, unit, done, time.monotonic() - start), on_terminal, end=True)


def _running(label: str, unit: str, done: int, total: int, seconds: float) -> str:
    line = f"{label}: {done:,}/{total:,} {unit} ({done / max(total, 1):.0%})"
    if done:
        line += f", {_rate(done, unit, seconds)}, {duration(seconds / done * (total - done))} left"
    return line


def _finished(label: str, unit: str, done: int, seconds: float) -> str:
    return f"{label}: {done:,} {unit} in {duration(seconds)} ({_rate(done, unit, seconds)})"


def _rate(done: int, unit: str, seconds: float) -> str:
    per_second = done / max(seconds, 1e-6)
    return f"{per_second:,.0f} {unit}/s" if per_second >= 10 else f"{per_second:.2g} {unit}/s"


def duration(seconds: float) -> str:
    """Returns seconds as "4.2 s", "3 min 20 s", "5 h 07 min" or "2 d 3 h".

    None of these can be mistaken for a time of day.
    """
    if seconds < 59.95:  # 60 would read "60.0 s"
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def _write(line: str, on_terminal: bool, end: bool) -> None:
    if on_terminal:
        # \x1b[K clears the rest of a longer previous line.
        print(f"\r{line}\x1b[K", end="\n" if end else "", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)
