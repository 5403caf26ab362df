"""Jobs under attack: processes killed, stopped and exchanged, the store locked, the clocks wrong. Nothing may be lost.

Leases and graces are a tenth of the defaults, see `storm.SHORTENED`. The full rounds are marked `slow`; the long
soak is `scripts/soak_jobs.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from knowledge_engine.client import Client as RealClient
from knowledge_engine.core import (
    Checkpoint,
    DatasetFormat,
    DatasetKind,
    GenerationResult,
    GenerationSpec,
    Job,
    JobKind,
    JobState,
    Page,
    Progress,
    StateChange,
    TrackerRun,
    TrainingSpec,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import ConflictError, KnowledgeEngineError, NotFoundError, Reason, UpstreamError
from knowledge_engine.processes import process_identity, server_lock_path
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.v1 import generation_pb2
from tests.history import (
    UNKNOWN,
    History,
    Watch,
    integrity,
    losses,
    remains_of,
    stored_fingerprint,
    twin_key,
    violations,
)
from tests.storm import (
    CALLERS,
    REST_SECONDS,
    Client,
    Fault,
    Report,
    ServerProcess,
    Traffic,
    fault_schedule,
    free_port,
    lock_store,
    storm_round,
    storm_settings,
    train_twins,
    training_spec,
    upload_training_data,
    workers_of,
)

PATIENCE = 60
SEED = 20260101
"""Printed with every violation; another seed is another storm."""


@asynccontextmanager
async def serving(
    settings: Settings, points: str = "", environment: dict[str, str] | None = None
) -> AsyncIterator[ServerProcess]:
    """A real server process; nothing of it, nor of its workers, outlives the test."""
    server = ServerProcess(settings, environment)
    try:
        await server.start(points)
        yield server
        await server.end()
        assert workers_of(settings) == []
        assert integrity(settings) == "ok"
    finally:
        server.send(signal.SIGCONT)
        await server.kill()
        for worker in workers_of(settings):
            with contextlib.suppress(psutil.Error):
                worker.kill()


@pytest.fixture
def settings(tmp_path: Path, tiny_base: Path) -> Settings:
    return storm_settings(tmp_path / "data", tiny_base)


@pytest.fixture
def state(settings: Settings) -> Iterator[State]:
    state = State.open(settings.state_url)
    yield state
    state.close()


def chats(number: int = 10, **fields: object) -> generation_pb2.GenerationSpec:
    return generation_pb2.GenerationSpec(num_conversations=number, **fields)  # type: ignore[arg-type]


async def eventually(holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.05)


async def followed(client: Client, job_id: str) -> None:
    await asyncio.wait_for(client.watch(Watch("test", job_id)), PATIENCE)


def judge(report: Report) -> None:
    assert not report.violations, "\n".join(map(str, report.violations))


# --- storms (A5, A7, A8) ------------------------------------------------------------------------------------------


async def test_a_storm_of_verbs_and_kills_breaks_no_promise(tmp_path: Path, tiny_base: Path) -> None:
    schedule = [
        Fault(2.5, "kill worker"),
        Fault(0.5, "kill server", points="finish.done=kill@1"),
        Fault(2.0, "stop worker", 1.0),
        Fault(0.2, "lock store", 2.5),
        Fault(0.5, "end worker"),
        Fault(1.0, "kill server"),
    ]
    traffic = Traffic(seconds=10, clients=12, generations=14, max_conversations=1000)
    report = await storm_round(tmp_path / "data", tiny_base, SEED, 1, traffic, schedule=schedule)
    judge(report)
    assert report.faults["kill server"] == 2
    assert len(report.history.calls) > 100


async def followed_by_twin(settings: Settings, history: History, faults: Callable[..., Awaitable[None]]) -> None:
    """Trains the same twice, first in peace; `faults` gets the server, a client, the store and the second job."""
    async with serving(settings, "training.step=sleep:0.2") as server, Client(history, server.address) as client:
        await upload_training_data(client)
        twin = (await client.create(training_spec("twin"))).jobs[0].job_id
        await asyncio.wait_for(client.watch(Watch("test", twin)), REST_SECONDS)
        job_id = (await client.create(training_spec("m"), "once")).jobs[0].job_id
        history.watches.append(Watch("test", job_id))
        watching = asyncio.create_task(client.watch(history.watches[-1]))
        look = State.open(settings.state_url, migrate=False)
        try:
            await faults(server, client, look, job_id)
            await asyncio.wait_for(watching, REST_SECONDS)
        finally:
            watching.cancel()
            look.close()
    history.remains = remains_of(settings)
    for job in history.remains.jobs.values():
        assert isinstance(job.spec, TrainingSpec)
        assert job.state is JobState.SUCCEEDED
    history.twins = {twin_key(history.remains.jobs[twin].spec): losses(history.remains.events[twin])}  # type: ignore[arg-type]
    judge(Report(history, violations(history)))
    assert len(losses(history.remains.events[job_id])) == 8
    assert len(history.remains.versions) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_killed_training_ends_as_if_nothing_had_happened(settings: Settings) -> None:
    async def faults(server: ServerProcess, client: Client, look: State, job_id: str) -> None:
        await eventually(lambda: (look.get_job(job_id).checkpoint_step or 0) >= 4, REST_SECONDS)
        await server.kill()
        workers_of(settings)[0].kill()
        await server.start()

    await followed_by_twin(settings, History(SEED, 2), faults)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_training_that_is_killed_paused_and_killed_again_ends_as_if_nothing_had_happened(
    settings: Settings,
) -> None:
    async def faults(server: ServerProcess, client: Client, look: State, job_id: str) -> None:
        await eventually(lambda: (look.get_job(job_id).checkpoint_step or 0) >= 2, REST_SECONDS)
        workers_of(settings)[0].kill()
        await eventually(lambda: (look.get_job(job_id).checkpoint_step or 0) >= 4, REST_SECONDS)
        await client.pause(job_id)
        await eventually(lambda: look.get_job(job_id).state is JobState.PAUSED)
        await server.kill()
        await server.start("training.step=sleep:0.2,publish.done=kill@1")
        await client.insist(lambda: client.resume(job_id))
        await eventually(lambda: look.get_job(job_id).attempt == 4, REST_SECONDS)
        await server.kill()
        await server.start()

    await followed_by_twin(settings, History(SEED, 3), faults)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_storms_with_everything(tmp_path: Path, tiny_base: Path) -> None:
    twins = await train_twins(tmp_path / "twins", tiny_base)
    for number in range(3):
        traffic = Traffic(seconds=30, trainings=2)
        judge(await storm_round(tmp_path / f"data-{number}", tiny_base, SEED, number, traffic, twins))


def test_a_seed_is_a_schedule() -> None:
    first = fault_schedule(1, 1, 60, trainings=True)
    assert first == fault_schedule(1, 1, 60, trainings=True)
    assert first != fault_schedule(1, 2, 60, trainings=True)
    assert len({fault.kind for fault in first}) > 3


# --- A1: an acknowledged submit is never lost -----------------------------------------------------------------------


async def submits_under_kills(settings: Settings, rounds: int, submits: int, seed: int) -> Counter[str]:
    """Kills the server at a random moment while jobs are submitted, and looks for every one that was acknowledged."""
    random_, history, told = random.Random(seed), History(seed), Counter[str]()
    async with serving(settings) as server:
        for _ in range(rounds):
            acknowledged: list[str] = []
            async with Client(history, server.address) as client:
                await client.insist(client.list)  # connected
                kill_after = random_.randint(1, submits - 1)
                pending = [submit_and_cancel(client, acknowledged) for _ in range(submits)]
                storm = asyncio.gather(*_in_lanes(pending, 8))
                while len(acknowledged) < kill_after and not storm.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                await server.kill()
                await storm
            await server.start()
            look = State.open(settings.state_url, migrate=False)
            for job_id in acknowledged:
                assert look.events(job_id, 0, 1)[0].payload == StateChange(state=JobState.QUEUED), job_id
            look.close()
            told["acknowledged"] += len(acknowledged)
            told["submitted"] += submits
    history.remains = remains_of(settings)
    for rule in ("every_acknowledged_job_exists", "sequences_have_no_gap", "replies_agree_with_the_log"):
        assert [violation for violation in violations(history) if violation.rule == rule] == []
    return told


async def submit_and_cancel(client: Client, acknowledged: list[str]) -> None:
    """The queue has room for 64, so each one leaves it again."""
    call = await client.create(chats(100))
    for sight in call.jobs:
        acknowledged.append(sight.job_id)
        await client.cancel(sight.job_id)


def _in_lanes(calls: list[Awaitable[None]], lanes: int) -> list[Awaitable[None]]:
    async def lane(mine: list[Awaitable[None]]) -> None:
        for call in mine:
            await call

    return [lane(calls[number::lanes]) for number in range(lanes)]


async def test_a_killed_server_keeps_what_it_acknowledged(settings: Settings) -> None:
    told = await submits_under_kills(settings, rounds=3, submits=40, seed=SEED)
    assert told["acknowledged"] > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_killed_server_keeps_what_it_acknowledged_fifty_times(settings: Settings) -> None:
    told = await submits_under_kills(settings, rounds=50, submits=200, seed=SEED)
    print(dict(told))  # noqa: T201


def test_the_store_waits_for_the_disk(state: State) -> None:
    with state._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to see system calls")
async def test_a_job_is_on_the_disk_before_it_is_acknowledged(settings: Settings, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    async with serving(settings) as server, Client(History(), server.address) as client:
        await client.create(chats())  # stores the demo catalogue too
        calls = "pwrite64,fsync,fdatasync,sendmsg,sendto,write,writev"
        command = ["strace", "-f", "-y", "-s", "9000", "-e", f"trace={calls}", "-o", str(trace), "-p", str(server.pid)]
        tracer = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert tracer.stderr is not None
        if b"attached" not in (line := await tracer.stderr.readline()):
            await tracer.wait()
            pytest.skip(f"strace may not look: {line.decode()}")
        await asyncio.sleep(0.5)
        job_id = (await client.create(chats())).jobs[0].job_id
        tracer.send_signal(signal.SIGINT)
        await tracer.communicate()
    lines = trace.read_text(errors="replace").splitlines()
    # A number of the trace's lines each: the job's page is written, the file is synced, the reply leaves.
    written = [n for n, line in enumerate(lines) if "pwrite64" in line and "state.db-wal" in line and job_id in line]
    synced = [n for n, line in enumerate(lines) if re.search(r"f(data)?sync\(.*state\.db-wal", line)]
    replied = [n for n, line in enumerate(lines) if "send" in line and job_id in line and "state.db" not in line]
    assert written
    assert replied
    first_commit = next(n for n in synced if n > written[0])
    assert written[0] < first_commit < replied[0]


# --- A4: a stale attempt cannot write -------------------------------------------------------------------------------


def start_worker(settings: Settings, job: Job, points: str = "") -> subprocess.Popen[bytes]:
    """A worker as a server would start it, by hand."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KNOWLEDGE_")}
    environment |= settings.environment() | ({"KNOWLEDGE_FAILPOINTS": points} if points else {})
    argv = [sys.executable, "-m", "knowledge_engine.worker", job.id, str(job.attempt)]
    return subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


@contextlib.contextmanager
def as_if_served(settings: Settings) -> Iterator[None]:
    """Holds the lock by which workers know that a server lives."""
    with server_lock_path(settings).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stale_attempt(settings: Settings, state: State, stopped_for: float) -> float:
    """A worker is stopped, declared dead and replaced, and wakes; how long it then lives, in seconds."""
    datasets = Datasets(settings.data_dir / "datasets", state)
    catalogue = datasets.default_catalogue().name
    job = state.create_job(GenerationSpec(num_conversations=100_000, dataset="d", catalogue=catalogue))
    claimed = state.claim_job({JobKind.GENERATION: 9})
    assert claimed is not None
    worker = start_worker(settings, claimed)
    try:
        deadline = time.monotonic() + PATIENCE
        while state.get_job(job.id).progress is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        worker.send_signal(signal.SIGSTOP)
        time.sleep(stopped_for)
        state.abandon_attempt(job.id, 1, "declared dead")
        assert state.claim_job({JobKind.GENERATION: 9}) is not None
        sequence = state.get_job(job.id).last_sequence
        worker.send_signal(signal.SIGCONT)
        woken = time.monotonic()
        worker.wait(10)
        lived = time.monotonic() - woken
        assert state.get_job(job.id).last_sequence == sequence  # not a word
        assert state.get_job(job.id).attempt == 2
        with pytest.raises(NotFoundError):
            state.get_dataset("d")
        state.abandon_attempt(job.id, 2, "over")
        state.request_cancel(job.id)
        return lived
    finally:
        worker.kill()
        worker.wait()


def test_a_worker_that_wakes_up_too_late_ends_without_a_word(settings: Settings, state: State) -> None:
    with as_if_served(settings):
        assert stale_attempt(settings, state, stopped_for=1) < 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_workers_that_wake_up_too_late_end_without_a_word(settings: Settings, state: State) -> None:
    with as_if_served(settings):
        lived = [stale_attempt(settings, state, stopped_for=0.5) for _ in range(20)]
        lived.append(stale_attempt(settings, state, stopped_for=90))
    print(f"gone within {max(lived):.2f} s of waking, 21/21")  # noqa: T201
    assert max(lived) < 10


def test_every_write_of_a_stale_attempt_is_refused(settings: Settings, state: State) -> None:
    job = state.create_job(GenerationSpec(num_conversations=10, dataset="d"))
    assert state.claim_job({JobKind.GENERATION: 9}) is not None
    state.abandon_attempt(job.id, 1, "declared dead")
    assert state.claim_job({JobKind.GENERATION: 9}) is not None
    before = state.get_job(job.id)
    result = GenerationResult(
        dataset="d", digest="x", num_conversations=10, num_rejected=0, rejections={}, provider="offline"
    )
    datasets = Datasets(settings.data_dir / "datasets", state, attempt=1)
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    writes: dict[str, Callable[[], object]] = {
        "beat": lambda: state.beat(job.id, 1, 1, "x"),
        "progress": lambda: state.append_events(job.id, 1, [Progress(phase="generating", step=1)]),
        "checkpoint": lambda: state.append_events(job.id, 1, [Checkpoint(step=9, size_bytes=1)]),
        "memory": lambda: state.expect_memory(job.id, 1, 1),
        "tracker": lambda: state.set_tracker_run(job.id, 1, TrackerRun(id="x")),
        "artifact": lambda: datasets.store("d", DatasetKind.CONVERSATIONS, DatasetFormat.JSONL, [row], job_id=job.id),
        "success": lambda: state.finish_attempt(job.id, 1, result),
        "failure": lambda: state.finish_attempt(job.id, 1, KnowledgeEngineError("x")),
        "requeue": lambda: state.abandon_attempt(job.id, 1, "x"),
        "crash": lambda: state.bury_attempt(job.id, 1, "x", 3, Reason.WORKER_CRASHED),
    }
    for what, write in writes.items():
        with pytest.raises(ConflictError):
            write()
        assert state.get_job(job.id) == before, what
    assert not list((settings.data_dir / "datasets").glob("*.jsonl"))


# --- A6: a request makes one job ------------------------------------------------------------------------------------


async def test_fifty_equal_requests_at_once_make_one_job(settings: Settings) -> None:
    history = History()
    async with (
        serving(settings) as server,
        Client(history, server.address) as alice,
        Client(history, server.address, "bob") as bob,
    ):
        await alice.create(chats(100_000))
        await alice.create(chats(100_000))  # both places are taken: what follows waits
        calls = await asyncio.gather(*(alice.create(chats(), "same") for _ in range(50)))
        assert [call.outcome for call in calls] == ["OK"] * 50
        assert len({call.jobs for call in calls}) == 1
        assert (await alice.create(chats(11), "same")).outcome == "REQUEST_ID_REUSED"
        assert (await alice.create(training_spec("m"), "same")).outcome == "REQUEST_ID_REUSED"
        theirs = await bob.create(chats(), "same")
        assert theirs.jobs[0].job_id != calls[0].jobs[0].job_id
        for sight in (await alice.list()).jobs:
            await alice.cancel(sight.job_id)
    assert len(remains_of(settings).jobs) == 4


async def test_a_reply_that_was_lost_is_given_again(settings: Settings) -> None:
    history = History()
    async with serving(settings, "create.done=kill@1") as server, Client(history, server.address) as client:
        assert (await client.create(chats(), "lost")).outcome == UNKNOWN
        await server.gone()
        look = State.open(settings.state_url, migrate=False)
        stored = look.list_jobs(Page(1000, None))[0]
        look.close()
        assert len(stored) == 1  # it was stored, and nobody heard of it
        await server.start()
        again = await client.insist(lambda: client.create(chats(), "lost"))
        assert again.jobs[0].job_id == stored[0].id
        await followed(client, stored[0].id)
    assert len(remains_of(settings).jobs) == 1


# --- A8: watchers ---------------------------------------------------------------------------------------------------


async def watched_by(settings: Settings, watchers: int, kills: int) -> History:
    """Half of the watchers are slow, half come back again and again; the server is killed meanwhile."""
    history = History(SEED)
    async with serving(settings) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(history, server.address)) for _ in range(4)]
        jobs = [(await clients[0].create(chats(number), f"r{number}")).jobs[0].job_id for number in (1500, 10, 3000)]
        tasks = []
        for number in range(watchers):
            watch = Watch(f"watcher {number}", jobs[number % len(jobs)])
            history.watches.append(watch)
            slow, restless = (0.05, 0) if number % 2 else (0.0, 4)
            tasks.append(asyncio.create_task(clients[number % 4].watch(watch, slow, restless)))
        for _ in range(kills):
            await asyncio.sleep(1.0)
            await server.kill()
            await server.start()
        await asyncio.wait_for(asyncio.gather(*tasks), 2 * PATIENCE)
    history.remains = remains_of(settings)
    return history


@pytest.mark.parametrize(
    ("watchers", "kills"), [(100, 3), pytest.param(100, 10, marks=[pytest.mark.slow])], ids=["3 kills", "10 kills"]
)
async def test_a_hundred_watchers_see_the_exact_log(settings: Settings, watchers: int, kills: int) -> None:
    history = await watched_by(settings, watchers, kills)
    judge(Report(history, violations(history)))
    logs = {
        job_id: [(event.sequence, stored_fingerprint(event)) for event in events]
        for job_id, events in history.remains.events.items()
    }
    assert all(watch.events == logs[watch.job_id] for watch in history.watches)
    assert sum(watch.connections for watch in history.watches) > 2 * watchers


# --- A10: a poison job ----------------------------------------------------------------------------------------------


async def test_a_poison_job_fails_and_those_behind_it_go_on(settings: Settings) -> None:
    async with (
        serving(settings, "training.begin=kill@1") as server,
        Client(History(), server.address) as client,
    ):
        await upload_training_data(client)
        poison = (await client.create(training_spec("m"))).jobs[0].job_id
        healthy = [(await client.create(chats())).jobs[0].job_id for _ in range(10)]
        for job_id in [poison, *healthy]:
            await followed(client, job_id)
    remains = remains_of(settings)
    job = remains.jobs[poison]
    assert (job.state, job.attempt) == (JobState.FAILED, 3)
    assert job.error is not None
    assert job.error["reason"] == Reason.WORKER_CRASHED
    assert "SIGKILL" in job.error["message"]
    assert "its last words" in job.error["message"]
    assert {remains.jobs[job_id].state for job_id in healthy} == {JobState.SUCCEEDED}


# --- A12: the store is locked ---------------------------------------------------------------------------------------


async def locked_for(settings: Settings, seconds: float) -> None:
    history = History()
    async with serving(settings) as server, Client(history, server.address) as client:
        finishing = (await client.create(chats(200, dataset="datasets/finishing"))).jobs[0].job_id
        going_on = (await client.create(chats(100_000, dataset="datasets/going-on"))).jobs[0].job_id
        look = State.open(settings.state_url, migrate=False)
        await eventually(lambda: look.get_job(going_on).progress and look.get_job(finishing).attempt)
        worker = next(worker for worker in workers_of(settings) if going_on in worker.cmdline())
        worked = sum(worker.cpu_times()[:2])
        before = look.get_job(going_on).last_sequence
        locked = asyncio.create_task(asyncio.to_thread(lock_store, settings, seconds))
        await asyncio.sleep(0.3)
        end = time.monotonic() + seconds - 1
        refused = 0
        while time.monotonic() < end:
            asked = time.monotonic()
            call = await client.create(chats(), "during")
            if not locked.done():
                assert call.outcome == UNKNOWN
                assert time.monotonic() - asked < 2.5  # two seconds, on a machine that is busy
                refused += 1
            asked = time.monotonic()
            assert (await client.get(going_on)).outcome == "OK"  # reading goes on
            assert time.monotonic() - asked < 2
        await locked
        assert refused >= 2
        assert worker.is_running()
        assert sum(worker.cpu_times()[:2]) > worked + seconds / 20  # the work went on
        await eventually(lambda: look.get_job(going_on).last_sequence > before)
        during = await client.insist(lambda: client.create(chats(), "during"))
        assert look.get_job(going_on).attempt == 1
        await client.cancel(going_on)
        for job_id in (finishing, during.jobs[0].job_id, going_on):
            await followed(client, job_id)
        look.close()
    history.remains = remains_of(settings)
    judge(Report(history, violations(history)))
    assert history.remains.jobs[finishing].state is JobState.SUCCEEDED


async def test_a_locked_store_stops_no_work_and_loses_nothing(settings: Settings) -> None:
    await locked_for(settings, 5)


@pytest.mark.slow
async def test_a_store_that_is_locked_for_long_stops_no_work_and_loses_nothing(settings: Settings) -> None:
    await locked_for(settings.model_copy(update={"lease_seconds": 30, "orphan_grace_seconds": 60}), 30)


async def test_an_answer_about_a_locked_store_says_when_to_ask_again(settings: Settings) -> None:
    async with serving(settings) as server, Client(History(), server.address) as client:
        await client.create(chats())
        locked = asyncio.create_task(asyncio.to_thread(lock_store, settings, 4))
        await asyncio.sleep(0.3)

        def ask() -> UpstreamError:
            with RealClient(server.address, CALLERS["alice"]) as real, pytest.raises(UpstreamError) as caught:
                real.create_generation_job(GenerationSpec(num_conversations=10))
            return caught.value

        error = await asyncio.to_thread(ask)
        assert error.reason is Reason.STATE_UNAVAILABLE
        assert error.retry_after_seconds
        await locked


# --- A13: SQLite stays whole ----------------------------------------------------------------------------------------

_LISTS_FILES = """
import os, sys
if "knowledge_engine.worker" in sys.orig_argv:
    with open(os.environ["FILES_SEEN"], "a") as seen:
        for name in os.listdir("/proc/self/fd"):
            try:
                print(name, os.readlink("/proc/self/fd/" + name), file=seen)
            except OSError:
                pass
"""


async def test_a_worker_inherits_no_file_of_the_server(settings: Settings, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_LISTS_FILES)
    seen = tmp_path / "seen"
    environment = {"PYTHONPATH": str(site), "FILES_SEEN": str(seen)}
    async with serving(settings, environment=environment) as server, Client(History(), server.address) as client:
        assert server.pid is not None
        assert any("state.db" in file.path for file in psutil.Process(server.pid).open_files())
        await followed(client, (await client.create(chats())).jobs[0].job_id)
    opened = seen.read_text().splitlines()
    assert any("worker-1.log" in line for line in opened)
    assert not [line for line in opened if "state.db" in line or "server.lock" in line or "socket:" in line]


async def test_a_second_server_is_refused(settings: Settings) -> None:
    async with serving(settings) as server, Client(History(), server.address) as client:
        other = settings.model_copy(update={"grpc_address": f"127.0.0.1:{free_port()}"})
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KNOWLEDGE_")}
        second = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "knowledge_engine.server",
            env=environment | other.environment(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await asyncio.wait_for(second.communicate(), PATIENCE)
        assert second.returncode
        assert "another server is running" in said.decode()
        await followed(client, (await client.create(chats())).jobs[0].job_id)


# --- A14: a pid is not a process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["before a restart of the machine", "before its pid was given again"])
async def test_a_reused_pid_is_never_touched_and_the_job_goes_on(settings: Settings, state: State, who: str) -> None:
    stranger = subprocess.Popen(["sleep", "300"], start_new_session=True)  # noqa: ASYNC220
    try:
        boot, _, ticks = (process_identity(stranger.pid) or "").partition(" ")
        worker = f"another-boot {ticks}" if "machine" in who else f"{boot} {int(ticks) - 100}"
        catalogue = Datasets(settings.data_dir / "datasets", state).default_catalogue().name
        job = state.create_job(GenerationSpec(num_conversations=10, dataset="d", catalogue=catalogue))
        assert state.claim_job({JobKind.GENERATION: 9}) is not None
        state.beat(job.id, 1, stranger.pid, worker)
        began = time.monotonic()
        async with serving(settings) as server, Client(History(), server.address) as client:
            await followed(client, job.id)
        assert time.monotonic() - began < 60
        assert (state.get_job(job.id).state, state.get_job(job.id).attempt) == (JobState.SUCCEEDED, 2)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# --- A15: clocks ----------------------------------------------------------------------------------------------------

_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
static int (*real)(clockid_t, struct timespec *);
static long offset(void) {
    char line[64] = "0", path[4096], name[256];
    const char *base = getenv("CLOCK_FILE");
    FILE *comm = fopen("/proc/self/cmdline", "r");
    size_t size = comm ? fread(path, 1, sizeof path - 1, comm) : 0;
    int worker = 0;
    for (size_t at = 0; at < size; at++) worker |= !strncmp(path + at, "knowledge_engine.worker", 23);
    if (comm) fclose(comm);
    snprintf(name, sizeof name, "%s.%s", base ? base : "", worker ? "worker" : "server");
    FILE *file = fopen(name, "r");
    if (file) { if (!fgets(line, sizeof line, file)) line[0] = 0; fclose(file); }
    return atol(line);
}
int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += offset();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *result) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (result) *result = at.tv_sec;
    return at.tv_sec;
}
"""


@pytest.fixture
def clocks(tmp_path: Path) -> dict[str, str]:
    """An environment in which the wall clock is off by what the files `clock.server` and `clock.worker` say."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler to set clocks")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "CLOCK_FILE": str(tmp_path / "clock")}


async def test_clocks_that_jump_cost_no_attempt(settings: Settings, tmp_path: Path, clocks: dict[str, str]) -> None:
    def set_clock(which: str, seconds: int) -> None:
        (tmp_path / f"new.{which}").write_text(str(seconds))
        (tmp_path / f"new.{which}").replace(tmp_path / f"clock.{which}")

    hour = 3600
    history = History()
    set_clock("worker", -600)
    async with serving(settings, environment=clocks) as server, Client(history, server.address) as client:
        set_clock("server", hour)
        running = (await client.create(chats(100_000))).jobs[0].job_id
        early = (await client.create(chats(20))).jobs[0].job_id
        await followed(client, early)
        waiting = [(await client.create(chats(20))).jobs[0].job_id for _ in range(2)]
        for seconds in (-hour, hour, 0):
            set_clock("server", seconds)
            set_clock("worker", -seconds)
            await asyncio.sleep(settings.lease_seconds / 2 + 0.5)
            waiting.append((await client.create(chats(20))).jobs[0].job_id)
        await asyncio.sleep(settings.lease_seconds)
        for job_id in waiting:
            await followed(client, job_id)
        assert (await client.get(running)).jobs[0].state is JobState.RUNNING
        await client.cancel(running)
        await followed(client, running)
    history.remains = remains_of(settings)
    judge(Report(history, violations(history)))
    jobs = history.remains.jobs
    assert {job.attempt for job in jobs.values()} == {1}
    assert {jobs[job_id].state for job_id in [early, *waiting]} == {JobState.SUCCEEDED}
    # The clocks were wrong indeed, and nothing lasted less than no time.
    times = [event.create_time for event in history.remains.events[early]]
    assert times != sorted(times)
    assert all(job.end_time and job.start_time and job.end_time >= job.start_time for job in jobs.values())


# --- A3: dead workers ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_twenty_killed_workers_are_noticed_at_once(settings: Settings) -> None:
    noticed = []
    async with serving(settings) as server, Client(History(), server.address) as client:
        look = State.open(settings.state_url, migrate=False)
        for _ in range(20):
            job_id = (await client.create(chats(100_000))).jobs[0].job_id
            await eventually(lambda job_id=job_id: look.get_job(job_id).progress)  # type: ignore[misc]
            worker = next(worker for worker in workers_of(settings) if job_id in worker.cmdline())
            worker.kill()
            killed = time.monotonic()
            await eventually(lambda job_id=job_id: look.get_job(job_id).attempt == 2)  # type: ignore[misc]
            noticed.append(time.monotonic() - killed)
            await client.cancel(job_id)
            await followed(client, job_id)
        look.close()
    print(f"noticed and started again within {max(noticed):.2f} s")  # noqa: T201
    assert max(noticed) < settings.lease_seconds + 1


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_step_that_takes_long_is_no_sign_of_death(settings: Settings) -> None:
    """Ten leases long."""
    step = f"training.step=sleep:{10 * settings.lease_seconds:g}@2"
    async with serving(settings, step) as server, Client(History(), server.address) as client:
        await upload_training_data(client)
        job_id = (await client.create(training_spec("m"))).jobs[0].job_id
        await asyncio.wait_for(client.watch(Watch("test", job_id)), 5 * PATIENCE)
    job = remains_of(settings).jobs[job_id]
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
