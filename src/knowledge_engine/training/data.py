"""From examples to the tensors of a batch; which ones go together is in `plan.py`. Knows no model and no optimizer.

Shapes: B examples, T tokens of the longest of them, N trained tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from knowledge_engine.text import Example


@dataclass(frozen=True)
class Batch:
    """`input_ids` and `attention_mask` are (B, T), padded on the right; the mask is None where nothing is padded.

    `positions` (N,) index the flattened (B * T) hidden states whose next token is trained, `targets` (N,) are those
    tokens. `num_tokens` leaves padding out.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    positions: torch.Tensor
    targets: torch.Tensor
    num_examples: int
    num_tokens: int


def collate(examples: Sequence[Example], device: str) -> Batch:
    """One batch on `device`. Padding is token 0: the mask hides it, and no target ever stands there."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        learned = [index for index in range(1, length) if example.trained[index]]
        positions += [row * longest + index - 1 for index in learned]
        targets += [example.input_ids[index] for index in learned]
    num_tokens = sum(len(example.input_ids) for example in examples)
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=None if num_tokens == input_ids.numel() else mask.to(device),
        positions=torch.tensor(positions, device=device),
        targets=torch.tensor(targets, device=device),
        num_examples=len(examples),
        num_tokens=num_tokens,
    )


def count_trained(example: Example) -> int:
    """Trained tokens of an example; the very first token has nothing before it to be predicted from."""
    return sum(example.trained[1:])
