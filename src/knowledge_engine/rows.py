"""Rows of datasets: what is sound, what each kind means, and how other people's layouts become ours.

Every refusal has a code of `RowCode` and one sentence. Rows stream: memory grows with a catalogue's ids only. Knows no
file and no store. Layouts: chat JSONL as OpenAI's fine-tuning takes it (`messages`, `weight`, `tools`, `tool_calls`),
preferences as TRL's `DPOTrainer` takes them, ShareGPT and Alpaca as they are commonly published.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from knowledge_engine.catalogue import Product, check_header, parse_json, parse_json_at
from knowledge_engine.core import MAX_MESSAGES, DatasetFormat, DatasetKind, Message, Tool, ToolCall, Turn
from knowledge_engine.errors import InvalidSpecError, Reason, RowCode, RowError, Violation
from knowledge_engine.tools import call_to_row, check_calls, check_text, read_calls, read_tools, tool_to_row

MAX_LINE_BYTES = 2**20
MAX_VIOLATIONS = 20
FORMATS: dict[DatasetKind, tuple[DatasetFormat, ...]] = {
    DatasetKind.CONVERSATIONS: (DatasetFormat.JSONL, DatasetFormat.SHAREGPT, DatasetFormat.ALPACA),
    DatasetKind.CATALOGUE: (DatasetFormat.JSONL, DatasetFormat.CSV),
    DatasetKind.PREFERENCES: (DatasetFormat.JSONL,),
    DatasetKind.EVALUATION: (DatasetFormat.JSONL, DatasetFormat.SHAREGPT, DatasetFormat.ALPACA),
}
"""Which layouts each kind comes in."""

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_SHAREGPT_ROLES |= {role: role for role in _ROLES if role != "tool"}
_DEPRECATED = ("functions", "function_call")
_ARRAY_READ = 2**18
_NO_SPACE = re.compile(r"[^ \t\r\n]")


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Conversation(_Row):
    """One row of conversations, or of an evaluation; `products` are the candidate rows that its prompt showed, `tools`
    what the assistant may call in it. A `Turn` of weight 0 among the messages is shown and not learned."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    products: tuple[Product, ...] = ()

    @classmethod
    def from_row(cls, row: Any) -> Conversation:
        """A conversation from `{"messages": [{"role", "content", "weight"?}, ...], "tools"?, "products"?}`; the
        assistant may have `tool_calls` beside its content or instead, and a message of the role `tool` has the
        `tool_call_id` of the call that it answers, or as TRL has it the `name` of its tool. `parallel_tool_calls` false
        says that no message has several calls.

        Raises:
            RowError: what is wrong with it.
        """
        fields = _fields(row, ("messages", "tools", "parallel_tool_calls", "products"))
        messages = _messages(fields.get("messages"), "messages")
        tools = _tools(fields)
        _check_names(fields["messages"], check_calls(messages, tools))
        is_parallel = fields.get("parallel_tool_calls")
        if is_parallel is not None and not isinstance(is_parallel, bool):
            raise RowError(RowCode.FIELD_INVALID, "parallel_tool_calls must be true or false")
        if is_parallel is False and any(len(message.tool_calls) > 1 for message in messages):
            raise RowError(RowCode.CALL_INVALID, "parallel_tool_calls is false, but a message has several calls")
        answers = [message for message in messages if message.role == "assistant"]
        if not answers:
            raise RowError(RowCode.NOTHING_TO_LEARN, "has no assistant message, so nothing to learn from")
        if not any(message.is_learned for message in answers):
            raise RowError(RowCode.NOTHING_TO_LEARN, "weighs every assistant message 0, so nothing is left to learn")
        return cls(messages=messages, tools=tools, products=_products(fields.get("products", [])))

    def to_row(self) -> dict[str, Any]:
        """The JSON object that `from_row` reads; what is optional only where it says something."""
        row: dict[str, Any] = {"messages": [_to_row(message) for message in self.messages]}
        return row | _shown(self)


class Preference(_Row):
    """One row of preferences: of two ways to go on from `prompt`, `chosen` is the better one. Both begin and end with
    the assistant."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    products: tuple[Product, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that it says."""
        return (*self.prompt, *self.chosen, *self.rejected)

    @property
    def sides(self) -> tuple[Conversation, Conversation]:
        """The prompt with the chosen answer, and with the rejected one; only the answers are learned."""
        shown = [
            Turn(role=message.role, content=message.content, tool_calls=message.tool_calls, weight=0)
            if message.is_learned
            else message
            for message in self.prompt
        ]
        chosen, rejected = (*shown, *self.chosen), (*shown, *self.rejected)
        return Conversation(messages=chosen, tools=self.tools), Conversation(messages=rejected, tools=self.tools)

    @classmethod
    def from_row(cls, row: Any) -> Preference:
        """A preference from `{"prompt", "chosen", "rejected", "tools"?, "products"?}`, the first three lists of
        messages; without `prompt`, the messages with which both answers begin are the prompt.

        Raises:
            RowError: what is wrong with it.
        """
        fields = _fields(row, ("prompt", "chosen", "rejected", "tools", "products"))
        sides = [list(_messages(fields.get(field), field)) for field in ("chosen", "rejected")]
        if fields.get("prompt") is not None:
            prompt = list(_messages(fields["prompt"], "prompt"))
        else:
            prompt = [one for one, _ in itertools.takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False))]
            # Both answers begin alike, or their first calls are answered alike in part.
            while prompt and (prompt[-1].role == "assistant" or _goes_on_with_a_result(sides, len(prompt))):
                prompt.pop()
            sides = [side[len(prompt) :] for side in sides]
        if not prompt or prompt[-1].role not in {"user", "tool"}:
            raise RowError(RowCode.PROMPT_INVALID, "the prompt must end with the user's words, or a tool's result")
        for field, side in zip(("chosen", "rejected"), sides, strict=True):
            if not side or side[0].role != "assistant" or side[-1].role != "assistant":
                raise RowError(RowCode.ANSWER_MISSING, f"{field} must begin and end with the assistant's words")
            if len(prompt) + len(side) > MAX_MESSAGES:
                raise RowError(RowCode.TOO_MANY_MESSAGES, f"has more than {MAX_MESSAGES} messages")
        if any(isinstance(message, Turn) for message in itertools.chain(prompt, *sides)):
            raise RowError(RowCode.WEIGHT_INVALID, "weight is for conversations; here both answers are compared whole")
        if sides[0] == sides[1]:
            raise RowError(RowCode.ANSWERS_EQUAL, "chosen and rejected are the same, so nothing is preferred")
        tools = _tools(fields)
        for field, side in zip(("chosen", "rejected"), sides, strict=True):
            answered = check_calls([*prompt, *side], tools, f"prompt and {field}")
            _check_names([*(fields.get("prompt") or ()), *fields[field]], answered)
        products = _products(fields.get("products", []))
        chosen, rejected = map(tuple, sides)
        return cls(prompt=tuple(prompt), chosen=chosen, rejected=rejected, tools=tools, products=products)

    def to_row(self) -> dict[str, Any]:
        """The JSON object that `from_row` reads."""
        row: dict[str, Any] = {
            field: [_to_row(message) for message in getattr(self, field)] for field in ("prompt", "chosen", "rejected")
        }
        return row | _shown(self)


Row = Conversation | Preference
"""What a training learns from."""


class Rows:
    """The canonical rows of raw bytes. After the first broken row it yields no more and only collects violations, at
    most `max_violations`."""

    def __init__(
        self,
        kind: DatasetKind,
        format: DatasetFormat,  # noqa: A002 - the contract's word
        chunks: Iterable[bytes],
        max_violations: int = MAX_VIOLATIONS,
    ) -> None:
        """`chunks` are the bytes in order, cut anywhere."""
        self.violations: list[Violation] = []
        self.num_rows = 0
        self._kind = kind
        self._format = format
        self._chunks = iter(chunks)
        self._max_violations = max_violations
        self._ids: dict[str, str] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._format not in FORMATS[self._kind]:
            known = " or ".join(word.upper() for word in FORMATS[self._kind])
            self._refuse("format", f"a dataset of {self._kind} comes as {known}", RowCode.FIELD_INVALID)
            return
        for where, row in self._records():
            self.num_rows += 1
            if isinstance(row, Product):
                first = self._ids.setdefault(row.id, where)
                if first != where:
                    self._refuse(where, f"id {row.id[:60]!r} is there already, on {first}", RowCode.ID_DUPLICATE)
            if not self.violations:
                yield row.to_row()
            elif self._is_full:
                return
        if not self.num_rows and not self.violations:
            self._refuse("line 1", "there are no rows", RowCode.NO_ROWS)

    @property
    def _is_full(self) -> bool:
        return len(self.violations) >= self._max_violations

    def _refuse(self, where: str, sentence: str, code: RowCode) -> None:
        if not self._is_full:
            # A row can hold anything; what it holds must not flood the response.
            self.violations.append(Violation(where, sentence[:300], code))

    def _records(self) -> Iterator[tuple[str, Product | Conversation | Preference]]:
        if self._format is DatasetFormat.CSV:
            yield from self._csv_records()
            return
        for where, value in self._values():
            try:
                yield where, self._row(value)
            except (RowError, ValidationError) as error:
                self._refuse(where, _sentence(error), _code(error, RowCode.FIELD_INVALID))
                if self._is_full:
                    return

    def _row(self, value: Any) -> Product | Conversation | Preference:
        if self._kind is DatasetKind.CATALOGUE:
            return _product(value, "")
        if self._kind is DatasetKind.PREFERENCES:
            return Preference.from_row(value)
        if self._format is DatasetFormat.SHAREGPT:
            value = _from_sharegpt(value)
        elif self._format is DatasetFormat.ALPACA:
            value = _from_alpaca(value)
        return Conversation.from_row(value)

    def _values(self) -> Iterator[tuple[str, Any]]:
        """JSON values with where they stood: one a line, or, as ShareGPT and Alpaca files mostly are, one array."""
        if self._format in {DatasetFormat.SHAREGPT, DatasetFormat.ALPACA}:
            head = b""
            for chunk in self._chunks:
                head += chunk
                if head.strip():
                    break
            self._chunks = itertools.chain([head], self._chunks)
            if head.lstrip().startswith(b"["):
                yield from self._array_values()
                return
        for number, line in self._text_lines():
            where = f"line {number}"
            try:
                if not line.strip():
                    raise RowError(RowCode.LINE_EMPTY, "is empty")
                yield where, parse_json(line)
            except ValueError as error:
                self._refuse(where, str(error), _code(error, RowCode.JSON_INVALID))
            if self._is_full:
                return

    def _array_values(self) -> Iterator[tuple[str, Any]]:
        number = 1
        try:
            for number, value in enumerate(_array(self._chunks), 1):
                yield f"row {number}", value
        except UnicodeDecodeError:
            self._refuse(f"row {number}", "is not UTF-8, or the next one is not", RowCode.NOT_UTF8)
        except ValueError as error:
            self._refuse(f"row {number}", f"or the next one: {error}", _code(error, RowCode.JSON_INVALID))

    def _text_lines(self) -> Iterator[tuple[int, str]]:
        for number, raw in enumerate(_lines(self._chunks), 1):
            try:
                yield number, _decode(raw, number)
            except RowError as error:
                self._refuse(f"line {number}", str(error), error.code)
                if self._is_full:
                    return

    def _csv_records(self) -> Iterator[tuple[str, Product]]:
        lines = _CsvLines(self._text_lines())
        reader = csv.reader(lines, strict=True)
        try:
            header = [cell.strip() for cell in next(reader, [])]
            check_header(header)
        except (ValueError, csv.Error) as error:
            self._refuse("line 1", str(error), RowCode.CSV_INVALID)
            return  # without a header no later line can be judged
        while not self._is_full:
            lines.first = 0
            try:
                cells = next(reader)
                if not cells:
                    raise RowError(RowCode.LINE_EMPTY, "is empty")
                yield f"line {lines.first}", Product.from_cells(header, cells)
            except StopIteration:
                return
            except csv.Error as error:
                self._refuse(f"line {lines.first}", str(error), RowCode.CSV_INVALID)
                return  # nor can one in the middle of a broken quotation
            except ValueError as error:
                self._refuse(f"line {lines.first}", _sentence(error), _code(error, RowCode.PRODUCT_INVALID))


def broken(violations: Sequence[Violation]) -> InvalidSpecError:
    """DATASET_FORMAT_INVALID, with the first violation as its sentence."""
    first = violations[0]
    return InvalidSpecError(
        f"{first.field}: {first.description}", reason=Reason.DATASET_FORMAT_INVALID, violations=violations
    )


# --- one row ------------------------------------------------------------------------------------------------------


def _fields(row: Any, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise RowError(RowCode.NOT_AN_OBJECT, f"must be an object with {known[0]}")
    _demand_known(row, known, "has ")
    return row


def _demand_known(row: Mapping[str, Any], known: Sequence[str], has: str) -> None:
    if unknown := [key for key in row if key not in known]:
        if unknown[0] in _DEPRECATED:
            raise RowError(
                RowCode.TOOLS_UNSUPPORTED,
                f"{has}{unknown[0]}, of a layout that is deprecated; write tools and tool_calls",
            )
        raise RowError(RowCode.FIELD_UNKNOWN, f"{has}the unknown field {unknown[0]!r}; known are {', '.join(known)}")


def _messages(items: Any, field: str) -> tuple[Message, ...]:
    if not items:
        raise RowError(RowCode.FIELD_MISSING, f"{field} is missing or empty")
    if not isinstance(items, list):
        raise RowError(RowCode.FIELD_INVALID, f"{field} must be a list of messages with role and content")
    if len(items) > MAX_MESSAGES:
        raise RowError(RowCode.TOO_MANY_MESSAGES, f"has more than {MAX_MESSAGES} messages")
    return tuple(_message(item, f"{field}[{position}]", position) for position, item in enumerate(items))


def _message(item: Any, where: str, position: int) -> Message:
    if not isinstance(item, dict):
        raise RowError(RowCode.FIELD_INVALID, f"{where} must be an object with role and content")
    role, content = item.get("role"), item.get("content")
    named = ("name",) if role == "tool" else ()
    _demand_known(item, ("role", "content", "weight", "tool_calls", "tool_call_id", *named), f"{where} has ")
    if role not in _ROLES:
        raise RowError(RowCode.ROLE_UNKNOWN, f"{where}.role must be one of {', '.join(_ROLES)}")
    if role == "system" and position:
        raise RowError(RowCode.SYSTEM_NOT_FIRST, f"{where}: only the first message may be a system message")
    calls = () if item.get("tool_calls") in (None, []) else read_calls(item["tool_calls"], f"{where}.tool_calls")
    call_id = "" if item.get("tool_call_id") is None else item["tool_call_id"]
    if not isinstance(call_id, str):
        raise RowError(RowCode.CALL_UNKNOWN, f"{where}.tool_call_id must be text")
    has_words = not calls or content not in (None, "")
    said = {"role": role, "content": _text(content, f"{where}.content") if has_words else ""}
    said |= {"tool_calls": calls, "tool_call_id": call_id}
    if "weight" not in item:
        return Message(**said)
    weight = item["weight"]
    if role != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(RowCode.WEIGHT_INVALID, f"{where}.weight must be 0 or 1, and the message the assistant's")
    return Turn(**said, weight=0) if weight == 0 else Message(**said)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(RowCode.FIELD_INVALID, f"{where} must be text")
    if not value.strip():
        raise RowError(RowCode.CONTENT_EMPTY, f"{where} is empty")
    check_text(value, where)
    return value


def _to_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role}
    if message.content:
        row["content"] = message.content
    if message.tool_calls:
        row["tool_calls"] = [call_to_row(call) for call in message.tool_calls]
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    return row | ({"weight": message.weight} if isinstance(message, Turn) else {})


def _shown(row: Conversation | Preference) -> dict[str, Any]:
    """What a row has beside its messages."""
    tools = {"tools": [tool_to_row(tool) for tool in row.tools]} if row.tools else {}
    return tools | ({"products": [product.to_row() for product in row.products]} if row.products else {})


def _goes_on_with_a_result(sides: Sequence[Sequence[Message]], position: int) -> bool:
    return any(message.role == "tool" for side in sides for message in side[position : position + 1])


def _tools(fields: Mapping[str, Any]) -> tuple[Tool, ...]:
    """From a list, or as TRL takes it too, from its JSON text."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise RowError(RowCode.TOOL_INVALID, f"tools must be a list, or its JSON text: {error}") from None
    return () if tools is None else read_tools(tools)


def _check_names(items: Sequence[Any], answered: Mapping[int, ToolCall]) -> None:
    """The names that results have beside their calls'; they say nothing that is not known, and are left out."""
    for position, call in answered.items():
        if (name := items[position].get("name")) not in (None, call.name):
            raise RowError(RowCode.CALL_UNKNOWN, f"a result has the name {name!r}, and answers the call of {call.name}")


def _products(items: Any) -> tuple[Product, ...]:
    if not isinstance(items, list):
        raise RowError(RowCode.FIELD_INVALID, "products must be a list")
    return tuple(_product(item, f"products[{position}]") for position, item in enumerate(items))


def _product(item: Any, where: str) -> Product:
    if not isinstance(item, dict):
        raise RowError(RowCode.NOT_AN_OBJECT, f"{where} must be an object with the fields of a product".lstrip())
    try:
        return Product.from_row(item)
    except ValueError as error:
        raise RowError(RowCode.PRODUCT_INVALID, f"{where}: {_sentence(error)}".removeprefix(": ")) from None


# --- other people's layouts ---------------------------------------------------------------------------------------


def _from_sharegpt(row: Any) -> dict[str, Any]:
    """`{"conversations": [{"from", "value"}, ...], "system"?, "tools"?, "id"?}`; an id names the row for its authors
    and is left out. Tools are as LLaMA-Factory has them: a list of functions or its JSON text, calls from
    `function_call`, each answered by one `observation`."""
    fields = _fields(row, ("conversations", "system", "tools", "id"))
    turns = fields.get("conversations")
    if not turns:
        raise RowError(RowCode.FIELD_MISSING, "conversations is missing or empty")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(RowCode.FIELD_INVALID, "conversations must be a list of objects with from and value")
    messages = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    for position, turn in enumerate(turns):
        where = f"conversations[{position}]"
        _demand_known(turn, ("from", "value", "weight"), f"{where} has ")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise RowError(RowCode.ROLE_UNKNOWN, f"{where}.from must be one of {', '.join(_SHAREGPT_ROLES)}")
        content = _text(turn.get("value"), f"{where}.value")
        weight = {"weight": turn["weight"]} if "weight" in turn else {}
        said: dict[str, Any] = {"content": content}
        if speaker == "function_call":
            said = {"tool_calls": _wrapped(content, f"{where}.value", RowCode.CALL_INVALID)}
        messages.append({"role": _SHAREGPT_ROLES[speaker]} | said | weight)
    if (tools := fields.get("tools")) in (None, "", []):
        return {"messages": messages}
    return {"messages": messages, "tools": _wrapped(tools, "tools", RowCode.TOOL_INVALID)}


def _wrapped(functions: Any, where: str, code: RowCode) -> list[dict[str, Any]]:
    """Functions, or calls of them, as OpenAI has them: from a list, from one alone, or from the JSON text of either."""
    if isinstance(functions, str):
        try:
            functions = parse_json(functions)
        except ValueError as error:
            raise RowError(code, f"{where} must be JSON text: {error}") from None
    items = functions if isinstance(functions, list) else [functions]
    return [
        item if isinstance(item, dict) and "function" in item else {"type": "function", "function": item}
        for item in items
    ]


def _from_alpaca(row: Any) -> dict[str, Any]:
    """`{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}`; an input follows its
    instruction on a line of its own."""
    fields = _fields(row, ("instruction", "input", "output", "system", "history"))
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(RowCode.FIELD_INVALID, "history must be a list of pairs of question and answer")
    for field in ("instruction", "output"):
        if fields.get(field) is None:
            raise RowError(RowCode.FIELD_MISSING, f"{field} is missing")
    question = _text(fields["instruction"], "instruction")
    if fields.get("input"):
        question += "\n" + _text(fields["input"], "input")
    messages = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    for asked, answered in [*history, [question, fields["output"]]]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages}


# --- bytes, lines, arrays -----------------------------------------------------------------------------------------


class _CsvLines:
    """Lines for the CSV reader; `first` is the number of the first one taken since it was set to 0."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self.first = 0
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.first = self.first or number
        return line + "\n"


def _code(error: Exception, otherwise: RowCode) -> RowCode:
    return error.code if isinstance(error, RowError) else otherwise


def _sentence(error: Exception) -> str:
    return error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)


def _decode(raw: bytes | None, number: int) -> str:
    if raw is None:
        raise RowError(RowCode.LINE_TOO_LONG, f"is longer than {MAX_LINE_BYTES} bytes")
    if number == 1 and raw.startswith(codecs.BOM_UTF8):
        raise RowError(RowCode.BYTE_ORDER_MARK, "begins with a byte order mark; save the file as plain UTF-8")
    if b"\0" in raw:
        raise RowError(RowCode.NUL_BYTE, "holds a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RowError(RowCode.NOT_UTF8, f"is not UTF-8 at byte {error.start + 1}") from None


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their end; None for one that is too long, whose bytes are never gathered."""
    parts: list[bytes] = []
    length = 0
    for chunk in chunks:
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            yield _joined(parts, length, chunk[begin:end])
            parts, length, begin = [], 0, end + 1
        length += len(chunk) - begin
        if length <= MAX_LINE_BYTES:
            parts.append(chunk[begin:])
        else:
            parts = []
    if length:
        yield _joined(parts, length, b"")


def _joined(parts: list[bytes], length: int, rest: bytes) -> bytes | None:
    if length + len(rest) > MAX_LINE_BYTES:
        return None
    return b"".join([*parts, rest]).removesuffix(b"\r")


def _array(chunks: Iterator[bytes]) -> Iterator[Any]:
    """The elements of one JSON array, each as soon as it is whole; the buffer holds one element and one read.

    Raises:
        ValueError: what is there is no array of JSON; UnicodeDecodeError.
    """
    text = _Text(chunks)
    text.take("[", "an array begins with [")
    if text.peek() == "]":
        text.take("]", "")
    else:
        while True:
            yield text.value()
            if text.peek() != ",":
                break
            text.take(",", "")
        text.take("]", "the array is not closed with ]")
    if text.peek():
        raise RowError(RowCode.JSON_INVALID, "something follows the array")


class _Text:
    """Decoded text that is read as far as it is needed."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._is_whole = False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            found = _NO_SPACE.search(self._text, self._at)
            self._at = found.start() if found else len(self._text)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self, character: str, sentence: str) -> None:
        if self.peek() != character:
            raise RowError(RowCode.JSON_INVALID, sentence)
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = parse_json_at(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    raise RowError(RowCode.LINE_TOO_LONG, f"is longer than {MAX_LINE_BYTES} bytes") from None
                if not self._read():
                    raise
            else:
                self._at = end
                return value

    def _read(self) -> bool:
        """Whether there was more."""
        if self._is_whole:
            return False
        gathered = b""
        for chunk in self._chunks:
            gathered += chunk
            if len(gathered) >= _ARRAY_READ:
                break
        else:
            self._is_whole = True
        self._text = self._text[self._at :] + self._decoder.decode(gathered, final=self._is_whole)
        self._at = 0
        return True
