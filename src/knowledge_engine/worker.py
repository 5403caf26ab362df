"""Runs one attempt of one job in its own process: `python -m knowledge_engine.worker JOB ATTEMPT`.

It writes to the store itself, and every write carries the attempt number, so an attempt that was declared dead is
refused and ends. It also ends when its lease could not be renewed for that lease's length, or when no server has been
alive for the orphan's grace. Killing it is always safe.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from knowledge_engine.core import (
    GenerationResult,
    Job,
    JobKind,
    JobResult,
    JobState,
    JobStopped,
    JobWarning,
    LogLine,
    Progress,
    Service,
    TrackerRun,
    TrainingResult,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import ConflictError, CredentialsError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.generation import journal
from knowledge_engine.jobs import server_is_alive, work_dir
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings, load_settings
from knowledge_engine.state import State
from knowledge_engine.training.publishing import drop_kept

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.5


class Attempt:
    """The `JobContext` of this process; a thread beside the work keeps the lease and looks for reasons to stop."""

    def __init__(self, settings: Settings, state: State, job: Job) -> None:
        self.job = job
        self.work_dir: Path = work_dir(settings, job.id)
        self._settings = settings
        self._state = state
        self._stop_reason: str | None = None
        self._at_end: list[Callable[[JobState | None], None]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_lease, daemon=True, name="lease")

    def __enter__(self) -> Attempt:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def stop(self, reason: str) -> None:
        """Lets the next `check` raise; the first reason counts."""
        self._stop_reason = self._stop_reason or reason

    def check(self) -> None:
        if self._stop_reason is not None:
            raise JobStopped(self._stop_reason)

    def report(self, progress: Progress) -> None:
        self._state.append_events(self.job.id, self.job.attempt, [progress])

    def log(self, message: str) -> None:
        self._state.append_events(self.job.id, self.job.attempt, [LogLine(message=message)])

    def warn(self, reason: str, message: str) -> None:
        self._state.append_events(self.job.id, self.job.attempt, [JobWarning(reason=reason, message=message)])

    def observe(self, service: Service, trouble: str | None) -> None:
        self._state.observe_service(service, trouble)

    def track(self, run: TrackerRun) -> None:
        self._state.set_tracker_run(self.job.id, self.job.attempt, run)

    def at_end(self, call: Callable[[JobState | None], None]) -> None:
        self._at_end.append(call)

    def tell_end(self, state: JobState | None) -> None:
        for call in self._at_end:
            call(state)

    def _keep_lease(self) -> None:
        lease = self._settings.lease_seconds
        pid, started = os.getpid(), psutil.Process().create_time()
        renewed = served = time.monotonic()
        next_renewal = 0.0
        while not self._done.is_set():
            now = time.monotonic()
            try:
                if now >= next_renewal:
                    state = self._state.renew_lease(self.job.id, self.job.attempt, lease, pid, started)
                    renewed, next_renewal = now, now + lease / 3
                else:
                    state = self._state.attempt_state(self.job.id, self.job.attempt)
                if state is JobState.CANCELLING:
                    self.stop("cancelled")
            except ConflictError:
                self.stop("superseded")
            except KnowledgeEngineError as error:
                _LOG.warning("the lease could not be renewed: %s", error.message)
                if now - renewed > lease:
                    self._give_up("the lease could not be renewed")
            if server_is_alive(self._settings):
                served = now
            elif now - served > self._settings.orphan_grace_seconds:
                self._give_up("no server is alive")
            self._done.wait(_POLL_SECONDS)

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
    signal.signal(signal.SIGTERM, lambda *_: attempt.stop("interrupted"))
    with attempt:
        outcome = _work(attempt, settings, state)
    end_attempt(attempt, outcome, settings, state)


def _work(attempt: Attempt, settings: Settings, state: State) -> JobResult | KnowledgeEngineError | JobStopped:
    try:
        return run_job(attempt, settings, state)
    except JobStopped as stop:
        return stop
    except ConflictError:
        return JobStopped("superseded")
    except KnowledgeEngineError as error:
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
) -> None:
    """Writes down how the attempt ended and clears up after it.

    What waits for the end is told last, with what the store decided: it may take a while, which no watcher of the job
    needs to wait for, and a server that stops may kill us in it without harm to the job.

    Raises:
        ConflictError: ATTEMPT_SUPERSEDED.
    """
    left_as: JobState | None = None
    try:
        left_as = _decide(attempt.job, outcome, state)
        if left_as is JobState.CANCELLED and not isinstance(outcome, JobStopped):
            _undo(outcome, settings, state)
        _clean_up(settings, state, attempt.job)
    finally:
        attempt.tell_end(left_as)


def _decide(job: Job, outcome: JobResult | KnowledgeEngineError | JobStopped, state: State) -> JobState | None:
    """The state in which the attempt leaves its job; None where another attempt has it."""
    if not isinstance(outcome, JobStopped):
        return state.finish_attempt(job.id, job.attempt, outcome).state
    match str(outcome):
        case "superseded":
            return None
        case "interrupted":
            return state.abandon_attempt(job.id, job.attempt, "interrupted: the service was stopped", None).state
    return state.finish_attempt(job.id, job.attempt, KnowledgeEngineError("cancelled")).state


def _undo(outcome: JobResult | KnowledgeEngineError, settings: Settings, state: State) -> None:
    """A cancelled job leaves nothing behind, even one that was cancelled at its very last moment."""
    match outcome:
        case TrainingResult():
            try:
                Registry.open(settings).delete(outcome.model, outcome.version)
            except (UpstreamError, CredentialsError) as error:
                _LOG.error("version %d of %r stays published: %s", outcome.version, outcome.model, error.message)
        case GenerationResult():
            Datasets(settings.data_dir / "datasets", state).delete(outcome.dataset)


def _clean_up(settings: Settings, state: State, job: Job) -> None:
    """Takes the job's scratch away once it has ended; the workers' logs stay."""
    ended, folder = state.get_job(job.id), work_dir(settings, job.id)
    if ended.state.is_terminal or ended.attempt == job.attempt:  # else another attempt is at work there
        Registry.open(settings).discard_stage(job.id)
    if ended.state in {JobState.SUCCEEDED, JobState.CANCELLED}:
        drop_kept(settings, job.id)
        (folder / journal.REPLIES).unlink(missing_ok=True)
    if ended.state is JobState.FAILED:
        journal.leave(settings, ended, folder)
    if ended.state.is_terminal:
        for path in folder.iterdir():
            if path.is_dir() and path.name != "tracking":
                shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every conversation
    os.umask(0o077)
    job_id, attempt_number = sys.argv[1], int(sys.argv[2])
    settings = load_settings(env_file=None)
    state = State.open(settings.state_url, migrate=False)
    job = state.get_job(job_id)
    if job.attempt != attempt_number or job.state.is_terminal:
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
