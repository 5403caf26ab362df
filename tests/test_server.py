"""The gRPC face, driven as a client drives it: a real server on a free port."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from knowledge_engine.server.app import INFERENCE_SERVICE, SERVICES, RunningServer, start_server
from knowledge_engine.settings import Settings
from knowledge_engine.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    generation_pb2,
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    training_pb2,
)

CONVERSATION = json.dumps(
    {"messages": [{"role": "user", "content": "A kettle?"}, {"role": "assistant", "content": "The blue one."}]}
)


def details(error: grpc.aio.AioRpcError | grpc.Call) -> tuple[error_details_pb2.ErrorInfo, list[str]]:
    """The one ErrorInfo of an error, and the fields it complains of."""
    raw = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(raw if isinstance(raw, bytes) else raw.encode())
    assert status.message == error.details()
    infos, fields = [], []
    for item in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if item.Unpack(info):
            infos.append(info)
        elif item.Unpack(bad):
            fields = [violation.field for violation in bad.field_violations]
    assert len(infos) == 1
    assert infos[0].domain == "knowledge-engine"
    return infos[0], fields


async def refused(call: Any) -> tuple[grpc.StatusCode, str, list[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (anext(aiter(call)) if hasattr(call, "__aiter__") else call)
    info, fields = details(caught.value)
    return caught.value.code(), info.reason, fields


async def refused_stream(server: RunningServer, method: str, requests: AsyncIterator[Message] | Message) -> grpc.Call:
    """The error with which the server ends a stream of requests, which it may do before it has read them all.

    Asked without asyncio: `grpc.aio` puts an INTERNAL of its own in the place of an answer that came before a write.
    """
    sent = [requests] if isinstance(requests, Message) else [request async for request in requests]

    def ask() -> grpc.Call:
        with grpc.insecure_channel(server.address) as channel:
            call = channel.stream_stream(method, request_serializer=lambda request: request.SerializeToString())
            with pytest.raises(grpc.RpcError) as caught:
                next(call(iter(sent), timeout=60))
        assert isinstance(caught.value, grpc.Call)
        return caught.value

    return await asyncio.to_thread(ask)


UPLOAD = "/knowledge_engine.v1.DatasetService/UploadDataset"


async def refused_upload(
    server: RunningServer, requests: AsyncIterator[Message]
) -> tuple[grpc.StatusCode, str, list[str]]:
    error = await refused_stream(server, UPLOAD, requests)
    info, fields = details(error)
    return error.code(), info.reason, fields


def upload(
    name: str, *chunks: bytes, kind: datasets_pb2.DatasetKind.ValueType = datasets_pb2.DATASET_KIND_CONVERSATIONS
) -> AsyncIterator[datasets_pb2.UploadDatasetRequest]:
    async def requests() -> AsyncIterator[datasets_pb2.UploadDatasetRequest]:
        metadata = datasets_pb2.UploadDatasetMetadata(name=name, kind=kind)
        yield datasets_pb2.UploadDatasetRequest(metadata=metadata)
        for chunk in chunks:
            yield datasets_pb2.UploadDatasetRequest(chunk=chunk)

    return requests()


async def test_a_dataset_is_uploaded_listed_and_deleted(channel: grpc.aio.Channel) -> None:
    stub = datasets_pb2_grpc.DatasetServiceStub(channel)
    # Chunks may cut a line, or a character, anywhere.
    content = (CONVERSATION.replace("blue", "blåe") + "\n").encode() * 3
    sent = [content[at : at + 7] for at in range(0, len(content), 7)]
    stored = (await stub.UploadDataset(upload("datasets/chats", *sent))).dataset
    assert (stored.name, stored.num_rows) == ("datasets/chats", 3)
    again = (await stub.UploadDataset(upload("datasets/chats", content))).dataset
    assert again == stored
    listed = await stub.ListDatasets(datasets_pb2.ListDatasetsRequest())
    assert list(listed.datasets) == [stored]
    await stub.DeleteDataset(datasets_pb2.DeleteDatasetRequest(name="datasets/chats"))
    code, reason, _ = await refused(stub.GetDataset(datasets_pb2.GetDatasetRequest(name="datasets/chats")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"messages": \n', 1),
        ((CONVERSATION + "\n" + "nonsense\n").encode(), 2),
        ((CONVERSATION + "\n").encode() + b'{"messages": [{"role": "robot", "content": "x"}]}\n', 2),
        (b'{"messages": []}\n', 1),
        (b"\xff\xfe\n", 1),
    ],
    ids=["cut", "not JSON", "unknown role", "no messages", "not UTF-8"],
)
async def test_a_broken_line_is_named_and_nothing_is_stored(
    channel: grpc.aio.Channel, server: RunningServer, tmp_path: Path, content: bytes, line: int
) -> None:
    stub = datasets_pb2_grpc.DatasetServiceStub(channel)
    code, reason, fields = await refused_upload(server, upload("datasets/broken", content))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_FORMAT_INVALID")
    assert any(str(line) in field for field in fields)
    assert not (await stub.ListDatasets(datasets_pb2.ListDatasetsRequest())).datasets
    left = [path for part in ("datasets", "uploads") for path in (tmp_path / "data" / part).rglob("*")]
    assert [path.name for path in left if path.is_file()] in ([], [".lock"])


async def test_an_upload_begins_with_its_metadata(server: RunningServer) -> None:
    async def only_bytes() -> AsyncIterator[datasets_pb2.UploadDatasetRequest]:
        yield datasets_pb2.UploadDatasetRequest(chunk=b"x")

    async def nothing() -> AsyncIterator[datasets_pb2.UploadDatasetRequest]:
        return
        yield

    for requests in (only_bytes(), nothing()):
        code, reason, fields = await refused_upload(server, requests)
        assert (code, reason, fields) == (grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", ["metadata"])


async def test_training_is_refused_before_anything_is_stored(channel: grpc.aio.Channel) -> None:
    jobs = jobs_pb2_grpc.JobServiceStub(channel)
    datasets = datasets_pb2_grpc.DatasetServiceStub(channel)
    await datasets.UploadDataset(upload("datasets/chats", (CONVERSATION + "\n").encode()))

    def create(**fields: Any) -> Any:
        spec = training_pb2.TrainingSpec(**{"dataset": "datasets/chats", "model": "models/m"} | fields)
        return jobs.CreateTrainingJob(jobs_pb2.CreateTrainingJobRequest(spec=spec))

    for fields, code, reason in (
        ({"dataset": "datasets/none"}, grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND"),
        ({"base_model": "llama-2"}, grpc.StatusCode.INVALID_ARGUMENT, "BASE_MODEL_UNKNOWN"),
        ({"learning_rate": float("nan")}, grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
    ):
        assert (await refused(create(**fields)))[:2] == (code, reason)
    assert not (await jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs


async def test_generation_is_refused_before_anything_is_stored(channel: grpc.aio.Channel) -> None:
    jobs = jobs_pb2_grpc.JobServiceStub(channel)
    for fields, code, reason in (
        ({"num_conversations": 0}, grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
        ({"num_conversations": 10, "catalogue": "datasets/none"}, grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND"),
        ({"num_conversations": 10, "topics": ["submarines"]}, grpc.StatusCode.INVALID_ARGUMENT, "TOPIC_UNKNOWN"),
    ):
        spec = generation_pb2.GenerationSpec(**fields)
        call = jobs.CreateGenerationJob(jobs_pb2.CreateGenerationJobRequest(spec=spec))
        assert (await refused(call))[:2] == (code, reason)
    assert not (await jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs


TRICKS = ["", "..", "../x", "%2e%2e", "a/../b", "a\0b", "a\n", "x" * 300, "．．", "-a", "C:\\x", "name@production"]


@pytest.mark.parametrize("trick", TRICKS)
async def test_every_id_refuses_path_tricks(channel: grpc.aio.Channel, server: RunningServer, trick: str) -> None:
    jobs, datasets = jobs_pb2_grpc.JobServiceStub(channel), datasets_pb2_grpc.DatasetServiceStub(channel)
    models, inference = models_pb2_grpc.ModelServiceStub(channel), inference_pb2_grpc.InferenceServiceStub(channel)
    ask = inference_pb2.GenerationInput(
        model=f"models/{trick}", messages=[inference_pb2.Message(role="user", content="hi")]
    )
    calls = [
        jobs.GetJob(jobs_pb2.GetJobRequest(name=f"jobs/{trick}")),
        jobs.CancelJob(jobs_pb2.CancelJobRequest(name=f"jobs/{trick}")),
        jobs.WatchJob(jobs_pb2.WatchJobRequest(name=f"jobs/{trick}")),
        datasets.GetDataset(datasets_pb2.GetDatasetRequest(name=f"datasets/{trick}")),
        datasets.DeleteDataset(datasets_pb2.DeleteDatasetRequest(name=f"datasets/{trick}")),
        datasets.PreviewDataset(datasets_pb2.PreviewDatasetRequest(name=f"datasets/{trick}")),
        models.GetModel(models_pb2.GetModelRequest(name=f"models/{trick}")),
        models.ListModelVersions(models_pb2.ListModelVersionsRequest(parent=f"models/{trick}")),
        models.GetModelVersion(models_pb2.GetModelVersionRequest(name=f"models/{trick}/versions/1")),
        models.DeleteModelVersion(models_pb2.DeleteModelVersionRequest(name=f"models/a/versions/{trick}")),
        inference.Generate(inference_pb2.GenerateRequest(input=ask)),
        inference.StreamGenerate(inference_pb2.StreamGenerateRequest(input=ask)),
    ]
    for call in calls:
        assert (await refused(call))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "NAME_INVALID")
    sent = upload(f"datasets/{trick}", b"")
    assert (await refused_upload(server, sent))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "NAME_INVALID")


async def test_unknown_things_are_not_found(channel: grpc.aio.Channel) -> None:
    models = models_pb2_grpc.ModelServiceStub(channel)
    jobs = jobs_pb2_grpc.JobServiceStub(channel)
    for call, reason in (
        (jobs.GetJob(jobs_pb2.GetJobRequest(name="jobs/none")), "JOB_NOT_FOUND"),
        (jobs.WatchJob(jobs_pb2.WatchJobRequest(name="jobs/none")), "JOB_NOT_FOUND"),
        (models.GetModel(models_pb2.GetModelRequest(name="models/none")), "MODEL_NOT_FOUND"),
        (models.GetModelVersion(models_pb2.GetModelVersionRequest(name="models/a/versions/1")), "MODEL_NOT_FOUND"),
    ):
        assert (await refused(call))[:2] == (grpc.StatusCode.NOT_FOUND, reason)


async def test_health_says_what_can_be_asked(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        serving = answer.status == health_pb2.HealthCheckResponse.SERVING
        assert serving is (name != INFERENCE_SERVICE), name  # no engine here
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nonsense"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_without_an_engine_an_answer_is_unavailable(channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    ask = inference_pb2.GenerationInput(model="base", messages=[inference_pb2.Message(role="user", content="hi")])
    for call in (
        stub.Generate(inference_pb2.GenerateRequest(input=ask)),
        stub.StreamGenerate(inference_pb2.StreamGenerateRequest(input=ask)),
    ):
        code, reason, _ = await refused(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert reason in {"ENGINE_UNAVAILABLE", "BASE_MODEL_LOADING"}


REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
LIST_SERVICES = reflection_pb2.ServerReflectionRequest(list_services="")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_every_service(channel: grpc.aio.Channel, version: str) -> None:
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield LIST_SERVICES

    names = [service.name async for answer in call(ask()) for service in answer.list_services_response.service]
    assert set(SERVICES) <= set(names)


async def test_reflection_can_be_switched_off(make_settings: Callable[..., Settings]) -> None:
    async with await start_server(make_settings(reflection=False)) as server:
        error = await refused_stream(server, REFLECTION, LIST_SERVICES)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_with_keys_everything_but_health_demands_one(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(api_keys="advisory:a-long-key,ops:another-long-key")
    async with (
        await start_server(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        jobs = jobs_pb2_grpc.JobServiceStub(channel)
        request = jobs_pb2.ListJobsRequest()
        watch = jobs_pb2.WatchJobRequest(name="jobs/none")
        for metadata, reason in (
            ((), "API_KEY_MISSING"),
            ((("authorization", "Bearer "),), "API_KEY_MISSING"),
            ((("authorization", "Basic a-long-key"),), "API_KEY_MISSING"),
            ((("authorization", "Bearer a-wrong-key"),), "API_KEY_INVALID"),
            ((("x-api-key", "a-long-key2"),), "API_KEY_INVALID"),
        ):
            for call in (jobs.ListJobs(request, metadata=metadata), jobs.WatchJob(watch, metadata=metadata)):
                assert (await refused(call))[:2] == (grpc.StatusCode.UNAUTHENTICATED, reason)
        for metadata in ((("authorization", "bearer a-long-key"),), (("x-api-key", "another-long-key"),)):
            await jobs.ListJobs(request, metadata=metadata)
        spec = generation_pb2.GenerationSpec(num_conversations=10)
        created = await jobs.CreateGenerationJob(
            jobs_pb2.CreateGenerationJobRequest(spec=spec), metadata=(("x-api-key", "another-long-key"),)
        )
        assert created.job.creator == "ops"
        assert (await refused_stream(server, REFLECTION, LIST_SERVICES)).code() is grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status


async def test_an_unexpected_failure_tells_nothing_of_itself(
    channel: grpc.aio.Channel, server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    # A closed store is something no servicer expects.
    def explode(*_: object) -> None:
        raise RuntimeError("canary /secret/path")

    server._state.list_jobs = explode  # type: ignore[method-assign,assignment]
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListJobs(jobs_pb2.ListJobsRequest(), metadata=(("x-request-id", "req-7"),))
    info, _ = details(caught.value)
    assert (caught.value.code(), info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "canary" not in str(caught.value)
    assert "req-7" in (caught.value.details() or "")
    assert "canary" in caplog.text


async def test_two_servers_never_share_a_data_directory_or_a_port(
    server: RunningServer, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    from knowledge_engine.errors import InvalidSpecError, StateError

    with pytest.raises(StateError, match="another server"):
        await start_server(make_settings())
    with pytest.raises(InvalidSpecError, match="taken"):
        await start_server(make_settings(data_dir=tmp_path / "other", grpc_address=server.address))


async def test_an_oversized_message_is_refused_and_the_server_lives(channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    ask = inference_pb2.GenerationInput(
        model="base", messages=[inference_pb2.Message(role="user", content="x" * (13 * 2**20))]
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(inference_pb2.GenerateRequest(input=ask))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await jobs_pb2_grpc.JobServiceStub(channel).ListJobs(jobs_pb2.ListJobsRequest())


def test_a_broken_setting_stops_the_process_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "knowledge_engine.server"],
        env={"KNOWLEDGE_GRPC_ADDRESS": "0.0.0.0:0", "KNOWLEDGE_DATA_DIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "KNOWLEDGE_API_KEYS" in done.stderr


async def test_the_process_announces_its_address_and_drains(tmp_path: Path, tiny_base: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "knowledge_engine.server",
        env={
            "KNOWLEDGE_GRPC_ADDRESS": "127.0.0.1:0",
            "KNOWLEDGE_DATA_DIR": str(tmp_path / "data"),
            "KNOWLEDGE_BASE_MODEL": str(tiny_base),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdout
    address = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))["grpc_address"]
    async with grpc.aio.insecure_channel(address) as channel:
        await jobs_pb2_grpc.JobServiceStub(channel).ListJobs(jobs_pb2.ListJobsRequest())
    process.terminate()
    await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
