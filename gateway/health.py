"""The health route: what the server says of itself and of what it leans on. Never demands a key."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import grpc
from fastapi import APIRouter, Response
from grpc_health.v1 import health_pb2

from gateway import schemas
from gateway.backend import Backend, Call
from gateway.openapi import errors, rpc
from gateway.strict import StrictRoute
from knowledge_engine.core import HEALTH_WORDS, Service, ServiceState
from knowledge_engine.v1 import datasets_pb2, inference_pb2, jobs_pb2, models_pb2

router = APIRouter(prefix="/api/v1", route_class=StrictRoute, tags=["health"])

_SERVICES = tuple(
    service.full_name
    for module in (jobs_pb2, datasets_pb2, models_pb2, inference_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
_COMPONENTS = (Service.ENGINE, Service.STORE)
_WELL = {ServiceState.OK, ServiceState.NOT_CONFIGURED}
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
    openapi_extra=rpc("Health.List"),
)
async def health(calls: Call, response: Response) -> schemas.HealthResponse:
    """How the service is; 503 when it is unhealthy."""
    told = await _list(calls.server)
    serves = told.get("") == _SERVING
    seen = {name: _state(told, name) for name in Service}
    services = {name.rpartition(".")[2]: told.get(name, "UNAVAILABLE") for name in _SERVICES}
    overall: Literal["healthy", "degraded", "unhealthy"] = "healthy"
    if not serves:
        overall = "unhealthy"
        response.status_code = 503
    elif any(word != _SERVING for word in services.values()) or set(seen.values()) - _WELL:
        overall = "degraded"
    return schemas.HealthResponse(
        service="healthy" if serves else "unhealthy",
        services=services,
        components={name: state for name, state in seen.items() if name in _COMPONENTS},
        external_apis={name: state for name, state in seen.items() if name not in _COMPONENTS},
        overall=overall,
        timestamp=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    )


async def _list(server: Backend) -> dict[str, str]:
    """The server's words by name; empty when it does not answer."""
    try:
        answer = await server.health.List(health_pb2.HealthListRequest(), timeout=_DEADLINE_SECONDS)
    except grpc.aio.AioRpcError:
        return {}
    word = health_pb2.HealthCheckResponse.ServingStatus.Name
    return {name: str(word(status.status)) for name, status in answer.statuses.items()}


def _state(told: dict[str, str], name: Service) -> ServiceState:
    """Without a server nothing is known of what it leans on, which is worse than `ok` and no more than that."""
    if name.value in told:
        return HEALTH_WORDS[told[name.value]]
    if told:
        return ServiceState.NOT_CONFIGURED
    return ServiceState.DOWN if name in _COMPONENTS else ServiceState.DEGRADED
