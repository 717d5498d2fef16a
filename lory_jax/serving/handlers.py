"""What the server answers on every route; the engine's thread does the work, and handlers wait."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from lory_jax.generation.text_batch import Piece
from lory_jax.serving import protocol, strip
from lory_jax.serving.engine import Engine, QueueFull
from lory_jax.serving.metrics import Metrics
from lory_jax.serving.protocol import Answer, ApiError, Completion

MOST_BYTES = 2**20  # of a body
BODY_SECONDS = 30  # until a body must have arrived
PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Handlers:
    """The routes of a server."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.metrics = Metrics(engine)
        self.is_stopping = False
        self._strips = threading.Lock()  # one at a time: they compete with the batch

    # ------------------------------------------------------------------ completions

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        begun = time.monotonic()
        model = "unknown"
        try:
            body = protocol.read_body(await read_bytes(request))
            model = protocol.model_name(self.engine, body.get("model"))
            # Tokenizing a long prompt must not hold up the others.
            completion = await run_in_threadpool(protocol.read_completion, self.engine, body)
            pieces = self._submit(completion)
        except ApiError as error:
            self.metrics.finished(model, error.status, begun)
            return answer_error(error)
        self.metrics.prompt_tokens.inc(completion.prompt_tokens)
        answer = Answer(completion)
        if completion.stream:
            events = self._events(completion, answer, pieces, begun)
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return await self._whole(request, completion, answer, pieces, begun)

    def _submit(self, completion: Completion) -> "Pieces":
        if self.is_stopping:
            raise ApiError(503, "the server is stopping")
        if self.engine.failure:
            raise ApiError(503, "the engine has failed; see the server's log")
        pieces = Pieces(self.engine)
        try:
            pieces.submit(completion)
        except QueueFull:
            raise ApiError(
                429,
                f"{self.engine.waiting} texts are waiting and {len(completion.requests)} more do "
                f"not fit into the queue of {self.engine.queue}; try again later",
                code="queue_full",
            ) from None
        return pieces

    async def _whole(
        self,
        request: Request,
        completion: Completion,
        answer: Answer,
        pieces: "Pieces",
        begun: float,
    ) -> Response:
        """The answer in one body; a client that goes away frees its slots."""
        gone = asyncio.ensure_future(disconnected(request))
        done = asyncio.ensure_future(self._collect(answer, pieces, begun))
        status = 499  # nginx's: the client closed the connection
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return Response(status_code=status)
            done.result()
            status = 200
            return JSONResponse(answer.whole())
        except ApiError as error:
            status = error.status
            return answer_error(error)
        finally:
            for task in (gone, done):
                task.cancel()
            pieces.cancel()
            self._count(completion, answer, status, begun)

    async def _collect(self, answer: Answer, pieces: "Pieces", begun: float) -> None:
        async for choice, piece in pieces:
            self._first(answer, begun)
            answer.add(choice, piece)

    async def _events(
        self, completion: Completion, answer: Answer, pieces: "Pieces", begun: float
    ) -> AsyncIterator[str]:
        status = 499
        try:
            async for choice, piece in pieces:
                self._first(answer, begun)
                if event := answer.add(choice, piece):
                    yield f"data: {json.dumps(event)}\n\n"
            if completion.include_usage:
                yield f"data: {json.dumps(answer.last())}\n\n"
            status = 200
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent
            status = error.status
            yield f"data: {json.dumps(error.body)}\n\n"
        finally:
            pieces.cancel()
            self._count(completion, answer, status, begun)

    def _first(self, answer: Answer, begun: float) -> None:
        if not answer.tokens:
            self.metrics.first_token.observe(time.monotonic() - begun)

    def _count(self, completion: Completion, answer: Answer, status: int, begun: float) -> None:
        self.metrics.generated_tokens.inc(answer.tokens)
        self.metrics.finished(completion.model, status, begun)

    # ------------------------------------------------------------------ everything else

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        cards = [protocol.model_card(self.engine, name) for name in self.engine.names]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        try:
            name = protocol.model_name(self.engine, request.path_params["name"])
        except ApiError as error:
            return answer_error(error)
        return JSONResponse(protocol.model_card(self.engine, name))

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 while requests are accepted."""
        state = "failed" if self.engine.failure else "stopping" if self.is_stopping else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def routing(self, request: Request) -> Response:
        """`POST /routing`: the weights of every segment of a text, for the page's strip."""
        try:
            body = protocol.read_body(await read_bytes(request))
            found = await run_in_threadpool(self._strip, body)
        except ApiError as error:
            return answer_error(error)
        return JSONResponse(found)

    def _strip(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._strips:
            return strip.describe(self.engine, body)

    async def page(self, request: Request) -> Response:
        """`GET /`: a page with a text box."""
        return HTMLResponse(PAGE.read_text("utf-8"), headers=PAGE_HEADERS)

    async def show_metrics(self, request: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(self.metrics.text(), media_type=self.metrics.media_type)


class Pieces:
    """The pieces of a request's choices, as they arrive from the engine's thread."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        self._left = 0
        self._numbers: list[int] = []

    def submit(self, completion: Completion) -> None:
        """Queues the choices; raises `QueueFull`."""
        loop = asyncio.get_running_loop()

        def receiver(choice: int) -> Any:
            def receive(piece: Piece | None) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._queue.put_nowait, (choice, piece))

            return receive

        self._numbers = self._engine.submit(
            [(request, receiver(choice)) for choice, request in enumerate(completion.requests)]
        )
        self._left = len(self._numbers)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._left:
            choice, piece = await self._queue.get()
            if piece is None:
                raise ApiError(503, "the server stopped before the text was finished")
            self._left -= bool(piece.finish_reason)
            yield choice, piece

    def cancel(self) -> None:
        """Frees what is not finished."""
        if self._left:
            self._engine.cancel(self._numbers)


# ---------------------------------------------------------------- requests and answers


async def read_bytes(request: Request) -> bytes:
    """The body of a request.

    Raises:
      ApiError: it is not JSON by its own declaration, too large, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page elsewhere can send other types without being asked
        raise ApiError(415, "Content-Type must be application/json")
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                found += part
                if len(found) > MOST_BYTES:
                    raise ApiError(413, f"the body must be at most {MOST_BYTES:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the body ended") from None
    return bytes(found)


async def disconnected(request: Request) -> None:
    """Returns when the client has gone away; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def answer_error(error: ApiError) -> Response:
    """An error as OpenAI's clients read it."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """A wrong path or method, in the same form."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)
