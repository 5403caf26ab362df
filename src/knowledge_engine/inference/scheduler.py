"""Whose turn it is: every step takes all active sequences further, and reads what it can of new prompts beside them.

Owns the model; everything here runs in the one thread that does, except `Scheduler.check`, `steps_of` and the counters,
which only read. Knows nothing of sockets, and of a model only what `Model` says.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from knowledge_engine.core import FinishReason, TokenLogprob
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason
from knowledge_engine.inference.adapters import Adapters
from knowledge_engine.inference.blocks import BlockPool
from knowledge_engine.inference.detokenize import Detokenizer
from knowledge_engine.inference.drafts import Drafts
from knowledge_engine.inference.grammar import Grammars, Matcher
from knowledge_engine.inference.sampling import Sampler
from knowledge_engine.inference.wire import EngineRequest, Finished
from knowledge_engine.metrics import EngineMetrics, Holding

Key = tuple[int, int]
"""Connection and request."""

_log = logging.getLogger(__name__)

Piece = tuple[Any, int, list[int], int]
"""A place, how many of its tokens were read before, the tokens to read, and of how many of them, the last ones, the
logits are wanted."""


class Model(Protocol):
    """A base with its adapters, and where sequences keep what was read of them: `int8.py` or `plain.py`."""

    piece_tokens: int
    """The most tokens of one prompt read in one step."""
    step_tokens: int
    """The most prompt tokens, of all, read in one step beside answers under way."""
    num_drafts: int
    """The most guessed tokens that a step looks at."""
    block_tokens: int
    """Pieces of prompts end at multiples of it, so that others who begin alike can take them over."""
    vocabulary_size: int
    room_bytes: int
    """Memory set aside for what will be read, and not taken yet."""

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that prompt and answer may have, where that is not the context alone."""

    @property
    def pool(self) -> BlockPool | None:
        """Where keys and values lie, where that is bounded."""

    @property
    def adapters(self) -> Adapters[Any]: ...

    def open(self, request: EngineRequest) -> Generator[None, None, Any]:
        """A place for a sequence, its adapter loaded, in steps where that takes long; None while there is no room."""

    def close(self, place: Any) -> None:
        """Gives the place back."""

    def spare(self, digest: str, content: Any) -> Any:
        """A place beside all others for `golden.MAX_TOKENS` tokens, through an adapter that `adapters` holds. There is
        one at a time, and nobody closes it."""

    def find_read(self, place: Any, num_tokens: int) -> int:
        """How many tokens of the prompt are read, where `num_tokens` were: others may have read the same."""

    def names_from(self, place: Any, num_tokens: int) -> list[bytes]:
        """Of the prompt's blocks from there on: the same names have the same content."""

    def forward(self, pieces: list[Piece]) -> Iterator[tuple[int, torch.Tensor | Exception]]:
        """Reads the pieces; gives for each its index and the logits (wanted, V), or what went wrong."""


@dataclass(frozen=True)
class Output:
    """What one step gave one sequence; with `finished` or `error` it is the last."""

    key: Key
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finished: Finished | None = None
    error: KnowledgeEngineError | None = None


class Sequence:
    """One answer in the making."""

    def __init__(
        self,
        key: Key,
        request: EngineRequest,
        receive_time: float,
        tokenizer: Tokenizer,
        sampler: Sampler,
        metrics: EngineMetrics,
    ) -> None:
        self.key = key
        self.request = request
        self.sampling = request.sampling
        self.stop_token_ids = frozenset(request.stop_token_ids)
        self.tokens = list(request.prompt_token_ids)
        self.num_read = 0
        """Tokens that the model has seen; their keys and values are kept."""
        self.place: Any = None
        self.drafts = Drafts()
        self.sampler = sampler
        self.num_steps = 0
        self._detokenizer = Detokenizer(tokenizer, request.sampling.stop)
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._metrics = metrics
        self._receive_time = receive_time
        self._queue_seconds = 0.0
        self._first_token_seconds = 0.0
        self._last_token_seconds = 0.0

    @property
    def num_unread(self) -> int:
        return len(self.tokens) - self.num_read

    @property
    def num_tokens(self) -> int:
        """Of the answer, so far."""
        return len(self.tokens) - self._num_prompt_tokens

    @property
    def is_answering(self) -> bool:
        """Whether its prompt is read but for what one step reads in any case."""
        return self.num_unread == 1

    def begin(self, place: Any) -> None:
        """Its turn has come."""
        self.place = place
        self._queue_seconds = time.monotonic() - self._receive_time
        self._metrics.queue.observe(self._queue_seconds)
        self._metrics.prompt_tokens.inc(self._num_prompt_tokens)

    def add(self, token: int) -> Output:
        """Takes the next token of the answer."""
        self.tokens.append(token)
        seconds = time.monotonic() - self._receive_time
        if self.num_tokens == 1:
            self._first_token_seconds = seconds
            self._metrics.first_token.observe(seconds)
        else:
            self._metrics.between_tokens.observe(seconds - self._last_token_seconds)
        self._last_token_seconds = seconds
        is_last = token in self.stop_token_ids
        text = "" if is_last else self._detokenizer.push(token)
        is_over = is_last or self._detokenizer.stopped or self.sampler.is_complete
        reason = FinishReason.STOP if is_over else None
        if reason is None and self.num_tokens == self.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if reason is None:
            return Output(self.key, text)
        text += self._detokenizer.flush()
        if self._detokenizer.stopped:  # by what was held back
            reason = FinishReason.STOP
        finished = Finished(
            reason, self._num_prompt_tokens, self.num_tokens, self._first_token_seconds, self._queue_seconds, seconds
        )
        return Output(self.key, text, finished=finished)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may be the next ones."""
        most = min(most, self.sampling.max_tokens - self.num_tokens - 1)
        if most <= 0:
            return []
        return self.sampler.forced()[:most] or self.drafts.guess(self.tokens, most)


class Scheduler:
    """Takes up to `max_active` sequences forward together; of the rest, the first of the caller with the fewest of them
    is next, so that nobody waits for another's hundred."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        grammars: Grammars,
        context_length: int,
        max_active: int,
        metrics: EngineMetrics,
    ) -> None:
        self._model = model
        self._metrics = metrics
        self._tokenizer = tokenizer
        self.grammars = grammars
        self._context_length = context_length
        self._max_active = max_active
        self._active: dict[Key, Sequence] = {}
        self._waiting: dict[Key, Sequence] = {}
        self._opening: tuple[Key, Generator[None, None, Any]] | None = None
        """Of those who wait, the one whose adapter is being loaded."""
        self.num_steps = 0
        self.num_aborted = 0
        self.max_steps_after_abort = 0

    @property
    def adapters(self) -> Adapters[Any]:
        return self._model.adapters

    @property
    def room_bytes(self) -> int:
        return self._model.room_bytes

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def holding(self) -> Holding:
        """What is held now."""
        adapters, pool = self._model.adapters, self._model.pool
        blocks: dict[str, int] = {}
        if pool is not None:
            used, kept = pool.num_used, pool.num_kept
            blocks = {"used": used, "kept": kept, "free": pool.num_blocks - used - kept}
        return Holding(
            active=self.num_active,
            waiting=self.num_waiting,
            steps=self.num_steps,
            adapters=len(adapters.digests),
            adapter_bytes=adapters.size_bytes,
            adapter_loads=adapters.num_loads,
            adapter_evictions=adapters.num_evictions,
            blocks=blocks,
        )

    def check(self, request: EngineRequest) -> None:
        """Refuses what cannot be answered, before it takes a place.

        Raises:
            InvalidSpecError: PROMPT_TOO_LONG; SPEC_INVALID for an empty prompt or a token the base does not have.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidSpecError("The prompt has no tokens.")
        if min(prompt) < 0 or max(prompt) >= self._model.vocabulary_size:
            raise InvalidSpecError(f"The prompt has a token outside 0..{self._model.vocabulary_size - 1}.")
        num_tokens = len(prompt) + request.sampling.max_tokens
        limit = min(self._context_length, self._model.max_tokens or self._context_length)
        if num_tokens > limit:
            what = (
                "the model's context"
                if limit == self._context_length
                else "what KNOWLEDGE_KV_CACHE_BYTES has room for,"
            )
            raise InvalidSpecError(
                f"The prompt has {len(prompt)} tokens; with max_tokens {request.sampling.max_tokens} that is more than "
                f"{what} of {limit}.",
                reason=Reason.PROMPT_TOO_LONG,
                prompt_tokens=len(prompt),
                max_tokens=request.sampling.max_tokens,
                context_length=limit,
            )

    def submit(self, key: Key, request: EngineRequest, receive_time: float, matcher: Matcher | None = None) -> None:
        """Puts a checked request at the end of the line; `receive_time` is `time.monotonic()`, `matcher` the compiled
        form of its answer."""
        prompt, vocabulary_size = request.prompt_token_ids, self._model.vocabulary_size
        sampler = Sampler(request.sampling, prompt, vocabulary_size, matcher, self.grammars.bytes_of)
        self._waiting[key] = Sequence(key, request, receive_time, self._tokenizer, sampler, self._metrics)

    def steps_of(self, key: Key) -> int:
        """Steps this sequence has completed; 0 when it has not begun or is over."""
        sequence = self._active.get(key)
        return sequence.num_steps if sequence is not None else 0

    def abort(self, key: Key, num_steps_at_arrival: int) -> None:
        """Removes a sequence; none of its tokens follows. One that has ended is left alone."""
        sequence = self._waiting.pop(key, None) or self._active.get(key)
        if sequence is None:
            return
        if self._opening is not None and self._opening[0] == key:
            self._opening[1].close()
            self._opening = None
        self._end(sequence, "aborted")
        self.num_aborted += 1
        self.max_steps_after_abort = max(self.max_steps_after_abort, sequence.num_steps - num_steps_at_arrival)

    def step(self) -> Iterator[Output]:
        """Takes every active sequence further: its next token, or a piece of its prompt.

        The caller may submit and abort between two outputs.
        """
        yield from self._admit()
        planned = self._plan()
        pieces: list[Piece] = [
            (sequence.place, sequence.num_read, token_ids, num_logits) for sequence, token_ids, num_logits in planned
        ]
        if not pieces:
            return
        for index, result in self._model.forward(pieces):
            sequence, token_ids, _ = planned[index]
            sequence.num_steps += 1
            self.num_steps += 1
            if sequence.key in self._active:  # else aborted since the step began
                yield self._advance(sequence, token_ids, result)

    def _admit(self) -> Iterator[Output]:
        """Adapters are loaded one at a time and in steps of their own; meanwhile others have their turns."""
        if self._opening is not None:
            opening, self._opening = self._opening, None
            yield from self._open(*opening)
        while len(self._active) + (self._opening is not None) < self._max_active:
            active = Counter(sequence.request.caller for sequence in self._active.values())
            loaded = None if self._opening is None else {"", *self.adapters.digests}
            turns = [
                (active[sequence.request.caller], key)
                for key, sequence in self._waiting.items()
                if loaded is None or _adapter_of(sequence) in loaded
            ]
            if not turns:
                return
            _, key = min(turns, key=lambda turn: turn[0])
            yield from self._open(key, self._model.open(self._waiting[key].request))
            if key in self._waiting and (self._opening is None or self._opening[0] != key):
                return  # whose turn it is waits for room

    def _open(self, key: Key, steps: Generator[None, None, Any]) -> Iterator[Output]:
        """Takes one step towards a place."""
        try:
            next(steps)
        except StopIteration as end:
            if end.value is not None:
                self._active[key] = sequence = self._waiting.pop(key)
                sequence.begin(end.value)
        except Exception as error:
            self._end(self._waiting.pop(key), "failed")
            yield Output(key, error=_as_ours(error))
        else:
            self._opening = key, steps

    def _plan(self) -> list[tuple[Sequence, list[int], int]]:
        """What each sequence reads in this step, and how many logits it wants."""
        answering = [sequence for sequence in self._active.values() if sequence.is_answering]
        num_drafts = self._model.num_drafts // len(answering) if answering else 0
        planned = []
        for sequence in answering:
            token_ids = [sequence.tokens[-1], *sequence.guess(num_drafts)]
            planned.append((sequence, token_ids, len(token_ids)))
        room = self._model.step_tokens if answering else max(self._model.step_tokens, self._model.piece_tokens)
        size = self._model.block_tokens
        being_read: set[bytes] = set()
        for sequence in self._active.values():
            if sequence.is_answering:
                continue
            num_read = self._model.find_read(sequence.place, sequence.num_read)
            self._metrics.shared_tokens.inc(num_read - sequence.num_read)
            sequence.num_read = num_read
            names = self._model.names_from(sequence.place, num_read)
            if names and names[0] in being_read:
                continue  # and found in the next step
            count = min(sequence.num_unread, self._model.piece_tokens, room)
            if count < sequence.num_unread:
                count = (num_read + count) // size * size - num_read
            if count <= 0:
                continue
            room -= count
            being_read.update(names[: count // size])
            token_ids = sequence.tokens[sequence.num_read : sequence.num_read + count]
            planned.append((sequence, token_ids, int(count == sequence.num_unread)))
        return planned

    def _advance(self, sequence: Sequence, token_ids: list[int], result: torch.Tensor | Exception) -> Output:
        try:
            if isinstance(result, Exception):
                raise result
            output = self._take(sequence, token_ids, result)
        except Exception as error:
            output = Output(sequence.key, error=_as_ours(error))
        if output.finished is not None or output.error is not None:
            self._end(sequence, output.finished.finish_reason if output.finished is not None else "failed")
        return output

    def _take(self, sequence: Sequence, token_ids: list[int], logits: torch.Tensor) -> Output:
        """The tokens that these logits choose: one, and one more for every guess that turns out to be the choice."""
        if not len(logits):
            sequence.num_read += len(token_ids)
            return Output(sequence.key)
        guessed = token_ids[len(token_ids) - len(logits) + 1 :]
        sequence.num_read += len(token_ids) - len(guessed)
        text, logprobs, num_before = "", [], sequence.num_tokens
        for row, guess in zip(logits.to("cpu", torch.float32).numpy(), [*guessed, None], strict=True):
            token, logprob = sequence.sampler.choose(row)
            output = sequence.add(token)
            text += output.text
            if logprob is not None:
                logprobs.append(logprob)
            if output.finished is not None or token != guess:
                break
            sequence.num_read += 1
        num_new = sequence.num_tokens - num_before
        self._metrics.completion_tokens.inc(num_new)
        if guessed:
            self._metrics.guessed_tokens.inc(len(guessed))
            self._metrics.accepted_tokens.inc(num_new - 1)
        return replace(output, text=text, logprobs=tuple(logprobs))

    def _end(self, sequence: Sequence, outcome: str) -> None:
        self._metrics.answers.labels(outcome).inc()
        if self._active.pop(sequence.key, None) is not None:
            self._model.close(sequence.place)
            sequence.place = None


def _adapter_of(sequence: Sequence) -> str:
    """Its digest; empty for none."""
    adapter = sequence.request.adapter
    return "" if adapter is None else adapter.digest


def _as_ours(error: Exception) -> KnowledgeEngineError:
    if isinstance(error, KnowledgeEngineError):
        return error
    _log.error("a sequence failed", exc_info=error)
    return KnowledgeEngineError("The engine could not produce this answer.", reason=Reason.INTERNAL)
