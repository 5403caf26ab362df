"""The supervised service as real processes: ready, healthy, restarted when a part dies, and gone without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from knowledge_engine.catalogue import DEMO_CATALOGUE
from knowledge_engine.cli.demo import PeakMemory
from knowledge_engine.client import Client
from knowledge_engine.core import DatasetKind, GenerationSpec
from knowledge_engine.settings import Settings
from knowledge_engine.supervisor import MODULES, reachable, with_ports
from tests.running import Service, end, environment, http_status, is_serving, start, wait_until
from tests.tiny import build_tiny_base

KEY = "a-secret-that-must-not-show"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def service(tmp_path: Path, base: Path) -> Iterator[Service]:
    running = start(tmp_path, base)
    yield running
    end(running)


def test_serve_is_ready_and_stops_without_a_trace(tmp_path: Path, base: Path) -> None:
    service = start(tmp_path, base, KNOWLEDGE_API_KEYS=f"shop:{KEY}")
    try:
        assert is_serving(service)
        assert http_status(service, "/api/v1/health") in (200, 503)
        wait_until(lambda: service.part("engine"))
        family = service.family()
        for name in MODULES:
            part = service.part(name)
            assert part is not None
            assert os.getsid(part.pid) == part.pid, "each part leads a session of its own"
        assert not any(KEY in word for process in family for word in process.cmdline())
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        assert [process for process in family if process.is_running()] == []
        assert KEY not in service.log.read_text()
    finally:
        end(service)


@pytest.mark.parametrize("name", ["server", "gateway", "engine"])
def test_killed_part_comes_back(service: Service, name: str) -> None:
    wait_until(lambda: service.part(name))
    killed = service.part(name)
    assert killed is not None
    killed.kill()
    wait_until(lambda: service.part(name) not in (None, killed))
    wait_until(lambda: is_serving(service) and http_status(service, "/api/v1/health") in (200, 503))
    assert f"the {name} was killed by SIGKILL" in service.log.read_text()


def test_part_that_keeps_crashing_stays_down_loudly(service: Service) -> None:
    for _ in range(5):
        wait_until(lambda: service.part("gateway"))
        part = service.part("gateway")
        assert part is not None
        part.kill()
        part.wait(10)
    wait_until(lambda: "ERROR: the gateway was killed by SIGKILL, 5 times in a row" in service.log.read_text())
    assert is_serving(service), "the other parts go on"
    assert service.process.poll() is None


def test_killed_supervisor_takes_its_parts_along(service: Service) -> None:
    wait_until(lambda: service.part("engine"))
    family = service.family()
    assert len(family) >= 3
    service.process.kill()
    service.process.wait(10)
    wait_until(lambda: not [process for process in family if process.is_running()], seconds=40)


def test_stop_ends_workers_that_outlived_a_server(service: Service) -> None:
    with Client(service.grpc_address) as client:
        client.upload_dataset("shop", DEMO_CATALOGUE.read_bytes(), kind=DatasetKind.CATALOGUE)
        job = client.create_generation_job(GenerationSpec(catalogue="shop", num_conversations=100_000))
        seen: list[int] = []
        watch = threading.Thread(target=lambda: seen.extend(event.sequence for event in client.watch_job(job.id)))

        def worker() -> psutil.Process | None:
            found = [p for p in psutil.process_iter(["cmdline"]) if job.id in (p.info["cmdline"] or ())]
            return found[0] if found else None

        watch.start()
        wait_until(worker)
        running, server = worker(), service.part("server")
        assert running is not None
        assert server is not None
        time.sleep(1.5)  # the supervisor looks once a second for who there is
        server.kill()
        wait_until(lambda: service.part("server") not in (None, server))
        wait_until(lambda: is_serving(service))
        assert running.is_running(), "a crash of the server does not end its workers"
        before = len(seen)
        wait_until(lambda: len(seen) > before)  # the watch was taken up again by itself
        client.cancel_job(job.id)
        watch.join(60)
        assert not watch.is_alive()
        assert seen == list(range(1, len(seen) + 1)), "no event twice, none missing"
    end(service)
    assert not running.is_running()


@pytest.mark.parametrize("name", ["KNOWLEDGE_GRPC_ADDRESS", "KNOWLEDGE_HTTP_ADDRESS"])
def test_taken_address_is_named(tmp_path: Path, base: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-m", "knowledge_engine.cli", "serve"],
            env=environment(tmp_path, base, **{name: address}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 3
    assert ended.stdout == ""
    assert name in ended.stderr
    assert address in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_second_service_on_the_same_data_is_refused(service: Service, tmp_path: Path, base: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "knowledge_engine.cli", "serve"],
        env=environment(tmp_path, base),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 11
    assert "another server is running" in ended.stderr
    assert is_serving(service)


def test_part_runs_alone(tmp_path: Path, base: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "knowledge_engine.cli", "serve", "--only", "server"],
        env=environment(tmp_path, base),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["grpc_address"]
        with Client(address) as client:
            assert client.health()[""] == "SERVING"
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_taken_ports_are_avoided_on_request_and_kept_otherwise() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = Settings(_env_file=None, grpc_address=address, http_address="127.0.0.1:0")
        assert with_ports(settings).grpc_address == address
        assert with_ports(settings).http_address != "127.0.0.1:0"
        assert with_ports(settings, avoid_taken=True).grpc_address not in (address, "127.0.0.1:0")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("[::]:1", "[::1]:1"),
        ("localhost:1", "localhost:1"),
        ("10.0.0.1:1", "10.0.0.1:1"),
    ],
)
def test_wildcard_addresses_are_reached_over_loopback(address: str, expected: str) -> None:
    assert reachable(address) == expected


def test_peak_memory_counts_children() -> None:
    hoard = "import time; held = bytearray(b'x') * 200_000_000; print('full', flush=True); time.sleep(60)"
    with PeakMemory() as memory:
        child = subprocess.Popen([sys.executable, "-c", hoard], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline()
        wait_until(lambda: memory.peak_bytes > 200_000_000)
        child.kill()
        child.wait()
        child.stdout.close()
    own = psutil.Process().memory_full_info().pss
    assert 200_000_000 < memory.peak_bytes < own + 1_000_000_000
