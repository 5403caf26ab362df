"""Sequences whose keys and values lie in blocks, each with an adapter: what models that keep them so have in common."""

from __future__ import annotations

from collections.abc import Generator
from typing import Generic, TypeVar

from knowledge_engine.inference.adapters import Adapters
from knowledge_engine.inference.blocks import BlockPool, Table
from knowledge_engine.inference.wire import EngineRequest

T = TypeVar("T")

DEFAULT_CACHE_BYTES = 2**30


def count_blocks(cache_bytes: int | None, block_bytes: int, block_tokens: int, context_length: int) -> int:
    """How many there is room for; without `cache_bytes`, enough for one whole context at least."""
    if cache_bytes is None:
        cache_bytes = max(DEFAULT_CACHE_BYTES, block_bytes * -(-context_length // block_tokens))
    return max(1, cache_bytes // block_bytes)


class Place(Generic[T]):
    """A sequence's blocks, and what its adapter is there."""

    def __init__(self, table: Table, digest: str | None, content: T) -> None:
        self.table = table
        self.digest = digest
        self.content = content


class Paged(Generic[T]):
    """The places of a `scheduler.Model`."""

    def __init__(self, pool: BlockPool, spare: list[int], adapters: Adapters[T], nothing: T) -> None:
        """`spare` are the blocks of the place beside all others, `nothing` is the content where there is no adapter."""
        self.pool = pool
        self.adapters = adapters
        self.max_tokens = pool.num_tokens
        self._spare = spare
        self._nothing = nothing

    def open(self, request: EngineRequest) -> Generator[None, None, Place[T] | None]:
        """Raises IntegrityError: the adapter's files are not what they should be."""
        digest = request.adapter.digest if request.adapter is not None else None
        owner = f"{digest or ''} {request.caller}"
        table = self.pool.open(owner, request.prompt_token_ids, request.sampling.max_tokens)
        if table is None:
            return None
        if request.adapter is None:
            return Place(table, None, self._nothing)
        try:
            return Place(table, digest, (yield from self.adapters.acquire(request.adapter)))
        except BaseException:
            self.pool.close(table)
            raise

    def close(self, place: Place[T]) -> None:
        self.pool.close(place.table)
        if place.digest is not None:
            self.adapters.release(place.digest)

    def spare(self, digest: str, content: T) -> Place[T]:
        return Place(Table(self._spare, []), digest, content)

    def find_read(self, place: Place[T], num_tokens: int) -> int:
        return self.pool.find_read(place.table, num_tokens)

    def names_from(self, place: Place[T], num_tokens: int) -> list[bytes]:
        return self.pool.names_from(place.table, num_tokens)
