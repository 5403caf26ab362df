"""Jobs from acceptance to their end: queueing, worker processes, cancelling, watching.

The store is the truth; what lives here is only what is needed to act on it. A worker is a fresh interpreter in a
session of its own that writes to the store itself (`worker.py`), so this process may die and come back: attempts whose
process lives are left alone, others are queued again. Three crashed attempts end a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import psutil

from knowledge_engine.core import Job, JobEvent, JobKind, JobSpec, JobState
from knowledge_engine.errors import ConflictError, KnowledgeEngineError, Reason, StateError, UpstreamError
from knowledge_engine.settings import Settings
from knowledge_engine.state import RunningAttempt, State

_LOG = logging.getLogger(__name__)

MAX_CRASHES = 3
MAX_CONCURRENT_GENERATIONS = 2
"""Generation needs one core and little memory; two at once leave a core for everything else."""

_SWEEP_SECONDS = 0.5
_TAIL_SECONDS = 0.1
_TAIL_EVENTS = 4096
_REPLAY_EVENTS = 500
_LOG_TAIL_LINES = 20


class Jobs:
    """Create, `start` and `stop` it inside one event loop."""

    def __init__(self, settings: Settings, state: State, discard: Callable[[str], None]) -> None:
        """`discard` takes away what a dead attempt of a job had staged."""
        self.trouble = ""
        """Why jobs cannot be started now; empty while they can."""
        self._settings = settings
        self._state = state
        self._discard = discard
        self._workers: dict[_Key, _Worker] = {}
        self._tails: dict[str, _Tail] = {}
        self._cancelled_at: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._dispatcher: asyncio.Task[None] | None = None
        self._lock_file: int | None = None

    async def start(self) -> None:
        """Begins to run what is queued.

        Raises:
            StateError: another server runs on the same data directory.
        """
        self._lock_file = await asyncio.to_thread(_take_server_lock, server_lock_path(self._settings))
        self._dispatcher = asyncio.create_task(self._dispatch())

    async def stop(self) -> None:
        """Interrupts every worker and queues its job again; returns when no worker is left."""
        self._stopping = True
        self._wake.set()
        if self._dispatcher is not None:
            await self._dispatcher  # cancelled, it could lose a worker that it is just starting
        await asyncio.gather(*(worker.interrupt(self._settings.drain_seconds) for worker in self._workers.values()))
        for tail in self._tails.values():
            tail.stop()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    async def submit(self, spec: JobSpec, creator: str) -> Job:
        """Stores a job; once this returns, it is not lost."""
        job = await asyncio.to_thread(self._state.create_job, spec, creator)
        self._wake.set()
        return job

    async def get(self, job_id: str) -> Job:
        return await asyncio.to_thread(self._state.get_job, job_id)

    async def cancel(self, job_id: str) -> Job:
        """Cancels a queued job at once and asks a running one to end; see `State.request_cancel`."""
        job = await asyncio.to_thread(self._state.request_cancel, job_id)
        self._wake.set()
        return job

    async def watch(self, job_id: str, after: int) -> AsyncGenerator[JobEvent]:
        """The job's events after a sequence number, to its last one, as they come.

        Raises:
            NotFoundError: JOB_NOT_FOUND.
        """
        job = await self.get(job_id)
        if job.state.is_terminal and after >= job.last_sequence:
            return
        tail = self._tails.get(job_id)
        if tail is None or tail.is_over:
            tail = self._tails[job_id] = _Tail(self._state, job_id, job.last_sequence)
        tail.watchers += 1
        try:
            while True:
                events = tail.after(after)
                if events is None:
                    events = await asyncio.to_thread(self._state.events, job_id, after, _REPLAY_EVENTS)
                for event in events:
                    yield event
                    after = event.sequence
                    if event.is_last:
                        return
                if not events and not await tail.wait(after):
                    return
        finally:
            tail.watchers -= 1
            if not tail.watchers:
                tail.stop()
                if self._tails.get(job_id) is tail:
                    del self._tails[job_id]

    # --- dispatching ----------------------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                await self._sweep()
                await self._start_queued()
                self.trouble = ""
            except KnowledgeEngineError as error:
                self.trouble = error.message
                _LOG.warning("jobs cannot be dispatched now: %s", error.message)
            except Exception:  # a process that cannot be started, for one; the next round tries again
                self.trouble = "jobs cannot be started now; the server's log says why"
                _LOG.exception("jobs cannot be dispatched now")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _SWEEP_SECONDS)

    async def _start_queued(self) -> None:
        while not self._stopping:
            running = [worker.job.kind for worker in self._workers.values()]
            running += [attempt.job.kind for attempt in await self._foreign_attempts()]
            limits = {
                # A slim server leaves trainings to a full one on the same data.
                JobKind.TRAINING: self._settings.max_concurrent_trainings if can_train() else 0,
                JobKind.GENERATION: MAX_CONCURRENT_GENERATIONS,
            }
            free = [kind for kind, limit in limits.items() if running.count(kind) < limit]
            job = await asyncio.to_thread(self._state.claim_job, free, self._settings.lease_seconds)
            if job is None:
                return
            worker = await _Worker.start(self._settings, job)
            self._workers[worker.key] = worker
            worker.settled = asyncio.create_task(self._settle(worker))

    async def _settle(self, worker: _Worker) -> None:
        """Waits for a worker's end and writes down what it could not write itself."""
        code = await worker.process.wait()
        worker.kill_group()  # whatever it started ends with it
        try:
            await self._bury(worker.job, worker.interrupted, _describe_exit(code, worker.log_path))
        except ConflictError:
            pass  # it finished by itself: the ordinary case
        finally:
            del self._workers[worker.key]
            self._wake.set()

    async def _bury(self, job: Job, interrupted: bool, how: str) -> None:
        """Ends an attempt whose process is gone without a word."""
        if interrupted:
            message, error = "interrupted: the service was stopped", None
        else:
            crashes = await asyncio.to_thread(self._state.count_crash, job.id, job.attempt)
            message = f"attempt {job.attempt} crashed: {how}"
            error = None
            if crashes >= MAX_CRASHES:
                error = KnowledgeEngineError(
                    f"{MAX_CRASHES} attempts crashed; the last: {how}", reason=Reason.WORKER_CRASHED, job=job.id
                )
        await asyncio.to_thread(self._discard, job.id)
        await asyncio.to_thread(self._state.abandon_attempt, job.id, job.attempt, message, error)
        _LOG.warning("job %s: %s", job.id, message)

    async def _foreign_attempts(self) -> list[RunningAttempt]:
        """Attempts under way that a former server process started."""
        attempts = await asyncio.to_thread(self._state.running_attempts)
        return [attempt for attempt in attempts if _key(attempt.job) not in self._workers]

    async def _sweep(self) -> None:
        """Presses what was asked to stop, and buries foreign attempts that are no longer alive."""
        attempts = await asyncio.to_thread(self._state.running_attempts)
        cancelling = {attempt.job.id for attempt in attempts if attempt.job.state is JobState.CANCELLING}
        self._cancelled_at = {job_id: self._cancelled_at.get(job_id, time.monotonic()) for job_id in cancelling}
        for attempt in attempts:
            job_id = attempt.job.id
            overdue = job_id in cancelling and (
                time.monotonic() - self._cancelled_at[job_id] >= self._settings.cancel_grace_seconds
            )
            if worker := self._workers.get(_key(attempt.job)):
                if overdue:
                    worker.kill_group()
                continue
            process = await asyncio.to_thread(_find_process, attempt)
            if process is not None and overdue:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if process is None and (attempt.worker_pid is not None or attempt.lease_expires < time.time()):
                with contextlib.suppress(ConflictError):
                    await self._bury(attempt.job, False, "its process was gone when the service came back")


def can_train() -> bool:
    """Whether torch is installed here; it is not imported."""
    return importlib.util.find_spec("torch") is not None


_Key = tuple[str, int]


def _key(job: Job) -> _Key:
    """An attempt: one job may have a worker that is ending and another that is beginning."""
    return job.id, job.attempt


def server_lock_path(settings: Settings) -> Path:
    """The file whose lock says that a server is alive on this data directory."""
    return settings.data_dir / "server.lock"


def work_dir(settings: Settings, job_id: str) -> Path:
    """A job's private folder: worker logs and whatever its attempts keep."""
    return settings.data_dir / "jobs" / job_id


class _Worker:
    """One worker process of ours."""

    def __init__(self, job: Job, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.job = job
        self.key = _key(job)
        self.process = process
        self.log_path = log_path
        self.interrupted = False
        self.settled: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, settings: Settings, job: Job) -> _Worker:
        """A fresh interpreter in its own session; settings travel in the environment, secrets never in argv."""
        folder = work_dir(settings, job.id)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        log_path = folder / f"worker-{job.attempt}.log"
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "knowledge_engine.worker",
                job.id,
                str(job.attempt),
                env=settings.child_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        return cls(job, process, log_path)

    async def interrupt(self, grace_seconds: float) -> None:
        self.interrupted = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), grace_seconds)
        except TimeoutError:
            self.kill_group()
        if self.settled is not None:
            await self.settled

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class _Tail:
    """Follows one job's log for all its watchers: one query at most every 100 ms, however many they are."""

    def __init__(self, state: State, job_id: str, last_sequence: int) -> None:
        self.watchers = 0
        self._state = state
        self._job_id = job_id
        self._last = last_sequence
        self._recent: deque[JobEvent] = deque(maxlen=_TAIL_EVENTS)
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    def after(self, sequence: int) -> list[JobEvent] | None:
        """Events after `sequence` that are at hand; None when the store must be asked for older ones."""
        if sequence >= self._last:
            return []
        if not self._recent or sequence + 1 < self._recent[0].sequence:
            return None
        return list(self._recent)[sequence + 1 - self._recent[0].sequence :]

    @property
    def is_over(self) -> bool:
        return self._task.done()

    async def wait(self, sequence: int) -> bool:
        """Until there is something after `sequence`; False when nothing will come any more.

        Raises:
            KnowledgeEngineError: the log cannot be followed now.
        """
        changed = self._changed
        if sequence >= self._last and not self._task.done():
            await changed.wait()
        if not self._task.done():
            return True
        if self._task.cancelled():
            raise UpstreamError("the server is stopping", reason=Reason.SERVER_UNAVAILABLE, retry_after_seconds=1)
        self._task.result()
        return sequence < self._last

    def stop(self) -> None:
        self._task.cancel()

    async def _follow(self) -> None:
        try:
            while True:
                events = await asyncio.to_thread(self._state.events, self._job_id, self._last, _TAIL_EVENTS)
                if events:
                    self._recent.extend(events)
                    self._last = events[-1].sequence
                    self._announce()
                    if events[-1].is_last:
                        return
                await asyncio.sleep(_TAIL_SECONDS)
        finally:
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _take_server_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    # A worker may be looking at the lock this very moment; a server keeps it.
    if _retried(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB), seconds=2):
        return descriptor
    os.close(descriptor)
    raise StateError(f"another server is running on {path.parent}", reason=Reason.SERVER_RUNNING)


def _retried(attempt: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            attempt()
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def server_is_alive(settings: Settings) -> bool:
    """Whether a server holds the data directory's lock."""
    try:
        descriptor = os.open(server_lock_path(settings), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _find_process(attempt: RunningAttempt) -> psutil.Process | None:
    """The attempt's process, if it lives; a reused pid has another start time."""
    if attempt.worker_pid is None:
        return None
    try:
        process = psutil.Process(attempt.worker_pid)
        if process.create_time() == attempt.worker_started and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except psutil.Error:
        pass
    return None


def _describe_exit(code: int, log_path: Path) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    with contextlib.suppress(OSError):
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        if lines:
            return f"{how}; its last words:\n" + "\n".join(lines)
    return how
