"""Protos to core and back; the only module that knows both. Bad input becomes `InvalidSpecError` with proto paths."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf import duration_pb2, json_format, struct_pb2, timestamp_pb2
from google.protobuf.message import Message as ProtoMessage
from google.rpc import status_pb2
from pydantic import BaseModel, ValidationError

from knowledge_engine import core, errors, tools
from knowledge_engine.errors import InvalidSpecError, Reason, RowError, Violation
from knowledge_engine.server.status import to_status
from knowledge_engine.state import Request
from knowledge_engine.training.estimate import Estimate
from knowledge_engine.v1 import (
    datasets_pb2,
    generation_pb2,
    inference_pb2,
    jobs_pb2,
    models_pb2,
    training_pb2,
)

_S = TypeVar("_S", bound=BaseModel)

DEFAULT_PAGE_SIZE = 50
MAX_REQUEST_ID_LENGTH = 255
MAX_PAGE_SIZE = 1000
DEFAULT_PREVIEWED_ROWS = 10
MAX_PREVIEWED_ROWS = 100

_TRAINING_ENUMS: dict[str, dict[int, StrEnum]] = {
    "lr_scheduler_type": {
        training_pb2.LR_SCHEDULER_TYPE_LINEAR: core.LrSchedulerType.LINEAR,
        training_pb2.LR_SCHEDULER_TYPE_COSINE: core.LrSchedulerType.COSINE,
        training_pb2.LR_SCHEDULER_TYPE_CONSTANT: core.LrSchedulerType.CONSTANT,
    },
    "method": {
        training_pb2.TRAINING_METHOD_SFT: core.TrainingMethod.SFT,
        training_pb2.TRAINING_METHOD_DPO: core.TrainingMethod.DPO,
    },
    "split_by": {
        training_pb2.SPLIT_BY_CONVERSATION: core.SplitBy.CONVERSATION,
        training_pb2.SPLIT_BY_PRODUCT: core.SplitBy.PRODUCT,
    },
    "truncation": {
        training_pb2.TRUNCATION_ERROR: core.Truncation.ERROR,
        training_pb2.TRUNCATION_DROP: core.Truncation.DROP,
        training_pb2.TRUNCATION_KEEP_LAST_TURNS: core.Truncation.KEEP_LAST_TURNS,
    },
}
_DIFFICULTIES = {
    generation_pb2.DIFFICULTY_LEVEL_SIMPLE: core.DifficultyLevel.SIMPLE,
    generation_pb2.DIFFICULTY_LEVEL_MEDIUM: core.DifficultyLevel.MEDIUM,
    generation_pb2.DIFFICULTY_LEVEL_COMPLEX: core.DifficultyLevel.COMPLEX,
}
_PROVIDERS = {
    generation_pb2.GENERATION_PROVIDER_OFFLINE: core.GenerationProvider.OFFLINE,
    generation_pb2.GENERATION_PROVIDER_OPENAI: core.GenerationProvider.OPENAI,
}
_DATASET_KINDS = {
    datasets_pb2.DATASET_KIND_CONVERSATIONS: core.DatasetKind.CONVERSATIONS,
    datasets_pb2.DATASET_KIND_CATALOGUE: core.DatasetKind.CATALOGUE,
    datasets_pb2.DATASET_KIND_PREFERENCES: core.DatasetKind.PREFERENCES,
    datasets_pb2.DATASET_KIND_EVALUATION: core.DatasetKind.EVALUATION,
}
_DATASET_FORMATS = {
    datasets_pb2.DATASET_FORMAT_UNSPECIFIED: core.DatasetFormat.JSONL,
    datasets_pb2.DATASET_FORMAT_JSONL: core.DatasetFormat.JSONL,
    datasets_pb2.DATASET_FORMAT_CSV: core.DatasetFormat.CSV,
    datasets_pb2.DATASET_FORMAT_SHAREGPT: core.DatasetFormat.SHAREGPT,
    datasets_pb2.DATASET_FORMAT_ALPACA: core.DatasetFormat.ALPACA,
}
_FINISH_REASONS = {
    core.FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    core.FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_JOB_STATES = {state: jobs_pb2.JobState.Value(f"JOB_STATE_{state}") for state in core.JobState}


# --- from proto ---------------------------------------------------------------------------------------------------


def training_spec(proto: training_pb2.TrainingSpec) -> core.TrainingSpec:
    """Raises InvalidSpecError: paths begin with `spec`."""
    values = _set_scalars(proto, skip={"lora", "dataset", "model"})
    values["dataset"] = parse_name(proto.dataset, "datasets", field="spec.dataset")
    values["model"] = parse_name(proto.model, "models", field="spec.model")
    if proto.eval_dataset:
        values["eval_dataset"] = parse_name(proto.eval_dataset, "datasets", field="spec.eval_dataset")
    if proto.start_from:
        model, version = parse_version_name(proto.start_from, field="spec.start_from")
        values["start_from"] = f"{model}:{version}"
    for field, table in _TRAINING_ENUMS.items():
        if field in values:
            values[field] = _enum(table, values[field], f"spec.{field}")
    values["lora"] = _set_scalars(proto.lora, skip={"target_modules"}) | {
        "target_modules": tuple(proto.lora.target_modules)
    }
    return _validated(core.TrainingSpec, values, "spec")


def generation_spec(proto: generation_pb2.GenerationSpec) -> core.GenerationSpec:
    """Raises InvalidSpecError: paths begin with `spec`."""
    values = _set_scalars(proto, skip={"catalogue", "dataset", "topics", "difficulty_level", "provider"})
    values["num_conversations"] = proto.num_conversations
    values["topics"] = tuple(proto.topics)
    for field in ("catalogue", "dataset"):
        if name := getattr(proto, field):
            values[field] = parse_name(name, "datasets", field=f"spec.{field}")
    if proto.difficulty_level:
        values["difficulty_level"] = _enum(_DIFFICULTIES, proto.difficulty_level, "spec.difficulty_level")
    if proto.provider:
        values["provider"] = _enum(_PROVIDERS, proto.provider, "spec.provider")
    return _validated(core.GenerationSpec, values, "spec")


def request(request_id: str, spec: core.JobSpec) -> Request | None:
    """What makes a create call safe to repeat; None where the caller has given no id.

    Raises:
        InvalidSpecError: an id of another shape.
    """
    if not request_id:
        return None
    if len(request_id) > MAX_REQUEST_ID_LENGTH or not request_id.isascii() or not request_id.isprintable():
        raise _invalid("request_id", f"must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters")
    asked = f"{type(spec).__name__} {spec.model_dump_json(exclude_defaults=True)}"  # a later release knows more fields
    return Request(request_id, hashlib.sha256(asked.encode()).hexdigest())


def preview_spec(proto: datasets_pb2.PreviewDatasetRequest) -> core.PreviewSpec:
    """Raises InvalidSpecError."""
    values = _set_scalars(proto, skip={"name", "page_size", "page_token", "skip"})
    values["name"] = parse_name(proto.name, "datasets")
    if proto.truncation:
        values["truncation"] = _enum(_TRAINING_ENUMS["truncation"], proto.truncation, "truncation")
    return _validated(core.PreviewSpec, values, "")


def generation_input(proto: inference_pb2.GenerationInput) -> core.GenerationInput:
    """Raises InvalidSpecError: paths begin with `input`."""
    values = _set_scalars(proto, skip={"model", "messages", "context", "stop", "tools"})
    values["model"], values["version"] = _model_and_version(proto.model)
    values["stop"] = tuple(proto.stop)
    if proto.HasField("context"):
        values["context"] = _plain_struct(proto.context)
    try:
        values["messages"] = tuple(_message(item, f"messages[{at}]") for at, item in enumerate(proto.messages))
        tools.demand_few(proto.tools, "tools")
        values["tools"] = tuple(
            tools.make_tool(item.name, item.description, item.parameters, f"tools[{at}]")
            for at, item in enumerate(proto.tools)
        )
        asked = _validated(core.GenerationInput, values, "input")
        tools.check_tools(asked.tools)
        tools.check_calls(asked.messages, asked.tools)
    except RowError as error:
        place = str(error).partition(" ")[0].removesuffix(":")  # its sentence begins with it
        raise InvalidSpecError(
            f"input.{error}", violations=[Violation(f"input.{place}", str(error), error.code)]
        ) from None
    return asked


def _message(proto: inference_pb2.Message, where: str) -> dict[str, Any]:
    tools.demand_few(proto.tool_calls, f"{where}.tool_calls")
    calls = tuple(
        tools.make_call(call.name, call.arguments, call.id, f"{where}.tool_calls[{at}]")
        for at, call in enumerate(proto.tool_calls)
    )
    return {"role": proto.role, "content": proto.content, "tool_calls": calls, "tool_call_id": proto.tool_call_id}


def upload_metadata(
    proto: datasets_pb2.UploadDatasetMetadata,
) -> tuple[str, core.DatasetKind, core.DatasetFormat]:
    """Raises InvalidSpecError: paths begin with `metadata`."""
    name = parse_name(proto.name, "datasets", field="metadata.name")
    kind = _enum(_DATASET_KINDS, proto.kind, "metadata.kind")
    return name, kind, _enum(_DATASET_FORMATS, proto.format, "metadata.format")


def parse_name(text: str, collection: str, *, field: str = "name") -> str:
    """The id of `collection/{id}`; `models/base` is no model of ours."""
    (name,) = core.parse_name(text, collection, field=field)
    if (collection, name) == ("models", core.BASE) and field != "input.model":
        raise _invalid(field, f"the model name {core.BASE!r} is reserved")
    return name


def parse_version_name(text: str, *, field: str = "name") -> tuple[str, int]:
    """`models/{model}/versions/{version}` as model and version."""
    model, version = core.parse_name(text, "models", "versions", field=field)
    # A version beyond 10^9 cannot exist, and a longer number need not be read.
    if not version.isascii() or not version.isdecimal() or not 1 <= len(version) <= 9 or version.startswith("0"):
        raise InvalidSpecError(
            f"{field}: versions are counted 1, 2, 3",
            reason=Reason.NAME_INVALID,
            violations=[Violation(field, "versions are counted 1, 2, 3")],
        )
    return model, int(version)


def page(
    page_size: int, page_token: str, default_size: int = DEFAULT_PAGE_SIZE, max_size: int = MAX_PAGE_SIZE
) -> core.Page:
    """Raises InvalidSpecError: SPEC_INVALID, PAGE_TOKEN_INVALID."""
    if not 0 <= page_size <= max_size:
        raise _invalid("page_size", f"must be 1 to {max_size}, or 0 for {default_size}")
    after = None
    if page_token:
        try:
            after = base64.b64decode(page_token, altchars=b"-_", validate=True).decode()
        except (ValueError, binascii.Error):
            raise _strange_page_token() from None
    return core.Page(page_size or default_size, after)


def rows_page(page_size: int, page_token: str) -> core.Page:
    """A page of rows to look at; `after` is a row's number. Raises as `page`."""
    asked = page(page_size, page_token, DEFAULT_PREVIEWED_ROWS, MAX_PREVIEWED_ROWS)
    if asked.after is not None and not (asked.after.isascii() and asked.after.isdecimal() and len(asked.after) < 19):
        raise _strange_page_token()
    return asked


def page_token(after: str | None) -> str:
    return base64.urlsafe_b64encode(after.encode()).decode() if after else ""


def _strange_page_token() -> InvalidSpecError:
    return InvalidSpecError(
        "page_token is not one of ours",
        reason=Reason.PAGE_TOKEN_INVALID,
        violations=[Violation("page_token", "is not one of ours")],
    )


def _model_and_version(name: str) -> tuple[str, int | None]:
    if name == core.BASE:
        return core.BASE, None
    if name.count("/") == 1:
        return parse_name(name, "models", field="input.model"), None
    if name.count("/") == 3:
        return parse_version_name(name, field="input.model")
    shape = "must be base, models/{model} or models/{model}/versions/{version}"
    raise InvalidSpecError(
        f"input.model {shape}", reason=Reason.NAME_INVALID, violations=[Violation("input.model", shape)]
    )


def _set_scalars(proto: ProtoMessage, skip: set[str]) -> dict[str, Any]:
    """The fields with presence that the caller has set; core supplies the defaults of the others."""
    return {field.name: value for field, value in proto.ListFields() if field.name not in skip}


def _validated(model: type[_S], values: Mapping[str, Any], prefix: str) -> _S:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise core.invalid_spec(error, prefix) from None


def _enum(table: Mapping[Any, Any], value: int, field: str) -> Any:
    if value not in table:
        raise _invalid(field, "is not one of the known values")
    return table[value]


def _plain_struct(struct: struct_pb2.Struct) -> dict[str, Any]:
    """JSON numbers are doubles in a Struct; whole ones come back as int, so that 5 is rendered as 5."""
    try:
        data: dict[str, Any] = json_format.MessageToDict(struct)
    except (json_format.Error, RecursionError, ValueError):
        raise _invalid("input.context", "must be JSON without NaN or infinity, nested at most 100 deep") from None
    return {key: _whole(value) for key, value in data.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


def _invalid(field: str, description: str) -> InvalidSpecError:
    return InvalidSpecError(f"{field}: {description}", violations=[Violation(field, description)])


# --- to proto -----------------------------------------------------------------------------------------------------


def job(job: core.Job) -> jobs_pb2.Job:
    proto = jobs_pb2.Job(
        name=f"jobs/{job.id}",
        state=_JOB_STATES[job.state],
        create_time=_timestamp(job.create_time),
        start_time=_timestamp(job.start_time),
        end_time=_timestamp(job.end_time),
        attempt=job.attempt,
        creator=job.creator,
        last_sequence=job.last_sequence,
        pause_requested=job.pause_requested,
        queue_position=job.queue_position,
        checkpoint_step=job.checkpoint_step,
    )
    if isinstance(job.spec, core.TrainingSpec):
        proto.training.CopyFrom(training_spec_proto(job.spec))
    else:
        proto.generation.CopyFrom(_generation_spec_proto(job.spec))
    if job.result is not None:
        proto.result.CopyFrom(_job_result(job.result))
    if job.error is not None:
        proto.error.CopyFrom(_status(job.error))
    if job.progress is not None:
        proto.progress.CopyFrom(_progress(job.progress))
    if job.tracker_run is not None:
        proto.tracker_run.CopyFrom(jobs_pb2.TrackerRun(id=job.tracker_run.id, url=job.tracker_run.url))
    return proto


def job_event(event: core.JobEvent) -> jobs_pb2.JobEvent:
    proto = jobs_pb2.JobEvent(
        job=f"jobs/{event.job_id}", sequence=event.sequence, create_time=_timestamp(event.create_time)
    )
    match event.payload:
        case core.StateChange() as change:
            proto.state_change.CopyFrom(
                jobs_pb2.JobEvent.StateChange(
                    state=_JOB_STATES[change.state],
                    attempt=change.attempt,
                    message=change.message,
                    error=_status(change.error) if change.error else None,
                )
            )
        case core.Progress() as progress:
            proto.progress.CopyFrom(_progress(progress))
        case core.Checkpoint() as checkpoint:
            proto.checkpoint.CopyFrom(
                jobs_pb2.JobEvent.Checkpoint(step=checkpoint.step, size_bytes=checkpoint.size_bytes)
            )
        case core.LogLine() as line:
            proto.log.message = line.message
        case core.JobWarning() as warning:
            proto.warning.CopyFrom(jobs_pb2.JobEvent.Warning(reason=warning.reason, message=warning.message))
        case core.ResultEvent() as ended:
            proto.result.CopyFrom(_job_result(ended.result))
    return proto


def dataset(dataset: core.Dataset) -> datasets_pb2.Dataset:
    kinds = {kind: number for number, kind in _DATASET_KINDS.items()}
    return datasets_pb2.Dataset(
        name=f"datasets/{dataset.name}",
        kind=kinds[dataset.kind],
        digest=dataset.digest,
        num_rows=dataset.num_rows,
        size_bytes=dataset.size_bytes,
        create_time=_timestamp(dataset.create_time),
        parents=dataset.parents,
        job=f"jobs/{dataset.job_id}" if dataset.job_id else "",
    )


def previewed_row(row: core.PreviewedRow) -> datasets_pb2.PreviewedRow:
    rejected = row.rejected
    return datasets_pb2.PreviewedRow(
        row=row.row,
        text=row.text,
        tokens=_previewed_tokens(row.tokens),
        num_trained_tokens=row.num_trained_tokens,
        problem=row.problem,
        change=row.change,
        rejected=None
        if rejected is None
        else datasets_pb2.PreviewedRow.Answer(
            text=rejected.text,
            tokens=_previewed_tokens(rejected.tokens),
            num_trained_tokens=rejected.num_trained_tokens,
        ),
    )


def _previewed_tokens(tokens: Sequence[core.PreviewedToken]) -> list[datasets_pb2.PreviewedRow.Token]:
    return [datasets_pb2.PreviewedRow.Token(**token._asdict()) for token in tokens]


def dataset_preview(preview: core.DatasetPreview) -> datasets_pb2.DatasetPreview:
    return datasets_pb2.DatasetPreview(
        num_rows=preview.num_rows,
        num_tokens=preview.num_tokens,
        num_trained_tokens=preview.num_trained_tokens,
        lengths=datasets_pb2.DatasetPreview.TokenLengths(**preview.lengths._asdict()),
        num_issues=preview.num_issues,
        issues=[datasets_pb2.DatasetPreview.Issue(**issue._asdict()) for issue in preview.issues],
        num_changes=preview.num_changes,
        changes=[datasets_pb2.DatasetPreview.Issue(**change._asdict()) for change in preview.changes],
        num_messages=preview.num_messages,
        num_learned_messages=preview.num_learned_messages,
        num_near_duplicates=preview.num_near_duplicates,
        near_duplicates=[
            datasets_pb2.DatasetPreview.NearDuplicate(**pair._asdict()) for pair in preview.near_duplicates
        ],
        length_bins=[datasets_pb2.DatasetPreview.LengthBin(**each._asdict()) for each in preview.length_bins],
    )


def model(model: core.Model) -> models_pb2.Model:
    latest = model.latest_version
    return models_pb2.Model(
        name=f"models/{model.name}",
        create_time=_timestamp(model.create_time),
        latest_version=model_version(latest) if latest else None,
        num_versions=model.num_versions,
    )


def model_version(version: core.ModelVersion) -> models_pb2.ModelVersion:
    return models_pb2.ModelVersion(
        name=version_name(version.model, version.version),
        digest=version.digest,
        base_model=version.base_model,
        base_digest=version.base_digest,
        base_source=version.base_source,
        base_revision=version.base_revision,
        dataset_digest=version.dataset_digest,
        eval_dataset_digest=version.eval_dataset_digest,
        start_from_digest=version.start_from_digest,
        chat_template_digest=version.chat_template_digest,
        job=f"jobs/{version.job_id}",
        spec=training_spec_proto(version.spec),
        comparison=_comparison(version.comparison),
        training_precision=version.training_precision,
        size_bytes=version.size_bytes,
        create_time=_timestamp(version.create_time),
    )


def export(facts: Mapping[str, Any]) -> models_pb2.Export:
    """`facts` may say more than the contract."""
    fields = [field.name for field in models_pb2.Export.DESCRIPTOR.fields]
    return models_pb2.Export(**{name: facts[name] for name in fields})


def version_name(model: str, version: int) -> str:
    return f"models/{model}/versions/{version}"


def completion(facts: core.Completion) -> inference_pb2.Completion:
    return inference_pb2.Completion(
        finish_reason=_FINISH_REASONS[facts.finish_reasons[0]],
        finish_reasons=[_FINISH_REASONS[reason] for reason in facts.finish_reasons],
        usage=inference_pb2.Usage(prompt_tokens=facts.prompt_tokens, completion_tokens=facts.completion_tokens),
        model=facts.model if facts.version is None else version_name(facts.model, facts.version),
        digest=facts.digest,
        time_to_first_token=_duration(facts.time_to_first_token_seconds),
        total_time=_duration(facts.total_seconds),
    )


def token_logprob(told: core.TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=told.token_id,
        bytes=told.text_bytes,
        token=told.text_bytes.decode(errors="replace"),
        logprob=told.logprob,
        top=map(token_logprob, told.top),
    )


def training_spec_proto(spec: core.TrainingSpec) -> training_pb2.TrainingSpec:
    values = spec.model_dump(exclude_none=True)
    for field in ("dataset", "eval_dataset"):
        if field in values:
            values[field] = f"datasets/{values[field]}"
    if spec.start_from is not None:
        values["start_from"] = version_name(*core.split_version(spec.start_from))
    for field, table in _TRAINING_ENUMS.items():
        values[field] = next(number for number, word in table.items() if word == values[field])
    values["lora"] = training_pb2.LoraConfig(**values["lora"])
    return training_pb2.TrainingSpec(**values | {"model": f"models/{spec.model}"})


def training_estimate(estimate: Estimate) -> training_pb2.TrainingEstimate:
    memory, nearest, refusal = estimate.need.memory, estimate.nearest_spec, estimate.refusal
    return training_pb2.TrainingEstimate(
        memory=training_pb2.TrainingEstimate.MemoryRange(
            low_bytes=memory.low_bytes, expected_bytes=memory.expected_bytes, high_bytes=memory.high_bytes
        ),
        device=estimate.device,
        total_memory_bytes=estimate.total_memory_bytes,
        held_memory_bytes=estimate.held,
        disk_bytes=estimate.need.disk_bytes,
        free_disk_bytes=estimate.free_disk_bytes,
        num_steps=estimate.need.num_steps,
        num_tokens=estimate.need.num_tokens,
        training_time=_duration(estimate.training_seconds),
        fits=refusal is None,
        refusal="" if refusal is None else refusal.message,
        nearest_spec=None if nearest is None else training_spec_proto(nearest),
        gradient_checkpointing=estimate.need.gradient_checkpointing,
    )


def _generation_spec_proto(spec: core.GenerationSpec) -> generation_pb2.GenerationSpec:
    difficulties = {level: number for number, level in _DIFFICULTIES.items()}
    providers = {provider: number for number, provider in _PROVIDERS.items()}
    return generation_pb2.GenerationSpec(
        catalogue=f"datasets/{spec.catalogue}" if spec.catalogue else "",
        dataset=f"datasets/{spec.dataset}" if spec.dataset else "",
        num_conversations=spec.num_conversations,
        topics=spec.topics,
        difficulty_level=difficulties[spec.difficulty_level],
        include_product_data=spec.include_product_data,
        seed=spec.seed,
        provider=providers[spec.provider] if spec.provider else generation_pb2.GENERATION_PROVIDER_UNSPECIFIED,
    )


def _job_result(result: core.JobResult) -> jobs_pb2.JobResult:
    if isinstance(result, core.GenerationResult):
        usage = generation_pb2.GenerationUsage(**result.usage.model_dump()) if result.usage else None
        values = result.model_dump(exclude={"type", "dataset", "usage"})
        return jobs_pb2.JobResult(
            generation=generation_pb2.GenerationResult(dataset=f"datasets/{result.dataset}", usage=usage, **values)
        )
    return jobs_pb2.JobResult(
        training=training_pb2.TrainingResult(
            model_version=version_name(result.model, result.version),
            digest=result.digest,
            train_loss=result.train_loss,
            comparison=_comparison(result.comparison),
            num_steps=result.num_steps,
            num_tokens=result.num_tokens,
            tokens_per_second=result.tokens_per_second,
            training_time=_duration(result.training_seconds),
            peak_memory_bytes=result.peak_memory_bytes,
            published_step=result.published_step,
        )
    )


def _comparison(comparison: core.HeldOutComparison | None) -> training_pb2.HeldOutComparison | None:
    return None if comparison is None else training_pb2.HeldOutComparison(**comparison.model_dump())


def _progress(progress: core.Progress) -> jobs_pb2.Progress:
    values = progress.model_dump(exclude={"type", "eta_seconds"}, exclude_none=True)
    return jobs_pb2.Progress(**values, eta=_duration(progress.eta_seconds))


def _status(error: Mapping[str, Any]) -> status_pb2.Status:
    return to_status(errors.from_dict(dict(error)))


def _timestamp(time: datetime | None) -> timestamp_pb2.Timestamp | None:
    if time is None:
        return None
    proto = timestamp_pb2.Timestamp()
    proto.FromDatetime(time)
    return proto


def _duration(seconds: float | None) -> duration_pb2.Duration | None:
    if seconds is None:
        return None
    proto = duration_pb2.Duration()
    proto.FromTimedelta(timedelta(seconds=seconds))
    return proto
