"""What lies between a trained adapter and a published version: the adapter is kept until the job has ended well.

A killed attempt, or a bucket that does not answer, costs no training: the next attempt of the job, or another job that
would train exactly the same, goes on with what is kept in `<data_dir>/unpublished/<fingerprint>/<job>`. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from knowledge_engine.core import (
    HeldOutComparison,
    JobContext,
    JobStopped,
    ModelVersion,
    Service,
    StopReason,
    TrainingSpec,
)
from knowledge_engine.errors import CredentialsError, KnowledgeEngineError, UpstreamError, from_dict
from knowledge_engine.files import replace_durably, sha256_of, sync
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings

KEPT_FOR = timedelta(days=30)

_FACTS = "trained.json"
_ADAPTER = "adapter"
_LOCK = "lock"
LIBRARIES = ("knowledge-engine", "torch", "transformers", "peft", "bitsandbytes", "numpy")
_FIRST_DELAY_SECONDS = 1.0
_MAX_DELAY_SECONDS = 30.0
_CHECK_SECONDS = 0.2

_LOG = logging.getLogger(__name__)


class Trained(BaseModel):
    """What is known of a kept adapter besides its files; `files` holds their sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: str
    loss: float
    num_steps: int
    num_tokens: int
    seconds: float
    peak_memory_bytes: int
    comparison: HeldOutComparison | None
    published_step: int = 0
    files: dict[str, str] = {}


class Kept:
    """A kept adapter, held by this process until it ends; `folder` must be left as it is."""

    def __init__(self, entry: Path, trained: Trained, lock: int) -> None:
        self.folder = entry / _ADAPTER
        self.trained = trained
        self._lock = lock

    def release(self) -> None:
        os.close(self._lock)


def training_facts(
    spec: TrainingSpec,
    dataset_digest: str,
    base_digest: str,
    chat_template_digest: str,
    training_precision: str,
    parents: Mapping[str, str],
) -> dict[str, Any]:
    """What goes into a training. `parents` are the digests of what only some have."""
    return {
        "spec": spec.model_dump(mode="json"),
        "dataset_digest": dataset_digest,
        "base_digest": base_digest,
        "chat_template_digest": chat_template_digest,
        "training_precision": training_precision,
        **parents,
    }


def fingerprint(facts: Mapping[str, Any]) -> str:
    """What makes two trainings the same, down to the libraries that they run on."""
    facts = {**facts, "libraries": {name: version(name) for name in LIBRARIES}}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def keep(settings: Settings, mark: str, folder: Path, trained: Trained) -> Kept:
    """Moves a complete adapter folder out of harm's way. It counts once its facts are written, which comes last."""
    entry = _root(settings) / mark / trained.job_id
    entry.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _take_lock(entry)
    if lock is None:
        raise AssertionError(f"two attempts of job {trained.job_id} at once")
    shutil.rmtree(entry / _ADAPTER, ignore_errors=True)
    for path in folder.iterdir():
        sync(path)
    folder.rename(entry / _ADAPTER)
    sync(entry / _ADAPTER)
    files = {path.name: sha256_of(path) for path in (entry / _ADAPTER).iterdir()}
    trained = trained.model_copy(update={"files": files})
    replace_durably(entry / _FACTS, trained.model_dump_json().encode())
    for folder in (entry.parent, entry.parent.parent, settings.data_dir):
        sync(folder)
    return Kept(entry, trained, lock)


def find_kept(settings: Settings, mark: str, job_id: str) -> Kept | None:
    """What an earlier attempt, or another job that is over, has kept; from now on it belongs to this job."""
    home = _root(settings) / mark
    entries = sorted(home.iterdir(), key=lambda entry: entry.name != job_id) if home.is_dir() else []
    for entry in entries:
        lock = _take_lock(entry)
        if lock is None:
            continue  # its job is at work with it, or it has just gone
        trained = _read_facts(entry)
        if trained is not None:
            own = entry.with_name(job_id)
            if entry != own:
                shutil.rmtree(own, ignore_errors=True)
                entry.rename(own)
            return Kept(own, trained, lock)
        if entry.name == job_id:
            _LOG.warning("what job %s has kept is incomplete or damaged: it trains again", job_id)
        os.close(lock)
    return None


def drop_kept(settings: Settings, job_id: str) -> None:
    """Takes away what a job has kept: it is published, or nobody wants it."""
    for entry in _root(settings).glob(f"*/{job_id}"):
        shutil.rmtree(entry, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may have kept something under the same mark
            entry.parent.rmdir()


def sweep_kept(settings: Settings, max_age: timedelta = KEPT_FOR) -> None:
    """Takes away what nobody came back for; what a job is at work with stays."""
    for entry in _root(settings).glob("*/*"):
        lock = _take_lock(entry)
        if lock is None:
            continue
        if time.time() - entry.stat().st_mtime > max_age.total_seconds():
            _LOG.warning("the adapter that job %s could not publish is taken away: nobody came back for it", entry.name)
            drop_kept(settings, entry.name)
        os.close(lock)


def publish_patiently(
    context: JobContext, settings: Settings, registry: Registry, model: str, publish: Callable[[], ModelVersion]
) -> ModelVersion:
    """Calls `publish`, again and again while the bucket is away, for as long as the settings allow.

    Raises:
        UpstreamError: STORAGE_UNREACHABLE, after that time; what was trained is kept.
        CredentialsError: UPSTREAM_CREDENTIALS, at once; what was trained is kept.
        JobStopped: from `context.check`; nothing of a cancelled job stays in the bucket.
    """
    deadline = time.monotonic() + settings.s3_patience_seconds
    delay = _FIRST_DELAY_SECONDS
    warned = False
    try:
        while True:
            context.check()
            try:
                published = publish()
            except (UpstreamError, CredentialsError) as error:
                context.check()  # the trouble may be that we stopped in the middle of an upload
                context.observe(Service.S3, error.message)
                if isinstance(error, CredentialsError) or time.monotonic() + delay > deadline:
                    raise _with_consolation(error) from None
                if not warned:
                    warned = True
                    context.warn(
                        error.reason.value,
                        f"{error.message}; publishing is tried again for {settings.s3_patience_seconds:g} s",
                    )
                wait(delay, context.check)
                delay = min(2 * delay, _MAX_DELAY_SECONDS)
            else:
                if registry.has_bucket:
                    context.observe(Service.S3, None)
                return published
    except JobStopped as stop:
        if stop.reason is StopReason.CANCELLED:
            _withdraw(registry, model, context.job.id)
        raise


def _withdraw(registry: Registry, model: str, job_id: str) -> None:
    try:
        registry.withdraw(model, job_id)
    except KnowledgeEngineError as error:
        _LOG.warning("what job %s brought to the bucket stays for the sweep, seen by nobody: %s", job_id, error.message)


def _with_consolation(error: KnowledgeEngineError) -> KnowledgeEngineError:
    message = f"{error.message}; the trained adapter is kept: the same job created again publishes it without training"
    return from_dict(error.to_dict() | {"message": message})


def wait(seconds: float, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _CHECK_SECONDS))


def _root(settings: Settings) -> Path:
    return settings.data_dir / "unpublished"


def _take_lock(entry: Path) -> int | None:
    """A lock that ends with this process; None where another one has it."""
    try:
        descriptor = os.open(entry / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _read_facts(entry: Path) -> Trained | None:
    """None where the adapter is not whole."""
    try:
        trained = Trained.model_validate_json((entry / _FACTS).read_bytes())
        found = {path.name: sha256_of(path) for path in (entry / _ADAPTER).iterdir()}
    except (OSError, ValidationError):
        return None
    return trained if found == trained.files else None
