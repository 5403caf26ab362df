"""The bucket: bytes under keys in S3 or anything that speaks its protocol; the only importer of boto3, and a late one.

Knows nothing of what it stores. A write can be conditional, so that of many writers one wins; uploads carry checksums.
Short trouble is retried here, a few times; what is left becomes one of our errors, in `Bucket._translate` alone.
"""

from __future__ import annotations

import contextlib
import io
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from knowledge_engine.errors import (
    CredentialsError,
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    Reason,
    UpstreamError,
)
from knowledge_engine.settings import Settings

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
ATTEMPTS = 3
"""Tries of one request. Whoever can wait longer tries again (`training/publishing.py`)."""

PART_BYTES = 16 * 2**20
"""From this size on a file travels in parts of this size."""

_PIECE_BYTES = 2**20
_MAX_OBJECT_BYTES = 16 * 2**20  # of what is read whole into memory
_DELETE_KEYS = 1000  # the protocol's limit for one request
_PROBE_SECONDS = 2.0
_REFUSALS = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
_WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"})
_ABSENT = frozenset({"NoSuchKey", "NotFound", "404"})
_TAKEN = frozenset({"PreconditionFailed", "412"})
_RACED = frozenset({"ConditionalRequestConflict", "OperationAborted"})  # two at once; the protocol says: try again


class Stored(NamedTuple):
    """One object of a listing."""

    key: str
    size_bytes: int
    modified: datetime


class Bucket:
    """One bucket. Its methods block, may be called from any thread, and raise:

    UpstreamError: STORAGE_UNREACHABLE: it does not answer, is overloaded, or does not exist.
    CredentialsError: UPSTREAM_CREDENTIALS.
    InvalidSpecError: SETTINGS_INVALID: no bucket could have such a name, or such a region.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
        attempts: int = ATTEMPTS,
    ) -> None:
        assert settings.s3_bucket is not None
        self.name = settings.s3_bucket
        self.endpoint = settings.s3_endpoint_url or ""
        self._settings = settings
        self._connect_seconds = connect_seconds
        self._read_seconds = read_seconds
        self._attempts = attempts
        self._lock = threading.Lock()
        self._opened: Any = None

    def close(self) -> None:
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def check(self) -> None:
        """Returns if the bucket is there and our credentials are good for it."""
        with self._errors(), self._absent() as absent:
            self._client().head_bucket(Bucket=self.name)
        if absent:
            raise self._no_bucket()

    def list_objects(self, prefix: str) -> list[Stored]:
        """Everything below `prefix`, by key."""
        with self._errors():
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
            found = (item for page in pages for item in page.get("Contents", ()))
            return [Stored(item["Key"], item["Size"], item["LastModified"]) for item in found]

    def get(self, key: str) -> bytes | None:
        """A small object's bytes; None where there is no such object."""
        content = io.BytesIO()
        return content.getvalue() if self._fetch(key, content, _MAX_OBJECT_BYTES) else None

    def download(self, key: str, path: Path, max_bytes: int) -> bool:
        """Writes an object to `path`, but little more than `max_bytes` of it; False where there is no such object."""
        with path.open("wb") as file:
            return self._fetch(key, file, max_bytes)

    def put(self, key: str, body: bytes, *, only_new: bool = False) -> bool:
        """Writes a small object. With `only_new` never over another one: False then, and nothing is written."""
        condition = {"IfNoneMatch": "*"} if only_new else {}
        for attempt in range(self._attempts):
            with self._errors():
                try:
                    self._client().put_object(Bucket=self.name, Key=key, Body=body, **condition)
                except Exception as error:
                    if _code(error) in _TAKEN:
                        return False
                    if _code(error) not in _RACED or attempt + 1 == self._attempts:
                        raise
                else:
                    return True
            _pause(attempt)
        raise AssertionError("unreachable")

    def upload(self, key: str, path: Path, sha256: str, check: Callable[[], None]) -> None:
        """Writes a file, in parts where it is big; one that is there already, whole, is left alone. `check` is called
        on the way and may raise; then nothing is written."""
        if self._holds(key, path.stat().st_size, sha256):
            return
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
        with self._errors(), path.open("rb") as file:
            self._client().upload_fileobj(
                file,
                self.name,
                key,
                ExtraArgs={"Metadata": {"sha256": sha256}},
                Callback=lambda _: check(),
                Config=config,
            )

    def delete(self, keys: Iterable[str]) -> None:
        """Takes objects away; missing ones are fine."""
        left = list(keys)
        while left:
            batch, left = left[:_DELETE_KEYS], left[_DELETE_KEYS:]
            request = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
            with self._errors():
                answer = self._client().delete_objects(Bucket=self.name, Delete=request)
            for failure in answer.get("Errors", ()):
                raise self._from_code(failure.get("Code", ""), 200)

    def abort_uploads(self, prefix: str, before: datetime, is_ours: Callable[[str], bool]) -> int:
        """Ends uploads in parts below `prefix`, of keys that are ours, that were begun before a moment and never
        completed; says how many."""
        with self._errors():
            pages = self._client().get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix)
            found = (upload for page in pages for upload in page.get("Uploads", ()))
            uploads = [upload for upload in found if upload["Initiated"] < before and is_ours(upload["Key"])]
        for upload in uploads:
            # Gone meanwhile is as good.
            with self._errors(), contextlib.suppress(self._client().exceptions.NoSuchUpload):
                self._client().abort_multipart_upload(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(uploads)

    def _holds(self, key: str, size_bytes: int, sha256: str) -> bool:
        with self._errors(), self._absent():
            head = self._client().head_object(Bucket=self.name, Key=key)
            return bool(head["ContentLength"] == size_bytes and head["Metadata"].get("sha256") == sha256)
        return False

    def _fetch(self, key: str, file: IO[bytes], max_bytes: int) -> bool:
        """The request is tried again by boto3; a body that breaks off is tried again here."""
        for attempt in range(self._attempts):
            with self._errors(), self._absent() as absent:
                body = self._client().get_object(Bucket=self.name, Key=key)["Body"]
            if absent:
                return False
            file.seek(0)
            file.truncate()
            try:
                with self._errors(), closing(body):
                    while (piece := body.read(_PIECE_BYTES)) and file.tell() <= max_bytes:
                        file.write(piece)
            except (UpstreamError, IntegrityError):
                if attempt + 1 == self._attempts:
                    raise
                _pause(attempt)
            else:
                return True
        raise AssertionError("unreachable")

    # --- client and errors ----------------------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> Any:
        import boto3
        from botocore.config import Config

        settings = self._settings
        secrets = {
            "aws_access_key_id": settings.aws_access_key_id,
            "aws_secret_access_key": settings.aws_secret_access_key,
            "aws_session_token": settings.aws_session_token,
        }
        # A session of our own: the shared default one is not made for threads. What is unset, boto3 looks for itself.
        session = boto3.session.Session(region_name=settings.aws_region)
        return session.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            config=Config(
                signature_version="s3v4",
                connect_timeout=self._connect_seconds,
                read_timeout=self._read_seconds,
                retries={"mode": "standard", "total_max_attempts": self._attempts},
                s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
                request_checksum_calculation="when_supported",
                response_checksum_validation="when_supported",
            ),
            **{name: secret.get_secret_value() for name, secret in secrets.items() if secret is not None},
        )

    @contextmanager
    def _absent(self) -> Iterator[list[str]]:
        """Ends quietly where the object does not exist; the list is then not empty."""
        absent: list[str] = []
        try:
            yield absent
        except Exception as error:
            if _code(error) not in _ABSENT:
                raise
            absent.append(_code(error))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Everything upstream becomes ours here. The original is not chained: its text may quote what we sent."""
        try:
            yield
        except Exception as error:
            ours = self._translate(error)
            if isinstance(ours, CredentialsError):
                self.close()  # the next call looks for them anew
            if ours is None:
                raise
            raise ours from None

    def _translate(self, error: Exception) -> KnowledgeEngineError | None:
        """The error of ours that an upstream one stands for; None for what is none of theirs."""
        import boto3.exceptions
        import botocore.exceptions as theirs
        import s3transfer.exceptions
        import urllib3.exceptions

        kind = type(error).__name__
        if isinstance(error, theirs.ClientError):
            return self._from_code(_code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if isinstance(error, (theirs.ParamValidationError, theirs.ValidationError)):
            return InvalidSpecError(
                f"KNOWLEDGE_S3_BUCKET or KNOWLEDGE_AWS_REGION: no bucket can be called {self.name!r} there",
                reason=Reason.SETTINGS_INVALID,
                bucket=self.name,
            )
        if isinstance(error, theirs.FlexibleChecksumError):
            return IntegrityError(
                f"what the bucket {self.name!r} sent does not match its checksum",
                reason=Reason.MODEL_VERSION_CORRUPT,
                bucket=self.name,
            )
        refused = (
            theirs.NoCredentialsError,
            theirs.PartialCredentialsError,
            theirs.CredentialRetrievalError,
            theirs.UnknownCredentialError,
            theirs.ProfileNotFound,
            theirs.NoAuthTokenError,
            theirs.TokenRetrievalError,
            theirs.SSOError,
            theirs.LoginError,
        )
        if isinstance(error, refused):
            return CredentialsError(
                f"no credentials for the bucket {self.name!r} were found ({kind}): set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or give this machine a role",
                reason=Reason.UPSTREAM_CREDENTIALS,
                bucket=self.name,
            )
        upstream = (
            theirs.BotoCoreError,
            boto3.exceptions.Boto3Error,
            s3transfer.exceptions.RetriesExceededError,
            urllib3.exceptions.HTTPError,
        )
        return self._unreachable(f"does not answer ({kind})") if isinstance(error, upstream) else None

    def _from_code(self, code: str, status: int) -> KnowledgeEngineError:
        if code == "NoSuchBucket":
            return self._no_bucket()
        if code == "RequestTimeTooSkewed":
            return self._unreachable("finds this machine's clock wrong; set it")
        if code in _WRONG_REGION or status == 301:
            return self._unreachable("is in another region; set AWS_REGION")
        if code in _REFUSALS or status in {401, 403}:
            return CredentialsError(
                f"the bucket {self.name!r} refuses our credentials ({code}): correct or renew AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or allow them to read and write it",
                reason=Reason.UPSTREAM_CREDENTIALS,
                bucket=self.name,
                code=code,
            )
        return self._unreachable(f"answers {status} {code if code != str(status) else ''}".rstrip())

    def _no_bucket(self) -> UpstreamError:
        return self._unreachable("does not exist; create it or correct KNOWLEDGE_S3_BUCKET")

    def _unreachable(self, what: str) -> UpstreamError:
        where = f" at {self.endpoint}" if self.endpoint else ""
        return UpstreamError(
            f"the bucket {self.name!r}{where} {what}",
            reason=Reason.STORAGE_UNREACHABLE,
            retry_after_seconds=10,
            bucket=self.name,
            trouble=what,
        )


def open_bucket(settings: Settings) -> Bucket | None:
    """The bucket of the settings; None without one. Nothing is asked of it yet."""
    return Bucket(settings) if settings.s3_bucket is not None else None


def probe(settings: Settings) -> None:
    """One look at the bucket, of a few seconds; raises what `Bucket` raises."""
    with closing(Bucket(settings, connect_seconds=_PROBE_SECONDS, read_seconds=_PROBE_SECONDS, attempts=1)) as bucket:
        bucket.check()


def _code(error: Exception) -> str:
    """The protocol's code of a ClientError; an answer without a body has its HTTP status there."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    # It stands in messages: a server's words, so short and of one line.
    return "".join(character for character in str(code)[:60] if character.isalnum() or character in "._-")


def _pause(attempt: int) -> None:
    time.sleep((0.1 + 0.2 * random.random()) * 2**attempt)  # noqa: S311 - spreads writers, guards nothing
