"""Traffic and faults against a real server process, by a seed: what the soak and the fault tests have in common.

A round has a fresh data directory. Clients and watchers go about while processes are killed, stopped and terminated,
the store is locked, and single starts of the server get failpoints. Then the faults end, everything must come to rest
within a bound, and `history.violations` judges what was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
from grpc_status import rpc_status

from knowledge_engine import failpoints
from knowledge_engine.client_convert import error_from_status
from knowledge_engine.core import JobKind, JobState, Page
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    generation_pb2,
    jobs_pb2,
    jobs_pb2_grpc,
    training_pb2,
)
from tests.history import UNKNOWN, Call, History, Sight, Violation, Watch, fingerprint, losses, remains_of, twin_key
from tests.history import violations as broken_promises

SHORTENED = {"lease_seconds": 3.0, "cancel_grace_seconds": 0.8, "orphan_grace_seconds": 6.0, "checkpoint_seconds": 12.0}
"""A tenth of the defaults."""
CALLERS = {"alice": "alice-key-1", "bob": "bob-key-22"}
START_SECONDS = 60
REST_SECONDS = 150
"""Without any job going on. A worker that never said who it is has 30 s to do so, which is no setting; a training may
take a minute to load torch where others use the machine too."""
MAX_REST_SECONDS = 480
CALL_SECONDS = 6.0

_NOBODY = {"SERVER_UNAVAILABLE", "STATE_UNAVAILABLE"}
_NOBODY_CODES = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
_QUICK_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_EVENTUALLY = 0.1


def storm_settings(folder: Path, base: Path, **changes: Any) -> Settings:
    keys = ",".join(f"{name}:{key}" for name, key in CALLERS.items())
    values = {
        "data_dir": folder,
        "grpc_address": f"127.0.0.1:{free_port()}",
        "base_model": str(base),
        "api_keys": keys,
        "drain_seconds": 2,
        **SHORTENED,
    }
    return Settings(**values | changes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """`python -m knowledge_engine.server` on one data directory, started again and again at one address."""

    def __init__(self, settings: Settings, environment: dict[str, str] | None = None) -> None:
        self.settings = settings
        self.address = settings.grpc_address
        self.log = settings.data_dir.parent / f"{settings.data_dir.name}-server.log"
        self._environment = environment or {}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self, points: str = "") -> None:
        """Returns once it serves; a start that a failpoint kills is repeated without any."""
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KNOWLEDGE_")}
        environment |= self.settings.environment() | self._environment
        for attempt in range(20):
            if points and attempt == 0:
                environment[failpoints.VARIABLE] = points
            else:
                environment.pop(failpoints.VARIABLE, None)
            if await self._start_once(environment):
                return
            await asyncio.sleep(0.25)  # the dead one's lock or port may take a moment
        raise AssertionError(f"the server does not start: {self.log.read_text()[-2000:]}")

    async def _start_once(self, environment: dict[str, str]) -> bool:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "knowledge_engine.server",
                env=environment,
                cwd=self.settings.data_dir,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_SECONDS)
        if line:
            self.address = json.loads(line)["grpc_address"]
            return True
        await self._process.wait()
        return False

    def send(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        await self.gone()

    async def gone(self, seconds: float = START_SECONDS) -> int | None:
        if self._process is None:
            return None
        return await asyncio.wait_for(self._process.wait(), seconds)

    async def end(self) -> int | None:
        """A clean stop, with all workers."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        return await self.gone()


class Client:
    """One caller over its own connection; writes down every call."""

    def __init__(self, history: History, address: str, name: str = "alice") -> None:
        self.name = name
        self._history = history
        self._metadata = (("authorization", f"Bearer {CALLERS[name]}"),)
        # Channels to one address would share a connection.
        options = (*_QUICK_RECONNECT, ("grpc.use_local_subchannel_pool", 1))
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self.jobs = jobs_pb2_grpc.JobServiceStub(self.channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def call(
        self, verb: str, rpc: Any, request: Any, request_id: str = "", seconds: float = CALL_SECONDS
    ) -> Call:
        start = time.monotonic()
        sights: tuple[Sight, ...] = ()
        try:
            response = await rpc(request, timeout=seconds, metadata=self._metadata)
            outcome = "OK"
            if isinstance(response, jobs_pb2.ListJobsResponse):
                sights = tuple(map(Sight.of, response.jobs))
            else:
                sights = (Sight.of(response.job),)
        except grpc.aio.AioRpcError as error:
            outcome = outcome_of(error)
        call = Call(self.name, verb, start, time.monotonic(), outcome, sights, request_id)
        self._history.calls.append(call)
        return call

    async def create(self, spec: Spec, request_id: str = "", verb: str = "create") -> Call:
        if isinstance(spec, training_pb2.TrainingSpec):
            training = jobs_pb2.CreateTrainingJobRequest(spec=spec, request_id=request_id)
            return await self.call(verb, self.jobs.CreateTrainingJob, training, request_id, CALL_SECONDS * 2)
        generation = jobs_pb2.CreateGenerationJobRequest(spec=spec, request_id=request_id)
        return await self.call(verb, self.jobs.CreateGenerationJob, generation, request_id)

    async def get(self, job_id: str) -> Call:
        return await self.call("get", self.jobs.GetJob, jobs_pb2.GetJobRequest(name=f"jobs/{job_id}"))

    async def list(self) -> Call:
        return await self.call("list", self.jobs.ListJobs, jobs_pb2.ListJobsRequest(page_size=100))

    async def cancel(self, job_id: str) -> Call:
        return await self.call("cancel", self.jobs.CancelJob, jobs_pb2.CancelJobRequest(name=f"jobs/{job_id}"))

    async def pause(self, job_id: str) -> Call:
        return await self.call("pause", self.jobs.PauseJob, jobs_pb2.PauseJobRequest(name=f"jobs/{job_id}"))

    async def resume(self, job_id: str) -> Call:
        return await self.call("resume", self.jobs.ResumeJob, jobs_pb2.ResumeJobRequest(name=f"jobs/{job_id}"))

    async def insist(self, verb: Callable[[], Awaitable[Call]], seconds: float = START_SECONDS) -> Call:
        """Until somebody answers."""
        deadline = time.monotonic() + seconds
        while (call := await verb()).outcome == UNKNOWN:
            if time.monotonic() > deadline:
                raise AssertionError(f"nobody answers: {call}")
            await asyncio.sleep(_EVENTUALLY)
        return call

    async def watch(self, watch: Watch, pause_seconds: float = 0, break_after: int = 0) -> None:
        """Follows a job to its end over all that breaks; breaks off itself after `break_after` events, 0 never."""
        while not watch.is_over:
            watch.connections += 1
            request = jobs_pb2.WatchJobRequest(name=f"jobs/{watch.job_id}", after_sequence=watch.last)
            stream = self.jobs.WatchJob(request, metadata=self._metadata)
            try:
                watch.is_over = await _follow(stream, watch, pause_seconds, break_after)
            except grpc.aio.AioRpcError as error:
                if outcome_of(error) != UNKNOWN:
                    raise
            finally:
                stream.cancel()
            await asyncio.sleep(_EVENTUALLY)


Spec = training_pb2.TrainingSpec | generation_pb2.GenerationSpec


async def _follow(stream: Any, watch: Watch, pause_seconds: float, break_after: int) -> bool:
    """Whether the service has said that nothing follows."""
    seen = 0
    async for response in stream:
        watch.events.append((response.event.sequence, fingerprint(response.event)))
        seen += 1
        if break_after and seen >= break_after:
            return False
        if pause_seconds:
            await asyncio.sleep(pause_seconds)
    return True


def outcome_of(error: grpc.aio.AioRpcError) -> str:
    if error.code() in _NOBODY_CODES:
        return UNKNOWN
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    if status is None:
        return f"{error.code().name}: {error.details()}"
    reason = error_from_status(status).reason.value
    return UNKNOWN if reason in _NOBODY else reason


# --- faults -------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """`pause` seconds after the one before; `seconds` is how long it lasts, `points` the next start's failpoints."""

    pause: float
    kind: str
    seconds: float = 0
    points: str = ""


_POINTS = (
    "",
    "",
    "",
    "claim.done=kill@1",
    "claim.done=kill@3",
    "finish.before=kill@1",
    "finish.done=kill@1",
    "finish.before=sleep:1",
    "finish.done=sleep:1",
)
_TRAINING_POINTS = (
    "",
    "",
    "training.step=kill@3",
    "training.batch=kill@4",
    "checkpoint.begin=kill@2",
    "checkpoint.file=kill@3",
    "checkpoint.before_marker=kill@2",
    "checkpoint.before_rename=kill@1",
    "checkpoint.done=kill@2",
    "publish.begin=kill@1",
    "publish.done=kill@1",
    "checkpoint.file=sleep:0.2",
)
_KINDS = {
    "kill server": 4,
    "end server": 1,
    "stop server": 1,
    "kill worker": 5,
    "stop worker": 3,
    "end worker": 3,
    "lock store": 2,
}


def fault_schedule(seed: int, round_number: int, seconds: float, *, trainings: bool) -> list[Fault]:
    """The same for the same seed and round."""
    random_ = random.Random(f"faults {seed} {round_number}")
    faults: list[Fault] = []
    at = 0.0
    while True:
        pause = random_.uniform(0.5, 4.5)
        kind = random_.choices(list(_KINDS), list(_KINDS.values()))[0]
        lasts = {
            "stop worker": random_.choice([0.5, 2.0, 7.0]),
            "stop server": random_.uniform(0.5, 5.0),
            "lock store": random_.choice([0.5, 2.0, 5.0]),
        }.get(kind, 0.0)
        points = random_.choice(_POINTS)
        training_point = random_.choice(_TRAINING_POINTS) if trainings else ""
        at += pause + lasts
        if at > seconds:
            return faults
        faults.append(Fault(pause, kind, lasts, ",".join(filter(None, (points, training_point)))))


class Faults:
    """Does to a service what a schedule says."""

    def __init__(self, server: ServerProcess, history: History, slow_steps: str = "") -> None:
        self._server = server
        self._history = history
        self._slow_steps = slow_steps
        """Failpoints of every start, so that there is something to interrupt."""
        self._random = random.Random(f"victims {history.seed} {history.round}")

    async def run(self, schedule: Sequence[Fault]) -> None:
        for fault in schedule:
            await asyncio.sleep(fault.pause)
            if self._server.pid is None:  # a failpoint was faster
                self._note("failpoint")
                await self._start(fault)
            await self.strike(fault)
        if self._server.pid is None:
            self._note("failpoint")

    async def strike(self, fault: Fault) -> None:
        match fault.kind:
            case "kill server":
                await self._server.kill()
                self._note(fault.kind)
                await self._start(fault)
            case "end server":
                await self._server.end()
                self._note(fault.kind)
                await self._start(fault)
            case "stop server":
                self._note(fault.kind)
                self._server.send(signal.SIGSTOP)
                await asyncio.sleep(fault.seconds)
                self._server.send(signal.SIGCONT)
            case "lock store":
                self._note(fault.kind)
                await asyncio.to_thread(lock_store, self._server.settings, fault.seconds)
            case _:
                await self._strike_worker(fault)

    async def _strike_worker(self, fault: Fault) -> None:
        workers = await asyncio.to_thread(workers_of, self._server.settings)
        if not workers:
            return
        victim = self._random.choice(workers)
        number = {"kill worker": signal.SIGKILL, "stop worker": signal.SIGSTOP, "end worker": signal.SIGTERM}[
            fault.kind
        ]
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
            self._note(fault.kind)
            if fault.seconds:
                await asyncio.sleep(fault.seconds)
                victim.send_signal(signal.SIGCONT)

    async def _start(self, fault: Fault) -> None:
        points = fault.points
        if "training.step=" not in points:
            points = ",".join(filter(None, (points, self._slow_steps)))
        await self._server.start(points)

    def _note(self, kind: str) -> None:
        self._history.faults.append(kind)


def lock_store(settings: Settings, seconds: float) -> None:
    """Holds SQLite's write lock."""
    connection = sqlite3.connect(settings.data_dir / "state.db", timeout=30, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def workers_of(settings: Settings) -> list[psutil.Process]:
    """The living workers on a data directory, oldest first."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                "knowledge_engine.worker" in process.cmdline()
                and process.environ().get("KNOWLEDGE_DATA_DIR") == str(settings.data_dir)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


# --- traffic ------------------------------------------------------------------------------------------------------

TRAINING_DATA = "lessons"


def training_data() -> bytes:
    things = ["kettle", "shoe", "backpack", "lamp", "phone", "chair", "bottle", "watch", "tent", "desk", "pan", "coat"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Do you have a {thing}?"},
                {"role": "assistant", "content": f"Yes, the {thing} number {number} costs {number}9 EUR."},
            ]
        }
        for number, thing in enumerate(things, 2)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def training_spec(model: str, variety: int = 0) -> training_pb2.TrainingSpec:
    """A few seconds of work; trainings of one variety have the same losses."""
    return training_pb2.TrainingSpec(
        dataset=f"datasets/{TRAINING_DATA}",
        model=f"models/{model}",
        max_steps=8,
        save_steps=2 + variety % 2,
        gradient_accumulation_steps=1 + variety % 2,
        per_device_train_batch_size=2,
        eval_split=0.2,
        lora=training_pb2.LoraConfig(rank=4, alpha=8, dropout=0.1),
        learning_rate=1e-3,
        seed=7,
    )


async def upload_training_data(client: Client) -> None:
    metadata = datasets_pb2.UploadDatasetMetadata(
        name=f"datasets/{TRAINING_DATA}",
        kind=datasets_pb2.DATASET_KIND_CONVERSATIONS,
        format=datasets_pb2.DATASET_FORMAT_JSONL,
    )

    async def parts() -> Any:
        yield datasets_pb2.UploadDatasetRequest(metadata=metadata)
        yield datasets_pb2.UploadDatasetRequest(chunk=training_data())

    await datasets_pb2_grpc.DatasetServiceStub(client.channel).UploadDataset(parts(), metadata=client._metadata)


@dataclass(frozen=True)
class Traffic:
    """How much of what goes on in a round."""

    seconds: float = 30
    clients: int = 4
    generations: int = 16
    trainings: int = 0
    watchers_a_job: int = 2
    max_conversations: int = 3000


@dataclass
class _Known:
    """What all clients of a round know of it."""

    job_ids: list[str] = field(default_factory=list)
    num_generations: int = 0
    num_trainings: int = 0
    watchers: list[asyncio.Task[None]] = field(default_factory=list)


class _Storm:
    """One round."""

    def __init__(self, server: ServerProcess, history: History, traffic: Traffic) -> None:
        self._server = server
        self._history = history
        self._traffic = traffic
        self._known = _Known()
        self._watching = Client(history, server.address)
        self._over = time.monotonic() + traffic.seconds

    async def run(self, schedule: Sequence[Fault]) -> None:
        slow = "training.step=sleep:0.25" if self._traffic.trainings else ""
        faults = Faults(self._server, self._history, slow)
        clients = [asyncio.create_task(self._client(number)) for number in range(self._traffic.clients)]
        try:
            await faults.run(schedule)
            await asyncio.gather(*clients)
            await self._rest()
        finally:
            for task in [*clients, *self._known.watchers]:
                task.cancel()
            await asyncio.gather(*clients, *self._known.watchers, return_exceptions=True)
            await self._watching.channel.close()

    async def _client(self, number: int) -> None:
        random_ = random.Random(f"client {number} {self._history.seed} {self._history.round}")
        name = list(CALLERS)[number % len(CALLERS)]
        async with Client(self._history, self._server.address, name) as client:
            while time.monotonic() < self._over:
                await self._act(client, random_, number)
                await asyncio.sleep(random_.expovariate(4))

    async def _act(self, client: Client, random_: random.Random, number: int) -> None:
        verb = random_.choices(["create", "get", "list", "cancel", "pause", "resume"], [30, 30, 10, 3, 15, 30])[0]
        if verb == "create":
            await self._create(client, random_, number)
        elif verb == "list":
            await client.list()
        elif self._known.job_ids:
            job_id = random_.choice(self._known.job_ids[-12:])
            await getattr(client, verb)(job_id)

    async def _create(self, client: Client, random_: random.Random, number: int) -> None:
        """Several at once with one request id, until one is answered; both callers use the same ids."""
        spec = self._spec(random_)
        if spec is None:
            return
        request_id = f"request-{number // 2}-{len(self._known.job_ids)}-{random_.getrandbits(24)}"
        for _ in range(100):
            calls = await asyncio.gather(
                *(client.create(spec, request_id) for _ in range(random_.choice([1, 1, 2, 4])))
            )
            if made := [sight for call in calls for sight in call.jobs]:
                break
            if any(call.outcome != UNKNOWN for call in calls):
                return
            await asyncio.sleep(0.3)
        else:
            return
        if random_.random() < 0.3:
            other = generation_pb2.GenerationSpec(num_conversations=11)
            await client.create(other, request_id, verb="reuse")
        self._know(made[0].job_id, random_)

    def _spec(self, random_: random.Random) -> Spec | None:
        known, traffic = self._known, self._traffic
        if known.num_trainings < traffic.trainings and random_.random() < 0.4:
            known.num_trainings += 1
            return training_spec(f"model-{known.num_trainings}", random_.randrange(2))
        if known.num_generations < traffic.generations:
            known.num_generations += 1
            wanted = random_.choice([10, 20, 200, traffic.max_conversations])
            return generation_pb2.GenerationSpec(
                num_conversations=wanted, dataset=f"datasets/chats-{known.num_generations}"
            )
        return None

    def _know(self, job_id: str, random_: random.Random) -> None:
        self._known.job_ids.append(job_id)
        for number in range(self._traffic.watchers_a_job):
            kind, pause, break_after = random_.choice([("fast", 0, 0), ("slow", 0.05, 0), ("restless", 0, 3)])
            self.watch(Watch(f"{kind} watcher {number}", job_id), pause, break_after)

    def watch(self, watch: Watch, pause_seconds: float, break_after: int) -> None:
        self._history.watches.append(watch)
        self._known.watchers.append(asyncio.create_task(self._watching.watch(watch, pause_seconds, break_after)))

    async def _rest(self) -> None:
        """No more faults: every job goes on to its end, and so do its watchers."""
        await self._server.kill()
        await self._server.start()
        deadline = time.monotonic() + MAX_REST_SECONDS
        went_on, events = time.monotonic(), 0
        async with Client(self._history, self._server.address) as client:
            while time.monotonic() < min(deadline, went_on + REST_SECONDS):
                sights = (await client.list()).jobs
                if (now := sum(sight.last_sequence for sight in sights)) > events:
                    went_on, events = time.monotonic(), now
                waiting = [sight for sight in sights if sight.state is JobState.PAUSED]
                for sight in waiting:
                    await client.resume(sight.job_id)
                if sights and not waiting and all(sight.state.is_terminal for sight in sights):
                    break
                await asyncio.sleep(0.5)
            else:
                self._history.complaints.append("long after the last fault not everything was at rest")
            await self._probe(client)
        if self._known.watchers:
            done, late = await asyncio.wait(self._known.watchers, timeout=30)
            if late:
                self._history.complaints.append(f"{len(late)} watchers were not told of the end within 30 s")
            failed = [error for task in done if (error := task.exception()) is not None]
            self._history.complaints += [f"a watcher was refused: {error!r}" for error in failed]

    async def _probe(self, client: Client) -> None:
        """The service still works: one more job goes through without a hitch."""
        spec = generation_pb2.GenerationSpec(num_conversations=10, dataset="datasets/probe")
        call = await client.insist(lambda: client.create(spec, "probe"))
        if not call.jobs:
            self._history.complaints.append(f"the probe was refused: {call.outcome}")
            return
        watch = Watch("probe", call.jobs[0].job_id)
        self._history.watches.append(watch)
        try:
            await asyncio.wait_for(client.watch(watch), 60)
        except TimeoutError:
            self._history.complaints.append("the probe did not end within 60 s")
            return
        sight = (await client.insist(lambda: client.get(watch.job_id))).jobs[0]
        if (sight.state, sight.attempt) != (JobState.SUCCEEDED, 1):
            self._history.complaints.append(f"the probe ended as {sight}")


class Report(NamedTuple):
    history: History
    violations: list[Violation]

    @property
    def faults(self) -> Counter[str]:
        return Counter(self.history.faults)

    @property
    def states(self) -> Counter[str]:
        return Counter(job.state.value for job in self.history.remains.jobs.values())


async def storm_round(
    folder: Path,
    base: Path,
    seed: int,
    round_number: int,
    traffic: Traffic,
    twins: dict[str, dict[int, float]] | None = None,
    schedule: Sequence[Fault] | None = None,
) -> Report:
    """One round in `folder`, which must be fresh, with everything that it started gone at its end."""
    settings = storm_settings(folder, base)
    history = History(seed, round_number, twins=twins or {})
    server = ServerProcess(settings)
    if schedule is None:
        schedule = fault_schedule(seed, round_number, traffic.seconds, trainings=traffic.trainings > 0)
    try:
        await server.start("training.step=sleep:0.25" if traffic.trainings else "")
        if traffic.trainings:
            async with Client(history, server.address) as client:
                await upload_training_data(client)
        await _Storm(server, history, traffic).run(schedule)
        if (code := await server.end()) != 0:
            history.complaints.append(f"the server ended with {code}")
        await _until_alone(settings)
        history.remains = await asyncio.to_thread(remains_of, settings)
    finally:
        await server.kill()
        for worker in workers_of(settings):
            with contextlib.suppress(psutil.Error):
                worker.kill()
    return Report(history, broken_promises(history))


async def _until_alone(settings: Settings, seconds: float = 20) -> None:
    """What a tracker leaves behind may take a moment to end."""
    deadline = time.monotonic() + seconds
    while workers_of(settings) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.2)


async def train_twins(folder: Path, base: Path, varieties: int = 2) -> dict[str, dict[int, float]]:
    """The losses of trainings that nobody disturbs, by `twin_key`."""
    settings = storm_settings(folder, base)
    server = ServerProcess(settings)
    history = History()
    try:
        await server.start()
        async with Client(history, server.address) as client:
            await upload_training_data(client)
            for variety in range(varieties):
                call = await client.create(training_spec(f"twin-{variety}", variety))
                await asyncio.wait_for(client.watch(Watch("twin", call.jobs[0].job_id)), REST_SECONDS)
        await server.end()
    finally:
        await server.kill()
    state = State.open(settings.state_url, migrate=False)
    try:
        jobs = [job for job in state.list_jobs(Page(100, None))[0] if job.kind is JobKind.TRAINING]
        assert all(job.state is JobState.SUCCEEDED for job in jobs), [job.error for job in jobs]
        return {twin_key(job.spec): losses(state.events(job.id, 0, 100_000)) for job in jobs}  # type: ignore[arg-type]
    finally:
        state.close()
