"""Preflight: what a training would take, found out before anything loads. No torch.

Counts what `loop.py`, `loss.py`, `lora.py` and `blocks.py` keep, from the shapes in the base's files and the rows' real
lengths in tokens. Decision record 0011 has the formula and how far it is from measured peaks. For CUDA the same is
counted in the device's own number format, without what only a CPU process has. The range is wider for architectures
whose activations are not known here.

Shapes: B examples, T tokens of the longest of them, H width, I inner width, V vocabulary, r rank.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from knowledge_engine import devices
from knowledge_engine.bases import Base
from knowledge_engine.core import JobState, LoraConfig, Page, TrainingResult, TrainingSpec
from knowledge_engine.errors import CapacityError, KnowledgeEngineError, Reason, StateError, UpstreamError, Violation
from knowledge_engine.files import read_json
from knowledge_engine.settings import Settings
from knowledge_engine.state import State
from knowledge_engine.training.material import Item, num_tokens, num_trained, width
from knowledge_engine.training.plan import (
    CHUNK_POSITIONS,
    EVALUATION_BATCH_SIZE,
    FUSED_HEAD_STEP,
    FUSED_LAYERS,
    count_steps,
    deal_window,
    plan_windows,
    split_window,
    tokens_at_once,
)

_MIB = 2**20

_LIBRARIES_BYTES = {devices.CPU: 900 * _MIB, devices.CUDA: 830 * _MIB}
"""Resident once everything is imported (CPU); context, kernels and cuBLAS workspaces of a process on the device (CUDA).
Both measured."""
_INT8_BYTES = 170 * _MIB
"""numba and its kernels, for golden values in eight bits; measured, as they come compiled."""
_BFLOAT16_BYTES = 20 * _MIB
"""oneDNN's kernels, for golden values in bfloat16 on a CPU; measured at 9 to 36."""
_FRAGMENTATION, _FUSED_FRAGMENTATION = 1.68, 1.35
"""Resident over live bytes of what the loop allocates and frees on the CPU: glibc does not reuse freed aligned blocks
of the same size. Measured, as are the next; fused layers have fewer blocks."""
_CUDA_FRAGMENTATION = 1.15
"""Reserved over allocated bytes of torch's own allocator: 1.08 to 1.28, the most with a large vocabulary."""
_LOADING_SHARE = 0.35
"""Left behind on the heap when weights are quantised on the CPU, of the float32 bytes that were."""

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, one byte for each block of 64, four for 256 of those (Dettmers et al. 2023, section 3)."""
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ADAM_COPIES = 4
"""The weight, its gradient and AdamW's two moments, all in float32."""
_INNER_BACKWARD_COPIES = 3
"""Gradients of the inner width that exist at once in the backward pass of a layer."""
_KNOWN = {"llama": 4, "mistral": 4, "qwen2": 4, "qwen3": 4, "gpt2": 5}
"""Tensors of the inner width that a layer keeps for the backward pass where it is not fused, by architecture."""
_EMBEDDINGS = frozenset({"wte", "wpe", "embed_tokens", "embed_positions", "embed_in", "lm_head", "embed_out"})
_LAYER = re.compile(r"\.\d+\.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SMALL_FILES_BYTES = _MIB
"""Configurations, random states, where the run stands, the tracker's own."""
_CHECKPOINTS = 3  # two stay, one is being written
_MAX_EPOCHS_PLANNED = 3
_NUM_JOBS_SEARCHED = 1000
_MAX_ACCUMULATION = 256

_LOG = logging.getLogger(__name__)


class Linear(NamedTuple):
    """A linear module that LoRA could adapt."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Shape:
    """What of a base decides how much memory it takes. Bytes are those of the files."""

    architecture: str
    width: int
    inner: int
    num_layers: int
    num_heads: int
    head_width: int
    key_value_width: int
    vocabulary: int
    linears: tuple[Linear, ...]
    num_weights: int
    file_bytes: int
    is_float32: bool
    is_fusible: bool

    @property
    def num_linear_weights(self) -> int:
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    def adapted(self, lora: LoraConfig) -> list[Linear]:
        """As `modeling.attach_lora` chooses them."""
        return [
            linear
            for linear in self.linears
            if not lora.target_modules
            or any(linear.name == target or linear.name.endswith(f".{target}") for target in lora.target_modules)
        ]


@dataclass(frozen=True)
class Memory:
    """Bytes of the largest resident memory; outside of low and high would surprise us."""

    low_bytes: int
    expected_bytes: int
    high_bytes: int


class Row(NamedTuple):
    """What counts of an item: the tokens that it takes up, those that it has, and those that are trained."""

    length: int
    num_tokens: int
    num_trained: int

    @classmethod
    def of(cls, item: Item) -> Row:
        return cls(width(item), num_tokens(item), num_trained(item))


@dataclass(frozen=True)
class Material:
    """The encoded rows on both sides of the split."""

    train: Sequence[Row]
    held_out: Sequence[Row]

    @property
    def longest(self) -> int:
        return max(row.length for row in (*self.train, *self.held_out))


@dataclass(frozen=True)
class Need:
    """What a run takes, whatever is there. With `gradient_checkpointing` its layers keep their inputs alone and are
    computed once more in the backward pass, about a third more work."""

    memory: Memory
    disk_bytes: int
    num_steps: int
    num_tokens: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Estimate:
    """A need beside what there is. `held` is by holder, `engine` or `jobs/{job}`; `refusal` is None where it fits."""

    need: Need
    device: str
    total_memory_bytes: int
    held: Mapping[str, int]
    free_disk_bytes: int
    training_seconds: float | None
    refusal: KnowledgeEngineError | None
    nearest_spec: TrainingSpec | None


# --- what there is ------------------------------------------------------------------------------------------------


class Preflight:
    """Estimates for this machine, beside what others hold on it."""

    def __init__(self, settings: Settings, state: State) -> None:
        self._settings = settings
        self._state = state

    def estimate(self, spec: TrainingSpec, base: Base, material: Material) -> Estimate:
        """Raises UpstreamError: STATE_UNAVAILABLE."""
        device = devices.default_device()
        shape = read_shape(base.folder)

        def need_of(candidate: TrainingSpec, *, gradient_checkpointing: bool = False) -> Need:
            return compute_need(
                shape,
                candidate,
                material,
                base,
                device,
                gradient_checkpointing=gradient_checkpointing,
                num_devices=self._settings.training_devices,
                is_served_in_nf4=self._settings.serving_precision == "nf4",
            )

        need = need_of(spec)
        room = _Room(self._settings, self._state.held_memory())
        nearest = None
        if not room.takes(need):
            nearest = _nearest(spec, need_of, room)
            less = need_of(spec, gradient_checkpointing=True)
            if (nearest is None or nearest.use_qlora is not spec.use_qlora) and room.takes(less):
                need, nearest = less, None
            elif nearest is None:
                nearest = _nearest(spec, partial(need_of, gradient_checkpointing=True), room)
        rate = self._tokens_per_second(spec)
        return Estimate(
            need=need,
            device=device,
            total_memory_bytes=room.total_bytes,
            held=room.held,
            free_disk_bytes=room.free_disk_bytes,
            training_seconds=need.num_tokens / rate * (4 / 3 if need.gradient_checkpointing else 1) if rate else None,
            refusal=None if room.takes(need) else room.refusal(need, spec, nearest, material.longest),
            nearest_spec=nearest,
        )

    def demand_room(self, spec: TrainingSpec, base: Base, material: Material) -> Need:
        """The need of a run that could start once no other job is running.

        Raises:
            StateError: MEMORY_INSUFFICIENT, with the nearest settings that would fit.
            CapacityError: DISK_FULL.
        """
        estimate = self.estimate(spec, base, material)
        if estimate.refusal is not None:
            raise estimate.refusal
        return estimate.need

    def _tokens_per_second(self, spec: TrainingSpec) -> float | None:
        """The rate of the newest training on the same base in the same precision; None where there was none."""
        page = Page(_NUM_JOBS_SEARCHED, None)
        for job in self._state.list_jobs(page)[0]:
            if (
                job.state is JobState.SUCCEEDED
                and isinstance(job.spec, TrainingSpec)
                and isinstance(job.result, TrainingResult)
                and (job.spec.base_model, job.spec.use_qlora) == (spec.base_model, spec.use_qlora)
                and job.result.tokens_per_second > 0
            ):
                return job.result.tokens_per_second
        return None


def demand_room(
    settings: Settings,
    spec: TrainingSpec,
    base: Base,
    train: Sequence[Item],
    held_out: Sequence[Item],
    micro_batch: int,
) -> Need | None:
    """The check of a worker, once the base is prepared and before it loads; `micro_batch` examples go at once. None
    where the store does not say who holds what.

    Raises:
        StateError: MEMORY_INSUFFICIENT, with the nearest settings that would fit.
        CapacityError: DISK_FULL.
    """
    halved = spec.model_copy(
        update={
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": spec.gradient_accumulation_steps
            * math.ceil(spec.per_device_train_batch_size / micro_batch),
        }
    )
    try:
        state = State.open(settings.state_url, migrate=False)
        try:
            material = Material([*map(Row.of, train)], [*map(Row.of, held_out)])
            return Preflight(settings, state).demand_room(halved, base, material)
        finally:
            state.close()
    except UpstreamError as error:
        _LOG.warning("whether there is memory for this training could not be found out: %s", error.message)
        return None


class _Room:
    """Memory and disk of this machine, and who holds how much of the memory."""

    def __init__(self, settings: Settings, held: Mapping[str, int]) -> None:
        self.total_bytes = devices.total_memory(settings)
        self.free_disk_bytes = shutil.disk_usage(settings.data_dir).free
        self.held = dict(held)
        self._lasting = {holder: size for holder, size in held.items() if not holder.startswith("jobs/")}

    @property
    def available_bytes(self) -> int:
        """For one training alone: other jobs end, the engine stays."""
        return max(0, self.total_bytes - sum(self._lasting.values()))

    def takes(self, need: Need) -> bool:
        return self._has_memory(need) and need.disk_bytes <= self.free_disk_bytes

    def refusal(
        self, need: Need, spec: TrainingSpec, nearest: TrainingSpec | None, longest: int
    ) -> KnowledgeEngineError:
        if self._has_memory(need):
            return CapacityError(
                f"this training writes up to {_gigabytes(need.disk_bytes)} and the disk of KNOWLEDGE_DATA_DIR has "
                f"{_gigabytes(self.free_disk_bytes)} free; make room, or set KNOWLEDGE_DATA_DIR to a larger disk",
                reason=Reason.DISK_FULL,
                retry_after_seconds=60,
                needed_bytes=need.disk_bytes,
                free_bytes=self.free_disk_bytes,
            )
        changes = _changes(spec, nearest)
        advice = (
            f"it would fit with {' and '.join(f'{field} {value}' for field, value in changes.items())}"
            if changes
            else f"no smaller batch helps, its longest conversation has {longest} tokens; a smaller base model would"
        )
        held = ", ".join(f"{holder} holds {_gigabytes(size)}" for holder, size in self._lasting.items())
        return StateError(
            f"this training is expected to take {_gigabytes(need.memory.expected_bytes)} of memory and "
            f"{_gigabytes(self.available_bytes)} of {_gigabytes(self.total_bytes)} are there for it"
            f"{f' ({held})' if held else ''}; {advice}",
            reason=Reason.MEMORY_INSUFFICIENT,
            violations=[Violation(f"spec.{field}", f"{value} would fit") for field, value in changes.items()],
            needed_bytes=need.memory.expected_bytes,
            available_bytes=self.available_bytes,
            total_bytes=self.total_bytes,
            holders=", ".join(f"{holder}={size}" for holder, size in self._lasting.items()),
            longest_row=longest,
            nearest=", ".join(f"{field}={value}" for field, value in changes.items()),
        )

    def _has_memory(self, need: Need) -> bool:
        return need.memory.expected_bytes <= self.available_bytes


def _nearest(spec: TrainingSpec, need_of: Callable[[TrainingSpec], Need], room: _Room) -> TrainingSpec | None:
    """The first that fits of: a smaller micro-batch of the same effective batch, then the other precision too.

    `max_length` is no candidate: rows are never cut, so it takes no memory that they do not.
    """
    for candidate in _candidates(spec):
        if room.takes(need_of(candidate)):
            return candidate
    return None


def _candidates(spec: TrainingSpec) -> Iterator[TrainingSpec]:
    asked, accumulation = spec.per_device_train_batch_size, spec.gradient_accumulation_steps
    for use_qlora in (spec.use_qlora, not spec.use_qlora):
        for size in range(asked, 0, -1):
            if asked % size == 0 and accumulation * (asked // size) <= _MAX_ACCUMULATION:
                yield spec.model_copy(
                    update={
                        "per_device_train_batch_size": size,
                        "gradient_accumulation_steps": accumulation * (asked // size),
                        "use_qlora": use_qlora,
                    }
                )


def _changes(spec: TrainingSpec, nearest: TrainingSpec | None) -> dict[str, object]:
    fields = ("per_device_train_batch_size", "gradient_accumulation_steps", "use_qlora")
    if nearest is None:
        return {}
    return {field: getattr(nearest, field) for field in fields if getattr(nearest, field) != getattr(spec, field)}


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


# --- the arithmetic -----------------------------------------------------------------------------------------------


def read_shape(folder: Path) -> Shape:
    """The shape of a prepared base, from its config.json and the headers of its safetensors files."""
    config = read_json(folder / "config.json")
    tensors = {
        name: facts for path in sorted(folder.glob("*.safetensors")) for name, facts in _read_header(path).items()
    }
    architecture = str(config.get("model_type", ""))
    width = _number(config, "hidden_size", "n_embd", default=1024)
    num_heads = _number(config, "num_attention_heads", "n_head", default=16)
    head_width = _number(config, "head_dim", default=max(1, width // num_heads))
    return Shape(
        architecture=architecture,
        width=width,
        inner=_number(config, "intermediate_size", "n_inner", default=4 * width),
        num_layers=_number(config, "num_hidden_layers", "n_layer", default=1),
        num_heads=num_heads,
        head_width=head_width,
        key_value_width=_number(config, "num_key_value_heads", default=num_heads) * head_width,
        vocabulary=_number(config, "vocab_size", default=32_000),
        linears=tuple(_linears(tensors, is_transposed=architecture == "gpt2")),
        num_weights=sum(math.prod(facts["shape"]) for facts in tensors.values()),
        file_bytes=sum(math.prod(facts["shape"]) * _FLOAT_BYTES.get(facts["dtype"], 1) for facts in tensors.values()),
        is_float32=all(facts["dtype"] == "F32" for facts in tensors.values()),
        is_fusible=architecture in FUSED_LAYERS
        and config.get("hidden_act") == "silu"
        and not config.get("attention_dropout"),
    )


def compute_need(
    shape: Shape,
    spec: TrainingSpec,
    material: Material,
    base: Base,
    device: str,
    *,
    gradient_checkpointing: bool = False,
    num_devices: int = 1,
    is_served_in_nf4: bool = False,
) -> Need:
    """Memory is that of each device where several share the training; processes on a CPU share the host's."""
    num_steps, per_epoch = count_steps(spec, len(material.train))
    adapter = sum(spec.lora.rank * (linear.inputs + linear.outputs) for linear in shape.adapted(spec.lora)) * 4
    tokenizer = sum((base.folder / name).stat().st_size for name in _TOKENIZER_FILES if (base.folder / name).is_file())
    version = adapter + tokenizer
    return Need(
        memory=_memory(
            shape,
            spec,
            material,
            adapter,
            num_steps,
            per_epoch,
            device,
            num_devices,
            gradient_checkpointing=gradient_checkpointing,
            is_served_in_nf4=is_served_in_nf4,
        ),
        disk_bytes=_CHECKPOINTS * (_ADAM_COPIES - 1 + spec.load_best_model_at_end) * adapter
        + 2 * version
        + _SMALL_FILES_BYTES,
        num_steps=num_steps,
        num_tokens=_count_tokens(spec, material, num_steps, per_epoch),
        gradient_checkpointing=gradient_checkpointing,
    )


def _memory(
    shape: Shape,
    spec: TrainingSpec,
    material: Material,
    adapter: int,
    num_steps: int,
    per_epoch: int,
    device: str,
    num_devices: int,
    *,
    gradient_checkpointing: bool,
    is_served_in_nf4: bool,
) -> Memory:
    """All phases: loading, the steps with their checkpoints, and with the base as it is served the comparison and the
    golden values; those in other precisions take less on a CPU, and of a device nothing.

    On a CPU what was freed stays resident, so the largest phase decides, and what a later phase adds to it. Several
    devices load the whole base each before they share its linear weights out; while they train, each holds two layers'
    whole, the one at work and the next.
    """
    size = 2 if device == devices.CUDA and devices.has_bfloat16() else 4
    weights = _weight_bytes(shape, size, device, use_qlora=spec.use_qlora)
    batches = _batches(spec, material.train, min(num_steps, _MAX_EPOCHS_PLANNED * per_epoch), device, num_devices)
    num_kept = 1 if gradient_checkpointing else shape.num_layers
    step = max(_step_bytes(shape, spec, tokens, trained, size, device, num_kept) for tokens, trained in batches)
    libraries = _LIBRARIES_BYTES[device]
    served = size * shape.num_weights
    if is_served_in_nf4:
        served = _weight_bytes(shape, size, device, use_qlora=True)
    copies = _ADAM_COPIES + spec.load_best_model_at_end
    if device == devices.CUDA:  # a checkpoint's copy is made on the host, and files are not mapped
        held = weights
        if num_devices > 1:
            linear = round((_NF4_BYTES if spec.use_qlora else size) * shape.num_linear_weights)
            held += linear // num_devices + 2 * linear // max(1, shape.num_layers) - linear
        training = max(weights, held + round(_CUDA_FRAGMENTATION * (copies * adapter + step)))
    else:
        work = copies * adapter + max(step, (copies - 1) * adapter)
        fragmentation = _FUSED_FRAGMENTATION if _is_fused(shape, spec, device) else _FRAGMENTATION
        training = weights + round(fragmentation * work)
        training += (num_devices - 1) * (libraries + training)
        served = max(shape.file_bytes, served)
    evaluated = _evaluation_bytes(shape, material.held_out, size, adapter) if material.held_out else 0
    recorded = adapter
    if device == devices.CPU:
        libraries += _BFLOAT16_BYTES
    if device == devices.CPU and shape.is_fusible:  # nearly as `modeling.serving_precision` decides it
        libraries += _INT8_BYTES
        recorded += shape.num_weights  # once more, in eight bits
    evaluating = served + max(evaluated, recorded)
    return _range(libraries + max(training, evaluating), shape)


def _range(expected: int, shape: Shape) -> Memory:
    low, high = 0.85, 1.18
    if shape.architecture not in _KNOWN:
        low, high = low * 0.75, high * 1.5
    return Memory(round(low * expected), expected, round(high * expected))


def _weight_bytes(shape: Shape, size: int, device: str, *, use_qlora: bool) -> int:
    """Resident weights while training. Files in float32 are mapped on a CPU, not copied: quantised or not, their pages
    stay resident as long as one tensor lies in them, and the embeddings always do."""
    linear = shape.num_linear_weights
    quantised = round(_NF4_BYTES * linear) if use_qlora else 0
    if device == devices.CUDA:
        return quantised + size * (shape.num_weights - (linear if use_qlora else 0))
    left_behind = round(_LOADING_SHARE * 4 * linear) if use_qlora else 0
    if shape.is_float32:
        return shape.file_bytes + quantised + left_behind
    kept = size * (shape.num_weights - (linear if use_qlora else 0))
    return max(shape.file_bytes, left_behind) + kept + quantised


def _step_bytes(
    shape: Shape, spec: TrainingSpec, tokens: int, trained: int, size: int, device: str, num_kept: int
) -> int:
    """Live at the largest moment of a batch, besides weights and optimizer: all that `num_kept` layers keep, the input
    of each that keeps nothing else, and the larger of the head's chunk and the backward pass of one layer."""
    adapted = shape.adapted(spec.lora)
    heads_width = shape.num_heads * shape.head_width
    numbers = 2 * heads_width + 2 * shape.key_value_width
    if _is_fused(shape, spec, device):
        numbers += 2 * shape.width + 2 * shape.inner
    else:
        numbers += 4 * shape.width + _KNOWN.get(shape.architecture, 4) * shape.inner
        numbers += heads_width  # what attention gives is kept as it lays examples out, and as they are packed
    in_all = size * tokens * (shape.num_layers * numbers + spec.lora.rank * len(adapted))
    in_all += (4 - size) * tokens * shape.num_layers * 2 * shape.width  # both norms compute in float32
    if spec.lora.dropout:  # a mask of one byte a number, or places of eight for the few that are dropped
        each = min(1, 8 * spec.lora.dropout) if _is_fused(shape, spec, device) else 1
        in_all += round(each * tokens * sum(linear.inputs for linear in adapted))
    if spec.lora.use_dora:  # PEFT's own: both products and the dropped input, and NF4 weights as they are multiplied
        in_all += size * tokens * sum(2 * linear.outputs + linear.inputs for linear in adapted)
        in_all += size * shape.num_linear_weights if spec.use_qlora and spec.lora.dropout else 0
    kept = in_all * num_kept // shape.num_layers
    if num_kept < shape.num_layers:
        kept += size * tokens * shape.num_layers * shape.width
    kept += 2 * size * (tokens + trained) * shape.width
    head = _head_bytes(shape, trained, size)
    backward = _INNER_BACKWARD_COPIES * size * tokens * shape.inner
    if spec.use_qlora:
        backward += 2 * size * shape.width * shape.inner
    return kept + max(head, backward)


def _is_fused(shape: Shape, spec: TrainingSpec, device: str) -> bool:
    """As `blocks.use_fused_layers` decides it."""
    is_all_adapted = len(shape.adapted(spec.lora)) == len(shape.linears) and not spec.lora.use_dora
    has_such_heads = shape.head_width % FUSED_HEAD_STEP == 0
    return shape.is_fusible and has_such_heads and is_all_adapted and device == devices.CPU


def _evaluation_bytes(shape: Shape, held_out: Sequence[Row], size: int, adapter: int) -> int:
    """Besides the base as it is served, with the adapter; nothing is kept for a backward pass."""
    lengths = sorted(row.length for row in held_out)
    tokens = EVALUATION_BATCH_SIZE * lengths[-1]
    layer = size * tokens * (6 * shape.width + 3 * shape.inner)
    return 2 * adapter + layer + _head_bytes(shape, tokens, size)


def _head_bytes(shape: Shape, num_positions: int, size: int) -> int:
    """A chunk's logits: as the head gives them, and in float32 where that is not the same."""
    return (4 if size == 4 else 4 + size) * min(num_positions, CHUNK_POSITIONS) * shape.vocabulary


def _batches(
    spec: TrainingSpec, rows: Sequence[Row], num_steps: int, device: str, num_devices: int
) -> Iterator[tuple[int, int]]:
    """How many tokens are computed at once at most, on whichever device, and how many of them are trained. Packed
    batches are filled with examples that begin alike, which lengths do not tell, up to the same bound."""
    lengths = [row.length for row in rows]
    size = spec.per_device_train_batch_size
    bound = tokens_at_once(spec, device, size)
    for window in islice(plan_windows(lengths, spec), num_steps):
        for hand in deal_window(window, lengths, num_devices):
            most = sum(sorted(lengths[index] for index in hand)[-size:])
            trained = sum(sorted(rows[index].num_trained for index in hand)[-size:])
            for members in split_window([hand], lengths, spec, device, size):
                padded = len(members) * max(lengths[index] for index in members)
                tokens = max(padded, min(most, bound))
                yield tokens, min(tokens, trained)


def _count_tokens(spec: TrainingSpec, material: Material, num_steps: int, per_epoch: int) -> int:
    """Whole epochs go through everything once; of the last one only the steps that are left count."""
    tokens = [row.num_tokens for row in material.train]
    whole, left = divmod(num_steps, per_epoch)
    windows = islice(plan_windows([row.length for row in material.train], spec, first_epoch=whole), left)
    return whole * sum(tokens) + sum(tokens[index] for window in windows for batch in window for index in batch)


def _linears(tensors: Mapping[str, Any], *, is_transposed: bool) -> Iterator[Linear]:
    for name, facts in tensors.items():
        module = name.removesuffix(".weight")
        shape = facts["shape"]
        if len(shape) != 2 or module == name or module.rpartition(".")[2] in _EMBEDDINGS or not _LAYER.search(name):
            continue
        outputs, inputs = reversed(shape) if is_transposed else shape
        yield Linear(module, inputs, outputs)


def _read_header(path: Path) -> dict[str, Any]:
    """Tensors by name: `dtype` and `shape`."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: facts for name, facts in header.items() if name != "__metadata__"}


def _number(config: Mapping[str, Any], *keys: str, default: int) -> int:
    values = [config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0]
    return values[0] if values else default
