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
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

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
_LARGEST = np.finfo(np.float32).max
_SMALLEST = _F32(-87.0)  # e to the power of less is no normal number any more
# Fused multiply-add is the one liberty that the compiler has: it rounds once instead of twice, in every row alike.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
# Where two ways must give the same, not even that.
_AS_WRITTEN = _OPTIONS | {"fastmath": False}
# And here the order of a sum, which it chooses once, for all rows.
_IN_ANY_ORDER = _OPTIONS | {"fastmath": {"contract", "reassoc", "nsz"}}
# Only what Python calls is kept on the disk, and nothing kept calls another: what numba 0.68 compiles beside a kept
# function with a parallel loop crashes once it is kept itself.
_KEPT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}


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
    """What a pass is of: for every row its position, the row of `tables` (S, blocks) that its sequence has, and the
    block that its own token goes to. `parts` (R, 4 L, PART_FIELDS) says what its adapter has for every product."""

    positions: Array
    sequences: Array
    tables: Array
    blocks: Array
    parts: Array


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


_BYTE, _SHORT, _WORD, _SIZE = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_MANY, _SUMS = ir.VectorType(_SHORT, _LANES), ir.VectorType(_WORD, _LANES // 2)


def _data(context: Any, builder: ir.IRBuilder, kind: Any, array: Any) -> tuple[Any, Any]:
    """Where an array begins, and the bytes from one of its rows to the next."""
    struct = context.make_array(kind)(context, builder, array)
    stride = cgutils.unpack_tuple(builder, struct.strides)[0]
    return builder.bitcast(struct.data, _BYTE.as_pointer()), stride


def _load(builder: ir.IRBuilder, pointer: Any, at: Any, kind: Any, align: int) -> Any:
    """What lies so many bytes after the pointer."""
    value = builder.load(builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer()))
    value.align = align
    return value


def _pairs(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """Products of sixteen bits, each added to its neighbour's. Compilers do not find the instruction where a sum is one
    of many, so it is named; without it the same sums come from plain vectors."""
    if _HAS_PAIRS:
        kind = ir.FunctionType(_SUMS, [_MANY, _MANY])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, _PAIRS), [a, b])
    halves = []
    for start in (0, 1):
        mask = ir.Constant(ir.VectorType(_WORD, _LANES // 2), [_WORD(2 * k + start) for k in range(_LANES // 2)])
        parts = [builder.shuffle_vector(value, ir.Constant(_MANY, ir.Undefined), mask) for value in (a, b)]
        halves.append(builder.mul(*(builder.sext(part, _SUMS) for part in parts)))
    return builder.add(*halves)


def _make_block(num_outputs: int, num_rows: int) -> Any:
    """Sums of products of rows of weights and rows of whole numbers, of each of the one with each of the other.

    What of the weights comes next is asked for ahead, in the order in which it lies: several rows in turn are more than
    a CPU foresees, and come half as fast.
    """

    @intrinsic
    def block(typingctx: Any, weight: Any, o: Any, whole: Any, r: Any, first: Any, last: Any, sums: Any) -> Any:
        """weight (O, inputs) from row o, whole (R, inputs) from row r, columns first to last, a multiple of _LANES ->
        sums (num_rows, num_outputs) of int32, flat."""
        size = types.intp
        signature = types.void(weight, size, whole, size, size, size, sums)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            def pointers(index: int, count: int) -> list[Any]:
                data, stride = _data(context, builder, signature.args[index], args[index])
                start = args[index + 1]
                return [builder.gep(data, [builder.mul(stride, builder.add(start, _SIZE(k)))]) for k in range(count)]

            weights, rows = pointers(0, num_outputs), pointers(2, num_rows)
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            at = builder.phi(_SIZE)
            totals = [builder.phi(_SUMS) for _ in range(num_rows * num_outputs)]
            narrow = ir.VectorType(_BYTE, _LANES)
            of_weights = [builder.sext(_load(builder, pointer, at, narrow, 1), _MANY) for pointer in weights]
            of_rows = [_load(builder, pointer, builder.shl(at, _SIZE(1)), _MANY, 2) for pointer in rows]
            products = [_pairs(builder, weight, row) for row in of_rows for weight in of_weights]
            added = [builder.add(total, product) for total, product in zip(totals, products, strict=True)]
            kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _WORD, _WORD, _WORD])
            prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            for line in range(_AHEAD, _AHEAD + num_outputs * _LANES, 64):
                ahead = builder.gep(weights[0], [builder.add(builder.mul(at, _SIZE(num_outputs)), _SIZE(line))])
                builder.call(prefetch, [ahead, _WORD(0), _WORD(3), _WORD(1)])
            following = builder.add(at, _SIZE(_LANES))
            builder.cbranch(builder.icmp_signed("<", following, args[5]), loop, after)
            at.add_incoming(args[4], before)
            at.add_incoming(following, loop)
            for total, more in zip(totals, added, strict=True):
                total.add_incoming(ir.Constant(_SUMS, None), before)
                total.add_incoming(more, loop)
            builder.position_at_end(after)
            name = f"llvm.vector.reduce.add.v{_LANES // 2}i32"
            reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_WORD, [_SUMS]), name)
            out = context.make_array(signature.args[6])(context, builder, args[6]).data
            for index, more in enumerate(added):
                builder.store(builder.call(reduce, [more]), builder.gep(out, [_SIZE(index)]))
            return context.get_dummy_value()

        return signature, codegen

    return block


def _make_strip(num_vectors: int) -> Any:
    """Sums of pairs side by side, of so many vectors at once."""

    @intrinsic
    def strip(typingctx: Any, factors: Any, matrix: Any, column: Any, sums: Any) -> Any:
        """factors (2 N,) of int16, matrix (N, M, 2) of int16 -> sums (M,) of int32, from this column on."""
        signature = types.void(factors, matrix, types.intp, sums)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            pairs, _ = _data(context, builder, signature.args[0], args[0])
            data, stride = _data(context, builder, signature.args[1], args[1])
            shape = context.make_array(signature.args[1])(context, builder, args[1]).shape
            num_rows = cgutils.unpack_tuple(builder, shape)[0]
            start = builder.gep(data, [builder.mul(args[2], _SIZE(4))])
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            n = builder.phi(_SIZE)
            totals = [builder.phi(_SUMS) for _ in range(num_vectors)]
            pair = _load(builder, pairs, builder.mul(n, _SIZE(4)), _WORD, 2)
            nothing = ir.Constant(_SUMS, ir.Undefined)
            mask = ir.Constant(ir.VectorType(_WORD, _LANES // 2), [_WORD(0)] * (_LANES // 2))
            alike = builder.shuffle_vector(builder.insert_element(nothing, pair, _WORD(0)), nothing, mask)
            factor, row = builder.bitcast(alike, _MANY), builder.mul(n, stride)
            added = []
            for k, total in enumerate(totals):
                value = _load(builder, start, builder.add(row, _SIZE(2 * _LANES * k)), _MANY, 2)
                added.append(builder.add(total, _pairs(builder, factor, value)))
            following = builder.add(n, _SIZE(1))
            builder.cbranch(builder.icmp_signed("<", following, num_rows), loop, after)
            n.add_incoming(_SIZE(0), before)
            n.add_incoming(following, loop)
            for total, more in zip(totals, added, strict=True):
                total.add_incoming(ir.Constant(_SUMS, None), before)
                total.add_incoming(more, loop)
            builder.position_at_end(after)
            out, _ = _data(context, builder, signature.args[3], args[3])
            for k, more in enumerate(added):
                offset = builder.add(builder.mul(args[2], _SIZE(4)), _SIZE(2 * _LANES * k))
                place = builder.bitcast(builder.gep(out, [offset]), _SUMS.as_pointer())
                builder.store(more, place).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return strip


_one, _column, _square = _make_block(1, 1), _make_block(4, 1), _make_block(4, 4)
_strip1, _strip4 = _make_strip(1), _make_strip(4)


@njit(**_AS_WRITTEN)
def _multiply_tile(whole: Array, linear: Linear, units: Array, y: Array, begin: int, end: int) -> None:
    """Outputs begin to end of y (R, O), for all rows."""
    num_rows, num_inputs = whole.shape
    weight, scales, bias = linear.weight, linear.scales, linear.bias
    even = num_inputs - num_inputs % _LANES
    sums, totals = np.empty(16, np.int32), np.zeros(16, np.int64)
    o = begin
    while o < end:
        num_outputs = 4 if num_rows >= 4 and end - o >= 4 else 1
        r = 0
        while r < num_rows:
            count = 4 if num_outputs == 4 and num_rows - r >= 4 else 1
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


@njit(parallel=True, **_OPTIONS)
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


@njit(**_IN_ANY_ORDER)
def _dot4(x: Array, matrix: Array, first: int) -> Any:
    """x (I,) times four rows of matrix (rows, I): x is read once for all of them."""
    sum0 = sum1 = sum2 = sum3 = _F32(0.0)
    for i in range(len(x)):
        value = x[i]
        sum0 += value * _F32(matrix[first, i])
        sum1 += value * _F32(matrix[first + 1, i])
        sum2 += value * _F32(matrix[first + 2, i])
        sum3 += value * _F32(matrix[first + 3, i])
    return sum0, sum1, sum2, sum3


@njit(**_OPTIONS)
def _add_pairs(factors: Array, matrix: Array, sums: Array) -> None:
    """factors (2 N,), matrix (N, M, 2) -> sums (M,) of int32; M is a multiple of HEAD_STEP."""
    step = 2 * _LANES
    for column in range(0, len(sums), _LANES // 2):
        if column % step == 0 and len(sums) - column >= step:
            _strip4(factors, matrix, column, sums)
        elif column >= len(sums) // step * step:
            _strip1(factors, matrix, column, sums)


@njit(inline="always", **_OPTIONS)
def _exp(x: Any) -> Any:
    """e^x of x <= 0 within two units in the last place: 2^n times a polynomial (Cephes, `expf`)."""
    x = max(x, _SMALLEST)
    whole = np.int32(x * _F32(1.44269504088896341) - _F32(0.5))
    n = _F32(whole)
    r = x - n * _F32(0.693359375) + n * _F32(2.12194440e-4)
    p = _F32(1.9875691500e-4)
    p = p * r + _F32(1.3981999507e-3)
    p = p * r + _F32(8.3334519073e-3)
    p = p * r + _F32(4.1665795894e-2)
    p = p * r + _F32(1.6666665459e-1)
    p = p * r + _F32(5.0000001201e-1)
    p = p * r * r + r + _F32(1.0)
    return p * np.int32((whole + np.int32(127)) << np.int32(23)).view(_F32)


@njit(**_OPTIONS)
def _largest(x: Array) -> Any:
    """The largest amount in x (I,), or not a number where one of them is not finite."""
    top, is_finite = _F32(0.0), True
    for i in range(len(x)):
        value = abs(x[i])
        top = max(top, value)
        is_finite &= value <= _LARGEST
    return top if is_finite else _F32(np.nan)


@njit(**_IN_ANY_ORDER)
def _total(x: Array) -> Any:
    total = _F32(0.0)
    for i in range(len(x)):
        total += x[i]
    return total


@njit(**_OPTIONS)
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


@njit(**_OPTIONS)
def _round(x: Array, whole: Array, levels: Any) -> Any:
    """Rounds a row (I,) to whole numbers within -levels and levels; returns what one of them is worth."""
    return _round_by(x, whole, _largest(x) / _F32(levels))


@njit(**_OPTIONS)
def _round_to_length(x: Array, whole: Array) -> Any:
    """Rounds a row (I,) so that its product with any other rounded so is below 2^31 (Cauchy and Schwarz)."""
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(x[i])
    return _round_by(x, whole, max(_largest(x) / _F32(_MOST), _F32(np.sqrt(total) / _LENGTH)))


@njit(**_OPTIONS)
def _norm(x: Array, y: Array, weight: Array, eps: Any, normed: Array, whole: Array) -> Any:
    """x (H,) += y, which may be empty; normed = w x / sqrt(mean(x^2) + eps) (H,), and the same rounded: its unit."""
    width = len(x)
    if len(y):
        for i in range(width):
            x[i] += y[i]
    total = 0.0
    for i in range(width):
        total += np.float64(x[i]) * np.float64(x[i])
    inverse = _F32(1.0 / np.sqrt(total / width + eps))
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

PART_FIELDS = 6
"""An adapter's share in one product, in `Rows.parts`: how many groups it has, and the addresses of a, b, units, groups
and factors, 0 for none.

a (4 G, inputs) of int16 holds the ranks of all the modules that y is the output of, in groups of four of one module. A
group's outputs begin at groups[g, 0] and are groups[g, 1] many; its four columns of B, of int16 as well, begin at
b[groups[g, 2]]. What a rank of a and its column of b are worth together, times the scaling, is units (4 G,). Where
factors (O,) are given, what is not bias is multiplied by them (DoRA; Liu et al. 2024, arXiv 2402.09353, equation 5).
"""


@njit(**_OPTIONS)
def _adapt(x: Array, y: Array, part: Array, bias: Array) -> None:
    """Adds to y (O,) what an adapter makes of x (inputs,)."""
    num_groups = part[0]
    if not num_groups:
        return
    a = carray(_shorts_at(part[1]), (4 * num_groups, len(x)))
    units = carray(_floats_at(part[3]), 4 * num_groups)
    groups = carray(_sizes_at(part[4]), (num_groups, 3))
    for g in range(num_groups):
        low0, low1, low2, low3 = _dot4(x, a, 4 * g)
        low0, low1 = low0 * units[4 * g], low1 * units[4 * g + 1]
        low2, low3 = low2 * units[4 * g + 2], low3 * units[4 * g + 3]
        start, size, offset = groups[g, 0], groups[g, 1], groups[g, 2]
        more = y[start : start + size]
        columns = carray(_shorts_at(part[2] + 2 * offset), (4, size))
        for o in range(size):
            high = low0 * _F32(columns[0, o]) + low1 * _F32(columns[1, o])
            more[o] += high + (low2 * _F32(columns[2, o]) + low3 * _F32(columns[3, o]))
    if part[5]:
        factors = carray(_floats_at(part[5]), len(y))
        for o in range(len(y)):
            shift = bias[o] if len(bias) else _F32(0.0)
            y[o] = (y[o] - shift) * factors[o] + shift


@njit(**_OPTIONS)
def _gate(gated: Array, inner: Array, whole: Array) -> Any:
    """gated (2 I,), gate and up -> inner = silu(gate) up (I,), and the same rounded: its unit."""
    width = len(inner)
    for i in range(width):
        gate = gated[i]
        small = _exp(-abs(gate))
        sigmoid = (_F32(1.0) if gate >= 0 else small) / (_F32(1.0) + small)
        inner[i] = gate * sigmoid * gated[width + i]
    return _round(inner, whole, LEVELS)


@njit(**_OPTIONS)
def _store(qkv: Array, n: int, r: int, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """Turns queries and keys by their position (Su et al. 2021, arXiv 2104.09864) and rounds them, puts key and value
    in their block: qkv ((N + 2 K) D,)."""
    position, block = rows.positions[r], rows.blocks[r]
    num_heads = room.queries.shape[1]
    num_keys, half = cache.keys.shape[2], geometry.cos.shape[1]
    width, at = 2 * half, position % BLOCK_TOKENS
    turned, rounded = np.empty(width, _F32), np.empty(width, np.int16)
    for head in range(num_heads + num_keys):
        start = head * width
        for d in range(half):
            left, right = qkv[start + d], qkv[start + half + d]
            turned[d] = left * geometry.cos[position, d] - right * geometry.sin[position, d]
            turned[half + d] = right * geometry.cos[position, d] + left * geometry.sin[position, d]
        if head < num_heads:
            room.query_units[r, head] = _round_to_length(turned, rounded)
            for d in range(width):
                room.queries[r, head, d] = rounded[d]
            continue
        key = head - num_heads
        cache.key_units[n, block, key, at] = _round_to_length(turned, rounded)
        for d in range(width):
            cache.keys[n, block, key, d // 2, at, d % 2] = rounded[d]
        start += num_keys * width
        cache.value_units[n, block, key, at] = _round(qkv[start : start + width], rounded, _VALUE_LEVELS)
        for d in range(width):
            cache.values[n, block, key, at // 2, d, at % 2] = rounded[d]


@njit(**_OPTIONS)
def _attend(n: int, r: int, key: int, window: int, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """Attention of the heads that read one key-value head to the tokens up to the row's own, or to the last `window` of
    them -> their part of `room.attended`. The softmax is taken block by block (Milakov and Gimelshein 2018, arXiv
    1805.02867)."""
    num_heads, padded = room.queries.shape[1:]
    group, width = num_heads // cache.keys.shape[2], 2 * geometry.cos.shape[1]
    end = rows.positions[r] + 1
    begin = max(0, end - window)
    scores, shares = np.empty(BLOCK_TOKENS, _F32), np.empty(BLOCK_TOKENS, np.int16)
    of_scores, of_values = np.empty(BLOCK_TOKENS, np.int32), np.empty(padded, np.int32)
    sums = np.zeros((group, width), _F32)
    tops, totals = np.full(group, _F32(-np.inf)), np.zeros(group, _F32)
    for index in range(begin // BLOCK_TOKENS, (end + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
        block = rows.tables[rows.sequences[r], index]
        keys, values = cache.keys[n, block, key], cache.values[n, block, key]
        key_units, value_units = cache.key_units[n, block, key], cache.value_units[n, block, key]
        first = max(0, begin - index * BLOCK_TOKENS)
        last = min(BLOCK_TOKENS, end - index * BLOCK_TOKENS)
        for g in range(group):  # the heads that read the same keys and values, while these are at hand
            head = key * group + g
            _add_pairs(room.queries[r, head], keys, of_scores)
            unit, top = room.query_units[r, head] * _F32(geometry.scaling), tops[g]
            for t in range(BLOCK_TOKENS):
                scores[t] = _F32(of_scores[t]) * (unit * key_units[t])
            for t in range(first, last):
                top = max(top, scores[t])
            shrink = _exp(tops[g] - top)
            for t in range(BLOCK_TOKENS):
                scores[t] = _exp(min(scores[t] - top, _F32(0.0)))
            scores[:first] = _F32(0.0)
            scores[last:] = _F32(0.0)
            tops[g], totals[g] = top, totals[g] * shrink + _total(scores)
            for t in range(BLOCK_TOKENS):
                scores[t] *= value_units[t]
            unit = max(_largest(scores) / _F32(_MOST), _total(scores) / _F32(_SHARES))
            _round_by(scores, shares, unit)
            _add_pairs(shares, values, of_values)
            for d in range(width):
                sums[g, d] = sums[g, d] * shrink + _F32(of_values[d]) * unit
    for g in range(group):
        for d in range(width):
            room.attended[r, (key * group + g) * width + d] = sums[g, d] / totals[g]


# --- what lies between two products -------------------------------------------------------------------------------


@njit(**_OPTIONS)
def _of_layer(linear: Linear, n: int) -> Linear:
    return Linear(linear.weight[n], linear.scales[n], linear.bias[n])


@njit(parallel=True, **_OPTIONS)
def _begin_rows(layers: Layers, room: Room, geometry: Geometry) -> None:
    weight, nothing = layers.first_norms[0], room.y[0, :0]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(room.x)):
        units[r] = _norm(room.x[r], nothing, weight, geometry.eps, room.normed[r], room.whole[r])


# One loop each: of several in one function numba moves one before another where it sees no variable set.
@njit(parallel=True, **_OPTIONS)
def _store_rows(n: int, bias: Array, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    for r in prange(len(rows.positions)):
        _adapt(room.normed[r], room.qkv[r], rows.parts[r, 4 * n], bias)
        _store(room.qkv[r], n, r, rows, room, cache, geometry)


@njit(parallel=True, **_OPTIONS)
def _attend_heads(n: int, window: int, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    num_keys = cache.keys.shape[2]
    for task in prange(len(rows.positions) * num_keys):
        _attend(n, task // num_keys, task % num_keys, window, rows, room, cache, geometry)


@njit(parallel=True, **_OPTIONS)
def _round_rows(x: Array, whole: Array, units: Array) -> None:
    for r in prange(len(x)):
        units[r] = _round(x[r], whole[r], LEVELS)


@njit(**_OPTIONS)
def _attend_rows(n: int, layers: Layers, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    _store_rows(n, layers.qkv.bias[n], rows, room, cache, geometry)
    _attend_heads(n, layers.windows[n], rows, room, cache, geometry)
    _round_rows(room.attended, room.whole_heads, room.units)


@njit(parallel=True, **_OPTIONS)
def _close_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    weight, bias = layers.second_norms[n], layers.o.bias[n]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(rows.positions)):
        _adapt(room.attended[r], room.y[r], rows.parts[r, 4 * n + 1], bias)
        units[r] = _norm(room.x[r], room.y[r], weight, geometry.eps, room.normed[r], room.whole[r])


@njit(parallel=True, **_OPTIONS)
def _gate_rows(n: int, layers: Layers, rows: Rows, room: Room) -> None:
    bias = layers.gate_up.bias[n]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(rows.positions)):
        _adapt(room.normed[r], room.gated[r], rows.parts[r, 4 * n + 2], bias)
        units[r] = _gate(room.gated[r], room.inner[r], room.whole_inner[r])


@njit(parallel=True, **_OPTIONS)
def _end_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    bias = layers.down.bias[n]
    weight = layers.first_norms[n + 1] if n + 1 < len(layers.first_norms) else geometry.last_norm
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(rows.positions)):
        _adapt(room.inner[r], room.y[r], rows.parts[r, 4 * n + 3], bias)
        units[r] = _norm(room.x[r], room.y[r], weight, geometry.eps, room.normed[r], room.whole[r])


# --- what Python calls --------------------------------------------------------------------------------------------


@njit(**_KEPT)
def multiply_rows(whole: Array, linear: Linear, units: Array, y: Array) -> None:
    """y (R, O) = whole (R, inputs), in units (R,), times the transpose of the weight, in its scales, plus the bias.

    The weights are read once, as fast as memory gives them.
    """
    _multiply_rows(whole, linear, units, y)


@njit(**_KEPT)
def halve_rows(whole: Array, halves: Array) -> None:
    """whole (R, I) = 2 HALF_LEVELS high + low -> halves (2 R, I), the high ones first."""
    _halve_rows(whole, halves)


@njit(**_KEPT)
def join_rows(sums: Array, linear: Linear, units: Array, y: Array) -> None:
    """The products of both halves, sums (2 R, O), as `multiply_rows` gives y (R, O)."""
    _join_rows(sums, linear, units, y)


@njit(**_KEPT)
def begin_rows(layers: Layers, room: Room, geometry: Geometry) -> None:
    """From `room.x`, the tokens' embeddings, to the first layer's input: `room.normed`, and the same rounded."""
    _begin_rows(layers, room, geometry)


@njit(**_KEPT)
def attend_rows(n: int, layers: Layers, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """From `room.qkv`, the first product of layer n, to `room.attended`, and the same rounded."""
    _attend_rows(n, layers, rows, room, cache, geometry)


@njit(**_KEPT)
def close_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    """From `room.y`, the second product, to `room.normed`, the input of the third, and the same rounded."""
    _close_rows(n, layers, rows, room, geometry)


@njit(**_KEPT)
def gate_rows(n: int, layers: Layers, rows: Rows, room: Room) -> None:
    """From `room.gated`, the third product, to `room.inner`, and the same rounded."""
    _gate_rows(n, layers, rows, room)


@njit(**_KEPT)
def end_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    """From `room.y`, the fourth product, to `room.normed`, the input of the next layer or of the head, and the same
    rounded."""
    _end_rows(n, layers, rows, room, geometry)


@njit(**_KEPT)
def decode_rows(layers: Layers, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """All layers, for few rows: from `room.x` to the head's input, in `room.whole`."""
    _begin_rows(layers, room, geometry)
    for n in range(len(layers.windows)):
        _multiply_rows(room.whole, _of_layer(layers.qkv, n), room.units, room.qkv)
        _attend_rows(n, layers, rows, room, cache, geometry)
        _multiply_rows(room.whole_heads, _of_layer(layers.o, n), room.units, room.y)
        _close_rows(n, layers, rows, room, geometry)
        _multiply_rows(room.whole, _of_layer(layers.gate_up, n), room.units, room.gated)
        _gate_rows(n, layers, rows, room)
        _multiply_rows(room.whole_inner, _of_layer(layers.down, n), room.units, room.y)
        _end_rows(n, layers, rows, room, geometry)
