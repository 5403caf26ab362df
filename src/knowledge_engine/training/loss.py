"""The loss of a batch, with the head applied to trained positions only. Knows no optimizer and no job.

The head is a fifth of a small model and most positions are not trained, so this is where the time is. It equals the
plain loss over all logits. Shapes as in `data.py`, and H the width of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from knowledge_engine.core import TrainingMethod, TrainingSpec
from knowledge_engine.errors import InvalidSpecError, Reason
from knowledge_engine.modeling import PeftModel, PreTrainedModel, body_and_head, linear, without_adapter
from knowledge_engine.training.data import Batch
from knowledge_engine.training.packing import hidden_states
from knowledge_engine.training.plan import CHUNK_POSITIONS

_CHECKED_POSITIONS = 64

Model = PreTrainedModel | PeftModel


class _HeadLoss(torch.autograd.Function):
    """Losses (N,) of hidden states (N, H) through a frozen head. Their gradients are computed chunk by chunk on the way
    forward, so that no more than one chunk of logits is ever kept: each state has a loss of its own, lse(z) - z_t, and
    softmax(z) - e_t is its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for states, tokens in _chunks(hidden, targets):
            mine, raised = _through_head(states, tokens, head)
            losses.append(mine)
            raised /= raised.sum(1, keepdim=True)
            raised.scatter_add_(1, tokens.unsqueeze(1), raised.new_full((len(tokens), 1), -1))
            gradients.append(raised.to(hidden.dtype) @ head.weight)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype).unsqueeze(1), None, None


def _through_head(states: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (n,) of hidden states (n, H), and what the logits are raised to, exp(z - max z) (n, V)."""
    values = linear(states, head.weight, head.bias).float()
    values -= values.amax(1, keepdim=True)
    mine = values.gather(1, targets.unsqueeze(1)).squeeze(1)
    raised = values.exp_()
    return raised.sum(1).log_() - mine, raised


Loss = Callable[[Model, Batch], torch.Tensor]
"""The loss of a batch, summed over its units, in nats."""


def loss_of(spec: TrainingSpec) -> Loss:
    """What the spec's method minimises."""
    if spec.method is TrainingMethod.SFT:
        return batch_loss

    def of_preferences(model: Model, batch: Batch) -> torch.Tensor:
        assert isinstance(model, PeftModel)  # the reference is the base without its adapter
        return preference_loss(preference_margins(model, batch), spec)

    return of_preferences


def batch_loss(model: Model, batch: Batch) -> torch.Tensor:
    """Summed negative log-likelihood of the trained tokens, in nats; divide by N for the mean."""
    return token_losses(model, batch).sum()


def preference_loss(margins: torch.Tensor, spec: TrainingSpec) -> torch.Tensor:
    """The sigmoid loss of DPO, summed over the preferences (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    assert spec.beta is not None
    return -functional.logsigmoid(spec.beta * margins).sum()


def preference_margins(model: PeftModel, batch: Batch) -> torch.Tensor:
    """By how much more the adapter favours each chosen answer over the rejected one than the bare base does (P,), in
    nats. Times beta these are the margins of the implicit rewards."""
    with torch.no_grad(), without_adapter(model):
        reference = _favours(model, batch)
    return _favours(model, batch) - reference


def _favours(model: PeftModel, batch: Batch) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of each preference (P,)."""
    losses = token_losses(model, batch)
    answers = losses.new_zeros(2 * batch.num_pairs).index_add(0, batch.rows, losses)
    return answers[1::2] - answers[::2]


def token_losses(model: Model, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every trained token (N,), in nats."""
    _, head = body_and_head(model)
    hidden = hidden_states(model, batch)[batch.positions]
    if hidden.requires_grad:
        return _HeadLoss.apply(hidden, batch.targets, head)  # type: ignore[no-any-return, no-untyped-call]
    losses = [_through_head(states, tokens, head)[0] for states, tokens in _chunks(hidden, batch.targets)]
    return torch.cat(losses)


@torch.no_grad()
def mean_loss(
    model: Model, batches: Iterable[Batch], check: Callable[[], None], loss: Loss = batch_loss
) -> tuple[float, int]:
    """Mean loss per unit over all batches, in evaluation mode, and how many units that is: trained tokens, or
    preferences.

    `check` runs before every batch and may raise.
    """
    was_training = model.training
    model.eval()
    total, num_units = 0.0, 0
    try:
        for batch in batches:
            check()
            total += loss(model, batch).item()
            num_units += batch.num_units
    finally:
        model.train(was_training)
    return total / num_units, num_units


@torch.no_grad()
def check_head(model: Model, batch: Batch) -> None:
    """Makes sure that the model's head is one frozen linear module, and that nothing is done to logits after it, which
    `batch_loss` would miss.

    Raises:
        InvalidSpecError: BASE_MODEL_UNSUPPORTED.
    """
    body, head = body_and_head(model)
    if type(head) is not nn.Linear or head.weight.requires_grad:
        raise InvalidSpecError(
            f"a {model.config.model_type} model has no plain linear head, which training does not support",
            reason=Reason.BASE_MODEL_UNSUPPORTED,
            architecture=model.config.model_type,
        )
    was_training = model.training
    model.eval()
    few = batch.input_ids[:1, :_CHECKED_POSITIONS]  # all logits of a long row would take more than a step
    logits = model(input_ids=few, use_cache=False).logits[0].float()
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
