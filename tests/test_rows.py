"""Every kind of broken row has its code, and other people's layouts become ours."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from knowledge_engine.cli import app
from knowledge_engine.core import DatasetFormat, DatasetKind
from knowledge_engine.errors import RowCode, Violation
from knowledge_engine.rows import MAX_LINE_BYTES, Preference, Rows

TALKS, SHOP, BETTER = DatasetKind.CONVERSATIONS, DatasetKind.CATALOGUE, DatasetKind.PREFERENCES
JSONL, CSV, SHAREGPT, ALPACA = DatasetFormat
GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
PRODUCT = '{"id": "a", "title": "Kettle", "price": 49.90, "currency": "EUR", "category": "Kitchen"}'
HEADER = "id,title,price,currency,category\n"


def said(*contents: str, **extra: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} | extra for at, text in enumerate(contents)]


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def line(**row: Any) -> bytes:
    return json.dumps(row).encode()


def messages(*items: Any) -> bytes:
    return line(messages=list(items))


def read(
    content: bytes, kind: DatasetKind = TALKS, layout: DatasetFormat = JSONL, chunk: int = 1000
) -> tuple[list[dict[str, Any]], list[Violation]]:
    rows = Rows(kind, layout, [content[at : at + chunk] for at in range(0, len(content), chunk)])
    return list(rows), rows.violations


def tool(name: str = "find", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | function}


def call(name: str = "find", arguments: Any = '{"word": "kettle"}', **extra: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | extra


def calls(*made: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(made)} | extra


def result(text: str = "20 EUR", **extra: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text} | extra


def using(*items: Any, tools: Any = None) -> bytes:
    return line(messages=[{"role": "user", "content": "x"}, *items], tools=[tool()] if tools is None else tools)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


USER, TOLD = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
BROKEN: list[tuple[DatasetKind, DatasetFormat, bytes, RowCode, str]] = [
    (TALKS, JSONL, b"x" * (MAX_LINE_BYTES + 1), RowCode.LINE_TOO_LONG, f"longer than {MAX_LINE_BYTES} bytes"),
    (TALKS, JSONL, b"  ", RowCode.LINE_EMPTY, "is empty"),
    (TALKS, JSONL, b'{"messages": "\xff"}', RowCode.NOT_UTF8, "is not UTF-8 at byte 15"),
    (TALKS, JSONL, b'{"messages": "\0"}', RowCode.NUL_BYTE, "NUL byte"),
    (TALKS, JSONL, b"{", RowCode.JSON_INVALID, "is not JSON"),
    (TALKS, JSONL, b'{"messages": NaN}', RowCode.JSON_INVALID, "NaN is no number"),
    (TALKS, JSONL, b'{"messages": [], "messages": []}', RowCode.JSON_INVALID, "is there twice"),
    (TALKS, JSONL, b"[" * 100_000, RowCode.JSON_INVALID, "nested too deeply"),
    (TALKS, JSONL, b"[]", RowCode.NOT_AN_OBJECT, "must be an object"),
    (TALKS, JSONL, b"{}", RowCode.FIELD_MISSING, "messages is missing or empty"),
    (TALKS, JSONL, b'{"messages": []}', RowCode.FIELD_MISSING, "messages is missing or empty"),
    (TALKS, JSONL, b'{"messages": {"role": "user"}}', RowCode.FIELD_INVALID, "must be a list"),
    (TALKS, JSONL, messages("hello"), RowCode.FIELD_INVALID, "messages[0] must be an object"),
    (TALKS, JSONL, messages({"role": "user", "content": 5}), RowCode.FIELD_INVALID, "content must be text"),
    (TALKS, JSONL, messages(USER | {"name": "z"}, TOLD), RowCode.FIELD_UNKNOWN, "unknown field 'name'"),
    (TALKS, JSONL, line(messages=[USER, TOLD], split="train"), RowCode.FIELD_UNKNOWN, "unknown field 'split'"),
    (TALKS, JSONL, line(messages=[USER, TOLD], functions=[]), RowCode.TOOLS_UNSUPPORTED, "write tools and tool_calls"),
    (TALKS, JSONL, messages(USER, TOLD | {"function_call": {}}), RowCode.TOOLS_UNSUPPORTED, "has function_call, of a"),
    (TALKS, JSONL, messages(*[USER, TOLD] * 101), RowCode.TOO_MANY_MESSAGES, "more than 200 messages"),
    (TALKS, JSONL, messages({"role": "bot", "content": "x"}), RowCode.ROLE_UNKNOWN, "role must be one of"),
    (TALKS, JSONL, messages({"role": ["user"], "content": "x"}), RowCode.ROLE_UNKNOWN, "role must be one of"),
    (TALKS, JSONL, messages(USER, TOLD, {"role": "system", "content": "z"}), RowCode.SYSTEM_NOT_FIRST, "only the"),
    (TALKS, JSONL, messages({"role": "user", "content": " "}, TOLD), RowCode.CONTENT_EMPTY, "content is empty"),
    (TALKS, JSONL, messages({"role": "user", "content": "\ud800"}, TOLD), RowCode.CHARACTER_REFUSED, "lone surrogate"),
    (TALKS, JSONL, messages({"role": "user", "content": "\0"}, TOLD), RowCode.CHARACTER_REFUSED, "NUL"),
    (TALKS, JSONL, messages(USER | {"weight": 0}, TOLD), RowCode.WEIGHT_INVALID, "messages[0].weight must be 0 or 1"),
    (TALKS, JSONL, messages(USER, TOLD | {"weight": 0.5}), RowCode.WEIGHT_INVALID, "messages[1].weight"),
    (TALKS, JSONL, messages(USER, TOLD | {"weight": True}), RowCode.WEIGHT_INVALID, "messages[1].weight"),
    (TALKS, JSONL, messages(USER), RowCode.NOTHING_TO_LEARN, "no assistant message"),
    (TALKS, JSONL, messages(USER, TOLD | {"weight": 0}), RowCode.NOTHING_TO_LEARN, "every assistant message 0"),
    (TALKS, JSONL, line(messages=[USER, TOLD], products=[{"id": "a"}]), RowCode.PRODUCT_INVALID, "products[0]: title"),
    (TALKS, JSONL, line(messages=[USER, TOLD], products={}), RowCode.FIELD_INVALID, "products must be a list"),
    (TALKS, JSONL, using(TOLD, tools={}), RowCode.TOOL_INVALID, "tools must be a list"),
    (TALKS, JSONL, using(TOLD, tools=["find"]), RowCode.TOOL_INVALID, 'tools[0] must be {"type": "function"'),
    (TALKS, JSONL, using(TOLD, tools=[{"name": "find"}]), RowCode.TOOL_INVALID, 'tools[0] must be {"type": "function"'),
    (TALKS, JSONL, using(TOLD, tools=[tool("find it")]), RowCode.TOOL_INVALID, "letters, digits, underscores"),
    (TALKS, JSONL, using(TOLD, tools=[tool(description=5)]), RowCode.TOOL_INVALID, "description must be text"),
    (TALKS, JSONL, using(TOLD, tools=[tool(parameters=[])]), RowCode.TOOL_INVALID, "parameters must be an object"),
    (TALKS, JSONL, using(TOLD, tools=[tool(parameters=deep(34))]), RowCode.TOOL_INVALID, "more than 32 deep"),
    (TALKS, JSONL, using(TOLD, tools=[tool(strict=True)]), RowCode.FIELD_UNKNOWN, "the unknown field 'strict'"),
    (TALKS, JSONL, using(TOLD, tools=[tool(), tool()]), RowCode.TOOL_DUPLICATE, "tools has find twice"),
    (TALKS, JSONL, using(TOLD, tools=[tool(f"t{at}") for at in range(129)]), RowCode.TOOLS_TOO_LARGE, "than 128"),
    (TALKS, JSONL, using(TOLD, tools=[tool(description="x" * 131_072)]), RowCode.TOOLS_TOO_LARGE, "than 131072"),
    (TALKS, JSONL, using(calls(call(arguments={"a": "x" * 131_072}))), RowCode.TOOLS_TOO_LARGE, "than 131072"),
    (TALKS, JSONL, using(calls(*[call()] * 129)), RowCode.TOOLS_TOO_LARGE, "messages[1].tool_calls has more than 128"),
    (TALKS, JSONL, using(TOLD, tools=[tool(description="a\0")]), RowCode.CHARACTER_REFUSED, "holds a NUL"),
    (TALKS, JSONL, using(calls(call(arguments='{"a": "\\u0000"}'))), RowCode.CHARACTER_REFUSED, "holds a NUL"),
    (TALKS, JSONL, using(calls(call()), tools=[]), RowCode.TOOLS_MISSING, "calls find, but there are no tools"),
    (TALKS, JSONL, using(calls(call("buy"))), RowCode.TOOL_UNKNOWN, "messages[1] calls buy, which is none of the"),
    (TALKS, JSONL, using(calls(tool_calls="find")), RowCode.CALL_INVALID, "messages[1].tool_calls must be a list of"),
    (TALKS, JSONL, using(calls()), RowCode.FIELD_INVALID, "messages[1].content must be text"),
    (TALKS, JSONL, using(calls(5)), RowCode.CALL_INVALID, 'tool_calls[0] must be {"type": "function"'),
    (TALKS, JSONL, using(calls(call("a b"))), RowCode.CALL_INVALID, "letters, digits, underscores"),
    (TALKS, JSONL, using(calls(call(id=5))), RowCode.CALL_INVALID, "id must be text"),
    (TALKS, JSONL, using(calls(call(id="a"), call())), RowCode.CALL_INVALID, "either no call has an id"),
    (TALKS, JSONL, using(calls(call(id="a"), call(id="a"))), RowCode.CALL_INVALID, "each one of its own"),
    (TALKS, JSONL, using(calls(call(), role="user", content="x"), TOLD), RowCode.CALL_INVALID, "only the assistant"),
    (TALKS, JSONL, using(calls(call()), result() | {"tool_calls": [call()]}), RowCode.CALL_INVALID, "only the assist"),
    (TALKS, JSONL, using(calls(call(arguments="{"))), RowCode.ARGUMENTS_INVALID, "JSON text of an object: is not JSON"),
    (TALKS, JSONL, using(calls(call(arguments="[]"))), RowCode.ARGUMENTS_INVALID, "must be an object, or its JSON"),
    (TALKS, JSONL, using(calls(call(arguments=None))), RowCode.ARGUMENTS_INVALID, "must be an object, or its JSON"),
    (TALKS, JSONL, using(calls(call(arguments='{"a": 1e999}'))), RowCode.ARGUMENTS_INVALID, "a number that is none"),
    (TALKS, JSONL, using(calls(call(arguments='{"a": 1, "a": 2}'))), RowCode.ARGUMENTS_INVALID, "is there twice"),
    (TALKS, JSONL, using(calls(call(arguments=deep(34)))), RowCode.ARGUMENTS_INVALID, "more than 32 deep"),
    (TALKS, JSONL, using(calls(call(id="a")), result()), RowCode.CALL_UNKNOWN, "[2].tool_call_id must be that of"),
    (TALKS, JSONL, using(calls(call(id="a")), result(tool_call_id="b")), RowCode.CALL_UNKNOWN, "open call, such as a"),
    (TALKS, JSONL, using(calls(call()), result(tool_call_id="b")), RowCode.CALL_UNKNOWN, "must be absent"),
    (TALKS, JSONL, using(calls(call()), result(), result()), RowCode.CALL_UNKNOWN, "messages[3] answers no call"),
    (TALKS, JSONL, using(TOLD, result()), RowCode.CALL_UNKNOWN, "messages[2] answers no call"),
    (TALKS, JSONL, using(TOLD | {"tool_call_id": "a"}), RowCode.CALL_UNKNOWN, "only a message of the role tool"),
    (TALKS, JSONL, using(TOLD | {"tool_call_id": 5}), RowCode.CALL_UNKNOWN, "tool_call_id must be text"),
    (TALKS, JSONL, using(calls(call()), result(name="buy")), RowCode.CALL_UNKNOWN, "has the name 'buy', and answers"),
    (TALKS, JSONL, using(TOLD, tools="["), RowCode.TOOL_INVALID, "tools must be a list, or its JSON text"),
    (TALKS, JSONL, using(calls(call()), TOLD), RowCode.CALL_UNANSWERED, "messages[2]: the call of find is not"),
    (TALKS, JSONL, using(calls(call(), call()), result()), RowCode.CALL_UNANSWERED, "end before the call of find"),
    (TALKS, JSONL, line(messages=[USER, TOLD], parallel_tool_calls=0), RowCode.FIELD_INVALID, "must be true or false"),
    (TALKS, JSONL, line(messages=[USER, calls(call(), call())], tools=[tool()], parallel_tool_calls=False),
     RowCode.CALL_INVALID, "a message has several calls"),
    (TALKS, JSONL, using(calls(call()), result("")), RowCode.CONTENT_EMPTY, "messages[2].content is empty"),
    (TALKS, JSONL, using(calls(call(), content=" ")), RowCode.CONTENT_EMPTY, "messages[1].content is empty"),
    (SHOP, JSONL, b"[]", RowCode.NOT_AN_OBJECT, "must be an object with the fields of a product"),
    (SHOP, JSONL, PRODUCT.replace("EUR", "XXX").encode(), RowCode.PRODUCT_INVALID, "currency must be"),
    (BETTER, JSONL, GOOD, RowCode.FIELD_UNKNOWN, "unknown field 'messages'"),
    (BETTER, JSONL, line(prompt="x", chosen=answer("a"), rejected=answer("b")), RowCode.FIELD_INVALID, "prompt must"),
    (BETTER, JSONL, line(prompt=said("x"), chosen=answer("a")), RowCode.FIELD_MISSING, "rejected is missing"),
    (BETTER, JSONL, line(prompt=said("x", "y"), chosen=answer("a"), rejected=answer("b")), RowCode.PROMPT_INVALID,
     "must end with the user's words"),
    (BETTER, JSONL, line(chosen=said("x", "a"), rejected=said("y", "b")), RowCode.PROMPT_INVALID, "must end with"),
    (BETTER, JSONL, line(prompt=said("x"), chosen=said("z"), rejected=answer("b")), RowCode.ANSWER_MISSING, "chosen"),
    (BETTER, JSONL, line(chosen=said("x", "a"), rejected=said("x", "a")), RowCode.ANSWERS_EQUAL, "are the same"),
    (BETTER, JSONL, line(prompt=said("x"), chosen=[calls(call())], rejected=answer("b")), RowCode.TOOLS_MISSING,
     "prompt and chosen[1] calls find"),
    (BETTER, JSONL, line(prompt=said("x"), chosen=[TOLD | {"weight": 0}], rejected=answer("b")), RowCode.WEIGHT_INVALID,
     "weight is for conversations"),
    (TALKS, SHAREGPT, line(messages=[]), RowCode.FIELD_UNKNOWN, "unknown field 'messages'"),
    (TALKS, SHAREGPT, line(conversations=[]), RowCode.FIELD_MISSING, "conversations is missing"),
    (TALKS, SHAREGPT, line(conversations=["a"]), RowCode.FIELD_INVALID, "must be a list of objects"),
    (TALKS, SHAREGPT, line(conversations=[{"from": "bot", "value": "a"}]), RowCode.ROLE_UNKNOWN, "from must be one of"),
    (TALKS, SHAREGPT, line(conversations=[{"from": "gpt", "value": ""}]), RowCode.CONTENT_EMPTY, "[0].value is empty"),
    (TALKS, SHAREGPT, line(conversations=[{"from": "function_call", "value": "find"}]), RowCode.CALL_INVALID,
     "[0].value must be JSON text"),
    (TALKS, SHAREGPT, line(conversations=[{"from": "human", "value": "a"}], tools="["), RowCode.TOOL_INVALID,
     "tools must be JSON text"),
    (TALKS, ALPACA, line(instruction="a"), RowCode.FIELD_MISSING, "output is missing"),
    (TALKS, ALPACA, line(instruction="a", output="b", text="c"), RowCode.FIELD_UNKNOWN, "unknown field 'text'"),
    (TALKS, ALPACA, line(instruction="a", output="b", history=["c"]), RowCode.FIELD_INVALID, "history must be"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "layout", "row", "code", "sentence"),
    BROKEN,
    ids=[f"{kind}-{layout}-{code}-{row[:30]!r}" for kind, layout, row, code, _ in BROKEN],
)
def test_a_broken_row_has_its_line_code_and_reason(
    kind: DatasetKind, layout: DatasetFormat, row: bytes, code: RowCode, sentence: str
) -> None:
    rows, violations = read(row + b"\n", kind, layout)
    assert rows == []
    assert [(item.field, item.reason) for item in violations] == [("line 1", code)]
    assert sentence in violations[0].description


@pytest.mark.parametrize(
    ("content", "field", "code"),
    [
        (HEADER + "a,Mug,9,EUR,K\na,Cup,9,EUR,K\n", "line 3", RowCode.ID_DUPLICATE),
        (HEADER + "a,Mug,nan,EUR,K\n", "line 2", RowCode.PRODUCT_INVALID),
        (HEADER + "a,Mug\n", "line 2", RowCode.PRODUCT_INVALID),
        (HEADER + '"a,Mug,9,EUR,K\n', "line 2", RowCode.CSV_INVALID),
        (HEADER + "\n", "line 2", RowCode.LINE_EMPTY),
        ("id,title\n", "line 1", RowCode.CSV_INVALID),
        ("\ufeff" + HEADER, "line 1", RowCode.BYTE_ORDER_MARK),
        (HEADER, "line 1", RowCode.NO_ROWS),
    ],
)
def test_a_broken_table_has_its_line_and_code(content: str, field: str, code: RowCode) -> None:
    _, violations = read(content.encode(), SHOP, CSV)
    assert (violations[0].field, violations[0].reason) == (field, code)


def test_every_code_is_tested() -> None:
    tables = {RowCode.ID_DUPLICATE, RowCode.CSV_INVALID, RowCode.BYTE_ORDER_MARK, RowCode.NO_ROWS}
    assert {code for *_, code, _ in BROKEN} | tables == set(RowCode)
    assert len(RowCode) >= 15


@pytest.mark.parametrize(("kind", "layout"), [(TALKS, CSV), (SHOP, ALPACA), (BETTER, SHAREGPT)])
def test_a_kind_comes_in_its_own_layouts(kind: DatasetKind, layout: DatasetFormat) -> None:
    _, violations = read(GOOD, kind, layout)
    assert (violations[0].field, violations[0].reason) == ("format", RowCode.FIELD_INVALID)


CONVERSATION = {"messages": [{"role": "system", "content": "Be kind."}, *said("Hi", "Hello", "And?", "So.")]}
SHAREGPT_ROW = {
    "id": "identity_0",
    "system": "Be kind.",
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "user", "value": "And?"},
        {"from": "assistant", "value": "So."},
    ],
}
ALPACA_ROW = {"instruction": "And?", "input": "", "output": "So.", "system": "Be kind.", "history": [["Hi", "Hello"]]}


@pytest.mark.parametrize(("layout", "row"), [(SHAREGPT, SHAREGPT_ROW), (ALPACA, ALPACA_ROW)])
@pytest.mark.parametrize("shape", ["lines", "array", "indented"])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_other_layouts_become_ours(layout: DatasetFormat, row: dict[str, Any], shape: str, chunk: int) -> None:
    texts = {
        "lines": "\n".join([json.dumps(row)] * 3),
        "array": " \n" + json.dumps([row] * 3, ensure_ascii=False),
        "indented": json.dumps([row] * 3, indent=2) + "\n\n",
    }
    rows, violations = read(texts[shape].encode(), TALKS, layout, chunk)
    assert violations == []
    assert rows == [CONVERSATION] * 3


SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}, "most": {"type": "number"}}}
ARGUMENTS = {"word": 'Größe "M"', "most": 10.5}


def test_calls_written_in_any_way_are_the_same_row() -> None:
    whole = json.dumps(ARGUMENTS, ensure_ascii=False)
    made = call(arguments=whole, id="a"), call("buy", "{}", id="b")
    answers = result("none", tool_call_id="b"), result("one", tool_call_id="a")
    tools = [tool(description="Finds.", parameters=SCHEMA), tool("buy")]
    wanted = json.loads(using(calls(*made), *answers, *answer("Yes."), tools=tools))
    others = [
        using(calls(*made, content=None), *answers, *answer("Yes."), tools=tools),
        using(calls(*made, content=""), *answers, *answer("Yes."), tools=tools),
        using(calls(call(arguments=ARGUMENTS, id="a"), call("buy", {}, id="b")), *answers, *answer("Yes."),
              tools=tools),
        using(calls(call(arguments=json.dumps(ARGUMENTS, indent=2), id="a"), made[1]), *answers, *answer("Yes."),
              tools=[tool(description="Finds.", parameters=SCHEMA), tool("buy", description="", parameters=None)]),
    ]  # fmt: skip
    for content in [line(**wanted), *others]:
        assert read(content) == ([wanted], [])
    single = json.loads(using(calls(call()), result(), *answer("Yes.")))
    assert read(line(**single, parallel_tool_calls=False)) == ([single], [])
    named = [{**message, "name": "find"} if message["role"] == "tool" else message for message in single["messages"]]
    assert read(line(messages=named, tools=json.dumps(single["tools"]))) == ([single], [])
    empty = {"content": None, "tool_calls": None, "tool_call_id": None}
    padded = [empty | message for message in single["messages"]]
    assert read(line(messages=padded, tools=single["tools"], parallel_tool_calls=None)) == ([single], [])
    plain = {"messages": said("x", "y")}
    assert read(line(messages=[empty | message for message in plain["messages"]], tools=None)) == ([plain], [])
    none = {"tool_calls": []}
    assert read(line(messages=[none | message for message in plain["messages"]], tools=[])) == ([plain], [])
    spoken = using(calls(call(), content="Let me look.", weight=0), result(), calls(call()))
    assert read(spoken) == ([json.loads(spoken)], [])


def test_a_preference_may_call_tools() -> None:
    shared = [{"role": "user", "content": "x"}, calls(call(), call()), result("a")]
    sides = {"chosen": [*shared, result("b"), *answer("Yes.")], "rejected": [*shared, result("c"), *answer("No.")]}
    ((row,), violations) = read(line(**sides, tools=[tool()]), BETTER)
    assert (violations, row["prompt"], row["tools"]) == ([], shared[:1], [tool()])
    assert read(json.dumps(row).encode(), BETTER)[0] == [row]
    wrong = {side: [*shared, result(side, name="buy"), *answer(side)] for side in ("chosen", "rejected")}
    assert read(line(**wrong, tools=[tool()]), BETTER)[1][0].reason == RowCode.CALL_UNKNOWN
    ended = {"prompt": [*shared, result("b")], "chosen": [calls(call())], "rejected": answer("No.")}
    assert read(line(**ended, tools=[tool()]), BETTER) == ([ended | {"tools": [tool()]}], [])
    chosen, rejected = Preference.from_row(ended | {"tools": [tool()]}).sides
    assert (chosen.tools, rejected.tools[0].name) == (rejected.tools, "find")
    assert [message.is_learned for message in chosen.messages] == [False, False, False, False, True]
    assert chosen.messages[1].tool_calls == chosen.messages[-1].tool_calls * 2


def test_sharegpt_calls_become_ours() -> None:
    turns = [
        {"from": "human", "value": "x"},
        {"from": "function_call", "value": json.dumps({"name": "find", "arguments": {"word": "kettle"}})},
        {"from": "observation", "value": "20 EUR"},
        {"from": "gpt", "value": "y"},
    ]
    wanted = json.loads(using(calls(call()), result(), TOLD))
    for tools in ([{"name": "find"}], json.dumps([{"name": "find"}]), [tool()]):
        assert read(line(conversations=turns, tools=tools), TALKS, SHAREGPT) == ([wanted], [])


def test_an_input_follows_its_instruction_and_a_weight_comes_along() -> None:
    rows, _ = read(line(instruction="Translate", input="Tasse", output="cup"), TALKS, ALPACA)
    assert rows == [{"messages": said("Translate\nTasse", "cup")}]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0},
             {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]  # fmt: skip
    rows, _ = read(line(conversations=turns), TALKS, SHAREGPT)
    assert [message.get("weight") for message in rows[0]["messages"]] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("content", "field", "code"),
    [
        (b"[", "row 1", RowCode.JSON_INVALID),
        (b"[]", "line 1", RowCode.NO_ROWS),
        (b"[{}", "row 1", RowCode.FIELD_MISSING),
        (json.dumps([ALPACA_ROW]).encode()[:-1], "row 1", RowCode.JSON_INVALID),
        (json.dumps([ALPACA_ROW]).encode() + b"[", "row 1", RowCode.JSON_INVALID),
        (json.dumps([ALPACA_ROW]).encode()[:-1] + b',{"a": 1, "a": 2}]', "row 1", RowCode.JSON_INVALID),
        (json.dumps([ALPACA_ROW, 5, ALPACA_ROW]).encode(), "row 2", RowCode.NOT_AN_OBJECT),
        (b'[{"instruction": "\xff"}]', "row 1", RowCode.NOT_UTF8),
        (b'[{"instruction": "' + b"x" * (MAX_LINE_BYTES + 2**19), "row 1", RowCode.LINE_TOO_LONG),
    ],
    ids=["open", "empty", "cut", "not closed", "more", "twice", "number", "bytes", "long"],
)
def test_a_broken_array_names_its_row(content: bytes, field: str, code: RowCode) -> None:
    _, violations = read(content, TALKS, ALPACA, chunk=100_000)
    assert (violations[0].field, violations[0].reason) == (field, code)


def test_an_array_is_never_held_whole() -> None:
    row = json.dumps(ALPACA_ROW | {"output": "x" * 10_000}).encode()

    def chunks() -> Iterator[bytes]:
        yield b"["
        for at in range(800):
            yield (b"," if at else b"") + row
        yield b"]"

    tracemalloc.start()
    rows = Rows(TALKS, ALPACA, chunks())
    assert sum(1 for _ in rows) == 800
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.violations == []
    assert peak < 4_000_000


def test_a_file_is_checked_without_an_upload(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_bytes(GOOD + b"\n" + messages(USER) + b"\n" + b"{\n" * 30)
    result = CliRunner().invoke(app, ["data", "check", str(file), "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)["violations"]
    assert [item["reason"] for item in told] == ["NOTHING_TO_LEARN", *["JSON_INVALID"] * 30]
    shown = CliRunner().invoke(app, ["data", "check", str(file), "--limit", "1"])
    assert "NOTHING_TO_LEARN" in shown.stdout
    assert "line 3" not in shown.stdout
    file.write_bytes(GOOD)
    assert CliRunner().invoke(app, ["data", "check", str(file)]).exit_code == 0
