"""Resumed equals never stopped; a checkpoint is whole or not there; disks and memory that run out are told as that."""

# ruff: noqa: F401, F811 (fixtures of another file)

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from knowledge_engine import failpoints, modeling
from knowledge_engine.bases import Base
from knowledge_engine.core import JobStopped, Progress, StopReason, TrainingSpec
from knowledge_engine.errors import CapacityError, IntegrityError, KnowledgeEngineError, Reason
from knowledge_engine.settings import Settings
from knowledge_engine.text import Example
from knowledge_engine.training.checkpoints import (
    DAMAGED,
    ENVIRONMENT_CHANGED,
    FILES,
    FOLDER,
    MARKER,
    Boundary,
    Checkpoints,
    Learned,
    Position,
    Randomness,
)
from knowledge_engine.training.dropout import Masks
from knowledge_engine.training.loop import TrainedSummary, train
from knowledge_engine.training.shortages import Shortages
from tests.test_training import (
    SPEC,
    FakeContext,
    Workshop,
    bases,
    checkpoints_of,
    examples,
    no_log,
    tuned,
    workshop,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes this process fail at named places, as the environment variable does for others."""

    def set_up(text: str) -> None:
        failpoints._PASSED.clear()
        monkeypatch.setattr(failpoints, "_TRIGGERS", failpoints._parse(text))

    yield set_up
    failpoints._PASSED.clear()


# --- resumed equals never stopped ---------------------------------------------------------------------------------

SEVERAL = {
    "lora": {"dropout": 0.1},
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "eval_steps": 2,
    "use_qlora": False,
    "neftune_noise_alpha": 5,
}
"""Nine examples: five batches, three windows and an uneven last one in an epoch; the run takes two epochs."""


class Run:
    """A training in a folder of its own, which may be stopped and gone on with."""

    def __init__(self, base: Base, examples: list[Example], work_dir: Path, **changes: Any) -> None:
        self.spec = TrainingSpec.model_validate(SPEC.model_dump() | SEVERAL | changes)
        self.work_dir = work_dir
        self.progress: list[Progress] = []
        self.lines: list[str] = []
        self._base = base
        self._examples = examples

    def go_on(
        self, stop_at_check: int | None = None, reason: StopReason = StopReason.PAUSED, **settings: Any
    ) -> TrainedSummary:
        context = FakeContext(self.work_dir, self.spec)
        context.stop_at_check, context.stop_reason = stop_at_check, reason
        self.work_dir.mkdir(exist_ok=True)
        try:
            return train(
                tuned(self._base, self.spec),
                self._examples[3:],
                self._examples[:3],
                self.spec,
                context,
                no_log,
                "cpu",
                checkpoints_of(context, **settings),
            )
        finally:
            self.progress += context.steps
            self.lines += context.lines
            self.context = context

    def facts(self) -> list[tuple[Any, ...]]:
        """What each step reported that does not depend on the clock. A step whose evaluation was broken off may be told
        twice, in the same words."""
        facts = [(p.step, p.loss, p.eval_loss, p.grad_norm, p.learning_rate, p.num_examples) for p in self.progress]
        return list(dict.fromkeys(facts))

    def end(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The last checkpoint: adapter, moments, chance by file, and the rest without its clock."""
        folder = self.work_dir / FOLDER / f"step-{self.spec.max_steps:08d}"
        progress = json.loads((folder / "progress.json").read_bytes())
        assert progress["position"].pop("seconds") > 0
        del progress["position"]["untold"], progress["position"]["selection"]  # a pause in the last step's evaluation
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}, progress


@pytest.mark.parametrize(
    ("family", "use_qlora", "every"),
    [("llama", False, 1), ("llama", False, 5), ("llama", True, 3), ("gpt2", True, 5), ("gpt2", False, 3)],
    ids=lambda value: str(value),
)
def test_a_run_that_is_paused_again_and_again_equals_one_that_never_was(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
    family: str,
    use_qlora: bool,
    every: int,
) -> None:
    """`every` checks later it must pause: in a window, between windows, in an evaluation."""
    twin = Run(bases[family], examples, tmp_path / "twin", use_qlora=use_qlora)
    expected = twin.go_on()
    run = Run(bases[family], examples, tmp_path / "run", use_qlora=use_qlora)
    stops = 0
    stop_at = every + 1
    while True:
        before = run.work_dir / FOLDER
        known = sorted(path.name for path in before.glob("step-*"))
        try:
            summary = run.go_on(stop_at)
        except JobStopped:
            stops += 1
            # What was redone of a window made no progress: give it one check more, or it would never end.
            stop_at = every + 1 if sorted(path.name for path in before.glob("step-*")) != known else stop_at + 1
        else:
            break
    assert stops >= 2
    assert run.facts() == twin.facts()
    assert run.end() == twin.end()
    assert (summary.loss, summary.num_steps, summary.num_tokens) == (
        expected.loss,
        expected.num_steps,
        expected.num_tokens,
    )
    assert any(line.startswith("goes on from the checkpoint after step") for line in run.lines)


@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.SUPERSEDED])
def test_who_must_not_go_on_writes_nothing(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
    reason: StopReason,
) -> None:
    run = Run(bases["llama"], examples, tmp_path / "run")
    with pytest.raises(JobStopped):
        run.go_on(5, reason)
    assert not list((run.work_dir / FOLDER).glob("step-*"))


def test_a_pause_before_the_first_step_starts_anew(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    run = Run(bases["llama"], examples, tmp_path / "run")
    with pytest.raises(JobStopped):
        run.go_on(1)
    assert run.context.checkpoints == []
    run.go_on()
    assert run.context.checkpoints == [6]


def test_checkpoints_come_as_often_as_asked(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    run = Run(bases["llama"], examples, tmp_path / "steps", save_steps=2, max_steps=7)
    run.go_on()
    assert run.context.checkpoints == [2, 4, 6, 7]
    assert sorted(path.name for path in (run.work_dir / FOLDER).glob("step-*")) == ["step-00000006", "step-00000007"]
    run = Run(bases["llama"], examples, tmp_path / "time", max_steps=3)
    run.go_on(checkpoint_seconds=1e-9)
    assert run.context.checkpoints[-1] == 3  # by time, but for 2 % of it: what lies between depends on the disk


def test_a_finished_training_is_not_trained_again(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    run = Run(bases["llama"], examples, tmp_path / "run")
    first = run.go_on()
    reported = len(run.progress)
    assert run.go_on() == first
    assert (len(run.progress), run.context.checkpoints) == (reported, [])


# --- whole or not at all ------------------------------------------------------------------------------------------


class Toy:
    """Two weights, an optimizer and a source of chance, moved a step at a time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {name: torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for name in ("a", "b")}
        self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=0.1, fused=True)
        self.masks = Masks(0)
        self.learned = Learned(self.weights, self.optimizer)

    def step(self, number: int) -> Boundary:
        for weight in self.weights.values():
            weight.grad = weight.detach() * number
        self.optimizer.step()
        self.masks.draw(torch.zeros(5), 0.5)
        return Boundary(Position(step=number, order=str(number)), Randomness.capture(self.masks, "cpu"))

    def resume(self, checkpoints: Checkpoints) -> Position:
        return checkpoints.resume(self.learned, self.masks, "cpu")


def _facts(seed: int = 1) -> dict[str, Any]:
    """What makes a training the one it is, afresh for every call."""
    spec = TrainingSpec(dataset="d", model="m", seed=seed)
    return {"spec": spec.model_dump(mode="json"), "base_digest": "x"}


def _store(context: FakeContext, facts: dict[str, Any] | None = None, **settings: Any) -> Checkpoints:
    values = {"data_dir": context.work_dir, "checkpoint_seconds": 1e-9}
    return Checkpoints(context, Settings(**values | settings), facts or _facts(), 1)


def _saved(work_dir: Path, *steps: int, facts: dict[str, Any] | None = None) -> FakeContext:
    """Checkpoints after these steps."""
    work_dir.mkdir(exist_ok=True)
    context, toy = FakeContext(work_dir), Toy()
    store = _store(context, facts)
    toy.resume(store)
    for step in steps:
        store.save(toy.learned, toy.step(step))
    assert context.checkpoints == list(steps)
    return context


def _names(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / FOLDER).glob("step-*"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _flip_first(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def _flip_late(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 0x10
    path.write_bytes(content)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", [*FILES, MARKER])
@pytest.mark.parametrize("damage", [_truncate, _empty, _zero, _flip_first, _flip_late, Path.unlink, _make_folder])
def test_the_one_before_is_used_where_the_newest_is_damaged(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    _saved(tmp_path / "work", 1, 2)
    damage(tmp_path / "work" / FOLDER / "step-00000002" / file)
    context, toy = FakeContext(tmp_path / "work"), Toy()
    store = _store(context)
    position = toy.resume(store)
    assert (position.step, position.order) == (1, "1")
    ((reason, message),) = context.warnings
    assert reason == DAMAGED
    assert "step-00000002" in message
    assert file in message or file == MARKER  # where it is the list that lies, it accuses another file
    assert "goes on from the checkpoint after step 1" in context.lines
    # The same step again takes its place, and is as good as the first.
    store.save(toy.learned, toy.step(2))
    assert _names(tmp_path / "work") == ["step-00000001", "step-00000002"]
    assert Toy().resume(_store(FakeContext(tmp_path / "work"))).step == 2


def test_everything_comes_back(tmp_path: Path) -> None:
    toy, context = Toy(), FakeContext(tmp_path)
    store = _store(context)
    toy.resume(store)
    for step in (1, 2, 3):
        boundary = toy.step(step)
    store.save(toy.learned, boundary)
    other = Toy()
    assert other.resume(_store(FakeContext(tmp_path))) == boundary.position
    assert other.masks.state() == toy.masks.state()
    for name, weight in toy.weights.items():
        assert torch.equal(weight, other.weights[name])
        for key, value in toy.optimizer.state[weight].items():
            assert torch.equal(value, other.optimizer.state[other.weights[name]][key])
    toy.step(4)
    other.step(4)
    assert all(torch.equal(weight, other.weights[name]) for name, weight in toy.weights.items())


def test_all_damaged_is_told_and_nothing_begins_anew(tmp_path: Path) -> None:
    _saved(tmp_path / "work", 1, 2)
    for name in _names(tmp_path / "work"):
        _flip_late(tmp_path / "work" / FOLDER / name / "exp_avg.safetensors")
    for _ in range(2):  # and again: nothing was taken away
        with pytest.raises(IntegrityError, match=r"all 2 are damaged .*step-00000002, step-00000001") as caught:
            Toy().resume(_store(FakeContext(tmp_path / "work")))
        assert caught.value.reason is Reason.CHECKPOINT_UNUSABLE


def test_a_checkpoint_that_the_store_knows_and_the_disk_does_not_is_missed(tmp_path: Path) -> None:
    context = FakeContext(tmp_path)
    context.job = context.job.model_copy(update={"checkpoint_step": 12})
    with pytest.raises(IntegrityError, match="after step 12 is gone"):
        Toy().resume(_store(context))


@pytest.mark.parametrize(
    ("facts", "changed"),
    [
        (_facts(seed=2), "spec.seed"),
        (_facts() | {"base_digest": "y"}, "base_digest"),
        (_facts() | {"dataset_digest": "z"}, "dataset_digest"),
    ],
    ids=["spec", "base", "dataset"],
)
def test_a_checkpoint_of_another_training_is_refused_by_what_changed(
    tmp_path: Path, facts: dict[str, Any], changed: str
) -> None:
    context = _saved(tmp_path, 1, 2)
    with pytest.raises(IntegrityError, match=f"{changed} changed") as caught:
        Toy().resume(Checkpoints(context, Settings(data_dir=tmp_path), facts, 1))
    assert caught.value.reason is Reason.CHECKPOINT_UNUSABLE
    assert _names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_of_an_older_release_is_gone_on_with(tmp_path: Path) -> None:
    """It does not know the fields that came later; they stand at their defaults."""
    older = _facts()
    del older["spec"]["save_steps"]
    context = _saved(tmp_path, 1, facts=older)
    assert Toy().resume(Checkpoints(context, Settings(data_dir=tmp_path), _facts(), 1)).step == 1


def test_an_attempt_that_comes_too_late_does_not_take_the_folder_over(tmp_path: Path) -> None:
    context = _saved(tmp_path, 1)
    context.job = context.job.model_copy(update={"attempt": 7})
    Toy().resume(Checkpoints(context, Settings(data_dir=tmp_path), _facts(), 1))
    context.job = context.job.model_copy(update={"attempt": 6})
    with pytest.raises(JobStopped) as caught:
        Toy().resume(Checkpoints(context, Settings(data_dir=tmp_path), _facts(), 1))
    assert caught.value.reason is StopReason.SUPERSEDED


def test_other_examples_than_before_are_noticed(
    bases: dict[str, Base],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    run = Run(bases["llama"], examples, tmp_path / "run")
    with pytest.raises(JobStopped):
        run.go_on(7)
    fewer = Run(bases["llama"], examples[:-2], tmp_path / "run")
    with pytest.raises(IntegrityError, match="other examples"):
        fewer.go_on()


def test_other_libraries_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from knowledge_engine.training import checkpoints

    monkeypatch.setattr(checkpoints, "version", lambda name: "0.0.1")
    _saved(tmp_path, 1)
    monkeypatch.undo()
    context = FakeContext(tmp_path)
    assert Toy().resume(_store(context)).step == 1
    ((reason, message),) = context.warnings
    assert reason == ENVIRONMENT_CHANGED
    assert "torch" in message


def test_another_number_of_threads_is_a_warning(tmp_path: Path) -> None:
    _saved(tmp_path, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        context = FakeContext(tmp_path)
        assert Toy().resume(_store(context)).step == 1
    finally:
        torch.set_num_threads(threads)
    assert [(reason, "threads changed" in message) for reason, message in context.warnings] == [
        (ENVIRONMENT_CHANGED, True)
    ]


def test_an_attempt_that_was_declared_dead_writes_nothing(tmp_path: Path) -> None:
    old, toy = FakeContext(tmp_path), Toy()
    old.job = old.job.model_copy(update={"attempt": 1})
    store = _store(old)
    toy.resume(store)
    store.save(toy.learned, toy.step(1))
    new = FakeContext(tmp_path)
    new.job = new.job.model_copy(update={"attempt": 2})
    newer = Toy()
    newer_store = _store(new)
    assert newer.resume(newer_store).step == 1
    with pytest.raises(JobStopped) as caught:
        store.save(toy.learned, toy.step(2))
    assert caught.value.reason is StopReason.SUPERSEDED
    assert _names(tmp_path) == ["step-00000001"]
    newer_store.save(newer.learned, newer.step(2))
    assert new.checkpoints == [2]


@pytest.mark.parametrize("where", ["weight", "moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_written_down(tmp_path: Path, where: str, value: float) -> None:
    toy = Toy()
    store = _store(FakeContext(tmp_path))
    toy.resume(store)
    store.save(toy.learned, toy.step(1))
    boundary = toy.step(2)
    weight = toy.weights["a"]
    tensor = weight.data if where == "weight" else toy.optimizer.state[weight]["exp_avg_sq"]
    tensor[1, 1] = value
    with pytest.raises(KnowledgeEngineError, match="no number") as caught:
        store.save(toy.learned, boundary)
    assert caught.value.reason is Reason.NON_FINITE
    assert _names(tmp_path) == ["step-00000001"]


def test_nothing_that_runs_when_it_is_read_lies_in_a_checkpoint(tmp_path: Path) -> None:
    _saved(tmp_path, 1)
    folder = tmp_path / FOLDER / "step-00000001"
    assert {path.name for path in folder.iterdir()} == {*FILES, MARKER}
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in [folder, *folder.iterdir()])


# --- killed at every place ----------------------------------------------------------------------------------------

_CHILD = """
import sys
from pathlib import Path
from tests.test_checkpoints import killed_job
killed_job(Path(sys.argv[1]), Path(sys.argv[2]))
"""
_KILLED = {"save_steps": 2, "eval_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def killed_job(root: Path, base: Path) -> None:
    """A whole job in this process; what it reports goes to a file line by line."""
    workshop = Workshop(root, base)
    with (root / "progress.jsonl").open("a", buffering=1) as file:
        workshop.run(report=lambda progress: print(progress.model_dump_json(), file=file), **_KILLED)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Base]) -> tuple[Path, list[Progress], bytes]:
    """Base, reports and weights of a job that nobody killed."""
    root = tmp_path_factory.mktemp("twin")
    base = bases["llama"].folder
    workshop = Workshop(root, base)
    _, context = workshop.run(**_KILLED)
    workshop.state.close()
    return base, context.steps, (root / "models" / "shop" / "1" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "place",
    [
        "checkpoint.file@9",
        *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in (
                "training.batch@1",
                "training.batch@10",
                "training.step@1",
                "training.step@4",
                "checkpoint.begin@1",
                "checkpoint.begin@2",
                "checkpoint.file@1",
                "checkpoint.file@12",
                "checkpoint.before_marker@2",
                "checkpoint.before_rename@2",
                "checkpoint.done@1",
                "checkpoint.done@3",
                "training.evaluation@1",
                "publish.begin@1",
                "publish.done@1",
            )
        ),
    ],
)
@pytest.mark.timeout(600)
def test_a_killed_job_ends_as_one_that_never_was(
    tmp_path: Path, twin: tuple[Path, list[Progress], bytes], place: str
) -> None:
    base, expected, weights = twin
    root = tmp_path / "data"
    root.mkdir()
    name, _, passing = place.partition("@")
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(root), str(base)],
        env=os.environ | {failpoints.VARIABLE: f"{name}=kill@{passing}"},
        cwd=ROOT,
        timeout=300,
        check=False,
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    before = [Progress.model_validate_json(line) for line in (root / "progress.jsonl").read_text().splitlines()]
    workshop = Workshop(root, base)
    result, context = workshop.run(**_KILLED)
    workshop.state.close()
    told = {p.step: (p.loss, p.eval_loss, p.num_examples) for p in expected}
    for progress in [*(p for p in before if p.phase == "training"), *context.steps]:
        assert told[progress.step] == (progress.loss, progress.eval_loss, progress.num_examples)
    steps = [p.step or 0 for p in context.steps]
    first_again = steps[0] if steps else 7
    reached = max((p.step or 0 for p in before if p.phase == "training"), default=0)
    assert reached + 1 - first_again <= 2  # no more than an interval is done twice
    assert (result.version, result.num_steps) == (1, 6)
    assert workshop.registry.get_model("shop").num_versions == 1
    assert (root / "models" / "shop" / "1" / "adapter_model.safetensors").read_bytes() == weights
    if place.startswith(("training.evaluation", "publish")):
        assert steps == []  # nothing is trained again for the sake of an evaluation or a publication


# --- a full disk --------------------------------------------------------------------------------------------------

OFFSETS = ["checkpoint.begin", "checkpoint.file@1", "checkpoint.file@6", "checkpoint.before_marker",
           "checkpoint.before_rename"]  # fmt: skip


@pytest.mark.parametrize("place", OFFSETS)
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, fail_at: Callable[[str], None], place: str
) -> None:
    context = _saved(tmp_path, 1)
    toy = Toy()
    store = _store(context)
    toy.resume(store)
    name, _, passing = place.partition("@")
    fail_at(f"{name}=enospc@{passing or 1}")
    store.save(toy.learned, toy.step(2))
    assert [reason for reason, _ in context.warnings] == ["DISK_FULL"]
    assert _names(tmp_path) == ["step-00000001"]
    assert Toy().resume(_store(FakeContext(tmp_path))).step == 1
    assert store.is_due(3)
    store.save(toy.learned, toy.step(3))  # there is room again
    assert _names(tmp_path) == ["step-00000001", "step-00000003"]


def test_the_third_full_disk_in_a_row_ends_the_run_with_the_last_good_checkpoint(
    tmp_path: Path, fail_at: Callable[[str], None]
) -> None:
    context = _saved(tmp_path, 1)
    toy = Toy()
    store = _store(context)
    toy.resume(store)
    fail_at("checkpoint.file=enospc")
    for step in (2, 3):
        store.save(toy.learned, toy.step(step))
    with pytest.raises(CapacityError, match=r"GB free.*jobs/job-1/checkpoints/step-00000001") as caught:
        store.save(toy.learned, toy.step(4))
    assert caught.value.reason is Reason.DISK_FULL
    assert int(caught.value.metadata["free_bytes"]) > 0
    assert [reason for reason, _ in context.warnings] == ["DISK_FULL"] * 2
    assert _names(tmp_path) == ["step-00000001"]
    store.save(toy.learned, toy.step(5), may_fail=True)  # a pause, or the end of the training: no reason to fail
    assert Toy().resume(_store(FakeContext(tmp_path))).step == 1


def test_tries_are_spaced(tmp_path: Path, fail_at: Callable[[str], None]) -> None:
    context = _saved(tmp_path, 1)
    toy = Toy()
    store = _store(context, checkpoint_seconds=3600)
    toy.resume(store)
    fail_at("checkpoint.begin=enospc")
    store.save(toy.learned, toy.step(2))
    assert not store.is_due(3)


def test_a_real_limit_is_a_full_disk(tmp_path: Path) -> None:
    context = _saved(tmp_path, 1)
    toy = Toy()
    store = _store(context)
    toy.resume(store)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        store.save(toy.learned, toy.step(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [reason for reason, _ in context.warnings] == ["DISK_FULL"]
    assert _names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("place", ["publish.begin", "training.evaluation"])
def test_no_room_elsewhere_in_a_job_is_told_as_that(
    workshop: Workshop, fail_at: Callable[[str], None], place: str
) -> None:
    """What is kept already is not given up so fast: three times it waits for room."""
    workshop.settings = workshop.settings.model_copy(update={"checkpoint_seconds": 0.01})
    fail_at(f"{place}=enospc")
    for _ in range(3):
        with pytest.raises(JobStopped) as stopped:
            workshop.run(use_qlora=False, max_steps=1)
        assert stopped.value.reason is StopReason.RETRY
    with pytest.raises(CapacityError, match=r"No space left on device.*GB free") as caught:
        workshop.run(use_qlora=False, max_steps=1)
    assert caught.value.reason is Reason.DISK_FULL
    fail_at("")
    result, context = workshop.run(use_qlora=False, max_steps=1)
    assert (result.version, context.steps) == (1, [])  # nothing was lost


def test_an_adapter_that_does_not_fit_on_the_disk_is_told_as_that(
    workshop: Workshop, fail_at: Callable[[str], None]
) -> None:
    """PEFT's own writer, which has an error of its own for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    workshop.state.close()

    def limit(progress: Progress) -> None:
        if progress.phase == "training":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(CapacityError, match="the job could not write its files") as caught:
            workshop.run(use_qlora=False, max_steps=1, report=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.reason is Reason.DISK_FULL


# --- too little memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("training.load", "halve per_device_train_batch_size to 2"),
        ("training.batch@1", "halve per_device_train_batch_size to 2"),
        ("training.evaluation", "halve per_device_train_batch_size to 2"),
        ("checkpoint.begin", "halve per_device_train_batch_size to 2"),
    ],
)
def test_too_little_memory_is_told_with_figures_and_advice(
    workshop: Workshop, fail_at: Callable[[str], None], place: str, advice: str
) -> None:
    name, _, passing = place.partition("@")
    fail_at(f"{name}=oom@{passing or 1}")
    with pytest.raises(KnowledgeEngineError, match="GiB") as caught:
        workshop.run(use_qlora=False, max_steps=2, per_device_train_batch_size=4)
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert advice in caught.value.message
    assert int(caught.value.metadata["longest_row"]) > 10
    assert int(caught.value.metadata["held_bytes"]) > 10**8


def test_too_little_memory_to_go_on_is_told(workshop: Workshop, fail_at: Callable[[str], None]) -> None:
    fail_at("training.step=fail@3")
    changes = {"use_qlora": False, "save_steps": 1}
    with pytest.raises(RuntimeError):
        workshop.run(**changes)
    fail_at("training.load=oom")
    with pytest.raises(KnowledgeEngineError, match="set use_qlora") as caught:
        workshop.run(**changes)
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    fail_at("")
    _, context = workshop.run(**changes)
    assert [event.step for event in context.steps] == [3, 4, 5, 6]


def test_memory_gets_one_second_chance_at_half_the_micro_batch(
    workshop: Workshop, fail_at: Callable[[str], None]
) -> None:
    changes = {"use_qlora": False, "per_device_train_batch_size": 4, "auto_find_batch_size": True, "save_steps": 1}
    changes |= {"lora": {"dropout": 0.0}, "max_steps": 4}
    twin, context = workshop.run(**changes, model="twin")
    expected = [event.loss for event in context.steps]
    shutil.rmtree(workshop.work_dir / FOLDER)

    fail_at("training.batch=oom@3")
    with pytest.raises(JobStopped, match="goes on with 2") as caught:
        workshop.run(**changes)
    assert caught.value.reason is StopReason.RETRY
    assert [reason for reason, _ in workshop.context.warnings] == ["OUT_OF_MEMORY"]
    losses = [event.loss for event in workshop.context.steps]
    fail_at("training.batch=oom@3")  # the second step of the next attempt: two halves each
    with pytest.raises(KnowledgeEngineError, match="micro-batch 2") as failed:
        workshop.run(**changes)
    assert failed.value.reason is Reason.OUT_OF_MEMORY
    losses += [event.loss for event in workshop.context.steps]
    fail_at("")
    result, context = workshop.run(**changes)
    losses += [event.loss for event in context.steps]
    # The same conversations in every step, computed in smaller parts.
    assert losses == pytest.approx(expected, abs=1e-4)
    assert result.num_tokens == twin.num_tokens


def test_one_conversation_at_once_gets_its_second_chance_with_gradient_checkpointing(
    workshop: Workshop, fail_at: Callable[[str], None]
) -> None:
    changes = {"use_qlora": False, "per_device_train_batch_size": 1, "auto_find_batch_size": True, "save_steps": 1}
    changes |= {"lora": {"dropout": 0.1}, "max_steps": 4}
    workshop.run(**changes, model="twin")
    expected = [event.loss for event in workshop.context.steps]
    shutil.rmtree(workshop.work_dir / FOLDER)

    fail_at("training.batch=oom@3")
    with pytest.raises(JobStopped, match="gradient checkpointing") as caught:
        workshop.run(**changes)
    assert caught.value.reason is StopReason.RETRY
    losses = [event.loss for event in workshop.context.steps]
    fail_at("training.batch=oom@2")
    with pytest.raises(KnowledgeEngineError, match="memory ran out") as failed:
        workshop.run(**changes)
    assert failed.value.reason is Reason.OUT_OF_MEMORY
    losses += [event.loss for event in workshop.context.steps]
    fail_at("")
    workshop.run(**changes)
    assert any("computed twice" in line for line in workshop.context.lines)
    losses += [event.loss for event in workshop.context.steps]
    assert losses == expected  # to the last bit


def test_the_allocators_own_words_are_understood(tmp_path: Path) -> None:
    context = FakeContext(tmp_path)
    shortages = Shortages(context, Settings(data_dir=tmp_path), SPEC, "cpu")
    words = "a smaller base model, or use_qlora, needs less"
    with pytest.raises(KnowledgeEngineError, match=words) as caught, shortages.told():
        torch.empty(10**15)
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="shape"), shortages.told():
        torch.zeros(2).view(3)


# --- numbers that break down --------------------------------------------------------------------------------------


def test_a_loss_stuck_at_zero_ends_the_run(bases: dict[str, Base], tmp_path: Path) -> None:
    """A head so sure of one token that its loss is 0 in 32 bits, as a collapsed half-precision run shows it."""
    token = 7
    spec = SPEC.model_copy(update={"max_steps": 20, "save_steps": 1})
    model = tuned(bases["gpt2"], spec)
    body, _ = modeling.body_and_head(model)
    body.ln_f.weight.data.zero_()
    body.ln_f.bias.data.copy_(1e4 * body.wte.weight.data[token])
    sure = Example([token] * 6, [(0, 1)] * 6, [False] + [True] * 5)
    context = FakeContext(tmp_path, spec)
    with pytest.raises(KnowledgeEngineError, match="stuck at 0") as caught:
        train(model, [sure] * 4, [], spec, context, no_log, "cpu", checkpoints_of(context))
    assert (caught.value.reason, caught.value.metadata["step"]) == (Reason.NON_FINITE, "5")
    assert context.checkpoints == []  # of what is broken nothing is kept


def test_the_last_good_checkpoint_outlives_a_loss_that_is_no_number(workshop: Workshop) -> None:
    changes = {"use_qlora": False, "save_steps": 2, "max_steps": 30, "learning_rate": 1.0, "max_grad_norm": 0}
    changes |= {"lora": {"alpha": 1024, "rank": 1}}

    def poison(progress: Progress) -> None:
        if progress.phase == "training" and progress.step == 5:
            for thing in _adapters():
                thing.data.fill_(float("nan"))

    with pytest.raises(KnowledgeEngineError, match=r"step 6.*jobs/job-1/checkpoints/step-00000004") as caught:
        workshop.run(report=poison, **changes)
    assert caught.value.reason is Reason.NON_FINITE
    folder = workshop.work_dir / FOLDER / "step-00000004"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "adapter.safetensors").values())


def _adapters() -> list[torch.nn.Parameter]:
    """The trained weights of whatever model lives in this process."""
    import gc

    return [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter and thing.requires_grad]


def test_a_boundary_stays_what_it_was(tmp_path: Path) -> None:
    """Chance that is drawn after it does not move it."""
    toy = Toy()
    boundary = toy.step(1)
    frozen = replace(boundary, randomness=Randomness(boundary.randomness.masks, {"cpu": torch.get_rng_state()}))
    toy.masks.draw(torch.zeros(100), 0.5)
    torch.rand(3)
    assert boundary.randomness.masks == frozen.randomness.masks
    assert torch.equal(boundary.randomness.torch["cpu"], frozen.randomness.torch["cpu"])
