"""Every number that is counted for Prometheus, one class for each process; the only prometheus_client.

Names begin with the process that counts, so that the texts of all three make one. Labels have few values: routes, RPC
methods, codes, reasons; never who asks, what for, or with what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
METHOD = "/knowledge_engine.internal.Metrics/Read"
"""How the gateway asks the server for its text and the engine's: bytes for bytes, between our own processes and no part
of the contract."""

OUTCOMES = ("stop", "length", "aborted", "failed")
"""How an answer that the engine took on can end."""

_CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WAIT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each counter, which no text format asks for


class _Metrics:
    """What one process counts; its memory, processor time and files besides."""

    def __init__(self, part: str) -> None:
        self._prefix = f"knowledge_{part}"
        self._registry = CollectorRegistry()
        ProcessCollector(self._prefix, registry=self._registry)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"{self._prefix}_{name}", says, labels, registry=self._registry)

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(f"{self._prefix}_{name}", says, registry=self._registry)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{self._prefix}_{name}", says, labels, buckets=buckets, registry=self._registry)


class GatewayMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__("gateway")
        self.requests = self._histogram(
            "http_request_duration_seconds",
            "From a request's first byte to the last one of its answer, streams whole.",
            _CALL_SECONDS,
            "method",
            "route",
            "status",
        )
        self.active = self._gauge("http_requests_active", "Requests that are being answered.")
        self.server_up = self._gauge("server_up", "Whether the server answered this scrape.")


class ServerMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__("server")
        self.calls = self._histogram(
            "rpc_duration_seconds",
            "From a call's receipt to its end, streams whole.",
            _CALL_SECONDS,
            "method",
            "code",
        )
        self.active = self._gauge("rpcs_active", "Calls that are being answered.")
        self.errors = self._counter("errors_total", "Calls that were refused or failed, by reason.", "method", "reason")
        self.engine_up = self._gauge("engine_up", "Whether the engine answered this scrape.")
        self.engine_ready = self._gauge("engine_ready", "Whether the engine has its model and takes requests.")


@dataclass(frozen=True)
class Holding:
    """What the engine holds now, and what it has done with adapters and passes since it began."""

    active: int
    waiting: int
    steps: int
    adapters: int
    adapter_bytes: int
    adapter_loads: int
    adapter_evictions: int
    blocks: Mapping[str, int]
    """Of keys and values, by what becomes of them; empty where their number is not bounded."""


class EngineMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__("engine")
        self.queue = self._histogram(
            "queue_seconds", "From a request's receipt until its prompt's turn came.", _WAIT_SECONDS
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's receipt to the first token of its answer, waiting included.",
            _WAIT_SECONDS,
        )
        self.between_tokens = self._histogram(
            "time_between_tokens_seconds",
            "From each token of an answer to the next; one that was guessed right comes with the one before it.",
            _TOKEN_SECONDS,
        )
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of requests whose turn came.")
        self.shared_tokens = self._counter(
            "shared_prompt_tokens_total", "Prompt tokens that needed no reading, as an earlier prompt began alike."
        )
        self.completion_tokens = self._counter("completion_tokens_total", "Tokens answered.")
        self.guessed_tokens = self._counter("guessed_tokens_total", "Tokens guessed ahead.")
        self.accepted_tokens = self._counter("accepted_tokens_total", "Guessed tokens that saved a step.")
        self.answers = self._counter("answers_total", "Answers that ended, by how.", "outcome")
        self.refusals = self._counter("refusals_total", "Requests that were not taken on, by reason.", "reason")
        for outcome in OUTCOMES:
            self.answers.labels(outcome)

    def follow(self, read: Callable[[], Holding]) -> None:
        """From now on tells what is held, which `read` says at each scrape."""
        self._registry.register(_Held(self._prefix, read))


class _Held(Collector):
    def __init__(self, prefix: str, read: Callable[[], Holding]) -> None:
        self._prefix = prefix
        self._read = read

    def collect(self) -> Iterator[Metric]:
        held = self._read()
        for name, says, value in (
            ("active", "Answers under way.", held.active),
            ("waiting", "Requests that wait for their turn.", held.waiting),
            ("adapters", "Adapters that are loaded.", held.adapters),
            ("adapter_bytes", "Memory of the loaded adapters.", held.adapter_bytes),
        ):
            yield GaugeMetricFamily(f"{self._prefix}_{name}", says, value)
        for name, says, value in (
            ("steps", "Forward passes, each sequence's counted.", held.steps),
            ("adapter_loads", "Adapters read from disk.", held.adapter_loads),
            ("adapter_evictions", "Adapters that gave way to others.", held.adapter_evictions),
        ):
            yield CounterMetricFamily(f"{self._prefix}_{name}", says, value)
        if held.blocks:
            says = "Blocks for keys and values: in use, kept for prompts that begin alike, or free."
            blocks = GaugeMetricFamily(f"{self._prefix}_kv_blocks", says, labels=["state"])
            for state, value in held.blocks.items():
                blocks.add_metric([state], value)
            yield blocks
