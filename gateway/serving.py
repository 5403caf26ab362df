"""The gateway on a socket: uvicorn, which lets nobody leave an answer unread for ever, and ends with a last word."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from gateway.app import create_app
from gateway.backend import Backend
from knowledge_engine.settings import Settings, split_address

_LAST_WORDS_SECONDS = 2.0
"""From the end of the drain to the hard end of requests that are still there; the server's last words come first."""


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        SystemExit: 1 when the address is taken.
    """
    host, port = split_address(settings.http_address)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop",
        http=_protocol(settings.write_timeout_seconds),
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds + _LAST_WORDS_SECONDS),
    )
    server = _Server(config, app.state.backend, settings.drain_seconds)
    server.run()
    if not server.started:
        raise SystemExit(1)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, backend: Backend, drain_seconds: float) -> None:
        super().__init__(config)
        self._backend = backend
        self._drain_seconds = drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Else every full collection looks at all that was imported, and for 0.1 s nobody is answered.
        gc.collect()
        gc.freeze()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A server that stops beside us says by itself why its calls end; it has a moment more to do so.
        seconds = self._drain_seconds + _LAST_WORDS_SECONDS / 2
        last_words = asyncio.get_running_loop().call_later(seconds, self._backend.end_calls)
        await super().shutdown(sockets)
        last_words.cancel()


def _protocol(write_timeout_seconds: float) -> type[asyncio.Protocol]:
    class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # a class chosen at run time
        """Drops a connection whose peer takes nothing of what waits for it; the request ends as if it had gone."""

        _patience: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._patience = asyncio.get_running_loop().call_later(write_timeout_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._be_patient()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._be_patient()
            super().connection_lost(exc)

        def _be_patient(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    found: Any = Impatient
    return found  # type: ignore[no-any-return]
