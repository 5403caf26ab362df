"""Memory and disk that run out: told from other failures, and turned into ones that say what to change.

Memory may get a second chance, in a fresh process that takes less; the job's folder remembers that.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knowledge_engine import devices, modeling
from knowledge_engine.core import JobContext, JobStopped, StopReason, TrainingSpec
from knowledge_engine.errors import CapacityError, KnowledgeEngineError, Reason
from knowledge_engine.files import read_json, replace_durably
from knowledge_engine.settings import Settings
from knowledge_engine.training.plan import CHECKPOINTS, read_micro_batch, take_less
from knowledge_engine.training.publishing import wait

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as libraries written in Rust say it


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room: of the disk, of a quota, or of a limit on the size of files."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    said = _OS_ERROR.search(str(error))
    return said is not None and int(said[1]) in _FULL


def disk_full(error: BaseException, folder: Path, what: str) -> CapacityError:
    free = shutil.disk_usage(folder).free
    cause = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)[:200]
    return CapacityError(
        f"{what} ({cause}): the disk of KNOWLEDGE_DATA_DIR has {free / 1e9:.2f} GB free; make room, or set "
        "KNOWLEDGE_DATA_DIR to a larger disk",
        reason=Reason.DISK_FULL,
        free_bytes=free,
    )


_WAITS = "disk_full.json"
_MAX_WAITS = 3


class Shortages:
    """What runs out while a training job is at work. `longest_row`, in tokens, is told to it."""

    def __init__(self, context: JobContext, settings: Settings, spec: TrainingSpec, device: str) -> None:
        self._context = context
        self._settings = settings
        self._spec = spec
        self._device = device
        self.longest_row = 0
        self._is_training = False

    @property
    def micro_batch(self) -> int:
        """Examples that are computed at once: as the spec has it, or half of it since memory ran out."""
        return read_micro_batch(self._context.work_dir, self._spec)

    @contextmanager
    def training(self) -> Iterator[None]:
        """In here taking less helps against too little memory."""
        self._is_training = True
        yield
        self._is_training = False  # left as it is by a failure, for `told`

    @contextmanager
    def told(self) -> Iterator[None]:
        """Lets other failures through as they are.

        Raises:
            KnowledgeEngineError: OUT_OF_MEMORY, CapacityError: DISK_FULL, each with figures and advice.
            JobStopped: RETRY, taking less.
        """
        try:
            yield
        except (KnowledgeEngineError, JobStopped):
            raise
        except Exception as error:
            try:
                self._explain(error)
            except OSError as another:  # the disk may be full as well
                if not is_disk_full(another):
                    raise
                raise disk_full(another, self._settings.data_dir, "the job could not write its files") from error
            raise

    def _explain(self, error: Exception) -> None:
        """Raises what `told` does, where it applies."""
        if is_disk_full(error):
            if self._may_wait_for_room():
                self._wait_for_room(error)
                raise JobStopped(StopReason.RETRY, "the disk was full; it goes on from what is kept") from error
            raise disk_full(error, self._settings.data_dir, "the job could not write its files") from error
        if modeling.is_out_of_memory(error):
            if message := self._less():
                self._context.warn(Reason.OUT_OF_MEMORY.value, message)
                raise JobStopped(StopReason.RETRY, message) from error
            raise self._out_of_memory(error) from error

    def _may_wait_for_room(self) -> bool:
        """Whether there is something to lose, and no more than so many waits for room behind it."""
        if not any((self._context.work_dir / CHECKPOINTS).glob("step-*")):
            return False
        path = self._context.work_dir / _WAITS
        before = read_json(path)
        step = self._context.job.checkpoint_step
        waits = before.get("waits", 0) if before.get("checkpoint_step") == step else 0
        if waits < _MAX_WAITS:
            replace_durably(path, json.dumps({"waits": waits + 1, "checkpoint_step": step}).encode())
        return bool(waits < _MAX_WAITS)

    def _wait_for_room(self, error: Exception) -> None:
        """Raises JobStopped, from `context.check`."""
        seconds = self._settings.checkpoint_seconds
        self._context.warn(
            Reason.DISK_FULL.value, f"the job could not write its files ({error}); it tries again in {seconds:g} s"
        )
        wait(seconds, self._context.check)

    def _less(self) -> str | None:
        if not self._spec.auto_find_batch_size or not self._is_training:
            return None
        return take_less(self._context.work_dir, self._spec)

    def _out_of_memory(self, error: Exception) -> KnowledgeEngineError:
        held = modeling.peak_device_memory(self._device)
        device_bytes = devices.total_memory(self._settings)
        micro_batch = self.micro_batch
        rows = f", the longest conversation has {self.longest_row} tokens" if self.longest_row else ""
        in_use = devices.memory_in_use()
        return KnowledgeEngineError(
            f"memory ran out: of {device_bytes / 2**30:.1f} GiB on {self._device}, {in_use / 2**30:.1f} GiB are in use "
            f"and the worker held at most {held / 2**30:.1f} GiB, micro-batch {micro_batch}{rows}; "
            f"{self._advice(micro_batch)}",
            reason=Reason.OUT_OF_MEMORY,
            device_bytes=device_bytes,
            in_use_bytes=in_use,
            held_bytes=held,
            micro_batch=micro_batch,
            longest_row=self.longest_row,
            cause=str(error)[:200],
        )

    def _advice(self, micro_batch: int) -> str:
        if micro_batch > 1:
            return f"halve per_device_train_batch_size to {micro_batch // 2} and double gradient_accumulation_steps"
        if self.longest_row:
            return "shorten the longest conversations (max_length finds them), lower lora.rank" + (
                "" if self._spec.use_qlora else ", or set use_qlora"
            )
        return "a smaller base model" + ("" if self._spec.use_qlora else ", or use_qlora,") + " needs less"
