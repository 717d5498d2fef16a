"""The thread that continues texts, and the queue before it.

HTTP handlers submit requests and receive pieces of text; this thread alone touches the batch.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lory_jax.api import Model
from lory_jax.errors import InputError
from lory_jax.generation.batch import ContinuousBatch
from lory_jax.generation.text_batch import Piece, Request, TextBatch
from lory_jax.serving.models import NAME

Receive = Callable[[Piece | None], None]  # None: the request was lost


class QueueFull(Exception):
    """There are as many waiting texts as may wait."""


@dataclass
class Entry:
    """A request on its way, and who receives its pieces."""

    request: Request
    receive: Receive


class Engine:
    """Continues texts in one running batch, in the order of their arrival.

    Attributes:
      model: the model.
      domains: routing weights `[Y, E]` by the name of a domain.
      slots, context, queue: limits: texts at a time, tokens of a text with its prompt, and texts
        that may wait.
      failure: the traceback of what ended the thread; "" while it is well.
    """

    def __init__(
        self,
        model: Model,
        domains: Mapping[str, np.ndarray],
        *,
        slots: int,
        context: int,
        queue: int,
        ffn: str = "auto",
    ):
        """Raises `InputError` if a limit is out of its range."""
        limit = model.config.sequence_length
        if not 2 <= context <= limit:
            raise InputError(
                f"context: got {context}, must be 2 to {limit}, the positions that the model reads"
            )
        self.model, self.domains = model, domains
        self.slots, self.context, self.queue = slots, context, queue
        self.failure = ""
        self.started = int(time.time())
        batch = ContinuousBatch(
            model.config,
            model.params,
            slots=slots,
            cache_length=context,
            ffn=ffn,
            vocab_size=model.tokenizer.vocab_size,
        )
        self._texts = TextBatch(batch, model.tokenizer)
        self._lock = threading.Condition()
        self._waiting: deque[Entry] = deque()
        self._running: dict[int, Receive] = {}
        self._cancelled: list[int] = []
        self._numbers = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def names(self) -> list[str]:
        """The models that are served."""
        return [NAME, *(f"{NAME}:{domain}" for domain in self.domains)]

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Texts being continued."""
        return len(self._running)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; texts that are not finished are lost."""
        with self._lock:
            self._is_stopping = True
            self._lock.notify()
        self._thread.join()

    def submit(self, requests: list[tuple[Request, Receive]]) -> list[int]:
        """Queues requests, all or none; returns the numbers they got.

        `receive` is called from the engine's thread with every piece, and with None if the request
        is lost.

        Raises:
          QueueFull: the queue has no room for all of them.
        """
        with self._lock:
            free = self.slots - len(self._running) + self.queue - len(self._waiting)
            if len(requests) > free or self._is_stopping or self.failure:
                raise QueueFull
            numbers = []
            for request, receive in requests:
                self._numbers += 1
                numbers.append(self._numbers)
                self._waiting.append(Entry(replace(request, number=self._numbers), receive))
            self._lock.notify()
        return numbers

    def cancel(self, numbers: list[int]) -> None:
        """Forgets requests that nobody waits for any more."""
        with self._lock:
            gone = set(numbers)
            self._waiting = deque(e for e in self._waiting if e.request.number not in gone)
            self._cancelled += [number for number in numbers if number in self._running]
            self._lock.notify()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                for piece in self._texts.step(iter(self._next, None)):
                    receive = self._running[piece.number]
                    if piece.finish_reason:
                        del self._running[piece.number]
                    receive(piece)
        except Exception:
            self.failure = traceback.format_exc()
            print(self.failure, flush=True)
        finally:
            with self._lock:
                lost = [entry.receive for entry in self._waiting]
                self._waiting.clear()
            for receive in [*self._running.values(), *lost]:
                receive(None)
            self._running.clear()

    def _wait_for_work(self) -> bool:
        """Waits for requests and takes cancelled ones out; False when the thread must end."""
        with self._lock:
            while not (self._waiting or self._running or self._is_stopping):
                self._lock.wait()
            cancelled, self._cancelled = self._cancelled, []
        for number in cancelled:
            if self._running.pop(number, None):
                self._texts.cancel(number)
        return not self._is_stopping

    def _next(self) -> Request | None:
        with self._lock:
            if not self._waiting:
                return None
            entry = self._waiting.popleft()
            self._running[entry.request.number] = entry.receive
            return entry.request
