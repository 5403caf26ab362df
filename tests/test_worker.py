"""One attempt's side of the bargain: what it says arrives, what it is told it does, what it leaves goes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from knowledge_engine.core import GenerationSpec, Job, JobKind, JobState, JobStopped, LogLine, StopReason, TrainingSpec
from knowledge_engine.errors import KnowledgeEngineError, Reason
from knowledge_engine.leftovers import clean_up, second_chance, sweep_checkpoints
from knowledge_engine.processes import take_server_lock
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.training.plan import CHECKPOINTS
from knowledge_engine.worker import Attempt

PATIENCE = 60.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, lease_seconds=1, orphan_grace_seconds=30)


@pytest.fixture
def state(settings: Settings) -> Iterator[State]:
    state = State.open(settings.state_url, busy_timeout_seconds=0.1)
    yield state
    state.close()


@pytest.fixture
def attempt(settings: Settings, state: State) -> Attempt:
    return claimed(settings, state)


def claimed(settings: Settings, state: State, spec: TrainingSpec | GenerationSpec | None = None) -> Attempt:
    state.create_job(spec or GenerationSpec(num_conversations=10))
    job = state.claim_job(dict.fromkeys(JobKind, 9))
    assert job is not None
    attempt = Attempt(settings, state, job)
    attempt.work_dir.mkdir(parents=True)
    return attempt


def lines(state: State, job: Job) -> list[str]:
    payloads = [event.payload for event in state.events(job.id, 0, 1000)]
    return [payload.message for payload in payloads if isinstance(payload, LogLine)]


def stops(attempt: Attempt) -> StopReason:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            attempt.check()
        except JobStopped as stop:
            return stop.reason
        time.sleep(0.02)
    raise AssertionError("it was never told to stop")


def test_what_is_said_while_the_store_is_locked_arrives_in_order(
    attempt: Attempt, state: State, tmp_path: Path
) -> None:
    with attempt:
        attempt.log("before")
        blocker = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        for number in range(20):
            attempt.log(f"while {number}")
        assert lines(state, attempt.job) == ["before"]
        blocker.execute("ROLLBACK")
        blocker.close()
        attempt.insist(lambda: None)
        attempt.log("after")
    assert lines(state, attempt.job) == ["before", *(f"while {number}" for number in range(20)), "after"]


def test_half_a_character_in_a_message_costs_nothing(attempt: Attempt, state: State) -> None:
    attempt.log("a \ud800 b")
    attempt.warn("ODD", "\udfff")
    attempt.log("after")
    assert lines(state, attempt.job) == ["a ? b", "after"]


def test_a_pause_stops_it_and_is_taken_back_by_a_resume(attempt: Attempt, state: State) -> None:
    with attempt:
        state.request_pause(attempt.job.id)
        assert stops(attempt) is StopReason.PAUSED
        state.request_resume(attempt.job.id)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                attempt.check()
                break
            except JobStopped:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        state.request_cancel(attempt.job.id)
        assert stops(attempt) is StopReason.CANCELLED
        attempt.stop(StopReason.INTERRUPTED)
        assert stops(attempt) is StopReason.CANCELLED  # what is to be cancelled is not kept for later


def test_without_a_server_it_keeps_what_it_has_and_goes(settings: Settings, state: State) -> None:
    lock = take_server_lock(settings)
    with claimed(settings.model_copy(update={"orphan_grace_seconds": 1.0}), state) as attempt:
        attempt.check()
        os.close(lock)
        assert stops(attempt) is StopReason.INTERRUPTED


CHILD = """
import sys, time
from knowledge_engine import worker
from knowledge_engine.core import JobStopped

def work(attempt, settings, state):
    print("at work", flush=True)
    while True:
        try:
            attempt.check()
        except JobStopped:
            time.sleep(float(sys.argv[3]))  # as long as a checkpoint takes
            raise
        time.sleep(0.02)

worker.run_job = work
worker.main()
"""


@pytest.mark.parametrize(
    ("pauses", "checkpoint_seconds", "is_graceful"),
    [([0.0], 0.5, True), ([0.0, 0.2, 0.1], 1.5, True), ([0.0, 3.0], 30.0, False)],
    ids=["once", "twice-at-once", "once-more-and-meant"],
)
def test_sigterm_lets_it_keep_what_it_has_and_a_later_second_one_ends_it(
    settings: Settings, state: State, pauses: list[float], checkpoint_seconds: float, is_graceful: bool
) -> None:
    job = claimed(settings, state).job
    command = [sys.executable, "-c", CHILD, job.id, "1", str(checkpoint_seconds)]
    child = subprocess.Popen(
        command, env=settings.child_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None
    with child, take_lock(settings):
        assert child.stdout.readline() == b"at work\n"
        for pause in pauses:
            time.sleep(pause)
            child.send_signal(signal.SIGTERM)
        code = child.wait(PATIENCE)
    if is_graceful:
        assert code == 0
        assert state.get_job(job.id).state is JobState.QUEUED
    else:
        assert code == 128 + signal.SIGTERM
        assert state.get_job(job.id).state is JobState.RUNNING  # its server sees to the rest


class take_lock:  # noqa: N801
    """A server is alive for as long as this is entered."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __enter__(self) -> None:
        self._lock = take_server_lock(self._settings)

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)


# --- what is left -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (JobState.SUCCEEDED, {"tracking", "worker-1.log"}),
        (JobState.CANCELLED, {"tracking", "worker-1.log"}),
        (JobState.FAILED, {"tracking", "worker-1.log", CHECKPOINTS}),
        (JobState.QUEUED, {"tracking", "worker-1.log", CHECKPOINTS, "scratch"}),
        (JobState.PAUSED, {"tracking", "worker-1.log", CHECKPOINTS, "scratch"}),
    ],
)
def test_what_nobody_needs_goes_and_the_rest_stays(
    settings: Settings, state: State, end: JobState, left: set[str]
) -> None:
    attempt = claimed(settings, state, TrainingSpec(dataset="d", model="m"))
    for name in ("tracking", "scratch", CHECKPOINTS):
        (attempt.work_dir / name / "deep").mkdir(parents=True)
    (attempt.work_dir / "worker-1.log").touch()
    for _ in range(2):
        clean_up(settings, state, attempt.job.model_copy(update={"state": end}))
        assert {path.name for path in attempt.work_dir.iterdir()} == left


def test_a_worker_that_the_kernel_killed_may_do_with_less_once(settings: Settings, state: State) -> None:
    def job(**fields: object) -> Job:
        spec = TrainingSpec.model_validate({"dataset": "d", "model": "m", "per_device_train_batch_size": 5} | fields)
        return claimed(settings, state, spec).job

    allowed = job(auto_find_batch_size=True)
    message = second_chance(settings, allowed)
    assert message is not None
    assert "goes on with 2" in message
    assert second_chance(settings, allowed) is None
    assert second_chance(settings, job()) is None
    alone = job(auto_find_batch_size=True, per_device_train_batch_size=1)
    assert "goes on with gradient checkpointing" in str(second_chance(settings, alone))
    assert second_chance(settings, alone) is None
    assert second_chance(settings, job(per_device_train_batch_size=1)) is None


def test_checkpoints_of_a_failed_job_are_not_kept_for_ever(settings: Settings, state: State) -> None:
    from datetime import timedelta

    failed, running = (claimed(settings, state, TrainingSpec(dataset="d", model="m")) for _ in range(2))
    for attempt in (failed, running):
        (attempt.work_dir / CHECKPOINTS).mkdir()
    state.finish_attempt(failed.job.id, 1, KnowledgeEngineError("no", reason=Reason.NON_FINITE))
    sweep_checkpoints(settings, state)
    assert (failed.work_dir / CHECKPOINTS).is_dir()
    sweep_checkpoints(settings, state, timedelta())
    assert not (failed.work_dir / CHECKPOINTS).exists()
    assert (running.work_dir / CHECKPOINTS).is_dir()
