"""The truth about jobs, their events and datasets, in the database of `database.py`.

Every method is one transaction; all of them block, so the server calls them off its event loop. A worker's writes carry
its attempt number, and one that is not the current attempt of a live job is refused (`ATTEMPT_SUPERSEDED`). Events are
numbered inside the transaction that changes the job, so the log has no gap and a terminal state is its last entry.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, TypeAdapter
from sqlalchemy.exc import DatabaseError, DataError, NotSupportedError, ProgrammingError
from sqlalchemy.exc import IntegrityError as ConstraintError

from knowledge_engine.core import (
    LEGAL_TRANSITIONS,
    MAX_QUEUED_JOBS,
    TERMINAL_STATES,
    Checkpoint,
    Dataset,
    DatasetKind,
    EventPayload,
    GenerationSpec,
    Job,
    JobEvent,
    JobKind,
    JobResult,
    JobSpec,
    JobState,
    LogLine,
    Page,
    Progress,
    ResultEvent,
    Service,
    StateChange,
    TrackerRun,
    TrainingSpec,
    utc_now,
)
from knowledge_engine.database import DATASETS, EPOCH, EVENTS, JOBS, LEASES, REQUESTS, SERVICES, open_database
from knowledge_engine.errors import (
    AlreadyExistsError,
    CapacityError,
    ConflictError,
    InvalidSpecError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    StateError,
    UpstreamError,
    Violation,
)

_UNDER_WAY = (JobState.RUNNING.value, JobState.CANCELLING.value)
_OUR_MISTAKES = (ConstraintError, DataError, NotSupportedError, ProgrammingError)

_PAYLOAD: TypeAdapter[EventPayload] = TypeAdapter(EventPayload)
_RESULT: TypeAdapter[JobResult] = TypeAdapter(JobResult)
_SPECS: dict[JobKind, type[TrainingSpec] | type[GenerationSpec]] = {
    JobKind.TRAINING: TrainingSpec,
    JobKind.GENERATION: GenerationSpec,
}


_M = TypeVar("_M", bound=BaseModel)


class Observation(NamedTuple):
    """How the latest work with an outside service went; an empty `trouble` means well."""

    trouble: str
    update_time: datetime


class RunningAttempt(NamedTuple):
    """The current attempt of a RUNNING or CANCELLING job. `beat` grows for as long as its worker lives; pid and
    identity are None until its first beat."""

    job: Job
    beat: int
    worker_pid: int | None
    worker_identity: str | None


class Orders(NamedTuple):
    """What a running attempt should know: its state is RUNNING or CANCELLING."""

    state: JobState
    pause_requested: bool


class Request(NamedTuple):
    """What makes a call safe to repeat: its caller's id for it, and a digest of what was asked."""

    id: str
    digest: str


class State:
    """Open with `State.open`; safe to share between threads, never to inherit over a fork."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str, *, migrate: bool = True, busy_timeout_seconds: float = 10) -> State:
        """Opens the store and, unless told otherwise, brings its schema up to date. A write waits for another one's
        lock up to `busy_timeout_seconds`.

        Raises:
            IntegrityError: STATE_NEWER when a newer release wrote it.
            InvalidSpecError: SETTINGS_INVALID for a folder on a network file system.
        """
        engine = open_database(url, migrate=migrate, busy_timeout_seconds=busy_timeout_seconds)
        return cls(engine)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._translated(), self._engine.connect() as connection:
            connection = connection.execution_options(write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            if isinstance(error, _OUR_MISTAKES):
                raise
            raise UpstreamError(
                "the state store does not answer, or is damaged", reason=Reason.STATE_UNAVAILABLE, retry_after_seconds=2
            ) from error

    # --- jobs, seen from outside ----------------------------------------------------------------------------------

    def create_job(
        self, spec: JobSpec, creator: str = "", request: Request | None = None, memory_bytes: int | None = None
    ) -> Job:
        """Stores a QUEUED job and its first event; a repeated request answers with the job of the first.

        `memory_bytes` is what its worker is expected to take of its device, None where that is not known.

        Raises:
            CapacityError: QUEUE_FULL.
            AlreadyExistsError: REQUEST_ID_REUSED.
        """
        kind = JobKind.TRAINING if isinstance(spec, TrainingSpec) else JobKind.GENERATION
        job = Job(id=_new_job_id(), kind=kind, state=JobState.QUEUED, spec=spec, create_time=utc_now(), creator=creator)
        with self._write() as connection:
            if request is not None and (known := _find_request(connection, creator, request)):
                return known
            queued = connection.scalar(
                sa.select(sa.func.count()).select_from(JOBS).where(JOBS.c.state == JobState.QUEUED)
            )
            if (queued or 0) >= MAX_QUEUED_JOBS:
                raise CapacityError(
                    f"{MAX_QUEUED_JOBS} jobs are waiting already",
                    reason=Reason.QUEUE_FULL,
                    retry_after_seconds=60,
                    limit=MAX_QUEUED_JOBS,
                )
            connection.execute(
                JOBS.insert().values(
                    id=job.id,
                    kind=kind.value,
                    state=job.state.value,
                    spec=spec.model_dump_json(),
                    create_time=job.create_time,
                    queue_time=_next_queue_time(connection),
                    creator=creator,
                    memory_bytes=memory_bytes,
                )
            )
            if request is not None:
                values = {"creator": creator, "request_id": request.id, "digest": request.digest, "job_id": job.id}
                connection.execute(REQUESTS.insert().values(values))
            _append(connection, job.id, [StateChange(state=JobState.QUEUED)])
            return _shown(connection, job.id)

    def find_request(self, creator: str, request: Request) -> Job | None:
        """The job that this request has made already.

        Raises:
            AlreadyExistsError: REQUEST_ID_REUSED, it asked for something else.
        """
        with self._read() as connection:
            return _find_request(connection, creator, request)

    def get_job(self, job_id: str) -> Job:
        """Raises NotFoundError: JOB_NOT_FOUND."""
        with self._read() as connection:
            return _shown(connection, job_id)

    def list_jobs(self, page: Page) -> tuple[list[Job], str | None]:
        """Newest first; job ids sort by creation."""
        query = sa.select(JOBS).order_by(JOBS.c.id.desc()).limit(page.size + 1)
        if page.after is not None:
            query = query.where(JOBS.c.id < page.after)
        with self._read() as connection:
            jobs = [_to_job(row) for row in connection.execute(query)]
            places = {} if not any(job.state is JobState.QUEUED for job in jobs) else _places(connection)
        jobs = [job.model_copy(update={"queue_position": places.get(job.id)}) for job in jobs]
        return jobs[: page.size], jobs[page.size - 1].id if len(jobs) > page.size else None

    def request_cancel(self, job_id: str) -> Job:
        """QUEUED and PAUSED become CANCELLED, RUNNING becomes CANCELLING; repeating it changes nothing.

        Raises:
            NotFoundError: JOB_NOT_FOUND.
            StateError: JOB_ENDED, when it ended otherwise.
        """
        with self._write() as connection:
            job = _get_job(connection, job_id)
            if job.state in {JobState.CANCELLING, JobState.CANCELLED}:
                return job
            _demand_live(job)
            target = JobState.CANCELLING if job.state is JobState.RUNNING else JobState.CANCELLED
            _transition(connection, job, target, message="cancelled on request")
            return _get_job(connection, job_id)

    def request_pause(self, job_id: str) -> Job:
        """QUEUED becomes PAUSED, RUNNING is asked to become so; repeating it changes nothing.

        Raises:
            NotFoundError: JOB_NOT_FOUND.
            StateError: JOB_ENDED, also while it is being cancelled.
        """
        with self._write() as connection:
            job = _get_job(connection, job_id)
            _demand_live(job)
            if job.state is JobState.QUEUED:
                _transition(connection, job, JobState.PAUSED, message="paused on request")
            if job.state is JobState.RUNNING and not job.pause_requested:
                connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(pause_requested=True))
                _append(connection, job_id, [LogLine(message="asked to pause")])
            return _shown(connection, job_id)

    def request_resume(self, job_id: str) -> Job:
        """PAUSED becomes QUEUED, behind those that wait; a job that was only asked to pause goes on. Others stay.

        Raises:
            NotFoundError: JOB_NOT_FOUND.
            StateError: JOB_ENDED, also while it is being cancelled.
        """
        with self._write() as connection:
            job = _get_job(connection, job_id)
            _demand_live(job)
            if job.state is JobState.PAUSED:
                values = {"queue_time": _next_queue_time(connection), "crashes": 0}
                connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(values))
                _transition(connection, job, JobState.QUEUED, message="resumed on request")
            if job.pause_requested:
                connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(pause_requested=False))
                _append(connection, job_id, [LogLine(message="asked to go on")])
            return _shown(connection, job_id)

    def events(self, job_id: str, after: int, limit: int) -> list[JobEvent]:
        """The next events after a sequence number, in order."""
        query = (
            sa.select(EVENTS)
            .where(EVENTS.c.job_id == job_id, EVENTS.c.sequence > after)
            .order_by(EVENTS.c.sequence)
            .limit(limit)
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
        return [
            JobEvent(
                job_id=row.job_id,
                sequence=row.sequence,
                create_time=row.create_time,
                payload=_PAYLOAD.validate_json(row.payload),
            )
            for row in rows
        ]

    # --- jobs, seen from the dispatcher ---------------------------------------------------------------------------

    def claim_job(self, limits: Mapping[JobKind, int], memory_bytes: int | None = None) -> Job | None:
        """Starts the next attempt of the job whose turn it is, of a kind that has fewer under way than its limit.

        A job that does not fit beside what is held of `memory_bytes` waits, and those of its kind behind it; beside no
        other job it starts in any case, for its worker looks again at what the engine holds.
        """
        with self._read() as connection:  # as a rule nothing waits, and then nobody needs the lock
            if not any(_startable(connection, limits, memory_bytes)):
                return None
        with self._write() as connection:
            turn = next(_startable(connection, limits, memory_bytes), None)
            if turn is None:
                return None
            job = _get_job(connection, turn.id)
            connection.execute(
                JOBS.update()
                .where(JOBS.c.id == job.id)
                .values(
                    attempt=job.attempt + 1,
                    start_time=job.start_time or max(utc_now(), job.create_time),
                    worker_pid=None,
                    worker_identity=None,
                    beat=0,
                )
            )
            _transition(connection, _get_job(connection, job.id), JobState.RUNNING)
            return _get_job(connection, job.id)

    def running_attempts(self) -> list[RunningAttempt]:
        """Every attempt that is under way, or was when its process died."""
        query = sa.select(JOBS).where(JOBS.c.state.in_(_UNDER_WAY)).order_by(JOBS.c.id)
        with self._read() as connection:
            rows = connection.execute(query).all()
        return [RunningAttempt(_to_job(row), row.beat, row.worker_pid, row.worker_identity) for row in rows]

    def abandon_attempt(self, job_id: str, attempt: int, message: str) -> Job:
        """Ends an attempt whose work is to go on later: CANCELLING becomes CANCELLED, RUNNING becomes PAUSED where that
        was asked for and else QUEUED.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED, when the attempt has ended already.
        """
        with self._write() as connection:
            _abandon(connection, _get_attempt(connection, job_id, attempt), message)
            return _shown(connection, job_id)

    def bury_attempt(self, job_id: str, attempt: int, how: str, max_crashes: int, reason: Reason) -> Job:
        """Ends an attempt whose process is gone without a word: as `abandon_attempt`, but FAILED with `reason` when it
        is the last of `max_crashes` crashes without a checkpoint between them.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED, when the attempt has ended already.
        """
        with self._write() as connection:
            job = _get_attempt(connection, job_id, attempt)
            crashes = 1 + (connection.scalar(sa.select(JOBS.c.crashes).where(JOBS.c.id == job_id)) or 0)
            connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(crashes=crashes))
            message = f"attempt {attempt} crashed: {how}"
            if crashes < max_crashes or job.state is JobState.CANCELLING:
                _abandon(connection, job, message)
            else:
                error = KnowledgeEngineError(
                    f"{max_crashes} attempts crashed; the last: {how}", reason=reason, job=job_id
                )
                _transition(connection, job, JobState.FAILED, message=message, error=error)
            return _shown(connection, job_id)

    def ended_jobs_to_see_off(self) -> list[Job]:
        """Jobs that have ended after an attempt, and of which something may be left."""
        query = sa.select(JOBS).where(JOBS.c.is_seen_off.is_(False)).order_by(JOBS.c.id)
        with self._read() as connection:
            return [_to_job(row) for row in connection.execute(query)]

    def set_seen_off(self, job_id: str) -> None:
        """Nothing is left of an ended job that somebody should clear away, and its tracker knows of its end."""
        with self._write() as connection:
            connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(is_seen_off=True))

    # --- memory held by others than jobs --------------------------------------------------------------------------

    def hold_memory(self, holder: str, device: str, size_bytes: int) -> None:
        """Says what `holder` has taken of a device, and that it still lives."""
        values = {"device": device, "size_bytes": size_bytes}
        with self._write() as connection:
            updated = connection.execute(
                LEASES.update().where(LEASES.c.holder == holder).values(**values, beat=LEASES.c.beat + 1)
            )
            if not updated.rowcount:
                connection.execute(LEASES.insert().values(holder=holder, beat=0, **values))

    def release_memory(self, holder: str) -> None:
        """What `holder` had taken is free again."""
        with self._write() as connection:
            connection.execute(LEASES.delete().where(LEASES.c.holder == holder))

    def lease_beats(self) -> dict[str, int]:
        """The signs of life of all holders."""
        with self._read() as connection:
            return {row.holder: row.beat for row in connection.execute(sa.select(LEASES))}

    def held_memory(self) -> dict[str, int]:
        """Bytes by holder: `engine` and the like, and `jobs/{job}` for every job under way."""
        with self._read() as connection:
            return _held(connection)

    # --- jobs, seen from a worker: every write is fenced by the attempt number ------------------------------------

    def beat(self, job_id: str, attempt: int, pid: int, identity: str) -> Orders:
        """Says that the attempt is alive, and who runs it.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED.
        """
        with self._write() as connection:
            job = _get_attempt(connection, job_id, attempt)
            connection.execute(
                JOBS.update()
                .where(JOBS.c.id == job_id)
                .values(beat=JOBS.c.beat + 1, worker_pid=pid, worker_identity=identity)
            )
            return Orders(job.state, job.pause_requested)

    def expect_memory(self, job_id: str, attempt: int, memory_bytes: int) -> None:
        """Says what the job's worker will take of its device, once that is known better.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED.
        """
        with self._write() as connection:
            _get_attempt(connection, job_id, attempt)
            connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(memory_bytes=memory_bytes))

    def orders(self, job_id: str, attempt: int) -> Orders:
        """Raises ConflictError: ATTEMPT_SUPERSEDED."""
        with self._read() as connection:
            job = _get_attempt(connection, job_id, attempt)
        return Orders(job.state, job.pause_requested)

    def demand_unlocked(self) -> None:
        """Raises UpstreamError: STATE_UNAVAILABLE, when nobody can begin to write now. It writes nothing itself."""
        with self._write() as connection:
            connection.execute(JOBS.update().where(JOBS.c.id == "").values(beat=0))

    def demand_writable(self) -> None:
        """Raises UpstreamError: STATE_UNAVAILABLE, when nothing can be written now, be it for want of room."""
        with self._write() as connection:
            connection.execute(SERVICES.insert().values(name="", trouble="", update_time=utc_now()))
            connection.execute(SERVICES.delete().where(SERVICES.c.name == ""))

    def append_events(self, job_id: str, attempt: int, payloads: Sequence[EventPayload]) -> None:
        """Adds events of a running attempt. A progress event also becomes the job's progress; a checkpoint is what the
        job goes on from, and crashes before it count no more.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED.
        """
        with self._write() as connection:
            job = _get_attempt(connection, job_id, attempt)
            _append(connection, job_id, payloads)
            values: dict[str, Any] = {}
            progress = job.progress
            for payload in payloads:
                if isinstance(payload, Progress):
                    progress = payload.over(progress)
                    values["progress"] = progress.model_dump_json()
                if isinstance(payload, Checkpoint):
                    values |= {"checkpoint_step": payload.step, "crashes": 0}
            if values:
                connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(values))

    def set_tracker_run(self, job_id: str, attempt: int, run: TrackerRun) -> None:
        """Raises ConflictError: ATTEMPT_SUPERSEDED."""
        with self._write() as connection:
            _get_attempt(connection, job_id, attempt)
            connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(tracker_run=run.model_dump_json()))

    def finish_attempt(self, job_id: str, attempt: int, outcome: JobResult | KnowledgeEngineError) -> Job:
        """Ends the job: SUCCEEDED with its result, FAILED with an error, CANCELLED when that was asked for meanwhile.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED.
        """
        with self._write() as connection:
            job = _get_attempt(connection, job_id, attempt)
            if job.state is JobState.CANCELLING:
                _transition(connection, job, JobState.CANCELLED, message="cancelled on request")
            elif isinstance(outcome, KnowledgeEngineError):
                _transition(connection, job, JobState.FAILED, message=outcome.message, error=outcome)
            else:
                _append(connection, job_id, [ResultEvent(result=outcome)])
                connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(result=outcome.model_dump_json()))
                _transition(connection, job, JobState.SUCCEEDED)
            return _get_job(connection, job_id)

    # --- outside services -----------------------------------------------------------------------------------------

    def observe_service(self, service: Service, trouble: str | None) -> None:
        """Records how the latest work with a service went."""
        values = {"trouble": trouble or "", "update_time": utc_now()}
        with self._write() as connection:
            updated = connection.execute(SERVICES.update().where(SERVICES.c.name == service.value).values(values))
            if not updated.rowcount:
                connection.execute(SERVICES.insert().values(name=service.value, **values))

    def observations(self) -> dict[Service, Observation]:
        """The latest word on each service that was worked with."""
        with self._read() as connection:
            rows = connection.execute(sa.select(SERVICES)).all()
        return {Service(row.name): Observation(row.trouble, row.update_time) for row in rows}

    # --- datasets -------------------------------------------------------------------------------------------------

    def add_dataset(self, dataset: Dataset, attempt: int | None = None) -> Dataset:
        """Records a dataset; the same content under the same name again answers with the stored one. `attempt` is
        that of its job.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED.
            AlreadyExistsError: DATASET_EXISTS, when the name stands for other content.
        """
        with self._write() as connection:
            if attempt is not None:
                _get_attempt(connection, dataset.job_id, attempt)
            row = connection.execute(sa.select(DATASETS).where(DATASETS.c.name == dataset.name)).first()
            if row is None:
                values = dataset.model_dump(mode="python")
                values |= {"kind": dataset.kind.value, "parents": json.dumps(dataset.parents)}
                connection.execute(DATASETS.insert().values(values))
                return dataset
            stored = _to_dataset(row)
        if (stored.digest, stored.kind) != (dataset.digest, dataset.kind):
            raise AlreadyExistsError(
                f"dataset {dataset.name!r} holds other content; a dataset never changes, choose another name",
                reason=Reason.DATASET_EXISTS,
                dataset=dataset.name,
            )
        return stored

    def get_dataset(self, name: str) -> Dataset:
        """Raises NotFoundError: DATASET_NOT_FOUND."""
        with self._read() as connection:
            row = connection.execute(sa.select(DATASETS).where(DATASETS.c.name == name)).first()
        if row is None:
            raise NotFoundError(f"no dataset {name!r}", reason=Reason.DATASET_NOT_FOUND, dataset=name)
        return _to_dataset(row)

    def list_datasets(self, page: Page) -> tuple[list[Dataset], str | None]:
        """Newest first."""
        query = sa.select(DATASETS).order_by(DATASETS.c.create_time.desc(), DATASETS.c.name).limit(page.size + 1)
        if page.after is not None:
            micros, _, name = page.after.partition(" ")
            if not micros.isdecimal():
                raise InvalidSpecError("page_token is not one of ours", reason=Reason.PAGE_TOKEN_INVALID)
            at = datetime.fromtimestamp(int(micros) / 1_000_000, UTC)
            query = query.where(
                sa.or_(DATASETS.c.create_time < at, sa.and_(DATASETS.c.create_time == at, DATASETS.c.name > name))
            )
        with self._read() as connection:
            datasets = [_to_dataset(row) for row in connection.execute(query)]
        if len(datasets) <= page.size:
            return datasets, None
        last = datasets[page.size - 1]
        return datasets[: page.size], f"{int((last.create_time - EPOCH).total_seconds() * 1_000_000)} {last.name}"

    def newest_dataset(self, kind: DatasetKind) -> Dataset | None:
        query = sa.select(DATASETS).where(DATASETS.c.kind == kind.value)
        query = query.order_by(DATASETS.c.create_time.desc()).limit(1)
        with self._read() as connection:
            row = connection.execute(query).first()
        return None if row is None else _to_dataset(row)

    def delete_dataset(self, name: str) -> Dataset:
        """Forgets a dataset.

        Raises:
            NotFoundError: DATASET_NOT_FOUND.
            StateError: DATASET_IN_USE, while an unfinished job reads or writes it.
        """
        with self._write() as connection:
            row = connection.execute(sa.select(DATASETS).where(DATASETS.c.name == name)).first()
            if row is None:
                raise NotFoundError(f"no dataset {name!r}", reason=Reason.DATASET_NOT_FOUND, dataset=name)
            live = sa.select(JOBS).where(JOBS.c.state.not_in([state.value for state in TERMINAL_STATES]))
            for job in map(_to_job, connection.execute(live)):
                if name in _datasets_of(job.spec):
                    raise StateError(
                        f"job {job.id} is using dataset {name!r}",
                        reason=Reason.DATASET_IN_USE,
                        dataset=name,
                        job=job.id,
                    )
            connection.execute(DATASETS.delete().where(DATASETS.c.name == name))
            return _to_dataset(row)


# --- inside one transaction ---------------------------------------------------------------------------------------


def _get_job(connection: sa.Connection, job_id: str) -> Job:
    row = connection.execute(sa.select(JOBS).where(JOBS.c.id == job_id).with_for_update()).first()
    if row is None:
        raise NotFoundError(f"no job {job_id!r}", reason=Reason.JOB_NOT_FOUND, job=job_id)
    return _to_job(row)


def _shown(connection: sa.Connection, job_id: str) -> Job:
    """The job with its place in the queue."""
    job = _get_job(connection, job_id)
    if job.state is not JobState.QUEUED:
        return job
    return job.model_copy(update={"queue_position": _places(connection).get(job_id)})


def _queue(connection: sa.Connection, kind: JobKind) -> list[sa.Row[Any]]:
    """The waiting jobs of a kind, next first: callers take turns, and each caller's jobs go in the order they came.
    What a caller has running counts as its turn."""
    live = sa.select(JOBS).where(JOBS.c.kind == kind.value, JOBS.c.state.in_([JobState.QUEUED.value, *_UNDER_WAY]))
    turns: Counter[str] = Counter()
    waiting: list[sa.Row[Any]] = []
    for row in connection.execute(live.order_by(JOBS.c.queue_time, JOBS.c.id)):
        if row.state == JobState.QUEUED:
            waiting.append(row)
        else:
            turns[row.creator] += 1
    places: list[tuple[int, int]] = []
    for order, row in enumerate(waiting):
        places.append((turns[row.creator], order))
        turns[row.creator] += 1
    return [waiting[order] for _, order in sorted(places)]


def _next_queue_time(connection: sa.Connection) -> datetime:
    """Now, or just behind the last one who came, should the clock have been set back."""
    last = connection.scalar(sa.select(sa.func.max(JOBS.c.queue_time)))
    return utc_now() if last is None else max(utc_now(), last + timedelta(microseconds=1))


def _startable(
    connection: sa.Connection, limits: Mapping[JobKind, int], memory_bytes: int | None
) -> Iterator[sa.Row[Any]]:
    """Of each kind with room the job whose turn it is, where it fits."""
    for kind, limit in limits.items():
        of_kind = sa.select(sa.func.count()).select_from(JOBS).where(JOBS.c.kind == kind.value)
        under_way = connection.scalar(of_kind.where(JOBS.c.state.in_(_UNDER_WAY))) or 0
        if under_way >= limit or not connection.scalar(of_kind.where(JOBS.c.state == JobState.QUEUED)):
            continue
        turn = _queue(connection, kind)
        if _fits(connection, turn[0], memory_bytes):
            yield turn[0]


def _places(connection: sa.Connection) -> dict[str, int]:
    """By job, from 1."""
    return {row.id: place for kind in JobKind for place, row in enumerate(_queue(connection, kind), 1)}


def _held(connection: sa.Connection) -> dict[str, int]:
    held = {row.holder: row.size_bytes for row in connection.execute(sa.select(LEASES))}
    running = sa.select(JOBS).where(JOBS.c.state.in_(_UNDER_WAY), JOBS.c.memory_bytes.is_not(None))
    return held | {f"jobs/{row.id}": row.memory_bytes for row in connection.execute(running)}


def _fits(connection: sa.Connection, row: sa.Row[Any], memory_bytes: int | None) -> bool:
    if row.memory_bytes is None or memory_bytes is None:
        return True
    others = sa.select(sa.func.count()).select_from(JOBS).where(JOBS.c.kind == row.kind, JOBS.c.state.in_(_UNDER_WAY))
    return not connection.scalar(others) or row.memory_bytes + sum(_held(connection).values()) <= memory_bytes


def _find_request(connection: sa.Connection, creator: str, request: Request) -> Job | None:
    query = sa.select(REQUESTS).where(REQUESTS.c.creator == creator, REQUESTS.c.request_id == request.id)
    row = connection.execute(query).first()
    if row is None:
        return None
    if row.digest != request.digest:
        raise AlreadyExistsError(
            f"this request id made job {row.job_id}, which was asked for something else; take a new id",
            reason=Reason.REQUEST_ID_REUSED,
            violations=[Violation("request_id", "was used with another spec")],
            job=row.job_id,
        )
    return _shown(connection, row.job_id)


def _demand_live(job: Job) -> None:
    """Raises StateError: JOB_ENDED."""
    if job.state.is_terminal or job.state is JobState.CANCELLING:
        how = f"has ended: {job.state}" if job.state.is_terminal else "is being cancelled"
        raise StateError(f"job {job.id} {how}", reason=Reason.JOB_ENDED, job=job.id, state=job.state)


def _abandon(connection: sa.Connection, job: Job, message: str) -> None:
    if job.state is JobState.CANCELLING:
        _transition(connection, job, JobState.CANCELLED, message="cancelled on request")
    elif job.pause_requested:
        _transition(connection, job, JobState.PAUSED, message=message)
    else:
        _transition(connection, job, JobState.QUEUED, message=message)


def _get_attempt(connection: sa.Connection, job_id: str, attempt: int) -> Job:
    job = _get_job(connection, job_id)
    if job.attempt != attempt or job.state not in {JobState.RUNNING, JobState.CANCELLING}:
        raise ConflictError(
            f"attempt {attempt} of job {job_id} is over",
            reason=Reason.ATTEMPT_SUPERSEDED,
            job=job_id,
            attempt=attempt,
        )
    return job


def _transition(
    connection: sa.Connection,
    job: Job,
    target: JobState,
    *,
    message: str = "",
    error: KnowledgeEngineError | None = None,
) -> None:
    if target not in LEGAL_TRANSITIONS[job.state]:
        raise AssertionError(f"{job.state} -> {target} is no legal transition")
    details = None if error is None else error.to_dict()
    values: dict[str, Any] = {"state": target.value, "pause_requested": False}
    if target.is_terminal:
        # The clock of whoever says so may be behind that of whoever began it; nothing lasts less than no time.
        values |= {
            "end_time": max(utc_now(), job.start_time or job.create_time),
            "error": details and json.dumps(details),
            "is_seen_off": not job.attempt,
        }
    connection.execute(JOBS.update().where(JOBS.c.id == job.id).values(values))
    _append(connection, job.id, [StateChange(state=target, attempt=job.attempt, message=message, error=details)])


def _append(connection: sa.Connection, job_id: str, payloads: Sequence[EventPayload]) -> None:
    last = connection.scalar(sa.select(JOBS.c.last_sequence).where(JOBS.c.id == job_id)) or 0
    now = utc_now()
    connection.execute(
        EVENTS.insert(),
        [
            {"job_id": job_id, "sequence": sequence, "create_time": now, "payload": payload.model_dump_json()}
            for sequence, payload in enumerate(payloads, last + 1)
        ],
    )
    connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(last_sequence=last + len(payloads)))


def _datasets_of(spec: JobSpec) -> set[str | None]:
    return {spec.dataset, spec.eval_dataset if isinstance(spec, TrainingSpec) else spec.catalogue}


def _to_job(row: sa.Row[Any]) -> Job:
    kind = JobKind(row.kind)
    return Job(
        id=row.id,
        kind=kind,
        state=JobState(row.state),
        spec=_SPECS[kind].model_validate_json(row.spec),
        result=_RESULT.validate_json(row.result) if row.result else None,
        error=json.loads(row.error) if row.error else None,
        progress=_parsed(Progress, row.progress),
        create_time=row.create_time,
        start_time=row.start_time,
        end_time=row.end_time,
        attempt=row.attempt,
        creator=row.creator,
        tracker_run=_parsed(TrackerRun, row.tracker_run),
        last_sequence=row.last_sequence,
        pause_requested=row.pause_requested,
        checkpoint_step=row.checkpoint_step,
    )


def _parsed(model: type[_M], text: str | None) -> _M | None:
    return model.model_validate_json(text) if text else None


def _to_dataset(row: sa.Row[Any]) -> Dataset:
    values = dict(row._mapping)
    return Dataset(**values | {"parents": tuple(json.loads(values["parents"]))})


def _new_job_id() -> str:
    """Sorts by creation: 12 hex digits of microseconds since 1970, then 8 random ones."""
    return f"job-{time.time_ns() // 1000:013x}{secrets.token_hex(4)}"
