"""Model versions: published whole or not at all, immutable, checked against their digests.

A version is the folder `<root>/<model>/<version>`: a PEFT adapter with its tokenizer and chat template, and
`manifest.json` with the sha256 of every file, written last. The folder is filled elsewhere and moved into place by one
rename, so that a reader sees all of it or none. What lies on the disk is the truth; nothing else records versions.
A deleted version leaves an empty `<version>.deleted` behind, so that its number is never given again.

With a bucket the truth lies there (`remote.py`) and the folder is its copy: manifests come with `sync`, the other
files when a version is first used. While the bucket is away, what is here goes on being served.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType

from knowledge_engine.bases import Base
from knowledge_engine.core import (
    HeldOutComparison,
    Model,
    ModelVersion,
    Page,
    TrainingSpec,
    is_name,
    utc_now,
)
from knowledge_engine.errors import (
    CredentialsError,
    IntegrityError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    UpstreamError,
    from_dict,
)
from knowledge_engine.files import demand_space, sha256_of, sync, write_durably
from knowledge_engine.manifest import MANIFEST, FileEntry, Manifest, corrupt, parse_manifest
from knowledge_engine.remote import Remote
from knowledge_engine.settings import Settings
from knowledge_engine.storage import Bucket, open_bucket
from knowledge_engine.weights import demand_finite_weights

SYNC_SECONDS = 10.0
SWEEP_SECONDS = 3600.0
LEFTOVER_AGE = timedelta(hours=24)
"""What was begun in the bucket and left alone for so long belongs to no job any more."""

_STAGING = ".staging"
_LOCKS = ".locks"
_TEMPORARY = "tmp-"
_HASTY_SECONDS = 3.0
_REPEAT_SECONDS = 600.0
_QUIET_SECONDS = 5.0  # a bucket that just did not answer is not asked again for every caller

_LOG = logging.getLogger(__name__)


class Registry:
    """The versions below one folder. Methods block; any number of processes may use one folder at once.

    With a bucket they raise, besides their own errors, UpstreamError: STORAGE_UNREACHABLE and CredentialsError:
    UPSTREAM_CREDENTIALS, where the answer is not here and the bucket does not give it.
    """

    def __init__(self, root: Path, remote: Remote | None = None, hasty: Remote | None = None) -> None:
        """`hasty` is the same bucket for questions that somebody waits for."""
        self._root = root
        self._remote = remote
        self._hasty = hasty or remote
        # A manifest never changes, so a parsed one is good for as long as its file is there.
        self._parsed: dict[tuple[str, int], Manifest] = {}
        self._trouble: KnowledgeEngineError | None = None
        self._trouble_time = 0.0

    @classmethod
    def open(cls, settings: Settings) -> Registry:
        """The registry of a deployment. Each bucket has a folder of its own: two truths are never mixed in one."""
        bucket = open_bucket(settings)
        if bucket is None:
            return cls(settings.data_dir / "models")
        name = hashlib.sha256(f"{bucket.endpoint}/{bucket.name}".encode()).hexdigest()[:16]
        hasty = Bucket(settings, connect_seconds=_HASTY_SECONDS, read_seconds=_HASTY_SECONDS, attempts=2)
        return cls(settings.data_dir / "buckets" / name / "models", Remote(bucket), Remote(hasty))

    @property
    def has_bucket(self) -> bool:
        return self._remote is not None

    def stage(self, job_id: str, attempt: int = 1) -> Path:
        """A fresh private folder for an attempt of a job to fill and publish; whatever it left there before is gone.
        No two attempts share one: the earlier may still be alive."""
        folder = self._root / _STAGING / f"{job_id}.{attempt}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        return folder

    def discard_stage(self, job_id: str, attempt: int) -> None:
        """Takes away what this attempt and those before it have staged."""
        for folder in (self._root / _STAGING).glob(f"{job_id}.*"):
            if int(folder.suffix[1:]) <= attempt:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self,
        *,
        spec: TrainingSpec,
        job_id: str,
        folder: Path,
        base: Base,
        dataset_digest: str,
        chat_template_digest: str,
        comparison: HeldOutComparison | None,
        training_precision: str,
        parents: Mapping[str, str] = MappingProxyType({}),
        check: Callable[[], None] = lambda: None,
    ) -> ModelVersion:
        """Makes the staged `folder` the next version of `spec.model`. A job publishes once: asked again, the answer is
        the version it has published already, or it goes on where it was. `check` is called on the way to a bucket and
        may raise. `parents` are digests of what else went into it, by the version's field.

        Raises:
            KnowledgeEngineError: NON_FINITE, a weight is no number; MODEL_VERSION_CORRUPT, weights cannot be read.
        """
        if self._remote is not None:
            self.sync(spec.model)
        if published := self._published_by(spec.model, job_id):
            return published
        paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
        for path in paths:
            if path.suffix == ".safetensors":
                demand_finite_weights(path)
        files = {path.name: FileEntry(sha256_of(path), path.stat().st_size) for path in paths}
        manifest = {
            "model": spec.model,
            "job_id": job_id,
            "spec": spec.model_dump(mode="json"),
            "base_model": base.name,
            "base_digest": base.digest,
            "base_source": base.source,
            "base_revision": base.revision,
            "dataset_digest": dataset_digest,
            "chat_template_digest": chat_template_digest,
            "comparison": comparison and comparison.model_dump(mode="json"),
            "training_precision": training_precision,
            **parents,
            "create_time": utc_now().isoformat(),
            "files": {name: entry._asdict() for name, entry in files.items()},
        }

        def manifest_of(version: int) -> bytes:
            return json.dumps(manifest | {"version": version}, indent=2, sort_keys=True).encode()

        for path in paths:
            path.chmod(0o600)
            sync(path)
        home = self._root / spec.model
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._remote is not None:
            known = max(self._numbers(spec.model, deleted=True), default=0)
            version, text = self._remote.publish(spec.model, job_id, folder, files, manifest_of, check, known)
            write_durably(folder / MANIFEST, text)
            sync(folder)
            with self._lock(spec.model, version):
                _merge(folder, home / str(version))
        else:
            version = self._take_number(spec.model, folder, manifest_of)
        for folder in (home, self._root):
            sync(folder)
        return self.get(spec.model, version)

    def withdraw(self, model: str, job_id: str) -> None:
        """Takes away what a job has brought to the bucket and will not publish."""
        if self._remote is not None:
            self._remote.withdraw(model, job_id)

    def retract(self, model: str, job_id: str) -> None:
        """Takes away whatever a job has published or brought to the bucket; nothing where there is nothing."""
        if self._remote is not None:
            self.sync(model)
        if published := self._published_by(model, job_id):
            self.delete(model, published.version)
        self.withdraw(model, job_id)

    def resolve(self, model: str, version: int | None) -> ModelVersion:
        """The version asked for, or the newest one.

        Raises:
            NotFoundError: MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND.
        """
        if version is not None:
            return self.get(model, version)
        numbers = self._numbers(model)
        if not numbers and (remote := self._hasty) is not None:
            self._ask(lambda: self._sync(remote, model))
            numbers = self._numbers(model)
        if not numbers:
            raise NotFoundError(f"no model {model!r}", reason=Reason.MODEL_NOT_FOUND, model=model)
        return self.get(model, max(numbers))

    def get(self, model: str, version: int) -> ModelVersion:
        """Raises NotFoundError: MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND; IntegrityError: MODEL_VERSION_CORRUPT."""
        return self._manifest(model, version).version

    def folder(self, model: str, version: int) -> Path:
        assert is_name(model)
        return self._root / model / str(version)

    def verify(self, model: str, version: int) -> None:
        """Compares every file with the manifest. With a bucket, what is missing or damaged here is brought from there.

        Raises:
            IntegrityError: MODEL_VERSION_CORRUPT, naming the file.
        """
        folder = self.folder(model, version)
        listed = self._manifest(model, version).files
        with self._lock(model, version) if self._remote is not None else contextlib.nullcontext():
            found = {path.name for path in folder.iterdir()} - {MANIFEST}
            for name in sorted(found - listed.keys()):
                raise corrupt(model, version, name, "is not in the manifest")
            for name, entry in listed.items():
                if name not in found:
                    trouble = "is missing"
                elif sha256_of(folder / name) != entry.sha256:
                    trouble = "has changed since it was published"
                else:
                    continue
                if self._remote is None:
                    raise corrupt(model, version, name, trouble)
                if name in found:
                    _LOG.warning("%s of version %d of model %r %s: fetched again", name, version, model, trouble)
                self._ask(partial(self._bring_file, self._remote, model, version, name, entry))

    def list_models(self, page: Page) -> tuple[list[Model], str | None]:
        """By name; a model whose versions are all deleted is left out."""
        names = [name for name in self._models() if self._numbers(name) and (page.after is None or name > page.after)]
        models = [self.get_model(name) for name in names[: page.size]]
        return models, models[-1].name if len(names) > page.size else None

    def get_model(self, model: str) -> Model:
        """Raises NotFoundError: MODEL_NOT_FOUND."""
        latest = self.resolve(model, None)
        numbers = self._numbers(model)
        first = self.get(model, min(numbers))
        return Model(name=model, create_time=first.create_time, latest_version=latest, num_versions=len(numbers))

    def list_versions(self, model: str, page: Page) -> tuple[list[ModelVersion], str | None]:
        """Newest first."""
        self.resolve(model, None)
        numbers = sorted(self._numbers(model), reverse=True)
        if page.after is not None and page.after.isdecimal():
            numbers = [number for number in numbers if number < int(page.after)]
        versions = [self.get(model, number) for number in numbers[: page.size]]
        return versions, str(versions[-1].version) if len(numbers) > page.size else None

    def delete(self, model: str, version: int) -> ModelVersion:
        """Takes a version away, first out of sight and then off the disk.

        Raises:
            NotFoundError: MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND.
        """
        found = self.get(model, version)
        if self._remote is not None:
            self._remote.delete(model, version)
        self._take_away(model, version)
        return found

    # --- the bucket's copy ----------------------------------------------------------------------------------------

    def sync(self, model: str | None = None) -> None:
        """Makes the folder show what the bucket shows, for one model or all: manifests come, deleted versions go."""
        assert self._remote is not None
        self._sync(self._remote, model)

    def _sync(self, remote: Remote, model: str | None) -> None:
        published = remote.published(model)
        for key in sorted(published):
            if not (self.folder(*key) / MANIFEST).is_file():
                try:
                    self._bring_manifest(remote, *key)
                except IntegrityError as error:  # one damaged version must not hide the others
                    _LOG.warning("%s", error.message)
        for name in [model] if model is not None else self._models():
            for version in self._numbers(name):
                # Not being listed is not enough: an emptied or exchanged bucket must not cost the last copies.
                if (name, version) not in published and remote.is_deleted(name, version):
                    _LOG.info("version %d of model %r was deleted from the bucket", version, name)
                    self._take_away(name, version)

    def follow(
        self,
        observe: Callable[[str | None], None],
        stop: threading.Event,
        *,
        sync_seconds: float = SYNC_SECONDS,
        sweep_seconds: float = SWEEP_SECONDS,
        leftover_age: timedelta = LEFTOVER_AGE,
    ) -> None:
        """Keeps the folder like the bucket, and the bucket clean, until `stop` is set; for a thread of its own.
        `observe` is told when the bucket begins to give trouble, in one sentence, and when that is over."""
        assert self._remote is not None
        told: str | None = "nothing yet"
        next_sweep = next_word = 0.0
        while not stop.is_set():
            trouble = None
            try:
                self._watch_trouble(self.sync)
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + sweep_seconds
                    self._sweep(leftover_age)
            except KnowledgeEngineError as error:
                trouble = error.message
            except Exception:  # the thread must outlive whatever this was
                _LOG.exception("the bucket cannot be followed")
                trouble = "following the bucket failed unexpectedly; the server's log says more"
            if trouble != told:
                _LOG.log(logging.WARNING if trouble else logging.INFO, "bucket: %s", trouble or "in step")
            # Trouble that lasts is told again: what was last said is believed for a while only.
            if (trouble != told or (trouble and time.monotonic() >= next_word)) and not stop.is_set():
                with contextlib.suppress(KnowledgeEngineError):  # the store has its own trouble: told next time
                    observe(trouble)
                    told, next_word = trouble, time.monotonic() + _REPEAT_SECONDS
            stop.wait(sync_seconds)

    def _sweep(self, leftover_age: timedelta) -> None:
        """A bucket that may be read and not cleaned serves as well: that is for the log alone."""
        assert self._remote is not None
        for folder in (self._root / _STAGING).glob(f"{_TEMPORARY}*"):  # of processes that were killed
            if time.time() - folder.stat().st_mtime > leftover_age.total_seconds():
                shutil.rmtree(folder, ignore_errors=True)
        try:
            self._remote.sweep(utc_now() - leftover_age)
        except (UpstreamError, CredentialsError) as error:
            _LOG.warning("the bucket's leftovers cannot be taken away: %s", error.message)

    def _ask(self, question: Callable[[], None]) -> None:
        """Looks into the bucket for what is not here; one that has just failed is not asked again at once."""
        trouble = self._trouble
        if trouble is not None and time.monotonic() - self._trouble_time < _QUIET_SECONDS:
            raise from_dict(trouble.to_dict())
        self._watch_trouble(question)

    def _watch_trouble(self, question: Callable[[], None]) -> None:
        try:
            question()
        except (UpstreamError, CredentialsError) as error:
            self._trouble, self._trouble_time = error, time.monotonic()
            raise
        self._trouble = None

    def _bring_manifest(self, remote: Remote, model: str, version: int) -> None:
        """Shows a version that is in the bucket; does nothing where there is none.

        Raises:
            IntegrityError: MODEL_VERSION_CORRUPT: its manifest there is no good.
        """
        text = remote.read_manifest(model, version)
        if text is None:
            return
        parse_manifest(model, version, text)
        folder = self._fresh_folder()
        write_durably(folder / MANIFEST, text)
        sync(folder)
        home = self._root / model
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock(model, version):
            _merge(folder, home / str(version))
        sync(home)

    def _bring_file(self, remote: Remote, model: str, version: int, name: str, entry: FileEntry) -> None:
        demand_space(self._root, entry.size_bytes)
        folder = self._fresh_folder()
        try:
            remote.fetch(model, version, name, entry, folder / name)
            (folder / name).chmod(0o600)
            sync(folder / name)
            (folder / name).replace(self.folder(model, version) / name)
            sync(self.folder(model, version))
        except FileNotFoundError:  # deleted while its files were on their way
            raise _no_version(model, version) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- the folder -----------------------------------------------------------------------------------------------

    def _manifest(self, model: str, version: int) -> Manifest:
        remote = self._hasty
        try:
            return self._read_manifest(model, version)
        except NotFoundError:
            if remote is None:
                raise
        except IntegrityError as error:
            if remote is None:
                raise
            _LOG.warning("%s: fetched again", error.message)
        self._ask(lambda: self._bring_manifest(remote, model, version))
        return self._read_manifest(model, version)

    def _read_manifest(self, model: str, version: int) -> Manifest:
        path = self.folder(model, version) / MANIFEST
        key = (model, version)
        if key in self._parsed and path.is_file():
            return self._parsed[key]
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            self._parsed.pop(key, None)
            if not self._numbers(model, deleted=True):
                raise NotFoundError(f"no model {model!r}", reason=Reason.MODEL_NOT_FOUND, model=model) from None
            raise _no_version(model, version) from None
        parsed = self._parsed[key] = parse_manifest(model, version, text)
        return parsed

    def _take_number(self, model: str, folder: Path, manifest_of: Callable[[int], bytes]) -> int:
        """Moves a folder to the next free number."""
        while True:
            version = max(self._numbers(model, deleted=True), default=0) + 1
            write_durably(folder / MANIFEST, manifest_of(version))
            sync(folder)
            try:
                folder.rename(self.folder(model, version))
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise
                continue  # another job took the number; take the next
            return version

    def _take_away(self, model: str, version: int) -> None:
        """Takes a version off the disk, first out of sight."""
        (self._root / model / f"{version}.deleted").touch(mode=0o600)
        grave = self._fresh_folder()
        with contextlib.suppress(FileNotFoundError):  # two deletions at once: one of them moved it
            self.folder(model, version).rename(grave)
        self._parsed.pop((model, version), None)
        shutil.rmtree(grave, ignore_errors=True)

    def _fresh_folder(self) -> Path:
        folder = self._root / _STAGING / f"{_TEMPORARY}{secrets.token_hex(8)}"
        folder.mkdir(parents=True, mode=0o700)
        return folder

    @contextmanager
    def _lock(self, model: str, version: int) -> Iterator[None]:
        """Keeps other threads and processes from filling the same folder meanwhile."""
        path = self._root / _LOCKS / f"{model}.{version}"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _models(self) -> list[str]:
        return sorted(path.name for path in self._root.iterdir() if is_name(path.name)) if self._root.is_dir() else []

    def _published_by(self, model: str, job_id: str) -> ModelVersion | None:
        for number in sorted(self._numbers(model), reverse=True):
            try:
                version = self.get(model, number)
            except (IntegrityError, NotFoundError) as error:  # a neighbour's trouble is not ours
                _LOG.warning("passed over: %s", error.message)
                continue
            if version.job_id == job_id:
                return version
        return None

    def _numbers(self, model: str, *, deleted: bool = False) -> list[int]:
        home = self._root / model
        if not home.is_dir():
            return []
        names = (path.name.removesuffix(".deleted") if deleted else path.name for path in home.iterdir())
        return [int(name) for name in names if name.isdecimal()]


def _no_version(model: str, version: int) -> NotFoundError:
    return NotFoundError(
        f"model {model!r} has no version {version}",
        reason=Reason.MODEL_VERSION_NOT_FOUND,
        model=model,
        version=version,
    )


def _merge(folder: Path, target: Path) -> None:
    """Moves a folder to its place; where that is taken by the same version, each file, the manifest last."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(target / path.name)
        sync(target)
        shutil.rmtree(folder, ignore_errors=True)
