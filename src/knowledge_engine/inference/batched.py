"""Known architectures on any device, through transformers' own forward: all sequences, each with its adapter, in one
pass.

Attention and adapters are ours, put into transformers' layers where it lets others in. Keys and values lie in blocks
that are lent, shared and bounded; adapters lie side by side, and every row takes its own.

Floating-point sums depend on the shape of a product. So answers are read in passes of one size, or of a few that are
found to agree, filled up with rows of no sequence; and prompts one by one, in pieces that end at multiples of a block.
What a row goes through is decided by its sequence alone, and an answer is the same alone and among many.

Shapes: R rows (one token of one sequence each), N query heads and K key-value heads of width D.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from knowledge_engine import devices, modeling
from knowledge_engine.bases import Base
from knowledge_engine.inference.adapters import Adapters
from knowledge_engine.inference.blocks import BlockPool
from knowledge_engine.inference.golden import MAX_TOKENS
from knowledge_engine.inference.paged import Paged, Place, count_blocks
from knowledge_engine.inference.wire import Adapter
from knowledge_engine.modeling import AdapterWeights

BLOCK_TOKENS = 256
"""Of a prompt, read in one pass; shared and lent as a whole, so that all who begin alike read the same pieces."""
SIZES = {devices.CPU: (2, 4, 8, 16), devices.CUDA: (64,)}
"""Rows of a pass over answers: the largest, and smaller ones where a row comes out of them as it comes out of the
largest, bit by bit. A GPU reads its weights in the same time for all."""
NUM_DRAFTS = 6
"""Guessed tokens that one pass looks at, of all sequences together: as many as find room in it."""

_ARCHITECTURES = frozenset(
    {"apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2",
     "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "llama", "mistral", "olmo", "olmo2", "olmo3", "opt", "phi",
     "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2"}
)  # fmt: skip
"""A test shows of each that it answers here as in transformers, and the same alone and among others. Left out are those
whose attention is not to be had (Falcon, Bloom) or caps its scores (Gemma 2), and those that send rows to experts
(Mixtral): the shape of their products depends on where others are sent."""
_ATTENTION = "knowledge_engine"
_log = logging.getLogger(__name__)
_SLOTS = 4
"""Adapters that room is made for at once."""


def can_batch(base: Base) -> bool:
    """Whether its architecture is one of those known here."""
    return base.architecture in _ARCHITECTURES and modeling.has_static_rope(base)


_Piece = tuple[Place["_Slot | None"], int, list[int], int]
"""`scheduler.Piece`."""
_Row = tuple[Place["_Slot | None"], int, int]
"""Of an answer: whose, the position, and the token."""
_Replay = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Group:
    """What is asked of attention in one call: `rows` (B, Q) of the pass, the blocks of each (B, n), and the position of
    each row (B, Q), behind which nothing counts."""

    rows: torch.Tensor
    blocks: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class _Pass:
    """What the model is asked at once: tokens and positions (1, R), the rows whose logits are wanted (W,), where keys
    and values go (R,), who reads what, and, by rank, the slot of each batch of rows in the stacks of adapters, (S,)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor
    groups: list[_Group]
    slots: dict[int, torch.Tensor]

    def tensors(self) -> list[torch.Tensor]:
        of_groups = [tensor for group in self.groups for tensor in (group.rows, group.blocks, group.positions)]
        return [self.tokens, self.positions, self.wanted, self.targets, *of_groups, *self.slots.values()]

    def copy(self) -> _Pass:
        groups = [_Group(group.rows.clone(), group.blocks.clone(), group.positions.clone()) for group in self.groups]
        slots = {rank: tensor.clone() for rank, tensor in self.slots.items()}
        return _Pass(
            self.tokens.clone(), self.positions.clone(), self.wanted.clone(), self.targets.clone(), groups, slots
        )


class _Replays:
    """Passes that were recorded once for each shape, and are played with other numbers in the same memory."""

    def __init__(
        self, run: Callable[[_Pass], torch.Tensor], record: Callable[[Callable[[], torch.Tensor]], _Replay]
    ) -> None:
        self._run = run
        self._record = record
        self._kept: dict[tuple[Any, ...], tuple[_Pass, _Replay]] = {}

    def __call__(self, asked: _Pass) -> torch.Tensor:
        """What `run` gives; it is overwritten by the next pass."""
        key = (*asked.slots, *(tensor.shape for tensor in asked.tensors()))
        if key not in self._kept:
            mine = asked.copy()
            self._kept[key] = mine, self._record(functools.partial(self._run, mine))
        mine, replay = self._kept[key]
        for old, new in zip(mine.tensors(), asked.tensors(), strict=True):
            old.copy_(new)
        return replay()

    def forget(self) -> None:
        """What a pass reads lies elsewhere now."""
        self._kept.clear()


def _record_graph(run: Callable[[], torch.Tensor]) -> _Replay:
    """As a CUDA graph: some two thousand launches become one."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is chosen and allocated in a first run is no part of a graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


class _Cache:
    """Keys and values of a layer, (blocks, BLOCK_TOKENS, K, D) each; of the last block nobody reads."""

    def __init__(self, num_blocks: int, num_heads: int, widths: tuple[int, int], like: torch.Tensor) -> None:
        self.keys, self.values = (_zeros((num_blocks, BLOCK_TOKENS, num_heads, width), like) for width in widths)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: _Pass,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """query (1, N, R, D), key and value (1, K, R, D) -> what every row finds before itself, (1, R, N, D)."""
        num_heads, num_keys = query.shape[1], key.shape[1]
        for cache, told in ((self.keys, key), (self.values, value)):
            # What is not finite would reach whoever gets the block next: no share of it is 0.
            cache.flatten(0, 1)[rows.targets] = told[0].transpose(0, 1).nan_to_num()
        by_row = query[0].transpose(0, 1)
        result = by_row.new_zeros(*by_row.shape[:2], value.shape[-1])
        for group in rows.groups:
            size, length = group.rows.shape
            keys, values = (cache[group.blocks].flatten(1, 2).transpose(1, 2) for cache in (self.keys, self.values))
            times = torch.arange(keys.shape[2], device=keys.device)
            mask = times <= group.positions[..., None]
            if window:
                mask &= times > group.positions[..., None] - window
            # The heads that read one head's keys are asked as if they were more rows.
            asked = by_row[group.rows].view(size, length, num_keys, -1, by_row.shape[-1])
            asked = asked.permute(0, 2, 3, 1, 4).flatten(2, 3)
            mask = mask[:, None].repeat(1, 1, num_heads // num_keys, 1)
            found = functional.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=scaling)
            found = found.view(size, num_keys, -1, length, found.shape[-1]).permute(0, 3, 1, 2, 4)
            result[group.rows] = found.flatten(2, 3)
        return result[None]


class _Stack:
    """The adapters of one rank for one module: a (slots, inputs, r), b (slots, r, O) with the scaling, and of DoRA
    factors (slots, O), less one."""

    def __init__(self, num_inputs: int, num_outputs: int, rank: int, like: torch.Tensor) -> None:
        self.a = like.new_zeros(0, num_inputs, rank)
        self.b = like.new_zeros(0, rank, num_outputs)
        self.factors: torch.Tensor | None = None

    def grow(self, num_slots: int) -> None:
        self.a, self.b = _longer(self.a, num_slots), _longer(self.b, num_slots)
        if self.factors is not None:
            self.factors = _longer(self.factors, num_slots)

    def put(self, slot: int, weights: AdapterWeights | None, factors: torch.Tensor | None) -> int:
        """Without weights this adapter leaves the module alone. Gives the bytes of what it has."""
        if weights is None:
            self.a[slot], self.b[slot] = 0, 0
        else:
            self.a[slot] = weights.a.t()
            self.b[slot] = weights.b.t() * weights.scaling
        if factors is not None and self.factors is None:
            self.factors = self.b.new_zeros(len(self.b), self.b.shape[2])
        if self.factors is not None:
            self.factors[slot] = 0 if factors is None else factors - 1
        own = [] if weights is None else [self.a[slot], self.b[slot]]
        own += [] if factors is None or self.factors is None else [self.factors[slot]]
        return sum(tensor.nbytes for tensor in own)

    def add(self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        """x (1, R, inputs), y (1, R, O), slots (S,) of R / S rows each -> y with what they add."""
        by_slot = x.reshape(len(slots), -1, x.shape[-1])
        y = y + (by_slot @ self.a[slots] @ self.b[slots]).view_as(y)
        if self.factors is not None:
            own = self.factors[slots].repeat_interleave(by_slot.shape[1], 0)[None]
            y = y + own * (y if bias is None else y - bias)
        return y


@dataclass(frozen=True)
class _Slot:
    """Where an adapter lies: in the stacks of its rank."""

    rank: int
    number: int


class _Stacks:
    """The adapters of one rank; number 0 is none."""

    def __init__(self) -> None:
        self.by_module: dict[str, _Stack] = {}
        self.num_slots = 0
        self.free: list[int] = []

    def addresses(self) -> list[int]:
        tensors = [tensor for stack in self.by_module.values() for tensor in (stack.a, stack.b, stack.factors)]
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def take(self) -> int:
        if not self.free:
            first = self.num_slots
            self.num_slots += _SLOTS
            self.free = list(range(self.num_slots - 1, max(first, 1) - 1, -1))
            for stack in self.by_module.values():
                stack.grow(self.num_slots)
        return self.free.pop()


class BatchedModel(Paged["_Slot | None"]):
    """`scheduler.Model` of a transformers model."""

    piece_tokens = BLOCK_TOKENS
    step_tokens = BLOCK_TOKENS
    num_drafts = NUM_DRAFTS
    block_tokens = BLOCK_TOKENS

    def __init__(
        self, model: PreTrainedModel, context_length: int, cache_bytes: int | None, adapter_budget_bytes: int
    ) -> None:
        """Without `cache_bytes` there is room for one whole context at least. `model` is changed in place."""
        AttentionInterface.register(_ATTENTION, _attend)
        model.set_attn_implementation(_ATTENTION)
        self._model = model
        self._device = model.device
        modules: dict[str, Any] = dict(model.named_modules())
        self._linears = {name: modules[name] for name in modeling.linear_modules(model)}
        self._sizes = {name: modeling.linear_size(module) for name, module in self._linears.items()}
        is_plain = self._device.type == devices.CPU and model.dtype is torch.float32
        for module in modules.values():
            if is_plain and type(module) is torch.nn.Linear:
                module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]
        for name, module in self._linears.items():
            module.register_forward_hook(functools.partial(self._add_adapters, name))
        self._stacks: dict[int, _Stacks] = defaultdict(_Stacks)
        self._slots: dict[int, torch.Tensor] = {}
        """Of the pass that is under way: `_Pass.slots`."""
        self._has_fixed_shapes = self._device.type != devices.CPU
        self._replays: _Replays | None = None

        probe = _Probe()
        self._layers: Sequence[_Cache] = probe
        zero = self._tensor([0])
        like = self._run(_Pass(zero[None], zero[None], zero, zero, [], {}))
        block_bytes = BLOCK_TOKENS * like.itemsize * sum(heads * sum(widths) for heads, widths in probe.shapes)
        num_blocks = count_blocks(cache_bytes, block_bytes, BLOCK_TOKENS, context_length)
        num_spare = -(-MAX_TOKENS // BLOCK_TOKENS)
        # And one more, that rows of no sequence write to.
        self._layers = [_Cache(num_blocks + num_spare + 1, *shape, like) for shape in probe.shapes]
        self._nowhere = (num_blocks + num_spare) * BLOCK_TOKENS
        # A GPU's is taken already.
        self.room_bytes = (num_blocks + num_spare + 1) * block_bytes if self._device.type == devices.CPU else 0
        self.vocabulary_size = int(model.config.get_text_config().vocab_size)
        pool = BlockPool(num_blocks, BLOCK_TOKENS)
        spare = list(range(num_blocks, num_blocks + num_spare))
        super().__init__(pool, spare, Adapters(self._load, self._remove, adapter_budget_bytes), None)
        self._most_rows = SIZES[self._device.type][-1]
        self._exact_sizes = self._find_exact_sizes()
        self._exact_shapes: set[tuple[int, int, int]] = set()
        """Of adapters that those sizes were found to hold for."""
        if self._has_fixed_shapes:
            self._try_replays(_record_graph)

    def forward(self, pieces: Sequence[_Piece]) -> Iterator[tuple[int, torch.Tensor | Exception]]:
        """Answers first, all together, then the pieces of prompts. What was closed meanwhile is left out."""
        answers = [index for index, (_, start, ids, wanted) in enumerate(pieces) if start and wanted == len(ids)]
        yield from zip(answers, self._read_answers([pieces[index] for index in answers]), strict=True)
        for index in sorted(set(range(len(pieces))) - set(answers)):
            place, start, token_ids, num_logits = pieces[index]
            if not place.table.blocks:
                continue
            try:
                logits = self._read_prompt(place, start, token_ids, num_logits)
            except Exception as error:
                yield index, error
            else:
                self.pool.name_read(place.table, start + len(token_ids))
                yield index, logits

    def _read_answers(self, pieces: Sequence[_Piece]) -> list[torch.Tensor | Exception]:
        rows = [(place, start + k, token) for place, start, token_ids, _ in pieces for k, token in enumerate(token_ids)]
        try:
            parts = [self._read_rows(rows[k : k + self._most_rows]) for k in range(0, len(rows), self._most_rows)]
        except Exception as error:
            return [error] * len(pieces)
        if not parts:
            return []
        logits, ends = torch.cat(parts), itertools.accumulate(len(token_ids) for _, _, token_ids, _ in pieces)
        return [logits[end - len(piece[2]) : end] for end, piece in zip(ends, pieces, strict=True)]

    def _read_rows(self, rows: Sequence[_Row], num_rows: int = 0) -> torch.Tensor:
        """Of every row the logits (R, V), in a pass of `num_rows`, or of as few as are enough."""
        num_rows = num_rows or next(size for size in self._exact_sizes if size >= len(rows))
        asked = self._pass_of(rows, num_rows)
        logits = self._run(asked) if self._replays is None else self._replays(asked)
        return logits[: len(rows)].to(devices.CPU, torch.float32)

    def _pass_of(self, rows: Sequence[_Row], num_rows: int) -> _Pass:
        nothing = [0] * (num_rows - len(rows))
        slots = [place.content for place, *_ in rows]
        return _Pass(
            self._tensor([[token for *_, token in rows] + nothing]),
            self._tensor([[position for _, position, _ in rows] + nothing]),
            self._tensor(list(range(num_rows))),
            self._tensor([_target(place, position) for place, position, _ in rows] + [self._nowhere] * len(nothing)),
            self._groups(rows, num_rows),
            self._by_rank([*slots, *([None] * len(nothing))]),
        )

    def _groups(self, rows: Sequence[_Row], num_rows: int) -> list[_Group]:
        blocks = [place.table.blocks[: position // BLOCK_TOKENS + 1] for place, position, _ in rows]
        positions = [position for _, position, _ in rows]
        if not self._has_fixed_shapes:
            # Each alone: on a CPU, what attention finds for two differs in the last bit from what it finds for one.
            return [
                _Group(self._tensor([[index]]), self._tensor([own]), self._tensor([[position]]))
                for index, (own, position) in enumerate(zip(blocks, positions, strict=True))
            ]
        size, most = min(num_rows, _power_of_two(len(rows))), _power_of_two(max(map(len, blocks)))
        nowhere = self._nowhere // BLOCK_TOKENS
        blocks = [own + [nowhere] * (most - len(own)) for own in blocks] + [[nowhere] * most] * (size - len(rows))
        positions += [0] * (size - len(rows))
        group = _Group(self._tensor(list(range(size))), self._tensor(blocks), self._tensor(positions))
        return [_Group(group.rows[:, None], group.blocks, group.positions[:, None])]

    def _try_replays(self, record: Callable[[Callable[[], torch.Tensor]], _Replay]) -> None:
        """Plays passes from now on, if one that is recorded gives what it gives when it is run."""
        asked = self._pass_of([(self.spare("", None), 0, 1)], self._most_rows)
        try:
            expected, replays = self._run(asked), _Replays(self._run, record)
            is_same = all(torch.equal(replays(asked), expected) for _ in range(2))
        except RuntimeError as error:
            _log.warning("passes are launched step by step: they cannot be recorded here (%s)", error)
            return
        if is_same:
            self._replays = replays
        else:
            _log.warning("passes are launched step by step: recorded ones differ from those that are run")

    def _find_exact_sizes(self) -> list[int]:
        place = self.spare("", None)
        rows = [(place, k, 31 * k % self.vocabulary_size) for k in range(self._most_rows)]
        whole = self._read_rows(rows, self._most_rows)
        *smaller, most = SIZES[self._device.type]
        return [size for size in smaller if torch.equal(self._read_rows(rows[:size], size), whole[:size])] + [most]

    def _read_prompt(
        self, place: Place[_Slot | None], start: int, token_ids: list[int], num_logits: int
    ) -> torch.Tensor:
        """The last logits (num_logits, V) of a piece of a prompt."""
        num_rows = len(token_ids)
        positions = list(range(start, start + num_rows))
        blocks = place.table.blocks[: -(-(start + num_rows) // BLOCK_TOKENS)]
        group = _Group(self._tensor([list(range(num_rows))]), self._tensor([blocks]), self._tensor([positions]))
        wanted = list(range(num_rows - max(1, num_logits), num_rows))
        asked = _Pass(
            self._tensor([token_ids]),
            self._tensor([positions]),
            self._tensor(wanted),
            self._tensor([_target(place, position) for position in positions]),
            [group],
            self._by_rank([place.content]),
        )
        return self._run(asked)[len(wanted) - num_logits :]

    @torch.inference_mode()
    def _run(self, asked: _Pass) -> torch.Tensor:
        """The logits (W, V)."""
        self._slots = asked.slots
        result = self._model(
            input_ids=asked.tokens,
            position_ids=asked.positions,
            use_cache=False,
            logits_to_keep=asked.wanted,
            layers=self._layers,
            rows=asked,
        )
        logits: torch.Tensor = result.logits[0]
        return logits

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self._device)

    # --- adapters -------------------------------------------------------------------------------------------------

    def _by_rank(self, slots: Sequence[_Slot | None]) -> dict[int, torch.Tensor]:
        return {
            rank: self._tensor([slot.number if slot is not None and slot.rank == rank else 0 for slot in slots])
            for rank in sorted({slot.rank for slot in slots if slot is not None})
        }

    def _add_adapters(self, name: str, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        for rank, slots in self._slots.items():
            if (stack := self._stacks[rank].by_module.get(name)) is not None:
                output = stack.add(inputs[0], output, module.bias, slots)
        return output

    @torch.inference_mode()
    def _load(self, adapter: Adapter) -> tuple[_Slot, int]:
        weights = modeling.read_adapter(adapter.folder, self._sizes)
        rank = len(next(iter(weights.values())).a)
        stacks = self._stacks[rank]
        before = stacks.addresses()
        number, num_bytes = stacks.take(), 0
        for name, (num_outputs, num_inputs) in self._sizes.items():
            own, stack = weights.get(name), stacks.by_module.get(name)
            if own is not None and stack is None:
                like = torch.empty(0, dtype=self._layers[0].keys.dtype, device=self._device)
                stack = stacks.by_module[name] = _Stack(num_inputs, num_outputs, rank, like)
                stack.grow(stacks.num_slots)
                self._prove_sizes(stack, (num_inputs, num_outputs, rank))
            if stack is not None:
                num_bytes += stack.put(number, own, None if own is None else self._factors(name, own))
        if self._replays is not None and stacks.addresses() != before:
            self._replays.forget()
        return _Slot(rank, number), num_bytes

    def _prove_sizes(self, stack: _Stack, shape: tuple[int, int, int]) -> None:
        """Gives up the sizes of passes that adapters of this shape do not come out of alike."""
        if shape in self._exact_shapes:
            return
        self._exact_shapes.add(shape)
        generator = torch.Generator(self._device).manual_seed(0)
        num_inputs, num_outputs, rank = shape
        trial = _Stack(num_inputs, num_outputs, rank, stack.a)
        for tensor in (trial.a, trial.b):
            tensor.resize_(self._most_rows, *tensor.shape[1:]).normal_(generator=generator)
        x = stack.a.new_empty(1, self._most_rows, num_inputs).normal_(generator=generator)
        y, slots = x.new_zeros(1, self._most_rows, num_outputs), self._tensor(list(range(self._most_rows)))
        whole = trial.add(x, y, None, slots)
        self._exact_sizes = [
            size
            for size in self._exact_sizes
            if torch.equal(trial.add(x[:, :size], y[:, :size], None, slots[:size]), whole[:, :size])
        ]

    def _factors(self, name: str, own: AdapterWeights) -> torch.Tensor | None:
        """What DoRA multiplies outputs by (Liu et al. 2024, arXiv 2402.09353, equation 5), (O,)."""
        if own.magnitude is None:
            return None
        whole = modeling.dense_weight(self._linears[name], torch.float32).cpu() + own.scaling * (own.b @ own.a)
        factors: torch.Tensor = own.magnitude / torch.linalg.vector_norm(whole, dim=1)
        return factors

    def _remove(self, slot: _Slot | None) -> None:
        assert slot is not None
        self._stacks[slot.rank].free.append(slot.number)


class _Probe(list[Any]):
    """Stands for the layers of a pass that only asks for their shapes: (K, widths of keys and values) each."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, tuple[int, int]]] = []

    def __getitem__(self, index: Any) -> Any:
        return self

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        self.shapes.append((key.shape[1], (key.shape[-1], value.shape[-1])))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layers: Sequence[_Cache],
    rows: _Pass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' layers call."""
    return layers[module.layer_idx].attend(query, key, value, rows, scaling, sliding_window), None


def _linear(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Its forward, by what is faster on a CPU."""
    return modeling.linear(x.flatten(0, -2), module.weight, module.bias).view(*x.shape[:-1], -1)


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


def _target(place: Place[_Slot | None], position: int) -> int:
    return place.table.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


def _longer(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """On a CPU, memory that is taken as it is written to."""
    if like.device.type != devices.CPU:
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros((*shape, like.itemsize), np.uint8)).view(like.dtype)[..., 0]
