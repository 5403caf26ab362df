"""gRPC statuses as problem+json, over a scripted server: every code, hints, and what fails mid-stream."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import anyio.to_thread
import grpc
import httpx2
import pytest
from fastapi.sse import KEEPALIVE_COMMENT
from google.rpc import status_pb2

from gateway.app import create_app
from gateway.problems import HTTP_STATUS, failure_of, http_status
from gateway.routes import _job_event
from gateway.sse import EventStream, frames
from knowledge_engine.errors import Reason
from knowledge_engine.settings import Settings
from knowledge_engine.v1 import inference_pb2, jobs_pb2, jobs_pb2_grpc
from tests.fakes_server import ScriptedServer, abort, scripted_server, status

ROOT = Path(__file__).parent.parent
ASK = {"messages": [{"role": "user", "content": "Which kettle?"}]}
EXPECTED = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server() as scripted:
        yield scripted


@pytest.fixture
async def client(server: ScriptedServer, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    app = create_app(Settings(data_dir=tmp_path, grpc_address=server.address, request_timeout_seconds=20))
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8001") as opened:
        yield opened
    await app.state.backend.close()


def events(text: str) -> list[tuple[str, Any]]:
    """The (event, data) pairs of a server-sent stream."""
    pairs = []
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            pairs.append((fields["event"], json.loads(fields["data"])))
    return pairs


def test_every_grpc_code_has_the_http_number_of_code_proto() -> None:
    assert {code.name: number for code, number in HTTP_STATUS.items() if number != 200} == EXPECTED
    assert len(HTTP_STATUS) == 17


@pytest.mark.parametrize("name", EXPECTED)
async def test_a_status_becomes_a_problem(name: str, server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    server.script["GetJob"] = status(grpc.StatusCode[name], "SOME_REASON", "no job 'x'", job="x")
    answer = await client.get("/api/v1/jobs/x", headers={"x-request-id": "abc-1"})
    assert answer.status_code == EXPECTED[name]
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body == {
        "type": "urn:knowledge-engine:error:SOME_REASON",
        "title": body["title"],
        "status": EXPECTED[name],
        "detail": "no job 'x'",
        "instance": "abc-1",
        "code": name,
        "reason": "SOME_REASON",
        "metadata": {"job": "x"},
        "violations": [],
    }
    assert body["title"]
    assert ("www-authenticate" in answer.headers) == (name == "UNAUTHENTICATED")


async def test_violations_are_kept_with_their_paths(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    wrong = (("spec.max_length", "is beyond the context"), ("spec.lora.rank", "is too much"))
    server.script["CreateTrainingJob"] = status(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", violations=wrong)
    answer = await client.post("/api/v1/train", json={"dataset_name": "d"})
    assert answer.status_code == 400
    assert answer.json()["violations"] == [{"field": field, "description": text, "reason": ""} for field, text in wrong]


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (1.0, "1"), (2.4, "3"), (30.0, "30")])
async def test_a_retry_hint_becomes_a_header(
    seconds: float, header: str, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    server.script["Generate"] = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "ENGINE_BUSY", retry_seconds=seconds)
    answer = await client.post("/api/v1/models/base/inference", json=ASK)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, header)


async def test_too_large_is_413_whoever_says_so(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    server.script["UploadDataset"] = status(grpc.StatusCode.INVALID_ARGUMENT, "DATASET_TOO_LARGE")
    answer = await client.post(
        "/api/v1/datasets?name=a&kind=catalogue", content=b"{}\n", headers={"content-type": "application/x-ndjson"}
    )
    assert (answer.status_code, answer.json()["reason"]) == (413, "DATASET_TOO_LARGE")
    # The scripted server takes gRPC's own 4 MiB; the status comes from the transport and has no ErrorInfo.
    answer = await client.post("/api/v1/models/base/inference", json=ASK | {"context": {"notes": "x" * 5_000_000}})
    assert (answer.status_code, answer.json()["reason"]) == (413, "BODY_TOO_LARGE")
    assert "retry-after" not in answer.headers


async def test_what_a_transport_says_is_not_passed_on(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    server.script["GetJob"] = status(grpc.StatusCode.UNAVAILABLE, message="ipv4:10.0.0.7:50051 refused")
    answer = await client.get("/api/v1/jobs/x")
    assert (answer.status_code, answer.json()["reason"]) == (503, "SERVER_UNAVAILABLE")
    assert answer.headers["retry-after"] == "1"
    assert "10.0.0.7" not in answer.text

    async def crash(request: Any, context: Any) -> None:
        raise ValueError("secret value")

    server.script["GetJob"] = crash
    answer = await client.get("/api/v1/jobs/x")
    assert (answer.status_code, answer.json()["code"]) == (500, "UNKNOWN")
    assert "secret" not in answer.text


async def test_an_absent_server_is_503_and_is_found_again(tmp_path: Path) -> None:
    async with scripted_server() as scripted:
        address = scripted.address
    app = create_app(Settings(data_dir=tmp_path, grpc_address=address))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
        answer = await client.get("/api/v1/jobs")
        assert (answer.status_code, answer.json()["reason"]) == (503, "SERVER_UNAVAILABLE")
        health = await client.get("/api/v1/health")
        assert (health.status_code, health.json()["overall"]) == (503, "unhealthy")
        server = grpc.aio.server()
        server.add_insecure_port(address)
        await server.start()
        for _ in range(100):
            answer = await client.get("/api/v1/jobs")
            if answer.status_code != 503:
                break
            await asyncio.sleep(0.1)
        assert (answer.status_code, answer.json()["reason"]) == (501, "METHOD_UNKNOWN")
        await server.stop(None)
    await app.state.backend.close()


async def test_a_slow_answer_is_504_and_the_call_is_over(server: ScriptedServer, tmp_path: Path) -> None:
    async def sleep(request: Any, context: Any) -> None:
        await asyncio.sleep(60)

    server.script["GetJob"] = sleep
    app = create_app(Settings(data_dir=tmp_path, grpc_address=server.address, request_timeout_seconds=0.3))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
        answer = await client.get("/api/v1/jobs/x")
    assert (answer.status_code, answer.json()["reason"]) == (504, "DEADLINE")
    assert server.received[0].seconds_left is not None
    assert server.received[0].seconds_left <= 0.3
    await app.state.backend.close()


async def test_a_stream_that_fails_at_once_has_its_own_status(
    server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    server.script["StreamGenerate"] = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "ENGINE_BUSY", retry_seconds=2)
    answer = await client.post("/api/v1/models/base/inference", json=ASK | {"stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_stream_that_fails_later_ends_with_an_error_event(
    server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    async def break_off(request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        yield inference_pb2.StreamGenerateResponse(text_delta="The ")
        await abort(context, status(grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE", "the engine went away"))

    server.script["StreamGenerate"] = break_off
    answer = await client.post(
        "/api/v1/models/base/inference", json=ASK | {"stream": True}, headers={"x-request-id": "r1"}
    )
    assert answer.status_code == 200
    first, last = events(answer.text)
    assert first == ("delta", {"text": "The "})
    assert last[0] == "error"
    assert (last[1]["status"], last[1]["reason"], last[1]["instance"]) == (503, "ENGINE_UNAVAILABLE", "r1")


async def test_a_watch_of_an_unknown_job_is_404(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    server.script["GetJob"] = status(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
    answer = await client.get("/api/v1/jobs/x/events")
    assert (answer.status_code, answer.json()["reason"]) == (404, "JOB_NOT_FOUND")


async def test_a_failed_jobs_error_is_readable(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    error = status(grpc.StatusCode.DATA_LOSS, "DATASET_CORRUPT", "digest of 'd' differs", dataset="d")
    server.script["GetJob"] = jobs_pb2.GetJobResponse(
        job=jobs_pb2.Job(name="jobs/x", state=jobs_pb2.JOB_STATE_FAILED, error=error)
    )
    job = (await client.get("/api/v1/jobs/x")).json()
    assert (job["error"]["code"], job["error"]["reason"]) == ("DATA_LOSS", "DATASET_CORRUPT")
    page = (await client.get("/api/v1/training/status/x")).json()
    assert (page["status"], page["error"]) == ("failed", "digest of 'd' differs")


async def test_no_request_waits_for_a_thread(
    server: ScriptedServer, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI calls in one, unasked, what is not asynchronous; it costs more than all that a token does here."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("called in a thread")

    monkeypatch.setattr(anyio.to_thread, "run_sync", refuse)
    completion = inference_pb2.Completion(finish_reason=inference_pb2.FINISH_REASON_STOP)
    server.script["Generate"] = inference_pb2.GenerateResponse(text="Yes.", completion=completion)
    assert (await client.post("/api/v1/models/base/inference", json=ASK)).status_code == 200


async def test_an_unexpected_exception_is_a_fixed_problem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(data_dir=tmp_path))

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("secret value")

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
        answer = await client.get("/boom", headers={"x-request-id": "r9"})
    assert (answer.status_code, answer.json()["reason"]) == (500, Reason.INTERNAL)
    assert answer.json()["metadata"] == {"request_id": "r9"}
    assert "secret" not in answer.text
    assert "secret" in caplog.text
    assert "r9" in caplog.text


async def test_a_quiet_stream_is_kept_alive_and_its_call_ends_with_it(server: ScriptedServer) -> None:
    async def wait(request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        event = jobs_pb2.JobEvent(job="jobs/x", sequence=1, log=jobs_pb2.JobEvent.LogLine(message="a\nb"))
        yield jobs_pb2.WatchJobResponse(event=event)
        await asyncio.sleep(60)

    received: list[bytes] = []
    enough = asyncio.Event()

    async def receive() -> dict[str, str]:
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        received.append(message.get("body", b""))
        if received[-3:] == [KEEPALIVE_COMMENT] * 3 and any(body.startswith(b"event:") for body in received):
            enough.set()

    server.script["WatchJob"] = wait
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = jobs_pb2_grpc.JobServiceStub(channel).WatchJob(jobs_pb2.WatchJobRequest(name="jobs/x"))
        stream = EventStream(frames(call, _job_event, "r1"), heartbeat_seconds=0.02)
        async with asyncio.timeout(30):
            await stream({"type": "http"}, receive, send)
        assert call.cancelled()
    (told,) = [body.decode() for body in received if body.startswith(b"event:")]
    (event,) = events(told)
    assert (event[0], event[1]["log"]["message"]) == ("log", "a\nb")
    assert told.endswith("\nid: 1\n\n")
    assert set(received) == {b"", KEEPALIVE_COMMENT, told.encode()}


def test_bad_settings_stop_the_gateway_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway"],
        env={"PATH": "", "KNOWLEDGE_HTTP_ADDRESS": "0.0.0.0:0", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "KNOWLEDGE_API_KEYS" in done.stderr
    assert "KNOWLEDGE_ALLOW_ANONYMOUS" in done.stderr


def test_a_status_code_of_tomorrow_is_unknown() -> None:
    failure = failure_of(status_pb2.Status(code=99, message="?"))
    assert (failure.code, http_status(failure)) == ("UNKNOWN", 500)
