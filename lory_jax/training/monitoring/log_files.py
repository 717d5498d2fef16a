"""metrics.jsonl and TensorBoard's events, on a disk that may fill up, turn read-only or vanish."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from lory_jax.console import say
from lory_jax.run.directory import METRICS
from lory_jax.storage import write_atomically


class LogFiles:
    """Appends lines. Lines that cannot be written are kept and tried again with the next line.

    A problem is reported once, and so is its end. TensorBoard misses the steps in between.
    """

    def __init__(self, directory: Path, kept: list[dict[str, Any]], first_step: int):
        """Starts the files anew with the lines `kept`; `first_step` is the next step logged."""
        self._path = directory / METRICS
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self._path, text)
        self._size = len(text.encode())
        self._waiting: list[str] = []
        self._in_trouble = False
        self._events = Events(directory / "tensorboard", first_step)

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line to both; never raises for a disk error."""
        self._waiting.append(json.dumps(line) + "\n")
        try:
            self._append_waiting()
            self._events.write(line)
        except OSError as error:
            if not self._in_trouble:
                say(
                    f"WARNING: {self._path.parent}: {error.strerror}; metrics are kept in memory",
                    sys.stderr,
                )
            self._in_trouble = True
        else:
            if self._in_trouble:
                say(
                    f"{self._path.parent}: can be written again, no line of metrics is lost",
                    sys.stderr,
                )
            self._in_trouble = False

    def close(self) -> int:
        """Closes the files; returns how many lines could not be written."""
        self._events.close()
        return len(self._waiting)

    def _append_waiting(self) -> None:
        # Opened again for every line: a file opened before its directory vanished would accept
        # writes silently. Appends from a known size, because a full disk may accept half a line.
        data = "".join(self._waiting).encode()
        with open(self._path, "r+b", buffering=0) as file:
            file.seek(self._size)
            if (file.write(data) or 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(data)
        self._waiting.clear()


class Events:
    """TensorBoard's event file, written in the caller's thread: tensorboardX's own thread dies of a
    full disk, and its queue then blocks the loop."""

    def __init__(self, directory: Path, first_step: int):
        self._directory, self._first_step = directory, first_step
        self._writer: EventsWriter | None = None

    def write(self, line: dict[str, Any]) -> None:
        """Writes every number of a line at its step; raises `OSError`."""
        step = line["step"]
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        values = [Summary.Value(tag=name, simple_value=v) for name, v in numbers.items()]
        try:
            if self._writer is None:
                self._directory.mkdir(exist_ok=True)
                self._writer = EventsWriter(str(self._directory / "events"))
                # Hides what an earlier process logged of these steps.
                start = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(step=self._first_step, session_log=start))
            event = Event(step=step, wall_time=time.time(), summary=Summary(value=values))
            self._writer.write_event(event)
            self._writer.flush()
        except OSError:
            self.close()  # readers stop at a torn record: continue in a new file
            self._first_step = step + 1
            raise

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
