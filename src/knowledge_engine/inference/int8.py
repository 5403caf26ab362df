"""Bases of Llama's shape on a CPU with weights of eight bits: all sequences, each with its adapter, in one pass.

The large products are of whole numbers: weights of eight bits with a scale for each output, and activations of
fourteen with a scale for each row. Their sums are exact in whatever order they are taken, and everything else is
computed row by row (`kernels.py`), so that no row's result depends on what stands beside it: an answer is the same
alone and among many, after a prompt read at once, in pieces, or taken from another who began alike.

Shapes: R rows (one token of one sequence each), H width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from knowledge_engine import modeling
from knowledge_engine.inference import kernels
from knowledge_engine.inference.adapters import Adapters
from knowledge_engine.inference.blocks import BlockPool, Table
from knowledge_engine.inference.golden import MAX_TOKENS
from knowledge_engine.inference.kernels import BLOCK_TOKENS, Array
from knowledge_engine.inference.wire import Adapter, EngineRequest
from knowledge_engine.modeling import AdapterWeights, Int8Weight, PreTrainedModel

PIECE_TOKENS = 256
"""Prompt tokens of one sequence read in one pass; more make no product faster."""
STEP_TOKENS = 64
"""Prompt tokens read in one pass while others wait for their next token."""
FEW_ROWS = 2
"""So many are multiplied by a kernel of our own: torch's are made for more."""
NUM_DRAFTS = 6
"""Guessed tokens that one pass looks at, of all sequences together: so few cost next to nothing."""

DEFAULT_CACHE_BYTES = 2**30

_NOTHING = np.zeros(0, np.float32)
_NO_ROWS = np.zeros((0, 0), np.float32)
_UNBOUNDED = 2**62


@dataclass(frozen=True)
class _Part:
    """An adapter's share in one product, as `kernels.adapt_rows` takes it."""

    a: Array
    b: Array
    groups: Array
    factors: Array

    @property
    def size_bytes(self) -> int:
        return int(self.a.nbytes + self.b.nbytes + self.groups.nbytes + self.factors.nbytes)


class Int8Place:
    """A sequence's blocks, and its adapter's parts by product."""

    def __init__(self, table: Table, digest: str | None, parts: list[_Part | None]) -> None:
        self.table = table
        self.digest = digest
        self.parts = parts


_Piece = tuple[Int8Place, int, list[int], int]
"""`scheduler.Piece`."""


class _Linear:
    """Linear modules with the same input as one product."""

    def __init__(self, number: int, names: Sequence[str], modules: Sequence[nn.Linear]) -> None:
        self.number = number
        self.names = names
        self.num_outputs = [module.out_features for module in modules]
        self._weight = Int8Weight(torch.cat([module.weight.detach().float() for module in modules]))
        self._scales = self._weight.scales.numpy()
        self._bias = _NOTHING
        if any(module.bias is not None for module in modules):
            biases = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in modules]
            self._bias = torch.cat(biases).numpy()

    def apply(self, whole: Array, units: Array, y: Array) -> None:
        """whole (R, inputs), units (R,) -> y (R, outputs)."""
        num_rows, num_inputs = whole.shape
        if num_rows <= FEW_ROWS and (plain := self._weight.plain) is not None:
            kernels.multiply_rows(whole, plain.numpy(), units, self._scales, self._bias, y)
            return
        halves = torch.empty(2 * num_rows, num_inputs, dtype=torch.int8)
        kernels.halve_rows(whole, halves.numpy())
        kernels.join_rows(self._weight.times(halves).numpy(), units, self._scales, self._bias, y)

    def adapt(self, x: Array, y: Array, adapted: Sequence[tuple[list[_Part | None], Array]]) -> None:
        """Adds to y what each adapter makes of its rows of x."""
        for parts, rows in adapted:
            if (part := parts[self.number]) is not None:
                kernels.adapt_rows(x, y, rows, part.a, part.b, part.groups, part.factors, self._bias)

    def part(self, weights: dict[str, AdapterWeights]) -> _Part | None:
        """What an adapter has for these modules; None for nothing."""
        rows: list[torch.Tensor] = []
        columns: list[torch.Tensor] = []
        groups: list[tuple[int, int, int]] = []
        factors = torch.ones(sum(self.num_outputs))
        starts = itertools.accumulate(self.num_outputs, initial=0)
        is_dora = False
        for name, start, size in zip(self.names, starts, self.num_outputs, strict=False):
            if (own := weights.get(name)) is None:
                continue
            padding = -len(own.a) % 4
            rows.append(nn.functional.pad(own.a, (0, 0, 0, padding)))
            columns.append(nn.functional.pad((own.b * own.scaling).t(), (0, 0, 0, padding)).flatten())
            first = sum(map(len, columns[:-1]))
            groups += ((start, size, first + 4 * g * size) for g in range((len(own.a) + padding) // 4))
            if own.magnitude is not None:
                is_dora = True
                whole = self._weight.to_float()[start : start + size] + own.scaling * (own.b @ own.a)
                factors[start : start + size] = own.magnitude / torch.linalg.vector_norm(whole, dim=1)
        if not rows:
            return None
        return _Part(
            torch.cat(rows).numpy(),
            torch.cat(columns).numpy(),
            np.array(groups, np.int64),
            factors.numpy() if is_dora else _NOTHING,
        )


class _Layer:
    def __init__(self, number: int, name: str, module: Any, window: int | None) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.first_norm: Array = module.input_layernorm.weight.detach().float().numpy()
        self.second_norm: Array = module.post_attention_layernorm.weight.detach().float().numpy()
        self.window = window or _UNBOUNDED

        def linear(offset: int, parent: str, *names: str) -> _Linear:
            owner = attention if parent == "self_attn" else mlp
            full = [f"{name}.{parent}.{short}" for short in names]
            return _Linear(4 * number + offset, full, [getattr(owner, short) for short in names])

        self.qkv = linear(0, "self_attn", "q_proj", "k_proj", "v_proj")
        self.o = linear(1, "self_attn", "o_proj")
        self.gate_up = linear(2, "mlp", "gate_proj", "up_proj")
        self.down = linear(3, "mlp", "down_proj")

    @property
    def linears(self) -> tuple[_Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class Int8Model:
    """`scheduler.Model` of a base that `modeling.load_base` loaded in `int8`; it takes what it needs of it."""

    piece_tokens = PIECE_TOKENS
    step_tokens = STEP_TOKENS
    num_drafts = NUM_DRAFTS

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
        self._layers = [
            _Layer(number, f"{name}.{number}", layer, _window(layer.self_attn, config))
            for number, layer in enumerate(decoder.layers)
        ]
        self._head = _Linear(-1, ("head",), (head,))
        self._embedding: torch.Tensor = decoder.embed_tokens.weight.detach().float()
        self._norm: Array = decoder.norm.weight.detach().float().numpy()
        self._eps = float(decoder.norm.variance_epsilon)
        self._scaling = np.float32(attention.scaling)
        cos, sin = decoder.rotary_emb(torch.zeros(1), torch.arange(context_length)[None])
        half = attention.head_dim // 2
        self._cos, self._sin = (part[0, :, :half].contiguous().numpy() for part in (cos, sin))

        num_heads, num_keys = config.num_attention_heads, config.num_key_value_heads
        width, self._heads_width = config.hidden_size, num_heads * attention.head_dim
        depth, num_layers = attention.head_dim, len(self._layers)
        block_bytes = 2 * 4 * num_layers * num_keys * depth * BLOCK_TOKENS
        if cache_bytes is None:
            cache_bytes = max(DEFAULT_CACHE_BYTES, block_bytes * -(-context_length // BLOCK_TOKENS))
        num_blocks = max(1, cache_bytes // block_bytes)
        self._pool = BlockPool(num_blocks, BLOCK_TOKENS)
        num_all = num_blocks + -(-MAX_TOKENS // BLOCK_TOKENS)
        self._spare = list(range(num_blocks, num_all))
        self._keys = np.zeros((num_layers, num_all, num_keys, BLOCK_TOKENS, depth), np.float32)
        self._values = np.zeros((num_layers, num_all, num_keys, depth, BLOCK_TOKENS), np.float32)
        self.room_bytes = self._keys.nbytes + self._values.nbytes

        max_rows = max_active + PIECE_TOKENS + NUM_DRAFTS
        inner = config.intermediate_size
        self._whole = np.empty(max_rows * max(width, self._heads_width, inner), np.int16)
        self._units = np.empty(max_rows, np.float32)
        self._queries = np.empty((max_rows, num_heads, depth), np.float32)
        self._normed, self._out = np.empty((2, max_rows, width), np.float32)
        self._qkv = np.empty((max_rows, self._heads_width + 2 * num_keys * depth), np.float32)
        self._attended = np.empty((max_rows, self._heads_width), np.float32)
        self._gated = np.empty((max_rows, 2 * inner), np.float32)
        self._inner = np.empty((max_rows, inner), np.float32)

        self.vocabulary_size = len(self._embedding)
        self.max_tokens = self._pool.num_tokens
        self.adapters = Adapters(self._load, lambda parts: None, adapter_budget_bytes)
        self._no_parts: list[_Part | None] = [None] * (4 * len(self._layers))

    def warm_up(self) -> None:
        """Compiles the kernels, or finds them compiled: seconds, which no request should wait."""
        a = np.zeros((4, self._embedding.shape[1]), np.float32)
        part = _Part(a, _NOTHING, np.zeros((1, 3), np.int64), _NOTHING)
        place = self.spare("", [part, *self._no_parts[1:]])
        for num_rows in (1, FEW_ROWS + 1):
            self._pass([(place, 0, [0] * num_rows, num_rows)])

    def open(self, request: EngineRequest) -> Int8Place | None:
        """Raises IntegrityError: the adapter's files are not what they should be."""
        digest = request.adapter.digest if request.adapter is not None else None
        owner = f"{digest or ''} {request.caller}"
        table = self._pool.open(owner, request.prompt_token_ids, request.sampling.max_tokens)
        if table is None:
            return None
        if request.adapter is None:
            return Int8Place(table, None, self._no_parts)
        try:
            return Int8Place(table, digest, self.adapters.acquire(request.adapter))
        except BaseException:
            self._pool.close(table)
            raise

    def close(self, place: Int8Place) -> None:
        self._pool.close(place.table)
        if place.digest is not None:
            self.adapters.release(place.digest)

    def spare(self, digest: str, content: list[_Part | None]) -> Int8Place:
        return Int8Place(Table(self._spare, []), digest, content)

    def find_read(self, place: Int8Place, num_tokens: int) -> int:
        return self._pool.find_read(place.table, num_tokens)

    def forward(self, pieces: Sequence[_Piece]) -> Iterator[tuple[int, torch.Tensor | Exception]]:
        """One pass for all."""
        try:
            logits = self._pass(pieces)
        except Exception as error:
            yield from ((index, error) for index in range(len(pieces)))
            return
        for place, start, token_ids, _ in pieces:  # before the first is given away, and others may be closed
            self._pool.name_read(place.table, start + len(token_ids))
        first = 0
        for index, (*_, num_logits) in enumerate(pieces):
            yield index, logits[first : first + num_logits]
            first += num_logits

    def _pass(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        """The logits asked for, (sum of `num_logits`, V)."""
        lengths = [len(token_ids) for _, _, token_ids, _ in pieces]
        tables = np.zeros((len(pieces), max(len(place.table.blocks) for place, *_ in pieces)), np.int64)
        for index, (place, *_) in enumerate(pieces):
            tables[index, : len(place.table.blocks)] = place.table.blocks
        sequences = np.repeat(np.arange(len(pieces)), lengths)
        positions = np.concatenate([np.arange(start, start + len(ids)) for _, start, ids, _ in pieces])
        tokens = torch.tensor([token for _, _, token_ids, _ in pieces for token in token_ids])
        ends = list(itertools.accumulate(lengths))
        wanted = [row for end, (*_, count) in zip(ends, pieces, strict=True) for row in range(end - count, end)]
        x: Array = self._embedding[tokens].numpy()
        x = self._decode(x, positions, sequences, tables, _by_adapter(pieces, lengths), np.array(wanted, np.int64))
        if not wanted:
            return torch.empty(0, self.vocabulary_size)
        whole, units = self._whole_of(*x.shape), self._units[: len(x)]
        kernels.norm_rows(x, _NO_ROWS, self._norm, self._eps, self._normed[: len(x)], whole, units)
        logits = np.empty((len(x), self.vocabulary_size), np.float32)
        self._head.apply(whole, units, logits)
        return torch.from_numpy(logits)

    def _decode(
        self,
        x: Array,
        positions: Array,
        sequences: Array,
        tables: Array,
        adapted: list[tuple[list[_Part | None], Array]],
        wanted: Array,
    ) -> Array:
        """The layers: x (R, H) -> the wanted rows of the last one's output."""
        num_rows, width = x.shape
        blocks = tables[sequences, positions // BLOCK_TOKENS]
        units, queries, normed = self._units[:num_rows], self._queries[:num_rows], self._normed[:num_rows]
        qkv, attended, out = self._qkv[:num_rows], self._attended[:num_rows], self._out[:num_rows]
        gated, inner = self._gated[:num_rows], self._inner[:num_rows]
        whole = self._whole_of(num_rows, width)
        whole_heads, whole_inner = self._whole_of(*attended.shape), self._whole_of(*inner.shape)
        y = _NO_ROWS
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            kernels.norm_rows(x, y, layer.first_norm, self._eps, normed, whole, units)
            layer.qkv.apply(whole, units, qkv)
            layer.qkv.adapt(normed, qkv, adapted)
            kernels.store_rows(qkv, self._cos, self._sin, queries, keys, values, blocks, positions)
            kernels.attend_rows(
                queries, keys, values, tables, sequences, positions, self._scaling, layer.window, attended
            )
            kernels.round_rows(attended, whole_heads, units)
            layer.o.apply(whole_heads, units, out)
            layer.o.adapt(attended, out, adapted)
            kernels.norm_rows(x, out, layer.second_norm, self._eps, normed, whole, units)
            layer.gate_up.apply(whole, units, gated)
            layer.gate_up.adapt(normed, gated, adapted)
            kernels.gate_rows(gated, inner, whole_inner, units)
            layer.down.apply(whole_inner, units, out)
            layer.down.adapt(inner, out, adapted)
            y = out
        return x[wanted] + y[wanted]

    def _whole_of(self, num_rows: int, width: int) -> Array:
        """The same room each time, for what is rounded next."""
        return self._whole[: num_rows * width].reshape(num_rows, width)

    def _load(self, adapter: Adapter) -> tuple[list[_Part | None], int]:
        weights = modeling.read_adapter(adapter.folder, self._modules)
        parts = [linear.part(weights) for layer in self._layers for linear in layer.linears]
        return parts, sum(part.size_bytes for part in parts if part is not None)


def _window(attention: Any, config: Any) -> int | None:
    """Of how many tokens a layer's attention knows; None of all. Qwen2's layers differ, Mistral's do not."""
    owner = attention if hasattr(attention, "sliding_window") else config
    return getattr(owner, "sliding_window", None)


def _by_adapter(pieces: Sequence[_Piece], lengths: Sequence[int]) -> list[tuple[list[_Part | None], Array]]:
    """Each adapter's parts and the rows that go through them."""
    rows: dict[str, list[int]] = defaultdict(list)
    parts: dict[str, list[_Part | None]] = {}
    first = 0
    for (place, *_), length in zip(pieces, lengths, strict=True):
        if place.digest is not None:
            rows[place.digest] += range(first, first + length)
            parts[place.digest] = place.parts
        first += length
    return [(parts[digest], np.array(of_digest, np.int64)) for digest, of_digest in rows.items()]
