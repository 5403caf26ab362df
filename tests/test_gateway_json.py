"""Protos as REST JSON: the mirror of the contract, and the words and figures of the first release."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from pydantic import BaseModel

from gateway import original, resources, specs
from gateway.resources import MIRRORS, Job, JobEvent
from gateway.rest_json import rest_name, to_json
from gateway.schemas import FittingConfig, LoraSettings, TrainEstimateResponse, TrainingConfig, TrainRequest
from gateway.specs import CONTRACT_NAMES
from knowledge_engine.v1 import datasets_pb2, inference_pb2, jobs_pb2, models_pb2, training_pb2


@pytest.mark.parametrize(("model", "message"), MIRRORS.items(), ids=lambda part: getattr(part, "__name__", ""))
def test_a_mirror_has_the_fields_of_its_message(model: type[BaseModel], message: Descriptor) -> None:
    assert list(model.model_fields) == [rest_name(field) for field in message.fields]


def test_every_model_is_a_mirror() -> None:
    models = {value for value in vars(resources).values() if isinstance(value, type) and issubclass(value, BaseModel)}
    ours = {value for value in models if value.__module__ == resources.__name__}
    assert ours - MIRRORS.keys() == set()


def test_training_config_takes_every_field_of_the_spec() -> None:
    named = {CONTRACT_NAMES.get(name, name) for name in TrainingConfig.model_fields}
    spec = {field.name for field in training_pb2.TrainingSpec.DESCRIPTOR.fields}
    assert named == spec - {"base_model", "dataset", "model"}
    assert set(LoraSettings.model_fields) == {field.name for field in training_pb2.LoraConfig.DESCRIPTOR.fields}


def test_a_job_reads_as_documented() -> None:
    job = jobs_pb2.Job(name="jobs/a", state=jobs_pb2.JOB_STATE_RUNNING, last_sequence=7)
    job.training.dataset, job.training.model = "datasets/d", "models/m"
    job.training.lr_scheduler_type = training_pb2.LR_SCHEDULER_TYPE_COSINE
    job.progress.phase, job.progress.grad_norm = "training", float("inf")
    job.progress.eta.FromMilliseconds(2500)
    job.create_time.FromDatetime(datetime(2026, 1, 2, 3, 4, 5, 600000, tzinfo=UTC))
    plain = to_json(job)
    assert plain["id"] == "a"
    assert plain["state"] == "RUNNING"
    assert (plain["training"]["dataset"], plain["training"]["model"]) == ("d", "m")
    assert plain["training"]["lr_scheduler_type"] == "cosine"
    assert plain["progress"]["eta_seconds"] == 2.5
    assert plain["progress"]["grad_norm"] is None
    assert plain["create_time"] == "2026-01-02T03:04:05.600Z"
    assert plain["end_time"] is None
    assert plain["last_sequence"] == 7
    assert "generation" not in plain
    Job.model_validate(plain, strict=True)


@pytest.mark.parametrize("payload", ["state_change", "progress", "log", "warning", "result", "checkpoint"])
def test_an_event_holds_its_payload_alone(payload: str) -> None:
    event = jobs_pb2.JobEvent(job="jobs/a", sequence=3)
    getattr(event, payload).SetInParent()
    if payload == "result":
        event.result.training.model_version = "models/m/versions/4"
        event.result.training.training_time.FromSeconds(61)
    plain = to_json(event)
    assert set(plain) == {"job_id", "sequence", "create_time", payload}
    if payload == "result":
        assert plain["result"]["training"]["model_version"] == "m:4"
        assert plain["result"]["training"]["training_time_seconds"] == 61.0
    JobEvent.model_validate(plain, strict=True)


def test_every_enum_value_has_a_word() -> None:
    for kind, word in ((1, "conversations"), (2, "catalogue")):
        assert to_json(datasets_pb2.Dataset(kind=kind))["kind"] == word  # type: ignore[arg-type]
    state_names = [value.name for value in jobs_pb2.JobState.DESCRIPTOR.values]
    states = [to_json(jobs_pb2.Job(state=jobs_pb2.JobState.Value(name)))["state"] for name in state_names]
    assert states == [None, "QUEUED", "RUNNING", "CANCELLING", "SUCCEEDED", "FAILED", "CANCELLED", "PAUSED"]


@pytest.mark.parametrize(
    ("state", "phase", "word"),
    [
        ("QUEUED", "", "starting"),
        ("QUEUED", "training", "starting"),
        ("RUNNING", "", "preparing_data"),
        ("RUNNING", "loading", "preparing_data"),
        ("RUNNING", "generating", "preparing_data"),
        ("RUNNING", "training", "training"),
        ("RUNNING", "evaluating", "training"),
        ("RUNNING", "publishing", "training"),
        ("CANCELLING", "training", "cancelled"),
        ("CANCELLED", "", "cancelled"),
        ("SUCCEEDED", "publishing", "completed"),
        ("FAILED", "training", "failed"),
        ("PAUSED", "", "starting"),
        ("PAUSED", "loading", "starting"),
        ("PAUSED", "generating", "preparing_data"),
        ("PAUSED", "training", "training"),
        ("PAUSED", "evaluating", "training"),
        ("PAUSED", "publishing", "training"),
    ],
)
def test_states_read_in_the_first_releases_words(state: str, phase: str, word: str) -> None:
    job = jobs_pb2.Job(state=jobs_pb2.JobState.Value(f"JOB_STATE_{state}"))
    if phase:
        job.progress.phase = phase
    assert original.status(job) == word


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (0.4, "0 seconds"),
        (1, "1 second"),
        (125, "2 minutes 5 seconds"),
        (120, "2 minutes"),
        (3600, "1 hour"),
        (3605, "1 hour"),
        (7384, "2 hours 3 minutes"),
        (90061, "1 day 1 hour"),
        (-3, "0 seconds"),
    ],
)
def test_durations_are_words(seconds: float, text: str) -> None:
    assert original.duration(seconds) == text


def test_the_status_page_tells_only_what_is_known() -> None:
    job = jobs_pb2.Job(name="jobs/a", state=jobs_pb2.JOB_STATE_QUEUED)
    page = original.training_status(job).model_dump()
    assert page == {
        "job_id": "a",
        "status": "starting",
        "progress": 0.0,
        "started_at": None,
        "elapsed_time": "0 seconds",
        "estimated_remaining": None,
        "metrics": {
            "current_loss": None,
            "learning_rate": None,
            "throughput": None,
            "samples_processed": None,
            "epoch": None,
        },
        "error": None,
        "state": "QUEUED",
    }


def test_a_paused_job_shows_as_such_on_the_status_page() -> None:
    job = jobs_pb2.Job(name="jobs/a", state=jobs_pb2.JOB_STATE_PAUSED)
    job.progress.MergeFrom(jobs_pb2.Progress(phase="training", step=30, total_steps=120))
    job.progress.eta.FromSeconds(60)
    page = original.training_status(job)
    assert (page.status, page.state, page.progress, page.estimated_remaining) == ("training", "PAUSED", 25.0, None)


def test_an_estimate_has_every_field_of_the_contract_and_settings_that_train_takes() -> None:
    names = [rest_name(field) for field in training_pb2.TrainingEstimate.DESCRIPTOR.fields]
    assert list(TrainEstimateResponse.model_fields) == [
        "nearest_config" if name == "nearest_spec" else name for name in names
    ]
    assert list(FittingConfig.model_fields) == list(TrainingConfig.model_fields)
    estimate = training_pb2.TrainingEstimate(
        memory=training_pb2.TrainingEstimate.MemoryRange(low_bytes=1, expected_bytes=2, high_bytes=3),
        held_memory_bytes={"engine": 5, "jobs/j": 7},
        refusal="too much",
    )
    estimate.training_time.FromMilliseconds(1500)
    estimate.nearest_spec.MergeFrom(
        training_pb2.TrainingSpec(
            dataset="datasets/d", model="models/m", per_device_train_batch_size=2, num_train_epochs=2, max_length=512
        )
    )
    estimate.nearest_spec.lora.rank = 8
    plain = original.train_estimate(estimate)
    assert plain["memory"] == {"low_bytes": 1, "expected_bytes": 2, "high_bytes": 3}
    assert plain["held_memory_bytes"] == {"engine": 5, "j": 7}
    assert plain["training_time_seconds"] == 1.5
    config = plain["nearest_config"]
    assert config == {"batch_size": 2, "epochs": 2.0, "max_length": 512, "lora": {"rank": 8, "target_modules": []}}
    TrainEstimateResponse.model_validate(plain)
    sent = specs.training_spec(TrainRequest(dataset_name="d", training_config=config))
    assert (sent.per_device_train_batch_size, sent.num_train_epochs, sent.lora.rank) == (2, 2.0, 8)
    estimate.ClearField("nearest_spec")
    estimate.ClearField("training_time")
    plain = original.train_estimate(estimate)
    assert plain["nearest_config"] is None
    assert plain["training_time_seconds"] is None


def test_the_status_page_of_a_running_job() -> None:
    job = jobs_pb2.Job(name="jobs/a", state=jobs_pb2.JOB_STATE_RUNNING)
    job.start_time.FromDatetime(datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC))
    job.progress.MergeFrom(
        jobs_pb2.Progress(phase="training", step=30, total_steps=120, loss=1.5, examples_per_second=2.0, epoch=0.75)
    )
    job.progress.num_examples, job.progress.learning_rate = 60, 1e-4
    job.progress.eta.FromSeconds(3725)
    page = original.training_status(job, datetime(2026, 1, 1, 12, 2, 5, tzinfo=UTC))
    assert (page.status, page.progress, page.started_at) == ("training", 25.0, "2026-01-01T12:00:00Z")
    assert (page.elapsed_time, page.estimated_remaining) == ("2 minutes 5 seconds", "1 hour 2 minutes")
    assert page.metrics.model_dump() == {
        "current_loss": 1.5,
        "learning_rate": 1e-4,
        "throughput": 2.0,
        "samples_processed": 60,
        "epoch": 0.75,
    }


def test_progress_is_complete_only_once_the_job_is() -> None:
    job = jobs_pb2.Job(state=jobs_pb2.JOB_STATE_RUNNING)
    job.progress.phase, job.progress.step, job.progress.total_steps = "training", 10, 10
    assert original.progress_percent(job) == 99.0
    for phase in ("evaluating", "publishing"):
        job.progress.phase = phase
        assert original.progress_percent(job) == 99.0
    job.state = jobs_pb2.JOB_STATE_SUCCEEDED
    assert original.progress_percent(job) == 100.0


def model(**comparison: Any) -> models_pb2.Model:
    version = models_pb2.ModelVersion(name="models/m/versions/2", base_model="base", size_bytes=12_345_678)
    if comparison:
        version.comparison.MergeFrom(training_pb2.HeldOutComparison(**comparison))
    return models_pb2.Model(name="models/m", latest_version=version, num_versions=2)


def test_performance_is_measured_or_null() -> None:
    summary = original.model_summary(model(base_loss=3.0, tuned_loss=1.0, num_conversations=4, precision="float32"))
    assert summary.performance is not None
    assert summary.performance.perplexity == pytest.approx(2.71828, abs=1e-4)
    assert (summary.id, summary.status, summary.size_mb) == ("m", "ready", 12.35)
    assert original.model_summary(model()).performance is None
    huge = original.model_summary(model(base_loss=3.0, tuned_loss=900.0)).performance
    assert huge is not None
    assert huge.perplexity is None
    of_preferences = model(base_loss=0.69, tuned_loss=0.5)
    of_preferences.latest_version.spec.method = training_pb2.TRAINING_METHOD_DPO
    preferred = original.model_summary(of_preferences).performance
    assert preferred is not None
    assert (preferred.tuned_loss, preferred.perplexity) == (0.5, None)
    empty = original.model_summary(models_pb2.Model(name="models/m"))
    assert (empty.status, empty.base_model, empty.size_mb) == ("deleted", None, None)


def test_an_answers_facts() -> None:
    completion = inference_pb2.Completion(
        finish_reason=inference_pb2.FINISH_REASON_LENGTH,
        finish_reasons=[inference_pb2.FINISH_REASON_LENGTH, inference_pb2.FINISH_REASON_STOP],
        usage=inference_pb2.Usage(prompt_tokens=30, completion_tokens=5),
        model="models/m/versions/2",
        digest="sha256:ab",
    )
    completion.total_time.FromMicroseconds(1_234_560)
    facts = original.completion_facts(completion)
    assert (facts.model_used, facts.tokens_used, facts.finish_reason) == ("m:2", 35, "length")
    assert facts.finish_reasons == ["length", "stop"]
    assert facts.processing_time_ms == 1234.6
