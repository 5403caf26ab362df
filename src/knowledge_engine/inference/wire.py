"""What server and engine say to each other: length-prefixed msgpack frames over a private Unix socket.

A frame is a big-endian 32-bit length and that many bytes of one msgpack map. The client opens with `hello`, the engine
answers with its own; then the client sends `generate`, `abort`, `unload`, `ping` and `metrics`, the engine `status`
(the answer to each ping, and whenever its state changes), `step` (everything one engine step produced) and `metrics` (a
text for Prometheus). Nothing here is pickled, and what a client sends is checked before it is used.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgpack  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from knowledge_engine.core import FinishReason, SamplingParams, TokenLogprob
from knowledge_engine.errors import CapacityError, Reason

PROTOCOL_VERSION = 4
MAX_FRAME_BYTES = 8 * 2**20
"""A prompt of a million tokens is 5 MB; nothing honest is longer."""
RETRY_SECONDS = 2.0

_LENGTH = struct.Struct(">I")

EngineState = Literal["down", "preparing", "loading", "ready"]


class FrameError(Exception):
    """The other side sent what is no frame; the connection is of no use any more."""


@dataclass(frozen=True)
class Adapter:
    """A model version's PEFT folder; `digest` is its identity. It stays loaded until another comes with the same `pin`,
    unless that is empty."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    digest: str
    folder: Path
    pin: str = ""


@dataclass(frozen=True)
class EngineRequest:
    """An answer to produce; `adapter` None is the bare base. The answer ends with the first of `stop_token_ids`. Only
    requests of one `caller` share what was read of a prompt."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop_token_ids: list[int]
    adapter: Adapter | None = None
    caller: str = ""


@dataclass(frozen=True)
class TextDelta:
    """The next characters of one of the answers: whole code points, and none only where `logprobs` come without any."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: int = 0


@dataclass(frozen=True)
class Finished:
    """The end of one of the answers. `completion_tokens` counts the end-of-turn token; times run from the engine's
    receipt of the request: until its turn came, to its first token, to its last."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_seconds: float
    queue_seconds: float
    total_seconds: float
    choice: int = 0


@dataclass(frozen=True)
class Room:
    """For how many answers an engine has room, and for how many of one caller."""

    max_active_streams: int
    max_waiting_streams: int
    max_streams_per_caller: int | None

    def demand(self, callers: Collection[str], caller: str) -> None:
        """Room for one more answer of `caller`, where those of `callers` are under way or wait.

        Raises:
            CapacityError: ENGINE_BUSY, CALLER_BUSY.
        """
        active, waiting, cap = self.max_active_streams, self.max_waiting_streams, self.max_streams_per_caller
        if len(callers) >= active + waiting:
            raise CapacityError(
                f"{active} answers are under way and {waiting} wait; no more can.",
                reason=Reason.ENGINE_BUSY,
                retry_after_seconds=RETRY_SECONDS,
                max_active_streams=active,
                max_waiting_streams=waiting,
            )
        if cap is not None and sum(other == caller for other in callers) >= cap:
            raise CapacityError(
                f"{cap} answers of this caller are under way or wait; no more can.",
                reason=Reason.CALLER_BUSY,
                retry_after_seconds=RETRY_SECONDS,
                max_streams_per_caller=cap,
            )


@dataclass(frozen=True)
class EngineStatus:
    """What the engine says of itself; `detail` is for people.

    `num_steps` counts forward passes of single sequences since the start, `max_steps_after_abort` the most of them that
    any aborted sequence completed between the abort's arrival and its removal.
    """

    state: EngineState
    detail: str = ""
    base_digest: str = ""
    precision: str = ""
    context_length: int = 0
    active: int = 0
    waiting: int = 0
    num_steps: int = 0
    num_aborted: int = 0
    max_steps_after_abort: int = 0
    adapters: tuple[str, ...] = ()
    room: Room | None = None


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hello(_Frame):
    type: Literal["hello"] = "hello"
    version: int


class Generate(_Frame):
    type: Literal["generate"] = "generate"
    id: int
    request: EngineRequest


class Abort(_Frame):
    type: Literal["abort"] = "abort"
    id: int


class Unload(_Frame):
    type: Literal["unload"] = "unload"
    digest: str


class Ping(_Frame):
    type: Literal["ping"] = "ping"


class AskMetrics(_Frame):
    """`refused` are requests that the client did not even send, by reason: they are counted with the engine's own."""

    type: Literal["metrics"] = "metrics"
    refused: dict[Reason, Annotated[int, Field(ge=0)]] = {}


ClientFrame: TypeAlias = Hello | Generate | Abort | Unload | Ping | AskMetrics
_CLIENT_FRAME: TypeAdapter[ClientFrame] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="type")])


def parse_client_frame(data: dict[str, Any]) -> ClientFrame:
    """Checks what a client sent.

    Raises:
        FrameError: it is none of the client's frames.
    """
    try:
        return _CLIENT_FRAME.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise FrameError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def pack(frame: BaseModel | dict[str, Any]) -> bytes:
    """One frame, with its length.

    Raises:
        FrameError: longer than MAX_FRAME_BYTES.
    """
    body: bytes = msgpack.packb(frame.model_dump(mode="json") if isinstance(frame, BaseModel) else frame)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next frame; None when the other side has closed the connection between two frames.

    Raises:
        FrameError: too long, cut off, or no msgpack map.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise FrameError("the connection ended inside a frame") from None
        return None
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES}")
    try:
        data = msgpack.unpackb(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        raise FrameError("the connection ended inside a frame") from None
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise FrameError(f"not msgpack: {error}") from None
    if not isinstance(data, dict):
        raise FrameError("not a map")
    return data
