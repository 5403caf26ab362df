"""Trainings on several devices, as two processes on a CPU: losses and adapter as on one, and one end for all."""

# ruff: noqa: F401, F811 (fixtures of another file)

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from knowledge_engine import failpoints, modeling
from knowledge_engine.bases import Base
from knowledge_engine.core import (
    DatasetFormat,
    DatasetKind,
    Job,
    JobState,
    JobStopped,
    Progress,
    StateChange,
    StopReason,
    TrainingSpec,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.text import Example
from knowledge_engine.training import ranks
from knowledge_engine.training.checkpoints import ENVIRONMENT_CHANGED
from knowledge_engine.training.loop import TrainedSummary, train
from knowledge_engine.training.material import Item, Pair
from knowledge_engine.training.plan import split_window
from knowledge_engine.training.ranks import (
    CONFIGURATION,
    FOLDER,
    Ranks,
    Task,
    demand_devices,
    load_tuned,
    read_plugin,
    together,
    write_configuration,
)
from tests.test_methods import pairs
from tests.test_training import SPEC, FakeContext, Workshop, bases, checkpoints_of, examples, no_log, workshop

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

    def __init__(
        self, base: Base, examples: Sequence[Item], work_dir: Path, num: int = 2, *,
        gradient_checkpointing: bool = False, **changes: Any,
    ) -> None:  # fmt: skip
        self.spec = TrainingSpec.model_validate(SPEC.model_dump() | SEVERAL | changes)
        self.context = FakeContext(work_dir, self.spec)
        self.settings = Settings(data_dir=work_dir, training_devices=num)
        self.task = Task(
            self.context.job, self.spec, base, None, examples[3:], examples[:3], "cpu",
            self.spec.per_device_train_batch_size, gradient_checkpointing,
        )  # fmt: skip

    def pause_after(self, steps: int) -> list[Progress]:
        """What it reports until then."""
        self.context = FakeContext(self.context.work_dir, self.spec, stop_after=steps)
        self.context.stop_reason = StopReason.PAUSED
        with pytest.raises(JobStopped):
            self.go_on()
        return self.context.steps

    def go_on(self) -> TrainedSummary:
        task = self.task
        with together(self.context, self.settings, task) as ranks:
            model = load_tuned(task, ranks, self.context.check)
            try:
                return train(
                    model, task.train, task.held_out, task.spec, self.context, no_log, "cpu",
                    checkpoints_of(self.context, training_devices=self.settings.training_devices), task.micro_batch,
                    ranks, gradient_checkpointing=task.gradient_checkpointing,
                )  # fmt: skip
            finally:
                self.adapter = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}


def told(steps: list[Progress]) -> list[tuple[float, ...]]:
    return [(p.loss or 0, p.eval_loss or 0, p.grad_norm or 0, p.num_examples or 0) for p in steps]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"use_qlora": True}),
        ("gpt2", {"gradient_checkpointing": True}),
        pytest.param("llama", {"gradient_checkpointing": True, "use_qlora": True}, marks=pytest.mark.slow),
        pytest.param("llama", {"num": 3}, marks=pytest.mark.slow),
        pytest.param("gpt2", {"use_qlora": True}, marks=pytest.mark.slow),
    ],
    ids=["llama nf4", "gpt2 checkpointing", "llama nf4 checkpointing", "three", "gpt2 nf4"],
)
def test_ranks_take_the_steps_of_one(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    one = Run(bases[family], examples, tmp_path / "one", **changes | {"num": 1, "gradient_checkpointing": False})
    expected = one.go_on()
    two = Run(bases[family], examples, tmp_path / "two", **changes)
    summary = two.go_on()
    for ours, theirs in zip(told(two.context.steps), told(one.context.steps), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert summary.num_tokens == expected.num_tokens
    assert summary.loss == pytest.approx(expected.loss, rel=1e-4)
    for name, weight in one.adapter.items():
        assert torch.allclose(two.adapter[name], weight, atol=2e-3), name


@pytest.mark.slow
def test_preferences_and_dora_are_shared_as_well(bases: dict[str, Base], tmp_path: Path, pairs: list[Pair]) -> None:
    changes = {"method": "dpo", "beta": 0.3, "lora": {"dropout": 0.0, "use_dora": True}, "max_steps": 2}
    runs = [Run(bases["llama"], pairs, tmp_path / str(num), num=num, **changes) for num in (1, 2)]
    for run in runs:
        run.go_on()
    for ours, theirs in zip(*(told(run.context.steps) for run in runs), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_every_rank_holds_a_share_of_the_linear_weights(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path
) -> None:
    run = Run(bases["llama"], examples, tmp_path, use_qlora=True)
    with together(run.context, run.settings, run.task) as ranks:
        model = load_tuned(run.task, ranks, run.context.check)
        kinds = {
            name.rpartition(".")[2]: type(weight).__name__
            for name, weight in ((name.removesuffix(".weight"), weight) for name, weight in model.named_parameters())
        }
        body, _ = modeling.body_and_head(model)
        for module in modeling.frozen_linears(body):
            outputs, inputs = modeling.linear_size(module)
            share = module.weight.to_local()
            assert share.numel() * share.itemsize == outputs * inputs // 2 // 2  # four bits, on two ranks
    assert kinds["base_layer"] == "DTensor"
    assert {kinds[name] for name in ("default", "embed_tokens", "input_layernorm", "norm")} == {"Parameter"}


def test_a_resumed_run_equals_one_that_never_stopped(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path
) -> None:
    changes = {"lora": {"dropout": 0.1}, "neftune_noise_alpha": 5, "load_best_model_at_end": True}
    twin = Run(bases["llama"], examples, tmp_path / "twin", **changes)
    twin.go_on()
    before = Run(bases["llama"], examples, tmp_path / "run", **changes).pause_after(2)
    run = Run(bases["llama"], examples, tmp_path / "run", **changes)
    run.go_on()
    assert told([*before, *run.context.steps]) == told(twin.context.steps)
    for name, weight in twin.adapter.items():
        assert torch.equal(run.adapter[name], weight), name


@pytest.mark.slow
def test_one_device_goes_on_where_two_have_been(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path
) -> None:
    before = Run(bases["llama"], examples, tmp_path / "run").pause_after(2)
    alone = Run(bases["llama"], examples, tmp_path / "run", num=1)
    alone.go_on()
    ((reason, message),) = alone.context.warnings
    assert (reason, "devices" in message) == (ENVIRONMENT_CHANGED, True)
    twin = Run(bases["llama"], examples, tmp_path / "twin", num=1)
    twin.go_on()
    for ours, theirs in zip(told([*before, *alone.context.steps]), told(twin.context.steps), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_job_on_two_devices_publishes_one_version(workshop: Workshop) -> None:
    workshop.settings = workshop.settings.model_copy(update={"training_devices": 2})
    result, context = workshop.run()
    assert (result.num_steps, result.version) == (6, 1)
    assert result.comparison is not None
    assert result.comparison.tuned_loss < result.comparison.base_loss
    assert "2 devices share the base and every step" in context.lines
    assert not list(workshop.work_dir.glob(f"{FOLDER}-*"))
    workshop.registry.verify("shop", 1)


# --- one end for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "kind", "says"),
    [
        ("follower.step=fail@2", KnowledgeEngineError, r"rank 1 of 2 failed unexpectedly \(RuntimeError\)"),
        ("follower.load=oom", MemoryError, "rank 1 of 2: failpoint follower.load"),
        pytest.param("follower.step=kill@2", SystemExit, "rank 1 of 2 is gone: signal SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_ends_the_attempt_by_name(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    kind: type[BaseException],
    says: str,
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, point)
    with pytest.raises(kind, match=says):
        Run(bases["llama"], examples, tmp_path).go_on()
    assert processes(FOLLOWER) == []


@pytest.mark.slow
def test_memory_that_runs_out_on_another_rank_halves_the_micro_batch(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "follower.step=oom@2")
    workshop.settings = workshop.settings.model_copy(update={"training_devices": 2})
    with pytest.raises(JobStopped, match="the training goes on with 2") as caught:
        workshop.run(per_device_train_batch_size=4, auto_find_batch_size=True)
    assert caught.value.reason is StopReason.RETRY


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_given_up(
    bases: dict[str, Base], examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "follower.step=stop@2")
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 5.0)
    monkeypatch.setattr(ranks, "_LAST_WORDS_SECONDS", 0.5)
    with pytest.raises(SystemExit, match="a rank of 2 did not answer for 5 s"):
        Run(bases["llama"], examples, tmp_path).go_on()
    assert processes(FOLLOWER) == []


class Service:
    """A training on two devices, in the hands of a server."""

    def __init__(self, settings: Settings, state: State) -> None:
        self._state = state
        row = '{"messages": [{"role": "user", "content": "%s?"}, {"role": "assistant", "content": "Yes."}]}\n'
        lines = "".join(row % name for name in ("kettle", "lamp", "tent", "mug")).encode()
        datasets = Datasets(settings.data_dir / "datasets", self._state)
        datasets.store("d", DatasetKind.CONVERSATIONS, DatasetFormat.JSONL, [lines])
        self._job_id = self._state.create_job(SPEC.model_copy(update={"max_steps": 100, "save_steps": 2})).id

    @property
    def job(self) -> Job:
        return self._state.get_job(self._job_id)

    def messages(self) -> list[str]:
        payloads = [event.payload for event in self._state.events(self._job_id, 0, 1000)]
        return [payload.message for payload in payloads if isinstance(payload, StateChange)]

    async def eventually(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, self.job
            await asyncio.sleep(0.05)

    async def kill(self, module: str, step: int) -> None:
        """Once there is a checkpoint after this step."""
        await self.eventually(lambda: (self.job.checkpoint_step or 0) >= step)
        (victim,) = processes(module)
        victim.kill()
        await self.eventually(lambda: not victim.is_running())

    async def cancel(self) -> None:
        self._state.request_cancel(self._job_id)
        await self.eventually(lambda: self.job.state is JobState.CANCELLED)
        await self.eventually(lambda: not processes(FOLLOWER))


WORKER, FOLLOWER = "knowledge_engine.worker", "knowledge_engine.training.follower"


def processes(module: str) -> list[psutil.Process]:
    """Those of this module that this process has started, directly or not."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline():
                found.append(process)
    return found


@pytest.fixture
async def service(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setenv(failpoints.VARIABLE, "training.step=sleep:0.2")
    settings = make_settings(training_devices=2)
    async with await start_server(settings):
        state = State.open(settings.state_url, migrate=False)
        yield Service(settings, state)
        state.close()


async def test_no_rank_outlives_its_worker(service: Service) -> None:
    await service.eventually(lambda: processes(FOLLOWER))
    followers = processes(FOLLOWER)
    await service.kill(WORKER, 2)
    await service.eventually(lambda: not any(process.is_running() for process in followers))


@pytest.mark.slow
async def test_a_job_goes_on_after_the_kill_of_any_rank_and_ends_all_when_cancelled(service: Service) -> None:
    await service.kill(FOLLOWER, 2)
    await service.kill(WORKER, 4)
    await service.eventually(lambda: (service.job.checkpoint_step or 0) >= 6)
    await service.cancel()
    assert any("rank 1 of 2 is gone: signal SIGKILL" in message for message in service.messages())


# --- what is written ----------------------------------------------------------------------------------------------


def test_accelerate_understands_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / CONFIGURATION
    write_configuration(path, 4, "cuda")
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    assert (arguments.num_processes, arguments.use_fsdp, arguments.mixed_precision) == (4, True, "no")
    environment = prepare_multi_gpu_env(arguments)
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert environment["FSDP_OFFLOAD_PARAMS"] == environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    plugin = read_plugin(path)
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)


def test_devices_that_are_not_there_are_refused() -> None:
    settings = Settings(training_devices=3)
    demand_devices(settings, "cpu")
    with pytest.raises(InvalidSpecError, match="KNOWLEDGE_TRAINING_DEVICES: 3 are asked for and this machine has 0"):
        demand_devices(settings, "cuda")


def test_ranks_have_as_many_parts_and_every_example_once() -> None:
    spec = SPEC.model_copy(update={"per_device_train_batch_size": 2})
    lengths = [400, 30, 600, 20, 900, 10, 700]

    def split(hand: Sequence[int]) -> list[list[int]]:
        return split_window([hand], lengths, spec, "cpu", 2)

    for window in ([[0, 1], [2, 3], [4, 5], [6]], [[3]], [[5, 1], [0]]):
        hands = [Ranks(3, index).parts(window, lengths, split) for index in range(3)]
        assert len({len(hand) for hand in hands}) == 1
        counted = [index for hand in hands for part, times in hand for index in part * times]
        assert sorted(counted) == sorted(index for batch in window for index in batch)
        assert all(part == [min(part, key=lambda i: lengths[i])] for hand in hands for part, times in hand if not times)
