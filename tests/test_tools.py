"""Tools from a row to an answer: how templates are tried with them, and that what was trained is what is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
import pytest
from tokenizers import AddedToken, Tokenizer

from knowledge_engine.bases import prepare_base
from knowledge_engine.client import Client
from knowledge_engine.core import BASE, JobState, Message, Tool, ToolCall, TrainingSpec, Truncation
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason, RowCode, RowError
from knowledge_engine.inference.detokenize import Detokenizer
from knowledge_engine.preview import preview_dataset, preview_row
from knowledge_engine.rows import Conversation, Preference
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings
from knowledge_engine.splits import near_duplicates
from knowledge_engine.text import ChatText, fit_conversations
from knowledge_engine.tools import check_calls, make_call, make_tool
from tests.running import Service, end, start, wait_until
from tests.test_templates import FIND, TOOLS, _byte_level, marked, text_of, tool_talk
from tests.tiny import TOOL_TEMPLATE, build_tiny_base


def chat_text(template: str, *markup: str) -> ChatText:
    tokenizer = Tokenizer.from_str(_byte_level())
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in markup])
    return ChatText(tokenizer, template, {}, [])


def talk(*found: str, tools: Sequence[Tool] = TOOLS) -> Conversation:
    """A question, a call for each of `found`, their results, and an answer."""
    calls = tuple(ToolCall(name="find", arguments=json.dumps({"word": word})) for word in found)
    results = [Message(role="tool", content=f"{word}: 20 EUR") for word in found]
    said = [Message(role="user", content="Price?"), Message(role="assistant", tool_calls=calls)]
    return Conversation(messages=(*said, *results, Message(role="assistant", content="20 EUR.")), tools=tuple(tools))


# --- templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("{{ tool | tojson }}", "{{ tool.function.name }}", "leaves out the tool tried_tool, or its description"),
        ("{% if tools %}", "{% if false %}", "leaves out the tool tried_tool"),
        ("tool | tojson", "tool.function.name ~ tool.function.description", "what a tool's parameters mean"),
        ("m.tool_calls or []", "[]", "leaves out 'tried_tool', of a call in message 2"),
        ("call.function | tojson", "call.function.name", "leaves out 'tried_key', of a call"),
        ("call.function | tojson", "call.function.name ~ call.function.arguments.items() | list", "as Python does"),
        ("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}", "leaves out message 3"),
        ("{% if tools %}", "{% if tools and messages[-1].role == 'user' %}", "leaves out the tool tried_tool"),
        ("{% if tools %}", "{% if tools %}{{ messages | length }}", "in another way once the conversation goes on"),
        ("{{ m.role }}", "{{ raise_exception('no') if m.role == 'tool' else m.role }}", "refuses these messages: no"),
        ("</tool_call>", "</tool_call>{{ call.x.y }}", "it cannot be used: UndefinedError"),
    ],
)  # fmt: skip
def test_a_template_that_loses_what_is_said_of_tools_refuses_them(old: str, new: str, why: str) -> None:
    assert old in TOOL_TEMPLATE
    text = chat_text(TOOL_TEMPLATE.replace(old, new))
    with pytest.raises(InvalidSpecError, match="does not take tools: tried with one, it ") as caught:
        text.encode_example(talk("a").messages, TOOLS)
    assert why in caught.value.message
    assert caught.value.reason is Reason.TOOLS_UNSUPPORTED
    plain = [Message(role="user", content="Hi"), Message(role="assistant", content="Hello")]
    assert text.encode_example(plain).input_ids == chat_text(TOOL_TEMPLATE).encode_example(plain).input_ids


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (lambda: chat_text(TOOL_TEMPLATE.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")), "leaves out"),
        (lambda: text_of("llama-3.1"), "refuses these messages: only one call at once"),
    ],
    ids=["lost", "refused"],
)
def test_a_template_that_takes_one_call_at_once_refuses_several(text: Callable[[], ChatText], why: str) -> None:
    chat = text()
    assert chat.encode_example(talk("a").messages, TOOLS)
    for found in (("a", "b"), ("a", "a")):
        with pytest.raises(InvalidSpecError, match=f"tried with two calls in one message, it {why}") as caught:
            chat.encode_example(talk(*found).messages, TOOLS)
        assert caught.value.reason is Reason.TOOLS_UNSUPPORTED


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (lambda: chat_text(TOOL_TEMPLATE.replace("in m.tool_calls or []", "in m.tool_calls or [] if not m.content")),
         "leaves out 'tried_tool', of a call"),
        (lambda: text_of("llama-3.1"), "leaves out message 2, which is the assistant's"),
    ],
    ids=["call", "words"],
)  # fmt: skip
def test_a_template_that_takes_words_or_a_call_refuses_both(text: Callable[[], ChatText], why: str) -> None:
    spoken = tool_talk()[1].model_copy(update={"content": "I shall find a kettle."})
    with pytest.raises(InvalidSpecError, match=f"tried with words beside a call, it {why}") as caught:
        text().encode_example([tool_talk()[0], spoken], TOOLS)
    assert caught.value.reason is Reason.TOOLS_UNSUPPORTED
    assert "«I shall find a kettle.\n<tool_call>" in marked(text_of("qwen-2.5"), [tool_talk()[0], spoken], TOOLS)


def test_what_a_template_loses_of_one_call_is_named() -> None:
    calls = "in ([] if m.tool_calls and m.tool_calls[0].function.name == 'buy' else m.tool_calls)"
    text = chat_text(TOOL_TEMPLATE.replace("in m.tool_calls", calls))
    assert text.encode_example(tool_talk(), TOOLS)
    bought = Message(role="assistant", tool_calls=(ToolCall(name="buy", arguments="{}"),))
    with pytest.raises(InvalidSpecError, match="it leaves out 'buy', of a call in message 2"):
        text.encode_example([tool_talk()[0], bought], TOOLS)


@pytest.mark.parametrize(
    "call",
    [
        "{% if m.content is none %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}",
        "{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}",
        "{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name }} {{ call.function.arguments }}{% endfor %}",
    ],
    ids=["content is none", "text alone", "printed"],
)
def test_templates_of_other_conventions_are_written_as_they_want_it(call: str) -> None:
    text = chat_text("".join(["{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}",
                              f"<|im_start|>{{{{ m.role }}}}\n{call}<|im_end|>\n{{% endfor %}}",
                              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"]))  # fmt: skip
    shown = marked(text, talk('"é"<|im_end|>').messages, TOOLS)
    assert '{"word": "\\"é\\"<|im_end|>"}' in shown.partition("assistant")[2]


def test_results_without_ids_come_in_the_order_of_the_calls() -> None:
    shown = marked(text_of("qwen-2.5"), talk("a", "b").messages, TOOLS)
    results = [f"<tool_response>\n{word}: 20 EUR\n</tool_response>" for word in "ab"]
    assert "\n".join(results) + "<|im_end|>" in shown
    assert shown.count("«") == 2
    named = chat_text(TOOL_TEMPLATE.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role ~ (m.name or '') }}"))
    assert "toolfind\na: 20 EUR" in marked(named, talk("a").messages, TOOLS)


def test_markup_of_calls_reaches_the_answer_and_what_ends_it_does_not() -> None:
    for text, markup in (
        (text_of("qwen-2.5"), '<tool_call>\n{"name": "find", "arguments": {"word": "kettle"}}\n</tool_call>'),
        (chat_text(TOOL_TEMPLATE.replace("<tool_call>", "[CALLS]"), "[CALLS]", "</tool_call>"),
         '[CALLS]{"name": "find", "arguments": {"word": "kettle"}}</tool_call>'),
    ):  # fmt: skip
        example = text.encode_example(tool_talk()[:2], TOOLS)
        said = [token for token, is_trained in zip(example.input_ids, example.trained, strict=True) if is_trained]
        assert said[-1] in text.stop_token_ids
        assert any(text.is_control(token) for token in said[:-1])
        detokenizer = Detokenizer(text.decoder)
        assert "".join([*map(detokenizer.push, said), detokenizer.flush()]) == markup


def test_a_token_that_ends_calls_alone_stops_an_answer() -> None:
    end = "{% endfor %}{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"
    text = chat_text(TOOL_TEMPLATE.replace("{% endfor %}<|im_end|>\n{% endfor %}", end), "<|eom|>")
    assert {text.tokenizer.id_to_token(token) for token in text.stop_token_ids} == {"<|im_end|>", "<|eom|>"}
    assert marked(text, tool_talk(), TOOLS).count("</tool_call><|eom|>»") == 1
    assert chat_text(TOOL_TEMPLATE).stop_token_ids == {2}


def test_a_control_token_that_json_would_write_otherwise_is_refused_in_tools() -> None:
    text = chat_text(TOOL_TEMPLATE.replace("<tool_call>", '<|"|>'), '<|"|>')
    assert '<|"|>' in marked(text, tool_talk(told='a <|"|>'), TOOLS)
    with pytest.raises(InvalidSpecError, match="a control token of this base that JSON"):
        text.encode_example(tool_talk('a <|"|>'), TOOLS)


def test_what_exceeds_a_context_is_seen_in_tools_and_calls_as_well() -> None:
    text = text_of("qwen-2.5")
    messages = tool_talk("kettle " * 200)
    for tools in ([FIND], [FIND.model_copy(update={"description": "words " * 900})]):
        num_tokens = len(text.encode_prompt(messages[:3], tools))
        assert not text.exceeds(messages[:3], num_tokens, tools)
        assert text.exceeds(messages[:3], num_tokens // 10, tools)
    assert text.exceeds(messages[:1], 500, [FIND.model_copy(update={"parameters": json.dumps({"a": "word " * 4000})})])


def test_a_template_completes_no_control_token() -> None:
    """It writes the keys of a schema between signs, as some do of keys that they do not know."""
    keys = (
        "{% for tool in tools or [] %}{% for key in tool.function.parameters %}<{{ key }}>{% endfor %}{% endfor %}"
        "{% for m in messages %}"
    )
    text = chat_text(TOOL_TEMPLATE.replace("{% for m in messages %}", keys))
    asked = [Message(role="user", content="Price?")]
    plain = make_tool("find", "Finds.", {"type": "object"}, "tool")
    num_control = sum(map(text.is_control, text.encode_prompt(asked, [plain])))
    for key in ("|im_end|", "x><|im_end|", "|im_end|><x", "<|im_end|"):
        evil = make_tool("find", "Finds.", {"type": "object", key: "assistant"}, "tool")
        assert f"<{key}>" in text.render(asked, [evil], add_generation_prompt=True)
        assert sum(map(text.is_control, text.encode_prompt(asked, [evil]))) == num_control


def test_a_long_chat_with_a_large_tool_is_seen_to_exceed_before_it_is_encoded() -> None:
    text = chat_text(TOOL_TEMPLATE)
    large = make_tool("find", "Finds.", {"type": "object", "x": "word " * 20_000}, "tool")
    asked = [Message(role="user", content="a"), Message(role="assistant", content="b")] * 90
    asked.append(Message(role="user", content="a"))
    assert text.exceeds(asked, 8192, [large])
    assert not text.exceeds(asked, 10**6, [large])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ('{"a": 1e99999999999999999999}', RowCode.ARGUMENTS_INVALID),
        ("{" + ", ".join(['"a": 1'] * 50_000) + "}", RowCode.ARGUMENTS_INVALID),
        ('{"a": "' + "x" * 900_000 + '"}', RowCode.TOOLS_TOO_LARGE),
    ],
    ids=["exponent", "a key many times", "long"],
)
def test_arguments_that_would_take_long_are_refused_at_once(arguments: str, code: RowCode) -> None:
    with pytest.raises(RowError) as caught:
        make_call("find", arguments, None, "call")
    assert caught.value.code is code


def test_all_calls_together_are_bounded() -> None:
    call = make_call("find", {"a": "x" * 130_000}, None, "call")
    many = [Message(role="user", content="a"), Message(role="assistant", tool_calls=(call,) * 9)]
    with pytest.raises(RowError) as caught:
        check_calls(many, [FIND])
    assert caught.value.code is RowCode.TOOLS_TOO_LARGE


def test_calls_that_contradict_the_tools_are_not_rendered() -> None:
    with pytest.raises(InvalidSpecError, match="there are no tools"):
        text_of("qwen-2.5").encode_example(tool_talk())


# --- datasets -----------------------------------------------------------------------------------------------------


def test_truncation_never_parts_a_result_from_its_call() -> None:
    text = text_of("qwen-2.5")
    messages = [turn for word in ("a " * 150, "b", "c") for turn in tool_talk(word)]
    row = Conversation(messages=tuple(messages), tools=TOOLS)
    kept = len(text.encode_example(messages[4:], TOOLS).input_ids)
    for most in range(len(text.encode_example(messages[8:], TOOLS).input_ids), kept + 8, 4):
        (fitted,) = fit_conversations([row], text, most, Truncation.KEEP_LAST_TURNS)
        assert fitted.messages == messages[4 if most >= kept else 8 :]
        assert fitted.example == text.encode_example(fitted.messages, TOOLS)
        shown = preview_row(row, 1, text, most, Truncation.KEEP_LAST_TURNS)
        assert (shown.problem, "Finds a product." in shown.text) == ("", True)


def test_previews_show_calls_and_name_bases_without_tools() -> None:
    rows = [talk("a"), talk("b", "c"), talk("d", tools=TOOLS[:1])]
    whole = preview_dataset(rows, text_of("qwen-2.5"), 2000, Truncation.ERROR)
    assert (whole.num_issues, whole.num_learned_messages) == (0, 6)
    assert whole.num_messages == {"user": 3, "assistant": 6, "tool": 4}
    assert whole.num_near_duplicates == 0
    trained = [token.text for token in preview_row(rows[0], 1, text_of("qwen-2.5"), 2000, Truncation.ERROR).tokens
               if token.is_trained]  # fmt: skip
    assert "".join(trained).startswith('<tool_call>\n{"name": "find", "arguments": {"word": "a"}}\n</tool_call>')
    without = preview_dataset(rows, text_of("chatml"), 2000, Truncation.ERROR)
    assert [(issue.row, "does not take tools" in issue.problem) for issue in without.issues] == [
        (1, True), (2, True), (3, True)]  # fmt: skip
    better = Preference(
        prompt=talk("a").messages[:-1],
        chosen=talk("b").messages[1:],
        rejected=(Message(role="assistant", content="No."),),
        tools=TOOLS,
    )
    shown = preview_row(better, 1, text_of("qwen-2.5"), 2000, Truncation.ERROR)
    assert shown.rejected is not None
    assert "".join(token.text for token in shown.rejected.tokens if token.is_trained) == "No.<|im_end|>"
    assert shown.problem == ""


def test_rows_that_call_otherwise_do_not_say_the_same() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
    assert near_duplicates([talk(*words), talk(*words)]) == [(0, 1)]
    called = [Message(role="assistant", tool_calls=(ToolCall(name="find", arguments=json.dumps({"a": part})),))
              for part in (words[:6], words[6:])]  # fmt: skip
    told = Message(role="tool", content="20 EUR")
    assert near_duplicates([Conversation(messages=(call, told), tools=TOOLS) for call in called]) == []


# --- the service --------------------------------------------------------------------------------------------------


def rows(num: int) -> bytes:
    return b"".join(json.dumps(talk(f"kettle {at}").to_row()).encode() + b"\n" for at in range(num))


OPENAI_TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds a product.",
                 "parameters": json.loads(FIND.parameters)}}]  # fmt: skip
ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "Price?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_0", "type": "function", "function": {"name": "find", "arguments": '{"word":"kettle"}'}}]},
    {"role": "tool", "tool_call_id": "call_0", "content": "20 EUR"},
]  # fmt: skip


async def test_a_base_without_tools_refuses_to_learn_and_to_answer(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    (settings.data_dir / "bases").mkdir(parents=True, exist_ok=True)
    prepare_base(settings, BASE, lambda phase, fraction: None)

    def ask(address: str) -> list[KnowledgeEngineError]:
        spec = TrainingSpec(dataset="calls", model="m")
        failures = []
        with Client(address) as client:
            client.upload_dataset("calls", rows(4))
            for call in (
                lambda: client.create_training_job(spec),
                lambda: client.estimate_training(spec),
                lambda: client.generate("base", ASKED, tools=OPENAI_TOOLS),
                lambda: list(client.stream_generate("base", "Price?", tools=[FIND])),
            ):
                with pytest.raises(KnowledgeEngineError) as caught:
                    call()
                failures.append(caught.value)
            _, whole = client.preview_dataset("calls")
        assert [issue.row for issue in whole.issues] == [1, 2, 3, 4]
        return failures

    async with await start_server(settings) as server:
        failures = await asyncio.to_thread(ask, server.address)
    assert {failure.reason for failure in failures} == {Reason.TOOLS_UNSUPPORTED}
    assert failures[0].message.startswith("row 1: the base's chat template does not take tools")


SERVED_TEMPLATE = TOOL_TEMPLATE.replace("<tool_call>", "<|endoftext|>")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A whole service on a base whose template takes tools, and writes calls with a control token."""
    base = build_tiny_base(tmp_path_factory.mktemp("base"))
    (base / "chat_template.jinja").write_text(SERVED_TEMPLATE, encoding="utf-8")
    running = start(tmp_path_factory.mktemp("service"), base)
    try:
        yield running
    finally:
        end(running)


def test_what_was_trained_with_tools_can_be_asked_with_them_over_every_face(service: Service) -> None:
    text = chat_text(SERVED_TEMPLATE)
    with Client(service.grpc_address) as client:
        client.upload_dataset("calls", rows(8))
        spec = TrainingSpec(dataset="calls", model="shop", use_qlora=False, max_steps=1, eval_split=0)
        job = client.create_training_job(spec)
        *_, last = client.watch_job(job.id)
        ended = client.get_job(job.id)
        assert ended.state is JobState.SUCCEEDED, (last, ended.error)
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
        wait_until(lambda: client.health()[""] == "SERVING", 150)
        answers = [client.generate("shop", ASKED[:turn], tools=OPENAI_TOOLS, **options) for turn in (1, 3)]
        with client.stream_generate("shop", ASKED, tools=[FIND], **options) as stream:
            streamed = "".join(stream)
    asked = [Message(role="user", content="Price?"), *tool_talk()[1:3]]
    prompts = [len(text.encode_prompt(asked[:turn], [FIND])) for turn in (1, 3)]
    assert [answer.completion.prompt_tokens for answer in answers] == prompts
    assert streamed == answers[1].text
    with httpx2.Client(base_url=f"http://{service.http_address}", timeout=120) as http:
        body = {"messages": ASKED, "tools": OPENAI_TOOLS, **options}
        whole = http.post("/api/v1/models/shop/inference", json=body)
        assert whole.status_code == 200, whole.text
        assert (whole.json()["response"], whole.json()["prompt_tokens"]) == (answers[1].text, prompts[1])
        told = http.post("/api/v1/models/shop/inference", json=body | {"stream": True})
        frames = [line.removeprefix("data: ") for line in told.text.splitlines() if line.startswith("data: ")]
        assert "".join(json.loads(frame).get("text", "") for frame in frames) == streamed
        empty = [*ASKED[:1], ASKED[1] | {"content": ""}, ASKED[2]]
        unlike = http.post("/api/v1/models/shop/inference", json=body | {"messages": empty})
        assert unlike.json()["response"] == answers[1].text
        bare = http.post("/api/v1/models/shop/inference", json=body | {"tools": []})
        assert (bare.status_code, bare.json()["violations"][0]["field"]) == (400, "input.messages[1]")


def test_an_answer_shows_the_control_tokens_of_calls_and_no_others(service: Service) -> None:
    with Client(service.grpc_address) as client:
        wait_until(lambda: client.health()[""] == "SERVING", 150)
        answer = client.generate("base", "Hi", temperature=2, top_p=1, n=8, seed=1, max_tokens=300, logprobs=True)
    said = [(choice.text, {token.token_id for token in choice.logprobs}) for choice in answer.choices]
    assert any("<|endoftext|>" in text for text, _ in said)
    assert all(("<|endoftext|>" in text) is (0 in tokens) for text, tokens in said)
    assert any({1, 2} & tokens for _, tokens in said)
    assert not any("<|im_" in text for text, _ in said)
