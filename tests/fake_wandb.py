"""A W&B server for the real client: what wandb 0.31 sends to start, resume, fill and end a run, over a real socket.

Every request is recorded whole. A test's `fault` may answer any of them with a status, or never.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

ENTITY = "shop-team"

Fault: TypeAlias = Callable[["Received"], float | int | None]
"""What to do to a request: an int is the status to answer with, a float seconds to wait first (`HANG` waits to the
end), None nothing."""

HANG = float("inf")


@dataclass(frozen=True)
class Received:
    """One request; `operation` is the GraphQL operation's name, `file_stream` or `upload`."""

    operation: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        """The API key it came with."""
        scheme, _, value = self.headers.get("authorization", "").partition(" ")
        return base64.b64decode(value).decode().removeprefix("api:") if scheme == "Basic" else value


@dataclass
class Run:
    """A run as W&B shows it."""

    id: str
    project: str
    state: str = "running"
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.lines[offset] for offset in sorted(self.lines)]


@dataclass
class FakeWandb:
    """`runs` by id; `keys` are accepted, all where it is None; to an anonymous caller the viewer is null."""

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    keys: set[str] | None = None
    fault: Fault | None = None
    is_anonymous: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def operations(self) -> list[str]:
        return [request.operation for request in self.received]

    def answer(self, request: Received) -> tuple[int, Any]:
        trouble = self.fault(request) if self.fault is not None else None
        if trouble == HANG:
            self.over.wait()
            return 503, {}
        if isinstance(trouble, float):
            self.over.wait(trouble)
        elif trouble is not None:
            return trouble, {"errors": [{"message": "told to fail"}], "error": "told to fail"}
        if request.operation == "upload":
            return 200, {}
        if self.keys is not None and request.key not in self.keys:
            return 401, {"errors": [{"message": "user is not logged in"}], "data": None}
        if request.operation == "file_stream":
            return self._file_stream(request)
        if not request.operation:
            return 404, {"error": "not found"}
        sent = json.loads(request.body)
        return 200, {"data": self._graphql(request.operation, sent.get("query", ""), sent.get("variables") or {})}

    def _graphql(self, operation: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "UpsertBucket":
                return {"upsertBucket": self._upsert(variables)}
            case "RunResumeStatus":
                return {"model": self._resume_status(variables)}
            case "CreateRunFiles":
                return {"createRunFiles": self._run_files(variables)}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
        viewer = {"id": "VXNlcg==", "entity": ENTITY, "username": "someone", "flags": "{}", "teams": {"edges": []}}
        limits = {"cliVersionInfo": {"max_cli_version": "9.0.0"}, "latestLocalVersionInfo": None}
        return {
            "viewer": None if self.is_anonymous else viewer,
            "serverInfo": limits,
            "entity": {"id": "RW50", "name": ENTITY},
        }

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        project = variables.get("project") or variables.get("modelName") or "uncategorized"
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(name, project))
        if variables.get("displayName"):  # an attempt begins; later ones of it only bring its configuration
            run.state, run.preempting, run.exit_code = "running", False, None
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        bucket = {
            "id": f"bucket-{name}",
            "name": name,
            "displayName": variables.get("displayName") or name,
            "sweepName": None,
            "historyLineCount": len(run.lines),
            "project": {"id": "UHJvamVjdA==", "name": project, "entity": {"id": "RW50", "name": ENTITY}},
        }
        return {"bucket": bucket, "inserted": inserted}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(variables["name"])
        model = {"id": "UHJvamVjdA==", "name": variables.get("project"), "entity": {"id": "RW50", "name": ENTITY}}
        if run is None:
            return {**model, "bucket": None}
        tail = [json.dumps(line) for line in run.history[-1:]]
        bucket = {
            "id": f"bucket-{run.id}",
            "name": run.id,
            "displayName": run.id,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {**model, "bucket": bucket}

    def _run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        names = variables.get("files") or []
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in names]
        return {"runID": variables.get("run"), "uploadHeaders": [], "files": files}

    def _file_stream(self, request: Received) -> tuple[int, Any]:
        run = self.runs.get(unquote(urlsplit(request.path).path.split("/")[-2]))
        if run is None:
            return 404, {"error": "no such run"}
        sent = json.loads(request.body)
        files = sent.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], history["offset"]):
            run.lines[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            run.summary = json.loads(line)
        run.preempting = run.preempting or bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
            run.state = "finished" if run.exit_code == 0 else "preempted" if run.preempting else "failed"
        return 200, {"limits": {}}


@contextmanager
def fake_wandb(fault: Fault | None = None, keys: set[str] | None = None) -> Iterator[FakeWandb]:
    """Serves on a free port until the block ends."""
    fake = FakeWandb(fault=fault, keys=keys)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it never came true")
        time.sleep(0.05)


def _operation(path: str, body: bytes) -> str:
    if path.startswith("/upload/"):
        return "upload"
    if path.endswith("/file_stream"):
        return "file_stream"
    try:
        sent = json.loads(body)
    except ValueError:
        return ""
    named = re.match(r"\s*(?:query|mutation)\s+(\w+)", sent.get("query", ""))
    return sent.get("operationName") or (named.group(1) if named else "")


def _handler(fake: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client went away
                super().handle()

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Received(_operation(self.path, body), self.command, self.path, headers, body)
            fake.received.append(request)
            status, answer = fake.answer(request)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    for method in ("GET", "POST", "PUT"):
        setattr(Handler, f"do_{method}", Handler._serve)
    return Handler
