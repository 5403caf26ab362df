"""Runs one attempt of one job in its own process: `python -m knowledge_engine.worker JOB ATTEMPT`. For a job that has
ended it only tells the job's tracker so.

It writes to the store itself, and every write carries the attempt number, so an attempt that was declared dead is
refused and ends. While the store cannot be written to, the work goes on and its events wait here; it ends when that, or
the absence of any server, outlasts the orphan's grace. Killing it is always safe.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from knowledge_engine import devices
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
from knowledge_engine.leftovers import clean_up
from knowledge_engine.processes import GAVE_UP, process_identity, server_is_alive, work_dir
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings, load_settings
from knowledge_engine.state import Orders, State

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_STORE_PATIENCE_SECONDS = 2.0
_STORE_RETRY_SECONDS = 5.0
_SUPERSEDED_SECONDS = 8.0
_SECOND_SIGNAL_SECONDS = 2.0
"""Who stops a whole service may signal a worker twice at once; later, a second signal is meant."""

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
        self._deciding = threading.RLock()  # a signal may come while this very thread holds it
        self._refused_since: float | None = None
        """Since when the store has taken no write; None while it does."""
        self._superseded_since: float | None = None
        self._is_over = False
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
        with self._deciding:
            if self._stop_reason in {None, StopReason.PAUSED, StopReason.INTERRUPTED}:
                self._stop_reason = reason

    def check(self) -> None:
        if (reason := self._stop_reason) is not None:
            raise JobStopped(reason)

    def report(self, progress: Progress) -> None:
        self._say(progress)

    def log(self, message: str) -> None:
        self._say(LogLine(message=_sayable(message)))

    def warn(self, reason: str, message: str) -> None:
        self._say(JobWarning(reason=reason, message=_sayable(message)))

    def checkpointed(self, step: int, size_bytes: int) -> None:
        self._say(Checkpoint(step=step, size_bytes=size_bytes))

    def observe(self, service: Service, trouble: str | None) -> None:
        try:
            self._state.observe_service(service, trouble)
        except UpstreamError as error:
            _LOG.warning("how %s does could not be written down: %s", service, error.message)

    def track(self, run: TrackerRun) -> None:
        self.insist(lambda: self._state.set_tracker_run(self.job.id, self.job.attempt, run))

    def expect_memory(self, memory_bytes: int) -> None:
        self.insist(lambda: self._state.expect_memory(self.job.id, self.job.attempt, memory_bytes))

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
                self._be_refused()
                time.sleep(_POLL_SECONDS)

    def end(self, write: Callable[[], _Answer]) -> _Answer:
        """As `insist`, for the write after which this attempt has no say any more."""
        answer = self.insist(write)
        self._is_over = True
        return answer

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
                self._refused_since = None
            with self._speaking:
                del self._waiting[: len(payloads)]

    def _live(self) -> None:
        served = time.monotonic()
        next_beat = 0.0
        while not self._done.is_set():
            now = time.monotonic()
            try:
                next_beat = self._hear(now, next_beat)
                if server_is_alive(self._settings):
                    served = now
            except Exception:  # a file too many, for one; the next round may do better
                _LOG.exception("a round of looking around failed")
            if now - served > self._settings.orphan_grace_seconds:
                self.stop(StopReason.INTERRUPTED)  # to keep what there is
            if now - served > 2 * self._settings.orphan_grace_seconds:
                self._give_up("no server is alive")
            if self._superseded_since is not None and now - self._superseded_since > _SUPERSEDED_SECONDS:
                self._give_up("another attempt has the job")
            self._done.wait(_POLL_SECONDS)

    def _hear(self, now: float, next_beat: float) -> float:
        """Says what there is to say, hears what to do, and answers when the next beat is due."""
        if self._is_over:
            return next_beat
        try:
            self._deliver()
            if now >= next_beat:
                next_beat = now + self._settings.lease_seconds / 3
                self._obey(self._beat())
            else:
                self._obey(self._state.orders(self.job.id, self.job.attempt))
        except ConflictError:
            if not self._is_over:
                self.stop(StopReason.SUPERSEDED)
                self._superseded_since = self._superseded_since or now
        except KnowledgeEngineError as error:
            _LOG.warning("no sign of life could be given: %s", error.message)
            self._be_refused()
            return 0.0
        return next_beat

    def _beat(self) -> Orders:
        pid = os.getpid()
        orders = self._state.beat(self.job.id, self.job.attempt, pid, process_identity(pid) or "")
        self._refused_since = None
        return orders

    def _be_refused(self) -> None:
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > self._settings.orphan_grace_seconds:
            self.stop(StopReason.INTERRUPTED)  # to keep what there is
        if now - self._refused_since > 2 * self._settings.orphan_grace_seconds:
            self._give_up("the store took no write")

    def _obey(self, orders: Orders) -> None:
        if orders.state is JobState.CANCELLING:
            self.stop(StopReason.CANCELLED)
        elif orders.pause_requested and self._stop_reason is None:
            self.stop(StopReason.PAUSED)
        elif not orders.pause_requested:
            self._take_back(StopReason.PAUSED)

    def _take_back(self, reason: StopReason) -> None:
        """Somebody thought better of it before the work noticed."""
        with self._deciding:
            if self._stop_reason is reason:
                self._stop_reason = None

    def _give_up(self, why: str) -> None:
        """Ends the process at once: nobody would hear of its work, and a later attempt will redo it."""
        _LOG.error("giving up: %s", why)
        os._exit(GAVE_UP)


def _sayable(text: str) -> str:
    """Half a character, as some services and file names have it, can be stored nowhere."""
    return text.encode("utf-8", "replace").decode("utf-8")


def run_job(attempt: Attempt, settings: Settings, state: State) -> JobResult:
    """The one place that knows which code does which kind of job; heavy imports wait until they are needed."""
    datasets = Datasets(settings.data_dir / "datasets", state, attempt=attempt.job.attempt)
    match attempt.job.kind:
        case JobKind.TRAINING:
            failpoint("training.begin")
            devices.prepare_compiler(settings)
            from knowledge_engine.training.job import run_training

            return run_training(attempt, settings, datasets, Registry.open(settings))
        case JobKind.GENERATION:
            from knowledge_engine.generation.pipeline import run_generation

            return run_generation(attempt, settings, datasets)


def run_attempt(settings: Settings, state: State, job: Job) -> None:
    """Runs the attempt and ends it; raises nothing that belongs to the job."""
    attempt = Attempt(settings, state, job)

    first: list[float] = []

    def interrupt(*_: object) -> None:
        first.append(time.monotonic())
        if first[-1] - first[0] > _SECOND_SIGNAL_SECONDS:
            os._exit(128 + signal.SIGTERM)
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
    if left_as is not None and left_as.is_terminal:
        state.set_seen_off(job.id)


def _work(attempt: Attempt, settings: Settings, state: State) -> JobResult | KnowledgeEngineError | JobStopped:
    try:
        return run_job(attempt, settings, state)
    except JobStopped as stop:
        return stop
    except ConflictError:
        return JobStopped(StopReason.SUPERSEDED)
    except KnowledgeEngineError as error:
        if error.reason is Reason.STATE_UNAVAILABLE:  # that is no fault of the job's
            time.sleep(_STORE_RETRY_SECONDS)
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
    left = attempt.end(lambda: _decide(attempt.job, outcome, state))
    failpoint("finish.done")
    if left is None:
        return None
    clean_up(settings, state, left)
    return left.state


def _decide(job: Job, outcome: JobResult | KnowledgeEngineError | JobStopped, state: State) -> Job | None:
    """The job as this attempt leaves it."""
    if not isinstance(outcome, JobStopped):
        return state.finish_attempt(job.id, job.attempt, outcome)
    match outcome.reason:
        case StopReason.SUPERSEDED:
            return None
        case StopReason.CANCELLED:
            return state.finish_attempt(job.id, job.attempt, KnowledgeEngineError("cancelled"))
        case StopReason.INTERRUPTED:
            message = "interrupted: its worker was asked to end"
        case StopReason.PAUSED:
            message = "put aside on request"
        case StopReason.RETRY:
            message = outcome.message
    return state.abandon_attempt(job.id, job.attempt, message)


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
    _LOG.info("attempt %d of job %s begins", attempt_number, job_id)
    try:
        run_attempt(settings, state, job)
    except ConflictError:
        _LOG.warning("attempt %d of job %s is over", attempt_number, job_id)
    except SystemExit as crash:  # of a process that the work had started
        _LOG.error("%s", crash)
        os._exit(1)  # at once, or what libraries say as they end would be its last words
    finally:
        state.close()
    _LOG.info("peak memory %d MiB", devices.peak_memory() // 2**20)


if __name__ == "__main__":
    main()
