"""The words and figures of the REST shapes that clients of the first release read: status, progress, durations.

Pure functions from the contract's messages to values; no I/O, no HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from gateway import schemas
from gateway.rest_json import enum_word, plain_id, seconds, timestamp, to_json
from gateway.specs import CONTRACT_NAMES
from knowledge_engine.v1 import generation_pb2, inference_pb2, jobs_pb2, models_pb2, training_pb2

_PROVIDERS: Mapping[int, Literal["offline", "openai"]] = {
    generation_pb2.GENERATION_PROVIDER_OFFLINE: "offline",
    generation_pb2.GENERATION_PROVIDER_OPENAI: "openai",
}
# By state and phase; an empty phase stands for every other one of the state.
_STATUS: dict[tuple[int, str], schemas.JobStatus] = {
    (jobs_pb2.JOB_STATE_QUEUED, ""): "starting",
    (jobs_pb2.JOB_STATE_RUNNING, ""): "preparing_data",
    (jobs_pb2.JOB_STATE_RUNNING, "training"): "training",
    (jobs_pb2.JOB_STATE_RUNNING, "evaluating"): "training",
    (jobs_pb2.JOB_STATE_RUNNING, "publishing"): "training",
    # The first release could not pause: the word is that of where the job stands.
    (jobs_pb2.JOB_STATE_PAUSED, ""): "starting",
    (jobs_pb2.JOB_STATE_PAUSED, "generating"): "preparing_data",
    (jobs_pb2.JOB_STATE_PAUSED, "training"): "training",
    (jobs_pb2.JOB_STATE_PAUSED, "evaluating"): "training",
    (jobs_pb2.JOB_STATE_PAUSED, "publishing"): "training",
    (jobs_pb2.JOB_STATE_CANCELLING, ""): "cancelled",
    (jobs_pb2.JOB_STATE_CANCELLED, ""): "cancelled",
    (jobs_pb2.JOB_STATE_SUCCEEDED, ""): "completed",
    (jobs_pb2.JOB_STATE_FAILED, ""): "failed",
}
# The phases whose steps are the job's own work, and those that come after it.
_WORK = frozenset({"training", "generating"})
_AFTER_WORK = frozenset({"evaluating", "publishing"})
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def status(job: jobs_pb2.Job) -> schemas.JobStatus:
    phase = job.progress.phase if job.HasField("progress") else ""
    return _STATUS.get((job.state, phase)) or _STATUS[job.state, ""]


def duration(length_seconds: float) -> str:
    """The two largest units: `2 minutes 5 seconds`, `1 hour`."""
    rest = max(0, round(length_seconds))
    parts = []
    for name, size in _UNITS:
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {name}{'s' if count != 1 else ''}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 seconds"


def progress_percent(job: jobs_pb2.Job) -> float:
    """Share of the job's steps that are done, 0 to 100; 100 only once it has succeeded."""
    if job.state == jobs_pb2.JOB_STATE_SUCCEEDED:
        return 100.0
    progress = job.progress
    share = 0.0
    if progress.phase in _WORK and progress.total_steps:
        share = progress.step / progress.total_steps
    elif progress.phase in _AFTER_WORK:
        share = 1.0
    return round(min(share * 100, 99.0), 1)


def training_status(job: jobs_pb2.Job, now: datetime | None = None) -> schemas.TrainingStatusResponse:
    """The status page of any job; `now` is the time that a running job's elapsed time is counted to."""
    progress = job.progress
    running = job.state == jobs_pb2.JOB_STATE_RUNNING
    result = job.result.training if job.result.HasField("training") else None
    loss = progress.loss if progress.HasField("loss") else result.train_loss if result else None
    metrics = schemas.TrainingMetrics(
        current_loss=_finite(loss) if loss is not None else None,
        learning_rate=_finite(progress.learning_rate) if progress.HasField("learning_rate") else None,
        throughput=_finite(progress.examples_per_second) if progress.HasField("examples_per_second") else None,
        samples_processed=progress.num_examples if progress.HasField("num_examples") else None,
        epoch=_finite(progress.epoch) if progress.HasField("epoch") else None,
    )
    return schemas.TrainingStatusResponse(
        job_id=plain_id(job.name),
        status=status(job),
        progress=progress_percent(job),
        started_at=timestamp(job, "start_time"),
        elapsed_time=duration(_elapsed_seconds(job, now or datetime.now(UTC))),
        estimated_remaining=duration(seconds(progress.eta)) if running and progress.HasField("eta") else None,
        metrics=metrics,
        error=job.error.message if job.HasField("error") else None,
        state=enum_word(jobs_pb2.JobState.DESCRIPTOR, job.state),
    )


def train_estimate(estimate: training_pb2.TrainingEstimate) -> dict[str, Any]:
    """The contract's estimate with the nearest settings in the words that `training_config` takes."""
    values = to_json(estimate)
    values["held_memory_bytes"] = {plain_id(holder): held for holder, held in estimate.held_memory_bytes.items()}
    nearest = values.pop("nearest_spec")
    values["nearest_config"] = _training_config(nearest) if nearest else None
    return values


def _training_config(spec: Mapping[str, Any]) -> dict[str, Any]:
    words = {contract: word for word, contract in CONTRACT_NAMES.items()}
    config = {words.get(name, name): value for name, value in spec.items() if value is not None}
    if (lora := config.get("lora")) is not None:
        config["lora"] = {name: value for name, value in lora.items() if value is not None}
    if "epochs" in config:
        config["epochs"] = round(config["epochs"])  # whole, as it was in the request
    for field in ("base_model", "dataset", "model"):
        config.pop(field, None)
    return config


def train_response(job: jobs_pb2.Job) -> schemas.TrainResponse:
    return schemas.TrainResponse(
        job_id=plain_id(job.name),
        status=status(job),
        estimated_duration=None,
        wandb_url=job.tracker_run.url or None,
        model_name=plain_id(job.training.model),
    )


def generate_data_response(job: jobs_pb2.Job) -> schemas.GenerateDataResponse:
    return schemas.GenerateDataResponse(
        job_id=plain_id(job.name),
        status=status(job),
        estimated_conversations=job.generation.num_conversations,
        estimated_cost=None,
        estimated_duration=None,
        dataset_name=plain_id(job.generation.dataset),
        catalogue=plain_id(job.generation.catalogue),
        provider=_PROVIDERS.get(job.generation.provider),
    )


def model_summary(model: models_pb2.Model) -> schemas.ModelSummary:
    """A model by its newest ready version; what there is no version for is null."""
    version = model.latest_version if model.HasField("latest_version") else None
    return schemas.ModelSummary(
        id=plain_id(model.name),
        base_model=version.base_model if version else None,
        created_at=timestamp(model, "create_time"),
        performance=_performance(version) if version else None,
        status="ready" if version else "deleted",
        size_mb=round(version.size_bytes / 1e6, 2) if version else None,
    )


def token_logprob(told: inference_pb2.TokenLogprob) -> schemas.TokenLogprob:
    return schemas.TokenLogprob(**_likely(told), top=[schemas.LikelyToken(**_likely(other)) for other in told.top])


def _likely(told: inference_pb2.TokenLogprob) -> dict[str, Any]:
    return {"token_id": told.token_id, "token": told.token, "bytes": list(told.bytes), "logprob": told.logprob}


def completion_facts(completion: inference_pb2.Completion) -> schemas.CompletionFacts:
    words: dict[int, schemas.FinishReason] = {
        inference_pb2.FINISH_REASON_STOP: "stop",
        inference_pb2.FINISH_REASON_LENGTH: "length",
    }
    usage = completion.usage
    return schemas.CompletionFacts(
        model_used=plain_id(completion.model),
        tokens_used=usage.prompt_tokens + usage.completion_tokens,
        processing_time_ms=round(seconds(completion.total_time) * 1000, 1),
        finish_reason=words[completion.finish_reason],
        finish_reasons=[words[reason] for reason in completion.finish_reasons],
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        time_to_first_token_ms=round(seconds(completion.time_to_first_token) * 1000, 1),
        digest=completion.digest,
    )


def _performance(version: models_pb2.ModelVersion) -> schemas.Performance | None:
    if not version.HasField("comparison"):
        return None
    comparison = version.comparison
    return schemas.Performance(
        base_loss=comparison.base_loss,
        tuned_loss=comparison.tuned_loss,
        perplexity=_perplexity(version),
        num_conversations=comparison.num_conversations,
        precision=comparison.precision,
    )


def _perplexity(version: models_pb2.ModelVersion) -> float | None:
    """None for a loss of preferences, and for one beyond a double's range, which JSON could not say."""
    loss = version.comparison.tuned_loss
    is_of_tokens = version.spec.method != training_pb2.TRAINING_METHOD_DPO
    return math.exp(loss) if is_of_tokens and loss < 700 else None


def _elapsed_seconds(job: jobs_pb2.Job, now: datetime) -> float:
    if not job.HasField("start_time"):
        return 0.0
    end = job.end_time.ToDatetime(UTC) if job.HasField("end_time") else now
    return (end - job.start_time.ToDatetime(UTC)).total_seconds()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
