"""Experiment tracking through W&B: an offline run, kept in the job's folder, or an online one where there is a key.

The only importer of wandb, and a late one: it takes seconds. A tracker never raises into training and never blocks it:
a thread of its own does all the talking, starting and finishing wait only so long, and trouble ends as one warning. It
sends what it is given and the job's spec; no argv, environment, code, host or console output. What is promised here is
no operator's to change by accident: W&B's own environment variables and settings files do not count.

A job has one run, named by its id, over all its attempts. It ends there as the job ends; an attempt that is interrupted
leaves it preempted, one that dies leaves it open, and the next attempt goes on with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import httpx2
import psutil

from knowledge_engine.core import Job, JobState, Service, TrackerRun
from knowledge_engine.errors import CredentialsError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.settings import Settings

if TYPE_CHECKING:
    import wandb

_LOG = logging.getLogger(__name__)

UNAVAILABLE = "TRACKER_UNAVAILABLE"
"""The reason of every warning of a tracker."""

_ONLINE_START_SECONDS = 20
_OFFLINE_START_SECONDS = 40  # seconds of imports, on a busy machine
_FINISH_SECONDS = 30
_PROBE_SECONDS = 5
_FLUSH_SECONDS = 1.0  # what a killed worker may lose of its run's file
_MAX_WAITING_METRICS = 10_000
_POSITION_FILE = "position"
_FOLDERS = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")

Warn = Callable[[str, str], None]
"""Takes a reason and a sentence; `JobContext.warn` is one."""
Observe = Callable[[Service, str | None], None]
"""Takes how work with a service went; `JobContext.observe` is one."""


class _Position(NamedTuple):
    """The last optimizer step of a run that was told, and how many rows its history has."""

    step: int
    num_rows: int


class Tracker:
    """One tracked attempt of a job. Metrics carry the names of the Hugging Face integration, such as `train/loss`."""

    run: TrackerRun | None
    """None when there is none: what is logged then goes nowhere, as a warning has said."""

    def __init__(
        self, settings: Settings, job: Job, work_dir: Path, warn: Warn, observe: Observe, online_start_seconds: float
    ) -> None:
        self.run = None
        self._settings = settings
        self._job = job
        self._folder = work_dir / "tracking"
        self._warn = warn
        self._observe = observe
        self._warned = False
        self._is_broken = False
        self._job_is_over = False
        self._online_start_seconds = online_start_seconds
        self._trouble: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._metrics: queue.Queue[dict[str, float] | JobState] = queue.Queue(_MAX_WAITING_METRICS)
        self._started = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="tracker", daemon=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands over metrics of an optimizer step; returns at once."""
        self._put({**metrics, "train/global_step": step})

    def finish(self, state: JobState | None) -> None:
        """Ends the run as the job ended, so it comes after that: SUCCEEDED is a success there, FAILED and CANCELLED are
        none, and QUEUED or PAUSED, after an interruption, leave it preempted. None says nothing there: another attempt
        has the run by now.

        Waits half a minute at most: what was not sent by then stays in the job's folder. The job hears no warning any
        more; trouble is logged.
        """
        self._job_is_over = True
        if state is None:
            self._let_go()
            return
        self._put(state)
        in_time = self._over.wait(self._patience(state))
        if not in_time:
            self._trouble.put(
                "W&B did not finish in time; what it has not sent stays in the job's folder, to be synced"
            )
        self._tell()
        if not in_time or self._is_broken:
            self._let_go()
        elif self.run is not None and self.run.url and not self._warned:
            self._see(None)

    def _patience(self, state: JobState) -> float:
        """Who cancels a job wants its place; an interrupted worker is killed when the drain is over."""
        match state:
            case JobState.CANCELLED:
                return self._settings.cancel_grace_seconds / 2
            case JobState.QUEUED:
                return min(_FINISH_SECONDS, self._settings.drain_seconds / 2)
        return _FINISH_SECONDS

    def _let_go(self) -> None:
        """Ends W&B's own process: it would hold up the end of ours, and say there that the run is over."""
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("wandb-core"):
                    process.kill()

    def _start(self) -> None:
        self._thread.start()
        if not self._started.wait(self._online_start_seconds + _OFFLINE_START_SECONDS):
            self._trouble.put("W&B does not start; this job may go untracked")
        if self.run is not None and self.run.url:
            self._see(None)
        self._tell()

    def _put(self, item: dict[str, float] | JobState) -> None:
        self._tell()
        if not self._thread.is_alive():
            return
        try:
            self._metrics.put_nowait(item)
        except queue.Full:
            self._trouble.put("W&B does not keep up; some metrics are left out there")

    def _tell(self) -> None:
        """Passes trouble on, in the caller's thread, once."""
        while not self._trouble.empty():
            sentence = self._trouble.get()
            if self._job_is_over:
                _LOG.warning("%s", sentence)
            elif not self._warned:
                self._warn(UNAVAILABLE, sentence)
            if not self._warned and self._settings.wandb_api_key is not None:
                self._see(sentence)
            self._warned = True

    def _see(self, trouble: str | None) -> None:
        try:
            self._observe(Service.TRACKER, trouble)
        except KnowledgeEngineError as error:  # what health would have told is worth no job
            _LOG.warning("how W&B did could not be noted: %s", error.message)

    # --- in the tracker's own thread ------------------------------------------------------------------------------

    def _talk(self) -> None:
        lock: int | None = None
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self._await_turn()
            run = self._open()
            self.run = TrackerRun(id=run.id, url="" if run.offline else run.url or "")
            last = self._read_position(run)
            run.summary["state"] = JobState.RUNNING.value
            self._started.set()
            while not isinstance(item := self._metrics.get(), JobState):
                if item["train/global_step"] < last.step:
                    continue  # an earlier attempt has told it
                run.log(item, step=last.num_rows if run.offline else None, commit=True)
                last = _Position(int(item["train/global_step"]), last.num_rows + 1)
                if run.offline:
                    self._write_position(last)
            self._end(run, item)
        # Whatever a tracker throws, training must go on; the sentence names the kind, never values.
        except Exception as error:
            self._is_broken = True
            self._trouble.put(f"W&B failed ({type(error).__name__}); what it has not sent stays in the job's folder")
        finally:
            if lock is not None:
                os.close(lock)
            self._started.set()
            self._over.set()

    def _await_turn(self) -> int:
        """Until the job's former attempt, which may still be telling W&B that it was interrupted, is done with that;
        the lock ends with its process."""
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + _FINISH_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
            else:
                break
        return lock

    def _read_position(self, run: wandb.Run) -> _Position:
        """How far the job's earlier attempts came: W&B knows, and for offline ones a file beside them."""
        if not run.offline:
            summary: Mapping[str, Any] = dict(run.summary)
            return _Position(int(summary.get("train/global_step") or 0), 0)
        try:
            step, num_rows = (self._folder / _POSITION_FILE).read_text(encoding="ascii").split()
            return _Position(int(step), int(num_rows))
        except (FileNotFoundError, ValueError):
            return _Position(0, 0)

    def _write_position(self, position: _Position) -> None:
        new = self._folder / f"{_POSITION_FILE}.new"
        new.write_text(f"{position.step} {position.num_rows}", encoding="ascii")
        new.replace(self._folder / _POSITION_FILE)

    def _end(self, run: wandb.Run, state: JobState) -> None:
        run.summary["state"] = state.value
        if not state.is_terminal:
            run.mark_preempting()  # its end is then no end: the run waits to be gone on with
        run.finish(exit_code=0 if state is JobState.SUCCEEDED else 1)

    def _open(self) -> wandb.Run:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]  # another run's id, another mode, tags, notes: whatever W&B reads there
        os.environ.update(dict.fromkeys(_FOLDERS, str(self._folder)))
        os.environ["WANDB_SILENT"] = "true"
        # Its reports about itself; where its server is silent they hold up the end of the process for 20 s.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        if self._settings.wandb_api_key is not None:
            try:
                return self._init("online")
            except Exception as error:
                self._trouble.put(f"{_refusal(error)}; tracking offline, to be synced later")
                self._let_go()  # it would not let go of the run's id
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> wandb.Run:
        import wandb

        with contextlib.suppress(Exception, SystemExit):  # of the failed first try, whose process was ended
            wandb.teardown()
        key = self._settings.wandb_api_key
        run = wandb.init(
            project=self._settings.wandb_project,
            entity=self._settings.wandb_entity,
            id=self._job.id,
            name=self._job.id,
            config={"job": self._job.id, "kind": self._job.kind.value, **self._job.spec.model_dump(mode="json")},
            mode=mode,
            # A later attempt of the job goes on with its run; offline the two are joined when synced.
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                api_key=key.get_secret_value() if mode == "online" and key is not None else None,
                base_url=self._settings.wandb_base_url,
                root_dir=str(self._folder),
                console="off",
                silent=True,
                host="",
                program="knowledge-engine",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=_FLUSH_SECONDS,
                init_timeout=self._online_start_seconds,
                login_timeout=self._online_start_seconds,
                finish_timeout=_FINISH_SECONDS - 5,
                finish_timeout_raises=True,
                stop_fn=_stop_pressed,
            ),
        )
        wandb.termsetup(run.settings, _Terminal(self._trouble))
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        return run


def _stop_pressed() -> None:
    """In place of W&B's own answer to its stop button, which is to interrupt this process."""
    _LOG.warning("someone pressed stop at W&B; a job is stopped by cancelling it here")


class _Terminal:
    """Hears what W&B would print."""

    def __init__(self, trouble: queue.SimpleQueue[str]) -> None:
        self._trouble = trouble

    def info(self, message: str, /) -> None:
        _LOG.info("W&B: %s", message)

    def warning(self, message: str, /) -> None:
        _LOG.warning("W&B: %s", message)
        if "Fatal error while uploading" in message:
            self._trouble.put("W&B takes no more of this run's data; it stays in the job's folder, to be synced")

    error = debug = warning


def _refusal(error: Exception) -> str:
    text = str(error)
    if any(f"error {status}" in text for status in (401, 403)):
        return "W&B refuses the key (KNOWLEDGE_WANDB_API_KEY)"
    return f"W&B cannot be reached ({type(error).__name__})"


def probe(settings: Settings) -> None:
    """Looks whether W&B answers and knows our key; without a key there is nothing to look at.

    Raises:
        CredentialsError: UPSTREAM_CREDENTIALS.
        UpstreamError: TRACKER_UNREACHABLE.
    """
    if settings.wandb_api_key is None:
        return
    url = settings.wandb_base_url
    try:
        answer = httpx2.post(
            f"{url}/graphql",
            json={"query": "query Viewer { viewer { id } }"},
            auth=("api", settings.wandb_api_key.get_secret_value()),
            timeout=_PROBE_SECONDS,
        )
        if answer.status_code not in (401, 403):
            answer.raise_for_status()
        known = answer.is_success and bool(answer.json()["data"]["viewer"])
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise UpstreamError(
            f"W&B at {url} does not answer as it should ({type(error).__name__}); training goes on, tracked offline",
            reason=Reason.TRACKER_UNREACHABLE,
            url=url,
            error=type(error).__name__,
        ) from None
    if not known:
        raise CredentialsError(
            f"W&B at {url} does not know our key: set KNOWLEDGE_WANDB_API_KEY to a valid one",
            reason=Reason.UPSTREAM_CREDENTIALS,
            url=url,
        )


def open_tracker(
    settings: Settings,
    job: Job,
    work_dir: Path,
    warn: Warn,
    observe: Observe,
    *,
    online_start_seconds: float = _ONLINE_START_SECONDS,
) -> Tracker:
    """Starts tracking an attempt of a job; never raises. `warn` is told, once, if it cannot be tracked as it should,
    `observe` how online work went.

    With a key, W&B has `online_start_seconds` to answer; after that the run is kept offline, to be synced later.
    """
    tracker = Tracker(settings, job, work_dir, warn, observe, online_start_seconds)
    tracker._start()
    return tracker
