"""Health tells what was last seen of every service, and asks nobody while it is asked."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.app import create_app
from knowledge_engine.core import Service
from knowledge_engine.server.app import RunningServer, start_server
from knowledge_engine.settings import Settings
from knowledge_engine.state import State

OUTSIDE = ("tracker", "openai", "s3", "hub")


class Somebody(ThreadingHTTPServer):
    """Answers every request with one status, counts them, and may keep silent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.num_requests = 0
        self.talks = threading.Event()
        self.talks.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Somebody

    def do_GET(self) -> None:
        self.server.num_requests += 1
        self.server.talks.wait(20)
        body = b'{"object": "list", "data": []}'
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def somebody() -> Iterator[Somebody]:
    server = Somebody()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.talks.set()
        server.shutdown()
        server.server_close()
        thread.join()


async def ask(running: RunningServer, settings: Settings) -> dict[str, str]:
    """The states as REST tells them."""
    async with grpc.aio.insecure_channel(running.address) as channel:
        app = create_app(settings, channel)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
            body = (await client.get("/api/v1/health")).json()
    states: dict[str, str] = body["components"] | body["external_apis"] | {"overall": body["overall"]}
    return states


async def becomes(running: RunningServer, settings: Settings, name: str, state: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while (seen := (await ask(running, settings))[name]) != state:
        assert time.monotonic() < deadline, f"{name} is {seen}, not {state}"
        await asyncio.sleep(0.05)


async def test_what_is_not_set_up_says_so(server: RunningServer, channel: grpc.aio.Channel) -> None:
    states = await ask(server, server._settings)
    assert {name: states[name] for name in OUTSIDE} == dict.fromkeys(OUTSIDE, "not_configured")
    assert (states["store"], states["engine"]) == ("ok", "down")  # no engine here
    stub = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="openai"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    listed = await stub.List(health_pb2.HealthListRequest())
    assert {"", "store", "engine", "knowledge_engine.v1.JobService"} <= set(listed.statuses)
    assert not set(OUTSIDE) & set(listed.statuses)


async def test_a_service_is_followed_through_good_and_bad_days(make_settings: Callable[..., Settings]) -> None:
    with somebody() as openai:
        settings = make_settings(openai_api_key="canary-key-1", openai_base_url=openai.url, probe_seconds=0.1)
        async with await start_server(settings) as running:
            state = State.open(settings.state_url, migrate=False)
            await becomes(running, settings, "openai", "ok")
            # Well at a glance, but the work of a worker failed.
            state.observe_service(Service.OPENAI, "the account has no credit left")
            await becomes(running, settings, "openai", "degraded")
            assert (await ask(running, settings))["overall"] == "degraded"
            state.observe_service(Service.OPENAI, None)
            await becomes(running, settings, "openai", "ok")
            openai.status = 401
            await becomes(running, settings, "openai", "down")
            openai.status = 503
            await asyncio.sleep(0.5)
            assert (await ask(running, settings))["openai"] == "down"
            openai.status = 200
            await becomes(running, settings, "openai", "ok")
            async with grpc.aio.insecure_channel(running.address) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="openai"))
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                openai.status = 500
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                watch.cancel()
            state.close()


async def test_nobody_is_called_while_health_is_asked(make_settings: Callable[..., Settings]) -> None:
    with somebody() as openai:
        settings = make_settings(openai_api_key="canary-key-1", openai_base_url=openai.url, probe_seconds=3600)
        async with await start_server(settings) as running:
            await becomes(running, settings, "openai", "ok")
            before = openai.num_requests
            for _ in range(50):
                await ask(running, settings)
            assert openai.num_requests == before == 1


async def test_a_silent_service_holds_up_nothing(make_settings: Callable[..., Settings]) -> None:
    with somebody() as silent:
        silent.talks.clear()
        settings = make_settings(
            openai_api_key="canary-key-1",
            openai_base_url=silent.url,
            huggingface_token="canary-key-2",
            huggingface_endpoint=silent.url,
            base_models={"other": "org/name"},
            probe_seconds=0.1,
        )
        async with await start_server(settings) as running:
            states = await asyncio.wait_for(ask(running, settings), 5)
            assert (states["store"], states["openai"], states["hub"]) == ("ok", "degraded", "degraded")
            await becomes(running, settings, "openai", "down")
            await becomes(running, settings, "hub", "down")
            assert (await asyncio.wait_for(ask(running, settings), 5))["store"] == "ok"


async def test_a_store_that_takes_no_writes_is_degraded(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    async with await start_server(settings) as running:
        lock = sqlite3.connect(settings.data_dir / "state.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        await becomes(running, settings, "store", "degraded", seconds=60)
        lock.execute("ROLLBACK")
        lock.close()
        await becomes(running, settings, "store", "ok")
