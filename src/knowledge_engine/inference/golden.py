"""The golden self-test: what a version answered when it was published, asked again wherever it is loaded.

`golden.json` in the version's folder holds a few conversations with their tokens, and for each precision that serves
the first tokens of every answer and what the model made of them, in log-probabilities. The conversations are rendered
and the tokens computed by the very code that serves, so that whatever has changed since shows: a template, a base, a
weight, a way to compute. Knows nothing of sockets and jobs, and of a model only what `scheduler.Model` says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from knowledge_engine import modeling
from knowledge_engine.bases import Base
from knowledge_engine.core import Message
from knowledge_engine.errors import IntegrityError, InvalidSpecError, KnowledgeEngineError, Reason
from knowledge_engine.files import read_json, write_durably
from knowledge_engine.inference.adapters import at_once
from knowledge_engine.inference.scheduler import Model
from knowledge_engine.inference.wire import Adapter
from knowledge_engine.manifest import MANIFEST
from knowledge_engine.text import ChatText, with_context

GOLDEN = "golden.json"
MAX_TOKENS = 256
"""Of a prompt with its answer: no model cuts so few into pieces, or needs much room for them."""
TOLERANCES = {
    modeling.INT8: 0.05, modeling.NF4_INT8: 0.05, modeling.FLOAT32: 0.01, modeling.BFLOAT16: 0.5, modeling.NF4: 0.5
}  # fmt: skip
"""Nats that a log-probability may differ by, in each precision that serves: twice what it differs by between kinds of
CPUs, and in float32 more (record 18). Four bits are computed with in bfloat16 where a device has it; for `nf4-int8`
CPUs are assumed to round to NF4 alike."""

_ANSWER_TOKENS = 8
_READ_TOKENS = 32
"""The last tokens of a prompt that are scored, too: a tuned model is so sure of its own words that they show half."""
_MAX_BYTES = 2**18
_PROMPTS: tuple[tuple[Message, ...], ...] = (
    (Message(role="user", content="Hi!"),),
    with_context(
        [Message(role="user", content="Which of these kettles is the cheapest, and is it in stock?")],
        {
            "products": [
                {"title": "Field Kettle", "brand": "Norvik", "price": 39.9, "currency": "EUR", "in_stock": True},
                {"title": "Nordlys Kettle", "price": 49.5, "currency": "EUR", "in_stock": False},
            ]
        },
    ),
    (
        Message(role="user", content="Guten Tag, führen Sie Größe 42½?"),
        Message(role="assistant", content="Ja, für 1.299,00 €."),
        Message(role="user", content="¿Y el n.º 4711 cuánto cuesta? 送料は？"),
    ),
    (
        Message(
            role="user",
            content="I am planning a two-week trip through the mountains with my sister and need a light tent for two, "
            "below 250 euros, that stands up to wind and heavy rain, packs small enough for a bicycle, and can be put "
            "up by one person in the dark. We already own sleeping bags and a stove. Last year's tent leaked at the "
            "seams, so I would rather pay a little more than get wet again. Which one would you take, and why?",
        ),
    ),
)

_Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_TOKENS)]
_Logprobs = Annotated[list[Annotated[float, Field(le=0, allow_inf_nan=False)]], Field(min_length=1)]

_log = logging.getLogger(__name__)


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Prompt(_Stored):
    """A conversation, and its tokens up to where the answer begins."""

    messages: list[Message] = Field(min_length=1, max_length=8)
    token_ids: _Tokens


class Answer(_Stored):
    """The likeliest tokens, one after the other; `logprobs` of the prompt's last ones and of these, each given all
    before it."""

    token_ids: _Tokens
    logprobs: _Logprobs


class Golden(_Stored):
    """`golden.json`: the answers to the prompts, by precision."""

    format: Literal[1] = 1
    prompts: list[Prompt] = Field(min_length=1, max_length=8)
    answers: dict[str, list[Answer]] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for answers in self.answers.values():
            for prompt, answer in zip(self.prompts, answers, strict=True):
                num_tokens = len(prompt.token_ids) + len(answer.token_ids)
                if not len(answer.token_ids) <= len(answer.logprobs) < num_tokens <= MAX_TOKENS:
                    raise ValueError("an answer is too long, or of another number of tokens than its log-probabilities")
        return self


class SelfTest:
    """The self-test of a base's adapters on the model that serves them."""

    def __init__(self, model: Model, base: Base, text: ChatText, precision: str) -> None:
        self._model = model
        self._text = text
        self._precision = precision
        self._limit = min(MAX_TOKENS, base.context_length)
        self._told: set[str] = set()

    def record(self, folder: Path, check: Callable[[], None]) -> None:
        """Adds the golden values of the adapter in `folder` to those beside it in other precisions, which have the same
        prompts. Conversations that the template refuses, or the context does not hold, are left out. `check` is called
        before each prompt and may raise.

        Raises:
            KnowledgeEngineError: NON_FINITE.
        """
        before = _read(folder)
        prompts = before.prompts if before else self._render()
        if not prompts:
            return
        adapter = Adapter(GOLDEN, folder)
        content = at_once(self._model.adapters.acquire(adapter))
        try:
            answers: list[Answer] = []
            for prompt in prompts:
                check()
                answers.append(self._answer(adapter, content, prompt.token_ids))
        finally:
            self._model.adapters.release(adapter.digest)
        others = before.answers if before else {}
        golden = Golden(prompts=prompts, answers={**others, self._precision: answers})
        write_durably(folder / GOLDEN, golden.model_dump_json(indent=1).encode())

    def demand(self, adapter: Adapter, content: Any) -> Iterator[None]:
        """Asks a loaded adapter for what it answered when it was published, one prompt a step. One that has no golden
        values, as those that were published before there were any, is told to the log once.

        Raises:
            IntegrityError: SELF_TEST_FAILED, naming the prompt; MODEL_VERSION_CORRUPT, golden.json is no good.
        """
        golden = _read(adapter.folder)
        if golden is None:
            if adapter.digest not in self._told:
                self._told.add(adapter.digest)
                _log.warning("%s was published without golden values: it serves untested", adapter.digest)
            return
        answers = golden.answers.get(self._precision)
        if answers is None:
            raise self._failed(
                adapter,
                f"it has golden values for {', '.join(sorted(golden.answers))}, and {self._precision} serves here",
            )
        seconds = 0.0
        for number, (prompt, answer) in enumerate(zip(golden.prompts, answers, strict=True), 1):
            if number > 1:
                yield
            start = time.monotonic()
            if problem := self._difference(adapter, content, prompt, answer):
                excerpt = prompt.messages[-1].content[:40]
                raise self._failed(adapter, f"prompt {number} ({excerpt!r}): {problem}")
            seconds += time.monotonic() - start
        _log.info(
            "%s answers %d golden prompts as published (%.0f ms)",
            adapter.digest,
            len(golden.prompts),
            1000 * seconds,
        )

    def _render(self) -> list[Prompt]:
        prompts: list[Prompt] = []
        for messages in _PROMPTS:
            try:
                token_ids = self._text.encode_prompt(messages)
            except InvalidSpecError:
                continue
            if len(token_ids) + _ANSWER_TOKENS <= self._limit:
                prompts.append(Prompt(messages=list(messages), token_ids=token_ids))
        return prompts

    def _answer(self, adapter: Adapter, content: Any, prompt: list[int]) -> Answer:
        place = self._model.spare(adapter.digest, content)
        tokens = [int(self._logprobs(place, 0, prompt, 1).argmax())]
        while len(tokens) < _ANSWER_TOKENS and tokens[-1] not in self._text.stop_token_ids:
            start = len(prompt) + len(tokens) - 1
            tokens.append(int(self._logprobs(place, start, tokens[-1:], 1).argmax()))
        num_scored = min(len(tokens) + _READ_TOKENS, len(prompt) + len(tokens) - 1)
        rows, scored = self._read_at_once(adapter, content, prompt, tokens, num_scored)
        found = rows.gather(1, scored[:, None])[:, 0]
        if not found.isfinite().all():
            raise KnowledgeEngineError("The model's answer to a golden prompt is not finite.", reason=Reason.NON_FINITE)
        return Answer(token_ids=tokens, logprobs=[round(value, 5) for value in found.tolist()])

    def _difference(self, adapter: Adapter, content: Any, prompt: Prompt, answer: Answer) -> str:
        """What is not as it was, in words; empty when nothing is."""
        try:
            token_ids = self._text.encode_prompt(prompt.messages)
        except InvalidSpecError as error:
            return error.message
        if token_ids != prompt.token_ids:
            return (
                f"its {len(prompt.token_ids)} tokens are {len(token_ids)} now, other ones from token "
                f"{_first_difference(prompt.token_ids, token_ids)} on: chat template or tokenizer have changed"
            )
        num_tokens = len(prompt.token_ids) + len(answer.token_ids)
        if num_tokens > self._limit or max(answer.token_ids) >= self._model.vocabulary_size:
            return "this base has no room for its tokens"
        num_scored = len(answer.logprobs)
        rows, scored = self._read_at_once(adapter, content, prompt.token_ids, answer.token_ids, num_scored)
        allowed = TOLERANCES[self._precision]
        for index, (row, token, expected) in enumerate(zip(rows, scored.tolist(), answer.logprobs, strict=True)):
            found, best = float(row[token]), int(row.argmax())
            is_chosen = index >= num_scored - len(answer.token_ids)
            # What was likeliest may have lost `allowed`, and another token may have gained as much.
            is_choice = not is_chosen or float(row[best]) - found <= 2 * allowed
            if not (abs(found - expected) <= allowed and is_choice):  # what is not finite is no less than anything
                got = f"{found:.3f}"
                if best != token:
                    got += f", and {self._say(best)} at {float(row[best]):.3f}"
                place = num_tokens - num_scored + index + 1
                return f"token {place}: expected {self._say(token)} at {expected:.3f}, got it at {got}"
        return ""

    def _read_at_once(
        self, adapter: Adapter, content: Any, prompt: list[int], answer: list[int], num_scored: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probabilities (num_scored, V) before each of the last tokens, and those tokens. The same pass when
        they are recorded and when they are tested, as some models sum in another order in passes of another size."""
        place = self._model.spare(adapter.digest, content)
        tokens = [*prompt, *answer]
        return self._logprobs(place, 0, tokens[:-1], num_scored), torch.tensor(tokens[-num_scored:])

    def _logprobs(self, place: Any, start: int, token_ids: list[int], num_rows: int) -> torch.Tensor:
        ((_, logits),) = self._model.forward([(place, start, token_ids, num_rows)])
        if isinstance(logits, Exception):
            raise logits
        return logits.cpu().float().log_softmax(-1)

    def _say(self, token: int) -> str:
        return repr(self._text.tokenizer.decode([token], skip_special_tokens=False))

    def _failed(self, adapter: Adapter, what: str) -> IntegrityError:
        return IntegrityError(
            f"version {adapter.digest[:19]} does not answer as it did when it was published: {what}",
            reason=Reason.SELF_TEST_FAILED,
            digest=adapter.digest,
            precision=self._precision,
            difference=what,
        )


def _read(folder: Path) -> Golden | None:
    """None where the version has none."""
    path = folder / GOLDEN
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        return Golden.model_validate_json(content)
    except FileNotFoundError:
        if GOLDEN not in (read_json(folder / MANIFEST).get("files") or {}):
            return None
        problem = "is missing"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        problem = f"cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {error}"
    raise IntegrityError(
        f"{GOLDEN} of the adapter {problem}", reason=Reason.MODEL_VERSION_CORRUPT, file=GOLDEN, problem=problem
    )


def _first_difference(left: list[int], right: list[int]) -> int:
    """Counted from 1."""
    same = [a == b for a, b in zip(left, right, strict=False)]
    return same.index(False) + 1 if False in same else len(same) + 1
