"""Preflight through the real server: what is estimated, what is refused, and how near it comes to a real run."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from knowledge_engine import devices
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.client import Client
from knowledge_engine.core import BASE, DatasetKind, Job, JobState, LoraConfig, TrainingResult, TrainingSpec
from knowledge_engine.errors import KnowledgeEngineError, Reason
from knowledge_engine.inference.lease import MemoryLease
from knowledge_engine.server.app import RunningServer, start_server
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.text import Example
from knowledge_engine.training.estimate import Linear, Material, Need, Row, Shape, compute_need, demand_room, read_shape
from tests.running import wait_until
from tests.tiny import FAMILIES, build_random_llama, build_tiny_base

GIB = 2**30
WIDE = {"width": 256, "inner": 1024, "layers": 8, "heads": 4, "key_value_heads": 2, "vocabulary": 8192}


def rows(count: int = 24, words: int = 12) -> bytes:
    return b"".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "Which shoe?"},
                    {"role": "assistant", "content": f"the trail shoe {number} " * (words + number % 7)},
                ]
            }
        ).encode()
        + b"\n"
        for number in range(count)
    )


def spec(**changes: Any) -> TrainingSpec:
    values: dict[str, Any] = {
        "dataset": "talks",
        "model": "shop",
        "use_qlora": False,
        "eval_split": 0.2,
        "max_steps": 3,
    }
    return TrainingSpec(**values | changes)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[tuple[Client, RunningServer]]:
    """A server with a prepared base and a dataset `talks`; call its client in threads."""
    await asyncio.to_thread(prepared, settings)
    async with await start_server(settings) as server:
        with Client(server.address) as client:
            await asyncio.to_thread(client.upload_dataset, "talks", rows(), kind=DatasetKind.CONVERSATIONS)
            yield client, server


def prepared(settings: Settings) -> Base:
    (settings.data_dir / "bases").mkdir(parents=True, exist_ok=True)
    return prepare_base(settings, BASE, lambda phase, fraction: None)


async def ended(client: Client, job: Job) -> Job:
    for _ in range(1200):
        job = await asyncio.to_thread(client.get_job, job.id)
        if job.state.is_terminal:
            return job
        await asyncio.sleep(0.1)
    raise AssertionError("it never ended")


async def refusal(call: Callable[..., object], *arguments: object) -> KnowledgeEngineError:
    with pytest.raises(KnowledgeEngineError) as caught:
        await asyncio.to_thread(call, *arguments)
    return caught.value


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide and deep enough that a batch matters beside the libraries."""
    return build_random_llama(tmp_path_factory.mktemp("wide") / "base", **WIDE)


def test_a_peak_is_that_of_the_process_and_not_of_who_started_it() -> None:
    ballast = bytearray(os.urandom(2**10) * 300_000)  # 300 MB, resident
    code = "from knowledge_engine.devices import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < len(ballast) < devices.peak_memory()


async def test_an_estimate_comes_near_a_real_run_which_then_gives_the_rate(make_settings: Any) -> None:
    async with serving(make_settings()) as (client, _):
        asked = spec(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=7, save_steps=3)
        estimate = await asyncio.to_thread(client.estimate_training, asked)
        assert estimate.training_seconds is None
        assert estimate.memory.low_bytes < estimate.memory.expected_bytes < estimate.memory.high_bytes
        assert estimate.fits
        assert not estimate.refusal
        assert estimate.nearest_spec is None
        assert estimate.device == devices.default_device()
        assert estimate.total_memory_bytes > estimate.memory.expected_bytes
        assert estimate.held_memory_bytes == {}
        assert 0 < estimate.disk_bytes < estimate.free_disk_bytes

        job = await ended(client, await asyncio.to_thread(client.create_training_job, asked))
        assert isinstance(job.result, TrainingResult), job.error
        assert (estimate.num_steps, estimate.num_tokens) == (job.result.num_steps, job.result.num_tokens)
        if estimate.device == devices.CPU:
            assert estimate.memory.expected_bytes == pytest.approx(job.result.peak_memory_bytes, rel=0.15)

        again = await asyncio.to_thread(client.estimate_training, asked)
        assert again.training_seconds == pytest.approx(job.result.training_seconds, rel=0.01)
        other = await asyncio.to_thread(client.estimate_training, spec(use_qlora=True))
        assert other.training_seconds is None


async def test_a_job_that_cannot_fit_is_refused_with_settings_that_do(make_settings: Any, wide_base: Path) -> None:
    settings = make_settings(base_model=str(wide_base))
    base = prepared(settings)
    async with serving(settings) as (client, _):
        asked = spec(per_device_train_batch_size=16)
        large = await asyncio.to_thread(client.estimate_training, asked)
        small = await asyncio.to_thread(
            client.estimate_training, spec(per_device_train_batch_size=4, gradient_accumulation_steps=4)
        )
    limit = (large.memory.expected_bytes + small.memory.expected_bytes) // 2
    async with serving(settings.model_copy(update={"memory_limit_bytes": limit})) as (client, _):
        estimate = await asyncio.to_thread(client.estimate_training, asked)
        assert not estimate.fits
        assert estimate.total_memory_bytes == limit
        assert estimate.nearest_spec is not None
        error = await refusal(client.create_training_job, asked)
        assert error.reason is Reason.MEMORY_INSUFFICIENT
        assert error.message == estimate.refusal
        assert {violation.field for violation in error.violations} == {
            "spec.per_device_train_batch_size",
            "spec.gradient_accumulation_steps",
        }
        assert int(error.metadata["needed_bytes"]) == estimate.memory.expected_bytes
        assert int(error.metadata["available_bytes"]) == limit
        assert await asyncio.to_thread(list, client.list_jobs()) == []

        nearest = estimate.nearest_spec
        assert nearest.per_device_train_batch_size * nearest.gradient_accumulation_steps == 16
        fitting = await asyncio.to_thread(client.estimate_training, nearest)
        assert fitting.fits
        assert fitting.memory.expected_bytes <= limit
        assert fitting.num_steps == estimate.num_steps
        job = await asyncio.to_thread(client.create_training_job, nearest)
        await asyncio.to_thread(client.cancel_job, job.id)
        assert (await ended(client, job)).state is JobState.CANCELLED
    assert base.size_bytes > 0


async def test_what_the_engine_holds_counts_and_what_jobs_hold_does_not(make_settings: Any) -> None:
    settings = make_settings(memory_limit_bytes=4 * GIB)
    async with serving(settings) as (client, _):
        state = State.open(settings.state_url, migrate=False)
        state.hold_memory("engine", "cpu", 7 * GIB // 2)
        held = await asyncio.to_thread(client.estimate_training, spec())
        assert held.held_memory_bytes == {"engine": 7 * GIB // 2}
        assert not held.fits
        assert held.nearest_spec is None
        error = await refusal(client.create_training_job, spec())
        assert error.metadata["holders"] == f"engine={7 * GIB // 2}"
        assert not error.violations
        state.release_memory("engine")
        state.hold_memory("jobs/other", "cpu", 7 * GIB // 2)
        assert (await asyncio.to_thread(client.estimate_training, spec())).fits
        state.close()


async def test_an_estimate_refuses_what_create_refuses(make_settings: Any) -> None:
    async with serving(make_settings()) as (client, _):
        await asyncio.to_thread(client.upload_dataset, "one", rows(1))
        for wrong, reason in (
            (spec(dataset="none"), Reason.DATASET_NOT_FOUND),
            (spec(base_model="llama-9"), Reason.BASE_MODEL_UNKNOWN),
            (spec(max_length=16), Reason.EXAMPLE_TOO_LONG),
            (spec(max_length=131_072), Reason.SPEC_INVALID),
            (spec(dataset="one"), Reason.SPLIT_IMPOSSIBLE),
        ):
            errors = [await refusal(call, wrong) for call in (client.estimate_training, client.create_training_job)]
            assert {error.reason for error in errors} == {reason}
            assert errors[0].message == errors[1].message


async def test_a_base_that_is_not_prepared_cannot_be_estimated_but_asked_for(make_settings: Any) -> None:
    """Its worker finds out itself, before it loads."""
    async with await start_server(make_settings(memory_limit_bytes=2**20)) as server:
        with Client(server.address) as client:
            await asyncio.to_thread(client.upload_dataset, "talks", rows())
            error = await refusal(client.estimate_training, spec())
            assert error.reason is Reason.BASE_MODEL_LOADING
            job = await ended(client, await asyncio.to_thread(client.create_training_job, spec()))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["reason"] == Reason.MEMORY_INSUFFICIENT


@pytest.mark.slow
async def test_a_job_whose_base_was_not_prepared_holds_what_its_worker_finds(make_settings: Any) -> None:
    settings = make_settings()
    async with await start_server(settings) as server:
        with Client(server.address) as client:
            await asyncio.to_thread(client.upload_dataset, "talks", rows())
            job = await asyncio.to_thread(client.create_training_job, spec(max_steps=10_000))
            state = State.open(settings.state_url, migrate=False)
            assert state.held_memory() == {}
            held = f"jobs/{job.id}"
            await asyncio.to_thread(wait_until, lambda: state.held_memory().get(held), 120)
            estimate = await asyncio.to_thread(client.estimate_training, spec(max_steps=10_000))
            assert estimate.held_memory_bytes == {job.id: estimate.memory.expected_bytes}
            state.close()
            await asyncio.to_thread(client.cancel_job, job.id)
            await ended(client, job)


async def test_gradient_checkpointing_comes_where_nothing_smaller_fits(make_settings: Any, wide_base: Path) -> None:
    settings = make_settings(base_model=str(wide_base))
    asked = spec(per_device_train_batch_size=1, max_steps=2, eval_split=0)
    long_rows = rows(8, words=100)
    async with serving(settings) as (client, _):
        await asyncio.to_thread(client.upload_dataset, "long", long_rows)
        asked = asked.model_copy(update={"dataset": "long"})
        plain = await asyncio.to_thread(client.estimate_training, asked)
        assert not plain.gradient_checkpointing
    limit = plain.memory.expected_bytes - 1
    async with serving(settings.model_copy(update={"memory_limit_bytes": limit})) as (client, _):
        less = await asyncio.to_thread(client.estimate_training, asked)
        assert less.fits, less.refusal
        assert less.gradient_checkpointing
        assert less.nearest_spec is None
        assert less.memory.expected_bytes < 0.95 * plain.memory.expected_bytes
        # Of several at once fewer are the better way.
        several = await asyncio.to_thread(client.estimate_training, spec(per_device_train_batch_size=16))
        assert not several.gradient_checkpointing
        job = await ended(client, await asyncio.to_thread(client.create_training_job, asked))
        assert isinstance(job.result, TrainingResult), job.error
        told = await asyncio.to_thread(list, client.watch_job(job.id))
        assert any("layers are computed twice" in str(event) for event in told)


def test_a_worker_looks_for_room_even_where_the_store_does_not_answer(make_settings: Any) -> None:
    settings = make_settings()
    demand_room(settings, spec(), prepared(settings), examples(), examples(2), 1)


def examples(count: int = 8, length: int = 100) -> list[Example]:
    return [
        Example(input_ids=[5] * (length + number), offsets=[], trained=[index > 20 for index in range(length + number)])
        for number in range(count)
    ]


def need(base: Base, length: int = 100, num_devices: int = 1, **changes: Any) -> Need:
    shape = read_shape(base.folder)
    return compute_need(
        shape,
        spec(**changes),
        Material([*map(Row.of, examples(length=length))], [*map(Row.of, examples(2))]),
        base,
        devices.CPU,
        num_devices=num_devices,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 4},
        {"use_qlora": True},
        {"lora": LoraConfig(rank=64)},
        {"lora": LoraConfig(dropout=0)},
        {"lora": LoraConfig(target_modules=("q_proj",))},
        {"length": 200},
    ],
    ids=str,
)
def test_every_setting_that_takes_memory_changes_the_estimate(
    make_settings: Any, wide_base: Path, changes: dict[str, Any]
) -> None:
    base = prepared(make_settings(base_model=str(wide_base)))
    assert need(base, **changes).memory != need(base).memory


def test_devices_share_the_linear_weights(make_settings: Any, wide_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Llama-2-70B each device holds all while it loads, and then its share."""
    monkeypatch.setattr(devices, "has_bfloat16", lambda: True)
    base = prepared(make_settings(base_model=str(wide_base)))
    sizes = {"q": (8192, 8192), "k": (8192, 1024), "v": (8192, 1024), "o": (8192, 8192)}
    sizes |= {"gate": (8192, 28672), "up": (8192, 28672), "down": (28672, 8192)}
    linears = tuple(Linear(f"model.layers.{i}.{name}_proj", *size) for i in range(80) for name, size in sizes.items())
    weights = sum(linear.inputs * linear.outputs for linear in linears)
    shape = Shape("llama", 8192, 28672, 80, 64, 128, 1024, 32000, linears, weights + 2 * 32000 * 8192, 0, False, True)
    rows = Material([Row(3500, 3500, 1000)] * 4, [])

    def memory(num_devices: int) -> int:
        asked = spec(use_qlora=True, gradient_accumulation_steps=4, eval_split=0)
        need = compute_need(shape, asked, rows, base, devices.CUDA, num_devices=num_devices, is_served_in_nf4=True)
        return need.memory.expected_bytes

    quantised = 0.516 * weights
    assert memory(1) - memory(2) == pytest.approx(quantised * (1 / 2 - 2 / 80), rel=0.01)
    assert memory(16) > quantised


def test_processes_on_a_cpu_share_the_host(make_settings: Any, wide_base: Path) -> None:
    base = prepared(make_settings(base_model=str(wide_base)))
    one, three = (need(base, num_devices=number).memory.expected_bytes for number in (1, 3))
    assert three > 2.5 * one


def test_steps_tokens_and_disk_follow_the_spec(make_settings: Any, wide_base: Path) -> None:
    base = prepared(make_settings(base_model=str(wide_base)))
    plain = need(base, max_steps=None, num_train_epochs=2)
    assert plain.num_steps == 16
    assert plain.num_tokens == 2 * sum(len(example.input_ids) for example in examples())
    halved = need(base, max_steps=None, num_train_epochs=2, gradient_accumulation_steps=2)
    assert (halved.num_steps, halved.num_tokens) == (8, plain.num_tokens)
    assert need(base, max_steps=4).num_tokens < plain.num_tokens
    assert need(base, lora=LoraConfig(rank=64)).disk_bytes > plain.disk_bytes


@pytest.mark.parametrize("family", [*FAMILIES, "unheard-of"])
def test_other_architectures_get_a_sane_estimate(make_settings: Any, tmp_path: Path, family: str) -> None:
    folder = build_tiny_base(tmp_path / "base", family if family in FAMILIES else "llama")
    base = prepared(make_settings(base_model=str(folder)))
    known = need(base)
    assert GIB // 2 < known.memory.expected_bytes < 1.1 * GIB
    if family not in FAMILIES:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": config["vocab_size"]}))
        strange = need(base)
        assert strange.memory.high_bytes > known.memory.high_bytes
        assert strange.memory.low_bytes < known.memory.low_bytes


def test_the_engine_says_what_it_holds_until_it_ends(make_settings: Any) -> None:
    settings = make_settings()
    lease = MemoryLease(settings)
    lease.start()  # before there is a store
    lease.expect(12_345)
    state = State.open(settings.state_url)
    try:
        wait_until(lambda: state.held_memory() == {"engine": 12_345})
        lease.measure(room_bytes=2**40)
        wait_until(lambda: state.held_memory()["engine"] > 2**40 + 2**20)
        lease.release()
        assert state.held_memory() == {}
    finally:
        state.close()


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/pod/box\n", {"pod/box/memory.max": "max\n", "pod/memory.max": "4096\n"}, [4096]),
        ("0::/elsewhere\n", {"memory.max": "8192\n"}, [8192]),
        ("5:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "1024\n"}, [1024]),
        ("", {}, []),
    ],
    ids=["v2, the group above", "v2, inside a container", "v1", "none"],
)
def test_a_container_has_the_memory_of_its_limit(
    tmp_path: Path, membership: str, files: dict[str, str], limits: list[int]
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert list(devices.cgroup_limits(tmp_path / "fs", tmp_path / "cgroup")) == limits


@pytest.mark.parametrize(
    ("membership", "files", "rooms"),
    [
        (
            "0::/pod\n",
            {
                "pod/memory.max": "4096\n",
                "pod/memory.current": "3000\n",
                "pod/memory.stat": "anon 1700\nactive_file 300\ninactive_file 1000\n",
            },
            [4096 - 1700],
        ),
        (
            "4:memory:/x\n",
            {
                "memory/x/memory.limit_in_bytes": "1024\n",
                "memory/x/memory.usage_in_bytes": "1000\n",
                "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
            },
            [524],
        ),
        ("0::/pod\n", {"pod/memory.max": "4096\n"}, [4096]),
    ],
    ids=["v2", "v1", "nothing told"],
)
def test_a_container_has_room_for_what_its_groups_do_not_hold(
    tmp_path: Path, membership: str, files: dict[str, str], rooms: list[int]
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert list(devices.cgroup_rooms(tmp_path / "fs", tmp_path / "cgroup")) == rooms


def test_what_is_free_is_no_more_than_the_settings_leave(make_settings: Any) -> None:
    assert devices.free_host_memory(make_settings(memory_limit_bytes=2**20)) < 0
    assert devices.free_host_memory(make_settings()) > 0


def test_the_limit_of_the_settings_is_the_last_word(make_settings: Any) -> None:
    assert devices.total_memory(make_settings(memory_limit_bytes=2**20)) == 2**20
    assert devices.total_memory(make_settings()) > 2**30
