"""What a GPU adds to what must survive: `python scripts/check_jobs_gpu.py [--json]`. Needs a CUDA device.

Real jobs through a real server, on a random base: a killed training ends as one that nobody touched; memory that really
runs out (another process takes what is free) at loading, at a step, at the comparison and at resuming is that job's
problem alone, and its memory is free again within ten seconds; half the micro-batch is tried once; a cancelled job
gives back its memory. Exits 1 when one of them does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from knowledge_engine import devices, failpoints
from knowledge_engine.bases import prepare_base
from knowledge_engine.client import Client
from knowledge_engine.core import BASE, DatasetKind, Job, JobState, Progress, TrainingSpec
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from scripts.bench_estimate import SIZES, conversations, device_memory_in_use
from tests.storm import workers_of
from tests.tiny import build_random_llama

_FREE_AGAIN_SECONDS = 10.0
_NEAR_BASELINE_BYTES = 64 * 2**20
_FINAL_LOSS_TOLERANCE = 0.005
_PATIENCE_SECONDS = 120.0
_HOG_BYTES = 600 * 2**20
"""Its context, before it takes memory."""
_HOG = """
import sys, time, torch
leave, held = int(sys.argv[1]), []
torch.cuda.mem_get_info()
print("ready", flush=True)
sys.stdin.readline()
for size in (2**30, 2**26, 2**21):
    while torch.cuda.mem_get_info()[0] - leave > size:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            break
print("holding", flush=True)
time.sleep(3600)
"""


class Checks:
    """One service on one base; every check is a job or two."""

    def __init__(self, settings: Settings, client: Client, state: State) -> None:
        self._settings = settings
        self._client = client
        self._state = state
        self._num_models = 0
        self._baseline = device_memory_in_use()

    def spec(self, **changes: Any) -> TrainingSpec:
        self._num_models += 1
        values = {
            "dataset": "rows",
            "model": f"model-{self._num_models}",
            "per_device_train_batch_size": 8,
            "max_steps": 12,
            "save_steps": 4,
            "eval_split": 0.2,
            "logging_steps": 1,
        }
        return TrainingSpec(**values | changes)

    def killed(self, *, use_qlora: bool) -> dict[str, Any]:
        """A2, B8: killed after a checkpoint, beside a twin."""
        twin = self._ended(self._create(self.spec(use_qlora=use_qlora)))
        job = self._create(self.spec(use_qlora=use_qlora), "training.step=sleep:0.5")
        self._until(lambda: (self._client.get_job(job.id).checkpoint_step or 0) >= 4)
        time.sleep(1)
        workers_of(self._settings)[0].kill()
        job = self._ended(job)
        losses = [self._losses(one) for one in (twin, job)]
        largest = max((abs(losses[0][step] - losses[1][step]) for step in losses[0]), default=float("inf"))
        final = losses[1][12] / losses[0][12] - 1
        return {
            "state": job.state,
            "attempts": job.attempt,
            "largest_difference_of_a_step": largest,
            "final_loss_off_by": final,
            "holds": job.state is JobState.SUCCEEDED
            and job.attempt == 2
            and losses[0].keys() == losses[1].keys()
            and abs(final) <= _FINAL_LOSS_TOLERANCE,
        }

    def out_of_memory(self, where: str) -> dict[str, Any]:
        """B4: `load`, `step`, `evaluation` or `resume`, with next to nothing left on the device."""
        point = {"step": "training.batch=sleep:12@1", "evaluation": "training.evaluation=sleep:5"}.get(where, "")
        with _hog(leave=0 if point else 700 * 2**20) as take_memory:
            if where == "load":
                take_memory()
            job = self._create(self.spec(), point or "training.step=sleep:0.5")
            if where == "step":
                self._until(lambda: self._in_use(_HOG_BYTES))
                time.sleep(5)  # it is loaded and waits
            elif where == "evaluation":
                self._until(lambda: (self._client.get_job(job.id).progress or Progress(phase="")).phase == "evaluating")
            elif where == "resume":
                self._until(lambda: (self._client.get_job(job.id).checkpoint_step or 0) >= 4)
                workers_of(self._settings)[0].kill()
                self._until(lambda: not self._in_use(_HOG_BYTES))
            if where != "load":
                take_memory()
            beside = device_memory_in_use()
            job = self._ended(job)
            free_after = self._seconds_until_free(beside if where in {"load", "resume"} else None)
            alive = self._client.get_job(job.id).state is JobState.FAILED
        self._until(lambda: not self._in_use())
        error = job.error or {}
        return {
            "state": job.state,
            "reason": error.get("reason"),
            "message": error.get("message"),
            "free_after_seconds": round(free_after, 1),
            "checkpoint_step": job.checkpoint_step,
            "holds": job.state is JobState.FAILED
            and error.get("reason") == "OUT_OF_MEMORY"
            and "GiB" in error.get("message", "")
            and free_after <= _FREE_AGAIN_SECONDS
            and alive
            and (job.checkpoint_step is not None) == (where in {"evaluation", "resume"}),
        }

    def second_chance(self) -> dict[str, Any]:
        """B4: what fits at half the micro-batch and not at the whole."""
        whole, half = (
            self._client.estimate_training(self.spec(per_device_train_batch_size=size)).memory.expected_bytes
            for size in (16, 8)
        )
        with _hog(leave=(whole + half) // 2) as take_memory:
            take_memory()
            spec = self.spec(per_device_train_batch_size=16, auto_find_batch_size=True, max_steps=6)
            job = self._ended(self._create(spec))
        self._until(lambda: not self._in_use())
        return {
            "state": job.state,
            "attempts": job.attempt,
            "error": (job.error or {}).get("message"),
            "left_bytes": (whole + half) // 2,
            "holds": job.state is JobState.SUCCEEDED and job.attempt == 2,
        }

    def cancelled(self) -> dict[str, Any]:
        """A9: memory after a cancel."""
        job = self._create(self.spec(max_steps=10_000))
        self._until(lambda: len(self._losses(job)) >= 3)
        self._client.cancel_job(job.id)
        began = time.monotonic()
        job = self._ended(job)
        told = time.monotonic() - began
        free_after = self._seconds_until_free()
        return {
            "state": job.state,
            "told_after_seconds": round(told, 2),
            "free_after_seconds": round(told + free_after, 2),
            "holds": job.state is JobState.CANCELLED and told + free_after <= _FREE_AGAIN_SECONDS,
        }

    def _create(self, spec: TrainingSpec, points: str = "") -> Job:
        """Workers inherit this process's environment; failpoints are read when they start."""
        os.environ[failpoints.VARIABLE] = points
        try:
            job = self._client.create_training_job(spec)
            self._until(lambda: workers_of(self._settings) or self._client.get_job(job.id).state.is_terminal)
        finally:
            del os.environ[failpoints.VARIABLE]
        return job

    def _ended(self, job: Job) -> Job:
        self._until(lambda: self._client.get_job(job.id).state.is_terminal)
        return self._client.get_job(job.id)

    def _losses(self, job: Job) -> dict[int, float]:
        """By step; one that was redone counts as it was told last."""
        payloads = [event.payload for event in self._state.events(job.id, 0, 100_000)]
        return {
            payload.step: payload.loss
            for payload in payloads
            if isinstance(payload, Progress) and payload.step is not None and payload.loss is not None
        }

    def _in_use(self, by_others: int = 0) -> bool:
        return device_memory_in_use() > self._baseline + by_others + _NEAR_BASELINE_BYTES

    def _seconds_until_free(self, beside: int | None = None) -> float:
        """Until no more is in use than before; `beside` is what another process then held."""
        began = time.monotonic()
        if beside is None:
            self._until(lambda: not workers_of(self._settings))
        else:
            self._until(lambda: device_memory_in_use() <= beside + _NEAR_BASELINE_BYTES)
        return time.monotonic() - began

    @staticmethod
    def _until(holds: Any) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not holds():
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happened for {_PATIENCE_SECONDS:g} s")
            time.sleep(0.05)


@contextlib.contextmanager
def _hog(leave: int) -> Iterator[Callable[[], None]]:
    """A process that, once it is told to, holds all of the device but so many bytes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOG, str(leave)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def take_memory() -> None:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        if process.stdout.readline() != "holding\n":  # type: ignore[union-attr]
            raise SystemExit("the memory could not be taken")

    try:
        process.stdout.readline()
        yield take_memory
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per check")
    parser.add_argument("--only", nargs="+", default=[""], help="checks whose name holds one of these texts")
    arguments = parser.parse_args()
    if devices.default_device() != devices.CUDA:
        raise SystemExit("there is no CUDA device here")
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        return asyncio.run(_check(Path(folder), arguments.only, arguments.json))


async def _check(folder: Path, only: list[str], as_json: bool) -> int:
    size = SIZES["llama-362M"]
    assert size is not None
    settings = Settings(
        data_dir=folder / "data",
        grpc_address="127.0.0.1:0",
        base_model=str(build_random_llama(folder / "base", **size)),
        lease_seconds=6,
    )
    (settings.data_dir / "bases").mkdir(parents=True)
    base = prepare_base(settings, BASE, lambda phase, fraction: None)
    async with await start_server(settings) as server:
        return await asyncio.to_thread(_run, settings, server.address, list(conversations(base, 512)), only, as_json)


def _run(settings: Settings, address: str, rows: list[str], only: list[str], as_json: bool) -> int:
    state = State.open(settings.state_url, migrate=False)
    failed = 0
    with Client(address) as client:
        client.upload_dataset("rows", "\n".join(rows * 2).encode(), kind=DatasetKind.CONVERSATIONS)
        checks = Checks(settings, client, state)
        for name, check in (
            ("killed, NF4", lambda: checks.killed(use_qlora=True)),
            ("killed, bfloat16", lambda: checks.killed(use_qlora=False)),
            *((f"out of memory at {where}", lambda where=where: checks.out_of_memory(where))
              for where in ("load", "step", "evaluation", "resume")),
            ("a second chance", checks.second_chance),
            ("cancelled", checks.cancelled),
        ):  # fmt: skip
            if not any(text in name for text in only):
                continue
            began = time.monotonic()
            try:
                facts = check()
            except SystemExit as error:
                facts = {"holds": False, "error": str(error)}
            facts = {"check": name, "seconds": round(time.monotonic() - began, 1), **facts}
            failed += not facts["holds"]
            print(json.dumps(facts) if as_json else _line(facts), flush=True)
    state.close()
    return int(failed > 0)


def _line(facts: dict[str, Any]) -> str:
    told = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in {"check", "holds"})
    return f"{'ok  ' if facts['holds'] else 'FAIL'} {facts['check']}: {told}"


if __name__ == "__main__":
    sys.exit(main())
