"""The arithmetic of an adapted linear layer in one autograd function, with the results of PEFT's own.

y = W x + (alpha / r) B A dropout(x), W frozen (Hu et al. 2021, arXiv 2106.09685, section 4.1). PEFT spells it as six
operations, each of which keeps or copies an activation; here a layer keeps its input, r numbers per token and a mask of
one byte per number. W is dequantised when it is needed, forward and backward, and never kept.

Shapes: M tokens of the batch, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from knowledge_engine import devices
from knowledge_engine.modeling import AdaptedLinear, PeftModel, adapted_linears, linear


def forward(layer: AdaptedLinear, x: torch.Tensor, dropped: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, I) -> (M, O), and A dropout(x) (M, r) for `backward`. `dropped` (M, I) is true where dropout zeroes an input
    of A."""
    low = linear(_without(x, dropped), layer.a.to(x.dtype))
    y = wide_linear(x, layer.weight(x.dtype), layer.bias(x.dtype))
    y.addmm_(low, layer.b.t().to(x.dtype), alpha=_scale(layer))
    return y, low


def backward(
    layer: AdaptedLinear,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    dropped: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    *,
    is_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A (r, I) and B (O, r); that of x is added to `grad_x` (M, I) where it is asked for, or the first
    that is written there."""
    a, b = layer.a.to(x.dtype), layer.b.to(x.dtype)
    grad_low = linear(grad_y, b.t()).mul_(_scale(layer))
    grad_a = grad_low.t() @ _without(x, dropped)
    grad_b = linear(low.t(), grad_y.t()).t() * _scale(layer)
    if grad_x is not None:
        grad_x.addmm_(grad_y, layer.weight(x.dtype), beta=0 if is_first else 1)
        if dropped is None:
            grad_x.addmm_(grad_low, a)
        else:
            grad_x += (grad_low @ a).masked_fill_(dropped, 0)
    return grad_a.to(layer.a.dtype), grad_b.to(layer.b.dtype)


def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`modeling.linear` of many inputs and outputs. On Zen 3 alone MKL is faster at these: 186 against 165 GFLOP/s."""
    if devices.is_zen3() and x.device.type == devices.CPU and x.dtype is torch.float32:
        return functional.linear(x, weight, bias)
    return linear(x, weight, bias)


def _scale(layer: AdaptedLinear) -> float:
    """alpha / r, and what makes up for the inputs that dropout zeroes."""
    return layer.scaling / (1 - layer.dropout)


class _LoraLinear(torch.autograd.Function):
    """`forward` and `backward` of one layer, which keeps its input."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: AdaptedLinear, dropped: torch.Tensor | None
    ) -> torch.Tensor:
        y, low = forward(layer, x, dropped)
        ctx.save_for_backward(x, low, dropped)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, dropped = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = backward(ctx.layer, gradients[0], x, low, dropped, grad_x, is_first=True)
        return grad_x, grad_a, grad_b, None, None


def use_fused_lora(model: PeftModel, seed: int) -> Masks:
    """Lets every adapted layer of `model` compute through `_LoraLinear` while it trains. Evaluation stays PEFT's,
    and so does all of DoRA.

    `seed` decides what dropout drops, through the masks that are returned.
    """
    masks = Masks(seed)
    for layer in adapted_linears(model):
        if not layer.is_dora:
            layer.module.forward = _forward(layer, layer.module.forward, masks)
    return masks


def _forward(layer: AdaptedLinear, plain: Callable[..., torch.Tensor], masks: Masks) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if not layer.module.training or not torch.is_grad_enabled():
            return plain(x, *args, **options)
        flat = x.reshape(-1, x.shape[-1])
        dropped = masks.draw(flat, layer.dropout) if layer.dropout else None
        y = _LoraLinear.apply(flat, layer.a, layer.b, layer, dropped)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    return forward


class Masks:
    """Dropout's coin tosses. torch tosses them one by one on a CPU, which takes a tenth of a training step."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.Generator(np.random.SFC64(seed))

    def draw(self, like: torch.Tensor, probability: float) -> torch.Tensor:
        """True with `probability`, in steps of 1 / 65,536, for every number of `like`."""
        if like.device.type != "cpu":
            return torch.rand_like(like, dtype=torch.float32) < probability
        words = np.frombuffer(self._random.bytes(2 * like.numel()), dtype=np.uint16)
        return torch.from_numpy(words < round(probability * 65_536)).view(like.shape)

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


def _without(x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    return x if dropped is None else x.masked_fill(dropped, 0)
