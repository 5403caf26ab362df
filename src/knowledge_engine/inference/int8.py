"""Bases of Llama's shape on a CPU with weights of eight bits: all sequences, each with its adapter, in one pass.

The large products are of whole numbers: weights of eight bits with a scale for each output, and activations of
fourteen with a scale for each row. Their sums are exact in whatever order they are taken, and everything else is
computed row by row (`kernels.py`), so that no row's result depends on what stands beside it: an answer is the same
alone and among many, after a prompt read at once, in pieces, or taken from another who began alike.

Shapes: R rows (one token of one sequence each), H width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from knowledge_engine import devices, modeling
from knowledge_engine.inference import kernels
from knowledge_engine.inference.adapters import Adapters
from knowledge_engine.inference.blocks import BlockPool
from knowledge_engine.inference.golden import MAX_TOKENS
from knowledge_engine.inference.kernels import (
    BLOCK_TOKENS,
    FINE_LEVELS,
    HALF_LEVELS,
    HEAD_STEP,
    NUM_STAGES,
    PART_FIELDS,
    Array,
)
from knowledge_engine.inference.paged import Paged, Place, count_blocks
from knowledge_engine.inference.wire import Adapter
from knowledge_engine.modeling import AdapterWeights, PreTrainedModel

PIECE_TOKENS = 256
"""Prompt tokens of one sequence read in one pass; more make no product faster."""
STEP_TOKENS = 64
"""Prompt tokens read in one pass while others wait for their next token."""
FEW_ROWS = 32
"""So many are multiplied by a kernel of our own: torch's are made for more."""
NUM_DRAFTS = 6
"""Guessed tokens that one pass looks at, of all sequences together: so few cost next to nothing."""

_UNBOUNDED = 2**62


@dataclass(frozen=True)
class _Part:
    """An adapter's share in all products: `table` (4 L, PART_FIELDS) as `kernels` has it, of what is in `arrays`."""

    table: Array
    arrays: list[Array]

    @property
    def size_bytes(self) -> int:
        return int(self.table.nbytes + sum(array.nbytes for array in self.arrays))


_Piece = tuple[Place[_Part], int, list[int], int]
"""`scheduler.Piece`."""


class _Linear:
    """Linear modules with the same input as one product, in all layers."""

    def __init__(self, names: Sequence[Sequence[str]], modules: Sequence[Sequence[nn.Linear]]) -> None:
        """By layer, and of that by module."""
        self.names = names
        self.sizes = [module.out_features for module in modules[0]]
        num_layers, num_outputs, num_inputs = len(modules), sum(self.sizes), modules[0][0].in_features
        has_bias = any(module.bias is not None for module in modules[0])
        self.arrays = kernels.Linear(
            np.empty((num_layers, num_outputs, num_inputs), np.int8),
            np.empty((num_layers, num_outputs), np.float32),
            np.zeros((num_layers, num_outputs if has_bias else 0), np.float32),
        )
        starts = list(itertools.accumulate(self.sizes, initial=0))
        for n, own in enumerate(modules):
            for module, start, size in zip(own, starts, self.sizes, strict=False):
                rounded, scales = modeling.round_to_int8(module.weight.detach().float())
                self.arrays.weight[n, start : start + size] = rounded.numpy()
                self.arrays.scales[n, start : start + size] = scales.numpy()
                if module.bias is not None:
                    self.arrays.bias[n, start : start + size] = module.bias.detach().float().numpy()

    def of_layer(self, n: int) -> kernels.Linear:
        return kernels.Linear(*(array[n] for array in self.arrays))

    def apply(self, n: int, whole: Array, units: Array, y: Array) -> None:
        """whole (R, inputs), units (R,) -> y (R, O), for many rows."""
        linear = self.of_layer(n)
        num_rows, num_inputs = whole.shape
        if num_rows <= FEW_ROWS or not _has_fast_products():
            kernels.multiply_rows(whole, linear, units, y)
            return
        halves = torch.empty(2 * num_rows, num_inputs, dtype=torch.int8)
        kernels.halve_rows(whole, halves.numpy())
        sums = torch._int_mm(halves, torch.from_numpy(linear.weight).t())
        kernels.join_rows(sums.numpy(), linear, units, y)

    def part(self, n: int, weights: dict[str, AdapterWeights]) -> list[Array]:
        """What an adapter has for this product of a layer: a, b, units, modules and, of DoRA, factors; empty for
        nothing."""
        rows: list[Array] = []
        columns: list[Array] = []
        units: list[Array] = []
        adapted: list[tuple[int, int, int, int]] = []
        factors = torch.ones(sum(self.sizes))
        is_dora = False
        starts = itertools.accumulate(self.sizes, initial=0)
        for name, start, size in zip(self.names[n], starts, self.sizes, strict=False):
            if (own := weights.get(name)) is None:
                continue
            padding = -len(own.a) % 4
            whole_a, units_a = _round_finely(nn.functional.pad(own.a, (0, 0, 0, padding)))
            whole_b, units_b = _round_finely(nn.functional.pad(own.b.t(), (0, 0, 0, padding)))
            adapted.append((start, size, len(whole_a), sum(array.size for array in columns)))
            rows.append(whole_a)
            columns.append(whole_b.ravel())
            units.append(units_a * units_b * np.float32(own.scaling))
            if own.magnitude is not None:
                is_dora = True
                base = torch.from_numpy(self.arrays.weight[n, start : start + size]).float()
                base *= torch.from_numpy(self.arrays.scales[n, start : start + size])[:, None]
                whole = base + own.scaling * (own.b @ own.a)
                factors[start : start + size] = own.magnitude / torch.linalg.vector_norm(whole, dim=1)
        if not rows:
            return []
        part = [np.concatenate(rows), np.concatenate(columns), np.concatenate(units), np.array(adapted, np.int64)]
        return [*part, factors.numpy()] if is_dora else part


def _round_finely(x: torch.Tensor) -> tuple[Array, Array]:
    """x (R, I) -> whole numbers of sixteen bits (R, I), and what one is worth in each row (R,)."""
    units = x.abs().amax(1).clamp_min(1e-30) / FINE_LEVELS
    return (x / units[:, None]).round_().to(torch.int16).numpy(), units.numpy()


@cache
def _has_fast_products() -> bool:
    """Whether many rows are a case for `torch._int_mm`: if it is exact without VNNI, it is slower than ours by far."""
    return devices.has_vnni() and _has_exact_products()


def _has_exact_products() -> bool:
    """Whether it adds up without saturating."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.full((64, 256), modeling.INT8_LEVELS, dtype=torch.int8)
    for num_rows in (2, 64):
        largest = torch.full((num_rows, 256), HALF_LEVELS, dtype=torch.int8)
        if (torch._int_mm(largest, weight.t()) != 256 * modeling.INT8_LEVELS * HALF_LEVELS).any():
            return False
    return True


class Int8Model(Paged[_Part]):
    """`scheduler.Model` of a base that `modeling.load_base` loaded in one of `INT8S`; it takes what it needs of it."""

    piece_tokens = PIECE_TOKENS
    step_tokens = STEP_TOKENS
    num_drafts = NUM_DRAFTS
    block_tokens = BLOCK_TOKENS

    def __init__(
        self,
        model: PreTrainedModel,
        context_length: int,
        max_active: int,
        cache_bytes: int | None,
        adapter_budget_bytes: int,
    ) -> None:
        """Without `cache_bytes` there is room for one whole context at least."""
        config: Any = model.config
        decoder, head = modeling.body_and_head(model)
        attention = decoder.layers[0].self_attn
        modules: dict[str, Any] = dict(model.named_modules())
        self._modules = {
            known: (modules[known].out_features, modules[known].in_features) for known in modeling.linear_modules(model)
        }
        name = next(name for name, module in modules.items() if module is decoder.layers)

        def linear(parent: str, *names: str) -> _Linear:
            full = [[f"{name}.{n}.{parent}.{short}" for short in names] for n in range(len(decoder.layers))]
            return _Linear(full, [[modules[known] for known in of_layer] for of_layer in full])

        def stacked(norm: str) -> Array:
            return np.stack([getattr(layer, norm).weight.detach().float().numpy() for layer in decoder.layers])

        self._linears = (
            linear("self_attn", "q_proj", "k_proj", "v_proj"),
            linear("self_attn", "o_proj"),
            linear("mlp", "gate_proj", "up_proj"),
            linear("mlp", "down_proj"),
        )
        windows = [_window(layer.self_attn, config) or _UNBOUNDED for layer in decoder.layers]
        self._layers = kernels.Layers(
            stacked("input_layernorm"),
            stacked("post_attention_layernorm"),
            np.array(windows, np.int64),
            *(product.arrays for product in self._linears),
        )
        self._head = _Linear([["head"]], [[head]])
        self._embedding: Array = decoder.embed_tokens.weight.detach().float().numpy()
        cos, sin = decoder.rotary_emb(torch.zeros(1), torch.arange(context_length)[None])
        half = attention.head_dim // 2
        self._geometry = kernels.Geometry(
            cos[0, :, :half].contiguous().numpy(),
            sin[0, :, :half].contiguous().numpy(),
            float(decoder.norm.variance_epsilon),
            float(attention.scaling),
            decoder.norm.weight.detach().float().numpy(),
        )

        num_heads, num_keys = config.num_attention_heads, config.num_key_value_heads
        width, depth, num_layers = config.hidden_size, attention.head_dim, len(decoder.layers)
        padded = -(-depth // HEAD_STEP) * HEAD_STEP
        block_bytes = 2 * (2 * padded + 4) * num_layers * num_keys * BLOCK_TOKENS
        num_blocks = count_blocks(cache_bytes, block_bytes, BLOCK_TOKENS, context_length)
        num_all = num_blocks + -(-MAX_TOKENS // BLOCK_TOKENS)
        heads = num_layers, num_all, num_keys
        self._cache = kernels.Cache(
            np.zeros((*heads, padded // 2, BLOCK_TOKENS, 2), np.int16),
            np.zeros((*heads, BLOCK_TOKENS), np.float32),
            np.zeros((*heads, BLOCK_TOKENS // 2, padded, 2), np.int16),
            np.zeros((*heads, BLOCK_TOKENS), np.float32),
        )
        self.room_bytes = sum(array.nbytes for array in self._cache)

        max_rows, inner, of_heads = max_active + PIECE_TOKENS + NUM_DRAFTS, config.intermediate_size, num_heads * depth
        self._room = kernels.Room(
            x=np.empty((max_rows, width), np.float32),
            y=np.empty((max_rows, width), np.float32),
            normed=np.empty((max_rows, width), np.float32),
            whole=np.empty((max_rows, width), np.int16),
            whole_heads=np.empty((max_rows, of_heads), np.int16),
            whole_inner=np.empty((max_rows, inner), np.int16),
            units=np.empty(max_rows, np.float32),
            qkv=np.empty((max_rows, of_heads + 2 * num_keys * depth), np.float32),
            queries=np.zeros((max_rows, num_heads, padded), np.int16),
            query_units=np.empty((max_rows, num_heads), np.float32),
            attended=np.empty((max_rows, of_heads), np.float32),
            gated=np.empty((max_rows, 2 * inner), np.float32),
            inner=np.empty((max_rows, inner), np.float32),
        )

        self.vocabulary_size = len(self._embedding)
        super().__init__(
            BlockPool(num_blocks, BLOCK_TOKENS),
            list(range(num_blocks, num_all)),
            Adapters(self._load, lambda parts: None, adapter_budget_bytes),
            _Part(np.zeros((4 * num_layers, PART_FIELDS), np.int64), []),
        )

    def warm_up(self) -> None:
        """Compiles the kernels, or finds them compiled: seconds, which no request should wait."""
        place = self.spare("", self._nothing)
        for num_rows in (1, FEW_ROWS + 1):
            self._pass([(place, 0, [0] * num_rows, num_rows)])

    def forward(self, pieces: Sequence[_Piece]) -> Iterator[tuple[int, torch.Tensor | Exception]]:
        """One pass for all."""
        try:
            logits = self._pass(pieces)
        except Exception as error:
            yield from ((index, error) for index in range(len(pieces)))
            return
        for place, start, token_ids, _ in pieces:  # before the first is given away, and others may be closed
            self.pool.name_read(place.table, start + len(token_ids))
        first = 0
        for index, (*_, num_logits) in enumerate(pieces):
            yield index, logits[first : first + num_logits]
            first += num_logits

    def _pass(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        """The logits asked for, (sum of `num_logits`, V)."""
        lengths = [len(token_ids) for _, _, token_ids, _ in pieces]
        num_rows = sum(lengths)
        tables = np.zeros((len(pieces), max(len(place.table.blocks) for place, *_ in pieces)), np.int64)
        for index, (place, *_) in enumerate(pieces):
            tables[index, : len(place.table.blocks)] = place.table.blocks
        sequences = np.repeat(np.arange(len(pieces)), lengths)
        positions = np.concatenate([np.arange(start, start + len(ids)) for _, start, ids, _ in pieces])
        parts = np.stack([place.content.table for place, *_ in pieces])
        blocks = tables[sequences, positions // BLOCK_TOKENS]
        rows = kernels.Rows(positions, sequences, tables, blocks, parts, *_tasks(pieces, lengths))
        room = kernels.Room(*(array[:num_rows] for array in self._room))
        room.x[:] = self._embedding[[token for _, _, token_ids, _ in pieces for token in token_ids]]
        if num_rows <= FEW_ROWS:
            num_stages = NUM_STAGES * len(self._layers.windows)
            kernels.pass_rows(0, num_stages, self._layers, rows, room, self._cache, self._geometry)
        else:
            self._read_rows(rows, room)
        ends = itertools.accumulate(lengths)
        wanted = [row for end, (*_, count) in zip(ends, pieces, strict=True) for row in range(end - count, end)]
        logits = np.empty((len(wanted), self.vocabulary_size), np.float32)
        if wanted:
            self._head.apply(0, room.whole[wanted], room.units[wanted], logits)
        return torch.from_numpy(logits)

    def _read_rows(self, rows: kernels.Rows, room: kernels.Room) -> None:
        """A pass over many rows: torch multiplies."""
        products = (
            (room.whole, room.qkv), (room.whole_heads, room.y), (room.whole, room.gated), (room.whole_inner, room.y)
        )  # fmt: skip
        kernels.pass_rows(0, 0, self._layers, rows, room, self._cache, self._geometry)
        for n in range(len(self._layers.windows)):
            for index, (linear, (whole, y)) in enumerate(zip(self._linears, products, strict=True)):
                linear.apply(n, whole, room.units, y)
                stage = NUM_STAGES * n + 2 * index + 1
                kernels.pass_rows(stage, stage + 1, self._layers, rows, room, self._cache, self._geometry)

    def _load(self, adapter: Adapter) -> tuple[_Part, int]:
        weights = modeling.read_adapter(adapter.folder, self._modules)
        part = _Part(np.zeros_like(self._nothing.table), [])
        for n in range(len(self._layers.windows)):
            for index, linear in enumerate(self._linears):
                arrays = linear.part(n, weights)
                if arrays:
                    sizes = len(arrays[3]), len(arrays[0])
                    own = [*sizes, *(array.ctypes.data for array in arrays)]
                    part.table[4 * n + index, : len(own)] = own
                    part.arrays.extend(arrays)
        return part, part.size_bytes


def _tasks(pieces: Sequence[_Piece], lengths: Sequence[int]) -> tuple[Array, Array]:
    """`order` and `tasks` of `kernels.Rows`: rows of one adapter are taken together, what is read of it serves all;
    few enough that every thread has some."""
    starts = list(itertools.accumulate(lengths, initial=0))
    of_part: dict[int, list[int]] = {}
    for index, (place, *_) in enumerate(pieces):
        of_part.setdefault(id(place.content), []).extend(range(starts[index], starts[index + 1]))
    most = max(1, min(4, starts[-1] // kernels.num_threads()))
    tasks = [0]
    for rows in of_part.values():
        left = len(rows)
        while left:
            size = next(size for size in (4, 2, 1) if size <= min(left, most))
            tasks.append(tasks[-1] + size)
            left -= size
    return np.array([row for rows in of_part.values() for row in rows]), np.array(tasks)


def _window(attention: Any, config: Any) -> int | None:
    """Of how many tokens a layer's attention knows; None of all. Qwen2's layers differ, Mistral's do not."""
    owner = attention if hasattr(attention, "sliding_window") else config
    return getattr(owner, "sliding_window", None)
