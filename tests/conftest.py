"""What many tests need: a tiny base, settings for a private service, a running server on a free port."""

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from knowledge_engine.server.app import RunningServer, start_server
from knowledge_engine.settings import _ALIASES, Settings
from knowledge_engine.storage import READ_SECONDS, Bucket
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from tests.seaweed import seaweed as start_seaweed
from tests.tiny import build_tiny_base

# The keys of whoever runs the tests: no test may spend their money or write to their accounts.
for _name in [name for name in os.environ if name.startswith("KNOWLEDGE_") or name in _ALIASES]:
    del os.environ[_name]

_KERNELS = ("compiled.py", "inference/kernels.py", "training/kernels.py")

# Two tests share the cores: threads that spin while they wait slow each other down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Compiles the kernels before workers share the cores, once for what their source says."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None) or not hasattr(config, "cache"):
        return
    root = Path(__file__).parent.parent
    sources = [root / "src" / "knowledge_engine" / name for name in _KERNELS]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    if config.cache.get("kernels/compiled", "") != digest:
        commands = [[sys.executable, "-m", "tests.compile_kernels", part] for part in ("serving", "training")]
        at_work = [subprocess.Popen(command, cwd=root) for command in commands]
        exits = [process.wait() for process in at_work]
        if any(exits):
            pytest.exit("the kernels cannot be compiled", returncode=1)
        config.cache.set("kernels/compiled", digest)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama-shaped base of a few hundred kilobytes."""
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def make_settings(tmp_path: Path, tiny_base: Path) -> Callable[..., Settings]:
    """Settings of a service of one's own: private data, free ports, the tiny base, short waits."""

    def make(**changes: Any) -> Settings:
        values: dict[str, Any] = {
            "data_dir": tmp_path / "data",
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "base_model": str(tiny_base),
            "drain_seconds": 5,
        }
        return Settings(**values | changes)

    return make


@pytest.fixture
async def server(make_settings: Callable[..., Settings]) -> AsyncIterator[RunningServer]:
    """A server without an engine; its job workers are real."""
    async with await start_server(make_settings()) as running:
        yield running


@pytest.fixture
async def channel(server: RunningServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server; each test takes buckets of its own."""
    with start_seaweed(tmp_path_factory.mktemp("seaweed")) as running:
        yield running


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultyProxy]:
    """The way to that server for tests that make it go wrong."""
    with faulty_proxy(seaweed.endpoint) as running:
        yield running


@pytest.fixture
def s3_settings(make_settings: Callable[..., Settings], seaweed: Seaweed) -> Callable[..., Settings]:
    """Settings with a fresh bucket, the same one for every call."""
    values = {
        "s3_bucket": seaweed.new_bucket(),
        "s3_endpoint_url": seaweed.endpoint,
        "aws_region": "us-east-1",
        "aws_access_key_id": ACCESS_KEY,
        "aws_secret_access_key": SECRET_KEY,
    }
    return lambda **changes: make_settings(**values | changes)


@pytest.fixture
def make_bucket(s3_settings: Callable[..., Settings]) -> Iterator[Callable[..., Bucket]]:
    """Buckets as patient as they are in service, or as `read_seconds` says; other arguments change their settings."""
    opened: dict[tuple[tuple[str, Any], ...], Bucket] = {}

    def make(*, read_seconds: float = READ_SECONDS, **changes: Any) -> Bucket:
        key = (("read_seconds", read_seconds), *sorted(changes.items()))
        if key not in opened:  # a client takes a while to make
            opened[key] = Bucket(s3_settings(**changes), connect_seconds=1, read_seconds=read_seconds)
        return opened[key]

    yield make
    for bucket in opened.values():
        bucket.close()
