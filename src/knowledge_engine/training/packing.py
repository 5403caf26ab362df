"""Attention over packed batches: every example for itself, whatever else is computed in the same pass.

A packed batch goes through the layers as one row of tokens without padding, in which beginnings that examples share
stand once. Only attention sees examples: queries, keys and values are laid out as (B, T), padded on the right, and go
through transformers' own attention, causal and without a mask. What a shared token gives is taken from the first
example that it stands in, and equals that of the others; its gradients are summed over all of them.

Shapes as in `data.py`, N heads of width D.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from knowledge_engine.modeling import PeftModel, body_and_head
from knowledge_engine.text import Example
from knowledge_engine.training.data import Batch, Packing, collate
from knowledge_engine.training.material import Item, sides_of

_ATTENTION = "knowledge_engine_packed"
_CHECKED_TOKENS = 48
_NO_BOUND = 2**31
_log = logging.getLogger(__name__)


class _Laid(torch.autograd.Function):
    """`lay`, whose backward pass adds few rows instead of all."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return x[packing.index]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather(gradients[0], ctx.packing), None


def lay(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(U, ...) -> (B, T, ...)"""
    return _Laid.apply(x, packing)  # type: ignore[no-any-return, no-untyped-call]


def gather(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(B, T, ...) -> (U, ...): the sums over all places where a token stands."""
    flat = x.flatten(0, 1)
    return flat[packing.firsts].index_add_(0, packing.tokens_again, flat[packing.again])


def use_packing(model: PeftModel, item: Item) -> int:
    """Lets `model` take packed batches too; the longest example (tokens) that may be in one, 0 where it takes none.

    Found out with the beginning of `item`: a packed batch has to give what a padded one gives. Longer than a sliding
    window, attention needs a mask.
    """
    base: Any = model.get_base_model()
    if base.config._attn_implementation != "sdpa":
        return 0
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    base.set_attn_implementation(_ATTENTION)
    config = base.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = min((window for window in windows if isinstance(window, int) and window > 0), default=_NO_BOUND)
    if _gives_the_same(model, sides_of(item)[0].input_ids[: min(_CHECKED_TOKENS, longest)]):
        return longest
    base.set_attn_implementation("sdpa")
    return 0


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """What the body gives for every token of `input_ids`, flattened (M, H)."""
    body, _ = body_and_head(model)
    options: dict[str, Any] = {}
    if batch.packing is not None:
        # A mask of four dimensions is passed on as it is, so that none is made; attention does not look at it.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
        options = {"position_ids": batch.packing.places, "attention_mask": mask, "packing": batch.packing}
    states: torch.Tensor = body(input_ids=batch.input_ids, use_cache=False, **options).last_hidden_state
    return states.flatten(0, 1)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, N, T, D), key and value, which may have fewer heads -> (B, T, N, D)."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (lay(x[0].transpose(0, 1), packing).transpose(1, 2) for x in (query, key, value))
    found, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return found.flatten(0, 1)[packing.firsts].unsqueeze(0), None


@torch.no_grad()
def _gives_the_same(model: PeftModel, ids: Sequence[int]) -> bool:
    half = (len(ids) + 1) // 2
    rows = [[*ids], [*ids[:half], *ids[half:][::-1]], [*ids[:half]]]
    examples = [Example(row, [], [True] * len(row)) for row in rows]
    was_training = model.training
    model.eval()
    try:
        device = str(model.device)
        packed, padded = (collate(examples, device, is_packed=is_packed) for is_packed in (True, False))
        ours, plain = (hidden_states(model, batch)[batch.positions].float() for batch in (packed, padded))
        return torch.allclose(ours, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max()))
    except Exception as error:  # of an architecture that knows nothing of packing, in its own way
        _log.info("no packed batches: %s: %s", type(error).__name__, error)
        return False
    finally:
        model.train(was_training)
