"""What several stores on disk need: a file's digest, durability, room, a JSON object that may be missing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from knowledge_engine.errors import CapacityError, Reason

RESERVE_BYTES = 10**9
"""What a download leaves free on the disk, for the state store above all."""


def sha256_of(path: Path) -> str:
    """Hex digest of the content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def demand_space(folder: Path, needed_bytes: int) -> None:
    """Raises CapacityError: DISK_FULL, when a download of so many bytes into `folder` would not fit."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > 0 and free < needed_bytes + RESERVE_BYTES:
        raise CapacityError(
            f"the disk of KNOWLEDGE_DATA_DIR has {free / 1e9:.1f} GB free and the download needs "
            f"{(needed_bytes + RESERVE_BYTES) / 1e9:.1f} GB, 1 GB of it as a reserve; make room, or set "
            "KNOWLEDGE_DATA_DIR to a larger disk",
            reason=Reason.DISK_FULL,
            free_bytes=free,
            needed_bytes=needed_bytes,
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is missing, cannot be read, or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
