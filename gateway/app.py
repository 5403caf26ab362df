"""The gateway's composition root: settings in, a FastAPI application out.

`uvicorn gateway.app:from_environment --factory` serves it; it holds no state but the channel to the gRPC server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import grpc
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gateway import health, inference, metrics, openapi, routes
from gateway.access import HEALTH_PATH, Access
from gateway.backend import Backend
from gateway.problems import ProblemError, error_response, response, rpc_problem
from gateway.strict import schema_mismatch
from knowledge_engine.errors import Reason
from knowledge_engine.settings import Settings, load_settings

_DESCRIPTION = (
    "The Knowledge Engine over REST: the same contract as its gRPC services, as JSON and server-sent events. "
    "Every error is a problem (RFC 9457) with a stable `reason`."
)


def from_environment() -> FastAPI:
    """The application for `KNOWLEDGE_*` and `config/.env`; for `uvicorn --factory`.

    Raises:
        InvalidSpecError: SETTINGS_INVALID.
    """
    return create_app(load_settings())


def create_app(settings: Settings, channel: grpc.aio.Channel | None = None) -> FastAPI:
    """The application over `channel`, or over one of its own to `settings.grpc_address`.

    A given channel stays the caller's to close; its own is closed when the application's lifespan ends.
    """
    backend = Backend(settings, channel)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPI(
        title="Knowledge Engine",
        version=version("knowledge-engine"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry={
            "tracer_provider": backend.traces.provider,
            "tracing": backend.traces.provider is not None,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": _is_untraced,
        },
    )
    app.state.backend = backend
    for part in (routes, inference, health, metrics):
        app.include_router(part.router)
    openapi.install(app, with_keys=not settings.anonymous)
    _handle_errors(app)
    # The last one added is the outermost: a browser must be able to read a refusal, and every answer counts.
    app.add_middleware(Access, settings=settings)
    _allow_origins(app, settings)
    app.add_middleware(metrics.Counted, counts=backend.metrics)
    return app


def _is_untraced(scope: MutableMapping[str, Any]) -> bool:
    """Whether nobody would look for a trace of it: what is asked every few seconds, and pages."""
    return scope["path"] == HEALTH_PATH or not scope["path"].startswith("/api/")


def _allow_origins(app: FastAPI, settings: Settings) -> None:
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_credentials="*" not in settings.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "X-API-Key", "X-Request-ID", "Last-Event-ID", "Idempotency-Key"),
            expose_headers=("X-Request-ID", "Link", "Retry-After"),
        )


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(grpc.aio.AioRpcError)
    async def _rpc(request: Request, error: grpc.aio.AioRpcError) -> Response:
        return response(*rpc_problem(error, request.state.request_id))

    @app.exception_handler(RequestValidationError)
    async def _mismatch(request: Request, error: RequestValidationError) -> Response:
        return error_response(schema_mismatch(error), request.state.request_id)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        return error_response(_as_problem(request, error), request.state.request_id)


def _as_problem(request: Request, error: HTTPException) -> ProblemError:
    """Ours as they are; the router's own two in the same form."""
    if isinstance(error, ProblemError):
        return error
    if error.status_code == 405:
        return ProblemError(
            405,
            grpc.StatusCode.UNIMPLEMENTED,
            Reason.METHOD_NOT_ALLOWED,
            f"{request.method} is not possible here",
            headers=error.headers,
        )
    if error.status_code == 404:
        return ProblemError(404, grpc.StatusCode.NOT_FOUND, Reason.ROUTE_NOT_FOUND, "there is nothing at this path")
    return ProblemError(
        error.status_code, grpc.StatusCode.INVALID_ARGUMENT, Reason.SPEC_INVALID, "the request cannot be read"
    )
