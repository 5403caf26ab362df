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
from knowledge_engine.training.dropout import Masks, arrays
from knowledge_engine.training.lora import Backward, forward
from knowledge_engine.training.packing import gather
from knowledge_engine.training.plan import FUSED_HEAD_STEP, FUSED_LAYERS


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
        turn = tuple(part[0, :, : self.head_width // 2].contiguous() for part in (cos, sin))
        q, k, v = _Inputs.apply(x, self, turn, masks, *_weights(self.inputs))  # type: ignore[no-untyped-call]
        attended = _Attention.apply(q, k, v, packing, self.scaling)  # type: ignore[no-untyped-call]
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
    """(1, U, H) -> queries (U, N, D), keys and values, which may have fewer heads."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: _Block,
        turn: tuple[torch.Tensor, torch.Tensor],
        masks: Masks,
        *ab: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        flat = x[0]
        outputs, low, dropped = _times(block.inputs, block.first_norm.apply(flat), masks, len(flat))
        q, k, v = (output.view(len(flat), -1, block.head_width) for output in outputs)
        kernels.rotate(*arrays(q, *turn))
        kernels.rotate(*arrays(k, *turn))
        ctx.save_for_backward(flat, *turn, low, *dropped)
        ctx.block = block
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, cos, sin, low, *dropped = ctx.saved_tensors
        block: _Block = ctx.block
        for gradient in gradients[:2]:  # nobody else has them: `_Attention` made them
            kernels.rotate(*arrays(gradient, cos, -sin))
        back = Backward(block.inputs, [gradient.flatten(1) for gradient in gradients], dropped)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = block.first_norm.backward(back.to_input(), flat).unsqueeze(0)
        return grad_x, None, None, None, *back.to_weights(block.first_norm.apply(flat), low)


class _Attention(torch.autograd.Function):
    """Queries (U, N, D), keys and values (U, K, D) -> what every token finds in its example, (U, N, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float
    ) -> torch.Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        kernels.attend(*arrays(q, k, v), *_where(packing), np.float32(scaling), *arrays(out, lse))
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
            *arrays(q, k, v, out, lse, gradients[0].contiguous()), *_where(packing), ctx.scaling,
            *arrays(grad_q, *laid),
        )  # fmt: skip
        return grad_q, *(gather(part, packing) for part in laid), None, None


def _where(packing: Packing) -> list[Any]:
    return arrays(packing.index, packing.starts, packing.lengths)


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
        num_rows = len(attended)
        o, inner, down = block.outputs[:1], block.outputs[1:3], block.outputs[3:]
        (h,), low_o, dropped_o = _times(o, _chosen(attended, wanted), masks, num_rows, wanted)
        h += _chosen(x[0], wanted)
        normed = block.second_norm.apply(h)
        (gated, raised), low_inner, dropped_inner = _times(inner, normed, masks, num_rows, wanted)
        product = torch.empty_like(gated)
        kernels.gate(*_flat(gated, raised, product))
        (y,), low_down, dropped_down = _times(down, product, masks, num_rows, wanted)
        y += h
        dropped = (*dropped_o, *dropped_inner, *dropped_down)
        ctx.save_for_backward(attended, h, gated, raised, low_o, low_inner, low_down, *dropped)
        ctx.block, ctx.wanted = block, wanted
        return _spread(y, wanted, num_rows).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attended, h, gated, raised, low_o, low_inner, low_down, *dropped = ctx.saved_tensors
        block: _Block = ctx.block
        num_rows = len(attended)
        o, inner, down = block.outputs[:1], block.outputs[1:3], block.outputs[3:]
        grad_y = _chosen(gradients[0][0], ctx.wanted)

        back_down = Backward(down, [grad_y], dropped[3:])
        grad_product = back_down.to_input()
        grad_raised, product = torch.empty_like(raised), torch.empty_like(raised)
        kernels.gate_backward(*_flat(gated, raised, grad_product, grad_raised, product))
        of_down = back_down.to_weights(product, low_down)
        del product

        back_inner = Backward(inner, [grad_product, grad_raised], dropped[1:3])
        grad_h = block.second_norm.backward(back_inner.to_input(), h).add_(grad_y)
        of_inner = back_inner.to_weights(block.second_norm.apply(h), low_inner)
        del back_inner, back_down, grad_product, grad_raised

        back_o = Backward(o, [grad_h], dropped[:1])
        grad_attended = _spread(back_o.to_input(), ctx.wanted, num_rows)
        of_o = back_o.to_weights(_chosen(attended, ctx.wanted), low_o)
        grad_x = _spread(grad_h, ctx.wanted, num_rows).unsqueeze(0)
        return grad_attended, grad_x, None, None, None, *of_o, *of_inner, *of_down


def _flat(*tensors: torch.Tensor) -> list[Any]:
    return arrays(*(tensor.view(-1) for tensor in tensors))


class _Norm:
    """Root mean square norm, w x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, module: Any) -> None:
        self._weight: torch.Tensor = module.weight
        self._eps: float = module.variance_epsilon

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (M, H)"""
        y = torch.empty_like(x)
        kernels.norm(*arrays(x, self._weight), np.float32(self._eps), y.numpy())
        return y

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of x, in the place of `grad` (M, H)."""
        kernels.norm_backward(*arrays(x, self._weight), np.float32(self._eps), grad.numpy())
        return grad


def _times(
    layers: Sequence[AdaptedLinear], x: torch.Tensor, masks: Masks, num_rows: int, chosen: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor | None]]:
    """`lora.forward` of all rows x, or of the chosen ones of so many; also what was dropped."""
    dropped = [masks.few(num_rows, x.shape[1], layer.dropout, chosen) for layer in layers]
    return *forward(layers, x, dropped), dropped
