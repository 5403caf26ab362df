"""Event logs as real jobs write them: a training that is killed once and goes on, and a generation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from knowledge_engine.core import (
    Checkpoint,
    EventPayload,
    GenerationResult,
    GenerationSpec,
    HeldOutComparison,
    Job,
    JobEvent,
    JobKind,
    JobState,
    JobWarning,
    LogLine,
    Progress,
    ResultEvent,
    StateChange,
    TrainingResult,
    TrainingSpec,
)

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
STEPS = 300
SPIKE = 85

JOB = Job(
    id="job-7f3a",
    kind=JobKind.TRAINING,
    state=JobState.RUNNING,
    spec=TrainingSpec(dataset="talks", model="assistant", learning_rate=5e-4, eval_steps=25),
    create_time=NOON,
    start_time=NOON + timedelta(seconds=1),
    attempt=2,
    creator="shop",
)
GENERATION = Job(
    id="job-900d",
    kind=JobKind.GENERATION,
    state=JobState.RUNNING,
    spec=GenerationSpec(catalogue="garden", dataset="talks", num_conversations=60),
    create_time=NOON,
    attempt=1,
)
TRAINED = TrainingResult(
    model="assistant",
    version=3,
    digest="sha256:" + "ab" * 32,
    train_loss=0.61,
    comparison=HeldOutComparison(
        base_loss=2.5, tuned_loss=0.5, num_conversations=12, num_tokens=900, precision="float32"
    ),
    num_steps=STEPS,
    num_tokens=52_000,
    tokens_per_second=151.5,
    training_seconds=343.2,
    peak_memory_bytes=4 * 2**30,
)
GENERATED = GenerationResult(
    dataset="talks",
    digest="sha256:" + "cd" * 32,
    num_conversations=60,
    num_rejected=3,
    rejections={"DUPLICATE": 2, "WRONG_PRICE": 1},
    provider="offline",
)


class Recorder:
    """Writes on where a log ends, a second an event."""

    def __init__(self, events: Iterable[JobEvent] = (), job: Job | None = None) -> None:
        self.events = list(events)
        known = GENERATION if self.events and self.events[0].job_id == GENERATION.id else JOB
        self.job = job or known

    def event(self, payload: EventPayload) -> JobEvent:
        sequence = len(self.events) + 1
        time = NOON + timedelta(seconds=sequence)
        return JobEvent(job_id=self.job.id, sequence=sequence, create_time=time, payload=payload)

    def add(self, payload: EventPayload) -> None:
        self.events.append(self.event(payload))
        self.job = self.job.model_copy(update={"last_sequence": len(self.events)})

    def finish(self) -> list[JobEvent]:
        """Ends the job well; returns the events of that."""
        before = len(self.events)
        result = TRAINED if self.job.kind is JobKind.TRAINING else GENERATED
        self.add(ResultEvent(result=result))
        self.add(StateChange(state=JobState.SUCCEEDED, attempt=self.job.attempt))
        ended = {"state": JobState.SUCCEEDED, "result": result, "end_time": self.events[-1].create_time}
        self.job = self.job.model_copy(update=ended)
        return self.events[before:]


def record_training(until: int = 229, killed_at: int = 170) -> list[JobEvent]:
    """A training that is killed and goes on from its checkpoint at step 160."""
    recorder, rng = Recorder(), random.Random(1)
    for payload in (
        StateChange(state=JobState.QUEUED),
        StateChange(state=JobState.RUNNING, attempt=1),
        Progress(phase="loading", step=50, total_steps=100),
        LogLine(message="135 conversations to train on, 15 held out"),
    ):
        recorder.add(payload)
    _steps(recorder, range(1, killed_at), rng)
    recorder.add(StateChange(state=JobState.QUEUED, attempt=1, message="worker killed by signal 9"))
    recorder.add(StateChange(state=JobState.RUNNING, attempt=2))
    recorder.add(
        JobWarning(reason="CHECKPOINT_DAMAGED", message="the newest checkpoint is damaged, the one before it is used")
    )
    _steps(recorder, range(killed_at // 40 * 40 + 1, until + 1), rng)
    return recorder.events


def _steps(recorder: Recorder, steps: Iterable[int], rng: random.Random) -> None:
    for step in steps:
        learned = math.exp(-step / 60)
        recorder.add(
            Progress(
                phase="training",
                step=step,
                total_steps=STEPS,
                epoch=step / 100,
                num_examples=2 * step,
                examples_per_second=2.1,
                loss=0.5 + 2.6 * learned + rng.gauss(0, 0.1) + (4 if step == SPIKE else 0),
                eval_loss=0.7 + 2.4 * learned if step % 25 == 0 else None,
                learning_rate=2e-4 * min(step / 10, 1) * (1 - step / STEPS),
                grad_norm=1 + rng.random(),
                tokens_per_second=150 + rng.gauss(0, 9),
                eta_seconds=(STEPS - step) * 1.2,
                memory_bytes=3 * 2**30 + step * 2**20,
            )
        )
        if step % 40 == 0:
            recorder.add(Checkpoint(step=step, size_bytes=5 * 2**20))


def record_generation() -> list[JobEvent]:
    recorder = Recorder(job=GENERATION)
    recorder.add(StateChange(state=JobState.QUEUED))
    recorder.add(StateChange(state=JobState.RUNNING, attempt=1))
    recorder.add(LogLine(message="generating 60 conversations from garden with offline words"))
    for step in range(0, 61, 3):
        if step == 3:
            recorder.add(LogLine(message="conversation 3: WRONG_PRICE"))
        rate = 40 + step / 10 if step else None
        recorder.add(
            Progress(
                phase="generating",
                step=step,
                total_steps=60,
                num_examples=step,
                examples_per_second=rate,
                eta_seconds=(60 - step) / rate if rate else None,
            )
        )
    return recorder.events
