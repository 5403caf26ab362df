"""The health route: what the server says of itself, and which outside services are set up. Never demands a key."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Literal

import grpc
from fastapi import APIRouter, Response
from grpc_health.v1 import health_pb2

from gateway import schemas
from gateway.backend import Backend, Call
from gateway.openapi import errors, rpc
from gateway.strict import StrictRoute
from knowledge_engine.settings import Settings
from knowledge_engine.v1 import datasets_pb2, inference_pb2, jobs_pb2, models_pb2

router = APIRouter(prefix="/api/v1", route_class=StrictRoute, tags=["health"])

_SERVICES = tuple(
    service.full_name
    for module in (jobs_pb2, datasets_pb2, models_pb2, inference_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
# A server that is well answers within milliseconds, whatever else it does.
_DEADLINE_SECONDS = 2.0
_SERVING = "SERVING"


@router.get(
    "/health",
    response_model=schemas.HealthResponse,
    responses={
        503: {"model": schemas.HealthResponse, "description": "The server does not answer or does not serve."},
        **errors(only=(403, 422)),
    },
    openapi_extra=rpc("Health.Check"),
)
async def health(calls: Call, response: Response) -> schemas.HealthResponse:
    """How the service is; 503 when it is unhealthy."""
    whole, *parts = await asyncio.gather(*(_check(calls.server, name) for name in ("", *_SERVICES)))
    overall: Literal["healthy", "degraded", "unhealthy"] = "healthy"
    if whole != _SERVING:
        overall = "unhealthy"
        response.status_code = 503
    elif any(part != _SERVING for part in parts):
        overall = "degraded"
    return schemas.HealthResponse(
        service="healthy" if whole == _SERVING else "unhealthy",
        services={name.rpartition(".")[2]: part for name, part in zip(_SERVICES, parts, strict=True)},
        external_apis=_external_apis(calls.server.settings),
        overall=overall,
        timestamp=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    )


async def _check(server: Backend, service: str) -> str:
    """`SERVING`, another word of the health protocol, or the code of the call that failed."""
    request: Any = health_pb2.HealthCheckRequest(service=service)
    try:
        answer = await server.health.Check(request, timeout=_DEADLINE_SECONDS)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _external_apis(settings: Settings) -> dict[str, Literal["configured", "not_configured"]]:
    """Whether each is set up here; nothing is called to find out more."""
    set_up = {
        "openai": settings.openai_api_key,
        "wandb": settings.wandb_api_key,
        "huggingface": settings.huggingface_token,
        "s3": settings.s3_bucket,
    }
    return {name: "configured" if value else "not_configured" for name, value in set_up.items()}
