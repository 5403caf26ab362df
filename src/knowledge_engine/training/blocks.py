"""A decoder layer of Llama's shape in three autograd functions, with transformers' own results.

    q, k, v = rotate(W norm(x))                       _Inputs
    a       = attention(q, k, v)                      _Attention
    h       = x + W_o a                               _Outputs
    y       = h + W_down (silu(W_gate norm(h)) * W_up norm(h))

Every W is an adapted linear of `lora.py`; what stands between products is in `kernels.py`. Kept for the backward pass
are x, q, k, v, a, h, and both inner products; what is one multiplication away from those is computed again.

Shapes: U tokens of a packed batch, M = U, H width of the model, N heads of width D, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation

from knowledge_engine.modeling import AdaptedLinear, PeftModel, adapted_linears, body_and_head
from knowledge_engine.training import kernels
from knowledge_engine.training.data import Packing
from knowledge_engine.training.lora import Masks, backward, forward
from knowledge_engine.training.packing import gather
from knowledge_engine.training.plan import FUSED_HEAD_STEP, FUSED_LAYERS

_Kept = tuple[torch.Tensor, torch.Tensor | None]
"""Of an adapted linear, for its backward pass: A dropout(x) (M, r), and what dropout dropped (M, inputs)."""


def use_fused_layers(model: PeftModel, masks: Masks) -> int:
    """Lets decoder layers of `model` compute through this module while they train; how many they are.

    A layer has to be one of `FUSED_LAYERS` in float32 on a CPU, with heads as wide as a multiple of `FUSED_HEAD_STEP`
    and all of its linear modules adapted by LoRA (not DoRA). Whatever else is asked of it goes its usual way:
    evaluation, and batches that are padded.
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
    if num_fused:
        kernels.warm_up(torch.get_num_threads())
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
        if module.training and torch.is_grad_enabled() and packing is not None:
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
            and attention.head_dim % FUSED_HEAD_STEP == 0
        )
        return cls(module, linears[: len(inputs)], linears[len(inputs) :]) if is_ours else None

    def compute(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, masks: Masks, packing: Packing
    ) -> torch.Tensor:
        """(1, U, H) -> (1, U, H); cos and sin are (1, U, D), the same in both of their halves."""
        half = self.head_width // 2
        turn = (cos[..., None, :half], sin[..., None, :half])
        q, k, v = _Inputs.apply(x, self, turn, masks, *_weights(self.inputs))  # type: ignore[no-untyped-call]
        attended = _Attention.apply(q[0], k[0], v[0], packing, self.scaling)  # type: ignore[no-untyped-call]
        wanted = packing.wanted if self.is_last else None
        return _Outputs.apply(attended.flatten(1), x, self, masks, wanted, *_weights(self.outputs))  # type: ignore[no-any-return, no-untyped-call]


def _chosen(x: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """(M, ...) -> (len(indices), ...)"""
    return x if indices is None else x[indices]


def _spread(x: torch.Tensor, indices: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """The inverse of `_chosen`: (len(indices), ...) -> (M, ...), 0 where nothing was chosen."""
    return x if indices is None else x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, indices, x)


def _weights(layers: Sequence[AdaptedLinear]) -> list[torch.Tensor]:
    return [weight for layer in layers for weight in (layer.a, layer.b)]


class _Inputs(torch.autograd.Function):
    """(1, U, H) -> queries (1, U, N, D), keys and values, which may have fewer heads."""

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
        normed = block.first_norm.apply(flat)
        products, kept = zip(*(_times(layer, normed, masks, len(flat)) for layer in block.inputs), strict=True)
        q, k, v = (product.view(*x.shape[:2], -1, block.head_width) for product in products)
        ctx.save_for_backward(flat, *turn, *_flattened(kept))
        ctx.block = block
        return _rotated(q, *turn), _rotated(k, *turn), v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, cos, sin, *kept = ctx.saved_tensors
        block: _Block = ctx.block
        grad_q, grad_k, grad_v = gradients
        shape = grad_q.shape
        grad_products = (_rotated(grad_q, cos, -sin), _rotated(grad_k, cos, -sin), grad_v.contiguous())
        normed = block.first_norm.apply(flat)
        grad_normed = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        grad_ab: list[torch.Tensor] = []
        for layer, grad, pair in zip(block.inputs, grad_products, _pairs(kept), strict=True):
            is_first = layer is block.inputs[0]
            grad_ab += backward(layer, grad.view(len(flat), -1), normed, *pair, grad_normed, is_first=is_first)
        grad_x = None
        if grad_normed is not None:
            grad_x = block.first_norm.backward(grad_normed, flat).view(*shape[:2], -1)
        return grad_x, None, None, None, *grad_ab


class _Attention(torch.autograd.Function):
    """Queries (U, N, D), keys and values (U, K, D) -> what every token finds in its example, (U, N, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float
    ) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        kernels.attend(*_arrays(q, k, v), *_where(packing), np.float32(scaling), *_arrays(out, lse))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.packing, ctx.scaling = packing, np.float32(scaling)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        packing: Packing = ctx.packing
        grad_q = torch.empty_like(q)
        laid = [k.new_empty(*packing.index.shape, *k.shape[1:]) for _ in range(2)]
        kernels.attend_backward(
            *_arrays(q, k, v, out, lse, gradients[0].contiguous()), *_where(packing), ctx.scaling,
            *_arrays(grad_q, *laid),
        )  # fmt: skip
        return grad_q, *(gather(part, packing) for part in laid), None, None


def _arrays(*tensors: torch.Tensor) -> list[Any]:
    return [tensor.numpy() for tensor in tensors]


def _where(packing: Packing) -> list[Any]:
    return _arrays(packing.index, packing.starts, packing.lengths)


class _Outputs(torch.autograd.Function):
    """What attention gives (U, N D) and the layer's input (1, U, H) -> the layer's output (1, U, H), 0 for tokens of
    which it is not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: torch.Tensor,
        x: torch.Tensor,
        block: _Block,
        masks: Masks,
        wanted: torch.Tensor | None,
        *ab: torch.Tensor,
    ) -> torch.Tensor:
        o, gate, up, down = block.outputs
        num_rows = len(attended)

        def times(layer: AdaptedLinear, values: torch.Tensor) -> tuple[torch.Tensor, _Kept]:
            return _times(layer, values, masks, num_rows, wanted)

        h, kept_o = times(o, _chosen(attended, wanted))
        h += _chosen(x[0], wanted)
        normed = block.second_norm.apply(h)
        gated, kept_gate = times(gate, normed)
        raised, kept_up = times(up, normed)
        y, kept_down = times(down, _gated(gated, raised))
        y += h
        kept = (kept_o, kept_gate, kept_up, kept_down)
        ctx.save_for_backward(attended, h, gated, raised, *_flattened(kept))
        ctx.block, ctx.wanted = block, wanted
        return _spread(y, wanted, num_rows).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attended, h, gated, raised, *kept = ctx.saved_tensors
        block: _Block = ctx.block
        num_rows = len(attended)
        o, gate, up, down = block.outputs
        kept_o, kept_gate, kept_up, kept_down = _pairs(kept)
        grad_y = _chosen(gradients[0][0], ctx.wanted)

        grad_inner = torch.empty_like(gated)
        of_down = backward(down, grad_y, _gated(gated, raised), *kept_down, grad_inner, is_first=True)
        grad_raised = torch.empty_like(raised)
        kernels.gate_backward(*(part.reshape(-1).numpy() for part in (gated, raised, grad_inner, grad_raised)))
        grad_gated = grad_inner

        normed = block.second_norm.apply(h)
        grad_normed = torch.empty_like(h)
        of_gate = backward(gate, grad_gated, normed, *kept_gate, grad_normed, is_first=True)
        of_up = backward(up, grad_raised, normed, *kept_up, grad_normed)
        grad_h = block.second_norm.backward(grad_normed, h).add_(grad_y)

        grad_attended = h.new_empty(len(h), attended.shape[1])
        of_o = backward(o, grad_h, _chosen(attended, ctx.wanted), *kept_o, grad_attended, is_first=True)
        grad_x = _spread(grad_h, ctx.wanted, num_rows).unsqueeze(0)
        return (
            _spread(grad_attended, ctx.wanted, num_rows), grad_x, None, None, None, *of_o, *of_gate, *of_up, *of_down
        )  # fmt: skip


def _gated(gated: torch.Tensor, raised: torch.Tensor) -> torch.Tensor:
    """silu(gated) raised, (M, I) each."""
    inner = torch.empty_like(gated)
    kernels.gate(*(part.view(-1).numpy() for part in (gated, raised, inner)))
    return inner


class _Norm:
    """Root mean square norm, w x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, module: Any) -> None:
        self._weight: torch.Tensor = module.weight
        self._eps: float = module.variance_epsilon

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (M, H)"""
        y = torch.empty_like(x)
        kernels.norm(*_arrays(x, self._weight), np.float32(self._eps), y.numpy())
        return y

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of x, in the place of `grad` (M, H)."""
        kernels.norm_backward(*_arrays(x, self._weight), np.float32(self._eps), grad.numpy())
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
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of x (1, U, N, D); cos and sin are (1, U, 1, D / 2)."""
    left, right = x.chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    torch.mul(left, cos, out=y[..., :half]).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=y[..., half:]).addcmul_(left, sin)
    return y
