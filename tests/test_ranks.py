"""Trainings on several devices, as two processes on a CPU: the same losses and adapter as on one, and one end for all."""

# ruff: noqa: F401, F811 (fixtures of another file)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from knowledge_engine.bases import Base
from knowledge_engine.core import Progress, TrainingSpec
from knowledge_engine.settings import Settings
from knowledge_engine.text import Example
from knowledge_engine.training.loop import TrainedSummary, train
from knowledge_engine.training.ranks import Task, load_tuned, together
from tests.test_training import SPEC, FakeContext, bases, checkpoints_of, examples, no_log

SEVERAL: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "eval_steps": 2,
    "use_qlora": False,
    "lora": {"dropout": 0.0},
}
"""Nine examples: two windows of four and one of one, which leaves a rank without work."""


class Run:
    """A training on so many devices in a folder of its own."""

    def __init__(self, base: Base, examples: list[Example], work_dir: Path, num: int = 2, **changes: Any) -> None:
        self.spec = TrainingSpec.model_validate(SPEC.model_dump() | SEVERAL | changes)
        self.context = FakeContext(work_dir, self.spec)
        self._settings = Settings(data_dir=work_dir, training_devices=num)
        self._task = Task(
            self.context.job, self.spec, base, None, examples[3:], examples[:3], "cpu",
            self.spec.per_device_train_batch_size,
        )  # fmt: skip

    def go_on(self) -> TrainedSummary:
        task = self._task
        with together(self.context, self._settings, task) as ranks:
            model = load_tuned(task, ranks, self.context.check)
            try:
                return train(
                    model, task.train, task.held_out, task.spec, self.context, no_log, "cpu",
                    checkpoints_of(self.context, training_devices=self._settings.training_devices), task.micro_batch,
                    ranks,
                )  # fmt: skip
            finally:
                self.adapter = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}


def told(steps: list[Progress]) -> list[tuple[float, ...]]:
    return [(p.loss or 0, p.eval_loss or 0, p.grad_norm or 0, p.num_examples or 0) for p in steps]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"use_qlora": True}), ("gpt2", {"use_qlora": True})],
    ids=["llama", "llama nf4", "gpt2 nf4"],
)
def test_two_ranks_take_the_steps_of_one(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    one = Run(bases[family], examples, tmp_path / "one", num=1, **changes)
    expected = one.go_on()
    two = Run(bases[family], examples, tmp_path / "two", **changes)
    summary = two.go_on()
    for ours, theirs in zip(told(two.context.steps), told(one.context.steps), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert summary.num_tokens == expected.num_tokens
    assert summary.loss == pytest.approx(expected.loss, rel=1e-4)
    for name, weight in one.adapter.items():
        assert torch.allclose(two.adapter[name], weight, atol=2e-3), name
