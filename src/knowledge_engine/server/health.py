"""Health: what was last seen of everything the service leans on, told without calling anybody.

Two things are known of an outside service: what a look at it said (`probe`, now and then, in threads of their own) and
how the latest real work with it went (`JobContext.observe`, kept in the store). It is `down` when it does not answer or
refuses our credentials, `degraded` when it answers but that work failed, and `ok` otherwise. What was seen is published
through grpc.health.v1, under the names of `core.Service` beside those of the contract's services.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from knowledge_engine import hub, storage, tracking
from knowledge_engine.core import HEALTH_WORDS, Service, ServiceState, utc_now
from knowledge_engine.errors import KnowledgeEngineError
from knowledge_engine.generation import chat_client
from knowledge_engine.inference.client import EngineClient
from knowledge_engine.jobs import Jobs
from knowledge_engine.settings import Settings
from knowledge_engine.state import Observation, State

Probe = Callable[[], None]
"""Looks at one service; raises KnowledgeEngineError with the sentence that says what is wrong. Blocks for seconds."""

_PUBLISH_SECONDS = 0.25
_STORE_SECONDS = 1.0
_LOOK_SECONDS = 15.0  # in all; a probe bounds each of its steps
_AGAIN_SECONDS = 10.0  # a service that is down is looked at more often, to be found soon when it is back
_WORK_COUNTS_FOR = timedelta(hours=1)  # then its trouble is history, not state
_WORDS = {state: health_pb2.HealthCheckResponse.ServingStatus.Value(word) for word, state in HEALTH_WORDS.items()}

_OUTSIDE = frozenset({Service.TRACKER.value, Service.OPENAI.value, Service.S3.value, Service.HUB.value})

_LOG = logging.getLogger(__name__)


class Health(HealthServicer):  # type: ignore[misc]  # the library is untyped
    """The health service; the library's own lacks `List`."""

    async def List(  # noqa: N802 - the protocol's name
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def enter_graceful_shutdown(self) -> None:
        """What others are does not change because we end."""
        others = {name: status for name, status in self._server_status.items() if name in _OUTSIDE}
        await super().enter_graceful_shutdown()
        self._server_status.update(others)


class Watchman:
    """Looks, remembers and publishes, from `start` to `stop`."""

    def __init__(
        self,
        settings: Settings,
        health: Health,
        state: State,
        jobs: Jobs,
        engine: EngineClient,
        services: tuple[str, ...],
        inference_service: str,
    ) -> None:
        self._settings = settings
        self._health = health
        self._state = state
        self._jobs = jobs
        self._engine = engine
        self._services = services
        self._inference_service = inference_service
        self._probes = find_probes(settings)
        self._looks: dict[Service, str] = {}  # what the latest look found wrong; empty for nothing
        self._work: Mapping[Service, Observation] = {}
        self._store_trouble = ""
        self._told: dict[str, ServiceState] = {}
        self._said: dict[Service, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Publishes what is known now and goes on in the background."""
        await self._publish()
        self._tasks = [
            asyncio.create_task(work)
            for work in (
                self._follow_store(),
                self._follow(),
                *(self._follow_probe(service, probe) for service, probe in self._probes.items()),
            )
        ]

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    # --- looking --------------------------------------------------------------------------------------------------

    async def _follow_probe(self, service: Service, probe: Probe) -> None:
        every = self._settings.probe_seconds
        while True:
            self._looks[service] = trouble = await self._look(service, probe)
            await asyncio.sleep(min(every, _AGAIN_SECONDS) if trouble else every)

    async def _look(self, service: Service, probe: Probe) -> str:
        try:
            await asyncio.wait_for(_in_own_thread(probe), _LOOK_SECONDS)
        except TimeoutError:
            return "it does not answer in time"
        except KnowledgeEngineError as error:
            return error.message
        except Exception:  # a probe that is broken says nothing good of its service, and ends nothing else
            _LOG.exception("looking at %s failed", service)
            return "looking at it failed unexpectedly; the server's log says more"
        return ""

    async def _follow_store(self) -> None:
        while True:
            try:
                self._work = await asyncio.to_thread(self._state.observations)
                self._store_trouble = ""
            except KnowledgeEngineError as error:
                self._store_trouble = error.message
            except Exception:
                _LOG.exception("looking at the store failed")
                self._store_trouble = "looking at it failed unexpectedly; the server's log says more"
            await asyncio.sleep(_STORE_SECONDS)

    # --- telling --------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_PUBLISH_SECONDS)
            await self._publish()

    async def _publish(self) -> None:
        seen = {service: self._see(service) for service in Service}
        for service, (state, why) in seen.items():
            await self._tell(service.value, state)
            said = f"{service}: {state}{f', {why}' if why else ''}"
            if self._said.get(service) != said:
                self._said[service] = said
                _LOG.info("%s", said)
        for name in ("", *self._services):
            state, _ = seen[Service.ENGINE if name == self._inference_service else Service.STORE]
            serves = state is ServiceState.OK or (state is ServiceState.DEGRADED and name != self._inference_service)
            await self._tell(name, ServiceState.OK if serves else ServiceState.DOWN)

    async def _tell(self, name: str, state: ServiceState) -> None:
        """Publishes a state if it is news."""
        if self._told.get(name) is not state:
            self._told[name] = state
            if state is not ServiceState.NOT_CONFIGURED:
                await self._health.set(name, _WORDS[state])

    def _see(self, service: Service) -> tuple[ServiceState, str]:
        """The state of a service now, and one sentence on why it is not well."""
        if service is Service.ENGINE:
            status = self._engine.status
            states = {"ready": ServiceState.OK, "down": ServiceState.DOWN}
            # What it prepares changes with every percent; why it is down does not.
            return states.get(
                status.state, ServiceState.DEGRADED
            ), status.detail if status.state == "down" else status.state
        if service is Service.STORE:
            if self._store_trouble:
                return ServiceState.DOWN, self._store_trouble
            return (ServiceState.DEGRADED, self._jobs.trouble) if self._jobs.trouble else (ServiceState.OK, "")
        if service not in self._probes:
            return ServiceState.NOT_CONFIGURED, ""
        look = self._looks.get(service)
        if look is None:
            return ServiceState.DEGRADED, "not looked at yet"
        if look:
            return ServiceState.DOWN, look
        work = self._work.get(service)
        if work is not None and work.trouble and utc_now() - work.update_time < _WORK_COUNTS_FOR:
            return ServiceState.DEGRADED, work.trouble
        return ServiceState.OK, ""


async def _in_own_thread(probe: Probe) -> None:
    """One that hangs takes no thread from anybody, and keeps no process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not done.done():  # nobody waits any more
            done.set_exception(error) if error is not None else done.set_result(None)

    def look() -> None:
        error: BaseException | None = None
        try:
            probe()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=look, name="probe", daemon=True).start()
    await done


def find_probes(settings: Settings) -> dict[Service, Probe]:
    """How to look at each outside service that is set up here."""
    probes: dict[Service, Probe] = {}
    if settings.openai_api_key is not None:
        probes[Service.OPENAI] = lambda: chat_client.probe(settings)
    if settings.s3_bucket is not None:
        probes[Service.S3] = lambda: storage.probe(settings)
    if hub.is_needed(settings):
        probes[Service.HUB] = lambda: hub.probe(settings)
    if settings.wandb_api_key is not None:
        probes[Service.TRACKER] = lambda: tracking.probe(settings)
    return probes
