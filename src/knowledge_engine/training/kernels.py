"""What a decoder layer does between its products, compiled for this machine by numba: causal attention over packed
examples, rotary positions, norms, SwiGLU and dropout, forward and backward.

Attention takes queries in strips of `STRIP` rows, all keys of an example before them, and no more: scores, shares and
what is made of them are products of small tiles that stay in the cache. Of what examples share at their beginning, keys
and values are read where they stand, and queries are computed once.

Shapes: U tokens, B examples of T places, N query heads and K key-value heads of width D, a multiple of `WIDTH`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from knowledge_engine.compiled import IN_ANY_ORDER, KEPT, OPTIONS, SIZE, WIDE, WIDTH, WORD, everywhere, exp, sum_up

STRIP = 6
"""Rows of a tile: with two vectors side by side its sums fill twelve of the sixteen registers that AVX2 has."""
_BLOCK = 8 * STRIP
"""Rows whose scores are kept until the gradients of keys and values are taken of all of them."""
_CHUNK = 16_384
DROPOUT_PARTS = 4
"""Sums over rows are taken in so many parts, however many threads there are: they come out the same."""
_ROW_PARTS = 32
_MOST_THREADS = get_num_threads()
_NEVER = np.float32(-1e30)
"""The score of what comes later; no share is left of it."""

_F32 = np.float32
_FLOAT = ir.FloatType()


# --- tiles --------------------------------------------------------------------------------------------------------


def _make_tile(*, adds: bool) -> Any:
    """C (STRIP, WIDTH) = A (STRIP, n) B (n, WIDTH), or added to what is there. All are flat arrays; of each it is said
    where the tile begins, and how far apart its rows lie, of A its columns as well."""

    @intrinsic
    def tile(
        typingctx: Any, c: Any, c_at: Any, c_row: Any, a: Any, a_at: Any, a_row: Any, a_column: Any, b: Any, b_at: Any,
        b_row: Any, n: Any,
    ) -> Any:  # fmt: skip
        size = types.intp
        signature = types.void(c, size, size, a, size, size, size, b, size, size, size)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            c, a, b = (context.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 3, 7))
            _, c_at, c_row, _, a_at, a_row, a_column, _, b_at, b_row, n = args
            kind = ir.FunctionType(WIDE, [WIDE, WIDE, WIDE])
            multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32")
            results = [
                _vector_at(builder, builder.gep(c, [builder.add(c_at, builder.mul(c_row, SIZE(row)))]))
                for row in range(STRIP)
            ]
            rows = [builder.gep(a, [builder.add(a_at, builder.mul(a_row, SIZE(row)))]) for row in range(STRIP)]
            start = builder.gep(b, [b_at])

            def body(at: Any, totals: list[Any]) -> list[Any]:
                of_b = _load_vector(builder, _vector_at(builder, builder.gep(start, [builder.mul(at, b_row)])))
                place = builder.mul(at, a_column)
                of_a = [everywhere(builder, builder.load(builder.gep(row, [place])), WIDTH) for row in rows]
                return [
                    builder.call(multiply_add, [value, of_b, total]) for value, total in zip(of_a, totals, strict=True)
                ]

            nothing = ir.Constant(WIDE, None)
            totals = [_load_vector(builder, result) if adds else nothing for result in results]
            for result, total in zip(results, sum_up(builder, (SIZE(0), n, 1), totals, body), strict=True):
                builder.store(total, result).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _vector_at(builder: ir.IRBuilder, pointer: Any) -> Any:
    return builder.bitcast(pointer, WIDE.as_pointer())


def _load_vector(builder: ir.IRBuilder, pointer: Any) -> Any:
    value = builder.load(pointer)
    value.align = 4
    return value


_set_tile, _add_tile = _make_tile(adds=False), _make_tile(adds=True)


def _largest_of(typingctx: Any, x: Any, at: Any, n: Any) -> Any:
    """Of n numbers of x from `at` on, a multiple of WIDTH; one that is none is passed on."""
    signature = types.float32(x, types.intp, types.intp)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        start = builder.gep(data, [args[1]])

        def larger(one: Any, other: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", one, other), one, other)

        def body(at: Any, totals: list[Any]) -> list[Any]:
            return [larger(totals[0], _load_vector(builder, _vector_at(builder, builder.gep(start, [at]))))]

        least = ir.Constant(WIDE, [_FLOAT(float(_NEVER))] * WIDTH)
        (top,) = sum_up(builder, (SIZE(0), args[2], WIDTH), [least], body)
        while top.type.count > 1:
            half = top.type.count // 2
            nothing = ir.Constant(top.type, ir.Undefined)
            masks = ([WORD(first + k) for k in range(half)] for first in (0, half))
            top = larger(
                *(builder.shuffle_vector(top, nothing, ir.Constant(ir.VectorType(WORD, half), mask)) for mask in masks)
            )
        return builder.extract_element(top, WORD(0))

    return signature, codegen


_largest: Any = intrinsic(_largest_of)


# --- attention ----------------------------------------------------------------------------------------------------


@njit(**KEPT, parallel=True)
def attend(q: Any, k: Any, v: Any, index: Any, starts: Any, lengths: Any, scaling: Any, out: Any, lse: Any) -> None:
    """Causal attention: q (U, N, D), k and v (U, K, D) -> out (U, N, D), and the logarithms of the sums of exponentials
    (U, N). Example b has the tokens index[b, : lengths[b]], of which the first starts[b] are an earlier one's as well:
    their queries are left to that one."""
    num_groups = k.shape[1]
    for task in prange(len(index) * num_groups):
        b = task // num_groups
        _attend(q, k, v, index[b, : lengths[b]], starts[b], scaling, out, lse, task % num_groups)


@njit(**OPTIONS)
def _attend(q: Any, k: Any, v: Any, tokens: Any, start: Any, scaling: Any, out: Any, lse: Any, group: Any) -> None:
    """One example's queries of the heads that read one head's keys."""
    length, width, num_heads = len(tokens), q.shape[2], q.shape[1] // k.shape[1]
    room = (length + WIDTH - 1) // WIDTH * WIDTH
    keys, values = np.zeros(room * width, np.float32), np.empty(length * width, np.float32)
    _lay_panels(k, tokens, group, keys)
    _lay(v, tokens, group, values)
    queries = np.zeros((length + STRIP) * width, np.float32)
    scores, mixed = np.empty(STRIP * room, np.float32), np.empty(STRIP * width, np.float32)
    shares = np.empty(STRIP, np.float32)
    for head in range(group * num_heads, (group + 1) * num_heads):
        _lay(q, tokens[start:], head, queries)
        for first in range(start, length, STRIP):
            end = min(first + STRIP, length)
            seen = (end + WIDTH - 1) // WIDTH * WIDTH
            for j in range(0, seen, WIDTH):
                _set_tile(scores, j, room, queries, (first - start) * width, width, 1, keys, j * width, WIDTH, width)
            for row in range(end - first):
                at = row * room
                scores[at + first + row + 1 : at + seen] = _NEVER
                top = _largest(scores, at, seen) * scaling
                total = _exponentials(scores[at : at + seen], scaling, top)
                shares[row] = _F32(1) / total
                lse[tokens[first + row], head] = top + _F32(math.log(total))
            for d in range(0, width, WIDTH):
                _set_tile(mixed, d, width, scores, 0, room, 1, values, d, width, end)
            for row in range(end - first):
                to, part, share = out[tokens[first + row], head], mixed[row * width :], shares[row]
                for d in range(width):
                    to[d] = part[d] * share


@njit(**KEPT, parallel=True)
def attend_backward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, grad: Any, index: Any, starts: Any, lengths: Any, scaling: Any,
    grad_q: Any, grad_k: Any, grad_v: Any,
) -> None:  # fmt: skip
    """The gradients, of `attend`'s inputs and results and the gradient of `out`: grad_q (U, N, D), and of every example
    by itself grad_k and grad_v (B, T, K, D), which are set up to its length."""
    num_groups = k.shape[1]
    for task in prange(len(index) * num_groups):
        b = task // num_groups
        tokens, group = index[b, : lengths[b]], task % num_groups
        _attend_backward(q, k, v, out, lse, grad, tokens, starts[b], scaling, grad_q, grad_k[b], grad_v[b], group)


@njit(**OPTIONS)
def _attend_backward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, grad: Any, tokens: Any, start: Any, scaling: Any, grad_q: Any,
    grad_k: Any, grad_v: Any, group: Any,
) -> None:  # fmt: skip
    length, width, num_heads = len(tokens), q.shape[2], q.shape[1] // k.shape[1]
    room = (length + WIDTH - 1) // WIDTH * WIDTH + WIDTH
    keys, values = np.zeros(room * width, np.float32), np.zeros(room * width, np.float32)
    _lay_panels(k, tokens, group, keys)
    _lay_panels(v, tokens, group, values)
    keys_by_row = np.empty(length * width, np.float32)
    _lay(k, tokens, group, keys_by_row)
    of_keys, of_values = np.zeros(room * width, np.float32), np.zeros(room * width, np.float32)
    queries = np.zeros((length + _BLOCK) * width, np.float32)
    gradients = np.zeros((length + _BLOCK) * width, np.float32)
    shares, of_scores = np.zeros(_BLOCK * room, np.float32), np.zeros(_BLOCK * room, np.float32)
    of_queries = np.empty(STRIP * width, np.float32)
    for head in range(group * num_heads, (group + 1) * num_heads):
        _lay(q, tokens[start:], head, queries)
        _lay(grad, tokens[start:], head, gradients)
        for block in range(start, length, _BLOCK):
            block_end = min(block + _BLOCK, length)
            for first in range(block, block_end, STRIP):
                end, at, row_at = min(first + STRIP, length), (first - block) * room, (first - start) * width
                for j in range(0, end, WIDTH):
                    _set_tile(shares, at + j, room, queries, row_at, width, 1, keys, j * width, WIDTH, width)
                    _set_tile(of_scores, at + j, room, gradients, row_at, width, 1, values, j * width, WIDTH, width)
                for row in range(STRIP):
                    begin, seen = at + row * room, 0
                    if first + row < end:
                        token, seen = tokens[first + row], first + row + 1
                        part, of_part = shares[begin : begin + seen], of_scores[begin : begin + seen]
                        _exponentials(part, scaling, lse[token, head])
                        _score_gradients(part, of_part, _dot(grad[token, head], out[token, head]), scaling)
                    shares[begin + seen : begin + room] = _F32(0)
                    of_scores[begin + seen : begin + room] = _F32(0)
                for d in range(0, width, WIDTH):
                    _set_tile(of_queries, d, width, of_scores, at, room, 1, keys_by_row, d, width, end)
                for row in range(end - first):
                    grad_q[tokens[first + row], head, :] = of_queries[row * width : (row + 1) * width]
            num_rows, row_at = block_end - block, (block - start) * width
            for j in range(0, block_end, STRIP):
                for d in range(0, width, WIDTH):
                    at = j * width + d
                    _add_tile(of_values, at, width, shares, j, 1, room, gradients, row_at + d, width, num_rows)
                    _add_tile(of_keys, at, width, of_scores, j, 1, room, queries, row_at + d, width, num_rows)
    for j in range(length):
        grad_k[j, group, :] = of_keys[j * width : (j + 1) * width]
        grad_v[j, group, :] = of_values[j * width : (j + 1) * width]


@njit(**OPTIONS)
def _lay(x: Any, tokens: Any, head: Any, out: Any) -> None:
    """These tokens of x (U, heads, D) one behind the other."""
    width = x.shape[2]
    for j in range(len(tokens)):
        out[j * width : (j + 1) * width] = x[tokens[j], head]


@njit(**OPTIONS)
def _lay_panels(x: Any, tokens: Any, head: Any, out: Any) -> None:
    """The same with WIDTH tokens side by side: (D, WIDTH) of the first ones, then of the next."""
    width = x.shape[2]
    for j in range(len(tokens)):
        row, panel = x[tokens[j], head], out[j // WIDTH * WIDTH * width + j % WIDTH :]
        for d in range(width):
            panel[d * WIDTH] = row[d]


@njit(**IN_ANY_ORDER)
def _exponentials(x: Any, scaling: Any, top: Any) -> Any:
    """x becomes exp(x scaling - top), no more than 1 but for rounding; its sum."""
    total = _F32(0)
    for j in range(len(x)):
        x[j] = exp(x[j] * scaling - top)
        total += x[j]
    return total


@njit(**IN_ANY_ORDER)
def _score_gradients(shares: Any, x: Any, delta: Any, scaling: Any) -> None:
    for j in range(len(x)):
        x[j] = shares[j] * (x[j] - delta) * scaling


@njit(**IN_ANY_ORDER)
def _dot(x: Any, y: Any) -> Any:
    total = _F32(0)
    for d in range(len(x)):
        total += x[d] * y[d]
    return total


# --- positions ------------------------------------------------------------------------------------------------------


@njit(**KEPT, parallel=True)
def rotate(x: Any, cos: Any, sin: Any) -> None:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of x (U, N, D), in its place; cos and sin are (U, D / 2)."""
    for token in prange(len(x)):
        for head in range(x.shape[1]):
            _rotate(x[token, head], cos[token], sin[token])


@njit(**OPTIONS)
def _rotate(x: Any, cos: Any, sin: Any) -> None:
    half = len(cos)
    for d in range(half):
        left, right = x[d], x[half + d]
        x[d] = left * cos[d] - right * sin[d]
        x[half + d] = right * cos[d] + left * sin[d]


# --- norms --------------------------------------------------------------------------------------------------------


@njit(**KEPT, parallel=True)
def norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """Of every row of x (M, H), out = weight x / sqrt(mean(x^2) + eps)."""
    for row in prange(len(x)):
        _norm(x[row], weight, eps, out[row])


@njit(**OPTIONS)
def _norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    inverse = _inverse(x, eps)
    for i in range(len(x)):
        out[i] = x[i] * inverse * weight[i]


@njit(**KEPT, parallel=True)
def norm_backward(x: Any, weight: Any, eps: Any, grad: Any) -> None:
    """The gradient of x (M, H) takes the place of that of `norm`'s result."""
    for row in prange(len(x)):
        _norm_backward(x[row], weight, eps, grad[row])


@njit(**IN_ANY_ORDER)
def _norm_backward(x: Any, weight: Any, eps: Any, grad: Any) -> None:
    inverse, along = _inverse(x, eps), _F32(0)
    for i in range(len(x)):
        along += grad[i] * weight[i] * x[i]
    along *= inverse * inverse * inverse / _F32(len(x))
    for i in range(len(x)):
        grad[i] = grad[i] * weight[i] * inverse - x[i] * along


@njit(**OPTIONS)
def _inverse(x: Any, eps: Any) -> Any:
    """1 / sqrt(mean(x^2) + eps)"""
    return _F32(1) / _F32(math.sqrt(_dot(x, x) / _F32(len(x)) + eps))


# --- SwiGLU -------------------------------------------------------------------------------------------------------


@njit(**KEPT, parallel=True)
def gate(gated: Any, raised: Any, out: Any) -> None:
    """out = silu(gated) raised, flat."""
    for chunk in prange((len(out) + _CHUNK - 1) // _CHUNK):
        part = slice(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(out)))
        _gate(gated[part], raised[part], out[part])


@njit(**OPTIONS)
def _gate(gated: Any, raised: Any, out: Any) -> None:
    for i in range(len(out)):
        out[i] = gated[i] * _sigmoid(gated[i]) * raised[i]


@njit(**KEPT, parallel=True)
def gate_backward(gated: Any, raised: Any, grad: Any, grad_raised: Any, product: Any) -> None:
    """Of the gradient of what `gate` gives those of its inputs, and what it gave, once more; the gradient of `gated`
    takes the place of `grad`."""
    for chunk in prange((len(grad) + _CHUNK - 1) // _CHUNK):
        part = slice(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(grad)))
        _gate_backward(gated[part], raised[part], grad[part], grad_raised[part], product[part])


@njit(**OPTIONS)
def _gate_backward(gated: Any, raised: Any, grad: Any, grad_raised: Any, product: Any) -> None:
    for i in range(len(grad)):
        x, of_product = gated[i], grad[i]
        share = _sigmoid(x)
        product[i] = x * share * raised[i]
        grad_raised[i] = x * share * of_product
        grad[i] = of_product * raised[i] * share * (_F32(1) + x * (_F32(1) - share))


@njit(inline="always", **OPTIONS)
def _sigmoid(x: Any) -> Any:
    small = exp(-abs(x))
    return (_F32(1) if x >= _F32(0) else small) / (_F32(1) + small)


# --- dropout ------------------------------------------------------------------------------------------------------


@njit(**KEPT, parallel=True)
def take_from_product(x: Any, a: Any, places: Any, low: Any) -> None:
    """Of x (M, I), a (I, r) and places in x, in order: takes their part out of the product low (M, r)."""
    for part in prange(_ROW_PARTS):
        _take_from_product(x, a, places, _part_of(len(x), part, _ROW_PARTS), low)


@njit(**OPTIONS)
def _take_from_product(x: Any, a: Any, places: Any, rows: Any, low: Any) -> None:
    width = x.shape[1]
    at = np.searchsorted(places, rows[0] * width)
    for row in range(rows[0], rows[1]):
        while at < len(places) and places[at] < (row + 1) * width:
            i = places[at] - row * width
            value = x[row, i]
            for j in range(low.shape[1]):
                low[row, j] -= value * a[i, j]
            at += 1


@njit(**KEPT, parallel=True)
def take_from_input(grad_low: Any, a: Any, places: Any, grad_x: Any) -> None:
    """Of grad_low (M, r) and a (I, r): takes their product out of grad_x (M, I) at these places."""
    for part in prange(_ROW_PARTS):
        _take_from_input(grad_low, a, places, _part_of(len(grad_x), part, _ROW_PARTS), grad_x)


@njit(**OPTIONS)
def _take_from_input(grad_low: Any, a: Any, places: Any, rows: Any, grad_x: Any) -> None:
    width = grad_x.shape[1]
    at = np.searchsorted(places, rows[0] * width)
    for row in range(rows[0], rows[1]):
        while at < len(places) and places[at] < (row + 1) * width:
            i = places[at] - row * width
            grad_x[row, i] -= _dot(grad_low[row], a[i])
            at += 1


@njit(**KEPT, parallel=True)
def take_from_weights(x: Any, grad_low: Any, places: Any, parts: Any) -> None:
    """Of x (M, I) at these places and grad_low (M, r): takes their products out of parts (DROPOUT_PARTS, I, r)."""
    for part in prange(DROPOUT_PARTS):
        _take_from_weights(x, grad_low, places, _part_of(len(x), part, DROPOUT_PARTS), parts[part])


@njit(**OPTIONS)
def _take_from_weights(x: Any, grad_low: Any, places: Any, rows: Any, out: Any) -> None:
    width = x.shape[1]
    at = np.searchsorted(places, rows[0] * width)
    for row in range(rows[0], rows[1]):
        while at < len(places) and places[at] < (row + 1) * width:
            i = places[at] - row * width
            value = x[row, i]
            for j in range(out.shape[1]):
                out[i, j] -= value * grad_low[row, j]
            at += 1


@njit(**OPTIONS)
def _part_of(num_rows: Any, part: Any, num_parts: Any) -> Any:
    return num_rows * part // num_parts, num_rows * (part + 1) // num_parts


def warm_up(num_threads: int) -> None:
    """Compiles what is not kept yet, which takes some ten seconds once, and works with so many threads from now on."""
    set_num_threads(min(num_threads, _MOST_THREADS))
    heads, row, one = np.zeros((1, 1, WIDTH), np.float32), np.zeros((1, WIDTH), np.float32), np.ones(1, np.int64)
    index, scaling = np.zeros((1, 1), np.int64), _F32(1)
    found, lse = heads.copy(), np.zeros((1, 1), np.float32)
    attend(heads, heads, heads, index, 0 * one, one, scaling, found, lse)
    attend_backward(
        heads, heads, heads, found, lse, heads, index, 0 * one, one, scaling, heads.copy(), heads[None].copy(),
        heads[None].copy(),
    )  # fmt: skip
    rotate(heads.copy(), row[:, : WIDTH // 2].copy(), row[:, : WIDTH // 2].copy())
    norm(row, row[0], scaling, row.copy())
    norm_backward(row, row[0], scaling, row.copy())
    gate(row[0], row[0], row[0].copy())
    gate_backward(row[0], row[0], row[0].copy(), row[0].copy(), row[0].copy())
    parts = np.zeros((DROPOUT_PARTS, WIDTH, WIDTH), np.float32)
    for take, other, out in (
        (take_from_product, parts[0], row),
        (take_from_input, parts[0], row),
        (take_from_weights, row, parts),
    ):
        take(row, other, one[:0], out.copy())
