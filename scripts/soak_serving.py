"""Serving under attack: `python scripts/soak_serving.py [--rows D1,D3] [--scale 0.1] [--json]`.

Each row attacks a real service (gateway, server and engine as processes of the supervisor, a tiny base) over real
sockets and sets its figures beside those that pass; exits 1 when one is missed. D8 runs on the bundled base. All take
half an hour on two cores, a third of it D11.

D1 cancelled streams give their places back     D2 connections that break off before anything is answered
D3 ten times more than there is room for        D4 readers that do not read
D5 SIGTERM with streams under way               D6 kill -9 of the server
D7 kill -9 of the engine                        D8 32 adapters at once
D9 prompts of a megabyte, listing of versions   D10 the same text over SSE and gRPC, and heartbeats
D11 nothing grows
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from knowledge_engine.bases import get_base
from knowledge_engine.bundled import write_bundled_base
from knowledge_engine.core import BASE, TrainingSpec
from knowledge_engine.inference.client import EngineClient, EngineStatus, socket_path
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings
from knowledge_engine.text import ChatText
from knowledge_engine.v1 import inference_pb2, inference_pb2_grpc, models_pb2, models_pb2_grpc
from tests.running import Service, end, start
from tests.tiny import build_tiny_adapter, build_tiny_base

CONTEXT = 16_384
"""Tokens; what is shorter than a megabyte in characters is encoded before it is refused."""
PARTS = ("server", "gateway", "engine")
KEYS = {name: f"{name}-secret-key" for name in ("many", "some", "one")}
QUESTION = "Which kettle would you recommend?"
LONG = 2000
"""Tokens; the most that REST gives."""
CHOSEN: dict[str, Any] = {"temperature": 1.0, "seed": 1, "regex": "[a-z ]{6000,}"}
"""A random model ends its answers at random; a form makes them last as long as they may."""
LAG_SECONDS = 0.01
HEARTBEAT_SECONDS = 15
DRAIN_SECONDS = 3
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Row:
    """A row's figures: what was measured, and the most that passes."""

    name: str
    title: str
    figures: list[tuple[str, float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tell(self, what: str, measured: float, most: float) -> None:
        self.figures.append((what, round(measured, 4), most))

    @property
    def passed(self) -> bool:
        return all(measured <= most for _, measured, most in self.figures)


class Place:
    """A running service, and everything that is asked of it."""

    def __init__(self, folder: Path, base: Path, **settings: str) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.base = base
        self.service: Service = start(folder, base, **settings)
        self.engine = EngineClient(socket_path(Settings(data_dir=folder)))
        self.random = random.Random(1)

    async def __aenter__(self) -> Place:
        await self.engine.start()
        await self.until(lambda status: status.state == "ready", 240)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()
        await asyncio.to_thread(end, self.service)

    async def until(self, holds: Callable[[EngineStatus], bool], seconds: float = 60) -> float:
        """How long it takes until the engine's own status is so."""
        began = time.monotonic()
        while not holds(await self.engine.refresh()):
            if time.monotonic() - began > seconds:
                raise TimeoutError(str(self.engine.status))
            await asyncio.sleep(0.005)
        return time.monotonic() - began

    async def rest(self, seconds: float = 60) -> float:
        return await self.until(lambda status: status.state == "ready" and not status.active + status.waiting, seconds)

    @contextlib.asynccontextmanager
    async def stub(self, address: str = "", **options: int) -> AsyncIterator[Any]:
        given = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{key}", value) for key, value in options.items())]
        async with grpc.aio.insecure_channel(address or self.service.grpc_address, options=given) as channel:
            yield inference_pb2_grpc.InferenceServiceStub(channel)

    def processes(self) -> dict[str, psutil.Process]:
        return {name: process for name in PARTS if (process := self.service.part(name)) is not None}

    def memory(self) -> dict[str, float]:
        """Mebibytes in use, by part."""
        return {name: process.memory_info().rss / 2**20 for name, process in self.processes().items()}

    def handles(self) -> dict[str, int]:
        """Open files and threads, by part."""
        found: dict[str, int] = {}
        for name, process in self.processes().items():
            found |= {f"{name} files": process.num_fds(), f"{name} threads": process.num_threads()}
        return found

    def publish(self, model: str, seed: int, rank: int, scale: float) -> None:
        """A version of random weights, as a worker publishes what it has trained."""
        base = get_base(Settings(data_dir=self.folder, base_model=str(self.base)), BASE)
        registry = Registry(self.folder / "models")
        job_id = f"{model}.{seed}"
        registry.publish(
            spec=TrainingSpec(dataset="d", model=model),
            job_id=job_id,
            folder=build_tiny_adapter(base.folder, registry.stage(job_id), seed, rank, scale),
            base=base,
            dataset_digest="sha256:data",
            chat_template_digest=ChatText.load(base).template_digest,
            comparison=None,
            training_precision="float32",
        )

    def kill(self, part: str) -> None:
        process = self.service.part(part)
        assert process is not None
        process.kill()

    @property
    def http(self) -> tuple[str, int]:
        host, _, port = self.service.http_address.rpartition(":")
        return host, int(port)


def ask(content: str = QUESTION, max_tokens: int = LONG, model: str = BASE, **chosen: Any) -> Any:
    message = inference_pb2.Message(role="user", content=content)
    given = CHOSEN | chosen
    name = model if model == BASE else f"models/{model}"
    asked = inference_pb2.GenerationInput(model=name, messages=[message], max_tokens=max_tokens, **given)
    return inference_pb2.StreamGenerateRequest(input=asked)


def metadata(caller: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {KEYS[caller]}"),) if caller else ()


def http_request(max_tokens: int = LONG, content: str = QUESTION, caller: str = "", **chosen: Any) -> bytes:
    asked = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": max_tokens}
    body = json.dumps(asked | CHOSEN | chosen).encode()
    key = f"Authorization: Bearer {KEYS[caller]}\r\n" if caller else ""
    head = f"POST /api/v1/models/base/inference HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{key}"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def open_sse(place: Place, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*place.http, limit=2**24)
    writer.write(request)
    return reader, writer


async def read_events(reader: asyncio.StreamReader) -> tuple[int, list[tuple[str, Any]]]:
    """HTTP status and events of a whole answer."""
    raw = await reader.read(-1)
    head, _, body = raw.partition(b"\r\n\r\n")
    text = b""
    while body:  # chunks
        size, _, body = body.partition(b"\r\n")
        with contextlib.suppress(ValueError):
            text += body[: int(size, 16)]
            body = body[int(size, 16) + 2 :]
    events = []
    for block in text.decode(errors="replace").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "event" in lines:
            events.append((lines["event"], json.loads(lines.get("data", "null"))))
    return int(head.split()[1]) if head else 0, events


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection by TCP RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Wire:
    """A way to the gRPC port that can be cut by TCP RST."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._ends: list[asyncio.StreamWriter] = []
        self.address = ""

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self._ends:
            with contextlib.suppress(OSError):
                reset(writer)
        self._ends.clear()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._place.service.grpc_address.rpartition(":")
        other_reader, other_writer = await asyncio.open_connection(host, int(port))
        self._ends += [writer, other_writer]

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
            target.close()

        await asyncio.gather(copy(reader, other_writer), copy(other_reader, writer))


async def end_of(call: Any) -> tuple[str, str, float]:
    """Code and reason of a stream's end, and when it came."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
        code, found = grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError as error:
        code, found = error.code(), _reason(error)
    except asyncio.CancelledError:
        code, found = grpc.StatusCode.CANCELLED, ""
    return code.name, found, time.monotonic()


def _reason(error: grpc.aio.AioRpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status_pb2.Status.FromString(bytes(value)).details[0].Unpack(info)
    return info.reason


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


# --- D1, D2: who goes ---------------------------------------------------------------------------------------------


async def d1(place: Place, scale: float) -> Row:
    row = Row("D1", "a cancelled stream gives its place back within a second")
    rounds = max(1, round(184 * scale / 4))
    freed: dict[str, list[float]] = {}
    for way in ("rpc cancel", "deadline", "tcp rst", "sse close", "sse rst"):
        count = rounds if way in ("rpc cancel", "deadline") else max(1, rounds * 2 // 3)
        freed[way] = [await _cancel_one(place, way) for _ in range(count)]
    before = (await place.engine.refresh()).num_aborted
    streams = [await open_sse(place, http_request()) for _ in range(16)]
    await place.until(lambda status: status.active == 16)
    place.kill("gateway")
    freed["gateway kill -9, 16 streams"] = [await place.until(lambda status: not status.active)]
    row.notes.append(f"aborted then: {(await place.engine.refresh()).num_aborted - before} of 16")
    for _, writer in streams:
        writer.close()
    times = [seconds for way in freed.values() for seconds in way]
    row.notes.append(", ".join(f"{way} {len(found)} (worst {max(found):.3f} s)" for way, found in freed.items()))
    row.tell("p99 until the place is free, s", percentile(times, 0.99), 1.0)
    row.tell("forward passes after an abort", (await place.engine.refresh()).max_steps_after_abort, 2)
    await _answers_again(place)
    return row


async def _cancel_one(place: Place, way: str) -> float:
    """Cancels a stream at a random token; how long until the engine has no stream."""
    await place.rest()
    most = place.random.randrange(1, 40)
    if way.startswith("sse"):
        reader, writer = await open_sse(place, http_request())
        for _ in range(3 * most):
            await reader.readline()
        reset(writer) if way == "sse rst" else writer.close()
    elif way == "tcp rst":
        async with Wire(place) as wire, place.stub(wire.address) as stub:
            call = stub.StreamGenerate(ask())
            for _ in range(most):
                await call.read()
            wire.cut()
            return await place.until(lambda status: not status.active)
    else:
        async with place.stub() as stub:
            timeout = 0.1 + most / 200 if way == "deadline" else None
            call = stub.StreamGenerate(ask(), timeout=timeout)
            if way == "deadline":
                await end_of(call)
            else:
                for _ in range(most):
                    await call.read()
                call.cancel()
            return await place.until(lambda status: not status.active)
    return await place.until(lambda status: not status.active)


async def _answers_again(place: Place) -> None:
    """Until REST answers."""
    for _ in range(200):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await open_sse(place, http_request(2))
            status, _ = await read_events(reader)
            writer.close()
            if status == 200:
                return
        await asyncio.sleep(0.1)
    raise TimeoutError("the gateway does not answer")


async def _warm(place: Place) -> None:
    """Until pools have the threads that they will have, and what is loaded late is loaded."""
    await _answers_again(place)

    async def over_rest() -> None:
        reader, writer = await open_sse(place, http_request(20))
        await reader.read(-1)
        writer.close()

    async with place.stub() as stub:
        for _ in range(8):
            calls = [end_of(stub.StreamGenerate(ask(max_tokens=20))) for _ in range(60)]
            await asyncio.gather(*calls, *(over_rest() for _ in range(60)))
    await place.rest()
    await asyncio.sleep(6)  # idle connections of the gateway end after five


async def d2(place: Place, scale: float) -> Row:
    row = Row("D2", "who breaks off before the first byte holds nothing")
    await place.rest()
    await _warm(place)
    before = place.handles()
    host, _, port = place.service.grpc_address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
    request = http_request()
    attacks: list[tuple[tuple[str, int], bytes]] = [
        (place.http, b"POST /api/v1/models/base/infer"),
        (place.http, request[:200]),
        (place.http, request),
        ((host, int(port)), preface),
    ]
    count = max(4, round(800 * scale))
    for index in range(count):
        address, data = attacks[index % len(attacks)]
        _, writer = await asyncio.open_connection(*address)
        writer.write(data)
        if index % 3:
            await asyncio.sleep(0)
        reset(writer)
    calls = max(10, round(200 * scale))
    for _ in range(calls // 10):
        async with Wire(place) as wire, place.stub(wire.address) as stub:
            started = [stub.StreamGenerate(ask()) for _ in range(10)]
            await asyncio.sleep(place.random.random() / 50)
            wire.cut()
            for call in started:
                call.cancel()
    row.notes.append(f"{count} connections and {calls} calls broken off")
    row.tell("until no stream is left, s", await place.rest(), 2.0)
    await asyncio.sleep(6)  # idle connections of the gateway end after five
    after = place.handles()
    row.tell("files and threads more", max(after[what] - before[what] for what in before), 8)
    row.notes.append(f"before {before}, after {after}")
    return row


# --- D3, D4: too many, too slow -----------------------------------------------------------------------------------


async def d3(place: Place, scale: float) -> Row:
    """With room for 4 + 8 answers and 4 for each of three callers."""
    row = Row("D3", "overload is refused at once, and nobody takes everybody's place")
    full = {"many": 4, "some": 4, "one": 4}
    await _load(place, full, 3)
    calm = await _load(place, full, max(3, 15 * scale))
    before = place.memory()
    storm = await _load(place, {"many": 80, "some": 39, "one": 1}, max(6, 60 * scale))
    after = place.memory()
    for what, load in (("12", calm), ("120", storm)):
        whole, first = percentile(load.accepted, 0.99), percentile(load.refused, 0.5)
        row.notes.append(
            f"{what} clients: {len(load.accepted)} answers {dict(load.by_caller)}, p99 {whole:.2f} s; refused "
            f"{dict(load.reasons)}, median {first:.3f} s"
        )
    row.tell("p99 until refused, s", percentile(storm.refused, 0.99), 0.1)
    row.tell("answers' p99 beside that of 12 clients", _ratio(storm.accepted, calm.accepted, 0.99), 1.5)
    row.tell("most that wait", storm.most_waiting, 8)
    row.tell("most streams at once (4 + 4 + 1 may be)", storm.most, 9)
    row.tell("refusals of the caller with one client", storm.reasons["one: 429"], 0)
    row.tell("refusals without a retry hint", storm.hintless, 0)
    row.tell("MiB more", max(after[name] - before[name] for name in PARTS), 50)
    return row


@dataclass
class Load:
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    by_caller: Counter[str] = field(default_factory=Counter)
    most_waiting: int = 0
    most: int = 0
    hintless: int = 0


async def _load(place: Place, clients: dict[str, int], seconds: float) -> Load:
    """Clients that ask, wait as they are told when they are refused, and ask again. Every fourth uses REST."""
    load, stop = Load(), time.monotonic() + seconds

    async def grpc_client(caller: str) -> None:
        while time.monotonic() < stop:
            began = time.monotonic()
            call = stub.StreamGenerate(ask(max_tokens=40), metadata=metadata(caller))
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
                load.accepted.append(time.monotonic() - began)
                load.by_caller[caller] += 1
            except grpc.aio.AioRpcError as error:
                load.refused.append(time.monotonic() - began)
                load.reasons[f"{caller}: {_reason(error) or error.code().name}"] += 1
                load.hintless += b"RetryInfo" not in bytes(
                    dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
                )
                await asyncio.sleep(2 * place.random.uniform(0.8, 1.2))

    async def rest_client(caller: str) -> None:
        while time.monotonic() < stop:
            began = time.monotonic()
            reader, writer = await open_sse(place, http_request(40, caller=caller))
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 429 " in head.split(b"\r\n")[0]:
                load.refused.append(time.monotonic() - began)
                load.reasons[f"{caller}: 429"] += 1
                load.hintless += b"retry-after" not in head.lower()
                writer.close()
                await asyncio.sleep(2 * place.random.uniform(0.8, 1.2))
                continue
            await reader.read(-1)
            writer.close()
            load.accepted.append(time.monotonic() - began)
            load.by_caller[caller] += 1

    async def look() -> None:
        while time.monotonic() < stop:
            status = await place.engine.refresh()
            load.most_waiting = max(load.most_waiting, status.waiting)
            load.most = max(load.most, status.active + status.waiting)
            await asyncio.sleep(0.05)

    async with place.stub() as stub:
        kinds = [grpc_client, grpc_client, grpc_client, rest_client]
        names = [name for name, count in clients.items() for _ in range(count)]

        async def late(index: int, caller: str) -> None:
            await asyncio.sleep(index * 0.02)  # not all in one instant
            await kinds[index % 4](caller)

        await asyncio.gather(look(), *(late(index, name) for index, name in enumerate(names)))
    await place.rest()
    return load


def _ratio(these: list[float], those: list[float], share: float) -> float:
    return percentile(these, share) / max(percentile(those, share), 1e-9)


async def d4(place: Place, scale: float) -> Row:
    """With a time-out for writing of three seconds."""
    row = Row("D4", "slow readers hurt only themselves")
    fast_before = await _fast(place)
    before = place.memory()
    count = max(8, round(200 * scale)) // 4
    large = {"logprobs": True, "top_logprobs": 20}
    async with place.stub(**{"http2.bdp_probe": 0, "http2.lookahead_bytes": 16384}) as narrow:
        silent = [narrow.StreamGenerate(ask(max_tokens=600, **large)) for _ in range(count)]
        slow = [narrow.StreamGenerate(ask(max_tokens=600)) for _ in range(count)]
        sockets = [_narrow_socket(place.http) for _ in range(2 * count)]
        for index, narrow_socket in enumerate(sockets):
            narrow_socket.sendall(http_request(600 if index % 2 else 6000, **large))
        crawling = [asyncio.create_task(_crawl(call)) for call in slow]
        crawling += [asyncio.create_task(_crawl_socket(found)) for found in sockets[1::2]]
        await place.until(lambda status: status.active + status.waiting > count, 60)
        await place.until(lambda status: status.active + status.waiting <= 2, 300)
        await asyncio.sleep(4)
        grown = place.memory()
        fast = await _fast(place)
        row.notes.append(f"{count} each: gRPC and SSE that read nothing, gRPC and SSE that read a piece a second")
        row.tell("fast readers' p99 between pieces beside before", _ratio(fast, fast_before, 0.99), 1.2)
        row.tell("MiB more", max(grown[name] - before[name] for name in PARTS), 100)
        for task in crawling:
            task.cancel()
        await asyncio.gather(*crawling, return_exceptions=True)
        ends = Counter(reason for _, reason, _ in await asyncio.gather(*map(end_of, silent)))
        row.notes.append(f"gRPC that read nothing: {dict(ends)}")
        row.tell("of them not ended for it", count - ends["READER_STALLED"], 0)
        whole = sum([await asyncio.to_thread(_came_whole, found) for found in sockets[0::2]])
        row.tell("SSE that read nothing and were not ended", whole, 0)
        for call in slow:
            call.cancel()
        for found in sockets:
            found.close()
    row.tell("until no stream is left, s", await place.rest(), 2.0)
    among_fast, among_slow = [], []
    for _ in range(3):  # by turns, as what else the machine does comes and goes
        among_fast += await _fast_among(place, 4 * count, slowly=False)
        among_slow += await _fast_among(place, 4 * count, slowly=True)
    row.tell("their p99 while all answer beside that when all read fast", _ratio(among_slow, among_fast, 0.99), 1.2)
    for what, found in (("before", fast_before), ("after", fast), ("all fast", among_fast), ("slow", among_slow)):
        median, late = (1000 * percentile(found, share) for share in (0.5, 0.99))
        row.notes.append(f"{what}: {len(found)} pieces, median {median:.1f} ms, p99 {late:.1f} ms")
    return row


async def _fast_among(place: Place, count: int, slowly: bool) -> list[float]:
    """Seconds between pieces of 20 who read at once while the engine works for `count` others, too: of those half read
    nothing and half a piece a second when they do it `slowly`, else all read at once."""
    between: list[float] = []
    is_full = asyncio.Event()

    async def read(stub: Any) -> None:
        call = stub.StreamGenerate(ask(max_tokens=900))
        last = None
        while await call.read() is not grpc.aio.EOF:
            now = time.monotonic()
            if last is not None and is_full.is_set():
                between.append(now - last)
            last = now

    async def look() -> None:
        while True:
            status = await place.engine.refresh()
            is_full.set() if status.waiting else is_full.clear()
            await asyncio.sleep(0.1)

    pause = 1.0 if slowly else 0.0
    async with place.stub() as stub, place.stub(**{"http2.bdp_probe": 0, "http2.lookahead_bytes": 16384}) as narrow:
        fast = [asyncio.create_task(read(stub)) for _ in range(20)]
        await place.until(lambda status: status.active == 20)
        chosen: list[dict[str, Any]] = [{}, {"logprobs": True, "top_logprobs": 20}]
        calls = [narrow.StreamGenerate(ask(max_tokens=600, **chosen[index % 2])) for index in range(count // 2)]
        sockets = [_narrow_socket(place.http) for _ in range(count // 2)]
        for index, narrow_socket in enumerate(sockets):
            narrow_socket.sendall(http_request(600, **chosen[index % 2]))
        step = 2 if slowly else 1
        others = [asyncio.create_task(_crawl(call, pause)) for call in calls[::step]]
        others += [asyncio.create_task(_crawl_socket(found, pause)) for found in sockets[::step]]
        others.append(asyncio.create_task(look()))
        await asyncio.gather(*fast)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for call in calls:
            call.cancel()
        for found in sockets:
            found.close()
    await place.rest()
    return between


async def _fast(place: Place) -> list[float]:
    """Seconds between pieces of 20 who read at once."""
    between: list[float] = []

    async def read() -> None:
        call = stub.StreamGenerate(ask(max_tokens=150))
        last = None
        while await call.read() is not grpc.aio.EOF:
            now = time.monotonic()
            if last is not None:
                between.append(now - last)
            last = now

    async with place.stub() as stub:
        for _ in range(3):
            await asyncio.gather(*(read() for _ in range(20)))
    return between


def _narrow_socket(address: tuple[str, int]) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(address)
    return made


async def _crawl(call: Any, pause: float = 1.0) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            await asyncio.sleep(pause)


async def _crawl_socket(found: socket.socket, pause: float = 1.0) -> None:
    found.setblocking(False)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while await loop.sock_recv(found, 2048):  # noqa: ASYNC110 - a slow reader is meant
            await asyncio.sleep(pause)


def _came_whole(found: socket.socket) -> bool:
    """Whether what a socket still gives ends as a whole answer does."""
    found.settimeout(10)
    data = b""
    with contextlib.suppress(OSError):
        while piece := found.recv(65536):
            data += piece
    return b"event: completion" in data


# --- D5, D6, D7: the end ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _fifty(place: Place, lengths: tuple[int, ...]) -> AsyncIterator[tuple[list[Any], list[Any]]]:
    """25 gRPC streams and 25 event streams, 16 of all under way."""
    async with place.stub() as stub:
        calls, streams = [], []
        for first in (0, 8):  # eight of each come first
            for index in range(first, 8 if not first else 25):
                streams.append(await open_sse(place, http_request(lengths[index % len(lengths)])))  # noqa: PERF401
            await place.until(lambda status: status.active >= 8 or status.waiting > 8)
            for index in range(first, 8 if not first else 25):
                calls.append(stub.StreamGenerate(ask(max_tokens=lengths[index % len(lengths)])))  # noqa: PERF401
        await place.until(lambda status: status.waiting > 16)
        yield calls, streams
        for _, writer in streams:
            writer.close()


async def _ends(calls: list[Any], streams: list[Any]) -> tuple[Counter[str], Counter[str], float]:
    """How all of them end, and when the last did."""
    grpc_ends, http_ends = asyncio.gather(*map(end_of, calls)), asyncio.gather(*(_sse_end(one) for one, _ in streams))
    ends, told = await asyncio.wait_for(asyncio.gather(grpc_ends, http_ends), 60)
    last = max([*(when for _, _, when in ends), *(when for _, when in told)])
    return Counter(f"{code} {reason}".strip() for code, reason, _ in ends), Counter(what for what, _ in told), last


async def _sse_end(reader: asyncio.StreamReader) -> tuple[str, float]:
    try:
        status, events = await read_events(reader)
    except OSError:
        return "broken off", time.monotonic()
    terminal = [(name, data) for name, data in events if name != "delta"]
    if status not in (0, 200):
        return f"HTTP {status}", time.monotonic()
    if len(terminal) != 1 or events[-1] != terminal[0]:
        return f"{len(terminal)} terminal events", time.monotonic()
    name, data = terminal[0]
    return name if name == "completion" else f"error {data['reason']}", time.monotonic()


def _untyped(ends: Counter[str], told: Counter[str]) -> int:
    """How many ended in another way than whole or with a reason."""
    good = {"OK", "completion", "HTTP 503"}
    every = ends + told
    return sum(n for how, n in every.items() if how not in good and not how.endswith(("_UNAVAILABLE", "_LOADING")))


async def d5(place: Place, scale: float) -> Row:
    row = Row("D5", "a stop drains")
    async with _fifty(place, (200, LONG)) as (calls, streams):  # noqa: SIM117 - the streams come first
        async with grpc.aio.insecure_channel(place.service.grpc_address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            place.service.process.terminate()
            sent = time.monotonic()
            ending = asyncio.create_task(_ends(calls, streams))
            with contextlib.suppress(grpc.aio.AioRpcError):
                while (await watch.read()).status != NOT_SERVING:
                    pass
            row.tell("until health says NOT_SERVING, s", time.monotonic() - sent, 1.0)
            new = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(ask(), timeout=5)
            code, reason, _ = await end_of(new)
            row.notes.append(f"a new call: {code} {reason}")
            row.tell("new calls not refused as UNAVAILABLE", code != "UNAVAILABLE", 0)
            ends, told, last = await ending
            watch.cancel()
    row.notes.append(f"gRPC {dict(ends)}, SSE {dict(told)}, the last after {last - sent:.1f} s")
    row.tell("streams that ended without a last word", _untyped(ends, told), 0)
    row.tell("exit code", await asyncio.to_thread(place.service.process.wait, 60), 0)
    row.tell(f"until the exit, s (grace {DRAIN_SECONDS})", time.monotonic() - sent, DRAIN_SECONDS + 5)
    return row


async def d6(place: Place, scale: float) -> Row:
    row = Row("D6", "kill -9 of the server is survivable")
    async with _fifty(place, (LONG,)) as (calls, streams):
        engine = place.service.part("engine")
        place.kill("server")
        sent = time.monotonic()
        ends, told, last = await _ends(calls, streams)
    row.notes.append(f"gRPC {dict(ends)}, SSE {dict(told)}")
    row.tell("until the last stream's error, s", last - sent, 40.0)
    row.tell(
        "event streams without an error event", told.total() - told["error SERVER_UNAVAILABLE"] - told["HTTP 503"], 0
    )
    freed = await place.until(lambda status: not status.active + status.waiting)
    row.notes.append(f"engine empty after {freed:.2f} s")
    await _answers_again(place)
    row.tell("until answers come again, s", time.monotonic() - sent, 30.0)
    row.tell("engines that are not the old one", place.service.part("engine") != engine, 0)
    return row


async def d7(place: Place, scale: float) -> Row:
    row = Row("D7", "a dead engine is seen")
    async with _fifty(place, (LONG,)) as (calls, streams):  # noqa: SIM117 - the streams come first
        async with grpc.aio.insecure_channel(place.service.grpc_address) as channel:
            service = health_pb2.HealthCheckRequest(service="knowledge_engine.v1.InferenceService")
            watch = health_pb2_grpc.HealthStub(channel).Watch(service)
            await watch.read()
            place.kill("engine")
            sent = time.monotonic()
            ending = asyncio.create_task(_ends(calls, streams))
            while (await watch.read()).status != NOT_SERVING:
                pass
            unhealthy = time.monotonic() - sent
            watch.cancel()
            ends, told, last = await ending
    row.notes.append(f"gRPC {dict(ends)}, SSE {dict(told)}; five crashes: tests/test_supervisor.py")
    row.tell("until the last stream's error, s", last - sent, 2.0)
    row.tell("streams that ended without a reason", _untyped(ends, told), 0)
    row.tell("until health says NOT_SERVING, s", unhealthy, 2.0)
    await place.until(lambda status: status.state == "ready", 240)
    row.notes.append(f"ready again after {time.monotonic() - sent:.1f} s")
    return row


# --- D8: who answers ----------------------------------------------------------------------------------------------


async def d8(place: Place, scale: float) -> Row:
    """All at once first, while nothing is cached; then one by one, the last first."""
    row = Row("D8", "adapters do not mix")
    names = [f"shop-{seed}" for seed in range(32)]
    for seed, name in enumerate(names):
        await asyncio.to_thread(place.publish, name, seed, 8 + seed % 9, 0.3)
    asked_of = [*names, BASE]
    count = max(66, round(200 * scale))
    beginning = "Our kettles boil a litre in three minutes and cost 39.90 EUR; two of them are in stock. "
    questions = [
        (asked_of[index % 33], f"{beginning * (index % 7)}Which one is for traveller {index % 40}?")
        for index in range(count)
    ]
    greedy = {"temperature": 0.0, "seed": None, "regex": None}

    async with place.stub() as stub:

        async def answer(model: str, question: str) -> tuple[str, int]:
            call = stub.StreamGenerate(ask(question, 24, model, **greedy))
            text, num_tokens = "", 0
            async for message in call:
                text += message.text_delta
                num_tokens += message.completion.usage.completion_tokens
            return text, num_tokens

        began = time.monotonic()
        together = await asyncio.gather(*(answer(*question) for question in questions))
        seconds = time.monotonic() - began
        alone = [await answer(*question) for question in reversed(questions)][::-1]
        same = [(await answer(model, QUESTION))[0] for model in asked_of]
    loaded = (await place.engine.refresh()).adapters
    differ = [index for index in range(count) if together[index] != alone[index]]
    for index in differ[:3]:
        row.notes.append(f"{questions[index]}: {together[index]}, alone {alone[index]}")
    row.tell("answers that are not those given alone", len(differ), 0)
    row.tell("models that answer one question as another does", len(same) - len(set(same)), 0)
    row.tell("adapters never loaded", len(names) - len(loaded), 0)
    num_tokens = sum(tokens for _, tokens in together)
    row.notes.append(
        f"{count} answers, {len(set(together))} different ones, {num_tokens} tokens at once in {seconds:.1f} s"
    )
    return row


# --- D9, D10, D11: what goes through ------------------------------------------------------------------------------


async def d9(place: Place, scale: float) -> Row:
    row = Row("D9", "no prompt holds up an event loop")
    await place.rest()
    for seed in range(100):  # a hundred models, and one of them with a hundred versions
        await asyncio.to_thread(place.publish, f"shop-{seed}", seed, 2, 0.5)
        await asyncio.to_thread(place.publish, "shop-0", 100 + seed, 2, 0.5)
    own: list[float] = []
    quiet = await _probed(place, asyncio.sleep(2), own)
    own.clear()
    count = max(40, round(400 * scale))
    words = " ".join(f"{index} kettles and {index * 7} shoes" for index in range(40_000))[: 2**20 - 1000]
    outcomes: Counter[str] = Counter()

    async def ask_much(index: int) -> None:
        if index % 2:
            reader, writer = await open_sse(place, http_request(10, words))
            outcomes[str((await read_events(reader))[0])] += 1
            writer.close()
            return
        async with place.stub(max_send_message_length=2**23) as stub:
            given = inference_pb2.GenerationInput(model="base", max_tokens=10)
            if index % 4:
                given.messages.add(role="user", content=words)
            else:
                for turn in range(199):
                    given.messages.add(role=("user", "assistant")[turn % 2], content=words[: 2**20 // 200])
            code, reason, _ = await end_of(stub.StreamGenerate(inference_pb2.StreamGenerateRequest(input=given)))
            outcomes[reason or code] += 1

    listings: list[float] = []
    over = asyncio.Event()

    async def list_all() -> None:
        """Again and again; and of one version after the other an answer, its first."""
        async with grpc.aio.insecure_channel(place.service.grpc_address) as channel:
            models, answers = (
                models_pb2_grpc.ModelServiceStub(channel),
                inference_pb2_grpc.InferenceServiceStub(channel),
            )
            while not over.is_set():
                began = time.monotonic()
                page = await models.ListModels(models_pb2.ListModelsRequest(page_size=1000))
                versions = models_pb2.ListModelVersionsRequest(parent="models/shop-0", page_size=1000)
                assert len(page.models) == 100
                assert len((await models.ListModelVersions(versions)).model_versions) == 101
                listings.append(time.monotonic() - began)
                await end_of(answers.StreamGenerate(ask(max_tokens=2, model=f"shop-{len(listings) % 100}")))

    async def attack() -> None:
        listing = asyncio.create_task(list_all())
        for first in range(0, count, 4):
            await asyncio.gather(*map(ask_much, range(first, first + 4)))
        over.set()
        await listing

    seen = await _probed(place, attack(), own)
    row.notes.append(f"{count} prompts of 1 MB, four at a time: {dict(outcomes)}")
    row.notes.append(
        f"beside them {len(listings)} listings of 100 models and 101 versions, p99 {percentile(listings, 0.99):.2f} s"
    )
    row.tell("listings that did not come", len(listings) < 10, 0)
    looks = {"quiet gRPC": quiet["gRPC"], "quiet REST": quiet["REST"], "this program's own loop": own}
    told = ", ".join(f"{what} {percentile(found, 0.999):.3f} s" for what, found in looks.items())
    row.notes.append(f"{len(seen['gRPC'])} + {len(seen['REST'])} looks; p99.9 beside them: {told}")
    for face, found in seen.items():
        row.tell(f"p99.9 of {face} health, s, an upper bound of the lag", percentile(found, 0.999), 0.2)
        row.tell(f"p99 of {face} health, s", percentile(found, 0.99), 0.1)
    return row


async def _probed(place: Place, work: Awaitable[Any], own: list[float]) -> dict[str, list[float]]:
    """How long health takes to answer while `work` goes on."""
    seen: dict[str, list[float]] = {"gRPC": [], "REST": []}

    async def look_grpc() -> None:
        async with grpc.aio.insecure_channel(place.service.grpc_address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            while True:
                began = time.monotonic()
                await check(health_pb2.HealthCheckRequest())
                seen["gRPC"].append(time.monotonic() - began)
                await asyncio.sleep(LAG_SECONDS)

    async def look_rest() -> None:
        reader, writer = await asyncio.open_connection(*place.http)
        while True:
            began = time.monotonic()
            writer.write(b"GET /docs-none HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            seen["REST"].append(time.monotonic() - began)
            await asyncio.sleep(LAG_SECONDS)

    async def look_here() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(LAG_SECONDS)
            own.append(time.monotonic() - began - LAG_SECONDS)

    looks = [asyncio.create_task(look()) for look in (look_grpc, look_rest, look_here)]
    try:
        await work
    finally:
        for task in looks:
            task.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
    return seen


async def d10(place: Place, scale: float) -> Row:
    row = Row("D10", "SSE tells what gRPC tells")
    count = max(10, round(1000 * scale))
    differ = newlines = data = unterminated = 0
    forms = [
        "",
        r"(data: [a-z]{1,4}\n){2,3}",
        r"[a-zé€🙂]{3,9}(\n\n|\r\n)event: error\ndata: \{\}",
        r"\n{1,3}:[ a-z]{2,6}\r",
    ]
    turns = asyncio.Semaphore(8)

    async def compare(index: int) -> None:
        nonlocal differ, newlines, data, unterminated
        chosen = {"regex": forms[index % 4] or None, "seed": index}
        content = f"Question {index}:\n\ndata: {index}\nWhich one?"
        async with turns:
            call = stub.StreamGenerate(ask(content, 40, **chosen))
            text, ends = "", 0
            while (message := await call.read()) is not grpc.aio.EOF:
                text += message.text_delta
                ends += message.WhichOneof("payload") == "completion"
            request = http_request(40, content, **chosen)
            reader, writer = await open_sse(place, request)
            _, events = await read_events(reader)
            writer.close()
        told = "".join(told["text"] for name, told in events if name == "delta")
        names = [name for name, _ in events]
        differ += told != text
        unterminated += ends != 1 or names.count("completion") != 1 or names[-1] != "completion"
        newlines += "\n" in text
        data += "data:" in text

    async with place.stub() as stub:
        await asyncio.gather(*map(compare, range(count)))
    row.notes.append(f"{count} prompts; {newlines} answers with newlines, {data} with `data:`")
    row.tell("texts that differ", differ, 0)
    row.tell("streams without exactly one terminal frame, the last", unterminated, 0)
    await _hear_heartbeats(place, row)
    return row


async def _hear_heartbeats(place: Place, row: Row) -> None:
    """The text of a stream is held back after its first piece, as it may turn out to be a stop string, and the engine
    sleeps for four seconds after every few steps."""
    async with place.stub() as stub:
        pieces = [message.text_delta async for message in stub.StreamGenerate(ask(max_tokens=300))]
    text = "".join(pieces)
    stop = text[len(pieces[0]) :][:255] + "!"
    reader, writer = await open_sse(place, http_request(300, stop=[stop]))
    came: list[tuple[float, bytes]] = []

    async def read() -> None:
        while line := await reader.readline():
            if line.startswith((b":", b"data: ")):
                came.append((time.monotonic(), line.strip()))

    reading = asyncio.create_task(read())
    engine = place.processes()["engine"]
    num_steps = (await place.engine.refresh()).num_steps
    while not reading.done():
        status = await place.engine.refresh()
        if came and status.active and status.num_steps >= num_steps + 6:
            num_steps = status.num_steps
            engine.suspend()
            try:
                await asyncio.sleep(4)
            finally:
                engine.resume()
    await reading
    writer.close()
    told = "".join(json.loads(line[6:]).get("text", "") for _, line in came if not line.startswith(b":"))
    events = [when for when, line in came if not line.startswith(b":")]
    silence = max(later - earlier for earlier, later in pairwise(events))
    longest = max(later - earlier for (earlier, _), (later, _) in pairwise(came))
    heartbeats = len(came) - len(events)
    row.notes.append(f"{heartbeats} heartbeats in a silence of {silence:.1f} s")
    row.tell("heartbeats too few", max(1, int(silence / HEARTBEAT_SECONDS)) - heartbeats, 0)
    row.tell("longest without one, s", longest, HEARTBEAT_SECONDS + 1)
    row.tell("texts that a silence changed", told != text, 0)


async def d11(place: Place, scale: float) -> Row:
    row = Row("D11", "nothing grows")
    count = max(300, round(50_000 * scale))
    await place.rest()
    await _warm(place)
    before = place.handles()
    samples: list[dict[str, float]] = []
    began = time.monotonic()
    cancelled = 0
    async with place.stub() as stub:
        turns = asyncio.Semaphore(12)

        async def one(index: int) -> None:
            nonlocal cancelled
            async with turns:
                leaves = place.random.random() < 0.3
                cancelled += leaves
                if index % 10 == 0:
                    reader, writer = await open_sse(place, http_request(2000 if leaves else 4))
                    await (reader.readline() if leaves else reader.read(-1))
                    writer.close()
                    return
                call = stub.StreamGenerate(ask(max_tokens=2000 if leaves else 4))
                await call.read()
                if leaves:
                    call.cancel()
                else:
                    await end_of(call)

        for tenth in range(10):
            await asyncio.gather(*map(one, range(tenth * count // 10, (tenth + 1) * count // 10)))
            await place.rest()
            samples.append(place.memory())
    seconds = time.monotonic() - began
    await asyncio.sleep(6)
    after = place.handles()
    half = count / 2000
    most = 0.5 if count >= 50_000 else 2.0  # memory is taken in steps, which few requests do not even out
    for name in PARTS:
        first, last = (sum(sample[name] for sample in samples[at : at + 2]) / 2 for at in (4, 8))
        row.tell(f"MiB more for 1,000 requests in the second half, {name}", (last - first) / (0.8 * half), most)
    row.tell("files and threads more", max(after[what] - before[what] for what in before), 8)
    row.notes.append(f"before {before}, after {after}")
    row.notes.append(
        f"{count} requests, {cancelled} cancelled, {seconds:.0f} s; MiB at the end {_rounded(samples[-1])}"
    )
    return row


def _rounded(found: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in found.items()}


# --- the program --------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Place, float], Awaitable[Row]]] = {
    "D1": d1,
    "D2": d2,
    "D9": d9,
    "D10": d10,
    "D11": d11,
    "D7": d7,
    "D6": d6,
    "D5": d5,
    "D3": d3,
    "D4": d4,
    "D8": d8,
}
_CALLERS = ",".join(f"{name}:{key}" for name, key in KEYS.items())
SETTINGS = {
    "D3": {
        "KNOWLEDGE_MAX_ACTIVE_STREAMS": "4",
        "KNOWLEDGE_MAX_WAITING_STREAMS": "8",
        "KNOWLEDGE_MAX_STREAMS_PER_CALLER": "4",
        "KNOWLEDGE_API_KEYS": _CALLERS,
    },
    "D4": {
        "KNOWLEDGE_MAX_ACTIVE_STREAMS": "32",
        "KNOWLEDGE_MAX_WAITING_STREAMS": "250",
        "KNOWLEDGE_WRITE_TIMEOUT_SECONDS": "3",
    },
    "D8": {"KNOWLEDGE_MAX_WAITING_STREAMS": "200"},
}
"""Of rows that have a service of their own; the others share one."""


async def _soak(rows: list[str], scale: float, as_json: bool, folder: Path) -> bool:
    base = build_tiny_base(folder / "base")
    if "D8" in rows:
        (folder / "bundled").mkdir()
        write_bundled_base(folder / "bundled", lambda *_: None)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        file = base / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: CONTEXT}))
    passed = True
    groups = [[name for name in ROWS if name in rows and name not in SETTINGS]]
    groups += [[name] for name in SETTINGS if name in rows]
    for group in filter(None, groups):
        settings = SETTINGS.get(group[0], {"KNOWLEDGE_DRAIN_SECONDS": str(DRAIN_SECONDS)})
        served = folder / "bundled" if group[0] == "D8" else base
        async with Place(folder / group[0], served, **settings) as place:
            for name in group:
                began = time.monotonic()
                row = await ROWS[name](place, scale)
                passed &= row.passed
                _say(row, time.monotonic() - began, as_json)
    return passed


def _say(row: Row, seconds: float, as_json: bool) -> None:
    if as_json:
        told = {"row": row.name, "passed": row.passed, "seconds": round(seconds, 1), "notes": row.notes}
        figures = [dict(zip(("figure", "measured", "most"), found, strict=True)) for found in row.figures]
        print(json.dumps(told | {"figures": figures}), flush=True)
        return
    print(f"{row.name} {'passed' if row.passed else 'MISSED'}: {row.title} ({seconds:.0f} s)", flush=True)
    for what, measured, most in row.figures:
        print(
            f"    {measured:10.4g}  at most {most:<6g} {what}{'' if measured <= most else '   <-- missed'}", flush=True
        )
    for note in row.notes:
        print(f"    {note}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    if unknown := set(rows) - ROWS.keys():
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; known are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return 0 if asyncio.run(_soak(rows, arguments.scale, arguments.json, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
