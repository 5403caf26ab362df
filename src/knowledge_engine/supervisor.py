"""Starts gateway, server and engine as child processes, keeps them up, and leaves none behind.

Settings travel in the environment, never in argv. Each part leads a session of its own and holds the read end of a
pipe from here, its lifeline: should this process vanish, even by `kill -9`, the pipe closes and the part ends itself.
Job workers are the server's children and outlive its crashes; a stop ends those too. Knows nothing of the parts' work.

`python -m knowledge_engine.supervisor MODULE ...` is a child's entry: it watches the lifeline and runs the module.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, Self

import psutil

from knowledge_engine.errors import InvalidSpecError, Reason, UpstreamError
from knowledge_engine.settings import PREFIX, Settings, split_address

MODULES = {"server": "knowledge_engine.server", "gateway": "gateway", "engine": "knowledge_engine.inference.engine"}
STOP_ORDER = ("gateway", "server", "engine")
GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
"""gRPC's newer event engine hands each message through two threads more than its poller does, and a switch of threads
costs as much as the message; read at gRPC's import. A release that has no such switch says so in the log."""

START_SECONDS = 60.0  # for server and gateway to answer; both take a second or two
STABLE_SECONDS = 60.0  # a part that ran this long before it crashed starts with a clean record
MAX_CRASHES = 5
ENGINE_STOP_SECONDS = 3.0
LIFELINE_SECONDS = 15.0  # from a vanished supervisor to the hard end of a part that ignores SIGTERM


@dataclass
class _Part:
    name: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    crashes: int = 0
    start_at: float | None = None  # when it is to be started again
    is_down: bool = False


class Supervisor:
    """One running service; a context manager. Start and stop it in one thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        log: IO[Any] | None = None,
        folder: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`log` takes what the parts print (default stderr), `folder` is where they run, `say` what people should know.

        Port 0 in an address becomes a free one; `settings` holds the real ones.
        """
        self.settings = with_ports(settings)
        self._log = log
        self._folder = folder
        self._say = say or _say
        self._parts = {name: _Part(name) for name in MODULES}
        self._ending = threading.Event()
        self._all_down = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._descendants: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once server and gateway answer; the engine may still be loading its model.

        Raises:
            InvalidSpecError: SETTINGS_INVALID, an address is taken.
            UpstreamError: SERVER_UNAVAILABLE, a part ended or hung while it started; everything is stopped again.
        """
        require_free(self.settings)
        try:
            self._launch(self._parts["server"])
            self._launch(self._parts["gateway"])
            self._await_answers()
            # Last, as importing torch would take the cores that the other two need.
            self._launch(self._parts["engine"])
        except BaseException:
            self.stop()
            raise
        self._watcher.start()

    def wait(self) -> None:
        """Blocks; returns only when every part has crashed for good."""
        while not self._all_down.wait(0.5):
            pass

    def stop(self) -> None:
        """Ends gateway and server, then the engine, gracefully within a bound, then hard, and whatever they left.

        A signal while it works makes it hurry.
        """
        with _hurried() as hurry:
            self._ending.set()
            if self._watcher.is_alive():
                self._watcher.join()
            self._note_descendants()
            drain = self.settings.drain_seconds
            bounds = {"gateway": drain + 5, "server": drain + 8, "engine": ENGINE_STOP_SECONDS}
            # These two drain side by side: the gateway's streams are the server's calls.
            for name in ("gateway", "server"):
                if (process := self._parts[name].process) is not None:
                    _ask_to_end(process)
            for name in STOP_ORDER:
                if (process := self._parts[name].process) is not None:
                    end_child(process, bounds[name], hurry)
            self._end_stragglers()

    # --- one part -------------------------------------------------------------------------------------------------

    def _launch(self, part: _Part) -> None:
        part.started, part.start_at = time.monotonic(), None
        log = self._log or sys.stderr
        part.process = start_child([MODULES[part.name]], self.settings, log, log, self._folder)

    def _await_answers(self) -> None:
        """Until the gateway says that the server serves; it asks it over gRPC."""
        deadline = time.monotonic() + START_SECONDS
        while not (_listens(self.settings.grpc_address) and is_healthy(self.settings.http_address)):
            for part in self._parts.values():
                if part.process is not None and (code := part.process.poll()) is not None:
                    message = f"the {part.name} {_describe(code)} while it started; its log says why"
                    raise UpstreamError(message, reason=Reason.SERVER_UNAVAILABLE, part=part.name)
            if time.monotonic() > deadline:
                message = f"server and gateway were not ready within {START_SECONDS:.0f} s; their log may say why"
                raise UpstreamError(message, reason=Reason.SERVER_UNAVAILABLE)
            time.sleep(0.02)

    # --- keeping them up ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        note_at = 0.0
        while not self._ending.wait(0.1):
            now = time.monotonic()
            for part in self._parts.values():
                self._tend(part, now)
            if now >= note_at:
                self._note_descendants()
                note_at = now + 1
            if all(part.is_down for part in self._parts.values()):
                self._all_down.set()

    def _tend(self, part: _Part, now: float) -> None:
        """Starts a crashed part again after a pause that doubles, and gives it up after MAX_CRASHES in a row."""
        if part.start_at is not None and now >= part.start_at:
            self._launch(part)
        if part.is_down or part.start_at is not None or part.process is None:
            return
        if (code := part.process.poll()) is None:
            return
        _kill_group(part.process.pid)  # what it had started in its own session
        part.crashes = part.crashes + 1 if now - part.started < STABLE_SECONDS else 1
        if part.crashes >= MAX_CRASHES:
            part.is_down = True
            self._say(f"ERROR: the {part.name} {_describe(code)}, {MAX_CRASHES} times in a row; it stays down")
            return
        pause = 0.5 * 2 ** (part.crashes - 1)
        part.start_at = now + pause
        self._say(f"the {part.name} {_describe(code)}; starting it again in {pause:g} s")

    def _note_descendants(self) -> None:
        """Remembers who was started below the parts: orphans of a crash can then still be found by pid and birth."""
        for part in self._parts.values():
            if part.process is not None:
                with contextlib.suppress(psutil.Error):
                    self._descendants.update(psutil.Process(part.process.pid).children(recursive=True))
        self._descendants = {process for process in self._descendants if process.is_running()}

    def _end_stragglers(self) -> None:
        left = [process for process in self._descendants if process.is_running()]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(left, timeout=2)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def start_child(
    command: list[str], settings: Settings, stdout: IO[Any] | int, stderr: IO[Any] | int, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Runs `python -m` with `command`, a module and its arguments, tied to the life of this process."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "knowledge_engine.supervisor", *command],
        env=_environment(settings),
        cwd=folder,
        stdin=subprocess.PIPE,  # the lifeline; nothing is ever written
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def _environment(settings: Settings) -> dict[str, str]:
    return {"GRPC_EXPERIMENTS": GRPC_EXPERIMENTS} | settings.child_environment()


def end_child(process: subprocess.Popen[bytes], bound_seconds: float, hurry: threading.Event | None = None) -> None:
    """SIGTERM to the child, which ends its own children; SIGKILL to its whole group after the bound."""
    if process.poll() is None:
        _ask_to_end(process)
        deadline = time.monotonic() + bound_seconds
        while process.poll() is None and time.monotonic() < deadline and not (hurry and hurry.is_set()):
            time.sleep(0.02)
    _kill_group(process.pid)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _describe(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


# --- addresses and settings ---------------------------------------------------------------------------------------


def with_ports(settings: Settings, *, avoid_taken: bool = False) -> Settings:
    """The settings with a free port wherever port 0 stands and, if asked, wherever the port is taken."""
    update = {}
    for field in ("grpc_address", "http_address"):
        host, port = split_address(getattr(settings, field))
        if port == 0 or (avoid_taken and _bind_failure(host, port)):
            update[field] = _join(host, _free_port(host))
    return settings.model_copy(update=update)


def require_free(settings: Settings, fields: tuple[str, ...] = ("grpc_address", "http_address")) -> None:
    """Raises InvalidSpecError SETTINGS_INVALID when something else listens on an address, or none may."""
    for field in fields:
        address = getattr(settings, field)
        if failure := _bind_failure(*split_address(address)):
            name = f"{PREFIX}{field.upper()}"
            message = f"{name}: cannot listen on {address}: {failure}; stop what listens there or set {name}"
            raise InvalidSpecError(message, reason=Reason.SETTINGS_INVALID, address=address)


def _bind_failure(host: str, port: int) -> str:
    """Why nobody can listen there; empty when one can."""
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as found:
        return int(found.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(address: str) -> str:
    """The address under which this machine itself reaches a listener: loopback for `0.0.0.0` and `[::]`."""
    host, port = split_address(address)
    with contextlib.suppress(ValueError):  # a name, not a number
        if ipaddress.ip_address(host).is_unspecified:
            host = "::1" if ":" in host else "127.0.0.1"
    return _join(host, port)


def _listens(address: str) -> bool:
    try:
        socket.create_connection(split_address(reachable(address)), timeout=1).close()
    except OSError:
        return False
    return True


def is_healthy(address: str) -> bool:
    """Whether the gateway answers, and for a server that serves; what the model does is no matter."""
    connection = http.client.HTTPConnection(*split_address(reachable(address)), timeout=5)
    try:
        connection.request("GET", "/api/v1/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# --- signals ------------------------------------------------------------------------------------------------------

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A stop signal arrived; unwinds like KeyboardInterrupt, whatever the signal was."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise_stopped(number: int, _: FrameType | None) -> NoReturn:
    raise Stopped(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread."""
    former = {number: signal.signal(number, _raise_stopped) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _hurried() -> Iterator[threading.Event]:
    """Within it a stop signal only sets the event."""
    hurry = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield hurry
        return
    former = {number: signal.signal(number, lambda *_: hurry.set()) for number in _STOP_SIGNALS}
    try:
        yield hurry
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# --- entries ------------------------------------------------------------------------------------------------------


def run_service(settings: Settings, announce: Callable[[dict[str, str]], None] | None = None) -> int:
    """Runs the whole service until a stop signal; returns the exit code.

    `announce` gets the real addresses once server and gateway answer.
    """
    try:
        with stop_signals(), Supervisor(settings) as service:
            addresses = {
                "grpc_address": service.settings.grpc_address,
                "http_address": service.settings.http_address,
            }
            if announce is not None:
                announce(addresses)
            _say(f"gRPC on {addresses['grpc_address']}, REST on http://{addresses['http_address']} (see /docs)")
            _say("the model may still be loading: `knowledge-engine health` tells; Ctrl-C stops everything")
            service.wait()
    except Stopped:
        return 0
    return 1


def run_alone(settings: Settings, part: str) -> NoReturn:
    """Becomes one part, unsupervised, as containers and clusters run it."""
    if part == "gateway":
        settings = with_ports(settings)
    if part in ("server", "gateway"):
        require_free(settings, ("grpc_address" if part == "server" else "http_address",))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", MODULES[part]], _environment(settings))  # noqa: S606


def _say(line: str) -> None:
    print(f"knowledge-engine: {line}", file=sys.stderr, flush=True)  # noqa: T201


def _follow_lifeline() -> None:
    """Ends this process, gracefully and then hard, once its supervisor is gone."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LIFELINE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _run_child() -> None:
    del sys.argv[0]
    threading.Thread(target=_follow_lifeline, name="lifeline", daemon=True).start()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run_child()
