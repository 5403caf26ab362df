"""What the engine says of the memory it holds, so that trainings are started beside it only where they fit.

Serving has precedence: the lease asks nobody, and a store that does not answer is tried again and disturbs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from pathlib import Path
from typing import Any

from knowledge_engine import devices
from knowledge_engine.settings import Settings
from knowledge_engine.state import State

HOLDER = "engine"
REFRESH_SECONDS = 3.0
_STORE_PATIENCE_SECONDS = 1.0
_LAST_SECONDS = 2.0

_LOG = logging.getLogger(__name__)


class MemoryLease:
    """The engine's entry among those who hold memory, kept true by a thread of its own until `release`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._expected_bytes = 0
        self._largest_bytes = 0
        self._is_ready = False
        self._over = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="memory", daemon=True)
        self._is_trouble_told = False

    def start(self) -> None:
        self._thread.start()

    def expect(self, size_bytes: int) -> None:
        """Holds so much from now on: the base, before it is loaded."""
        self._expected_bytes = size_bytes
        self._changed.set()

    def measure(self, room_bytes: int) -> None:
        """From now on holds what the process really takes, and `room_bytes` more than it takes now, which it may fill
        later; what came before, the preparation of the base above all, does not count."""
        self._largest_bytes = _taken_bytes() + room_bytes
        self._is_ready = True
        self._changed.set()

    def release(self) -> None:
        """Gives the memory back and ends the thread; takes seconds at most."""
        self._over.set()
        self._changed.set()
        self._thread.join(_LAST_SECONDS)

    def _keep(self) -> None:
        state: State | None = None
        while not self._over.is_set():
            self._changed.clear()
            try:
                state = state or self._open()
                if state is not None and (held := self._held()):
                    state.hold_memory(HOLDER, devices.default_device(), held)
                self._is_trouble_told = False
            except Exception as error:
                self._tell(error)
            self._changed.wait(REFRESH_SECONDS)
        if state is not None:
            with contextlib.suppress(Exception):
                state.release_memory(HOLDER)
                state.close()

    def _open(self) -> State | None:
        """None while no server has made the store."""
        url = self._settings.state_url
        if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
            return None
        return State.open(url, migrate=False, busy_timeout_seconds=_STORE_PATIENCE_SECONDS)

    def _held(self) -> int:
        if self._is_ready:
            self._largest_bytes = max(self._largest_bytes, _taken_bytes())
        return max(self._expected_bytes, self._largest_bytes)

    def _tell(self, error: Exception) -> None:
        if not self._is_trouble_told:
            _LOG.warning("the store does not learn how much memory the engine holds: %s", error)
        self._is_trouble_told = True


def _taken_bytes() -> int:
    """Of the device: what torch has reserved there, or the resident memory of this process."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and devices.default_device() == devices.CUDA:
        return int(torch.cuda.max_memory_reserved())
    return devices.resident_memory()
