"""The HTTP server: its routes, and how it starts and stops.

Starlette routes requests, and uvicorn speaks HTTP.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Route

from lory_jax.errors import InputError
from lory_jax.serving.engine import Engine
from lory_jax.serving.handlers import Handlers, answer_http_error

LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


def make_app(handlers: Handlers, host: str) -> Starlette:
    """The application; a server on loopback only answers to its own names."""
    hosts = LOOPBACK if host in ("127.0.0.1", "::1") else ["*"]
    return Starlette(
        routes=[
            Route("/", handlers.page),
            Route("/health", handlers.health),
            Route("/metrics", handlers.show_metrics),
            Route("/routing", handlers.routing, methods=["POST"]),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{name:path}", handlers.model),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={HTTPException: answer_http_error},
    )


class Server(uvicorn.Server):
    """uvicorn without its handlers of signals, which raise the signal again after stopping."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `serve`."""
        yield


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; closed at the end.

    Raises:
      InputError: the address is taken, or not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"host: cannot listen on {host}:{port} ({reason})") from None
    with found:
        yield found


def make_server(handlers: Handlers, host: str, connections: int, stop_seconds: int) -> Server:
    """The server of these handlers; `serve` says what the other arguments are."""
    config = uvicorn.Config(
        make_app(handlers, host),
        log_level="warning",
        access_log=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=stop_seconds,
        lifespan="off",
        server_header=False,
    )
    return Server(config)


def serve(engine: Engine, listening: socket.socket, connections: int, stop_seconds: int) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what was begun.

    Args:
      engine: what continues texts; it is started and stopped here.
      listening: what `listen` returns.
      connections: more than these are refused with status 503.
      stop_seconds: how long a stop waits.
    """
    host, port = listening.getsockname()[:2]
    handlers = Handlers(engine)
    server = make_server(handlers, host, connections, stop_seconds)
    engine.start()
    at = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(engine.names)} on http://{at}:{port}", flush=True)
    if host not in ("127.0.0.1", "::1"):
        print("everyone who reaches this address can use the model", flush=True)
    with _stopped_by_signals(server, handlers):
        asyncio.run(server.serve([listening]))
    engine.stop()
    print("stopped", flush=True)


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server, handlers: Handlers) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        if handlers.is_stopping:
            server.force_exit = True
        handlers.is_stopping = server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
