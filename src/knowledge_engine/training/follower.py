"""One of the other ranks of a training: `python -m knowledge_engine.training.follower FOLDER RANKS RANK DEVICE`.

It computes its share of what rank 0 computes (`ranks.py`), reports nothing, writes nothing but why it failed, and ends
with the job's worker, however that ends.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from knowledge_engine.core import Job, JobContext, JobState, Progress, Service, TrackerRun
from knowledge_engine.failpoints import failpoint
from knowledge_engine.processes import GAVE_UP
from knowledge_engine.training.checkpoints import Best, Boundary, Checkpoints, Learned, Position
from knowledge_engine.training.dropout import Masks
from knowledge_engine.training.loop import train
from knowledge_engine.training.ranks import Ranks, Task, joined, load_tuned, tell_failure

_LOG = logging.getLogger(__name__)


class _Silence(JobContext):
    """Has nothing to say, and never stops by itself."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._folder = folder

    @property
    def job(self) -> Job:
        return self._job

    @property
    def work_dir(self) -> Path:
        return self._folder

    def report(self, progress: Progress) -> None: ...

    def log(self, message: str) -> None: ...

    def warn(self, reason: str, message: str) -> None: ...

    def track(self, run: TrackerRun) -> None: ...

    def expect_memory(self, memory_bytes: int) -> None: ...

    def checkpointed(self, step: int, size_bytes: int) -> None: ...

    def observe(self, service: Service, trouble: str | None) -> None: ...

    def at_end(self, call: Callable[[JobState | None], None]) -> None: ...

    def check(self) -> None: ...


class _Elsewhere(Checkpoints):
    """Those of rank 0, which tells where it goes on."""

    def __init__(self) -> None: ...

    def resume(self, learned: Learned, masks: Masks, device: str, best: Best | None = None) -> Position:
        return Position()

    def check_order(self, position: Position, order: str) -> None: ...

    def is_due(self, step: int) -> bool:
        return False

    def save(
        self, learned: Learned, boundary: Boundary, best: Best | None = None, *, may_fail: bool = False
    ) -> None: ...


def _follow(folder: Path, num: int, index: int, device: str) -> None:
    ranks = Ranks(num, index, folder)
    ranks.meet("started", lambda: None)
    with joined(folder, num, index, device):
        task: Task = ranks.broadcast(None)
        failpoint("follower.load")
        model = load_tuned(task, ranks, lambda: None)
        train(
            model, task.train, task.held_out, task.spec, _Silence(task.job, folder), lambda metrics, step: None, device,
            _Elsewhere(), task.micro_batch, ranks, gradient_checkpointing=task.gradient_checkpointing,
        )  # fmt: skip


def _end_with_worker() -> None:
    os.read(sys.stdin.fileno(), 1)  # past the file's lock, which the end of the process would want
    os._exit(GAVE_UP)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    folder, num, index, device = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    threading.Thread(target=_end_with_worker, daemon=True, name="worker").start()
    try:
        _follow(folder, num, index, device)
    except Exception as error:
        _LOG.exception("rank %d failed", index)
        tell_failure(folder, index, error)
        os._exit(1)  # at once: what else there is to close waits for the others


if __name__ == "__main__":
    main()
