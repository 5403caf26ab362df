"""The arithmetic of an adapted linear layer in one autograd function, with the results of PEFT's own.

y = W x + (alpha / r) B A dropout(x), W frozen (Hu et al. 2021, arXiv 2106.09685, section 4.1). PEFT spells it as six
operations, each of which keeps or copies an activation; here a layer keeps its input, r numbers per token and a mask of
one byte per number. W is dequantised when it is needed, forward and backward, and never kept.

Shapes: M tokens of the batch, I inputs, O outputs, r rank, R ranks of several layers in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from knowledge_engine import devices
from knowledge_engine.modeling import AdaptedLinear, PeftModel, adapted_linears, linear
from knowledge_engine.training import dropout
from knowledge_engine.training.dropout import Masks


def forward(
    layers: Sequence[AdaptedLinear], x: torch.Tensor, dropped: Sequence[torch.Tensor | None]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What `layers` make of an input that all of them read: (M, I) -> (M, O) each; and A dropout(x) of all of them side
    by side (M, R) for the backward pass. `dropped` is of each layer what `dropout.py` says, if anything."""
    if _drops_nothing(dropped):
        low = linear(x, _all_a(layers, x.dtype))
    else:
        pairs = zip(layers, dropped, strict=True)
        low = _side_by_side([dropout.product(x, layer.a.to(x.dtype), mine) for layer, mine in pairs], 1)
    outputs: list[torch.Tensor] = []
    for layer, mine in zip(layers, torch.split(low, _ranks(layers), 1), strict=True):
        y = _wide_linear(x, layer.weight(x.dtype), layer.bias(x.dtype))
        outputs.append(y.addmm_(mine, layer.b.t().to(x.dtype), alpha=_scale(layer)))
    return outputs, low


class Backward:
    """The backward pass of `forward`, of the gradients (M, O) of its outputs: to the input and to the weights."""

    def __init__(
        self,
        layers: Sequence[AdaptedLinear],
        grad_outputs: Sequence[torch.Tensor],
        dropped: Sequence[torch.Tensor | None],
    ) -> None:
        self._layers = layers
        self._grad_outputs = grad_outputs
        self._dropped = dropped
        pairs = zip(layers, grad_outputs, strict=True)
        self._of_low = [linear(grad_y, layer.b.to(grad_y.dtype).t()).mul_(_scale(layer)) for layer, grad_y in pairs]

    def to_input(self) -> torch.Tensor:
        """(M, I)"""
        dtype = self._of_low[0].dtype
        grad_x: torch.Tensor | None = None
        for layer, grad_y in zip(self._layers, self._grad_outputs, strict=True):
            weight = layer.weight(dtype)
            grad_x = grad_y @ weight if grad_x is None else grad_x.addmm_(grad_y, weight)
        assert grad_x is not None
        if _drops_nothing(self._dropped):
            return grad_x.addmm_(_side_by_side(self._of_low, 1), _all_a(self._layers, dtype))
        for layer, grad, mine in zip(self._layers, self._of_low, self._dropped, strict=True):
            dropout.add_to_input(grad_x, grad, layer.a.to(dtype), mine)
        return grad_x

    def to_weights(self, x: torch.Tensor, low: torch.Tensor) -> list[torch.Tensor]:
        """Of every layer those of A (r, I) and B (O, r); x and low are what `forward` took and gave."""
        ranks = _ranks(self._layers)
        if _drops_nothing(self._dropped):
            of_a = [*torch.split(_side_by_side(self._of_low, 1).t() @ x, ranks)]
        else:
            pairs = zip(self._of_low, self._dropped, strict=True)
            of_a = [dropout.gradient_of_a(grad, x, mine) for grad, mine in pairs]
        gradients: list[torch.Tensor] = []
        for layer, a, mine, grad_y in zip(
            self._layers, of_a, torch.split(low, ranks, 1), self._grad_outputs, strict=True
        ):
            b = linear(mine.t(), grad_y.t()).t() * _scale(layer)
            gradients += [a.to(layer.a.dtype), b.to(layer.b.dtype)]
        return gradients


def _wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`modeling.linear` of many inputs and outputs. On Zen 3 alone MKL is faster at these: 186 against 165 GFLOP/s."""
    if devices.is_zen3() and x.device.type == devices.CPU and x.dtype is torch.float32:
        return functional.linear(x, weight, bias)
    return linear(x, weight, bias)


def _drops_nothing(dropped: Sequence[torch.Tensor | None]) -> bool:
    return all(mask is None for mask in dropped)


def _all_a(layers: Sequence[AdaptedLinear], dtype: torch.dtype) -> torch.Tensor:
    """(R, I)"""
    return _side_by_side([layer.a for layer in layers], 0).to(dtype)


def _side_by_side(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim)


def _ranks(layers: Sequence[AdaptedLinear]) -> list[int]:
    return [layer.a.shape[0] for layer in layers]


def _scale(layer: AdaptedLinear) -> float:
    """alpha / r, and what makes up for the inputs that dropout zeroes."""
    return layer.scaling / (1 - layer.dropout)


class _LoraLinear(torch.autograd.Function):
    """`forward` and `Backward` of one layer, which keeps its input."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: AdaptedLinear, dropped: torch.Tensor | None
    ) -> torch.Tensor:
        (y,), low = forward([layer], x, [dropped])
        ctx.save_for_backward(x, low, dropped)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, dropped = ctx.saved_tensors
        back = Backward([ctx.layer], gradients, [dropped])
        grad_x = back.to_input() if ctx.needs_input_grad[0] else None
        return grad_x, *back.to_weights(x, low), None, None


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
