"""W&B for real: offline runs read back with its own inspector, and trouble that must not reach training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from knowledge_engine.core import Job, JobKind, JobState, TrainingSpec, utc_now
from knowledge_engine.settings import Settings
from knowledge_engine.tracking import UNAVAILABLE, open_tracker

CANARY = "canary-5f2c9e"
KEY = "0123456789" * 4  # the shape of a W&B key


def _job(job_id: str = "job-0001abcd") -> Job:
    spec = TrainingSpec(dataset="talks", model="shop", learning_rate=1e-3)
    return Job(id=job_id, kind=JobKind.TRAINING, state=JobState.RUNNING, spec=spec, create_time=utc_now())


def _records(folder: Path) -> list[dict[str, Any]]:
    """What W&B itself reads from the one run below `folder`."""
    (log,) = folder.rglob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def _history(folder: Path) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in _records(folder) if record["type"] == "history"]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_offline_run_holds_the_metrics_the_spec_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)  # the environment, where secrets live
    monkeypatch.setattr(sys, "argv", ["train", f"--key={CANARY}"])  # a command line with one
    warnings: list[tuple[str, str]] = []
    settings = Settings(openai_api_key=SecretStr(CANARY), api_keys=SecretStr(f"me:{CANARY}"))

    tracker = open_tracker(settings, _job(), tmp_path, lambda *warning: warnings.append(warning))
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
    tracker = open_tracker(Settings(), _job(), tmp_path)
    tracker.finish(JobState.CANCELLED)
    records = _records(tmp_path)
    assert next(record["exit"]["exit_code"] for record in records if record["type"] == "exit") == 1
    assert {"state": "CANCELLED"} in [r["summary"]["update"] for r in records if r["type"] == "summary"]


def test_a_tracker_that_cannot_start_warns_once_and_takes_everything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    warnings: list[tuple[str, str]] = []
    tracker = open_tracker(Settings(), _job(), tmp_path / "file", lambda *warning: warnings.append(warning))
    assert tracker.run is None
    for step in range(3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(JobState.FAILED)
    assert [reason for reason, _ in warnings] == [UNAVAILABLE]


def test_without_an_answer_from_wandb_the_run_is_kept_offline(tmp_path: Path, silent_server: str) -> None:
    # A process of its own, as every worker is: W&B reads its environment once.
    code = """
import json, sys
from pathlib import Path
from pydantic import SecretStr
from knowledge_engine.core import JobState
from knowledge_engine.settings import Settings
from knowledge_engine.tracking import open_tracker
from tests.test_tracking import KEY, _job

warnings = []
tracker = open_tracker(
    Settings(wandb_api_key=SecretStr(KEY)),
    _job(),
    Path(sys.argv[1]),
    lambda *warning: warnings.append(warning),
    online_start_seconds=3,
)
tracker.log({"train/loss": 1.0}, 1)
tracker.finish(JobState.SUCCEEDED)
print(json.dumps([warnings, tracker.run and tracker.run.url]))
"""
    root = Path(__file__).parent.parent
    # Not this process's environment: W&B leaves there how children can join its service.
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environment |= {"WANDB_BASE_URL": silent_server, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=150)

    warnings, url = json.loads(done.stdout)
    assert [reason for reason, _ in warnings] == [UNAVAILABLE]
    assert "offline" in warnings[0][1]
    assert url == ""
    assert KEY not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    offline = [path.parent for path in tmp_path.rglob("*.wandb") if "offline" in path.parent.name]
    assert [item["train/loss"] for folder in offline for item in _history(folder)] == [1.0]


def test_wandb_is_imported_by_a_tracker_only() -> None:
    code = (
        "import sys, knowledge_engine.tracking; sys.exit(bool({'wandb', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
