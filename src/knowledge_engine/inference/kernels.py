"""A decoder's pass over whole numbers, compiled for this machine by numba.

Every row is computed by itself and its sums are taken in one order, so that a row's result does not depend on which
rows stand beside it, on how a prompt was cut into pieces, or on what was computed before.

Shapes: R rows (one token of one sequence each), H width, N query heads and K key-value heads of width D, I inner width.
Keys and values lie in blocks of `BLOCK_TOKENS` tokens, as whole numbers of sixteen bits with a unit for every token and
head; a sequence's table names its blocks in order.
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
"""Of what is kept and not multiplied as whole numbers: keys, values, adapters."""

_CHUNK = 2048
"""So many products of a row's number and a weight add up to less than 2^31."""

Array = np.ndarray[Any, Any]

_F32 = np.float32
_LARGEST = np.finfo(np.float32).max
_SMALLEST = _F32(-87.0)  # e to the power of less is no normal number any more
# Fused multiply-add is the one liberty that the compiler has: it rounds once instead of twice, in every row alike.
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}
# Where two ways must give the same, not even that.
_AS_WRITTEN = _OPTIONS | {"fastmath": False}
# And here the order of a sum, which it chooses once, for all rows.
_IN_ANY_ORDER = _OPTIONS | {"fastmath": {"contract", "reassoc", "nsz"}}


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
    attended: Array
    gated: Array
    inner: Array


class Cache(NamedTuple):
    """Keys (L, blocks, K, BLOCK_TOKENS, D), values (L, blocks, K, D, BLOCK_TOKENS), and their units (L, blocks, K,
    BLOCK_TOKENS)."""

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
_HAS_PAIRS = _HAS_WIDE or binding.get_host_cpu_features().get("avx2", False)


def _make_block(num_rows: int) -> Any:
    """Sums of products of one row of weights and `num_rows` rows of whole numbers.

    Weights are read in the order in which they lie: of several rows in turn memory gives half as much. Compilers do
    not find the instruction that multiplies sixteen bits in pairs and adds them where a sum is one of many, so it is
    named here; without it the same sums come from plain vectors.
    """

    @intrinsic
    def block(typingctx: Any, weight: Any, o: Any, whole: Any, r: Any, first: Any, last: Any, sums: Any) -> Any:
        """weight (O, inputs) from row o, whole (R, inputs) from row r, columns first to last, a multiple of _LANES ->
        sums (num_rows,) of int32."""
        size = types.intp
        signature = types.void(weight, size, whole, size, size, size, sums)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            byte, short, word, size = (ir.IntType(bits) for bits in (8, 16, 32, 64))
            many, sums = ir.VectorType(short, _LANES), ir.VectorType(word, _LANES // 2)

            def pointers(array: Any, kind: Any, start: Any, count: int) -> list[Any]:
                struct = context.make_array(kind)(context, builder, array)
                stride = cgutils.unpack_tuple(builder, struct.strides)[0]
                data = builder.bitcast(struct.data, byte.as_pointer())
                return [builder.gep(data, [builder.mul(stride, builder.add(start, size(k)))]) for k in range(count)]

            def load(pointer: Any, at: Any, width: Any) -> Any:
                place = builder.bitcast(builder.gep(pointer, [at]), ir.VectorType(width, _LANES).as_pointer())
                value = builder.load(place)
                value.align = width.width // 8
                return builder.sext(value, many) if width is byte else value

            def pairs(a: Any, b: Any) -> Any:
                if _HAS_PAIRS:
                    kind = ir.FunctionType(sums, [many, many])
                    return builder.call(cgutils.get_or_insert_function(builder.module, kind, _PAIRS), [a, b])
                halves = []
                for start in (0, 1):
                    mask = ir.Constant(
                        ir.VectorType(word, _LANES // 2), [word(2 * k + start) for k in range(_LANES // 2)]
                    )
                    parts = [builder.shuffle_vector(value, ir.Constant(many, ir.Undefined), mask) for value in (a, b)]
                    halves.append(builder.mul(*(builder.sext(part, sums) for part in parts)))
                return builder.add(*halves)

            (weights,) = pointers(args[0], signature.args[0], args[1], 1)
            rows = pointers(args[2], signature.args[2], args[3], num_rows)
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            at = builder.phi(size)
            totals = [builder.phi(sums) for _ in range(num_rows)]
            weight = load(weights, at, byte)
            added = []
            for total, pointer in zip(totals, rows, strict=True):
                row = load(pointer, builder.shl(at, size(1)), short)
                added.append(builder.add(total, pairs(weight, row)))
            following = builder.add(at, size(_LANES))
            builder.cbranch(builder.icmp_signed("<", following, args[5]), loop, after)
            at.add_incoming(args[4], before)
            at.add_incoming(following, loop)
            for total, more in zip(totals, added, strict=True):
                total.add_incoming(ir.Constant(sums, None), before)
                total.add_incoming(more, loop)
            builder.position_at_end(after)
            name = f"llvm.vector.reduce.add.v{_LANES // 2}i32"
            reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [sums]), name)
            out = context.make_array(signature.args[6])(context, builder, args[6]).data
            for index, more in enumerate(added):
                builder.store(builder.call(reduce, [more]), builder.gep(out, [size(index)]))
            return context.get_dummy_value()

        return signature, codegen

    return block


_block1, _block4, _block8 = _make_block(1), _make_block(4), _make_block(8)


@njit(**_AS_WRITTEN)
def _multiply_tile(whole: Array, linear: Linear, units: Array, y: Array, begin: int, end: int) -> None:
    """Outputs begin to end of y (R, O), for all rows."""
    num_rows, num_inputs = whole.shape
    weight, scales, bias = linear.weight, linear.scales, linear.bias
    even = num_inputs - num_inputs % _LANES
    sums, totals = np.empty(8, np.int32), np.zeros(8, np.int64)
    for o in range(begin, end):
        r = 0
        while r < num_rows:
            left = num_rows - r
            count = 8 if left >= 8 else 4 if left >= 4 else 1
            for first in range(0, even, _CHUNK):
                last = min(first + _CHUNK, even)
                if count == 8:
                    _block8(weight, o, whole, r, first, last, sums)
                elif count == 4:
                    _block4(weight, o, whole, r, first, last, sums)
                else:
                    _block1(weight, o, whole, r, first, last, sums)
                for k in range(count):
                    totals[k] += sums[k]
            for k in range(count):
                total = totals[k]
                totals[k] = 0
                for i in range(even, num_inputs):
                    total += np.int32(weight[o, i]) * np.int32(whole[r + k, i])
                value = _F32(total) * units[r + k] * scales[o]
                y[r + k, o] = value + bias[o] if len(bias) else value
            r += count


@njit(parallel=True, **_AS_WRITTEN)
def multiply_rows(whole: Array, linear: Linear, units: Array, y: Array) -> None:
    """y (R, O) = whole (R, inputs), in units (R,), times the transpose of the weight, in its scales, plus the bias.

    The weights are read once, as fast as memory gives them.
    """
    num_outputs = len(linear.weight)
    for task in prange((num_outputs + 31) // 32):
        _multiply_tile(whole, linear, units, y, 32 * task, min(32 * (task + 1), num_outputs))


@njit(parallel=True, **_OPTIONS)
def halve_rows(whole: Array, halves: Array) -> None:
    """whole (R, I) = 2 HALF_LEVELS high + low -> halves (2 R, I), the high ones first."""
    num_rows, num_inputs = whole.shape
    for r in prange(num_rows):
        for i in range(num_inputs):
            high = np.rint(_F32(whole[r, i]) * _F32(1.0 / (2 * HALF_LEVELS)))
            halves[r, i] = np.int8(high)
            halves[num_rows + r, i] = np.int8(_F32(whole[r, i]) - high * _F32(2 * HALF_LEVELS))


@njit(parallel=True, **_AS_WRITTEN)
def join_rows(sums: Array, linear: Linear, units: Array, y: Array) -> None:
    """The products of both halves, sums (2 R, O), as `multiply_rows` gives y (R, O)."""
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
    row0, row1, row2, row3 = matrix[first], matrix[first + 1], matrix[first + 2], matrix[first + 3]
    sum0 = sum1 = sum2 = sum3 = _F32(0.0)
    for i in range(len(x)):
        value = x[i]
        sum0 += value * _F32(row0[i])
        sum1 += value * _F32(row1[i])
        sum2 += value * _F32(row2[i])
        sum3 += value * _F32(row3[i])
    return sum0, sum1, sum2, sum3


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
def _round(x: Array, whole: Array, levels: Any) -> Any:
    """Rounds a row (I,) to whole numbers within -levels and levels; returns what one of them is worth, which is not a
    number where one of the row is not finite."""
    top, is_finite = _F32(0.0), True
    for i in range(len(x)):
        value = abs(x[i])
        top = max(top, value)
        is_finite &= value <= _LARGEST
    if not is_finite or not top:
        whole[:] = 0
        return _F32(0.0) if is_finite else _F32(np.nan)
    unit = max(top, _F32(1e-30)) / _F32(levels)
    inverse = _F32(1.0) / unit
    for i in range(len(x)):
        whole[i] = np.int16(np.rint(x[i] * inverse))
    return unit


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
        column0, column1, column2, column3 = columns[0], columns[1], columns[2], columns[3]
        for o in range(size):
            more[o] += (
                low0 * _F32(column0[o]) + low1 * _F32(column1[o]) + low2 * _F32(column2[o]) + low3 * _F32(column3[o])
            )
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
def _store(qkv: Array, geometry: Geometry, position: int, queries: Array, cache: Cache, layer: int, block: int) -> None:
    """Turns queries and keys by their position (Su et al. 2021, arXiv 2104.09864), puts key and value in their block:
    qkv ((N + 2 K) D,) -> queries (N, D)."""
    num_heads, width = queries.shape
    num_keys = cache.keys.shape[2]
    half, at = width // 2, position % BLOCK_TOKENS
    cos, sin = geometry.cos[position], geometry.sin[position]
    turned, rounded = np.empty(width, _F32), np.empty(width, np.int16)
    for head in range(num_heads + num_keys):
        own = qkv[head * width : (head + 1) * width]
        for d in range(half):
            left, right = own[d], own[half + d]
            turned[d] = left * cos[d] - right * sin[d]
            turned[half + d] = right * cos[d] + left * sin[d]
        if head < num_heads:
            queries[head] = turned
        else:
            key = head - num_heads
            cache.key_units[layer, block, key, at] = _round(turned, cache.keys[layer, block, key, at], FINE_LEVELS)
            start = (head + num_keys) * width
            unit = _round(qkv[start : start + width], rounded, FINE_LEVELS)
            cache.value_units[layer, block, key, at] = unit
            for d in range(width):
                cache.values[layer, block, key, d, at] = rounded[d]


@njit(**_OPTIONS)
def _attend(
    queries: Array, cache: Cache, layer: int, key: int, table: Array, end: int, window: int, scaling: Any, out: Array
) -> None:
    """Attention of the heads that read one key-value head, queries (N, D), to the tokens before `end`, or to the last
    `window` of them -> their part of out (N D,). The softmax is taken block by block (Milakov and Gimelshein 2018,
    arXiv 1805.02867)."""
    num_heads, width = queries.shape
    group = num_heads // cache.keys.shape[2]
    begin = max(0, end - window)
    scores = np.empty(BLOCK_TOKENS, _F32)
    sums = np.zeros((group, width), _F32)
    tops, totals = np.full(group, _F32(-np.inf)), np.zeros(group, _F32)
    for index in range(begin // BLOCK_TOKENS, (end + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
        block = table[index]
        block_keys, block_values = cache.keys[layer, block, key], cache.values[layer, block, key]
        key_units, value_units = cache.key_units[layer, block, key], cache.value_units[layer, block, key]
        first = max(0, begin - index * BLOCK_TOKENS)
        last = min(BLOCK_TOKENS, end - index * BLOCK_TOKENS)
        for g in range(group):  # the heads that read the same keys and values, while these are at hand
            query = queries[key * group + g]
            for t in range(0, BLOCK_TOKENS, 4):
                scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = _dot4(query, block_keys, t)
            top = tops[g]
            for t in range(first, last):
                scores[t] *= scaling * key_units[t]
                top = max(top, scores[t])
            shrink = _exp(tops[g] - top)
            total = totals[g] * shrink
            for t in range(BLOCK_TOKENS):
                scores[t] = _exp(min(scores[t] - top, _F32(0.0)))
            scores[:first] = _F32(0.0)
            scores[last:] = _F32(0.0)
            for t in range(BLOCK_TOKENS):
                total += scores[t]
            tops[g], totals[g] = top, total
            for t in range(first, last):
                scores[t] *= value_units[t]
            for d in range(0, width, 4):
                sum0, sum1, sum2, sum3 = _dot4(scores, block_values, d)
                sums[g, d] = sums[g, d] * shrink + sum0
                sums[g, d + 1] = sums[g, d + 1] * shrink + sum1
                sums[g, d + 2] = sums[g, d + 2] * shrink + sum2
                sums[g, d + 3] = sums[g, d + 3] * shrink + sum3
    for g in range(group):
        for d in range(width):
            out[(key * group + g) * width + d] = sums[g, d] / totals[g]


# --- what lies between two products -------------------------------------------------------------------------------


@njit(**_OPTIONS)
def _of_layer(linear: Linear, n: int) -> Linear:
    return Linear(linear.weight[n], linear.scales[n], linear.bias[n])


@njit(parallel=True, **_OPTIONS)
def begin_rows(layers: Layers, room: Room, geometry: Geometry) -> None:
    """From `room.x`, the tokens' embeddings, to the first layer's input: `room.normed`, and the same rounded."""
    weight, nothing = layers.first_norms[0], room.y[0, :0]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(room.x)):
        units[r] = _norm(room.x[r], nothing, weight, geometry.eps, room.normed[r], room.whole[r])


# One loop each: of several in one function numba moves one before another where it sees no variable set.
@njit(parallel=True, **_OPTIONS)
def _store_rows(n: int, bias: Array, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    for r in prange(len(rows.positions)):
        _adapt(room.normed[r], room.qkv[r], rows.parts[r, 4 * n], bias)
        _store(room.qkv[r], geometry, rows.positions[r], room.queries[r], cache, n, rows.blocks[r])


@njit(parallel=True, **_OPTIONS)
def _attend_rows(n: int, window: int, rows: Rows, room: Room, cache: Cache, scaling: Any) -> None:
    num_keys = cache.keys.shape[2]
    for task in prange(len(rows.positions) * num_keys):
        r, key = task // num_keys, task % num_keys
        end, table = rows.positions[r] + 1, rows.tables[rows.sequences[r]]
        _attend(room.queries[r], cache, n, key, table, end, window, scaling, room.attended[r])


@njit(parallel=True, **_OPTIONS)
def _round_rows(x: Array, whole: Array, units: Array) -> None:
    for r in prange(len(x)):
        units[r] = _round(x[r], whole[r], LEVELS)


@njit(**_OPTIONS)
def attend_rows(n: int, layers: Layers, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """From `room.qkv`, the first product of layer n, to `room.attended`, and the same rounded."""
    _store_rows(n, layers.qkv.bias[n], rows, room, cache, geometry)
    _attend_rows(n, layers.windows[n], rows, room, cache, _F32(geometry.scaling))
    _round_rows(room.attended, room.whole_heads, room.units)


@njit(parallel=True, **_OPTIONS)
def close_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    """From `room.y`, the second product, to `room.normed`, the input of the third, and the same rounded."""
    weight, bias = layers.second_norms[n], layers.o.bias[n]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(rows.positions)):
        _adapt(room.attended[r], room.y[r], rows.parts[r, 4 * n + 1], bias)
        units[r] = _norm(room.x[r], room.y[r], weight, geometry.eps, room.normed[r], room.whole[r])


@njit(parallel=True, **_OPTIONS)
def gate_rows(n: int, layers: Layers, rows: Rows, room: Room) -> None:
    """From `room.gated`, the third product, to `room.inner`, and the same rounded."""
    bias = layers.gate_up.bias[n]
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(rows.positions)):
        _adapt(room.normed[r], room.gated[r], rows.parts[r, 4 * n + 2], bias)
        units[r] = _gate(room.gated[r], room.inner[r], room.whole_inner[r])


@njit(parallel=True, **_OPTIONS)
def end_rows(n: int, layers: Layers, rows: Rows, room: Room, geometry: Geometry) -> None:
    """From `room.y`, the fourth product, to `room.normed`, the input of the next layer or of the head, and the same
    rounded."""
    bias = layers.down.bias[n]
    weight = layers.first_norms[n + 1] if n + 1 < len(layers.first_norms) else geometry.last_norm
    units = room.units  # numba loses what a loop sets in a tuple's array
    for r in prange(len(rows.positions)):
        _adapt(room.inner[r], room.y[r], rows.parts[r, 4 * n + 3], bias)
        units[r] = _norm(room.x[r], room.y[r], weight, geometry.eps, room.normed[r], room.whole[r])


@njit(**_OPTIONS)
def decode_rows(layers: Layers, rows: Rows, room: Room, cache: Cache, geometry: Geometry) -> None:
    """All layers, for few rows: from `room.x` to the head's input, in `room.whole`."""
    begin_rows(layers, room, geometry)
    for n in range(len(layers.windows)):
        multiply_rows(room.whole, _of_layer(layers.qkv, n), room.units, room.qkv)
        attend_rows(n, layers, rows, room, cache, geometry)
        multiply_rows(room.whole_heads, _of_layer(layers.o, n), room.units, room.y)
        close_rows(n, layers, rows, room, geometry)
        multiply_rows(room.whole, _of_layer(layers.gate_up, n), room.units, room.gated)
        gate_rows(n, layers, rows, room)
        multiply_rows(room.whole_inner, _of_layer(layers.down, n), room.units, room.y)
        end_rows(n, layers, rows, room, geometry)
