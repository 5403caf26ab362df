"""Guesses at the next tokens of an answer: what followed the last time that its end was written.

Shopping answers repeat names and prices from their prompt. A guess costs one more row of a pass that reads all weights
in any case, and is taken only where the model chooses it itself (prompt lookup; Saxena 2023). Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTH = 3
"""Tokens that must be the same for what followed them to be a guess; shorter beginnings guess wrong too often."""


class Drafts:
    """Of one sequence."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        """Where the newest text after each few tokens begins."""
        self._num_seen = _LENGTH - 1

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which only grow from call to call."""
        end = len(tokens)
        if most <= 0 or end < _LENGTH:
            return []
        for at in range(max(self._num_seen + 1, _LENGTH), end):
            self._after[tuple(tokens[at - _LENGTH : at])] = at
        self._num_seen = end - 1
        found = self._after.get(tuple(tokens[end - _LENGTH :]))
        return [] if found is None else list(tokens[found : found + most])
