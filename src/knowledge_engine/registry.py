"""Model versions on the local disk: published whole or not at all, immutable, checked against their digests.

A version is the folder `<root>/<model>/<version>`: a PEFT adapter with its tokenizer and chat template, and
`manifest.json` with the sha256 of every file, written last. The folder is filled elsewhere and moved into place by one
rename, so that a reader sees all of it or none. What lies on the disk is the truth; nothing else records versions.
A deleted version leaves an empty `<version>.deleted` behind, so that its number is never given again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

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
from knowledge_engine.errors import IntegrityError, NotFoundError, Reason
from knowledge_engine.files import sha256_of, sync

MANIFEST = "manifest.json"
_STAGING = ".staging"


class Registry:
    """The versions below one folder. Methods block; any number of processes may use one folder at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # A manifest never changes, so a parsed one is good for as long as its file is there.
        self._parsed: dict[tuple[str, int], ModelVersion] = {}

    def stage(self, job_id: str) -> Path:
        """A fresh private folder for a job to fill and publish; whatever the job left there before is gone."""
        folder = self._root / _STAGING / job_id
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        return folder

    def discard_stage(self, job_id: str) -> None:
        shutil.rmtree(self._root / _STAGING / job_id, ignore_errors=True)

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
    ) -> ModelVersion:
        """Makes the staged `folder` the next version of `spec.model`. A job publishes once: asked again, the answer is
        the version it has published already."""
        if published := self._published_by(spec.model, job_id):
            return published
        files = {path.name: path for path in sorted(folder.iterdir())}
        entries = {name: {"sha256": sha256_of(path), "size_bytes": path.stat().st_size} for name, path in files.items()}
        manifest = {
            "model": spec.model,
            "job_id": job_id,
            "spec": spec.model_dump(mode="json"),
            "base_model": base.name,
            "base_digest": base.digest,
            "dataset_digest": dataset_digest,
            "chat_template_digest": chat_template_digest,
            "comparison": comparison and comparison.model_dump(mode="json"),
            "training_precision": training_precision,
            "create_time": utc_now().isoformat(),
            "files": entries,
        }
        for path in files.values():
            path.chmod(0o600)
            sync(path)
        home = self._root / spec.model
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            version = max(self._numbers(spec.model, deleted=True), default=0) + 1
            _write_durably(folder / MANIFEST, json.dumps(manifest | {"version": version}, indent=2, sort_keys=True))
            try:
                folder.rename(home / str(version))
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise
                continue  # another job took the number; take the next
            sync(home)
            return self.get(spec.model, version)

    def resolve(self, model: str, version: int | None) -> ModelVersion:
        """The version asked for, or the newest one.

        Raises:
            NotFoundError: MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND.
        """
        if version is not None:
            return self.get(model, version)
        numbers = self._numbers(model)
        if not numbers:
            raise NotFoundError(f"no model {model!r}", reason=Reason.MODEL_NOT_FOUND, model=model)
        return self.get(model, max(numbers))

    def get(self, model: str, version: int) -> ModelVersion:
        """Raises NotFoundError: MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND; IntegrityError: MODEL_VERSION_CORRUPT."""
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
            raise NotFoundError(
                f"model {model!r} has no version {version}",
                reason=Reason.MODEL_VERSION_NOT_FOUND,
                model=model,
                version=version,
            ) from None
        parsed = _parse_manifest(model, version, text)
        self._parsed[key] = parsed
        return parsed

    def folder(self, model: str, version: int) -> Path:
        assert is_name(model)
        return self._root / model / str(version)

    def verify(self, model: str, version: int) -> None:
        """Compares every file with the manifest.

        Raises:
            IntegrityError: MODEL_VERSION_CORRUPT, naming the file.
        """
        folder = self.folder(model, version)
        self.get(model, version)
        listed: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_bytes())["files"]
        found = {path.name for path in folder.iterdir()} - {MANIFEST}
        for name in sorted(found - listed.keys()):
            raise _corrupt(model, version, name, "is not in the manifest")
        for name, entry in listed.items():
            if name not in found:
                raise _corrupt(model, version, name, "is missing")
            if sha256_of(folder / name) != entry["sha256"]:
                raise _corrupt(model, version, name, "has changed since it was published")

    def list_models(self, page: Page) -> tuple[list[Model], str | None]:
        """By name; a model whose versions are all deleted is left out."""
        names = sorted(path.name for path in self._root.iterdir() if is_name(path.name)) if self._root.is_dir() else []
        names = [name for name in names if self._numbers(name) and (page.after is None or name > page.after)]
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
        folder = self.folder(model, version)
        (self._root / model / f"{version}.deleted").touch(mode=0o600)
        grave = self._root / _STAGING / f"deleted-{secrets.token_hex(8)}"
        grave.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # two deletions at once: one of them moved it
            folder.rename(grave)
        self._parsed.pop((model, version), None)
        shutil.rmtree(grave, ignore_errors=True)
        return found

    def _published_by(self, model: str, job_id: str) -> ModelVersion | None:
        versions = (self.get(model, number) for number in sorted(self._numbers(model), reverse=True))
        return next((version for version in versions if version.job_id == job_id), None)

    def _numbers(self, model: str, *, deleted: bool = False) -> list[int]:
        home = self._root / model
        if not home.is_dir():
            return []
        names = (path.name.removesuffix(".deleted") if deleted else path.name for path in home.iterdir())
        return [int(name) for name in names if name.isdecimal()]


def _parse_manifest(model: str, version: int, text: bytes) -> ModelVersion:
    try:
        manifest = json.loads(text)
        size_bytes = sum(entry["size_bytes"] for entry in manifest.pop("files").values())
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        parsed = ModelVersion(**manifest, digest=digest, size_bytes=size_bytes + len(text))
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise _corrupt(model, version, MANIFEST, "cannot be read") from error
    if (parsed.model, parsed.version) != (model, version):
        raise _corrupt(model, version, MANIFEST, "belongs to another version")
    return parsed


def _corrupt(model: str, version: int, file: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"version {version} of model {model!r} is damaged: {file} {what}",
        reason=Reason.MODEL_VERSION_CORRUPT,
        model=model,
        version=version,
        file=file,
    )


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o600)
    sync(path.parent)
