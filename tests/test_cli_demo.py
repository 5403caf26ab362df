"""The demo from nothing to an answer, a second time from what it left, and interrupted: with a tiny base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.running import environment, wait_until

FIELDS = {
    "base_loss",
    "tuned_loss",
    "train_tokens_per_second",
    "conversations_generated",
    "conversations_rejected",
    "model",
    "version",
    "digest",
    "seconds",
    "peak_memory_bytes",
}


def start(folder: Path, base: Path, *words: str, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "knowledge_engine.cli", "demo", *words],
        env=environment(folder, base, **settings),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, base: Path, *words: str) -> tuple[dict[str, Any], str]:
    """One run with `--json`: its object, and what it said."""
    keys = {"KNOWLEDGE_WANDB_API_KEY": "must-not-be-used", "KNOWLEDGE_OPENAI_API_KEY": "must-not-be-used"}
    nowhere = dict.fromkeys(("KNOWLEDGE_OPENAI_BASE_URL", "KNOWLEDGE_WANDB_BASE_URL"), "http://127.0.0.1:9")
    process = start(folder, base, "--json", *words, **keys, **nowhere)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    (line,) = stdout.splitlines()
    assert "\x1b" not in stderr
    assert "must-not-be-used" not in stderr + stdout
    summary: dict[str, Any] = json.loads(line)
    assert summary.keys() == FIELDS
    return summary, stderr


@pytest.mark.timeout(600)
def test_second_demo_reuses_what_the_first_one_made(tmp_path: Path, tiny_base: Path) -> None:
    first, told = run(tmp_path, tiny_base)
    assert first["tuned_loss"] < first["base_loss"]
    assert (first["model"], first["version"]) == ("demo-assistant", 1)
    assert first["conversations_generated"] >= 100
    assert first["peak_memory_bytes"] > 100 * 2**20
    assert "Fine-tuning" in told
    assert "grpcurl" in told
    assert "costs money" not in told
    second, told = run(tmp_path, tiny_base, "--online")
    measured_anew = ("seconds", "peak_memory_bytes")
    assert {key: value for key, value in second.items() if key not in measured_anew} == {
        key: value for key, value in first.items() if key not in measured_anew
    }
    assert "Fine-tuning" not in told
    assert "Generating" not in told
    assert "costs money" not in told  # nothing is generated, so nothing is paid for


@pytest.mark.parametrize("moment", ["The service is up", "training: RUNNING"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["ctrl-c", "kill-9"])
def test_interrupted_demo_leaves_no_process(
    tmp_path: Path, tiny_base: Path, moment: str, number: signal.Signals, code: int
) -> None:
    process = start(tmp_path, tiny_base, "--json", KNOWLEDGE_ORPHAN_GRACE_SECONDS="2")
    assert process.stderr is not None
    for line in process.stderr:
        if moment in line:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == ""
    assert "Traceback" not in stderr
    wait_until(lambda: not [child for child in family if child.is_running()], seconds=40)
    assert not [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("KNOWLEDGE_DATA_DIR") == str(tmp_path)
    ]
