"""Jobs from acceptance to their end: queueing, worker processes, pausing, cancelling, watching.

The store is the truth; what lives here is only what is needed to act on it. A worker is a fresh interpreter in a
session of its own that writes to the store itself (`worker.py`), so this process may die and come back: attempts whose
process lives are adopted, others are queued again. Three crashes without a checkpoint between them end a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from knowledge_engine import devices
from knowledge_engine.core import Job, JobEvent, JobKind, JobSpec, JobState
from knowledge_engine.errors import ConflictError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.failpoints import failpoint
from knowledge_engine.processes import GAVE_UP, LINGERING_SECONDS, Adopted, Child, Worker, describe_exit, last_words
from knowledge_engine.settings import Settings
from knowledge_engine.state import Request, RunningAttempt, State

_LOG = logging.getLogger(__name__)

MAX_CRASHES = 3
MAX_CONCURRENT_GENERATIONS = 2
"""Generation needs one core and little memory; two at once leave a core for everything else."""

_SWEEP_SECONDS = 0.5
_STARTING_SECONDS = 30.0
"""A worker may take so long to its first beat."""
_MAX_START_DELAY_SECONDS = 30.0
_TAIL_SECONDS = 0.1
_TAIL_EVENTS = 4096
_REPLAY_EVENTS = 500


class Jobs:
    """Create, `start` and `stop` it inside one event loop."""

    def __init__(
        self,
        settings: Settings,
        state: State,
        clean_up: Callable[[Job], None],
        second_chance: Callable[[Job], str | None],
        lock_file: int,
    ) -> None:
        """`clean_up` takes away what a job's attempts have left and nobody needs in the job's state. `second_chance`
        lets a job's next attempt do with less memory and says how, or answers None. `lock_file` is what
        `take_server_lock` gave; it is closed by `stop`."""
        self.trouble = ""
        """Why jobs cannot be started now; empty while they can."""
        self._settings = settings
        self._state = state
        self._clean_up = clean_up
        self._second_chance = second_chance
        self._workers: dict[_Key, Worker] = {}
        self._memory_bytes = devices.total_memory(settings)
        self._pulse = _Pulse(settings.lease_seconds)
        self._lease_pulse = _Pulse(settings.lease_seconds)
        self._tails: dict[str, _Tail] = {}
        self._chores: dict[str, asyncio.Task[None]] = {}
        self._num_failed_starts = 0
        self._start_again_time = 0.0
        self._under_way: set[_Key] = set()
        self._cancelled_at: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._dispatcher: asyncio.Task[None] | None = None
        self._lock_file: int | None = lock_file

    async def start(self) -> None:
        """Begins to run what is queued, and sees off what a former server did not."""
        for job in await asyncio.to_thread(self._state.ended_jobs_to_see_off):
            self._see_off(job)
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
        if self._chores:
            _, late = await asyncio.wait(self._chores.values(), timeout=self._settings.drain_seconds)
            for chore in late:  # the next server goes on with it
                chore.cancel()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    async def submit(
        self, spec: JobSpec, creator: str, request: Request | None = None, memory_bytes: int | None = None
    ) -> Job:
        """Stores a job; once this returns, it is not lost. See `State.create_job`."""
        job = await asyncio.to_thread(self._state.create_job, spec, creator, request, memory_bytes)
        failpoint("create.done")
        self._wake.set()
        return job

    async def get(self, job_id: str) -> Job:
        return await asyncio.to_thread(self._state.get_job, job_id)

    async def cancel(self, job_id: str) -> Job:
        """Cancels a waiting job at once and asks a running one to end; see `State.request_cancel`."""
        job = await asyncio.to_thread(self._state.request_cancel, job_id)
        if job.state.is_terminal:
            self._see_off(job)
        self._wake.set()
        return job

    async def pause(self, job_id: str) -> Job:
        """Puts a waiting job aside at once and asks a running one to pause; see `State.request_pause`."""
        return await asyncio.to_thread(self._state.request_pause, job_id)

    async def resume(self, job_id: str) -> Job:
        """Queues a paused job again; see `State.request_resume`."""
        job = await asyncio.to_thread(self._state.request_resume, job_id)
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
                await asyncio.to_thread(self._state.demand_unlocked)  # health hears of it if not
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
            if time.monotonic() < self._start_again_time:
                return
            # Who has ended its job still takes its place while it lives.
            lingering = [worker.job.kind for key, worker in self._workers.items() if key not in self._under_way]
            limits = {
                # A slim server leaves trainings to a full one on the same data.
                JobKind.TRAINING: self._settings.max_concurrent_trainings if can_train() else 0,
                JobKind.GENERATION: MAX_CONCURRENT_GENERATIONS,
            }
            free = {kind: limit - lingering.count(kind) for kind, limit in limits.items()}
            job = await asyncio.to_thread(self._state.claim_job, free, self._memory_bytes)
            if job is None:
                return
            failpoint("claim.done")
            await self._start(job)

    async def _start(self, job: Job) -> None:
        """Raises what kept the worker from starting; the job waits again then, and so does every other for a while."""
        try:
            worker = await Child.start(self._settings, job)
        except Exception as error:
            self._num_failed_starts += 1
            self._start_again_time = time.monotonic() + min(2.0**self._num_failed_starts, _MAX_START_DELAY_SECONDS)
            message = f"its worker could not be started: {error}"
            await asyncio.to_thread(self._state.abandon_attempt, job.id, job.attempt, message)
            raise
        self._num_failed_starts = 0
        self._take_charge(worker)

    def _take_charge(self, worker: Worker) -> None:
        key = _key(worker.job)
        self._workers[key] = worker
        self._under_way.add(key)
        worker.settled = asyncio.create_task(self._settle(worker))

    async def _settle(self, worker: Worker) -> None:
        """Waits for a worker's end and writes down what it could not write itself."""
        code = await worker.wait()
        worker.kill_group()  # whatever it started ends with it
        key = _key(worker.job)
        try:
            while not await self._is_buried(worker, code):  # noqa: ASYNC110
                await asyncio.sleep(_SWEEP_SECONDS)
        except Exception:  # the sweep finds the job without a worker, and buries it again
            _LOG.exception("the end of attempt %d of job %s could not be written down", worker.job.attempt, key[0])
        finally:
            del self._workers[key]
            self._pulse.forget(key)
            self._wake.set()

    async def _is_buried(self, worker: Worker, code: int | None) -> bool:
        """False while the store cannot be told."""
        try:
            try:
                await self._bury(worker, code)
            except ConflictError:  # it finished by itself: the ordinary case; but it may have died just after
                for job in await asyncio.to_thread(self._state.ended_jobs_to_see_off):
                    if job.id == worker.job.id:
                        self._see_off(job)
        except KnowledgeEngineError as error:
            if not self._stopping:
                return False
            _LOG.warning("the end of job %s could not be written down: %s", worker.job.id, error.message)
        return True

    async def _bury(self, worker: Worker, code: int | None) -> None:
        """Ends an attempt whose process is gone without a word."""
        job, how = worker.job, worker.verdict or describe_exit(code)
        if worker.interrupted or code in {-signal.SIGTERM, 128 + signal.SIGTERM}:
            message = "interrupted before it could make a checkpoint"
            job = await asyncio.to_thread(self._state.abandon_attempt, job.id, job.attempt, message)
        elif worker.fell_with_its_machine or code == GAVE_UP:
            message = "its machine, its server or the store was away"
            job = await asyncio.to_thread(self._state.abandon_attempt, job.id, job.attempt, message)
        elif worker.was_out_of_memory(code):
            job = await self._bury_out_of_memory(job, how)
        else:
            how += await asyncio.to_thread(last_words, self._settings, job)
            bury = self._state.bury_attempt
            job = await asyncio.to_thread(bury, job.id, job.attempt, how, MAX_CRASHES, Reason.WORKER_CRASHED)
        _LOG.warning("job %s, attempt %d: %s", job.id, job.attempt, how)
        if job.state.is_terminal:
            self._see_off(job)
        else:
            await asyncio.to_thread(self._clean_up, job)

    async def _bury_out_of_memory(self, job: Job, how: str) -> Job:
        """The kernel has killed it for want of memory: with less at once it may go on, where the job allows that."""
        how += f", by the kernel, which had run out of memory ({self._memory_bytes / 2**30:.1f} GiB for all)"
        if message := await asyncio.to_thread(self._second_chance, job):
            return await asyncio.to_thread(self._state.abandon_attempt, job.id, job.attempt, f"{how}; {message}")
        how += "; a smaller per_device_train_batch_size, or shorter conversations, need less"
        bury = self._state.bury_attempt
        return await asyncio.to_thread(bury, job.id, job.attempt, how, MAX_CRASHES, Reason.OUT_OF_MEMORY)

    def _see_off(self, job: Job) -> None:
        """Does for a job that has ended what its worker could not do any more; nobody waits for it."""
        if job.id not in self._chores and not self._stopping:  # else the next server does it
            chore = self._chores[job.id] = asyncio.create_task(self._clear_away(job))
            chore.add_done_callback(lambda _: self._chores.pop(job.id))

    async def _clear_away(self, job: Job) -> None:
        try:
            await asyncio.to_thread(self._clean_up, job)
            if job.tracker_run is not None and can_train():
                last = await Child.start(self._settings, job)
                try:
                    await asyncio.wait_for(last.wait(), LINGERING_SECONDS)
                finally:
                    last.kill_group()
                    await last.wait()
            await asyncio.to_thread(self._state.set_seen_off, job.id)
        except Exception:  # the next server tries again
            _LOG.exception("something of job %s may be left", job.id)

    async def _sweep(self) -> None:
        """Adopts what a former server left, presses what was asked to stop, and ends what gives no sign of life."""
        known = set(self._workers)
        attempts = await asyncio.to_thread(self._state.running_attempts)
        self._under_way = {_key(attempt.job) for attempt in attempts}
        self._pulse.feel({_key(attempt.job): attempt.beat for attempt in attempts})
        cancelling = {attempt.job.id for attempt in attempts if attempt.job.state is JobState.CANCELLING}
        self._cancelled_at = {job_id: self._cancelled_at.get(job_id, time.monotonic()) for job_id in cancelling}
        silent: list[Worker] = []
        for attempt in attempts:
            key = _key(attempt.job)
            worker = self._workers.get(key)
            if worker is None and (key in known or (worker := self._adopted(attempt)) is None):
                continue  # it has just ended, or not yet said who it is
            cancelled_at = self._cancelled_at.get(attempt.job.id)
            if cancelled_at is not None and time.monotonic() - cancelled_at >= self._settings.cancel_grace_seconds:
                worker.kill_group()
            elif self._pulse.is_silent(key):
                silent.append(worker)
        for key, worker in self._workers.items():
            if key not in self._under_way:
                worker.end_lingering()
        for worker in silent:
            await self._end_silent(worker)
        await self._drop_dead_leases()

    def _adopted(self, attempt: RunningAttempt) -> Worker | None:
        """The worker that a former server started; None where it has not said who it is and still may. Should it come
        too late, it finds itself superseded, and nothing is lost."""
        if attempt.worker_pid is None and not self._pulse.is_silent(_key(attempt.job), starting_seconds=0):
            return None
        worker = Adopted(attempt)
        self._take_charge(worker)
        return worker

    async def _end_silent(self, worker: Worker) -> None:
        """Kills a worker without a sign of life, once it is sure that it could have given one."""
        await asyncio.to_thread(self._state.demand_writable)
        if self._pulse.is_lost(_key(worker.job)):
            worker.verdict = f"it gave no sign of life for {self._settings.lease_seconds:g} s"
            worker.kill_group()

    async def _drop_dead_leases(self) -> None:
        beats = await asyncio.to_thread(self._state.lease_beats)
        self._lease_pulse.feel(beats)
        for holder in beats:
            if self._lease_pulse.is_silent(holder):
                _LOG.warning("%s no longer says that it holds memory: it counts as free", holder)
                await asyncio.to_thread(self._state.release_memory, holder)


def can_train() -> bool:
    """Whether torch is installed here; it is not imported."""
    return importlib.util.find_spec("torch") is not None


_Key = tuple[str, int]


def _key(job: Job) -> _Key:
    """An attempt: one job may have a worker that is ending and another that is beginning."""
    return job.id, job.attempt


class _Pulse:
    """Who has given no sign of life for how long, by this process's own clock.

    Only time in which the store could be asked counts: while this process sleeps or the store is away, nobody is
    judged. Clocks that are set, here or elsewhere, change nothing.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience = patience_seconds
        self._beats: dict[object, tuple[int, float]] = {}  # the last beat, and for how long it is the last
        self._felt_at = time.monotonic()

    def feel(self, beats: Mapping[Any, int]) -> None:
        """Takes the counts of all who should live."""
        now = time.monotonic()
        passed, self._felt_at = min(now - self._felt_at, 2 * _SWEEP_SECONDS), now
        before = self._beats
        self._beats = {
            key: (beat, before[key][1] + passed if key in before and before[key][0] == beat else 0.0)
            for key, beat in beats.items()
        }

    def is_silent(self, key: object, starting_seconds: float = _STARTING_SECONDS) -> bool:
        """Whether it should have been heard of; before the first beat it has time to start."""
        beat, silence = self._beats.get(key, (0, 0.0))
        return silence > self._patience + (starting_seconds if beat == 0 else 0)

    def is_lost(self, key: object) -> bool:
        """Whether it stayed silent for another third of the patience: a store that could not be written to may have
        silenced it until just now."""
        beat, silence = self._beats.get(key, (0, 0.0))
        return silence > self._patience * 4 / 3 + 2 * _SWEEP_SECONDS + (_STARTING_SECONDS if beat == 0 else 0)

    def forget(self, key: object) -> None:
        self._beats.pop(key, None)


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
