"""Proto messages into `core` types and specs into proto messages, as a client sees them; gRPC errors into `errors`.

The counterpart of `server/convert.py` on the other end of the wire. Unset fields stay unset, so that a newer server
applies its own defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from pydantic import BaseModel, ConfigDict

from knowledge_engine import core, errors
from knowledge_engine.core import BASE
from knowledge_engine.errors import KnowledgeEngineError, Reason, Violation
from knowledge_engine.v1 import datasets_pb2, generation_pb2, inference_pb2, jobs_pb2, models_pb2, training_pb2

# --- names --------------------------------------------------------------------------------------------------------


def model_resource(model: str) -> str:
    """`base` -> `base`, `x` -> `models/x`, `x:3` -> `models/x/versions/3`."""
    if model == BASE:
        return model
    name, separator, version = model.partition(":")
    return f"models/{name}/versions/{version}" if separator else f"models/{name}"


def version_resource(model: str, version: int) -> str:
    return f"models/{model}/versions/{version}"


def _id(name: str) -> str:
    return name.rpartition("/")[2]


def _model_and_version(name: str) -> tuple[str, int | None]:
    """`models/x/versions/3` is `("x", 3)`, `base` is `("base", None)`."""
    parts = name.split("/")
    return (parts[1], int(parts[3])) if len(parts) == 4 else (name, None)


# --- jobs ---------------------------------------------------------------------------------------------------------


def job_from_proto(job: jobs_pb2.Job) -> core.Job:
    is_training = job.WhichOneof("spec") == "training"
    return core.Job(
        id=_id(job.name),
        kind=core.JobKind.TRAINING if is_training else core.JobKind.GENERATION,
        state=_state(job.state),
        spec=_training_spec(job.training) if is_training else _generation_spec(job.generation),
        result=_result(job.result) if job.HasField("result") else None,
        error=error_from_status(job.error).to_dict() if job.HasField("error") else None,
        progress=_progress(job.progress) if job.HasField("progress") else None,
        create_time=_time(job.create_time),
        start_time=_time(job.start_time) if job.HasField("start_time") else None,
        end_time=_time(job.end_time) if job.HasField("end_time") else None,
        attempt=job.attempt,
        creator=job.creator,
        tracker_run=core.TrackerRun(id=job.tracker_run.id, url=job.tracker_run.url)
        if job.HasField("tracker_run")
        else None,
        last_sequence=job.last_sequence,
        pause_requested=job.pause_requested,
        queue_position=job.queue_position if job.HasField("queue_position") else None,
        checkpoint_step=job.checkpoint_step if job.HasField("checkpoint_step") else None,
    )


def event_from_proto(event: jobs_pb2.JobEvent) -> core.JobEvent:
    return core.JobEvent(
        job_id=_id(event.job),
        sequence=event.sequence,
        create_time=_time(event.create_time),
        payload=_payload(event),
    )


def _payload(event: jobs_pb2.JobEvent) -> core.EventPayload:
    match event.WhichOneof("payload"):
        case "state_change":
            change = event.state_change
            error = error_from_status(change.error).to_dict() if change.HasField("error") else None
            return core.StateChange(
                state=_state(change.state), attempt=change.attempt, message=change.message, error=error
            )
        case "progress":
            return _progress(event.progress)
        case "log":
            return core.LogLine(message=event.log.message)
        case "warning":
            return core.JobWarning(reason=event.warning.reason, message=event.warning.message)
        case "checkpoint":
            return core.Checkpoint(step=event.checkpoint.step, size_bytes=event.checkpoint.size_bytes)
        case "result":
            return core.ResultEvent(result=_result(event.result))
        case unknown:
            raise KnowledgeEngineError(f"the server sent an event this client does not know ({unknown})")


def _state(state: jobs_pb2.JobState.ValueType) -> core.JobState:
    return core.JobState(jobs_pb2.JobState.Name(state).removeprefix("JOB_STATE_"))


def _progress(progress: jobs_pb2.Progress) -> core.Progress:
    values = _set_fields(progress)
    if (eta := values.pop("eta", None)) is not None:
        values["eta_seconds"] = _seconds(eta)
    return core.Progress(**values)


def _result(result: jobs_pb2.JobResult) -> core.TrainingResult | core.GenerationResult:
    if result.WhichOneof("result") == "generation":
        generated = result.generation
        return core.GenerationResult(
            dataset=_id(generated.dataset),
            digest=generated.digest,
            num_conversations=generated.num_conversations,
            num_rejected=generated.num_rejected,
            rejections=dict(generated.rejections),
            provider=generated.provider,
            language_model=generated.language_model,
            usage=core.GenerationUsage(**_set_fields(generated.usage)) if generated.HasField("usage") else None,
        )
    trained = result.training
    model, version = _model_and_version(trained.model_version)
    return core.TrainingResult(
        model=model,
        version=version or 0,
        digest=trained.digest,
        train_loss=trained.train_loss,
        comparison=_comparison(trained.comparison) if trained.HasField("comparison") else None,
        num_steps=trained.num_steps,
        num_tokens=trained.num_tokens,
        tokens_per_second=trained.tokens_per_second,
        training_seconds=_seconds(trained.training_time),
        peak_memory_bytes=trained.peak_memory_bytes,
        published_step=trained.published_step,
    )


def _comparison(comparison: training_pb2.HeldOutComparison) -> core.HeldOutComparison:
    return core.HeldOutComparison(
        base_loss=comparison.base_loss,
        tuned_loss=comparison.tuned_loss,
        num_conversations=comparison.num_conversations,
        num_tokens=comparison.num_tokens,
        precision=comparison.precision,
    )


# --- estimates ----------------------------------------------------------------------------------------------------


class MemoryRange(BaseModel):
    model_config = ConfigDict(frozen=True)

    low_bytes: int
    expected_bytes: int
    high_bytes: int


class TrainingEstimate(BaseModel):
    """What a fine-tuning run would take, found out without loading anything."""

    model_config = ConfigDict(frozen=True)

    memory: MemoryRange
    device: str
    total_memory_bytes: int
    held_memory_bytes: dict[str, int]
    """By holder: `engine`, or a job's id."""
    disk_bytes: int
    free_disk_bytes: int
    num_steps: int
    num_tokens: int
    training_seconds: float | None
    """At the rate of the newest run on the same base and precision; None while there was none."""
    fits: bool
    refusal: str
    nearest_spec: core.TrainingSpec | None
    """The nearest settings that would fit; None when these do, or when none would."""
    gradient_checkpointing: bool
    """Whether layers are computed twice, because it would not fit otherwise."""


def estimate_from_proto(estimate: training_pb2.TrainingEstimate) -> TrainingEstimate:
    memory = estimate.memory
    return TrainingEstimate(
        memory=MemoryRange(
            low_bytes=memory.low_bytes, expected_bytes=memory.expected_bytes, high_bytes=memory.high_bytes
        ),
        device=estimate.device,
        total_memory_bytes=estimate.total_memory_bytes,
        held_memory_bytes={_id(holder): held for holder, held in estimate.held_memory_bytes.items()},
        disk_bytes=estimate.disk_bytes,
        free_disk_bytes=estimate.free_disk_bytes,
        num_steps=estimate.num_steps,
        num_tokens=estimate.num_tokens,
        training_seconds=_seconds(estimate.training_time) if estimate.HasField("training_time") else None,
        fits=estimate.fits,
        refusal=estimate.refusal,
        nearest_spec=_training_spec(estimate.nearest_spec) if estimate.HasField("nearest_spec") else None,
        gradient_checkpointing=estimate.gradient_checkpointing,
    )


# --- specs --------------------------------------------------------------------------------------------------------


def training_spec_to_proto(spec: core.TrainingSpec) -> training_pb2.TrainingSpec:
    """The fields that were set, and no other."""
    values = spec.model_dump(exclude_unset=True, exclude_none=True)
    for field in ("dataset", "eval_dataset"):
        if field in values:
            values[field] = f"datasets/{values[field]}"
    values["model"] = f"models/{spec.model}"
    if spec.start_from is not None:
        values["start_from"] = model_resource(spec.start_from)
    if "lora" in values:
        values["lora"] = training_pb2.LoraConfig(**values["lora"])
    return training_pb2.TrainingSpec(**_enums_numbered(values, training_pb2.TrainingSpec.DESCRIPTOR))


def generation_spec_to_proto(spec: core.GenerationSpec) -> generation_pb2.GenerationSpec:
    """The fields that were set, and no other."""
    values = spec.model_dump(exclude_unset=True, exclude_none=True)
    for field in ("catalogue", "dataset"):
        if field in values:
            values[field] = f"datasets/{values[field]}"
    return generation_pb2.GenerationSpec(**_enums_numbered(values, generation_pb2.GenerationSpec.DESCRIPTOR))


def _training_spec(spec: training_pb2.TrainingSpec) -> core.TrainingSpec:
    values = _set_fields(spec)
    values["dataset"] = _id(spec.dataset)
    values["model"] = _id(spec.model)
    if "eval_dataset" in values:
        values["eval_dataset"] = _id(spec.eval_dataset)
    if "start_from" in values:
        model, version = _model_and_version(spec.start_from)
        values["start_from"] = f"{model}:{version}"
    if "lora" in values:
        values["lora"] = core.LoraConfig(**_set_fields(spec.lora))
    return core.TrainingSpec(**_enums_named(values, spec.DESCRIPTOR))


def _generation_spec(spec: generation_pb2.GenerationSpec) -> core.GenerationSpec:
    values = _set_fields(spec)
    for field in ("catalogue", "dataset"):
        if field in values:
            values[field] = _id(values[field])
    return core.GenerationSpec(**_enums_named(values, spec.DESCRIPTOR))


def _enums_numbered(values: Mapping[str, Any], message: Descriptor) -> dict[str, Any]:
    """With the numbers of the contract for the words that `core` uses in enum fields."""
    numbers = {
        field.name: field.enum_type.values_by_name[f"{_prefix(field.enum_type)}{values[field.name].upper()}"].number
        for field in message.fields
        if field.enum_type is not None and field.name in values
    }
    return {**values, **numbers}


def _enums_named(values: Mapping[str, Any], message: Descriptor) -> dict[str, Any]:
    """The inverse of `_enums_numbered`."""
    words = {
        field.name: field.enum_type.values_by_number[values[field.name]].name.removeprefix(_prefix(field.enum_type))
        for field in message.fields
        if field.enum_type is not None and field.name in values
    }
    return {**values, **{name: word.lower() for name, word in words.items()}}


def _prefix(enum: EnumDescriptor) -> str:
    """What the names of an enum's values begin with; its zero is `..._UNSPECIFIED`."""
    return enum.values_by_number[0].name.removesuffix("UNSPECIFIED")


def _set_fields(message: ProtoMessage) -> dict[str, Any]:
    return {field.name: tuple(value) if field.is_repeated else value for field, value in message.ListFields()}


# --- datasets, models, answers ------------------------------------------------------------------------------------


def dataset_from_proto(dataset: datasets_pb2.Dataset) -> core.Dataset:
    return core.Dataset(
        name=_id(dataset.name),
        kind=core.DatasetKind(datasets_pb2.DatasetKind.Name(dataset.kind).removeprefix("DATASET_KIND_").lower()),
        digest=dataset.digest,
        num_rows=dataset.num_rows,
        size_bytes=dataset.size_bytes,
        create_time=_time(dataset.create_time),
        parents=tuple(dataset.parents),
        job_id=_id(dataset.job),
    )


def previewed_row_from_proto(row: datasets_pb2.PreviewedRow) -> core.PreviewedRow:
    rejected = (
        core.PreviewedAnswer(row.rejected.text, _previewed_tokens(row.rejected.tokens))
        if row.HasField("rejected")
        else None
    )
    return core.PreviewedRow(row.row, row.text, _previewed_tokens(row.tokens), row.problem, row.change, rejected)


def _previewed_tokens(tokens: Iterable[datasets_pb2.PreviewedRow.Token]) -> tuple[core.PreviewedToken, ...]:
    return tuple(core.PreviewedToken(token.id, token.text, token.is_trained, token.is_control) for token in tokens)


def dataset_preview_from_proto(preview: datasets_pb2.DatasetPreview) -> core.DatasetPreview:
    lengths = preview.lengths
    return core.DatasetPreview(
        num_rows=preview.num_rows,
        num_tokens=preview.num_tokens,
        num_trained_tokens=preview.num_trained_tokens,
        lengths=core.TokenLengths(lengths.min, lengths.median, lengths.p95, lengths.max, lengths.mean),
        num_issues=preview.num_issues,
        issues=tuple(core.PreviewIssue(issue.row, issue.problem) for issue in preview.issues),
        num_changes=preview.num_changes,
        changes=tuple(core.PreviewIssue(change.row, change.problem) for change in preview.changes),
        num_messages=dict(preview.num_messages),
        num_learned_messages=preview.num_learned_messages,
        num_near_duplicates=preview.num_near_duplicates,
        near_duplicates=tuple(core.NearDuplicate(pair.row, pair.of_row) for pair in preview.near_duplicates),
        length_bins=tuple(core.LengthBin(each.max_tokens, each.num_rows) for each in preview.length_bins),
    )


def model_from_proto(model: models_pb2.Model) -> core.Model:
    return core.Model(
        name=_id(model.name),
        create_time=_time(model.create_time),
        latest_version=version_from_proto(model.latest_version) if model.HasField("latest_version") else None,
        num_versions=model.num_versions,
    )


def version_from_proto(version: models_pb2.ModelVersion) -> core.ModelVersion:
    model, number = _model_and_version(version.name)
    return core.ModelVersion(
        model=model,
        version=number or 0,
        digest=version.digest,
        base_model=version.base_model,
        base_digest=version.base_digest,
        base_source=version.base_source,
        base_revision=version.base_revision,
        dataset_digest=version.dataset_digest,
        eval_dataset_digest=version.eval_dataset_digest,
        start_from_digest=version.start_from_digest,
        chat_template_digest=version.chat_template_digest,
        job_id=_id(version.job),
        spec=_training_spec(version.spec),
        comparison=_comparison(version.comparison) if version.HasField("comparison") else None,
        training_precision=version.training_precision,
        size_bytes=version.size_bytes,
        create_time=_time(version.create_time),
    )


class Export(BaseModel):
    """A version merged into its base; `folder` is in the service's data directory."""

    model_config = ConfigDict(frozen=True)

    folder: str
    version_digest: str
    precision: str
    size_bytes: int
    num_tokens: int
    num_same: int
    max_difference: float


def export_from_proto(export: models_pb2.Export) -> Export:
    return Export(**{field: getattr(export, field) for field in Export.model_fields})


def completion_from_proto(completion: inference_pb2.Completion) -> core.Completion:
    model, version = _model_and_version(completion.model)
    reasons = map(inference_pb2.FinishReason.Name, completion.finish_reasons)
    return core.Completion(
        finish_reasons=tuple(core.FinishReason(reason.removeprefix("FINISH_REASON_").lower()) for reason in reasons),
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        model=model,
        version=version,
        digest=completion.digest,
        time_to_first_token_seconds=_seconds(completion.time_to_first_token),
        total_seconds=_seconds(completion.total_time),
    )


def token_logprob_from_proto(told: inference_pb2.TokenLogprob) -> core.TokenLogprob:
    return core.TokenLogprob(told.token_id, told.bytes, told.logprob, tuple(map(token_logprob_from_proto, told.top)))


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


# --- errors -------------------------------------------------------------------------------------------------------

_KINDS: dict[grpc.StatusCode, type[KnowledgeEngineError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidSpecError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.StateError,
    grpc.StatusCode.ABORTED: errors.ConflictError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.CapacityError,
    grpc.StatusCode.UNAVAILABLE: errors.UpstreamError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.UpstreamError,
    grpc.StatusCode.DATA_LOSS: errors.IntegrityError,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def error_from_call(error: grpc.RpcError, server: str) -> KnowledgeEngineError:
    """A failed call as the error the service raised, or as UpstreamError where no service answered."""
    assert isinstance(error, grpc.Call)
    if (status := rpc_status.from_call(error)) is not None:
        converted = error_from_status(status)
        trailing = {str(key): value for key, value in error.trailing_metadata() or ()}
        if converted.reason is Reason.INTERNAL and "x-request-id" in trailing:
            converted.metadata["request_id"] = str(trailing["x-request-id"])
        return converted
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"nothing answers at {server}; `knowledge-engine serve` starts the service"
        return errors.UpstreamError(message, reason=Reason.SERVER_UNAVAILABLE, server=server)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"{server} did not answer in time"
        return errors.UpstreamError(message, reason=Reason.SERVER_UNAVAILABLE, server=server)
    return _KINDS.get(code, KnowledgeEngineError)(f"{details or 'the call failed'} ({code.name})")


def error_from_status(status: status_pb2.Status) -> KnowledgeEngineError:
    """A google.rpc.Status with ErrorInfo, BadRequest and RetryInfo as one of our errors.

    A reason that only a newer server knows becomes the class's default reason, the word itself stays in the metadata.
    """
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for known in (info, request, retry):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    kind = _KINDS.get(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), KnowledgeEngineError)
    known_reason = info.reason in Reason.__members__
    error = kind(
        status.message,
        reason=Reason(info.reason) if known_reason else None,
        violations=[Violation(item.field, item.description, item.reason) for item in request.field_violations],
        retry_after_seconds=_seconds(retry.retry_delay) if retry.HasField("retry_delay") else None,
    )
    error.metadata = dict(info.metadata) | ({} if known_reason or not info.reason else {"reason": info.reason})
    return error
