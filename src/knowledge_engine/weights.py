"""What a file of weights holds, read without torch: whether every number in it is one. The format does not check that.

A safetensors file is the length of a JSON header in 8 bytes, the header (for each tensor dtype, shape and where its
bytes lie), and the bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from knowledge_engine.errors import IntegrityError, KnowledgeEngineError, Reason

_EXPONENT_BITS = {"F64": (8, 0x7FF0_0000_0000_0000), "F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
"""Bytes of a number, and the bits that are all set in an infinity or a NaN, and in nothing else."""
_MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 2**24


def demand_finite_weights(path: Path) -> None:
    """Reads the whole file, in pieces.

    Raises:
        KnowledgeEngineError: NON_FINITE, naming the tensor.
        IntegrityError: MODEL_VERSION_CORRUPT, it is no safetensors file.
    """
    tensors, start = _header(path)
    for name, tensor in sorted(tensors.items()):
        first, last = tensor["data_offsets"]
        if tensor["dtype"] in _EXPONENT_BITS and not _is_finite(path, tensor["dtype"], start + first, last - first):
            raise KnowledgeEngineError(
                f"{path.name} cannot be published: {name} holds a value that is no number; a lower learning_rate "
                "usually helps",
                reason=Reason.NON_FINITE,
                file=path.name,
                quantity=name,
            )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors by name, and where their bytes begin."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("its header is cut off")
            tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        start = 8 + length
        if any(not 0 <= a <= b <= size - start for a, b in (tensor["data_offsets"] for tensor in tensors.values())):
            raise ValueError("its tensors are cut off")
        if any(not isinstance(tensor["dtype"], str) for tensor in tensors.values()):
            raise ValueError("a tensor has no type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path.name} cannot be published: it is no file of weights ({str(error)[:100]})",
            reason=Reason.MODEL_VERSION_CORRUPT,
            file=path.name,
        ) from error
    return tensors, start


def _is_finite(path: Path, dtype: str, begin: int, length: int) -> bool:
    import numpy as np  # only where something is published, which the slim image never does

    width, bits = _EXPONENT_BITS[dtype]
    with path.open("rb") as file:
        file.seek(begin)
        while length > 0:
            piece = file.read(min(length, _PIECE_BYTES))
            if not piece:
                return False
            length -= len(piece)
            words = np.frombuffer(piece, dtype=f"<u{width}", count=len(piece) // width)
            if ((words & bits) == bits).any():
                return False
    return True
