"""The server's side of the engine socket; imports no torch.

Owns one connection: it connects, says hello, asks for a status every few seconds and starts over with growing waits
when the engine goes away. A request that is under way then fails with ENGINE_UNAVAILABLE; none is sent twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
import stat
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from knowledge_engine.core import FinishReason, TokenLogprob
from knowledge_engine.errors import CapacityError, KnowledgeEngineError, Reason, UpstreamError, from_dict
from knowledge_engine.inference.wire import (
    PROTOCOL_VERSION,
    RETRY_SECONDS,
    Abort,
    Adapter,
    AskMetrics,
    EngineRequest,
    EngineStatus,
    Finished,
    FrameError,
    Generate,
    Hello,
    Ping,
    TextDelta,
    Unload,
    pack,
    read_frame,
)
from knowledge_engine.settings import Settings

__all__ = ["Adapter", "EngineClient", "EngineRequest", "EngineStatus", "Finished", "TextDelta", "socket_path"]

PING_SECONDS = 2.0
SILENCE_SECONDS = 15.0
"""A ready engine answers pings from its event loop, which no forward pass holds for long."""
LOADING_SILENCE_SECONDS = 60.0
"""Importing torch from a cold disk holds the interpreter for many seconds."""
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 2.0
LOADING_RETRY_SECONDS = 5.0

# A Unix socket's path has at most 108 bytes with its NUL; some systems allow 104.
_LONGEST_PATH = 100

_log = logging.getLogger(__name__)
_STATUS: TypeAdapter[EngineStatus] = TypeAdapter(EngineStatus)


def socket_path(settings: Settings) -> Path:
    """Where the engine of this data directory listens: beside its data, or in the temporary folder when that is too
    long for a socket."""
    path = settings.data_dir.absolute() / "run" / "engine.sock"
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        return path
    name = hashlib.sha256(os.fsencode(settings.data_dir.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"knowledge-engine-{os.getuid()}" / f"{name}.sock"


def check_private(folder: Path) -> None:
    """Raises PermissionError unless `folder` is a real folder that only this user can enter.

    The temporary folder is everyone's: someone else could have made ours first, and would read every prompt.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user with mode 0700")


class EngineClient:
    """One connection to the engine, shared by all requests of this process."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._status = EngineStatus(state="down", detail="not connected yet")
        self._writer: asyncio.StreamWriter | None = None
        self._requests: dict[int, _Awaited] = {}
        """What the engine has been asked for, until its last output has come: read or not."""
        self._preparing: Counter[str] = Counter()
        """Answers of each caller that are about to be asked for."""
        self._refused: Counter[Reason] = Counter()
        self._status_waiters: list[asyncio.Future[EngineStatus]] = []
        self._metrics_waiters: list[asyncio.Future[bytes]] = []
        self._last_words = ""  # why the engine gave up, as far as it said so
        self._next_id = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to connect, and keeps the connection until `close`; does not wait for the engine."""
        self._task = asyncio.create_task(self._stay_connected())

    async def close(self) -> None:
        """Closes the connection; requests under way fail."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    @property
    def status(self) -> EngineStatus:
        """What the engine said last; `down` while there is no connection."""
        return self._status

    async def refresh(self) -> EngineStatus:
        """Asks the engine for its status now; `down` when there is no connection."""
        if self._writer is None:
            return self._status
        waiter: asyncio.Future[EngineStatus] = asyncio.get_running_loop().create_future()
        self._status_waiters.append(waiter)
        self._writer.write(pack(Ping()))
        return await waiter

    async def metrics(self) -> bytes:
        """What the engine counts, as a text for Prometheus; empty when there is no connection."""
        if self._writer is None:
            return b""
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._metrics_waiters.append(waiter)
        refused, self._refused = self._refused, Counter()
        self._writer.write(pack(AskMetrics(refused=refused)))
        return await waiter

    @contextlib.contextmanager
    def place(self, caller: str, n: int = 1) -> Iterator[None]:
        """Held while a prompt is being made ready, until `generate` asks for its `n` answers.

        The engine has what this process has under way, and what others have besides: it would refuse what is refused
        here, and may refuse more. So no prompt is encoded, nor waits to be, that there is no room for.

        Raises:
            CapacityError: ENGINE_BUSY, CALLER_BUSY.
        """
        callers = [*self._preparing.elements(), *(awaited.caller for awaited in self._requests.values())]
        if (room := self._status.room) is not None:
            for index in range(n):
                try:
                    room.demand(callers, caller)
                except CapacityError as error:
                    self._refused[error.reason] += n - index
                    raise
                callers.append(caller)
        self._preparing[caller] += n
        try:
            yield
        finally:
            self._preparing[caller] -= n

    async def generate(self, request: EngineRequest, n: int = 1) -> AsyncGenerator[TextDelta | Finished, None]:
        """The text of `n` answers as it comes, and a `Finished` for each. Closing the iterator aborts within one step,
        and if one fails, all do. With a seed each answer has its own, the first the one that is given.

        Raises:
            UpstreamError: ENGINE_UNAVAILABLE, BASE_MODEL_LOADING.
            CapacityError: ENGINE_BUSY, CALLER_BUSY.
            InvalidSpecError: PROMPT_TOO_LONG, or token ids the base does not have.
            IntegrityError: the adapter cannot be loaded.
        """
        writer = self._ready_writer()
        first = self._next_id + 1
        self._next_id += n
        queue: asyncio.Queue[TextDelta | Finished | KnowledgeEngineError] = asyncio.Queue()
        going_on = dict.fromkeys(range(n))
        try:
            for choice in going_on:
                self._requests[first + choice] = _Awaited(queue, choice, request.caller)
                writer.write(pack(Generate(id=first + choice, request=_of_choice(request, choice))))
            while going_on:
                item = await queue.get()
                if isinstance(item, KnowledgeEngineError):
                    raise item
                if isinstance(item, Finished):
                    del going_on[item.choice]
                yield item
        finally:
            for choice in going_on:
                self._requests.pop(first + choice, None)
                if self._writer is writer:
                    writer.write(pack(Abort(id=first + choice)))

    async def unload(self, digest: str) -> None:
        """Tells the engine to forget an adapter once no answer uses it. Without a connection there is none to tell:
        an engine that starts has no adapter."""
        if self._writer is not None:
            self._writer.write(pack(Unload(digest=digest)))

    def _ready_writer(self) -> asyncio.StreamWriter:
        if self._writer is None or self._status.state == "down":
            raise _unavailable(self._status.detail)
        if self._status.state != "ready":
            raise UpstreamError(
                f"The base model is being prepared: {self._status.detail or self._status.state}.",
                reason=Reason.BASE_MODEL_LOADING,
                retry_after_seconds=LOADING_RETRY_SECONDS,
                state=self._status.state,
                detail=self._status.detail,
            )
        return self._writer

    # --- the connection -------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        wait = FIRST_WAIT_SECONDS
        try:
            while True:
                try:
                    await self._connect_once()
                    detail = self._last_words or "the engine has gone away"
                except (FileNotFoundError, ConnectionRefusedError):
                    detail = self._last_words or "the engine is not running"
                except (OSError, FrameError, TimeoutError) as error:
                    detail = f"the engine does not answer: {error or type(error).__name__}"
                wait = FIRST_WAIT_SECONDS if self._writer is not None else min(2 * wait, LONGEST_WAIT_SECONDS)
                if self._writer is not None:
                    _log.warning("engine connection lost: %s", detail)
                self._drop(detail)
                await asyncio.sleep(wait)
        finally:
            self._drop("closed")

    async def _connect_once(self) -> None:
        """One connection from hello to its end."""
        check_private(self._path.parent)
        reader, writer = await asyncio.open_unix_connection(self._path)
        ping = None
        try:
            writer.write(pack(Hello(version=PROTOCOL_VERSION)))
            async with asyncio.timeout(LOADING_SILENCE_SECONDS):
                hello = await read_frame(reader)
            if hello is None or hello.get("type") != "hello" or hello.get("version") != PROTOCOL_VERSION:
                raise FrameError(f"it speaks another protocol ({hello}), not version {PROTOCOL_VERSION}")
            self._writer = writer
            ping = asyncio.create_task(self._ping(writer))
            while (frame := await self._next_frame(reader)) is not None:
                self._receive(frame)
        finally:
            if ping is not None:
                ping.cancel()
            writer.transport.abort()

    async def _next_frame(self, reader: asyncio.StreamReader) -> dict[str, Any] | None:
        limit = SILENCE_SECONDS if self._status.state == "ready" else LOADING_SILENCE_SECONDS
        async with asyncio.timeout(limit):
            return await read_frame(reader)

    async def _ping(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            writer.write(pack(Ping()))

    def _receive(self, frame: dict[str, Any]) -> None:
        kind = frame.pop("type", None)
        if kind == "step":
            for number, *output in frame["outputs"]:
                if (known := self._requests.get(number)) is not None and _put(known.queue, known.choice, *output):
                    del self._requests[number]
        elif kind == "status":
            self._set_status(frame)
        elif kind == "metrics":
            self._answer_metrics_waiters(frame["text"])
        else:
            raise FrameError(f"a frame of an unknown type {kind!r}")

    def _set_status(self, frame: dict[str, Any]) -> None:
        try:
            self._status = _STATUS.validate_python(frame)
        except ValidationError as error:
            raise FrameError(f"not a status: {error.error_count()} fields are wrong") from None
        self._last_words = self._status.detail if self._status.state == "down" else ""
        self._answer_waiters()
        if self._status.state == "down":
            self._fail_requests()

    def _answer_waiters(self) -> None:
        waiters, self._status_waiters = self._status_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(self._status)

    def _answer_metrics_waiters(self, text: bytes) -> None:
        waiters, self._metrics_waiters = self._metrics_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(text)

    def _drop(self, detail: str) -> None:
        self._writer = None
        self._status = EngineStatus(state="down", detail=detail)
        self._answer_waiters()
        self._answer_metrics_waiters(b"")
        self._fail_requests()

    def _fail_requests(self) -> None:
        for awaited in self._requests.values():
            awaited.queue.put_nowait(_unavailable(self._status.detail))
        self._requests.clear()


class _Awaited(NamedTuple):
    """Where the outputs of a request go, which of the answers asked for there it is, and whose."""

    queue: asyncio.Queue[TextDelta | Finished | KnowledgeEngineError]
    choice: int
    caller: str


def _of_choice(request: EngineRequest, choice: int) -> EngineRequest:
    """Seeds far apart: those of the next question may well be the next ones."""
    sampling = request.sampling
    if not choice or sampling.seed is None:
        return request
    seed = int.from_bytes(hashlib.blake2b(f"{sampling.seed} {choice}".encode(), digest_size=8).digest()) >> 1
    return dataclasses.replace(request, sampling=sampling.model_copy(update={"seed": seed}))


def _put(
    queue: asyncio.Queue[TextDelta | Finished | KnowledgeEngineError],
    choice: int,
    text: str,
    finished: list[Any] | None,
    error: dict[str, Any] | None,
    logprobs: list[Any],
) -> bool:
    """Hands an output on; whether it is the last."""
    if text or logprobs:
        queue.put_nowait(TextDelta(text, tuple(map(_logprob, logprobs)), choice))
    if finished is not None:
        reason, *facts = finished
        queue.put_nowait(dataclasses.replace(Finished(FinishReason(reason), *facts), choice=choice))
    if error is not None:
        queue.put_nowait(from_dict(error))
    return finished is not None or error is not None


def _logprob(told: list[Any]) -> TokenLogprob:
    token_id, text_bytes, logprob, top = told
    return TokenLogprob(token_id, text_bytes, logprob, tuple(map(_logprob, top)))


def _unavailable(detail: str) -> UpstreamError:
    return UpstreamError(
        f"The inference engine cannot answer now: {detail}.",
        reason=Reason.ENGINE_UNAVAILABLE,
        retry_after_seconds=RETRY_SECONDS,
        detail=detail,
    )
