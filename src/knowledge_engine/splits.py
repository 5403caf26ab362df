"""Which rows are held out: whole groups, so that nothing of the held-out side was seen in training.

Groups are conversations that say nearly the same (Jaccard similarity of their three-word shingles, estimated with
MinHash, Broder 1997), and on request also those that share a product. The same rows and seed are split the
same way on every machine.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rensa import RMinHash, RMinHashLSH

from knowledge_engine.core import Message, SplitBy
from knowledge_engine.errors import InvalidSpecError, Reason, Violation
from knowledge_engine.rows import Conversation, Preference, Row

NEAR = 0.8
"""Conversations at least so similar stay on one side."""
_PERMUTATIONS, _BANDS = 128, 32  # finds 0.8 with a probability of 1 - (1 - 0.8^4)^32, that is all but one in 10^7
_SHINGLE_WORDS = 3
_MOST_INDEXED = 64
"""Of one group; a set in which all rows are alike would compare each with all others."""
_WORD = re.compile(r"\w+")


Rows = Sequence[Conversation] | Sequence[Preference] | Sequence[Row]


@dataclass(frozen=True)
class Split:
    """Positions of the rows on each side, in their old order."""

    train: list[int]
    held_out: list[int]


def split_rows(rows: Rows, eval_split: float, seed: int, split_by: SplitBy = SplitBy.CONVERSATION) -> Split:
    """About `eval_split` of the rows held out, at least one where it is above 0, and one left to train on.

    Raises:
        InvalidSpecError: SPLIT_IMPOSSIBLE, whole groups cannot be divided so.
    """
    everything = list(range(len(rows)))
    if eval_split == 0:
        return Split(everything, [])
    groups = group_rows(rows, split_by)
    chance = random.Random(seed)  # noqa: S311 - no secret
    held_out: set[int] = set()
    if split_by is SplitBy.PRODUCT:
        # Each on its own: holding out only conversations that show no product would be no such split.
        showing, groups = _parted(groups, lambda group: any(rows[index].products for index in group))
        held_out |= _hold_out(showing, eval_split, chance)
        if not held_out:
            _refuse(rows, showing, split_by)
    held_out |= _hold_out(groups, eval_split, chance)
    if not held_out:
        _refuse(rows, groups, split_by)
    return Split([index for index in everything if index not in held_out], sorted(held_out))


def _parted(groups: Sequence[list[int]], holds: Callable[[list[int]], bool]) -> tuple[list[list[int]], list[list[int]]]:
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    for group in groups:
        sides[not holds(group)].append(group)
    return sides


def _hold_out(groups: Sequence[list[int]], share: float, chance: random.Random) -> set[int]:
    """About `share` of all members, at least one and at most half, in whole groups; empty where that cannot be."""
    size = sum(map(len, groups))
    wanted = max(1, round(size * share))
    held_out: set[int] = set()
    shuffled: list[list[int]] = chance.sample(groups, len(groups))
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out and groups:
        smallest: list[int] = min(shuffled, key=len)
        held_out.update(smallest)  # every group is larger than what is wanted
    return held_out if 2 * len(held_out) <= size else set()


def group_rows(rows: Rows, split_by: SplitBy) -> list[list[int]]:
    """Positions of the conversations that must stay together, group by group."""
    groups = _Groups(len(rows))
    for first, second in near_duplicates(rows):
        groups.join(first, second)
    if split_by is SplitBy.PRODUCT:
        seen: dict[str, int] = {}
        for index, row in enumerate(rows):
            for product in row.products:
                groups.join(seen.setdefault(product.id, index), index)
    return groups.all()


def near_duplicates(rows: Rows) -> list[tuple[int, int]]:
    """Pairs of positions, the earlier first, of conversations that say nearly the same; enough of them to connect every
    group. System messages and tools do not count: all conversations of a shop may share them."""
    shingles = [_shingles(row) for row in rows]
    sketches = RMinHash.from_token_sets(shingles, num_perm=_PERMUTATIONS, seed=0)
    index = RMinHashLSH(threshold=NEAR, num_perm=_PERMUTATIONS, num_bands=_BANDS)
    pairs: list[tuple[int, int]] = []
    groups = _Groups(len(sketches))
    same: dict[tuple[str, ...], int] = {}
    num_indexed: Counter[int] = Counter()
    for later, sketch in enumerate(sketches):
        earlier = same.setdefault(tuple(shingles[later]), later)
        if earlier != later:
            groups.join(earlier, later)
            pairs.append((earlier, later))
            continue
        for earlier in sorted(index.query(sketch)):
            if groups.first(earlier) != groups.first(later) and sketches[earlier].jaccard(sketch) >= NEAR:
                groups.join(earlier, later)
                pairs.append((earlier, later))
        group = groups.first(later)
        if num_indexed[group] < _MOST_INDEXED:
            num_indexed[group] += 1
            index.insert(later, sketch)
    return pairs


def _shingles(row: Conversation | Preference) -> list[str]:
    words = [
        word
        for message in row.messages
        if message.role != "system"
        for word in (f"<{message.role}>", *_WORD.findall(_said(message).casefold()))
    ]
    return [" ".join(words[at : at + _SHINGLE_WORDS]) for at in range(max(1, len(words) - _SHINGLE_WORDS + 1))]


def _said(message: Message) -> str:
    return " ".join([message.content, *(f"{call.name} {call.arguments}" for call in message.tool_calls)])


class _Groups:
    """Disjoint sets of 0 .. n - 1; the smallest member stands for its set."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def first(self, member: int) -> int:
        while self._parents[member] != member:
            self._parents[member] = member = self._parents[self._parents[member]]
        return member

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._parents[high] = low

    def all(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for member in range(len(self._parents)):
            groups.setdefault(self.first(member), []).append(member)
        return list(groups.values())


def _refuse(rows: Rows, groups: Sequence[Sequence[int]], split_by: SplitBy) -> None:
    largest = max(map(len, groups), default=0)
    if len(rows) < 2:
        why, field = f"there are only {len(rows)} conversations", "spec.eval_split"
    elif split_by is SplitBy.PRODUCT and not groups:
        why, field = "no conversation shows a product", "spec.split_by"
    elif split_by is SplitBy.PRODUCT:
        why, field = (
            (
                f"{largest} of {len(rows)} conversations hang together through the products that they share; "
                "split by conversation, or name an eval_dataset"
            ),
            "spec.split_by",
        )
    else:
        why, field = f"{largest} of {len(rows)} conversations say nearly the same", "spec.eval_split"
    raise InvalidSpecError(
        f"no part can be held out that training would not see: {why}",
        reason=Reason.SPLIT_IMPOSSIBLE,
        violations=[Violation(field, why)],
        num_rows=len(rows),
        largest_group=largest,
    )
