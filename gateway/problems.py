"""Failures as problem+json (RFC 9457): a gRPC status becomes one body, here and nowhere else.

It reads statuses only and knows no service. HTTP numbers are those of `google/rpc/code.proto`, but for what is too
large, which is 413: 400 would blame the content, and 429 would invite to try again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import grpc
from fastapi import HTTPException
from fastapi.responses import Response
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from pydantic import BaseModel, Field

from knowledge_engine.errors import Reason

MEDIA_TYPE = "application/problem+json"
MAX_VIOLATIONS = 20

HTTP_STATUS: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
_TOO_LARGE = frozenset({Reason.DATASET_TOO_LARGE, Reason.BODY_TOO_LARGE})

# What a transport says on its own, without an ErrorInfo; its own words would show addresses and internals.
_TRANSPORT: Mapping[grpc.StatusCode, tuple[Reason, str]] = {
    grpc.StatusCode.UNAVAILABLE: (Reason.SERVER_UNAVAILABLE, "the Knowledge Engine server does not answer"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (Reason.DEADLINE, "the answer took longer than a request may"),
    grpc.StatusCode.CANCELLED: (Reason.CANCELLED_BY_CLIENT, "the call was cancelled"),
    grpc.StatusCode.UNIMPLEMENTED: (Reason.METHOD_UNKNOWN, "the Knowledge Engine server does not know this method"),
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class FieldViolation(BaseModel):
    """One field that is wrong."""

    field: str = Field(description="Path of the field, such as `training_config.epochs`; empty for the whole.")
    description: str = Field(description="What is wrong with it.")
    reason: str = Field("", description="A stable code, such as `ROLE_UNKNOWN` of a dataset's row; mostly empty.")


class Failure(BaseModel):
    """Why something failed."""

    code: str = Field(description="The gRPC status code, such as `NOT_FOUND`.")
    reason: str = Field(description="Stable, documented code, such as `JOB_NOT_FOUND`.")
    detail: str = Field(description="What happened, in a sentence.")
    metadata: dict[str, str] = Field(description="The changing values of the sentence.")
    violations: list[FieldViolation] = Field(description="The fields that are wrong, at most 20.")


class Problem(Failure):
    """The body of every error (RFC 9457)."""

    type: str = Field(description="`urn:knowledge-engine:error:` and the reason.")
    title: str = Field(description="The kind of failure.")
    status: int = Field(description="The HTTP status.")
    instance: str = Field(description="The request's id, as in the `x-request-id` header and in the logs.")


class ProblemError(HTTPException):
    """A failure that the gateway itself finds. An HTTPException, so that FastAPI passes it on while it reads a body."""

    def __init__(
        self,
        status: int,
        code: grpc.StatusCode,
        reason: Reason,
        detail: str,
        *,
        violations: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        **metadata: object,
    ) -> None:
        super().__init__(status, detail, headers=dict(headers or {}))
        self.failure = Failure(
            code=code.name,
            reason=reason,
            detail=detail,
            metadata={key: str(value) for key, value in metadata.items()},
            violations=[FieldViolation(field=field, description=text) for field, text in violations[:MAX_VIOLATIONS]],
        )


def unprocessable(violations: Sequence[tuple[str, str]]) -> ProblemError:
    """A request that does not have the documented shape."""
    field, description = violations[0]
    detail = f"{field}: {description}" if field else description
    return ProblemError(422, grpc.StatusCode.INVALID_ARGUMENT, Reason.SPEC_INVALID, detail, violations=violations)


def too_large(what: str, limit: int, reason: Reason = Reason.BODY_TOO_LARGE) -> ProblemError:
    return ProblemError(
        413,
        grpc.StatusCode.INVALID_ARGUMENT,
        reason,
        f"{what} is larger than {limit} bytes",
        # The rest of it will not be read.
        headers={"Connection": "close"},
        limit_bytes=limit,
    )


def failure_of(status: status_pb2.Status) -> Failure:
    """The status of a job or of a call; unpacks ErrorInfo and BadRequest."""
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, bad_request):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    reason, detail_text = info.reason, status.message
    if not reason:
        reason, detail_text = _TRANSPORT.get(code, (code.name, "the Knowledge Engine server failed to answer"))
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in status.message:
            reason, detail_text = Reason.BODY_TOO_LARGE, "the request is larger than the server takes"
    return Failure(
        code=code.name,
        reason=reason,
        detail=detail_text,
        metadata=dict(info.metadata),
        violations=[
            FieldViolation(field=item.field, description=item.description, reason=item.reason)
            for item in bad_request.field_violations[:MAX_VIOLATIONS]
        ],
    )


def http_status(failure: Failure) -> int:
    """The HTTP number of a failed call."""
    return 413 if failure.reason in _TOO_LARGE else HTTP_STATUS[grpc.StatusCode[failure.code]]


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The rich status of a failed call, or what its code and words say when it has none."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status(code=error.code().value[0], message=error.details() or "")


def rpc_problem(error: grpc.aio.AioRpcError, request_id: str) -> tuple[Problem, dict[str, str]]:
    """Body and headers for a failed call."""
    status = status_of(error)
    failure = failure_of(status)
    headers: dict[str, str] = {}
    seconds = _retry_seconds(status, failure)
    if seconds is not None:
        headers["Retry-After"] = str(seconds)
    if failure.code == grpc.StatusCode.UNAUTHENTICATED.name:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(failure, http_status(failure), request_id), headers


def _retry_seconds(status: status_pb2.Status, failure: Failure) -> int | None:
    """Whole seconds from RetryInfo; 1 where the server is away, since the gateway looks for it again that often."""
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            milliseconds: int = info.retry_delay.ToMilliseconds()
            return max(1, math.ceil(milliseconds / 1000))
    return 1 if failure.reason == Reason.SERVER_UNAVAILABLE else None


def problem(failure: Failure, status: int, request_id: str) -> Problem:
    return Problem(
        **failure.model_dump(),
        type=f"urn:knowledge-engine:error:{failure.reason}",
        title=title_of(status),
        status=status,
        instance=request_id,
    )


def title_of(status: int) -> str:
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase


def response(body: Problem, headers: Mapping[str, str] | None = None) -> Response:
    content = json.dumps(body.model_dump(), ensure_ascii=False).encode("utf-8", "replace")
    return Response(content, body.status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def error_response(error: ProblemError, request_id: str) -> Response:
    return response(problem(error.failure, error.status_code, request_id), error.headers)


def internal(request_id: str) -> Response:
    """The fixed answer to whatever is unexpected; the log holds the rest."""
    failure = Failure(
        code=grpc.StatusCode.INTERNAL.name,
        reason=Reason.INTERNAL,
        detail=f"something unexpected went wrong; the gateway's log knows it as request {request_id}",
        metadata={"request_id": request_id},
        violations=[],
    )
    return response(problem(failure, 500, request_id))
