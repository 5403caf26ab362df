"""Canaries in every key: whatever the service does and however it fails, none of them is seen again.

One real service (supervised, with engine, workers, W&B client, S3 client) works through successes and failures with
servers that quote the keys back at it. Then everything it wrote, said, sent and showed is searched.
"""

from __future__ import annotations

import base64
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from knowledge_engine.catalogue import DEMO_CATALOGUE
from knowledge_engine.client import Client
from knowledge_engine.core import (
    DatasetFormat,
    DatasetKind,
    GenerationProvider,
    GenerationSpec,
    Job,
    JobState,
    LoraConfig,
    TrainingSpec,
)
from knowledge_engine.errors import KnowledgeEngineError
from tests.fake_openai import FakeOpenAI, Request, Scripted
from tests.fake_wandb import FakeWandb, Received, fake_wandb
from tests.running import Service, end, start, wait_until
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, seaweed
from tests.tiny import build_tiny_base

CANARIES = {
    "api key": "canary-caller-7c1f+/=2b9e",
    "openai": "sk-canary-openai-51d0+/=8e77aa",
    "wandb": "ca9a49caa9d1c0ffee5ec4e7ca9a49caa9d1c0ff",
    "huggingface": "hf_canaryHuggingFace93c2b1",
    "s3 secret": SECRET_KEY,
}


def disguises(secret: str) -> dict[str, bytes]:
    """The forms in which a secret may hide; in base64 also within something longer, at any of its three offsets."""
    plain = secret.encode()
    forms = {
        "plain": plain,
        "url": urllib.parse.quote(secret, safe="").encode(),
        "json": json.dumps(secret).strip('"').encode(),
        "hex": plain.hex().encode(),
    }
    for offset in range(3):
        whole = base64.b64encode(b"\0" * offset + plain + b"\0" * (-(len(plain) + offset) % 3))
        inner = whole[4 if offset else 0 : len(whole) - 4]
        forms[f"base64 at {offset}"] = inner
        forms[f"url-safe base64 at {offset}"] = inner.replace(b"+", b"-").replace(b"/", b"_")
    return forms


def find_secrets(content: bytes) -> list[str]:
    return [
        f"{name} ({form})"
        for name, secret in CANARIES.items()
        for form, text in disguises(secret).items()
        if text in content
    ]


def test_the_search_finds_what_it_looks_for() -> None:
    for name, secret in CANARIES.items():
        for prefix in (b"", b"a", b"bc", b"api:"):
            hidden = base64.b64encode(prefix + secret.encode() + b" and more")
            assert any(found.startswith(name) for found in find_secrets(b"x" + hidden)), (name, prefix)
        assert f"{name} (plain)" in find_secrets(f"the key {secret}!".encode())
        assert f"{name} (url)" in find_secrets(urllib.parse.quote(f"u={secret}", safe="").encode())
    assert not find_secrets(b"nothing of the kind: canary, hf_, sk-")


class Watched:
    """Everything that came to light, by where it did."""

    def __init__(self) -> None:
        self.said: dict[str, bytes] = {}

    def add(self, where: str, content: str | bytes) -> None:
        self.said[where] = self.said.get(where, b"") + (content.encode() if isinstance(content, str) else content)


@contextmanager
def command_lines(service: Service, watched: Watched) -> Iterator[None]:
    """Notes the arguments of every process of the service, however short its life."""
    over = threading.Event()
    seen: set[str] = set()

    def look() -> None:
        while not over.is_set():
            try:
                family = [psutil.Process(service.process.pid), *service.family()]
            except psutil.Error:
                return
            for process in family:
                try:
                    seen.add("\0".join(process.cmdline()))
                except psutil.Error:
                    continue
            over.wait(0.02)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        assert any("knowledge_engine.worker" in line for line in seen), "the look-out saw no worker"
        watched.add("command lines", "\n".join(seen))


@contextmanager
def refusing_hub(token: str) -> Iterator[str]:
    """A hub that refuses everybody and quotes the token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"error": f"Invalid credentials {token}"}).encode()
            self.send_response(401)
            self.send_header("X-Error-Message", f"Invalid credentials {token}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the library's name

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def quoting(status: int) -> Any:
    """An OpenAI that refuses and quotes the key, as the real one does in part."""

    def answer(request: Request) -> Scripted:
        message = f"Incorrect API key provided: {CANARIES['openai']}."
        return Scripted(status, {"error": {"message": message, "type": "invalid_request_error", "code": "bad"}})

    return answer


def finish(client: Client, job: Job, watched: Watched) -> Job:
    for event in client.watch_job(job.id):
        watched.add("events", event.model_dump_json())
    ended = client.get_job(job.id)
    watched.add("jobs", ended.model_dump_json())
    return ended


def training(dataset: str, **changes: Any) -> TrainingSpec:
    values = {"dataset": dataset, "model": "m", "max_steps": 2, "eval_split": 0.2, "lora": LoraConfig(rank=2, alpha=4)}
    return TrainingSpec(**values | changes)


def work(
    client: Client,
    rest: httpx2.Client,
    watched: Watched,
    openai: FakeOpenAI,
    wandb: FakeWandb,
    s3: Seaweed,
    bucket: str,
) -> None:
    """Good and bad days with everyone outside."""
    catalogue = DEMO_CATALOGUE.read_bytes()
    client.upload_dataset("shop", catalogue, kind=DatasetKind.CATALOGUE, format=DatasetFormat.JSONL)
    generation = GenerationSpec(
        catalogue="shop", dataset="chats", num_conversations=12, provider=GenerationProvider.OPENAI
    )
    assert finish(client, client.create_generation_job(generation), watched).state is JobState.SUCCEEDED
    for number, status in enumerate((401, 400, 402)):
        openai.script = quoting(status)
        spec = generation.model_copy(update={"dataset": f"failed-{number}"})
        assert finish(client, client.create_generation_job(spec), watched).state is JobState.FAILED
    openai.script = None

    trained = finish(client, client.create_training_job(training("chats")), watched)
    assert trained.state is JobState.SUCCEEDED, trained.error
    assert s3.keys(bucket)
    for key in s3.keys(bucket):
        watched.add("bucket", s3.read(bucket, key))

    refused = finish(client, client.create_training_job(training("chats", base_model="gated")), watched)
    assert refused.error is not None
    assert refused.error["reason"] == "UPSTREAM_CREDENTIALS"

    def reject(request: Received) -> int | None:
        return 401

    wandb.fault = reject
    for key in s3.keys(bucket):
        s3.client.delete_object(Bucket=bucket, Key=key)
    s3.client.delete_bucket(Bucket=bucket)
    lost = finish(client, client.create_training_job(training("chats", seed=7)), watched)
    assert lost.error is not None
    assert lost.error["reason"] == "STORAGE_UNREACHABLE"

    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    for path, body in (
        ("/api/v1/models/base/inference", json.dumps(ask)),
        ("/api/v1/models/none/inference", json.dumps(ask)),
        ("/api/v1/models/base/inference", "{"),
        ("/api/v1/train", json.dumps({"dataset_name": "none"})),
    ):
        answer = rest.post(path, content=body, headers={"Content-Type": "application/json"})
        watched.add("answers", f"{answer.status_code} {answer.headers} {answer.text}")
    for path in ("/api/v1/health", "/api/v1/jobs", "/api/v1/models", "/openapi.json", "/nothing"):
        answer = rest.get(path)
        watched.add("answers", f"{answer.status_code} {answer.headers} {answer.text}")
    wrong = rest.get("/api/v1/jobs", headers={"Authorization": f"Bearer {CANARIES['api key']}x"})
    assert wrong.status_code == 401
    watched.add("answers", wrong.text)


@pytest.mark.timeout(900)
def test_no_secret_is_left_anywhere(tmp_path: Path) -> None:
    watched = Watched()
    base = build_tiny_base(tmp_path / "base")
    data = tmp_path / "data"
    (tmp_path / "weed").mkdir()
    data.mkdir()
    with (
        seaweed(tmp_path / "weed") as s3,
        FakeOpenAI(key=CANARIES["openai"]) as openai,
        fake_wandb(keys={CANARIES["wandb"]}) as wandb,
        refusing_hub(CANARIES["huggingface"]) as hub,
    ):
        bucket = s3.new_bucket()
        service = start(
            data,
            base,
            KNOWLEDGE_API_KEYS=f"tests:{CANARIES['api key']}",
            KNOWLEDGE_OPENAI_API_KEY=CANARIES["openai"],
            KNOWLEDGE_OPENAI_BASE_URL=openai.url,
            KNOWLEDGE_WANDB_API_KEY=CANARIES["wandb"],
            KNOWLEDGE_WANDB_BASE_URL=wandb.url,
            HF_TOKEN=CANARIES["huggingface"],
            KNOWLEDGE_HUGGINGFACE_ENDPOINT=hub,
            KNOWLEDGE_BASE_MODELS="gated=org/gated",
            KNOWLEDGE_S3_BUCKET=bucket,
            KNOWLEDGE_S3_ENDPOINT_URL=s3.endpoint,
            KNOWLEDGE_S3_PATIENCE_SECONDS="1",
            AWS_ACCESS_KEY_ID=ACCESS_KEY,
            AWS_SECRET_ACCESS_KEY=SECRET_KEY,
            AWS_REGION="us-east-1",
            KNOWLEDGE_PROBE_SECONDS="1",
        )
        try:
            rest = httpx2.Client(
                base_url=f"http://{service.http_address}",
                headers={"Authorization": f"Bearer {CANARIES['api key']}"},
                timeout=60,
            )
            with (
                Client(service.grpc_address, api_key=CANARIES["api key"]) as client,
                rest,
                command_lines(service, watched),
            ):
                wait_until(lambda: client.health()["engine"] == "ok", seconds=120)
                work(client, rest, watched, openai, wandb, s3, bucket)
                wait_until(lambda: client.health()["hub"] == "down")
                with pytest.raises(KnowledgeEngineError) as caught:
                    Client(service.grpc_address, api_key=f"{CANARIES['api key']}x").get_job("none")
                watched.add("client errors", repr(caught.value))
        finally:
            end(service)
        # What it sent, but for the headers that carry a key to whom it belongs.
        watched.add("sent to openai", json.dumps([request.body for request in openai.requests], default=str))
        for received in wandb.received:
            watched.add("sent to wandb", received.path.encode() + b"\n" + received.body + b"\n")

    num_files = 0
    for path in data.rglob("*"):
        if path.is_file():
            num_files += 1
            watched.add(str(path.relative_to(data)), path.read_bytes())
    assert num_files > 20
    assert {"events", "jobs", "answers", "bucket", "service.log", "command lines", "sent to wandb", "state.db"} <= set(
        watched.said
    )
    leaks = {where: found for where, content in watched.said.items() if (found := find_secrets(content))}
    assert not leaks
