"""A server of a tiny model in this process, and ways to talk to it that no client library has."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lory_jax.api import Model
from lory_jax.serving.engine import Engine
from lory_jax.serving.handlers import Handlers
from lory_jax.serving.server import listen, make_server


@dataclass
class Served:
    """A running server."""

    engine: Engine
    handlers: Handlers
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(
        self, body: bytes, path: str = "/v1/completions", method: str = "POST", **headers: str
    ) -> tuple[int, dict]:
        """One request over a connection of its own; its status and JSON."""
        with self.connect() as connection:
            connection.sendall(head(len(body), path, method, **headers) + body)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        status, _, rest = answer.partition(b"\r\n")
        return int(status.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])


def head(length: int, path: str = "/v1/completions", method: str = "POST", **headers: str) -> bytes:
    """The head of a request; a header's name is written with underscores."""
    fields = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(length),
        "Connection": "close",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


@contextlib.contextmanager
def serving(
    model: Model,
    domains: dict[str, np.ndarray] | None = None,
    *,
    slots: int = 8,
    queue: int = 256,
    step_seconds: float = 0.0,
) -> Iterator[Served]:
    """Serves a model until the end of the block; `step_seconds` makes every step slower."""
    engine = Engine(
        model, domains or {}, slots=slots, context=model.config.sequence_length, queue=queue
    )
    step = engine._texts.step

    def slow_step(arriving):
        time.sleep(step_seconds)
        return step(arriving)

    engine._texts.step = slow_step if step_seconds else step
    handlers = Handlers(engine)
    with listen("127.0.0.1", 0) as listening:
        server = make_server(handlers, "127.0.0.1", 1000, 5)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        engine.start()
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield Served(engine, handlers, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            engine.stop()


def wait_until(is_true: Callable[[], bool], seconds: float = 30) -> None:
    """Fails unless something becomes true in time."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
