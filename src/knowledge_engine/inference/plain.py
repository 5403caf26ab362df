"""Any base, through transformers' own forward and PEFT's adapters: one sequence in each forward pass.

Slower than `int8.py` and open to every architecture, precision and device. As every pass is of one sequence, an answer
does not depend on who else is being answered.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from knowledge_engine import modeling
from knowledge_engine.inference.adapters import Adapters
from knowledge_engine.inference.wire import Adapter, EngineRequest

PIECE_TOKENS = 512
"""Prompt tokens read in one pass: a long prompt neither stalls the others nor outlives its abort. Fixed, because other
pieces sum in another order and may give another answer."""


class PlainPlace:
    """A sequence's keys and values, and which adapter reads them."""

    def __init__(self, cache: DynamicCache, digest: str | None) -> None:
        self.cache: DynamicCache | None = cache
        self.digest = digest


class PlainModel:
    """`scheduler.Model` of a transformers model."""

    piece_tokens = PIECE_TOKENS
    step_tokens = sys.maxsize
    num_drafts = 0
    block_tokens = 1
    max_tokens: int | None = None
    room_bytes = 0
    pool = None

    def __init__(self, model: PreTrainedModel, adapter_budget_bytes: int) -> None:
        # Adapters replace layers inside this very object, so it is the one to call with or without them.
        self._model = model
        self._tuned: Any = None  # PEFT's wrapper, once there was an adapter
        self._names: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._selected: str | None = None
        """Digest of the adapter that forward passes go through now; None is the bare base, empty is not known."""
        self.adapters = Adapters(self._load, self._remove, adapter_budget_bytes)
        self.vocabulary_size = int(model.config.get_text_config().vocab_size)

    def open(self, request: EngineRequest) -> Generator[None, None, PlainPlace]:
        """Raises IntegrityError: the adapter's files are not what they should be."""
        digest = None
        if request.adapter is not None:
            yield from self.adapters.acquire(request.adapter)
            digest = request.adapter.digest
        return PlainPlace(DynamicCache(config=self._model.config), digest)

    def close(self, place: PlainPlace) -> None:
        place.cache = None
        if place.digest is not None:
            self.adapters.release(place.digest)

    def spare(self, digest: str, content: str) -> PlainPlace:
        return PlainPlace(DynamicCache(config=self._model.config), digest)

    def find_read(self, place: PlainPlace, num_tokens: int) -> int:
        """Nothing is shared here."""
        return num_tokens

    def names_from(self, place: PlainPlace, num_tokens: int) -> list[bytes]:
        return []

    def forward(
        self, pieces: Sequence[tuple[PlainPlace, int, list[int], int]]
    ) -> Iterator[tuple[int, torch.Tensor | Exception]]:
        """One pass after the other; those of the adapter that is selected come first, so that a step switches as
        seldom as can be. What was closed meanwhile is left out."""

        def turn(index: int) -> tuple[bool, str]:
            digest = pieces[index][0].digest
            return digest != self._selected, digest or ""

        for index in sorted(range(len(pieces)), key=turn):
            place, _, token_ids, num_logits = pieces[index]
            if place.cache is None:
                continue
            try:
                yield index, self._pass(place, token_ids, num_logits)
            except Exception as error:
                yield index, error

    def _pass(self, place: PlainPlace, token_ids: list[int], num_logits: int) -> torch.Tensor:
        self._select(place.digest)
        with torch.inference_mode():
            result = self._model(
                input_ids=torch.tensor([token_ids], device=self._model.device),
                past_key_values=place.cache,
                use_cache=True,
                logits_to_keep=max(1, num_logits),
            )
        logits: torch.Tensor = result.logits[0]
        return logits[len(logits) - num_logits :]

    def _select(self, digest: str | None) -> None:
        if digest == self._selected or self._tuned is None:
            return  # a base that was never wrapped has nothing to select
        self._selected = ""  # until it has worked
        modeling.select_adapter(self._tuned, None if digest is None else self._names[digest])
        self._selected = digest

    def _load(self, adapter: Adapter) -> tuple[str, int]:
        name = f"adapter{next(self._numbers)}"
        self._selected = ""  # loading may move the selection
        model = self._model if self._tuned is None else self._tuned
        self._tuned = modeling.add_adapter(model, adapter.folder, name)
        self._names[adapter.digest] = name
        return adapter.digest, _weights_size(adapter.folder)

    def _remove(self, digest: str) -> None:
        if self._selected == digest:
            self._select(None)
        self._selected = ""  # as may removing
        modeling.remove_adapter(self._tuned, self._names.pop(digest))


def _weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
