"""Whose turn it is: sequences with their own KV cache, taken one token further in each step, round robin.

Owns the model; everything here runs in the one thread that does, except `Scheduler.check`, `steps_of` and the counters,
which only read. Every forward pass is of one sequence, so an answer does not depend on who else is being answered.
Knows nothing of sockets.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, PreTrainedModel

from knowledge_engine import modeling
from knowledge_engine.core import FinishReason, SamplingParams
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason
from knowledge_engine.inference.detokenize import Detokenizer
from knowledge_engine.inference.wire import Adapter, EngineRequest, Finished

PREFILL_TOKENS = 512
"""Prompt tokens read in one step: a long prompt neither stalls the others nor outlives its abort. Fixed, because other
pieces sum in another order and may give another answer."""

MAX_IDLE_ADAPTERS = 8
"""Adapters kept for the next request beside those in use; one of rank 16 on a 7B base is 160 MB in fp32."""

Key = tuple[int, int]
"""Connection and request."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What one step gave one sequence; with `finished` or `error` it is the last."""

    key: Key
    text: str = ""
    finished: Finished | None = None
    error: KnowledgeEngineError | None = None


class Sequence:
    """One answer in the making."""

    def __init__(self, key: Key, request: EngineRequest, receive_time: float, tokenizer: Tokenizer) -> None:
        self.key = key
        self.adapter = request.adapter
        self.sampling = request.sampling
        self.stop_token_ids = frozenset(request.stop_token_ids)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.unread = request.prompt_token_ids  # tokens the model has not seen yet
        self.cache: DynamicCache | None = None
        self.generator = torch.Generator()
        if request.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.sampling.seed)
        self.num_steps = 0
        self._detokenizer = Detokenizer(tokenizer, request.sampling.stop)
        self._num_tokens = 0
        self._receive_time = receive_time
        self._first_token_seconds = 0.0

    def add(self, token: int) -> Output:
        """Takes the next token of the answer."""
        self.unread = [token]
        self._num_tokens += 1
        if self._num_tokens == 1:
            self._first_token_seconds = time.monotonic() - self._receive_time
        is_last = token in self.stop_token_ids
        text = "" if is_last else self._detokenizer.push(token)
        reason = FinishReason.STOP if is_last or self._detokenizer.stopped else None
        if reason is None and self._num_tokens == self.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if reason is None:
            return Output(self.key, text)
        text += self._detokenizer.flush()
        if self._detokenizer.stopped:  # by what was held back
            reason = FinishReason.STOP
        finished = Finished(reason, self.num_prompt_tokens, self._num_tokens, self._first_token_seconds)
        return Output(self.key, text, finished)


@dataclass
class _Loaded:
    name: str
    num_users: int = 0
    unloading: bool = False


class Adapters:
    """LoRA adapters beside one base, by version digest; the least recently used idle ones give way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tuned: Any = None  # PEFT's wrapper, once there was an adapter
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._selected: str | None = None
        self._numbers = itertools.count(1)

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    @property
    def selected(self) -> str | None:
        """Digest of the adapter that forward passes go through now; None is the bare base, empty is not known."""
        return self._selected

    def acquire(self, adapter: Adapter) -> None:
        """Loads the adapter unless it is there, and keeps it until `release`.

        Raises:
            IntegrityError: its files are not what they should be.
        """
        loaded = self._loaded.get(adapter.digest)
        if loaded is None:
            loaded = _Loaded(f"adapter{next(self._numbers)}")
            self._selected = ""  # loading may move the selection
            model = self._model if self._tuned is None else self._tuned
            self._tuned = modeling.add_adapter(model, adapter.folder, loaded.name)
            self._loaded[adapter.digest] = loaded
        self._loaded.move_to_end(adapter.digest)
        loaded.num_users += 1

    def release(self, digest: str) -> None:
        """Ends one use."""
        loaded = self._loaded[digest]
        loaded.num_users -= 1
        if loaded.unloading and not loaded.num_users:
            self._remove(digest)
        idle = [other for other, entry in self._loaded.items() if not entry.num_users]
        for other in idle[: max(0, len(idle) - MAX_IDLE_ADAPTERS)]:
            self._remove(other)

    def unload(self, digest: str) -> None:
        """Forgets the adapter, at once or after its last use."""
        loaded = self._loaded.get(digest)
        if loaded is not None and loaded.num_users:
            loaded.unloading = True
        elif loaded is not None:
            self._remove(digest)

    def select(self, digest: str | None) -> None:
        """Sends the following forward passes through this adapter, or through the bare base."""
        if digest == self._selected or self._tuned is None:
            return  # a base that was never wrapped has nothing to select
        self._selected = ""  # until it has worked
        modeling.select_adapter(self._tuned, None if digest is None else self._loaded[digest].name)
        self._selected = digest

    def _remove(self, digest: str) -> None:
        if self._selected == digest:
            self.select(None)
        self._selected = ""  # as may removing
        modeling.remove_adapter(self._tuned, self._loaded.pop(digest).name)


class Scheduler:
    """Takes up to `max_active` sequences forward together; the rest wait in the order they came."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, context_length: int, max_active: int) -> None:
        # Adapters replace layers inside this very object, so it is the one to call with or without them.
        self._model = model
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._vocabulary_size = int(model.config.get_text_config().vocab_size)
        self._max_active = max_active
        self._active: dict[Key, Sequence] = {}
        self._waiting: dict[Key, Sequence] = {}
        self.adapters = Adapters(model)
        self.num_steps = 0
        self.num_aborted = 0
        self.max_steps_after_abort = 0

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check(self, request: EngineRequest) -> None:
        """Refuses what cannot be answered, before it takes a place.

        Raises:
            InvalidSpecError: PROMPT_TOO_LONG; SPEC_INVALID for an empty prompt or a token the base does not have.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidSpecError("The prompt has no tokens.")
        if min(prompt) < 0 or max(prompt) >= self._vocabulary_size:
            raise InvalidSpecError(f"The prompt has a token outside 0..{self._vocabulary_size - 1}.")
        num_tokens = len(prompt) + request.sampling.max_tokens
        if num_tokens > self._context_length:
            raise InvalidSpecError(
                f"The prompt has {len(prompt)} tokens; with max_tokens {request.sampling.max_tokens} that is more than "
                f"the model's context of {self._context_length}.",
                reason=Reason.PROMPT_TOO_LONG,
                prompt_tokens=len(prompt),
                max_tokens=request.sampling.max_tokens,
                context_length=self._context_length,
            )

    def submit(self, key: Key, request: EngineRequest, receive_time: float) -> None:
        """Puts a checked request at the end of the line; `receive_time` is `time.monotonic()`."""
        self._waiting[key] = Sequence(key, request, receive_time, self._tokenizer)

    def steps_of(self, key: Key) -> int:
        """Steps this sequence has completed; 0 when it has not begun or is over."""
        sequence = self._active.get(key)
        return sequence.num_steps if sequence is not None else 0

    def abort(self, key: Key, num_steps_at_arrival: int) -> None:
        """Removes a sequence; none of its tokens follows. One that has ended is left alone."""
        sequence = self._waiting.pop(key, None) or self._active.get(key)
        if sequence is None:
            return
        self._end(sequence)
        self.num_aborted += 1
        self.max_steps_after_abort = max(self.max_steps_after_abort, sequence.num_steps - num_steps_at_arrival)

    def step(self) -> Iterator[Output]:
        """Takes every active sequence one token (or one piece of its prompt) further.

        The caller may submit and abort between two outputs.
        """
        yield from self._admit()
        for sequence in self._in_order():
            if sequence.key in self._active:  # else aborted since the step began
                yield self._advance(sequence)

    def _admit(self) -> Iterator[Output]:
        while self._waiting and len(self._active) < self._max_active:
            key = next(iter(self._waiting))
            sequence = self._waiting.pop(key)
            try:
                if sequence.adapter is not None:
                    self.adapters.acquire(sequence.adapter)
            except Exception as error:
                yield Output(key, error=_as_ours(error))
                continue
            sequence.cache = DynamicCache(config=self._model.config)
            self._active[key] = sequence

    def _in_order(self) -> list[Sequence]:
        """By adapter, the selected one first, so that a step switches as seldom as can be."""
        selected = self.adapters.selected

        def place(sequence: Sequence) -> tuple[bool, str]:
            digest = sequence.adapter.digest if sequence.adapter is not None else None
            return digest != selected, digest or ""

        return sorted(self._active.values(), key=place)

    def _advance(self, sequence: Sequence) -> Output:
        try:
            logits = self._forward(sequence)
            if sequence.unread:
                return Output(sequence.key)
            output = sequence.add(choose_token(logits, sequence.sampling, sequence.generator))
        except Exception as error:
            output = Output(sequence.key, error=_as_ours(error))
        if output.finished is not None or output.error is not None:
            self._end(sequence)
        return output

    def _forward(self, sequence: Sequence) -> torch.Tensor:
        """Reads the next unread tokens; returns the last one's logits, (V,) on the model's device."""
        self.adapters.select(sequence.adapter.digest if sequence.adapter is not None else None)
        piece, sequence.unread = sequence.unread[:PREFILL_TOKENS], sequence.unread[PREFILL_TOKENS:]
        with torch.inference_mode():
            result = self._model(
                input_ids=torch.tensor([piece], device=self._model.device),
                past_key_values=sequence.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        sequence.num_steps += 1
        self.num_steps += 1
        logits: torch.Tensor = result.logits[0, -1]
        return logits

    def _end(self, sequence: Sequence) -> None:
        sequence.cache = None
        if self._active.pop(sequence.key, None) is not None and sequence.adapter is not None:
            self.adapters.release(sequence.adapter.digest)


def choose_token(logits: torch.Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """The next token from logits (V,): temperature, then the `top_k` likeliest, then the nucleus of `top_p`
    (Holtzman et al. 2019, arXiv 1904.09751), which always keeps the likeliest.

    Raises:
        KnowledgeEngineError: NON_FINITE.
    """
    best = int(logits.argmax())  # a NaN counts as the largest
    if not math.isfinite(float(logits[best])):
        raise KnowledgeEngineError("The model's logits are not finite.", reason=Reason.NON_FINITE)
    if sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0:
        return best
    # In double precision and from the largest logit down: a tiny temperature gives 0 and -inf, not NaN.
    scaled = logits.to("cpu", torch.float64)
    scaled = (scaled - scaled[best]) / sampling.temperature
    tokens: torch.Tensor | None = None
    if 0 < sampling.top_k < len(scaled):
        scaled, tokens = scaled.topk(sampling.top_k)
    elif sampling.top_p < 1:
        scaled, tokens = scaled.sort(descending=True)
    probabilities = scaled.softmax(0)
    if sampling.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= sampling.top_p] = 0
    position = int(torch.multinomial(probabilities, 1, generator=generator))
    return position if tokens is None else int(tokens[position])


def _as_ours(error: Exception) -> KnowledgeEngineError:
    if isinstance(error, KnowledgeEngineError):
        return error
    _log.error("a sequence failed", exc_info=error)
    return KnowledgeEngineError("The engine could not produce this answer.", reason=Reason.INTERNAL)
