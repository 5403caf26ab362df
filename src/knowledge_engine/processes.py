"""The processes of a service: workers started or adopted, who lives, who is whose, and how somebody ended.

A worker is a fresh interpreter that leads a session of its own. A process is known by more than its pid, and one server
at a time has a data directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import psutil

from knowledge_engine.core import Job
from knowledge_engine.errors import Reason, StateError
from knowledge_engine.settings import Settings
from knowledge_engine.state import RunningAttempt

_LOG = logging.getLogger(__name__)

LINGERING_SECONDS = 60.0
"""A worker may take so long to clear up and to tell its tracker, once its job's end is written down."""
GAVE_UP = 75
"""Exit code of a worker that ended because nobody could hear of its work; that is no crash (EX_TEMPFAIL, sysexits)."""
_LOOK_SECONDS = 0.25
_LOG_TAIL_LINES = 20
_LAST_WORDS_BYTES = 16_384
_MAX_LINE_LENGTH = 300


def server_lock_path(settings: Settings) -> Path:
    """The file whose lock says that a server is alive on this data directory."""
    return settings.data_dir / "server.lock"


def work_dir(settings: Settings, job_id: str) -> Path:
    """A job's private folder: worker logs and whatever its attempts keep."""
    return settings.data_dir / "jobs" / job_id


class Worker(ABC):
    """The process of one attempt."""

    def __init__(self, job: Job, pid: int | None, identity: str | None) -> None:
        self.job = job
        self.pid = pid
        self.identity = identity
        self.interrupted = False
        self.verdict = ""
        """Why it was killed; empty unless it was."""
        self.settled: asyncio.Task[None] | None = None
        self._oom_kills = count_oom_kills()
        self._over_since: float | None = None

    @abstractmethod
    async def wait(self) -> int | None:
        """Until the process is gone; its exit code, negative for a signal, or None where that cannot be known."""

    @property
    def fell_with_its_machine(self) -> bool:
        """Whether its end was no crash of its own: the machine started anew since, or its server was killed before it
        gave a sign of life."""
        return False

    def was_out_of_memory(self, code: int | None) -> bool:
        """Whether the kernel has killed processes for want of memory meanwhile, likely this one."""
        return code in {-signal.SIGKILL, None} and not self.verdict and count_oom_kills() > self._oom_kills

    async def interrupt(self, grace_seconds: float) -> None:
        """Asks it to keep what it has and end; after the grace it is killed."""
        self.interrupted = True
        if self.pid is not None and process_identity(self.pid) == self.identity is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        if self.settled is not None:
            done, _ = await asyncio.wait([self.settled], timeout=grace_seconds)
            if not done:
                self.kill_group()
                await self.settled

    def end_lingering(self) -> None:
        """Kills it when its attempt is over and it still lives long after."""
        now = time.monotonic()
        self._over_since = self._over_since or now
        if now - self._over_since > LINGERING_SECONDS:
            _LOG.warning("the worker of job %s did not end by itself and is killed", self.job.id)
            self.kill_group()

    def kill_group(self) -> None:
        """A worker leads its session, so this reaches whatever it has started, also after its own end: a pid is not
        given anew while a group bears it. A stranger that has the pid is left alone."""
        if self.pid is not None and process_identity(self.pid) in {self.identity, None}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class Child(Worker):
    """A worker that this process has started."""

    def __init__(self, job: Job, process: asyncio.subprocess.Process) -> None:
        super().__init__(job, process.pid, process_identity(process.pid))
        self._process = process

    @classmethod
    async def start(cls, settings: Settings, job: Job) -> Child:
        """A fresh interpreter in its own session; settings travel in the environment, secrets never in argv."""
        path = _log_path(settings, job)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "knowledge_engine.worker",
                job.id,
                str(job.attempt),
                env=settings.child_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        return cls(job, process)

    async def wait(self) -> int | None:
        return await self._process.wait()


class Adopted(Worker):
    """A worker that a former server has started."""

    def __init__(self, attempt: RunningAttempt) -> None:
        super().__init__(attempt.job, attempt.worker_pid, attempt.worker_identity)

    async def wait(self) -> int | None:
        while self._lives():  # noqa: ASYNC110 (nobody tells of the end of a stranger's child)
            await asyncio.sleep(_LOOK_SECONDS)
        return None

    @property
    def fell_with_its_machine(self) -> bool:
        return self.identity is None or not self.identity.startswith(_boot())

    def _lives(self) -> bool:
        return self.pid is not None and process_identity(self.pid) == self.identity is not None

    def kill_group(self) -> None:
        if self.identity is not None and not self.fell_with_its_machine:
            super().kill_group()


def take_server_lock(settings: Settings) -> int:
    """An open file whose lock keeps every other server from this data directory. Blocks.

    Raises:
        StateError: SERVER_RUNNING.
    """
    path = server_lock_path(settings)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    # A worker may be looking at the lock this very moment; a server keeps it.
    if _retried(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB), seconds=2):
        return descriptor
    os.close(descriptor)
    raise StateError(f"another server is running on {path.parent}", reason=Reason.SERVER_RUNNING)


def _retried(attempt: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            attempt()
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def server_is_alive(settings: Settings) -> bool:
    """Whether a server holds the data directory's lock."""
    try:
        descriptor = os.open(server_lock_path(settings), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def process_identity(pid: int) -> str | None:
    """What tells this process from every other that had or will have its pid: the boot and the tick of its start. None
    when there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _portable_identity(pid)
    return None if fields[0] in {"Z", "X"} else f"{_boot()} {fields[19]}"


def _boot() -> str:
    """What tells this start of the machine from every other; empty where there is no such thing."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _portable_identity(pid: int) -> str | None:
    """Where there is no /proc."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def count_oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 where it does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def describe_exit(code: int | None) -> str:
    if code is None:
        return "its process ended while no server was its parent"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def last_words(settings: Settings, job: Job) -> str:
    """The end of the worker's log, without secrets."""
    try:
        with _log_path(settings, job).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    for secret in settings.secrets():
        text = text.replace(secret, "***")
    lines = [line[:_MAX_LINE_LENGTH] for line in text.splitlines()[-_LOG_TAIL_LINES:]]
    return "; its last words:\n" + "\n".join(lines) if lines else ""


def _log_path(settings: Settings, job: Job) -> Path:
    return work_dir(settings, job.id) / f"worker-{job.attempt}.log"
