"""The state store: legal transitions only, numbered events, fenced writes, nothing lost over a restart."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from knowledge_engine.core import (
    LEGAL_TRANSITIONS,
    MAX_QUEUED_JOBS,
    Dataset,
    DatasetKind,
    GenerationResult,
    GenerationSpec,
    JobKind,
    JobState,
    LogLine,
    Page,
    Progress,
    ResultEvent,
    StateChange,
    TrainingSpec,
    utc_now,
)
from knowledge_engine.errors import (
    AlreadyExistsError,
    CapacityError,
    ConflictError,
    IntegrityError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    StateError,
    UpstreamError,
)
from knowledge_engine.state import State

SPEC = GenerationSpec(num_conversations=10)
RESULT = GenerationResult(
    dataset="made", digest="sha256:0", num_conversations=10, num_rejected=0, rejections={}, provider="offline"
)
KINDS = list(JobKind)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state.db'}"


@pytest.fixture
def state(url: str) -> Iterator[State]:
    state = State.open(url)
    yield state
    state.close()


def states(state: State, job_id: str) -> list[JobState]:
    payloads = [event.payload for event in state.events(job_id, 0, 1000)]
    return [payload.state for payload in payloads if isinstance(payload, StateChange)]


def claim(state: State) -> tuple[str, int]:
    job = state.claim_job(KINDS)
    assert job is not None
    return job.id, job.attempt


def test_a_job_lives_from_queued_to_succeeded(state: State) -> None:
    created = state.create_job(SPEC, creator="advisory")
    job_id, attempt = claim(state)
    assert job_id == created.id
    state.append_events(job_id, attempt, [LogLine(message="hello"), Progress(phase="generating", step=3)])
    done = state.finish_attempt(job_id, attempt, RESULT)
    assert (done.state, done.result, done.creator) == (JobState.SUCCEEDED, RESULT, "advisory")
    assert done.progress is not None
    assert done.progress.step == 3
    assert done.start_time is not None
    assert done.end_time is not None
    events = state.events(job_id, 0, 1000)
    assert [event.sequence for event in events] == list(range(1, 7))
    assert [event.is_last for event in events] == [False] * 5 + [True]
    assert isinstance(events[-2].payload, ResultEvent)
    assert done.last_sequence == 6


def test_progress_keeps_the_figures_of_the_training(state: State) -> None:
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    state.append_events(job_id, attempt, [Progress(phase="training", step=5, total_steps=5, loss=1.5, epoch=2.0)])
    state.append_events(job_id, attempt, [Progress(phase="publishing")])
    assert state.get_job(job_id).progress == Progress(phase="publishing", loss=1.5, epoch=2.0)


def test_events_are_read_from_any_sequence(state: State) -> None:
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    state.append_events(job_id, attempt, [LogLine(message=str(i)) for i in range(10)])
    whole = state.events(job_id, 0, 1000)
    for after in range(len(whole) + 2):
        assert state.events(job_id, after, 1000) == whole[after:]
    assert state.events(job_id, 3, 2) == whole[3:5]


def test_every_event_and_job_survives_a_restart(url: str) -> None:
    first = State.open(url)
    first.create_job(TrainingSpec(dataset="d", model="m", learning_rate=1e-3))
    job_id, attempt = claim(first)
    first.append_events(job_id, attempt, [Progress(phase="training", loss=1.5)])
    job, events = first.get_job(job_id), first.events(job_id, 0, 1000)
    first.close()
    second = State.open(url)
    assert second.get_job(job_id) == job
    assert second.events(job_id, 0, 1000) == events
    second.close()


def test_a_stale_attempt_is_refused_everywhere(state: State) -> None:
    state.create_job(SPEC)
    job_id, old = claim(state)
    state.abandon_attempt(job_id, old, "interrupted")
    assert claim(state) == (job_id, old + 1)
    for write in (
        lambda: state.append_events(job_id, old, [LogLine(message="late")]),
        lambda: state.beat(job_id, old, 1, "me"),
        lambda: state.orders(job_id, old),
        lambda: state.finish_attempt(job_id, old, RESULT),
        lambda: state.abandon_attempt(job_id, old, "again"),
        lambda: state.bury_attempt(job_id, old, "gone", 3, Reason.WORKER_CRASHED),
    ):
        with pytest.raises(ConflictError) as caught:
            write()
        assert caught.value.reason is Reason.ATTEMPT_SUPERSEDED
    assert states(state, job_id) == [JobState.QUEUED, JobState.RUNNING, JobState.QUEUED, JobState.RUNNING]


def test_cancelling_is_idempotent_and_ends_in_cancelled(state: State) -> None:
    queued = state.create_job(SPEC).id
    assert {state.request_cancel(queued).state for _ in range(3)} == {JobState.CANCELLED}
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    assert {state.request_cancel(job_id).state for _ in range(3)} == {JobState.CANCELLING}
    # It finished in the same moment: whoever cancelled was told first.
    assert state.finish_attempt(job_id, attempt, RESULT).state is JobState.CANCELLED
    assert state.request_cancel(job_id).state is JobState.CANCELLED
    assert states(state, job_id) == [JobState.QUEUED, JobState.RUNNING, JobState.CANCELLING, JobState.CANCELLED]


def test_an_ended_job_cannot_be_cancelled(state: State) -> None:
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    failed = state.finish_attempt(job_id, attempt, KnowledgeEngineError("boom", reason=Reason.NON_FINITE, step=7))
    assert failed.error is not None
    assert failed.error["reason"] == "NON_FINITE"
    with pytest.raises(StateError) as caught:
        state.request_cancel(job_id)
    assert caught.value.reason is Reason.JOB_ENDED


def test_only_legal_transitions_are_ever_recorded(state: State) -> None:
    for ending in ("finish", "fail", "cancel", "requeue"):
        state.create_job(SPEC)
        job_id, attempt = claim(state)
        if ending == "cancel":
            state.request_cancel(job_id)
        if ending == "requeue":
            state.abandon_attempt(job_id, attempt, "")
            state.request_cancel(job_id)
        else:
            outcome = KnowledgeEngineError("no") if ending == "fail" else RESULT
            state.finish_attempt(job_id, attempt, outcome)
        walked = states(state, job_id)
        assert all(after in LEGAL_TRANSITIONS[before] for before, after in pairwise(walked))
        assert walked[-1].is_terminal


def test_an_attempt_is_claimed_once_by_many(state: State) -> None:
    ids = {state.create_job(SPEC).id for _ in range(20)}
    with ThreadPoolExecutor(8) as pool:
        claimed = [job.id for job in pool.map(lambda _: state.claim_job(KINDS), range(30)) if job]
    assert sorted(claimed) == sorted(ids)


def test_jobs_are_claimed_in_order_and_by_kind(state: State) -> None:
    first = state.create_job(TrainingSpec(dataset="d", model="m")).id
    second = state.create_job(SPEC).id
    assert state.claim_job([]) is None
    assert claim_of(state, JobKind.GENERATION) == second
    assert claim_of(state, JobKind.TRAINING) == first


def claim_of(state: State, kind: JobKind) -> str:
    job = state.claim_job([kind])
    assert job is not None
    return job.id


def test_the_queue_is_bounded(state: State) -> None:
    for _ in range(MAX_QUEUED_JOBS):
        state.create_job(SPEC)
    with pytest.raises(CapacityError) as caught:
        state.create_job(SPEC)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_seconds


def test_jobs_are_paged_newest_first(state: State) -> None:
    ids = [state.create_job(SPEC).id for _ in range(7)]
    seen: list[str] = []
    after: str | None = None
    while True:
        jobs, after = state.list_jobs(Page(3, after))
        seen += [job.id for job in jobs]
        if after is None:
            break
    assert seen == ids[::-1]


def test_an_unknown_job_is_not_found(state: State) -> None:
    with pytest.raises(NotFoundError) as caught:
        state.get_job("job-none")
    assert caught.value.reason is Reason.JOB_NOT_FOUND
    assert caught.value.metadata == {"job": "job-none"}


def test_a_dataset_name_stands_for_one_content(state: State) -> None:
    dataset = Dataset(
        name="d", kind=DatasetKind.CATALOGUE, digest="sha256:1", num_rows=1, size_bytes=2, create_time=utc_now()
    )
    assert state.add_dataset(dataset) == dataset
    assert state.add_dataset(dataset.model_copy(update={"create_time": utc_now()})) == dataset
    with pytest.raises(AlreadyExistsError):
        state.add_dataset(dataset.model_copy(update={"digest": "sha256:2"}))
    assert state.newest_dataset(DatasetKind.CATALOGUE) == dataset
    assert state.newest_dataset(DatasetKind.CONVERSATIONS) is None


def test_datasets_are_paged(state: State) -> None:
    for index in range(5):
        state.add_dataset(
            Dataset(
                name=f"d{index}",
                kind=DatasetKind.CATALOGUE,
                digest=f"sha256:{index}",
                num_rows=1,
                size_bytes=2,
                create_time=utc_now(),
            )
        )
    first, after = state.list_datasets(Page(2, None))
    second, after = state.list_datasets(Page(2, after))
    third, end = state.list_datasets(Page(2, after))
    assert [dataset.name for dataset in first + second + third] == ["d4", "d3", "d2", "d1", "d0"]
    assert end is None


def test_a_dataset_in_use_is_kept(state: State) -> None:
    state.add_dataset(
        Dataset(
            name="d", kind=DatasetKind.CONVERSATIONS, digest="sha256:1", num_rows=1, size_bytes=2, create_time=utc_now()
        )
    )
    job = state.create_job(TrainingSpec(dataset="d", model="m"))
    with pytest.raises(StateError) as caught:
        state.delete_dataset("d")
    assert caught.value.reason is Reason.DATASET_IN_USE
    state.request_cancel(job.id)
    state.delete_dataset("d")
    with pytest.raises(NotFoundError):
        state.get_dataset("d")


def test_a_newer_schema_is_refused(url: str, tmp_path: Path) -> None:
    State.open(url).close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(IntegrityError) as caught:
        State.open(url)
    assert caught.value.reason is Reason.STATE_NEWER


def test_the_migrations_make_the_tables_the_code_expects(state: State) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from knowledge_engine.state import METADATA

    with state._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_a_locked_store_is_unavailable_not_lost(state: State, url: str, tmp_path: Path) -> None:
    blocker = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    impatient = State.open(url, migrate=False, busy_timeout_seconds=0)
    with pytest.raises(UpstreamError) as caught:
        impatient.create_job(SPEC)
    assert caught.value.reason is Reason.STATE_UNAVAILABLE
    blocker.execute("ROLLBACK")
    blocker.close()
    assert impatient.create_job(SPEC).state is JobState.QUEUED
    assert len(state.list_jobs(Page(10, None))[0]) == 1
    impatient.close()
