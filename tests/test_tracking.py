"""W&B's real client: offline runs read back with its own inspector, online ones against a server of ours, and trouble
that must not reach training."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from knowledge_engine.core import (
    Job,
    JobKind,
    JobState,
    JobStopped,
    Service,
    StopReason,
    TrackerRun,
    TrainingSpec,
    utc_now,
)
from knowledge_engine.errors import ConflictError, CredentialsError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.tracking import UNAVAILABLE, open_tracker, probe
from knowledge_engine.worker import Attempt, end_attempt
from tests.fake_wandb import ENTITY, HANG, Fault, Received, Run, fake_wandb, wait_for

CANARY = "canary-5f2c9e"
KEY = "0123456789" * 4  # the shape of a W&B key


def _job(job_id: str = "job-0001abcd") -> Job:
    spec = TrainingSpec(dataset="talks", model="shop", learning_rate=1e-3)
    return Job(id=job_id, kind=JobKind.TRAINING, state=JobState.RUNNING, spec=spec, create_time=utc_now())


def _observe_nothing(service: Service, trouble: str | None) -> None: ...


def _records(folder: Path) -> list[dict[str, Any]]:
    """What W&B itself reads from the one run below `folder`."""
    (log,) = folder.rglob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def _history(folder: Path) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in _records(folder) if record["type"] == "history"]


_CHILD = """
import json, sys, time
from pathlib import Path
from knowledge_engine.core import JobState
from knowledge_engine.settings import Settings
from knowledge_engine.tracking import open_tracker
from tests.test_tracking import _job

folder, end, first, last, patience = sys.argv[1:6]
heard = {"warnings": [], "observed": []}
started = time.monotonic()
tracker = open_tracker(
    Settings(),
    _job(),
    Path(folder),
    lambda *warning: heard["warnings"].append(warning),
    lambda *seen: heard["observed"].append(seen),
    online_start_seconds=float(patience),
)
heard["start_seconds"] = time.monotonic() - started
for step in range(int(first), int(last) + 1):
    tracker.log(
        {"train/loss": 3.0 / step, "train/learning_rate": 1e-3, "train/grad_norm": 1.0, "train/epoch": step / 8}, step
    )
if end == "hold":
    time.sleep(600)
tracker.log({"eval/loss": 0.5}, int(last))
finishing = time.monotonic()
tracker.finish(None if end == "none" else JobState(end))
heard["finish_seconds"] = time.monotonic() - finishing
print(json.dumps(heard | {"run": tracker.run and tracker.run.model_dump()}))
"""


def _command(folder: Path, end: str, first: int, last: int, patience: float) -> list[str]:
    arguments = [str(folder), end, str(first), str(last), str(patience), f"--api-key={CANARY}"]
    return [sys.executable, "-c", _CHILD, *arguments]


def _environment(url: str | None, **more: str) -> dict[str, str]:
    # Not this process's environment: W&B leaves there how children can join its service.
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    settings = {"KNOWLEDGE_WANDB_BASE_URL": url, "KNOWLEDGE_WANDB_API_KEY": KEY} if url else {}
    return kept | {"PYTHONPATH": str(Path(__file__).parent.parent)} | settings | more


def _track(
    folder: Path,
    url: str | None,
    end: str = "SUCCEEDED",
    first: int = 1,
    last: int = 4,
    patience: float = 20,
    **more: str,
) -> dict[str, Any]:
    """One attempt in a process of its own, as every worker is: what its job heard."""
    command = _command(folder, end, first, last, patience)
    done = subprocess.run(
        command, env=_environment(url, **more), capture_output=True, text=True, check=True, timeout=150
    )
    for spelling in _spellings(KEY):
        assert spelling not in done.stdout + done.stderr
    heard: dict[str, Any] = json.loads(done.stdout)
    return heard | {"log": done.stderr}


def _sync(folder: Path, url: str) -> None:
    """`wandb sync` of every run kept below `folder`."""
    runs = sorted(str(log.parent) for log in folder.rglob("*.wandb"))
    environment = _environment(None, WANDB_BASE_URL=url, WANDB_API_KEY=KEY, HOME=str(folder))
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", *runs]
    subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=True, timeout=120)


def _global_steps(run: Run) -> list[int]:
    return [row["train/global_step"] for row in run.history]


def _spellings(secret: str) -> list[str]:
    return [secret, base64.b64encode(secret.encode()).decode().rstrip("="), quote(secret, safe="")]


def test_an_offline_run_holds_the_metrics_the_spec_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)  # the environment, where secrets live
    monkeypatch.setattr(sys, "argv", ["train", f"--key={CANARY}"])  # a command line with one
    warnings: list[tuple[str, str]] = []
    settings = Settings(openai_api_key=SecretStr(CANARY), api_keys=SecretStr(f"me:{CANARY}"))

    tracker = open_tracker(settings, _job(), tmp_path, lambda *warning: warnings.append(warning), _observe_nothing)
    assert tracker.run is not None
    assert (tracker.run.id, tracker.run.url) == ("job-0001abcd", "")
    for step in (1, 2, 3):
        tracker.log({"train/loss": 3.0 / step, "train/learning_rate": 1e-3}, step)
    tracker.log({"eval/loss": 0.5}, 3)
    tracker.finish(JobState.SUCCEEDED)

    assert warnings == []
    assert capfd.readouterr().out == ""
    records = _records(tmp_path)
    history = _history(tmp_path)
    assert [item.get("train/global_step") for item in history] == [1, 2, 3, 3]
    assert [item["train/loss"] for item in history[:3]] == [3.0, 1.5, 1.0]
    assert history[3]["eval/loss"] == 0.5
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert run["run_id"] == "job-0001abcd"
    assert run["config"]["update"]["learning_rate"] == 1e-3
    assert next(record["exit"]["exit_code"] for record in records if record["type"] == "exit") == 0
    assert {"state": "SUCCEEDED"} in [r["summary"]["update"] for r in records if r["type"] == "summary"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_a_job_that_did_not_succeed_is_no_success_there(tmp_path: Path) -> None:
    warnings: list[tuple[str, str]] = []
    tracker = open_tracker(Settings(), _job(), tmp_path, lambda *warning: warnings.append(warning), _observe_nothing)
    tracker.finish(JobState.CANCELLED)
    assert warnings == []
    records = _records(tmp_path)
    assert next(record["exit"]["exit_code"] for record in records if record["type"] == "exit") == 1
    assert {"state": "CANCELLED"} in [r["summary"]["update"] for r in records if r["type"] == "summary"]


def test_a_tracker_that_cannot_start_warns_once_and_takes_everything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    warnings: list[tuple[str, str]] = []
    tracker = open_tracker(
        Settings(), _job(), tmp_path / "file", lambda *warning: warnings.append(warning), _observe_nothing
    )
    assert tracker.run is None
    for step in range(3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(JobState.FAILED)
    assert [reason for reason, _ in warnings] == [UNAVAILABLE]


def test_an_online_run_is_the_job_there_and_holds_no_secret(tmp_path: Path) -> None:
    secrets = {name: f"{CANARY}/{number}?&" for number, name in enumerate(("OPENAI_API_KEY", "HF_TOKEN", "ANYTHING"))}
    secrets |= {"AWS_ACCESS_KEY_ID": f"{CANARY}-id", "AWS_SECRET_ACCESS_KEY": f"{CANARY}/aws+"}
    # What W&B would listen to, were it let: every one of these breaks a promise.
    hostile = {
        "WANDB_MODE": "disabled",
        "WANDB_RUN_ID": "x",
        "WANDB_NAME": "x",
        "WANDB_PROJECT": "x",
        "WANDB_ENTITY": "x",
        "WANDB_NOTES": CANARY,
        "WANDB_TAGS": CANARY,
        "WANDB_API_KEY": "f" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_RESUME": "never",
        "WANDB_DIR": str(tmp_path / "elsewhere"),
    }
    with fake_wandb(keys={KEY}) as fake:
        heard = _track(tmp_path / "job", fake.url, **secrets, **hostile)
        (run,) = fake.runs.values()

    assert heard["run"] == {"id": "job-0001abcd", "url": f"{fake.url}/{ENTITY}/knowledge-engine/runs/job-0001abcd"}
    assert heard["warnings"] == []
    assert heard["observed"] == [["tracker", None], ["tracker", None]]
    assert (run.id, run.project, run.state, run.exit_code) == ("job-0001abcd", "knowledge-engine", "finished", 0)
    assert run.summary["state"] == "SUCCEEDED"
    assert run.config["learning_rate"]["value"] == 1e-3
    assert _global_steps(run) == [1, 2, 3, 4, 4]
    assert (
        run.history[0].items()
        >= {
            "train/loss": 3.0,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 1.0,
            "train/epoch": 0.125,
        }.items()
    )
    assert run.history[-1]["eval/loss"] == 0.5

    assert {request.key for request in fake.received if request.operation != "upload"} == {KEY}
    told = [
        f"{r.path} {[v for k, v in r.headers.items() if k != 'authorization']}".encode() + r.body for r in fake.received
    ]
    kept = [path.read_bytes() for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert kept
    for secret in (CANARY, KEY, *secrets.values()):
        for spelling in _spellings(secret):
            assert not [text for text in told + kept if spelling.encode() in text]
    for fact in (str(tmp_path).encode(), socket.gethostname().encode(), b"test_tracking"):
        assert not [text for text in told if fact in text]
    assert not (tmp_path / "elsewhere").exists()


def test_an_interrupted_run_is_no_ended_one_and_the_next_attempt_ends_it(tmp_path: Path) -> None:
    told: list[str] = []

    def watch(request: Received) -> None:
        """Keeps the first attempt's end waiting, while the second one is there already."""
        if request.operation == "UpsertBucket" and json.loads(request.body)["variables"].get("displayName"):
            told.append("begins")
        if request.operation == "file_stream" and json.loads(request.body).get("complete"):
            told.append("ends")
            asked.set()
            time.sleep(2.5 if len(told) == 2 else 0)
            told.append(f"ended while {fake.runs[_job().id].state}")

    asked = threading.Event()
    with fake_wandb(watch) as fake, ThreadPoolExecutor() as pool:
        first = pool.submit(_track, tmp_path, fake.url, "PAUSED", 1, 4)
        assert asked.wait(60)
        _track(tmp_path, fake.url, "FAILED", 1, 6)
        assert first.result()["warnings"] == []
        assert told == ["begins", "ends", "ended while running"] * 2
        (run,) = fake.runs.values()
        assert list(fake.runs) == ["job-0001abcd"]
        assert (run.state, run.summary["state"]) == ("failed", "FAILED")
        assert run.exit_code
        steps = _global_steps(run)
        assert steps == sorted(steps)
        assert set(steps) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    "rows_are_there",
    [
        pytest.param(False, id="before-a-row-was-sent"),
        pytest.param(True, id="after-rows-were-sent", marks=pytest.mark.slow),  # W&B sends them every 15 s
    ],
)
def test_a_killed_attempt_leaves_its_run_open_and_the_next_one_ends_it(tmp_path: Path, rows_are_there: bool) -> None:
    with fake_wandb() as fake:
        child = subprocess.Popen(
            _command(tmp_path, "hold", 1, 4, 20), env=_environment(fake.url), stderr=subprocess.DEVNULL
        )
        try:
            wait_for(
                lambda: any(run.history if rows_are_there else run.summary.get("state") for run in fake.runs.values())
            )
        finally:
            child.kill()
            child.wait()
        (run,) = fake.runs.values()
        assert (run.state, run.summary["state"]) == ("running", "RUNNING")
        _track(tmp_path, fake.url, "SUCCEEDED", 1, 6)
        assert (run.state, run.exit_code, run.summary["state"]) == ("finished", 0, "SUCCEEDED")
        steps = _global_steps(run)
        assert steps == sorted(steps)
        assert set(steps) == {1, 2, 3, 4, 5, 6}


def test_a_run_whose_workers_all_died_is_ended_for_them(tmp_path: Path) -> None:
    with fake_wandb() as fake:
        settings = Settings(data_dir=tmp_path, wandb_api_key=SecretStr(KEY), wandb_base_url=fake.url)
        state = State.open(settings.state_url)
        job = state.create_job(_job().spec)
        assert state.claim_job({JobKind.TRAINING: 9})
        state.set_tracker_run(job.id, 1, TrackerRun(id=job.id))
        state.bury_attempt(job.id, 1, "signal SIGKILL", 1, Reason.WORKER_CRASHED)
        state.close()
        command = [sys.executable, "-m", "knowledge_engine.worker", job.id, "1"]
        subprocess.run(command, env=_environment(fake.url, KNOWLEDGE_DATA_DIR=str(tmp_path)), check=True, timeout=120)
        run = fake.runs[job.id]
        assert (run.state, run.summary["state"], run.exit_code) == ("failed", "FAILED", 1)


def test_a_superseded_attempt_leaves_its_run_alone(tmp_path: Path) -> None:
    with fake_wandb() as fake:
        heard = _track(tmp_path, fake.url, "none")
        (run,) = fake.runs.values()
        assert heard["warnings"] == []
        assert (run.state, run.exit_code) == ("running", None)


def test_offline_attempts_are_one_run_once_synced(tmp_path: Path) -> None:
    assert _track(tmp_path, None, "QUEUED", 1, 4)["run"] == {"id": "job-0001abcd", "url": ""}
    heard = _track(tmp_path, None, "SUCCEEDED", 1, 6)
    assert (heard["warnings"], heard["observed"]) == ([], [])
    with fake_wandb() as fake:
        _sync(tmp_path, fake.url)
        (run,) = fake.runs.values()
    assert (run.id, run.state, run.summary["state"]) == ("job-0001abcd", "finished", "SUCCEEDED")
    assert _global_steps(run) == [1, 2, 3, 4, 4, 4, 5, 6, 6]
    assert [row["_step"] for row in run.history] == list(range(9))


def _refuse_file_stream(request: Received) -> int | None:
    return 401 if request.operation == "file_stream" else None


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        pytest.param(lambda _: 401, "refuses the key", id="401"),
        pytest.param(lambda _: 403, "refuses the key", id="403", marks=pytest.mark.slow),
        pytest.param(lambda _: 500, "cannot be reached", id="500", marks=pytest.mark.slow),
        pytest.param(lambda _: HANG, "cannot be reached", id="silence"),
        pytest.param(None, "cannot be reached", id="nothing-listens", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_cannot_start_online_is_kept_offline(tmp_path: Path, fault: Fault | None, sentence: str) -> None:
    with fake_wandb(fault) as fake:
        url = fake.url if fault else "http://127.0.0.1:9"
        heard = _track(tmp_path, url, patience=2)
    (warning,) = heard["warnings"]
    assert warning[0] == UNAVAILABLE
    assert sentence in warning[1]
    assert "offline" in warning[1]
    assert heard["observed"] == [["tracker", warning[1]]]
    assert heard["run"] == {"id": "job-0001abcd", "url": ""}
    (folder,) = (tmp_path / "tracking" / "wandb").glob("offline-run-*")
    assert [item["train/global_step"] for item in _history(folder)] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("end", "fault"),
    [
        pytest.param("SUCCEEDED", _refuse_file_stream, id="key-refused-later"),
        pytest.param("CANCELLED", lambda r: HANG if r.operation == "file_stream" else None, id="cancelled-in-silence"),
    ],
)
def test_a_run_that_is_cut_off_is_whole_in_the_jobs_folder(tmp_path: Path, end: str, fault: Fault) -> None:
    with fake_wandb(fault) as fake:
        heard = _track(tmp_path, fake.url, end, KNOWLEDGE_CANCEL_GRACE_SECONDS="4")
        assert heard["run"]["url"].startswith(fake.url)
        (started, (_, trouble)) = heard["observed"]
        assert started == ["tracker", None]
        assert "the job's folder" in trouble
        assert trouble in heard["log"]
        assert heard["warnings"] == []  # the job is over: its log takes none
        assert heard["finish_seconds"] < 25  # the cancelled one: who cancels wants the place
        fake.fault = None
        _sync(tmp_path, fake.url)
        (run,) = fake.runs.values()
    assert _global_steps(run) == [1, 2, 3, 4, 4]
    assert run.summary["state"] == end
    assert bool(run.exit_code) == (end != "SUCCEEDED")


@pytest.mark.parametrize(
    ("outcome", "is_cancelled", "told"),
    [
        (KnowledgeEngineError("it broke"), False, JobState.FAILED),
        (KnowledgeEngineError("it broke"), True, JobState.CANCELLED),
        (JobStopped(StopReason.INTERRUPTED), False, JobState.QUEUED),
        (JobStopped(StopReason.INTERRUPTED), True, JobState.CANCELLED),
        (JobStopped(StopReason.CANCELLED), True, JobState.CANCELLED),
        (JobStopped(StopReason.SUPERSEDED), False, None),
    ],
    ids=str,
)
def test_what_is_told_at_an_attempts_end_is_what_the_store_decided(
    tmp_path: Path, outcome: KnowledgeEngineError | JobStopped, is_cancelled: bool, told: JobState | None
) -> None:
    """Whoever cancels a job may be faster than the attempt notices."""
    settings = Settings(data_dir=tmp_path)
    state = State.open(settings.state_url)
    state.create_job(_job().spec)
    job = state.claim_job({JobKind.TRAINING: 9})
    assert job is not None
    attempt = Attempt(settings, state, job)
    attempt.work_dir.mkdir(parents=True)
    heard: list[tuple[JobState | None, JobState]] = []
    attempt.at_end(lambda left_as: heard.append((left_as, state.get_job(job.id).state)))
    if is_cancelled:
        state.request_cancel(job.id)
    attempt.tell_end(end_attempt(attempt, outcome, settings, state))
    assert heard == [(told, told or JobState.RUNNING)]
    state.close()


def test_an_attempt_that_comes_too_late_leaves_the_next_one_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    state = State.open(settings.state_url)
    state.create_job(_job().spec)
    first = state.claim_job({JobKind.TRAINING: 9})
    assert first is not None
    attempt = Attempt(settings, state, first)
    attempt.work_dir.mkdir(parents=True)
    state.abandon_attempt(first.id, first.attempt, "given up")
    assert state.claim_job({JobKind.TRAINING: 9})
    staged = Registry.open(settings).stage(first.id)
    assert end_attempt(attempt, JobStopped(StopReason.SUPERSEDED), settings, state) is None
    with pytest.raises(ConflictError):
        end_attempt(attempt, KnowledgeEngineError("it broke"), settings, state)
    assert staged.is_dir()
    state.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda _: HANG, id="silence"),
        pytest.param(lambda r: HANG if r.operation == "file_stream" else None, id="silence-later"),
        pytest.param(lambda r: 500 if r.operation == "file_stream" else None, id="500-later"),
        pytest.param(lambda _: 30.0, id="late"),
    ],
)
def test_a_bad_server_costs_a_bounded_time(tmp_path: Path, fault: Fault) -> None:
    with fake_wandb(fault) as fake:
        heard = _track(tmp_path, fake.url)
    assert heard["observed"][-1][1]
    assert heard["start_seconds"] < 45
    assert heard["finish_seconds"] < 31


@pytest.mark.parametrize(
    ("fault", "keys", "error"),
    [
        pytest.param(None, {KEY}, None, id="well"),
        pytest.param(None, set(), CredentialsError, id="key-refused"),
        pytest.param(lambda _: 403, None, CredentialsError, id="403"),
        pytest.param(lambda _: 503, None, UpstreamError, id="503"),
        pytest.param(lambda _: 302, None, UpstreamError, id="redirect"),
        pytest.param(lambda _: HANG, None, UpstreamError, id="silence"),
    ],
)
def test_probe(fault: Fault | None, keys: set[str] | None, error: type[KnowledgeEngineError] | None) -> None:
    with fake_wandb(fault, keys) as fake:
        settings = Settings(wandb_api_key=SecretStr(KEY), wandb_base_url=fake.url)
        if error is None:
            probe(settings)
            assert [request.key for request in fake.received] == [KEY]
            return
        with pytest.raises(error) as caught:
            probe(settings)
    wanted = Reason.UPSTREAM_CREDENTIALS if error is CredentialsError else Reason.TRACKER_UNREACHABLE
    assert caught.value.reason is wanted
    assert KEY not in f"{caught.value.to_dict()}{caught.value!r}"


def test_probe_of_a_null_viewer_and_of_nothing(tmp_path: Path) -> None:
    with fake_wandb() as fake:
        fake.is_anonymous = True
        with pytest.raises(CredentialsError):
            probe(Settings(wandb_api_key=SecretStr(KEY), wandb_base_url=fake.url))
    with pytest.raises(UpstreamError):
        probe(Settings(wandb_api_key=SecretStr(KEY), wandb_base_url=fake.url))
    probe(Settings())


def test_wandb_is_imported_by_a_tracker_only() -> None:
    code = (
        "import sys, knowledge_engine.tracking; sys.exit(bool({'wandb', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
