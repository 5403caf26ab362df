"""The client's view of the wire: what the server sends comes out as the same `core` types and errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from knowledge_engine import core, errors
from knowledge_engine.cli.output import EXIT_CODES, exit_code
from knowledge_engine.client import Client
from knowledge_engine.client_convert import (
    completion_from_proto,
    dataset_from_proto,
    error_from_status,
    estimate_from_proto,
    event_from_proto,
    generation_spec_to_proto,
    job_from_proto,
    model_from_proto,
    model_resource,
    training_spec_to_proto,
)
from knowledge_engine.server import convert
from knowledge_engine.server.status import to_status
from knowledge_engine.v1 import jobs_pb2, training_pb2
from tests.fakes_server import ScriptedServer, abort, scripted_server, status

NOW = datetime(2030, 1, 2, 3, 4, 5, 600_000, tzinfo=UTC)
COMPARISON = core.HeldOutComparison(
    base_loss=2.5, tuned_loss=0.5, num_conversations=12, num_tokens=900, precision="float32"
)
TRAINING = core.TrainingSpec(
    dataset="talks",
    model="assistant",
    lora=core.LoraConfig(rank=4, target_modules=("q_proj", "v_proj")),
    lr_scheduler_type=core.LrSchedulerType.COSINE,
    max_steps=7,
    warmup_ratio=0.0,
    save_steps=50,
    auto_find_batch_size=True,
)
GENERATION = core.GenerationSpec(
    catalogue="shop",
    dataset="talks",
    num_conversations=50,
    topics=("kettle", "shoe"),
    difficulty_level=core.DifficultyLevel.COMPLEX,
    include_product_data=False,
    seed=0,
    provider=core.GenerationProvider.OPENAI,
)
TRAINED = core.TrainingResult(
    model="assistant",
    version=3,
    digest="sha256:aa",
    train_loss=1.25,
    comparison=COMPARISON,
    num_steps=7,
    num_tokens=4000,
    tokens_per_second=160.5,
    training_seconds=24.75,
    peak_memory_bytes=2**31,
)
GENERATED = core.GenerationResult(
    dataset="talks",
    digest="sha256:bb",
    num_conversations=50,
    num_rejected=3,
    rejections={"WRONG_PRICE": 2, "DUPLICATE": 1},
    provider="openai",
    language_model="gpt-4.1-mini-2025-04-14",
    usage=core.GenerationUsage(prompt_tokens=3, completion_tokens=2, num_requests=2, num_retries=1, cost_usd=0.25),
)
FAILURE = errors.InvalidSpecError(
    "row 3 is too long",
    reason=errors.Reason.EXAMPLE_TOO_LONG,
    violations=[errors.Violation("spec.max_length", "row 3 has 3000 tokens")],
    row=3,
)
PROGRESS = core.Progress(phase="training", step=0, total_steps=7, loss=1.5, epoch=0.25, eta_seconds=12.5)

JOBS = {
    "queued": core.Job(
        id="j1",
        kind=core.JobKind.GENERATION,
        state=core.JobState.QUEUED,
        spec=GENERATION,
        create_time=NOW,
        queue_position=3,
    ),
    "pausing": core.Job(
        id="j4",
        kind=core.JobKind.TRAINING,
        state=core.JobState.RUNNING,
        spec=TRAINING,
        create_time=NOW,
        pause_requested=True,
        checkpoint_step=0,
    ),
    "paused": core.Job(
        id="j5",
        kind=core.JobKind.TRAINING,
        state=core.JobState.PAUSED,
        spec=TRAINING,
        create_time=NOW,
        checkpoint_step=40,
    ),
    "succeeded": core.Job(
        id="j2",
        kind=core.JobKind.TRAINING,
        state=core.JobState.SUCCEEDED,
        spec=TRAINING,
        result=TRAINED,
        progress=PROGRESS,
        create_time=NOW,
        start_time=NOW,
        end_time=NOW,
        attempt=2,
        creator="shop",
        tracker_run=core.TrackerRun(id="run1"),
        last_sequence=40,
    ),
    "failed": core.Job(
        id="j3",
        kind=core.JobKind.TRAINING,
        state=core.JobState.FAILED,
        spec=TRAINING,
        error=FAILURE.to_dict(),
        create_time=NOW,
    ),
}

PAYLOADS: dict[str, core.EventPayload] = {
    "state": core.StateChange(state=core.JobState.RUNNING, attempt=1, message="started"),
    "failure": core.StateChange(state=core.JobState.FAILED, attempt=1, error=FAILURE.to_dict()),
    "progress": PROGRESS,
    "paused": core.StateChange(state=core.JobState.PAUSED, attempt=1),
    "checkpoint": core.Checkpoint(step=40, size_bytes=2**33),
    "log": core.LogLine(message="hello"),
    "warning": core.JobWarning(reason="SLOW", message="this is slow"),
    "training": core.ResultEvent(result=TRAINED),
    "generation": core.ResultEvent(result=GENERATED),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_job_survives_the_wire(job: core.Job) -> None:
    assert job_from_proto(convert.job(job)) == job


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_event_survives_the_wire(payload: core.EventPayload) -> None:
    event = core.JobEvent(job_id="j1", sequence=9, create_time=NOW, payload=payload)
    assert event_from_proto(convert.job_event(event)) == event


def test_dataset_and_model_survive_the_wire() -> None:
    dataset = core.Dataset(
        name="talks",
        kind=core.DatasetKind.CONVERSATIONS,
        digest="sha256:bb",
        num_rows=50,
        size_bytes=1234,
        create_time=NOW,
        parents=("sha256:cc",),
        job_id="j1",
    )
    version = core.ModelVersion(
        model="assistant",
        version=3,
        digest="sha256:aa",
        base_model="base",
        base_digest="sha256:dd",
        base_source="org/name",
        base_revision="c0ffee",
        dataset_digest="sha256:bb",
        chat_template_digest="sha256:ee",
        job_id="j2",
        spec=TRAINING,
        comparison=COMPARISON,
        training_precision="nf4",
        size_bytes=99,
        create_time=NOW,
    )
    model = core.Model(name="assistant", create_time=NOW, latest_version=version, num_versions=2)
    empty = core.Model(name="assistant", create_time=NOW, latest_version=None, num_versions=0)
    assert dataset_from_proto(convert.dataset(dataset)) == dataset
    assert model_from_proto(convert.model(model)) == model
    assert model_from_proto(convert.model(empty)) == empty


@pytest.mark.parametrize(("model", "version"), [("base", None), ("assistant", 3)])
def test_completion_survives_the_wire(model: str, version: int | None) -> None:
    completion = core.Completion(
        finish_reasons=(core.FinishReason.LENGTH, core.FinishReason.STOP),
        prompt_tokens=10,
        completion_tokens=20,
        model=model,
        version=version,
        digest="sha256:aa",
        time_to_first_token_seconds=0.25,
        total_seconds=1.5,
    )
    assert completion_from_proto(convert.completion(completion)) == completion


def test_specs_reach_the_server_as_they_were_meant() -> None:
    assert convert.training_spec(training_spec_to_proto(TRAINING)) == TRAINING
    assert convert.generation_spec(generation_spec_to_proto(GENERATION)) == GENERATION


def test_what_was_not_set_is_left_to_the_server() -> None:
    proto = training_spec_to_proto(core.TrainingSpec(dataset="talks", model="assistant", seed=1))
    assert {field.name for field, _ in proto.ListFields()} == {"dataset", "model", "seed"}


@pytest.mark.parametrize("kind", [kind for kind in errors.KINDS.values() if kind is not errors.CredentialsError])
def test_error_survives_the_wire(kind: type[errors.KnowledgeEngineError]) -> None:
    error = kind(
        "it went wrong",
        reason=errors.Reason.QUEUE_FULL,
        violations=[errors.Violation("spec.seed", "is odd")],
        retry_after_seconds=2.5,
        limit=64,
    )
    returned = error_from_status(to_status(error))
    assert type(returned) is kind
    assert returned.to_dict() == error.to_dict()


def test_reason_of_a_newer_server_is_kept_as_metadata() -> None:
    status = to_status(errors.NotFoundError("gone", reason=errors.Reason.JOB_NOT_FOUND))
    info = status.details[0]
    info.value = info.value.replace(b"JOB_NOT_FOUND", b"JOB_NOT_FOUNF")
    error = error_from_status(status)
    assert isinstance(error, errors.NotFoundError)
    assert error.metadata["reason"] == "JOB_NOT_FOUNF"


def test_every_error_class_has_its_own_exit_code() -> None:
    kinds = [kind for kind in errors.KINDS.values() if kind is not errors.KnowledgeEngineError]
    codes = {exit_code(kind("x")) for kind in kinds}
    assert set(EXIT_CODES) == set(kinds)
    assert len(codes) == len(kinds)
    assert codes.isdisjoint({0, 1, 2, 130})
    assert exit_code(errors.KnowledgeEngineError("x")) == 1


def test_models_are_addressed_by_short_names() -> None:
    assert [model_resource(name) for name in ("base", "x", "x:3")] == ["base", "models/x", "models/x/versions/3"]


def test_unreachable_server_is_an_upstream_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = f"127.0.0.1:{found.getsockname()[1]}"
    with Client(address) as client, pytest.raises(errors.UpstreamError, match=address) as caught:
        client.get_job("j1")
    assert caught.value.reason is errors.Reason.SERVER_UNAVAILABLE


def test_unknown_option_of_an_answer_is_refused() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="temprature"):
        client.generate("base", "hello", temprature=1)


def test_estimate_survives_the_wire() -> None:
    proto = training_pb2.TrainingEstimate(
        memory=training_pb2.TrainingEstimate.MemoryRange(low_bytes=1, expected_bytes=2, high_bytes=2**40),
        device="cpu",
        total_memory_bytes=9,
        held_memory_bytes={"engine": 5, "jobs/j": 7},
        disk_bytes=3,
        free_disk_bytes=4,
        num_steps=6,
        num_tokens=8,
        fits=False,
        refusal="too much",
        nearest_spec=training_spec_to_proto(TRAINING),
        gradient_checkpointing=True,
    )
    proto.training_time.FromMilliseconds(1500)
    estimate = estimate_from_proto(proto)
    assert estimate.model_dump() == {
        "memory": {"low_bytes": 1, "expected_bytes": 2, "high_bytes": 2**40},
        "device": "cpu",
        "total_memory_bytes": 9,
        "held_memory_bytes": {"engine": 5, "j": 7},
        "disk_bytes": 3,
        "free_disk_bytes": 4,
        "num_steps": 6,
        "num_tokens": 8,
        "training_seconds": 1.5,
        "fits": False,
        "refusal": "too much",
        "nearest_spec": TRAINING.model_dump(),
        "gradient_checkpointing": True,
    }
    assert set(estimate.model_dump()) == {
        "training_seconds" if field.name == "training_time" else field.name for field in proto.DESCRIPTOR.fields
    }
    proto.ClearField("training_time")
    proto.ClearField("nearest_spec")
    estimate = estimate_from_proto(proto)
    assert (estimate.training_seconds, estimate.nearest_spec) == (None, None)


# --- repeating and reconnecting, over a scripted server -----------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server() as scripted:
        yield scripted


def _job(state: jobs_pb2.JobState.ValueType, last: int = 0) -> jobs_pb2.Job:
    return jobs_pb2.Job(
        name="jobs/j",
        state=state,
        training=training_spec_to_proto(TRAINING),
        create_time=Timestamp(seconds=1),
        last_sequence=last,
    )


async def test_a_create_call_whose_answer_is_lost_is_repeated_with_the_same_id(server: ScriptedServer) -> None:
    async def answer(request: Any, context: Any) -> jobs_pb2.CreateTrainingJobResponse:
        if len(server.received) == 1:
            await abort(context, status(grpc.StatusCode.UNAVAILABLE))
        return jobs_pb2.CreateTrainingJobResponse(job=_job(jobs_pb2.JOB_STATE_QUEUED))

    server.script["CreateTrainingJob"] = answer
    with Client(server.address) as client:
        job = await asyncio.to_thread(client.create_training_job, TRAINING)
        await asyncio.to_thread(client.create_training_job, TRAINING)
        await asyncio.to_thread(client.create_training_job, TRAINING, request_id="mine")
    assert job.id == "j"
    first, again, other, mine = [call.request.request_id for call in server.received]
    assert first == again
    assert len({first, other, mine}) == 3
    assert (len(first), mine) == (36, "mine")


async def test_a_create_call_that_the_service_refused_is_not_repeated(server: ScriptedServer) -> None:
    server.script["CreateGenerationJob"] = status(grpc.StatusCode.UNAVAILABLE, "STATE_UNAVAILABLE")
    with Client(server.address) as client, pytest.raises(errors.UpstreamError):
        await asyncio.to_thread(client.create_generation_job, GENERATION)
    assert len(server.received) == 1


async def test_a_watch_goes_on_however_the_server_goes_away(server: ScriptedServer) -> None:
    last = 8
    breaks = iter(
        [
            lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed"),
            lambda context: context.abort(grpc.StatusCode.CANCELLED, "the server stops"),
            None,  # it ends its stream in order, and the job ends meanwhile
        ]
    )

    async def watch(request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        breaking = next(breaks, None)
        for sequence in range(request.after_sequence + 1, min(request.after_sequence + 2, last) + 1):
            event = jobs_pb2.JobEvent(job="jobs/j", sequence=sequence, create_time=Timestamp(seconds=sequence))
            event.checkpoint.step = sequence
            if sequence == last:
                event.state_change.state = jobs_pb2.JOB_STATE_SUCCEEDED
            yield jobs_pb2.WatchJobResponse(event=event)
        if breaking is not None:
            await breaking(context)

    server.script["WatchJob"] = watch
    server.script["GetJob"] = jobs_pb2.GetJobResponse(job=_job(jobs_pb2.JOB_STATE_SUCCEEDED, last))
    lost: list[int] = []
    with Client(server.address) as client:
        watched = client.watch_job("j", on_reconnect=lambda: lost.append(1))
        events = await asyncio.to_thread(list, watched)
        assert [event.sequence for event in events] == list(range(1, last + 1))
        assert len(lost) == 2
        assert await asyncio.to_thread(list, client.watch_job("j", last)) == []
        assert [event.sequence for event in await asyncio.to_thread(list, client.watch_job("j", last - 1))] == [last]


async def test_a_watch_gives_up_when_its_patience_is_over(server: ScriptedServer) -> None:
    async def find(request: Any, context: Any) -> jobs_pb2.GetJobResponse:
        if len(server.received) > 1:
            await abort(context, status(grpc.StatusCode.UNAVAILABLE))
        return jobs_pb2.GetJobResponse(job=_job(jobs_pb2.JOB_STATE_RUNNING))

    server.script["GetJob"] = find
    server.script["WatchJob"] = status(grpc.StatusCode.UNAVAILABLE)
    lost: list[int] = []
    with Client(server.address) as client:
        watched = client.watch_job("j", reconnect_seconds=0.7, on_reconnect=lambda: lost.append(1))
        with pytest.raises(errors.UpstreamError) as caught:
            await asyncio.to_thread(list, watched)
    assert caught.value.reason is errors.Reason.SERVER_UNAVAILABLE
    assert len(lost) == 1, "said once, however often it was tried"


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED])
async def test_a_watch_that_is_refused_does_not_go_on(server: ScriptedServer, code: grpc.StatusCode) -> None:
    server.script["GetJob"] = jobs_pb2.GetJobResponse(job=_job(jobs_pb2.JOB_STATE_RUNNING))
    server.script["WatchJob"] = status(code, "SOME_REASON")
    with Client(server.address) as client, pytest.raises(errors.KnowledgeEngineError, match="it failed"):
        await asyncio.to_thread(list, client.watch_job("j"))
    assert len(server.received) == 2


def test_a_watch_of_a_server_that_was_never_there_fails_at_once() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.UpstreamError):
        next(client.watch_job("j"))
