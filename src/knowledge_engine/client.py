"""A synchronous, typed client of the gRPC contract: ids in, `core` types out, errors as raised in the service.

The command line, the demo and the README's Python lines use it. Resource names (`models/x/versions/3`) stay inside;
a model is addressed as `base`, `x` (its newest version) or `x:3`. Knows nothing of the service's insides.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar

import grpc
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knowledge_engine.client_convert import (
    Export,
    TrainingEstimate,
    completion_from_proto,
    dataset_from_proto,
    dataset_preview_from_proto,
    error_from_call,
    estimate_from_proto,
    event_from_proto,
    export_from_proto,
    generation_spec_to_proto,
    job_from_proto,
    model_from_proto,
    model_resource,
    previewed_row_from_proto,
    token_logprob_from_proto,
    training_spec_to_proto,
    version_from_proto,
    version_resource,
)
from knowledge_engine.core import (
    BASE,
    HEALTH_WORDS,
    Completion,
    Dataset,
    DatasetFormat,
    DatasetKind,
    DatasetPreview,
    GenerationSpec,
    Job,
    JobEvent,
    Message,
    Model,
    ModelVersion,
    PreviewedRow,
    Service,
    ServiceState,
    TokenLogprob,
    Tool,
    TrainingSpec,
    Truncation,
)
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.settings import is_loopback, split_address
from knowledge_engine.tools import read_calls, read_tools, tool_to_row
from knowledge_engine.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    training_pb2,
)

_EXPORT_SECONDS = 3600.0
DEFAULT_SERVER = "127.0.0.1:50051"
SERVICES = ("JobService", "DatasetService", "ModelService", "InferenceService")
UPLOAD_CHUNK_BYTES = 2**20  # well under gRPC's limit of 4 MiB for one message
RECONNECT_SECONDS = 300.0
"""How long a watch looks for a server that went away: a restart takes seconds, an upgrade minutes."""

_LOOKING_SECONDS = 300.0
"""A server may look through a large dataset before it takes a job."""
_Response = TypeVar("_Response")

Messages = str | Sequence[Message | Mapping[str, Any]]
"""A question, or a whole conversation, with `tool_calls` and `tool_call_id` as OpenAI has them."""


class Choice(NamedTuple):
    """One of the answers to a question; `logprobs` has every token where they are asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...]


class Answer(NamedTuple):
    """`text` is that of the first of the `n` choices."""

    text: str
    completion: Completion
    choices: tuple[Choice, ...]


class AnswerStream:
    """An answer as it comes: iterate for its pieces of text; `completion` is set once they have ended, and `logprobs`
    has the tokens so far where they are asked for.

    Closing it, or leaving its `with`, cancels the call, and the service stops decoding.
    """

    def __init__(self, call: Any, error: Callable[[grpc.RpcError], KnowledgeEngineError]) -> None:
        self._call = call
        self._error = error
        self.completion: Completion | None = None
        self.logprobs: list[TokenLogprob] = []

    def __iter__(self) -> Iterator[str]:
        try:
            for response in self._call:
                if response.WhichOneof("payload") == "completion":
                    self.completion = completion_from_proto(response.completion)
                    continue
                self.logprobs += map(token_logprob_from_proto, response.logprobs)
                if response.text_delta:
                    yield response.text_delta
        except grpc.RpcError as error:
            raise self._error(error) from None
        finally:
            self.close()

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One connection to a server.

    Every method raises the class of `errors.py` that the service raised, with its reason, violations and retry hint;
    UpstreamError SERVER_UNAVAILABLE when nothing answers.
    """

    def __init__(
        self, server: str | None = None, api_key: str | None = None, *, timeout_seconds: float | None = 30
    ) -> None:
        """`server` is `host:port`, else KNOWLEDGE_SERVER, else 127.0.0.1:50051; `api_key` else KNOWLEDGE_API_KEY.

        `timeout_seconds` bounds every call but uploads, watches and answers.
        """
        self.server = server or os.environ.get("KNOWLEDGE_SERVER") or DEFAULT_SERVER
        key = api_key or os.environ.get("KNOWLEDGE_API_KEY")
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._timeout_seconds = timeout_seconds
        self._channel = grpc.insecure_channel(self.server, options=_channel_options(self.server))
        self._jobs = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._datasets = datasets_pb2_grpc.DatasetServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelServiceStub(self._channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- jobs -----------------------------------------------------------------------------------------------------

    def create_training_job(self, spec: TrainingSpec, *, request_id: str | None = None) -> Job:
        """Queues a fine-tuning run; fields left at their default are left to the server.

        A second call with the same `request_id` and spec returns the job of the first. Without one the client takes a
        new one, so that it can ask again itself when the connection breaks before the answer.
        """
        request = jobs_pb2.CreateTrainingJobRequest(
            spec=training_spec_to_proto(spec), request_id=_request_id(request_id)
        )
        return job_from_proto(self._create(self._jobs.CreateTrainingJob, request).job)

    def create_generation_job(self, spec: GenerationSpec, *, request_id: str | None = None) -> Job:
        """Queues the generation of conversations; `request_id` as in `create_training_job`."""
        request = jobs_pb2.CreateGenerationJobRequest(
            spec=generation_spec_to_proto(spec), request_id=_request_id(request_id)
        )
        return job_from_proto(self._create(self._jobs.CreateGenerationJob, request).job)

    def estimate_training(self, spec: TrainingSpec) -> TrainingEstimate:
        """What a fine-tuning run would take and whether it would be accepted; nothing is queued."""
        request = jobs_pb2.EstimateTrainingJobRequest(spec=training_spec_to_proto(spec))
        return estimate_from_proto(self._call(self._jobs.EstimateTrainingJob, request, _LOOKING_SECONDS).estimate)

    def get_job(self, job: str) -> Job:
        return job_from_proto(self._call(self._jobs.GetJob, jobs_pb2.GetJobRequest(name=f"jobs/{job}")).job)

    def list_jobs(self) -> Iterator[Job]:
        """All jobs, newest first, a page at a time."""
        token = ""
        while True:
            page = self._call(self._jobs.ListJobs, jobs_pb2.ListJobsRequest(page_token=token))
            yield from map(job_from_proto, page.jobs)
            if not (token := page.next_page_token):
                return

    def cancel_job(self, job: str) -> Job:
        return job_from_proto(self._call(self._jobs.CancelJob, jobs_pb2.CancelJobRequest(name=f"jobs/{job}")).job)

    def pause_job(self, job: str) -> Job:
        """Puts a job aside; a running one is PAUSED once its checkpoint is durable, `pause_requested` until then."""
        return job_from_proto(self._call(self._jobs.PauseJob, jobs_pb2.PauseJobRequest(name=f"jobs/{job}")).job)

    def resume_job(self, job: str) -> Job:
        """Queues a paused job again; it goes on from its checkpoint."""
        return job_from_proto(self._call(self._jobs.ResumeJob, jobs_pb2.ResumeJobRequest(name=f"jobs/{job}")).job)

    def watch_job(
        self,
        job: str,
        after_sequence: int = 0,
        *,
        reconnect_seconds: float = RECONNECT_SECONDS,
        on_reconnect: Callable[[], None] | None = None,
    ) -> Generator[JobEvent, None, None]:
        """The job's events after `after_sequence`, each once and in order, then each new one, until the job's last.

        A server that goes away meanwhile is looked for again for `reconnect_seconds`, and the watch goes on where it
        was; `on_reconnect` is called once for each time it went away.

        Raises:
            UpstreamError: nothing answers at first, or for longer than that.
        """
        lost_at: float | None = None
        is_first = True
        while True:
            try:
                # The stream alone may stand for hours without a word; this one says that the server is there.
                found = self.get_job(job)
                is_first, lost_at = False, None
                if found.state.is_terminal and after_sequence >= found.last_sequence:
                    return
                with closing(self._events(job, after_sequence)) as events:
                    for event in events:
                        after_sequence = event.sequence
                        yield event
                        if event.is_last:
                            return
                # A server that stops ends its streams in order, also while there is more to tell.
            except UpstreamError:
                now = time.monotonic()
                if is_first or (lost_at is not None and now - lost_at > reconnect_seconds):
                    raise
                if lost_at is None:
                    lost_at = now
                    if on_reconnect is not None:
                        on_reconnect()
            time.sleep(0.5)

    def _events(self, job: str, after_sequence: int) -> Generator[JobEvent, None, None]:
        """One stream. Raises UpstreamError when it breaks off, however it does."""
        request = jobs_pb2.WatchJobRequest(name=f"jobs/{job}", after_sequence=after_sequence)
        call = self._jobs.WatchJob(request, metadata=self._metadata)
        try:
            for response in call:
                yield event_from_proto(response.event)
        except grpc.RpcError as error:
            failure = self._error(error)
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.CANCELLED:  # by the server: it stops
                failure = UpstreamError(failure.message, reason=Reason.SERVER_UNAVAILABLE)
            raise failure from None
        finally:
            call.cancel()

    # --- datasets -------------------------------------------------------------------------------------------------

    def upload_dataset(
        self,
        name: str,
        content: BinaryIO | bytes,
        *,
        kind: DatasetKind = DatasetKind.CONVERSATIONS,
        format: DatasetFormat = DatasetFormat.JSONL,  # noqa: A002 - the contract's word
    ) -> Dataset:
        """Stores `content` under `name`; the same content again returns the stored dataset."""
        metadata = datasets_pb2.UploadDatasetMetadata(
            name=f"datasets/{name}",
            kind=datasets_pb2.DatasetKind.Value(f"DATASET_KIND_{DatasetKind(kind).name}"),
            format=datasets_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{DatasetFormat(format).name}"),
        )
        try:
            response = self._datasets.UploadDataset(_upload(metadata, content), metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None
        return dataset_from_proto(response.dataset)

    def get_dataset(self, name: str) -> Dataset:
        request = datasets_pb2.GetDatasetRequest(name=f"datasets/{name}")
        return dataset_from_proto(self._call(self._datasets.GetDataset, request).dataset)

    def list_datasets(self) -> Iterator[Dataset]:
        """All datasets, newest first, a page at a time."""
        token = ""
        while True:
            page = self._call(self._datasets.ListDatasets, datasets_pb2.ListDatasetsRequest(page_token=token))
            yield from map(dataset_from_proto, page.datasets)
            if not (token := page.next_page_token):
                return

    def preview_dataset(
        self,
        name: str,
        *,
        first_row: int = 1,
        num_rows: int = 10,
        base_model: str = BASE,
        max_length: int | None = None,
        truncation: Truncation = Truncation.ERROR,
    ) -> tuple[list[PreviewedRow], DatasetPreview]:
        """At most 100 rows from `first_row` on, counted from 1, as a training sees them; and what becomes of all."""
        request = datasets_pb2.PreviewDatasetRequest(
            name=f"datasets/{name}",
            base_model=base_model,
            max_length=max_length,
            truncation=training_pb2.Truncation.Value(f"TRUNCATION_{Truncation(truncation).name}"),
            page_size=num_rows,
            skip=first_row - 1,
        )
        response = self._call(self._datasets.PreviewDataset, request)
        return [*map(previewed_row_from_proto, response.rows)], dataset_preview_from_proto(response.dataset)

    def delete_dataset(self, name: str) -> None:
        self._call(self._datasets.DeleteDataset, datasets_pb2.DeleteDatasetRequest(name=f"datasets/{name}"))

    # --- models ---------------------------------------------------------------------------------------------------

    def list_models(self) -> Iterator[Model]:
        """All models by name, a page at a time."""
        token = ""
        while True:
            page = self._call(self._models.ListModels, models_pb2.ListModelsRequest(page_token=token))
            yield from map(model_from_proto, page.models)
            if not (token := page.next_page_token):
                return

    def get_model(self, model: str) -> Model:
        return model_from_proto(
            self._call(self._models.GetModel, models_pb2.GetModelRequest(name=f"models/{model}")).model
        )

    def list_model_versions(self, model: str) -> Iterator[ModelVersion]:
        """The versions of `model`, newest first, a page at a time."""
        token = ""
        while True:
            request = models_pb2.ListModelVersionsRequest(parent=f"models/{model}", page_token=token)
            page = self._call(self._models.ListModelVersions, request)
            yield from map(version_from_proto, page.model_versions)
            if not (token := page.next_page_token):
                return

    def get_model_version(self, model: str, version: int) -> ModelVersion:
        request = models_pb2.GetModelVersionRequest(name=version_resource(model, version))
        return version_from_proto(self._call(self._models.GetModelVersion, request).model_version)

    def export_model_version(self, model: str, version: int) -> Export:
        """Merges a version into its base in the service's data directory; returns when it is there and checked."""
        request = models_pb2.ExportModelVersionRequest(name=version_resource(model, version))
        return export_from_proto(self._call(self._models.ExportModelVersion, request, _EXPORT_SECONDS).export)

    def delete_model_version(self, model: str, version: int) -> None:
        request = models_pb2.DeleteModelVersionRequest(name=version_resource(model, version))
        self._call(self._models.DeleteModelVersion, request)

    # --- answers --------------------------------------------------------------------------------------------------

    def generate(
        self, model: str, messages: Messages, *, timeout_seconds: float | None = None, **options: Any
    ) -> Answer:
        """One whole answer of `model` to `messages`.

        `options` are the contract's: `context`, `max_tokens`, `temperature`, `top_p`, `top_k`, `min_p`,
        `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `stop`, `seed`, `json_schema` (a dict, or its
        text), `regex`, `logprobs`, `top_logprobs`, `n`, `tools` (as OpenAI has them, or `core.Tool`); what is left out
        or None takes the server's default. Passing `timeout_seconds` stops the decoding.

        A call of a tool is part of the text, the way the base's chat template writes it.
        """
        request = inference_pb2.GenerateRequest(input=_generation_input(model, messages, options))
        try:
            response = self._inference.Generate(request, metadata=self._metadata, timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise self._error(error) from None
        choices = tuple(
            Choice(choice.text, tuple(map(token_logprob_from_proto, choice.logprobs))) for choice in response.choices
        )
        return Answer(response.text, completion_from_proto(response.completion), choices)

    def stream_generate(
        self, model: str, messages: Messages, *, timeout_seconds: float | None = None, **options: Any
    ) -> AnswerStream:
        """The same, piece by piece, of one answer."""
        if options.get("n") not in (None, 1):
            raise TypeError("a stream is of one answer; generate() gives n of them")
        request = inference_pb2.StreamGenerateRequest(input=_generation_input(model, messages, options))
        call = self._inference.StreamGenerate(request, metadata=self._metadata, timeout=timeout_seconds)
        return AnswerStream(call, self._error)

    # --- health ---------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, str]:
        """`SERVING` or `NOT_SERVING` under `""` (overall) and under each service's name; `ok`, `degraded`, `down` or
        `not_configured` under the names of `core.Service`, as the server last saw them."""
        response = self._call(self._health.List, health_pb2.HealthListRequest())
        word = health_pb2.HealthCheckResponse.ServingStatus.Name
        told = {name: str(word(answer.status)) for name, answer in response.statuses.items()}
        seen = {name: HEALTH_WORDS[told[name]] if name in told else ServiceState.NOT_CONFIGURED for name in Service}
        return (
            {"": told[""]}
            | {service: told[f"knowledge_engine.v1.{service}"] for service in SERVICES}
            | {name.value: state.value for name, state in seen.items()}
        )

    def _create(self, method: Callable[..., _Response], request: object) -> _Response:
        """A call whose request carries an id, so that it can be repeated when its answer was lost."""
        try:
            return self._call(method, request, _LOOKING_SECONDS)
        except UpstreamError as error:
            if error.reason is not Reason.SERVER_UNAVAILABLE:
                raise
            return self._call(method, request, _LOOKING_SECONDS)

    def _call(self, method: Callable[..., _Response], request: object, at_least_seconds: float = 0) -> _Response:
        timeout = None if self._timeout_seconds is None else max(self._timeout_seconds, at_least_seconds)
        try:
            return method(request, metadata=self._metadata, timeout=timeout)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def _error(self, error: grpc.RpcError) -> KnowledgeEngineError:
        return error_from_call(error, self.server)


def _request_id(given: str | None) -> str:
    return given if given is not None else str(uuid.uuid4())


def _channel_options(server: str) -> list[tuple[str, int]]:
    options = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000)]
    try:
        host, _ = split_address(server)
    except ValueError:  # a gRPC target such as dns:///host
        return options
    # An outgoing proxy of the environment cannot reach this machine's own loopback.
    return [*options, ("grpc.enable_http_proxy", 0)] if is_loopback(host) else options


def _upload(
    metadata: datasets_pb2.UploadDatasetMetadata, content: BinaryIO | bytes
) -> Iterator[datasets_pb2.UploadDatasetRequest]:
    yield datasets_pb2.UploadDatasetRequest(metadata=metadata)
    for chunk in _chunks(content):
        yield datasets_pb2.UploadDatasetRequest(chunk=chunk)


def _chunks(content: BinaryIO | bytes) -> Iterable[bytes]:
    if isinstance(content, bytes):
        return (content[at : at + UPLOAD_CHUNK_BYTES] for at in range(0, len(content), UPLOAD_CHUNK_BYTES))
    return iter(lambda: content.read(UPLOAD_CHUNK_BYTES), b"")


_OPTIONS = frozenset(inference_pb2.GenerationInput.DESCRIPTOR.fields_by_name) - {"model", "messages"}


def _generation_input(model: str, messages: Messages, options: Mapping[str, Any]) -> inference_pb2.GenerationInput:
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"unknown options {sorted(unknown)}; known are {sorted(_OPTIONS)}")
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    values = {key: value for key, value in options.items() if value is not None}
    if (context := values.pop("context", None)) is not None:
        values["context"] = Struct()
        values["context"].update(context)
    if isinstance(schema := values.get("json_schema"), Mapping):
        values["json_schema"] = json.dumps(schema)
    try:
        values["tools"] = _tools(values.pop("tools", ()))
        return inference_pb2.GenerationInput(
            model=model_resource(model),
            messages=[_message(turn, f"messages[{at}]") for at, turn in enumerate(turns)],
            **values,
        )
    except ValueError as error:  # outside the field's width, such as max_tokens 2^40, or no tool or call
        raise InvalidSpecError(f"the request does not fit the contract: {error}") from None


def _message(turn: Message | Mapping[str, Any], where: str) -> inference_pb2.Message:
    """Raises ValueError."""
    if isinstance(turn, Message):
        role, content, calls, call_id = turn.role, turn.content, turn.tool_calls, turn.tool_call_id
    else:
        role, content, call_id = turn["role"], turn.get("content") or "", turn.get("tool_call_id") or ""
        calls = read_calls(turn["tool_calls"], f"{where}.tool_calls") if turn.get("tool_calls") else ()
    made = [inference_pb2.ToolCall(**call.model_dump()) for call in calls]
    return inference_pb2.Message(role=role, content=content, tool_calls=made, tool_call_id=call_id)


def _tools(tools: Iterable[Tool | Mapping[str, Any]]) -> list[inference_pb2.Tool]:
    """Raises ValueError."""
    rows = [tool_to_row(tool) if isinstance(tool, Tool) else tool for tool in tools]
    return [inference_pb2.Tool(**tool.model_dump()) for tool in read_tools(rows)]
