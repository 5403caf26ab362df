"""What a training will go through: its steps, its batches, and their sizes. Known before anything loads; no torch."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from itertools import count, pairwise, takewhile
from pathlib import Path

from knowledge_engine import devices
from knowledge_engine.core import TrainingSpec
from knowledge_engine.files import read_json, replace_durably
from knowledge_engine.training.material import Item, sides_of

CHECKPOINTS = "checkpoints"
"""The folder of a job's checkpoints, in its work folder."""
DEFAULT_EPOCHS = 3.0
EVALUATION_BATCH_SIZE = 4
CHUNK_POSITIONS = 512
"""Logits of so many positions exist at a time: 100 MB with a vocabulary of 49,152."""
FUSED_LAYERS = {"llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer"}
"""The architectures whose layers are computed in one piece, and what transformers calls such a layer."""
FUSED_HEAD_STEP = 16
"""Of which the width of their heads has to be a multiple: so many numbers stand side by side in kernels."""

_MICRO_BATCH, _CHECKPOINTING = "micro_batch.json", "gradient_checkpointing.json"
_TOKENS_AT_ONCE = {devices.CPU: 1024, devices.CUDA: 16_384}
"""Tokens of one forward pass, padding included. More would take memory and make a CPU no faster (record 0015);
a GPU wants to be filled."""
_POOL_BATCHES = 64
"""Examples are sorted by length within pools of so many batches: little padding, yet other neighbours every epoch."""


def read_micro_batch(folder: Path, spec: TrainingSpec) -> int:
    """Examples that are computed at once: as the spec has it, or half of it since memory ran out. `folder` is the
    job's."""
    kept = read_json(folder / _MICRO_BATCH).get("per_device_train_batch_size")
    return kept if isinstance(kept, int) and kept > 0 else spec.per_device_train_batch_size


def has_gradient_checkpointing(folder: Path) -> bool:
    """Whether layers are computed once more in the backward pass instead of kept: the same numbers, in less memory."""
    return read_json(folder / _CHECKPOINTING).get("gradient_checkpointing") is True


def remember_gradient_checkpointing(folder: Path) -> None:
    """For this attempt of the job, and for all that follow."""
    replace_durably(folder / _CHECKPOINTING, json.dumps({"gradient_checkpointing": True}).encode())


def take_less(folder: Path, spec: TrainingSpec) -> str | None:
    """From the next attempt on half as many examples are computed at once, or where the spec has one, layers are
    computed twice; says so in a sentence. None where that is done already."""
    asked = spec.per_device_train_batch_size
    if asked < 2:
        if has_gradient_checkpointing(folder):
            return None
        remember_gradient_checkpointing(folder)
        return "memory ran out with one conversation at once; the training goes on with gradient checkpointing"
    if read_micro_batch(folder, spec) != asked:
        return None
    half = asked // 2
    replace_durably(folder / _MICRO_BATCH, json.dumps({"per_device_train_batch_size": half}).encode())
    return (
        f"memory ran out with {asked} conversations at once; the training goes on with {half}, and as many for each "
        "optimizer step as before"
    )


def count_steps(spec: TrainingSpec, num_examples: int) -> tuple[int, int]:
    """Optimizer steps of the run, and of one epoch."""
    num_batches = math.ceil(num_examples / spec.per_device_train_batch_size)
    per_epoch = math.ceil(num_batches / spec.gradient_accumulation_steps)
    epochs = DEFAULT_EPOCHS if spec.num_train_epochs is None else spec.num_train_epochs
    return spec.max_steps or math.ceil(epochs * per_epoch), per_epoch


def plan_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every index once, in batches of similar lengths and random order; the same seed and epoch give the same plan."""
    chance = random.Random(f"{seed} {epoch}")  # noqa: S311
    order = list(range(len(lengths)))
    chance.shuffle(order)
    batches: list[list[int]] = []
    pool = batch_size * _POOL_BATCHES
    for start in range(0, len(order), pool):
        similar = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches += [similar[first : first + batch_size] for first in range(0, len(similar), batch_size)]
    chance.shuffle(batches)
    return batches


def plan_windows(lengths: Sequence[int], spec: TrainingSpec, first_epoch: int = 0) -> Iterator[list[list[int]]]:
    """The batches of one optimizer step after the other, without end; an epoch's last step may have fewer."""
    for epoch in count(first_epoch):
        plan = plan_batches(lengths, spec.per_device_train_batch_size, spec.seed, epoch)
        for first in range(0, len(plan), spec.gradient_accumulation_steps):
            yield plan[first : first + spec.gradient_accumulation_steps]


def tokens_at_once(spec: TrainingSpec, device: str, micro_batch: int) -> int:
    """At most so many, but for a single example that has more. Where less than the spec's batch goes at once since
    memory ran out, fewer tokens do as well."""
    return _TOKENS_AT_ONCE[device] * micro_batch // spec.per_device_train_batch_size


def split_window(
    window: Sequence[Sequence[int]], lengths: Sequence[int], spec: TrainingSpec, device: str, micro_batch: int
) -> list[list[int]]:
    """The examples of an optimizer step in the parts that are computed at once, the shortest first.

    A part has at most `micro_batch` examples and, padding included, as many tokens as are worth computing at once on
    `device`, or one example that alone has more.
    """
    max_tokens = tokens_at_once(spec, device, micro_batch)
    parts: list[list[int]] = []
    for index in sorted((index for batch in window for index in batch), key=lambda index: lengths[index]):
        # The newest is the longest, so it says how wide the part becomes.
        if parts and len(parts[-1]) < micro_batch and (len(parts[-1]) + 1) * lengths[index] <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def pack_window(
    window: Sequence[Sequence[int]], items: Sequence[Item], spec: TrainingSpec, device: str, micro_batch: int
) -> list[list[int]]:
    """`split_window` for packed batches: examples that begin alike come together, and what they share counts once.

    Attention still lays every example out; a place that it takes beyond the tokens counts a quarter of one, about what
    it keeps.
    """
    max_tokens = tokens_at_once(spec, device, micro_batch)
    rows = {index: [example.input_ids for example in sides_of(items[index])] for batch in window for index in batch}
    parts: list[list[int]] = []
    num_tokens = num_rows = longest = 0
    before: Sequence[int] = ()
    # In this order no example has more in common with an earlier one than with the one before it.
    for index in sorted(rows, key=rows.__getitem__):
        mine = rows[index]
        alone = sum(map(len, mine)) - sum(_num_shared(*pair) for pair in pairwise(mine))
        num_tokens += alone - _num_shared(before, mine[0])
        num_rows += len(mine)
        longest = max(longest, *map(len, mine))
        cost = num_tokens + (num_rows * longest - num_tokens) / 4
        if parts and len(parts[-1]) < micro_batch and cost <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
            num_tokens, num_rows, longest = alone, len(mine), max(map(len, mine))
        before = mine[-1]
    return parts


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def deal_window(window: Sequence[Sequence[int]], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The examples of an optimizer step for each rank, dealt out by length, so that all have nearly as much to do. One
    may have none."""
    ordered = sorted((index for batch in window for index in batch), key=lambda index: lengths[index])
    return [ordered[rank::num_ranks] for rank in range(num_ranks)]
