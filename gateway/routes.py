"""The REST routes of jobs, datasets and models: JSON in, stub calls, JSON or server-sent events out.

They hold no policy: the server decides. Every route names the RPCs it serves in its OpenAPI entry (`x-rpc`) and
documents the errors it can answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import grpc
from fastapi import APIRouter, Header, Path, Query, Request, Response

from gateway import original, resources, schemas, specs
from gateway.backend import Call, Calls
from gateway.openapi import JSON_BODY, AnyModel, errors, rpc
from gateway.problems import ProblemError
from gateway.rest_json import enum_number, plain_id, to_json
from gateway.sse import Event, EventStream, frames
from gateway.strict import StrictRoute
from gateway.uploads import UPLOAD_BODY, upload
from knowledge_engine.errors import Reason
from knowledge_engine.v1 import datasets_pb2, jobs_pb2, models_pb2, training_pb2

router = APIRouter(prefix="/api/v1", route_class=StrictRoute)

_MAX_SEQUENCE = 2**63 - 1

_NAME = "A name matching `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`."
Id = Annotated[str, Path(alias="id", description=_NAME)]
VersionNumber = Annotated[str, Path(alias="n", description="A version number, counted from 1.")]
PageSize = Annotated[int, Query(ge=0, le=1000, description="Entries on a page; 50 when 0 or absent.")]
PageToken = Annotated[str, Query(max_length=1024, description="`next_page_token` of the page before.")]

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern="^[ -~]+$",
        description="Makes the call safe to repeat: the same key and body return the job of the first call, the same "
        "key and another body are refused as REQUEST_ID_REUSED. Printable ASCII, such as a UUID; kept as long as the "
        "job.",
    ),
]


# --- jobs ---------------------------------------------------------------------------------------------------------


@router.post(
    "/train",
    response_model=schemas.TrainResponse,
    responses=errors(404, 409, 429, *JSON_BODY),
    openapi_extra=rpc("JobService.CreateTrainingJob"),
    tags=["training"],
)
async def train(
    body: schemas.TrainRequest, calls: Call, idempotency_key: IdempotencyKey = None
) -> schemas.TrainResponse:
    """Queues a fine-tuning run."""
    message = jobs_pb2.CreateTrainingJobRequest(spec=specs.training_spec(body), request_id=idempotency_key or "")
    answer = await calls.unary(calls.server.jobs.CreateTrainingJob, message)
    return original.train_response(answer.job)


@router.post(
    "/train/estimate",
    response_model=schemas.TrainEstimateResponse,
    response_model_exclude_unset=True,
    responses=errors(404, 429, *JSON_BODY),
    openapi_extra=rpc("JobService.EstimateTrainingJob"),
    tags=["training"],
)
async def estimate_training(body: schemas.TrainRequest, calls: Call) -> dict[str, Any]:
    """Says what a fine-tuning run would take and whether it would be accepted; nothing is queued or loaded."""
    message = jobs_pb2.EstimateTrainingJobRequest(spec=specs.training_spec(body))
    answer = await calls.unary(calls.server.jobs.EstimateTrainingJob, message)
    return original.train_estimate(answer.estimate)


@router.get(
    "/training/status/{job_id}",
    response_model=schemas.TrainingStatusResponse,
    responses=errors(404),
    openapi_extra=rpc("JobService.GetJob"),
    tags=["training"],
)
async def training_status(
    job_id: Annotated[str, Path(description=_NAME)], calls: Call
) -> schemas.TrainingStatusResponse:
    """How far a job is, in the words of the first release."""
    return original.training_status(await _get_job(calls, job_id))


@router.post(
    "/data/generate",
    response_model=schemas.GenerateDataResponse,
    responses=errors(404, 409, 429, *JSON_BODY),
    openapi_extra=rpc("JobService.CreateGenerationJob"),
    tags=["data"],
)
async def generate_data(
    body: schemas.GenerateDataRequest, calls: Call, idempotency_key: IdempotencyKey = None
) -> schemas.GenerateDataResponse:
    """Queues the generation of training conversations from a catalogue."""
    message = jobs_pb2.CreateGenerationJobRequest(spec=specs.generation_spec(body), request_id=idempotency_key or "")
    answer = await calls.unary(calls.server.jobs.CreateGenerationJob, message)
    return original.generate_data_response(answer.job)


@router.get(
    "/jobs",
    response_model=resources.JobPage,
    response_model_exclude_unset=True,
    responses=errors(),
    openapi_extra=rpc("JobService.ListJobs"),
    tags=["jobs"],
)
async def list_jobs(calls: Call, page_size: PageSize = 0, page_token: PageToken = "") -> dict[str, Any]:
    """Lists jobs, newest first."""
    message = jobs_pb2.ListJobsRequest(page_size=page_size, page_token=page_token)
    answer = await calls.unary(calls.server.jobs.ListJobs, message)
    return to_json(answer)


@router.get(
    "/jobs/{id}",
    response_model=resources.Job,
    response_model_exclude_unset=True,
    responses=errors(404),
    openapi_extra=rpc("JobService.GetJob"),
    tags=["jobs"],
)
async def get_job(job_id: Id, calls: Call) -> dict[str, Any]:
    """Returns one job."""
    return to_json(await _get_job(calls, job_id))


@router.post(
    "/jobs/{id}/cancel",
    response_model=resources.Job,
    response_model_exclude_unset=True,
    responses=errors(404),
    openapi_extra=rpc("JobService.CancelJob"),
    tags=["jobs"],
)
async def cancel_job(job_id: Id, calls: Call) -> dict[str, Any]:
    """Asks a job to stop; repeating it returns the job."""
    message = jobs_pb2.CancelJobRequest(name=f"jobs/{job_id}")
    return to_json((await calls.unary(calls.server.jobs.CancelJob, message)).job)


@router.post(
    "/jobs/{id}/pause",
    response_model=resources.Job,
    response_model_exclude_unset=True,
    responses=errors(404),
    openapi_extra=rpc("JobService.PauseJob"),
    tags=["jobs"],
)
async def pause_job(job_id: Id, calls: Call) -> dict[str, Any]:
    """Puts a job aside, a running one as soon as its checkpoint is durable; repeating it returns the job."""
    message = jobs_pb2.PauseJobRequest(name=f"jobs/{job_id}")
    return to_json((await calls.unary(calls.server.jobs.PauseJob, message)).job)


@router.post(
    "/jobs/{id}/resume",
    response_model=resources.Job,
    response_model_exclude_unset=True,
    responses=errors(404),
    openapi_extra=rpc("JobService.ResumeJob"),
    tags=["jobs"],
)
async def resume_job(job_id: Id, calls: Call) -> dict[str, Any]:
    """Queues a paused job again; it goes on from its checkpoint. A job that is not paused is returned as it is."""
    message = jobs_pb2.ResumeJobRequest(name=f"jobs/{job_id}")
    return to_json((await calls.unary(calls.server.jobs.ResumeJob, message)).job)


@router.get(
    "/jobs/{id}/events",
    response_model=None,
    responses={
        200: {
            "description": "Events of type `state_change`, `progress`, `checkpoint`, `log`, `warning` or `result`, "
            "each with its sequence number as id; `error` with a problem when the stream breaks. Ends after the "
            "terminal event.",
            "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/JobEvent"}}},
        },
        204: {"description": "The job has ended and Last-Event-ID names its last event: a browser stops asking."},
        **errors(404),
    },
    openapi_extra=rpc("JobService.WatchJob"),
    tags=["jobs"],
)
async def watch_job(
    job_id: Id,
    request: Request,
    calls: Call,
    after_sequence: Annotated[int, Query(ge=0, le=_MAX_SEQUENCE, description="Send events after this one.")] = 0,
    last_event_id: Annotated[
        str | None, Header(pattern="^[0-9]{1,18}$", description="Sent by browsers on reconnecting; goes first.")
    ] = None,
) -> Response:
    """Replays a job's events after a sequence number, then follows it until its last one."""
    after = int(last_event_id) if last_event_id is not None else after_sequence
    # The stream may have nothing to say for long; who may not have it, or asks for an unknown job, hears so at once.
    job = await _get_job(calls, job_id)
    if last_event_id is not None and job.HasField("end_time") and after >= job.last_sequence:
        return Response(status_code=204)
    message = jobs_pb2.WatchJobRequest(name=job.name, after_sequence=after)
    call = calls.stream(calls.server.jobs.WatchJob, message, deadline=False)
    return EventStream(frames(call, _job_event, request.state.request_id))


def _job_event(message: jobs_pb2.WatchJobResponse) -> Event:
    event = message.event
    return Event(event.WhichOneof("payload") or "unknown", to_json(event), str(event.sequence))


async def _get_job(calls: Calls, job_id: str) -> jobs_pb2.Job:
    return (await calls.unary(calls.server.jobs.GetJob, jobs_pb2.GetJobRequest(name=f"jobs/{job_id}"))).job


# --- datasets -----------------------------------------------------------------------------------------------------


@router.post(
    "/datasets",
    status_code=201,
    response_model=resources.Dataset,
    responses=errors(409, 413, 415),
    openapi_extra=rpc("DatasetService.UploadDataset", requestBody=UPLOAD_BODY),
    tags=["data"],
)
async def upload_dataset(
    request: Request,
    calls: Call,
    name: Annotated[str, Query(min_length=1, max_length=1024, description="The dataset's name.")],
    kind: Annotated[
        Literal["conversations", "catalogue", "preferences", "evaluation"], Query(description="What the rows are.")
    ],
    layout: Annotated[
        Literal["jsonl", "csv", "sharegpt", "alpaca"] | None,
        Query(
            alias="format",
            description="When absent as the Content-Type says: `csv` for `text/csv`, else `jsonl`. `sharegpt` and "
            "`alpaca` come as `application/json` or `application/x-ndjson`.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Stores a dataset from the raw body, which is checked row by row as it streams in; at most 2 GiB."""
    return to_json(await upload(request, calls, name, kind, layout))


@router.get(
    "/datasets",
    response_model=resources.DatasetPage,
    responses=errors(),
    openapi_extra=rpc("DatasetService.ListDatasets"),
    tags=["data"],
)
async def list_datasets(calls: Call, page_size: PageSize = 0, page_token: PageToken = "") -> dict[str, Any]:
    """Lists datasets, newest first."""
    message = datasets_pb2.ListDatasetsRequest(page_size=page_size, page_token=page_token)
    answer = await calls.unary(calls.server.datasets.ListDatasets, message)
    return to_json(answer)


@router.get(
    "/datasets/{id}",
    response_model=resources.Dataset,
    responses=errors(404),
    openapi_extra=rpc("DatasetService.GetDataset"),
    tags=["data"],
)
async def get_dataset(dataset: Id, calls: Call) -> dict[str, Any]:
    """Returns one dataset."""
    message = datasets_pb2.GetDatasetRequest(name=f"datasets/{dataset}")
    return to_json((await calls.unary(calls.server.datasets.GetDataset, message)).dataset)


@router.delete(
    "/datasets/{id}",
    status_code=204,
    response_model=None,
    responses=errors(404),
    openapi_extra=rpc("DatasetService.DeleteDataset"),
    tags=["data"],
)
async def delete_dataset(dataset: Id, calls: Call) -> Response:
    """Deletes a dataset that no unfinished job uses."""
    message = datasets_pb2.DeleteDatasetRequest(name=f"datasets/{dataset}")
    await calls.unary(calls.server.datasets.DeleteDataset, message)
    return Response(status_code=204)


@router.get(
    "/datasets/{id}/preview",
    response_model=resources.PreviewPage,
    responses=errors(404),
    openapi_extra=rpc("DatasetService.PreviewDataset"),
    tags=["data"],
)
async def preview_dataset(
    dataset: Id,
    calls: Call,
    base_model: Annotated[str, Query(max_length=1024, description="`base` when absent.")] = "",
    max_length: Annotated[
        int | None, Query(ge=16, le=131_072, description="Longest conversation in tokens; longer ones are named.")
    ] = None,
    truncation: Annotated[
        Literal["error", "drop", "keep_last_turns"], Query(description="What becomes of longer ones.")
    ] = "error",
    skip: Annotated[int, Query(ge=0, le=_MAX_SEQUENCE, description="Rows to leave out before the first.")] = 0,
    page_size: Annotated[int, Query(ge=0, le=100, description="Rows on a page; 10 when 0 or absent.")] = 0,
    page_token: PageToken = "",
) -> dict[str, Any]:
    """Shows what a base's chat template makes of conversations, and which of their tokens would be trained."""
    message = datasets_pb2.PreviewDatasetRequest(
        name=f"datasets/{dataset}",
        base_model=base_model,
        max_length=max_length,
        truncation=enum_number(training_pb2.Truncation.DESCRIPTOR, truncation),  # type: ignore[arg-type]
        skip=skip,
        page_size=page_size,
        page_token=page_token,
    )
    answer = await calls.unary(calls.server.datasets.PreviewDataset, message)
    return to_json(answer)


# --- models -------------------------------------------------------------------------------------------------------


@router.get(
    "/models",
    response_model=list[schemas.ModelSummary],
    responses={
        200: {"headers": {"Link": {"description": 'The next page, `rel="next"`.', "schema": {"type": "string"}}}},
        **errors(),
    },
    openapi_extra=rpc("ModelService.ListModels"),
    tags=["models"],
)
async def list_models(
    calls: Call, response: Response, page_size: PageSize = 0, page_token: PageToken = ""
) -> list[schemas.ModelSummary]:
    """Lists models by name; the next page is in the `Link` header."""
    message = models_pb2.ListModelsRequest(page_size=page_size, page_token=page_token)
    answer = await calls.unary(calls.server.models.ListModels, message)
    if answer.next_page_token:
        query = urlencode({"page_size": page_size, "page_token": answer.next_page_token})
        response.headers["Link"] = f'<{router.prefix}/models?{query}>; rel="next"'
    return [original.model_summary(model) for model in answer.models]


class ModelDetails(schemas.ModelSummary):
    """A model with its newest ready version."""

    num_versions: int
    latest_version: resources.ModelVersion | None


@router.get(
    "/models/{id}",
    response_model=ModelDetails,
    responses=errors(404),
    openapi_extra=rpc("ModelService.GetModel"),
    tags=["models"],
)
async def get_model(model: Id, calls: Call) -> dict[str, Any]:
    """Returns one model."""
    found = await _get_model(calls, model)
    mirror = to_json(found)
    details = {key: mirror[key] for key in ("num_versions", "latest_version")}
    return original.model_summary(found).model_dump() | details


@router.get(
    "/models/{id}/versions",
    response_model=resources.ModelVersionPage,
    responses=errors(404),
    openapi_extra=rpc("ModelService.ListModelVersions"),
    tags=["models"],
)
async def list_model_versions(
    model: Id, calls: Call, page_size: PageSize = 0, page_token: PageToken = ""
) -> dict[str, Any]:
    """Lists the versions of a model, newest first."""
    message = models_pb2.ListModelVersionsRequest(parent=f"models/{model}", page_size=page_size, page_token=page_token)
    answer = await calls.unary(calls.server.models.ListModelVersions, message)
    return to_json(answer)


@router.get(
    "/models/{id}/versions/{n}",
    response_model=resources.ModelVersion,
    responses=errors(404),
    openapi_extra=rpc("ModelService.GetModelVersion"),
    tags=["models"],
)
async def get_model_version(model: Id, number: VersionNumber, calls: Call) -> dict[str, Any]:
    """Returns one version."""
    return to_json(await _get_version(calls, f"models/{model}/versions/{number}"))


@router.post(
    "/models/{id}/versions/{n}/export",
    response_model=resources.Export,
    responses=errors(404),
    openapi_extra=rpc("ModelService.ExportModelVersion"),
    tags=["models"],
)
async def export_model_version(model: Id, number: VersionNumber, calls: Call) -> dict[str, Any]:
    """Merges a version into its base, in the service's data directory; answers when it is there and checked."""
    message = models_pb2.ExportModelVersionRequest(name=f"models/{model}/versions/{number}")
    return to_json((await calls.unary(calls.server.models.ExportModelVersion, message, deadline=False)).export)


@router.delete(
    "/models/{id}/versions/{n}",
    status_code=204,
    response_model=None,
    responses=errors(404),
    openapi_extra=rpc("ModelService.DeleteModelVersion"),
    tags=["models"],
)
async def delete_model_version(model: Id, number: VersionNumber, calls: Call) -> Response:
    """Deletes a version and its files; its number is never given again."""
    message = models_pb2.DeleteModelVersionRequest(name=f"models/{model}/versions/{number}")
    await calls.unary(calls.server.models.DeleteModelVersion, message)
    return Response(status_code=204)


@router.get(
    "/models/{id}/evaluate",
    status_code=404,
    response_model=None,
    response_class=Response,
    responses=errors(404),
    openapi_extra=rpc("ModelService.GetModel"),
    tags=["models"],
)
async def evaluate(model_id: AnyModel, calls: Call) -> None:
    """The latest evaluation report; 404 while there is none, and this release makes none."""
    name = specs.model_name(model_id)
    if "/versions/" in name:
        await _get_version(calls, name)
    elif name != specs.BASE:
        await _get_model(calls, model_id)
    raise ProblemError(
        404,
        grpc.StatusCode.NOT_FOUND,
        Reason.EVALUATION_NOT_FOUND,
        f"{plain_id(name)} has no evaluation report",
        model=plain_id(name),
    )


async def _get_model(calls: Calls, model: str) -> models_pb2.Model:
    return (await calls.unary(calls.server.models.GetModel, models_pb2.GetModelRequest(name=f"models/{model}"))).model


async def _get_version(calls: Calls, name: str) -> models_pb2.ModelVersion:
    message = models_pb2.GetModelVersionRequest(name=name)
    return (await calls.unary(calls.server.models.GetModelVersion, message)).model_version
