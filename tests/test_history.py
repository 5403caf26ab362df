"""The checker of histories finds every kind of broken promise, and nothing in a sound history."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from knowledge_engine.core import (
    Checkpoint,
    EventPayload,
    GenerationResult,
    GenerationSpec,
    Job,
    JobEvent,
    JobKind,
    JobState,
    LogLine,
    Progress,
    ResultEvent,
    StateChange,
    TrainingResult,
    TrainingSpec,
)
from tests.history import (
    RULES,
    UNKNOWN,
    Call,
    History,
    Remains,
    Sight,
    Watch,
    losses,
    stored_fingerprint,
    twin_key,
    violations,
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
TRAINED = TrainingResult(
    model="m",
    version=1,
    digest="sha256:1",
    train_loss=1,
    comparison=None,
    num_steps=4,
    num_tokens=4,
    tokens_per_second=1,
    training_seconds=1,
    peak_memory_bytes=1,
)
GENERATED = GenerationResult(
    dataset="d", digest="sha256:2", num_conversations=10, num_rejected=0, rejections={}, provider="offline"
)


def change(state: str, attempt: int, message: str = "") -> StateChange:
    return StateChange(state=JobState(state), attempt=attempt, message=message)


def step(number: int, loss: float) -> Progress:
    return Progress(phase="training", step=number, loss=loss)


LOGS: dict[str, list[EventPayload]] = {
    "train": [
        change("QUEUED", 0),
        change("RUNNING", 1),
        step(1, 3.0),
        step(2, 2.5),
        Checkpoint(step=2, size_bytes=9),
        step(3, 2.25),
        change("QUEUED", 1, "attempt 1 crashed: signal SIGKILL"),
        change("RUNNING", 2),
        step(3, 2.25),
        step(4, 2.0),
        ResultEvent(result=TRAINED),
        change("SUCCEEDED", 2),
    ],
    "make": [change("QUEUED", 0), change("RUNNING", 1), ResultEvent(result=GENERATED), change("SUCCEEDED", 1)],
    "never": [change("QUEUED", 0), change("PAUSED", 0), change("CANCELLED", 0)],
    "poison": [
        change("QUEUED", 0),
        *(
            change(state, attempt, message)
            for attempt in (1, 2, 3)
            for state, message in (
                ("RUNNING", ""),
                ("FAILED" if attempt == 3 else "QUEUED", f"attempt {attempt} crashed: signal SIGKILL"),
            )
        ),
    ],
}


def events_of(job_id: str, payloads: list[EventPayload]) -> list[JobEvent]:
    return [
        JobEvent(job_id=job_id, sequence=number, create_time=BEGIN + timedelta(seconds=number), payload=payload)
        for number, payload in enumerate(payloads, 1)
    ]


def job_of(job_id: str, payloads: list[EventPayload], spec: Any, **facts: Any) -> Job:
    last = payloads[-1]
    assert isinstance(last, StateChange)
    kind = JobKind.TRAINING if isinstance(spec, TrainingSpec) else JobKind.GENERATION
    return Job(
        id=job_id,
        kind=kind,
        state=last.state,
        spec=spec,
        create_time=BEGIN,
        end_time=BEGIN + timedelta(minutes=1) if last.state.is_terminal else None,
        attempt=last.attempt,
        last_sequence=len(payloads),
        **facts,
    )


def sound() -> History:
    training = TrainingSpec(dataset="d", model="m", max_steps=4, save_steps=2)
    generation = GenerationSpec(num_conversations=10, dataset="d")
    crashed = {"reason": "WORKER_CRASHED", "message": "3 attempts crashed"}
    remains = Remains(
        jobs={
            "train": job_of("train", LOGS["train"], training, result=TRAINED, checkpoint_step=2),
            "make": job_of("make", LOGS["make"], generation, result=GENERATED),
            "never": job_of("never", LOGS["never"], generation),
            "poison": job_of("poison", LOGS["poison"], generation, error=crashed),
        },
        events={job_id: events_of(job_id, payloads) for job_id, payloads in LOGS.items()},
        requests=[("alice", "r1", "train"), ("alice", "r2", "make"), ("bob", "r1", "never"), ("bob", "r2", "poison")],
        datasets={"d": ("make", "sha256:2"), "uploaded": ("", "sha256:3")},
        dataset_files={"d": "sha256:2", "uploaded": "sha256:3"},
        versions=[("m", 1, "train")],
    )
    queued = {job_id: Sight(job_id, JobState.QUEUED, 0, 1, None, False) for job_id in LOGS}
    calls = [
        Call("alice", "create", 1, 2, "OK", (queued["train"],), "r1"),
        Call("alice", "create", 1, 2, "OK", (queued["train"],), "r1"),
        Call("alice", "create", 1, 2, UNKNOWN, (), "r2"),
        Call("bob", "create", 1, 2, "OK", (queued["never"],), "r1"),
        Call("bob", "create", 1, 2, "OK", (queued["poison"],), "r2"),
        Call("alice", "reuse", 2, 3, "REQUEST_ID_REUSED", (), "r1"),
        Call("alice", "get", 4, 5, "OK", (Sight("train", JobState.RUNNING, 1, 6, 2, False),)),
        Call("alice", "get", 6, 7, "OK", (Sight("train", JobState.SUCCEEDED, 2, 12, 2, True),)),
        Call("bob", "cancel", 8, 9, "OK", (Sight("never", JobState.CANCELLED, 0, 3, None, True),)),
        Call("bob", "pause", 9, 10, "JOB_ENDED"),
        Call("alice", "list", 10, 11, "OK", (Sight("make", JobState.SUCCEEDED, 1, 4, None, True),)),
    ]
    log = [(event.sequence, stored_fingerprint(event)) for event in remains.events["train"]]
    watches = [Watch("fast", "train", 0, log, 1, True), Watch("late", "train", 5, log[5:9], 3, False)]
    return History(
        seed=7,
        round=3,
        calls=calls,
        watches=watches,
        remains=remains,
        twins={twin_key(training): {1: 3.0, 2: 2.5, 3: 2.25, 4: 2.0}},
    )


def test_a_sound_history_has_no_violation() -> None:
    assert violations(sound()) == []
    assert losses(sound().remains.events["train"]) == {1: 3.0, 2: 2.5, 3: 2.25, 4: 2.0}


def rewrite(history: History, job_id: str, payloads: list[EventPayload]) -> None:
    """Another log, with the record of the job in step."""
    history.remains.events[job_id] = events_of(job_id, payloads)
    before = history.remains.jobs[job_id]
    last = next(payload for payload in reversed(payloads) if isinstance(payload, StateChange))
    history.remains.jobs[job_id] = before.model_copy(
        update={
            "state": last.state,
            "attempt": last.attempt,
            "last_sequence": len(payloads),
            "end_time": before.end_time or BEGIN if last.state.is_terminal else None,
        }
    )


def record(history: History, job_id: str, **changes: Any) -> None:
    history.remains.jobs[job_id] = history.remains.jobs[job_id].model_copy(update=changes)


def reply(history: History, number: int, **changes: Any) -> None:
    call = history.calls[number]
    history.calls[number] = replace(call, jobs=(call.jobs[0]._replace(**changes),))


def lose_a_job(history: History) -> None:
    del history.remains.jobs["train"], history.remains.events["train"]


def make_two_of_one_request(history: History) -> None:
    reply(history, 1, job_id="make")


def forget_a_request(history: History) -> None:
    history.remains.requests.remove(("alice", "r1", "train"))


def make_a_job_of_nothing(history: History) -> None:
    history.remains.requests.remove(("alice", "r2", "make"))


def grant_a_used_request(history: History) -> None:
    history.calls[5] = replace(history.calls[5], outcome="OK")


def answer_with_an_internal_error(history: History) -> None:
    history.calls[6] = replace(history.calls[6], outcome="INTERNAL", jobs=())


def lose_an_event(history: History) -> None:
    del history.remains.events["train"][3]


def miscount(history: History) -> None:
    record(history, "make", last_sequence=5)


def wake_the_dead(history: History) -> None:
    rewrite(history, "never", [*LOGS["never"], change("QUEUED", 0), change("CANCELLED", 0)])


def cancel_what_runs_at_once(history: History) -> None:
    rewrite(history, "make", [change("QUEUED", 0), change("RUNNING", 1), change("CANCELLED", 1)])


def another_state_than_the_log(history: History) -> None:
    record(history, "make", state=JobState.FAILED)


def speak_after_the_end(history: History) -> None:
    rewrite(history, "make", [*LOGS["make"], LogLine(message="still here")])


def two_results(history: History) -> None:
    rewrite(history, "make", [*LOGS["make"][:3], *LOGS["make"][2:]])


def no_end_time(history: History) -> None:
    record(history, "never", end_time=None)


def an_early_end_time(history: History) -> None:
    record(history, "never", end_time=BEGIN - timedelta(hours=1))


def a_reply_without_end_time(history: History) -> None:
    reply(history, 7, has_end_time=False)


def skip_an_attempt(history: History) -> None:
    rewrite(history, "make", [change("QUEUED", 0), change("RUNNING", 2), LOGS["make"][2], change("SUCCEEDED", 2)])


def a_stale_attempt_speaks(history: History) -> None:
    log = list(LOGS["train"])
    log[-1] = change("SUCCEEDED", 1)
    rewrite(history, "train", log)


def miss_an_event(history: History) -> None:
    del history.watches[0].events[4]


def repeat_an_event(history: History) -> None:
    history.watches[1].events.insert(1, history.watches[1].events[0])


def see_something_else(history: History) -> None:
    history.watches[0].events[4] = (5, "something else")


def end_a_watch_early(history: History) -> None:
    history.watches[1].is_over = True


def answer_beside_the_log(history: History) -> None:
    reply(history, 6, state=JobState.QUEUED)


def answer_with_an_attempt_to_come(history: History) -> None:
    reply(history, 6, attempt=2)


def go_back(history: History) -> None:
    call = history.calls[7]
    history.calls.append(replace(call, start=20, end=21, jobs=history.calls[6].jobs))


def lose_a_checkpoint(history: History) -> None:
    log = list(LOGS["train"])
    log.insert(9, Checkpoint(step=1, size_bytes=9))
    rewrite(history, "train", log)


def run_on(history: History) -> None:
    rewrite(history, "make", LOGS["make"][:2])


def take_too_long(history: History) -> None:
    history.complaints.append("watchers wait")


def publish_twice(history: History) -> None:
    history.remains.versions.append(("m", 2, "train"))


def publish_nothing(history: History) -> None:
    history.remains.versions.clear()


def name_another_version(history: History) -> None:
    history.remains.versions[0] = ("m", 2, "train")


def leave_a_cancelled_dataset(history: History) -> None:
    history.remains.datasets["left"] = ("never", "sha256:4")
    history.remains.dataset_files["left"] = "sha256:4"


def lose_a_dataset(history: History) -> None:
    del history.remains.datasets["d"], history.remains.dataset_files["d"]


def change_a_dataset(history: History) -> None:
    history.remains.dataset_files["uploaded"] = "sha256:5"


def leave_a_file_that_nobody_knows(history: History) -> None:
    history.remains.dataset_files["left"] = "sha256:5"


def fail_after_two_crashes(history: History) -> None:
    rewrite(history, "poison", [*LOGS["poison"][:4], change("FAILED", 2, "attempt 2 crashed: signal SIGKILL")])


def fail_after_crashes_with_progress(history: History) -> None:
    rewrite(history, "poison", [*LOGS["poison"][:4], Checkpoint(step=1, size_bytes=9), *LOGS["poison"][4:]])


def fail_for_another_reason(history: History) -> None:
    record(history, "poison", error={"reason": "STATE_UNAVAILABLE", "message": "locked"})


def another_loss_than_the_twin(history: History) -> None:
    for losses_of_twin in history.twins.values():
        losses_of_twin[4] += 1e-5


def a_step_that_the_twin_has_not(history: History) -> None:
    for losses_of_twin in history.twins.values():
        del losses_of_twin[4]


def another_loss_when_done_again(history: History) -> None:
    history.twins.clear()
    log = list(LOGS["train"])
    log[8] = step(3, 2.26)
    rewrite(history, "train", log)


def begin_again(history: History) -> None:
    log = list(LOGS["train"])
    log.insert(8, step(1, 3.0))
    log.insert(9, step(2, 2.5))
    rewrite(history, "train", log)


def repeat_a_step(history: History) -> None:
    log = list(LOGS["train"])
    log.insert(3, step(1, 3.0))
    rewrite(history, "train", log)


def leave_a_process(history: History) -> None:
    history.remains.processes.append("1 python")


def leave_a_file(history: History) -> None:
    history.remains.leftovers.append("models/.staging/train")


def damage_the_store(history: History) -> None:
    history.remains.integrity = "row 3 missing from index"


BREAKS: dict[str, list[Callable[[History], None]]] = {
    "every_acknowledged_job_exists": [lose_a_job],
    "a_request_id_makes_one_job": [
        make_two_of_one_request,
        forget_a_request,
        make_a_job_of_nothing,
        grant_a_used_request,
    ],
    "calls_fail_as_they_may": [answer_with_an_internal_error],
    "sequences_have_no_gap": [lose_an_event, miscount],
    "transitions_are_legal": [wake_the_dead, cancel_what_runs_at_once, another_state_than_the_log],
    "what_is_terminal_is_final_and_last": [speak_after_the_end, two_results, wake_the_dead],
    "end_time_says_terminal": [no_end_time, an_early_end_time, a_reply_without_end_time],
    "attempts_grow_by_one": [skip_an_attempt, a_stale_attempt_speaks],
    "watchers_miss_and_repeat_nothing": [miss_an_event, repeat_an_event, see_something_else, end_a_watch_early],
    "replies_agree_with_the_log": [answer_beside_the_log, answer_with_an_attempt_to_come],
    "nothing_goes_back": [go_back],
    "checkpoints_grow": [lose_a_checkpoint],
    "everything_comes_to_rest": [run_on, take_too_long],
    "one_version_of_a_succeeded_training": [publish_twice, publish_nothing, name_another_version],
    "a_dataset_says_succeeded": [
        leave_a_cancelled_dataset,
        lose_a_dataset,
        change_a_dataset,
        leave_a_file_that_nobody_knows,
    ],
    "failures_have_a_cause": [
        fail_after_two_crashes,
        fail_after_crashes_with_progress,
        fail_for_another_reason,
    ],
    "losses_equal_those_of_the_twin": [
        another_loss_than_the_twin,
        a_step_that_the_twin_has_not,
        another_loss_when_done_again,
    ],
    "work_redone_is_one_interval_at_most": [begin_again, repeat_a_step],
    "nothing_is_left_behind": [leave_a_process, leave_a_file],
    "the_store_is_sound": [damage_the_store],
}


def test_every_rule_has_a_history_that_breaks_it() -> None:
    assert list(BREAKS) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        pytest.param(rule, damage, id=f"{rule}-{damage.__name__}")
        for rule, damages in BREAKS.items()
        for damage in damages
    ],
)
def test_a_broken_promise_is_found_and_named(rule: str, damage: Callable[[History], None]) -> None:
    history = copy.deepcopy(sound())
    damage(history)
    found = [violation for violation in violations(history) if violation.rule == rule]
    assert found
    assert str(found[0]).startswith(f"seed 7 round 3: {rule}: ")
