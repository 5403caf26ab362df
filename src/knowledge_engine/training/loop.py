"""The training loop, top to bottom: AdamW on the adapter's weights, one optimizer step after the other.

It is given a model with an adapter attached and examples already encoded; it knows nothing of where they come from or
where the adapter goes. The loss of a step is the mean over every trained token of all its batches, so that a batch of
4 and 4 batches of 1 are the same step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import psutil
import torch

from knowledge_engine.core import JobContext, LrSchedulerType, Progress, TrainingSpec
from knowledge_engine.errors import KnowledgeEngineError, Reason
from knowledge_engine.modeling import PeftModel
from knowledge_engine.text import Example
from knowledge_engine.training.data import Batch, collate, count_trained, plan_batches
from knowledge_engine.training.lora import use_fused_lora
from knowledge_engine.training.loss import batch_loss, check_head, mean_loss

DEFAULT_EPOCHS = 3.0
_EVALUATION_BATCH_SIZE = 4

Log = Callable[[dict[str, float], int], None]
"""Takes metrics under the Hugging Face integration's names, and the step."""


@dataclass(frozen=True)
class TrainedSummary:
    """What a run amounted to. `loss` is the mean per trained token over the last epoch's steps; evaluation is left out
    of `seconds`."""

    loss: float
    num_steps: int
    num_tokens: int
    seconds: float


def count_steps(spec: TrainingSpec, num_examples: int) -> tuple[int, int]:
    """Optimizer steps of the run, and of one epoch."""
    num_batches = math.ceil(num_examples / spec.per_device_train_batch_size)
    per_epoch = math.ceil(num_batches / spec.gradient_accumulation_steps)
    epochs = DEFAULT_EPOCHS if spec.num_train_epochs is None else spec.num_train_epochs
    return spec.max_steps or math.ceil(epochs * per_epoch), per_epoch


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
    examples: Sequence[Example],
    held_out: Sequence[Example],
    spec: TrainingSpec,
    context: JobContext,
    log: Log,
    device: str,
) -> TrainedSummary:
    """Trains the adapter in place.

    Raises:
        KnowledgeEngineError: NON_FINITE, naming the step.
        InvalidSpecError: BASE_MODEL_UNSUPPORTED.
        JobStopped: from `context.check`, within one batch.
    """
    total_steps, steps_per_epoch = count_steps(spec, len(examples))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
    windows = _windows(examples, spec)
    meter = _Meter(total_steps)
    recent: deque[tuple[float, int]] = deque(maxlen=steps_per_epoch)  # summed loss and trained tokens
    use_fused_lora(model, spec.seed)
    check_head(model, collate(examples[:1], device))
    model.train()
    for step in range(1, total_steps + 1):
        window = next(windows)
        num_trained = sum(count_trained(example) for batch in window for example in batch)
        step_loss = 0.0
        for members in window:
            context.check()
            batch = collate(members, device)
            loss = batch_loss(model, batch)
            (loss / num_trained).backward()  # type: ignore[no-untyped-call]
            step_loss += loss.item()
            meter.count(batch)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, spec.max_grad_norm or math.inf).item()
        demand_finite("the loss", step_loss, step)
        demand_finite("the gradient norm", grad_norm, step)
        learning_rate = learning_rate_at(spec, step - 1, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        recent.append((step_loss, num_trained))

        eval_loss = None
        if spec.eval_steps and step % spec.eval_steps == 0:
            with meter.paused():
                eval_loss, _ = mean_loss(model, evaluation_batches(held_out, device), context.check)
            log({"eval/loss": eval_loss, "train/global_step": step}, step)
        if step % spec.logging_steps == 0 or step == total_steps or eval_loss is not None:
            progress = meter.progress(step, step / steps_per_epoch).model_copy(
                update={
                    "loss": step_loss / num_trained,
                    "eval_loss": eval_loss,
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm,
                }
            )
            context.report(progress)
            log(_metrics(progress), step)
    losses, tokens = zip(*recent, strict=True)
    return TrainedSummary(sum(losses) / sum(tokens), total_steps, meter.num_tokens, meter.seconds)


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


def evaluation_batches(held_out: Sequence[Example], device: str) -> Iterator[Batch]:
    """All held-out examples, in batches of similar lengths."""
    ordered = sorted(held_out, key=lambda example: len(example.input_ids))
    for first in range(0, len(ordered), _EVALUATION_BATCH_SIZE):
        yield collate(ordered[first : first + _EVALUATION_BATCH_SIZE], device)


def _windows(examples: Sequence[Example], spec: TrainingSpec) -> Iterator[list[list[Example]]]:
    """The batches of one optimizer step after the other, without end; an epoch's last step may have fewer."""
    lengths = [len(example.input_ids) for example in examples]
    for epoch in count():
        plan = plan_batches(lengths, spec.per_device_train_batch_size, spec.seed, epoch)
        for first in range(0, len(plan), spec.gradient_accumulation_steps):
            window = plan[first : first + spec.gradient_accumulation_steps]
            yield [[examples[index] for index in members] for members in window]


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

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._process = psutil.Process()
        self._started = self._reported = time.perf_counter()
        self._paused_seconds = 0.0
        self._num_examples = 0
        self.num_tokens = 0
        self._last = (0, 0)

    @property
    def seconds(self) -> float:
        """Since the start, pauses left out."""
        return time.perf_counter() - self._started - self._paused_seconds

    def count(self, batch: Batch) -> None:
        self._num_examples += batch.num_examples
        self.num_tokens += batch.num_tokens

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
        self._last = (self._num_examples, self.num_tokens)
        self._reported = time.perf_counter()
        return Progress(
            phase="training",
            step=step,
            total_steps=self._total_steps,
            epoch=epoch,
            num_examples=self._num_examples,
            examples_per_second=(self._num_examples - num_examples) / passed,
            tokens_per_second=(self.num_tokens - num_tokens) / passed,
            eta_seconds=self.seconds / step * (self._total_steps - step),
            memory_bytes=self._process.memory_info().rss,
        )
