"""From examples to the tensors of a batch; which ones go together is in `plan.py`. Knows no model and no optimizer.

Shapes: B examples, T tokens of the longest of them as far as it is computed, U tokens that are computed, N trained
tokens of the whole batch, P preferences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from knowledge_engine.training.material import Item, Pair, sides_of


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed batch stand in its examples. One that stands behind the same tokens in several
    examples, as in a prompt that they share, is there once.

    `places` (1, U) are positions in an example. `index` (B, T) says which token stands where, and any behind an
    example's end. `firsts` (U,) are the flattened places (B * T) where a token stands first, `again` (R,) those where
    one stands once more, and `tokens_again` (R,) which. `lengths` (B,) are those of the examples, and `starts` (B,) how
    many tokens of each begin an earlier one as well. What the last layer gives is wanted of `wanted` (W,) tokens.
    """

    places: torch.Tensor
    index: torch.Tensor
    firsts: torch.Tensor
    again: torch.Tensor
    tokens_again: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    wanted: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """`input_ids` (B, T) are padded on the right, where causal attention never looks: no mask is needed. With a
    `packing` they are (1, U), without padding.

    `positions` (N,) index the flattened hidden states whose next token is trained, `targets` (N,) are those tokens,
    `rows` (N,) the example that each belongs to. An example ends before its last trained token: what comes after is
    asked nothing; `length` is that of the longest one before this. Of a preference both answers are examples,
    the chosen one first; there are `num_pairs` of them, or 0.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    length: int
    num_pairs: int = 0
    packing: Packing | None = None

    @property
    def num_units(self) -> int:
        """What the loss is a mean over: trained tokens, or preferences."""
        return self.num_pairs or len(self.targets)


def collate(items: Sequence[Item], device: str, *, is_packed: bool = False) -> Batch:
    """One batch on `device`. Padding is token 0, and no target ever stands there."""
    examples = [example for item in items for example in sides_of(item)]
    learned = [[index for index in range(1, len(one.trained)) if one.trained[index]] for one in examples]
    ids = [one.input_ids[: indices[-1] if indices else 1] for one, indices in zip(examples, learned, strict=True)]
    longest = max(map(len, ids))
    input_ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    positions = [row * longest + index - 1 for row, indices in enumerate(learned) for index in indices]
    targets = [one.input_ids[index] for one, indices in zip(examples, learned, strict=True) for index in indices]
    rows = [row for row, indices in enumerate(learned) for _ in indices]
    at = torch.tensor(positions)
    packing = None
    if is_packed:
        packing = _pack(ids, at)
        at = packing.index.flatten()[at]
        input_ids = input_ids.flatten()[packing.firsts].unsqueeze(0)
        packing = Packing(**{name: tensor.to(device) for name, tensor in vars(packing).items()})
    return Batch(
        input_ids=input_ids.to(device),
        positions=at.to(device),
        targets=torch.tensor(targets, device=device),
        rows=torch.tensor(rows, device=device),
        length=max(len(example.input_ids) for example in examples),
        num_pairs=sum(isinstance(item, Pair) for item in items),
        packing=packing,
    )


def _pack(rows: Sequence[Sequence[int]], positions: torch.Tensor) -> Packing:
    longest = max(map(len, rows))
    numbers: dict[tuple[int, int], int] = {}
    """Of a token behind another one, which says all that stands before it."""
    index = torch.zeros(len(rows), longest, dtype=torch.long)
    places: list[int] = []
    firsts: list[int] = []
    again: list[int] = []
    tokens_again: list[int] = []
    starts: list[int] = []
    for row, ids in enumerate(rows):
        before, num_again = -1, len(again)
        for place, token in enumerate(ids):
            number = numbers.setdefault((before, token), len(numbers))
            if number == len(places):
                places.append(place)
                firsts.append(row * longest + place)
            else:
                again.append(row * longest + place)
                tokens_again.append(number)
            index[row, place] = before = number
        starts.append(len(again) - num_again)
    return Packing(
        places=torch.tensor([places]),
        index=index,
        firsts=torch.tensor(firsts),
        again=torch.tensor(again, dtype=torch.long),
        tokens_again=torch.tensor(tokens_again, dtype=torch.long),
        starts=torch.tensor(starts),
        lengths=torch.tensor([*map(len, rows)]),
        wanted=torch.unique(index.flatten()[positions]),
    )
