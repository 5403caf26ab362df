"""REST against the whole service: a real gateway process, a real server, a real engine on a tiny base."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx2
import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.app import create_app
from knowledge_engine.bases import prepare_base
from knowledge_engine.core import HeldOutComparison, TrainingSpec
from knowledge_engine.inference.client import EngineClient, EngineStatus, socket_path
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings
from knowledge_engine.text import ChatText
from knowledge_engine.v1 import jobs_pb2, jobs_pb2_grpc
from tests.running import Service, end, start, wait_until
from tests.tiny import build_tiny_adapter

STARTUP_SECONDS = 150.0
NDJSON = {"content-type": "application/x-ndjson"}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Which kettle would you take?"}], "temperature": 0}
TRICKS = ["..%2f..%2fetc", "%2e%2e", "a%00b", "x" * 300, "a%2fb", "%c3%28", "-a", "a b", "b%0a", "%F0%9F%99%82", "~"]


class Running(NamedTuple):
    service: Service
    settings: Settings
    tiny: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    service = start(folder, tiny_base)
    try:
        yield Running(service, Settings(data_dir=folder, base_model=str(tiny_base)), tiny_base)
    finally:
        end(service)
    assert "Traceback" not in service.log.read_text()


@pytest.fixture
def client(running: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"http://{running.service.http_address}", timeout=120) as opened:
        yield opened


@pytest.fixture
def ready(client: httpx2.Client) -> httpx2.Client:
    """A client once the engine has its model."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while (health := client.get("/api/v1/health").json())["overall"] != "healthy":
        assert health["overall"] == "degraded"
        assert health["services"]["InferenceService"] == "NOT_SERVING"
        assert time.monotonic() < deadline, health
        time.sleep(0.25)
    return client


@pytest.fixture(scope="module")
def published(running: Running) -> None:
    """Two versions of the model `shop` whose answers differ."""
    for seed in (1, 2):
        publish(running, f"job-shop-{seed}", "shop", seed)


def publish(running: Running, job_id: str, model: str, seed: int) -> None:
    base = prepare_base(running.settings, "base", lambda *_: None)
    registry = Registry(running.settings.data_dir / "models")
    folder = registry.stage(job_id)
    build_tiny_adapter(running.tiny, folder, seed)
    registry.publish(
        spec=TrainingSpec(dataset="d", model=model),
        job_id=job_id,
        folder=folder,
        base=base,
        dataset_digest="sha256:data",
        chat_template_digest=ChatText.load(base).template_digest,
        comparison=HeldOutComparison(
            base_loss=2.5, tuned_loss=0.5, num_conversations=4, num_tokens=100, precision="float32"
        ),
        training_precision="float32",
    )


def jsonl(count: int, tag: str) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"{tag} {n}?"}, {"role": "assistant", "content": f"Blue {n}."}]}
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def frames(text: str) -> list[dict[str, str]]:
    """The frames of a server-sent stream as field -> value, comments left out."""
    blocks = (
        dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        for block in text.split("\n\n")
    )
    return [block for block in blocks if block]


# --- without the engine -------------------------------------------------------------------------------------------


def test_the_service_answers_before_its_model_is_loaded(client: httpx2.Client) -> None:
    health = client.get("/api/v1/health")
    assert health.status_code == 200
    body = health.json()
    assert set(body) == {"service", "services", "components", "external_apis", "overall", "timestamp"}
    assert body["service"] == "healthy"
    assert body["services"]["JobService"] == "SERVING"
    assert body["components"]["store"] == "ok"
    assert body["external_apis"] == dict.fromkeys(("tracker", "openai", "s3", "hub"), "not_configured")


def test_a_datasets_life(client: httpx2.Client) -> None:
    upload = "/api/v1/datasets?name=life&kind=conversations"
    stored = client.post(upload, content=jsonl(12, "kettle"), headers=NDJSON)
    assert stored.status_code == 201
    dataset = stored.json()
    assert (dataset["id"], dataset["kind"], dataset["num_rows"], dataset["job_id"]) == (
        "life",
        "conversations",
        12,
        None,
    )
    assert client.post(upload, content=jsonl(12, "kettle"), headers=NDJSON).json() == dataset
    taken = client.post(upload, content=jsonl(12, "lamp"), headers=NDJSON)
    assert (taken.status_code, taken.json()["reason"]) == (409, "DATASET_EXISTS")
    assert client.get("/api/v1/datasets/life").json() == dataset
    page = client.get("/api/v1/datasets?page_size=1").json()
    assert len(page["datasets"]) == 1
    assert client.delete("/api/v1/datasets/life").status_code == 204
    gone = client.get("/api/v1/datasets/life")
    assert (gone.status_code, gone.json()["reason"]) == (404, "DATASET_NOT_FOUND")


def test_a_broken_line_is_named_and_nothing_is_kept(client: httpx2.Client) -> None:
    rows = jsonl(3, "kettle") + "{broken\n"
    answer = client.post("/api/v1/datasets?name=broken&kind=conversations", content=rows, headers=NDJSON)
    assert (answer.status_code, answer.json()["reason"]) == (400, "DATASET_FORMAT_INVALID")
    assert "4" in answer.text
    assert client.get("/api/v1/datasets/broken").status_code == 404


def test_an_upload_that_breaks_off_leaves_nothing(running: Running, client: httpx2.Client) -> None:
    host, _, port = running.service.http_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = (
            "POST /api/v1/datasets?name=half&kind=conversations HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/x-ndjson\r\nContent-Length: 1000000\r\n\r\n"
        )
        connection.sendall(head.encode() + jsonl(200, "kettle").encode())
    assert client.get("/api/v1/datasets/half").status_code == 404
    whole = client.post("/api/v1/datasets?name=half&kind=conversations", content=jsonl(5, "lamp"), headers=NDJSON)
    assert (whole.status_code, whole.json()["num_rows"]) == (201, 5)


def test_an_oversized_body_is_413_over_a_socket(client: httpx2.Client) -> None:
    answer = client.post("/api/v1/train", content=b" " * 10_000_001, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["reason"]) == (413, "BODY_TOO_LARGE")
    assert client.get("/api/v1/jobs").status_code == 200


def test_a_csv_catalogue_is_taken(client: httpx2.Client) -> None:
    text = "id,title,price,currency,category,brand,description,in_stock\nk1,Kettle,19.90,EUR,Kitchen,Fjell,Boils,true\n"
    answer = client.post(
        "/api/v1/datasets?name=csv&kind=catalogue&format=csv", content=text, headers={"content-type": "text/csv"}
    )
    assert (answer.status_code, answer.json()["kind"], answer.json()["num_rows"]) == (201, "catalogue", 1)
    assert client.delete("/api/v1/datasets/csv").status_code == 204


def test_a_jobs_events_are_the_same_over_sse_and_grpc(running: Running, client: httpx2.Client) -> None:
    answer = client.post("/api/v1/data/generate", json={"number_of_conversations": 12, "dataset_name": "made"})
    assert answer.status_code == 200
    assert answer.json()["status"] == "starting"
    assert (answer.json()["dataset_name"], answer.json()["estimated_conversations"]) == ("made", 12)
    assert answer.json()["catalogue"] == "demo-catalogue"
    job_id = answer.json()["job_id"]
    live = client.get(f"/api/v1/jobs/{job_id}/events")
    assert live.headers["content-type"].startswith("text/event-stream")
    events = frames(live.text)
    assert [int(event["id"]) for event in events] == list(range(1, len(events) + 1))
    last = json.loads(events[-1]["data"])
    assert (events[-1]["event"], last["state_change"]["state"]) == ("state_change", "SUCCEEDED")
    assert json.loads(events[-2]["data"])["result"]["generation"]["dataset"] == "made"
    assert frames(client.get(f"/api/v1/jobs/{job_id}/events").text) == events
    with grpc.insecure_channel(running.service.grpc_address) as channel:
        watch = jobs_pb2_grpc.JobServiceStub(channel).WatchJob(jobs_pb2.WatchJobRequest(name=f"jobs/{job_id}"))
        over_grpc = [(reply.event.WhichOneof("payload"), reply.event.sequence) for reply in watch]
    assert [(event["event"], int(event["id"])) for event in events] == over_grpc

    again = client.get(f"/api/v1/jobs/{job_id}/events?after_sequence=1", headers={"last-event-id": "2"})
    assert frames(again.text) == events[2:]
    assert frames(client.get(f"/api/v1/jobs/{job_id}/events?after_sequence=3").text) == events[3:]
    end_reached = client.get(f"/api/v1/jobs/{job_id}/events", headers={"last-event-id": str(len(events))})
    assert (end_reached.status_code, end_reached.text) == (204, "")
    page = client.get(f"/api/v1/training/status/{job_id}").json()
    assert (page["status"], page["progress"], page["error"]) == ("completed", 100.0, None)
    job = client.get(f"/api/v1/jobs/{job_id}").json()
    assert (job["state"], job["last_sequence"]) == ("SUCCEEDED", len(events))
    assert job_id in [item["id"] for item in client.get("/api/v1/jobs").json()["jobs"]]
    ended = client.post(f"/api/v1/jobs/{job_id}/cancel")
    assert (ended.status_code, ended.json()["reason"]) == (400, "JOB_ENDED")


def test_a_cancelled_jobs_stream_ends(client: httpx2.Client) -> None:
    body = {"number_of_conversations": 100_000, "difficulty_level": "complex"}
    job_id = client.post("/api/v1/data/generate", json=body).json()["job_id"]
    seen = []
    with client.stream("GET", f"/api/v1/jobs/{job_id}/events") as stream:
        for line in stream.iter_lines():
            seen.append(line)
            if line.startswith("event: progress") or "RUNNING" in line:
                answer = client.post(f"/api/v1/jobs/{job_id}/cancel")
                assert answer.json()["state"] in ("CANCELLING", "CANCELLED")
    assert any('"state":"CANCELLED"' in line for line in seen)
    assert client.get(f"/api/v1/training/status/{job_id}").json()["status"] == "cancelled"
    assert client.post(f"/api/v1/jobs/{job_id}/cancel").json()["state"] == "CANCELLED"


def test_a_job_is_paused_and_resumed_over_rest(client: httpx2.Client) -> None:
    body = {"number_of_conversations": 100_000, "difficulty_level": "complex"}
    job_id = client.post("/api/v1/data/generate", json=body).json()["job_id"]
    for _ in range(2):
        paused = client.post(f"/api/v1/jobs/{job_id}/pause").json()
        assert paused["state"] == "PAUSED" or paused["pause_requested"]
    wait_until(lambda: client.get(f"/api/v1/jobs/{job_id}").json()["state"] == "PAUSED")
    assert client.get(f"/api/v1/training/status/{job_id}").json()["state"] == "PAUSED"
    resumed = client.post(f"/api/v1/jobs/{job_id}/resume").json()
    assert resumed["state"] in ("QUEUED", "RUNNING")
    assert resumed["state"] != "QUEUED" or resumed["queue_position"] >= 1
    assert client.post(f"/api/v1/jobs/{job_id}/cancel").json()["state"] in ("CANCELLING", "CANCELLED")
    for verb in ("pause", "resume"):
        answer = client.post(f"/api/v1/jobs/{job_id}/{verb}")
        assert (answer.status_code, answer.json()["code"]) == (400, "FAILED_PRECONDITION")


def test_a_repeated_key_makes_one_job(client: httpx2.Client) -> None:
    def create(key: str, seed: int) -> httpx2.Response:
        body = {"number_of_conversations": 10, "seed": seed}
        return client.post("/api/v1/data/generate", json=body, headers={"Idempotency-Key": key})

    first = create("once", 1).json()
    assert create("once", 1).json()["job_id"] == first["job_id"]
    assert create("twice", 1).json()["job_id"] != first["job_id"]
    other = create("once", 2)
    assert (other.status_code, other.json()["reason"]) == (409, "REQUEST_ID_REUSED")


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_in_ids_are_typed_problems(trick: str, client: httpx2.Client) -> None:
    routes = [
        ("GET", "/api/v1/jobs/{}"),
        ("GET", "/api/v1/jobs/{}/events"),
        ("POST", "/api/v1/jobs/{}/cancel"),
        ("POST", "/api/v1/jobs/{}/pause"),
        ("POST", "/api/v1/jobs/{}/resume"),
        ("GET", "/api/v1/training/status/{}"),
        ("GET", "/api/v1/datasets/{}"),
        ("DELETE", "/api/v1/datasets/{}"),
        ("GET", "/api/v1/models/{}"),
        ("GET", "/api/v1/models/{}/versions"),
        ("GET", "/api/v1/models/{}/versions/1"),
        ("DELETE", "/api/v1/models/{}/versions/1"),
        ("GET", "/api/v1/models/shop/versions/{}"),
        ("DELETE", "/api/v1/models/shop/versions/{}"),
        ("GET", "/api/v1/models/{}/evaluate"),
        ("POST", "/api/v1/models/{}/inference"),
    ]
    for method, route in routes:
        path = route.format(trick)
        answer = client.request(method, path, json=ASK if path.endswith("inference") else None)
        assert answer.status_code in (400, 404), (method, path, answer.text)
        wanted = ("ROUTE_NOT_FOUND",) if "%2f" in trick else ("NAME_INVALID", "ROUTE_NOT_FOUND")
        if trick == "~" or "%2e" in trick:
            wanted = ("NAME_INVALID", "ROUTE_NOT_FOUND")
        assert answer.json()["reason"] in wanted, (method, path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("trick", ["../x", "..", "a\0b", "x" * 300, "a/b", "", "base", "a\nb", "ü"])
def test_tricks_in_names_of_bodies_are_typed_problems(trick: str, client: httpx2.Client) -> None:
    bodies = [
        ("/api/v1/train", {"dataset_name": trick}),
        ("/api/v1/train", {"dataset_name": "made", "model_name": trick}),
        ("/api/v1/train/estimate", {"dataset_name": trick}),
        ("/api/v1/data/generate", {"number_of_conversations": 10, "catalogue": trick}),
    ]
    if trick != "base":
        bodies.append(("/api/v1/train", {"dataset_name": "made", "base_model": trick}))
        bodies.append(("/api/v1/data/generate", {"number_of_conversations": 10, "dataset_name": trick}))
    for path, body in bodies:
        answer = client.post(path, json=body)
        assert answer.status_code in (400, 404, 422), (path, body, answer.text)
        assert answer.json()["reason"], answer.text
    answer = client.post("/api/v1/datasets", params={"name": trick, "kind": "catalogue"}, content="x", headers=NDJSON)
    assert answer.status_code in (400, 422), answer.text


# --- with the engine ----------------------------------------------------------------------------------------------


def test_an_answer_and_its_stream_are_the_same(ready: httpx2.Client, published: None) -> None:
    answers = {}
    for model, used in (("base", "base"), ("shop", "shop:2"), ("shop:1", "shop:1"), ("shop:2", "shop:2")):
        body = ASK | {"max_tokens": 12, "context": {"products": [{"name": "Kettle", "price": 19.5}]}}
        answer = ready.post(f"/api/v1/models/{model}/inference", json=body)
        assert answer.status_code == 200, answer.text
        whole = answer.json()
        assert {"response", "model_used", "tokens_used", "processing_time_ms", "finish_reason"} <= set(whole)
        assert whole["model_used"] == used
        assert whole["tokens_used"] == whole["prompt_tokens"] + whole["completion_tokens"]
        stream = ready.post(f"/api/v1/models/{model}/inference", json=body | {"stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        *deltas, facts = [(frame["event"], json.loads(frame["data"])) for frame in frames(stream.text)]
        assert {name for name, _ in deltas} == {"delta"}
        assert "".join(data["text"] for _, data in deltas) == whole["response"]
        assert facts[0] == "completion"
        assert facts[1]["digest"] == whole["digest"]
        assert facts[1]["finish_reason"] == whole["finish_reason"]
        answers[model] = whole["response"]
    assert answers["shop"] == answers["shop:2"]
    assert len({answers["base"], answers["shop:1"], answers["shop:2"]}) == 3


def test_answers_take_a_form_come_in_numbers_and_tell_their_tokens(ready: httpx2.Client) -> None:
    schema = {"type": "object", "properties": {"b": {"enum": [1, 2]}, "a": {"enum": ["x"]}}, "required": ["b", "a"]}
    body = ASK | {"temperature": 1, "seed": 4, "n": 3, "json_schema": schema | {"additionalProperties": False}}
    body |= {"logprobs": True, "top_logprobs": 2}
    answer = ready.post("/api/v1/models/base/inference", json=body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    assert whole["response"] == whole["choices"][0]["text"]
    assert whole["finish_reasons"] == ["stop"] * 3
    assert sum(len(choice["logprobs"]) for choice in whole["choices"]) == whole["completion_tokens"]
    for choice in whole["choices"]:
        assert list(json.loads(choice["text"])) == ["b", "a"]
        assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]).decode().startswith(choice["text"])
    stream = ready.post("/api/v1/models/base/inference", json=body | {"stream": True})
    *deltas, facts = [json.loads(frame["data"]) for frame in frames(stream.text)]
    for number, choice in enumerate(whole["choices"]):
        own = [delta for delta in deltas if delta.get("choice", 0) == number]
        assert "".join(delta["text"] for delta in own) == choice["text"]
        assert [told for delta in own for told in delta["logprobs"]] == choice["logprobs"]
    assert facts["finish_reasons"] == whole["finish_reasons"]
    answer = ready.post("/api/v1/models/base/inference", json=ASK | {"regex": "(?=a)b"})
    assert (answer.status_code, answer.json()["reason"]) == (400, "SPEC_INVALID")
    assert "regex" in answer.text


def test_models_are_listed_as_the_first_release_did(ready: httpx2.Client, published: None) -> None:
    (model,) = [item for item in ready.get("/api/v1/models").json() if item["id"] == "shop"]
    assert model["performance"]["perplexity"] == pytest.approx(1.6487, abs=1e-3)
    assert (model["base_model"], model["status"]) == ("base", "ready")
    assert model["size_mb"] > 0
    details = ready.get("/api/v1/models/shop").json()
    assert {key: details[key] for key in model} == model
    versions = ready.get("/api/v1/models/shop/versions").json()["model_versions"]
    assert [version["id"] for version in versions] == ["shop:2", "shop:1"]
    assert details["latest_version"] == versions[0]
    assert ready.get("/api/v1/models/shop/versions/1").json() == versions[1]
    for path, reason in (
        ("/api/v1/models/shop/versions/9", "MODEL_VERSION_NOT_FOUND"),
        ("/api/v1/models/none", "MODEL_NOT_FOUND"),
        ("/api/v1/models/shop/evaluate", "EVALUATION_NOT_FOUND"),
        ("/api/v1/models/shop:9/evaluate", "MODEL_VERSION_NOT_FOUND"),
    ):
        answer = ready.get(path)
        assert (answer.status_code, answer.json()["reason"]) == (404, reason)


def test_a_deleted_version_is_gone(ready: httpx2.Client, running: Running) -> None:
    publish(running, "job-brief", "brief", 3)
    assert ready.delete("/api/v1/models/brief/versions/1").status_code == 204
    answer = ready.post("/api/v1/models/brief:1/inference", json=ASK)
    assert (answer.status_code, answer.json()["reason"]) == (404, "MODEL_VERSION_NOT_FOUND")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "x"}]}, "SPEC_INVALID"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "SPEC_INVALID"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, "PROMPT_TOO_LONG"),
        ({"max_tokens": 2000}, "PROMPT_TOO_LONG"),
    ],
    ids=["last", "system", "long", "tokens"],
)
def test_what_the_server_refuses_is_400(change: dict[str, Any], reason: str, ready: httpx2.Client) -> None:
    for stream in (False, True):
        answer = ready.post("/api/v1/models/base/inference", json=ASK | change | {"stream": stream})
        assert (answer.status_code, answer.json()["reason"]) == (400, reason), answer.text


@asynccontextmanager
async def engine_of(running: Running) -> AsyncIterator[EngineClient]:
    engine = EngineClient(socket_path(running.settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def engine_status(engine: EngineClient, holds: Callable[[EngineStatus], bool]) -> EngineStatus:
    async with asyncio.timeout(60):
        while True:
            status = await engine.refresh()
            if holds(status):
                return status
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False], ids=["sse", "unary"])
async def test_a_closed_connection_stops_decoding(stream: bool, running: Running, ready: httpx2.Client) -> None:
    long_ask = ASK | {"max_tokens": 900, "stream": stream}
    async with engine_of(running) as engine:
        before = await engine_status(engine, lambda status: status.state == "ready" and not status.active)
        for _ in range(3):
            task = asyncio.create_task(_ask_forever(running.service.http_address, long_ask))
            await engine_status(engine, lambda status: status.active == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await engine_status(engine, lambda status: not status.active)
        after = await engine.refresh()
        assert after.num_aborted == before.num_aborted + 3
        assert after.max_steps_after_abort <= 1
        assert after.num_steps - before.num_steps < 3 * 900


async def _ask_forever(address: str, body: dict[str, Any]) -> None:
    async with (
        httpx2.AsyncClient(base_url=f"http://{address}", timeout=120) as client,
        client.stream("POST", "/api/v1/models/base/inference", json=body) as answer,
    ):
        async for _ in answer.aiter_bytes():
            pass
        raise AssertionError("the answer came to its end")


# --- schemathesis -------------------------------------------------------------------------------------------------

# The document does not depend on the deployment, so that each operation can be a test of its own.
SCHEMA = schemathesis.openapi.from_dict(create_app(Settings()).openapi())
OPERATIONS = {item.ok().label: item.ok() for item in SCHEMA.get_all_operations() if isinstance(item, Ok)}
FUZZED = [
    (label, mode)
    for label, operation in OPERATIONS.items()
    for mode in GenerationMode
    # Every text is a possible id, so that what has nothing but ids cannot be asked wrongly.
    if mode is GenerationMode.POSITIVE or operation.body or operation.query
]
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
FUZZ = hypothesis.settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.mark.parametrize(("label", "mode"), FUZZED, ids=[f"{label} {mode.value}" for label, mode in FUZZED])
def test_no_request_gets_an_undocumented_answer(
    label: str, mode: GenerationMode, running: Running, ready: httpx2.Client, published: None
) -> None:
    address = f"http://{running.service.http_address}"

    @FUZZ
    @hypothesis.given(OPERATIONS[label].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        _shorten(case)
        response = case.call(base_url=address, timeout=60)
        assert response.status_code < 500 or response.status_code == 503, response.text
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400 and not case.path.endswith("/health"):
            assert response.json()["reason"]

    ask()


def _shorten(case: schemathesis.Case[Any]) -> None:
    """Keeps work that was asked for in earnest small; everything else stays as generated."""
    limits = {"/inference": ("max_tokens", 3), "/generate": ("number_of_conversations", 10)}
    for suffix, (field, limit) in limits.items():
        if case.path.endswith(suffix) and isinstance(case.body, dict):
            given = case.body.get(field, limit)
            if isinstance(given, int) and given > limit:
                case.body[field] = limit
            elif field == "max_tokens":
                case.body.setdefault(field, limit)
