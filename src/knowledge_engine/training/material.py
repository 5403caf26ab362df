"""What a training learns from and what it is measured on: rows fitted to its length, then split. No torch; the service
counts with the same functions before anything loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from knowledge_engine.core import DatasetKind, ModelVersion, TrainingMethod, TrainingSpec, Truncation
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import InvalidSpecError, Reason, Violation
from knowledge_engine.rows import Conversation, Preference, Row
from knowledge_engine.splits import Split, split_rows
from knowledge_engine.text import ChatText, Example, fit_conversations, with_one_prompt

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Pair:
    """A preference for training. Both begin with the same prompt, and only the answers are trained."""

    chosen: Example
    rejected: Example


Item = Example | Pair
"""What one row of a dataset becomes."""


def num_tokens(item: Item) -> int:
    """Tokens of an item; those that a batch shares, or nothing is asked of, are computed once or not at all."""
    return sum(len(example.input_ids) for example in sides_of(item))


def width(item: Item) -> int:
    """Tokens that an item takes up in a batch of its own, padding included."""
    examples = sides_of(item)
    return len(examples) * max(len(example.input_ids) for example in examples)


def num_trained(item: Item) -> int:
    """Trained tokens of an item; the very first token has nothing before it to be predicted from."""
    return sum(sum(example.trained[1:]) for example in sides_of(item))


def num_units(item: Item) -> int:
    """How much an item counts in the mean loss: its trained tokens, or one for a preference."""
    return 1 if isinstance(item, Pair) else num_trained(item)


def sides_of(item: Item) -> tuple[Example, ...]:
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


# --- datasets -----------------------------------------------------------------------------------------------------


KINDS = {TrainingMethod.SFT: DatasetKind.CONVERSATIONS, TrainingMethod.DPO: DatasetKind.PREFERENCES}
"""What each method learns from."""


def read_rows(datasets: Datasets, spec: TrainingSpec) -> tuple[Sequence[Row], Sequence[Conversation]]:
    """The rows to learn from, and those of the spec's evaluation, if it has one.

    Raises:
        NotFoundError: DATASET_NOT_FOUND. InvalidSpecError: DATASET_KIND_WRONG. IntegrityError: DATASET_CORRUPT.
    """
    evaluation: list[Conversation] = []
    if spec.eval_dataset is not None:
        evaluation = datasets.conversations(spec.eval_dataset, DatasetKind.EVALUATION)
    if spec.method is TrainingMethod.DPO:
        return datasets.preferences(spec.dataset), evaluation
    return datasets.conversations(spec.dataset), evaluation


def demand_continuable(spec: TrainingSpec, version: ModelVersion, base_digest: str, chat_template_digest: str) -> None:
    """Raises InvalidSpecError, unless the version's adapter can be trained on as the spec has it."""
    shape = ("rank", "alpha", "target_modules", "use_rslora", "use_dora")
    ours, theirs = spec.lora, version.spec.lora
    if version.base_digest != base_digest:
        problem = f"is an adapter of another base ({version.base_digest[:19]}, not {base_digest[:19]})"
    elif version.chat_template_digest != chat_template_digest:
        problem = "was trained with another chat template"
    elif changed := [field for field in shape if getattr(ours, field) != getattr(theirs, field)]:
        problem = f"has another adapter: leave lora out, or set {', '.join(changed)} as it has it"
    else:
        return
    raise InvalidSpecError(
        f"start_from {spec.start_from} {problem}",
        violations=[Violation("spec.start_from", problem)],
        version=str(spec.start_from),
    )


@dataclass(frozen=True)
class Fit(Generic[_Item]):
    """One item for every row, None for one that is left out; `changes` name the rows that do not stay as they are."""

    items: list[_Item | None]
    changes: list[str]


def fit(
    rows: Sequence[Row],
    text: ChatText,
    max_length: int,
    truncation: Truncation,
    keep: Callable[[Item], _Item],
) -> Fit[_Item]:
    """Raises as `text.fit_conversations`. `keep` says what is wanted of an item, all of which take much memory."""
    fitted = Fit[_Item]([], [])
    for number, (item, change) in enumerate(_items(rows, text, max_length, truncation), 1):
        fitted.items.append(None if item is None else keep(item))
        if change:
            fitted.changes.append(f"row {number} {change}")
    return fitted


def _items(
    rows: Sequence[Row], text: ChatText, max_length: int, truncation: Truncation
) -> Iterator[tuple[Item | None, str]]:
    if not any(isinstance(row, Preference) for row in rows):
        for fitted in fit_conversations(rows, text, max_length, truncation):
            yield fitted.example, fitted.change
        return
    preferences = [row for row in rows if isinstance(row, Preference)]
    answers = [side for row in preferences for side in row.sides]
    both = fit_conversations(answers, text, max_length, truncation, conversations_per_row=2)
    num_pairs = 0
    for row, *sides in zip(preferences, both, both, strict=True):  # two by two
        chosen, rejected = with_one_prompt(sides, row.sides, len(row.prompt), text)
        if chosen.example is None or rejected.example is None:
            yield None, chosen.change
        else:
            num_pairs += 1
            yield Pair(chosen.example, rejected.example), chosen.change
    if not num_pairs:
        raise InvalidSpecError(
            f"nothing would be learned: of no preference are both sides within max_length ({max_length} tokens)",
            reason=Reason.NOTHING_TO_TRAIN,
            max_length=max_length,
        )


def divide(
    spec: TrainingSpec,
    rows: Sequence[Row],
    items: Sequence[_Item | None],
    evaluation: Sequence[_Item | None],
) -> tuple[list[_Item], list[_Item]]:
    """What is trained and what is held out: the spec's split of what is kept, or an evaluation of its own.

    Raises:
        InvalidSpecError: SPLIT_IMPOSSIBLE.
    """
    kept = [(row, item) for row, item in zip(rows, items, strict=True) if item is not None]
    split: Split = split_rows([row for row, _ in kept], spec.eval_split, spec.seed, spec.split_by)
    held_out = [item for item in evaluation if item is not None] or [kept[at][1] for at in split.held_out]
    return [kept[at][1] for at in split.train], held_out
