"""Requests read strictly: unknown or repeated query parameters, too large or malformed JSON are refused, not ignored.

It knows nothing of any route. Every refusal is a `ProblemError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any, NoReturn

import grpc
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from gateway.problems import ProblemError, too_large, unprocessable
from knowledge_engine.errors import Reason

MAX_JSON_BYTES = 10_000_000
# A protobuf Struct is parsed at most 100 messages deep, and one JSON level takes up to three of them.
MAX_DEPTH = 30
# Numbers travel as doubles; a larger integer would arrive as another one.
MAX_INTEGER = 2**53


class StrictRequest(Request):
    """A request whose `body` is bounded while it streams in, and whose `json` takes RFC 8259 and nothing else."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            if declared_length(self) > MAX_JSON_BYTES:
                raise too_large("the body", MAX_JSON_BYTES)
            body = bytearray()
            async for chunk in self.stream():
                body += chunk
                if len(body) > MAX_JSON_BYTES:
                    raise too_large("the body", MAX_JSON_BYTES)
            if body and not _is_json(self.headers.get("content-type", "")):
                raise unsupported_media_type("application/json")
            self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route that reads its request strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def handle(request: Request) -> Response:
            _check_query(request, known)
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def parse_json(body: bytes) -> Any:
    """Parses a JSON text.

    Raises:
        ProblemError: 422 for what is no JSON, NaN, a repeated key, text that is no Unicode, or too deep a nesting.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise unprocessable([("", f"the body is not JSON: {error.msg} at {place}")]) from None
    except UnicodeDecodeError:
        raise unprocessable([("", "the body is not UTF-8")]) from None
    except ValueError as error:
        raise unprocessable([("", f"the body is not JSON: {error}")]) from None
    except RecursionError:
        raise unprocessable([("", f"the body is nested more than {MAX_DEPTH} deep")]) from None
    _check_values(value)
    return value


def unsupported_media_type(*allowed: str) -> ProblemError:
    return ProblemError(
        415,
        grpc.StatusCode.INVALID_ARGUMENT,
        Reason.MEDIA_TYPE_UNSUPPORTED,
        f"send the body as Content-Type: {' or '.join(allowed)}",
        headers={"Accept-Post": ", ".join(allowed)},
    )


def schema_mismatch(error: RequestValidationError) -> ProblemError:
    """What pydantic found, with paths as the caller wrote them and without the caller's values."""
    violations = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if part not in ("body", "query", "path", "header"))
        violations.append((path[:200], str(item["msg"]).removeprefix("Value error, ")))
    return unprocessable(violations)


def media_type(header: str) -> str:
    """The bare type of a Content-Type header, lower case."""
    message = Message()
    message["content-type"] = header
    return message.get_content_type()


def _is_json(header: str) -> bool:
    return bool(header) and media_type(header) == "application/json"


def declared_length(request: Request) -> int:
    value = request.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 19 else 0


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object holds a key twice")
    return members


def _check_values(root: Any) -> None:
    pending = [(root, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise unprocessable([("", f"the body is nested more than {MAX_DEPTH} deep")])
        if isinstance(value, dict):
            pending.extend((item, depth + 1) for item in value.values())
            pending.extend((key, depth) for key in value)
        elif isinstance(value, list):
            pending.extend((item, depth + 1) for item in value)
        elif isinstance(value, str):
            _check_text(value)
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise unprocessable([("", "the body holds a number beyond the range of a double")])


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise unprocessable([("", "the body holds half of a surrogate pair, which is no Unicode text")]) from None


def _check_query(request: Request, known: set[str]) -> None:
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise unprocessable([(name[:100], f"unknown query parameter; known here: {allowed}")])
        if name in seen:
            raise unprocessable([(name, "given more than once")])
        seen.add(name)
