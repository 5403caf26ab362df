"""What a base's chat template makes of stored conversations, before anything is trained: the text, its tokens, which of
them are trained, and what is wrong with which row. No torch; `text.py` renders, as it does for training and serving.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, quantiles

from knowledge_engine.core import (
    DatasetPreview,
    LengthBin,
    NearDuplicate,
    PreviewedAnswer,
    PreviewedRow,
    PreviewedToken,
    PreviewIssue,
    TokenLengths,
    Truncation,
)
from knowledge_engine.errors import InvalidSpecError, Reason
from knowledge_engine.rows import Conversation, Preference, Row
from knowledge_engine.splits import near_duplicates
from knowledge_engine.text import ChatText, Fitted, fit_conversation, with_one_prompt

MAX_ISSUES = 1000
_NUM_BINS = 16


def preview_row(row: Row, number: int, text: ChatText, max_length: int, truncation: Truncation) -> PreviewedRow:
    sides, problem = _looked_at(row, text, max_length, truncation)
    change = sides[0].change
    if any(fitted.example is None for fitted in sides):
        return PreviewedRow(number, "", (), problem, change)
    shown = [_rendered(fitted, text) for fitted in sides]
    rejected = PreviewedAnswer(*shown[1]) if isinstance(row, Preference) else None
    return PreviewedRow(number, *shown[0], problem, change, rejected)


def _rendered(fitted: Fitted, text: ChatText) -> tuple[str, tuple[PreviewedToken, ...]]:
    """The text and its tokens."""
    example = fitted.example
    assert example is not None
    rendered = text.render(fitted.messages, fitted.tools, add_generation_prompt=False)
    tokens: list[PreviewedToken] = []
    position = 0
    for token_id, (_, end), is_trained in zip(example.input_ids, example.offsets, example.trained, strict=True):
        piece = rendered[position : max(position, end)]
        tokens.append(PreviewedToken(token_id, piece, is_trained, text.is_control(token_id)))
        position = max(position, end)
    return rendered, tuple(tokens)


def preview_dataset(rows: Sequence[Row], text: ChatText, max_length: int, truncation: Truncation) -> DatasetPreview:
    """Goes through all rows; about a second for every 300. A preference is as long as the longer of its two sides."""
    lengths: list[int] = []
    issues: list[PreviewIssue] = []
    changes: list[PreviewIssue] = []
    num_messages: Counter[str] = Counter()
    num_learned = num_trained = num_tokens = 0
    for number, row in enumerate(rows, 1):
        num_messages.update(message.role for message in row.messages)
        num_learned += sum(message.is_learned for side in _sides(row) for message in side.messages)
        sides, problem = _looked_at(row, text, max_length, truncation)
        examples = [fitted.example for fitted in sides if fitted.example is not None]
        if len(examples) == len(sides):
            lengths.append(max(len(example.input_ids) for example in examples))
            num_tokens += sum(len(example.input_ids) for example in examples)
            num_trained += sum(sum(example.trained[1:]) for example in examples)
        if problem:
            issues.append(PreviewIssue(number, problem))
        if change := sides[0].change:
            changes.append(PreviewIssue(number, change))
    pairs = [NearDuplicate(later + 1, earlier + 1) for earlier, later in near_duplicates(rows)]
    first = {pair.row: pair for pair in reversed(pairs)}  # one that is like several is counted once
    return DatasetPreview(
        num_rows=len(rows),
        num_tokens=num_tokens,
        num_trained_tokens=num_trained,
        lengths=_summary(lengths),
        length_bins=_bins(lengths),
        num_messages=dict(num_messages),
        num_learned_messages=num_learned,
        num_issues=len(issues),
        issues=tuple(issues[:MAX_ISSUES]),
        num_changes=len(changes),
        changes=tuple(changes[:MAX_ISSUES]),
        num_near_duplicates=len(first),
        near_duplicates=tuple(sorted(first.values())[:MAX_ISSUES]),
    )


def _sides(row: Row) -> tuple[Conversation, ...]:
    return row.sides if isinstance(row, Preference) else (row,)


def _looked_at(row: Row, text: ChatText, max_length: int, truncation: Truncation) -> tuple[Sequence[Fitted], str]:
    """The fitted sides of a row, and what is wrong with the first that something is wrong with."""
    looked = [_side_looked_at(side, text, max_length, truncation) for side in _sides(row)]
    sides: Sequence[Fitted] = [fitted for fitted, _ in looked]
    problem = next((problem for _, problem in looked if problem), "")
    if isinstance(row, Preference) and not problem:
        sides = with_one_prompt(sides, row.sides, len(row.prompt), text)
    return sides, problem


def _side_looked_at(
    conversation: Conversation, text: ChatText, max_length: int, truncation: Truncation
) -> tuple[Fitted, str]:
    """The fitted conversation and what is wrong with it, empty for nothing. One that is refused is shown as it is, if
    it can be rendered."""
    try:
        return fit_conversation(conversation, text, max_length, truncation), ""
    except InvalidSpecError as error:
        problem = error.message
        if error.reason not in {Reason.EXAMPLE_TOO_LONG, Reason.NOTHING_TO_TRAIN}:
            return Fitted(None, (), ""), problem
    messages, tools = conversation.messages, conversation.tools
    return Fitted(text.encode_example(messages, tools), messages, "", tools), problem


def _bins(lengths: Sequence[int]) -> tuple[LengthBin, ...]:
    """At most 16 ranges of one width, which is a power of two times ten."""
    if not lengths:
        return ()
    width = 10
    while (max(lengths) - 1) // width >= _NUM_BINS:
        width *= 2
    counts = Counter((length - 1) // width for length in lengths)
    return tuple(LengthBin((at + 1) * width, counts[at]) for at in range(min(counts), max(counts) + 1))


def _summary(lengths: Sequence[int]) -> TokenLengths:
    if not lengths:
        return TokenLengths(0, 0, 0, 0, 0.0)
    cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else [lengths[0]] * 19
    return TokenLengths(min(lengths), round(cuts[9]), round(cuts[18]), max(lengths), fmean(lengths))
