"""`/metrics`: what gateway, server and engine count, as one text for Prometheus; and the counting of requests here."""

from __future__ import annotations

import time

import grpc
from fastapi import APIRouter, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.backend import Call
from gateway.strict import StrictRoute
from knowledge_engine.metrics import CONTENT_TYPE, GatewayMetrics

router = APIRouter(route_class=StrictRoute)

# Longer than the server waits for the engine, shorter than Prometheus waits for us.
_DEADLINE_SECONDS = 5.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_ANSWER = 499


@router.get("/metrics", include_in_schema=False)
async def read(calls: Call) -> Response:
    """Answers whatever is down: the gauges named `up` tell."""
    server, text = calls.server, b""
    try:
        text = await server.read_metrics(b"", timeout=_DEADLINE_SECONDS, metadata=calls.metadata)
        server.metrics.server_up.set(1)
    except grpc.aio.AioRpcError:
        server.metrics.server_up.set(0)
    return Response(server.metrics.text() + text, media_type=CONTENT_TYPE)


class Counted:
    """ASGI middleware: counts and times every request, by the route that took it."""

    def __init__(self, app: ASGIApp, counts: GatewayMetrics) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), _NO_ANSWER

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._counts.active.track_inprogress():
                await self._app(scope, receive, send_and_note)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", "none")
            self._counts.requests.labels(method, route, str(status)).observe(time.monotonic() - started)
