"""The state store: legal transitions only, numbered events, fenced writes, nothing lost over a restart."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from knowledge_engine.core import (
    LEGAL_TRANSITIONS,
    MAX_QUEUED_JOBS,
    Checkpoint,
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
from knowledge_engine.files import file_system_of
from knowledge_engine.state import Request, State

SPEC = GenerationSpec(num_conversations=10)
RESULT = GenerationResult(
    dataset="made", digest="sha256:0", num_conversations=10, num_rejected=0, rejections={}, provider="offline"
)
KINDS = dict.fromkeys(JobKind, 99)


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
    assert state.claim_job({}) is None
    assert claim_of(state, JobKind.GENERATION) == second
    assert claim_of(state, JobKind.TRAINING) == first


def claim_of(state: State, kind: JobKind) -> str:
    job = state.claim_job({kind: 9})
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

    from knowledge_engine.database import METADATA

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


# --- pausing ------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_takes_no_writes_and_still_locks(state: State, tmp_path: Path) -> None:
    state.create_job(SPEC)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "state.db-wal").stat().st_size, hard))
    try:
        state.demand_unlocked()
        with pytest.raises(UpstreamError):
            state.demand_writable()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    state.demand_writable()
    assert state.observations() == {}


def test_a_waiting_job_is_paused_at_once_and_goes_on_behind_the_others(state: State) -> None:
    first, second = state.create_job(SPEC).id, state.create_job(SPEC).id
    assert {state.request_pause(first).state for _ in range(3)} == {JobState.PAUSED}
    assert state.get_job(first).end_time is None
    assert {state.request_resume(first).state for _ in range(3)} == {JobState.QUEUED}
    assert [claim(state)[0] for _ in range(2)] == [second, first]


def test_a_running_job_pauses_when_its_worker_lets_go(state: State) -> None:
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    asked = [state.request_pause(job_id) for _ in range(3)]
    assert {(job.state, job.pause_requested) for job in asked} == {(JobState.RUNNING, True)}
    assert state.orders(job_id, attempt) == (JobState.RUNNING, True)
    paused = state.abandon_attempt(job_id, attempt, "paused on request")
    assert (paused.state, paused.pause_requested) == (JobState.PAUSED, False)
    assert state.claim_job(KINDS) is None
    with pytest.raises(ConflictError):
        state.finish_attempt(job_id, attempt, RESULT)
    state.request_resume(job_id)
    assert claim(state) == (job_id, attempt + 1)


def test_whoever_asks_to_pause_may_think_better_of_it(state: State) -> None:
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    state.request_pause(job_id)
    assert state.request_resume(job_id).pause_requested is False
    assert state.orders(job_id, attempt) == (JobState.RUNNING, False)
    assert state.abandon_attempt(job_id, attempt, "interrupted").state is JobState.QUEUED


def test_a_job_that_was_to_pause_is_paused_by_a_crash_too(state: State) -> None:
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    state.request_pause(job_id)
    assert state.bury_attempt(job_id, attempt, "SIGKILL", 3, Reason.WORKER_CRASHED).state is JobState.PAUSED


def test_a_paused_job_is_cancelled_at_once(state: State) -> None:
    job_id = state.create_job(SPEC).id
    state.request_pause(job_id)
    cancelled = state.request_cancel(job_id)
    assert cancelled.state is JobState.CANCELLED
    assert cancelled.end_time


@pytest.mark.parametrize("verb", ["request_pause", "request_resume"])
@pytest.mark.parametrize("end", ["cancelling", "cancelled", "succeeded", "failed"])
def test_what_has_ended_or_is_ending_neither_pauses_nor_goes_on(state: State, verb: str, end: str) -> None:
    state.create_job(SPEC)
    job_id, attempt = claim(state)
    if end.startswith("cancel"):
        state.request_cancel(job_id)
    if end != "cancelling":
        state.finish_attempt(job_id, attempt, KnowledgeEngineError("no") if end == "failed" else RESULT)
    with pytest.raises(StateError) as caught:
        getattr(state, verb)(job_id)
    assert caught.value.reason is Reason.JOB_ENDED


# --- whose turn it is ---------------------------------------------------------------------------------------------


def test_callers_take_turns_and_every_job_knows_its_place(state: State) -> None:
    eager = [state.create_job(SPEC, "eager").id for _ in range(3)]
    modest = state.create_job(SPEC, "modest").id
    order = [eager[0], modest, eager[1], eager[2]]
    assert [state.get_job(job_id).queue_position for job_id in order] == [1, 2, 3, 4]
    assert {job.id: job.queue_position for job in state.list_jobs(Page(10, None))[0]} == {
        job_id: place for place, job_id in enumerate(order, 1)
    }
    assert [claim(state)[0] for _ in order] == order
    assert state.get_job(modest).queue_position is None


def test_an_interruption_costs_no_place(state: State) -> None:
    first, second = state.create_job(SPEC).id, state.create_job(SPEC).id
    job_id, attempt = claim(state)
    assert job_id == first
    state.abandon_attempt(first, attempt, "interrupted")
    assert [state.get_job(job_id).queue_position for job_id in (first, second)] == [1, 2]


def test_a_training_waits_for_memory_and_others_do_not_overtake_it(state: State) -> None:
    training = TrainingSpec(dataset="d", model="m")
    sizes = [60, 60, 10]
    ids = [state.create_job(training, memory_bytes=size).id for size in sizes]
    generation = state.create_job(SPEC).id
    state.hold_memory("engine", "cpu", 30)
    assert claim_with(state, 100) == ids[0]
    assert state.held_memory() == {"engine": 30, f"jobs/{ids[0]}": 60}
    assert claim_with(state, 100) == generation  # needs none
    assert state.claim_job(KINDS, 100) is None
    state.finish_attempt(ids[0], 1, KnowledgeEngineError("done"))
    assert claim_with(state, 100) == ids[1]
    assert claim_with(state, 100) == ids[2]
    assert sum(state.held_memory().values()) == 100
    state.release_memory("engine")
    assert "engine" not in state.held_memory()


def test_beside_no_other_job_a_training_starts_in_any_case(state: State) -> None:
    job_id = state.create_job(TrainingSpec(dataset="d", model="m"), memory_bytes=90).id
    state.hold_memory("engine", "cpu", 30)
    state.hold_memory("engine", "cpu", 35)
    assert claim_with(state, 100) == job_id  # its worker looks again, and refuses by name


def claim_with(state: State, memory_bytes: int) -> str:
    job = state.claim_job(KINDS, memory_bytes)
    assert job is not None
    return job.id


# --- crashes ------------------------------------------------------------------------------------------------------


def test_three_crashes_without_a_checkpoint_between_them_end_a_job(state: State) -> None:
    job_id = state.create_job(SPEC).id
    for attempt in range(1, 6):
        assert claim(state) == (job_id, attempt)
        if attempt == 3:
            state.append_events(job_id, attempt, [Checkpoint(step=4, size_bytes=100)])
        buried = state.bury_attempt(job_id, attempt, "signal SIGKILL", 3, Reason.WORKER_CRASHED)
    assert buried.state is JobState.FAILED
    assert buried.checkpoint_step == 4
    assert buried.error is not None
    assert (buried.error["reason"], "SIGKILL" in buried.error["message"]) == ("WORKER_CRASHED", True)


def test_a_resumed_job_starts_with_a_clean_slate(state: State) -> None:
    job_id = state.create_job(SPEC).id
    for attempt in (1, 2):
        claim(state)
        state.bury_attempt(job_id, attempt, "gone", 3, Reason.WORKER_CRASHED)
    state.request_pause(job_id)
    state.request_resume(job_id)
    claim(state)
    assert state.bury_attempt(job_id, 3, "gone", 3, Reason.WORKER_CRASHED).state is JobState.QUEUED


# --- repeated requests --------------------------------------------------------------------------------------------


def test_many_equal_requests_make_one_job(state: State) -> None:
    request = Request("a-uuid", "digest")
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda _: state.create_job(SPEC, "shop", request), range(50)))
    assert {job.id for job in jobs} == {jobs[0].id}
    assert len(state.list_jobs(Page(100, None))[0]) == 1
    assert state.find_request("shop", request) == jobs[0]
    assert state.create_job(SPEC, "another", request).id != jobs[0].id


def test_a_request_id_stands_for_one_spec(state: State) -> None:
    made = state.create_job(SPEC, "shop", Request("id", "one"))
    for ask in (state.find_request, lambda *a: state.create_job(SPEC, *a)):
        with pytest.raises(AlreadyExistsError) as caught:
            ask("shop", Request("id", "other"))
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
        assert caught.value.metadata == {"job": made.id}


def test_a_repeated_request_is_answered_when_the_queue_is_full(state: State) -> None:
    request = Request("id", "one")
    made = state.create_job(SPEC, "shop", request)
    for _ in range(MAX_QUEUED_JOBS - 1):
        state.create_job(SPEC)
    with pytest.raises(CapacityError):
        state.create_job(SPEC, "shop", Request("refused", "one"))
    assert state.create_job(SPEC, "shop", request).id == made.id
    assert state.find_request("shop", Request("refused", "one")) is None  # what was refused is not remembered


# --- upgrades -----------------------------------------------------------------------------------------------------

RELEASED = sorted((Path(__file__).parent / "schemas").glob("*.sql"))


@pytest.fixture(params=RELEASED, ids=lambda path: path.stem)
def released(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store as a release left it, with jobs of every kind; each dump was written by that release."""
    path = tmp_path / "state.db"
    connection = sqlite3.connect(path)
    connection.executescript(request.param.read_text())
    connection.close()
    return path


def check_upgraded(path: Path) -> None:
    state = State.open(f"sqlite:///{path}")
    jobs = state.list_jobs(Page(100, None))[0][::-1]
    assert [job.state for job in jobs] == [
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.RUNNING,
        JobState.QUEUED,
        JobState.QUEUED,
    ]
    for job in jobs:
        events = state.events(job.id, 0, 1000)
        assert [event.sequence for event in events] == list(range(1, job.last_sequence + 1))
        assert events[-1].is_last == job.state.is_terminal
    assert jobs[0].result is not None
    assert jobs[1].error is not None
    assert [job.queue_position for job in jobs[4:]] == [1, 1]
    (attempt,) = state.running_attempts()
    assert (attempt.job.id, attempt.worker_identity) == (jobs[3].id, None)
    assert {claim(state)[0] for _ in range(2)} == {jobs[4].id, jobs[5].id}
    assert state.get_dataset("chats").num_rows == 3
    state.close()


def test_a_store_of_every_release_is_brought_up_to_date(released: Path) -> None:
    check_upgraded(released)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_upgrade_may_be_killed_at_any_statement(released: Path, every: int) -> None:
    code = f"from knowledge_engine.state import State; State.open('sqlite:///{released}').close()"
    for statement in range(1, 100, every):
        environment = os.environ | {"KNOWLEDGE_FAILPOINTS": f"migrate.statement=kill@{statement}"}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=60)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
        connection = sqlite3.connect(released)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
    assert statement > 5
    check_upgraded(released)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/srv/data", "ext4"), ("/srv/data/shared/a", "nfs4"), ("/", "overlay"), ("/srv/share", "ext4")],
)
def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount(folder: str, kind: str) -> None:
    class At(NamedTuple):
        mountpoint: str
        fstype: str

    mounts = [At("/", "overlay"), At("/srv", "xfs"), At("/srv", "ext4"), At("/srv/data/shared", "nfs4")]
    assert file_system_of(Path(folder), mounts) == kind
