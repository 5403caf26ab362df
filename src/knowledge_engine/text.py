"""The only renderer of conversations: context into the system message, chat template, encoding, trained-token mask.

Training and serving both go through here, so they cannot drift: the ids of a prompt are always the first ids of every
example that goes on from it. Imports `tokenizers` and `jinja2`, never torch. Templates run in Jinja's sandbox and see
the messages, the tools and the names of the special tokens, nothing else; what users write, in tools, calls and results
as well, can never become a control token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from knowledge_engine.bases import Base
from knowledge_engine.core import Message, Tool, ToolCall, Truncation
from knowledge_engine.errors import IntegrityError, InvalidSpecError, Reason, RowError, Violation
from knowledge_engine.files import read_json
from knowledge_engine.tools import check_calls, strings, tool_to_row

DEFAULT_SYSTEM = "You are a helpful shopping assistant."
MAX_TEMPLATE_CHARACTERS = 65_536
_MAX_NAMED_ROWS = 20
_GOING_ON = Message(role="user", content="Go on.")
_TRIED_TOOLS = (
    Tool(
        name="tried_tool",
        description="Tried words.",
        parameters='{"type": "object", "properties": {"tried_key": {"type": "string", "description": "Tried sense."}}}',
    ),
)
_OWN_WORDS = frozenset({"type", "function", "name", "description", "parameters", "id", "arguments"})
"""What the layout of tools and calls says by itself."""
_TWO_CALLS, _WORDS_TOO = "two calls in one message", "words beside a call"

# Private characters, which no script uses, stand in for control tokens while a template renders.
_STAND_IN_FIRST, _STAND_IN_LAST = 0xF0000, 0x10FFFD
_STAND_IN = f"[{chr(_STAND_IN_FIRST)}-{chr(_STAND_IN_LAST)}]"
_STAND_IN_RUN = re.compile(rf"({_STAND_IN})\1*")


def with_context(messages: Sequence[Message], context: Mapping[str, Any] | None) -> tuple[Message, ...]:
    """The conversation with every key of `context` rendered into its system message.

    `products`, a list of maps, becomes one line each; every other key one `key: value` line. Without a system message
    one is put first. An empty context changes nothing. Keys come sorted: a protobuf Struct has no order to keep, and
    the same context must give the same prompt in training and in every process that serves.
    """
    if not context:
        return tuple(messages)
    lines: list[str] = []
    for key, value in sorted(context.items()):
        if key == "products" and isinstance(value, Sequence) and not isinstance(value, str):
            lines.append("Products:" if value else "Products: none")
            lines.extend(f"- {_product_line(product)}" for product in value)
        else:
            lines.append(f"{key}: {_plain(value)}")
    system = messages[0].content if messages and messages[0].role == "system" else DEFAULT_SYSTEM
    rest = messages[1:] if messages and messages[0].role == "system" else messages
    return (Message(role="system", content="\n".join([system, *lines])), *rest)


def _product_line(product: Any) -> str:
    """One product as a short line: title, brand and price first, then whatever else it has."""
    if not isinstance(product, Mapping):
        return _plain(product)
    left = dict(product)
    head = str(left.pop("title", None) or left.pop("name", None) or left.pop("id", "unnamed"))
    if brand := left.pop("brand", None):
        head += f" by {_plain(brand)}"
    parts = [head]
    if (price := left.pop("price", None)) is not None:
        amount = f"{price:.2f}" if isinstance(price, int | float) and not isinstance(price, bool) else _plain(price)
        currency = left.pop("currency", None)
        parts.append(f"{amount} {currency}" if currency else amount)
    if (in_stock := left.pop("in_stock", None)) is not None:
        parts.append({True: "in stock", False: "out of stock"}.get(in_stock, f"in_stock: {_plain(in_stock)}"))
    attributes = left.pop("attributes", None)
    if isinstance(attributes, Mapping):
        left.update(attributes)
    elif attributes is not None:
        left["attributes"] = attributes
    parts.extend(f"{key}: {_plain(value)}" for key, value in sorted(left.items()))
    return ", ".join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


class _GenerationBlocks(jinja2.ext.Extension):
    """Reads the `{% generation %}` blocks that some templates carry; they only mark, and render as their content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateRefusalError(Exception):
    """A template's own `raise_exception`: it will not have these messages."""


class HasMessages(Protocol):
    """A conversation, however it is stored."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def tools(self) -> Sequence[Tool]: ...


@dataclass(frozen=True)
class Example:
    """One conversation for training; the three lists have one entry per token.

    `offsets` are character positions in the rendered text; `trained` says which tokens are learned.
    """

    input_ids: list[int]
    offsets: list[tuple[int, int]]
    trained: list[bool]


@dataclass(frozen=True)
class _Rendered:
    """A rendered text, and where in it (start, end) the names of control tokens stand that a user wrote."""

    text: str
    quoted: list[tuple[int, int]]


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a rendered text; `marks` are the indices of the first tokens after each cut."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    marks: list[int]


@dataclass(frozen=True)
class _CallStyle:
    """How a template takes calls: what stands for words where there are none, and whether arguments come as the JSON
    text that OpenAI has, where it has no use for the object of Hugging Face's convention."""

    blank: str | None
    has_text: bool


_CALL_STYLES = tuple(_CallStyle(blank, has_text) for has_text in (False, True) for blank in ("", None))


class ChatText:
    """One base's tokenizer and chat template. `decoder` is the tokenizer for answers: without the control tokens that
    end them, but with those by which the template writes calls."""

    def __init__(self, tokenizer: Tokenizer, template: str, names: Mapping[str, str], stop_token_ids: Iterable[int]):
        """`names` are the special tokens as templates know them, such as `bos_token`.

        Raises:
            InvalidSpecError: CHAT_TEMPLATE_REFUSED, a template for which masks could not be right.
        """
        self.template_digest = f"sha256:{hashlib.sha256(template.encode()).hexdigest()}"
        self._names = dict(names)
        self._template = _compile(template)
        self._call_style: _CallStyle | None = None
        self._why_no_tools = ""
        self._why_no_calls: dict[str, str] = {}
        self._control = {
            token.content: index
            for index, token in tokenizer.get_added_tokens_decoder().items()
            if token.special or (token.content.strip() and token.content in template)
        }
        self._control_ids = frozenset(self._control.values())
        self.tokenizer = _with_control_tokens(tokenizer, self._control)
        self._plain = _with_control_tokens(tokenizer, self._control)
        self._plain.encode_special_tokens = True
        for token in self._control:
            if not self._control_ids.isdisjoint(self._plain.encode(token, add_special_tokens=False).ids):
                raise _refused(f"the tokenizer cannot tell the control token {token!r} from the same text")
        tokens = [re.escape(token) for token in sorted(self._control, key=len, reverse=True)]
        self._protected = re.compile("|".join([*tokens, _STAND_IN]))
        self._edges = _edges(self._control)
        self._closing = re.compile("|".join([*tokens, r"\s"]))
        probe = [Message(role="user", content="Hello"), Message(role="assistant", content="Hi")] * 2
        try:
            example = self.encode_example(probe)
        except InvalidSpecError as error:
            raise error if error.reason is Reason.CHAT_TEMPLATE_REFUSED else _refused(error.message) from error
        self.stop_token_ids = frozenset({*stop_token_ids, example.input_ids[_last(example.trained)]})
        self.decoder = self.tokenizer
        self._try_tools(tokenizer)

    def _try_tools(self, tokenizer: Tokenizer) -> None:
        """Finds out how the template takes tools, by which tokens it writes and ends a call; or why it takes none. What
        else a call may come with is tried as well: a name or text of one that was left out may stand elsewhere."""
        for style in _CALL_STYLES:
            self._call_style = style
            try:
                call = self._tried_call(style)
            except InvalidSpecError as error:
                self._why_no_tools = self._why_no_tools or _tried_with("one", error)
                continue
            self.stop_token_ids |= {call[-1]}
            shown = self._control_ids.intersection(call) - self.stop_token_ids
            self.decoder = _with_control_tokens(
                tokenizer, {token: index for token, index in self._control.items() if index not in shown}
            )
            for what, talk in ((_TWO_CALLS, _tried_talk(num_calls=2)), (_WORDS_TOO, _tried_talk(words="Tried talk."))):
                try:
                    self.encode_example(talk, _TRIED_TOOLS)
                except InvalidSpecError as error:
                    self._why_no_calls[what] = _tried_with(what, error)
            return
        self._call_style = None

    def _tried_call(self, style: _CallStyle) -> list[int]:
        """The tokens of a turn that calls a tool. Raises InvalidSpecError."""
        talk = _tried_talk()
        example = self.encode_example(talk, _TRIED_TOOLS)
        first = example.trained.index(True)
        end = example.trained.index(False, first)
        text = self.render(talk, _TRIED_TOOLS, add_generation_prompt=False)
        call = text[example.offsets[first][0] : example.offsets[end - 1][1]]
        if "Tried sense." not in text:
            raise _toolless("it leaves out what a tool's parameters mean")
        if "'tried_key'" in call or (style.blank is None and "None" in call):
            raise _toolless("it writes calls as Python does, not as JSON")
        return example.input_ids[first:end]

    @classmethod
    def load(cls, base: Base) -> ChatText:
        """Reads tokenizer.json, tokenizer_config.json, generation_config.json and the template of a base.

        Raises:
            InvalidSpecError: CHAT_TEMPLATE_REFUSED.
            IntegrityError: BASE_MODEL_CORRUPT, tokenizer.json cannot be read.
        """
        config = read_json(base.folder / "tokenizer_config.json")
        try:
            tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise IntegrityError(
                f"tokenizer.json of the base model {base.name!r} cannot be read: {error}",
                reason=Reason.BASE_MODEL_CORRUPT,
                base_model=base.name,
                file="tokenizer.json",
            ) from error
        names = _special_names(config)
        stop = read_json(base.folder / "generation_config.json").get("eos_token_id")
        stop_ids = [item for item in (stop if isinstance(stop, list) else [stop]) if isinstance(item, int)]
        if (eos := tokenizer.token_to_id(names.get("eos_token", ""))) is not None:
            stop_ids.append(eos)
        return cls(tokenizer, read_template(base.folder), names, stop_ids)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def is_control(self, token_id: int) -> bool:
        """Whether a token steers, such as one that ends a turn; what users write never becomes one."""
        return token_id in self._control_ids

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, add_generation_prompt: bool) -> str:
        """The conversation as the template writes it.

        Raises:
            InvalidSpecError: SPEC_INVALID, the template will not have these messages; CHAT_TEMPLATE_REFUSED;
                TOOLS_UNSUPPORTED, it has no place for tools, or leaves out some of what is said of them.
        """
        return self._render(messages, tools, add_generation_prompt).text

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids up to where the assistant's next words begin. Raises as `render`."""
        rendered = self._render(messages, tools, True)
        return self._encode(rendered, [start for start, _ in self._turns(messages, tools, rendered.text)]).ids

    def exceeds(self, messages: Sequence[Message], most: int, tools: Sequence[Tool] = ()) -> bool:
        """Whether the messages alone, or with tools, have more than `most` tokens: found as soon as it is, where
        encoding would look at every turn of a chat anew. What is near `most` is said not to exceed it."""
        if _exceeds(self._plain, (message.content.strip() for message in messages), most):  # as templates may
            return True
        return bool(tools) and _exceeds(
            self.tokenizer, [self.render(messages, tools, add_generation_prompt=True)], most
        )

    def encode_example(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Example:
        """Token ids of a whole conversation; trained are the assistant's turns, calls as well, up to their end-of-turn
        token, but for those of weight 0.

        Raises:
            InvalidSpecError: SPEC_INVALID, CHAT_TEMPLATE_REFUSED, TOOLS_UNSUPPORTED.
        """
        rendered = self._render(messages, tools, False)
        turns = self._turns(messages, tools, rendered.text)
        encoded = self._encode(rendered, [start for start, _ in turns])
        trained = [False] * len(encoded.ids)
        learned = [message.is_learned for message in messages if message.role == "assistant"]
        for first, (_, end), is_learned in zip(encoded.marks, turns, learned, strict=True):
            if not is_learned:
                continue
            inside = [i for i in range(first, len(trained)) if encoded.offsets[i][1] <= end]
            control = [i for i in inside if encoded.ids[i] in self._control_ids]
            if not control:
                raise _refused("it ends the assistant's turn with no control token, so a model could not learn to stop")
            # What follows the end-of-turn token, such as a line break, is never generated.
            trained[first : control[-1] + 1] = [True] * (control[-1] + 1 - first)
        return Example(encoded.ids, encoded.offsets, trained)

    def _turns(self, messages: Sequence[Message], tools: Sequence[Tool], text: str) -> list[tuple[int, int]]:
        """Where in `text`, the rendering of `messages`, each assistant turn starts and ends, its closing included.

        A turn is what its rendering as the last one and the rendering of a conversation that goes on have in common:
        some templates close the whole conversation too, with a token that is never generated within one.
        """
        turns: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:index], tools, add_generation_prompt=True)
            through = self.render(messages[: index + 1], tools, add_generation_prompt=False)
            going_on = text
            if index + 1 == len(messages):
                going_on = self.render([*messages, *_what_follows(message)], tools, add_generation_prompt=False)
            end = self._end_of_turn(through, going_on)
            is_whole = end and message.content.strip() in through[len(before) : end]
            if not (text.startswith(before) and text[:end] == through[:end] and is_whole):
                raise _refused(
                    "it writes the beginning of a conversation in another way once the conversation goes on, so what "
                    "was trained would not be what is asked"
                )
            if missing := _missing(message, through[len(before) : end]):
                raise _toolless(f"it leaves out {missing[:60]!r}, of a call in message {index + 1}")
            turns.append((len(before), end))
        return turns

    def _end_of_turn(self, through: str, going_on: str) -> int:
        """Where the last turn of `through` ends that `going_on` has as well; 0 where they differ in more than what
        closes a conversation: control tokens and white space."""
        end = len(commonprefix([through, going_on]))  # noqa: RUF071 - characters are meant
        for token in self._closing.finditer(through):
            if token.start() < end < token.end():  # the next token of both begins alike
                end = token.start()
        return 0 if self._closing.sub("", through[end:]) else end

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool], add_generation_prompt: bool) -> _Rendered:
        try:
            answered = check_calls(messages, tools)
        except RowError as error:
            raise InvalidSpecError(str(error)) from None
        if tools and self._call_style is None:
            raise _toolless(self._why_no_tools)
        for message in messages:
            what = {_TWO_CALLS: len(message.tool_calls) > 1, _WORDS_TOO: message.tool_calls and message.content}
            if why := next((why for name, why in self._why_no_calls.items() if what[name]), ""):
                raise _toolless(why)
        stand_ins = _StandIns(self._protected, self._edges)
        hidden = [self._hidden(item, answered.get(index), stand_ins) for index, item in enumerate(messages)]
        shown = [stand_ins.hide_all(tool_to_row(tool)) for tool in tools]
        try:
            text = self._template.render(
                messages=hidden,
                add_generation_prompt=add_generation_prompt,
                tools=shown or None,
                documents=None,
                **self._names,
            )
        except _TemplateRefusalError as error:
            raise InvalidSpecError(f"{_TEMPLATE}refuses these messages: {str(error)[:300]}") from error
        except Exception as error:  # a template is data: whatever it breaks, it is the template's fault
            raise _refused(f"{type(error).__name__}: {str(error)[:300]}") from error
        for function in (tool["function"] for tool in shown):
            if not all(_count(words.strip(), text) for words in (function["name"], function.get("description", ""))):
                raise _toolless(f"it leaves out the tool {function['name']}, or its description")
        for number, item in enumerate(hidden, 1):
            content = (item["content"] or "").strip()
            if content not in text and not (item["role"] == "tool" and _count(content, text)):
                raise InvalidSpecError(
                    f"{_TEMPLATE}leaves out message {number}, which is the {item['role']}'s; put its text into a "
                    "message that the template takes"
                )
        return self._restore(text, stand_ins.literals)

    def _hidden(self, message: Message, answered: ToolCall | None, stand_ins: _StandIns) -> dict[str, Any]:
        """A message as templates take it; `answered` is the call whose result it is."""
        hidden: dict[str, Any] = {"role": message.role, "content": stand_ins.hide(message.content)}
        if answered is not None:
            hidden |= {"content": stand_ins.hide_all(message.content), "name": answered.name}
            if answered.id:
                hidden["tool_call_id"] = stand_ins.hide_all(answered.id)
        if (style := self._call_style) is None or not message.tool_calls:
            return hidden
        hidden["content"] = hidden["content"] or style.blank
        hidden["tool_calls"] = []
        for call in message.tool_calls:
            arguments = stand_ins.hide_all(json.loads(call.arguments))
            arguments = json.dumps(arguments, ensure_ascii=False) if style.has_text else arguments
            named = {"id": stand_ins.hide_all(call.id)} if call.id else {}
            hidden["tool_calls"].append(
                named | {"type": "function", "function": {"name": call.name, "arguments": arguments}}
            )
        return hidden

    def _restore(self, text: str, literals: Mapping[str, str]) -> _Rendered:
        """Puts back what stood-in characters stand for; each stands as often as its literal is long."""
        pieces: list[str] = []
        quoted: list[tuple[int, int]] = []
        position = 0
        for run in _STAND_IN_RUN.finditer(text):
            literal = literals.get(run[1], "")
            if not literal or len(run[0]) % len(literal):
                raise _refused("it takes message contents apart")
            pieces += [text[position : run.start()], literal * (len(run[0]) // len(literal))]
            position = run.end()
            if _STAND_IN_RUN.fullmatch(literal) is None:
                quoted.append((run.start(), run.end()))
        return _Rendered("".join([*pieces, text[position:]]), quoted)

    def _encode(self, rendered: _Rendered, cuts: Sequence[int]) -> _Encoded:
        """Tokens of the whole text, such that the tokens before each cut are those of the text before it.

        Mostly the ordinary encoding has that property. Where a token would span a cut (say two line breaks of which the
        second begins the answer), the text is encoded in two parts, as it is when the model answers.
        """
        done = _Encoded([], [], [])
        start = 0
        for cut, following in pairwise([*cuts, len(rendered.text)]):
            ids, offsets = self._encode_part(rendered, start, cut)
            done.marks.append(len(done.ids) + len(ids))
            if self._encode_part(rendered, start, following)[0][: len(ids)] != ids:
                done.ids.extend(ids)
                done.offsets.extend(offsets)
                start = cut
        ids, offsets = self._encode_part(rendered, start, len(rendered.text))
        done.ids.extend(ids)
        done.offsets.extend(offsets)
        return done

    def _encode_part(self, rendered: _Rendered, start: int, end: int) -> tuple[list[int], list[tuple[int, int]]]:
        text = rendered.text[start:end]
        quoted = [(max(a, start) - start, min(b, end) - start) for a, b in rendered.quoted if a < end and b > start]
        # One alone would hold the interpreter until it is done: half a second for a megabyte.
        (encoding,) = self.tokenizer.encode_batch([_masked(text, quoted)], add_special_tokens=False)
        tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
        if quoted:
            tokens = self._reencode(text, tokens, quoted)
        return [token for token, _ in tokens], [(a + start, b + start) for _, (a, b) in tokens]

    def _reencode(self, text: str, tokens: list[_Token], quoted: Sequence[tuple[int, int]]) -> list[_Token]:
        """Tokens of `text`, given those of the same text with its quoted parts masked: the stretches between control
        tokens that hold a quoted part are encoded again, as plain text."""
        done: list[_Token] = []
        stretch: list[_Token] = []
        first = 0
        for token, (start, end) in [*tokens, (-1, (len(text), len(text)))]:
            if token != -1 and token not in self._control_ids:
                stretch.append((token, (start, end)))
                continue
            if any(first <= a < start for a, _ in quoted):
                plain = self._plain.encode(text[first:start], add_special_tokens=False)
                stretch = [(i, (a + first, b + first)) for i, (a, b) in zip(plain.ids, plain.offsets, strict=True)]
            done += stretch
            if token != -1:
                done.append((token, (start, end)))
            stretch, first = [], end
        return done


class _StandIns:
    """Private characters for what must not become a control token while a template renders, each as often as its
    literal is long; `literals` says what they stand for."""

    def __init__(self, protected: re.Pattern[str], edges: re.Pattern[str]) -> None:
        self.literals: dict[str, str] = {}
        self._protected = protected
        self._edges = edges
        self._codes: dict[str, str] = {}

    def hide(self, text: str) -> str:
        return self._protected.sub(self._stand_in, text)

    def hide_all(self, value: Any) -> Any:
        """The same for every text in a JSON value, which a template may write as JSON."""
        if isinstance(value, str):
            for match in self._protected.finditer(value):
                if _json(match[0]) != match[0]:
                    raise InvalidSpecError(
                        f"a tool, call or result holds {match[0]!r}, a control token of this base that JSON has to "
                        "write in another way"
                    )
            # A template may put a text between signs that make a control token of it.
            return self._edges.sub(self._stand_in, self.hide(value))
        if isinstance(value, Mapping):
            return {self.hide_all(key): self.hide_all(item) for key, item in value.items()}
        return [self.hide_all(item) for item in value] if isinstance(value, list) else value

    def _stand_in(self, match: re.Match[str]) -> str:
        code = _STAND_IN_FIRST + len(self._codes)
        if code > _STAND_IN_LAST:
            raise InvalidSpecError("the messages hold too many private-use characters")
        stand_in = self._codes.setdefault(match[0], chr(code))
        self.literals[stand_in] = match[0]
        return stand_in * len(match[0])


def _edges(control: Iterable[str]) -> re.Pattern[str]:
    """Texts that are all of a control token but for a sign or two on either side, and beginnings and ends of texts that
    are all but for its first or its last."""
    parts: set[str] = set()
    for token in control:
        for few in (1, 2):
            if len(token) > few + 2:
                parts |= {rf"\A{re.escape(token[few:])}", rf"{re.escape(token[:-few])}\Z"}
                parts |= {
                    rf"\A{re.escape(token[few:-more])}\Z"
                    for more in (1, 2)
                    if len(token) > few + more and token[few:-more] not in _OWN_WORDS
                }
    return re.compile("|".join(sorted(parts)) or r"(?!)")


def _exceeds(tokenizer: Tokenizer, texts: Iterable[str], most: int) -> bool:
    num_tokens = 0
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARACTERS):
            (encoding,) = tokenizer.encode_batch_fast(
                [text[start : start + _PIECE_CHARACTERS]], add_special_tokens=False
            )
            num_tokens += max(0, len(encoding) - _SEAM_TOKENS)
            if num_tokens > most:
                return True
    return False


def _what_follows(message: Message) -> Sequence[Message]:
    """What may come behind a message of the assistant."""
    results = [Message(role="tool", content="Done.", tool_call_id=call.id) for call in message.tool_calls]
    return results or [_GOING_ON]


def _missing(message: Message, turn: str) -> str:
    """A name or text of the message's calls that its turn has too seldom, beside its words; empty where it has all."""
    text = turn.replace(message.content.strip(), "", 1)
    wanted = Counter(call.name for call in message.tool_calls)
    for arguments, number in Counter(call.arguments for call in message.tool_calls).items():
        if text.count(arguments) < number:  # written as something else than JSON
            wanted.update(list(strings(json.loads(arguments))) * number)
    return next((words for words, number in wanted.items() if _count(words, text) < number), "")


def _count(words: str, text: str) -> int:
    """How often `text` has them, as they are or as JSON writes them."""
    return max(text.count(words), text.count(_json(words)))


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _masked(text: str, quoted: Sequence[tuple[int, int]]) -> str:
    """The text with stand-ins for its quoted parts, which come in order."""
    pieces, position = [], 0
    for first, last in quoted:
        pieces += [text[position:first], chr(_STAND_IN_FIRST) * (last - first)]
        position = last
    return "".join([*pieces, text[position:]])


_Token = tuple[int, tuple[int, int]]

_PIECE_CHARACTERS = 2**15
_SEAM_TOKENS = 4
"""What cutting a text may add to its tokens, generously."""


@dataclass(frozen=True)
class Fitted:
    """What a conversation becomes: its example and the messages in it, None and none where it is left out.

    `change` says what was done to it, empty for nothing.
    """

    example: Example | None
    messages: Sequence[Message]
    change: str
    tools: Sequence[Tool] = ()


def fit_conversations(
    conversations: Iterable[HasMessages],
    text: ChatText,
    max_length: int,
    truncation: Truncation = Truncation.ERROR,
    conversations_per_row: int = 1,
) -> Iterator[Fitted]:
    """Every conversation as an example of at most `max_length` tokens, in the same order; rows count from 1, and
    `conversations_per_row` of them on end are one row. What is wrong with rows is raised at the end.

    `truncation` decides about longer ones: an error; dropped; or without its first turns, the system message kept, so
    that what is left begins with the user, and dropped where even the last turns are too long. No turn is ever cut, and
    no result parted from its call, as calls are answered before the user speaks again. The tools stay.

    Raises:
        InvalidSpecError: EXAMPLE_TOO_LONG or NOTHING_TO_TRAIN, naming rows; SPEC_INVALID, CHAT_TEMPLATE_REFUSED or
            TOOLS_UNSUPPORTED, naming the first row that the template does not take.
    """
    num_examples = 0
    too_long: list[Violation] = []
    untrained: list[Violation] = []
    for position, conversation in enumerate(conversations):
        row = position // conversations_per_row + 1
        try:
            fitted = fit_conversation(conversation, text, max_length, truncation)
        except InvalidSpecError as error:
            if error.reason is Reason.EXAMPLE_TOO_LONG:
                if not too_long or too_long[-1].field != f"rows[{row}]":
                    too_long.append(Violation(f"rows[{row}]", error.message))
            elif error.reason is Reason.NOTHING_TO_TRAIN:
                untrained.append(Violation(f"rows[{row}]", error.message))
            else:
                raise InvalidSpecError(f"row {row}: {error.message}", reason=error.reason, row=row) from error
            continue
        num_examples += fitted.example is not None
        yield fitted
    if untrained:
        raise InvalidSpecError(
            f"nothing would be learned from {_name_rows(untrained)}: no assistant turn",
            reason=Reason.NOTHING_TO_TRAIN,
            violations=untrained[:_MAX_NAMED_ROWS],
            num_rows=len(untrained),
        )
    if too_long:
        raise InvalidSpecError(
            f"{_name_rows(too_long)}: longer than max_length ({max_length} tokens); raise it, or set truncation",
            reason=Reason.EXAMPLE_TOO_LONG,
            violations=too_long[:_MAX_NAMED_ROWS],
            max_length=max_length,
            num_rows=len(too_long),
        )
    if not num_examples:
        raise InvalidSpecError(
            f"nothing would be learned: no conversation has at most max_length ({max_length}) tokens",
            reason=Reason.NOTHING_TO_TRAIN,
            max_length=max_length,
        )


def fit_conversation(
    conversation: HasMessages, text: ChatText, max_length: int, truncation: Truncation = Truncation.ERROR
) -> Fitted:
    """As `fit_conversations`, of one, with sentences that do not name a row."""
    messages, tools = conversation.messages, conversation.tools
    example = text.encode_example(messages, tools)
    if not any(example.trained[1:]):
        raise InvalidSpecError("holds no assistant turn", reason=Reason.NOTHING_TO_TRAIN)
    length = len(example.input_ids)
    if length <= max_length:
        return Fitted(example, messages, "", tools)
    has = f"has {length} tokens, more than max_length ({max_length})"
    if truncation is Truncation.ERROR:
        raise InvalidSpecError(has, reason=Reason.EXAMPLE_TOO_LONG)
    if truncation is Truncation.KEEP_LAST_TURNS:
        kept = messages[:1] if messages[0].role == "system" else messages[:0]
        for start in range(len(kept) + 1, len(messages)):
            if messages[start].role != "user":
                continue
            rest = [*kept, *messages[start:]]
            example = text.encode_example(rest, tools)
            if not any(example.trained[1:]):
                break
            if len(example.input_ids) <= max_length:
                left_out = start - len(kept)
                return Fitted(example, rest, f"{has}: its first {left_out} messages are left out", tools)
    return Fitted(None, (), f"{has}: dropped")


def with_one_prompt(
    sides: Sequence[Fitted], whole: Sequence[HasMessages], num_prompt: int, text: ChatText
) -> tuple[Fitted, ...]:
    """Both answers to one prompt of `num_prompt` messages, each with no more of it than the other was fitted with.

    Both are dropped where one is, or where nothing of the prompt would be left.
    """
    change = next((side.change for side in sides if side.change), "")
    if not change:
        return tuple(sides)
    left_out = max(len(all_of_it.messages) - len(side.messages) for side, all_of_it in zip(sides, whole, strict=True))
    num_system = int(whole[0].messages[0].role == "system")
    if any(side.example is None for side in sides) or num_system + left_out >= num_prompt:
        return tuple(Fitted(None, (), f"{change.partition(': ')[0]}: dropped") for _ in sides)
    kept = [[*each.messages[:num_system], *each.messages[num_system + left_out :]] for each in whole]
    tools = whole[0].tools
    return tuple(Fitted(text.encode_example(messages, tools), messages, change, tools) for messages in kept)


def read_template(folder: Path) -> str:
    """The chat template of a model folder, whichever way it is kept.

    Raises:
        InvalidSpecError: CHAT_TEMPLATE_REFUSED, there is none.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    kept = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(kept, list):
        kept = next((item.get("template") for item in kept if item.get("name") == "default"), None)
    if not isinstance(kept, str):
        raise _refused("the model folder holds none")
    return kept


def _compile(template: str) -> jinja2.Template:
    """The environment that transformers gives chat templates, without the clock: a prompt must not change by itself."""
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise _refused(f"it has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}")

    def refuse(message: object) -> None:
        raise _TemplateRefusalError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise _refused(f"it does not parse: {error}") from error


def _with_control_tokens(tokenizer: Tokenizer, control: Mapping[str, int]) -> Tokenizer:
    """A copy in which exactly `control` are special, each found in the text as it is and never in a normalised form."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in control
        token["normalized"] = token["normalized"] and not token["special"]
    return Tokenizer.from_str(json.dumps(data))


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            names[key] = text
    return names


def _refused(why: str) -> InvalidSpecError:
    return InvalidSpecError(f"{_TEMPLATE}cannot be used: {why}", reason=Reason.CHAT_TEMPLATE_REFUSED)


def _tried_talk(num_calls: int = 1, words: str = "") -> list[Message]:
    """Two questions that are answered with calls, each with an id of the length that Mistral's templates ask for."""
    talk: list[Message] = []
    for question in range(2):
        calls = [
            ToolCall(
                id=f"tried{question}{call:03}", name="tried_tool", arguments=f'{{"tried_key": "tried value {call}"}}'
            )
            for call in range(num_calls)
        ]
        talk += [
            Message(role="user", content="Hello"),
            Message(role="assistant", content=words, tool_calls=tuple(calls)),
            *(Message(role="tool", content=f"tried result {call.id}", tool_call_id=call.id) for call in calls),
            Message(role="assistant", content="Hi"),
        ]
    return talk


def _tried_with(what: str, error: InvalidSpecError) -> str:
    why = error.message.removeprefix(_TOOLLESS).removeprefix("it ").removeprefix(_TEMPLATE)
    return f"tried with {what}, it {why}"


def _toolless(why: str) -> InvalidSpecError:
    return InvalidSpecError(f"{_TOOLLESS}{why}", reason=Reason.TOOLS_UNSUPPORTED)


_TEMPLATE = "the base's chat template "
_TOOLLESS = f"{_TEMPLATE}does not take tools: "


def _last(flags: Sequence[bool]) -> int:
    return max(index for index, flag in enumerate(flags) if flag)


def _name_rows(violations: Sequence[Violation]) -> str:
    rows = [violation.field.removeprefix("rows[").removesuffix("]") for violation in violations[:_MAX_NAMED_ROWS]]
    more = f" and {len(violations) - len(rows)} more" if len(violations) > len(rows) else ""
    return f"row{'s' if len(violations) > 1 else ''} {', '.join(rows)}{more}" if rows else ""
