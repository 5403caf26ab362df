"""The composition root of the control process: builds every object, serves, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from knowledge_engine import failpoints
from knowledge_engine.bases import check_bases
from knowledge_engine.core import Service
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason
from knowledge_engine.inference.client import EngineClient, socket_path
from knowledge_engine.jobs import Jobs
from knowledge_engine.leftovers import clean_up, second_chance, sweep_checkpoints
from knowledge_engine.metrics import METHOD, ServerMetrics
from knowledge_engine.processes import take_server_lock
from knowledge_engine.registry import Registry
from knowledge_engine.server.exports import Exports
from knowledge_engine.server.health import Health, Watchman
from knowledge_engine.server.services import (
    DatasetServicer,
    InferenceServicer,
    JobServicer,
    ModelServicer,
    Texts,
)
from knowledge_engine.server.status import Guard
from knowledge_engine.settings import Settings, load_settings, split_address
from knowledge_engine.state import State
from knowledge_engine.tracing import Traces
from knowledge_engine.training.publishing import sweep_kept
from knowledge_engine.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

_LOG = logging.getLogger(__name__)

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
SERVICES = (
    *(
        descriptor.services_by_name[name].full_name
        for descriptor, name in (
            (jobs_pb2.DESCRIPTOR, "JobService"),
            (datasets_pb2.DESCRIPTOR, "DatasetService"),
            (models_pb2.DESCRIPTOR, "ModelService"),
        )
    ),
    INFERENCE_SERVICE,
)

_LAST_SECONDS = 3.0
_LAST_WORDS_SECONDS = 1.0
"""For calls that did not end in time: their callers are told."""
_OVERTIME_SECONDS = 4.5
"""A server whose calls, workers or chores do not end ends without them so long after the drain."""
_STORE_THREADS = 64
_ENGINE_PATIENCE_SECONDS = 2.0
"""An engine that answers no scrape within this is told as down; importing torch takes it longer, once."""
_STORE_PATIENCE_SECONDS = 1.5
"""A caller hears within two seconds that the store does not answer."""
_OPTIONS = (
    # A second server on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 12 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class RunningServer:
    """A started server; `port` is the real one. Closed by `stop` or at the end of `async with`."""

    def __init__(
        self,
        settings: Settings,
        server: grpc.aio.Server,
        guard: Guard,
        port: int,
        state: State,
        jobs: Jobs,
        traces: Traces,
    ) -> None:
        self.port = port
        self._settings = settings
        self._server = server
        self._guard = guard
        self._state = state
        self._jobs = jobs
        self._traces = traces
        self.engine: EngineClient
        self.health: Health
        self.watchman: Watchman
        self._bucket_is_over = threading.Event()

    def follow_bucket(self, registry: Registry) -> None:
        """In a thread of its own, which nobody waits for: a bucket that hangs holds up nothing."""

        def observe(trouble: str | None) -> None:
            self._state.observe_service(Service.S3, trouble)

        local = self._settings.data_dir / "models"
        if any(local.glob("*/*/manifest.json")):
            _LOG.warning("%s holds versions from before a bucket was set; they are kept and not served", local)

        arguments = (observe, self._bucket_is_over)
        threading.Thread(target=registry.follow, args=arguments, daemon=True, name="bucket").start()

    @property
    def address(self) -> str:
        host, _ = split_address(self._settings.grpc_address)
        return f"{f'[{host}]' if ':' in host else host}:{self.port}"

    async def stop(self) -> None:
        """Health off, calls drained, jobs queued again, everything closed."""
        await self.health.enter_graceful_shutdown()
        self.watchman.stop()
        self._bucket_is_over.set()
        await asyncio.gather(self._drain(), self._jobs.stop())
        await self.engine.close()
        await asyncio.gather(asyncio.to_thread(self._state.close), asyncio.to_thread(self._traces.close))

    async def _drain(self) -> None:
        """No new calls; those under way end by themselves, or else with an error that says why."""
        await self._guard.drain(self._settings.drain_seconds)
        await self._server.stop(_LAST_WORDS_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


async def start_server(settings: Settings) -> RunningServer:
    """Opens the store, binds the port and serves.

    Raises:
        InvalidSpecError: SETTINGS_INVALID, when the address cannot be bound or a base model is unusable.
        StateError: SERVER_RUNNING, when another server uses the data directory.
        IntegrityError: STATE_NEWER.
    """
    check_bases(settings)
    # The store's calls block. A locked one must not keep others from reading, so there are threads to spare.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_STORE_THREADS, "store"))
    # First of all: the store is another server's until it is ours.
    lock_file = await asyncio.to_thread(take_server_lock, settings)
    try:
        state = await asyncio.to_thread(State.open, settings.state_url, busy_timeout_seconds=_STORE_PATIENCE_SECONDS)
        await asyncio.to_thread(sweep_kept, settings)
        await asyncio.to_thread(sweep_checkpoints, settings, state)
    except BaseException:
        os.close(lock_file)
        raise
    registry = Registry.open(settings)
    datasets = Datasets(settings.data_dir / "datasets", state)
    engine = EngineClient(socket_path(settings))
    jobs = Jobs(
        settings,
        state,
        functools.partial(clean_up, settings, state),
        functools.partial(second_chance, settings),
        lock_file,
    )
    texts = Texts(settings)
    metrics, traces = ServerMetrics(), Traces("server")
    guard = Guard(settings.keys, metrics, traces, settings.write_timeout_seconds)
    server = grpc.aio.server(interceptors=[guard], options=_OPTIONS)
    jobs_pb2_grpc.add_JobServiceServicer_to_server(
        JobServicer(settings, jobs, state, datasets, registry, texts), server
    )
    datasets_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetServicer(settings, datasets, texts), server)
    models_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(registry, engine, Exports(settings)), server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(registry, engine, texts, settings.pinned_models), server
    )
    health = Health()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    _add_metrics(server, metrics, engine)
    if settings.reflection:
        _add_reflection(server)
    try:
        await jobs.start()
        port = _bind(server, settings)
        await server.start()
    except BaseException:
        await jobs.stop()
        state.close()
        raise
    running = RunningServer(settings, server, guard, port, state, jobs, traces)
    running.engine, running.health = engine, health
    running.watchman = Watchman(settings, health, state, jobs, engine, SERVICES, INFERENCE_SERVICE)
    await engine.start()
    await running.watchman.start()
    if registry.has_bucket:
        running.follow_bucket(registry)
    return running


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    try:
        return server.add_insecure_port(settings.grpc_address)
    except RuntimeError:
        raise InvalidSpecError(
            f"KNOWLEDGE_GRPC_ADDRESS: {settings.grpc_address} cannot be bound; it is taken or not of this machine",
            reason=Reason.SETTINGS_INVALID,
            address=settings.grpc_address,
        ) from None


def _add_metrics(server: grpc.aio.Server, metrics: ServerMetrics, engine: EngineClient) -> None:
    """Tells the gateway what server and engine count."""

    async def read(_: bytes, __: Any) -> bytes:
        text = b""
        with contextlib.suppress(TimeoutError):
            text = await asyncio.wait_for(engine.metrics(), _ENGINE_PATIENCE_SECONDS)
        metrics.engine_up.set(bool(text))
        metrics.engine_ready.set(engine.status.state == "ready")
        return metrics.text() + text

    _, service, method = METHOD.split("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(read)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])


def _add_reflection(server: grpc.aio.Server) -> None:
    """Serves v1alpha through the library, and v1, which has the same messages, through the same servicer."""
    names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": method})]
    )


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; prints the real address as one JSON line once it is ready."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    running = await start_server(settings)
    # Else every full collection looks at all that was imported, and for 0.1 s nobody is answered.
    gc.collect()
    gc.freeze()
    print(json.dumps({"grpc_address": running.address}), flush=True)  # noqa: T201
    await stopping.wait()
    _LOG.info("stopping")
    # A handler that swallows its cancellation must not keep the process alive.
    loop = asyncio.get_running_loop()
    watchdog = loop.call_later(settings.drain_seconds + _OVERTIME_SECONDS, os._exit, 0)
    with contextlib.suppress(asyncio.CancelledError):
        await running.stop()
    watchdog.cancel()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every look at a service
    if failpoints.is_active():
        _LOG.warning("%s is set: parts of this service will fail on purpose", failpoints.VARIABLE)
    os.umask(0o077)
    try:
        asyncio.run(serve(load_settings()))
    except KnowledgeEngineError as error:
        raise SystemExit(f"{error.message}") from None
    # The interpreter waits for threads of pools; one of them may be inside a bucket that hangs.
    end = threading.Timer(_LAST_SECONDS, os._exit, (0,))
    end.daemon = True
    end.start()
