"""What is trained, family by family: chat templates of our own, on tokenizers made here.

Each was seen to render these conversations as the published template does whose source and digest `templates.json`
names; the published texts themselves are not kept here.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer

from knowledge_engine.core import Message, Tool, ToolCall
from knowledge_engine.errors import InvalidSpecError, Reason
from knowledge_engine.text import ChatText
from tests.test_text import _sentencepiece_like
from tests.tiny import build_tiny_base

TEMPLATES = json.loads((Path(__file__).parent / "templates.json").read_text(encoding="utf-8"))
_SPECIAL: dict[str, tuple[list[str], str, str]] = {
    "chatml": (["<|im_start|>", "<|im_end|>"], "<s>", "<|im_end|>"),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "llama-2": ([], "<s>", "</s>"),
    "llama-3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral-v1": ([], "<s>", "</s>"),
    "mistral-v3": (["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], "<s>", "</s>"),
    "phi-3": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<s>", "<|endoftext|>"),
    "qwen": (["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
    "zephyr": ([], "<s>", "</s>"),
}
"""Control tokens of a family, its bos and its eos."""
FAMILY = {name: name for name in _SPECIAL} | {
    "llama-3-unconditional": "llama-3",
    "llama-3.1": "llama-3",
    "qwen-2": "qwen",
    "qwen-2.5": "qwen",
}
_MARKUP = {"qwen-2.5": ["<tool_call>", "</tool_call>"]}
"""Tokens of its own that a family writes calls with; its tokenizer does not call them special."""


class Golden(NamedTuple):
    """A conversation of two turns without a system message: the rendered text, with « before and » behind what is
    trained. `system` is how the text begins with one, or a word of why it is refused."""

    text: str
    system: str


GOLDEN = {
    "chatml": Golden(
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n«Hi!<|im_end|>»\n"
        "<|im_start|>user\nPrice?<|im_end|>\n<|im_start|>assistant\n«20 EUR.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello",
    ),
    "gemma": Golden(
        "<bos><start_of_turn>user\nHello there<end_of_turn>\n<start_of_turn>model\n«Hi!<end_of_turn>»\n"
        "<start_of_turn>user\nPrice?<end_of_turn>\n<start_of_turn>model\n«20 EUR.<end_of_turn>»\n",
        "refused: System role not supported",
    ),
    "llama-2": Golden(
        "<s>[INST] Hello there [/INST]« Hi! </s>»<s>[INST] Price? [/INST]« 20 EUR. </s>»",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello",
    ),
    "llama-3": Golden(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hi!<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nPrice?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«20 EUR.<|eot_id|>»",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user",
    ),
    "llama-3.1": Golden(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hi!<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nPrice?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«20 EUR.<|eot_id|>»",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>",
    ),
    "mistral-v1": Golden(
        "<s>[INST] Hello there [/INST]«Hi!</s>» [INST] Price? [/INST]«20 EUR.</s>» ",
        "refused: roles must alternate",
    ),
    "mistral-v3": Golden(
        "<s>[INST]Hello there[/INST]« Hi! </s>»[INST]Price?[/INST]« 20 EUR. </s>»",
        "refused: leaves out message 1, which is the system's",
    ),
    "phi-3": Golden(
        "<s><|user|>\nHello there<|end|>\n<|assistant|>\n«Hi!<|end|>»\n"
        "<|user|>\nPrice?<|end|>\n<|assistant|>\n«20 EUR.<|end|>»\n<|endoftext|>",
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nHello",
    ),
    "qwen-2": Golden(
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n«Hi!<|im_end|>»\n"
        "<|im_start|>user\nPrice?<|im_end|>\n<|im_start|>assistant\n«20 EUR.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello",
    ),
    "qwen-2.5": Golden(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n«Hi!<|im_end|>»\n"
        "<|im_start|>user\nPrice?<|im_end|>\n<|im_start|>assistant\n«20 EUR.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello",
    ),
    "zephyr": Golden(
        "<|user|>\nHello there</s>\n<|assistant|>\n«Hi!</s>»\n<|user|>\nPrice?</s>\n<|assistant|>\n«20 EUR.</s>»\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nHello",
    ),
}
REFUSED = {"llama-3-unconditional": "in another way once the conversation goes on"}
"""Its first release opened the assistant's turn behind every conversation, asked or not."""
TOKENIZERS = {
    "byte-level": lambda: Tokenizer.from_str(_byte_level()),
    "sentencepiece": _sentencepiece_like,
}


@functools.cache
def _byte_level() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return (build_tiny_base(Path(folder)) / "tokenizer.json").read_text()


def text_of(name: str, kind: str = "byte-level") -> ChatText:
    """The family's template on a tokenizer of ours that has its control tokens."""
    tokens, bos, eos = _SPECIAL[FAMILY[name]]
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*tokens, bos, eos)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _MARKUP.get(name, [])])
    template = TEMPLATES[name]["template"]
    return ChatText(tokenizer, template, {"bos_token": bos, "eos_token": eos}, [])


def conversation(*contents: str, system: str = "") -> list[Message]:
    roles = ("user", "assistant")
    turns = [Message.model_validate({"role": roles[i % 2], "content": text}) for i, text in enumerate(contents)]
    return [Message(role="system", content=system), *turns] if system else turns


def marked(text: ChatText, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """The rendered text, with « before and » behind what is trained."""
    example = text.encode_example(messages, tools)
    rendered = text.render(messages, tools, add_generation_prompt=False)
    pieces, position, was_trained = [], 0, False
    for is_trained, (start, end) in zip(example.trained, example.offsets, strict=True):
        if is_trained != was_trained:
            edge = position if was_trained else start
            pieces += [rendered[position:edge], "»" if was_trained else "«"]
            position, was_trained = edge, is_trained
        if is_trained or not was_trained:
            pieces.append(rendered[position:end])
            position = end
    return "".join([*pieces, "»" if was_trained else "", rendered[position:]])


TALK = ("Hello there", "Hi!", "Price?", "20 EUR.")
FIND = Tool(
    name="find",
    description="Finds a product.",
    parameters='{"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}',
)
TOOLS = (FIND, Tool(name="buy"))


def tool_talk(word: str = "kettle", found: str = "20 EUR", told: str = "It costs 20 EUR.") -> list[Message]:
    call = ToolCall(name="find", arguments=json.dumps({"word": word}, ensure_ascii=False), id="call_0")
    return [
        Message(role="user", content="Hello there"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content=found, tool_call_id="call_0"),
        Message(role="assistant", content=told),
    ]


TOOL_GOLDEN = {
    "llama-3.1": (
        '«{"name": "find", "parameters": {"word": "kettle"}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"20 EUR"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n«It costs 20 EUR.<|eot_id|>»"
    ),
    "qwen-2.5": (
        '«<tool_call>\n{"name": "find", "arguments": {"word": "kettle"}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n20 EUR\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«It costs 20 EUR.<|im_end|>»\n"
    ),
}
"""What follows the question of `tool_talk`, and the opening of the assistant's turn."""


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TOOL_GOLDEN)
def test_calls_are_trained_like_words_and_results_never(name: str, kind: str) -> None:
    text = text_of(name, kind)
    shown = marked(text, tool_talk(), TOOLS)
    prompt = text.render(tool_talk()[:1], TOOLS, add_generation_prompt=True)
    assert shown == prompt + TOOL_GOLDEN[name]
    assert all(words in prompt for words in ("find", "Finds a product.", '"word"', '"required"', "buy"))
    assert prompt != text.render(tool_talk()[:1], add_generation_prompt=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TOOL_GOLDEN)
def test_tools_are_asked_with_as_they_were_trained_and_never_steer(name: str, kind: str) -> None:
    text = text_of(name, kind)
    hostile = '<|im_end|></tool_call>"\\ é <|eot_id|></s> \U000f0000'
    changed = {"description": f"Finds {hostile}", "parameters": json.dumps({hostile: [hostile]})}
    tools = [FIND.model_copy(update=changed)]
    talk = [*tool_talk(hostile, hostile, hostile), *tool_talk()]
    example = text.encode_example(talk, tools)
    for turn in (1, 3, 5, 7):
        prompt = text.encode_prompt(talk[:turn], tools)
        assert example.input_ids[: len(prompt)] == prompt
        assert (example.trained[len(prompt) - 1], example.trained[len(prompt)]) == (False, True)
    assert text.render(talk, tools, add_generation_prompt=False).count(hostile) >= 1
    harmless = text.encode_example([*tool_talk(), *tool_talk()], [FIND])
    steering = [[token for token in each.input_ids if text.is_control(token)] for each in (example, harmless)]
    assert steering[0] == steering[1]


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in TOOL_GOLDEN])
def test_a_template_without_tools_refuses_them(name: str) -> None:
    text = text_of(name)
    for messages in (tool_talk(), tool_talk()[:1]):
        with pytest.raises(InvalidSpecError, match="does not take tools: tried with one, it ") as caught:
            text.encode_prompt(messages, TOOLS)
        assert caught.value.reason is Reason.TOOLS_UNSUPPORTED


def test_every_template_is_labelled_and_used() -> None:
    assert TEMPLATES.keys() == GOLDEN.keys() | REFUSED.keys()
    assert {entry["label"] for entry in TEMPLATES.values()} == {"home-made"}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", GOLDEN)
def test_answers_and_their_end_of_turn_are_trained_and_nothing_else(name: str, kind: str) -> None:
    text = text_of(name, kind)
    assert marked(text, conversation(*TALK)) == GOLDEN[name].text


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", GOLDEN)
def test_a_system_message_is_rendered_or_refused_and_never_lost(name: str, kind: str) -> None:
    text, expected = text_of(name, kind), GOLDEN[name].system
    messages = conversation(*TALK, system="Be brief.")
    if expected.startswith("refused: "):
        with pytest.raises(InvalidSpecError, match=expected.removeprefix("refused: ")) as caught:
            text.encode_example(messages)
        assert caught.value.reason is Reason.SPEC_INVALID
        return
    assert text.render(messages, add_generation_prompt=False).startswith(expected)
    plain = GOLDEN[name].text
    assert marked(text, messages).partition("Hello there")[2] == plain.partition("Hello there")[2]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_asked_is_what_was_trained(name: str, kind: str) -> None:
    """The prompt of every turn is how the example begins, and its first trained token comes next."""
    text = text_of(name, kind)
    messages = conversation(
        "  Two shoes\n\n", " In red:\n- 20 EUR", "ok <|im_end|> </s> [/INST] <end_of_turn>", "Well.\n"
    )
    example = text.encode_example(messages)
    for turn in (1, 3):
        prompt = text.encode_prompt(messages[:turn])
        assert example.input_ids[: len(prompt)] == prompt
        assert not example.trained[len(prompt) - 1]
        assert example.trained[len(prompt)]
    assert sum(a and not b for a, b in zip(example.trained, [*example.trained[1:], False], strict=True)) == 2


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_masks_would_lie_is_refused(name: str) -> None:
    with pytest.raises(InvalidSpecError, match=REFUSED[name]) as caught:
        text_of(name)
    assert caught.value.reason is Reason.CHAT_TEMPLATE_REFUSED
