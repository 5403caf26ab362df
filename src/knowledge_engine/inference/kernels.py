"""A decoder's pass over whole numbers, compiled for this machine by numba.

Every row is computed by itself and its sums are taken in one order, so that a row's result does not depend on which
rows stand beside it, on how a prompt was cut into pieces, or on what was computed before.

Shapes: R rows (one token of one sequence each), H width, N query heads and K key-value heads of width D, I inner width.
E is D, rounded up to a multiple of `HEAD_STEP`. Keys and values lie in blocks of `BLOCK_TOKENS` tokens, as whole
numbers of sixteen bits with a unit for every token and head; a sequence's table names its blocks in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import carray, get_num_threads, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from knowledge_engine.compiled import (
    BYTE,
    IN_ANY_ORDER,
    KEPT,
    OPTIONS,
    SIZE,
    WIDE,
    WIDTH,
    WORD,
    everywhere,
    exp,
    load,
    sum_up,
)

BLOCK_TOKENS = 64
HALF_LEVELS = 63
"""Seven bits with a sign: with weights of eight bits a pair of products fits in 16 bits, as older CPUs demand."""
LEVELS = HALF_LEVELS * 2 * HALF_LEVELS
"""Of a row's numbers, to either side of 0: two such halves, of which the lower one refines the higher."""
FINE_LEVELS = 32767
"""Of adapters, which are kept as whole numbers and not multiplied as such."""
HEAD_STEP = 16

_MOST = 32767
_LENGTH = 46_300
"""Of queries and keys as rows of whole numbers: with what rounding adds, the square is below 2^31."""
_VALUE_LEVELS = 16_383
_SHARES = 130_000
"""What the shares of a block add up to, so that their product with values is below 2^31, too."""

_CHUNK = 2048
"""So many products of a row's number and a weight add up to less than 2^31."""

Array = np.ndarray[Any, Any]

_F32 = np.float32
_AMOUNT, _INFINITE, _LEAST = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(-0x80000000)
_SIGN = np.int32(31)
# Where two ways must give the same, not even that.
_AS_WRITTEN = OPTIONS | {"fastmath": False}


class Linear(NamedTuple):
    """A product of all layers: weights (L, O, inputs) of int8, a scale for each output (L, O), and biases (L, O), which
    may have no columns. Or of one layer, without the L."""

    weight: Array
    scales: Array
    bias: Array


class Layers(NamedTuple):
    """All layers; norms are (L, H), and of how many tokens each layer's attention knows are windows (L,)."""

    first_norms: Array
    second_norms: Array
    windows: Array
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


class Rows(NamedTuple):
    """What a pass is of: for every row its position, the sequence it is of, and the block that its token goes to; for
    every sequence its blocks, `tables` (S, blocks), and what its adapter has for every product, `parts` (S, 4 L,
    PART_FIELDS).

    Task t takes the rows order[tasks[t]] to order[tasks[t + 1]] (T + 1,): one, two or four, all of one adapter.
    """

    positions: Array
    sequences: Array
    tables: Array
    blocks: Array
    parts: Array
    order: Array
    tasks: Array


class Room(NamedTuple):
    """Where a pass keeps what it is at: (R, ...) each, made once for the most rows."""

    x: Array
    y: Array
    normed: Array
    whole: Array
    whole_heads: Array
    whole_inner: Array
    units: Array
    qkv: Array
    queries: Array
    query_units: Array
    attended: Array
    gated: Array
    inner: Array


class Cache(NamedTuple):
    """Keys (L, blocks, K, E / 2, BLOCK_TOKENS, 2), values (L, blocks, K, BLOCK_TOKENS / 2, E, 2), and their units (L,
    blocks, K, BLOCK_TOKENS): so that sums of pairs are taken side by side, never across."""

    keys: Array
    key_units: Array
    values: Array
    value_units: Array


class Geometry(NamedTuple):
    """What all layers have in common; cos and sin are (positions, D / 2), the norm after the last layer is (H,)."""

    cos: Array
    sin: Array
    eps: float
    scaling: float
    last_norm: Array


# --- products of whole numbers ------------------------------------------------------------------------------------

_HAS_WIDE = binding.get_host_cpu_features().get("avx512bw", False)
_LANES = 32 if _HAS_WIDE else 16
_PAIRS = {32: "llvm.x86.avx512.pmaddw.d.512", 16: "llvm.x86.avx2.pmadd.wd"}[_LANES]
_AHEAD = 4608
"""Bytes: about what is read while memory answers."""
_HAS_PAIRS = _HAS_WIDE or binding.get_host_cpu_features().get("avx2", False)


_SHORT = ir.IntType(16)
_MANY, _SUMS = ir.VectorType(_SHORT, _LANES), ir.VectorType(WORD, _LANES // 2)
_TILE = 32
"""Outputs of an adapter at once."""


def _data(context: Any, builder: ir.IRBuilder, kind: Any, array: Any) -> tuple[Any, Any]:
    """Where an array begins, and the bytes from one of its rows to the next."""
    struct = context.make_array(kind)(context, builder, array)
    stride = cgutils.unpack_tuple(builder, struct.strides)[0]
    return builder.bitcast(struct.data, BYTE.as_pointer()), stride


def _pairs(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """Products of sixteen bits, each added to its neighbour's. Compilers do not find the instruction where a sum is one
    of many, so it is named; without it the same sums come from plain vectors."""
    if _HAS_PAIRS:
        kind = ir.FunctionType(_SUMS, [_MANY, _MANY])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, _PAIRS), [a, b])
    halves = []
    for start in (0, 1):
        mask = ir.Constant(ir.VectorType(WORD, _LANES // 2), [WORD(2 * k + start) for k in range(_LANES // 2)])
        parts = [builder.shuffle_vector(value, ir.Constant(_MANY, ir.Undefined), mask) for value in (a, b)]
        halves.append(builder.mul(*(builder.sext(part, _SUMS) for part in parts)))
    return builder.add(*halves)


def _pointers(context: Any, builder: ir.IRBuilder, kind: Any, array: Any, first: Any, count: int) -> list[Any]:
    """Where the rows of an array begin, so many from the first on."""
    data, stride = _data(context, builder, kind, array)
    return [builder.gep(data, [builder.mul(stride, builder.add(first, SIZE(k)))]) for k in range(count)]


def _products(builder: ir.IRBuilder, weights: list[Any], rows: list[Any], bounds: tuple[Any, Any, int]) -> list[Any]:
    """Sums of products of rows of weights and rows of whole numbers, of each of the one with each of the other, each in
    as many parts as a vector has places; bounds are columns.

    What of the weights comes next is asked for ahead, in the order in which it lies: several rows in turn are more than
    a CPU foresees, and come half as fast.
    """
    narrow, num_outputs = ir.VectorType(BYTE, _LANES), len(weights)
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), WORD, WORD, WORD])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")

    def body(at: Any, totals: list[Any]) -> list[Any]:
        of_weights = [builder.sext(load(builder, pointer, at, narrow, 1), _MANY) for pointer in weights]
        of_rows = [load(builder, pointer, builder.shl(at, SIZE(1)), _MANY, 2) for pointer in rows]
        products = [_pairs(builder, weight, row) for row in of_rows for weight in of_weights]
        for line in range(_AHEAD, _AHEAD + num_outputs * _LANES, 64):
            ahead = builder.gep(weights[0], [builder.add(builder.mul(at, SIZE(num_outputs)), SIZE(line))])
            builder.call(prefetch, [ahead, WORD(0), WORD(3), WORD(1)])
        return [builder.add(total, product) for total, product in zip(totals, products, strict=True)]

    return sum_up(builder, bounds, [ir.Constant(_SUMS, None)] * (len(rows) * num_outputs), body)


def _chosen(builder: ir.IRBuilder, left: Any, right: Any, places: list[int]) -> Any:
    """These places of two vectors that lie one behind the other."""
    mask = ir.Constant(ir.VectorType(WORD, len(places)), [WORD(place) for place in places])
    return builder.shuffle_vector(left, right, mask)


def _sums_of(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """What the places of each vector add up to, of four vectors or sixteen, as one vector.

    Two are laid into two others and added, place by place, until one place is left of each: one after the other takes
    as long as the products did.
    """
    count, length = len(vectors), _LANES // 2
    fours = range(0, length, 4)
    # Within sixteen bytes at first, which CPUs do best: places of the one and the other in turn, then pairs of them.
    levels = [
        [[four + 2 * half + k + length * side for four in fours for k in (0, 1) for side in (0, 1)] for half in (0, 1)],
        [[four + 2 * half + k + length * side for four in fours for side in (0, 1) for k in (0, 1)] for half in (0, 1)],
        [[four + k + length * side for side in (0, 1) for four in fours[half::2] for k in range(4)] for half in (0, 1)],
    ]
    for level in [*levels, levels[2]][: (min(count, length) - 1).bit_length()]:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.add(*(_chosen(builder, *pair, places) for places in level)) for pair in pairs]
    whole = vectors[0]
    for more in vectors[1:]:
        whole = _chosen(builder, whole, more, list(range(2 * length)))
    while whole.type.count > count:
        half = whole.type.count // 2
        whole = builder.add(*(_chosen(builder, whole, whole, list(range(k, k + half))) for k in (0, half)))
    return whole


def _make_block(num_outputs: int, num_rows: int) -> Any:
    """Sums of products of rows of weights and rows of whole numbers, of each of the one with each of the other."""

    @intrinsic
    def block(typingctx: Any, weight: Any, o: Any, whole: Any, r: Any, first: Any, last: Any, sums: Any) -> Any:
        """weight (O, inputs) from row o, whole (R, inputs) from row r, columns first to last, a multiple of _LANES ->
        sums (num_rows, num_outputs) of int32, flat."""
        size = types.intp
        signature = types.void(weight, size, whole, size, size, size, sums)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            weights = _pointers(context, builder, signature.args[0], args[0], args[1], num_outputs)
            rows = _pointers(context, builder, signature.args[2], args[2], args[3], num_rows)
            totals = _products(builder, weights, rows, (args[4], args[5], _LANES))
            name = f"llvm.vector.reduce.add.v{_LANES // 2}i32"
            reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORD, [_SUMS]), name)
            out = context.make_array(signature.args[6])(context, builder, args[6]).data
            for index, total in enumerate(totals):
                builder.store(builder.call(reduce, [total]), builder.gep(out, [SIZE(index)]))
            return context.get_dummy_value()

        return signature, codegen

    return block


def _make_tile(num_rows: int) -> Any:
    """Four outputs of so many rows, where all columns are a multiple of _LANES and one chunk."""

    @intrinsic
    def tile(typingctx: Any, weight: Any, o: Any, whole: Any, r: Any, scales: Any, units: Any, y: Any) -> Any:
        """weight (O, inputs) and scales (O,) from row o, whole (R, inputs) and units (R,) from row r -> y (R, O)."""
        size = types.intp
        signature = types.void(weight, size, whole, size, scales, units, y)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            weights = _pointers(context, builder, signature.args[0], args[0], args[1], 4)
            rows = _pointers(context, builder, signature.args[2], args[2], args[3], num_rows)
            shape = context.make_array(signature.args[0])(context, builder, args[0]).shape
            bounds = SIZE(0), cgutils.unpack_tuple(builder, shape)[1], _LANES
            sums = _sums_of(builder, _products(builder, weights, rows, bounds))
            kind, four = ir.VectorType(ir.FloatType(), 4 * num_rows), ir.VectorType(ir.FloatType(), 4)
            of_rows = load(
                builder,
                _data(context, builder, signature.args[5], args[5])[0],
                builder.shl(args[3], SIZE(2)),
                ir.VectorType(ir.FloatType(), num_rows),
                4,
            )
            of_outputs = load(
                builder,
                _data(context, builder, signature.args[4], args[4])[0],
                builder.shl(args[1], SIZE(2)),
                four,
                4,
            )
            places = range(4 * num_rows)
            values = builder.fmul(
                builder.sitofp(sums, kind), _chosen(builder, of_rows, of_rows, [place // 4 for place in places])
            )
            values = builder.fmul(values, _chosen(builder, of_outputs, of_outputs, [place % 4 for place in places]))
            at = builder.shl(args[1], SIZE(2))
            for k, out in enumerate(_pointers(context, builder, signature.args[6], args[6], args[3], num_rows)):
                place = builder.bitcast(builder.gep(out, [at]), four.as_pointer())
                part = _chosen(builder, values, values, list(range(4 * k, 4 * k + 4)))
                builder.store(part, place).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _make_strip(num_rows: int, num_vectors: int) -> Any:
    """Sums of pairs side by side, of so many vectors at once: what is read of the matrix serves all rows."""

    @intrinsic
    def strip(typingctx: Any, factors: Any, r: Any, matrix: Any, column: Any, sums: Any) -> Any:
        """factors (R, 2 N) of int16 from row r, matrix (N, M, 2) of int16 -> sums (R, M) of int32 from this column."""
        signature = types.void(factors, types.intp, matrix, types.intp, sums)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            rows = _pointers(context, builder, signature.args[0], args[0], args[1], num_rows)
            data, stride = _data(context, builder, signature.args[2], args[2])
            shape = context.make_array(signature.args[2])(context, builder, args[2]).shape
            offset = builder.mul(args[3], SIZE(4))
            start = builder.gep(data, [offset])

            def body(n: Any, totals: list[Any]) -> list[Any]:
                at = builder.mul(n, stride)
                values = [
                    load(builder, start, builder.add(at, SIZE(2 * _LANES * k)), _MANY, 2) for k in range(num_vectors)
                ]
                pairs = [load(builder, row, builder.mul(n, SIZE(4)), WORD, 2) for row in rows]
                both = [builder.bitcast(everywhere(builder, pair, _LANES // 2), _MANY) for pair in pairs]
                products = [_pairs(builder, factor, value) for factor in both for value in values]
                return [builder.add(total, product) for total, product in zip(totals, products, strict=True)]

            nothing = [ir.Constant(_SUMS, None)] * (num_rows * num_vectors)
            bounds = SIZE(0), cgutils.unpack_tuple(builder, shape)[0], 1
            totals = iter(sum_up(builder, bounds, nothing, body))
            for out in _pointers(context, builder, signature.args[4], args[4], args[1], num_rows):
                for k in range(num_vectors):
                    place = builder.gep(out, [builder.add(offset, SIZE(2 * _LANES * k))])
                    builder.store(next(totals), builder.bitcast(place, _SUMS.as_pointer())).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return strip


def _fused(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the CPU can."""
    kind = ir.FunctionType(WIDE, [WIDE] * 3)
    multiply = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32")
    return builder.call(multiply, [a, b, c])


def _widened(builder: ir.IRBuilder, pointer: Any, at: Any) -> Any:
    """Whole numbers of sixteen bits, so many bytes after the pointer, as floating-point ones."""
    narrow, words = ir.VectorType(_SHORT, WIDTH), ir.VectorType(WORD, WIDTH)
    return builder.sitofp(builder.sext(load(builder, pointer, at, narrow, 2), words), WIDE)


def _some_rows(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, count: int) -> list[Any]:
    """Where rows of the array that is the first argument begin: those that the second one, from the third on, names."""
    data, stride = _data(context, builder, signature.args[0], args[0])
    names, _ = _data(context, builder, signature.args[1], args[1])
    at = [builder.mul(builder.add(args[2], SIZE(k)), SIZE(8)) for k in range(count)]
    return [builder.gep(data, [builder.mul(stride, load(builder, names, offset, SIZE, 8))]) for offset in at]


def _make_low(num_rows: int) -> Any:
    """What four ranks of an adapter make of so many rows. Their sums have the same order whatever the number."""

    @intrinsic
    def low(typingctx: Any, x: Any, order: Any, first: Any, a: Any, rank: Any, end: Any, sums: Any) -> Any:
        """x (R, inputs) of float32 in the rows order[first:], a (ranks, inputs) of int16 from this rank, up to column
        `end`, a multiple of WIDTH -> sums (num_rows, 4) of float32, flat."""
        size = types.intp
        signature = types.void(x, order, size, a, size, size, sums)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            rows = _some_rows(context, builder, signature, args, num_rows)
            ranks = _pointers(context, builder, signature.args[3], args[3], args[4], 4)

            def body(at: Any, totals: list[Any]) -> list[Any]:
                of_ranks = [_widened(builder, pointer, builder.shl(at, SIZE(1))) for pointer in ranks]
                of_rows = [load(builder, row, builder.shl(at, SIZE(2)), WIDE, 4) for row in rows]
                factors = [(row, rank) for row in of_rows for rank in of_ranks]
                return [_fused(builder, *pair, total) for pair, total in zip(factors, totals, strict=True)]

            nothing = [ir.Constant(WIDE, None)] * (num_rows * 4)
            totals = sum_up(builder, (SIZE(0), args[5], WIDTH), nothing, body)
            out = context.make_array(signature.args[6])(context, builder, args[6]).data
            for index, total in enumerate(totals):
                width = WIDTH
                while width > 1:  # halves are added until one number is left
                    width //= 2
                    kind = ir.VectorType(WORD, width)
                    halves = [ir.Constant(kind, [WORD(begin + k) for k in range(width)]) for begin in (0, width)]
                    left, right = (builder.shuffle_vector(total, total, half) for half in halves)
                    total = builder.fadd(left, right)
                builder.store(builder.extract_element(total, WORD(0)), builder.gep(out, [SIZE(index)]))
            return context.get_dummy_value()

        return signature, codegen

    return low


def _make_high(num_rows: int) -> Any:
    """Adds to _TILE outputs of so many rows what all ranks of a module make of them."""

    @intrinsic
    def high(typingctx: Any, y: Any, order: Any, first: Any, o: Any, lows: Any, rank: Any, b: Any, column: Any) -> Any:
        """y (R, O) of float32 in the rows order[first:], from output o on; lows (num_rows, ranks) of float32 from this
        rank on, b (ranks, O) of int16 from this column on."""
        size = types.intp
        signature = types.void(y, order, size, size, lows, size, b, size)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            rows = _some_rows(context, builder, signature, args, num_rows)
            offset = builder.shl(args[3], SIZE(2))
            places = [
                builder.gep(row, [builder.add(offset, SIZE(4 * k))]) for row in rows for k in range(0, _TILE, WIDTH)
            ]
            of_rows = _pointers(context, builder, signature.args[4], args[4], SIZE(0), num_rows)
            data, stride = _data(context, builder, signature.args[6], args[6])
            columns = builder.gep(data, [builder.shl(args[7], SIZE(1))])
            shape = context.make_array(signature.args[6])(context, builder, args[6]).shape

            def body(n: Any, totals: list[Any]) -> list[Any]:
                at = builder.mul(n, stride)
                values = [_widened(builder, columns, builder.add(at, SIZE(2 * k))) for k in range(0, _TILE, WIDTH)]
                place = builder.shl(builder.add(args[5], n), SIZE(2))
                lows = [load(builder, row, place, ir.FloatType(), 4) for row in of_rows]
                factors = [(everywhere(builder, low, WIDTH), value) for low in lows for value in values]
                return [_fused(builder, *pair, total) for pair, total in zip(factors, totals, strict=True)]

            known = [load(builder, place, SIZE(0), WIDE, 4) for place in places]
            bounds = SIZE(0), cgutils.unpack_tuple(builder, shape)[0], 1
            for place, total in zip(places, sum_up(builder, bounds, known, body), strict=True):
                builder.store(total, builder.bitcast(place, WIDE.as_pointer())).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return high


_one, _column, _square = _make_block(1, 1), _make_block(4, 1), _make_block(4, 4)
_tile1, _tile4 = _make_tile(1), _make_tile(4)
_strip1, _strip4, _strip2x4, _strip3x4 = _make_strip(1, 1), _make_strip(1, 4), _make_strip(2, 4), _make_strip(3, 4)
_low1, _low2, _low4 = _make_low(1), _make_low(2), _make_low(4)
_high1, _high2, _high4 = _make_high(1), _make_high(2), _make_high(4)


@njit(**_AS_WRITTEN)
def _multiply_tile(whole: Array, linear: Linear, units: Array, y: Array, begin: int, end: int) -> None:
    """Outputs begin to end of y (R, O), for all rows."""
    num_rows, num_inputs = whole.shape
    weight, scales, bias = linear.weight, linear.scales, linear.bias
    even = num_inputs - num_inputs % _LANES
    is_short = 0 < even == num_inputs <= _CHUNK
    sums, totals = np.empty(16, np.int32), np.zeros(16, np.int64)
    o = begin
    while o < end:
        num_outputs = 4 if num_rows >= (2 if is_short else 4) and end - o >= 4 else 1
        r = 0
        while r < num_rows:
            count = 4 if num_outputs == 4 and num_rows - r >= 4 else 1
            if is_short and num_outputs == 4:
                if count == 4:
                    _tile4(weight, o, whole, r, scales, units, y)
                else:
                    _tile1(weight, o, whole, r, scales, units, y)
                if len(bias):
                    for row in range(r, r + count):
                        for k in range(o, o + 4):
                            y[row, k] += bias[k]
                r += count
                continue
            for first in range(0, even, _CHUNK):
                last = min(first + _CHUNK, even)
                if count == 4:
                    _square(weight, o, whole, r, first, last, sums)
                elif num_outputs == 4:
                    _column(weight, o, whole, r, first, last, sums)
                else:
                    _one(weight, o, whole, r, first, last, sums)
                for index in range(count * num_outputs):
                    totals[index] += sums[index]
            for index in range(count * num_outputs):
                row, k = r + index // num_outputs, o + index % num_outputs
                total = totals[index]
                totals[index] = 0
                for i in range(even, num_inputs):
                    total += np.int32(weight[k, i]) * np.int32(whole[row, i])
                value = _F32(total) * units[row] * scales[k]
                y[row, k] = value + bias[k] if len(bias) else value
            r += count
        o += num_outputs


@njit(parallel=True, **_AS_WRITTEN)
def _multiply_rows(whole: Array, linear: Linear, units: Array, y: Array) -> None:
    num_outputs = len(linear.weight)
    for task in prange((num_outputs + 31) // 32):
        _multiply_tile(whole, linear, units, y, 32 * task, min(32 * (task + 1), num_outputs))


@njit(parallel=True, **OPTIONS)
def _halve_rows(whole: Array, halves: Array) -> None:
    num_rows, num_inputs = whole.shape
    for r in prange(num_rows):
        for i in range(num_inputs):
            high = np.rint(_F32(whole[r, i]) * _F32(1.0 / (2 * HALF_LEVELS)))
            halves[r, i] = np.int8(high)
            halves[num_rows + r, i] = np.int8(_F32(whole[r, i]) - high * _F32(2 * HALF_LEVELS))


@njit(parallel=True, **_AS_WRITTEN)
def _join_rows(sums: Array, linear: Linear, units: Array, y: Array) -> None:
    num_rows, num_outputs = y.shape
    for r in prange(num_rows):
        for o in range(num_outputs):
            total = np.int64(sums[r, o]) * np.int64(2 * HALF_LEVELS) + np.int64(sums[num_rows + r, o])
            value = _F32(total) * units[r] * linear.scales[o]
            y[r, o] = value + linear.bias[o] if len(linear.bias) else value


# --- rows ---------------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def _add_pairs(factors: Array, matrix: Array, sums: Array) -> None:
    """factors (R, 2 N), matrix (N, M, 2) -> sums (R, M) of int32; M is a multiple of HEAD_STEP."""
    num_rows, num_columns = sums.shape
    step = 2 * _LANES
    even = num_columns - num_columns % step
    for column in range(0, even, step):
        r = 0
        while r < num_rows:
            left = num_rows - r
            if left == 1:
                _strip4(factors, r, matrix, column, sums)
                r += 1
            elif left == 2 or left == 4:
                _strip2x4(factors, r, matrix, column, sums)
                r += 2
            else:
                _strip3x4(factors, r, matrix, column, sums)
                r += 3
    for column in range(even, num_columns, _LANES // 2):
        for r in range(num_rows):
            _strip1(factors, r, matrix, column, sums)


@njit(**OPTIONS)
def _largest(x: Array) -> Any:
    """The largest amount in x (I,), or not a number where one of them is not finite. Of numbers without a sign the bits
    have the same order, and of whole numbers the largest is found many at a time."""
    bits, top = x.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] & _AMOUNT))
    amount = np.int32(top)
    return amount.view(_F32) if amount < _INFINITE else _F32(np.nan)


@njit(**OPTIONS)
def _top(x: Array) -> Any:
    """The largest number in x (I,), or not a number where there is one that is none and has no sign."""
    bits, top = x.view(np.int32), _LEAST
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] ^ ((bits[i] >> _SIGN) & _AMOUNT)))
    return np.int32(top ^ ((top >> _SIGN) & _AMOUNT)).view(_F32)


@njit(**IN_ANY_ORDER)
def _total(x: Array) -> Any:
    total = _F32(0.0)
    for i in range(len(x)):
        total += x[i]
    return total


@njit(**IN_ANY_ORDER)
def _total_of_squares(x: Array) -> Any:
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@njit(**OPTIONS)
def _round_by(x: Array, whole: Array, unit: Any) -> Any:
    """Rounds a row (I,) to whole numbers of this unit, which it returns; to zeros where that is none."""
    if not unit > 0:
        whole[:] = 0
        return unit
    unit = max(unit, _F32(1e-34))
    inverse = _F32(1.0) / unit
    for i in range(len(x)):
        whole[i] = np.int16(np.rint(x[i] * inverse))
    return unit


@njit(**OPTIONS)
def _round(x: Array, whole: Array, levels: Any) -> Any:
    """Rounds a row (I,) to whole numbers within -levels and levels; returns what one of them is worth."""
    return _round_by(x, whole, _largest(x) / _F32(levels))


@njit(**OPTIONS)
def _round_to_length(x: Array, whole: Array) -> Any:
    """Rounds a row (I,) so that its product with any other rounded so is below 2^31 (Cauchy and Schwarz)."""
    length = np.sqrt(_total_of_squares(x))
    return _round_by(x, whole, max(_largest(x) / _F32(_MOST), _F32(length / _LENGTH)))


@njit(**OPTIONS)
def _norm(x: Array, y: Array, weight: Array, eps: Any, normed: Array, whole: Array) -> Any:
    """x (H,) += y, which may be empty; normed = w x / sqrt(mean(x^2) + eps) (H,), and the same rounded: its unit."""
    width = len(x)
    if len(y):
        for i in range(width):
            x[i] += y[i]
    inverse = _F32(1.0 / np.sqrt(_total_of_squares(x) / width + eps))
    for i in range(width):
        normed[i] = weight[i] * (x[i] * inverse)
    return _round(normed, whole, LEVELS)


def _make_pointer(item: Any) -> Any:
    kind = types.CPointer(item)

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        """An address as a pointer."""

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    return pointer


_shorts_at, _floats_at, _sizes_at = _make_pointer(types.int16), _make_pointer(types.float32), _make_pointer(types.int64)

PART_FIELDS = 7
"""An adapter's share in one product, in `Rows.parts`: how many modules and ranks it has, and the addresses of a, b,
units, modules and factors, 0 for none.

a (ranks, inputs) of int16 holds the ranks of all the modules that y is the output of, of each a multiple of four. A
module's outputs begin at modules[m, 0] and are modules[m, 1] many; it has modules[m, 2] ranks, and its B (ranks,
outputs) of int16 begins at b[modules[m, 3]]. What a rank of a and its row of B are worth together, times the scaling,
is units (ranks,). Where factors (O,) are given, what is not bias is multiplied by them (DoRA; Liu et al. 2024, arXiv
2402.09353, equation 5).
"""


@njit(**_AS_WRITTEN)
def _adapt(x: Array, y: Array, rows: Rows, product: int, task: int, bias: Array) -> None:
    """Adds to a task's rows of y (R, O) what their adapter makes of x (R, inputs)."""
    order, first = rows.order, rows.tasks[task]
    count = rows.tasks[task + 1] - first
    part = rows.parts[rows.sequences[order[first]], product]
    num_modules, num_ranks, num_inputs = part[0], part[1], x.shape[1]
    if not num_modules:
        return
    a = carray(_shorts_at(part[2]), (num_ranks, num_inputs))
    units = carray(_floats_at(part[4]), num_ranks)
    modules = carray(_sizes_at(part[5]), (num_modules, 4))
    lows, sums = np.empty((4, num_ranks), _F32), np.zeros(16, _F32)
    even = num_inputs - num_inputs % WIDTH
    for rank in range(0, num_ranks, 4):
        if even and count == 1:
            _low1(x, order, first, a, rank, even, sums)
        elif even and count == 2:
            _low2(x, order, first, a, rank, even, sums)
        elif even:
            _low4(x, order, first, a, rank, even, sums)
        for index in range(4 * count):
            r, k = order[first + index // 4], rank + index % 4
            total = sums[index]
            for i in range(even, num_inputs):
                total += x[r, i] * _F32(a[k, i])
            lows[index // 4, k] = total * units[k]
    rank = 0
    for m in range(num_modules):
        start, size, ranks = modules[m, 0], modules[m, 1], modules[m, 2]
        b = carray(_shorts_at(part[3] + 2 * modules[m, 3]), (ranks, size))
        even = size - size % _TILE
        for o in range(0, even, _TILE):
            if count == 1:
                _high1(y, order, first, start + o, lows, rank, b, o)
            elif count == 2:
                _high2(y, order, first, start + o, lows, rank, b, o)
            else:
                _high4(y, order, first, start + o, lows, rank, b, o)
        for o in range(even, size):
            for index in range(count):
                total = y[order[first + index], start + o]
                for k in range(ranks):
                    total += lows[index, rank + k] * _F32(b[k, o])
                y[order[first + index], start + o] = total
        rank += ranks
    if part[6]:
        factors = carray(_floats_at(part[6]), y.shape[1])
        for index in range(count):
            of_row = y[order[first + index]]
            for o in range(len(of_row)):
                shift = bias[o] if len(bias) else _F32(0.0)
                of_row[o] = (of_row[o] - shift) * factors[o] + shift


@njit(**OPTIONS)
def _gate(gated: Array, inner: Array, whole: Array) -> Any:
    """gated (2 I,), gate and up -> inner = silu(gate) up (I,), and the same rounded: its unit."""
    width = len(inner)
    for i in range(width):
        gate = gated[i]
        small = exp(-abs(gate))
        sigmoid = (_F32(1.0) if gate >= 0 else small) / (_F32(1.0) + small)
        inner[i] = gate * sigmoid * gated[width + i]
    return _round(inner, whole, LEVELS)


@njit(**OPTIONS)
def _store(qkv: Array, n: int, r: int, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """Turns queries and keys by their position (Su et al. 2021, arXiv 2104.09864) and rounds them, puts key and value
    in their block: qkv ((N + 2 K) D,)."""
    block, at = rows.blocks[r], rows.positions[r] % BLOCK_TOKENS
    cos, sin = geometry.cos[rows.positions[r]], geometry.sin[rows.positions[r]]
    num_heads, num_keys, half = room.queries.shape[1], cache.keys.shape[2], len(cos)
    width = 2 * half
    turned, rounded = np.empty(width, _F32), np.empty(width, np.int16)
    for head in range(num_heads + num_keys):
        of_head = qkv[head * width : (head + 1) * width]
        for d in range(half):
            left, right = of_head[d], of_head[half + d]
            turned[d] = left * cos[d] - right * sin[d]
            turned[half + d] = right * cos[d] + left * sin[d]
        unit = _round_to_length(turned, rounded)
        if head < num_heads:
            room.query_units[r, head] = unit
            room.queries[r, head, :width] = rounded
            continue
        key = head - num_heads
        cache.key_units[n, block, key, at] = unit
        keys, values = cache.keys[n, block, key], cache.values[n, block, key, at // 2]
        for d in range(half):
            keys[d, at, 0] = rounded[2 * d]
            keys[d, at, 1] = rounded[2 * d + 1]
        start = (head + num_keys) * width
        cache.value_units[n, block, key, at] = _round(qkv[start : start + width], rounded, _VALUE_LEVELS)
        values[:width, at % 2] = rounded


@njit(**OPTIONS)
def _attend(n: int, r: int, key: int, window: int, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """Attention of the heads that read one key-value head to the tokens up to the row's own, or to the last `window` of
    them -> their part of `room.attended`. The softmax is taken block by block (Milakov and Gimelshein 2018, arXiv
    1805.02867)."""
    num_heads, padded = room.queries.shape[1:]
    group, width = num_heads // cache.keys.shape[2], 2 * geometry.cos.shape[1]
    end = rows.positions[r] + 1
    begin = max(0, end - window)
    heads = room.queries[r, key * group : (key + 1) * group]
    of_scores, shares = np.empty((group, BLOCK_TOKENS), np.int32), np.empty((group, BLOCK_TOKENS), np.int16)
    of_values, scores = np.empty((group, padded), np.int32), np.empty(BLOCK_TOKENS, _F32)
    sums, steps = np.zeros((group, width), _F32), np.empty((group, 2), _F32)
    tops, totals = np.full(group, _F32(-np.inf)), np.zeros(group, _F32)
    for index in range(begin // BLOCK_TOKENS, (end + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
        block = rows.tables[rows.sequences[r], index]
        keys, values = cache.keys[n, block, key], cache.values[n, block, key]
        key_units, value_units = cache.key_units[n, block, key], cache.value_units[n, block, key]
        first = max(0, begin - index * BLOCK_TOKENS)
        last = min(BLOCK_TOKENS, end - index * BLOCK_TOKENS)
        _add_pairs(heads, keys, of_scores)
        for g in range(group):
            of_head, unit = of_scores[g], room.query_units[r, key * group + g] * _F32(geometry.scaling)
            for t in range(BLOCK_TOKENS):
                scores[t] = _F32(of_head[t]) * (unit * key_units[t])
            scores[:first] = _F32(-np.inf)
            scores[last:] = _F32(-np.inf)
            top = max(tops[g], _top(scores))
            shrink = exp(tops[g] - top)
            for t in range(BLOCK_TOKENS):
                scores[t] = exp(scores[t] - top)
            scores[:first] = _F32(0.0)
            scores[last:] = _F32(0.0)
            tops[g], totals[g] = top, totals[g] * shrink + _total(scores)
            for t in range(BLOCK_TOKENS):
                scores[t] *= value_units[t]
            unit = max(_largest(scores) / _F32(_MOST), _total(scores) / _F32(_SHARES))
            _round_by(scores, shares[g], unit)
            steps[g, 0], steps[g, 1] = shrink, unit
        _add_pairs(shares, values, of_values)
        for g in range(group):
            shrink, unit, of_head = steps[g, 0], steps[g, 1], sums[g]
            for d in range(width):
                of_head[d] = of_head[d] * shrink + _F32(of_values[g, d]) * unit
    for g in range(group):
        for d in range(width):
            room.attended[r, (key * group + g) * width + d] = sums[g, d] / totals[g]


# --- what lies between two products -------------------------------------------------------------------------------


@njit(**OPTIONS)
def _of_layer(linear: Linear, n: int) -> Linear:
    return Linear(linear.weight[n], linear.scales[n], linear.bias[n])


@njit(parallel=True, **OPTIONS)
def _begin_rows(layers: Layers, room: Room, geometry: Geometry) -> None:
    weight, nothing = layers.first_norms[0], room.y[0, :0]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(room.x)):
        units[r] = _norm(room.x[r], nothing, weight, geometry.eps, room.normed[r], room.whole[r])


# One loop each: of several in one function numba moves one before another where it sees no variable set.
@njit(parallel=True, **OPTIONS)
def _store_rows(n: int, bias: Array, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    for task in prange(len(rows.tasks) - 1):
        _adapt(room.normed, room.qkv, rows, 4 * n, task, bias)
        for index in range(rows.tasks[task], rows.tasks[task + 1]):
            r = rows.order[index]
            _store(room.qkv[r], n, r, rows, room, cache, geometry)


@njit(parallel=True, **OPTIONS)
def _attend_heads(n: int, window: int, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    num_keys = cache.keys.shape[2]
    for task in prange(len(rows.positions) * num_keys):
        _attend(n, task // num_keys, task % num_keys, window, rows, room, cache, geometry)


@njit(parallel=True, **OPTIONS)
def _round_rows(x: Array, whole: Array, units: Array) -> None:
    for r in prange(len(x)):
        units[r] = _round(x[r], whole[r], LEVELS)


@njit(**OPTIONS)
def _attend_rows(n: int, layers: Layers, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    _store_rows(n, layers.qkv.bias[n], rows, room, cache, geometry)
    _attend_heads(n, layers.windows[n], rows, room, cache, geometry)
    _round_rows(room.attended, room.whole_heads, room.units)


@njit(parallel=True, **OPTIONS)
def _close_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    weight, bias = layers.second_norms[n], layers.o.bias[n]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for task in prange(len(rows.tasks) - 1):
        _adapt(room.attended, room.y, rows, 4 * n + 1, task, bias)
        for index in range(rows.tasks[task], rows.tasks[task + 1]):
            r = rows.order[index]
            units[r] = _norm(room.x[r], room.y[r], weight, geometry.eps, room.normed[r], room.whole[r])


@njit(parallel=True, **OPTIONS)
def _gate_rows(n: int, layers: Layers, rows: Rows, room: Room) -> None:
    bias = layers.gate_up.bias[n]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for task in prange(len(rows.tasks) - 1):
        _adapt(room.normed, room.gated, rows, 4 * n + 2, task, bias)
        for index in range(rows.tasks[task], rows.tasks[task + 1]):
            r = rows.order[index]
            units[r] = _gate(room.gated[r], room.inner[r], room.whole_inner[r])


@njit(parallel=True, **OPTIONS)
def _end_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    bias = layers.down.bias[n]
    weight = layers.first_norms[n + 1] if n + 1 < len(layers.first_norms) else geometry.last_norm
    units = room.units  # numba loses what a loop sets in a tuple's array
    for task in prange(len(rows.tasks) - 1):
        _adapt(room.inner, room.y, rows, 4 * n + 3, task, bias)
        for index in range(rows.tasks[task], rows.tasks[task + 1]):
            r = rows.order[index]
            units[r] = _norm(room.x[r], room.y[r], weight, geometry.eps, room.normed[r], room.whole[r])


# --- what Python calls --------------------------------------------------------------------------------------------


def num_threads() -> int:
    """How many take the rows of a pass."""
    return int(get_num_threads())


@njit(**KEPT)
def multiply_rows(whole: Array, linear: Linear, units: Array, y: Array) -> None:
    """y (R, O) = whole (R, inputs), in units (R,), times the transpose of the weight, in its scales, plus the bias.

    The weights are read once, as fast as memory gives them.
    """
    _multiply_rows(whole, linear, units, y)


@njit(**KEPT)
def halve_rows(whole: Array, halves: Array) -> None:
    """whole (R, I) = 2 HALF_LEVELS high + low -> halves (2 R, I), the high ones first."""
    _halve_rows(whole, halves)


@njit(**KEPT)
def join_rows(sums: Array, linear: Linear, units: Array, y: Array) -> None:
    """The products of both halves, sums (2 R, O), as `multiply_rows` gives y (R, O)."""
    _join_rows(sums, linear, units, y)


NUM_STAGES = 8
"""Of a layer, in turn: a product and what follows it, four times."""


@njit(**KEPT)
def pass_rows(first: int, last: int, layers: Layers, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """Stages `first` to `last` of a pass, so that somebody else may multiply in between. One function for all of them:
    compiling takes seconds.

    Before stage 0 the tokens' embeddings are in `room.x`; after the last stage of the last layer the head's input is in
    `room.whole`. Products are of `room.whole` -> `room.qkv`, `room.whole_heads` -> `room.y`, `room.whole` ->
    `room.gated`, and `room.whole_inner` -> `room.y`, with `room.units`.
    """
    if first == 0:
        _begin_rows(layers, room, geometry)
    for stage in range(first, last):
        n, what = stage // NUM_STAGES, stage % NUM_STAGES
        if what == 0:
            _multiply_rows(room.whole, _of_layer(layers.qkv, n), room.units, room.qkv)
        elif what == 1:
            _attend_rows(n, layers, rows, room, cache, geometry)
        elif what == 2:
            _multiply_rows(room.whole_heads, _of_layer(layers.o, n), room.units, room.y)
        elif what == 3:
            _close_rows(n, layers, rows, room, geometry)
        elif what == 4:
            _multiply_rows(room.whole, _of_layer(layers.gate_up, n), room.units, room.gated)
        elif what == 5:
            _gate_rows(n, layers, rows, room)
        elif what == 6:
            _multiply_rows(room.whole_inner, _of_layer(layers.down, n), room.units, room.y)
        else:
            _end_rows(n, layers, rows, room, geometry)
