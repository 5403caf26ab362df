"""More than there is room for, readers that do not read, and an end while calls are under way."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knowledge_engine.bases import prepare_base
from knowledge_engine.core import FinishReason
from knowledge_engine.inference.client import EngineClient, EngineRequest, Finished
from knowledge_engine.metrics import ServerMetrics
from knowledge_engine.server import services
from knowledge_engine.server.app import start_server
from knowledge_engine.server.status import Guard
from knowledge_engine.settings import Settings
from knowledge_engine.tracing import Traces
from knowledge_engine.v1 import inference_pb2, inference_pb2_grpc
from tests.fakes_server import ScriptedServer, scripted_server
from tests.running import environment
from tests.test_engine import EngineProcess
from tests.tiny import CONTEXT

ROOT = Path(__file__).parent.parent
WRITE_SECONDS = 0.5
DRAIN_SECONDS = 1


async def eventually(holds: Any, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - processes and sockets set no event
            await asyncio.sleep(0.02)


async def end_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """The code and the reason with which a stream breaks off, after all that is left of it."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        (packed,) = [value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"]
        info = error_details_pb2.ErrorInfo()
        status_pb2.Status.FromString(bytes(packed)).details[0].Unpack(info)
        return error.code(), info.reason
    raise AssertionError("it came to its end")


async def test_the_engine_is_told_whose_request_it_is(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = []

    async def generate(self: EngineClient, request: EngineRequest, n: int) -> AsyncIterator[Finished]:
        callers.append(request.caller)
        yield Finished(FinishReason.STOP, 1, 1, 0.0, 0.0, 0.0)

    monkeypatch.setattr(EngineClient, "generate", generate)
    settings = make_settings(api_keys="shop:shop-key-1,lab:lab-key-22")
    await asyncio.to_thread(prepare_base, settings, "base", lambda *_: None)
    async with await start_server(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for key in ("shop-key-1", "lab-key-22"):
            call = stub.StreamGenerate(asked("base"), metadata=(("authorization", f"Bearer {key}"),))
            assert [message.WhichOneof("payload") async for message in call] == ["completion"]
    assert callers == ["shop", "lab"]


async def test_no_prompt_is_encoded_that_there_is_no_room_for(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineProcess(tmp_path, tiny_base, max_active_streams=1, max_waiting_streams=1)
    settings = engine.settings.model_copy(update={"grpc_address": "127.0.0.1:0"})
    too_long = asked("base", "kettle " * CONTEXT)
    go_on = threading.Event()
    encode = services._encode

    def encode_later(*arguments: Any) -> list[int]:
        assert go_on.wait(60)
        return encode(*arguments)

    try:
        async with await start_server(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await eventually(lambda: server.engine.status.state == "ready", 120)
            assert await end_of(stub.StreamGenerate(too_long)) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
            monkeypatch.setattr(services, "_encode", encode_later)  # else it is over before anything can be asked
            calls = [stub.StreamGenerate(asked("base")) for _ in range(2)]
            busy = (grpc.StatusCode.RESOURCE_EXHAUSTED, "ENGINE_BUSY")
            refused: list[Any] = []

            async def ask_more() -> None:
                while busy not in refused:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.2):  # the first may come before those two
                            refused.append(await end_of(stub.StreamGenerate(too_long)))

            await asyncio.wait_for(ask_more(), 30)
            assert (await server.engine.refresh()).num_steps == 0
            go_on.set()
            for call in calls:
                assert [message.WhichOneof("payload") async for message in call][-1] == "completion"
            assert await end_of(stub.StreamGenerate(too_long)) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
    finally:
        go_on.set()
        assert engine.stop() == 0


# --- readers that do not read -------------------------------------------------------------------------------------


async def test_a_grpc_reader_that_does_not_read_is_ended_and_hurts_nobody() -> None:
    begun, closed = [], []

    async def answer(request: bytes, context: Any) -> AsyncIterator[bytes]:
        begun.append(request)
        try:
            for _ in range(20_000):
                yield bytes(10_000)
                await asyncio.sleep(0)
        finally:
            closed.append(request)

    server = grpc.aio.server(interceptors=[Guard({}, ServerMetrics(), Traces("server"), WRITE_SECONDS)])
    methods = {"Answer": grpc.unary_stream_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stalled, reading = (channel.unary_stream("/test/Answer")(name) for name in (b"stalled", b"reading"))
            await stalled.read()
            read = 0
            async with asyncio.timeout(20):
                while b"stalled" not in closed:
                    read += len(await reading.read())
            reading.cancel()
            assert read > 10**7
            await eventually(lambda: closed == [b"stalled", b"reading"], 5)
            assert await end_of(stalled) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "READER_STALLED")
    finally:
        await server.stop(0)


@asynccontextmanager
async def gateway(server: ScriptedServer, folder: Path) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """The real process in front of a scripted server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "KNOWLEDGE_GRPC_ADDRESS": server.address,
        "KNOWLEDGE_HTTP_ADDRESS": address,
        "KNOWLEDGE_WRITE_TIMEOUT_SECONDS": str(WRITE_SECONDS),
        "KNOWLEDGE_DRAIN_SECONDS": str(DRAIN_SECONDS),
        "PYTHONPATH": str(ROOT),
    }
    env = environment(folder, folder, **settings)
    command = [sys.executable, "-m", "gateway"]
    process = await asyncio.to_thread(subprocess.Popen[bytes], command, env=env, cwd=folder)
    try:
        await eventually(lambda: can_connect(address), 60)
        yield process, address
    finally:
        process.kill()
        process.wait()


def can_connect(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


async def test_the_gateway_drops_who_does_not_read_and_tells_the_others_when_it_ends(tmp_path: Path) -> None:
    ended: list[str] = []

    async def answer(request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        is_flood = request.input.model == "models/flood"
        context.add_done_callback(lambda _: ended.append(request.input.model))
        while True:
            yield inference_pb2.StreamGenerateResponse(text_delta="x" * (100_000 if is_flood else 1))
            await asyncio.sleep(0 if is_flood else 0.05)

    question = {"messages": [{"role": "user", "content": "Which kettle?"}], "stream": True}
    async with scripted_server() as server:
        server.script["StreamGenerate"] = answer
        async with gateway(server, tmp_path) as (process, address):
            host, _, port = address.rpartition(":")
            async with httpx2.AsyncClient(base_url=f"http://{address}/api/v1/models", timeout=30) as client:
                with socket.create_connection((host, int(port))) as stalled:
                    body = json.dumps(question).encode()
                    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                    stalled.sendall(b"POST /api/v1/models/flood/inference HTTP/1.1\r\n" + head.encode() + body)
                    async with client.stream("POST", "/calm/inference", json=question) as calm:
                        lines = calm.aiter_lines()
                        await anext(lines)
                        await eventually(lambda: ended == ["models/flood"], 20)

                        process.send_signal(signal.SIGTERM)
                        sent = time.monotonic()
                        rest = [line async for line in lines if line]
                assert rest[-2] == "event: error"
                assert json.loads(rest[-1].removeprefix("data: "))["reason"] == "SERVER_UNAVAILABLE"
                assert sum(line.startswith("event: error") for line in rest) == 1
            await asyncio.to_thread(process.wait, 10)
            assert process.returncode == 0
            assert time.monotonic() - sent < DRAIN_SECONDS + 5


# --- the end ------------------------------------------------------------------------------------------------------

_SERVER = """
import asyncio
from knowledge_engine.inference.client import TextDelta
from knowledge_engine.server import app, services

async def answer(self, asked):
    while True:
        yield TextDelta("word ")
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            if asked.model != "stubborn":
                raise

services.InferenceServicer._answer = answer
app.main()
"""


@pytest.fixture
def endless_server(tmp_path: Path, tiny_base: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process whose answers never end; those of the model `stubborn` swallow their cancellation too."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=environment(tmp_path, tiny_base, KNOWLEDGE_DRAIN_SECONDS=str(DRAIN_SECONDS), PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        yield process, json.loads(process.stdout.readline())["grpc_address"]
        process.kill()
        process.wait()


def asked(model: str, content: str = "Which kettle?") -> inference_pb2.StreamGenerateRequest:
    message = inference_pb2.Message(role="user", content=content)
    return inference_pb2.StreamGenerateRequest(input=inference_pb2.GenerationInput(model=model, messages=[message]))


async def test_a_drain_ends_with_an_error_for_what_is_left(
    endless_server: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = endless_server
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.StreamGenerate(asked(model)) for model in ("base", "base", "models/stubborn")]
        for call in calls:
            await call.read()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()

        process.terminate()
        sent = time.monotonic()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert time.monotonic() - sent < 1
        late = stub.StreamGenerate(asked("base"), timeout=5)
        assert await end_of(late) == (grpc.StatusCode.UNAVAILABLE, "SERVER_UNAVAILABLE")
        for call in calls[:2]:
            assert await end_of(call) == (grpc.StatusCode.UNAVAILABLE, "SERVER_UNAVAILABLE")
        assert DRAIN_SECONDS - 0.1 < time.monotonic() - sent < DRAIN_SECONDS + 2
        await asyncio.to_thread(process.wait, 20)
        assert process.returncode == 0
        assert time.monotonic() - sent < DRAIN_SECONDS + 5
        calls[2].cancel()
        watch.cancel()
