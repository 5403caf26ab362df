"""Answers of a given form: which tokens may come next, so that the whole is JSON of a schema or matches an expression.

The work is llguidance's (Moskal et al.; Earley's parser over derivatives of regular expressions). It compiles in
milliseconds and works out a token's mask in tens of microseconds; how much it may compute is bounded by its own limits,
in steps and not in seconds, so that the same form is taken or refused on every machine. Imports no torch.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from knowledge_engine.core import SamplingParams
from knowledge_engine.errors import InvalidSpecError, Violation

if TYPE_CHECKING:
    import numpy as np

_LIMITS = LLParserLimits(
    max_grammar_size=200_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
)
_NUM_KEPT = 64
"""Compiled forms kept for whoever asks for the same again."""
# As Python's json.dumps writes, which models have read most; free whitespace would let them write it without end.
_JSON_STYLE: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def check_form(sampling: SamplingParams, prefix: str) -> None:
    """Refuses a form that cannot be kept, before it takes anybody's time.

    Raises:
        InvalidSpecError: the violation's field begins with `prefix`.
    """
    form = _form(sampling)
    if form is None:
        return
    field, text = form
    if failure := LLMatcher.validate_grammar(_grammar(field, text, prefix), limits=_LIMITS):
        raise _refused(prefix + field, failure)


class Matcher:
    """One answer's form, and how far the answer has come in it."""

    def __init__(self, matcher: Any, field: str, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._field = field
        self._vocabulary_size = vocabulary_size

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> np.ndarray[Any, Any]:
        """Which tokens may be next, (V,) of bool.

        Raises:
            InvalidSpecError: none may, or finding out takes more than is allowed.
        """
        import numpy as np  # the server, which only checks forms, has none

        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() or (self._matcher.is_stopped() and not self._matcher.is_accepting()):
            raise _refused(self._field, self._matcher.get_error() or "nothing has this form")
        return np.unpackbits(bits, count=self._vocabulary_size, bitorder="little").view(bool)

    def take(self, token: int) -> None:
        """The answer goes on with this token, which the mask allowed.

        Raises:
            InvalidSpecError: going on takes more than is allowed; a matcher that failed would say that it is complete.
        """
        if not self._matcher.consume_token(token):
            raise _refused(self._field, self._matcher.get_error() or "the answer has left it")

    def forced(self) -> list[int]:
        """Tokens that most likely come next, as the form allows no other characters."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens


class Grammars:
    """Of one tokenizer; `compile` is for one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int, stop_token_ids: Iterable[int]) -> None:
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=vocabulary_size, eos_token=sorted(stop_token_ids))
        self._vocabulary_size = vocabulary_size
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def compile(self, sampling: SamplingParams) -> Matcher | None:
        """What an answer has to match; None where it has no form.

        Raises:
            InvalidSpecError: the form cannot be kept.
        """
        form = _form(sampling)
        if form is None:
            return None
        matcher = self._compiled.get(form)
        if matcher is None:
            grammar = _grammar(*form)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise _refused(form[0], matcher.get_error())
            self._compiled[form] = matcher
            if len(self._compiled) > _NUM_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(form)
        return Matcher(matcher.deep_copy(), form[0], self._vocabulary_size)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for."""
        return bytes(self._tokenizer.decode_bytes([token]))


def _form(sampling: SamplingParams) -> tuple[str, str] | None:
    if sampling.json_schema is not None:
        return "json_schema", sampling.json_schema
    return ("regex", sampling.regex) if sampling.regex is not None else None


def _grammar(field: str, text: str, prefix: str = "") -> str:
    """Raises InvalidSpecError: what is not even JSON."""
    if field == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise _refused(prefix + field, "not JSON") from None
    if not isinstance(schema, dict):
        raise _refused(prefix + field, "not a JSON object")
    schema.pop("x-guidance", None)  # the library's own options, which would undo ours
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE))
    except ValueError as error:
        raise _refused(prefix + field, str(error)) from None


def _refused(field: str, failure: str) -> InvalidSpecError:
    """Its first line; what follows is the grammar again, or the library's state."""
    description = failure.strip().splitlines()[0][:200]
    return InvalidSpecError(f"{field}: {description}", violations=[Violation(field, description)])
