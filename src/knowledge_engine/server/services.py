"""Thin servicers: convert, call, convert. What blocks runs in a thread; nothing here decides anything twice."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import IO, Any, Generic, NamedTuple, TypeVar

from knowledge_engine import bases, core
from knowledge_engine.bases import Base
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import (
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    StateError,
    UpstreamError,
    Violation,
)
from knowledge_engine.generation.chat_client import require_provider
from knowledge_engine.generation.planner import Planner
from knowledge_engine.inference.client import Adapter, EngineClient, EngineRequest, Finished, TextDelta
from knowledge_engine.inference.grammar import check_form
from knowledge_engine.jobs import Jobs, can_train
from knowledge_engine.preview import preview_dataset, preview_row
from knowledge_engine.registry import Registry
from knowledge_engine.rows import FORMATS
from knowledge_engine.server import convert
from knowledge_engine.server.exports import Exports
from knowledge_engine.server.status import CALLER
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.text import ChatText, with_context
from knowledge_engine.tracing import SPAN
from knowledge_engine.training.estimate import Material, Preflight, Row
from knowledge_engine.training.material import KINDS, Fit, demand_continuable, divide, fit, read_rows
from knowledge_engine.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

DEFAULT_MAX_TOKENS = 500

_REGISTRY_THREADS = 32
_FETCH_THREADS = 16
_Answer = TypeVar("_Answer")
_Spec = TypeVar("_Spec", core.TrainingSpec, core.GenerationSpec)


class Texts:
    """The chat texts of the bases, loaded once each."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: dict[str, ChatText] = {}

    def get(self, name: str) -> tuple[Base, ChatText]:
        """Blocks. Raises InvalidSpecError: BASE_MODEL_UNKNOWN; UpstreamError: BASE_MODEL_LOADING."""
        base = bases.get_base(self._settings, name)
        if base.digest not in self._loaded:
            self._loaded[base.digest] = ChatText.load(base)
        return base, self._loaded[base.digest]


def _require_torch() -> None:
    """Raises StateError: TRAINING_UNAVAILABLE."""
    if not can_train():
        raise StateError(
            "this server is installed without torch and cannot train; ask one of the full installation, "
            "the image's default target",
            reason=Reason.TRAINING_UNAVAILABLE,
        )


class _Accepted(NamedTuple):
    """A spec that may be stored, and the memory its worker is expected to take, None where that is not known."""

    spec: core.JobSpec
    memory_bytes: int | None = None


class _Measured(Generic[_Answer]):
    """What datasets measure for a base. It takes a second for every 300 rows or so, so many who ask share one answer,
    one is found at a time, the newest is kept, and the work goes on when those who asked leave."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, "measure")
        self._tasks: dict[object, asyncio.Task[_Answer]] = {}

    async def get(self, facts: object, measure: Callable[[], _Answer]) -> _Answer:
        task = self._tasks.get(facts)
        if task is None or (task.done() and task.exception() is not None):
            self._tasks = {key: task for key, task in self._tasks.items() if not task.done()}
            task = self._tasks[facts] = asyncio.create_task(_in(self._threads, measure))
        return await asyncio.shield(task)


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    def __init__(
        self, settings: Settings, jobs: Jobs, state: State, datasets: Datasets, registry: Registry, texts: Texts
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._state = state
        self._datasets = datasets
        self._registry = registry
        self._registry_threads = _registry_threads()
        self._texts = texts
        self._preflight = Preflight(settings, state)
        self._measured: _Measured[Fit[Row]] = _Measured()

    async def CreateTrainingJob(  # noqa: N802
        self, request: jobs_pb2.CreateTrainingJobRequest, context: Any
    ) -> jobs_pb2.CreateTrainingJobResponse:
        spec = convert.training_spec(request.spec)
        check = functools.partial(self._checked, has_lora=request.spec.HasField("lora"))
        job = await self._create(spec, request.request_id, check)
        return jobs_pb2.CreateTrainingJobResponse(job=convert.job(job))

    async def CreateGenerationJob(  # noqa: N802
        self, request: jobs_pb2.CreateGenerationJobRequest, context: Any
    ) -> jobs_pb2.CreateGenerationJobResponse:
        spec = convert.generation_spec(request.spec)
        job = await self._create(spec, request.request_id, self._completed)
        return jobs_pb2.CreateGenerationJobResponse(job=convert.job(job))

    async def EstimateTrainingJob(  # noqa: N802
        self, request: jobs_pb2.EstimateTrainingJobRequest, context: Any
    ) -> jobs_pb2.EstimateTrainingJobResponse:
        spec = await self._shaped(convert.training_spec(request.spec), request.spec.HasField("lora"))
        estimate = await asyncio.to_thread(self._preflight.estimate, spec, *await self._material(spec))
        return jobs_pb2.EstimateTrainingJobResponse(estimate=convert.training_estimate(estimate))

    async def _create(self, asked: _Spec, request_id: str, check: Callable[[_Spec], Awaitable[_Accepted]]) -> core.Job:
        """The job of this request: the one it has made before, else a new one, once `check` has let it pass."""
        caller, request = CALLER.get(), convert.request(request_id, asked)
        if request is not None and (known := await asyncio.to_thread(self._state.find_request, caller, request)):
            return known
        try:
            accepted = await check(asked)
        except KnowledgeEngineError:
            # The same request may have made its job, and the job its dataset, just now.
            if request is not None and (known := await asyncio.to_thread(self._state.find_request, caller, request)):
                return known
            raise
        return await self._jobs.submit(accepted.spec, caller, request, accepted.memory_bytes)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Any) -> jobs_pb2.GetJobResponse:  # noqa: N802
        job = await self._jobs.get(convert.parse_name(request.name, "jobs"))
        return jobs_pb2.GetJobResponse(job=convert.job(job))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Any) -> jobs_pb2.ListJobsResponse:  # noqa: N802
        page = convert.page(request.page_size, request.page_token)
        jobs, after = await asyncio.to_thread(self._state.list_jobs, page)
        return jobs_pb2.ListJobsResponse(jobs=map(convert.job, jobs), next_page_token=convert.page_token(after))

    async def CancelJob(  # noqa: N802
        self, request: jobs_pb2.CancelJobRequest, context: Any
    ) -> jobs_pb2.CancelJobResponse:
        job = await self._jobs.cancel(convert.parse_name(request.name, "jobs"))
        return jobs_pb2.CancelJobResponse(job=convert.job(job))

    async def PauseJob(  # noqa: N802
        self, request: jobs_pb2.PauseJobRequest, context: Any
    ) -> jobs_pb2.PauseJobResponse:
        job = await self._jobs.pause(convert.parse_name(request.name, "jobs"))
        return jobs_pb2.PauseJobResponse(job=convert.job(job))

    async def ResumeJob(  # noqa: N802
        self, request: jobs_pb2.ResumeJobRequest, context: Any
    ) -> jobs_pb2.ResumeJobResponse:
        job = await self._jobs.resume(convert.parse_name(request.name, "jobs"))
        return jobs_pb2.ResumeJobResponse(job=convert.job(job))

    async def WatchJob(  # noqa: N802
        self, request: jobs_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        job_id = convert.parse_name(request.name, "jobs")
        if request.after_sequence < 0:
            raise _invalid("after_sequence", "must not be negative")
        async with aclosing(self._jobs.watch(job_id, request.after_sequence)) as events:
            async for event in events:
                yield jobs_pb2.WatchJobResponse(event=convert.job_event(event))

    async def _checked(self, spec: core.TrainingSpec, has_lora: bool) -> _Accepted:
        """Refuses before anything is stored what could only fail later."""
        spec = await self._shaped(spec, has_lora)
        try:
            base, material = await self._material(spec)
        except UpstreamError as error:
            if error.reason is not Reason.BASE_MODEL_LOADING:
                raise
            return _Accepted(spec)  # not prepared yet: the worker prepares it and checks the same
        need = await asyncio.to_thread(self._preflight.demand_room, spec, base, material)
        return _Accepted(spec, need.memory.expected_bytes)

    async def _material(self, spec: core.TrainingSpec) -> tuple[Base, Material]:
        """The base, and the dataset's rows as it will see them.

        Raises:
            UpstreamError: BASE_MODEL_LOADING, once everything else is checked.
        """
        _require_torch()
        asked = [("dataset", spec.dataset, KINDS[spec.method])]
        if spec.eval_dataset is not None:
            asked.append(("eval_dataset", spec.eval_dataset, core.DatasetKind.EVALUATION))
        digests = []
        for field, name, kind in asked:
            dataset = await asyncio.to_thread(self._datasets.get, name)
            if dataset.kind is not kind:
                raise _wrong_kind(f"spec.{field}", dataset, kind)
            digests.append(dataset.digest)
        base, text = await asyncio.to_thread(self._texts.get, spec.base_model)
        if spec.start_from is not None:
            version = await self._version(spec.start_from)
            demand_continuable(spec, version, base.digest, text.template_digest)
        rows, evaluation = await asyncio.to_thread(read_rows, self._datasets, spec)
        how = (text, base.max_length(spec.max_length), spec.truncation)
        # Fitted before the split, so that errors name rows of the dataset.
        fitted: list[Fit[Row]] = []
        for digest, some in zip(digests, (rows, evaluation), strict=False):
            facts = (digest, base.digest, text.template_digest, *how[1:])
            fitted.append(await self._measured.get(facts, functools.partial(fit, some, *how, Row.of)))
        measured = fitted[1].items if evaluation else ()
        return base, Material(*await asyncio.to_thread(divide, spec, rows, fitted[0].items, measured))

    async def _shaped(self, spec: core.TrainingSpec, has_lora: bool) -> core.TrainingSpec:
        """The adapter's shape is that of the version it goes on from where the caller has named none."""
        if spec.start_from is None or has_lora:
            return spec
        return spec.model_copy(update={"lora": (await self._version(spec.start_from)).spec.lora})

    async def _version(self, name: str) -> core.ModelVersion:
        return await _in(self._registry_threads, self._registry.get, *core.split_version(name))

    async def _completed(self, spec: core.GenerationSpec) -> _Accepted:
        """The spec with its catalogue, dataset and provider named, all checked."""
        return await asyncio.to_thread(self._complete, spec)

    def _complete(self, spec: core.GenerationSpec) -> _Accepted:
        provider = require_provider(self._settings, spec.provider)
        if spec.catalogue:
            catalogue = self._datasets.get(spec.catalogue)
            if catalogue.kind is not core.DatasetKind.CATALOGUE:
                raise _wrong_kind("spec.catalogue", catalogue, core.DatasetKind.CATALOGUE)
        else:
            catalogue = self._datasets.default_catalogue()
        Planner(self._datasets.products(catalogue.name), spec)  # refuses topics that match nothing
        if spec.dataset:
            self._datasets.require_free(spec.dataset)
        name = spec.dataset or f"conversations-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        return _Accepted(spec.model_copy(update={"catalogue": catalogue.name, "dataset": name, "provider": provider}))


class DatasetServicer(datasets_pb2_grpc.DatasetServiceServicer):
    def __init__(self, settings: Settings, datasets: Datasets, texts: Texts) -> None:
        self._datasets = datasets
        self._texts = texts
        self._uploads = settings.data_dir / "uploads"
        self._previewed: _Measured[core.DatasetPreview] = _Measured()

    async def UploadDataset(  # noqa: N802
        self, request_iterator: AsyncIterator[datasets_pb2.UploadDatasetRequest], context: Any
    ) -> datasets_pb2.UploadDatasetResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("payload") != "metadata":
            raise _invalid("metadata", "must come first")
        name, kind, format_ = convert.upload_metadata(first.metadata)
        if format_ not in FORMATS[kind]:
            known = " or ".join(word.upper() for word in FORMATS[kind])
            raise _invalid("metadata.format", f"must be {known} for {kind}")
        self._uploads.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=self._uploads) as spool:
            await _receive(request_iterator, spool)
            dataset = await asyncio.to_thread(self._datasets.store, name, kind, format_, spool)
        return datasets_pb2.UploadDatasetResponse(dataset=convert.dataset(dataset))

    async def GetDataset(  # noqa: N802
        self, request: datasets_pb2.GetDatasetRequest, context: Any
    ) -> datasets_pb2.GetDatasetResponse:
        dataset = await asyncio.to_thread(self._datasets.get, convert.parse_name(request.name, "datasets"))
        return datasets_pb2.GetDatasetResponse(dataset=convert.dataset(dataset))

    async def ListDatasets(  # noqa: N802
        self, request: datasets_pb2.ListDatasetsRequest, context: Any
    ) -> datasets_pb2.ListDatasetsResponse:
        page = convert.page(request.page_size, request.page_token)
        datasets, after = await asyncio.to_thread(self._datasets.list, page)
        return datasets_pb2.ListDatasetsResponse(
            datasets=map(convert.dataset, datasets), next_page_token=convert.page_token(after)
        )

    async def DeleteDataset(  # noqa: N802
        self, request: datasets_pb2.DeleteDatasetRequest, context: Any
    ) -> datasets_pb2.DeleteDatasetResponse:
        await asyncio.to_thread(self._datasets.delete, convert.parse_name(request.name, "datasets"))
        return datasets_pb2.DeleteDatasetResponse()

    async def PreviewDataset(  # noqa: N802
        self, request: datasets_pb2.PreviewDatasetRequest, context: Any
    ) -> datasets_pb2.PreviewDatasetResponse:
        spec = convert.preview_spec(request)
        page = convert.rows_page(request.page_size, request.page_token)
        if request.skip < 0:
            raise _invalid("skip", "must not be negative")
        dataset = await asyncio.to_thread(self._datasets.get, spec.name)
        if dataset.kind is core.DatasetKind.CATALOGUE:
            raise _wrong_kind("name", dataset, core.DatasetKind.CONVERSATIONS)
        base, text = await asyncio.to_thread(self._texts.get, spec.base_model)
        max_length = base.max_length(spec.max_length, field="max_length")
        stored = await asyncio.to_thread(self._datasets.talks, spec.name, dataset.kind)
        how = (text, max_length, spec.truncation)
        facts = (dataset.digest, base.digest, text.template_digest, max_length, spec.truncation)
        whole = await self._previewed.get(facts, lambda: preview_dataset(stored, *how))
        first = int(page.after or 0) + request.skip
        shown = stored[first : first + page.size]
        rows = await asyncio.to_thread(
            lambda: [preview_row(item, row, *how) for row, item in enumerate(shown, first + 1)]
        )
        last = first + len(shown)
        return datasets_pb2.PreviewDatasetResponse(
            rows=map(convert.previewed_row, rows),
            next_page_token=convert.page_token(str(last) if shown and last < len(stored) else None),
            dataset=convert.dataset_preview(whole),
            chat_template_digest=text.template_digest,
        )


def _registry_threads() -> ThreadPoolExecutor:
    """A bucket that hangs must not take threads from the store's calls."""
    return ThreadPoolExecutor(_REGISTRY_THREADS, thread_name_prefix="registry")


async def _in(threads: ThreadPoolExecutor, call: Callable[..., _Answer], *arguments: object) -> _Answer:
    # In the call's context: there stands who calls.
    run = contextvars.copy_context().run
    return await asyncio.get_running_loop().run_in_executor(threads, run, call, *arguments)


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    def __init__(self, registry: Registry, engine: EngineClient, exports: Exports) -> None:
        self._registry = registry
        self._engine = engine
        self._exports = exports
        self._threads = _registry_threads()

    async def ListModels(  # noqa: N802
        self, request: models_pb2.ListModelsRequest, context: Any
    ) -> models_pb2.ListModelsResponse:
        page = convert.page(request.page_size, request.page_token)
        models, after = await _in(self._threads, self._registry.list_models, page)
        return models_pb2.ListModelsResponse(
            models=map(convert.model, models), next_page_token=convert.page_token(after)
        )

    async def GetModel(self, request: models_pb2.GetModelRequest, context: Any) -> models_pb2.GetModelResponse:  # noqa: N802
        model = await _in(self._threads, self._registry.get_model, convert.parse_name(request.name, "models"))
        return models_pb2.GetModelResponse(model=convert.model(model))

    async def ListModelVersions(  # noqa: N802
        self, request: models_pb2.ListModelVersionsRequest, context: Any
    ) -> models_pb2.ListModelVersionsResponse:
        name = convert.parse_name(request.parent, "models", field="parent")
        page = convert.page(request.page_size, request.page_token)
        versions, after = await _in(self._threads, self._registry.list_versions, name, page)
        return models_pb2.ListModelVersionsResponse(
            model_versions=map(convert.model_version, versions), next_page_token=convert.page_token(after)
        )

    async def GetModelVersion(  # noqa: N802
        self, request: models_pb2.GetModelVersionRequest, context: Any
    ) -> models_pb2.GetModelVersionResponse:
        version = await _in(self._threads, self._registry.get, *convert.parse_version_name(request.name))
        return models_pb2.GetModelVersionResponse(model_version=convert.model_version(version))

    async def DeleteModelVersion(  # noqa: N802
        self, request: models_pb2.DeleteModelVersionRequest, context: Any
    ) -> models_pb2.DeleteModelVersionResponse:
        version = await _in(self._threads, self._registry.delete, *convert.parse_version_name(request.name))
        await self._engine.unload(version.digest)
        await self._exports.forget(version)
        return models_pb2.DeleteModelVersionResponse()

    async def ExportModelVersion(  # noqa: N802
        self, request: models_pb2.ExportModelVersionRequest, context: Any
    ) -> models_pb2.ExportModelVersionResponse:
        version = await _in(self._threads, self._registry.get, *convert.parse_version_name(request.name))
        _require_torch()
        facts = await self._exports.export(version)
        try:
            await _in(self._threads, self._registry.get, version.model, version.version)
        except NotFoundError:  # deleted meanwhile, and its weights with it
            await self._exports.forget(version)
            raise
        return models_pb2.ExportModelVersionResponse(export=convert.export(facts))


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(
        self, registry: Registry, engine: EngineClient, texts: Texts, pinned_models: Collection[str] = ()
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._pinned_models = pinned_models
        self._texts = texts
        self._verified: set[str] = set()
        self._verifying: dict[str, asyncio.Task[None]] = {}
        self._threads = _registry_threads()
        # Its files may have to come first: that takes minutes, which nobody else should wait for.
        self._fetch_threads = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch")

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        asked = await _in(self._threads, convert.generation_input, request.input)
        response = inference_pb2.GenerateResponse(choices=[inference_pb2.Choice() for _ in range(asked.n)])
        async with aclosing(self._answer(asked)) as pieces:
            async for piece in pieces:
                if isinstance(piece, TextDelta):
                    choice = response.choices[piece.choice]
                    choice.text += piece.text
                    choice.logprobs.extend(map(convert.token_logprob, piece.logprobs))
                else:
                    response.completion.CopyFrom(convert.completion(piece))
        response.text = response.choices[0].text
        return response

    async def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        asked = await _in(self._threads, convert.generation_input, request.input)
        async with aclosing(self._answer(asked)) as pieces:
            async for piece in pieces:
                if isinstance(piece, TextDelta):
                    yield inference_pb2.StreamGenerateResponse(
                        text_delta=piece.text,
                        choice=piece.choice,
                        logprobs=map(convert.token_logprob, piece.logprobs),
                    )
                else:
                    yield inference_pb2.StreamGenerateResponse(completion=convert.completion(piece))

    async def _answer(self, asked: core.GenerationInput) -> AsyncGenerator[TextDelta | core.Completion]:
        """Text deltas, then the facts. Closing the iterator stops the decoding."""
        received = time.monotonic()
        with self._engine.place(CALLER.get(), asked.n):
            answerer, request = await _in(self._threads, self._prepare, asked)
        if isinstance(answerer, core.ModelVersion):
            await self._verify(answerer)
        first: float | None = None
        finished: dict[int, Finished] = {}
        try:
            async with aclosing(self._engine.generate(request, asked.n)) as pieces:
                async for piece in pieces:
                    now = time.monotonic() - received
                    if isinstance(piece, Finished):
                        finished[piece.choice] = piece
                        continue
                    first = now if first is None else first
                    yield piece
            answers = [finished[choice] for choice in range(asked.n)]
            _trace(asked.model, answers)
            yield core.Completion(
                finish_reasons=tuple(answer.finish_reason for answer in answers),
                prompt_tokens=len(request.prompt_token_ids),
                completion_tokens=sum(answer.completion_tokens for answer in answers),
                model=asked.model,
                version=answerer.version if isinstance(answerer, core.ModelVersion) else None,
                digest=answerer.digest,
                time_to_first_token_seconds=now if first is None else first,
                total_seconds=now,
            )
        except IntegrityError:
            self._verified.discard(answerer.digest)  # its files went after they were verified: look again next time
            raise

    async def _verify(self, version: core.ModelVersion) -> None:
        """Once for each version, however many ask for it; the work goes on when they leave."""
        if version.digest in self._verified:
            return
        task = self._verifying.get(version.digest)
        if task is None:
            verifying = _in(self._fetch_threads, self._registry.verify, version.model, version.version)
            task = self._verifying[version.digest] = asyncio.create_task(verifying)
            task.add_done_callback(functools.partial(self._end_verifying, version.digest))
        await asyncio.shield(task)

    def _end_verifying(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._verifying[digest]
        if not task.cancelled() and task.exception() is None:
            self._verified.add(digest)

    def _prepare(self, asked: core.GenerationInput) -> tuple[core.ModelVersion | Base, EngineRequest]:
        """Who answers, and what it is asked; blocks."""
        version = None if asked.model == core.BASE else self._registry.resolve(asked.model, asked.version)
        base, text = self._texts.get(core.BASE)
        adapter = None
        if version is not None:
            self._check_servable(version, base, text)
            asked_for = asked.model if asked.version is None else f"{asked.model}:{asked.version}"
            adapter = Adapter(
                digest=version.digest,
                folder=self._registry.folder(version.model, version.version),
                pin=asked_for if asked_for in self._pinned_models else "",
            )
        prompt = _encode(asked, base, text)
        left = base.context_length - len(prompt)
        wanted = asked.max_tokens or min(DEFAULT_MAX_TOKENS, left)
        if left < 1 or wanted > left:
            raise _too_long(len(prompt), wanted, base.context_length)
        chosen = asked.model_dump(include=core.SamplingParams.model_fields.keys() - {"max_tokens"})
        sampling = core.SamplingParams(max_tokens=wanted, **chosen)
        check_form(sampling, "input.")
        return version or base, EngineRequest(
            prompt_token_ids=prompt,
            sampling=sampling,
            stop_token_ids=sorted(text.stop_token_ids),
            adapter=adapter,
            caller=CALLER.get(),
        )

    def _check_servable(self, version: core.ModelVersion, base: Base, text: ChatText) -> None:
        if version.base_digest != base.digest:
            raise StateError(
                f"version {version.version} of {version.model!r} was trained on base {version.base_model!r} "
                f"({version.base_digest[:19]}), this engine serves {base.source} ({base.digest[:19]})",
                reason=Reason.BASE_MODEL_NOT_SERVED,
                model=version.model,
                version=version.version,
                base_model=version.base_model,
            )
        if version.chat_template_digest != text.template_digest:
            raise StateError(
                f"version {version.version} of {version.model!r} was trained with another chat template "
                f"({version.chat_template_digest[:19]}) than {base.source} has now ({text.template_digest[:19]}); "
                "train it again, or put the template back",
                reason=Reason.CHAT_TEMPLATE_CHANGED,
                model=version.model,
                version=version.version,
                base_model=version.base_model,
            )


def _trace(model: str, answers: Sequence[Finished]) -> None:
    """Tells the call's span what the engine did for it, by the engine's own times."""
    span = SPAN.get()
    span.set(
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": model,
            "gen_ai.response.finish_reasons": [answer.finish_reason.value for answer in answers],
            "gen_ai.usage.input_tokens": answers[0].prompt_tokens,
            "gen_ai.usage.output_tokens": sum(answer.completion_tokens for answer in answers),
        }
    )
    queue = min(answer.queue_seconds for answer in answers)
    first = min(answer.time_to_first_token_seconds for answer in answers)
    last = max(answer.total_seconds for answer in answers)
    span.add_phases({"engine queue": queue, "engine prompt": first - queue, "engine decode": last - first})


def _encode(asked: core.GenerationInput, base: Base, text: ChatText) -> list[int]:
    messages = with_context(asked.messages, asked.context)
    # No token stands for more characters than this; counting them first keeps a huge prompt from being encoded.
    characters = sum(len(message.content) for message in messages)
    if characters > base.context_length * 64:
        raise _too_long(characters // 64, 1, base.context_length)
    if (asked.tools or characters > base.context_length) and text.exceeds(messages, base.context_length, asked.tools):
        raise _too_long(base.context_length, 1, base.context_length)
    return text.encode_prompt(messages, asked.tools)


def _too_long(prompt_tokens: int, max_tokens: int, context_length: int) -> InvalidSpecError:
    return InvalidSpecError(
        f"the prompt has at least {prompt_tokens} tokens; with {max_tokens} more it exceeds the base's context of "
        f"{context_length}",
        reason=Reason.PROMPT_TOO_LONG,
        violations=[Violation("input.messages", "too long for the base's context together with max_tokens")],
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        context_length=context_length,
    )


async def _receive(requests: AsyncIterator[datasets_pb2.UploadDatasetRequest], spool: IO[bytes]) -> None:
    size = 0
    async for request in requests:
        if request.WhichOneof("payload") != "chunk":
            raise _invalid("metadata", "must come once")
        size += len(request.chunk)
        if size > core.MAX_UPLOAD_BYTES:
            raise InvalidSpecError(
                f"an upload holds at most {core.MAX_UPLOAD_BYTES} bytes",
                reason=Reason.DATASET_TOO_LARGE,
                limit_bytes=core.MAX_UPLOAD_BYTES,
            )
        await asyncio.to_thread(spool.write, request.chunk)
    await asyncio.to_thread(spool.seek, 0)


def _wrong_kind(field: str, dataset: core.Dataset, wanted: core.DatasetKind) -> InvalidSpecError:
    return InvalidSpecError(
        f"{field}: dataset {dataset.name!r} holds {dataset.kind}, not {wanted}",
        reason=Reason.DATASET_KIND_WRONG,
        violations=[Violation(field, f"holds {dataset.kind}, not {wanted}")],
        dataset=dataset.name,
        kind=dataset.kind,
    )


def _invalid(field: str, description: str) -> InvalidSpecError:
    return InvalidSpecError(f"{field} {description}", violations=[Violation(field, description)])
