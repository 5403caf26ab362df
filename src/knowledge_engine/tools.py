"""Tools that an assistant may call, its calls, and what they gave: OpenAI's layout, and what may be said with what.

Outside they are `{"type": "function", "function": {...}}`; inside `core.Tool` and `core.ToolCall`, their JSON as text
in one form, so that the same call is the same text whoever wrote it. Rows, requests and clients all come through here.
Every refusal is a `RowError` that names the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from knowledge_engine.catalogue import parse_json
from knowledge_engine.core import MAX_TOOLS, MAX_TOOLS_CHARACTERS, Message, Tool, ToolCall
from knowledge_engine.errors import RowCode, RowError

MAX_DEPTH = 32
"""Of parameters and arguments, which templates go through level by level."""


def read_tools(items: Any, where: str = "tools") -> tuple[Tool, ...]:
    """Tools from `[{"type": "function", "function": {"name", "description"?, "parameters"?}}, ...]`.

    Raises:
        RowError: TOOL_INVALID, TOOL_DUPLICATE, TOOLS_TOO_LARGE, FIELD_UNKNOWN, CHARACTER_REFUSED.
    """
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise RowError(RowCode.TOOL_INVALID, f"{where} must be a list of tools")
    demand_few(items, where)
    tools = []
    for position, item in enumerate(items):
        at = f"{where}[{position}]"
        fields = _function(item, at, ("name", "description", "parameters"), (), RowCode.TOOL_INVALID)
        tools.append(make_tool(fields.get("name"), fields.get("description"), fields.get("parameters"), at))
    check_tools(tools, where)
    return tuple(tools)


def make_tool(name: Any, description: Any, parameters: Any, where: str) -> Tool:
    """One tool; `parameters` are an object, or its JSON text. Raises RowError: TOOL_INVALID, CHARACTER_REFUSED."""
    if description is not None and not isinstance(description, str):
        raise RowError(RowCode.TOOL_INVALID, f"{where}: description must be text")
    check_text(description or "", f"{where}: description")
    schema = "" if parameters in (None, "") else _object(parameters, f"{where}: parameters", RowCode.TOOL_INVALID)
    try:
        return Tool(name=name, description=description or "", parameters=schema)
    except ValidationError:
        raise RowError(RowCode.TOOL_INVALID, f"{where}: {_NAME_RULE}") from None


def check_tools(tools: Sequence[Tool], where: str = "tools") -> None:
    """Raises RowError: TOOL_DUPLICATE, TOOLS_TOO_LARGE."""
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RowError(RowCode.TOOL_DUPLICATE, f"{where} has {twice} twice")
    if sum(len(tool.name + tool.description + tool.parameters) for tool in tools) > MAX_TOOLS_CHARACTERS:
        raise RowError(RowCode.TOOLS_TOO_LARGE, f"{where} has more than {MAX_TOOLS_CHARACTERS} characters")


def read_calls(items: Any, where: str) -> tuple[ToolCall, ...]:
    """Calls from `[{"id"?, "type": "function", "function": {"name", "arguments"}}, ...]`.

    Raises:
        RowError: CALL_INVALID, ARGUMENTS_INVALID, TOOLS_TOO_LARGE, FIELD_UNKNOWN, CHARACTER_REFUSED.
    """
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise RowError(RowCode.CALL_INVALID, f"{where} must be a list of calls, and not empty")
    demand_few(items, where)
    calls = []
    for position, item in enumerate(items):
        at = f"{where}[{position}]"
        fields = _function(item, at, ("name", "arguments"), ("id",), RowCode.CALL_INVALID)
        calls.append(make_call(fields.get("name"), fields.get("arguments"), fields.get("id"), at))
    return tuple(calls)


def make_call(name: Any, arguments: Any, call_id: Any, where: str) -> ToolCall:
    """One call; `arguments` are an object, or its JSON text. Raises RowError: CALL_INVALID, ARGUMENTS_INVALID,
    TOOLS_TOO_LARGE, CHARACTER_REFUSED."""
    text = _object(arguments, f"{where}: arguments", RowCode.ARGUMENTS_INVALID)
    if len(text) > MAX_TOOLS_CHARACTERS:
        raise RowError(RowCode.TOOLS_TOO_LARGE, f"{where}: arguments have more than {MAX_TOOLS_CHARACTERS} characters")
    if call_id is not None and (not isinstance(call_id, str) or len(call_id) > _MAX_ID):
        raise RowError(RowCode.CALL_INVALID, f"{where}: id must be text of at most {_MAX_ID} characters")
    check_text(call_id or "", f"{where}: id")
    try:
        return ToolCall(id=call_id or "", name=name, arguments=text)
    except ValidationError:
        raise RowError(RowCode.CALL_INVALID, f"{where}: {_NAME_RULE}") from None


def demand_few(items: Sequence[Any], where: str) -> None:
    """Raises RowError: TOOLS_TOO_LARGE."""
    if len(items) > MAX_TOOLS:
        raise RowError(RowCode.TOOLS_TOO_LARGE, f"{where} has more than {MAX_TOOLS} entries")


def check_calls(messages: Sequence[Message], tools: Sequence[Tool], field: str = "messages") -> dict[int, ToolCall]:
    """Which call each tool message answers, by the message's position. Every call is of a declared tool, and answered
    once before anybody else speaks; only those of the last message may still be open.

    Raises:
        RowError: TOOLS_TOO_LARGE, TOOLS_MISSING, TOOL_UNKNOWN, CALL_INVALID, CALL_UNKNOWN, CALL_UNANSWERED,
            ROLE_UNKNOWN.
    """
    names = {tool.name for tool in tools}
    answered: dict[int, ToolCall] = {}
    pending: list[ToolCall] = []
    num_characters = sum(len(call.arguments) for message in messages for call in message.tool_calls)
    if num_characters > _MAX_ARGUMENTS:
        raise RowError(RowCode.TOOLS_TOO_LARGE, f"{field}: the calls have more than {_MAX_ARGUMENTS} characters")
    for position, message in enumerate(messages):
        where = f"{field}[{position}]"
        if message.role == "tool":
            answered[position] = _answered(message, pending, where)
            pending.remove(answered[position])
            continue
        if message.tool_call_id:
            raise RowError(RowCode.CALL_UNKNOWN, f"{where}: only a message of the role tool has a tool_call_id")
        if pending:
            raise RowError(RowCode.CALL_UNANSWERED, f"{where}: the call of {pending[0].name} is not answered before")
        if message.tool_calls:
            _check_made(message, names, where)
            pending = list(message.tool_calls)
    if pending and messages[-1].role == "tool":
        raise RowError(RowCode.CALL_UNANSWERED, f"{field} end before the call of {pending[0].name} is answered")
    return answered


def _check_made(message: Message, names: set[str], where: str) -> None:
    if message.role != "assistant":
        raise RowError(RowCode.CALL_INVALID, f"{where}: only the assistant calls tools")
    if not names:
        raise RowError(RowCode.TOOLS_MISSING, f"{where} calls {message.tool_calls[0].name}, but there are no tools")
    if unknown := next((call.name for call in message.tool_calls if call.name not in names), None):
        raise RowError(RowCode.TOOL_UNKNOWN, f"{where} calls {unknown}, which is none of the tools")
    ids = [call.id for call in message.tool_calls if call.id]
    if len(ids) not in {0, len(message.tool_calls)} or len(set(ids)) < len(ids):
        raise RowError(RowCode.CALL_INVALID, f"{where}: either no call has an id, or each one of its own")


def _answered(message: Message, pending: Sequence[ToolCall], where: str) -> ToolCall:
    if message.tool_calls:
        raise RowError(RowCode.CALL_INVALID, f"{where}: only the assistant calls tools")
    if not pending:
        raise RowError(RowCode.CALL_UNKNOWN, f"{where} answers no call of the assistant's message before")
    if call := next((call for call in pending if call.id == message.tool_call_id), None):
        return call
    wanted = f"that of an open call, such as {pending[0].id[:60]}" if pending[0].id else "absent, as calls have no id"
    raise RowError(RowCode.CALL_UNKNOWN, f"{where}.tool_call_id must be {wanted}")


# --- the layout ---------------------------------------------------------------------------------------------------


def tool_to_row(tool: Tool) -> dict[str, Any]:
    """What `read_tools` reads, and what chat templates are given."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = json.loads(tool.parameters)
    return {"type": "function", "function": function}


def call_to_row(call: ToolCall) -> dict[str, Any]:
    """What `read_calls` reads: the arguments as JSON text, as OpenAI writes them."""
    named = {"id": call.id} if call.id else {}
    return named | {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def check_text(text: str, where: str) -> None:
    """Raises RowError: CHARACTER_REFUSED."""
    if "\0" in text:
        raise RowError(RowCode.CHARACTER_REFUSED, f"{where} holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(RowCode.CHARACTER_REFUSED, f"{where} holds a lone surrogate")


_MAX_ID = 256
_MAX_WRITTEN = 6 * MAX_TOOLS_CHARACTERS
"""Of JSON before it is read: that writes a character in six at most."""
_MAX_ARGUMENTS = 8 * MAX_TOOLS_CHARACTERS
"""Of all calls of a conversation."""
_NAME_RULE = "name must be 1 to 64 letters, digits, underscores or hyphens"


def _function(item: Any, where: str, inner: Sequence[str], outer: Sequence[str], code: RowCode) -> dict[str, Any]:
    """The fields of `{"type": "function", "function": {...}}`, both levels in one."""
    if not isinstance(item, Mapping) or item.get("type") != "function" or not isinstance(item.get("function"), Mapping):
        raise RowError(code, f'{where} must be {{"type": "function", "function": {{{", ".join(inner)}}}}}')
    known = ("type", "function", *outer)
    for fields, names, at in ((item, known, where), (item["function"], inner, f"{where}.function")):
        if unknown := [key for key in fields if key not in names]:
            raise RowError(
                RowCode.FIELD_UNKNOWN, f"{at} has the unknown field {unknown[0]!r}; known are {', '.join(names)}"
            )
    return {**item, **item["function"]}


def _object(value: Any, where: str, code: RowCode) -> str:
    """An object, or the JSON text of one, as JSON text of one form."""
    if isinstance(value, str):
        if len(value) > _MAX_WRITTEN:
            raise RowError(RowCode.TOOLS_TOO_LARGE, f"{where} have more than {_MAX_WRITTEN} characters")
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError(code, f"{where} must be the JSON text of an object: {str(error)[:200]}") from None
    if not isinstance(value, Mapping):
        raise RowError(code, f"{where} must be an object, or its JSON text")
    return json.dumps(_plain(value, where, code, MAX_DEPTH), ensure_ascii=False)


def _plain(value: Any, where: str, code: RowCode, depth: int) -> Any:
    """The same without `Decimal`."""
    if depth < 0:
        raise RowError(code, f"{where} nest more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        check_text(value, where)
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where, code, depth): _plain(item, where, code, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, code, depth - 1) for item in value]
    number = float(value) if isinstance(value, Decimal) else value
    if isinstance(number, float) and not math.isfinite(number):
        raise RowError(code, f"{where} hold a number that is none, or too large")
    if number is not None and not isinstance(number, bool | int | float):
        raise RowError(code, f"{where} hold what JSON cannot")
    return number
