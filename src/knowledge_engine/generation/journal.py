"""What conversations from a model have cost, kept: every reply lies on disk before it is used, and is never asked for
again.

A job's journal lies in its folder. When the job fails it moves to `<data_dir>/paid`, and the next job that asks the
same of the same model takes it over. A reply belongs to the very prompt it answers, so it never fits other products.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from knowledge_engine.core import Job
from knowledge_engine.errors import CapacityError, Reason
from knowledge_engine.generation.chat_client import Answer, Finish
from knowledge_engine.generation.pacing import Closed
from knowledge_engine.settings import Settings

REPLIES = "replies.jsonl"
_KEPT_SECONDS = 30 * 24 * 3600.0

_LOG = logging.getLogger(__name__)


def take_over(settings: Settings, job: Job, folder: Path) -> None:
    """Gives a job that has no journal yet the one that a failed job with the same wishes left. By one rename: no two
    jobs can get it."""
    for path in (settings.data_dir / "paid").glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
    if not (folder / REPLIES).exists():
        with contextlib.suppress(FileNotFoundError):
            _left_by(settings, job).rename(folder / REPLIES)


def leave(settings: Settings, job: Job, folder: Path) -> None:
    """Keeps a failed job's journal for the next job with the same wishes; of two, the longer one.

    Replies that were nearly all wrong are no use: that job would fail again without asking anything.
    """
    own, place = folder / REPLIES, _left_by(settings, job)
    try:
        if not own.exists():
            return
        is_useless = (job.error or {}).get("reason") == Reason.GENERATION_UNUSABLE
        other = place.stat().st_size if place.exists() else 0
        if is_useless or own.stat().st_size <= other:
            own.unlink()
        else:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            own.replace(place)
    except OSError as error:
        _LOG.warning("the replies stay in %s, where no other job finds them: %s", own, error.strerror)


def _left_by(settings: Settings, job: Job) -> Path:
    facts = {
        "spec": job.spec.model_dump(mode="json", exclude={"dataset"}),
        "base_url": settings.openai_base_url,
        "model": settings.openai_model,
    }
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return settings.data_dir / "paid" / f"{mark}.jsonl"


class Paid(BaseModel):
    """One reply as it is kept: the fields of an `Answer`, what it answers, and the job that paid for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    plan: str
    prompt: str
    finish: Finish
    content: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    num_requests: int


assert Paid.model_fields.keys() == {"job", "plan", "prompt", *Answer._fields}


class Journal:
    """Every reply of a job, one JSON line each, over all its attempts. A line that was not finished is no reply.

    `models` is over all of them; the sums are over what this job paid for, `taken_over` counts what others did.
    """

    def __init__(self, path: Path, job_id: str) -> None:
        self._lock = threading.Lock()
        self._job_id = job_id
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        self.models: set[str] = set()
        self.taken_over: Counter[str] = Counter()
        self.prompt_tokens = self.completion_tokens = 0
        self.cost_usd: float | None = None
        self.earlier_requests = self.earlier_retries = 0
        # Written and read past any buffer, so that nothing is left to fail when it is closed.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._is_closed = False
        self._size = 0
        with path.open("rb") as lines:
            self._read(lines)

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                with contextlib.suppress(OSError):  # must not take the place of what ended the run
                    os.close(self._descriptor)

    def find(self, plan: str, prompt: str) -> Paid | None:
        """What was answered to this very prompt."""
        with self._lock:
            place = self._places.get((plan, prompt))
            return None if place is None else Paid.model_validate_json(os.pread(self._descriptor, *place))

    def add(self, plan: str, prompt: str, answer: Answer) -> Paid:
        """Keeps a reply: the kernel has it before this returns, so that a killed worker does not lose it.

        Raises:
            CapacityError: DISK_FULL.
            Closed: nothing is kept any more.
        """
        paid = Paid(job=self._job_id, plan=plan, prompt=prompt, **answer._asdict())
        line = paid.model_dump_json().encode() + b"\n"
        with self._lock:
            if self._is_closed:
                raise Closed
            self._write(line)
            self._sum(paid)
        return paid

    def _write(self, line: bytes) -> None:
        """All of a line or nothing of it."""
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise CapacityError(
                "the disk of KNOWLEDGE_DATA_DIR is full: a reply could not be kept; make room and generate again, what "
                "was paid for until now is not asked for again",
                reason=Reason.DISK_FULL,
            ) from None
        self._size += len(line)

    def _read(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            if not line.endswith(b"\n"):
                os.ftruncate(self._descriptor, self._size)
                return
            with contextlib.suppress(ValidationError):
                paid = Paid.model_validate_json(line)
                self._places[paid.plan, paid.prompt] = (len(line), self._size)
                self._sum(paid)
                if paid.job == self._job_id:
                    self.earlier_requests += paid.num_requests
                    self.earlier_retries += paid.num_requests - 1
            self._size += len(line)

    def _sum(self, paid: Paid) -> None:
        self.models |= {paid.model} - {""}
        if paid.job != self._job_id:
            self.taken_over[paid.job] += 1
            return
        self.prompt_tokens += paid.prompt_tokens
        self.completion_tokens += paid.completion_tokens
        if paid.cost_usd is not None:
            self.cost_usd = (self.cost_usd or 0.0) + paid.cost_usd
