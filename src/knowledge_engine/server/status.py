"""Errors become `google.rpc.Status`: one ErrorInfo each, field violations and retry hints where they apply.

`Guard` is the one interceptor. It checks the caller's key, gives every call a request id, counts and traces it, and
maps whatever a handler raises, before the first message of a stream and after it. What is unexpected reaches the log,
never the caller. It ends a stream whose caller does not read, and at the server's end those that are still under way.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, Self

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from knowledge_engine import errors
from knowledge_engine.errors import AuthenticationError, CapacityError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.metrics import ServerMetrics
from knowledge_engine.tracing import SPAN, Traces

DOMAIN = "knowledge-engine"
_LOG = logging.getLogger(__name__)

# The most specific class wins; see the table of the tree in `errors.py`.
CODES: Mapping[type[KnowledgeEngineError], grpc.StatusCode] = {
    errors.InvalidSpecError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.StateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConflictError: grpc.StatusCode.ABORTED,
    errors.AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    errors.AccessError: grpc.StatusCode.PERMISSION_DENIED,
    errors.CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UpstreamError: grpc.StatusCode.UNAVAILABLE,
    errors.IntegrityError: grpc.StatusCode.DATA_LOSS,
    errors.CredentialsError: grpc.StatusCode.INTERNAL,
    errors.KnowledgeEngineError: grpc.StatusCode.INTERNAL,
}

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Name of the API key of the call being served; empty without keys."""

_LAST_WORD_SECONDS = 0.5
"""A status waits behind what its caller has not read; the call is over without it, and gRPC delivers it or not."""
_RESTART_SECONDS = 5.0
"""When to ask again a server that is ending."""
_MAX_VIOLATION_BYTES = 3000
_MAX_MESSAGE_CHARACTERS = 1000
_HEALTH = "/grpc.health.v1.Health/"
_CONTRACT = "/knowledge_engine.v1."


def to_status(error: KnowledgeEngineError) -> status_pb2.Status:
    """The error as callers see it."""
    code = _code_of(error)
    packed = [_packed(error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=error.metadata))]
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for item in error.violations:
            # Details travel in trailing metadata, which peers cut off at 8 KiB.
            if bad_request.ByteSize() + len(item.description) > _MAX_VIOLATION_BYTES:
                break
            bad_request.field_violations.add(field=item.field, description=item.description, reason=item.reason)
        packed.append(_packed(bad_request))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        packed.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code.value[0], message=error.message[:_MAX_MESSAGE_CHARACTERS], details=packed)


def _code_of(error: KnowledgeEngineError) -> grpc.StatusCode:
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


class Guard(grpc.aio.ServerInterceptor):
    """Authentication, request ids, numbers and error mapping for every method; health alone needs no key, and no
    count. Calls of the contract are traced."""

    def __init__(
        self, keys: Mapping[str, str], metrics: ServerMetrics, traces: Traces, write_timeout_seconds: float
    ) -> None:
        self._keys = {name: key.encode() for name, key in keys.items()}
        self._metrics = metrics
        self._traces = traces
        self._write_timeout_seconds = write_timeout_seconds
        self._running: set[asyncio.Task[Any]] = set()
        self._is_draining = False

    async def drain(self, seconds: float) -> None:
        """Refuses new calls, waits for those under way, and after so long ends them; health goes on answering.

        All are told to come back. The server itself, once it is stopped, would only say CANCELLED.
        """
        self._is_draining = True
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=seconds)
            for task in late:
                task.cancel()

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH):
            return handler
        sent = handler_call_details.invocation_metadata or ()
        metadata = {key: value for key, value in sent if isinstance(value, str)}
        method = handler_call_details.method
        if handler.response_streaming:
            return _with(handler, self._stream(handler.unary_stream or handler.stream_stream, method, metadata))
        return _with(handler, self._unary(handler.unary_unary or handler.stream_unary, method, metadata))

    def _unary(self, behaviour: Any, method: str, metadata: Mapping[str, str]) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            request_id = self._enter(context, metadata)
            try:
                with self._watched(context, method, metadata), self._ended():
                    CALLER.set(self._caller(metadata))
                    return await behaviour(request, context)
            except BaseException as error:
                await _abort(context, error, request_id)

        return call

    def _stream(self, behaviour: Any, method: str, metadata: Mapping[str, str]) -> Any:
        # No generator itself: one that is cancelled before its first message, or while that is sent, is left open.
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            request_id = self._enter(context, metadata)
            try:
                with (
                    self._watched(context, method, metadata),
                    self._ended(),
                    _Writer(context, self._write_timeout_seconds) as writer,
                ):
                    CALLER.set(self._caller(metadata))
                    responses = behaviour(request, context)
                    if hasattr(responses, "__aiter__"):
                        async with aclosing(responses):
                            async for response in responses:
                                await writer.write(response)
                    else:  # reflection's servicer is a plain generator
                        for response in responses:
                            await writer.write(response)
            except BaseException as error:
                await _abort(context, error, request_id)

        return call

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Lets `drain` refuse or end what is served in it, with an error."""
        task = asyncio.current_task()
        assert task is not None
        if self._is_draining:
            raise _stopping()
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_draining:
                raise
            task.uncancel()
            raise _stopping() from None
        finally:
            self._running.discard(task)

    def _enter(self, context: grpc.aio.ServicerContext[Any, Any], metadata: Mapping[str, str]) -> str:
        given = metadata.get("x-request-id", "")
        request_id = given if given.isascii() and given.isprintable() and 0 < len(given) <= 64 else secrets.token_hex(8)
        context.set_trailing_metadata((("x-request-id", request_id),))
        return request_id

    @contextmanager
    def _watched(
        self, context: grpc.aio.ServicerContext[Any, Any], method: str, metadata: Mapping[str, str]
    ) -> Iterator[None]:
        """Counts, times and traces the call that is served in it."""
        started = time.monotonic()
        name = method.removeprefix("/")
        code, reason = grpc.StatusCode.OK, ""
        span = self._traces.start_call(name, metadata) if method.startswith(_CONTRACT) else SPAN.get()
        with self._metrics.active.track_inprogress():
            try:
                yield
            except BaseException as error:
                code, reason = _outcome(error, context)
                raise
            finally:
                if reason:
                    self._metrics.errors.labels(name, reason).inc()
                self._metrics.calls.labels(name, code.name).observe(time.monotonic() - started)
                span.end(code.name)

    def _caller(self, metadata: Mapping[str, str]) -> str:
        if not self._keys:
            return ""
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else metadata.get("x-api-key", "")
        if not given:
            raise AuthenticationError(
                "send an API key: metadata `authorization: Bearer KEY`", reason=Reason.API_KEY_MISSING
            )
        # Every key is compared, so that the time taken tells nothing.
        matches = [name for name, key in self._keys.items() if hmac.compare_digest(key, given.encode())]
        if not matches:
            raise AuthenticationError("this API key is not known here", reason=Reason.API_KEY_INVALID)
        return matches[0]


class _Writer:
    """Sends the messages of one stream, from the task that makes it, and lets none of them wait for its reader longer
    than `timeout_seconds`. One timer watches them all: one for each message costs a tenth of what sending it does."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], timeout_seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._context = context
        self._timeout_seconds = timeout_seconds
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._write_time: float | None = None
        """When the message was handed over that waits now."""
        self._is_late = False

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(self._timeout_seconds, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    async def write(self, response: Any) -> None:
        """Returns once there is room for the next message."""
        self._write_time = self._loop.time()
        try:
            await self._context.write(response)
        except asyncio.CancelledError:
            if not self._is_late or self._task.uncancel():  # another one wants its end, too
                raise
            raise CapacityError(
                f"nothing of this answer was read for {self._timeout_seconds:g} s",
                reason=Reason.READER_STALLED,
                seconds=self._timeout_seconds,
            ) from None
        except grpc.aio.BaseError:  # the caller went a moment ago, and our cancellation is under way
            raise asyncio.CancelledError from None
        finally:
            self._write_time = None

    def _look(self) -> None:
        now = self._loop.time()
        end = (now if self._write_time is None else self._write_time) + self._timeout_seconds
        if end > now:
            self._timer = self._loop.call_at(end, self._look)
        else:
            self._is_late = True
            self._task.cancel()


def _stopping() -> UpstreamError:
    return UpstreamError(
        "the server is stopping; ask again", reason=Reason.SERVER_UNAVAILABLE, retry_after_seconds=_RESTART_SECONDS
    )


def _outcome(error: BaseException, context: grpc.aio.ServicerContext[Any, Any]) -> tuple[grpc.StatusCode, str]:
    """The code and the reason with which `error` ends a call."""
    if isinstance(error, KnowledgeEngineError):
        return _code_of(error), error.reason.value
    if isinstance(error, Exception):
        return grpc.StatusCode.INTERNAL, Reason.INTERNAL.value
    left = context.time_remaining()
    if left is not None and left <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE.value
    return grpc.StatusCode.CANCELLED, Reason.CANCELLED_BY_CLIENT.value


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, request_id: str) -> None:
    """Ends the call with the error's status; raises in every case."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, asyncio.CancelledError):
        raise error
    if not isinstance(error, KnowledgeEngineError):
        if not isinstance(error, Exception):
            raise error
        _LOG.error("request %s failed unexpectedly", request_id, exc_info=error)
        error = KnowledgeEngineError(
            f"something unexpected went wrong; the server's log knows it as request {request_id}",
            reason=Reason.INTERNAL,
            request_id=request_id,
        )
    elif isinstance(error, errors.IntegrityError | errors.CredentialsError):
        _LOG.error("request %s: %s", request_id, error.message)
    status = to_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    context.set_trailing_metadata(
        (("x-request-id", request_id), ("grpc-status-details-bin", status.SerializeToString()))
    )
    try:
        async with asyncio.timeout(_LAST_WORD_SECONDS):
            await context.abort(code, status.message)
    except TimeoutError:
        raise asyncio.CancelledError from None


def _with(handler: Any, behaviour: Any) -> Any:
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
