from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from knowledge_engine.core import FinishReason, SamplingParams
from knowledge_engine.errors import (
    CapacityError,
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    Reason,
    UpstreamError,
)
from knowledge_engine.inference.client import (
    Adapter,
    EngineClient,
    EngineRequest,
    EngineStatus,
    Finished,
    TextDelta,
    socket_path,
)
from knowledge_engine.inference.wire import PROTOCOL_VERSION, Hello, pack
from knowledge_engine.settings import Settings
from tests.tiny import CONTEXT, VOCABULARY, build_tiny_adapter, build_tiny_base

ACTIVE, WAITING = 4, 16
STARTUP_SECONDS = 120.0
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


class EngineProcess:
    """A real engine on a tiny base."""

    def __init__(self, root: Path, base: Path, **settings: int) -> None:
        self.base = base
        values = {"max_active_streams": ACTIVE, "max_waiting_streams": WAITING} | settings
        self.settings = Settings(data_dir=root, base_model=str(base), **values)
        self.path = socket_path(self.settings)
        self.log = root / "engine.log"
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KNOWLEDGE_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "knowledge_engine.inference.engine", "--parent-pid", str(os.getpid())],
                env=environment | self.settings.environment() | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    root = tmp_path_factory.mktemp("adapters")
    return [Adapter(f"sha256:{seed}", build_tiny_adapter(base, root / str(seed), seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    process = EngineProcess(tmp_path_factory.mktemp("engine"), base)
    yield process
    assert process.stop() == 0, process.log.read_text()


@pytest.fixture(scope="module")
def small_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineProcess]]:
    """One for each way to compute; room for 3,584 tokens where that is bounded, and four adapters of rank 2."""
    engines: dict[str, EngineProcess] = {}
    for family in ("llama", "gpt2", "dynamic"):
        root = tmp_path_factory.mktemp(family)
        base = build_tiny_base(root / "base", "llama" if family == "dynamic" else family)
        if family == "dynamic":  # a token's rotation depends on how many there are: no sequence shares a pass
            path = base / "config.json"
            rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
        build_tiny_adapter(base, root / "adapter", 0, rank=2)
        size = (root / "adapter" / "adapter_model.safetensors").stat().st_size
        num_bytes = 2**20 if family == "llama" else 14 * 2**18
        engines[family] = EngineProcess(root, base, kv_cache_bytes=num_bytes, adapter_cache_bytes=int(4.5 * size))
    yield engines
    for engine in engines.values():
        assert engine.stop() == 0, engine.log.read_text()


@pytest.fixture
async def client(engine: EngineProcess) -> AsyncIterator[EngineClient]:
    async with connected(engine) as client:
        yield client


@contextlib.asynccontextmanager
async def connected(engine: EngineProcess) -> AsyncIterator[EngineClient]:
    client = EngineClient(engine.path)
    await client.start()
    try:
        await until(client, lambda status: status.state == "ready")
        yield client
    finally:
        await client.close()


async def until(client: EngineClient, holds: Callable[[EngineStatus], bool]) -> EngineStatus:
    async with asyncio.timeout(STARTUP_SECONDS):
        while True:
            status = await client.refresh()
            if holds(status):
                return status
            await asyncio.sleep(0.02)


def prompt(engine: EngineProcess, text: str = "Which kettle would you recommend?") -> list[int]:
    tokenizer = Tokenizer.from_file(str(engine.base / "tokenizer.json"))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def ask(
    token_ids: list[int],
    *,
    max_tokens: int = 40,
    temperature: float = 0.0,
    adapter: Adapter | None = None,
    stop_token_ids: Sequence[int] = (),
    top_p: float = 1.0,
    top_k: int = 0,
    stop: tuple[str, ...] = (),
    seed: int | None = None,
) -> EngineRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, seed=seed
    )
    return EngineRequest(token_ids, sampling, list(stop_token_ids), adapter)


@dataclass
class Answer:
    deltas: list[str]
    finished: Finished

    @property
    def text(self) -> str:
        return "".join(self.deltas)


async def answer(client: EngineClient, request: EngineRequest) -> Answer:
    deltas: list[str] = []
    finished: list[Finished] = []
    async with aclosing(client.generate(request)) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                assert not finished
                assert piece.text
                deltas.append(piece.text)
            else:
                finished.append(piece)
    (only,) = finished
    return Answer(deltas, only)


async def failure(client: EngineClient, request: EngineRequest) -> KnowledgeEngineError:
    with pytest.raises(KnowledgeEngineError) as caught:
        await answer(client, request)
    return caught.value


async def test_deltas_join_to_one_answer_with_its_facts(engine: EngineProcess, client: EngineClient) -> None:
    token_ids = prompt(engine)
    got = await answer(client, ask(token_ids, max_tokens=30))
    assert len(got.deltas) > 1
    assert got.finished.finish_reason is FinishReason.LENGTH
    assert (got.finished.prompt_tokens, got.finished.completion_tokens) == (len(token_ids), 30)
    assert 0 < got.finished.time_to_first_token_seconds < 60
    assert (await answer(client, ask(token_ids, max_tokens=30))).text == got.text
    assert got.text.startswith((await answer(client, ask(token_ids, max_tokens=15))).text.rstrip("\ufffd"))


async def test_mixed_concurrent_answers_equal_those_one_by_one(
    engine: EngineProcess, client: EngineClient, adapters: list[Adapter]
) -> None:
    choices = [None, *adapters]
    requests = [
        ask(prompt(engine, f"Have you a backpack number {number}?"), adapter=choices[number % 3], max_tokens=30)
        for number in range(20)
    ]
    alone = [(await answer(client, request)).text for request in requests]
    together = await asyncio.gather(*(answer(client, request) for request in requests))
    assert [got.text for got in together] == alone
    same_prompt = [(await answer(client, ask(prompt(engine), adapter=adapter))).text for adapter in choices]
    assert len(set(same_prompt)) == 3
    assert set((await client.refresh()).adapters) >= {adapter.digest for adapter in adapters}


@pytest.mark.parametrize(
    ("family", "precision", "num_pieces"), [("llama", "int8", 4), ("gpt2", "float32", 4), ("dynamic", "float32", 2)]
)
async def test_a_long_prompt_is_read_in_pieces_and_answered_as_transformers_answers_it(
    family: str, precision: str, num_pieces: int, small_engines: dict[str, EngineProcess]
) -> None:
    import torch

    from knowledge_engine import modeling
    from knowledge_engine.bases import get_base

    engine = small_engines[family]
    async with connected(engine) as client:
        token_ids = (prompt(engine) * 60)[:900]
        before = await client.refresh()
        assert before.precision == precision
        got = await answer(client, ask(token_ids, max_tokens=20))
        num_steps = (await client.refresh()).num_steps - before.num_steps
    assert num_pieces < num_steps <= num_pieces + 19  # a right guess saves a step
    model = modeling.load_base(get_base(engine.settings), precision, "cpu")
    whole = list(token_ids)
    with torch.inference_mode():
        for _ in range(20):
            whole.append(int(model(torch.tensor([whole])).logits[0, -1].argmax()))
    tokenizer = Tokenizer.from_file(str(engine.base / "tokenizer.json"))
    assert got.text == tokenizer.decode(whole[len(token_ids) :], skip_special_tokens=True)


async def test_a_closed_iterator_stops_decoding_within_one_step(engine: EngineProcess, client: EngineClient) -> None:
    before = await client.refresh()
    for taken in (1, 3, 7):
        pieces = client.generate(ask(prompt(engine), max_tokens=900))
        for _ in range(taken):
            assert isinstance(await anext(pieces), TextDelta)
        await pieces.aclose()
    after = await until(client, lambda status: status.num_aborted == before.num_aborted + 3)
    assert (after.active, after.waiting) == (0, 0)
    assert after.max_steps_after_abort <= 1
    assert after.num_steps - before.num_steps < 3 * 900
    assert (await client.refresh()).num_steps == after.num_steps


async def test_a_cancelled_task_stops_decoding(engine: EngineProcess, client: EngineClient) -> None:
    before = await client.refresh()
    task = asyncio.create_task(answer(client, ask(prompt(engine), max_tokens=900)))
    await until(client, lambda status: status.active == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    after = await until(client, lambda status: status.active == 0)
    assert after.num_aborted == before.num_aborted + 1
    assert after.max_steps_after_abort <= 1


async def test_a_lost_client_frees_its_places(engine: EngineProcess, client: EngineClient) -> None:
    before = await client.refresh()
    async with connected(engine) as other:
        tasks = [asyncio.create_task(answer(other, ask(prompt(engine), max_tokens=900))) for _ in range(ACTIVE + 2)]
        await until(client, lambda status: status.active == ACTIVE and status.waiting == 2)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, UpstreamError) for result in results)
    after = await until(client, lambda status: status.active == status.waiting == 0)
    assert after.num_aborted == before.num_aborted + ACTIVE + 2
    assert after.max_steps_after_abort <= 1


async def test_a_full_engine_refuses_with_a_retry_hint(engine: EngineProcess, client: EngineClient) -> None:
    request = ask(prompt(engine), max_tokens=900)
    streams = [client.generate(request) for _ in range(ACTIVE + WAITING)]
    tasks = [asyncio.create_task(anext(stream)) for stream in streams]
    await until(client, lambda status: (status.active, status.waiting) == (ACTIVE, WAITING))
    refused = await failure(client, request)
    assert isinstance(refused, CapacityError)
    assert refused.reason is Reason.ENGINE_BUSY
    assert refused.retry_after_seconds is not None
    assert refused.metadata == {"max_active_streams": str(ACTIVE), "max_waiting_streams": str(WAITING)}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for stream in streams:
        await stream.aclose()
    await until(client, lambda status: status.active == status.waiting == 0)
    assert (await answer(client, ask(prompt(engine), max_tokens=5))).finished.completion_tokens == 5


async def test_who_has_the_fewest_answers_is_next(engine: EngineProcess, client: EngineClient) -> None:
    ended: list[str] = []

    async def whole(caller: str, max_tokens: int) -> None:
        await answer(client, replace(ask(prompt(engine), max_tokens=max_tokens), caller=caller))
        ended.append(caller)

    many = [asyncio.create_task(whole("many", 200)) for _ in range(3 * ACTIVE)]
    await until(client, lambda status: (status.active, status.waiting) == (ACTIVE, 2 * ACTIVE))
    await asyncio.gather(whole("one", 20), *many)
    assert ended.index("one") <= ACTIVE


async def test_a_caller_has_no_more_than_its_cap(base: Path, tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path, base, max_streams_per_caller=2)
    try:
        async with connected(engine) as client:
            endless = replace(ask(prompt(engine), max_tokens=900), caller="many")
            tasks = [asyncio.create_task(answer(client, endless)) for _ in range(2)]
            await until(client, lambda status: status.active == 2)
            refused = await failure(client, endless)
            assert isinstance(refused, CapacityError)
            assert refused.reason is Reason.CALLER_BUSY
            assert refused.retry_after_seconds is not None
            assert (await answer(client, replace(endless, caller="one", sampling=ONE_TOKEN))).finished
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (await answer(client, replace(endless, sampling=ONE_TOKEN))).finished
    finally:
        engine.stop()


async def test_a_client_refuses_what_the_engine_would(base: Path, tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path, base, max_streams_per_caller=2)
    try:
        async with connected(engine) as client, connected(engine) as other:
            request = replace(ask(prompt(engine), max_tokens=900), caller="many")
            tasks = [asyncio.create_task(answer(client, request)) for _ in range(2)]
            await until(client, lambda status: status.active == 2)
            said = {"many": await failure(client, request)}
            for number in range(ACTIVE + WAITING - 2):
                tasks.append(asyncio.create_task(answer(client, replace(request, caller=str(number)))))  # noqa: PERF401
            await until(client, lambda status: status.active + status.waiting == ACTIVE + WAITING)
            said["one"] = await failure(client, replace(request, caller="one"))
            assert [said[caller].reason for caller in said] == [Reason.CALLER_BUSY, Reason.ENGINE_BUSY]
            with other.place("many", 2):  # it cannot know: the engine's word is the last
                pass
            tasks.pop().cancel()  # one place is free now
            await until(client, lambda status: status.active + status.waiting < ACTIVE + WAITING)
            for caller, error in said.items():
                with client.place("last"), pytest.raises(CapacityError) as refused:
                    client.place(caller).__enter__()
                assert refused.value.to_dict() == said["one"].to_dict()
                with pytest.raises(CapacityError) as refused:
                    client.place(caller, 2).__enter__()
                assert refused.value.to_dict() == error.to_dict()
            told = (await client.metrics()).decode()
            assert 'knowledge_engine_refusals_total{reason="ENGINE_BUSY"} 4.0' in told
            assert 'knowledge_engine_refusals_total{reason="CALLER_BUSY"} 3.0' in told
            assert (await client.metrics()).decode().count("BUSY") == told.count("BUSY")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        engine.stop()


async def test_an_answer_that_is_over_holds_no_place_though_nobody_has_read_it(
    engine: EngineProcess, client: EngineClient
) -> None:
    unread = client.generate(ask(prompt(engine), max_tokens=20))
    await anext(unread)
    await until(client, lambda status: status.active == 0)
    with client.place("", ACTIVE + WAITING):
        pass
    assert [piece async for piece in unread]


async def test_stop_strings_cut_the_answer(engine: EngineProcess, client: EngineClient) -> None:
    whole = (await answer(client, ask(prompt(engine), max_tokens=60))).text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    got = await answer(client, ask(prompt(engine), max_tokens=60, stop=("never there", middle)))
    assert got.text == whole[: whole.index(middle)]
    assert got.finished.finish_reason is FinishReason.STOP
    assert got.finished.completion_tokens <= 60


async def test_a_stop_token_ends_the_answer_and_is_not_shown(engine: EngineProcess, client: EngineClient) -> None:
    got = await answer(client, ask(prompt(engine), max_tokens=900, temperature=2, seed=3, stop_token_ids=range(40)))
    assert got.finished.finish_reason is FinishReason.STOP
    assert got.finished.completion_tokens < 900
    shown = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert not any(token in got.text for token in shown)
    at_once = await answer(client, ask(prompt(engine), stop_token_ids=range(VOCABULARY)))
    assert (at_once.text, at_once.finished.completion_tokens) == ("", 1)


async def test_a_seed_repeats_an_answer(engine: EngineProcess, client: EngineClient) -> None:
    async def sampled(seed: int | None) -> str:
        return (await answer(client, ask(prompt(engine), temperature=1, seed=seed))).text

    first, again, other, unset, unset_again = [await sampled(seed) for seed in (7, 7, 8, None, None)]
    assert first == again
    assert len({first, other, unset, unset_again}) == 4
    assert await sampled(2**63 - 1) == await sampled(2**63 - 1)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.5, 1.0, 1), (2.0, 0.0, 0), (1e-300, 1.0, 0), (1e-6, 0.9, 50)],
    ids=["top_k 1", "top_p 0", "tiniest temperature", "tiny temperature"],
)
async def test_narrow_sampling_is_greedy(
    engine: EngineProcess, client: EngineClient, temperature: float, top_p: float, top_k: int
) -> None:
    greedy = await answer(client, ask(prompt(engine)))
    narrow = await answer(client, ask(prompt(engine), temperature=temperature, top_p=top_p, top_k=top_k))
    assert narrow.text == greedy.text


async def test_top_k_and_top_p_change_the_choice(engine: EngineProcess, client: EngineClient) -> None:
    texts = [
        (await answer(client, ask(prompt(engine), temperature=2, seed=1, top_p=top_p, top_k=top_k))).text
        for top_p, top_k in ((1.0, 0), (0.3, 0), (1.0, 3), (0.6, 3))
    ]
    assert len(set(texts)) == 4


async def test_code_points_stay_whole(engine: EngineProcess, client: EngineClient) -> None:
    """At temperature 2 the random model writes bytes of every kind; greedy pieces must equal the cut whole."""
    for seed in range(5):
        got = await answer(client, ask(prompt(engine, "€🙂漢"), max_tokens=120, temperature=2, seed=seed))
        same = await answer(client, ask(prompt(engine, "€🙂漢"), max_tokens=120, temperature=2, seed=seed))
        assert got.text == same.text
        for delta in got.deltas:
            delta.encode("utf-8")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
async def test_200_requests_over_32_adapters_are_answered_as_one_by_one(family: str, tmp_path: Path) -> None:
    """Most of the adapters do not fit at once, so they come and go while others answer."""
    base = build_tiny_base(tmp_path / "base", family)
    chosen: list[Adapter | None] = [
        Adapter(f"sha256:{seed}", build_tiny_adapter(base, tmp_path / str(seed), seed, rank=1 + seed % 8))
        for seed in range(32)
    ]
    sizes = [(one.folder / "adapter_model.safetensors").stat().st_size for one in chosen if one is not None]
    engine = EngineProcess(
        tmp_path, base, max_active_streams=16, max_waiting_streams=200, adapter_cache_bytes=sum(sizes) // 4
    )
    try:
        async with connected(engine) as client:
            chosen.append(None)
            requests = [
                ask(
                    prompt(engine, f"Question {number}: which backpack?" * (1 + number % 7)),
                    adapter=chosen[number % 33],
                )
                for number in range(200)
            ]
            alone = [(await answer(client, request)).text for request in requests]
            seen = asyncio.create_task(until(client, lambda status: status.active == 16 and status.waiting > 100))
            together = await asyncio.gather(*(answer(client, request) for request in requests))
            await seen
            assert [got.text for got in together] == alone
            assert len(set(alone)) > 150
            assert 0 < len((await client.refresh()).adapters) < 32
    finally:
        assert engine.stop() == 0


async def test_a_corrupt_adapter_fails_alone(
    engine: EngineProcess, client: EngineClient, adapters: list[Adapter], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters[0].folder, tmp_path / "cut")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    good = [ask(prompt(engine), adapter=adapter) for adapter in (None, adapters[0], adapters[1])]
    expected = [(await answer(client, request)).text for request in good]
    bad = ask(prompt(engine), adapter=Adapter("sha256:cut", folder))
    results = await asyncio.gather(*(answer(client, request) for request in good), failure(client, bad))
    assert [got.text for got in results[:3] if isinstance(got, Answer)] == expected
    assert isinstance(results[3], IntegrityError)
    assert results[3].reason is Reason.MODEL_VERSION_CORRUPT
    assert "adapter_model.safetensors" in results[3].message
    assert "sha256:cut" not in (await client.refresh()).adapters
    gone = await failure(client, ask(prompt(engine), adapter=Adapter("sha256:gone", tmp_path / "gone")))
    assert isinstance(gone, IntegrityError)
    assert [(await answer(client, request)).text for request in good] == expected


async def test_an_unloaded_adapter_is_gone_after_its_last_answer(
    engine: EngineProcess, client: EngineClient, base: Path, tmp_path: Path
) -> None:
    adapter = Adapter("sha256:9", build_tiny_adapter(base, tmp_path / "9", 9))
    pieces = client.generate(ask(prompt(engine), max_tokens=600, adapter=adapter))
    await anext(pieces)
    await client.unload(adapter.digest)
    await anext(pieces)
    assert adapter.digest in (await client.refresh()).adapters
    await pieces.aclose()
    await until(client, lambda status: adapter.digest not in status.adapters)
    again = await answer(client, ask(prompt(engine), adapter=adapter))
    assert again.text == (await answer(client, ask(prompt(engine), adapter=adapter))).text
    await client.unload(adapter.digest)
    await until(client, lambda status: adapter.digest not in status.adapters)


@pytest.mark.parametrize("family", ["llama", "gpt2", "dynamic"])
async def test_idle_adapters_give_way_to_newer_ones(
    family: str, small_engines: dict[str, EngineProcess], tmp_path: Path
) -> None:
    engine = small_engines[family]
    many = [
        Adapter(f"sha256:many{seed}", build_tiny_adapter(engine.base, tmp_path / str(seed), seed, rank=2))
        for seed in range(6)
    ]
    async with connected(engine) as client:

        async def text(adapter: Adapter) -> str:
            return (await answer(client, ask(prompt(engine), max_tokens=20, adapter=adapter))).text

        texts = [await text(adapter) for adapter in many]
        assert len(set(texts)) == len(texts)
        loaded = (await client.refresh()).adapters
        assert 2 <= len(loaded) < len(many)
        assert loaded == tuple(adapter.digest for adapter in many[-len(loaded) :])
        busy = client.generate(ask(prompt(engine), max_tokens=900, adapter=many[0]))
        await anext(busy)
        assert [await text(adapter) for adapter in many[1:]] == texts[1:]
        assert many[0].digest in (await client.refresh()).adapters
        await busy.aclose()
        assert await text(many[0]) == texts[0]


async def test_a_pinned_adapter_stays_until_another_takes_its_pin(
    small_engines: dict[str, EngineProcess], tmp_path: Path
) -> None:
    engine = small_engines["llama"]
    many = [
        Adapter(f"sha256:pin{n}", build_tiny_adapter(engine.base, tmp_path / str(n), n, rank=2), "shop" * (n in (0, 9)))
        for n in range(10)
    ]
    async with connected(engine) as client:

        async def loaded(*asked: Adapter) -> tuple[str, ...]:
            for adapter in asked:
                await answer(client, ask(prompt(engine), max_tokens=2, adapter=adapter))
            return (await client.refresh()).adapters

        assert many[0].digest in await loaded(*many[:9])
        assert many[0].digest not in await loaded(many[9])
        assert many[9].digest in await loaded(*many[1:9])
        await client.unload(many[9].digest)
        assert many[9].digest not in await loaded(many[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
async def test_room_for_what_was_read_is_bounded_and_given_back(
    family: str, small_engines: dict[str, EngineProcess]
) -> None:
    async with connected(small_engines[family]) as client:
        requests = [ask([number + 5] * 400, max_tokens=500) for number in range(ACTIVE)]
        alone = [(await answer(client, request)).text for request in requests]
        tasks = [asyncio.create_task(answer(client, request)) for request in requests]
        seen = await until(client, lambda status: status.waiting > 0)
        assert seen.active == 3
        assert [(await task).text for task in tasks] == alone


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "reason"),
    [
        ([], 1, Reason.SPEC_INVALID),
        ([-1], 1, Reason.SPEC_INVALID),
        ([VOCABULARY], 1, Reason.SPEC_INVALID),
        ([5] * CONTEXT, 1, Reason.PROMPT_TOO_LONG),
        ([5] * 10, CONTEXT, Reason.PROMPT_TOO_LONG),
    ],
    ids=["empty", "negative", "beyond the vocabulary", "prompt too long", "answer too long"],
)
async def test_requests_that_cannot_be_answered_are_refused(
    client: EngineClient, token_ids: list[int], max_tokens: int, reason: Reason
) -> None:
    refused = await failure(client, ask(token_ids, max_tokens=max_tokens))
    assert isinstance(refused, InvalidSpecError)
    assert refused.reason is reason


async def test_prompt_and_answer_may_fill_the_context(client: EngineClient) -> None:
    got = await answer(client, ask([5] * (CONTEXT - 3), max_tokens=3))
    assert got.finished.completion_tokens == 3


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 2**31),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        pack({"type": "generate", "id": 1}),
        pack(Hello(version=PROTOCOL_VERSION + 1)),
        pack(Hello(version=PROTOCOL_VERSION)) + pack({"type": "generate", "id": 1, "request": {"prompt": [1]}}),
        pack(Hello(version=PROTOCOL_VERSION)) + pack({"type": "unknown"}),
        pack(Hello(version=PROTOCOL_VERSION)) + struct.pack(">I", 0),
    ],
    ids=["http", "too long", "not msgpack", "no hello", "other version", "bad request", "unknown type", "empty frame"],
)
async def test_a_malformed_frame_closes_that_connection_only(
    engine: EngineProcess, client: EngineClient, sent: bytes
) -> None:
    pieces = client.generate(ask(prompt(engine), max_tokens=200))
    await anext(pieces)
    reader, writer = await asyncio.open_unix_connection(engine.path)
    writer.write(sent)
    async with asyncio.timeout(60):
        while await reader.read(65536):
            pass
    writer.close()
    assert isinstance(await anext(pieces), TextDelta)
    await pieces.aclose()
    assert engine.process.poll() is None


async def test_the_socket_is_private(engine: EngineProcess, client: EngineClient) -> None:
    assert stat.S_IMODE(engine.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(engine.path.parent.stat().st_mode) == 0o700


async def test_a_second_engine_on_the_same_data_is_refused(engine: EngineProcess, client: EngineClient) -> None:
    second = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "knowledge_engine.inference.engine",
        env=os.environ | engine.settings.environment(),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await second.communicate()
    assert second.returncode == 1
    assert b"another engine is running" in errors
    assert (await answer(client, ask(prompt(engine), max_tokens=2))).finished.completion_tokens == 2


def test_a_long_data_folder_still_gives_a_socket_that_can_be_bound(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 90) / ("y" * 90)
    paths = [socket_path(Settings(data_dir=folder)) for folder in (deep, deep / "other", tmp_path)]
    assert len(set(paths)) == 3
    assert all(len(os.fsencode(path)) < 104 for path in paths)


async def test_a_folder_that_others_can_enter_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "engine.sock"))
        listener.listen()
        client = EngineClient(folder / "engine.sock")
        await client.start()
        await until(client, lambda status: "0700" in status.detail)
        await client.close()


async def test_without_an_engine_requests_fail_with_a_retry_hint(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "engine.sock")
    await client.start()
    refused = await failure(client, ask([1]))
    assert isinstance(refused, UpstreamError)
    assert refused.reason is Reason.ENGINE_UNAVAILABLE
    assert refused.retry_after_seconds is not None
    assert (await client.refresh()).state == "down"
    await client.close()


async def test_a_killed_engine_fails_its_requests_and_is_found_again(base: Path, tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path, base)
    try:
        async with connected(engine) as client:
            tasks = [asyncio.create_task(answer(client, ask(prompt(engine), max_tokens=900))) for _ in range(ACTIVE)]
            await until(client, lambda status: status.active == ACTIVE)
            engine.process.kill()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, UpstreamError)
                assert result.reason is Reason.ENGINE_UNAVAILABLE
            assert client.status.state == "down"
            engine.process.wait(30)
            engine.start()
            status = await until(client, lambda status: status.state != "down")
            if status.state != "ready":  # it listens before it has loaded
                refused = await failure(client, ask(prompt(engine)))
                assert refused.reason is Reason.BASE_MODEL_LOADING
                assert refused.retry_after_seconds is not None
            await until(client, lambda status: status.state == "ready")
            assert (await answer(client, ask(prompt(engine), max_tokens=3))).finished.completion_tokens == 3
            running = asyncio.create_task(answer(client, ask(prompt(engine), max_tokens=900)))
            await until(client, lambda status: status.active == 1)
            assert await asyncio.to_thread(engine.stop) == 0
            with pytest.raises(UpstreamError):
                await running
            assert not engine.path.exists()
    finally:
        engine.process.kill()
        engine.process.wait()


async def test_an_engine_that_cannot_load_says_why_and_ends(tmp_path: Path) -> None:
    base = build_tiny_base(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    engine = EngineProcess(tmp_path, base)
    client = EngineClient(engine.path)
    await client.start()
    try:
        assert await asyncio.to_thread(engine.process.wait, STARTUP_SECONDS) == 1
        await until(client, lambda status: "lacks tokenizer.json" in status.detail)
    finally:
        await client.close()
        engine.process.kill()
        engine.process.wait()


def test_an_engine_ends_with_its_parent(base: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, base_model=str(base))
    starter = (
        "import os, subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-m', 'knowledge_engine.inference.engine', '--parent-pid', "
        "str(os.getpid())]); print(child.pid, flush=True)"
    )
    found = subprocess.run(
        [sys.executable, "-c", starter],
        env=os.environ | settings.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=60,
    )
    deadline = time.monotonic() + 60
    while is_running(int(found.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
