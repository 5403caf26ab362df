"""What the gateway takes and what it refuses: schemas, JSON, sizes, paths, hosts, origins, keys; /docs offline."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from gateway.app import create_app
from gateway.schemas import TrainingConfig
from gateway.strict import MAX_JSON_BYTES
from gateway.uploads import MAX_UPLOAD_BYTES
from knowledge_engine.settings import Settings
from knowledge_engine.v1 import datasets_pb2, generation_pb2, inference_pb2, jobs_pb2, models_pb2, training_pb2
from tests.fakes_server import METHODS, ScriptedServer, scripted_server, status

KEYS = "shop:correct-horse-9,crm:battery-staple-8"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Which kettle?"}]}
NDJSON = {"content-type": "application/x-ndjson"}
Connect = Callable[..., Any]


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server() as scripted:
        stop = inference_pb2.FINISH_REASON_STOP
        completion = inference_pb2.Completion(finish_reason=stop, model="base", finish_reasons=[stop])
        likely = inference_pb2.TokenLogprob(token_id=7, bytes=b"T", token="T", logprob=-0.5)
        choice = inference_pb2.Choice(text="This one.", logprobs=[likely])
        scripted.script["Generate"] = inference_pb2.GenerateResponse(
            text="This one.", completion=completion, choices=[choice]
        )
        job = jobs_pb2.Job(name="jobs/j", state=jobs_pb2.JOB_STATE_QUEUED, create_time=Timestamp(seconds=1))
        scripted.script["GetJob"] = jobs_pb2.GetJobResponse(job=job)
        scripted.script["CancelJob"] = jobs_pb2.CancelJobResponse(job=job)
        scripted.script["PauseJob"] = jobs_pb2.PauseJobResponse(job=job)
        scripted.script["ResumeJob"] = jobs_pb2.ResumeJobResponse(job=job)
        scripted.script["EstimateTrainingJob"] = jobs_pb2.EstimateTrainingJobResponse(
            estimate=training_pb2.TrainingEstimate(device="cpu", num_steps=7, fits=True)
        )
        scripted.script["ListJobs"] = jobs_pb2.ListJobsResponse(jobs=[job])
        job.training.model = "models/m"
        scripted.script["CreateTrainingJob"] = jobs_pb2.CreateTrainingJobResponse(job=job)
        job.generation.dataset, job.generation.catalogue = "datasets/d", "datasets/c"
        job.generation.num_conversations = 10
        job.generation.provider = generation_pb2.GENERATION_PROVIDER_OPENAI
        scripted.script["CreateGenerationJob"] = jobs_pb2.CreateGenerationJobResponse(job=job)
        yield scripted


@pytest.fixture
def connect(server: ScriptedServer, tmp_path: Path) -> Connect:
    @asynccontextmanager
    async def opened(url: str = "http://127.0.0.1:8001", **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
        app = create_app(Settings(data_dir=tmp_path, grpc_address=server.address, **settings))
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url=url) as client:
            yield client
        await app.state.backend.close()

    return opened


@pytest.fixture
async def client(connect: Connect) -> AsyncIterator[httpx2.AsyncClient]:
    async with connect() as opened:
        yield opened


def sent(server: ScriptedServer) -> dict[str, Any]:
    """The last request that reached the server, only what was set in it."""
    return json_format.MessageToDict(server.received[-1].request, preserving_proto_field_name=True)


# --- schemas ------------------------------------------------------------------------------------------------------


async def test_train_sends_only_what_the_caller_gave(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    answer = await client.post("/api/v1/train", json={"dataset_name": "conversations-1"})
    assert sent(server) == {"spec": {"dataset": "datasets/conversations-1", "model": "models/conversations-1"}}
    assert answer.json() == {
        "job_id": "j",
        "status": "starting",
        "estimated_duration": None,
        "wandb_url": None,
        "model_name": "m",
    }


async def test_train_passes_every_field_on(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    config = {
        "epochs": 2,
        "learning_rate": 0.001,
        "batch_size": 4,
        "max_length": 1024,
        "use_qlora": False,
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj"]},
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "max_steps": 7,
        "gradient_accumulation_steps": 2,
        "eval_split": 0.0,
        "split_by": "product",
        "truncation": "keep_last_turns",
        "eval_dataset": "exam",
        "method": "dpo",
        "beta": 0.5,
        "start_from": "m:3",
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "eval_steps": 3,
        "logging_steps": 5,
        "seed": 1,
        "save_steps": 6,
        "auto_find_batch_size": True,
        "neftune_noise_alpha": 2.5,
    }
    body = {"dataset_name": "d", "model_name": "m", "base_model": "small", "training_config": config}
    await client.post("/api/v1/train", json=body)
    expected = config | {
        "base_model": "small",
        "dataset": "datasets/d",
        "model": "models/m",
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "LR_SCHEDULER_TYPE_COSINE",
        "split_by": "SPLIT_BY_PRODUCT",
        "truncation": "TRUNCATION_KEEP_LAST_TURNS",
        "eval_dataset": "datasets/exam",
        "method": "TRAINING_METHOD_DPO",
        "start_from": "models/m/versions/3",
        "seed": "1",
    }
    del expected["epochs"], expected["batch_size"]
    assert set(config) == set(TrainingConfig.model_fields)
    assert sent(server)["spec"] == expected
    await client.post("/api/v1/train/estimate", json=body)
    assert server.received[-1].method == "EstimateTrainingJob"
    assert sent(server)["spec"] == expected


@pytest.mark.parametrize(("field", "other"), [("save_steps", 9), ("auto_find_batch_size", True)])
async def test_another_value_of_a_new_field_is_another_request(
    field: str, other: Any, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    specs = []
    for config in ({}, {field: TrainingConfig.model_fields[field].default}, {field: other}):
        await client.post("/api/v1/train", json={"dataset_name": "d", "training_config": config})
        specs.append(server.received[-1].request.SerializeToString())
    assert len(set(specs)) == 3


async def test_an_estimate_reads_as_documented(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    answer = await client.post("/api/v1/train/estimate", json={"dataset_name": "d"})
    assert answer.json() == {
        "memory": None,
        "device": "cpu",
        "total_memory_bytes": 0,
        "held_memory_bytes": {},
        "disk_bytes": 0,
        "free_disk_bytes": 0,
        "num_steps": 7,
        "num_tokens": 0,
        "training_time_seconds": None,
        "fits": True,
        "refusal": "",
        "nearest_config": None,
        "gradient_checkpointing": False,
    }
    nearest = training_pb2.TrainingSpec(dataset="datasets/d", model="models/d", per_device_train_batch_size=2)
    estimate = training_pb2.TrainingEstimate(refusal="too much", nearest_spec=nearest)
    server.script["EstimateTrainingJob"] = jobs_pb2.EstimateTrainingJobResponse(estimate=estimate)
    body = (await client.post("/api/v1/train/estimate", json={"dataset_name": "d"})).json()
    assert (body["fits"], body["refusal"], body["nearest_config"]) == (False, "too much", {"batch_size": 2})


CREATING = [("/api/v1/train", {"dataset_name": "d"}), ("/api/v1/data/generate", {"number_of_conversations": 10})]


@pytest.mark.parametrize(("path", "body"), CREATING)
async def test_an_idempotency_key_is_the_request_id(
    path: str, body: Any, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    for key in ("k", "0b9f6c1e-31c6-4f0c-9a0e-000000000001", "a b~!", "x" * 255):
        assert (await client.post(path, json=body, headers={"idempotency-key": key})).status_code == 200
        assert server.received[-1].request.request_id == key
    await client.post(path, json=body)
    assert server.received[-1].request.request_id == ""


@pytest.mark.parametrize(("path", "body"), CREATING)
@pytest.mark.parametrize(
    "key", ["", "x" * 256, b"caf\xc3\xa9", "a\tb", "\x7f"], ids=["empty", "long", "utf8", "tab", "del"]
)
async def test_an_idempotency_key_of_another_shape_is_422(
    path: str, body: Any, key: Any, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    answer = await client.post(path, json=body, headers={"idempotency-key": key})
    assert (answer.status_code, answer.json()["reason"]) == (422, "SPEC_INVALID")
    assert answer.json()["violations"][0]["field"].lower() == "idempotency-key"
    assert not server.received


async def test_a_key_of_another_request_is_refused_with_its_reason(
    server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    reused = status(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    server.script["CreateTrainingJob"] = server.script["CreateGenerationJob"] = reused
    for path, body in CREATING:
        answer = await client.post(path, json=body, headers={"idempotency-key": "k"})
        assert (answer.status_code, answer.json()["reason"]) == (409, "REQUEST_ID_REUSED")


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
async def test_a_job_is_paused_resumed_and_cancelled_by_its_id(
    verb: str, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    answer = await client.post(f"/api/v1/jobs/j/{verb}")
    assert (answer.status_code, answer.json()["id"], answer.json()["queue_position"]) == (200, "j", None)
    assert (server.received[-1].method, sent(server)) == (f"{verb.capitalize()}Job", {"name": "jobs/j"})
    server.script[f"{verb.capitalize()}Job"] = status(grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED")
    answer = await client.post(f"/api/v1/jobs/j/{verb}")
    assert (answer.status_code, answer.json()["reason"]) == (400, "JOB_ENDED")


async def test_nulls_of_optional_fields_are_absences(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    body: dict[str, Any] = {"dataset_name": "d", "model_name": None, "base_model": None, "training_config": None}
    assert (await client.post("/api/v1/train", json=body)).status_code == 200
    body = {"number_of_conversations": 10, "topics": None, "dataset_name": None}
    assert (await client.post("/api/v1/data/generate", json=body)).status_code == 200
    assert sent(server) == {"spec": {"num_conversations": 10}}
    assert (await client.post("/api/v1/models/base/inference", json=ASK | {"context": None})).status_code == 200


async def test_generate_passes_every_field_on(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    body = {
        "number_of_conversations": 50,
        "topics": ["kettle"],
        "difficulty_level": "complex",
        "include_product_data": False,
        "dataset_name": "d",
        "catalogue": "c",
        "seed": 3,
        "provider": "openai",
    }
    answer = await client.post("/api/v1/data/generate", json=body)
    assert sent(server)["spec"] == {
        "num_conversations": 50,
        "topics": ["kettle"],
        "difficulty_level": "DIFFICULTY_LEVEL_COMPLEX",
        "include_product_data": False,
        "dataset": "datasets/d",
        "catalogue": "datasets/c",
        "seed": "3",
        "provider": "GENERATION_PROVIDER_OPENAI",
    }
    assert answer.json() == {
        "job_id": "j",
        "status": "starting",
        "estimated_conversations": 10,
        "estimated_cost": None,
        "estimated_duration": None,
        "dataset_name": "d",
        "catalogue": "c",
        "provider": "openai",
    }


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("base", "base"),
        ("shop", "models/shop"),
        ("shop:3", "models/shop/versions/3"),
        ("shop@production", "models/shop@production"),
        ("shop:x", "models/shop:x"),
        ("%00", "models/\0"),
    ],
)
async def test_inference_addresses_models(
    given: str, name: str, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    await client.post(f"/api/v1/models/{given}/inference", json=ASK)
    assert server.received[-1].request.input.model == name


async def test_inference_passes_every_field_on(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    products = [{"name": "Kettle", "price": 19.9, "store": "A", "rating": None, "tags": ["x", {"deep": True}]}]
    settings = {"max_tokens": 5, "temperature": 0, "top_p": 1, "top_k": 4, "stop": ["."], "seed": 2**63 - 1}
    settings |= {"min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "regex": "x"}
    settings |= {"n": 1, "logprobs": True, "top_logprobs": 3}
    context = {"products": products, "criteria": "cheap", "n": 2**53}
    function = {"name": "find", "description": "Finds.", "parameters": {"z": 1.5, "a": "ü"}}
    call = {"id": "x", "type": "function", "function": {"name": "find", "arguments": '{"b":1}'}}
    messages = [
        *ASK["messages"],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call, call | {"function": {"name": "f", "arguments": {"c": "ü"}}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "20 EUR"},
    ]
    body = settings | {"context": context, "messages": messages, "tools": [{"type": "function", "function": function}]}
    answer = await client.post("/api/v1/models/base/inference", json=body)
    assert answer.status_code == 200
    given = sent(server)["input"]
    assert given.pop("context") == context
    assert given.pop("tools") == [function | {"parameters": '{"z": 1.5, "a": "ü"}'}]
    made = {"id": "x", "name": "find", "arguments": '{"b":1}'}
    assert given.pop("messages") == [
        ASK["messages"][0],
        {"role": "assistant", "tool_calls": [made, made | {"name": "f", "arguments": '{"c": "ü"}'}]},
        {"role": "tool", "content": "20 EUR", "tool_call_id": "x"},
    ]
    assert given == settings | {"model": "base", "seed": str(2**63 - 1)}
    assert answer.json() == {
        "response": "This one.",
        "model_used": "base",
        "tokens_used": 0,
        "processing_time_ms": 0.0,
        "finish_reason": "stop",
        "finish_reasons": ["stop"],
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "time_to_first_token_ms": 0.0,
        "digest": "",
        "choices": [
            {
                "text": "This one.",
                "logprobs": [{"token_id": 7, "token": "T", "bytes": [84], "logprob": -0.5, "top": []}],
            }
        ],
    }
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    answer = await client.post("/api/v1/models/base/inference", json=ASK | {"json_schema": schema})
    assert answer.json()["choices"][0]["logprobs"] is None
    assert sent(server)["input"]["json_schema"] == json.dumps(schema), "the order of properties is kept"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/train", {}, "dataset_name"),
        ("/train", {"dataset_name": 3}, "dataset_name"),
        ("/train", {"dataset_name": ""}, "dataset_name"),
        ("/train", {"dataset_name": "d", "extra": 1}, "extra"),
        ("/train", {"dataset_name": "d", "training_config": {"epochs": 0}}, "training_config.epochs"),
        ("/train", {"dataset_name": "d", "training_config": {"epochs": 51}}, "training_config.epochs"),
        ("/train", {"dataset_name": "d", "training_config": {"epochs": "3"}}, "training_config.epochs"),
        ("/train", {"dataset_name": "d", "training_config": {"epochs": True}}, "training_config.epochs"),
        ("/train", {"dataset_name": "d", "training_config": {"batch_size": 33}}, "training_config.batch_size"),
        ("/train", {"dataset_name": "d", "training_config": {"max_length": 511}}, "training_config.max_length"),
        ("/train", {"dataset_name": "d", "training_config": {"max_length": 4097}}, "training_config.max_length"),
        ("/train", {"dataset_name": "d", "training_config": {"use_qlora": 1}}, "training_config.use_qlora"),
        ("/train", {"dataset_name": "d", "training_config": {"lora": {"rank": 0}}}, "training_config.lora.rank"),
        ("/train", {"dataset_name": "d", "training_config": {"lr": 1}}, "training_config.lr"),
        ("/train", {"dataset_name": "d", "training_config": {"save_steps": -1}}, "training_config.save_steps"),
        (
            "/train",
            {"dataset_name": "d", "training_config": {"auto_find_batch_size": 1}},
            "training_config.auto_find_batch_size",
        ),
        ("/train/estimate", {"dataset_name": "d", "training_config": {"epochs": 0}}, "training_config.epochs"),
        ("/data/generate", {"number_of_conversations": 9}, "number_of_conversations"),
        ("/data/generate", {"number_of_conversations": 100_001}, "number_of_conversations"),
        ("/data/generate", {"number_of_conversations": 10, "difficulty_level": "easy"}, "difficulty_level"),
        ("/data/generate", {"number_of_conversations": 10, "topics": "kettle"}, "topics"),
        ("/data/generate", {"number_of_conversations": 10, "provider": "chatty"}, "provider"),
        ("/models/base/inference", {"messages": []}, "messages"),
        ("/models/base/inference", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ("/models/base/inference", {"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ("/models/base/inference", {"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages.0.name"),
        ("/models/base/inference", {"messages": ASK["messages"] * 201}, "messages"),
        ("/models/base/inference", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/models/base/inference", {"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content"),
        ("/models/base/inference", ASK | {"tools": [{"type": "function"}]}, "tools.0.function"),
        ("/models/base/inference", ASK | {"tools": [{"function": {"name": "f"}}]}, "tools.0.type"),
        ("/models/base/inference", ASK | {"max_tokens": 0}, "max_tokens"),
        ("/models/base/inference", ASK | {"max_tokens": 2001}, "max_tokens"),
        ("/models/base/inference", ASK | {"temperature": 2.1}, "temperature"),
        ("/models/base/inference", ASK | {"top_p": -0.1}, "top_p"),
        ("/models/base/inference", ASK | {"stream": "yes"}, "stream"),
        ("/models/base/inference", ASK | {"context": []}, "context"),
        ("/models/base/inference", ASK | {"context": {"products": [{"id": 2**53 + 1}]}}, "context.products[0].id"),
        ("/models/base/inference", [], ""),
    ],
)
async def test_a_body_that_does_not_match_is_422(
    path: str, body: Any, field: str, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    answer = await client.post(f"/api/v1{path}", json=body)
    assert (answer.status_code, answer.json()["reason"]) == (422, "SPEC_INVALID")
    assert answer.json()["violations"][0]["field"] == field
    assert not server.received


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "nonsense",
        '{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        '{"messages": [{"role": "user", "content": "x"}], "context": {"a": Infinity}}',
        '{"messages": [{"role": "user", "content": "x"}], "context": {"a": 1e999}}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [{"role": "user", "content": "x"}], "context": {"\\udfff": 1}}',
        '{"messages": [{"role": "user", "content": "x"}], "top_k": 1, "top_k": 2}',
        '{"messages": [{"role": "user", "content": "x"}], "context": {"a": ' + "[" * 40 + "]" * 40 + "}}",
        "[" * 100_000,
        '{"top_k": ' + "9" * 5000 + "}",
        b"\xff\xfe{}",
    ],
    ids=["cut", "empty", "word", "nan", "inf", "1e999", "surrogate", "key", "twice", "deep", "abyss", "digits", "utf8"],
)
async def test_what_is_no_json_is_422(text: Any, server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    answer = await client.post(
        "/api/v1/models/base/inference", content=text, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["reason"]) == (422, "SPEC_INVALID")
    assert not server.received


async def test_a_context_as_deep_as_allowed_arrives(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    context: Any = "bottom"
    for _ in range(28):
        context = {"a": context}
    answer = await client.post("/api/v1/models/base/inference", json=ASK | {"context": context})
    assert answer.status_code == 200
    assert sent(server)["input"]["context"] == context


async def test_other_media_types_are_415(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = await client.post("/api/v1/train", content=b'{"dataset_name": "d"}', headers={"content-type": kind})
        assert (answer.status_code, answer.json()["reason"]) == (415, "MEDIA_TYPE_UNSUPPORTED")
        answer = await client.post(
            "/api/v1/datasets?name=a&kind=catalogue", content=b"x", headers={"content-type": kind}
        )
        assert answer.status_code == 415
    assert not server.received


async def test_an_oversized_json_body_is_413(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 2**20
            yield b" " * 2**20

    json_type = {"content-type": "application/json"}
    answer = await client.post("/api/v1/train", content=endless(), headers=json_type)
    assert (answer.status_code, answer.json()["reason"]) == (413, "BODY_TOO_LARGE")
    assert taken <= MAX_JSON_BYTES + 2 * 2**20
    declared = json_type | {"content-length": str(MAX_JSON_BYTES + 1)}
    answer = await client.post("/api/v1/train", content=endless(), headers=declared)
    assert (answer.status_code, answer.json()["reason"]) == (413, "BODY_TOO_LARGE")
    assert not server.received


async def test_queries_are_strict(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    for query in ("page_size=x", "page_size=1001", "page_size=-1", "pagesize=3", "page_size=1&page_size=2", "a=%00"):
        answer = await client.get(f"/api/v1/jobs?{query}")
        assert (answer.status_code, answer.json()["reason"]) == (422, "SPEC_INVALID"), query
    answer = await client.get("/api/v1/jobs/j?verbose=1")
    assert answer.status_code == 422
    assert not server.received


async def test_unknown_paths_and_methods_are_problems(client: httpx2.AsyncClient) -> None:
    for path in ("/", "/api/v1/nothing", "/api/v1/jobs/", "/api/v1/jobs//events", "/openapi.yaml", "/redoc"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["reason"]) == (404, "ROUTE_NOT_FOUND"), path
    answer = await client.put("/api/v1/jobs")
    assert (answer.status_code, answer.json()["reason"]) == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "GET"


# --- uploads ------------------------------------------------------------------------------------------------------


async def test_an_upload_streams_through(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    arrived: list[Any] = []

    async def store(requests: Any, context: Any) -> datasets_pb2.UploadDatasetResponse:
        arrived.extend([item.metadata if item.HasField("metadata") else item.chunk async for item in requests])
        return datasets_pb2.UploadDatasetResponse(dataset=datasets_pb2.Dataset(name="datasets/a", kind=2))  # type: ignore[arg-type]

    async def rows() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * (2**20 + 10)

    server.script["UploadDataset"] = store
    answer = await client.post(
        "/api/v1/datasets?name=a&kind=catalogue&format=csv", content=rows(), headers={"content-type": "text/csv"}
    )
    assert answer.status_code == 201
    assert (answer.json()["id"], answer.json()["kind"]) == ("a", "catalogue")
    assert (arrived[0].name, arrived[0].kind, arrived[0].format) == ("datasets/a", 2, 2)
    assert b"".join(arrived[1:]) == b"x" * 3 * (2**20 + 10)
    assert max(map(len, arrived[1:])) == 2**20


@pytest.mark.parametrize(
    ("query", "content_type", "expected"),
    [
        ("kind=conversations", "application/x-ndjson", "JSONL"),
        ("kind=preferences", "application/x-ndjson", "JSONL"),
        ("kind=evaluation&format=sharegpt", "application/json", "SHAREGPT"),
        ("kind=conversations&format=alpaca", "application/x-ndjson", "ALPACA"),
        ("kind=conversations", "application/json", None),
        ("kind=conversations&format=jsonl", "application/json", None),
        ("kind=conversations&format=sharegpt", "text/csv", None),
    ],
)
async def test_the_layout_is_what_is_said_or_what_the_type_means(
    query: str, content_type: str, expected: str | None, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    metadata: list[Any] = []

    async def store(requests: Any, context: Any) -> datasets_pb2.UploadDatasetResponse:
        metadata.extend([item.metadata async for item in requests if item.HasField("metadata")])
        return datasets_pb2.UploadDatasetResponse(dataset=datasets_pb2.Dataset(name="datasets/a"))

    server.script["UploadDataset"] = store
    answer = await client.post(
        f"/api/v1/datasets?name=a&{query}", content=b"[]", headers={"content-type": content_type}
    )
    if expected is None:
        assert (answer.status_code, metadata) == (422, [])
        return
    assert answer.status_code == 201
    assert datasets_pb2.DatasetFormat.Name(metadata[0].format) == f"DATASET_FORMAT_{expected}"
    kind = query.removeprefix("kind=").partition("&")[0]
    assert datasets_pb2.DatasetKind.Name(metadata[0].kind) == f"DATASET_KIND_{kind.upper()}"


async def test_an_upload_that_is_refused_midway_says_why(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    server.script["UploadDataset"] = status(grpc.StatusCode.ALREADY_EXISTS, "DATASET_EXISTS")

    async def rows() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"{}\n" * 100_000

    answer = await client.post("/api/v1/datasets?name=a&kind=catalogue", content=rows(), headers=NDJSON)
    assert (answer.status_code, answer.json()["reason"]) == (409, "DATASET_EXISTS")


async def test_uploads_are_checked_before_they_begin(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    async def post(query: str, **headers: str) -> tuple[int, str]:
        answer = await client.post(f"/api/v1/datasets?{query}", content=b"{}\n", headers=NDJSON | headers)
        return answer.status_code, answer.json()["reason"]

    assert await post("kind=catalogue") == (422, "SPEC_INVALID")
    assert await post("name=a") == (422, "SPEC_INVALID")
    assert await post("name=a&kind=products") == (422, "SPEC_INVALID")
    assert await post("name=a&kind=catalogue&format=csv") == (422, "SPEC_INVALID")
    assert await post("name=a&kind=catalogue&format=xml") == (422, "SPEC_INVALID")
    too_long = {"content-length": str(MAX_UPLOAD_BYTES + 1)}
    assert await post("name=a&kind=catalogue", **too_long) == (413, "DATASET_TOO_LARGE")
    assert not server.received


# --- lists --------------------------------------------------------------------------------------------------------


async def test_the_model_list_is_bare_and_links_to_its_next_page(
    server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    models = [models_pb2.Model(name=f"models/m{number}", create_time=Timestamp(seconds=9)) for number in (1, 2)]
    server.script["ListModels"] = models_pb2.ListModelsResponse(models=models, next_page_token="a+b/c=")
    answer = await client.get("/api/v1/models?page_size=2")
    assert [model["id"] for model in answer.json()] == ["m1", "m2"]
    assert set(answer.json()[0]) == {"id", "base_model", "created_at", "performance", "status", "size_mb"}
    link = re.fullmatch(r'<(/api/v1/models\?\S+)>; rel="next"', answer.headers["link"])
    assert link
    server.script["ListModels"] = models_pb2.ListModelsResponse()
    answer = await client.get(link[1])
    assert sent(server) == {"page_size": 2, "page_token": "a+b/c="}
    assert answer.json() == []
    assert "link" not in answer.headers


async def test_there_is_no_evaluation_report_yet(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    server.script["GetModel"] = status(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    server.script["GetModelVersion"] = models_pb2.GetModelVersionResponse()
    reasons = [(await client.get(f"/api/v1/models/{name}/evaluate")).json()["reason"] for name in ("x", "x:1", "base")]
    assert reasons == ["MODEL_NOT_FOUND", "EVALUATION_NOT_FOUND", "EVALUATION_NOT_FOUND"]
    assert [call.method for call in server.received] == ["GetModel", "GetModelVersion"]


# --- access -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8001", "localhost:9", "LOCALHOST", "[::1]", "[::1]:80"])
async def test_loopback_hosts_are_answered(host: str, client: httpx2.AsyncClient) -> None:
    assert (await client.get("/api/v1/jobs", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "10.0.0.1", "", "evil.example#localhost"],
)
@pytest.mark.parametrize("path", ["/api/v1/jobs", "/api/v1/health", "/docs", "/openapi.json", "/nothing"])
async def test_foreign_hosts_are_refused(
    host: str, path: str, server: ScriptedServer, client: httpx2.AsyncClient
) -> None:
    answer = await client.get(path, headers={"host": host})
    assert (answer.status_code, answer.json()["reason"]) == (403, "HOST_REFUSED")
    assert not server.received


async def test_other_hosts_are_answered_with_keys_or_on_demand(connect: Connect) -> None:
    headers = {"authorization": "Bearer correct-horse-9"}
    async with connect("http://ke.shop.example", api_keys=KEYS) as client:
        assert (await client.get("/api/v1/jobs", headers=headers)).status_code == 200
    async with connect("http://ke.shop.example", allow_anonymous=True) as client:
        assert (await client.get("/api/v1/jobs")).status_code == 200


async def test_foreign_pages_cannot_change_anything(server: ScriptedServer, connect: Connect) -> None:
    async with connect() as client:
        answer = await client.post("/api/v1/jobs/j/cancel", headers={"origin": "https://evil.example"})
        assert (answer.status_code, answer.json()["reason"]) == (403, "ORIGIN_REFUSED")
        assert not server.received
        answer = await client.post("/api/v1/jobs/j/cancel", headers={"origin": "http://localhost:3000"})
        assert answer.status_code == 200
    async with connect(allowed_origins=("https://shop.example",)) as client:
        answer = await client.post("/api/v1/jobs/j/cancel", headers={"origin": "https://shop.example"})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "API_KEY_MISSING"),
        ({"authorization": "Bearer"}, "API_KEY_MISSING"),
        ({"authorization": "Basic Y29ycmVjdA=="}, "API_KEY_MISSING"),
        ({"authorization": "Bearer wrong"}, "API_KEY_INVALID"),
        ({"authorization": "Bearer correct-horse-"}, "API_KEY_INVALID"),
        ({"x-api-key": "correct-horse-99"}, "API_KEY_INVALID"),
        ({"x-api-key": b"\xff\xfe"}, "API_KEY_INVALID"),
    ],
)
async def test_a_key_is_demanded_everywhere_but_for_health(
    headers: Any, reason: str, server: ScriptedServer, connect: Connect
) -> None:
    async with connect(api_keys=KEYS) as client:
        for path in ("/api/v1/jobs", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/nothing", "/api/v1/health/"):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, answer.json()["reason"]) == (401, reason), path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"] == answer.json()["instance"]
        assert (await client.get("/api/v1/health", headers=headers)).status_code == 503
    assert not server.received


@pytest.mark.parametrize(
    "headers", [{"authorization": "bearer battery-staple-8"}, {"x-api-key": "battery-staple-8"}], ids=["bearer", "own"]
)
async def test_the_callers_key_is_forwarded(headers: Any, server: ScriptedServer, connect: Connect) -> None:
    async with connect(api_keys=KEYS) as client:
        for path in ("/api/v1/jobs", "/docs", "/openapi.json"):
            assert (await client.get(path, headers=headers)).status_code == 200
    assert server.received[0].metadata["authorization"] == "Bearer battery-staple-8"


async def test_request_ids_are_taken_or_made(server: ScriptedServer, client: httpx2.AsyncClient) -> None:
    answer = await client.get("/api/v1/jobs", headers={"x-request-id": "order-17"})
    assert answer.headers["x-request-id"] == "order-17"
    assert server.received[-1].metadata["x-request-id"] == "order-17"
    for bad in ("", "x" * 65, "two words", "\x7f"):
        answer = await client.get("/api/v1/jobs", headers={"x-request-id": bad})
        made = answer.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", made)
        assert server.received[-1].metadata["x-request-id"] == made


async def test_cors_names_origins_and_never_joins_a_star_with_credentials(connect: Connect) -> None:
    ask = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    async with connect(allowed_origins=("https://shop.example",), api_keys=KEYS) as client:
        answer = await client.options("/api/v1/train", headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        assert answer.headers["access-control-allow-credentials"] == "true"
        refused = await client.get("/api/v1/jobs", headers={"origin": "https://shop.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://shop.example")
        other = await client.options("/api/v1/train", headers=ask | {"origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
    async with connect(allowed_origins=("*", "https://shop.example")) as client:
        for answer in (
            await client.options("/api/v1/train", headers=ask),
            await client.get("/api/v1/jobs", headers={"origin": "https://shop.example", "cookie": "a=b"}),
        ):
            assert "access-control-allow-credentials" not in answer.headers
            assert answer.headers["access-control-allow-origin"] == "*"
    async with connect() as client:
        answer = await client.get("/api/v1/jobs", headers={"origin": "https://shop.example"})
        assert "access-control-allow-origin" not in answer.headers


# --- OpenAPI and /docs --------------------------------------------------------------------------------------------


async def test_every_rpc_of_the_contract_has_a_route(client: httpx2.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    operations = [operation for path in paths.values() for operation in path.values()]
    routed = {operation["x-rpc"] for operation in operations}
    routed |= {operation["x-rpc-stream"] for operation in operations if "x-rpc-stream" in operation}
    contract = {f"{method.containing_service.name}.{method.name}" for method in METHODS.values()}
    assert routed == contract | {"Health.List"}


async def test_every_route_documents_its_errors_as_problems(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            wrong = {code: answer for code, answer in operation["responses"].items() if code >= "400"}
            if path.endswith("/health"):
                assert set(wrong) == {"403", "422", "503"}
                continue
            assert {"400", "401", "403", "422", "500", "503", "504"} <= set(wrong)
            assert all(list(answer["content"]) == ["application/problem+json"] for answer in wrong.values())
            if "requestBody" in operation:
                assert {"413", "415"} <= set(wrong)
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])


async def test_docs_load_nothing_from_elsewhere(client: httpx2.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(links) == ["docs/favicon-32x32.png", "docs/swagger-ui-bundle.js", "docs/swagger-ui.css"]
    assert "://" not in page.text
    assert "url: 'openapi.json'" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "://" not in policy
    for link in links:
        asset = await client.get(f"/{link}")
        assert asset.status_code == 200
        assert asset.content
    assert re.findall(r"""url\(["']?(?!data:|["'])[^)]*\)""", (await client.get("/docs/swagger-ui.css")).text) == []
    for trick in ("/docs/__init__.py", "/docs/..%2f..%2fgateway%2fapp.py", "/docs/%2e%2e%2fapp.py", "/docs/x%00"):
        assert (await client.get(trick)).status_code == 404


async def test_the_document_names_the_keys_only_when_there_are_some(connect: Connect) -> None:
    async with connect(api_keys=KEYS) as client:
        document = (await client.get("/openapi.json", headers={"x-api-key": "battery-staple-8"})).json()
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert document["paths"]["/api/v1/health"]["get"]["security"] == []
    async with connect() as client:
        assert "security" not in (await client.get("/openapi.json")).json()
