"""One training on several devices of this machine: a process for each, which all take the same steps.

Every rank holds the whole adapter and a share of the base's linear weights, which FSDP2 gathers layer by layer when
needed; each computes a share of a step's examples, and the gradients of the adapter are summed over all. Rank 0 is the
job's worker: it alone reports, writes and decides. It starts the others (`follower.py`), which end with it, and answers
for them. Decision record 0023 says why so.

The only user of accelerate and of torch.distributed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import fsdp2_prepare_model
from torch import distributed, nn

from knowledge_engine import devices, modeling
from knowledge_engine.bases import Base
from knowledge_engine.core import Job, JobContext, JobStopped, TrainingSpec
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason, from_dict
from knowledge_engine.failpoints import failpoint
from knowledge_engine.modeling import PeftModel
from knowledge_engine.processes import count_oom_kills, describe_exit
from knowledge_engine.settings import Settings
from knowledge_engine.training.checkpoints import Best, Learned, Position
from knowledge_engine.training.data import Batch
from knowledge_engine.training.dropout import Masks
from knowledge_engine.training.material import Item
from knowledge_engine.training.plan import deal_window

FOLDER = "ranks"
"""Of an attempt, in the job's work folder and with the attempt's number: what its ranks share."""
CONFIGURATION = "accelerate.yaml"
PATIENCE_SECONDS = 600.0
"""A rank that others have waited for so long is given up; they wait for rank 0 while it writes a checkpoint, too."""
_NOTICE_SECONDS = 120.0
"""A failure of another rank ends a worker that has not noticed it by then: it waits for something that never comes."""
_LAST_WORDS_SECONDS = 5.0
_POLL_SECONDS = 0.05
_BACKENDS = {devices.CPU: "gloo", devices.CUDA: "cpu:gloo,cuda:nccl"}
_INTERFACE = "GLOO_SOCKET_IFNAME"
_STORE, _FAILURE = "store", "failure.json"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What every rank is told of the training."""

    job: Job
    spec: TrainingSpec
    base: Base
    start: Path | None
    """The adapter that it goes on from."""
    train: Sequence[Item]
    held_out: Sequence[Item]
    device: str
    micro_batch: int
    gradient_checkpointing: bool


class Ranks:
    """How many take part in a training, and which of them this process is. One alone exchanges nothing."""

    def __init__(
        self, num: int = 1, index: int = 0, folder: Path | None = None, demand_others: Callable[[], None] | None = None
    ) -> None:
        self.num = num
        self.index = index
        self._folder = folder
        self._demand_others = demand_others or (lambda: None)

    def parts(
        self,
        window: Sequence[Sequence[int]],
        lengths: Sequence[int],
        split: Callable[[Sequence[int]], list[list[int]]],
    ) -> list[tuple[list[int], int]]:
        """The examples of an optimizer step that this rank computes at once, as `split` parts what it is dealt, and how
        often they count.

        All ranks have as many parts, because they gather weights together: what one lacks is filled up with the
        shortest example, which counts 0 times.
        """
        dealt = [split(hand) for hand in deal_window(window, lengths, self.num)]
        shortest = min((index for batch in window for index in batch), key=lambda index: lengths[index])
        num_lacking = max(map(len, dealt)) - len(dealt[self.index])
        return [*((part, 1) for part in dealt[self.index]), *[([shortest], 0)] * num_lacking]

    def toss(self, masks: Masks, seed: int, step: int) -> None:
        """Begins a step's chance anew for every rank, so that a checkpoint need not keep that of each."""
        if self.num > 1:
            own = int.from_bytes(hashlib.sha256(f"{seed} {step} {self.index}".encode()).digest()[:7], "big")
            masks.restore(Masks(own).state())
            torch.manual_seed(own)

    def add_up(self, weights: Iterable[torch.Tensor], loss: float) -> float:
        """Sums the gradients of `weights` over all ranks, in place; returns the sum of their losses. Raises as
        `together` does."""
        if self.num == 1:
            return loss
        if self.index:
            failpoint("follower.step")
        for weight in weights:
            if weight.grad is not None:
                distributed.all_reduce(weight.grad)
        total = self._totals(loss)[0]
        self._demand_others()  # before a step is taken: sums that were broken off are worth nothing
        return total

    def mean_loss(self, batches: Iterable[Batch], measure: Callable[[Iterable[Batch]], tuple[float, int]]) -> float:
        """The mean over all batches, of which each rank measures some; the same number on every rank.

        `measure` returns a mean, and over how many it is.
        """
        if self.num == 1:
            return measure(batches)[0]
        everything = [*batches]
        mine = everything[self.index :: self.num]
        mean, num_units = measure(mine) if mine else (0.0, 0)
        if len(mine) < math.ceil(len(everything) / self.num):  # others gather weights once more
            measure(everything[:1])
        total, num_all = self._totals(mean * num_units, num_units)
        return total / num_all

    def agree(self, position: Position, learned: Learned, best: Best | None) -> Position:
        """Puts every rank where rank 0 stands, and returns that."""
        if self.num == 1:
            return position
        tensors = None if best is None else {name: tensor.cpu() for name, tensor in best.tensors.items()}
        position, files, tensors = self.broadcast((position, learned.tensors(), tensors) if self.index == 0 else None)
        if self.index:
            learned.restore(files)
            if best is not None and tensors is not None:
                best.put(tensors)
        return position

    def broadcast(self, said: Any) -> Any:
        """What rank 0 says; what others would is not asked."""
        box = [said]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def meet(self, place: str, check: Callable[[], None]) -> None:
        """Waits until every rank is at this place, however long the slowest takes. `check` may raise meanwhile.

        Raises:
            KnowledgeEngineError, MemoryError, SystemExit: another rank has failed, as `together` says.
        """
        if self._folder is None:
            return
        (self._folder / f"{place}-{self.index}").touch()
        while not all((self._folder / f"{place}-{index}").exists() for index in range(self.num)):
            check()
            self._demand_others()
            time.sleep(_POLL_SECONDS)

    def share_out(self, model: PeftModel) -> None:
        """Leaves to each rank its share of the weights of linear modules that are not trained. Norms, embeddings and
        the head stay whole: other code reads them outside of their modules, and they are few."""
        if self._folder is None:
            return
        body, _ = modeling.body_and_head(model)
        shared = {id(module.weight) for module in modeling.frozen_linears(body)}
        plugin = read_plugin(self._folder / CONFIGURATION)
        plugin.ignored_modules = [nn.ParameterList(w for w in body.parameters() if id(w) not in shared)]
        # All that accelerate reads of its own Accelerator, which shares out nothing on a CPU.
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            is_main_process=self.index == 0,
            device=next(body.parameters()).device,
        )
        fsdp2_prepare_model(accelerator, body)
        # It fears for hooks on what a layer returns; nothing changes that in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)

    def _totals(self, *values: float) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(totals)
        return totals.tolist()


ALONE = Ranks()


def demand_devices(settings: Settings, device: str) -> None:
    """Raises InvalidSpecError: SETTINGS_INVALID, there are fewer than a training shall have. On a CPU a rank is a
    process and nothing more."""
    num, there = settings.training_devices, torch.cuda.device_count()
    if device != devices.CPU and num > there:
        raise InvalidSpecError(
            f"KNOWLEDGE_TRAINING_DEVICES: {num} are asked for and this machine has {there}",
            reason=Reason.SETTINGS_INVALID,
        )


def load_tuned(task: Task, ranks: Ranks, check: Callable[[], None]) -> PeftModel:
    """The base with the adapter to train, ready for this rank. Raises as `modeling` does, and what `check` raises."""
    precision = modeling.training_precision(task.device, use_qlora=task.spec.use_qlora)
    model = modeling.load_base(task.base, precision, task.device, is_shared_out=ranks.num > 1)
    check()
    tuned = modeling.attach_lora(model, task.spec.lora, task.spec.seed)
    if task.start is not None:
        modeling.load_adapter(tuned, task.start)
    ranks.meet("loaded", check)
    ranks.share_out(tuned)
    return tuned


def write_configuration(path: Path, num: int, device: str) -> None:
    """accelerate's own file for these ranks. Every one of them takes from it how the base is shared out."""
    ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type="FSDP",
        mixed_precision="no",  # the base has its precision already, and the adapter keeps float32
        use_cpu=device == devices.CPU,
        debug=False,
        num_processes=num,
        fsdp_config={
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # by the layers that the model names itself
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": False,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": False,
        },
    ).to_yaml_file(path)


def read_plugin(path: Path) -> FullyShardedDataParallelPlugin:
    """What accelerate makes of the file."""
    values = ClusterConfig.from_yaml_file(path).fsdp_config
    return FullyShardedDataParallelPlugin(
        fsdp_version=values["fsdp_version"],
        auto_wrap_policy=values["fsdp_auto_wrap_policy"],
        reshard_after_forward=values["fsdp_reshard_after_forward"],
        cpu_offload=values["fsdp_offload_params"],
        state_dict_type=values["fsdp_state_dict_type"],
        activation_checkpointing=values["fsdp_activation_checkpointing"],
    )


@contextmanager
def joined(folder: Path, num: int, index: int, device: str) -> Iterator[None]:
    """This process as one rank of `num`, once all are there. They meet in `folder`, which is private, and exchange over
    the loopback device: what they say is pickled, and no other machine may have a word in it."""
    threads = torch.get_num_threads()
    before = os.environ.get(_INTERFACE)
    if device == devices.CPU:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num))
    else:
        torch.cuda.set_device(index)
    os.environ[_INTERFACE] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    try:
        distributed.init_process_group(
            _BACKENDS[device],
            store=distributed.FileStore(str(folder / _STORE), num),  # type: ignore[attr-defined]
            rank=index,
            world_size=num,
            timeout=timedelta(seconds=PATIENCE_SECONDS),
        )
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        del os.environ[_INTERFACE]
        if before is not None:
            os.environ[_INTERFACE] = before
        torch.set_num_threads(threads)


@contextmanager
def together(context: JobContext, settings: Settings, task: Task) -> Iterator[Ranks]:
    """All ranks that the settings ask for, at work on the task as long as this lasts; this process is rank 0.

    Raises:
        KnowledgeEngineError: as another rank has raised it, or INTERNAL; the message names the rank.
        MemoryError: another rank ran out of memory.
        SystemExit: another rank is gone without a word, or does not answer: a crash of this attempt.
        JobStopped: from `context.check`.
    """
    num = settings.training_devices
    if num == 1:
        yield ALONE
        return
    for former in context.work_dir.glob(f"{FOLDER}-*"):
        shutil.rmtree(former, ignore_errors=True)
    folder = context.work_dir / f"{FOLDER}-{context.job.attempt}"
    folder.mkdir(parents=True, mode=0o700)
    write_configuration(folder / CONFIGURATION, num, task.device)
    others = _Others(folder, num, task)
    try:
        others.start(settings)
        ranks = Ranks(num, 0, folder, others.demand)
        ranks.meet("started", context.check)
        with joined(folder, num, 0, task.device):
            ranks.broadcast(task)
            context.log(f"{num} devices share the base and every step")
            yield ranks
        others.finish()
    except (KnowledgeEngineError, JobStopped):
        raise
    except Exception as error:
        others.explain(error)
        raise
    finally:
        others.end()
        shutil.rmtree(folder, ignore_errors=True)


def tell_failure(folder: Path, index: int, error: Exception) -> None:
    """Leaves word for rank 0 of what this rank failed of. The first one counts: others fail of its silence."""
    kind = "memory" if modeling.is_out_of_memory(error) else type(error).__name__
    told = error.to_dict() if isinstance(error, KnowledgeEngineError) else None
    whole = folder / f"failure-{index}"
    whole.write_text(json.dumps({"rank": index, "kind": kind, "text": str(error)[:500], "error": told}))
    try:
        os.link(whole, folder / _FAILURE)
    except FileExistsError:
        _LOG.info("another rank has failed before")


class _Others:
    """The processes of all ranks but the first."""

    def __init__(self, folder: Path, num: int, task: Task) -> None:
        self._folder = folder
        self._job_id = task.job.id
        self._device = task.device
        self._num = num
        self._is_over = threading.Event()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._oom_kills = count_oom_kills()

    def start(self, settings: Settings) -> None:
        for index in range(1, self._num):
            arguments = [str(self._folder), str(self._num), str(index), self._device]
            self._processes[index] = subprocess.Popen(
                [sys.executable, "-m", "knowledge_engine.training.follower", *arguments],
                env=settings.child_environment(),
                stdin=subprocess.PIPE,  # its end tells them of ours, whatever that is
            )
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()

    def demand(self) -> None:
        """Raises as `together` does, where one has failed."""
        if any(process.poll() for process in self._processes.values()):
            self._blame()

    def explain(self, error: Exception) -> None:
        """Raises as `together` does, where `error` of this rank comes of another's failure."""
        if not isinstance(error, RuntimeError) or modeling.is_out_of_memory(error):
            return
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline:  # a broken connection is seen before its cause
            self.demand()
            time.sleep(_POLL_SECONDS)
        if "timed out" in str(error).lower():
            raise SystemExit(f"a rank of {self._num} did not answer for {PATIENCE_SECONDS:g} s") from error

    def finish(self) -> None:
        """Lets them end by themselves, once there is nothing left to do."""
        self._is_over.set()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS_SECONDS)

    def end(self) -> None:
        """None of them lives on."""
        self._is_over.set()
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def _blame(self) -> NoReturn:
        """A rank that is killed makes others fail of its silence; of what they say, only what is known is believed."""
        codes = {index: code for index, process in self._processes.items() if (code := process.poll())}
        path = self._folder / _FAILURE
        failure = json.loads(path.read_bytes()) if path.exists() else None
        if failure is not None:
            who = f"rank {failure['rank']} of {self._num}"
            if failure["kind"] == "memory":
                raise MemoryError(f"{who}: {failure['text']}")
            if failure["error"] is not None:
                raise from_dict(failure["error"] | {"message": f"{who}: {failure['error']['message']}"})
        index = min(codes, key=lambda index: codes[index])  # a signal before an exit code
        if codes[index] == -signal.SIGKILL and count_oom_kills() > self._oom_kills:
            raise MemoryError(f"rank {index} of {self._num} was killed by the kernel for want of memory")
        if failure is None or codes[index] < 0:
            raise SystemExit(f"rank {index} of {self._num} is gone: {describe_exit(codes[index])}")
        raise KnowledgeEngineError(
            f"{who} failed unexpectedly ({failure['kind']}); the worker's log in jobs/{self._job_id} says what",
            reason=Reason.INTERNAL,
            rank=failure["rank"],
        )

    def _watch(self) -> None:
        """Sees to it that a failure ends the wait for who has failed."""
        while not self._is_over.wait(_POLL_SECONDS * 10):
            if any(process.poll() for process in self._processes.values()):
                break
        else:
            return
        if self._device == devices.CUDA and distributed.is_initialized():
            distributed.distributed_c10d._get_default_group().abort()  # NCCL would wait; gloo notices by itself
        if not self._is_over.wait(_NOTICE_SECONDS):
            _LOG.error("another rank has failed: %s", {i: process.poll() for i, process in self._processes.items()})
            os._exit(1)
