"""A model hub over real sockets: the part of the Hugging Face HTTP API that fetching a model uses, and its faults.

Small files come from the hub itself, large ones (LFS) by a redirect to a second server on another port, as from its
CDN. Answers, headers and error codes are those that the real client (huggingface_hub 2.4) reads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")
SIGNATURE = "signed-for-you-alone"


@dataclass
class Repository:
    """Files by commit, and what each branch or tag means."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that are listed in place of the real ones."""

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Adds a commit and moves the branch there; returns its hash."""
        names = b"".join(name.encode() + hashlib.sha256(data).digest() for name, data in sorted(files.items()))
        commit = hashlib.sha1(names).hexdigest()
        self.commits[commit] = files
        self.revisions[revision] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        commit = self.revisions.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass(frozen=True)
class Request:
    """What was asked and what went out; `server` is `hub` or `cdn`."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    status: int
    num_bytes: int

    @property
    def offset(self) -> int:
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])


@dataclass
class Fault:
    """What happens to the next `times` requests whose path holds `path`, before anything else."""

    path: str
    status: int = 0  # answered instead
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_at: float | None = None  # the share of the file after which the connection breaks
    stall_at: float | None = None  # the share of the file after which nothing more comes
    flip: bool = False  # the right number of wrong bytes
    ignores_range: bool = False
    pause_seconds: float = 0.0  # between two pieces
    times: int = 1


class FakeHub:
    """Its repositories, its faults to come, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.token: str | None = None  # the only one it accepts; None accepts anyone
        self.url = self.cdn_url = ""
        self.is_closing = threading.Event()
        self._lock = threading.Lock()

    def add(self, name: str, folder: Path, without: str = "") -> Repository:
        """A repository with the files of a folder, but one."""
        repository = self.repositories.setdefault(name, Repository())
        repository.commit({path.name: path.read_bytes() for path in folder.iterdir() if path.name != without})
        return repository

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.path in path:
                    fault.times -= 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def asked(self, text: str) -> list[Request]:
        """The requests whose path holds `text`."""
        return [request for request in self.requests if text in request.path]

    @contextmanager
    def serving(self) -> Iterator[FakeHub]:
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, name)) for name in ("hub", "cdn")]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.is_closing.set()
            for server, thread in zip(servers, threads, strict=True):
                server.shutdown()
                thread.join()
                server.server_close()


def _handler(hub: FakeHub, server: str) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if (fault := hub.take_fault(path)) is not None and fault.status:
                self.answer(fault.status, fault.body, fault.headers)
            elif server == "cdn":
                repository, _, file = path.removeprefix("/blob/").partition("//")
                self.send_file(hub.repositories[repository].commits, file, fault)
            elif not self.is_let_in():
                self.fail(401, "", "Invalid credentials in Authorization header")
            elif path == "/api/whoami-v2":
                self.answer(200 if self.headers.get("authorization") else 401, b'{"name": "someone"}')
            elif path.startswith("/api/models/"):
                organisation, name, *rest = path.removeprefix("/api/models/").split("/")
                self.list_files(f"{organisation}/{name}", "/".join(rest[1:]) or "main")
            else:
                repository, _, rest_of_path = path[1:].partition("/resolve/")
                self.resolve(repository, *rest_of_path.split("/", 1), fault)

        def is_let_in(self) -> bool:
            sent = self.headers.get("authorization")
            return sent is None or hub.token is None or sent == f"Bearer {hub.token}"

        def find(self, name: str, revision: str) -> tuple[Repository, str] | None:
            repository = hub.repositories.get(name)
            if repository is None:
                # As the hub does: who is not logged in is not told that there is nothing.
                anonymous = self.headers.get("authorization") is None
                self.fail(401 if anonymous else 404, "RepoNotFound", "Repository not found")
                return None
            commit = repository.resolve(revision)
            if commit is None:
                self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return repository, commit

        def list_files(self, name: str, revision: str) -> None:
            if (found := self.find(name, revision)) is None:
                return
            repository, commit = found
            siblings = []
            for file, data in repository.commits[commit].items():
                size = repository.sizes.get(file, len(data))
                blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                sibling: dict[str, Any] = {"rfilename": file, "size": size, "blobId": blob}
                if file.endswith(LARGE):
                    sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
                siblings.append(sibling)
            body = {"id": name, "modelId": name, "sha": commit, "private": False, "gated": False, "siblings": siblings}
            self.answer(200, json.dumps(body).encode(), {"content-type": "application/json"})

        def resolve(self, name: str, revision: str, file: str, fault: Fault | None) -> None:
            if (found := self.find(name, revision)) is None:
                return
            repository, commit = found
            if repository.is_gated:
                self.fail(403, "GatedRepo", f"Access to model {name} is restricted")
            elif file not in repository.commits[commit]:
                self.fail(404, "EntryNotFound", "Entry not found")
            elif file.endswith(LARGE):
                data = repository.commits[commit][file]
                headers = {
                    "location": f"{hub.cdn_url}/blob/{name}//{commit}/{file}?X-Amz-Signature={SIGNATURE}",
                    "x-repo-commit": commit,
                    "x-linked-size": str(len(data)),
                    "x-linked-etag": f'"{hashlib.sha256(data).hexdigest()}"',
                }
                self.answer(302, b"", headers)
            else:
                self.send_file(repository.commits, f"{commit}/{file}", fault)

        def send_file(self, commits: dict[str, dict[str, bytes]], place: str, fault: Fault | None) -> None:
            commit, _, file = place.partition("/")
            whole = commits[commit][file]
            fault = fault or Fault("")
            data = bytes(byte ^ 1 for byte in whole) if fault.flip else whole
            first, headers = 0, {"etag": f'"{hashlib.sha1(whole).hexdigest()}"', "x-repo-commit": commit}
            if (asked := self.headers.get("range")) and not fault.ignores_range:
                first = int(asked.removeprefix("bytes=").rstrip("-"))
                if first >= len(whole):
                    self.answer(416, b"", {"content-range": f"bytes */{len(whole)}"})
                    return
                headers["content-range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
            self.answer(206 if "content-range" in headers else 200, data[first:], headers, fault, first, len(whole))

        def fail(self, status: int, code: str, message: str) -> None:
            headers = {"x-error-message": message} | ({"x-error-code": code} if code else {})
            self.answer(status, json.dumps({"error": message}).encode(), headers)

        def answer(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            fault: Fault | None = None,
            first: int = 0,
            whole: int = 0,
        ) -> None:
            fault = fault or Fault("")
            end = next((share for share in (fault.cut_at, fault.stall_at) if share is not None), None)
            sent = body if end is None else body[: max(0, int(end * whole) - first)]
            lower = {key.lower(): value for key, value in self.headers.items()}
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            num_bytes = 0
            try:
                if self.command != "HEAD":
                    for start in range(0, len(sent), 8192):
                        self.wfile.write(sent[start : start + 8192])
                        num_bytes += len(sent[start : start + 8192])
                        if fault.pause_seconds:
                            hub.is_closing.wait(fault.pause_seconds)
                    self.wfile.flush()
                if fault.stall_at is not None:
                    hub.is_closing.wait(120)
            except OSError:
                self.close_connection = True  # the client has gone
            if end is not None:
                self.close_connection = True
            hub.requests.append(Request(server, self.command, self.path, lower, status, num_bytes))

    return Handler
