"""Model repositories on the Hugging Face hub: which are configured, what they hold, and fetching them, bounded.

The only user of huggingface_hub, whose client asks, and whose session and errors the transfers use. Files are fetched
here with plain ranged requests: the client's own download throws a cut file away with its process, and writes ten
megabytes at a time. Xet is left out on purpose. Its transfer keeps a cache of its own, resumes nothing after a kill,
and speaks to further hosts through a client that knows none of our bounds; the hub serves the same files over HTTP.
Every file is checked against the digest that the hub lists for it. What a repository holds is data: no code of it runs.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from knowledge_engine.devices import has_cuda_device
from knowledge_engine.errors import (
    CapacityError,
    CredentialsError,
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    UpstreamError,
)
from knowledge_engine.files import demand_space, read_json, sync
from knowledge_engine.settings import Settings

if TYPE_CHECKING:
    from httpx2 import Response

Report = Callable[[str, float], None]
"""Is told the phase of a preparation and how far that is, 0 to 1. Called often; what it raises ends the preparation."""

ASKING, DOWNLOADING = PHASES = ("asking the hub", "downloading")

PAUSE_SECONDS = 10.0
"""After a hub was given up, for whoever wants to ask again."""
PATIENCE_SECONDS = 60.0
"""How long a hub that gives nothing is asked again; on top of it comes what it told us to wait."""
MAX_TOLD_SECONDS = 300.0
"""The hub counts requests in windows of five minutes."""
MAX_TOLD = 3
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 8.0
_CONNECT_SECONDS, _READ_SECONDS, _PROBE_SECONDS = 10.0, 20.0, 5.0
_TICK_SECONDS = 0.2
_HASH_BYTES = 2**22
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_REQUIRED = ("config.json", "tokenizer.json")
_TEXTS = (*_REQUIRED, "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")
_WORD = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"({_WORD}/{_WORD})(?:@([A-Za-z0-9_][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


# --- what is configured -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubId:
    """A repository and which revision of it: a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


DEFAULT = HubId("meta-llama/Llama-2-7b-hf")
"""The base where nothing is set and it can run."""


def parse_hub_id(value: str) -> HubId | None:
    """`org/name` or `org/name@revision`; None for anything else."""
    match = _HUB_ID.fullmatch(value)
    if match is None or len(match[1]) > 96 or ".." in value or "--" in match[1] or match[1].endswith(".git"):
        return None
    return HubId(match[1], match[2] or HubId.revision)


def choose_default(settings: Settings) -> tuple[HubId | None, str]:
    """What an unset KNOWLEDGE_BASE_MODEL stands for, None being the bundled model, and why."""
    if not has_cuda_device():
        return None, "KNOWLEDGE_BASE_MODEL is unset and there is no CUDA device"
    if settings.huggingface_token is None:
        return None, "KNOWLEDGE_BASE_MODEL is unset and there is a CUDA device, but no KNOWLEDGE_HUGGINGFACE_TOKEN"
    return DEFAULT, "KNOWLEDGE_BASE_MODEL is unset and there are a CUDA device and a KNOWLEDGE_HUGGINGFACE_TOKEN"


def configured(settings: Settings) -> list[HubId]:
    """The bases of this deployment that come from the hub."""
    base = parse_hub_id(settings.base_model) if settings.base_model else choose_default(settings)[0]
    return [found for found in (base, *map(parse_hub_id, settings.base_models.values())) if found is not None]


def is_needed(settings: Settings) -> bool:
    """Whether any base of this deployment comes from the hub."""
    return bool(configured(settings))


def probe(settings: Settings) -> None:
    """One light request: whose token it is, or without a token what the first configured repository is.

    Raises:
        CredentialsError: UPSTREAM_CREDENTIALS.
        UpstreamError: HUB_UNREACHABLE.
    """
    import httpx2

    _be_quiet()
    headers = {"user-agent": _user_agent()}
    if (token := _token(settings)) is not None:
        path, headers["authorization"] = "/api/whoami-v2", f"Bearer {token}"
    else:
        path = "".join(f"/api/models/{hub_id.repository}" for hub_id in configured(settings)[:1])
    try:
        answer = httpx2.get(settings.huggingface_endpoint + path, headers=headers, timeout=_PROBE_SECONDS)
    except httpx2.HTTPError as error:
        raise _unreachable(settings, type(error).__name__) from None
    if answer.status_code == 401 and token is not None:
        raise _credentials(settings, "it refuses the token")
    if answer.status_code >= 500 or answer.status_code == 429:
        raise _unreachable(settings, f"status {answer.status_code}")


# --- what a repository holds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubFile:
    """One file as the hub lists it. A large one has the sha256 of its content, a small one git's blob id."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repository: str
    commit: str
    files: dict[str, HubFile]


def find_snapshot(
    settings: Settings, hub_id: HubId, report: Report, *, patience_seconds: float = PATIENCE_SECONDS
) -> Snapshot:
    """What the repository holds at the revision, which this resolves to a commit.

    Raises:
        UpstreamError: HUB_UNREACHABLE.
        NotFoundError: BASE_MODEL_NOT_FOUND, no such repository or revision.
        CredentialsError: UPSTREAM_CREDENTIALS, BASE_MODEL_GATED.
    """

    def find(stop: threading.Event) -> Snapshot:
        patience = _Patience(settings, patience_seconds, stop)
        while True:
            try:
                return _list_files(settings, hub_id)
            except Exception as error:
                trouble = _find_trouble(error, settings, hub_id)
            patience.wait(trouble)

    return _attended(find, lambda: report(ASKING, 0.0))


def _list_files(settings: Settings, hub_id: HubId) -> Snapshot:
    from huggingface_hub import HfApi

    _be_quiet()
    api = HfApi(
        endpoint=settings.huggingface_endpoint,
        token=_token(settings) or False,  # False: nothing from its own cache or environment
        headers={"user-agent": _user_agent()},
    )
    info = api.model_info(hub_id.repository, revision=hub_id.revision, files_metadata=True, timeout=_READ_SECONDS)
    if not _COMMIT.fullmatch(info.sha or "") or not info.siblings:
        raise ValueError("no commit, or no files")
    return Snapshot(
        repository=hub_id.repository,
        commit=str(info.sha),
        files={
            item.rfilename: HubFile(
                item.rfilename,
                item.size or 0,
                item.lfs.sha256 if item.lfs else None,
                None if item.lfs else item.blob_id,
            )
            for item in info.siblings
        },
    )


def text_files(snapshot: Snapshot) -> list[str]:
    """The small files that a base needs, of those that the repository has.

    Raises:
        InvalidSpecError: BASE_MODEL_UNSUPPORTED, it lacks one, or holds no safetensors.
    """
    missing = [name for name in _REQUIRED if name not in snapshot.files]
    if missing:
        raise _unsupported(snapshot, f"lacks {', '.join(missing)}")
    if _SINGLE in snapshot.files:
        return [name for name in _TEXTS if name in snapshot.files]
    if _INDEX not in snapshot.files:
        pickles = [name for name in sorted(snapshot.files) if name.endswith(_PICKLES)]
        has = f"; it has {', '.join(pickles[:3])}, which could run code when read" if pickles else ""
        raise _unsupported(snapshot, f"has no safetensors weights, neither {_SINGLE} nor {_INDEX}{has}")
    return [name for name in (*_TEXTS, _INDEX) if name in snapshot.files]


def weight_files(snapshot: Snapshot, folder: Path) -> list[str]:
    """The safetensors files of the model; where there are several, the index in `folder` names them.

    Raises:
        InvalidSpecError: BASE_MODEL_UNSUPPORTED, the index names what is no file of the repository's own folder.
    """
    if _SINGLE in snapshot.files:
        return [_SINGLE]
    weights = read_json(folder / _INDEX).get("weight_map")
    names = sorted({str(name) for name in weights.values()}) if isinstance(weights, dict) else []
    bad = [name for name in names if not _SHARD.fullmatch(name) or name not in snapshot.files]
    if bad or not names:
        problem = f"{bad[0][:80]!r}, which is no safetensors file of it" if bad else "no files"
        raise _unsupported(snapshot, f"has an index of weights, {_INDEX}, that names {problem}")
    return names


# --- fetching -----------------------------------------------------------------------------------------------------


def fetch(
    settings: Settings,
    snapshot: Snapshot,
    names: Sequence[str],
    folder: Path,
    report: Report,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
) -> dict[str, str]:
    """Puts files into `folder`, going on with what an earlier try left there; returns the sha256 of each.

    Raises:
        UpstreamError: HUB_UNREACHABLE; what has arrived stays.
        IntegrityError: BASE_MODEL_CORRUPT, a file came twice with other bytes than the hub lists.
        CapacityError: DISK_FULL.
        NotFoundError, CredentialsError: as `find_snapshot`.
    """
    files = [snapshot.files[name] for name in names]
    for file in files:
        if file.sha256 is None and file.blob_id is None:
            raise _unreachable(settings, f"it lists no digest for {file.name}, so nothing could be checked")
    total = sum(file.size for file in files)
    demand_space(folder, total - sum(_size(folder / file.name) for file in files))
    transfer = _Transfer(settings, snapshot, folder, patience_seconds)

    def work(stop: threading.Event) -> dict[str, str]:
        return {file.name: transfer.fetch(file, stop) for file in files}

    return _attended(work, lambda: report(DOWNLOADING, min(1.0, transfer.num_bytes / max(total, 1))))


class _StoppedError(Exception):
    """The one who asked wants no more."""


def _attended(work: Callable[[threading.Event], _T], tick: Callable[[], None]) -> _T:
    """Runs `work` in a thread and `tick` here meanwhile, so that a silent network never keeps anyone who wants to stop.

    When `tick` raises, `work` finds its event set; a thread that is stuck in a read is left to its time-out, and
    touches nothing any more.
    """
    stop = threading.Event()
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(stop))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            tick()
            thread.join(_TICK_SECONDS)
        tick()
    finally:
        stop.set()
        thread.join(_TICK_SECONDS)
    if errors:
        raise errors[0]
    return results[0]


class _Patience:
    """Waits between tries, longer each time, and gives up; a new one begins whenever something has arrived."""

    def __init__(self, settings: Settings, seconds: float, stop: threading.Event) -> None:
        self._settings = settings
        self._stop = stop
        self._until = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE_SECONDS
        self._num_told = 0

    def wait(self, trouble: _Trouble) -> None:
        """Raises UpstreamError: HUB_UNREACHABLE, when it has been long enough."""
        pause = self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        if trouble.told_seconds is not None:
            pause = trouble.told_seconds
            self._until += pause
            self._num_told += 1
        if time.monotonic() + pause > self._until or pause > MAX_TOLD_SECONDS or self._num_told > MAX_TOLD:
            raise _unreachable(self._settings, trouble.what, trouble.told_seconds)
        _LOG.info("%s: %s; asking again in %.1f s", _host(self._settings), trouble.what, pause)
        if self._stop.wait(pause):
            raise _StoppedError


class _Sums:
    """The digests of a growing file."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self.clear()

    def clear(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self.size += len(data)
        self._sha256.update(data)
        if self._file.sha256 is None:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def are_right(self) -> bool:
        if self.size != self._file.size:
            return False
        if self._file.sha256 is not None:
            return self.sha256 == self._file.sha256
        return self._blob.hexdigest() == self._file.blob_id


class _Transfer:
    """Files of one snapshot on their way into a folder."""

    def __init__(self, settings: Settings, snapshot: Snapshot, folder: Path, patience_seconds: float) -> None:
        self._settings = settings
        self._hub_id = HubId(snapshot.repository, snapshot.commit)
        self._folder = folder
        self._patience_seconds = patience_seconds
        self.num_bytes = 0
        self._num_received = 0

    def fetch(self, file: HubFile, stop: threading.Event) -> str:
        """Completes one file and checks it; wrong bytes are thrown away and fetched once more. Returns its sha256."""
        path = self._folder / file.name
        for _ in range(2 + path.is_file()):  # what was left here may be wrong too
            try:
                sums = self._fill(file, path, stop)
            except OSError as error:
                raise _local_failure(error, file, self._folder) from None
            if sums.are_right:
                sync(path)
                return sums.sha256
            _LOG.warning("%s of %s has other bytes than the hub lists", file.name, self._hub_id.repository)
            path.unlink()
            self.num_bytes -= sums.size
        raise IntegrityError(
            f"{file.name} of {self._hub_id.repository} came twice with other bytes than the hub lists for it: it is "
            f"damaged there, or changed between {_host(self._settings)} and here; try again later, or set another "
            "revision",
            reason=Reason.BASE_MODEL_CORRUPT,
            repository=self._hub_id.repository,
            file=file.name,
        )

    def _fill(self, file: HubFile, path: Path, stop: threading.Event) -> _Sums:
        with path.open("r+b" if path.is_file() else "w+b") as stream:
            sums = self._take_over(file, stream, stop)
            patience = _Patience(self._settings, self._patience_seconds, stop)
            while sums.size < file.size:
                before = self._num_received
                try:
                    self._stream(file, stream, sums, stop)
                    trouble = _Trouble("its answer ended early")
                except Exception as error:
                    trouble = _find_trouble(error, self._settings, self._hub_id)
                if self._num_received > before:
                    patience = _Patience(self._settings, self._patience_seconds, stop)
                if sums.size < file.size:
                    patience.wait(trouble)
            return sums

    def _take_over(self, file: HubFile, stream: IO[bytes], stop: threading.Event) -> _Sums:
        """Counts what an earlier try left; the file stands at its end then."""
        sums = _Sums(file)
        if stream.seek(0, os.SEEK_END) > file.size:
            stream.truncate(0)
        stream.seek(0)
        while data := stream.read(_HASH_BYTES):
            self._count(sums, data, stop)
        return sums

    def _stream(self, file: HubFile, stream: IO[bytes], sums: _Sums, stop: threading.Event) -> None:
        """One request for the rest of the file. However it ends, `sums` are those of what is in the file."""
        import httpx2
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        hub_id, endpoint = self._hub_id, self._settings.huggingface_endpoint
        url = hf_hub_url(hub_id.repository, file.name, revision=hub_id.revision, endpoint=endpoint)
        headers = build_hf_headers(token=_token(self._settings) or False, headers={"user-agent": _user_agent()})
        headers["accept-encoding"] = "identity"
        if sums.size:
            headers["range"] = f"bytes={sums.size}-"
        timeout = httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            if response.status_code != 416:
                hf_raise_for_status(response)
            if sums.size and not _continues(response, sums.size):
                self.num_bytes -= sums.size
                stream.seek(0)
                stream.truncate()
                sums.clear()
            if response.status_code == 416:  # what is here is no part of that file: the next try begins anew
                return
            for chunk in response.iter_bytes():
                self._count(sums, chunk, stop)
                stream.write(chunk)
                self._num_received += len(chunk)
                if sums.size > file.size:
                    break  # more than the hub lists: wrong bytes

    def _count(self, sums: _Sums, data: bytes, stop: threading.Event) -> None:
        if stop.is_set():
            raise _StoppedError
        sums.update(data)
        self.num_bytes += len(data)


def _continues(response: Response, offset: int) -> bool:
    """Whether the server gives what follows `offset`, and not the whole file again."""
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {offset}-")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# --- the client ---------------------------------------------------------------------------------------------------


def _be_quiet() -> None:
    """No telemetry, and no addresses in logs: those of a file's real place are signed."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _user_agent() -> str:
    """Ours alone; the client's would tell the installed packages."""
    return f"knowledge-engine/{importlib.metadata.version('knowledge-engine')}"


def _token(settings: Settings) -> str | None:
    return settings.huggingface_token.get_secret_value() if settings.huggingface_token else None


def _host(settings: Settings) -> str:
    return urlsplit(settings.huggingface_endpoint).netloc


# --- its errors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trouble:
    """Something that may pass; `told_seconds` is the wait that the server asked for."""

    what: str
    told_seconds: float | None = None


def _find_trouble(error: Exception, settings: Settings, hub_id: HubId) -> _Trouble:
    """Why another try may help; else raises what the error means to us. Upstream's own text goes no further: it may
    hold signed addresses."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, KnowledgeEngineError | _StoppedError):
        raise error
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status not in _RETRIED:
            raise _refusal(error, settings, hub_id) from None
        told = error.response.headers.get("retry-after", "")
        return _Trouble(f"status {status}", float(told) if told.isdecimal() else None)
    if isinstance(error, OfflineModeIsEnabled):
        raise _unreachable(settings, "HF_HUB_OFFLINE is set in the environment, so it is not even asked") from None
    if isinstance(error, httpx2.HTTPError):
        return _Trouble(type(error).__name__)
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError | httpx2.InvalidURL):
        return _Trouble("its answer is none of a model hub")
    raise error


def _refusal(error: Any, settings: Settings, hub_id: HubId) -> KnowledgeEngineError:
    """What an HTTP error that stays means."""
    from huggingface_hub import errors

    status, host, repository = error.response.status_code, _host(settings), hub_id.repository
    facts: Any = {"repository": repository, "revision": hub_id.revision}
    has_token = settings.huggingface_token is not None
    if isinstance(error, errors.GatedRepoError):
        page = f"{settings.huggingface_endpoint}/{repository}"
        hint = "the account of KNOWLEDGE_HUGGINGFACE_TOKEN" if has_token else "an account"
        then = "try again" if has_token else "set KNOWLEDGE_HUGGINGFACE_TOKEN to a token of it"
        message = f"{repository} is gated: accept its terms on {page} with {hint}, then {then}"
        return CredentialsError(message, reason=Reason.BASE_MODEL_GATED, **facts)
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"{repository} has no revision {hub_id.revision!r} on {host}"
        return NotFoundError(message, reason=Reason.BASE_MODEL_NOT_FOUND, **facts)
    if isinstance(error, errors.DisabledRepoError):
        message = f"access to {repository} has been disabled on {host}"
        return NotFoundError(message, reason=Reason.BASE_MODEL_NOT_FOUND, **facts)
    if status == 401 and has_token:
        return _credentials(settings, "it refuses the token")
    if status in (401, 404) and not isinstance(error, errors.RemoteEntryNotFoundError):
        private = "the token may not see it" if has_token else "it is private and needs KNOWLEDGE_HUGGINGFACE_TOKEN"
        message = (
            f"{host} has no model {repository}, or {private} (a folder on this machine is written as an absolute path)"
        )
        return NotFoundError(message, reason=Reason.BASE_MODEL_NOT_FOUND, **facts)
    if status == 403:
        return _credentials(settings, f"the token may not read {repository}")
    return _unreachable(settings, f"status {status}")


def _unreachable(settings: Settings, what: str, retry_after_seconds: float | None = None) -> UpstreamError:
    return UpstreamError(
        f"the model hub at {_host(settings)} does not answer as it should ({what}); try again later, a download "
        "goes on where it stopped",
        reason=Reason.HUB_UNREACHABLE,
        retry_after_seconds=min(retry_after_seconds or PAUSE_SECONDS, MAX_TOLD_SECONDS),
        host=_host(settings),
        problem=what,
    )


def _credentials(settings: Settings, what: str) -> CredentialsError:
    return CredentialsError(
        f"the model hub at {_host(settings)} does not let us in: {what}; set KNOWLEDGE_HUGGINGFACE_TOKEN to a token "
        "that may read the base models",
        reason=Reason.UPSTREAM_CREDENTIALS,
        host=_host(settings),
        problem=what,
    )


def _unsupported(snapshot: Snapshot, problem: str) -> InvalidSpecError:
    return InvalidSpecError(
        f"{snapshot.repository} on the hub {problem}",
        reason=Reason.BASE_MODEL_UNSUPPORTED,
        repository=snapshot.repository,
        revision=snapshot.commit,
    )


def _local_failure(error: OSError, file: HubFile, folder: Path) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return CapacityError(
        f"the disk of KNOWLEDGE_DATA_DIR is full: {file.name} could not be written; make room and try again, the "
        "download goes on where it stopped",
        reason=Reason.DISK_FULL,
        file=file.name,
    )
