"""The engine process: one base model, adapters beside it, requests in, text out.

    python -m knowledge_engine.inference.engine [--parent-pid PID]

Listens before it loads, so that its state can be asked for from the start. The event loop owns the socket and who
asked for what, one thread owns the model; commands go to it through a queue, outputs come back as callbacks of the
loop. Torch is imported in that thread. Ends on SIGTERM, and with `--parent-pid` once that process is not its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import functools
import gc
import itertools
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_engine import hub
from knowledge_engine.bases import Base, describe_origin, prepare_base
from knowledge_engine.core import BASE
from knowledge_engine.errors import KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.inference.client import LOADING_RETRY_SECONDS, check_private, socket_path
from knowledge_engine.inference.lease import MemoryLease
from knowledge_engine.inference.wire import (
    PROTOCOL_VERSION,
    Abort,
    AskMetrics,
    EngineRequest,
    EngineStatus,
    FrameError,
    Generate,
    Hello,
    Ping,
    Room,
    Unload,
    pack,
    parse_client_frame,
    read_frame,
)
from knowledge_engine.metrics import EngineMetrics
from knowledge_engine.settings import Settings, load_settings

if TYPE_CHECKING:
    from knowledge_engine.inference.scheduler import Key, Output, Scheduler

MAX_UNSENT_BYTES = 16 * 2**20
"""A client that leaves more than this unread has stopped reading; its connection ends."""
PARENT_POLL_SECONDS = 0.5
STATUS_SECONDS = 0.2
"""At least this long between two progress reports while the base is prepared."""
LAST_WORDS_SECONDS = 2.5
"""An engine that failed says why for so long: clients look for it every two seconds."""
STOP_SECONDS = 5.0
"""A forward pass ends well within this; the preparation of a base does not, and may be cut off anywhere."""

# An outage ends, terms are accepted on the hub's page, room is made on the disk.
_HEALING = frozenset({Reason.HUB_UNREACHABLE, Reason.BASE_MODEL_GATED, Reason.DISK_FULL})

_log = logging.getLogger(__name__)

Command = Callable[["Scheduler"], None]


class Engine:
    """The process: its socket, its requests, its model thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = socket_path(settings)
        self._status = EngineStatus(state="preparing")
        self._room = Room(settings.max_active_streams, settings.max_waiting_streams, settings.max_streams_per_caller)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._scheduler: Scheduler | None = None  # set once the model is ready; called only in its thread
        self._connections: dict[int, asyncio.StreamWriter] = {}
        self._requests: dict[Key, str] = {}  # whose each is
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")
        self._forming: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._last_report = 0.0
        self._lease = MemoryLease(settings)
        self._metrics = EngineMetrics()
        self._origin = ""  # where the base comes from, once that is known
        self._failed = False

    async def run(self, parent_pid: int | None = None) -> int:
        """Serves until told to stop, or until `parent_pid` is gone; returns the exit code."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopped.set)
        with _only_one(self._path):
            server = await asyncio.start_unix_server(self._serve, sock=_listen(self._path))
            thread = threading.Thread(target=self._own_model, name="model", daemon=True)
            thread.start()
            self._lease.start()
            await self._wait(parent_pid)
            server.close()
            await self._say_goodbye()
            self._path.unlink(missing_ok=True)
            self._commands.put(None)
            await asyncio.gather(asyncio.to_thread(thread.join, STOP_SECONDS), asyncio.to_thread(self._lease.release))
        if thread.is_alive():
            # Ending the interpreter under a thread that is inside torch may crash; the base is prepared atomically.
            os._exit(int(self._failed))
        return int(self._failed)

    async def _wait(self, parent_pid: int | None) -> None:
        while not self._stopped.is_set():
            if parent_pid is not None and os.getppid() != parent_pid:
                _log.warning("the process that started the engine has gone")
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), PARENT_POLL_SECONDS)

    async def _say_goodbye(self) -> None:
        if not self._failed:
            self._set_status(replace(self._status, state="down", detail="the engine is stopping"))
        for writer in tuple(self._connections.values()):
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1)

    # --- the socket -----------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until it goes or sends what is no frame."""
        number = next(self._numbers)
        try:
            data = await read_frame(reader)
            hello = parse_client_frame(data) if data is not None else None
            writer.write(pack(Hello(version=PROTOCOL_VERSION)))
            if not isinstance(hello, Hello) or hello.version != PROTOCOL_VERSION:
                raise FrameError(f"no hello of version {PROTOCOL_VERSION}")
            self._connections[number] = writer
            self._send(number, self._status_frame())
            while (data := await read_frame(reader)) is not None:
                self._handle(number, data)
        except (FrameError, OSError) as error:
            _log.warning("a client's connection ends: %s", error)
        finally:
            self._connections.pop(number, None)
            for key in [key for key in self._requests if key[0] == number]:
                self._abort(key)
            writer.close()

    def _handle(self, number: int, data: dict[str, Any]) -> None:
        frame = parse_client_frame(data)
        if isinstance(frame, Generate):
            self._generate((number, frame.id), frame)
        elif isinstance(frame, Abort):
            self._abort((number, frame.id))
        elif isinstance(frame, Ping):
            self._send(number, self._status_frame())
        elif isinstance(frame, AskMetrics):
            for reason, count in frame.refused.items():
                self._metrics.refusals.labels(reason).inc(count)
            self._send(number, {"type": "metrics", "text": self._metrics.text()})
        elif isinstance(frame, Unload):
            if self._scheduler is not None:
                digest = frame.digest
                self._commands.put(lambda scheduler: scheduler.adapters.unload(digest))
        else:
            raise FrameError("a second hello")

    def _generate(self, key: Key, frame: Generate) -> None:
        if key in self._requests:
            raise FrameError(f"request {frame.id} is under way already")
        try:
            scheduler = self._ready_scheduler(frame.request.caller)
            scheduler.check(frame.request)
        except KnowledgeEngineError as error:
            self._refuse(key, error)
            return
        self._requests[key] = frame.request.caller
        receive_time = time.monotonic()
        if frame.request.sampling.json_schema is None and frame.request.sampling.regex is None:
            self._commands.put(lambda scheduler: scheduler.submit(key, frame.request, receive_time))
        else:
            forming = self._loop.create_task(self._submit_formed(scheduler, key, frame.request, receive_time))
            self._forming.add(forming)  # the loop itself keeps no hold of it
            forming.add_done_callback(self._forming.discard)

    async def _submit_formed(self, scheduler: Scheduler, key: Key, request: EngineRequest, receive_time: float) -> None:
        """Compiles the answer's form first, where that holds up nobody."""
        try:
            matcher = await self._loop.run_in_executor(self._compiler, scheduler.grammars.compile, request.sampling)
        except KnowledgeEngineError as error:
            self._requests.pop(key, None)
            self._refuse(key, error)
            return
        if key in self._requests:  # else aborted meanwhile
            self._commands.put(lambda scheduler: scheduler.submit(key, request, receive_time, matcher))

    def _refuse(self, key: Key, error: KnowledgeEngineError) -> None:
        self._metrics.refusals.labels(error.reason).inc()
        self._send(key[0], {"type": "step", "outputs": [[key[1], "", None, error.to_dict(), ()]]})

    def _ready_scheduler(self, caller: str) -> Scheduler:
        if self._scheduler is None:
            raise UpstreamError(
                "The base model is not loaded yet.",
                reason=Reason.BASE_MODEL_LOADING,
                retry_after_seconds=LOADING_RETRY_SECONDS,
            )
        self._room.demand(self._requests.values(), caller)
        return self._scheduler

    def _abort(self, key: Key) -> None:
        if self._requests.pop(key, None) is None:
            return
        if self._scheduler is not None:
            num_steps = self._scheduler.steps_of(key)
            self._commands.put(lambda scheduler: scheduler.abort(key, num_steps))

    def _send(self, number: int, frame: dict[str, Any]) -> None:
        writer = self._connections.get(number)
        if writer is None:
            return
        writer.write(pack(frame))
        if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            _log.warning("a client does not read what it asked for")
            writer.transport.abort()

    def _deliver(self, outputs: list[Output]) -> None:
        """Sends each client one frame with everything the step gave its requests."""
        frames: dict[int, list[list[Any]]] = defaultdict(list)
        for output in outputs:
            if output.key not in self._requests:
                continue  # aborted meanwhile
            number, request = output.key
            finished, error = output.finished, output.error
            if finished is not None or error is not None:
                del self._requests[output.key]
            frames[number].append(
                [
                    request,
                    output.text,
                    list(asdict(finished).values()) if finished is not None else None,
                    error.to_dict() if error is not None else None,
                    output.logprobs,
                ]
            )
        for number, entries in frames.items():
            self._send(number, {"type": "step", "outputs": entries})

    # --- the status -----------------------------------------------------------------------------------------------

    def _status_frame(self) -> dict[str, Any]:
        status = replace(self._status, room=self._room)
        if (scheduler := self._scheduler) is not None:
            status = replace(
                status,
                active=scheduler.num_active,
                waiting=scheduler.num_waiting,
                num_steps=scheduler.num_steps,
                num_aborted=scheduler.num_aborted,
                max_steps_after_abort=scheduler.max_steps_after_abort,
                adapters=scheduler.adapters.digests,
            )
        return {"type": "status", **asdict(status)}

    def _set_status(self, status: EngineStatus) -> None:
        self._status = status
        frame = self._status_frame()
        for number in tuple(self._connections):
            self._send(number, frame)

    def _became_ready(self, scheduler: Scheduler, status: EngineStatus) -> None:
        self._scheduler = scheduler
        self._lease.measure(scheduler.room_bytes)
        self._metrics.follow(scheduler.holding)
        self._set_status(status)
        _log.info("ready: %s in %s", status.base_digest, status.precision)

    def _give_up(self, detail: str) -> None:
        self._failed = True
        self._scheduler = None
        self._set_status(EngineStatus(state="down", detail=detail))
        self._loop.call_later(LAST_WORDS_SECONDS, self._stopped.set)

    # --- the model thread -----------------------------------------------------------------------------------------

    def _own_model(self) -> None:
        try:
            scheduler, status = self._load()
            # Else every full collection looks at all of torch, and for 0.4 s nothing is decoded.
            gc.collect()
            gc.freeze()
            self._post(functools.partial(self._became_ready, scheduler, status))
            self._decode(scheduler)
        except KnowledgeEngineError as error:
            _log.exception("the engine cannot go on")
            self._post(functools.partial(self._give_up, error.message))
        except Exception as error:
            _log.exception("the engine cannot go on")
            self._post(functools.partial(self._give_up, f"unexpected {type(error).__name__}; its log says more"))

    def _load(self) -> tuple[Scheduler, EngineStatus]:
        base = self._prepare()
        self._lease.expect(base.size_bytes)
        # Here and not above: torch takes seconds to import, and the socket answers meanwhile.
        self._post(functools.partial(self._set_status, EngineStatus("loading", "loading the base model", base.digest)))
        # OpenMP reads this once. A pass has 330 loops that threads share; woken for each they take 13 ms of one on two
        # cores, and spinning without end makes decoding ten times slower beside a training job. So: some microseconds.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "3000")
        import torch

        from knowledge_engine import modeling
        from knowledge_engine.inference.golden import SelfTest
        from knowledge_engine.inference.grammar import Grammars
        from knowledge_engine.inference.scheduler import Scheduler
        from knowledge_engine.inference.serving import serving_model
        from knowledge_engine.text import ChatText

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_num_cores())
        device = modeling.default_device()
        precision = modeling.serving_precision(base, device, self._settings.serving_precision)
        loaded = modeling.load_base(base, precision, device)

        def tell(detail: str) -> None:
            self._post(functools.partial(self._set_status, EngineStatus("loading", detail, base.digest)))

        model = serving_model(loaded, base, precision, self._settings, tell)
        del loaded
        text = ChatText.load(base)
        model.adapters.prove = SelfTest(model, base, text, precision).demand
        grammars = Grammars(text.tokenizer, model.vocabulary_size, text.stop_token_ids)
        max_active = self._settings.max_active_streams
        scheduler = Scheduler(model, text.decoder, grammars, base.context_length, max_active, self._metrics)
        return scheduler, EngineStatus(
            state="ready",
            detail=self._origin,
            base_digest=base.digest,
            precision=precision,
            context_length=base.context_length,
        )

    def _prepare(self) -> Base:
        """The prepared base. What heals without us is tried again for ever: a restart would not help it."""
        self._origin = describe_origin(self._settings)
        while True:
            try:
                return prepare_base(self._settings, BASE, self._report)
            except KnowledgeEngineError as error:
                if error.reason not in _HEALING:
                    raise
                pause = error.retry_after_seconds or hub.PAUSE_SECONDS
                _log.warning("%s; the engine tries again in %.0f s", error.message, pause)
                detail = f"{error.message}; trying again in {pause:.0f} s"
                self._post(functools.partial(self._set_status, EngineStatus(state="preparing", detail=detail)))
                with contextlib.suppress(queue.Empty):
                    self._commands.get(timeout=pause)  # before there is a model, only the end is commanded
                    raise SystemExit from None

    def _report(self, phase: str, fraction: float) -> None:
        if self._stopped.is_set():
            raise SystemExit  # of this thread
        now = time.monotonic()
        if now - self._last_report >= STATUS_SECONDS:
            self._last_report = now
            detail = f"{phase}, {fraction:.0%} ({self._origin})"
            status = EngineStatus(state="preparing", detail=detail)
            self._post(functools.partial(self._set_status, status))

    def _decode(self, scheduler: Scheduler) -> None:
        """Steps while there is work, and takes commands between any two forward passes."""
        while True:
            is_idle = not scheduler.num_active and not scheduler.num_waiting
            if not self._take_commands(scheduler, wait=is_idle):
                return
            outputs = []
            for output in scheduler.step():
                if output.text or output.logprobs or output.finished is not None or output.error is not None:
                    outputs.append(output)
                if not self._take_commands(scheduler, wait=False):
                    return
            if outputs:
                self._post(functools.partial(self._deliver, outputs))

    def _take_commands(self, scheduler: Scheduler, wait: bool) -> bool:
        """Runs what the event loop asked for; False means stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=wait)
                if command is None:
                    return False
                command(scheduler)
                wait = False
        return True

    def _post(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: there is nobody left to tell
            self._loop.call_soon_threadsafe(callback)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Holds this data directory's engine lock.

    Raises:
        SystemExit: another engine holds it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(path.parent)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another engine is running on {path}") from None
        yield


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of an engine that was killed; we hold the lock
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    return listener


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m knowledge_engine.inference.engine", description="The engine.")
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end when this process is gone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    try:
        settings = load_settings()
        return asyncio.run(Engine(settings).run(arguments.parent_pid))
    except (KnowledgeEngineError, PermissionError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
