"""Checkpoints: all that a training needs to go on as if it had never stopped, on disk whole or not at all.

One is a folder `<work_dir>/checkpoints/step-00000012`, of the state after 12 optimizer steps: tensors as safetensors,
the rest as JSON, and `complete.json` with the digest of each file, written last. It is filled under another name and
renamed once every byte is durable. The two newest stay, so that damage to one costs an interval and not the run.
The folder belongs to the newest attempt of the job: one that was declared dead and wakes up writes nothing here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from knowledge_engine.core import JobContext, JobStopped, StopReason, TrainingSpec
from knowledge_engine.errors import IntegrityError, KnowledgeEngineError, Reason, from_dict
from knowledge_engine.failpoints import failpoint
from knowledge_engine.files import read_json, replace_durably, sync, write_durably
from knowledge_engine.settings import Settings
from knowledge_engine.training.dropout import Masks
from knowledge_engine.training.plan import CHECKPOINTS
from knowledge_engine.training.publishing import LIBRARIES
from knowledge_engine.training.shortages import disk_full, is_disk_full

FOLDER = CHECKPOINTS
MARKER = "complete.json"
DAMAGED = "CHECKPOINT_DAMAGED"
FAILED = "CHECKPOINT_FAILED"
ENVIRONMENT_CHANGED = "CHECKPOINT_ENVIRONMENT_CHANGED"

_ADAPTER, _RANDOM, _PROGRESS = "adapter.safetensors", "random.safetensors", "progress.json"
_BEST = "best.safetensors"
_MOMENTS = {name: f"{name}.safetensors" for name in ("exp_avg", "exp_avg_sq", "step")}
FILES = (_ADAPTER, *_MOMENTS.values(), _RANDOM, _PROGRESS)
_OWNER = "attempt.json"
_NAME = re.compile(r"step-(\d{8,})")
_KEPT = 2
_SHARE = 50
"""By time, one is due no sooner than so many times what the last one took: 2 % of the time."""
_MAX_FAILURES = 3
_RESERVE_BYTES = 64 * 2**20

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step came to; `loss` is summed over its trained tokens, in nats."""

    step: int
    loss: float
    num_trained: int
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True)
class Selection:
    """What the evaluations so far have shown: the step with the lowest loss, 0 before the first, and how many
    evaluations there were since."""

    step: int = 0
    loss: float | None = None
    num_worse: int = 0

    def after(self, step: int, loss: float) -> Selection:
        return (
            Selection(step, loss, 0)
            if self.loss is None or loss < self.loss
            else replace(self, num_worse=self.num_worse + 1)
        )


@dataclass(frozen=True)
class Position:
    """Where a training stands between two optimizer steps, but for its tensors."""

    step: int = 0
    order: str = hashlib.sha256().hexdigest()
    """Digest of which examples went into which step so far."""
    num_examples: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    recent: tuple[tuple[float, int], ...] = ()
    """Summed loss and trained tokens of the newest steps, one epoch at most."""
    num_zeros: int = 0
    """How many steps in a row had a loss of 0."""
    untold: StepResult | None = None
    """The newest step, where it is not evaluated and reported yet."""
    selection: Selection = Selection()


@dataclass(frozen=True)
class Randomness:
    """Every source of chance: dropout's own on the CPU, and torch's."""

    masks: tuple[int, ...]
    torch: Mapping[str, torch.Tensor]

    @classmethod
    def capture(cls, masks: Masks, device: str) -> Randomness:
        states = {"cpu": torch.get_rng_state()}
        if device.startswith("cuda"):
            states["cuda"] = torch.cuda.get_rng_state(device)
        return cls(masks.state(), states)

    def restore(self, masks: Masks, device: str) -> None:
        masks.restore(self.masks)
        torch.set_rng_state(self.torch["cpu"])
        if device.startswith("cuda") and "cuda" in self.torch:
            torch.cuda.set_rng_state(self.torch["cuda"], device)


@dataclass(frozen=True)
class Boundary:
    """A moment between two optimizer steps, to be written down as long as no further step is taken."""

    position: Position
    randomness: Randomness


class Learned:
    """The trained weights by name, and what AdamW remembers of each."""

    def __init__(self, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.AdamW) -> None:
        self._weights = weights
        self._optimizer = optimizer

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """By file and name, on the CPU. A weight that was never moved has moments of zero, as AdamW begins."""
        files = {_ADAPTER: {name: weight.detach().cpu().contiguous() for name, weight in self._weights.items()}}
        for key, file in _MOMENTS.items():
            files[file] = {
                name: self._moment(weight, key).detach().cpu().contiguous() for name, weight in self._weights.items()
            }
        return files

    def difference(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
        """How these tensors differ in name, shape or type from ours, in a few words; empty when they do not."""
        ours_by_file = self.tensors()
        if _BEST in files:
            ours_by_file[_BEST] = ours_by_file[_ADAPTER]
        for file, ours in ours_by_file.items():
            theirs = files[file]
            if ours.keys() != theirs.keys():
                return f"{file} holds other tensors than this model trains"
            for name, tensor in ours.items():
                if (tensor.shape, tensor.dtype) != (theirs[name].shape, theirs[name].dtype):
                    return f"{file} holds {name} in another shape or type"
        return ""

    @torch.no_grad()
    def restore(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(files[_ADAPTER][name])
            self._optimizer.state[weight] = {
                key: files[file][name].to(weight.device, copy=True) for key, file in _MOMENTS.items()
            }

    def _moment(self, weight: torch.Tensor, key: str) -> torch.Tensor:
        state = self._optimizer.state.get(weight)
        if state:
            return state[key]  # type: ignore[no-any-return]
        return torch.zeros(()) if key == "step" else torch.zeros_like(weight)


class Best:
    """The weights of the step that did best in evaluation, beside those that go on learning; at first they are the
    same."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self.tensors: dict[str, torch.Tensor] = {}
        self.take()

    def take(self) -> None:
        """The present weights are the best."""
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As a checkpoint has them."""
        self.tensors = {name: tensor.to(self._weights[name].device) for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """The best weights become the present ones."""
        for name, weight in self._weights.items():
            weight.copy_(self.tensors[name])


class Checkpoints:
    """The checkpoints of one job, as one attempt of it sees them.

    `facts` are what makes two trainings the same; a checkpoint of other facts is refused. `save_steps` 0 saves by time.
    """

    def __init__(self, context: JobContext, settings: Settings, facts: Mapping[str, Any], save_steps: int) -> None:
        self._context = context
        self._facts = json.loads(json.dumps(facts))
        self._seconds = settings.checkpoint_seconds
        self._num_devices = settings.training_devices
        self._save_steps = save_steps
        self._root = context.work_dir / FOLDER
        self.newest_step = 0
        self._damaged: list[Path] = []
        self._saved_time = time.monotonic()
        self._took_seconds = 0.0
        self._num_failures = 0
        self._try_again_time: float | None = None

    @property
    def newest(self) -> str:
        """Where the newest sound one lies, as seen from the data directory; empty when there is none."""
        return f"jobs/{self._context.job.id}/{FOLDER}/{_name(self.newest_step)}" if self.newest_step else ""

    def resume(self, learned: Learned, masks: Masks, device: str, best: Best | None = None) -> Position:
        """Puts everything back as the newest sound checkpoint has it; position 0 where there never was one.

        Raises:
            IntegrityError: CHECKPOINT_UNUSABLE: none of them is sound, or they belong to another training.
        """
        self._take_over()
        for path in sorted(self._folders(), reverse=True):
            try:
                files, position, randomness = self._read(path, learned, device, has_best=best is not None)
            except _DamagedError as damage:
                self._damaged.append(path)
                self._context.warn(DAMAGED, f"the checkpoint {path.name} is damaged and is passed over: {damage}")
                continue
            if position.step < (self._context.job.checkpoint_step or 0) and not self._damaged:
                missing = f"the checkpoint after step {self._context.job.checkpoint_step} is gone"
                self._context.warn(DAMAGED, f"{missing}; the one before it is used")
            learned.restore(files)
            if best is not None:
                best.put(files[_BEST])
            randomness.restore(masks, device)
            self.newest_step = position.step
            self._context.log(f"goes on from the checkpoint after step {position.step}")
            return position
        if self._damaged or self._context.job.checkpoint_step:
            raise self._unusable(
                f"all {len(self._damaged)} are damaged ({', '.join(path.name for path in self._damaged)})"
                if self._damaged
                else f"the one after step {self._context.job.checkpoint_step} is gone"
            )
        return Position()

    def check_order(self, position: Position, order: str) -> None:
        """Raises IntegrityError: CHECKPOINT_UNUSABLE, unless `order` is that of the examples up to this position."""
        if order != position.order:
            raise self._unusable(f"the first {position.step} steps would now get other examples, or in another order")

    def is_due(self, step: int) -> bool:
        now = time.monotonic()
        if self._try_again_time is not None:
            return now >= self._try_again_time
        if self._save_steps:
            return step % self._save_steps == 0
        return now - self._saved_time >= max(self._seconds, _SHARE * self._took_seconds)

    def save(self, learned: Learned, boundary: Boundary, best: Best | None = None, *, may_fail: bool = False) -> None:
        """Returns once it would survive a power cut, or has been put off because the disk is full. One that is there
        already is not written again. With `may_fail`, a full disk is a warning however often it has been full.

        Raises:
            CapacityError: DISK_FULL, at the third time in a row.
            KnowledgeEngineError: NON_FINITE, there is a value in it that is no number; nothing is written.
            JobStopped: SUPERSEDED, another attempt has the job.
        """
        step = boundary.position.step
        if step <= self.newest_step:
            return
        began = time.monotonic()
        contents = self._contents(learned, boundary, best)
        try:
            size_bytes = self._write(step, contents)
        except JobStopped:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            self._demand_ownership()
            self._put_off(step, error, may_fail=may_fail)
            return
        self._num_failures, self._try_again_time = 0, None
        self.newest_step = step
        self._saved_time = time.monotonic()
        self._took_seconds = self._saved_time - began
        failpoint("checkpoint.done")
        self._context.checkpointed(step, size_bytes)
        self._retire(step)

    # --- writing --------------------------------------------------------------------------------------------------

    def _contents(self, learned: Learned, boundary: Boundary, best: Best | None) -> dict[str, bytes]:
        """By file. Made before the first byte is written: memory that runs out leaves nothing on the disk."""
        tensors = learned.tensors()
        if best is not None:
            tensors[_BEST] = {name: tensor.cpu().contiguous() for name, tensor in best.tensors.items()}
        for file, named in tensors.items():
            for name, tensor in named.items():
                if not torch.isfinite(tensor).all():
                    raise KnowledgeEngineError(
                        f"after step {boundary.position.step}, {name} holds a value that is no number ({file}); a "
                        "lower learning_rate usually helps",
                        reason=Reason.NON_FINITE,
                        step=boundary.position.step,
                        quantity=name,
                    )
        contents = {file: save(named) for file, named in tensors.items()}
        contents[_RANDOM] = save(dict(boundary.randomness.torch))
        progress = {
            "position": asdict(boundary.position),
            "masks": list(boundary.randomness.masks),
            "facts": self._facts,
            "environment": _environment(self._num_devices),
        }
        contents[_PROGRESS] = json.dumps(progress, indent=1).encode()
        return contents

    def _write(self, step: int, contents: Mapping[str, bytes]) -> int:
        """Returns its size in bytes."""
        size_bytes = sum(map(len, contents.values()))
        if shutil.disk_usage(self._root).free < size_bytes + _RESERVE_BYTES:  # the store needs some of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial, target = self._partial(step), self._root / _name(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        failpoint("checkpoint.begin")
        for file, content in contents.items():
            write_durably(partial / file, content)
            failpoint("checkpoint.file")
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        failpoint("checkpoint.before_marker")
        write_durably(partial / MARKER, json.dumps({"files": digests}, indent=1).encode())
        sync(partial)
        failpoint("checkpoint.before_rename")
        self._demand_ownership()
        if target.exists():  # damaged, or we would have gone on from it
            shutil.rmtree(target)
        partial.rename(target)
        sync(self._root)
        return size_bytes

    def _put_off(self, step: int, error: OSError, *, may_fail: bool) -> None:
        self._num_failures += 1
        if self._num_failures >= _MAX_FAILURES and not may_fail:
            if not is_disk_full(error):
                raise error
            raise self.with_whereabouts(disk_full(error, self._root, f"{_MAX_FAILURES} checkpoints in a row failed"))
        self._try_again_time = time.monotonic() + self._seconds
        self._context.warn(
            Reason.DISK_FULL.value if is_disk_full(error) else FAILED,
            f"the checkpoint after step {step} could not be written ({os.strerror(error.errno or 0)}); "
            + (
                f"from here the job can only go on from step {self.newest_step}"
                if may_fail
                else f"training goes on, and the next one is tried in {self._seconds:g} s"
            ),
        )

    def _retire(self, step: int) -> None:
        """Takes away the oldest; also what was damaged, now that there is something newer than it."""
        sound = sorted(path for path in self._folders() if path not in self._damaged and _step(path) < step)
        for path in [*sound[: 1 - _KEPT], *(path for path in self._damaged if _step(path) != step)]:
            shutil.rmtree(path, ignore_errors=True)
        self._damaged = []

    def with_whereabouts(self, error: KnowledgeEngineError) -> KnowledgeEngineError:
        """The error, and where the last good checkpoint is."""
        if not self.newest:
            return error
        message = f"{error.message}; the last good checkpoint is {self.newest} in the data directory"
        metadata = error.metadata | {"checkpoint": self.newest}
        return from_dict(error.to_dict() | {"message": message, "metadata": metadata})

    # --- reading --------------------------------------------------------------------------------------------------

    def _read(
        self, path: Path, learned: Learned, device: str, *, has_best: bool
    ) -> tuple[dict[str, dict[str, torch.Tensor]], Position, Randomness]:
        """Raises _DamagedError; IntegrityError: CHECKPOINT_UNUSABLE, it is sound and belongs to another training."""
        contents = _sound_contents(path)
        if has_best is not (_BEST in contents):
            raise _DamagedError(f"{_BEST} is {'missing' if has_best else 'not expected'}")
        kept = (_ADAPTER, *_MOMENTS.values(), *((_BEST,) if has_best else ()))
        try:
            progress = json.loads(contents[_PROGRESS])
            files = {file: load(contents[file]) for file in kept}
            randomness = Randomness(tuple(progress["masks"]), load(contents[_RANDOM]))
            position = _POSITION.validate_python(progress["position"])
            facts, environment = _completed(progress["facts"]), progress["environment"]
        except (ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
            raise _DamagedError(f"its content cannot be read ({type(error).__name__})") from error
        if facts != self._facts:
            raise self._unusable(f"{_changed(facts, self._facts)} changed since {path.name} was written")
        if position.step != _step(path):
            raise _DamagedError(f"it holds step {position.step}")
        if problem := learned.difference(files):
            raise _DamagedError(problem)
        now = {
            name: value for name, value in _environment(self._num_devices).items() if name in environment
        }  # older ones say less
        if changed := _changed(environment, now):
            self._context.warn(
                ENVIRONMENT_CHANGED,
                f"{changed} changed since the checkpoint was written: the losses may differ a little from those of an "
                "uninterrupted run",
            )
        return files, position, randomness

    # --- the folder -----------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """From now on no earlier attempt writes here; what those left half done is gone."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if read_json(self._root / _OWNER).get("attempt", 0) > self._context.job.attempt:
            raise JobStopped(StopReason.SUPERSEDED)
        replace_durably(self._root / _OWNER, json.dumps({"attempt": self._context.job.attempt}).encode())
        for partial in self._root.glob("step-*.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)
        for folder in (self._root, self._root.parent, self._root.parent.parent):
            sync(folder)

    def _demand_ownership(self) -> None:
        owner = json.loads((self._root / _OWNER).read_bytes())["attempt"]
        if owner != self._context.job.attempt:
            raise JobStopped(StopReason.SUPERSEDED)

    def _folders(self) -> list[Path]:
        return [path for path in self._root.iterdir() if _NAME.fullmatch(path.name)]

    def _partial(self, step: int) -> Path:
        return self._root / f"{_name(step)}.partial-{self._context.job.attempt}"

    def _unusable(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"this training cannot go on from its checkpoints in jobs/{self._context.job.id}/{FOLDER}: {why}; create "
            "the job again to train from the start",
            reason=Reason.CHECKPOINT_UNUSABLE,
            folder=f"jobs/{self._context.job.id}/{FOLDER}",
            problem=why,
        )


class _DamagedError(Exception):
    """What is wrong with a checkpoint, in one sentence that names the file."""


_POSITION = TypeAdapter(Position)


def told(boundary: Boundary, eval_loss: float | None, best: Best | None) -> Boundary:
    """The same moment, once its step is evaluated and reported; `best` follows the lowest loss."""
    position = boundary.position
    if eval_loss is not None:
        position = replace(position, selection=position.selection.after(position.step, eval_loss))
        if best is not None and position.selection.step == position.step:
            best.take()
    return replace(boundary, position=replace(position, untold=None))


def _sound_contents(path: Path) -> dict[str, bytes]:
    """Every file's bytes as they were written. Raises _DamagedError."""
    try:
        listed = json.loads((path / MARKER).read_bytes())["files"]
        if set(listed) - {_BEST} != set(FILES):
            raise ValueError
    except OSError as error:
        raise _DamagedError(f"{MARKER} cannot be read ({os.strerror(error.errno or 0)})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{MARKER} is no list of its files") from error
    contents: dict[str, bytes] = {}
    for file in listed:
        try:
            contents[file] = (path / file).read_bytes()
        except OSError as error:
            raise _DamagedError(f"{file} cannot be read ({os.strerror(error.errno or 0)})") from error
        if hashlib.sha256(contents[file]).hexdigest() != listed[file]:
            raise _DamagedError(f"{file} is not what was written")
    return contents


def _completed(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as an older release wrote them, with the defaults of what it did not know."""
    return facts | {"spec": TrainingSpec.model_validate(facts["spec"]).model_dump(mode="json")}


def _environment(num_devices: int) -> dict[str, Any]:
    """What may change the last digits of a loss, and nothing else."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}
    return {"device": device, "devices": num_devices} | threads | {name: version(name) for name in LIBRARIES}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """The names of what differs, those of nested values with a dot."""
    names: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            names.append(_changed(old, new, f"{prefix}{key}."))
        elif old != new:
            names.append(f"{prefix}{key}")
    return ", ".join(names)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
