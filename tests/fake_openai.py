"""An OpenAI-compatible API on a free port: answers plans truly, or as a test scripts it. It reads nothing but HTTP.

Unless told otherwise it takes the plan out of the prompt and lets the offline verbaliser speak, so that what comes of a
run against it passes the verifier. Every chat request is recorded.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from knowledge_engine.catalogue import Constraints, Product, parse_json, parse_price
from knowledge_engine.generation.offline import OfflineVerbaliser
from knowledge_engine.generation.planner import Act, Exchange, Plan

MODEL = "gpt-fake-2026-01-01"
PROMPT_TOKENS, COMPLETION_TOKENS = 700, 60


@dataclass
class Scripted:
    """One answer. `cut` closes the connection hard after so many bytes of the body; `hang` never answers; `endless` is
    a body of one byte every so many seconds, 200 in all, or without a pause of 64 MiB."""

    status: int = 200
    body: bytes | dict[str, Any] | None = None  # None: the plan's own answer
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    hang: bool = False
    endless: float | None = None


@dataclass
class Request:
    """One chat request as it came, counted from 0."""

    number: int
    time: float
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The plan in the prompt."""
        return plan_in(self.body["messages"][-1]["content"], self.body.get("seed", self.number))


def limited(retry_after: str | None = None, code: str = "rate_limit_exceeded") -> Scripted:
    """429 as OpenAI sends it."""
    message = "You exceeded your current quota" if code == "insufficient_quota" else "Rate limit reached"
    kind = code if code == "insufficient_quota" else "requests"
    error = {"message": message, "type": kind, "param": None, "code": code}
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return Scripted(status=429, body={"error": error}, headers=headers)


def refusing(status: int, message: str = "no", code: str | None = None, param: str | None = None) -> Scripted:
    """An error object as OpenAI sends it."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Scripted(status=status, body={"error": error})


def completion(content: str | None, finish_reason: str = "stop", **changes: Any) -> dict[str, Any]:
    """A chat completion object; `changes` replace members, `message` parts of the message."""
    message = {"role": "assistant", "content": content, "refusal": None, **changes.pop("message", {})}
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
        "usage": usage,
        **changes,
    }


def plan_in(prompt: str, seed: int) -> Plan:
    """The plan that a prompt holds, as far as words need it."""
    _, data, _ = prompt.replace("<plan>", "\0").replace("</plan>", "\0").split("\0")
    facts = parse_json(data)
    rows = {row["id"]: _row(row) for row in facts["products"]}
    exchanges = tuple(_exchange(exchange, rows) for exchange in facts["exchanges"])
    return Plan(f"fake/{seed}", facts["shopper_needs"], tuple(rows.values()), exchanges)


def words_for(plan: Plan) -> str:
    """The JSON a model would answer."""
    messages = OfflineVerbaliser().verbalise(plan)
    turns = zip(messages[::2], messages[1::2], strict=True)
    return json.dumps({f"turn_{n}": {"user": u.content, "assistant": a.content} for n, (u, a) in enumerate(turns, 1)})


def _row(row: dict[str, Any]) -> Product:
    return Product.from_row(row | {"price": row["price"].split()[0]})


def _exchange(exchange: dict[str, Any], rows: Mapping[str, Product]) -> Exchange:
    asked = exchange["asks_for"]
    amount, currency = asked["budget_at_most"].split() if "budget_at_most" in asked else (None, None)
    said = Constraints(
        brand=asked.get("brand"),
        attributes=asked.get("attributes", {}),
        max_price_minor=parse_price(amount, currency) if currency else None,
        currency=currency,
    )
    unmet = tuple("max_price_minor" if name == "price" else name for name in exchange.get("fails_in", ()))
    products = tuple(rows[named["id"]] for named in exchange["must_name"])
    return Exchange(Act(exchange["act"]), products, said, said, exchange.get("asked_attribute", ""), unmet)


Script = Callable[[Request], Scripted | None]


class FakeOpenAI:
    """The server; a context manager. `script` decides each answer, None being the plan's own."""

    def __init__(self, script: Script | None = None, *, key: str = "sk-right-key-0123456789") -> None:
        self.script = script
        self.key = key
        self.requests: list[Request] = []
        self.at_once = 0
        self.most_at_once = 0
        self.bytes_sent = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.fake = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def settings(self) -> dict[str, Any]:
        return {"openai_api_key": self.key, "openai_base_url": self.url, "openai_model": "gpt-fake"}

    @property
    def environment(self) -> dict[str, str]:
        return {f"KNOWLEDGE_{name.upper()}": value for name, value in self.settings.items()}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def take(self, headers: dict[str, str], body: dict[str, Any]) -> Scripted:
        with self._lock:
            request = Request(len(self.requests), time.monotonic(), headers, body)
            self.requests.append(request)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        answer = self.script(request) if self.script else None
        answer = answer or Scripted()
        if answer.body is None:
            answer.body = completion(words_for(request.plan))
        return answer

    def done(self) -> None:
        with self._lock:
            self.at_once -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    fake: FakeOpenAI

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Says nothing."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self._send(refusing(404))
        if self._is_wrong_key():
            return self._send(refusing(401, "Incorrect API key provided: sk-wrong**", "invalid_api_key"))
        answer = self.server.fake.script(Request(-1, time.monotonic(), {}, {})) if self.server.fake.script else None
        model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "fake"}
        return self._send(answer or Scripted(body={"object": "list", "data": [model]}))

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if urlsplit(self.path).path != "/v1/chat/completions":  # a proxy is sent the whole address
            return self._send(refusing(404, f"no such route: {self.path}"))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = fake.take(headers, body)
        try:
            if self._is_wrong_key():
                answer = refusing(401, f"Incorrect API key provided: {headers['authorization']}", "invalid_api_key")
            if answer.hang:
                fake.closing.wait()
                return None
            time.sleep(answer.delay)
        finally:
            fake.done()
        return self._send(answer)

    def _is_wrong_key(self) -> bool:
        return self.headers["authorization"] != f"Bearer {self.server.fake.key}"

    def _send(self, answer: Scripted) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in ({"content-type": "application/json"} | dict(answer.headers)).items():
            self.send_header(name, value)
        if answer.endless is not None:
            self._send_on_and_on(answer.endless)
            return
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if answer.cut is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: answer.cut])
        self.wfile.flush()
        # RST instead of a polite end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send_on_and_on(self, every: float) -> None:
        self.close_connection = True
        self.end_headers()
        pieces = [b" "] * 200 if every else [b" " * 65536] * 1024
        for piece in pieces:
            if self.server.fake.closing.wait(every):
                return
            self.wfile.write(piece)
            self.server.fake.bytes_sent += len(piece)
