"""Runs one attempt of one job in its own process: `python -m knowledge_engine.worker JOB ATTEMPT`. For a job that has
ended it only tells the job's tracker so.

It writes to the store itself, and every write carries the attempt number, so an attempt that was declared dead is
refused and ends. While the store cannot be written to, the work goes on and its events wait here; it ends when that, or
the absence of any server, outlasts the orphan's grace. Killing it is always safe.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from knowledge_engine.core import (
    Checkpoint,
    EventPayload,
    Job,
    JobKind,
    JobResult,
    JobState,
    JobStopped,
    JobWarning,
    LogLine,
    Progress,
    Service,
    StopReason,
    TrackerRun,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import (
    ConflictError,
    KnowledgeEngineError,
    Reason,
    UpstreamError,
)
from knowledge_engine.failpoints import failpoint
from knowledge_engine.jobs import process_identity, server_is_alive, work_dir
from knowledge_engine.leftovers import clean_up
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings, load_settings
from knowledge_engine.state import Orders, State

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_STORE_PATIENCE_SECONDS = 2.0

_Answer = TypeVar("_Answer")


class Attempt:
    """The `JobContext` of this process; a thread beside the work gives signs of life, delivers events that had to
    wait, and looks for reasons to stop."""

    def __init__(self, settings: Settings, state: State, job: Job) -> None:
        self.job = job
        self.work_dir: Path = work_dir(settings, job.id)
        self._settings = settings
        self._state = state
        self._stop_reason: StopReason | None = None
        self._at_end: list[Callable[[JobState | None], None]] = []
        self._waiting: list[EventPayload] = []
        self._speaking = threading.Lock()
        self._delivering = threading.Lock()
        self._heard = time.monotonic()
        """When the store last took a write."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="lease")

    def __enter__(self) -> Attempt:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def stop(self, reason: StopReason) -> None:
        """Lets the next `check` raise. An attempt that was to stop and go on later may still be cancelled."""
        if self._stop_reason in {None, StopReason.PAUSED, StopReason.INTERRUPTED}:
            self._stop_reason = reason

    def check(self) -> None:
        if self._stop_reason is not None:
            raise JobStopped(self._stop_reason)

    def report(self, progress: Progress) -> None:
        self._say(progress)

    def log(self, message: str) -> None:
        self._say(LogLine(message=message))

    def warn(self, reason: str, message: str) -> None:
        self._say(JobWarning(reason=reason, message=message))

    def checkpointed(self, step: int, size_bytes: int) -> None:
        self._say(Checkpoint(step=step, size_bytes=size_bytes))

    def observe(self, service: Service, trouble: str | None) -> None:
        try:
            self._state.observe_service(service, trouble)
        except UpstreamError as error:
            _LOG.warning("how %s does could not be written down: %s", service, error.message)

    def track(self, run: TrackerRun) -> None:
        self.insist(lambda: self._state.set_tracker_run(self.job.id, self.job.attempt, run))

    def at_end(self, call: Callable[[JobState | None], None]) -> None:
        self._at_end.append(call)

    def tell_end(self, state: JobState | None) -> None:
        for call in self._at_end:
            call(state)

    def insist(self, write: Callable[[], _Answer]) -> _Answer:
        """The answer of a write, which waits for a store that cannot take it now.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED.
        """
        while True:
            try:
                self._deliver()
                return write()
            except UpstreamError as error:
                _LOG.warning("the store is asked again: %s", error.message)
                if time.monotonic() - self._heard > self._settings.orphan_grace_seconds:
                    self._give_up("the store took no write")
                time.sleep(_POLL_SECONDS)

    def _say(self, payload: EventPayload) -> None:
        """Adds an event; one that cannot be stored now waits for those before it."""
        with self._speaking:
            was_silent = bool(self._waiting)
            self._waiting.append(payload)
        if not was_silent:
            try:
                self._deliver()
            except UpstreamError as error:
                _LOG.warning("events wait for the store: %s", error.message)

    def _deliver(self) -> None:
        """Stores what waits, in order.

        Raises:
            UpstreamError: STATE_UNAVAILABLE; it goes on waiting.
            ConflictError: ATTEMPT_SUPERSEDED.
        """
        with self._delivering:
            with self._speaking:
                payloads = list(self._waiting)
            if payloads:
                self._state.append_events(self.job.id, self.job.attempt, payloads)
                self._heard = time.monotonic()
            with self._speaking:
                del self._waiting[: len(payloads)]

    def _live(self) -> None:
        served = time.monotonic()
        next_beat = 0.0
        while not self._done.is_set():
            now = time.monotonic()
            try:
                self._deliver()
                if now >= next_beat:
                    orders = self._beat()
                    next_beat = now + self._settings.lease_seconds / 3
                else:
                    orders = self._state.orders(self.job.id, self.job.attempt)
                self._obey(orders)
            except ConflictError:
                self.stop(StopReason.SUPERSEDED)
            except KnowledgeEngineError as error:
                _LOG.warning("no sign of life could be given: %s", error.message)
                if now - self._heard > self._settings.orphan_grace_seconds:
                    self._give_up("the store took no write")
            if server_is_alive(self._settings):
                served = now
            elif now - served > self._settings.orphan_grace_seconds:
                self._give_up("no server is alive")
            self._done.wait(_POLL_SECONDS)

    def _beat(self) -> Orders:
        pid = os.getpid()
        orders = self._state.beat(self.job.id, self.job.attempt, pid, process_identity(pid) or "")
        self._heard = time.monotonic()
        return orders

    def _obey(self, orders: Orders) -> None:
        if orders.state is JobState.CANCELLING:
            self.stop(StopReason.CANCELLED)
        elif orders.pause_requested and self._stop_reason is None:
            self.stop(StopReason.PAUSED)
        elif not orders.pause_requested and self._stop_reason is StopReason.PAUSED:
            self._stop_reason = None  # somebody thought better of it before the work noticed

    def _give_up(self, why: str) -> None:
        """Ends the process at once: nobody would hear of its work, and a later attempt will redo it."""
        _LOG.error("giving up: %s", why)
        os._exit(3)


def run_job(attempt: Attempt, settings: Settings, state: State) -> JobResult:
    """The one place that knows which code does which kind of job; heavy imports wait until they are needed."""
    datasets = Datasets(settings.data_dir / "datasets", state)
    match attempt.job.kind:
        case JobKind.TRAINING:
            from knowledge_engine.training.job import run_training

            return run_training(attempt, settings, datasets, Registry.open(settings))
        case JobKind.GENERATION:
            from knowledge_engine.generation.pipeline import run_generation

            return run_generation(attempt, settings, datasets)


def run_attempt(settings: Settings, state: State, job: Job) -> None:
    """Runs the attempt and ends it; raises nothing that belongs to the job."""
    attempt = Attempt(settings, state, job)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
        attempt.stop(StopReason.INTERRUPTED)

    signal.signal(signal.SIGTERM, interrupt)
    left_as: JobState | None = None
    try:
        with attempt:
            left_as = end_attempt(attempt, _work(attempt, settings, state), settings, state)
    finally:
        # Last of all: it may take a while, which no watcher of the job needs to wait for, and a server that stops may
        # kill us in it without harm to the job.
        attempt.tell_end(left_as)


def _work(attempt: Attempt, settings: Settings, state: State) -> JobResult | KnowledgeEngineError | JobStopped:
    try:
        return run_job(attempt, settings, state)
    except JobStopped as stop:
        return stop
    except ConflictError:
        return JobStopped(StopReason.SUPERSEDED)
    except KnowledgeEngineError as error:
        if error.reason is Reason.STATE_UNAVAILABLE:  # that is no fault of the job's
            return JobStopped(StopReason.RETRY, f"interrupted: {error.message}")
        _LOG.exception("the job failed")
        return error
    except MemoryError:
        _LOG.exception("the job ran out of memory")
        return KnowledgeEngineError("the job ran out of memory", reason=Reason.OUT_OF_MEMORY)
    except Exception:
        _LOG.exception("the job failed unexpectedly")
        return KnowledgeEngineError(
            f"something unexpected went wrong; the worker's log in jobs/{attempt.job.id} says what",
            reason=Reason.INTERNAL,
        )


def end_attempt(
    attempt: Attempt, outcome: JobResult | KnowledgeEngineError | JobStopped, settings: Settings, state: State
) -> JobState | None:
    """Writes down how the attempt ended and clears up after it; the state in which it leaves its job, None where
    another attempt has it.

    Raises:
        ConflictError: ATTEMPT_SUPERSEDED.
    """
    failpoint("finish.before")
    left_as = attempt.insist(lambda: _decide(attempt.job, outcome, state))
    failpoint("finish.done")
    if left_as is not None:
        clean_up(settings, state, attempt.job.model_copy(update={"state": left_as}))
    return left_as


def _decide(job: Job, outcome: JobResult | KnowledgeEngineError | JobStopped, state: State) -> JobState | None:
    if not isinstance(outcome, JobStopped):
        return state.finish_attempt(job.id, job.attempt, outcome).state
    match outcome.reason:
        case StopReason.SUPERSEDED:
            return None
        case StopReason.CANCELLED:
            return state.finish_attempt(job.id, job.attempt, KnowledgeEngineError("cancelled")).state
        case StopReason.INTERRUPTED:
            message = "interrupted: its worker was asked to end"
        case StopReason.PAUSED:
            message = "paused on request"
        case StopReason.RETRY:
            message = outcome.message
    return state.abandon_attempt(job.id, job.attempt, message).state


def tell_end(settings: Settings, job: Job) -> None:
    """Tells the job's tracker how it ended, for a worker that could not."""
    from knowledge_engine.tracking import open_tracker

    def warn(reason: str, message: str) -> None:
        _LOG.warning("%s: %s", reason, message)

    tracker = open_tracker(settings, job, work_dir(settings, job.id), warn, lambda service, trouble: None)
    tracker.finish(job.state)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every conversation
    os.umask(0o077)
    job_id, attempt_number = sys.argv[1], int(sys.argv[2])
    settings = load_settings(env_file=None)
    state = State.open(settings.state_url, migrate=False, busy_timeout_seconds=_STORE_PATIENCE_SECONDS)
    job = state.get_job(job_id)
    if job.attempt == attempt_number and job.state.is_terminal:
        tell_end(settings, job)
        return
    if job.attempt != attempt_number or job.state not in {JobState.RUNNING, JobState.CANCELLING}:
        raise SystemExit(f"attempt {attempt_number} of job {job_id} is over")
    try:
        run_attempt(settings, state, job)
    except ConflictError:
        _LOG.warning("attempt %d of job %s is over", attempt_number, job_id)
    finally:
        state.close()
    _LOG.info("peak memory %d MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main()
