"""Experiment tracking through W&B: an offline run, kept in the job's folder, or an online one where there is a key.

The only importer of wandb, and a late one: it takes seconds. A tracker never raises into training and never blocks it:
a thread of its own does all the talking, starting and finishing wait only so long, and trouble ends as one warning. It
sends what it is given and the job's spec; no argv, environment, code, host or console output.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_engine.core import Job, JobState, TrackerRun
from knowledge_engine.settings import Settings

if TYPE_CHECKING:
    import wandb

_LOG = logging.getLogger(__name__)

UNAVAILABLE = "TRACKER_UNAVAILABLE"
"""The reason of every warning of a tracker."""

_ONLINE_START_SECONDS = 20
_OFFLINE_START_SECONDS = 40  # seconds of imports, on a busy machine
_FINISH_SECONDS = 30
_MAX_WAITING_METRICS = 10_000
_FOLDERS = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")

Warn = Callable[[str, str], None]
"""Takes a reason and a sentence; `JobContext.warn` is one."""


class Tracker:
    """One tracked attempt of a job. Metrics carry the names of the Hugging Face integration, such as `train/loss`."""

    run: TrackerRun | None
    """None when there is none: what is logged then goes nowhere, as a warning has said."""

    def __init__(self, settings: Settings, job: Job, work_dir: Path, warn: Warn, online_start_seconds: float) -> None:
        self.run = None
        self._settings = settings
        self._job = job
        self._folder = work_dir / "tracking"
        self._warn = warn
        self._warned = False
        self._online_start_seconds = online_start_seconds
        self._trouble: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._metrics: queue.Queue[dict[str, float] | JobState] = queue.Queue(_MAX_WAITING_METRICS)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="tracker", daemon=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands over metrics of an optimizer step; returns at once."""
        self._put({**metrics, "train/global_step": step})

    def finish(self, state: JobState) -> None:
        """Ends the run in the job's state, within half a minute; only SUCCEEDED counts as a success there."""
        self._put(state)
        self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive():
            self._trouble.put("W&B did not finish in time; what it has not sent stays in the job's folder")
        self._tell()

    def _start(self) -> None:
        self._thread.start()
        if not self._started.wait(self._online_start_seconds + _OFFLINE_START_SECONDS):
            self._trouble.put("W&B does not start; this job may go untracked")
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
            if not self._warned:
                self._warned = True
                self._warn(UNAVAILABLE, sentence)

    # --- in the tracker's own thread ------------------------------------------------------------------------------

    def _talk(self) -> None:
        try:
            run = self._open()
            self.run = TrackerRun(id=run.id, url="" if run.offline else run.url or "")
            self._started.set()
            while not isinstance(item := self._metrics.get(), JobState):
                run.log(item)
            run.summary["state"] = item.value
            run.finish(exit_code=0 if item is JobState.SUCCEEDED else 1)
        # Whatever a tracker throws, training must go on; the sentence names the kind, never values.
        except Exception as error:
            self._trouble.put(f"W&B failed ({type(error).__name__}); this job goes on untracked")
        finally:
            self._started.set()

    def _open(self) -> wandb.Run:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ.update(dict.fromkeys(_FOLDERS, str(self._folder)))
        # Its reports about itself; where its server is silent they hold up the end of the process for 20 s.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        if self._settings.wandb_api_key is not None:
            try:
                return self._init("online")
            except Exception as error:
                self._trouble.put(
                    f"W&B cannot be reached ({type(error).__name__}); tracking offline, to be synced later"
                )
        return self._init("offline")

    def _init(self, mode: str) -> wandb.Run:
        import wandb

        wandb.teardown()  # the service of a failed first try would not let go of the run's id
        key = self._settings.wandb_api_key
        options: dict[str, Any] = {"api_key": key.get_secret_value()} if mode == "online" and key is not None else {}
        run = wandb.init(
            project=self._settings.wandb_project,
            entity=self._settings.wandb_entity,
            id=self._job.id,
            name=self._job.id,
            config={"job": self._job.id, "kind": self._job.kind.value, **self._job.spec.model_dump(mode="json")},
            mode="online" if mode == "online" else "offline",
            # A second attempt of the job goes on with its run; offline the two are joined when synced.
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                **options,
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
                init_timeout=self._online_start_seconds,
                login_timeout=self._online_start_seconds,
                finish_timeout=_FINISH_SECONDS - 5,
            ),
        )
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        return run


def _log_warning(reason: str, sentence: str) -> None:
    _LOG.warning("%s: %s", reason, sentence)


def open_tracker(
    settings: Settings,
    job: Job,
    work_dir: Path,
    warn: Warn = _log_warning,
    *,
    online_start_seconds: float = _ONLINE_START_SECONDS,
) -> Tracker:
    """Starts tracking an attempt of a job; never raises. `warn` is told, once, if it cannot be tracked as it should.

    With a key, W&B has `online_start_seconds` to answer; after that the run is kept offline, to be synced later.
    """
    tracker = Tracker(settings, job, work_dir, warn, online_start_seconds)
    tracker._start()
    return tracker
