"""What clients and watchers saw of a service under attack, and a small model that says whether it may be so.

A `History` holds every call with its reply, every event that a watcher was shown, and what the store and the disk hold
once everything is at rest. `violations` is a list of broken promises; each rule says in its name what is promised.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from knowledge_engine.core import (
    LEGAL_TRANSITIONS,
    Checkpoint,
    GenerationResult,
    Job,
    JobEvent,
    JobKind,
    JobState,
    Page,
    Progress,
    ResultEvent,
    StateChange,
    TrainingResult,
    TrainingSpec,
)
from knowledge_engine.errors import Reason
from knowledge_engine.jobs import MAX_CRASHES
from knowledge_engine.server import convert
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.v1 import jobs_pb2

LOSS_TOLERANCE = 1e-6
UNKNOWN = "UNKNOWN"
"""The outcome of a call that nobody answered: it may have happened, or not."""


class Sight(NamedTuple):
    """What one reply says of a job."""

    job_id: str
    state: JobState
    attempt: int
    last_sequence: int
    checkpoint_step: int | None
    has_end_time: bool

    @classmethod
    def of(cls, job: jobs_pb2.Job) -> Sight:
        return cls(
            job.name.removeprefix("jobs/"),
            JobState(jobs_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")),
            job.attempt,
            job.last_sequence,
            job.checkpoint_step if job.HasField("checkpoint_step") else None,
            job.HasField("end_time"),
        )


@dataclass(frozen=True)
class Call:
    """`start` and `end` in seconds of one monotonic clock; `outcome` is `OK`, an error's reason, or `UNKNOWN`."""

    client: str
    verb: str
    start: float
    end: float
    outcome: str
    jobs: tuple[Sight, ...] = ()
    request_id: str = ""


@dataclass
class Watch:
    """One watcher of one job, over all its connections; `is_over` once the service has said that nothing follows."""

    watcher: str
    job_id: str
    after: int = 0
    events: list[tuple[int, str]] = field(default_factory=list)
    connections: int = 0
    is_over: bool = False

    @property
    def last(self) -> int:
        return self.events[-1][0] if self.events else self.after


@dataclass
class Remains:
    """What is there once everything is at rest and the server has ended."""

    jobs: dict[str, Job] = field(default_factory=dict)
    events: dict[str, list[JobEvent]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # creator, request id, job
    datasets: dict[str, tuple[str, str]] = field(default_factory=dict)  # by name: job, digest
    dataset_files: dict[str, str] = field(default_factory=dict)  # by name: digest of the content
    versions: list[tuple[str, int, str]] = field(default_factory=list)  # model, version, job
    leftovers: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    integrity: str = "ok"


@dataclass
class History:
    seed: int = 0
    round: int = 0
    calls: list[Call] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    twins: dict[str, dict[int, float]] = field(default_factory=dict)
    """By `twin_key`: the loss of each step of a training that nothing ever stopped."""
    remains: Remains = field(default_factory=Remains)
    complaints: list[str] = field(default_factory=list)
    """What took longer than it may."""


class Violation(NamedTuple):
    rule: str
    what: str
    seed: int = 0
    round: int = 0

    def __str__(self) -> str:
        return f"seed {self.seed} round {self.round}: {self.rule}: {self.what}"


def violations(history: History) -> list[Violation]:
    return [Violation(rule.__name__, what, history.seed, history.round) for rule in RULES for what in rule(history)]


def fingerprint(event: jobs_pb2.JobEvent) -> str:
    return hashlib.sha256(event.SerializeToString(deterministic=True)).hexdigest()[:16]


def stored_fingerprint(event: JobEvent) -> str:
    return fingerprint(convert.job_event(event))


def twin_key(spec: TrainingSpec) -> str:
    """Trainings with this in common have the same loss at every step."""
    return spec.model_dump_json(exclude={"model", "save_steps"})


def losses(events: list[JobEvent]) -> dict[int, float]:
    """The loss of each step; of one that was done again, the last."""
    return {step: loss for _, step, loss in _training_steps(events)}


# --- what the log says --------------------------------------------------------------------------------------------


class _Stand(NamedTuple):
    state: JobState
    attempt: int
    checkpoint_step: int | None


def _changes(events: list[JobEvent]) -> list[tuple[int, StateChange]]:
    return [(event.sequence, event.payload) for event in events if isinstance(event.payload, StateChange)]


def _stands(events: list[JobEvent]) -> dict[int, _Stand]:
    """How the job stands after each event."""
    stands: dict[int, _Stand] = {}
    state, attempt, step = JobState.QUEUED, 0, None
    for event in events:
        match event.payload:
            case StateChange(state=state, attempt=attempt):
                pass
            case Checkpoint(step=step):
                pass
        stands[event.sequence] = _Stand(state, attempt, step)
    return stands


def _training_steps(events: list[JobEvent]) -> Iterator[tuple[int, int, float]]:
    """Attempt, step and loss of each step that was told."""
    attempt = 0
    for event in events:
        match event.payload:
            case StateChange(attempt=attempt):
                pass
            case Progress(phase="training", step=int(step), loss=float(loss)):
                yield attempt, step, loss


# --- rules --------------------------------------------------------------------------------------------------------


def every_acknowledged_job_exists(history: History) -> Iterator[str]:
    for call in history.calls:
        for sight in call.jobs:
            if sight.job_id not in history.remains.jobs:
                yield f"{call.verb} of {call.client} was answered with {sight}, which the store does not know"


def a_request_id_makes_one_job(history: History) -> Iterator[str]:
    made: dict[tuple[str, str], set[str]] = defaultdict(set)
    asked: set[tuple[str, str]] = set()
    stored = {(creator, request_id): job for creator, request_id, job in history.remains.requests}
    for call in history.calls:
        key = call.client, call.request_id
        if call.verb == "create":
            asked.add(key)
            made[key].update(sight.job_id for sight in call.jobs)
        if call.verb == "reuse" and call.outcome == "OK":
            yield f"request {call.request_id} of {call.client} was granted for another spec"
    for (client, request_id), jobs in made.items():
        if not request_id:
            continue
        if len(jobs) > 1:
            yield f"request {request_id} of {client} made {sorted(jobs)}"
        if jobs and stored.get((client, request_id)) not in jobs:
            yield f"request {request_id} of {client} made {jobs}, stored is {stored.get((client, request_id))}"
    twice = [job for job, count in Counter(job for _, _, job in history.remains.requests).items() if count > 1]
    if twice:
        yield f"jobs of two requests: {twice}"
    asked_for = {job for creator, request_id, job in history.remains.requests if (creator, request_id) in asked}
    asked_for |= {sight.job_id for call in history.calls if call.verb == "create" for sight in call.jobs}
    if not any(call.verb == "create" and call.outcome == UNKNOWN and not call.request_id for call in history.calls):
        for job_id in history.remains.jobs.keys() - asked_for:
            yield f"nobody asked for {job_id}"


def calls_fail_as_they_may(history: History) -> Iterator[str]:
    """Under these faults a call may find nobody, and a verb may come too late; nothing else may go wrong."""
    for call in history.calls:
        allowed = {"OK", UNKNOWN} | _REFUSALS.get(call.verb, set())
        if call.outcome not in allowed:
            yield f"{call.verb} of {call.client} ended with {call.outcome}"


_REFUSALS: dict[str, set[str]] = {
    "create": {"QUEUE_FULL"},
    "reuse": {"REQUEST_ID_REUSED"},
    "cancel": {"JOB_ENDED"},
    "pause": {"JOB_ENDED"},
    "resume": {"JOB_ENDED"},
}


def sequences_have_no_gap(history: History) -> Iterator[str]:
    for job_id, events in history.remains.events.items():
        numbers = [event.sequence for event in events]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"{job_id} has the sequence numbers {numbers}"
        if (told := history.remains.jobs[job_id].last_sequence) != len(numbers):
            yield f"{job_id} says last_sequence {told} and has {len(numbers)} events"


def transitions_are_legal(history: History) -> Iterator[str]:
    for job_id, events in history.remains.events.items():
        changes = [change.state for _, change in _changes(events)]
        if not changes or changes[0] is not JobState.QUEUED:
            yield f"{job_id} begins as {changes[:1]}"
        for before, after in itertools.pairwise(changes):
            if after not in LEGAL_TRANSITIONS[before]:
                yield f"{job_id} went {before} -> {after}: {changes}"
        if changes and history.remains.jobs[job_id].state is not changes[-1]:
            yield f"{job_id} is {history.remains.jobs[job_id].state}, its log ends with {changes[-1]}"


def what_is_terminal_is_final_and_last(history: History) -> Iterator[str]:
    for job_id, events in history.remains.events.items():
        ends = [sequence for sequence, change in _changes(events) if change.state.is_terminal]
        if len(ends) > 1 or (ends and ends[0] != events[-1].sequence):
            yield f"{job_id} ended at {ends} and its log goes to {events[-1].sequence}"
        results = [event for event in events if isinstance(event.payload, ResultEvent)]
        succeeded = history.remains.jobs[job_id].state is JobState.SUCCEEDED
        if len(results) != int(succeeded):
            yield f"{job_id} is {history.remains.jobs[job_id].state} and has {len(results)} results"


def end_time_says_terminal(history: History) -> Iterator[str]:
    for job in history.remains.jobs.values():
        if (job.end_time is not None) != job.state.is_terminal:
            yield f"{job.id} is {job.state} and has end_time {job.end_time}"
        if job.end_time is not None and job.end_time < job.create_time:
            yield f"{job.id} ended before it was created"
    for call in history.calls:
        for sight in call.jobs:
            if sight.has_end_time != sight.state.is_terminal:
                yield f"{call.verb} of {call.client} was answered with {sight}"


def attempts_grow_by_one(history: History) -> Iterator[str]:
    for job_id, events in history.remains.events.items():
        current = 0
        for sequence, change in _changes(events):
            if change.state is JobState.RUNNING:
                current += 1
            if change.attempt != current:
                yield f"{job_id}, event {sequence}: {change.state} of attempt {change.attempt}, not {current}"
                break
        if history.remains.jobs[job_id].attempt != current:
            yield f"{job_id} says attempt {history.remains.jobs[job_id].attempt}, its log {current}"


def watchers_miss_and_repeat_nothing(history: History) -> Iterator[str]:
    stored = {
        job_id: {event.sequence: stored_fingerprint(event) for event in events}
        for job_id, events in history.remains.events.items()
    }
    for watch in history.watches:
        log = stored.get(watch.job_id, {})
        who = f"{watch.watcher} of {watch.job_id}, {watch.connections} connections"
        numbers = [sequence for sequence, _ in watch.events]
        if numbers != list(range(watch.after + 1, watch.after + 1 + len(numbers))):
            yield f"{who}: saw {numbers} after {watch.after}"
        wrong = [sequence for sequence, seen in watch.events if log.get(sequence) != seen]
        if wrong:
            yield f"{who}: events {wrong} are not those of the log"
        if watch.is_over and watch.last < len(log):
            yield f"{who}: was told that all is over after {watch.last} of {len(log)}"


def replies_agree_with_the_log(history: History) -> Iterator[str]:
    stands = {job_id: _stands(events) for job_id, events in history.remains.events.items()}
    for call in history.calls:
        for sight in call.jobs:
            stand = stands.get(sight.job_id, {}).get(sight.last_sequence)
            if stand != (sight.state, sight.attempt, sight.checkpoint_step):
                yield f"{call.verb} of {call.client} was answered with {sight}, the log says {stand}"


def nothing_goes_back(history: History) -> Iterator[str]:
    """Whoever asks after somebody was answered sees at least as much."""
    by_job: dict[str, list[tuple[Call, Sight]]] = defaultdict(list)
    for call in history.calls:
        for sight in call.jobs:
            by_job[sight.job_id].append((call, sight))
    for seen in by_job.values():
        ended = sorted(seen, key=lambda pair: pair[0].end)
        begun = sorted(seen, key=lambda pair: pair[0].start)
        best: tuple[int, int, int] = (0, 0, -1)
        known = 0
        for call, sight in begun:
            while known < len(ended) and ended[known][0].end <= call.start:
                best = _most(best, _measure(ended[known][1]))
                known += 1
            if any(now < before for now, before in zip(_measure(sight), best, strict=True)):
                yield f"{call.verb} of {call.client} saw {sight} after (sequence, attempt, checkpoint) {best}"


def _measure(sight: Sight) -> tuple[int, int, int]:
    return sight.last_sequence, sight.attempt, -1 if sight.checkpoint_step is None else sight.checkpoint_step


def _most(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])


def checkpoints_grow(history: History) -> Iterator[str]:
    for job_id, events in history.remains.events.items():
        steps = [event.payload.step for event in events if isinstance(event.payload, Checkpoint)]
        if steps != sorted(steps):
            yield f"{job_id} has checkpoints at {steps}"


def everything_comes_to_rest(history: History) -> Iterator[str]:
    yield from history.complaints
    for job in history.remains.jobs.values():
        if not job.state.is_terminal and job.state is not JobState.PAUSED:
            yield f"{job.id} is {job.state} after {job.attempt} attempts"


def one_version_of_a_succeeded_training(history: History) -> Iterator[str]:
    published = Counter(job_id for _, _, job_id in history.remains.versions)
    for job in history.remains.jobs.values():
        if job.kind is JobKind.TRAINING:
            wanted = int(job.state is JobState.SUCCEEDED)
            if published[job.id] != wanted:
                yield f"{job.id} is {job.state} and has published {published[job.id]} versions"
            if isinstance(job.result, TrainingResult):
                named = job.result.model, job.result.version, job.id
                if named not in history.remains.versions:
                    yield f"{job.id} names {named}, there are {history.remains.versions}"


def a_dataset_says_succeeded(history: History) -> Iterator[str]:
    stored = {job_id: name for name, (job_id, _) in history.remains.datasets.items() if job_id}
    for job in history.remains.jobs.values():
        if job.kind is not JobKind.GENERATION:
            continue
        if (job.id in stored) != (job.state is JobState.SUCCEEDED):
            yield f"{job.id} is {job.state} and its dataset is {stored.get(job.id)}"
        if isinstance(job.result, GenerationResult):
            record = history.remains.datasets.get(job.result.dataset)
            if record is None or record[1] != job.result.digest:
                yield f"{job.id} names {job.result.dataset} {job.result.digest}, stored is {record}"
    for name, (_, digest) in history.remains.datasets.items():
        if (found := history.remains.dataset_files.get(name)) != digest:
            yield f"dataset {name} is recorded as {digest}, its file is {found}"
    for name in history.remains.dataset_files.keys() - history.remains.datasets.keys():
        yield f"nobody knows the dataset file {name}"


def failures_have_a_cause(history: History) -> Iterator[str]:
    """Only three crashes without a checkpoint between them end a job of this traffic badly."""
    for job in history.remains.jobs.values():
        if job.state is not JobState.FAILED:
            continue
        reason = (job.error or {}).get("reason")
        crashes = 0
        for event in history.remains.events[job.id]:
            match event.payload:
                case Checkpoint():
                    crashes = 0
                case StateChange(message=message) if " crashed: " in message:
                    crashes += 1
                case StateChange(message="resumed on request"):
                    crashes = 0
        if reason not in {Reason.WORKER_CRASHED, Reason.OUT_OF_MEMORY} or crashes < MAX_CRASHES:
            yield f"{job.id} failed after {crashes} crashes: {job.error}"


def losses_equal_those_of_the_twin(history: History) -> Iterator[str]:
    for job in history.remains.jobs.values():
        if not isinstance(job.spec, TrainingSpec):
            continue
        told: dict[int, float] = dict(history.twins.get(twin_key(job.spec), {}))
        has_twin = bool(told)
        for attempt, step, loss in _training_steps(history.remains.events[job.id]):
            if has_twin and step not in told:
                yield f"{job.id}, attempt {attempt}: its twin has no step {step}"
            elif abs(told.setdefault(step, loss) - loss) > LOSS_TOLERANCE:
                yield f"{job.id}, attempt {attempt}, step {step}: loss {loss!r}, elsewhere {told[step]!r}"


def work_redone_is_one_interval_at_most(history: History) -> Iterator[str]:
    for job in history.remains.jobs.values():
        if not isinstance(job.spec, TrainingSpec) or not job.spec.save_steps:
            continue
        reached, last_attempt = 0, 0
        for attempt, step, _ in _training_steps(history.remains.events[job.id]):
            if attempt != last_attempt and reached - step + 1 > job.spec.save_steps:
                yield f"{job.id}: attempt {attempt} began at step {step}, {reached} were done already"
            elif attempt == last_attempt and step <= reached:
                yield f"{job.id}: attempt {attempt} did step {step} after step {reached}"
            reached, last_attempt = step, attempt


def nothing_is_left_behind(history: History) -> Iterator[str]:
    if history.remains.processes:
        yield f"processes: {history.remains.processes}"
    if history.remains.leftovers:
        yield f"files: {history.remains.leftovers}"


def the_store_is_sound(history: History) -> Iterator[str]:
    if history.remains.integrity != "ok":
        yield history.remains.integrity


RULES: tuple[Callable[[History], Iterator[str]], ...] = (
    every_acknowledged_job_exists,
    a_request_id_makes_one_job,
    calls_fail_as_they_may,
    sequences_have_no_gap,
    transitions_are_legal,
    what_is_terminal_is_final_and_last,
    end_time_says_terminal,
    attempts_grow_by_one,
    watchers_miss_and_repeat_nothing,
    replies_agree_with_the_log,
    nothing_goes_back,
    checkpoints_grow,
    everything_comes_to_rest,
    one_version_of_a_succeeded_training,
    a_dataset_says_succeeded,
    failures_have_a_cause,
    losses_equal_those_of_the_twin,
    work_redone_is_one_interval_at_most,
    nothing_is_left_behind,
    the_store_is_sound,
)


# --- looking at what remains --------------------------------------------------------------------------------------


def remains_of(settings: Settings) -> Remains:
    """Reads everything that a service has left; its server has ended."""
    remains = Remains(integrity=integrity(settings), processes=processes_of(settings.data_dir))
    state = State.open(settings.state_url, migrate=False)
    try:
        remains.jobs = {job.id: job for job in state.list_jobs(Page(100_000, None))[0]}
        remains.events = {job_id: state.events(job_id, 0, 1_000_000) for job_id in remains.jobs}
        datasets = state.list_datasets(Page(100_000, None))[0]
    finally:
        state.close()
    remains.datasets = {dataset.name: (dataset.job_id, dataset.digest) for dataset in datasets}
    for path in (settings.data_dir / "datasets").glob("*.jsonl"):
        with path.open("rb") as file:
            remains.dataset_files[path.stem] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    with sqlite3.connect(settings.data_dir / "state.db") as connection:
        remains.requests = connection.execute("SELECT creator, request_id, job_id FROM requests").fetchall()
    connection.close()
    remains.versions = _versions(settings.data_dir / "models")
    remains.leftovers = _leftovers(settings.data_dir, remains.jobs)
    return remains


def integrity(settings: Settings) -> str:
    connection = sqlite3.connect(settings.data_dir / "state.db")
    try:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
        found += [str(row) for row in connection.execute("PRAGMA foreign_key_check")]
    finally:
        connection.close()
    return "; ".join(found)


def processes_of(folder: Path) -> list[str]:
    """The living processes whose data directory this is."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("KNOWLEDGE_DATA_DIR") == str(folder):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.Error:
            continue
    return found


def _versions(root: Path) -> list[tuple[str, int, str]]:
    found = []
    for path in sorted(root.glob("[!.]*/*/manifest.json")):
        manifest: dict[str, Any] = _json_of(path)
        found.append((path.parts[-3], int(path.parts[-2]), manifest["job_id"]))
    return found


def _json_of(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_bytes())
    return value


def _leftovers(folder: Path, jobs: dict[str, Job]) -> list[str]:
    """What no job in its state has a use for."""
    left = [*folder.glob("models/.staging/*"), *folder.glob("datasets/incoming*"), *folder.glob("datasets/.incoming*")]
    left = [path for path in left if (job := jobs.get(path.name)) is None or job.state.is_terminal]
    for job in jobs.values():
        if job.state in {JobState.SUCCEEDED, JobState.CANCELLED}:
            left += folder.glob(f"jobs/{job.id}/checkpoints")
            left += folder.glob(f"unpublished/*/{job.id}")
    return [str(path.relative_to(folder)) for path in left]
