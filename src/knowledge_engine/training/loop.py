"""The training loop, top to bottom: AdamW on the adapter's weights, one optimizer step after the other.

It is given a model with an adapter attached and examples already encoded; it knows nothing of where they come from or
where the adapter goes. The loss of a step is the mean over every trained token of all its batches, so that a batch of
4 and 4 batches of 1 are the same step. What changes from one step to the next is what `checkpoints.py` writes down.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from knowledge_engine import modeling
from knowledge_engine.core import JobContext, JobStopped, LrSchedulerType, Progress, StopReason, TrainingSpec
from knowledge_engine.errors import KnowledgeEngineError, Reason
from knowledge_engine.failpoints import failpoint
from knowledge_engine.modeling import PeftModel
from knowledge_engine.training.blocks import use_fused_layers
from knowledge_engine.training.checkpoints import (
    Best,
    Boundary,
    Checkpoints,
    Learned,
    Position,
    Randomness,
    Selection,
    StepResult,
    told,
)
from knowledge_engine.training.data import Batch, collate
from knowledge_engine.training.lora import use_fused_lora
from knowledge_engine.training.loss import check_head, loss_of, mean_loss
from knowledge_engine.training.material import Item, num_tokens, num_units, sides_of, width
from knowledge_engine.training.packing import use_packing
from knowledge_engine.training.plan import (
    EVALUATION_BATCH_SIZE,
    count_steps,
    pack_window,
    plan_windows,
    split_window,
)
from knowledge_engine.training.ranks import ALONE, Ranks

_MAX_ZEROS = 5

Log = Callable[[dict[str, float], int], None]
"""Takes metrics under the Hugging Face integration's names, and the step."""


@dataclass(frozen=True)
class TrainedSummary:
    """What a run amounted to. `loss` is the mean per trained token, or preference, over the last epoch's steps;
    evaluation is left out of `seconds`. The model holds the weights of step `published_step`."""

    loss: float
    num_steps: int
    num_tokens: int
    seconds: float
    published_step: int


def learning_rate_at(spec: TrainingSpec, step: int, total_steps: int) -> float:
    """The rate of step `step`, counted from 0: up in a straight line during warm-up, then along the chosen shape
    towards 0, which is reached only after the last step."""
    warmup = round(total_steps * spec.warmup_ratio)
    if step < warmup:
        return spec.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (total_steps - warmup)
    match spec.lr_scheduler_type:
        case LrSchedulerType.LINEAR:
            return spec.learning_rate * (1 - done)
        case LrSchedulerType.COSINE:
            return spec.learning_rate * (1 + math.cos(math.pi * done)) / 2
        case LrSchedulerType.CONSTANT:
            return spec.learning_rate


def train(
    model: PeftModel,
    items: Sequence[Item],
    held_out: Sequence[Item],
    spec: TrainingSpec,
    context: JobContext,
    log: Log,
    device: str,
    checkpoints: Checkpoints,
    micro_batch: int | None = None,
    ranks: Ranks = ALONE,
    *,
    gradient_checkpointing: bool = False,
) -> TrainedSummary:
    """Trains the adapter in place, from the newest checkpoint on where there is one.

    At most `micro_batch` items are computed at once, by default a whole batch; the steps are the same, however many
    `ranks` share them, and with `gradient_checkpointing`, which computes layers twice and keeps their inputs alone.

    Raises:
        KnowledgeEngineError: NON_FINITE, naming the step.
        InvalidSpecError: BASE_MODEL_UNSUPPORTED.
        IntegrityError: CHECKPOINT_UNUSABLE.
        CapacityError: DISK_FULL, for checkpoints.
        JobStopped: from `context.check`, within one batch; one that is to go on later has left a checkpoint.
    """
    total_steps, steps_per_epoch = count_steps(spec, len(items))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(
        list(weights.values()), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True
    )
    learned = Learned(weights, optimizer)
    masks = use_fused_lora(model, spec.seed)
    if num_layers := use_fused_layers(model, masks):
        context.log(f"{num_layers} decoder layers are computed in one piece each")
    if gradient_checkpointing:
        modeling.use_gradient_checkpointing(model, masks.again)
        context.log("gradient checkpointing: layers are computed twice, as memory asks for it")
    check_head(model, collate(items[:1], device))
    longest_packed = use_packing(model, items[0])
    loss_of_batch = loss_of(spec)
    teller = _Teller(model, held_out, spec, context, log, device, steps_per_epoch, ranks)
    best = Best(weights) if spec.load_best_model_at_end else None
    model.train()
    noise = _Noise(model, spec.neftune_noise_alpha)

    position = ranks.agree(checkpoints.resume(learned, masks, device, best), learned, best)
    lengths = [*map(width, items)]
    windows = plan_windows(lengths, spec)
    at_once = micro_batch or spec.per_device_train_batch_size

    def split(hand: Sequence[int]) -> list[list[int]]:
        if _is_packable([items[index] for index in hand], longest_packed):
            return pack_window([hand], items, spec, device, at_once)
        return split_window([hand], lengths, spec, device, at_once)

    order = hashlib.sha256()
    for _ in range(position.step):
        order.update(_names(next(windows)))
    checkpoints.check_order(position, order.hexdigest())
    boundary = Boundary(position, Randomness.capture(masks, device))
    meter = _Meter(total_steps, position, device)
    recent = deque(position.recent, maxlen=steps_per_epoch)
    num_zeros = position.num_zeros
    try:
        if position.untold:
            boundary = told(boundary, teller.tell(position.untold, meter), best)
        for step in range(position.step + 1, total_steps + 1):
            if _is_no_better(spec, boundary.position):
                context.log(f"stops early, after step {step - 1}: {_patience(spec)} without a new lowest loss")
                break
            window = next(windows)
            members = [items[index] for batch in window for index in batch]
            num_trained = sum(map(num_units, members))
            step_loss = 0.0
            ranks.toss(masks, spec.seed, step)
            for part, times in ranks.parts(window, lengths, split):
                context.check()
                failpoint("training.batch")
                examples = [items[index] for index in part]
                batch = collate(examples, device, is_packed=_is_packable(examples, longest_packed))
                noise.length = batch.length
                loss = times * loss_of_batch(model, batch)
                (loss / num_trained).backward()  # type: ignore[no-untyped-call]
                step_loss += loss.item()
            step_loss = ranks.add_up(weights.values(), step_loss)
            meter.count(members)
            grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), spec.max_grad_norm or math.inf).item()
            demand_finite("the loss", step_loss, step)
            demand_finite("the gradient norm", grad_norm, step)
            num_zeros = num_zeros + 1 if step_loss == 0 else 0
            _demand_movement(num_zeros, step, total_steps)
            learning_rate = learning_rate_at(spec, step - 1, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            failpoint("training.step")
            optimizer.step()
            optimizer.zero_grad()

            order.update(_names(window))
            recent.append((step_loss, num_trained))
            result = StepResult(step, step_loss, num_trained, learning_rate, grad_norm)
            position = meter.position(
                step, order.hexdigest(), tuple(recent), num_zeros, result, boundary.position.selection
            )
            boundary = Boundary(position, Randomness.capture(masks, device))
            boundary = told(boundary, teller.tell(result, meter), best)
            if step == total_steps or _is_no_better(spec, boundary.position):
                checkpoints.save(learned, boundary, best, may_fail=True)
            elif not num_zeros and checkpoints.is_due(step):
                checkpoints.save(learned, boundary, best)
    except JobStopped as stop:
        if stop.reason in {StopReason.PAUSED, StopReason.INTERRUPTED}:
            checkpoints.save(learned, boundary, best, may_fail=True)
        raise
    finally:
        noise.remove()
    position = boundary.position
    losses, units = zip(*recent, strict=True)
    published = position.step
    if best is not None and position.selection.step:
        best.restore()
        published = position.selection.step
        context.log(
            f"step {published} of {position.step} is published: its loss, {position.selection.loss:.4f}, is the lowest"
        )
    return TrainedSummary(sum(losses) / sum(units), position.step, position.num_tokens, position.seconds, published)


def _is_packable(items: Sequence[Item], longest: int) -> bool:
    return all(len(example.input_ids) <= longest for item in items for example in sides_of(item))


def _is_no_better(spec: TrainingSpec, position: Position) -> bool:
    """Whether it is time to stop early."""
    return 0 < spec.early_stopping_patience <= position.selection.num_worse


def _patience(spec: TrainingSpec) -> str:
    many = spec.early_stopping_patience > 1
    return f"{spec.early_stopping_patience} evaluations" if many else "an evaluation"


class _Noise:
    """Noise on the embeddings (B, T, H) of every training batch, uniform within alpha / sqrt(T H) (Jain et al. 2023,
    arXiv 2310.05914, algorithm 1). It comes from torch's own source of chance, which a checkpoint keeps."""

    length = 1
    """T of the batch that comes next, which a packed one does not show."""

    def __init__(self, model: PeftModel, alpha: float) -> None:
        self._model = model
        self._alpha = alpha
        base: Any = model.get_base_model()
        handle: RemovableHandle = base.get_input_embeddings().register_forward_hook(self._add)
        self.remove = handle.remove

    def _add(self, module: nn.Module, inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        if not self._alpha or not self._model.training:
            return embedded
        bound = self._alpha / math.sqrt(self.length * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)


class _Teller:
    """Evaluates and reports the steps that are due for it."""

    def __init__(
        self,
        model: PeftModel,
        held_out: Sequence[Item],
        spec: TrainingSpec,
        context: JobContext,
        log: Log,
        device: str,
        steps_per_epoch: int,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._held_out = held_out
        self._spec = spec
        self._context = context
        self._log = log
        self._device = device
        self._steps_per_epoch = steps_per_epoch
        self._ranks = ranks

    def tell(self, result: StepResult, meter: _Meter) -> float | None:
        """The loss in evaluation, where the step is due for one."""
        spec, step = self._spec, result.step
        eval_loss = None
        is_last = spec.load_best_model_at_end and step == meter.total_steps
        if spec.eval_steps and (step % spec.eval_steps == 0 or is_last):
            with meter.paused():
                eval_loss = self._ranks.mean_loss(
                    evaluation_batches(self._held_out, self._device),
                    lambda batches: mean_loss(self._model, batches, self._context.check, loss_of(spec)),
                )
            demand_finite("the held-out loss", eval_loss, step)
            self._log({"eval/loss": eval_loss, "train/global_step": step}, step)
        if step % spec.logging_steps == 0 or step == meter.total_steps or eval_loss is not None:
            progress = meter.progress(step, step / self._steps_per_epoch).model_copy(
                update={
                    "loss": result.loss / result.num_trained,
                    "eval_loss": eval_loss,
                    "learning_rate": result.learning_rate,
                    "grad_norm": result.grad_norm,
                }
            )
            self._context.report(progress)
            self._log(_metrics(progress), step)
        return eval_loss


def demand_finite(quantity: str, value: float, step: int) -> None:
    """Raises KnowledgeEngineError: NON_FINITE."""
    if not math.isfinite(value):
        raise KnowledgeEngineError(
            f"{quantity} became {value} at step {step}; a lower learning_rate usually helps",
            reason=Reason.NON_FINITE,
            quantity=quantity,
            value=value,
            step=step,
        )


def _demand_movement(num_zeros: int, step: int, total_steps: int) -> None:
    """Raises KnowledgeEngineError: NON_FINITE, for a loss of exactly 0 in several steps on end, or in all there are."""
    if num_zeros >= min(_MAX_ZEROS, total_steps):
        raise KnowledgeEngineError(
            f"the loss is stuck at 0: {num_zeros} steps in a row, up to step {step}; the numbers have broken down, a "
            "lower learning_rate usually helps",
            reason=Reason.NON_FINITE,
            quantity="the loss",
            value=0,
            step=step,
        )


def evaluation_batches(held_out: Sequence[Item], device: str) -> Iterator[Batch]:
    """All held-out items, in batches of similar lengths."""
    ordered = sorted(held_out, key=width)
    for first in range(0, len(ordered), EVALUATION_BATCH_SIZE):
        yield collate(ordered[first : first + EVALUATION_BATCH_SIZE], device)


def _names(window: list[list[int]]) -> bytes:
    """A step's examples, for the digest of the data order."""
    return f"{window}\n".encode()


def _metrics(progress: Progress) -> dict[str, float]:
    """A progress event under the metric names of the Hugging Face integration."""
    values = {
        "train/loss": progress.loss,
        "train/grad_norm": progress.grad_norm,
        "train/learning_rate": progress.learning_rate,
        "train/epoch": progress.epoch,
        "train/global_step": progress.step,
        "train/tokens_per_second": progress.tokens_per_second,
    }
    return {name: value for name, value in values.items() if value is not None}


class _Meter:
    """Counts what went through and how long it took, in all and since the last report."""

    def __init__(self, total_steps: int, start: Position, device: str) -> None:
        self.total_steps = total_steps
        self._device = device
        self._started = self._reported = time.perf_counter()
        self._paused_seconds = 0.0
        self._seconds_before = start.seconds
        self._num_examples = start.num_examples
        self._num_tokens = start.num_tokens
        self._last = (self._num_examples, self._num_tokens)

    @property
    def seconds(self) -> float:
        """Over all attempts, pauses left out."""
        return self._seconds_before + time.perf_counter() - self._started - self._paused_seconds

    def count(self, items: Sequence[Item]) -> None:
        self._num_examples += len(items)
        self._num_tokens += sum(map(num_tokens, items))

    def position(
        self,
        step: int,
        order: str,
        recent: tuple[tuple[float, int], ...],
        num_zeros: int,
        untold: StepResult,
        selection: Selection,
    ) -> Position:
        """Where the training stands now, after a step."""
        return Position(
            step, order, self._num_examples, self._num_tokens, self.seconds, recent, num_zeros, untold, selection
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        passed = time.perf_counter() - began
        self._paused_seconds += passed
        self._reported += passed

    def progress(self, step: int, epoch: float) -> Progress:
        """The event of a step; rates are over the time since the last one."""
        passed = max(time.perf_counter() - self._reported, 1e-9)
        num_examples, num_tokens = self._last
        self._last = (self._num_examples, self._num_tokens)
        self._reported = time.perf_counter()
        return Progress(
            phase="training",
            step=step,
            total_steps=self.total_steps,
            epoch=epoch,
            num_examples=self._num_examples,
            examples_per_second=(self._num_examples - num_examples) / passed,
            tokens_per_second=(self._num_tokens - num_tokens) / passed,
            eta_seconds=self.seconds / step * (self.total_steps - step),
            memory_bytes=modeling.device_memory(self._device),
        )
