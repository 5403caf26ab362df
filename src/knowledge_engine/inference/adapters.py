"""Which adapters are loaded: by version digest, within a budget of memory, the least recently used idle ones give way.

One that answers or is pinned is never taken away; one that fails its self-test is not kept, and not tried again while
its files are the same. Knows nothing of what an adapter is made of; no torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from knowledge_engine.errors import IntegrityError, Reason, from_dict
from knowledge_engine.inference.wire import Adapter

T = TypeVar("T")
R = TypeVar("R")

_Stamp = tuple[tuple[str, int, int, int], ...]


class _Entry(Generic[T]):
    def __init__(self, content: T, size_bytes: int) -> None:
        self.content = content
        self.size_bytes = size_bytes
        self.num_users = 0
        self.is_unloading = False


class Adapters(Generic[T]):
    """`load` gives an adapter and its size in bytes; `remove` frees it. `prove`, where it is set, is asked of each that
    was loaded before it answers, and raises where it should not; others may be served between its steps."""

    prove: Callable[[Adapter, T], Iterator[None]] | None = None

    def __init__(
        self, load: Callable[[Adapter], tuple[T, int]], remove: Callable[[T], None], budget_bytes: int
    ) -> None:
        self._load = load
        self._remove = remove
        self._budget_bytes = budget_bytes
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._unproven: dict[str, _Entry[T]] = {}
        self._pinned: dict[str, str] = {}
        """Digests that stay, by pin."""
        self._failed: dict[str, tuple[_Stamp, IntegrityError]] = {}
        """What failed its self-test, by digest, and with which files."""
        self.num_loads = 0
        self.num_evictions = 0
        """Of those that gave way; not of those that were to be forgotten."""

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def size_bytes(self) -> int:
        """Of all that are loaded."""
        return sum(entry.size_bytes for entry in tuple(self._entries.values()))

    def acquire(self, adapter: Adapter) -> Generator[None, None, T]:
        """Loads the adapter unless it is there, and keeps it until `release`. In steps; one that is left before its end
        has done nothing. One adapter is loaded at a time.

        Raises:
            IntegrityError: its files are not what they should be; SELF_TEST_FAILED.
        """
        entry = self._entries.get(adapter.digest)
        if entry is None:
            entry = self._entries[adapter.digest] = yield from self._load_proven(adapter)
            self.num_loads += 1
        if adapter.pin:
            self._pinned[adapter.pin] = adapter.digest
        entry.num_users += 1
        self._entries.move_to_end(adapter.digest)
        self._make_room()
        return entry.content

    def release(self, digest: str) -> None:
        """Ends one use."""
        entry = self._entries[digest]
        entry.num_users -= 1
        if entry.is_unloading and not entry.num_users:
            self._drop(digest)
        self._make_room()

    def unload(self, digest: str) -> None:
        """Forgets the adapter, at once or after its last use; one that is being loaded has a use before it."""
        self._failed.pop(digest, None)
        entry = self._entries.get(digest) or self._unproven.get(digest)
        if entry is not None and (entry.num_users or digest in self._unproven):
            entry.is_unloading = True
        elif entry is not None:
            self._drop(digest)

    def _load_proven(self, adapter: Adapter) -> Generator[None, None, _Entry[T]]:
        stamp = _stamp(adapter.folder)
        if adapter.digest in self._failed:
            known, error = self._failed[adapter.digest]
            if known == stamp:  # loading and testing again would hold up everybody who is being answered
                raise from_dict(error.to_dict())
        entry = self._unproven[adapter.digest] = _Entry(*self._load(adapter))
        try:
            if self.prove is not None:
                yield from self.prove(adapter, entry.content)
        except BaseException as error:
            self._remove(entry.content)
            if isinstance(error, IntegrityError) and error.reason is Reason.SELF_TEST_FAILED:
                self._failed[adapter.digest] = stamp, error
            raise
        finally:
            del self._unproven[adapter.digest]
        self._failed.pop(adapter.digest, None)
        return entry

    def _make_room(self) -> None:
        kept = set(self._pinned.values())
        idle = [digest for digest, entry in self._entries.items() if not entry.num_users and digest not in kept]
        for digest in idle:
            if self.size_bytes <= self._budget_bytes:
                return
            self._drop(digest)
            self.num_evictions += 1

    def _drop(self, digest: str) -> None:
        self._remove(self._entries.pop(digest).content)


def at_once(steps: Generator[None, None, R]) -> R:
    """What comes of them, taken one after the other."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: R = end.value
            return result


def _stamp(folder: Path) -> _Stamp:
    """Another one when a file in the folder was changed or exchanged."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    stats = [(path.name, path.stat()) for path in paths]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
