"""`knowledge-engine serve` as a real process, for tests that need the whole service."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from knowledge_engine.client import Client
from knowledge_engine.errors import KnowledgeEngineError
from knowledge_engine.supervisor import MODULES


class Service(NamedTuple):
    process: subprocess.Popen[bytes]
    grpc_address: str
    http_address: str
    log: Path

    def part(self, name: str) -> psutil.Process | None:
        """The live process of a part."""
        try:
            children = psutil.Process(self.process.pid).children()
            found = [child for child in children if MODULES[name] in child.cmdline()]
        except psutil.Error:
            return None
        return found[0] if found else None

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def environment(folder: Path, base: Path, **settings: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KNOWLEDGE_")}
    return kept | {
        "KNOWLEDGE_DATA_DIR": str(folder),
        "KNOWLEDGE_BASE_MODEL": str(base),
        "KNOWLEDGE_GRPC_ADDRESS": "127.0.0.1:0",
        "KNOWLEDGE_HTTP_ADDRESS": "127.0.0.1:0",
        "KNOWLEDGE_DRAIN_SECONDS": "2",
        **settings,
    }


def start(folder: Path, base: Path, **settings: str) -> Service:
    """`knowledge-engine serve`, ready."""
    log = folder / "service.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "knowledge_engine.cli", "serve", "--json"],
            env=environment(folder, base, **settings),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()
    return Service(process, **json.loads(line), log=log)


def end(service: Service) -> None:
    if service.process.poll() is None:
        service.process.terminate()
        service.process.wait(60)
    if service.process.stdout is not None:
        service.process.stdout.close()


def is_serving(service: Service) -> bool:
    try:
        with Client(service.grpc_address, timeout_seconds=5) as client:
            return client.health()[""] == "SERVING"
    except KnowledgeEngineError:
        return False


def http_status(service: Service, path: str) -> int:
    host, _, port = service.http_address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
