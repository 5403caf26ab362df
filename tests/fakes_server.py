"""A gRPC server whose answers are written by the test: for statuses that the real server cannot be brought to give.

It speaks the real contract over a real socket; only what a method answers is scripted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2, message_factory
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from knowledge_engine.v1 import datasets_pb2, inference_pb2, jobs_pb2, models_pb2

Script: TypeAlias = Message | status_pb2.Status | Callable[[Any, Any], Any]

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for module in (jobs_pb2, datasets_pb2, models_pb2, inference_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass
class Received:
    """One call as the server saw it; `cancelled` is set when it ended before its answer did."""

    method: str
    request: Any
    metadata: dict[str, str]
    seconds_left: float | None
    cancelled: bool = False


@dataclass
class ScriptedServer:
    """`script` maps method names to a response, a status, or a function of request and context."""

    address: str = ""
    script: dict[str, Script] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)


def status(
    code: grpc.StatusCode,
    reason: str = "",
    message: str = "it failed",
    *,
    violations: tuple[tuple[str, str], ...] = (),
    retry_seconds: float | None = None,
    **metadata: str,
) -> status_pb2.Status:
    """A rich status; without a reason it has no ErrorInfo, like one that a transport made."""
    details: list[Message] = []
    if reason:
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain="knowledge-engine", metadata=metadata))
    if violations:
        fields = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(retry_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


@asynccontextmanager
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    """Serves on a free port until the block ends."""
    scripted = ScriptedServer()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([_Handlers(scripted)])
    scripted.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield scripted
    finally:
        await server.stop(None)


async def abort(context: Any, outcome: status_pb2.Status) -> None:
    """Ends the call with a rich status."""
    if outcome.details:
        context.set_trailing_metadata((("grpc-status-details-bin", outcome.SerializeToString()),))
    code = next(code for code in grpc.StatusCode if code.value[0] == outcome.code)
    await context.abort(code, outcome.message)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, scripted: ScriptedServer) -> None:
        self._scripted = scripted

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = METHODS.get(handler_call_details.method)
        if method is None:
            return None
        read = message_factory.GetMessageClass(method.input_type).FromString
        arguments: dict[str, Any] = {
            "request_deserializer": read,
            "response_serializer": lambda message: message.SerializeToString(),
        }
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._unary(method.name), **arguments)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method.name), **arguments)
        return grpc.unary_unary_rpc_method_handler(self._unary(method.name), **arguments)

    def _enter(self, name: str, request: Any, context: Any) -> Received:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        call = Received(name, request, metadata, context.time_remaining())
        self._scripted.received.append(call)
        return call

    def _unary(self, name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        async def answer(request: Any, context: Any) -> Any:
            call = self._enter(name, request, context)
            outcome = self._scripted.script[name]
            if isinstance(outcome, status_pb2.Status):
                await abort(context, outcome)
            if not callable(outcome):
                return outcome
            try:
                return await outcome(request, context)
            finally:
                call.cancelled = context.cancelled()

        return answer

    def _stream(self, name: str) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            call = self._enter(name, request, context)
            outcome = self._scripted.script[name]
            if isinstance(outcome, status_pb2.Status):
                await abort(context, outcome)
            assert callable(outcome)
            call.cancelled = True
            async for message in outcome(request, context):
                yield message
            call.cancelled = False

        return answer
