"""Dropout before an adapter: what it drops, and A dropout(x) with its gradients, not yet scaled by 1 / (1 - p).

What is dropped is a mask, bool (M, I); or where it is little and kernels take them, its places alone, in order, as
numbers of the flattened (M, I): everything is multiplied, and what was dropped is taken out again. Passes over masks
cost a fifth of a training step.

Shapes: M tokens, I inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeGuard, cast

import numpy as np
import torch

from knowledge_engine.modeling import linear
from knowledge_engine.training import kernels

_PLACES_UNTIL = 1 / 8
"""With a larger chance, places of eight bytes take more room than a mask, and more time in the end."""


def product(x: torch.Tensor, a: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """A dropout(x) (M, r), of x (M, I) and A (r, I)."""
    if _is_mask(dropped):
        return linear(x.masked_fill(dropped, 0), a)
    low = linear(x, a)
    if dropped is not None:
        kernels.take_from_product(*arrays(x, a.t().contiguous(), dropped, low))
    return low


def add_to_input(grad_x: torch.Tensor, grad_low: torch.Tensor, a: torch.Tensor, dropped: torch.Tensor | None) -> None:
    """Adds to the gradient of x (M, I) what comes of that of the product (M, r)."""
    if _is_mask(dropped):
        grad_x += (grad_low @ a).masked_fill_(dropped, 0)
        return
    grad_x.addmm_(grad_low, a)
    if dropped is not None:
        kernels.take_from_input(*arrays(grad_low, a.t().contiguous(), dropped, grad_x))


def gradient_of_a(grad_low: torch.Tensor, x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """(r, I)"""
    if _is_mask(dropped):
        return grad_low.t() @ x.masked_fill(dropped, 0)
    of_a = grad_low.t() @ x
    if dropped is not None:
        parts = x.new_zeros(kernels.DROPOUT_PARTS, x.shape[1], len(of_a))
        kernels.take_from_weights(*arrays(x, grad_low, dropped, parts))
        of_a += parts.sum(0).t()
    return of_a


def chosen_places(places: torch.Tensor, num_rows: int, num_inputs: int, chosen: torch.Tensor) -> torch.Tensor:
    """Of the places (K,) in (num_rows, num_inputs) those in chosen rows alone, which are numbered anew."""
    numbers = places.new_full((num_rows,), -1)
    numbers[chosen] = torch.arange(len(chosen), dtype=places.dtype)
    of_row = numbers[places // num_inputs]
    return (of_row * num_inputs + places % num_inputs)[of_row >= 0]


def _is_mask(dropped: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return dropped is not None and dropped.dtype is torch.bool


def arrays(*tensors: torch.Tensor) -> list[Any]:
    """As kernels take them."""
    return [tensor.numpy() for tensor in tensors]


class Masks:
    """Dropout's coin tosses; of those on a CPU, only the few are drawn that drop something."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.Generator(np.random.SFC64(seed))

    def draw(self, like: torch.Tensor, probability: float) -> torch.Tensor:
        """A mask: true with `probability`, for every number of `like`."""
        if like.device.type != "cpu":
            return torch.rand_like(like, dtype=torch.float32) < probability
        mask = torch.zeros(like.numel(), dtype=torch.bool)
        mask[self.places(like.numel(), probability)] = True
        return mask.view(like.shape)

    def places(self, count: int, probability: float) -> torch.Tensor:
        """Where the same tosses among so many fall that way, in order (K,). From one to the next it is geometrically
        far: one and the whole part of an exponentially distributed number."""
        rate = -math.log1p(-probability)
        expected = count * probability
        found: list[Any] = []
        last = -1
        while last < count:
            steps = self._random.standard_exponential(round(expected + 5 * math.sqrt(expected)) + 8) / rate
            found.append(last + np.cumsum(1 + np.minimum(steps, count).astype(np.int64)))
            last = int(found[-1][-1])
            expected = (count - last) * probability
        places = np.concatenate(found)
        return torch.from_numpy(places[: np.searchsorted(places, count)])

    def few(
        self, num_rows: int, num_inputs: int, probability: float, chosen: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is dropped of (num_rows, num_inputs) on a CPU, in the form that takes less; where rows are chosen, of
        those alone. Tosses are of all, so that a choice changes no other toss."""
        if not probability:
            return None
        if probability > _PLACES_UNTIL:
            mask = self.draw(torch.empty(num_rows, num_inputs), probability)
            return mask if chosen is None else mask[chosen]
        places = self.places(num_rows * num_inputs, probability)
        return places if chosen is None else chosen_places(places, num_rows, num_inputs, chosen)

    def again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a pass and one that repeats it later: the tosses of the second fall as those of the first. This is a
        `context_fn` of `torch.utils.checkpoint`."""
        first = self.state()

        @contextmanager
        def repeated() -> Iterator[None]:
            now = self.state()
            self.restore(first)
            try:
                yield
            finally:
                self.restore(now)

        return nullcontext(), repeated()

    def state(self) -> tuple[int, ...]:
        """Where the series of tosses stands, as six whole numbers."""
        values = cast("dict[str, Any]", self._random.bit_generator.state)
        return (*map(int, values["state"]["state"]), int(values["has_uint32"]), int(values["uinteger"]))

    def restore(self, state: Sequence[int]) -> None:
        """The inverse of `state`."""
        *words, has_uint32, uinteger = state
        self._random.bit_generator.state = {
            "bit_generator": "SFC64",
            "state": {"state": np.array(words, dtype=np.uint64)},
            "has_uint32": has_uint32,
            "uinteger": uinteger,
        }
