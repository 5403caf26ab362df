"""A decoder layer of Llama's shape in two autograd functions around torch's attention, with transformers' own results.

    q, k, v = rotate(W norm(x))                       _Inputs
    h       = x + W_o attention(q, k, v)              _Outputs
    y       = h + W_down (silu(W_gate norm(h)) * W_up norm(h))

Every W is an adapted linear of `lora.py`. Kept for the backward pass are x, q, k, v, what attention gives, h, and both
inner products; what is one multiplication away from those is computed again.

Shapes: B examples, T tokens each, M = B T, H width of the model, N heads of width D, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation

from knowledge_engine.modeling import AdaptedLinear, PeftModel, adapted_linears, body_and_head
from knowledge_engine.training.data import Packing
from knowledge_engine.training.lora import Masks, backward, forward
from knowledge_engine.training.packing import lay
from knowledge_engine.training.plan import FUSED_LAYERS

_Kept = tuple[torch.Tensor, torch.Tensor | None]
"""Of an adapted linear, for its backward pass: A dropout(x) (M, r), and what dropout dropped (M, inputs)."""


def use_fused_layers(model: PeftModel, masks: Masks) -> int:
    """Lets decoder layers of `model` compute through this module while they train; how many they are.

    A layer has to be one of `FUSED_LAYERS` in float32 on a CPU, with all of its linear modules adapted by LoRA (not
    DoRA). Whatever else is asked of it goes its usual way: evaluation, and attention with a mask of its own.
    """
    adapted = {id(layer.module): layer for layer in adapted_linears(model)}
    num_fused = 0
    body, _ = body_and_head(model)
    module: Any
    for module in model.modules():
        if type(module).__name__ in FUSED_LAYERS.values() and (block := _Block.of(module, adapted)) is not None:
            block.is_last = module is body.layers[-1]
            module.forward = _forward(block, module, module.forward, masks)
            num_fused += 1
    return num_fused


def _forward(
    block: _Block, module: nn.Module, plain: Callable[..., torch.Tensor], masks: Masks
) -> Callable[..., torch.Tensor]:
    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packing: Packing | None = None,
        **options: Any,
    ) -> torch.Tensor:
        is_unmasked = packing is not None or attention_mask is None
        if module.training and torch.is_grad_enabled() and is_unmasked:
            asked = (hidden_states, *position_embeddings, masks, packing)
            if module.gradient_checkpointing:  # transformers' own is in the method that this one replaces
                return checkpoint(block.compute, *asked, use_reentrant=False, context_fn=masks.again)  # type: ignore[no-any-return]
            return block.compute(*asked)
        return plain(hidden_states, attention_mask, position_embeddings=position_embeddings, packing=packing, **options)

    return forward


class _Block:
    """A layer's parts."""

    def __init__(self, module: Any, inputs: Sequence[AdaptedLinear], outputs: Sequence[AdaptedLinear]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.first_norm, self.second_norm = _Norm(module.input_layernorm), _Norm(module.post_attention_layernorm)
        self.head_width: int = module.self_attn.head_dim
        self.scaling: float = module.self_attn.scaling
        self.is_last = False
        self.is_grouped: bool = module.self_attn.num_key_value_groups > 1

    @classmethod
    def of(cls, module: Any, adapted: dict[int, AdaptedLinear]) -> _Block | None:
        """None where the layer's arithmetic is not that of this module."""
        attention, mlp = module.self_attn, module.mlp
        inputs = [adapted.get(id(part)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        outputs = [adapted.get(id(part)) for part in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        linears = [layer for layer in (*inputs, *outputs) if layer is not None and not layer.is_dora]
        norm = module.input_layernorm.weight
        is_ours = (
            len(linears) == len(inputs) + len(outputs)
            and (norm.device.type, norm.dtype) == ("cpu", torch.float32)
            and isinstance(mlp.act_fn, SiLUActivation)
            and not attention.attention_dropout
        )
        return cls(module, linears[: len(inputs)], linears[len(inputs) :]) if is_ours else None

    def compute(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, masks: Masks, packing: Packing | None
    ) -> torch.Tensor:
        """(B, T, H) -> (B, T, H), or of a packed batch (1, U, H); cos and sin are (1, T, D), the same in both of their
        halves."""
        half = self.head_width // 2
        turn = (cos[..., None, :half], sin[..., None, :half])
        q, k, v = _Inputs.apply(x, self, turn, masks, *_weights(self.inputs))  # type: ignore[no-untyped-call]
        if packing is not None:
            q, k, v = (lay(part[0], packing) for part in (q, k, v))
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=self.scaling,
            enable_gqa=self.is_grouped,
        )
        choice = _Choice.of(packing, is_last=self.is_last)
        attended = attended.transpose(1, 2).flatten(2)
        return _Outputs.apply(attended, x, self, masks, choice, *_weights(self.outputs))  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Choice:
    """Which places of attention's (B * T), and which tokens of a layer's input, its second half computes: None for all
    of them."""

    places: torch.Tensor | None
    tokens: torch.Tensor | None

    @classmethod
    def of(cls, packing: Packing | None, *, is_last: bool) -> _Choice:
        if packing is None:
            return cls(None, None)
        return cls(packing.firsts[packing.wanted], packing.wanted) if is_last else cls(packing.firsts, None)


def _chosen(x: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """(M, ...) -> (len(indices), ...)"""
    return x if indices is None else x[indices]


def _spread(x: torch.Tensor, indices: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """The inverse of `_chosen`: (len(indices), ...) -> (M, ...), 0 where nothing was chosen."""
    return x if indices is None else x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, indices, x)


def _weights(layers: Sequence[AdaptedLinear]) -> list[torch.Tensor]:
    return [weight for layer in layers for weight in (layer.a, layer.b)]


class _Inputs(torch.autograd.Function):
    """(B, T, H) -> queries (B, T, N, D), keys and values, which may have fewer heads."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: _Block,
        turn: tuple[torch.Tensor, torch.Tensor],
        masks: Masks,
        *ab: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        flat = x.flatten(0, 1)
        inverse = block.first_norm.inverse(flat)
        normed = block.first_norm.apply(flat, inverse)
        products, kept = zip(*(_times(layer, normed, masks, len(flat)) for layer in block.inputs), strict=True)
        q, k, v = (product.view(*x.shape[:2], -1, block.head_width) for product in products)
        ctx.save_for_backward(flat, inverse, *turn, *_flattened(kept))
        ctx.block = block
        return _rotated(q, *turn), _rotated(k, *turn), v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, inverse, cos, sin, *kept = ctx.saved_tensors
        block: _Block = ctx.block
        grad_q, grad_k, grad_v = gradients
        shape = grad_q.shape
        grad_products = (_rotated(grad_q, cos, -sin), _rotated(grad_k, cos, -sin), grad_v.contiguous())
        normed = block.first_norm.apply(flat, inverse)
        grad_normed = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        grad_ab: list[torch.Tensor] = []
        for layer, grad, pair in zip(block.inputs, grad_products, _pairs(kept), strict=True):
            grad_ab += backward(layer, grad.view(len(flat), -1), normed, *pair, grad_normed)
        grad_x = None
        if grad_normed is not None:
            grad_x = block.first_norm.backward(grad_normed, flat, inverse).view(*shape[:2], -1)
        return grad_x, None, None, None, *grad_ab


class _Outputs(torch.autograd.Function):
    """What attention gives (B, T, N D) and the layer's input (B, T, H) -> the layer's output (B, T, H), 0 for tokens
    that are not of the choice. Both inputs may lie differently, as the choice says."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: torch.Tensor,
        x: torch.Tensor,
        block: _Block,
        masks: Masks,
        choice: _Choice,
        *ab: torch.Tensor,
    ) -> torch.Tensor:
        o, gate, up, down = block.outputs
        num_rows = x.shape[0] * x.shape[1]

        def times(layer: AdaptedLinear, values: torch.Tensor) -> tuple[torch.Tensor, _Kept]:
            return _times(layer, values, masks, num_rows, choice.tokens)

        h, kept_o = times(o, _chosen(attended.flatten(0, 1), choice.places))
        h += _chosen(x.flatten(0, 1), choice.tokens)
        inverse = block.second_norm.inverse(h)
        normed = block.second_norm.apply(h, inverse)
        gated, kept_gate = times(gate, normed)
        raised, kept_up = times(up, normed)
        inner = functional.silu(gated).mul_(raised)
        y, kept_down = times(down, inner)
        y += h
        kept = (kept_o, kept_gate, kept_up, kept_down)
        ctx.save_for_backward(attended, h, inverse, gated, raised, *_flattened(kept))
        ctx.block, ctx.choice = block, choice
        return _spread(y, choice.tokens, num_rows).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found, h, inverse, gated, raised, *kept = ctx.saved_tensors
        block: _Block = ctx.block
        choice: _Choice = ctx.choice
        o, gate, up, down = block.outputs
        kept_o, kept_gate, kept_up, kept_down = _pairs(kept)
        shape = gradients[0].shape
        grad_y = _chosen(gradients[0].flatten(0, 1), choice.tokens)
        attended = _chosen(found.flatten(0, 1), choice.places)

        activated = functional.silu(gated)
        grad_inner = torch.zeros_like(gated)
        of_down = backward(down, grad_y, activated * raised, *kept_down, grad_inner)
        grad_raised = activated.mul_(grad_inner)
        grad_gated = torch.ops.aten.silu_backward(grad_inner.mul_(raised), gated)

        normed = block.second_norm.apply(h, inverse)
        grad_normed = torch.zeros_like(h)
        of_gate = backward(gate, grad_gated, normed, *kept_gate, grad_normed)
        of_up = backward(up, grad_raised, normed, *kept_up, grad_normed)
        grad_h = block.second_norm.backward(grad_normed, h, inverse).add_(grad_y)

        grad_attended = torch.zeros_like(attended)
        of_o = backward(o, grad_h, attended, *kept_o, grad_attended)
        grad_attended = _spread(grad_attended, choice.places, found.shape[0] * found.shape[1])
        grad_x = _spread(grad_h, choice.tokens, shape[0] * shape[1])
        return (
            grad_attended.view(found.shape), grad_x.view(shape), None, None, None, *of_o, *of_gate, *of_up, *of_down
        )  # fmt: skip


class _Norm:
    """Root mean square norm, w x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, module: Any) -> None:
        self._weight: torch.Tensor = module.weight
        self._eps: float = module.variance_epsilon

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """1 / sqrt(mean(x^2) + eps) (M, 1) of (M, H)."""
        length: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return length.square_().div_(x.shape[1]).add_(self._eps).rsqrt_()

    def apply(self, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return (x * inverse).mul_(self._weight)

    def backward(self, grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """The gradient of x, with `grad` (M, H) used up."""
        grad *= self._weight
        along = torch.linalg.vecdot(grad, x).unsqueeze_(1).mul_(inverse.pow(3)).div_(x.shape[1])
        grad *= inverse
        grad.addcmul_(x, along, value=-1)
        return grad


def _times(
    layer: AdaptedLinear, x: torch.Tensor, masks: Masks, num_rows: int, chosen: torch.Tensor | None = None
) -> tuple[torch.Tensor, _Kept]:
    """x are all rows, or the chosen ones of so many: dropout tosses for all, so that a choice changes no other toss."""
    dropped = None
    if layer.dropout:
        dropped = _chosen(masks.draw(x.new_empty(num_rows, x.shape[1]), layer.dropout), chosen)
    y, low = forward(layer, x, dropped)
    return y, (low, dropped)


def _flattened(kept: Sequence[_Kept]) -> list[torch.Tensor | None]:
    return [tensor for pair in kept for tensor in pair]


def _pairs(tensors: Sequence[Any]) -> list[_Kept]:
    """The inverse of `_flattened`."""
    return [*zip(tensors[::2], tensors[1::2], strict=True)]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of x (B, T, N, D); cos and sin are (1, T, 1, D / 2)."""
    left, right = x.chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    torch.mul(left, cos, out=y[..., :half]).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=y[..., half:]).addcmul_(left, sin)
    return y
