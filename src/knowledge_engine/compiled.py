"""What the kernels that numba compiles for this machine share: how they are compiled, and vectors in LLVM's IR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

# Fused multiply-add is the one liberty that the compiler has: it rounds once instead of twice, in every row alike.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
# And here the order of a sum, which it chooses once, for all rows.
IN_ANY_ORDER = OPTIONS | {"fastmath": {"contract", "reassoc", "nsz"}}
# Only what Python calls is kept on the disk, and nothing kept calls another: what numba 0.68 compiles beside a kept
# function with a parallel loop crashes once it is kept itself.
KEPT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}

BYTE, WORD, SIZE = (ir.IntType(bits) for bits in (8, 32, 64))
WIDTH = 16
"""Floating-point numbers side by side, on every CPU."""
WIDE = ir.VectorType(ir.FloatType(), WIDTH)

_F32 = np.float32
_SMALLEST = _F32(-87.0)  # e to the power of less is no normal number any more


def load(builder: ir.IRBuilder, pointer: Any, at: Any, kind: Any, align: int) -> Any:
    """What lies so many bytes after the pointer."""
    value = builder.load(builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer()))
    value.align = align
    return value


def sum_up(
    builder: ir.IRBuilder, bounds: tuple[Any, Any, int], totals: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """A loop over an index (from, to, by), taken once at least: what `body` makes of the index and the totals so far,
    in the end."""
    begin, end, step = bounds
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(SIZE)
    sums = [builder.phi(total.type) for total in totals]
    added = body(at, sums)
    following = builder.add(at, SIZE(step))
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    at.add_incoming(begin, before)
    at.add_incoming(following, loop)
    for total, first, more in zip(sums, totals, added, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(more, loop)
    builder.position_at_end(after)
    return added


def everywhere(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    """A vector with this value in every place."""
    nothing = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    mask = ir.Constant(ir.VectorType(WORD, count), [WORD(0)] * count)
    return builder.shuffle_vector(builder.insert_element(nothing, value, WORD(0)), nothing, mask)


@njit(inline="always", **OPTIONS)
def exp(x: Any) -> Any:
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
