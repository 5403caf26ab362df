"""What a decoder layer computes besides its large products, compiled for this machine by numba.

Every row is computed by itself and its sums are taken in one order, so that a row's result does not depend on which
rows stand beside it, on how a prompt was cut into pieces, or on what was computed before.

Shapes: R rows (one token of one sequence each), H width, N query heads and K key-value heads of width D, I inner width.
Keys and values lie in blocks of `BLOCK_TOKENS` tokens; a sequence's table names its blocks in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

BLOCK_TOKENS = 64
HALF_LEVELS = 63
"""Seven bits with a sign: with weights of eight bits a pair of products fits in 16 bits, as older CPUs demand."""
LEVELS = HALF_LEVELS * 2 * HALF_LEVELS
"""Of a row's numbers, to either side of 0: two such halves, of which the lower one refines the higher."""

_CHUNK = 2048
"""So many products of a row's number and a weight add up to less than 2^31."""

Array = np.ndarray[Any, Any]

_F32 = np.float32
_LARGEST = np.finfo(np.float32).max
_SMALLEST = _F32(-87.0)  # e to the power of less is no normal number any more
# Fused multiply-add is the one liberty that the compiler has: it rounds once instead of twice, in every row alike.
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}
# And here the order of a sum, which it chooses once, for all rows.
_IN_ANY_ORDER = _OPTIONS | {"fastmath": {"contract", "reassoc", "nsz"}}


@njit(**_IN_ANY_ORDER)
def _dot4(x: Array, matrix: Array, first: int) -> Any:
    """x (I,) times four rows of matrix (rows, I): x is read once for all of them."""
    row0, row1, row2, row3 = matrix[first], matrix[first + 1], matrix[first + 2], matrix[first + 3]
    sum0 = sum1 = sum2 = sum3 = _F32(0.0)
    for i in range(len(x)):
        value = x[i]
        sum0 += value * row0[i]
        sum1 += value * row1[i]
        sum2 += value * row2[i]
        sum3 += value * row3[i]
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
def _round(x: Array, whole: Array) -> Any:
    """Rounds a row (I,) to whole numbers within -LEVELS and LEVELS; returns what one of them is worth, which is not a
    number where one of the row is not finite."""
    top, is_finite = _F32(0.0), True
    for i in range(len(x)):
        value = abs(x[i])
        top = max(top, value)
        is_finite &= value <= _LARGEST
    if not is_finite or not top:
        whole[:] = 0
        return _F32(0.0) if is_finite else _F32(np.nan)
    unit = max(top, _F32(1e-30)) / _F32(LEVELS)
    inverse = _F32(1.0) / unit
    for i in range(len(x)):
        whole[i] = np.int16(np.rint(x[i] * inverse))
    return unit


@njit(parallel=True, **_OPTIONS)
def round_rows(x: Array, whole: Array, units: Array) -> None:
    """x (R, I) -> whole numbers (R, I), and what one is worth in each row, units (R,)."""
    for r in prange(len(x)):
        units[r] = _round(x[r], whole[r])


@njit(parallel=True, **_OPTIONS)
def norm_rows(x: Array, y: Array, weight: Array, eps: Any, normed: Array, whole: Array, units: Array) -> None:
    """x (R, H) += y, which may be empty; normed = w x / sqrt(mean(x^2) + eps) (R, H), and the same rounded."""
    num_rows, width = x.shape
    for r in prange(num_rows):
        if len(y):
            for i in range(width):
                x[r, i] += y[r, i]
        total = 0.0
        for i in range(width):
            total += np.float64(x[r, i]) * np.float64(x[r, i])
        inverse = _F32(1.0 / np.sqrt(total / width + eps))
        for i in range(width):
            normed[r, i] = weight[i] * (x[r, i] * inverse)
        units[r] = _round(normed[r], whole[r])


@njit(**_OPTIONS)
def _multiply(weight: Array, whole: Array) -> Any:
    """The sum of at most _CHUNK products."""
    total = np.int32(0)
    for i in range(len(weight)):  # cast by cast, or it would be taken in 64 bits
        total = np.int32(total + np.int32(np.int32(weight[i]) * np.int32(whole[i])))
    return total


@njit(parallel=True, **_OPTIONS)
def multiply_rows(whole: Array, weight: Array, units: Array, scales: Array, bias: Array, y: Array) -> None:
    """y (R, O) = whole (R, I) times the transpose of weight (O, I), in units and scales (O,), plus bias where given.

    For few rows: the weights are read once, as fast as memory gives them.
    """
    num_rows, num_inputs = whole.shape
    num_outputs = len(weight)
    for task in prange((num_outputs + 31) // 32):
        for o in range(32 * task, min(32 * task + 32, num_outputs)):
            row = weight[o]
            for r in range(num_rows):
                total = np.int64(0)
                for first in range(0, num_inputs, _CHUNK):
                    last = min(first + _CHUNK, num_inputs)
                    total += _multiply(row[first:last], whole[r, first:last])
                y[r, o] = _F32(total) * units[r] * scales[o]
                if len(bias):
                    y[r, o] += bias[o]


@njit(parallel=True, **_OPTIONS)
def halve_rows(whole: Array, halves: Array) -> None:
    """whole (R, I) = 2 HALF_LEVELS high + low -> halves (2 R, I), the high ones first."""
    num_rows, num_inputs = whole.shape
    for r in prange(num_rows):
        for i in range(num_inputs):
            high = np.rint(_F32(whole[r, i]) * _F32(1.0 / (2 * HALF_LEVELS)))
            halves[r, i] = np.int8(high)
            halves[num_rows + r, i] = np.int8(_F32(whole[r, i]) - high * _F32(2 * HALF_LEVELS))


@njit(parallel=True, **_OPTIONS)
def join_rows(sums: Array, units: Array, scales: Array, bias: Array, y: Array) -> None:
    """The products of both halves, sums (2 R, O), as `multiply_rows` gives y (R, O)."""
    num_rows, num_outputs = y.shape
    for r in prange(num_rows):
        for o in range(num_outputs):
            total = np.int64(sums[r, o]) * np.int64(2 * HALF_LEVELS) + np.int64(sums[num_rows + r, o])
            y[r, o] = _F32(total) * units[r] * scales[o]
        for o in range(len(bias)):
            y[r, o] += bias[o]


@njit(parallel=True, **_OPTIONS)
def adapt_rows(x: Array, y: Array, rows: Array, a: Array, b: Array, groups: Array, factors: Array, bias: Array) -> None:
    """Adds an adapter's part to y (R, O), for the given rows of x (R, I).

    a (J, I) holds the ranks of all the modules that y is the output of, in groups of four of one module. A group's
    outputs begin at groups[g, 0] and are groups[g, 1] many; its four columns of B, times the scaling, begin at
    b[groups[g, 2]]. Where factors (O,) are given, what is not bias is multiplied by them (DoRA; Liu et al. 2024,
    arXiv 2402.09353, equation 5).
    """
    for n in prange(len(rows)):
        own_x, own_y = x[rows[n]], y[rows[n]]
        for g in range(len(groups)):
            low0, low1, low2, low3 = _dot4(own_x, a, 4 * g)
            start, size, offset = groups[g, 0], groups[g, 1], groups[g, 2]
            part = own_y[start : start + size]
            columns = b[offset : offset + 4 * size].reshape(4, size)
            for o in range(size):
                more = low0 * columns[0, o] + low1 * columns[1, o] + low2 * columns[2, o] + low3 * columns[3, o]
                part[o] += more
        for o in range(len(factors)):
            shift = bias[o] if len(bias) else _F32(0.0)
            own_y[o] = (own_y[o] - shift) * factors[o] + shift


@njit(parallel=True, **_OPTIONS)
def gate_rows(gated: Array, inner: Array, whole: Array, units: Array) -> None:
    """gated (R, 2 I), gate and up -> inner = silu(gate) up (R, I), and the same rounded."""
    num_rows, width = inner.shape
    for r in prange(num_rows):
        for i in range(width):
            gate = gated[r, i]
            small = _exp(-abs(gate))
            sigmoid = (_F32(1.0) if gate >= 0 else small) / (_F32(1.0) + small)
            inner[r, i] = gate * sigmoid * gated[r, width + i]
        units[r] = _round(inner[r], whole[r])


@njit(parallel=True, **_OPTIONS)
def store_rows(
    qkv: Array, cos: Array, sin: Array, queries: Array, keys: Array, values: Array, blocks: Array, positions: Array
) -> None:
    """Turns queries and keys by their positions (Su et al. 2021, arXiv 2104.09864), puts keys and values in their
    blocks (R,).

    qkv (R, (N + 2 K) D) -> queries (R, N, D); keys (blocks, K, BLOCK_TOKENS, D), values (blocks, K, D, BLOCK_TOKENS);
    cos and sin are (positions, D / 2).
    """
    num_heads, width = queries.shape[1:]
    num_keys = keys.shape[1]
    half = width // 2
    for r in prange(len(qkv)):
        position = positions[r]
        block, at = blocks[r], position % BLOCK_TOKENS
        for head in range(num_heads):
            start = head * width
            for d in range(half):
                left, right = qkv[r, start + d], qkv[r, start + half + d]
                queries[r, head, d] = left * cos[position, d] - right * sin[position, d]
                queries[r, head, half + d] = right * cos[position, d] + left * sin[position, d]
        for head in range(num_keys):
            start = (num_heads + head) * width
            for d in range(half):
                left, right = qkv[r, start + d], qkv[r, start + half + d]
                keys[block, head, at, d] = left * cos[position, d] - right * sin[position, d]
                keys[block, head, at, half + d] = right * cos[position, d] + left * sin[position, d]
            start += num_keys * width
            for d in range(width):
                values[block, head, d, at] = qkv[r, start + d]


@njit(parallel=True, **_OPTIONS)
def attend_rows(
    queries: Array,
    keys: Array,
    values: Array,
    tables: Array,
    sequences: Array,
    positions: Array,
    scaling: Any,
    window: int,
    out: Array,
) -> None:
    """Attention of every row to all of its sequence's tokens up to its own, or to the last `window` of them.

    queries (R, N, D) -> out (R, N D); sequences (R,) are rows of tables (S, blocks). The softmax is taken block by
    block (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    num_rows, num_heads, width = queries.shape
    num_keys = keys.shape[1]
    group = num_heads // num_keys
    for task in prange(num_rows * num_keys):
        r, key = task // num_keys, task % num_keys
        table = tables[sequences[r]]
        end = positions[r] + 1
        begin = max(0, end - window)
        scores = np.empty(BLOCK_TOKENS, _F32)
        sums = np.zeros((group, width), _F32)
        tops, totals = np.full(group, _F32(-np.inf)), np.zeros(group, _F32)
        for index in range(begin // BLOCK_TOKENS, (end + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
            block_keys, block_values = keys[table[index], key], values[table[index], key]
            first = max(0, begin - index * BLOCK_TOKENS)
            last = min(BLOCK_TOKENS, end - index * BLOCK_TOKENS)
            for g in range(group):  # the heads that read the same keys and values, while these are at hand
                query = queries[r, key * group + g]
                for t in range(0, BLOCK_TOKENS, 4):
                    scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = _dot4(query, block_keys, t)
                top = tops[g]
                for t in range(first, last):
                    scores[t] *= scaling
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
                for d in range(0, width, 4):
                    sum0, sum1, sum2, sum3 = _dot4(scores, block_values, d)
                    sums[g, d] = sums[g, d] * shrink + sum0
                    sums[g, d + 1] = sums[g, d + 1] * shrink + sum1
                    sums[g, d + 2] = sums[g, d + 2] * shrink + sum2
                    sums[g, d + 3] = sums[g, d + 3] * shrink + sum3
        for g in range(group):
            for d in range(width):
                out[r, (key * group + g) * width + d] = sums[g, d] / totals[g]
