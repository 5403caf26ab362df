"""What many tests need: a tiny base, settings for a private service, a running server on a free port."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from knowledge_engine.server.app import RunningServer, start_server
from knowledge_engine.settings import Settings
from tests.tiny import build_tiny_base


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
