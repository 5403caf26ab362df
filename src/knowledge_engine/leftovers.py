"""What the attempts of a job leave behind, and what of it goes when. No torch: server and workers clear up alike."""

from __future__ import annotations

import contextlib
import logging
import shutil
from datetime import timedelta

from knowledge_engine.core import GenerationSpec, Job, JobState, TrainingSpec, utc_now
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import KnowledgeEngineError, NotFoundError, Reason, StateError
from knowledge_engine.generation import journal
from knowledge_engine.processes import work_dir
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.training.plan import CHECKPOINTS, take_less
from knowledge_engine.training.publishing import KEPT_FOR, drop_kept

_DEATHS = {Reason.WORKER_CRASHED, Reason.OUT_OF_MEMORY}

_LOG = logging.getLogger(__name__)


def clean_up(settings: Settings, state: State, job: Job) -> None:
    """Takes away what the job's attempts have left and nobody needs in the state that it is in; safe to repeat.

    What was cancelled, or died, has published nothing, even if that was at its very last moment. The workers' logs
    stay, and so does what a job goes on from, or somebody may want to after it has failed.
    """
    registry = Registry.open(settings)
    registry.discard_stage(job.id, job.attempt)
    folder = work_dir(settings, job.id)
    if job.attempt and (job.state is JobState.CANCELLED or _was_declared_dead(job)):
        _retract(settings, state, registry, job)
    if job.state in {JobState.SUCCEEDED, JobState.CANCELLED}:
        drop_kept(settings, job.id)
        (folder / journal.REPLIES).unlink(missing_ok=True)
    if job.state is JobState.FAILED:
        journal.leave(settings, job, folder)
    if job.state.is_terminal and folder.is_dir():
        spared = {"tracking"} | ({CHECKPOINTS} if job.state is JobState.FAILED else set())
        for path in folder.iterdir():
            if path.is_dir() and path.name not in spared:
                shutil.rmtree(path, ignore_errors=True)


def _was_declared_dead(job: Job) -> bool:
    """Whether its workers crashed so often that the server has given it up."""
    return job.state is JobState.FAILED and job.error is not None and job.error["reason"] in _DEATHS


def _retract(settings: Settings, state: State, registry: Registry, job: Job) -> None:
    match job.spec:
        case TrainingSpec(model=model):
            try:
                registry.retract(model, job.id)
            except KnowledgeEngineError as error:
                _LOG.error("what job %s has published of %r may stay: %s", job.id, model, error.message)
        case GenerationSpec(dataset=str(name)):
            datasets = Datasets(settings.data_dir / "datasets", state)
            with contextlib.suppress(NotFoundError, StateError):
                if state.get_dataset(name).job_id == job.id:
                    datasets.delete(name)
            datasets.discard_unrecorded(name)


def second_chance(settings: Settings, job: Job) -> str | None:
    """How the job's next attempt does with less memory, for a worker that could not say so itself; None where it may
    not, or does already."""
    if isinstance(job.spec, TrainingSpec) and job.spec.auto_find_batch_size:
        return take_less(work_dir(settings, job.id), job.spec)
    return None


def sweep_checkpoints(settings: Settings, state: State, max_age: timedelta = KEPT_FOR) -> None:
    """Takes away the checkpoints of jobs that failed long ago: nobody came back for them."""
    for folder in (settings.data_dir / "jobs").glob(f"*/{CHECKPOINTS}"):
        with contextlib.suppress(NotFoundError):
            job = state.get_job(folder.parent.name)
            if job.end_time is not None and utc_now() - job.end_time > max_age:
                _LOG.warning("the checkpoints of job %s are taken away: it failed more than 30 days ago", job.id)
                shutil.rmtree(folder, ignore_errors=True)
