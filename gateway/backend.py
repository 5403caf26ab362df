"""The gateway's way to the gRPC server: one channel, and per HTTP request calls that carry its key, id and deadline.

A call never outlives its caller: when the HTTP client goes away, the call is cancelled, and with it the work behind it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Annotated, Any, TypeVar

import grpc
from fastapi import Depends, Request
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc

from gateway.access import api_key
from gateway.problems import ProblemError
from knowledge_engine import metrics
from knowledge_engine.errors import Reason
from knowledge_engine.settings import Settings
from knowledge_engine.tracing import Traces
from knowledge_engine.v1 import datasets_pb2_grpc, inference_pb2_grpc, jobs_pb2_grpc, models_pb2_grpc

_Q = TypeVar("_Q", bound=Message)
_A = TypeVar("_A", bound=Message)

_CHANNEL_OPTIONS = (
    # A 10 MB JSON body fits into a message, and so does a page of a thousand jobs.
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    # gRPC's own back-off grows to two minutes; a server that came back must be found at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The server is a neighbour; a proxy of the environment leads elsewhere.
    ("grpc.enable_http_proxy", 0),
)


class Backend:
    """The server's services. The channel is opened at the first call, inside the running event loop."""

    def __init__(self, settings: Settings, channel: grpc.aio.Channel | None = None) -> None:
        self.settings = settings
        self.traces = Traces("gateway")
        self.metrics = metrics.GatewayMetrics()
        self._address = settings.grpc_address
        self._given = channel
        self._calls: weakref.WeakSet[grpc.aio.Call] = weakref.WeakSet()
        self._is_ending = False

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return self._given or grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)

    @cached_property
    def jobs(self) -> jobs_pb2_grpc.JobServiceAsyncStub:
        return jobs_pb2_grpc.JobServiceStub(self._channel)

    @cached_property
    def datasets(self) -> datasets_pb2_grpc.DatasetServiceAsyncStub:
        return datasets_pb2_grpc.DatasetServiceStub(self._channel)

    @cached_property
    def models(self) -> models_pb2_grpc.ModelServiceAsyncStub:
        return models_pb2_grpc.ModelServiceStub(self._channel)

    @cached_property
    def inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        return inference_pb2_grpc.InferenceServiceStub(self._channel)

    @cached_property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self._channel)

    @cached_property
    def read_metrics(self) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        return self._channel.unary_unary(metrics.METHOD)

    def follow(self, call: grpc.aio.Call) -> None:
        """Ends `call` when `end_calls` does, if it is not over by then."""
        self._calls.add(call)
        if self._is_ending:
            call.cancel()

    def end_calls(self) -> None:
        """Ends every call that is under way; their callers are told that the service is stopping."""
        self._is_ending = True
        for call in tuple(self._calls):
            call.cancel()

    async def close(self) -> None:
        """Closes a channel that this object opened, and sends what is left of traces."""
        if self._given is None and "_channel" in self.__dict__:
            await self._channel.close()
        await asyncio.to_thread(self.traces.close)


class Calls:
    """The gRPC calls of one HTTP request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.server: Backend = request.app.state.backend
        self._timeout = self.server.settings.request_timeout_seconds

    async def unary(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Q, _A], message: _Q, *, deadline: bool = True
    ) -> _A:
        """One answer, or the call's AioRpcError."""
        call = method(message, timeout=self._timeout if deadline else None, metadata=self.metadata)
        self.server.follow(call)
        async with self.alive(call):
            return await call

    def stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[_Q, _A], message: _Q, *, deadline: bool
    ) -> grpc.aio.UnaryStreamCall[_Q, _A]:
        call = method(message, timeout=self._timeout if deadline else None, metadata=self.metadata)
        self.server.follow(call)
        return call

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The caller's key, the request's id and its trace. A key that no metadata can hold is no key of ours."""
        metadata = [("x-request-id", self._request.state.request_id), *self.server.traces.headers()]
        key = api_key(self._request.headers)
        if key and key.isascii() and key.isprintable():
            metadata.append(("authorization", f"Bearer {key}"))
        return tuple(metadata)

    @asynccontextmanager
    async def alive(self, call: grpc.aio.Call) -> AsyncIterator[None]:
        """Cancels `call` when the HTTP client goes away, and whenever the block ends before the call does."""

        async def watch() -> None:
            await _disconnected(self._request)
            call.cancel()

        watcher = asyncio.create_task(watch())
        ended = False
        try:
            yield
            ended = True
        except asyncio.CancelledError:
            if watcher.done() and not watcher.cancelled():
                raise client_gone() from None
            if call.done():
                raise stopping() from None
            raise
        finally:
            watcher.cancel()
            if not ended:
                call.cancel()


async def _calls(request: Request) -> Calls:
    """Not the class itself: what is not asynchronous FastAPI calls in a thread, which costs more than all it does."""
    return Calls(request)


Call = Annotated[Calls, Depends(_calls)]
"""A route's parameter: the calls of its request."""


def client_gone() -> ProblemError:
    """Nobody reads it; it ends the request and stands in the log."""
    return ProblemError(499, grpc.StatusCode.CANCELLED, Reason.CANCELLED_BY_CLIENT, "the client closed the request")


def stopping() -> ProblemError:
    """The gateway ends, and this call with it."""
    return ProblemError(
        503,
        grpc.StatusCode.UNAVAILABLE,
        Reason.SERVER_UNAVAILABLE,
        "the service is stopping and this request did not end in time; ask again",
        headers={"Retry-After": "5"},
    )


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
