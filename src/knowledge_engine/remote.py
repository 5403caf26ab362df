"""Model versions in a bucket: `models/<model>/<n>/<file>`, as in the local folder, so that other tools can read them.

A publisher takes a number by a conditional write of `claim.json`, brings its files, and writes `manifest.json` last,
conditionally too: two never get one number, and a published version is never overwritten. Readers believe manifests
only, and none beside a `deleted.json`, which also keeps a number from being given again. Whatever a killed publisher
leaves is invisible; its job goes on with it, or `sweep` takes it away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from knowledge_engine.core import is_name, utc_now
from knowledge_engine.errors import IntegrityError, InvalidSpecError, Reason
from knowledge_engine.files import sha256_of
from knowledge_engine.manifest import MANIFEST, FileEntry, corrupt
from knowledge_engine.storage import Bucket, Stored

CLAIM = "claim.json"
TOMBSTONE = "deleted.json"

_ROOT = "models/"
_FETCH_ATTEMPTS = 3
_MAX_SWEPT = 100  # of one sweep; the next one takes more

_LOG = logging.getLogger(__name__)


class Key(NamedTuple):
    """A version's place."""

    model: str
    version: int

    def file(self, name: str) -> str:
        return f"{_ROOT}{self.model}/{self.version}/{name}"


class Remote:
    """The versions in one bucket. Methods block and raise what `Bucket` raises."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def published(self, model: str | None = None) -> set[Key]:
        """What readers may see, of one model or of all."""
        return {key for key, files in self._listing(model).items() if _is_published(files)}

    def read_manifest(self, model: str, version: int) -> bytes | None:
        """None where nothing is published under that number."""
        text = self._bucket.get(Key(model, version).file(MANIFEST))
        return None if not text or self.is_deleted(model, version) else text

    def is_deleted(self, model: str, version: int) -> bool:
        """Whether the number is over for good; a version that merely is not there was taken by somebody else."""
        return self._bucket.get(Key(model, version).file(TOMBSTONE)) is not None

    def fetch(self, model: str, version: int, name: str, entry: FileEntry, path: Path) -> None:
        """Writes a file of a version to `path`, whole and right.

        Raises:
            IntegrityError: MODEL_VERSION_CORRUPT, naming the file.
        """
        what = "is missing from the bucket"
        for _ in range(_FETCH_ATTEMPTS):
            try:
                found = self._bucket.download(Key(model, version).file(name), path, entry.size_bytes)
            except IntegrityError:
                found = True
            if found and path.stat().st_size == entry.size_bytes and sha256_of(path) == entry.sha256:
                return
            if found:
                what = "in the bucket is not what was published"
        raise corrupt(model, version, name, what)

    def publish(
        self,
        model: str,
        job_id: str,
        folder: Path,
        files: Mapping[str, FileEntry],
        manifest_of: Callable[[int], bytes],
        check: Callable[[], None],
        after: int = 0,
    ) -> tuple[int, bytes]:
        """Makes `folder` a version; its number, higher than `after`, and manifest. A job that comes again goes on where
        it was. `check` is called on the way and may raise.

        Raises:
            InvalidSpecError: SETTINGS_INVALID, the bucket knows no conditional writes.
        """
        while True:
            check()
            key = self._claim(model, job_id, after, check)
            for name, entry in files.items():
                check()
                self._bucket.upload(key.file(name), folder / name, entry.sha256, check)
            check()
            text = manifest_of(key.version)
            if not self._bucket.put(key.file(MANIFEST), text, only_new=True):
                # A write of ours whose answer was lost; the claim keeps everyone else out.
                text = self._bucket.get(key.file(MANIFEST)) or b""
            if text and not self.is_deleted(*key):
                return key.version, text
            self.delete(*key)  # swept away meanwhile: that number is over

    def withdraw(self, model: str, job_id: str) -> None:
        """Takes away whatever a job has brought for a model; no attempt of it may be at work any more."""
        for key, files in self._listing(model).items():
            if CLAIM not in files or TOMBSTONE in files or self._claimant(key) != job_id:
                continue
            if MANIFEST in files:
                self.delete(*key)
            else:  # seen by nobody, so its number needs no tombstone; the claim goes last
                self._bucket.delete(stored.key for name, stored in files.items() if name != CLAIM)
                self._bucket.delete([key.file(CLAIM)])

    def delete(self, model: str, version: int) -> None:
        """Takes a version away, first out of sight; asked again, it finishes what was begun."""
        key = Key(model, version)
        self._bucket.put(key.file(TOMBSTONE), json.dumps({"time": utc_now().isoformat()}).encode())
        self._bucket.delete([key.file(MANIFEST)])
        self._clear(key, self._listing(model).get(key, {}))

    def sweep(self, before: datetime) -> None:
        """Takes away what was begun before a moment and never published, and what deletions have left. What holds no
        claim is somebody else's: others may keep models under such names."""
        listing = self._listing()
        ours = {key for key, files in listing.items() if files.keys() & {CLAIM, TOMBSTONE}}
        if aborted := self._bucket.abort_uploads(_ROOT, before, lambda name: _place(name)[0] in ours):
            _LOG.warning("%d unfinished uploads in the bucket were ended", aborted)
        swept = 0
        for key in sorted(ours):
            files = listing[key]
            if swept == _MAX_SWEPT:
                return
            if TOMBSTONE in files and len(files) > 1:
                self._clear(key, files)
            elif not files.keys() & {MANIFEST, TOMBSTONE} and _newest(files) < before:
                # Its publisher may have come back just now: of the two of us, one writes the manifest.
                if not self._bucket.put(key.file(MANIFEST), b"", only_new=True):
                    continue
                self.delete(*key)
            else:
                continue
            _LOG.warning("the bucket's leftovers of version %d of model %r were taken away", key.version, key.model)
            swept += 1

    def _claim(self, model: str, job_id: str, after: int, check: Callable[[], None]) -> Key:
        """A number for the job: the one it has already, or the next one."""
        body = json.dumps({"job_id": job_id, "time": utc_now().isoformat()}).encode()
        taken = self._listing(model)
        for key, files in taken.items():
            if CLAIM in files and not {MANIFEST, TOMBSTONE} & files.keys() and self._claimant(key) == job_id:
                self._bucket.put(key.file(CLAIM), body)  # young again, for the sweep
                return key
        key = Key(model, max((key.version for key in taken), default=0) + 1)
        key = Key(model, max(key.version, after + 1))
        while not self._bucket.put(key.file(CLAIM), body, only_new=True) and self._claimant(key) != job_id:
            check()
            key = Key(model, key.version + 1)
        if self._bucket.put(key.file(CLAIM), body, only_new=True):
            raise InvalidSpecError(
                "KNOWLEDGE_S3_BUCKET: this S3 server ignores If-None-Match, so that one version could overwrite "
                "another; take one that honours it",
                reason=Reason.SETTINGS_INVALID,
            )
        return key

    def _claimant(self, key: Key) -> str | None:
        try:
            claim = json.loads(self._bucket.get(key.file(CLAIM)) or b"{}")
        except ValueError:
            return None
        return claim.get("job_id") if isinstance(claim, dict) else None

    def _clear(self, key: Key, files: Mapping[str, Stored]) -> None:
        self._bucket.delete(stored.key for name, stored in files.items() if name != TOMBSTONE)

    def _listing(self, model: str | None = None) -> dict[Key, dict[str, Stored]]:
        """Objects by version and file name; what has no place in the layout is left out."""
        listing: dict[Key, dict[str, Stored]] = {}
        for stored in self._bucket.list_objects(f"{_ROOT}{model}/" if model is not None else _ROOT):
            key, file = _place(stored.key)
            if key is not None:
                listing.setdefault(key, {})[file] = stored
        return listing


def _place(name: str) -> tuple[Key | None, str]:
    """The version and the file of an object's name; no version for what has no place in the layout."""
    model, _, rest = name.removeprefix(_ROOT).partition("/")
    number, _, file = rest.partition("/")
    if is_name(model) and number.isdecimal() and str(int(number)) == number and is_name(file):
        return Key(model, int(number)), file
    return None, ""


def _is_published(files: Mapping[str, Stored]) -> bool:
    """An empty manifest is the sweep's."""
    return MANIFEST in files and files[MANIFEST].size_bytes > 0 and TOMBSTONE not in files


def _newest(files: Mapping[str, Stored]) -> datetime:
    return max(stored.modified for stored in files.values())
