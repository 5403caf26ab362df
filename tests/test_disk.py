"""A disk that is really full: a small file system of its own, filled to the brim, with a service on it.

What fails in the middle of a file is in `test_checkpoints.py`; here everything that writes shares the fate.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from knowledge_engine.core import JobState, JobWarning, StateChange
from knowledge_engine.errors import Reason
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from tests.history import UNKNOWN, History, Watch, losses, remains_of, twin_key, violations
from tests.storm import Client, Report, storm_settings, training_spec, upload_training_data
from tests.test_faults import PATIENCE, eventually, judge, serving

MIB = 2**20
DISK_BYTES = 256 * MIB
SLOW = "training.step=sleep:1"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={DISK_BYTES}"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def settings(disk: Path, tiny_base: Path) -> Settings:
    return storm_settings(disk / "data", tiny_base, checkpoint_seconds=1)


class Filler:
    """Takes all of a disk but `leave` bytes."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._path = disk / "filler"

    def fill(self, leave: int = 0) -> None:
        """Chunk by chunk, for others may be writing."""
        with self._path.open("ab", buffering=0) as file:
            try:
                while (room := shutil.disk_usage(self._disk).free - leave) > 0:
                    file.write(bytes(min(room, MIB)))
            except OSError:
                pass

    def empty(self) -> None:
        self._path.unlink(missing_ok=True)


async def under_way(settings: Settings, client: Client, model: str) -> str:
    """A training that has made a checkpoint."""
    job_id = (await client.create(training_spec(model))).jobs[0].job_id
    look = State.open(settings.state_url, migrate=False)
    await eventually(lambda: look.get_job(job_id).checkpoint_step, PATIENCE)
    look.close()
    return job_id


async def ended(client: Client, job_id: str) -> str:
    """Follows it to its end, and a twin that has all the room."""
    await asyncio.wait_for(client.watch(Watch("test", job_id)), 2 * PATIENCE)
    twin = (await client.create(training_spec("twin"))).jobs[0].job_id
    await asyncio.wait_for(client.watch(Watch("test", twin)), 2 * PATIENCE)
    return twin


def compared(settings: Settings, history: History, job_id: str, twin: str) -> list[object]:
    """What is left once the service has ended breaks no promise, and both have the same losses; the job's events."""
    history.remains = remains_of(settings)
    jobs, events = history.remains.jobs, history.remains.events
    assert {job.state for job in jobs.values()} == {JobState.SUCCEEDED}, [job.error for job in jobs.values()]
    history.twins = {twin_key(jobs[twin].spec): losses(events[twin])}  # type: ignore[arg-type]
    assert losses(events[job_id]) == losses(events[twin])
    history.calls = [call for call in history.calls if call.outcome != "DISK_FULL"]  # as it may, here alone
    judge(Report(history, violations(history)))
    return [event.payload for event in events[job_id]]


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_disk_that_is_full_for_a_while_costs_nothing(settings: Settings, disk: Path) -> None:
    history, filler = History(), Filler(disk)
    async with serving(settings, SLOW) as server, Client(history, server.address) as client:
        await upload_training_data(client)
        job_id = await under_way(settings, client, "m")
        filler.fill()
        until = time.monotonic() + 4
        while time.monotonic() < until:
            asked = time.monotonic()
            assert (await client.get(job_id)).outcome == "OK"  # reading goes on
            assert (await client.create(training_spec("other"), "during")).outcome in {UNKNOWN, "DISK_FULL"}
            assert time.monotonic() - asked < 4
            filler.fill()
        filler.empty()
        twin = await ended(client, job_id)
    payloads = compared(settings, history, job_id, twin)
    assert [p.attempt for p in payloads if isinstance(p, StateChange) and p.state is JobState.RUNNING] == [1]


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_disk_that_is_full_for_longer_than_a_worker_waits_is_no_crash(settings: Settings, disk: Path) -> None:
    history, filler = History(), Filler(disk)
    async with serving(settings, "training.step=sleep:4") as server, Client(history, server.address) as client:
        await upload_training_data(client)
        job_id = await under_way(settings, client, "m")
        filler.fill()
        look = State.open(settings.state_url, migrate=False)
        worker = look.running_attempts()[0].worker_pid
        assert worker is not None

        def gone() -> bool:
            filler.fill()
            return not Path(f"/proc/{worker}").exists()

        await eventually(gone, PATIENCE)
        assert (await client.get(job_id)).outcome == "OK"  # the service is up
        assert (await client.get(job_id)).jobs[0].state is JobState.RUNNING  # nobody could write down that it ended
        filler.empty()
        look.close()
        twin = await ended(client, job_id)
    payloads = compared(settings, history, job_id, twin)
    told = [p.message for p in payloads if isinstance(p, StateChange) and p.state is JobState.QUEUED and p.message]
    assert told == ["its machine, its server or the store was away"]


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_disk_without_room_for_checkpoints_ends_the_job_with_the_last_good_one(
    settings: Settings, disk: Path
) -> None:
    """64 MB are left to the store, so that the end can be written down."""
    history, filler = History(), Filler(disk)
    async with serving(settings, SLOW) as server, Client(history, server.address) as client:
        await upload_training_data(client)
        job_id = await under_way(settings, client, "m")
        filler.fill(leave=60 * MIB)
        await asyncio.wait_for(client.watch(Watch("test", job_id)), PATIENCE)
        remains = remains_of(settings)
        job = remains.jobs[job_id]
        assert job.state is JobState.FAILED
        assert job.error is not None
        assert job.error["reason"] == Reason.DISK_FULL
        kept = max((settings.data_dir / "jobs" / job_id / "checkpoints").glob("step-*"))
        assert str(job.error["message"]).endswith(f"checkpoints/{kept.name} in the data directory")
        warnings = [e.payload for e in remains.events[job_id] if isinstance(e.payload, JobWarning)]
        assert [warning.reason for warning in warnings] == ["DISK_FULL", "DISK_FULL"]
        refused = await client.create(training_spec("other"))  # preflight sees it coming
        assert refused.outcome in {"OK", "DISK_FULL"}
        filler.empty()
        history.remains = remains_of(settings)
