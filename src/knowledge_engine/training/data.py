"""From examples to the tensors of a batch; which ones go together is in `plan.py`. Knows no model and no optimizer.

Shapes: B examples, T tokens of the longest of them, N trained tokens of the whole batch, P preferences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from knowledge_engine.training.material import Item, Pair, sides_of


@dataclass(frozen=True)
class Batch:
    """`input_ids` (B, T) are padded on the right, where causal attention never looks: no mask is needed.

    `positions` (N,) index the flattened (B * T) hidden states whose next token is trained, `targets` (N,) are those
    tokens, `rows` (N,) the example that each belongs to. `num_tokens` leaves padding out. Of a preference both answers
    are examples, the chosen one first; there are `num_pairs` of them, or 0.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    num_examples: int
    num_tokens: int
    num_pairs: int = 0

    @property
    def num_units(self) -> int:
        """What the loss is a mean over: trained tokens, or preferences."""
        return self.num_pairs or len(self.targets)


def collate(items: Sequence[Item], device: str) -> Batch:
    """One batch on `device`. Padding is token 0, and no target ever stands there."""
    examples = [example for item in items for example in sides_of(item)]
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        learned = [index for index in range(1, length) if example.trained[index]]
        positions += [row * longest + index - 1 for index in learned]
        targets += [example.input_ids[index] for index in learned]
        rows += [row] * len(learned)
    num_tokens = sum(len(example.input_ids) for example in examples)
    return Batch(
        input_ids=input_ids.to(device),
        positions=torch.tensor(positions, device=device),
        targets=torch.tensor(targets, device=device),
        rows=torch.tensor(rows, device=device),
        num_examples=len(items),
        num_tokens=num_tokens,
        num_pairs=sum(isinstance(item, Pair) for item in items),
    )
