"""Stored datasets: every row checked on the way in, canonical JSONL on disk, the digest checked on the way out.

A dataset is `<root>/<name>.jsonl` plus its record in the state store. Rows stream through, so memory grows with the ids
of a catalogue only. Content is written to a private temporary file and takes its name, durably, only once all of it is
sound; a writer that dies leaves a temporary file that the next one sweeps away. One lock orders renames and deletions
of all processes on this disk.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from knowledge_engine.catalogue import DEMO_CATALOGUE, Product, check_header, parse_json
from knowledge_engine.core import (
    MAX_MESSAGES,
    MAX_UPLOAD_BYTES,
    Dataset,
    DatasetFormat,
    DatasetKind,
    Message,
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
from knowledge_engine.state import State

DEMO_CATALOGUE_NAME = "demo-catalogue"
MAX_LINE_BYTES = 2**20
MAX_VIOLATIONS = 20
_ROLES = ("system", "user", "assistant")
_INCOMING = ".incoming-"
_READ_BYTES = 2**20


class Conversation(BaseModel):
    """One row of conversations; `products` are the candidate rows that its prompt showed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[Message, ...]
    products: tuple[Product, ...] = ()

    @classmethod
    def from_row(cls, row: Any) -> Conversation:
        """A conversation from a JSON object.

        Raises:
            ValueError: one sentence that says what is wrong and where in the row.
        """
        if not isinstance(row, dict):
            raise ValueError("must be an object with messages")
        unknown = [key for key in row if key not in ("messages", "products")]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; known are messages, products")
        rows = row.get("messages")
        if not isinstance(rows, list) or not rows:
            raise ValueError("messages is missing or empty" if not rows else "messages must be a list")
        if len(rows) > MAX_MESSAGES:
            raise ValueError(f"has more than {MAX_MESSAGES} messages")
        messages = tuple(_message(item, position) for position, item in enumerate(rows))
        if not any(message.role == "assistant" for message in messages):
            raise ValueError("has no assistant message, so nothing to learn from")
        products = row.get("products", [])
        if not isinstance(products, list):
            raise ValueError("products must be a list")
        return cls(messages=messages, products=tuple(_shown(item, at) for at, item in enumerate(products)))

    def to_row(self) -> dict[str, Any]:
        """The JSON object that `from_row` reads; `products` only where there are some."""
        row: dict[str, Any] = {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}
        return row | ({"products": [product.to_row() for product in self.products]} if self.products else {})


# Inside the class below, `list` is its method.
_Datasets: TypeAlias = list[Dataset]
_Conversations: TypeAlias = list[Conversation]
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
        if kind is DatasetKind.CONVERSATIONS and format is DatasetFormat.CSV:
            raise _broken([Violation("format", "conversations come as JSONL; CSV is for catalogues")])
        with self._incoming() as (file, path):
            rows = _Rows(kind, format, _lines(_limited(_chunks(chunks), self._max_bytes)))
            digest = hashlib.sha256()
            for row in rows:
                line = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
                digest.update(line)
                file.write(line)
            if rows.violations:
                raise _broken(rows.violations)
            if rows.num_rows == 0:
                raise _broken([Violation("line 1", "there are no rows")])
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

    def conversations(self, name: str) -> _Conversations:
        """All rows of a dataset of conversations.

        Raises:
            NotFoundError: DATASET_NOT_FOUND.
            InvalidSpecError: DATASET_KIND_WRONG.
            IntegrityError: DATASET_CORRUPT, when the file is not what was stored.
        """
        return [Conversation.from_row(row) for row in self._stored_rows(name, DatasetKind.CONVERSATIONS)]

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
                f"dataset {name!r} holds a {dataset.kind}, not {kind}",
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


def split_conversations(
    conversations: Sequence[Conversation], eval_split: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations, both in their old order; the same seed splits the same way.

    At least one is held out where `eval_split` is above 0, and at least one left to train on.

    Raises:
        InvalidSpecError: SPEC_INVALID, when there are too few for both.
    """
    if eval_split == 0:
        return list(conversations), []
    num_held_out = max(1, round(len(conversations) * eval_split))
    if num_held_out >= len(conversations):
        description = f"leaves nothing to train on: there are only {len(conversations)} conversations"
        raise InvalidSpecError(
            f"eval_split {description}",
            violations=[Violation("spec.eval_split", description)],
            num_conversations=len(conversations),
        )
    held_out = set(random.Random(seed).sample(range(len(conversations)), num_held_out))  # noqa: S311 - no secret
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for index, conversation in enumerate(conversations):
        sides[index in held_out].append(conversation)
    return sides


# --- reading rows -------------------------------------------------------------------------------------------------


class _Rows:
    """The canonical rows of raw lines. After the first broken line it yields no more and only collects violations."""

    def __init__(self, kind: DatasetKind, format: DatasetFormat, lines: Iterator[bytes | None]) -> None:  # noqa: A002
        self.violations: list[Violation] = []
        self.num_rows = 0
        self._kind = kind
        self._ids: dict[str, int] = {}
        self._lines = lines
        self._records = self._csv_records if format is DatasetFormat.CSV else self._json_records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in self._records():
            self.num_rows += 1
            if isinstance(row, Product):
                first = self._ids.setdefault(row.id, number)
                if first != number:
                    self._refuse(number, f"id {row.id[:60]!r} is there already, on line {first}")
            if not self.violations:
                yield row.to_row()
            elif len(self.violations) >= MAX_VIOLATIONS:
                return

    def _refuse(self, number: int, sentence: str) -> None:
        if len(self.violations) < MAX_VIOLATIONS:
            # A row can hold anything; what it holds must not flood the response.
            self.violations.append(Violation(f"line {number}", sentence[:300]))

    def _text_lines(self) -> Iterator[tuple[int, str]]:
        for number, raw in enumerate(self._lines, 1):
            try:
                yield number, _decode(raw, number)
            except ValueError as error:
                self._refuse(number, str(error))
                if len(self.violations) >= MAX_VIOLATIONS:
                    return

    def _json_records(self) -> Iterator[tuple[int, Product | Conversation]]:
        for number, line in self._text_lines():
            try:
                if not line.strip():
                    raise ValueError("is empty")
                row = parse_json(line)
                if self._kind is DatasetKind.CONVERSATIONS:
                    yield number, Conversation.from_row(row)
                elif isinstance(row, dict):
                    yield number, Product.from_row(row)
                else:
                    raise ValueError("must be an object with the fields of a product")
            except ValueError as error:
                self._refuse(number, _sentence(error))
            if len(self.violations) >= MAX_VIOLATIONS:
                return

    def _csv_records(self) -> Iterator[tuple[int, Product]]:
        lines = _CsvLines(self._text_lines())
        reader = csv.reader(lines, strict=True)
        try:
            header = [cell.strip() for cell in next(reader, [])]
            check_header(header)
        except (ValueError, csv.Error) as error:
            self._refuse(1, str(error))
            return  # without a header no later line can be judged
        while len(self.violations) < MAX_VIOLATIONS:
            lines.first = 0
            try:
                cells = next(reader)
                if not cells:
                    raise ValueError("is empty")
                yield lines.first, Product.from_cells(header, cells)
            except StopIteration:
                return
            except csv.Error as error:
                self._refuse(lines.first, str(error))
                return  # nor can one in the middle of a broken quotation
            except ValueError as error:
                self._refuse(lines.first, _sentence(error))


class _CsvLines:
    """Lines for the CSV reader; `first` is the number of the first one taken since it was set to 0."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self.first = 0
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.first = self.first or number
        return line + "\n"


def _message(item: Any, position: int) -> Message:
    where = f"messages[{position}]"
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object with role and content")
    unknown = [key for key in item if key not in ("role", "content")]
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; known are role, content")
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(_ROLES)}")
    if role == "system" and position:
        raise ValueError(f"{where}: only the first message may be a system message")
    if not isinstance(content, str):
        raise ValueError(f"{where}.content must be text")
    if not content.strip():
        raise ValueError(f"{where}.content is empty")
    if "\0" in content:
        raise ValueError(f"{where}.content holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"{where}.content holds a lone surrogate")
    return Message(role=role, content=content)


def _shown(item: Any, position: int) -> Product:
    if not isinstance(item, dict):
        raise ValueError(f"products[{position}] must be an object with the fields of a product")
    try:
        return Product.from_row(item)
    except ValueError as error:
        raise ValueError(f"products[{position}]: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    return error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)


def _decode(raw: bytes | None, number: int) -> str:
    if raw is None:
        raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes")
    if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
        raise ValueError("begins with a byte order mark; save the file as plain UTF-8")
    if b"\0" in raw:
        raise ValueError("holds a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1}") from None


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


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their end; None for one that is too long, whose bytes are never gathered."""
    parts: list[bytes] = []
    length = 0
    for chunk in chunks:
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            yield _joined(parts, length, chunk[begin:end])
            parts, length, begin = [], 0, end + 1
        length += len(chunk) - begin
        if length <= MAX_LINE_BYTES:
            parts.append(chunk[begin:])
        else:
            parts = []
    if length:
        yield _joined(parts, length, b"")


def _joined(parts: list[bytes], length: int, rest: bytes) -> bytes | None:
    if length + len(rest) > MAX_LINE_BYTES:
        return None
    return b"".join([*parts, rest]).removesuffix(b"\r")


# --- small helpers ------------------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if not is_name(name):
        description = "must be 1 to 63 letters, digits, dots, underscores or hyphens, the first a letter or digit"
        raise InvalidSpecError(
            f"a dataset's name {description}", reason=Reason.NAME_INVALID, violations=[Violation("name", description)]
        )


def _broken(violations: Sequence[Violation]) -> InvalidSpecError:
    first = violations[0]
    return InvalidSpecError(
        f"{first.field}: {first.description}", reason=Reason.DATASET_FORMAT_INVALID, violations=violations
    )


def _corrupt(name: str, why: str) -> KnowledgeEngineError:
    return IntegrityError(f"dataset {name!r}: {why}", reason=Reason.DATASET_CORRUPT, dataset=name)
