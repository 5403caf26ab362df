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

BLOCK_TOKENS = 32
LEVELS = 63
"""Seven bits with a sign: with weights of eight bits a pair of products fits in 16 bits, as older CPUs demand."""

Array = np.ndarray[Any, Any]

_F32 = np.float32
_LARGEST = np.finfo(np.float32).max
_SMALLEST = _F32(-87.0)  # e to the power of less is no normal number any more
# Fused multiply-add is the one liberty that the compiler has: it rounds once instead of twice, in every row alike.
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(inline="always", **_OPTIONS)
def _exp(x: Any) -> Any:
    """e^x of x <= 0 within two units in the last place: 2^n times a polynomial (Cephes, `expf`)."""
    x = max(x, _SMALLEST)
    n = np.floor(x * _F32(1.44269504088896341) + _F32(0.5))
    r = x - n * _F32(0.693359375) + n * _F32(2.12194440e-4)
    p = _F32(1.9875691500e-4)
    p = p * r + _F32(1.3981999507e-3)
    p = p * r + _F32(8.3334519073e-3)
    p = p * r + _F32(4.1665795894e-2)
    p = p * r + _F32(1.6666665459e-1)
    p = p * r + _F32(5.0000001201e-1)
    p = p * r * r + r + _F32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(_F32)


@njit(**_OPTIONS)
def _split(x: Array, high: Array, low: Array) -> Any:
    """Rounds a row (I,) to (high + low / (2 LEVELS)) top / LEVELS; returns top, which is not a number where one of the
    row is not finite."""
    top, is_finite = _F32(0.0), True
    for i in range(len(x)):
        value = abs(x[i])
        top = max(top, value)
        is_finite &= value <= _LARGEST
    if not is_finite or not top:
        high[:] = 0
        low[:] = 0
        return _F32(0.0) if is_finite else _F32(np.nan)
    levels = _F32(LEVELS)
    inverse = levels / max(top, _F32(1e-30))
    for i in range(len(x)):
        value = x[i] * inverse
        rounded = np.rint(value)
        high[i] = np.int8(rounded)
        low[i] = np.int8(np.rint((value - rounded) * (_F32(2.0) * levels)))
    return top


@njit(parallel=True, **_OPTIONS)
def split_rows(x: Array, halves: Array, tops: Array) -> None:
    """x (R, I) -> halves (2 R, I) of whole numbers, the high ones first, and tops (R,)."""
    num_rows = len(x)
    for r in prange(num_rows):
        tops[r] = _split(x[r], halves[r], halves[num_rows + r])


@njit(parallel=True, **_OPTIONS)
def norm_rows(x: Array, y: Array, weight: Array, eps: Any, normed: Array, halves: Array, tops: Array) -> None:
    """x (R, H) += y, which may be empty; normed = w x / sqrt(mean(x^2) + eps) (R, H), and the same in halves."""
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
        tops[r] = _split(normed[r], halves[r], halves[num_rows + r])


@njit(parallel=True, **_OPTIONS)
def join_rows(sums: Array, tops: Array, scales: Array, bias: Array, y: Array) -> None:
    """The products of both halves, sums (2 R, O), back as y (R, O), plus bias (O,) where that is not empty.

    scales (O,) are the weights'.
    """
    num_rows, num_outputs = y.shape
    for r in prange(num_rows):
        top = tops[r] / _F32(LEVELS)
        for o in range(num_outputs):
            y[r, o] = (_F32(sums[r, o]) + _F32(sums[num_rows + r, o]) / _F32(2 * LEVELS)) * top * scales[o]
        for o in range(len(bias)):
            y[r, o] += bias[o]


@njit(parallel=True, **_OPTIONS)
def adapt_rows(x: Array, y: Array, rows: Array, a: Array, b: Array, ranks: Array, factors: Array, bias: Array) -> None:
    """Adds an adapter's part to y (R, O), for the given rows of x (R, I).

    a (I, J) holds all J ranks of the modules that y is the output of. Rank j's outputs begin at ranks[j, 0] and are
    ranks[j, 1] many; its column of B, times the scaling, begins at b[ranks[j, 2]]. Where factors (O,) are given, what
    is not bias is multiplied by them (DoRA; Liu et al. 2024, arXiv 2402.09353, equation 5).
    """
    num_inputs, num_ranks = a.shape
    for n in prange(len(rows)):
        r = rows[n]
        low = np.zeros(num_ranks, _F32)
        for i in range(num_inputs):
            value = x[r, i]
            for j in range(num_ranks):
                low[j] += value * a[i, j]
        for j in range(num_ranks):
            start, offset, value = ranks[j, 0], ranks[j, 2], low[j]
            for o in range(ranks[j, 1]):
                y[r, start + o] += value * b[offset + o]
        for o in range(len(factors)):
            shift = bias[o] if len(bias) else _F32(0.0)
            y[r, o] = (y[r, o] - shift) * factors[o] + shift


@njit(parallel=True, **_OPTIONS)
def gate_rows(gated: Array, inner: Array, halves: Array, tops: Array) -> None:
    """gated (R, 2 I), gate and up -> inner = silu(gate) up (R, I), and the same in halves."""
    num_rows, width = inner.shape
    for r in prange(num_rows):
        for i in range(width):
            gate = gated[r, i]
            small = _exp(-abs(gate))
            sigmoid = (_F32(1.0) if gate >= 0 else small) / (_F32(1.0) + small)
            inner[r, i] = gate * sigmoid * gated[r, width + i]
        tops[r] = _split(inner[r], halves[r], halves[num_rows + r])


@njit(parallel=True, **_OPTIONS)
def store_rows(
    qkv: Array, cos: Array, sin: Array, queries: Array, keys: Array, values: Array, blocks: Array, positions: Array
) -> None:
    """Turns queries and keys by their positions (Su et al. 2021, arXiv 2104.09864), puts keys and values in their
    blocks (R,).

    qkv (R, (N + 2 K) D) -> queries (R, N, D); keys (blocks, K, D, BLOCK_TOKENS), values (blocks, K, BLOCK_TOKENS, D);
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
                keys[block, head, d, at] = left * cos[position, d] - right * sin[position, d]
                keys[block, head, half + d, at] = right * cos[position, d] + left * sin[position, d]
            start += num_keys * width
            for d in range(width):
                values[block, head, at, d] = qkv[r, start + d]


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
        sums = np.empty(width, _F32)
        for head in range(key * group, (key + 1) * group):
            sums[:] = _F32(0.0)
            top, total = _F32(-np.inf), _F32(0.0)
            for index in range(begin // BLOCK_TOKENS, (end + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
                block = table[index]
                first = max(0, begin - index * BLOCK_TOKENS)
                last = min(BLOCK_TOKENS, end - index * BLOCK_TOKENS)
                scores[:] = _F32(0.0)
                for d in range(0, width, 4):  # four at a time: the scores are read and written less often
                    q0, q1 = queries[r, head, d] * scaling, queries[r, head, d + 1] * scaling
                    q2, q3 = queries[r, head, d + 2] * scaling, queries[r, head, d + 3] * scaling
                    for t in range(BLOCK_TOKENS):
                        score = scores[t] + q0 * keys[block, key, d, t]
                        score += q1 * keys[block, key, d + 1, t]
                        score += q2 * keys[block, key, d + 2, t]
                        scores[t] = score + q3 * keys[block, key, d + 3, t]
                for t in range(BLOCK_TOKENS):
                    if not first <= t < last:
                        scores[t] = _F32(-np.inf)
                before = top
                for t in range(BLOCK_TOKENS):
                    top = max(top, scores[t])
                shrink = _exp(before - top)
                total *= shrink
                for d in range(width):
                    sums[d] *= shrink
                for t in range(BLOCK_TOKENS):
                    scores[t] = _exp(scores[t] - top) if first <= t < last else _F32(0.0)
                for t in range(BLOCK_TOKENS):
                    total += scores[t]
                for t in range(0, last, 4):
                    p0, p1, p2, p3 = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
                    for d in range(width):
                        value = sums[d] + p0 * values[block, key, t, d]
                        value += p1 * values[block, key, t + 1, d]
                        value += p2 * values[block, key, t + 2, d]
                        sums[d] = value + p3 * values[block, key, t + 3, d]
            for d in range(width):
                out[r, head * width + d] = sums[d] / total
