"""The course of a job, told from its event log: curves, attempts, checkpoints, and what was said.

Both the live view and the report look at a job through this. It knows events and nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple

from knowledge_engine.cli.curves import Point, thin
from knowledge_engine.cli.output import size
from knowledge_engine.core import (
    Checkpoint,
    Job,
    JobEvent,
    JobResult,
    JobState,
    JobWarning,
    LogLine,
    Progress,
    ResultEvent,
    StateChange,
)

METRICS = (
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "examples_per_second",
    "memory_bytes",
)
"""The fields of a progress event that have a curve over its steps."""

MAX_POINTS = 4096  # of one curve; beyond that it is thinned, as a run may take a million steps

EntryKind = Literal["state", "log", "warning", "checkpoint"]


class Entry(NamedTuple):
    """What was said at some time, in words."""

    time: datetime
    kind: EntryKind
    text: str


class StateEntry(NamedTuple):
    time: datetime
    change: StateChange


class CheckpointEntry(NamedTuple):
    time: datetime
    attempt: int
    checkpoint: Checkpoint


class WarningEntry(NamedTuple):
    time: datetime
    attempt: int
    warning: JobWarning


@dataclass
class Attempt:
    """One process's work on the job; `ended_as` is None while it goes on. The steps are those it told of."""

    number: int
    start_time: datetime
    end_time: datetime | None = None
    ended_as: JobState | None = None
    message: str = ""
    first_step: int | None = None
    last_step: int | None = None


@dataclass
class Course:
    """All that is known of a job from the events so far."""

    job: Job
    state: JobState = JobState.QUEUED
    progress: Progress | None = None
    result: JobResult | None = None
    last_time: datetime | None = None
    curves: dict[str, list[Point]] = field(default_factory=lambda: {metric: [] for metric in METRICS})
    attempts: list[Attempt] = field(default_factory=list)
    states: list[StateEntry] = field(default_factory=list)
    checkpoints: list[CheckpointEntry] = field(default_factory=list)
    warnings: list[WarningEntry] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, events: Iterable[JobEvent]) -> Course:
        course = cls(job)
        for event in events:
            course.add(event)
        return course

    @property
    def attempt(self) -> int:
        return self.attempts[-1].number if self.attempts else 0

    def add(self, event: JobEvent) -> None:
        """Takes the next event of the job's log."""
        time = self.last_time = event.create_time
        match event.payload:
            case Progress() as progress:
                self._advance(progress)
            case StateChange() as change:
                self._enter(time, change)
            case Checkpoint() as checkpoint:
                self.checkpoints.append(CheckpointEntry(time, self.attempt, checkpoint))
                self.say(time, "checkpoint", f"checkpoint at step {checkpoint.step} ({size(checkpoint.size_bytes)})")
            case JobWarning() as warning:
                self.warnings.append(WarningEntry(time, self.attempt, warning))
                self.say(time, "warning", f"warning: {warning.message} [{warning.reason}]")
            case LogLine(message=message):
                self.say(time, "log", message)
            case ResultEvent(result=result):
                self.result = result

    def say(self, time: datetime, kind: EntryKind, text: str) -> None:
        self.entries.append(Entry(time, kind, text))

    def _enter(self, time: datetime, change: StateChange) -> None:
        self.state = change.state
        self.states.append(StateEntry(time, change))
        self.say(time, "state", f"{change.state.value}{f': {change.message}' if change.message else ''}")
        if change.state is JobState.RUNNING:
            self.attempts.append(Attempt(change.attempt, time))
        elif change.state is not JobState.CANCELLING and self.attempts and self.attempts[-1].ended_as is None:
            ended = self.attempts[-1]
            ended.end_time, ended.ended_as, ended.message = time, change.state, change.message

    def _advance(self, progress: Progress) -> None:
        self.progress = progress.over(self.progress)
        values = {metric: getattr(progress, metric) for metric in METRICS}
        # Loading and evaluating count in steps of their own; only what moves a curve is a step of the job.
        if progress.step is None or all(value is None for value in values.values()):
            return
        if self.attempts:
            current = self.attempts[-1]
            current.first_step = progress.step if current.first_step is None else current.first_step
            current.last_step = progress.step
        for metric, value in values.items():
            if value is None:
                continue
            curve = self.curves[metric]
            curve.append(Point(progress.step, value, self.attempt))
            if len(curve) > 2 * MAX_POINTS:
                curve[:] = thin(curve, MAX_POINTS)
