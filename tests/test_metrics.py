"""What `/metrics` tells of a real service, and the trace of one of its answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from gateway.app import create_app
from knowledge_engine.core import SamplingParams
from knowledge_engine.inference.client import Adapter, EngineClient, EngineRequest, socket_path
from knowledge_engine.settings import Settings
from tests.running import Service, end, start, wait_until
from tests.tiny import build_random_llama, build_tiny_adapter

KEY = "a-key-for-the-scraper"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SECRET = "a kettle that nobody may read of"
INFERENCE = "/api/v1/models/{id}/inference"
STREAM = "knowledge_engine.v1.InferenceService/StreamGenerate"
WHOLE = "knowledge_engine.v1.InferenceService/Generate"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str) -> dict[str, Any]:
        """By name, of one trace; with the service that sent each."""
        found = {}
        for request in self.requests:
            for resource in request.resource_spans:
                (service,) = (a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                for scope in resource.scope_spans:
                    found |= {span.name: (service, span) for span in scope.spans if span.trace_id.hex() == trace_id}
        return found


class Running(NamedTuple):
    service: Service
    collector: Collector
    client: httpx2.Client
    engine_socket: Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose long answers take seconds."""
    folder = tmp_path_factory.mktemp("base")
    return build_random_llama(folder, width=512, inner=1536, layers=12, heads=8, key_value_heads=8, vocabulary=8192)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Running]:
    """Room for one answer and for no idle adapter."""
    folder, collector = tmp_path_factory.mktemp("service"), Collector()
    receiver = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    service = start(
        folder,
        base,
        KNOWLEDGE_API_KEYS=f"scraper:{KEY}",
        KNOWLEDGE_MAX_ACTIVE_STREAMS="1",
        KNOWLEDGE_MAX_WAITING_STREAMS="0",
        KNOWLEDGE_KV_CACHE_BYTES=str(2**25),
        KNOWLEDGE_ADAPTER_CACHE_BYTES="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
        OTEL_BSP_SCHEDULE_DELAY="50",
    )
    path = socket_path(Settings(data_dir=folder))
    try:
        with httpx2.Client(base_url=f"http://{service.http_address}", headers=HEADERS, timeout=60) as client:
            running = Running(service, collector, client, path)
            wait_until(lambda: scrape(running)["knowledge_server_engine_ready"] == 1, 120)
            yield running
    finally:
        end(service)
        receiver.stop(None).wait()
    log = service.log.read_text()
    assert "Traceback" not in log
    assert "opentelemetry" not in log


def parse(text: str) -> dict[str, float]:
    """Samples as `name{label="value",...}`, labels sorted."""
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        assert family.name.startswith(("knowledge_gateway_", "knowledge_server_", "knowledge_engine_"))
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def scrape(running: Running) -> dict[str, float]:
    answer = running.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(answer.text)


def requests(status: str, route: str = INFERENCE, method: str = "POST") -> str:
    """The gateway's count of them."""
    labels = f'method="{method}",route="{route}",status="{status}"'
    return f"knowledge_gateway_http_request_duration_seconds_count{{{labels}}}"


def ask(text: str = SECRET, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "stream": True} | options


def test_an_answer_moves_the_numbers_of_all_three(running: Running) -> None:
    before = scrape(running)
    answer = running.client.post("/api/v1/models/base/inference", json=ask(max_tokens=30))
    facts = json.loads(answer.text.split("event: completion\ndata: ")[1].split("\n")[0])
    after = scrape(running)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("knowledge_engine_prompt_tokens_total") == facts["prompt_tokens"]
    assert grown("knowledge_engine_completion_tokens_total") == facts["completion_tokens"] == 30
    assert grown('knowledge_engine_answers_total{outcome="length"}') == 1
    assert grown("knowledge_engine_queue_seconds_count") == 1
    assert grown("knowledge_engine_time_to_first_token_seconds_count") == 1
    assert grown("knowledge_engine_time_between_tokens_seconds_count") == 29
    assert grown("knowledge_engine_steps_total") > 0
    assert 0 <= grown("knowledge_engine_accepted_tokens_total") <= grown("knowledge_engine_guessed_tokens_total")
    assert grown(f'knowledge_server_rpc_duration_seconds_count{{code="OK",method="{STREAM}"}}') == 1
    assert grown(requests("200")) == 1
    assert after["knowledge_engine_active"] == after["knowledge_engine_waiting"] == 0
    assert after["knowledge_gateway_http_requests_active"] == after["knowledge_server_rpcs_active"] == 1  # this scrape
    assert after["knowledge_gateway_server_up"] == after["knowledge_server_engine_up"] == 1
    for part in ("gateway", "server", "engine"):
        assert after[f"knowledge_{part}_process_resident_memory_bytes"] > 2**24


async def test_a_busy_engine_a_refusal_and_a_cancel_are_counted(running: Running) -> None:
    before = scrape(running)
    text = 20 * "Which kettle would you take? "
    # Of thousands of words: neither guessed nor soon at its end. In one piece, as what has begun to come counts as 200.
    long = ask(text, max_tokens=700, temperature=2, stream=False)
    async with httpx2.AsyncClient(base_url=running.client.base_url, headers=HEADERS, timeout=60) as client:
        answer = asyncio.create_task(client.post("/api/v1/models/base/inference", json=long))
        during = await until(running, lambda told: told["knowledge_engine_active"] == 1)
        refused = await client.post("/api/v1/models/base/inference", json=ask(text, max_tokens=9))
        assert refused.json()["reason"] == "ENGINE_BUSY"
        answer.cancel()
        aborted = 'knowledge_engine_answers_total{outcome="aborted"}'
        gone = requests("499")
        await until(running, lambda told: told[aborted] == before[aborted] + 1 and gone in told)
        assert (await client.post("/api/v1/models/base/inference", json=ask(text, max_tokens=9))).status_code == 200
        after = scrape(running)
    kv_blocks = [f'knowledge_engine_kv_blocks{{state="{state}"}}' for state in ("used", "kept", "free")]
    assert during[kv_blocks[0]] > 700 // 64
    assert after["knowledge_engine_active"] == after[kv_blocks[0]] == 0
    assert sum(after[name] for name in kv_blocks) == sum(during[name] for name in kv_blocks)
    assert after["knowledge_engine_shared_prompt_tokens_total"] > 0, "two prompts began alike"
    assert after['knowledge_engine_refusals_total{reason="ENGINE_BUSY"}'] == 1
    assert after[f'knowledge_server_errors_total{{method="{STREAM}",reason="ENGINE_BUSY"}}'] == 1
    for code, method in (("RESOURCE_EXHAUSTED", STREAM), ("CANCELLED", WHOLE)):
        assert after[f'knowledge_server_rpc_duration_seconds_count{{code="{code}",method="{method}"}}'] == 1
    assert after[requests("429")] == after[gone] == 1


async def until(running: Running, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The first scrape of which `holds` is true."""
    async with asyncio.timeout(30):
        while True:
            if holds(told := await asyncio.to_thread(scrape, running)):
                return told
            await asyncio.sleep(0.01)


async def test_adapters_that_come_and_give_way_are_counted(running: Running, base: Path, tmp_path: Path) -> None:
    engine = EngineClient(running.engine_socket)
    await engine.start()
    try:
        await asyncio.to_thread(wait_until, lambda: engine.status.state == "ready", 30)
        for seed in (1, 2, 1):
            adapter = Adapter(f"sha256:{seed}", build_tiny_adapter(base, tmp_path / str(seed), seed))
            request = EngineRequest([5, 6], SamplingParams(max_tokens=2, temperature=0), [], adapter)
            async with aclosing(engine.generate(request)) as pieces:
                assert [piece async for piece in pieces]
        held = parse((await engine.metrics()).decode())
    finally:
        await engine.close()
    assert held["knowledge_engine_adapter_loads_total"] == 3
    assert held["knowledge_engine_adapter_evictions_total"] == 3
    assert held["knowledge_engine_adapters"] == held["knowledge_engine_adapter_bytes"] == 0
    assert await engine.metrics() == b""


def test_an_engine_that_does_not_answer_is_told_as_down(running: Running) -> None:
    engine = running.service.part("engine")
    assert engine is not None
    engine.suspend()
    try:
        told = scrape(running)
    finally:
        engine.resume()
    assert (told["knowledge_gateway_server_up"], told["knowledge_server_engine_up"]) == (1, 0)
    assert not any(name.startswith("knowledge_engine_") for name in told)
    assert scrape(running)["knowledge_server_engine_up"] == 1


async def test_without_a_server_the_gateway_tells_its_own(make_settings: Any) -> None:
    app = create_app(make_settings(grpc_address="127.0.0.1:1"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/api/v1/jobs/j")).status_code == 503
        assert (await client.get("/nothing")).status_code == 404
        told = parse((await client.get("/metrics")).text)
    await app.state.backend.close()
    assert told["knowledge_gateway_server_up"] == 0
    assert told[requests("503", "/api/v1/jobs/{id}", "GET")] == 1
    assert told[requests("404", "none", "GET")] == 1


def test_numbers_are_for_those_with_a_key_and_hold_no_secret(running: Running) -> None:
    with httpx2.Client(base_url=running.client.base_url) as stranger:
        assert stranger.get("/metrics").json()["reason"] == "API_KEY_MISSING"
        assert stranger.get("/metrics", headers={"x-api-key": "wrong-key"}).json()["reason"] == "API_KEY_INVALID"
    text = running.client.get("/metrics").text
    assert KEY not in text
    assert SECRET not in text
    assert "scraper" not in text, "the caller's name"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_promtool_finds_nothing_to_say(running: Running) -> None:
    text = running.client.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_one_trace_goes_through_all_three(running: Running) -> None:
    trace_id, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    begin = time.time_ns()
    answer = running.client.post(
        "/api/v1/models/base/inference",
        json=ask(max_tokens=20, seed=7),
        headers={"traceparent": f"00-{trace_id}-{caller}-01"},
    )
    assert answer.status_code == 200
    names = {f"POST {INFERENCE}", STREAM, "engine queue", "engine prompt", "engine decode"}
    wait_until(lambda: running.collector.spans(trace_id).keys() >= names, 10)
    found = running.collector.spans(trace_id)
    assert found.keys() == names
    (gateway_name, gateway), (server_name, server) = found[f"POST {INFERENCE}"], found[STREAM]
    assert (gateway_name, server_name) == ("knowledge-gateway", "knowledge-server")
    assert gateway.parent_span_id.hex() == caller
    assert server.parent_span_id == gateway.span_id
    phases = [found[name][1] for name in ("engine queue", "engine prompt", "engine decode")]
    assert all(phase.parent_span_id == server.span_id for phase in phases)
    assert [phase.end_time_unix_nano for phase in phases[:2]] == [phase.start_time_unix_nano for phase in phases[1:]]
    assert begin < server.start_time_unix_nano
    assert server.start_time_unix_nano <= phases[0].start_time_unix_nano
    assert phases[2].end_time_unix_nano <= server.end_time_unix_nano

    told = {item.key: item.value for item in server.attributes}
    assert (told["rpc.system.name"].string_value, told["rpc.method"].string_value) == ("grpc", STREAM)
    assert told["rpc.response.status_code"].string_value == "OK"
    assert told["gen_ai.request.model"].string_value == "base"
    assert told["gen_ai.usage.input_tokens"].int_value > 5
    assert told["gen_ai.usage.output_tokens"].int_value == 20
    assert {item.key: item.value for item in gateway.attributes}["http.route"].string_value == INFERENCE
    sent = b"".join(request.SerializeToString() for request in running.collector.requests)
    for secret in (SECRET, KEY):
        assert secret.encode() not in sent
    assert b"/metrics" not in sent
    assert b"/health" not in sent
