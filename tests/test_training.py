from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from knowledge_engine import devices, modeling
from knowledge_engine.bases import Base
from knowledge_engine.client import Client
from knowledge_engine.core import (
    DatasetFormat,
    DatasetKind,
    Job,
    JobKind,
    JobState,
    JobStopped,
    LoraConfig,
    Message,
    Progress,
    Service,
    StopReason,
    TrackerRun,
    TrainingResult,
    TrainingSpec,
    utc_now,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import IntegrityError, InvalidSpecError, KnowledgeEngineError, Reason, StateError
from knowledge_engine.inference.adapters import at_once
from knowledge_engine.inference.golden import SelfTest
from knowledge_engine.inference.serving import serving_model
from knowledge_engine.inference.wire import Adapter
from knowledge_engine.registry import Registry
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.text import ChatText, Example
from knowledge_engine.training.blocks import use_fused_layers
from knowledge_engine.training.checkpoints import Checkpoints
from knowledge_engine.training.data import collate
from knowledge_engine.training.dropout import Masks, add_to_input, chosen_places, gradient_of_a, product
from knowledge_engine.training.job import GOLDEN_VALUES_MISSING, run_training
from knowledge_engine.training.loop import evaluation_batches, learning_rate_at, train
from knowledge_engine.training.lora import use_fused_lora
from knowledge_engine.training.loss import batch_loss, check_head, mean_loss
from knowledge_engine.training.material import num_trained
from knowledge_engine.training.packing import use_packing
from knowledge_engine.training.plan import count_steps, plan_batches
from tests.fake_wandb import FakeWandb, Received, fake_wandb, wait_for
from tests.tiny import CONTEXT, FAMILIES, build_tiny_adapter, build_tiny_base

SPEC = TrainingSpec(dataset="d", model="m", use_qlora=False, max_steps=3, learning_rate=0.01)


class FakeContext:
    """Records what a job says; it must end once `stop_after` steps were reported, or at the check `stop_at_check`."""

    stop_reason = StopReason.CANCELLED

    def __init__(
        self,
        work_dir: Path,
        spec: TrainingSpec = SPEC,
        stop_after: int | None = None,
        tell: Callable[[Progress], object] = lambda progress: None,
        job_id: str = "job-1",
    ) -> None:
        self.job = Job(id=job_id, kind=JobKind.TRAINING, state=JobState.RUNNING, spec=spec, create_time=utc_now())
        self.work_dir = work_dir
        self.stop_at_check: int | None = None
        self.num_checks = 0
        self.warnings: list[tuple[str, str]] = []
        self.checkpoints: list[int] = []
        self.events: list[Progress] = []
        self.lines: list[str] = []
        self.runs: list[TrackerRun] = []
        self.ends: list[Callable[[JobState | None], None]] = []
        self._stop_after = stop_after
        self._tell = tell

    def report(self, progress: Progress) -> None:
        self.events.append(progress)
        self._tell(progress)

    def log(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, reason: str, message: str) -> None:
        self.warnings.append((reason, message))

    def checkpointed(self, step: int, size_bytes: int) -> None:
        assert size_bytes > 0
        self.checkpoints.append(step)

    def observe(self, service: Service, trouble: str | None) -> None:
        pass

    def track(self, run: TrackerRun) -> None:
        self.runs.append(run)

    def expect_memory(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes

    def at_end(self, call: Callable[[JobState | None], None]) -> None:
        self.ends.append(call)

    def check(self) -> None:
        self.num_checks += 1
        if self.num_checks == self.stop_at_check or (
            self._stop_after is not None and len(self.steps) >= self._stop_after
        ):
            raise JobStopped(self.stop_reason)

    @property
    def steps(self) -> list[Progress]:
        return [event for event in self.events if event.phase == "training"]


def no_log(metrics: dict[str, float], step: int) -> None: ...


def checkpoints_of(context: FakeContext, **settings: Any) -> Checkpoints:
    """Those of a training that nobody interrupts, unless settings say when to save."""
    spec = context.job.spec
    assert isinstance(spec, TrainingSpec)
    values = {"data_dir": context.work_dir, "checkpoint_seconds": 3600}
    return Checkpoints(context, Settings(**values | settings), {"spec": spec.model_dump(mode="json")}, spec.save_steps)


def _rows(count: int = 12) -> list[list[Message]]:
    chance = random.Random(3)
    words = ["the", "trail", "shoe", "kettle", "backpack", "costs", "is", "in stock", "black", "red", "small", "EUR"]
    return [
        [
            Message(role="user", content=" ".join(chance.choices(words, k=chance.randint(2, 9))) + "?"),
            Message(role="assistant", content="The " + " ".join(chance.choices(words, k=chance.randint(2, 14))) + "."),
        ]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("bases")
    folders = {family: build_tiny_base(root / family, family) for family in FAMILIES}
    return {name: Base("base", folder, "sha256:0", CONTEXT, name, "tiny", 1) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def examples(bases: dict[str, Base]) -> list[Example]:
    text = ChatText.load(bases["llama"])
    return [text.encode_example(row) for row in _rows()]


def tuned(base: Base, spec: TrainingSpec = SPEC) -> modeling.PeftModel:
    precision = modeling.training_precision("cpu", use_qlora=spec.use_qlora)
    return modeling.attach_lora(modeling.load_base(base, precision, "cpu"), spec.lora, spec.seed)


def _run(
    base: Base, examples: list[Example], tmp_path: Path, **changes: Any
) -> tuple[dict[str, torch.Tensor], list[Progress]]:
    """Trains with `changes` to SPEC; the adapter's weights and the progress events."""
    spec = TrainingSpec.model_validate(SPEC.model_dump() | changes)
    # A folder for each run: one that finds the checkpoints of another does not start at the beginning.
    model, context = tuned(base, spec), FakeContext(Path(tempfile.mkdtemp(dir=tmp_path)), spec)
    train(model, examples[2:], examples[:2], spec, context, no_log, "cpu", checkpoints_of(context))
    return {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}, context.steps


@pytest.mark.parametrize("use_qlora", [True, False], ids=["nf4", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_takes_the_same_steps(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    use_qlora: bool,
) -> None:
    """Bit by bit, with dropout and noise, and layers compute twice for it."""
    spec = TrainingSpec.model_validate(
        SPEC.model_dump() | {"use_qlora": use_qlora, "lora": {"dropout": 0.2}, "neftune_noise_alpha": 5.0}
    )
    runs = []
    places = Masks.places
    for gradient_checkpointing in (False, True):
        model, context = tuned(bases[family], spec), FakeContext(tmp_path / str(gradient_checkpointing), spec)
        calls: list[object] = []
        monkeypatch.setattr(Masks, "places", lambda *asked, calls=calls: (calls.append(asked[2]), places(*asked))[1])
        train(
            model, examples[2:], examples[:2], spec, context, no_log, "cpu", checkpoints_of(context),
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        weights = {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}
        monkeypatch.undo()
        runs.append((weights, [step.loss for step in context.steps], len(calls)))
    (weights, losses, num_calls), (again, losses_again, num_calls_again) = runs
    assert _equal(weights, again)
    assert losses == losses_again
    assert num_calls_again == 2 * num_calls > 0


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    if left.keys() != right.keys() or any(left[name].shape != right[name].shape for name in left):
        return False
    return all(torch.allclose(left[name], right[name], rtol=0, atol=tolerance) for name in left)


@pytest.mark.parametrize("use_qlora", [True, False], ids=["nf4", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_its_adapter_serves(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path, family: str, use_qlora: bool
) -> None:
    base = bases[family]
    changes = {
        "use_qlora": use_qlora,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "lora": LoraConfig(dropout=0.05),
    }
    spec = TrainingSpec.model_validate(SPEC.model_dump() | changes)
    model = tuned(base, spec)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" in kinds) is use_qlora
    before, _ = mean_loss(model, evaluation_batches(examples, "cpu"), lambda: None)
    context = FakeContext(tmp_path / "work")
    train(model, examples, [], spec, context, no_log, "cpu", checkpoints_of(context))
    after, num_tokens = mean_loss(model, evaluation_batches(examples, "cpu"), lambda: None)
    assert after < before - 0.5
    assert num_tokens == sum(map(num_trained, examples))

    folder = tmp_path / "adapter"
    modeling.save_adapter(model, folder, base)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    precision = modeling.training_precision("cpu", use_qlora=use_qlora)
    served = modeling.add_adapter(modeling.load_base(base, precision, "cpu"), folder, "x")
    modeling.select_adapter(served, "x")
    assert mean_loss(served, evaluation_batches(examples, "cpu"), lambda: None)[0] == pytest.approx(after, abs=1e-5)
    modeling.select_adapter(served, None)
    assert mean_loss(served, evaluation_batches(examples, "cpu"), lambda: None)[0] == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("use_qlora", [True, False], ids=["nf4", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_ways_equal_the_plain_loss_and_its_gradients(
    bases: dict[str, Base], examples: list[Example], family: str, use_qlora: bool
) -> None:
    """Head on trained positions, no mask, fused LoRA and fused layers, against PEFT's forward and a loss over all
    logits."""
    spec = SPEC.model_copy(update={"use_qlora": use_qlora, "lora": LoraConfig(dropout=0.0)})
    model = tuned(bases[family], spec)
    for weight in (weights := [w for w in model.parameters() if w.requires_grad]):
        torch.nn.init.normal_(weight, std=0.05)
    batch = collate(examples[:3], "cpu")
    assert len({len(example.input_ids) for example in examples[:3]}) > 1
    ids = torch.zeros(3, max(len(example.input_ids) for example in examples[:3]), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples[:3]):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        mask[row, : len(example.input_ids)] = 1
        for index, flag in enumerate(example.trained):
            labels[row, index] = example.input_ids[index] if flag else -100
    model.train()
    plain = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    plain_gradients = torch.autograd.grad(plain, weights)

    def equals_the_plain_one(*, is_packed: bool = False) -> None:
        asked = collate(examples[:3], "cpu", is_packed=is_packed)
        short = batch_loss(model, asked) / len(asked.targets)
        gradients = torch.autograd.grad(short, weights)
        assert short.item() == pytest.approx(plain.item(), abs=1e-5)
        for ours, theirs in zip(gradients, plain_gradients, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)

    masks = use_fused_lora(model, 0)
    equals_the_plain_one()
    assert use_packing(model, examples[0])
    equals_the_plain_one(is_packed=True)
    assert use_fused_layers(model, masks) == (0 if family == "gpt2" else model.config.num_hidden_layers)
    equals_the_plain_one()
    equals_the_plain_one(is_packed=True)
    with torch.no_grad():
        model.eval()
        assert batch_loss(model, batch).item() / len(batch.targets) == pytest.approx(plain.item(), abs=1e-5)


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.05), ("llama", 0.3), ("qwen2", 0.05)])
def test_a_fused_layer_drops_what_its_modules_would(
    bases: dict[str, Base], examples: list[Example], family: str, dropout: float
) -> None:
    spec = SPEC.model_copy(update={"lora": LoraConfig(dropout=dropout)})
    results = []
    for is_fused in (False, True):
        model = tuned(bases[family], spec)
        torch.manual_seed(3)
        for weight in (weights := [w for w in model.parameters() if w.requires_grad]):
            torch.nn.init.normal_(weight, std=0.05)
        masks = use_fused_lora(model, 5)
        assert use_packing(model, examples[0])
        if is_fused:
            assert use_fused_layers(model, masks)
        model.train()
        loss = batch_loss(model, collate(examples[:2], "cpu", is_packed=True))
        results.append((loss, *torch.autograd.grad(loss, weights), masks.state()))
    for plain, fused in zip(*results, strict=True):
        if isinstance(plain, torch.Tensor):
            assert torch.allclose(plain, fused, rtol=1e-3, atol=1e-4)
        else:
            assert plain == fused


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"target_modules": ["q_proj", "v_proj"]}], ids=["dora", "some"])
def test_other_adapters_are_not_fused(bases: dict[str, Base], lora: dict[str, Any]) -> None:
    model = tuned(bases["llama"], SPEC.model_copy(update={"lora": LoraConfig(**lora)}))
    assert use_fused_layers(model, use_fused_lora(model, 0)) == 0


def test_a_fused_layer_leaves_a_sliding_window_to_its_own_attention(
    bases: dict[str, Base], examples: list[Example]
) -> None:
    model = tuned(bases["mistral"], SPEC.model_copy(update={"lora": LoraConfig(dropout=0.0)}))
    model.config.sliding_window = 4
    masks = use_fused_lora(model, 0)
    model.train()
    batch = collate(examples[:1], "cpu")
    plain = batch_loss(model, batch).item()
    assert use_fused_layers(model, masks)
    assert batch_loss(model, batch).item() == pytest.approx(plain, abs=1e-5)
    model.config.sliding_window = None
    assert batch_loss(model, batch).item() != pytest.approx(plain, abs=1e-3)


def test_dropout_drops_its_share_and_keeps_the_mean(bases: dict[str, Base], examples: list[Example]) -> None:
    model = tuned(bases["llama"], SPEC.model_copy(update={"lora": LoraConfig(dropout=0.25)}))
    layer = modeling.adapted_linears(model)[0]
    torch.nn.init.normal_(layer.b)
    use_fused_lora(model, 1)
    model.train()
    x = torch.ones(4096, layer.a.shape[1])
    with torch.no_grad():
        full = layer.module.base_layer(x[:1]) + layer.scaling * (x[:1] @ layer.a.t()) @ layer.b.t()
    drawn = layer.module(x)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.allclose(drawn.mean(0), full[0], atol=0.25)


@pytest.mark.parametrize("probability", [1e-7, 0.001, 0.05, 0.5, 0.97])
def test_every_number_is_dropped_with_the_same_chance(probability: float) -> None:
    masks, count = Masks(3), 200_003
    places = masks.places(count, probability)
    assert ((places >= 0) & (places < count)).all()
    assert (places.diff() > 0).all()
    assert abs(len(places) - count * probability) <= 5 * (count * probability * (1 - probability)) ** 0.5 + 1
    neighbours = int((places.diff() == 1).sum())
    assert abs(neighbours - count * probability**2) <= 8 * (count * probability**2) ** 0.5 + 1
    few = torch.cat([masks.places(3, probability) + 3 * turn for turn in range(20_000)])
    shares = torch.bincount(few % 3, minlength=3) / 20_000
    assert shares.tolist() == pytest.approx([probability] * 3, abs=5 * (probability / 20_000) ** 0.5 + 1e-4)


def test_places_are_a_mask() -> None:
    """Of the same tosses: as products, as gradients, and of rows that are chosen."""
    torch.manual_seed(0)
    x, a, grad_low = torch.randn(37, 48), torch.randn(8, 48), torch.randn(37, 8)
    mask, places = Masks(5).draw(x, 0.3), Masks(5).places(x.numel(), 0.3)
    assert torch.equal(mask.flatten().nonzero().flatten(), places)
    for dropped in (mask, places):
        assert torch.allclose(product(x, a, dropped), x.masked_fill(mask, 0) @ a.t(), atol=1e-5)
        assert torch.allclose(gradient_of_a(grad_low, x, dropped), grad_low.t() @ x.masked_fill(mask, 0), atol=1e-5)
    of_x = [torch.ones_like(x), torch.ones_like(x)]
    for grad_x, dropped in zip(of_x, (mask, places), strict=True):
        add_to_input(grad_x, grad_low, a, dropped)
    assert torch.allclose(*of_x, atol=1e-5)
    assert (of_x[1][mask] - 1).abs().max() < 1e-5
    chosen = torch.tensor([0, 4, 5, 36])
    few = chosen_places(places, 37, 48, chosen)
    assert torch.equal(few, mask[chosen].flatten().nonzero().flatten())


def test_four_at_once_are_the_same_step_as_four_one_by_one(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path
) -> None:
    shared: dict[str, Any] = {"max_steps": 4, "lora": {"dropout": 0.0}, "eval_split": 0.1}
    # Eight examples: both ways see the same four in a step when lengths decide the batches.
    ordered = sorted(examples, key=lambda example: len(example.input_ids))[:4]
    together, steps = _run(bases["llama"], [*ordered[:2], *ordered], tmp_path, per_device_train_batch_size=4, **shared)
    one_by_one, others = _run(
        bases["llama"], [*ordered[:2], *ordered], tmp_path, gradient_accumulation_steps=4, **shared
    )
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in others], abs=1e-4)
    assert _equal(together, one_by_one, tolerance=2e-3)


def test_the_seed_decides_everything(bases: dict[str, Base], examples: list[Example], tmp_path: Path) -> None:
    lora = {"dropout": 0.1}
    first, _ = _run(bases["llama"], examples, tmp_path, lora=lora)
    again, _ = _run(bases["llama"], examples, tmp_path, lora=lora)
    other, _ = _run(bases["llama"], examples, tmp_path, lora=lora, seed=7)
    assert _equal(first, again)
    assert not _equal(first, other)


MOVED: list[dict[str, Any]] = [
    {"use_qlora": True},
    {"lora": {"rank": 4}},
    {"lora": {"alpha": 8}},
    {"lora": {"dropout": 0.5}},
    {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    {"learning_rate": 0.001},
    {"lr_scheduler_type": "cosine"},
    {"lr_scheduler_type": "constant"},
    {"warmup_ratio": 0.5},
    {"weight_decay": 0.5},
    {"max_grad_norm": 0.01},
    {"max_grad_norm": 0},
    {"per_device_train_batch_size": 3},
    {"gradient_accumulation_steps": 3},
    {"seed": 1},
    {"lora": {"use_rslora": True}},
    {"lora": {"use_dora": True}},
    {"neftune_noise_alpha": 5},
    {"num_train_epochs": 1, "max_steps": None},
    {"max_steps": 5},
]


@pytest.mark.parametrize("changes", MOVED, ids=lambda changes: "-".join(map(str, next(iter(changes.items())))))
def test_every_field_moves_the_adapter(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain, _ = _run(bases["llama"], examples, tmp_path)
    moved, _ = _run(bases["llama"], examples, tmp_path, **changes)
    assert not _equal(plain, moved)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 2}, 2),
        ({"max_steps": None}, 30),
        ({"max_steps": None, "num_train_epochs": 1}, 10),
        ({"max_steps": None, "num_train_epochs": 0.25}, 3),
        ({"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 4}, 6),
        (
            {
                "max_steps": None,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
            },
            6,
        ),
    ],
    ids=str,
)
def test_steps_follow_from_epochs_and_batches(changes: dict[str, Any], steps: int) -> None:
    assert count_steps(TrainingSpec.model_validate(SPEC.model_dump() | changes), 10)[0] == steps


def test_no_field_is_without_effect() -> None:
    """Those that move the adapter are moved above; the others say what is trained on, under what name, or how often."""
    moved = {name for changes in MOVED for name in changes} - {"lora"}
    shapes = {name for changes in MOVED for name in changes.get("lora", ())}
    elsewhere = {
        "base_model": "tests/test_bases.py",
        "dataset": "test_a_job_publishes_what_it_trained",
        "model": "test_a_job_publishes_what_it_trained",
        "lora": "its own fields",
        "max_length": "test_what_cannot_be_trained_is_refused",
        "eval_split": "test_without_a_split_nothing_is_compared",
        "eval_steps": "test_events_come_as_often_as_asked",
        "logging_steps": "test_events_come_as_often_as_asked",
        "method": "tests/test_methods.py",
        "beta": "tests/test_methods.py",
        "start_from": "tests/test_methods.py",
        "truncation": "tests/test_methods.py",
        "eval_dataset": "tests/test_methods.py",
        "split_by": "tests/test_methods.py",
        "load_best_model_at_end": "tests/test_methods.py",
        "early_stopping_patience": "tests/test_methods.py",
        "save_steps": "tests/test_checkpoints.py",
        "auto_find_batch_size": "tests/test_checkpoints.py",
    }
    assert moved | elsewhere.keys() == TrainingSpec.model_fields.keys()
    assert shapes == LoraConfig.model_fields.keys()


def test_events_come_as_often_as_asked(bases: dict[str, Base], examples: list[Example], tmp_path: Path) -> None:
    _, events = _run(bases["llama"], examples, tmp_path, max_steps=5, logging_steps=2)
    assert [event.step for event in events] == [2, 4, 5]
    _, events = _run(bases["llama"], examples, tmp_path, max_steps=5, logging_steps=100, eval_steps=2)
    assert [(event.step, event.eval_loss is not None) for event in events] == [(2, True), (4, True), (5, False)]
    last = events[-1]
    assert (last.total_steps, last.epoch, last.num_examples, last.eta_seconds) == (5, 0.5, 5, 0)
    assert last.loss is not None
    assert all(
        value is not None and value > 0
        for value in (last.grad_norm, last.learning_rate, last.tokens_per_second, last.memory_bytes)
    )


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_learning_rate_rises_then_follows_its_shape(shape: str) -> None:
    spec = TrainingSpec.model_validate(SPEC.model_dump() | {"lr_scheduler_type": shape, "warmup_ratio": 0.2})
    rates = [learning_rate_at(spec, step, 20) for step in range(20)]
    assert rates[:4] == sorted(rates[:4])
    assert 0 < rates[0] < rates[4] == max(rates) == spec.learning_rate
    assert rates[4:] == sorted(rates[4:], reverse=True)
    half = spec.learning_rate / 2
    assert rates[12] == pytest.approx({"linear": half, "cosine": half, "constant": 2 * half}[shape])


def test_batches_hold_every_example_once_and_similar_lengths() -> None:
    lengths = [random.Random(index).randint(10, 500) for index in range(203)]
    plan = plan_batches(lengths, 4, seed=1, epoch=0)
    assert sorted(index for batch in plan for index in batch) == list(range(203))
    padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in plan)
    assert padded < 1.05 * sum(lengths)
    assert plan == plan_batches(lengths, 4, seed=1, epoch=0)
    assert plan != plan_batches(lengths, 4, seed=1, epoch=1)
    assert plan != plan_batches(lengths, 4, seed=2, epoch=0)


def test_a_loss_that_is_no_number_ends_the_run(bases: dict[str, Base], examples: list[Example], tmp_path: Path) -> None:
    model = tuned(bases["llama"])
    modeling.adapted_linears(model)[0].b.data.fill_(math.nan)
    context = FakeContext(tmp_path)
    with pytest.raises(KnowledgeEngineError) as caught:
        train(model, examples, [], SPEC, context, no_log, "cpu", checkpoints_of(context))
    assert (caught.value.reason, caught.value.metadata["step"]) == (Reason.NON_FINITE, "1")


def test_a_model_that_changes_its_logits_after_the_head_is_refused(examples: list[Example]) -> None:
    config = Gemma2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(InvalidSpecError) as caught:
        check_head(Gemma2ForCausalLM(config), collate(examples[:1], "cpu"))
    assert caught.value.reason is Reason.BASE_MODEL_UNSUPPORTED


def test_unknown_targets_are_refused_with_the_known_ones(bases: dict[str, Base]) -> None:
    for target in ("lm_head", "proj", "embed_tokens", ".*"):
        with pytest.raises(InvalidSpecError, match="down_proj") as caught:
            modeling.attach_lora(
                modeling.load_base(bases["llama"], "float32", "cpu"), LoraConfig(target_modules=("q_proj", target)), 0
            )
        assert caught.value.reason is Reason.TARGET_MODULES_UNKNOWN


def _poison(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.inf
    save_file(tensors, folder / "adapter_model.safetensors")


def _drop_one(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors")


def _configure(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 100), "adapter_model.safetensors"),
        (_poison, "adapter_model.safetensors"),
        (_drop_one, "adapter_model.safetensors"),
        (_configure(r=4), "adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("["), "adapter_config.json"),
        (_configure(target_modules=["nothing"]), "adapter_config.json"),
        (_configure(target_modules="all-linear"), "adapter_config.json"),
        (_configure(lora_bias=True), "adapter_config.json"),
        (_configure(modules_to_save=["lm_head"]), "adapter_config.json"),
        (_configure(peft_type="IA3"), "adapter_config.json"),
    ],
    ids=[
        "missing",
        "garbage",
        "infinite",
        "incomplete",
        "shape",
        "json",
        "targets",
        "pattern",
        "bias",
        "modules",
        "kind",
    ],
)
def test_a_damaged_adapter_is_refused_by_file_and_leaves_the_model_as_it_was(
    bases: dict[str, Base], tmp_path: Path, damage: Callable[[Path], object], file: str
) -> None:
    base = bases["llama"]
    bad = build_tiny_adapter(base.folder, tmp_path / "bad", 1)
    damage(bad)
    model = modeling.load_base(base, "float32", "cpu")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
    for _ in range(2):
        with pytest.raises(IntegrityError) as caught:
            modeling.add_adapter(model, bad, "bad")
        assert (caught.value.reason, caught.value.metadata["file"]) == (Reason.MODEL_VERSION_CORRUPT, file)
    good = modeling.add_adapter(model, build_tiny_adapter(base.folder, tmp_path / "good", 2), "good")
    modeling.select_adapter(good, "good")
    with torch.no_grad():
        tuned = model(ids).logits
    with pytest.raises(IntegrityError):
        modeling.add_adapter(good, bad, "bad")
    with torch.no_grad():
        modeling.select_adapter(good, "good")
        assert torch.equal(model(ids).logits, tuned)
        modeling.select_adapter(good, None)
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(tuned, before)
    modeling.remove_adapter(good, "good")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


class Workshop:
    """Settings, dataset and registry of one data directory around a tiny base."""

    def __init__(self, root: Path, base: Path) -> None:
        free = "127.0.0.1:0"
        self.settings = Settings(data_dir=root, base_model=str(base), grpc_address=free, http_address=free)
        self.state = State.open(self.settings.state_url)
        self.datasets = Datasets(root / "datasets", self.state)
        self.registry = Registry(root / "models")
        self.work_dir = root / "work"
        self.work_dir.mkdir(exist_ok=True)
        rows = [{"messages": [message.model_dump() for message in row]} for row in _rows(20)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.dataset = self.datasets.store("talks", DatasetKind.CONVERSATIONS, DatasetFormat.JSONL, [lines])

    def run(
        self,
        stop_after: int | None = None,
        report: Callable[[Progress], object] = lambda progress: None,
        job_id: str = "job-1",
        **changes: Any,
    ) -> tuple[TrainingResult, FakeContext]:
        values = {"dataset": "talks", "model": "shop", "max_steps": 6, "learning_rate": 0.01, "eval_split": 0.2}
        spec = TrainingSpec.model_validate(values | changes)
        self.context = FakeContext(self.work_dir, spec, stop_after, report, job_id)
        state = JobState.FAILED
        try:
            result = run_training(self.context, self.settings, self.datasets, self.registry)
            state = JobState.SUCCEEDED
        finally:
            for call in self.context.ends:
                call(state)
        return result, self.context


@pytest.fixture
def workshop(tmp_path: Path, bases: dict[str, Base]) -> Any:
    workshop = Workshop(tmp_path / "data", bases["llama"].folder)
    yield workshop
    workshop.state.close()


def test_a_job_publishes_what_it_trained(workshop: Workshop, bases: dict[str, Base]) -> None:
    result, context = workshop.run()
    assert context.memory_bytes > 2**29
    phases = list(dict.fromkeys(event.phase for event in context.events))
    assert phases == ["loading", "checking", "training", "evaluating", "publishing"]
    assert [event.step for event in context.steps] == [1, 2, 3, 4, 5, 6]
    assert result.comparison is not None
    assert result.comparison.tuned_loss < result.comparison.base_loss
    assert (result.comparison.num_conversations, result.comparison.precision) == (4, "int8")
    assert (result.num_steps, result.version) == (6, 1)
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 100_000_000

    workshop.registry.verify("shop", 1)
    version = workshop.registry.resolve("shop", None)
    assert (version.digest, version.training_precision) == (result.digest, "nf4")
    assert version.dataset_digest == workshop.dataset.digest
    assert version.chat_template_digest == ChatText.load(bases["llama"]).template_digest
    folder = workshop.registry.folder("shop", 1)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "golden.json", "manifest.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert str(workshop.settings.data_dir.parent) not in (folder / "adapter_config.json").read_text()
    base = bases["llama"]
    text = ChatText.load(base)
    assert list(golden_values(folder)) == ["int8", "bfloat16", "float32"]
    for precision in golden_values(folder):
        engine = serving_model(
            modeling.load_base(base, precision, "cpu"), base, precision, workshop.settings, lambda detail: None
        )
        engine.adapters.prove = SelfTest(engine, base, text, precision).demand
        at_once(engine.adapters.acquire(Adapter(version.digest, folder)))
    served = modeling.add_adapter(modeling.load_base(base, "int8", "cpu"), folder, "x")
    modeling.select_adapter(served, "x")
    rows = [text.encode_example(row.messages) for row in workshop.datasets.conversations("talks")]
    assert mean_loss(served, evaluation_batches(rows, "cpu"), lambda: None)[0] < result.comparison.base_loss


def golden_values(folder: Path) -> dict[str, Any]:
    """By precision."""
    answers: dict[str, Any] = json.loads((folder / "golden.json").read_text())["answers"]
    return answers


def test_a_precision_without_room_is_left_out_with_a_warning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "free_host_memory", lambda settings: 2**28)  # no test can fill the machine
    _, context = workshop.run(max_steps=1)
    assert list(golden_values(workshop.registry.folder("shop", 1))) == ["int8"]
    ((reason, said),) = context.warnings
    assert reason == GOLDEN_VALUES_MISSING
    assert "bfloat16 (it takes 0.27 GB of memory, and 0.27 GB are free), float32 (" in said


def test_a_precision_whose_answers_are_not_finite_is_left_out_with_a_warning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = SelfTest.record

    def record_one(self: SelfTest, folder: Path, check: Callable[[], None]) -> None:
        if (folder / "golden.json").exists():
            raise KnowledgeEngineError("not finite", reason=Reason.NON_FINITE)
        record(self, folder, check)

    monkeypatch.setattr(SelfTest, "record", record_one)  # what float32 holds, these precisions hold in a small base
    _, context = workshop.run(max_steps=1)
    assert list(golden_values(workshop.registry.folder("shop", 1))) == ["int8"]
    assert "bfloat16 (its answers are not finite), float32 (its" in context.warnings[0][1]


@pytest.mark.parametrize("precision", ["nf4", "nf4-int8"])
def test_a_precision_that_is_asked_for_serves_is_compared_in_and_has_golden_values(
    workshop: Workshop, bases: dict[str, Base], caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    workshop.settings = workshop.settings.model_copy(update={"serving_precision": precision})
    result, _ = workshop.run()
    assert result.comparison is not None
    assert result.comparison.precision == precision
    folder = workshop.registry.folder("shop", 1)
    assert list(golden_values(folder)) == [precision, "int8", "bfloat16", "float32"]
    base = bases["llama"]
    loaded = modeling.load_base(base, precision, "cpu")
    engine = serving_model(loaded, base, precision, workshop.settings, lambda detail: None)
    engine.adapters.prove = SelfTest(engine, base, ChatText.load(base), precision).demand
    caplog.set_level(logging.INFO)
    at_once(engine.adapters.acquire(Adapter(result.digest, folder)))
    assert "golden prompts as published" in caplog.text


@pytest.mark.parametrize("precision", ["int8", "nf4-int8"])
def test_a_precision_that_cannot_serve_here_is_refused_before_anything_is_trained(
    tmp_path: Path, bases: dict[str, Base], precision: str
) -> None:
    workshop = Workshop(tmp_path / "data", bases["gpt2"].folder)
    workshop.settings = workshop.settings.model_copy(update={"serving_precision": precision})
    with pytest.raises(
        InvalidSpecError, match=f"KNOWLEDGE_SERVING_PRECISION: {precision} is for bases of Llama's shape"
    ):
        workshop.run()
    assert not workshop.context.steps
    workshop.state.close()


def test_a_job_is_stopped_while_golden_values_are_recorded(workshop: Workshop) -> None:
    def stop(progress: Progress) -> None:
        if progress.total_steps and progress.phase == "publishing":
            workshop.context.stop_at_check = workshop.context.num_checks + 3

    with pytest.raises(JobStopped):
        workshop.run(max_steps=1, report=stop)
    assert workshop.context.events[-1].phase == "publishing"
    assert not (workshop.settings.data_dir / "models" / "shop").exists()


def test_without_a_split_nothing_is_compared(workshop: Workshop) -> None:
    result, context = workshop.run(eval_split=0, use_qlora=False, max_steps=1)
    assert result.comparison is None
    assert "evaluating" not in {event.phase for event in context.events}
    assert workshop.registry.resolve("shop", 1).training_precision == "float32"


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"max_length": CONTEXT + 1}, Reason.SPEC_INVALID, "max_length"),
        ({"max_length": 24}, Reason.EXAMPLE_TOO_LONG, "row"),
        ({"eval_split": 0.5, "base_model": "other"}, Reason.BASE_MODEL_UNKNOWN, "other"),
        ({"dataset": "none"}, Reason.DATASET_NOT_FOUND, "none"),
        ({"lora": {"target_modules": ["x"]}}, Reason.TARGET_MODULES_UNKNOWN, "x"),
    ],
    ids=["context", "long", "base", "dataset", "targets"],
)
def test_what_cannot_be_trained_is_refused(
    workshop: Workshop, changes: dict[str, Any], reason: Reason, said: str
) -> None:
    with pytest.raises(KnowledgeEngineError, match=said) as caught:
        workshop.run(**changes)
    assert caught.value.reason is reason
    assert not (workshop.settings.data_dir / "models" / "shop").exists()


async def test_a_tracked_run_ends_as_its_job_did_and_holds_up_nobody(make_settings: Callable[..., Settings]) -> None:
    """A real worker, whose job somebody cancels while W&B keeps the end of its run waiting."""
    asked, may_go = threading.Event(), threading.Event()

    def hold_the_end(request: Received) -> None:
        if request.operation == "file_stream" and json.loads(request.body).get("complete"):
            asked.set()
            may_go.wait(60)

    rows = "".join(json.dumps({"messages": [message.model_dump() for message in row]}) + "\n" for row in _rows(4))
    spec = TrainingSpec(dataset="talks", model="shop", use_qlora=False, max_steps=1)

    def work(address: str, fake: FakeWandb) -> Job:
        with Client(address) as client:
            client.upload_dataset("talks", rows.encode())
            job = client.create_training_job(spec)
            assert asked.wait(120)
            with contextlib.suppress(StateError):
                client.cancel_job(job.id)
            list(client.watch_job(job.id))  # to its end, which waits for no tracker
            may_go.set()
            wait_for(lambda: fake.runs[job.id].state != "running")
            return client.get_job(job.id)

    with fake_wandb(hold_the_end) as fake:
        settings = make_settings(wandb_api_key=SecretStr("0123456789" * 4), wandb_base_url=fake.url)
        async with await start_server(settings) as running:
            job = await asyncio.to_thread(work, running.address, fake)
    run = fake.runs[job.id]
    assert job.state is JobState.SUCCEEDED
    assert (run.state, run.exit_code, run.summary["state"]) == ("finished", 0, job.state)


def test_a_stopped_job_publishes_nothing(workshop: Workshop) -> None:
    with pytest.raises(JobStopped):
        workshop.run(stop_after=2)
    assert len(workshop.context.steps) == 2
    with pytest.raises(KnowledgeEngineError) as caught:
        workshop.registry.resolve("shop", None)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
