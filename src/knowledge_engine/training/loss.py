"""The loss of a batch, with the head applied to trained positions only. Knows no optimizer and no job.

The head is a fifth of a small model and most positions are not trained, so this is where the time is. It equals the
plain loss over all logits. Shapes as in `data.py`, and H the width of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional

from knowledge_engine.errors import InvalidSpecError, Reason
from knowledge_engine.modeling import PeftModel, PreTrainedModel, body_and_head
from knowledge_engine.training.data import Batch
from knowledge_engine.training.plan import CHUNK_POSITIONS

_CHECKED_POSITIONS = 64

Model = PreTrainedModel | PeftModel


class _HeadLoss(torch.autograd.Function):
    """Summed loss of hidden states (N, H) through a frozen head. The gradient is computed chunk by chunk on the way
    forward, so that no more than one chunk of logits is ever kept."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Callable[..., Any]) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients: list[torch.Tensor] = []
        for states, tokens in _chunks(hidden, targets):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                loss = functional.cross_entropy(head(leaf).float(), tokens, reduction="sum")
                gradients += torch.autograd.grad(loss, leaf)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None


def batch_loss(model: Model, batch: Batch) -> torch.Tensor:
    """Summed negative log-likelihood of the trained tokens, in nats; divide by N for the mean."""
    body, head = body_and_head(model)
    states = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
    hidden = states.flatten(0, 1)[batch.positions]
    if hidden.requires_grad:
        return _HeadLoss.apply(hidden, batch.targets, head)  # type: ignore[no-any-return, no-untyped-call]
    losses = [
        functional.cross_entropy(head(states).float(), tokens, reduction="sum")
        for states, tokens in _chunks(hidden, batch.targets)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def mean_loss(model: Model, batches: Iterable[Batch], check: Callable[[], None]) -> tuple[float, int]:
    """Mean negative log-likelihood per trained token over all batches, in evaluation mode, and how many tokens that is.

    `check` runs before every batch and may raise.
    """
    was_training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    try:
        for batch in batches:
            check()
            total += batch_loss(model, batch).item()
            num_tokens += len(batch.targets)
    finally:
        model.train(was_training)
    return total / num_tokens, num_tokens


@torch.no_grad()
def check_head(model: Model, batch: Batch) -> None:
    """Makes sure that the model does nothing to its logits after the head, which `batch_loss` would miss.

    Raises:
        InvalidSpecError: BASE_MODEL_UNSUPPORTED.
    """
    was_training = model.training
    model.eval()
    few = batch.input_ids[:1, :_CHECKED_POSITIONS]  # all logits of a long row would take more than a step
    logits = model(input_ids=few, use_cache=False).logits[0].float()
    body, head = body_and_head(model)
    ours = head(body(input_ids=few, use_cache=False).last_hidden_state[0]).float()
    model.train(was_training)
    largest = float(logits.abs().max())
    if math.isfinite(largest) and not torch.allclose(ours, logits, rtol=1e-2, atol=1e-2 * largest):
        raise InvalidSpecError(
            f"a {model.config.model_type} model changes its logits after the head, which training does not support",
            reason=Reason.BASE_MODEL_UNSUPPORTED,
            architecture=model.config.model_type,
        )


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(tensor, CHUNK_POSITIONS) for tensor in tensors), strict=True)
