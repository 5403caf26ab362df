"""Memory and disk that run out: told from other failures, and turned into ones that say what to change.

Memory may get a second chance, in a fresh process at half the micro-batch; the job's folder remembers that.
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

import psutil
import torch

from knowledge_engine.core import JobContext, JobStopped, StopReason, TrainingSpec
from knowledge_engine.errors import CapacityError, KnowledgeEngineError, Reason
from knowledge_engine.files import read_json, replace_durably
from knowledge_engine.modeling import is_out_of_memory
from knowledge_engine.settings import Settings

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as libraries written in Rust say it
_MICRO_BATCH = "micro_batch.json"


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
        kept = read_json(self._context.work_dir / _MICRO_BATCH).get("per_device_train_batch_size")
        return kept if isinstance(kept, int) and kept > 0 else self._spec.per_device_train_batch_size

    @contextmanager
    def training(self) -> Iterator[None]:
        """In here a smaller micro-batch helps against too little memory."""
        self._is_training = True
        yield
        self._is_training = False  # left as it is by a failure, for `told`

    @contextmanager
    def told(self) -> Iterator[None]:
        """Lets other failures through as they are.

        Raises:
            KnowledgeEngineError: OUT_OF_MEMORY, CapacityError: DISK_FULL, each with figures and advice.
            JobStopped: RETRY, with half the micro-batch.
        """
        try:
            yield
        except (KnowledgeEngineError, JobStopped):
            raise
        except Exception as error:
            if is_disk_full(error):
                raise disk_full(error, self._settings.data_dir, "the job could not write its files") from error
            if not is_out_of_memory(error):
                raise
            if self._may_halve():
                raise self._halve() from error
            raise self._out_of_memory(error) from error

    def _may_halve(self) -> bool:
        asked = self._spec.per_device_train_batch_size
        return self._spec.auto_find_batch_size and self._is_training and asked > 1 and self.micro_batch == asked

    def _halve(self) -> JobStopped:
        asked = self._spec.per_device_train_batch_size
        half = asked // 2
        content = json.dumps({"per_device_train_batch_size": half}).encode()
        replace_durably(self._context.work_dir / _MICRO_BATCH, content)
        message = (
            f"memory ran out with {asked} conversations at once; the training goes on with {half}, and as many for "
            "each optimizer step as before"
        )
        self._context.warn(Reason.OUT_OF_MEMORY.value, message)
        return JobStopped(StopReason.RETRY, message)

    def _out_of_memory(self, error: Exception) -> KnowledgeEngineError:
        resident = psutil.Process().memory_info().rss
        device_bytes = _device_memory_bytes(self._device)
        micro_batch = self.micro_batch
        rows = f", the longest conversation has {self.longest_row} tokens" if self.longest_row else ""
        return KnowledgeEngineError(
            f"memory ran out: {self._device} has {device_bytes / 2**30:.1f} GiB, the worker holds "
            f"{resident / 2**30:.1f} GiB, micro-batch {micro_batch}{rows}; {self._advice(micro_batch)}",
            reason=Reason.OUT_OF_MEMORY,
            device_bytes=device_bytes,
            resident_bytes=resident,
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


def _device_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
