"""Jobs as their clients see them: real workers, real events, cancelling, restarts, crashes."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import psutil
import pytest

from knowledge_engine.core import (
    Dataset,
    DatasetKind,
    GenerationSpec,
    Job,
    JobKind,
    JobState,
    StateChange,
    TrainingSpec,
    utc_now,
)
from knowledge_engine.errors import Reason, StateError
from knowledge_engine.processes import Adopted, process_identity, take_server_lock
from knowledge_engine.server.app import RunningServer, start_server
from knowledge_engine.settings import Settings
from knowledge_engine.state import RunningAttempt, State
from knowledge_engine.v1 import generation_pb2, jobs_pb2, jobs_pb2_grpc

PATIENCE = 90


async def create(channel: grpc.aio.Channel, num_conversations: int = 20, **fields: object) -> str:
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    spec = generation_pb2.GenerationSpec(num_conversations=num_conversations, **fields)  # type: ignore[arg-type]
    created = await stub.CreateGenerationJob(jobs_pb2.CreateGenerationJobRequest(spec=spec))
    return created.job.name


async def watch(channel: grpc.aio.Channel, name: str, after: int = 0) -> list[jobs_pb2.JobEvent]:
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    call = stub.WatchJob(jobs_pb2.WatchJobRequest(name=name, after_sequence=after), timeout=PATIENCE)
    return [response.event async for response in call]


async def get(channel: grpc.aio.Channel, name: str) -> jobs_pb2.Job:
    return (await jobs_pb2_grpc.JobServiceStub(channel).GetJob(jobs_pb2.GetJobRequest(name=name))).job


async def cancel(channel: grpc.aio.Channel, name: str) -> jobs_pb2.Job:
    return (await jobs_pb2_grpc.JobServiceStub(channel).CancelJob(jobs_pb2.CancelJobRequest(name=name))).job


async def until_running(channel: grpc.aio.Channel, name: str, state: State, attempt_number: int = 1) -> psutil.Process:
    """The worker of the job's attempt, once it has said that it is alive."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for attempt in state.running_attempts():
            if (f"jobs/{attempt.job.id}", attempt.job.attempt) == (name, attempt_number) and attempt.worker_pid:
                return psutil.Process(attempt.worker_pid)
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} never ran: {await get(channel, name)}")


async def gone(worker: psutil.Process) -> None:
    """Until the process is no more; reaping it is its parent's business."""
    deadline = time.monotonic() + PATIENCE
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_job_runs_and_every_watcher_sees_the_same_log(channel: grpc.aio.Channel) -> None:
    name = await create(channel)
    live = await asyncio.gather(*(watch(channel, name) for _ in range(5)))
    late = await watch(channel, name)
    assert all(events == late for events in live)
    assert [event.sequence for event in late] == list(range(1, len(late) + 1))
    assert late[-1].state_change.state == jobs_pb2.JOB_STATE_SUCCEEDED
    assert late[-2].result.generation.num_conversations == 20
    for after in (1, len(late) - 1, len(late), len(late) + 5):
        assert await watch(channel, name, after) == late[after:]
    job = await get(channel, name)
    assert job.result.generation == late[-2].result.generation
    assert job.last_sequence == len(late)
    assert job.HasField("end_time")


async def test_a_name_that_is_taken_is_refused_before_the_work(channel: grpc.aio.Channel) -> None:
    await watch(channel, await create(channel, dataset="datasets/chats"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(channel, 30, dataset="datasets/chats")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_a_negative_sequence_is_refused(channel: grpc.aio.Channel) -> None:
    name = await create(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch(channel, name, -1)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_running_job_is_cancelled_and_its_worker_gone(
    channel: grpc.aio.Channel, server: RunningServer, tmp_path: Path
) -> None:
    name = await create(channel, 100_000, dataset="datasets/never")
    worker = await until_running(channel, name, server._state)
    asked = time.monotonic()
    for _ in range(3):
        assert (await cancel(channel, name)).state in {
            jobs_pb2.JOB_STATE_CANCELLING,
            jobs_pb2.JOB_STATE_CANCELLED,
        }
    events = await watch(channel, name)
    assert events[-1].state_change.state == jobs_pb2.JOB_STATE_CANCELLED
    await gone(worker)
    assert time.monotonic() - asked < 30
    assert not list((tmp_path / "data" / "datasets").rglob("never*"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cancel(channel, await finished(channel))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def finished(channel: grpc.aio.Channel) -> str:
    name = await create(channel)
    await watch(channel, name)
    return name


async def test_a_worker_that_ignores_everything_is_killed(
    make_settings: Callable[..., Settings],
) -> None:
    async with (
        await start_server(make_settings(cancel_grace_seconds=0.5)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        name = await create(channel, 100_000)
        worker = await until_running(channel, name, server._state)
        worker.suspend()
        await cancel(channel, name)
        events = await watch(channel, name)
        assert events[-1].state_change.state == jobs_pb2.JOB_STATE_CANCELLED
        assert not worker.is_running()


async def test_a_queued_job_is_cancelled_at_once(channel: grpc.aio.Channel) -> None:
    names = [await create(channel, 100_000) for _ in range(3)]  # two run, one waits
    assert (await cancel(channel, names[2])).state == jobs_pb2.JOB_STATE_CANCELLED
    for name in names[:2]:
        await cancel(channel, name)
        assert (await watch(channel, name))[-1].state_change.state == jobs_pb2.JOB_STATE_CANCELLED


async def test_a_crashed_worker_is_replaced_and_three_crashes_end_the_job(
    channel: grpc.aio.Channel, server: RunningServer
) -> None:
    name = await create(channel, 100_000)
    for attempt in (1, 2, 3):
        worker = await until_running(channel, name, server._state, attempt)
        worker.kill()
        await gone(worker)
    events = await watch(channel, name)
    states = [event.state_change.state for event in events if event.WhichOneof("payload") == "state_change"]
    assert states == [jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING] * 3 + [jobs_pb2.JOB_STATE_FAILED]
    job = await get(channel, name)
    assert "SIGKILL" in job.error.message
    assert job.attempt == 3
    # The queue behind it goes on.
    assert (await watch(channel, await create(channel)))[-1].state_change.state == jobs_pb2.JOB_STATE_SUCCEEDED


async def test_a_restart_loses_no_job_and_no_event(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    async with (
        await start_server(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        done = await finished(channel)
        log = await watch(channel, done)
        interrupted = await create(channel, 1000)
        waiting = [await create(channel) for _ in range(3)]
        worker = await until_running(channel, interrupted, server._state)
    assert not worker.is_running()
    async with (
        await start_server(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        assert await watch(channel, done) == log
        for name in [interrupted, *waiting]:
            events = await watch(channel, name)
            assert events[-1].state_change.state == jobs_pb2.JOB_STATE_SUCCEEDED
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_a_killed_server_finds_its_live_workers_again(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings()
    process, address = await start_process(settings, tmp_path)
    async with grpc.aio.insecure_channel(address) as channel:
        name = await create(channel, 1000)
        state = State.open(settings.state_url, migrate=False)
        worker = await until_running(channel, name, state)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert worker.is_running()
    async with (
        await start_server(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        events = await watch(channel, name)
        assert events[-1].state_change.state == jobs_pb2.JOB_STATE_SUCCEEDED
        assert (await get(channel, name)).attempt == 1  # the same attempt, never doubled
    state.close()


async def test_a_worker_without_a_server_ends_by_itself(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_settings(orphan_grace_seconds=1)
    process, address = await start_process(settings, tmp_path)
    async with grpc.aio.insecure_channel(address) as channel:
        name = await create(channel, 100_000)
        state = State.open(settings.state_url, migrate=False)
        worker = await until_running(channel, name, state)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await gone(worker)
    job = state.get_job(name.removeprefix("jobs/"))
    assert job.state is JobState.QUEUED  # it kept what it had and let the job go
    state.close()
    async with (
        await start_server(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await until_running(channel, name, server._state, attempt_number=2)
        await cancel(channel, name)
        events = await watch(channel, name)
        assert events[-1].state_change.state == jobs_pb2.JOB_STATE_CANCELLED


async def start_process(settings: Settings, folder: Path) -> tuple[asyncio.subprocess.Process, str]:
    import json
    import sys

    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "knowledge_engine.server",
        env=os.environ | settings.environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=folder,
    )
    assert process.stdout
    line = await asyncio.wait_for(process.stdout.readline(), 60)
    return process, json.loads(line)["grpc_address"]


async def test_a_stale_worker_cannot_write(channel: grpc.aio.Channel, server: RunningServer) -> None:
    name = await create(channel, 100_000)
    worker = await until_running(channel, name, server._state)
    job_id = name.removeprefix("jobs/")
    worker.suspend()
    server._state.abandon_attempt(job_id, 1, "declared dead")
    worker.resume()
    await gone(worker)
    changes = [event.payload for event in server._state.events(job_id, 0, 1000)]
    assert [change.attempt for change in changes if isinstance(change, StateChange) and change.state.is_terminal] == []
    await cancel(channel, name)
    assert (await watch(channel, name))[-1].state_change.state == jobs_pb2.JOB_STATE_CANCELLED


async def test_watchers_that_leave_leave_nothing_behind(channel: grpc.aio.Channel, server: RunningServer) -> None:
    name = await create(channel, 100_000)
    stub = jobs_pb2_grpc.JobServiceStub(channel)

    async def glance() -> None:
        call: AsyncIterator[jobs_pb2.WatchJobResponse] = stub.WatchJob(jobs_pb2.WatchJobRequest(name=name))
        async for _ in call:
            break
        call.cancel()  # type: ignore[attr-defined]

    await asyncio.gather(*(glance() for _ in range(20)))
    deadline = time.monotonic() + 30
    while server._jobs._tails and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert not server._jobs._tails
    await cancel(channel, name)


async def pause(channel: grpc.aio.Channel, name: str) -> jobs_pb2.Job:
    return (await jobs_pb2_grpc.JobServiceStub(channel).PauseJob(jobs_pb2.PauseJobRequest(name=name))).job


async def resume(channel: grpc.aio.Channel, name: str) -> jobs_pb2.Job:
    return (await jobs_pb2_grpc.JobServiceStub(channel).ResumeJob(jobs_pb2.ResumeJobRequest(name=name))).job


async def until(channel: grpc.aio.Channel, name: str, state: int) -> jobs_pb2.Job:
    deadline = time.monotonic() + PATIENCE
    while (job := await get(channel, name)).state != state:
        assert time.monotonic() < deadline, job
        await asyncio.sleep(0.05)
    return job


def walked(events: list[jobs_pb2.JobEvent]) -> list[str]:
    changes = [event.state_change for event in events if event.WhichOneof("payload") == "state_change"]
    return [jobs_pb2.JobState.Name(change.state).removeprefix("JOB_STATE_") for change in changes]


async def test_a_running_job_is_paused_and_goes_on(channel: grpc.aio.Channel, server: RunningServer) -> None:
    name = await create(channel, 2000)
    worker = await until_running(channel, name, server._state)
    for _ in range(3):
        assert (await pause(channel, name)).state in {jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_PAUSED}
    paused = await until(channel, name, jobs_pb2.JOB_STATE_PAUSED)
    assert not paused.HasField("end_time")
    await gone(worker)
    assert (await resume(channel, name)).queue_position == 1
    assert walked(await watch(channel, name)) == ["QUEUED", "RUNNING", "PAUSED", "QUEUED", "RUNNING", "SUCCEEDED"]


async def test_a_paused_job_is_cancelled_and_leaves_nothing(
    channel: grpc.aio.Channel, server: RunningServer, tmp_path: Path
) -> None:
    name = await create(channel, 100_000)
    await until_running(channel, name, server._state)
    await pause(channel, name)
    await until(channel, name, jobs_pb2.JOB_STATE_PAUSED)
    kept = tmp_path / "data" / name / "checkpoints"
    kept.mkdir()
    assert (await cancel(channel, name)).state == jobs_pb2.JOB_STATE_CANCELLED
    deadline = time.monotonic() + PATIENCE
    while kept.exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_terminated_worker_is_no_crash(channel: grpc.aio.Channel, server: RunningServer) -> None:
    name = await create(channel, 3000)
    for attempt in range(1, 6):
        (await until_running(channel, name, server._state, attempt)).terminate()
    events = await watch(channel, name)
    assert walked(events)[-1] == "SUCCEEDED"
    assert (await get(channel, name)).attempt == 6
    assert any("interrupted" in event.state_change.message for event in events)


async def test_a_worker_without_a_sign_of_life_is_replaced(make_settings: Callable[..., Settings]) -> None:
    async with (
        await start_server(make_settings(lease_seconds=1)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        name = await create(channel, 3000)
        worker = await until_running(channel, name, server._state)
        worker.suspend()
        events = await watch(channel, name)
        assert walked(events) == ["QUEUED", "RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]
        assert any("no sign of life" in event.state_change.message for event in events)
        assert not worker.is_running()


async def test_a_stopping_server_also_ends_the_workers_it_adopted(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings()
    process, address = await start_process(settings, tmp_path)
    async with grpc.aio.insecure_channel(address) as channel:
        name = await create(channel, 100_000)
        state = State.open(settings.state_url, migrate=False)
        worker = await until_running(channel, name, state)
        process.kill()
        await process.wait()
    async with await start_server(settings) as server:
        deadline = time.monotonic() + PATIENCE
        while not server._jobs._workers:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    await gone(worker)
    assert state.get_job(name.removeprefix("jobs/")).state is JobState.QUEUED
    state.close()


async def test_a_repeated_request_answers_with_the_first_job(channel: grpc.aio.Channel) -> None:
    stub = jobs_pb2_grpc.JobServiceStub(channel)

    async def ask(request_id: str, **fields: object) -> str:
        spec = generation_pb2.GenerationSpec(num_conversations=20, **fields)  # type: ignore[arg-type]
        request = jobs_pb2.CreateGenerationJobRequest(spec=spec, request_id=request_id)
        return (await stub.CreateGenerationJob(request)).job.name

    names = await asyncio.gather(*(ask("one") for _ in range(50)))
    assert len(set(names)) == 1
    await watch(channel, names[0])
    assert await ask("one") == names[0]  # also once its dataset is there
    assert await ask("two") != names[0]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask("one", seed=7)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    for bad in ("x" * 256, "tab\t", "\u00e9"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_store_that_is_locked_costs_no_event(
    channel: grpc.aio.Channel, server: RunningServer, tmp_path: Path
) -> None:
    name = await create(channel, 5000)
    await until_running(channel, name, server._state)
    blocker = sqlite3.connect(tmp_path / "data" / "state.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await asyncio.sleep(4)
    blocker.execute("ROLLBACK")
    blocker.close()
    events = await watch(channel, name)
    assert walked(events) == ["QUEUED", "RUNNING", "SUCCEEDED"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


def test_a_process_is_known_by_more_than_its_pid() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = process_identity(child.pid)
    assert identity
    assert process_identity(child.pid) == identity
    assert process_identity(os.getpid()) not in {identity, None}
    child.communicate(b"\n")
    assert process_identity(child.pid) is None


async def test_the_next_server_sees_off_what_the_last_one_could_not(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings()
    state = State.open(settings.state_url)
    job = state.create_job(TrainingSpec(dataset="d", model="m"))
    state.claim_job({JobKind.TRAINING: 1})
    state.abandon_attempt(job.id, 1, "interrupted")
    kept = tmp_path / "data" / "jobs" / job.id / "checkpoints"
    kept.mkdir(parents=True)
    state.request_cancel(job.id)  # and the server died before it could clear up
    async with await start_server(settings):
        deadline = time.monotonic() + PATIENCE
        while kept.exists() or state.ended_jobs_to_see_off():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
    state.close()


async def test_a_job_of_a_worker_that_an_older_release_started_goes_on(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings(lease_seconds=1)
    state = State.open(settings.state_url)
    state.add_dataset(
        Dataset(
            name="shop",
            kind=DatasetKind.CATALOGUE,
            digest="sha256:0",
            num_rows=1,
            size_bytes=1,
            create_time=utc_now(),
        )
    )
    job = state.create_job(GenerationSpec(num_conversations=10, catalogue="shop", dataset="chats"))
    state.claim_job({JobKind.GENERATION: 1})
    with sqlite3.connect(tmp_path / "data" / "state.db") as connection:
        connection.execute("UPDATE jobs SET worker_pid = 4194000, worker_identity = NULL, beat = 0")
    connection.close()
    async with await start_server(settings):
        deadline = time.monotonic() + PATIENCE
        while state.get_job(job.id).attempt < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        state.request_cancel(job.id)
    assert any("was away" in message for message in messages(state, job.id))
    state.close()


def messages(state: State, job_id: str) -> list[str]:
    payloads = [event.payload for event in state.events(job_id, 0, 1000)]
    return [payload.message for payload in payloads if isinstance(payload, StateChange)]


def test_who_has_no_lock_touches_nothing(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_settings()
    first = take_server_lock(settings)
    with pytest.raises(StateError) as caught:
        asyncio.run(start_server(settings))
    assert caught.value.reason is Reason.SERVER_RUNNING
    assert not (tmp_path / "data" / "state.db").exists()
    os.close(first)


def test_attempts_that_nobody_has_heard_of_count_too(tmp_path: Path) -> None:
    state = State.open(f"sqlite:///{tmp_path / 'state.db'}")
    for _ in range(2):
        state.create_job(TrainingSpec(dataset="d", model="m"))
    assert state.claim_job({JobKind.TRAINING: 1})
    assert state.claim_job({JobKind.TRAINING: 1}) is None
    assert state.claim_job({JobKind.TRAINING: 2})
    state.close()


def test_the_group_of_a_stranger_is_never_killed(make_settings: Callable[..., Settings]) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    job = Job(
        id="job-1",
        kind=JobKind.GENERATION,
        state=JobState.RUNNING,
        spec=GenerationSpec(num_conversations=10),
        create_time=utc_now(),
    )
    own = process_identity(os.getpid())
    for identity in (None, "", own, f"another-boot {(process_identity(stranger.pid) or '').split()[1]}"):
        adopted = Adopted(RunningAttempt(job, 3, stranger.pid, identity))
        adopted.kill_group()
        asyncio.run(asyncio.wait_for(adopted.wait(), 10))  # it is gone, as far as we are concerned
    assert stranger.poll() is None
    Adopted(RunningAttempt(job, 3, stranger.pid, process_identity(stranger.pid))).kill_group()
    assert stranger.wait(10) == -signal.SIGKILL
    assert stranger.stdin is not None
    stranger.stdin.close()
