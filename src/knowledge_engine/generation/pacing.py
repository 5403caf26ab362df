"""Who may ask a busy service now, and when it is given up; it knows threads and the clock, not what is asked."""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

from knowledge_engine.errors import KnowledgeEngineError


class Closed(Exception):
    """The client was closed, or another thread met something that cannot heal."""


class Patience(NamedTuple):
    """When a service is given up: after so many tries one after the other that nobody got an answer to, `first_tries`
    before the very first one; or when one question took `tries`, or `seconds` without an answer to anybody.

    The default waits between 6 tries add up to at most half a minute, those between 15 to nine.
    """

    first_tries: int = 6
    silent_tries: int = 15
    tries: int = 30
    seconds: float = 600.0
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0


class Gate:
    """Who may ask now. It opens one by one: the first question goes alone, every answer lets one more in beside it, and
    a rate limit halves them and shuts everybody out for a while."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._changed = threading.Condition()
        self._limit = 1
        self._inside = 0
        self._opens = 0.0
        self._is_first = True
        self._silent = 0
        self._silent_since = 0.0
        self.last_answer = -math.inf
        self.is_closed = False
        self.failure: KnowledgeEngineError | None = None

    def enter(self) -> float:
        """Returns the moment of entry. Raises Closed."""
        with self._changed:
            while not self.is_closed:
                shut = self._opens - time.monotonic()
                if shut <= 0 and self._inside < self._limit:
                    self._inside += 1
                    return time.monotonic()
                self._changed.wait(shut if shut > 0 else None)
        raise Closed

    def count_trouble(self, began: float) -> tuple[int, bool]:
        """How many tries in a row are in vain by now, those that ran side by side counted once; and whether there never
        was an answer."""
        with self._changed:
            if began >= self._silent_since:
                self._silent += 1
                self._silent_since = time.monotonic()
            return self._silent, self._is_first

    def leave(self, *, is_answered: bool = False, shut_for: float | None = None) -> None:
        with self._changed:
            self._inside -= 1
            if is_answered:
                self._limit = min(self._width, self._limit + 1)
                self._is_first = False
                self._silent = 0
                self.last_answer = time.monotonic()
            if shut_for is not None:
                self._limit = max(1, self._limit // 2)
                self._opens = max(self._opens, time.monotonic() + shut_for)
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Raises Closed."""
        with self._changed:
            if self._changed.wait_for(lambda: self.is_closed, seconds):
                raise Closed

    def close(self, failure: KnowledgeEngineError | None) -> None:
        """The first failure counts."""
        with self._changed:
            if not self.is_closed:
                self.failure = failure
            self.is_closed = True
            self._changed.notify_all()
