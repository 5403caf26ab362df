"""Server-sent events from a gRPC stream: numbered, kept alive, ended with the stream, cancelled with the connection.

It knows neither jobs nor answers; a route says how one message reads. A failure after the first byte is an
`event: error` with the problem as data.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple, TypeVar

import grpc
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.types import Receive, Scope, Send

from gateway.backend import stopping
from gateway.problems import problem, rpc_problem

HEARTBEAT_SECONDS = 15.0
_A = TypeVar("_A")


class Event(NamedTuple):
    """One event; `id` is what a client sends back as Last-Event-ID."""

    event: str
    data: Any
    id: str | None = None


class EventStream(StreamingResponse):
    """Sends events until `frames` ends or the client goes away; either way the generator is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(frames, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()


async def frames(
    call: grpc.aio.UnaryStreamCall[Any, _A],
    read: Callable[[_A], Event],
    request_id: str,
    *,
    first: Any = None,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> AsyncGenerator[bytes, None]:
    """The stream's messages as event frames, a comment whenever nothing came for `heartbeat_seconds`.

    `first` is a message that was already taken from the call. Closing the generator cancels the call.
    """
    pending: asyncio.Future[Any] | None = None
    try:
        message: Any = first
        while message is not grpc.aio.EOF:
            if message is not None:
                yield _frame(read(message))
            pending = asyncio.ensure_future(call.read())
            while not (await asyncio.wait({pending}, timeout=heartbeat_seconds))[0]:
                yield KEEPALIVE_COMMENT
            message = pending.result()
    except grpc.aio.AioRpcError as error:
        body, _ = rpc_problem(error, request_id)
        yield _frame(Event("error", body.model_dump()))
    except asyncio.CancelledError:
        if not call.done():  # else it is not the call that was ended, but this request
            raise
        end = stopping()
        yield _frame(Event("error", problem(end.failure, end.status_code, request_id).model_dump()))
    finally:
        call.cancel()
        if pending is not None:
            pending.cancel()


def _frame(event: Event) -> bytes:
    data = json.dumps(event.data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return format_sse_event(data_str=data, event=event.event, id=event.id)
