"""Server-sent events from a gRPC stream: numbered, kept alive, ended with the stream, cancelled with the connection.

It knows neither jobs nor answers; a route says how one message reads. A failure after the first byte is an
`event: error` with the problem as data.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple, TypeVar

import grpc
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT
from starlette.types import Receive, Scope, Send

from gateway.backend import stopping
from gateway.problems import problem, rpc_problem

HEARTBEAT_SECONDS = 15.0
_A = TypeVar("_A")
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Event(NamedTuple):
    """One event; `id` is what a client sends back as Last-Event-ID."""

    event: str
    data: Any
    id: str | None = None


class EventStream(StreamingResponse):
    """Sends events until `frames` ends or the client goes away; either way the generator is closed at once.

    A comment goes out whenever nothing else did for `heartbeat_seconds`.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], *, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        super().__init__(frames, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._frames = frames
        self._heartbeat_seconds = heartbeat_seconds
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last_sent = time.monotonic()
        # A task of its own: a timeout around each message would cost as much again as the message.
        heart = asyncio.create_task(self._beat(send))
        try:
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                self._last_sent = time.monotonic()
        finally:
            heart.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        while True:
            left = self._last_sent + self._heartbeat_seconds - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            else:
                await send({"type": "http.response.body", "body": KEEPALIVE_COMMENT, "more_body": True})
                self._last_sent = time.monotonic()


async def frames(
    call: grpc.aio.UnaryStreamCall[Any, _A], read: Callable[[_A], Event], request_id: str, *, first: Any = None
) -> AsyncGenerator[bytes, None]:
    """The stream's messages as event frames.

    `first` is a message that was already taken from the call. Closing the generator cancels the call.
    """
    try:
        message: Any = first if first is not None else await call.read()
        while message is not grpc.aio.EOF:
            yield _frame(read(message))
            message = await call.read()
    except grpc.aio.AioRpcError as error:
        body, _ = rpc_problem(error, request_id)
        yield _frame(Event("error", body.model_dump()))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # it is this request that was ended, and not its call
            raise
        end = stopping()
        yield _frame(Event("error", problem(end.failure, end.status_code, request_id).model_dump()))
    finally:
        call.cancel()


def _frame(event: Event) -> bytes:
    """JSON has no line break of its own, so the data are one line."""
    end = "" if event.id is None else f"id: {event.id}\n"
    return f"event: {event.event}\ndata: {_to_json(event.data)}\n{end}\n".encode()
