"""The command line against a running service: results on stdout, talk on stderr, exit codes that mean something."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from knowledge_engine import __version__
from knowledge_engine.catalogue import DEMO_CATALOGUE
from knowledge_engine.cli import app
from knowledge_engine.cli.progress import JobView
from knowledge_engine.client import Client
from knowledge_engine.core import Checkpoint, EventPayload, JobEvent, JobState, Progress, StateChange
from knowledge_engine.v1 import jobs_pb2, training_pb2
from tests.fakes_server import scripted_server
from tests.running import Service, end, environment, is_serving, start, wait_until
from tests.tiny import build_tiny_base

KEY = "a-key-for-the-tests"
PRODUCTS = [
    {"id": f"p{n}", "title": f"Kettle {n}", "price": 20 + n, "currency": "EUR", "category": "Kitchen", "brand": "Korvo"}
    for n in range(3)
]
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"a kettle {n}?"}, {"role": "assistant", "content": f"Kettle {n}."}]}
    for n in range(12)
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    base = build_tiny_base(tmp_path_factory.mktemp("base"))
    running = start(tmp_path_factory.mktemp("data"), base, KNOWLEDGE_API_KEYS=f"tests:{KEY}")
    yield running
    end(running)


@pytest.fixture
def catalogue(client_names: None) -> str:
    """The shipped catalogue, uploaded."""
    read("data", "upload", "shop", str(DEMO_CATALOGUE), "--kind", "catalogue")
    return "shop"


@pytest.fixture
def client_names(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWLEDGE_SERVER", service.grpc_address)
    monkeypatch.setenv("KNOWLEDGE_API_KEY", KEY)


def call(*words: str, code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(words), input=stdin)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert "\x1b" not in result.stdout + result.stderr, "no colour off a terminal"
    return result


def read(*words: str, code: int = 0) -> dict[str, Any]:
    """What `--json` prints: exactly one object."""
    lines = call(*words, "--json", code=code).stdout.splitlines()
    assert len(lines) == 1
    value = json.loads(lines[0])
    assert isinstance(value, dict)
    return value


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def process(service: Service, *words: str, **streams: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "knowledge_engine.cli", *words],
        env=os.environ | {"KNOWLEDGE_SERVER": service.grpc_address, "KNOWLEDGE_API_KEY": KEY},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
    )


# --- without a service --------------------------------------------------------------------------------------------


def test_help_is_quick_and_lists_the_exit_codes() -> None:
    code = (
        "import sys; sys.argv = ['knowledge-engine', '--help']\n"
        "from knowledge_engine.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'sqlalchemy', 'grpc', 'pydantic_settings'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    words = " ".join(done.stdout.split())
    assert all(f"{code} {meaning}" in words for code, meaning in [(2, "usage"), (4, "not found"), (130, "interrupted")])


def test_version() -> None:
    assert call("--version").stdout == f"knowledge-engine {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [("jobs", "wach"), ("train",), ("chat",), ("data", "generate", "-n", "many"), ("models", "delete", "x", "--yes")],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(words: tuple[str, ...]) -> None:
    assert call(*words, code=2).stdout == ""


def test_no_service_is_exit_code_11(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("health", "--server", "127.0.0.1:1", code=11)
    assert result.stdout == ""
    assert "127.0.0.1:1" in result.stderr
    assert "[SERVER_UNAVAILABLE]" in result.stderr


@pytest.mark.parametrize("words", [("serve",), ("serve", "--only", "engine"), ("demo",)], ids=" ".join)
def test_bad_setting_is_exit_code_3(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWLEDGE_GRPC_ADRESS", "127.0.0.1:1")
    result = call(*words, code=3)
    assert "KNOWLEDGE_GRPC_ADDRESS" in result.stderr, "says what was probably meant"
    assert len(result.stderr.splitlines()) == 1


def test_demo_online_without_a_key_names_the_keys(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "knowledge_engine.cli", "demo", "--online"],
        env=environment(tmp_path, tmp_path / "no-base"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert "KNOWLEDGE_WANDB_API_KEY" in done.stderr
    assert "KNOWLEDGE_OPENAI_API_KEY" in done.stderr


@pytest.mark.parametrize("is_terminal", [False, True], ids=["plain", "bars"])
def test_a_paused_job_is_told_once_and_takes_up_its_bars_again(is_terminal: bool) -> None:
    out = io.StringIO()
    training = Progress(phase="training", step=5, total_steps=10, eta_seconds=60)
    payloads: list[EventPayload] = [
        StateChange(state=JobState.RUNNING, attempt=1),
        training,
        Checkpoint(step=5, size_bytes=3 * 2**20),
        StateChange(state=JobState.PAUSED, attempt=1),
        StateChange(state=JobState.QUEUED, attempt=1),
        StateChange(state=JobState.RUNNING, attempt=2),
        training,
    ]
    console = Console(file=out, width=120, force_terminal=is_terminal, force_interactive=is_terminal, highlight=False)
    with JobView("j", output=console) as view:
        for number, payload in enumerate(payloads, 1):
            event = JobEvent(
                job_id="job-1", sequence=number, create_time=datetime(2030, 1, 1, tzinfo=UTC), payload=payload
            )
            view.show(event)
    text = out.getvalue()
    assert text.count("PAUSED") == 1
    assert text.count("`knowledge-engine jobs resume job-1` goes on with it") == 1
    assert "checkpoint at step 5 (3.0 MiB)" in text
    if not is_terminal:
        assert text.count("j: training 5/10 1:00 left") == 2, "a phase that goes on is told again"


async def test_an_estimate_that_does_not_fit_is_exit_code_1_and_names_what_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimate = training_pb2.TrainingEstimate(
        memory=training_pb2.TrainingEstimate.MemoryRange(low_bytes=2**30, expected_bytes=2**31, high_bytes=2**32),
        device="cpu",
        total_memory_bytes=2**30,
        held_memory_bytes={"engine": 2**29},
        num_steps=1200,
        refusal="it takes 2 GiB and 1 GiB is there",
    )
    estimate.nearest_spec.MergeFrom(
        training_pb2.TrainingSpec(
            dataset="datasets/d",
            model="models/m",
            use_qlora=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            lora=training_pb2.LoraConfig(rank=8, target_modules=["q_proj", "v_proj"]),
        )
    )
    async with scripted_server() as server:
        monkeypatch.setenv("KNOWLEDGE_SERVER", server.address)
        server.script["EstimateTrainingJob"] = jobs_pb2.EstimateTrainingJobResponse(estimate=estimate)
        words = ("train", "--dataset", "d", "--model", "m", "--no-qlora", "--batch-size", "8", "--estimate")
        told = (await asyncio.to_thread(call, *words, "--save-steps", "5", "--auto-find-batch-size", code=1)).stdout
        asked = server.received[-1].request.spec
        assert (asked.save_steps, asked.auto_find_batch_size, asked.per_device_train_batch_size) == (5, True, 8)
        plain = await asyncio.to_thread(read, *words, code=1)
        estimate.nearest_spec.Clear()
        estimate.ClearField("nearest_spec")
        estimate.fits, estimate.refusal = True, ""
        estimate.training_time.FromSeconds(7500)
        server.script["EstimateTrainingJob"] = jobs_pb2.EstimateTrainingJobResponse(estimate=estimate)
        fitting = (await asyncio.to_thread(call, *words)).stdout
    assert "no: it takes 2 GiB and 1 GiB is there" in told
    assert "2.0 GiB (1.0 GiB to 4.0 GiB)" in told
    assert "engine 512.0 MiB" in told
    (line,) = [line for line in told.splitlines() if line.startswith("would fit")]
    assert all(
        option in line
        for option in ("--qlora", "--batch-size 2", "--accumulation 4", "--lora-rank 8", "--target-module v_proj")
    )
    assert "not known before the first run" in told
    assert (plain["fits"], plain["nearest_spec"]["per_device_train_batch_size"]) == (False, 2)
    assert "about 2 h 5 min" in fitting
    assert "would fit" not in fitting


# --- with one -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("client_names")
def test_health() -> None:
    assert read("health")["status"] == "SERVING"
    assert "overall" in call("health").stdout


@pytest.mark.parametrize("words", [("--only", "server"), ("--local", "--server", "127.0.0.1:1")], ids=" ".join)
def test_health_takes_no_words_that_would_change_nothing(words: tuple[str, ...]) -> None:
    assert "--local" in call("health", *words, code=2).stderr


@pytest.mark.parametrize("key", ["", "a-key-nobody-knows"], ids=["missing", "unknown"])
def test_bad_key_is_exit_code_8(service: Service, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWLEDGE_API_KEY", key)
    result = call("jobs", "list", "--server", service.grpc_address, code=8)
    assert "[API_KEY_" in result.stderr
    assert "a-key-nobody-knows" not in result.stderr
    call("health", "--server", service.grpc_address)  # health asks for none


@pytest.mark.usefixtures("client_names")
@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("jobs", "show", "nothing"), 4, "JOB_NOT_FOUND"),
        (("jobs", "watch", "nothing"), 4, "JOB_NOT_FOUND"),
        (("data", "show", "nothing"), 4, "DATASET_NOT_FOUND"),
        (("models", "show", "nothing"), 4, "MODEL_NOT_FOUND"),
        (("models", "show", "nothing:2"), 4, "MODEL_NOT_FOUND"),
        (("jobs", "show", "../../etc/passwd"), 3, "NAME_INVALID"),
        (("chat", "nothing", "hello"), 4, "MODEL_NOT_FOUND"),
        (("train", "--dataset", "nothing", "--model", "m"), 4, "DATASET_NOT_FOUND"),
        (("train", "--dataset", "d", "--model", "base"), 3, "SPEC_INVALID"),
        (("train", "--dataset", "d", "--model", "m", "--lora-rank", "0"), 3, "SPEC_INVALID"),
        (("train", "--dataset", "d", "--model", "m", "--save-steps", "-1"), 3, "SPEC_INVALID"),
        (("train", "--dataset", "nothing", "--model", "m", "--estimate"), 4, "DATASET_NOT_FOUND"),
        (("jobs", "pause", "nothing"), 4, "JOB_NOT_FOUND"),
        (("jobs", "resume", "nothing"), 4, "JOB_NOT_FOUND"),
        (("data", "generate", "-n", "1"), 3, "SPEC_INVALID"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_error_is_one_line_and_its_exit_code(words: tuple[str, ...], code: int, reason: str) -> None:
    result = call(*words, code=code)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert f"[{reason}]" in result.stderr


@pytest.mark.usefixtures("client_names")
def test_violations_are_named() -> None:
    stderr = call("train", "--dataset", "d", "--model", "m", "--lora-rank", "0", "--seed", "-1", code=3).stderr
    assert "spec.lora.rank" in stderr
    assert "spec.seed" in stderr


@pytest.mark.usefixtures("client_names")
def test_dataset_from_upload_to_deletion(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "talks.jsonl", CONVERSATIONS)
    stored = read("data", "upload", "talks-1", file)
    assert (stored["name"], stored["kind"], stored["num_rows"]) == ("talks-1", "conversations", 12)
    assert read("data", "show", "talks-1") == stored
    assert stored in read("data", "list")["datasets"]
    assert read("data", "list", "--limit", "1")["datasets"] == [stored]
    assert "talks-1" in call("data", "list").stdout
    assert stored["digest"] in call("data", "show", "talks-1").stdout
    refused = call("data", "delete", "talks-1", code=2)
    assert "--yes" in refused.stderr
    assert read("data", "delete", "talks-1", "--yes") == {"deleted": "talks-1"}
    call("data", "show", "talks-1", code=4)


@pytest.mark.usefixtures("client_names")
def test_broken_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(CONVERSATIONS[0]) + "\nnot json\n")
    stderr = call("data", "upload", "broken", str(path), code=3).stderr
    assert "[DATASET_FORMAT_INVALID]" in stderr
    assert "line 2" in stderr
    call("data", "show", "broken", code=4)


@pytest.mark.usefixtures("client_names")
def test_csv_catalogue_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    path.write_text(
        "id,title,price,currency,category,brand\na,Kettle,20.00,EUR,Kitchen,Korvo\nb,Pan,30.00,EUR,Kitchen,Tavola\n"
    )
    assert read("data", "upload", "csv-shop", str(path), "--kind", "catalogue")["num_rows"] == 2
    assert (
        "DATASET_EXISTS" in call("data", "upload", "csv-shop", str(_other(path)), "--kind", "catalogue", code=5).stderr
    )


def _other(path: Path) -> Path:
    other = path.with_name("other.csv")
    other.write_text(path.read_text().replace("20.00", "21.00"))
    return other


def test_generation_is_followed_to_its_end(catalogue: str) -> None:
    result = call(
        "data", "generate", "--catalogue", catalogue, "-n", "12", "--dataset", "generated", "--seed", "7", "--json"
    )
    job = json.loads(result.stdout)
    assert (job["state"], job["result"]["dataset"], job["result"]["num_conversations"]) == (
        "SUCCEEDED",
        "generated",
        12,
    )
    assert "SUCCEEDED" in result.stderr, "progress is told beside the result"
    assert read("data", "show", "generated")["job_id"] == job["id"]
    events = [json.loads(line) for line in call("jobs", "watch", job["id"], "--json").stdout.splitlines()]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["payload"] == events[-1]["payload"] | {"type": "state_change", "state": "SUCCEEDED"}
    late = call("jobs", "watch", job["id"], "--after", str(len(events) - 1), "--json").stdout.splitlines()
    assert [json.loads(line) for line in late] == events[-1:]
    assert read("jobs", "show", job["id"]) == job
    assert job in read("jobs", "list")["jobs"]
    assert job["id"] in call("jobs", "list").stdout
    assert "generated" in call("jobs", "show", job["id"]).stdout
    assert "[JOB_ENDED]" in call("jobs", "cancel", job["id"], "--yes", code=6).stderr


def test_detached_job_can_be_cancelled(catalogue: str) -> None:
    job = read("data", "generate", "--catalogue", catalogue, "-n", "100000", "--dataset", "endless", "--detach")
    assert job["state"] in ("QUEUED", "RUNNING")
    call("jobs", "cancel", job["id"], code=2)
    assert read("jobs", "cancel", job["id"], "--yes")["state"] in ("CANCELLING", "CANCELLED")
    assert "CANCELLED" in call("jobs", "watch", job["id"], code=1).stderr


def test_a_watch_waits_for_a_paused_job_over_a_kill_of_the_server(service: Service, catalogue: str) -> None:
    job = read("data", "generate", "--catalogue", catalogue, "-n", "100000", "--dataset", "patient", "--detach")["id"]
    following = process(service, "jobs", "watch", job)
    reading = process(service, "jobs", "watch", job, "--json")
    assert following.stderr is not None
    assert reading.stdout is not None
    try:
        begun = [reading.stdout.readline(), following.stderr.readline()]  # they are connected
        for _ in range(2):
            paused = read("jobs", "pause", job)
            assert paused["state"] == "PAUSED" or paused["pause_requested"]
        wait_until(lambda: read("jobs", "show", job)["state"] == "PAUSED")
        assert "PAUSED" in call("jobs", "list").stdout
        before = service.part("server")
        assert before is not None
        before.kill()
        time.sleep(1)
        assert following.poll() is None
        assert reading.poll() is None
        wait_until(lambda: is_serving(service) and service.part("server") != before)
        assert read("jobs", "show", job)["state"] == "PAUSED"
        assert read("jobs", "resume", job)["state"] in ("QUEUED", "RUNNING")
        call("jobs", "cancel", job, "--yes")
        assert reading.stderr is not None
        # Not `communicate`: it would miss what was read ahead with the first line.
        rest, talk, told = reading.stdout.read(), reading.stderr.read(), following.stderr.read()
        for watching in (following, reading):
            watching.wait(90)
    finally:
        for watching in (following, reading):
            watching.kill()
            watching.communicate()
    events = [json.loads(line) for line in (begun[0] + rest).splitlines()]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["payload"]["state"] == "CANCELLED"
    assert (following.returncode, reading.returncode) == (1, 1)
    for text in (talk, told):
        assert text.count("reconnecting ...") == 1
        assert "Traceback" not in text
    assert told.count("PAUSED") == 1
    assert f"`knowledge-engine jobs resume {job}`" in told
    assert "[JOB_ENDED]" in call("jobs", "pause", job, code=6).stderr
    assert "[JOB_ENDED]" in call("jobs", "resume", job, code=6).stderr


@pytest.mark.usefixtures("client_names")
def test_an_estimate_and_the_place_in_the_queue(service: Service, tmp_path: Path) -> None:
    read("data", "upload", "talks-3", write_rows(tmp_path / "talks.jsonl", CONVERSATIONS))
    train = ("train", "--dataset", "talks-3", "--model", "waiting", "--max-steps", "100000")
    estimate = read(*train, "--estimate")
    assert (estimate["fits"], estimate["num_steps"], estimate["nearest_spec"]) == (True, 100_000, None)
    assert estimate["memory"]["low_bytes"] < estimate["memory"]["expected_bytes"] < estimate["memory"]["high_bytes"]
    told = call(*train, "--estimate").stdout
    assert "100,000" in told
    assert "fits" in told
    first = read(*train, "--save-steps", "1", "--auto-find-batch-size", "--detach")
    assert (first["spec"]["save_steps"], first["spec"]["auto_find_batch_size"]) == (1, True)
    wait_until(lambda: read("jobs", "show", first["id"])["state"] == "RUNNING")
    waiting = [read(*train, "--detach")["id"] for _ in range(2)]
    assert [read("jobs", "show", job)["queue_position"] for job in waiting] == [1, 2]
    assert "QUEUED, place 2" in call("jobs", "list").stdout
    assert "QUEUED, place 1" in call("jobs", "show", waiting[0]).stdout
    for job in waiting:
        assert read("jobs", "cancel", job, "--yes")["state"] == "CANCELLED"
    wait_until(lambda: read("jobs", "show", first["id"])["checkpoint_step"], seconds=120)
    assert "checkpoint" in call("jobs", "show", first["id"]).stdout
    read("jobs", "pause", first["id"])
    wait_until(lambda: read("jobs", "show", first["id"])["state"] == "PAUSED")
    with Client(service.grpc_address, KEY) as client:
        events = [event.payload for event, _ in zip(client.watch_job(first["id"]), range(6), strict=False)]
    assert any(isinstance(event, Progress | StateChange) for event in events)
    assert read("jobs", "cancel", first["id"], "--yes")["state"] == "CANCELLED"
    lines = call("jobs", "watch", first["id"], code=1).stderr.splitlines()
    assert any("checkpoint at step" in line for line in lines)


@pytest.mark.usefixtures("client_names")
def test_trained_model_is_listed_talked_to_and_deleted(tmp_path: Path) -> None:
    read("data", "upload", "talks-2", write_rows(tmp_path / "talks.jsonl", CONVERSATIONS))
    train = ("train", "--dataset", "talks-2", "--model", "helper", "--max-steps", "2", "--batch-size", "4")
    job = read(*train, "--lora-rank", "2", "--learning-rate", "0.01", "--no-qlora")
    assert job["state"] == "SUCCEEDED"
    assert job["spec"]["lora"]["rank"] == 2
    assert job["spec"]["use_qlora"] is False
    result = job["result"]
    assert (result["model"], result["version"], result["num_steps"]) == ("helper", 1, 2)
    (model,) = [model for model in read("models", "list")["models"] if model["name"] == "helper"]
    assert model == read("models", "show", "helper")
    version = read("models", "show", "helper:1")
    assert version["digest"] == result["digest"]
    assert read("models", "versions", "helper") == {"model_versions": [version]}
    assert all("helper" in call("models", *words).stdout for words in (("list",), ("show", "helper")))
    answer = call("chat", "helper:1", "a kettle?", "--temperature", "0", "--max-tokens", "4", "--json").stdout
    assert json.loads(answer.splitlines()[-1])["completion"]["digest"] == version["digest"]
    call("models", "delete", "helper:1", code=2)
    assert read("models", "delete", "helper:1", "--yes") == {"deleted": "helper:1"}
    call("models", "show", "helper:1", code=4)


@pytest.mark.usefixtures("client_names")
def test_chat_streams_pieces_and_then_the_facts(tmp_path: Path) -> None:
    wait_until(lambda: read("health")["services"]["InferenceService"] == "SERVING", seconds=120)
    words = ("chat", "base", "hello", "--temperature", "0", "--max-tokens", "6")
    lines = [json.loads(line) for line in call(*words, "--json").stdout.splitlines()]
    text = "".join(line["text_delta"] for line in lines[:-1])
    completion = lines[-1]["completion"]
    assert completion["model"] == "base"
    assert completion["completion_tokens"] <= 6
    assert call(*words).stdout == f"{text}\n"
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"products": PRODUCTS}))
    told = call(*words, "--context", str(context), "--system", "Be brief.", "--json").stdout.splitlines()
    assert json.loads(told[-1])["completion"]["prompt_tokens"] > completion["prompt_tokens"]
    two = call("chat", "base", "--temperature", "0", "--max-tokens", "6", stdin="hello\n\nand now?\n").stdout
    assert two.startswith(f"{text}\n")
    assert len(two) > len(text) + 1, "the second turn was answered too"
    context.write_text("[1]")
    assert "one JSON object" in call(*words, "--context", str(context), code=2).stderr
    assert "input.temperature" in call("chat", "base", "hello", "--temperature", "3", code=3).stderr
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "find"}}]))
    assert "TOOLS_UNSUPPORTED" in call(*words, "--tools", str(tools), code=3).stderr
    assert "needs a question" in call("chat", "base", "--tools", str(tools), code=2).stderr
    tools.write_text("[5]")
    assert "tools[0]" in call(*words, "--tools", str(tools), code=3).stderr
    tools.write_text("{}")
    assert "one JSON list" in call(*words, "--tools", str(tools), code=2).stderr


def test_interrupting_a_watch_leaves_the_job_running(service: Service, catalogue: str) -> None:
    job = read("data", "generate", "--catalogue", catalogue, "-n", "100000", "--dataset", "long", "--detach")["id"]
    watching = process(service, "jobs", "watch", job, "--json")
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["sequence"] == 1
    watching.send_signal(signal.SIGINT)
    _, stderr = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert "Traceback" not in stderr
    assert read("jobs", "show", job)["state"] in ("QUEUED", "RUNNING")
    call("jobs", "cancel", job, "--yes")


@pytest.mark.usefixtures("client_names")
def test_interrupting_an_answer_is_exit_code_130(service: Service) -> None:
    wait_until(lambda: read("health")["services"]["InferenceService"] == "SERVING", seconds=120)
    words = ("chat", "base", "hello", "--json", "--temperature", "2", "--top-p", "1", "--max-tokens", "900")
    chatting = process(service, *words)
    assert chatting.stdout is not None
    assert "text_delta" in json.loads(chatting.stdout.readline())
    chatting.send_signal(signal.SIGINT)
    _, stderr = chatting.communicate(timeout=30)
    assert chatting.returncode == 130
    assert "Traceback" not in stderr
    assert is_serving(service)


@pytest.mark.usefixtures("client_names")
def test_terminal_is_asked_before_anything_is_destroyed(service: Service, tmp_path: Path) -> None:
    read("data", "upload", "kept", write_rows(tmp_path / "talks.jsonl", CONVERSATIONS))
    for answer, code in (("n", 1), ("y", 0)):
        terminal, end_of_process = pty.openpty()
        asked = process(service, "data", "delete", "kept", stdin=end_of_process, stderr=end_of_process)
        os.write(terminal, f"{answer}\n".encode())
        assert asked.wait(60) == code
        assert b"Delete dataset kept?" in os.read(terminal, 4096)
        os.close(end_of_process)
        os.close(terminal)
        assert asked.stdout is not None
        asked.stdout.close()
    call("data", "show", "kept", code=4)
