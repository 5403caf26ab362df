"""Stored datasets: every row checked on the way in, canonical JSONL on disk, the digest checked on the way out.

A dataset is `<root>/<name>.jsonl` plus its record in the state store. Rows stream through, so memory grows with the ids
of a catalogue only. Content is written to a private temporary file and takes its name, durably, only once all of it is
sound; a writer that dies leaves a temporary file that the next one sweeps away. One lock orders renames and deletions
of all processes on this disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias

from knowledge_engine.catalogue import DEMO_CATALOGUE, Product, parse_json
from knowledge_engine.core import (
    MAX_UPLOAD_BYTES,
    Dataset,
    DatasetFormat,
    DatasetKind,
    Page,
    is_name,
    utc_now,
)
from knowledge_engine.errors import (
    AlreadyExistsError,
    ConflictError,
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    Violation,
)
from knowledge_engine.files import sync
from knowledge_engine.rows import Conversation, Preference, Row, Rows, broken
from knowledge_engine.state import State

DEMO_CATALOGUE_NAME = "demo-catalogue"
_INCOMING = ".incoming-"
_READ_BYTES = 2**20


# Inside the class below, `list` is its method.
_Datasets: TypeAlias = list[Dataset]
_Conversations: TypeAlias = list[Conversation]
_Preferences: TypeAlias = list[Preference]
_Products: TypeAlias = list[Product]


class Datasets:
    """The datasets below one folder. Methods block; safe to use from many threads and processes at once."""

    def __init__(
        self, root: Path, state: State, *, max_bytes: int = MAX_UPLOAD_BYTES, attempt: int | None = None
    ) -> None:
        """`attempt` is that of the job which stores what is stored here, None where it is no worker's."""
        self._attempt = attempt
        self._root = root
        self._state = state
        self._max_bytes = max_bytes
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def store(
        self,
        name: str,
        kind: DatasetKind,
        format: DatasetFormat,  # noqa: A002 - the contract's word
        chunks: Iterable[bytes] | BinaryIO,
        *,
        parents: Sequence[str] = (),
        job_id: str = "",
    ) -> Dataset:
        """Checks and stores every row, or nothing. The same content under the same name again is the stored dataset.

        `chunks` are the bytes in order, cut anywhere, or an open binary file.

        Raises:
            ConflictError: ATTEMPT_SUPERSEDED, the job's attempt is over; nothing is stored.
            InvalidSpecError: NAME_INVALID, DATASET_TOO_LARGE; DATASET_FORMAT_INVALID with the first broken lines.
            AlreadyExistsError: DATASET_EXISTS, when the name holds other content.
        """
        _check_name(name)
        with self._incoming() as (file, path):
            rows = Rows(kind, format, _limited(_chunks(chunks), self._max_bytes))
            digest = hashlib.sha256()
            for row in rows:
                line = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
                digest.update(line)
                file.write(line)
            if rows.violations:
                raise broken(rows.violations)
            file.flush()
            os.fsync(file.fileno())
            dataset = Dataset(
                name=name,
                kind=kind,
                digest=f"sha256:{digest.hexdigest()}",
                num_rows=rows.num_rows,
                size_bytes=file.tell(),
                create_time=utc_now(),
                parents=tuple(parents),
                job_id=job_id,
            )
            return self._publish(path, dataset)

    def get(self, name: str) -> Dataset:
        """Raises NotFoundError: DATASET_NOT_FOUND; InvalidSpecError: NAME_INVALID."""
        _check_name(name)
        return self._state.get_dataset(name)

    def list(self, page: Page) -> tuple[_Datasets, str | None]:
        """Newest first, and where the next page begins."""
        return self._state.list_datasets(page)

    def newest(self, kind: DatasetKind) -> Dataset | None:
        return self._state.newest_dataset(kind)

    def default_catalogue(self) -> Dataset:
        """The newest uploaded catalogue, else the shipped demo catalogue, which is then stored as a dataset."""
        newest = self.newest(DatasetKind.CATALOGUE)
        if newest is not None:
            return newest
        with DEMO_CATALOGUE.open("rb") as file:
            return self.store(DEMO_CATALOGUE_NAME, DatasetKind.CATALOGUE, DatasetFormat.JSONL, file)

    def require_free(self, name: str) -> None:
        """Raises AlreadyExistsError: DATASET_EXISTS, when the name stands for something already."""
        if self._find(name) is not None:
            raise AlreadyExistsError(
                f"dataset {name!r} exists already; choose another name", reason=Reason.DATASET_EXISTS, dataset=name
            )

    def delete(self, name: str) -> Dataset:
        """Forgets a dataset and removes its content.

        Raises:
            NotFoundError: DATASET_NOT_FOUND.
            StateError: DATASET_IN_USE, while an unfinished job reads or writes it.
        """
        _check_name(name)
        with self._exclusive():
            dataset = self._state.delete_dataset(name)
            self._path(name).unlink(missing_ok=True)
        return dataset

    def discard_unrecorded(self, name: str) -> None:
        """Removes the content that a writer left under a name when it died before the content was recorded."""
        _check_name(name)
        with self._exclusive():
            if self._find(name) is None:
                self._path(name).unlink(missing_ok=True)

    def conversations(self, name: str, kind: DatasetKind = DatasetKind.CONVERSATIONS) -> _Conversations:
        """All rows of a dataset of conversations, or with `kind` of an evaluation.

        Raises:
            NotFoundError: DATASET_NOT_FOUND.
            InvalidSpecError: DATASET_KIND_WRONG.
            IntegrityError: DATASET_CORRUPT, when the file is not what was stored.
        """
        return [Conversation.from_row(row) for row in self._stored_rows(name, kind)]

    def preferences(self, name: str) -> _Preferences:
        """All rows of a dataset of preferences; raises like `conversations`."""
        return [Preference.from_row(row) for row in self._stored_rows(name, DatasetKind.PREFERENCES)]

    def talks(self, name: str, kind: DatasetKind) -> Sequence[Row]:
        """All rows of a dataset of `kind`, whichever kind holds messages; raises like `conversations`."""
        return self.preferences(name) if kind is DatasetKind.PREFERENCES else self.conversations(name, kind)

    def products(self, name: str) -> _Products:
        """All rows of a catalogue; raises like `conversations`."""
        return [Product.from_row(row) for row in self._stored_rows(name, DatasetKind.CATALOGUE)]

    # --- on disk --------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self._root / f"{name}.jsonl"

    def _stored_rows(self, name: str, kind: DatasetKind) -> Iterator[Any]:
        dataset = self.get(name)
        if dataset.kind is not kind:
            raise InvalidSpecError(
                f"dataset {name!r} holds {dataset.kind}, not {kind}",
                reason=Reason.DATASET_KIND_WRONG,
                dataset=name,
                kind=dataset.kind,
            )
        try:
            with self._path(name).open("rb") as file:
                if f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" != dataset.digest:
                    raise _corrupt(name, "its content has changed since it was stored")
                file.seek(0)
                for line in file:
                    yield parse_json(line.decode())
        except FileNotFoundError:
            raise _corrupt(name, "its file is missing") from None

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        descriptor = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[tuple[IO[bytes], Path]]:
        """A private temporary file, locked for as long as its writer lives and gone when the writer fails."""
        with self._exclusive():
            self._sweep()
            descriptor, path = tempfile.mkstemp(prefix=_INCOMING, dir=self._root)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file, Path(path)
        finally:
            Path(path).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes what killed writers left. A living one may finish, and its file be gone, at any moment."""
        for path in self._root.glob(f"{_INCOMING}*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # blocked: its writer lives
                path.unlink()

    def _publish(self, incoming: Path, dataset: Dataset) -> Dataset:
        with self._exclusive():
            known = self._find(dataset.name)
            # The same content again also heals a file that was lost or damaged.
            if known is None or (known.digest, known.kind) == (dataset.digest, dataset.kind):
                incoming.rename(self._path(dataset.name))
                sync(self._root)
            try:
                return self._state.add_dataset(dataset, self._attempt if dataset.job_id else None)
            except ConflictError:
                if known is None:
                    self._path(dataset.name).unlink(missing_ok=True)
                raise

    def _find(self, name: str) -> Dataset | None:
        try:
            return self._state.get_dataset(name)
        except NotFoundError:
            return None


# --- small helpers --------------------------------------------------------------------------------------------------


def _chunks(source: Iterable[bytes] | BinaryIO) -> Iterator[bytes]:
    read = getattr(source, "read", None)
    return iter(lambda: read(_READ_BYTES), b"") if read is not None else iter(source)


def _limited(chunks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > max_bytes:
            raise InvalidSpecError(
                f"the content is larger than {max_bytes} bytes",
                reason=Reason.DATASET_TOO_LARGE,
                max_bytes=max_bytes,
            )
        yield chunk


def _check_name(name: str) -> None:
    if not is_name(name):
        description = "must be 1 to 63 letters, digits, dots, underscores or hyphens, the first a letter or digit"
        raise InvalidSpecError(
            f"a dataset's name {description}", reason=Reason.NAME_INVALID, violations=[Violation("name", description)]
        )


def _corrupt(name: str, why: str) -> KnowledgeEngineError:
    return IntegrityError(f"dataset {name!r}: {why}", reason=Reason.DATASET_CORRUPT, dataset=name)
